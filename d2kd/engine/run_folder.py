"""The folder of a run: one run in it at a time, no other run's files in it, and nothing left of killed writes."""

import contextlib
import errno
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from d2kd.errors import UserError
from detectron2.config import CfgNode
from detectron2.utils import comm

from .run_files import files_of_run, forget_replaced_run, holds_a_run, put_back_run, set_aside_run

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

#: Left by writes that were killed: see `d2kd.files.replacing`, and Detectron2's runtime.
_LEFT_OVER = re.compile(r"\..*\.\d+\.tmp(\..*)?|.*\.tmp\d+")


#: Of a disk that is full, or not to be written to.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class FolderError(UserError):
    """An OUTPUT_DIR that a run cannot, or must not, write into."""


def prepare_folder(path: str) -> None:
    """Makes a folder, and checks that files can be written into it.

    Raises:
        FolderError: it cannot be made, is a file, or takes no files.
    """
    if not path:
        raise FolderError("OUTPUT_DIR is empty: name a folder for checkpoints and logs.")
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise FolderError(
            f"OUTPUT_DIR {path} cannot be written into ({error.strerror or error}). Choose another folder, or make "
            "room for it."
        ) from error


def check_folder(cfg: CfgNode, resume: bool, overwrite: bool) -> None:
    """Checks that a training can have its folder; changes nothing.

    Args:
        cfg: of the run.
        resume: it continues a run that is there.
        overwrite: what another run has left there may go.

    Raises:
        FolderError: there is another run, or a file that this one reads; or checkpoints to resume from of which none is
            named as the last.
    """
    folder = cfg.OUTPUT_DIR
    reads = {
        "MODEL.WEIGHTS": "" if resume else cfg.MODEL.WEIGHTS,
        "DISTILL.TEACHER.WEIGHTS": cfg.DISTILL.TEACHER.WEIGHTS,
        "DISTILL.RECEPTIVE_TOKENS.FILE": cfg.DISTILL.RECEPTIVE_TOKENS.FILE,
    }
    own = Path(folder).resolve()
    removed = set(files_of_run(str(own))) if overwrite else set()
    for key, file in reads.items():
        given = Path(file.split("?")[0])
        paths = [given.parent.resolve() / given.name, given.resolve()]  # a link, and what it leads to
        if file and any(p.parent == own or not removed.isdisjoint([p, *p.parents]) for p in paths):
            raise FolderError(
                f"{key} {file} lies in OUTPUT_DIR {folder}, where this run would write over it. Choose another "
                "OUTPUT_DIR."
            )
    if resume:
        checkpoints = sorted(path.name for path in Path(folder).glob("model_[0-9f]*.pth"))  # numbered, or final
        if checkpoints and not Path(folder, "last_checkpoint").is_file():
            raise FolderError(
                f"--resume (resume=True): OUTPUT_DIR {folder} has checkpoints ({', '.join(checkpoints[-3:])}), but no "
                "file last_checkpoint that names the one to continue from. Write its name into such a file."
            )
    elif holds_a_run(folder) and not overwrite:
        raise FolderError(
            f"OUTPUT_DIR {folder} holds another run. Continue it with --resume (in Python resume=True), choose another "
            "OUTPUT_DIR, or give --overwrite (overwrite=True) to remove what it has left."
        )


@contextlib.contextmanager
def claimed_folder(cfg: CfgNode, resume: bool, overwrite: bool) -> Iterator[list[str]]:
    """Gives a training a folder with nothing in it but what belongs to it, and keeps other runs out until it ends.

    What another run has left there (`overwrite`) is set aside, until `forget_replaced_run` or the end of the block;
    after an error before that it is put back, as if this training had not been started.

    Returns:
        What has been done to the folder, for a log that is not there yet.

    Raises:
        FolderError: see `check_folder` and `locked`.
    """
    folder = cfg.OUTPUT_DIR
    with locked(folder):
        if not comm.is_main_process():
            yield []
            return
        notices = []
        if put_back_run(folder):
            notices = [f"{folder} has its former run again: the one that was to replace it was killed as it started."]
        check_folder(cfg, resume, overwrite)
        forget_replaced_run(folder)  # of a start before, if that was killed in the middle of it
        remove_left_overs(folder)
        if not resume and holds_a_run(folder):
            set_aside_run(folder)
        try:
            yield notices
        except BaseException:
            put_back_run(folder)
            raise
        forget_replaced_run(folder)


def remove_left_overs(folder: str) -> None:
    """Removes what killed writes have left in a folder."""
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        if path.is_file() and _LEFT_OVER.fullmatch(path.name):
            logger.info("Removed %s, which a killed write has left", path)
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keeps other runs out of a folder; the system lets go of it when the process ends, however that is.

    Raises:
        FolderError: another run is in it.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None and comm.is_main_process():
            file: IO[Any] = stack.enter_context(open(os.path.join(folder, ".lock"), "w"))
            try:
                # not flock, which the data workers of a killed run would hold on to
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise FolderError(
                    f"Another run is writing into OUTPUT_DIR {folder}. Wait for its end, or choose another folder."
                ) from error
            except OSError:  # a file system without locks
                logger.info("%s lies on a file system without locks: two runs in it would not be noticed", folder)
        yield
