#!/usr/bin/env python
"""Accuracy of every method on PhotoDigits: many runs of tools/train_net.py, and a table for docs/accuracy.md.

    python benchmarks/accuracy.py --length short --seeds 1 2 3 --jobs 2
    python benchmarks/accuracy.py --length long --seeds 1 --only baseline "inherit only" FeatureMimic
    python benchmarks/accuracy.py --tune --jobs 2
    python benchmarks/accuracy.py --suite classification --seeds 1 2 3
    python benchmarks/accuracy.py --length long --evaluate-only

A suite is a teacher, a student and the ways to distil it; `--suite mobilenet` has the teacher of `--suite detection`.
Teacher and baseline are shared by all methods. `--tune` tries the same number of weights for each of them, at the short
length and with a seed that the tables do not use; what came out best is what configs/PhotoDigits says. What is finished
is not repeated, so the program can be stopped and started, and seeds or methods added later. The tables are made of all
finished runs, and of those of the same teacher and dataset that benchmarks/results/accuracy.json has from elsewhere.

Every finished run is evaluated on val, by which weights are chosen, and on test, which the tables report: into its
folder `evaluation`, and again where the dataset has become another one. `--evaluate-only` does no more than that.
Differences are paired by seed, those of one seed are drawn over images; where 0 is in their interval they are called
noise. A detector that ends below a twentieth of its teacher's AP has diverged: the table counts it, and no mean has it.
`table.json` beside the runs has all of it.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accuracy_runs import Bench
from accuracy_tables import summary, table, tuning_table
from suites import FACTORS, SUITES, tuned

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.engine import log_runtime
from d2kd.files import write_json
from detectron2.utils.logger import setup_logger

logger = logging.getLogger("d2kd.benchmarks.accuracy")

#: What has the tables, and what those of `--tune`.
TABLES, TRIALS = Path("docs/accuracy.md"), Path("docs/experiments.md")


def insert(text: str, marker: str, document: Path) -> None:
    """Puts the table between `<!-- marker -->` and `<!-- /marker -->` of a document."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    head, _, rest = document.read_text(encoding="utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    temporary = document.with_suffix(".tmp")
    temporary.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
    temporary.replace(document)


def main() -> None:
    """Runs what is missing, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="detection", help="what is trained (default: detection)")
    lengths = list(dict.fromkeys(length for suite in SUITES.values() for length in suite.lengths))
    parser.add_argument("--length", choices=lengths, default="short")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows to run")
    parser.add_argument("--no-ablations", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    parser.add_argument("--output", type=Path, default=Path("output/accuracy"), help="folder of all suites")
    parser.add_argument("--tune", action="store_true", help="try weights, with a seed of its own, instead")
    parser.add_argument("--evaluate-only", action="store_true", help="train nothing: evaluate what is finished")
    parser.add_argument("--cache", action="store_true", help="keep the teacher's features: as accurate, to the bit")
    parser.add_argument("--no-document", action="store_true", help="leave documents and records as they are")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the configuration of all runs")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    if args.length not in suite.lengths:
        parser.error(f"--length {args.length}: the suite {args.suite} has {', '.join(suite.lengths)}")
    unknown = [name for name in args.only or () if name not in suite.entries]
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: the suite {args.suite} has {', '.join(suite.entries)}")
    if args.tune and args.length != "short":
        parser.error("--tune is for --length short")
    setup_logger(name="d2kd")
    log_runtime()
    data = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "photo_digits")
    if "DETECTRON2_DATASETS" not in os.environ or not (data / "test").is_dir():
        subprocess.run([sys.executable, "datasets/prepare_photo_digits.py", "--output", str(data)], check=True)
    train = not args.evaluate_only
    bench = Bench(suite, args.length, args.output, args.threads, args.opts, data, train, args.cache)
    names = [n for n in args.only or suite.entries if not (args.no_ablations and suite.entries[n].ablation)]
    if args.tune:
        names = [n for n in names if n in tuned(suite)]
    pool = ThreadPoolExecutor(args.jobs)
    try:
        # in the pool all of them: Ctrl-C in the main thread would kill a run that is about to save
        teacher = pool.submit(bench.teacher, any(name.startswith("ReceptiveTokens") for name in names))
        alone = [pool.submit(bench.student, n, s) for s in args.seeds for n in names if not suite.entries[n].distils]
        rest = [pool.submit(*call) for call in distilled_runs(bench, names, args)] if teacher.result() else []
        failed = sum(not job.result() for job in [teacher, *alone, *rest])
    except KeyboardInterrupt:
        logger.warning("Stopped: the runs of now are saving, no others start.")
        pool.shutdown(cancel_futures=True)
        sys.exit(130)
    if not teacher.result():
        sys.exit(1)
    text = tuning_table(bench) if args.tune else conclude(bench)
    logger.info("\n%s", text)
    document = TRIALS if args.tune else TABLES
    if text and document.is_file() and not args.no_document:
        if not args.tune:
            bench.record()
        insert(text, f"{suite.marker} {'tuning' if args.tune else args.length}", document)
    sys.exit(1 if failed else 0)


def conclude(bench: Bench) -> str:
    """Writes `table.json`, and returns the table; "" where no run is finished."""
    content = summary(bench)
    if not content["rows"]:
        logger.warning("No run of %s is finished.", bench.root)
        return ""
    plain = json.loads(json.dumps(content, default=lambda found: {**vars(found), "within_noise": found.within_noise}))
    write_json(bench.root / "table.json", plain)
    return table(bench, content)


def distilled_runs(bench: Bench, names: Sequence[str], args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """The runs that need the teacher, as functions with their arguments."""
    if args.tune:
        return [(bench.trial, n, factor) for factor in FACTORS for n in names]
    return [(bench.student, n, s) for s in args.seeds for n in names if bench.suite.entries[n].distils]


if __name__ == "__main__":
    main()
