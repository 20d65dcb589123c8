#!/usr/bin/env python
"""Accuracy of every method on PhotoDigits: many runs of tools/train_net.py, and a table for docs/benchmarks.md.

    python benchmarks/accuracy.py --length short --seeds 1 2 3 --jobs 2
    python benchmarks/accuracy.py --length long --seeds 1 --only baseline "inherit only" FeatureMimic
    python benchmarks/accuracy.py --tune --jobs 2
    python benchmarks/accuracy.py --suite classification --seeds 1 2 3
    python benchmarks/accuracy.py --length long --evaluate-only

A suite is a teacher, a student and the ways to distil it; `--suite mobilenet` has the teacher of `--suite detection`.
Teacher and baseline are shared by all methods. `--tune` tries the same number of weights for each of them, at the short
length and with a seed that the tables do not use; what came out best is what configs/PhotoDigits says. What is finished
is not repeated, so the program can be stopped and started, and seeds or methods added later. The tables are made of all
finished runs.

Every finished run is evaluated on val, by which weights are chosen, and on test, which the tables report: into its
folder `evaluation`, and again where the dataset has become another one. `--evaluate-only` does no more than that.
Differences are paired by seed, those of one seed are drawn over images; where 0 is in their interval they are called
noise. `table.json` beside the runs has all of it.
"""

import argparse
import functools
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from suites import FACTORS, SUITES, TUNED, TUNING_SEED, Suite, tuned

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.config import add_distill_config
from d2kd.engine import log_runtime
from d2kd.evaluation.image_bootstrap import bootstrap_difference, coco_matches
from d2kd.evaluation.statistics import Estimate, estimate, gap_closure, paired_difference
from d2kd.files import write_json
from detectron2.config import get_cfg
from detectron2.utils.logger import setup_logger

logger = logging.getLogger("d2kd.benchmarks.accuracy")

CONFIGS = Path("configs/PhotoDigits")
DOCUMENT = Path("docs/benchmarks.md")
SPLITS = ("val", "test")  # the first one chooses weights, the second one is reported


