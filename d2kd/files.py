"""Files that are either whole or not there, and the recipes that come with d2kd."""

import contextlib
import difflib
import hashlib
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d2kd.errors import UserError

_HERE = Path(__file__).parent
#: The recipes: in the package where it is installed from a wheel, else beside it in the repository.
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"


def is_exported(path: str) -> bool:
    """Whether a path is named as what `d2kd export` writes for ONNX Runtime or TorchScript."""
    return path.endswith((".onnx", ".pt", ".ts"))


def find_config(path: str) -> str:
    """Returns the path of a configuration file: `path` itself where it exists, else the recipe of that name.

    Args:
        path: relative to the working directory, or to the recipes, with or without "configs/" in front.

    Returns:
        The path of an existing file, or `path` unchanged where there is none.
    """
    if not path or os.path.isabs(path) or os.path.exists(path):
        return path
    parts = Path(path).parts
    recipe = CONFIGS.joinpath(*parts[1:] if parts[0] == "configs" else parts)
    return str(recipe) if recipe.is_file() else path


def near_configs(path: str) -> str:
    """Returns " Did you mean A or B?" with the recipes, and the files beside `path`, of the nearest names; or ""."""
    wanted = Path(path)
    recipes = [Path("configs", file.relative_to(CONFIGS)) for file in CONFIGS.glob("*/*.yaml")]

    def nearness(file: Path) -> float:
        name = difflib.SequenceMatcher(None, file.stem.lower(), wanted.stem.lower()).ratio()
        return name + 0.1 * (file.parent.name == wanted.parent.name) if name >= 0.6 else 0.0

    ranked = sorted({*recipes, *wanted.parent.glob("*.yaml")}, key=lambda file: (-nearness(file), str(file)))
    near = [str(file) for file in ranked[:3] if nearness(file)]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def why_unwritable(folder: str | Path) -> str | None:
    """Returns why a folder takes no files, in words of the system; None where it does, or can be made and would.

    It is tried, since permissions tell little of an administrator's process, a full disk or a folder such as /proc.
    What is made for that is removed again.
    """
    path = Path(folder).absolute()
    made: list[Path] = []
    try:
        for part in [p for p in (path, *path.parents) if not p.exists()][::-1]:
            part.mkdir()
            made.append(part)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    finally:
        for part in reversed(made):
            with contextlib.suppress(OSError):
                part.rmdir()
    return None


def require_writable(flag: str, path: str | Path, *, is_file: bool = False) -> None:
    """Checks that something can be written where a user wants it, before anything is computed; leaves nothing there.

    Args:
        flag: what names it, for the message.
        path: a folder, which need not be there; or a file, which may be written over.

    Raises:
        UserError: it cannot.
    """
    path = Path(path)
    if is_file and path.is_dir():
        raise UserError(f"{flag} {path} is a folder: name a file.")
    if not is_file and path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path} is a file: name a folder.")
    reason = why_unwritable(path.parent if is_file else path)
    if reason is not None:
        other = "a file in another folder" if is_file else "another folder"
        raise UserError(f"{flag} {path} cannot be written ({reason}): name {other}, or make room for it.")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, which takes its place when the block ends; after an error it is removed.

    The directory is made if need be, and the suffix is kept, for libraries that choose a format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # of several machines on one folder processes may have the same number
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes JSON; numbers that it does not know (the AP of a class without objects is NaN) become null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def file_checksum(path: str | Path) -> str:
    """What tells a file from others, by its content: about a second for a gigabyte."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def finite(value: Any) -> Any:
    """A copy in which floats that are not finite are None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_foreign_file(path: str | Path) -> str | None:
    """Returns what a file is that is not what its name says: empty, a Git LFS pointer, a web page; None otherwise."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:
        return None
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, probably the error page of a download"
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        return "it is compressed: unpack it"
    return None
