"""The runs of benchmarks/accuracy.py: their folders and commands, what they score, and what differs between them."""

import functools
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy_records import Records, Run
from suites import TUNED, TUNING_SEED, Suite

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.config import add_distill_config
from d2kd.evaluation.image_bootstrap import bootstrap_difference, coco_matches
from d2kd.evaluation.statistics import Estimate, paired_difference
from detectron2.config import get_cfg

logger = logging.getLogger("d2kd.benchmarks.accuracy")

CONFIGS = Path("configs/PhotoDigits")
SPLITS = ("val", "test")  # the first one chooses weights, the second one is reported
#: A detector below this part of its teacher's AP, or without one, has diverged: it is counted, but is in no mean and no
#: difference. What is right by chance is no sign of having learned, so it cannot be told of other metrics.
DIVERGED, WITHOUT_CHANCE = 0.05, ("bbox/AP", "segm/AP")
_CACHE_DIR = "DISTILL.CACHE.DIR"


class Bench:
    """The runs of one suite and length, in one directory."""

    def __init__(
        self,
        suite: Suite,
        length: str,
        output: Path,
        threads: int,
        options: list[str],
        data: Path,
        trains: bool = True,
        caches: bool = False,
    ) -> None:
        self.suite = suite
        self.length = suite.lengths[length]
        self.data = data
        self.trains = trains
        self.caches = caches
        self.output = output
        self.root = output / suite.folder / length
        self.records = Records(f"{suite.marker} {length}")
        # lengths of students may share a teacher: it is the dearest of all runs
        same = [name for name, other in suite.lengths.items() if other.of_teacher == self.length.of_teacher]
        self.teacher_folder = output / suite.teacher_folder / same[0] / "teacher"
        self.tokens_folder = self.teacher_folder.with_name("tokens")
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        self.options = options

    def run(self, directory: Path, command: Sequence[Any], result: str = "result.json") -> bool:
        """Runs a tool with `directory` for its output unless `result` is there; returns whether it is now."""
        line = [*map(str, command), *self.options, "OUTPUT_DIR", str(directory)]
        record = directory / "command.json"
        if record.is_file() and without_cache(json.loads(record.read_text())) != without_cache(line):
            logger.error("%s was made by another command: see %s; remove it to repeat it", directory, record)
            return False
        if not (directory / result).is_file():
            directory.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(line))
            (directory / "commit.txt").write_text(commit())
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
        return not (tokens and self.trains) or self.run(self.tokens_folder, [*command, *weights], result="tokens.pth")

    def student(self, name: str, seed: int, trial: str = "", changes: Sequence[Any] = ()) -> bool:
        """Trains and evaluates one student, in the folder of its row and seed, or that of a trial, with its changes."""
        entry = self.suite.entries[name]
        directory = self.root / (trial or f"{slug(name)}/seed{seed}")
        if self._left_out(directory):
            return True
        command: list[Any] = ["tools/train_net.py", "--resume", "--config-file", CONFIGS / f"{entry.config}.yaml"]
        iterations = self.length.student * entry.times
        options: list[Any] = ["SEED", seed, "SOLVER.MAX_ITER", iterations, "TEST.EVAL_PERIOD", 0]
        if self.length.student_lr is not None:
            options += ["SOLVER.BASE_LR", self.length.student_lr]
        options += entry.options  # last: a row may have a rate of its own
        if self.suite.sets_images:
            options += ["SOLVER.IMS_PER_BATCH", self.length.student_images]
        if entry.distils:
            command += ["--teacher-config", CONFIGS / f"{self.suite.teacher}.yaml"]
            command += ["--teacher-weights", self.teacher_folder / "model_final.pth"]
            options += ["DISTILL.TEACHER.EVAL_FIRST", False]
            if self.caches and _CACHE_DIR not in options:
                options += [_CACHE_DIR, self.output / "features"]
        if name.startswith("ReceptiveTokens"):
            options += ["DISTILL.RECEPTIVE_TOKENS.FILE", self.tokens_folder / "tokens.pth"]
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

    def trained(self, name: str) -> tuple[list[str], dict[int, Run]]:
        """The command of a row's evaluated runs in this folder, without what differs between seeds, and the runs."""
        folders = {int(path.name.removeprefix("seed")): path for path in (self.root / slug(name)).glob("seed*")}
        scores = {seed: self.scores(folders[seed]) for seed in sorted(folders)}
        done = [seed for seed, found in scores.items() if "test" in found]
        commands = {seed: self._without_seed(folders[seed]) for seed in done}
        runs = {}
        for seed in done:
            if commands[seed] == commands[done[0]]:
                runs[seed] = Run(scores[seed], read(folders[seed] / "commit.txt"))
            else:
                logger.error("%s differs from %s in more than its seed: left out", folders[seed], folders[done[0]])
        return commands[done[0]] if done else [], runs

    def evaluated(self, name: str) -> dict[int, dict[str, float]]:
        """The scores of every evaluated seed of a row, in this folder or recorded, by seed and split."""
        command, runs = self.trained(name)
        if self.records.fits(checksum(self.data), self.scores(self.teacher_folder)):
            runs = {**self.records.runs(name, command), **runs}
        return {seed: runs[seed].scores for seed in sorted(runs)}

    def finished(self, name: str) -> dict[int, dict[str, float]]:
        """The same, without the seeds that have diverged."""
        found, teacher = self.evaluated(name), self.scores(self.teacher_folder).get("test", math.nan)
        if self.suite.metric not in WITHOUT_CHANCE or math.isnan(teacher):
            return found
        return {seed: scores for seed, scores in found.items() if scores["test"] >= DIVERGED * teacher}

    def record(self) -> None:
        """Writes the evaluated runs in this folder into the repository."""
        trained = {name: self.trained(name) for name in self.suite.entries}
        found = {name: (command, runs) for name, (command, runs) in trained.items() if runs}
        self.records.write(checksum(self.data), self.scores(self.teacher_folder), found)

    def _without_seed(self, directory: Path) -> list[str]:
        """The command that made a run, without what differs between seeds and output folders, and without its cache."""
        line = without_cache(json.loads(read(directory / "command.json") or "[]"))
        kept = [x for key, x in zip(["", *line], line) if key not in ("SEED", "OUTPUT_DIR")]
        return [x.removeprefix(f"{self.output}/") for x in kept]

    def over(self, name: str, other: str) -> Estimate | None:
        """What a row has above another one on test: over the seeds that both have, or over images of the only one."""
        scores, reference = (
            {seed: found["test"] for seed, found in self.finished(row).items()} if row in self.suite.entries else {}
            for row in (name, other)
        )
        difference = paired_difference(scores, reference)
        if difference is None or difference.count > 1 or self.suite.metric not in ("bbox/AP", "segm/AP"):
            return difference
        shared = [seed for seed in scores if seed in reference]
        folders = [self.root / slug(row) / f"seed{shared[0]}" / "evaluation" for row in (name, other)]
        files = [folder / f"inference/{self.suite.dataset}_test/coco_instances_results.json" for folder in folders]
        if len(shared) > 1 or not all(file.is_file() for file in files):
            return difference
        annotations = str(self.data / "annotations/instances_test.json")
        task = self.suite.metric.partition("/")[0]
        return bootstrap_difference(*(coco_matches(annotations, str(file), task) for file in files))


def commit() -> str:
    """The repository's commit, with "-dirty" behind it where files differ from it; "" where there is none.

    What this program writes itself, when it is finished, does not count.
    """
    written = [":!docs/accuracy.md", ":!docs/experiments.md", ":!benchmarks/results"]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    name = _git("describe", "--always", "--exclude=*")
    return f"{name}-dirty" if name and changed else name


def _git(*arguments: str) -> str:
    return (subprocess.run(["git", *arguments], capture_output=True, text=True).stdout or "").strip()


def without_cache(line: Sequence[str]) -> list[str]:
    """A command without its cache, where that is in float32: students are equal to the bit to those without."""
    if _CACHE_DIR not in line or "DISTILL.CACHE.DTYPE" in line:
        return list(line)
    at = line.index(_CACHE_DIR)
    return [*line[:at], *line[at + 2 :]]


def read(path: Path) -> str:
    """A text file; "" where there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def checksum(data: Path) -> str:
    """What the dataset's files are; "" for one that does not tell."""
    return json.loads(read(data / "dataset.json") or '{"checksum": ""}')["checksum"]


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