class Bench:
    """The runs of one suite and length, in one directory."""

    def __init__(
        self, suite: Suite, length: str, output: Path, threads: int, options: list[str], data: Path, trains: bool = True
    ) -> None:
        self.suite = suite
        self.length = suite.lengths[length]
        self.data = data
        self.trains = trains
        self.root = output / suite.folder / length
        self.teacher_folder = output / suite.teacher_folder / length / "teacher"
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        self.options = options

    def run(self, directory: Path, command: Sequence[Any], result: str = "result.json") -> bool:
        """Runs a tool with `directory` for its output unless `result` is there; returns whether it is now."""
        line = [*map(str, command), *self.options, "OUTPUT_DIR", str(directory)]
        record = directory / "command.json"
        if record.is_file() and json.loads(record.read_text()) != line:
            logger.error("%s was made by another command: see %s; remove it to repeat it", directory, record)
            return False
        if not (directory / result).is_file():
            directory.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(line))
            logger.info("start %s", directory)
            with open(directory / "console.txt", "a", encoding="utf-8") as console:
                subprocess.run([sys.executable, *line], env=self.environment, stdout=console, stderr=subprocess.STDOUT)
        if not (directory / result).is_file():
            logger.error("%s failed: see %s", directory, directory / "console.txt")
            return False
        return True

    def evaluate(self, directory: Path, config: str, options: Sequence[Any], splits: Sequence[str] = SPLITS) -> bool:
        """Scores a finished run on parts of the dataset, unless that was done on this very dataset since it ended."""
        folder, names = directory / "evaluation", [f"{self.suite.dataset}_{split}" for split in splits]
        result, seen, dataset = folder / "result.json", folder / "dataset.json", checksum(self.data)
        folder.mkdir(exist_ok=True)
        if (
            not seen.is_file()
            or json.loads(seen.read_text()) != dataset
            or not newer(result, directory / "result.json")
        ):
            result.unlink(missing_ok=True)
            seen.write_text(json.dumps(dataset))
        command = ["tools/train_net.py", "--eval-only", "--config-file", CONFIGS / f"{config}.yaml"]
        command += ["MODEL.WEIGHTS", directory / "model_final.pth", *options, "DATASETS.TEST", names]
        if not self.run(folder, command):
            return False
        scores = ", ".join(f"{score:.1f} on {split}" for split, score in self.scores(directory).items())
        logger.info("%s: %s %s", directory, self.suite.called, scores)
        return True

    def _left_out(self, directory: Path) -> bool:
        """Whether a run is not to be trained now, and has not been."""
        return not self.trains and not (directory / "result.json").is_file()

    def teacher(self, tokens: bool) -> bool:
        """Trains and evaluates the teacher, and learns its tokens where they are needed."""
        if self._left_out(self.teacher_folder):
            return True
        steps = ["SOLVER.MAX_ITER", self.length.teacher, "SOLVER.IMS_PER_BATCH", self.length.teacher_images]
        command: list[Any] = ["tools/train_net.py", "--resume", "--config-file", CONFIGS / f"{self.suite.teacher}.yaml"]
        if self.suite.grand_teacher:
            config, folder = (
                CONFIGS / f"{self.suite.grand_teacher}.yaml",
                self.teacher_folder.with_name("grand_teacher"),
            )
            if not self.run(folder, [*command[:-1], config, "TEST.EVAL_PERIOD", 0]):
                return False
            command += ["--teacher-config", config, "--teacher-weights", folder / "model_final.pth"]
            steps += ["DISTILL.TEACHER.EVAL_FIRST", False]
        if not self.run(self.teacher_folder, [*command, *steps, "TEST.EVAL_PERIOD", 0]):
            return False
        if not self.evaluate(self.teacher_folder, self.suite.teacher, []):
            return False
        tokens_file = CONFIGS / f"{self.suite.teacher}_tokens.yaml"
        command = ["tools/learn_tokens.py", "--resume", "--config-file", tokens_file]
        weights = ["MODEL.WEIGHTS", self.teacher_folder / "model_final.pth"]
        return not (tokens and self.trains) or self.run(self.root / "tokens", [*command, *weights], result="tokens.pth")

    def student(self, name: str, seed: int, trial: str = "", changes: Sequence[Any] = ()) -> bool:
        """Trains and evaluates one student, in the folder of its row and seed, or that of a trial, with its changes."""
        entry = self.suite.entries[name]
        directory = self.root / (trial or f"{slug(name)}/seed{seed}")
        if self._left_out(directory):
            return True
        command: list[Any] = ["tools/train_net.py", "--resume", "--config-file", CONFIGS / f"{entry.config}.yaml"]
        iterations = self.length.student * entry.times
        options = ["SEED", seed, "SOLVER.MAX_ITER", iterations, "TEST.EVAL_PERIOD", 0, *entry.options]
        if self.suite.sets_images:
            options += ["SOLVER.IMS_PER_BATCH", self.length.student_images]
        if entry.distils:
            command += ["--teacher-config", CONFIGS / f"{self.suite.teacher}.yaml"]
            command += ["--teacher-weights", self.teacher_folder / "model_final.pth"]
            options += ["DISTILL.TEACHER.EVAL_FIRST", False]
        if name == "ReceptiveTokens":
            options += ["DISTILL.RECEPTIVE_TOKENS.FILE", self.root / "tokens/tokens.pth"]
        splits = SPLITS[:1] if trial else SPLITS  # what chooses must not see test
        return self.run(directory, [*command, *options, *changes]) and self.evaluate(
            directory, entry.config, entry.options, splits
        )

    def trial(self, name: str, factor: float) -> bool:
        """Trains one student with what `TUNED` names at `factor` times its default."""
        value = default(TUNED[name]) * factor
        return self.student(name, TUNING_SEED, trial_directory(name, value), [TUNED[name], value])

    def scores(self, directory: Path) -> dict[str, float]:
        """The suite's metric of an evaluated run, in percent, by split; NaN where it has none, {} before."""
        path = directory / "evaluation/result.json"
        if not path.is_file():
            return {}
        task, _, name = self.suite.metric.partition("/")
        result = json.loads(path.read_text())
        values = {n: result["metrics"].get(n, result["metrics"])[task][name] for n in result["datasets"]}
        return {n.rpartition("_")[2]: math.nan if value is None else value for n, value in values.items()}

    def finished(self, name: str) -> dict[int, dict[str, float]]:
        """The scores of every evaluated seed of a row, by seed and split."""
        folders = {int(path.name.removeprefix("seed")): path for path in (self.root / slug(name)).glob("seed*")}
        scores = {seed: self.scores(folders[seed]) for seed in sorted(folders)}
        done = [seed for seed, found in scores.items() if "test" in found]
        same = [seed for seed in done if without_seed(folders[seed]) == without_seed(folders[done[0]])]
        for seed in set(done) - set(same):
            logger.error("%s differs from %s in more than its seed: left out", folders[seed], folders[done[0]])
        return {seed: scores[seed] for seed in same}

    def over(self, name: str, other: str) -> Estimate | None:
        """What a row has above another one on test: over the seeds that both have, or over images of the only one."""
        scores, reference = (
            {seed: found["test"] for seed, found in self.finished(row).items()} if row in self.suite.entries else {}
            for row in (name, other)
        )
        difference = paired_difference(scores, reference)
        if difference is None or difference.count > 1 or self.suite.metric not in ("bbox/AP", "segm/AP"):
            return difference
        (seed,) = [seed for seed in scores if seed in reference]
        files = [self.root / slug(row) / f"seed{seed}" / "evaluation" / self.predictions for row in (name, other)]
        if not all(file.is_file() for file in files):
            return difference
        annotations = str(self.data / "annotations/instances_test.json")
        task = self.suite.metric.partition("/")[0]
        return bootstrap_difference(*(coco_matches(annotations, str(file), task) for file in files))

    @property
    def predictions(self) -> str:
        """Where the detections of an evaluation are, from its folder."""
        return f"inference/{self.suite.dataset}_test/coco_instances_results.json"


