"""The files of a run: which of a folder's they are, and how another run takes their place, or does not after all."""

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

#: What belongs to a run, as patterns; its log stays.
_WRITTEN = (
    "config.yaml",
    "last_checkpoint",
    "model_*.pth",
    "unsound_*.pth",
    "metrics.json",
    "result.json",
    "benchmark.json",
    "tokens.pth",
    "inference",
    "inference_*",
    "masks/*_[0-9]*.png",
    "events.out.tfevents.*",
)
#: Likewise in folders that have the first of these files, and are no runs of their own.
_WRITTEN_BELOW = {
    "teacher": ("result.json", "inference"),
    "evaluation": ("result.json", "config.yaml", "log.txt", "inference", "inference_*"),
    "features": ("features.json", "*.png"),
}
#: Where the files of a run are until the one that replaces it has come through its first iteration; on their way there
#: and back; and where they are removed. Folders change names at once, so that a run may be killed anywhere.
_SET_ASIDE, _MOVING, _FORGOTTEN = ".replaced", ".replaced.moving", ".replaced.forgotten"


def holds_a_run(path: str) -> bool:
    """Returns whether a folder has files that a training has written."""
    return any(next(Path(path).glob(pattern), None) for pattern in ("last_checkpoint", "model_*.pth", "metrics.json"))


def files_of_run(folder: str) -> list[Path]:
    """Files and folders that a run has written into its folder, or an evaluation of it."""
    own = [path for pattern in _WRITTEN for path in Path(folder).glob(pattern)]
    for name, patterns in _WRITTEN_BELOW.items():
        below = Path(folder, name)
        if (below / patterns[0]).is_file() and not holds_a_run(str(below)):
            own += [path for pattern in patterns for path in below.glob(pattern)]
    return [path for path in own if not holds_a_run(str(path))]


def _move(paths: Iterable[Path], source: str, target: str) -> None:
    for path in paths:
        to = Path(target, path.relative_to(source))
        to.parent.mkdir(parents=True, exist_ok=True)
        path.rename(to)


def set_aside_run(folder: str) -> None:
    """Sets a run aside, until `put_back_run` or `forget_replaced_run`."""
    _move(files_of_run(folder), folder, os.path.join(folder, _MOVING))
    Path(folder, _MOVING).rename(Path(folder, _SET_ASIDE))
    for name in ("masks", *_WRITTEN_BELOW):
        below = Path(folder, name)
        if below.is_dir() and not any(below.iterdir()):
            below.rmdir()


def put_back_run(folder: str) -> bool:
    """Gives a folder the run again that was set aside, in place of what another has begun; whether there was one."""
    aside, moving = Path(folder, _SET_ASIDE), Path(folder, _MOVING)
    if aside.is_dir():
        for path in files_of_run(folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        aside.rename(moving)
    if not moving.is_dir():
        return False
    _move([path for path in moving.rglob("*") if path.is_file()], str(moving), folder)
    shutil.rmtree(moving)
    return True


def forget_replaced_run(folder: str) -> None:
    """Removes what `set_aside_run` has set aside, if it has."""
    aside, forgotten = Path(folder, _SET_ASIDE), Path(folder, _FORGOTTEN)
    if forgotten.is_dir():  # the process that did so before was killed
        shutil.rmtree(forgotten)
    if aside.is_dir():
        count = sum(1 for path in aside.rglob("*") if path.is_file())
        aside.rename(forgotten)
        logger.warning("--overwrite: removed %d files of another run from %s", count, folder)
        shutil.rmtree(forgotten)
