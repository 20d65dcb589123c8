#!/usr/bin/env python
"""The whole of d2kd on the built-in dataset: a teacher, three students and the report that compares them.

Every part is a run of tools/train_net.py, shown before it starts. What is finished is not repeated, and what was
interrupted is resumed, so this program can be stopped and started at will.
"""

import argparse
import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.data.datasets import register_datasets
from d2kd.engine import load_config, log_runtime
from d2kd.evaluation.report import load_result, write_report
from d2kd.files import write_json
from detectron2.utils.logger import setup_logger

logger = logging.getLogger("d2kd.tools.quickstart")

TEACHER = "configs/PhotoDigits/retinanet_teacher.yaml"
STUDENT = "configs/PhotoDigits/retinanet_student.yaml"
DATASET = "photo_digits_val"

STATEMENT = """\
This shows **faster learning**, at a length where no student has converged: all students have seen the same {images:,}
images, and the baseline is far from what it reaches with more time. It does not show how much better a converged
student gets; for that, train the students, and a teacher that beats the converged baseline, for much longer
(`SOLVER.MAX_ITER`). One seed: other seeds and machines differ by a few AP, "inherit only" by
10 and more. "Inherit only" starts from the teacher's
neck and head and is then trained without distillation, so the distance between it and the distilled student is what the
distillation loss itself adds. A gap closure of about 100 % means that the student has caught up with its teacher, which
has seen more images ({teacher_images:,}) but is not converged either."""


class Run(NamedTuple):
    """One training run: name in the report, what to call it, arguments of train_net.py, share of the whole time."""

    name: str
    label: str
    arguments: list[str]
    share: float


def runs(output: Path, options: list[str]) -> list[Run]:
    """The four runs, in order."""
    teacher = output / "teacher"
    distil = [f"--teacher-config={TEACHER}", f"--teacher-weights={teacher / 'model_final.pth'}"]
    once = [*options, "DISTILL.TEACHER.EVAL_FIRST", "False"]  # its run has evaluated it
    return [
        Run("teacher", "Teacher", [f"--config-file={TEACHER}", *options], 0.45),
        Run("baseline", "Baseline student", [f"--config-file={STUDENT}", *options], 0.15),
        Run("inherit", "Inherit only", [f"--config-file={STUDENT}", *distil, *once, "DISTILL.METHODS", "[]"], 0.15),
        Run("distilled", "Distilled student", [f"--config-file={STUDENT}", *distil, *once], 0.25),
    ]


def command_of(run: Run, output: Path) -> list[str]:
    """The command line of a run."""
    return ["tools/train_net.py", "--resume", *run.arguments, "OUTPUT_DIR", str(output / run.name)]


def perform(run: Run, output: Path, environment: dict[str, str]) -> None:
    """Runs the command unless the same one has finished before.

    Raises:
        SystemExit: the run failed or was interrupted.
    """
    command = command_of(run, output)
    directory = output / run.name
    fingerprint = directory / "quickstart.json"
    wanted = {"command": command, "version": d2kd.__version__, "inputs": _digest(run.arguments)}
    same = fingerprint.is_file() and json.loads(fingerprint.read_text()) == wanted
    if same and (directory / "result.json").is_file():
        logger.info("%s: finished already, in %s", run.label, directory)
        return
    if directory.exists() and not same:
        stale = directory.with_name(f"{directory.name}.old-{int(time.time())}")
        logger.info("%s: %s comes from other settings; it is kept as %s", run.label, directory, stale)
        directory.rename(stale)
    write_json(fingerprint, wanted)
    logger.info("%s: python %s", run.label, shlex.join(command))
    status = _wait(subprocess.Popen([sys.executable, *command], env=environment))
    if status:
        log = directory / "log.txt"
        logger.error("%s stopped with status %d; run this again to continue. Its log: %s", run.label, status, log)
        sys.exit(status if status > 0 else 128 - status)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Waits for the run; Ctrl-C reaches it too (same terminal), and it saves before it stops."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _digest(arguments: list[str]) -> str:
    """Checksum of the configurations and of the teacher's checkpoint that a run depends on."""
    digest = hashlib.sha256()
    for argument in arguments:
        path = Path(argument.partition("=")[2])
        if argument.startswith("--") and path.is_file():
            digest.update(path.read_bytes())
            base = path.with_name("Base-PhotoDigits.yaml")
            digest.update(base.read_bytes() if base.is_file() else b"")
    return digest.hexdigest()


def report(all_runs: list[Run], output: Path) -> None:
    """Writes report.md, report.json and the pictures."""
    register_datasets(load_config(STUDENT))
    models = {run.name: load_result(run.name, str(output / run.name), run.label) for run in all_runs}
    summary = write_report(
        str(output),
        models,
        dataset_name=DATASET,
        title="Quickstart: distilling a RetinaNet on PhotoDigits",
        statement=STATEMENT.format(images=models["baseline"].images_seen, teacher_images=models["teacher"].images_seen),
        commands=["bash tools/quickstart.sh", *("python " + shlex.join(command_of(run, output)) for run in all_runs)],
    )
    logger.info("AP: %s", ", ".join(f"{m.label} {m.metrics['AP']:.1f}" for m in models.values()))
    if summary["gap_closure"] is not None:
        logger.info("Gap closure: %.0f %%", 100 * summary["gap_closure"])
    logger.info("Report: %s", output / "report.md")


def main() -> None:
    """Dataset, four runs, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"), help="where everything goes")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the configuration of all runs")
    args = parser.parse_args()
    setup_logger(name="d2kd")
    log_runtime()
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "datasets/prepare_photo_digits.py"], check=True)
    all_runs = runs(args.output, args.opts)
    start, done = time.time(), 0.0
    for number, run in enumerate(all_runs, 1):
        minutes = (time.time() - start) / done * (1 - done) / 60 if done else 0
        left = f"; about {max(1, round(minutes))} min left for all" if done else ""
        logger.info("Part %d of %d%s", number, len(all_runs), left)
        perform(run, args.output, environment)
        done += run.share
    report(all_runs, args.output)


if __name__ == "__main__":
    main()