def without_seed(directory: Path) -> list[str]:
    """The command that made a run, without what differs from seed to seed."""
    record = directory / "command.json"
    line = json.loads(record.read_text()) if record.is_file() else []
    return [x for key, x in zip(["", *line], line) if key not in ("SEED", "OUTPUT_DIR")]


def checksum(data: Path) -> str:
    """What the dataset's files are; "" for one that does not tell."""
    path = data / "dataset.json"
    return json.loads(path.read_text())["checksum"] if path.is_file() else ""


def newer(path: Path, than: Path) -> bool:
    """Whether a file is there, and not older than another one."""
    return path.is_file() and path.stat().st_mtime >= than.stat().st_mtime


def slug(name: str) -> str:
    """A row's name as a directory's name."""
    return name.replace(" ", "_").replace(",", "").replace("+", "and")


def default(key: str) -> float:
    """The default of a configuration key."""
    cfg = get_cfg()
    add_distill_config(cfg)
    return functools.reduce(getattr, key.split("."), cfg)


def trial_directory(name: str, value: float) -> str:
    """Where a trial of a row lies."""
    return f"tuning/{slug(name)}/{value:g}"


def tuning_table(bench: Bench) -> str:
    """Markdown table of all finished trials."""
    lines = [
        "| method | tried | " + " | ".join(f"x {factor:g}" for factor in FACTORS) + " |",
        "| --- | --- |" + " ---: |" * len(FACTORS),
    ]
    for name, key in tuned(bench.suite).items():
        paths = [bench.root / trial_directory(name, default(key) * factor) for factor in FACTORS]
        scores = [bench.scores(path).get("val") for path in paths]
        best = max((score for score in scores if score is not None), default=None)
        cells = ["-" if x is None else f"**{x:.1f}**" if x == best else f"{x:.1f}" for x in scores]
        lines.append(f"| {name} | `{key}`, default {default(key):g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(bench: Bench) -> dict[str, Any]:
    """What the table says, and val beside it: of every row its scores, their mean, and what it has above others."""
    teacher = bench.scores(bench.teacher_folder)
    rows = {name: bench.finished(name) for name in bench.suite.entries}
    of_test = {name: {seed: found["test"] for seed, found in scores.items()} for name, scores in rows.items()}
    base = of_test["baseline"]
    described = {}
    for name, scores in of_test.items():
        if scores:
            others = name not in ("baseline", "inherit only")
            described[name] = {
                "scores": rows[name],
                "mean": estimate(list(scores.values())),
                "over_baseline": bench.over(name, "baseline") if name != "baseline" else None,
                "over_inherit_only": bench.over(name, "inherit only") if others else None,
                "gap_closure": gap_closure(scores, base, teacher.get("test", math.nan)) if name != "baseline" else None,
            }
    return {
        "suite": bench.suite.marker,
        "metric": bench.suite.metric,
        "length": bench.length._asdict(),
        "dataset": checksum(bench.data),
        "teacher": teacher,
        "rows": described,
    }


def table(bench: Bench, content: Mapping[str, Any]) -> str:
    """Markdown table of what `summary` gives, on the test split."""
    length, rows = bench.length, content["rows"]
    columns = {"over baseline": "over_baseline", "over inherit only": "over_inherit_only"}
    columns = {heading: key for heading, key in columns.items() if any(row[key] for row in rows.values())}
    header = ["run", "seeds", f"{bench.suite.called} (mean)", "lowest to highest", *columns, "gap closure"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, row in rows.items():
        scores = [found["test"] for found in row["scores"].values()]
        spread = f"{min(scores):.1f} to {max(scores):.1f}" if len(scores) > 1 else "one seed"
        closure = row["gap_closure"]
        cells = [name, str(len(scores)), f"{row['mean'].mean:.1f}" if row["mean"] else "-", spread]
        cells += [difference_text(row[key]) for key in columns.values()]
        lines.append([*cells, closure.text(".0f", 100, " %") if closure else "-"])
    teacher = content["teacher"].get("test", math.nan)
    about = (
        f"Teacher: {teacher:.1f} {bench.suite.called} after {length.teacher:,} iterations of {length.teacher_images} "
        f"images; students: {length.student:,} iterations of {length.student_images}. On test."
    )
    return "\n".join([about, "", *(f"| {' | '.join(line)} |" for line in lines)])


def difference_text(difference: Estimate | None) -> str:
    """A difference with its interval, and whether it is noise."""
    if difference is None:
        return "-"
    over = " (images)" if difference.over == "images" else ""
    return difference.text() + over + (", noise" if difference.within_noise else "")


def insert(text: str, marker: str) -> None:
    """Puts the table between `<!-- marker -->` and `<!-- /marker -->` of docs/benchmarks.md."""
    document = DOCUMENT.read_text(encoding="utf-8")
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    head, _, rest = document.partition(begin)
    _, _, tail = rest.partition(end)
    temporary = DOCUMENT.with_suffix(".tmp")
    temporary.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
    temporary.replace(DOCUMENT)


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
    parser.add_argument("--no-document", action="store_true", help="leave docs/benchmarks.md as it is")
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
    bench = Bench(suite, args.length, args.output, args.threads, args.opts, data, not args.evaluate_only)
    names = [n for n in args.only or suite.entries if not (args.no_ablations and suite.entries[n].ablation)]
    if args.tune:
        names = [n for n in names if n in tuned(suite)]
    pool = ThreadPoolExecutor(args.jobs)
    try:
        # in the pool all of them: Ctrl-C in the main thread would kill a run that is about to save
        teacher = pool.submit(bench.teacher, "ReceptiveTokens" in names)
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
    if DOCUMENT.is_file() and not args.no_document:
        insert(text, f"{suite.marker} {'tuning' if args.tune else args.length}")
    sys.exit(1 if failed else 0)


def conclude(bench: Bench) -> str:
    """Writes `table.json`, and returns the table."""
    content = summary(bench)
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
