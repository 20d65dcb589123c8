#!/usr/bin/env python
"""The whole of d2kd on the built-in dataset: a teacher, three students and the report that compares them.

Every part is a run of tools/train_net.py, shown before it starts; two run side by side where there are two cores. What
is finished is not repeated, and what was interrupted is resumed, so this program can be stopped and started at will.
It may be started anywhere: the dataset and the output go to the working directory, unless it is told otherwise.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.data.datasets import register_datasets
from d2kd.engine import load_config, log_runtime, run_tool
from d2kd.evaluation.report import load_result, write_report
from d2kd.evaluation.report_inputs import read_inputs
from d2kd.evaluation.report_pictures import draw_detections
from d2kd.evaluation.tasks import metric_named
from d2kd.files import find_config, replacing, require_writable, write_json
from detectron2.utils.logger import setup_logger

logger = logging.getLogger("d2kd.tools.quickstart")

#: The programs of the repository, from the working directory.
ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[1]))
TEACHER = "configs/PhotoDigits/retinanet_teacher.yaml"
STUDENT = "configs/PhotoDigits/retinanet_student.yaml"
DATASET = "photo_digits_val"
TEACHER_ITERATIONS, STUDENT_ITERATIONS = 600, 500
EVALUATIONS = 3  # of each run: enough for a curve; each costs as much as 20 to 60 iterations

STATEMENT = """\
This shows **faster learning**, at a length where no student has converged: all students have seen the same {images:,}
images, and the baseline is far from what it reaches with more time. It does not show how much better a converged
student gets; for that, train the students, and a teacher that beats the converged baseline, for much longer
(`SOLVER.MAX_ITER`). One seed: other seeds and machines differ by a few AP, "inherit only" by more. "Inherit only"
starts from the teacher's neck and head and is then trained without distillation, so the distance between it and the
distilled student, whose head stays the teacher's, is what distillation itself adds. A gap closure above 100 % means
that the student has overtaken its teacher, which has seen more images ({teacher_images:,}) but is far from converged
as well."""


class Run(NamedTuple):
    """One training run."""

    name: str  # in the report, and of its folder
    label: str  # what to call it
    arguments: list[str]  # of train_net.py
    iterations: int
    cost: float  # processor time of an iteration, over that of a baseline's


def stages(output: Path, options: list[str]) -> list[list[Run]]:
    """The runs, in order; those of a stage do not wait for each other."""
    teacher = output / "teacher"
    distil = [f"--teacher-config={TEACHER}", f"--teacher-weights={teacher / 'model_final.pth'}"]
    once = ["DISTILL.TEACHER.EVAL_FIRST", "False"]  # its run has evaluated it
    given = dict(zip(options[::2], options[1::2])).get("SOLVER.MAX_ITER")

    def run(name: str, label: str, iterations: int, cost: float, *arguments: str) -> Run:
        iterations = int(given or iterations)
        lengths = ["SOLVER.MAX_ITER", str(iterations), "TEST.EVAL_PERIOD", str(math.ceil(iterations / EVALUATIONS))]
        return Run(name, label, [*arguments, *lengths, *options], iterations, cost)

    student = f"--config-file={STUDENT}"
    return [
        [
            run("teacher", "Teacher", TEACHER_ITERATIONS, 2.6, f"--config-file={TEACHER}"),
            run("baseline", "Baseline student", STUDENT_ITERATIONS, 1.0, student),
        ],
        [
            run("inherit", "Inherit only", STUDENT_ITERATIONS, 1.0, student, *distil, *once, "DISTILL.METHODS", "[]"),
            run("distilled", "Distilled student", STUDENT_ITERATIONS, 1.6, student, *distil, *once),
        ],
    ]


def command_of(run: Run, output: Path) -> list[str]:
    """The command line of a run."""
    return [str(ROOT / "tools/train_net.py"), "--resume", *run.arguments, "OUTPUT_DIR", str(output / run.name)]


def finished(run: Run, output: Path) -> bool:
    """Returns whether the same command has finished before; moves the folder of another one out of the way."""
    directory = output / run.name
    fingerprint = directory / "quickstart.json"
    wanted = {"command": command_of(run, output), "version": d2kd.__version__, "inputs": _digest(run.arguments)}
    same = fingerprint.is_file() and json.loads(fingerprint.read_text()) == wanted
    if same and (directory / "result.json").is_file():
        logger.info("%s: finished already, in %s", run.label, directory)
        return True
    if directory.exists() and not same:
        stale = directory.with_name(f"{directory.name}.old-{int(time.time())}")
        logger.info("%s: %s comes from other settings; it is kept as %s", run.label, directory, stale)
        directory.rename(stale)
    write_json(fingerprint, wanted)
    return False


class Progress:
    """Says every now and then how far the runs are, and how long all of them will take."""

    PERIOD_S = 20.0

    def __init__(self, output: Path, everything: Sequence[Sequence[Run]]) -> None:
        self.output = output
        self.everything = everything
        self.said = self.start = time.time()
        self.first = {run.name: self._last(run).get("iteration", 0) for stage in everything for run in stage}

    def _last(self, run: Run) -> dict[str, float]:
        """What a run has logged last, and the last AP; empty before its first iterations."""
        file = self.output / run.name / "metrics.json"
        found: dict[str, float] = {}
        for line in file.read_text().splitlines() if file.is_file() else ():
            try:
                found |= {k: v for k, v in json.loads(line).items() if isinstance(v, int | float)}  # not the text "NaN"
            except ValueError:  # is being written
                break
        return found

    def _left_s(self, running: Sequence[Run]) -> float | None:
        """Seconds until all stages are done, from the speed so far; None before anything has moved."""
        reached = {run.name: self._last(run).get("iteration", 0) for stage in self.everything for run in stage}
        moved = max(run.cost * (reached[run.name] - self.first[run.name]) for run in running)
        if moved <= 0:
            return None
        second = (time.time() - self.start) / moved
        ahead = (max(r.cost * (r.iterations - reached[r.name]) for r in stage) for stage in self.everything)
        return second * sum(ahead)

    def restart(self, running: Sequence[Run]) -> None:
        """Measures the speed anew, for the runs of the next stage."""
        self.start = time.time()
        self.first |= {run.name: self._last(run).get("iteration", 0) for run in running}

    def say(self, running: Sequence[Run]) -> None:
        """Logs a line, unless the last one is recent."""
        if time.time() - self.said < self.PERIOD_S:
            return
        self.said = time.time()
        parts = []
        for run in running:
            last = self._last(run)
            text = f"{run.label} {last.get('iteration', -1) + 1:.0f} of {run.iterations} iterations"
            text += f", loss {last['total_loss']:.2f}" if "total_loss" in last else ""
            parts.append(text + (f", AP {last['bbox/AP']:.1f}" if "bbox/AP" in last else ""))
        left = self._left_s(running)
        parts.append("starting" if left is None else f"about {max(1, math.ceil(left / 60))} min left for all")
        logger.info("%s", "; ".join(parts))


def perform(runs: Sequence[Run], output: Path, environment: dict[str, str], progress: Progress) -> None:
    """Runs the commands side by side, but for those that have finished before.

    Raises:
        SystemExit: a run failed or was interrupted; the others have saved and stopped.
    """
    processes: dict[str, subprocess.Popen[bytes]] = {}
    runs = [run for run in runs if not finished(run, output)]
    progress.restart(runs)
    for run in runs:
        command = command_of(run, output)
        logger.info("%s: python %s", run.label, shlex.join(command))
        with open(output / run.name / "console.txt", "ab") as console:
            processes[run.name] = subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=console, stderr=subprocess.STDOUT
            )
    try:
        _wait(runs, processes, output, progress)
    finally:
        _stop(processes.values())


def _wait(
    runs: Sequence[Run], processes: Mapping[str, subprocess.Popen[bytes]], output: Path, progress: Progress
) -> None:
    """Waits for the runs, and says how far they are; exits as soon as one fails."""
    while True:
        try:
            statuses = {name: process.poll() for name, process in processes.items()}
            failed = next((run for run in runs if statuses[run.name]), None)
            if failed is not None:
                _give_up(failed, statuses[failed.name] or 0, output / failed.name / "console.txt")
            if all(status == 0 for status in statuses.values()):
                return
            progress.say([run for run in runs if statuses[run.name] is None])
            first_picture(output)
            time.sleep(0.5)
        except KeyboardInterrupt:  # reaches the runs too (same terminal); they save before they stop
            for process in processes.values():
                process.wait()


def _stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Interrupts what still runs, and waits until it has saved."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for process in processes:
        process.wait()


def _give_up(run: Run, status: int, console: Path) -> NoReturn:
    """Shows the end of what a run said, and stops with its status."""
    logger.error("%s", "\n".join(console.read_text(errors="replace").splitlines()[-5:]))
    logger.error("%s stopped with status %d; run this again to continue. All it said: %s", run.label, status, console)
    sys.exit(status if status > 0 else 128 - status)


def first_picture(output: Path) -> None:
    """Draws what the baseline finds as soon as it is trained, while the others go on."""
    file, result = output / "first_look.png", output / "baseline/result.json"
    if result.is_file() and not (file.is_file() and file.stat().st_mtime >= result.stat().st_mtime):
        baseline = load_result("baseline", str(output / "baseline"), "Baseline student")
        inputs = read_inputs({"baseline": baseline}, DATASET, "bbox")
        content = inputs and draw_detections({"baseline": baseline}, inputs, metric_named("AP"), 6, 0.3)
        if content:
            with replacing(file) as temporary:
                temporary.write_bytes(content)
            logger.info("A first look, at what the baseline finds: %s", file)


def _digest(arguments: list[str]) -> str:
    """Checksum of the configurations and of the teacher's checkpoint that a run depends on."""
    digest = hashlib.sha256()
    for argument in arguments:
        path = Path(find_config(argument.partition("=")[2]))
        if argument.startswith("--") and path.is_file():
            digest.update(path.read_bytes())
            base = path.with_name("Base-PhotoDigits.yaml")
            digest.update(base.read_bytes() if base.is_file() else b"")
    return digest.hexdigest()


