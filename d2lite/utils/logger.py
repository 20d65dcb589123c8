"""Setup of logging, messages that are not repeated too often, and small tables."""

import logging
import os
import sys
import time
from collections import Counter
from typing import Any

from tabulate import tabulate
from termcolor import colored

from d2lite.utils.file_io import PathManager

__all__ = ["create_small_table", "log_every_n", "log_every_n_seconds", "log_first_n", "setup_logger"]

DATE_FORMAT = "%m/%d %H:%M:%S"


class _ColorFormatter(logging.Formatter):
    """Green prefix, and the level in red from warnings on."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        prefix = colored(f"[{record.asctime} {record.abbreviation}]:", "green")
        if record.levelno < logging.WARNING:
            return f"{prefix} {record.message}"
        attrs = ["bold", "underline"] if record.levelno >= logging.ERROR else ["bold"]
        return f"{prefix} {colored(record.levelname, 'red', attrs=attrs)} {record.message}"


class _Abbreviate(logging.Filter):
    """Adds to records the attribute `abbreviation`: the logger's name with its first part shortened."""

    def __init__(self, name: str, abbreviation: str) -> None:
        super().__init__()
        self._full, self._short = name, abbreviation

    def filter(self, record: logging.LogRecord) -> bool:
        name = record.name
        if name == self._full or name.startswith(self._full + "."):
            name = (self._short + name[len(self._full) :]).lstrip(".")
        record.abbreviation = name
        return True


class _StdoutHandler(logging.StreamHandler):
    """The type marks the handler, so that a second setup replaces it."""


def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detectron2",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Logs to stdout (rank 0 only) and to a file (every rank its own). "detectron2" stands for this runtime, so
    it sets up the logger "d2lite" as well. Repeated calls do not duplicate handlers.

    Args:
        output: a file that ends in .txt or .log, or a directory that gets a log.txt; None: no file. Ranks above
            0 append ".rank<rank>".
        distributed_rank: rank of this process.
        color: color on stdout, if it is a terminal.
        name: the logger to set up.
        abbrev_name: what its name is shortened to in messages; None: "d2" for "detectron2", else no change.
        enable_propagation: whether the messages also go to the handlers of parent loggers.
        configure_stdout: False does not change the output to stdout.

    Returns:
        The logger called `name`.
    """
    if abbrev_name is None:
        abbrev_name = "d2" if name == "detectron2" else name
    abbreviate = _Abbreviate(name, abbrev_name)
    plain = logging.Formatter("[%(asctime)s] %(abbreviation)s %(levelname)s: %(message)s", DATE_FORMAT)
    handlers = []
    if configure_stdout and distributed_rank == 0:
        handlers.append(_StdoutHandler(sys.stdout))
        handlers[-1].setFormatter(_ColorFormatter("%(asctime)s %(message)s", DATE_FORMAT) if color else plain)
    if output is not None:
        handlers.append(logging.FileHandler(_log_file(output, distributed_rank), delay=True))
        handlers[-1].setFormatter(plain)
    for handler in handlers:
        handler.setLevel(logging.DEBUG)
        handler.addFilter(abbreviate)
    for each in (name, "d2lite") if name == "detectron2" else (name,):
        logger = logging.getLogger(each)
        logger.setLevel(logging.DEBUG)
        logger.propagate = enable_propagation
        for handler in handlers:
            _add_or_replace(logger, handler)
    return logging.getLogger(name)


def _log_file(output: str, rank: int) -> str:
    path = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
    if rank > 0:
        path = f"{path}.rank{rank}"
    PathManager.mkdirs(os.path.dirname(os.path.abspath(path)))
    return os.path.abspath(path)


def _add_or_replace(logger: logging.Logger, handler: logging.Handler) -> None:
    for old in list(logger.handlers):
        same_file = getattr(old, "baseFilename", "") == getattr(handler, "baseFilename", None)
        if same_file or (isinstance(old, _StdoutHandler) and isinstance(handler, _StdoutHandler)):
            logger.removeHandler(old)
            old.close()
    logger.addHandler(handler)


Key = tuple[str, ...]
_COUNTS: "Counter[Key]" = Counter()
_TIMES: dict[Key, float] = {}


def _caller() -> tuple[str, Key]:
    """The module name of the code that called into this file, and a key for that line of code."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    code = frame.f_code
    module = frame.f_globals.get("__name__", "__main__")
    key = (code.co_filename, str(frame.f_lineno), code.co_name)
    # Messages of a script go to the logger that setup_logger always sets up.
    return ("d2lite" if module == "__main__" else module), key


def log_first_n(
    lvl: int, msg: str, n: int = 1, *, name: str | None = None, key: str | tuple[str, ...] = "caller"
) -> None:
    """Logs only the first `n` times.

    Args:
        lvl: level of `logging`.
        msg: the message.
        n: how often.
        name: of the logger; by default that of the calling module.
        key: what is counted: "caller" the line of code, "message" the text, or both as a tuple.
    """
    keys = (key,) if isinstance(key, str) else tuple(key)
    unknown = set(keys) - {"caller", "message"}
    if unknown or not keys:
        raise ValueError(f"log_first_n: key must be made of 'caller' and 'message', not {key!r}")
    module, caller = _caller()
    identity = (caller if "caller" in keys else ()) + ((msg,) if "message" in keys else ())
    _COUNTS[identity] += 1
    if _COUNTS[identity] <= n:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Logs the first of every `n` calls from the same line of code. Arguments as in `log_first_n`."""
    module, caller = _caller()
    _COUNTS[caller] += 1
    if n == 1 or _COUNTS[caller] % n == 1:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n_seconds(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Logs at most every `n` seconds from the same line of code. Arguments as in `log_first_n`."""
    module, caller = _caller()
    now = time.monotonic()
    if caller not in _TIMES or now - _TIMES[caller] >= n:
        logging.getLogger(name or module).log(lvl, msg)
        _TIMES[caller] = now


def create_small_table(small_dict: dict[str, Any]) -> str:
    """Returns a table of one row, with the keys as header and numbers to three decimals."""
    return tabulate(
        [tuple(small_dict.values())],
        headers=list(small_dict),
        tablefmt="pipe",
        floatfmt=".3f",
        stralign="center",
        numalign="center",
    )
