"""What is measured: runs, exported files, a configuration with its weights, and its teacher."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2kd.errors import UserError
from d2kd.evaluation.tasks import first_task, task_named
from d2kd.files import is_exported


class SubjectError(UserError):
    """What cannot be measured, or not here."""


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: in tables and pictures.
        weights: its checkpoint, or an exported file.
        config_file: its YAML; "" for an exported file.
        options: changes to the YAML.
        imports: files with architectures that it needs.
        run: the folder of the run that it comes from, whose metric it has; None if unknown.
    """

    name: str
    weights: str
    config_file: str = ""
    options: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    run: Path | None = None

    @property
    def exported(self) -> bool:
        """Whether it is a file of `d2kd export`."""
        return not self.config_file

    @property
    def runtime(self) -> str:
        """What runs it."""
        if not self.exported:
            return "PyTorch"
        return "ONNX Runtime" if self.weights.endswith(".onnx") else "TorchScript"

    def metric(self) -> tuple[str, str, float] | None:
        """Returns task, name and value of the first metric of its run, in percent; None where none is known."""
        if self.run is None:
            return None
        try:
            metrics = json.loads((self.run / "result.json").read_text())["metrics"]
            task = first_task(metrics)
            name = task_named(task).columns[0] if task is not None else ""
            value = float(metrics[task][name])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (str(task), name, value) if math.isfinite(value) else None


def find_subjects(
    given: Sequence[tuple[str, str]], options: Sequence[str] = (), imports: Sequence[str] = ()
) -> list[Subject]:
    """Returns what is meant by names and paths.

    Args:
        given: (name, path): a run's folder, a checkpoint in one, or an exported file. Without a name it has that of
            the folder, and of the file in it.
        options: changes to the YAML of each run.
        imports: files with architectures that they need.

    Raises:
        SubjectError: there is no such thing, or two have one name.
    """
    found = [_subject(name, Path(path), tuple(options), tuple(imports)) for name, path in given]
    names = [subject.name for subject in found]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise SubjectError(f"Two of what is to be measured are called {double}: name them, as in NAME=PATH.")
    return found


def _subject(name: str, path: Path, options: tuple[str, ...], imports: tuple[str, ...]) -> Subject:
    if path.is_file() and is_exported(path.name):
        run = path.parent if (path.parent / "result.json").is_file() else None
        return Subject(name or (f"{run.name}/{path.name}" if run else path.name), str(path), run=run)
    folder, weights = (path, path / "model_final.pth") if path.is_dir() else (path.parent, path)
    config = folder / "config.yaml"
    if not path.exists():
        raise SubjectError(f"There is no {path}: name the folder of a finished run, or a file of d2kd export.")
    for file, what in ((weights, "weights"), (config, "configuration")):
        if not file.is_file():
            raise SubjectError(f"{path} is no finished run: there is no {file} with its {what}.")
    title = folder.name if path.is_dir() else f"{folder.name}/{path.name}"
    run = folder if weights.name == "model_final.pth" else None  # of other checkpoints no metric is known
    return Subject(name or title, str(weights), str(config), options, imports, run)