def use(all_runs: Sequence[Run], output: Path, environment: dict[str, str]) -> list[list[str]]:
    """Exports the distilled student, verified, and measures what all models cost; returns the commands.

    What is there already and as new as its checkpoint is not made again. Without the packages of a format there is no
    such file.
    """
    checkpoint = output / "distilled/model_final.pth"
    config = output / "distilled/config.yaml"
    commands, files = [], []
    for file_format, name in (("torchscript", "student.pt"), ("onnx", "student.onnx")):
        if file_format == "onnx" and importlib.util.find_spec("onnxruntime") is None:
            logger.info("Without ONNX: pip install 'd2kd[onnx]'")
            continue
        files.append(output / "distilled" / name)
        command = ["export", str(checkpoint), str(files[-1]), "--format", file_format, "--config-file", str(config)]
        commands.append(_call(command, files[-1], checkpoint, environment))
    shown = [str(output / run.name) for run in all_runs]
    files = [file for file in files if file.is_file()]
    newest = max([checkpoint, *files], key=lambda file: file.stat().st_mtime)
    command = ["benchmark", *shown, *map(str, files), "--output", str(output / "cost"), "--threads", "1"]
    commands.append(_call(command, output / "cost/benchmark.json", newest, environment))
    return commands


def _call(command: list[str], made: Path, source: Path, environment: dict[str, str]) -> list[str]:
    """Runs a command of d2kd, unless what it makes is newer than what from; returns it.

    What goes wrong is told, and the report is written without it.
    """
    if not (made.is_file() and made.stat().st_mtime >= source.stat().st_mtime):
        logger.info("d2kd %s", shlex.join(command))
        done = subprocess.run(
            [sys.executable, "-m", "d2kd.cli", *command], env=environment, text=True, capture_output=True
        )
        if done.returncode:
            logger.error("%s", "\n".join((done.stdout + done.stderr).splitlines()[-5:]))
    return command


def report(all_runs: list[Run], output: Path, used: Sequence[Sequence[str]]) -> None:
    """Writes report.md, report.json, report.html and the pictures; `used` are the commands of `use`."""
    models = {run.name: load_result(run.name, str(output / run.name), run.label) for run in all_runs}
    summary = write_report(
        str(output),
        models,
        dataset_name=DATASET,
        title="Quickstart: distilling a RetinaNet on PhotoDigits",
        statement=STATEMENT.format(images=models["baseline"].images_seen, teacher_images=models["teacher"].images_seen),
        commands=[
            f"bash {ROOT / 'tools/quickstart.sh'}",
            *("python " + shlex.join(command_of(run, output)) for run in all_runs),
            *("d2kd " + shlex.join(command) for command in used),
        ],
    )
    logger.info("AP: %s", ", ".join(f"{m.label} {m.metrics['AP']:.1f}" for m in models.values()))
    if summary["gap_closure"] is not None:
        logger.info("Gap closure: %.0f %%", 100 * summary["gap_closure"])
    logger.info("Report: %s, and to look at: report.html beside it", output / "report.md")


def main() -> None:
    """Dataset, four runs, export, measurement, report.

    Raises:
        UserError: the output cannot be written, or a change of the configuration is wrong.
        SystemExit: a part failed, which has said why.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"), help="where everything goes")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the configuration of all runs")
    args = parser.parse_args()
    setup_logger(name="d2kd")
    log_runtime()
    require_writable("--output", args.output)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the runs too
    prepared = subprocess.run([sys.executable, str(ROOT / "datasets/prepare_photo_digits.py")]).returncode
    if prepared:
        sys.exit(prepared)
    register_datasets(load_config(STUDENT, trains=False))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lanes = min(cores, 2)
    environment = {"OMP_NUM_THREADS": str(cores // lanes), **os.environ, "PYTHONWARNINGS": "ignore"}
    all_stages = stages(args.output, args.opts)
    if lanes == 1:
        all_stages = [[run] for stage in all_stages for run in stage]
    progress = Progress(args.output, all_stages)
    for number, stage in enumerate(all_stages, 1):
        logger.info("Part %d of %d: %s", number, len(all_stages), " and ".join(run.label.lower() for run in stage))
        perform(stage, args.output, environment, progress)
        first_picture(args.output)
    all_runs = [run for stage in all_stages for run in stage]
    logger.info("Export of the distilled student, and what the models cost")
    report(all_runs, args.output, use(all_runs, args.output, environment))


if __name__ == "__main__":
    run_tool(main)
