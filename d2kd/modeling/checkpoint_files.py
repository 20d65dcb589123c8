"""Checkpoint files: read without running code on either runtime, and with a checksum that tells flipped bytes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2kd.errors import UserError
from d2kd.files import replacing
from d2kd.runtime import RUNTIME

# the one part of d2lite that d2kd uses under its own name: it needs no runtime, and real Detectron2 has no such reader
from d2lite.checkpoint.safe_load import InvalidCheckpointError, load_pickle_file, load_torch_file
from detectron2.checkpoint import DetectionCheckpointer

from .pretrained_names import is_detector_of_torchvision, source_of, unpacked

_CHECKSUM = "checksum"
#: Entries that are not of what was written: Detectron2's checkpointer adds the second when it reads.
_ADDED = (_CHECKSUM, "matching_heuristics")


class ChecksumError(UserError):
    """A file whose content is not what was written."""


class WritingError(UserError):
    """A file that cannot be written."""


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer; files that would run code, that are no checkpoints or were damaged are an error."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".safetensors"):
            return {"model": read_checkpoint(filename)}
        if RUNTIME.name == "detectron2" and not self._asks_for(filename):
            read_checkpoint(filename)  # its own reading runs what a pickle asks for: nothing, after this
        try:
            content: dict[str, Any] = super()._load_file(filename)
        except InvalidCheckpointError:  # d2lite's; weights of torchvision or timm may lie elsewhere in a file
            found = read_checkpoint(filename)
            if not isinstance(found, dict) or source_of(found) is None:
                raise
            content = {"model": unpacked(found)}
        if is_detector_of_torchvision(content["model"]):
            raise InvalidCheckpointError(
                f"Cannot load {filename}: it is a whole detector of torchvision's, whose neck and heads differ from "
                "Detectron2's. Give weights of its backbone alone, e.g. torchvision://resnet50, or of a detector of "
                "Detectron2's."
            )
        return without_checksum(filename, content)

    def _torch_load(self, f: str) -> Any:
        """What Detectron2 calls for most files."""
        return read_checkpoint(f)

    @staticmethod
    def _asks_for(filename: str) -> bool:
        """Whether Detectron2 reads a file by `_torch_load`, as all versions behind 0.6 do."""
        return hasattr(DetectionCheckpointer, "_torch_load") and not filename.endswith((".pkl", ".pyth"))


def read_checkpoint(path: str) -> Any:
    """Returns what a checkpoint file holds: tensors, arrays, numbers, text and plain containers of these.

    Raises:
        InvalidCheckpointError: it is damaged, no checkpoint, or asks for anything but data.
    """
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:
            raise InvalidCheckpointError(f"Cannot load {path}: {error}. Download or copy the file again.") from error
    return load_pickle_file(path) if path.endswith(".pkl") else load_torch_file(path)


def write_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint with its checksum; the file is whole or not there.

    Raises:
        WritingError: there is no room for it.
    """
    content = {key: value for key, value in content.items() if key not in _ADDED}
    with replacing(path) as temporary:
        try:
            torch.save({**content, _CHECKSUM: checksum(content)}, temporary)
        except RuntimeError as error:  # PyTorch's word for what goes wrong in its writing
            raise WritingError(
                f"Cannot write {path} completely; is the disk full? ({str(error).partition(chr(10))[0]})"
            ) from error


def without_checksum(path: str, content: Any) -> Any:
    """Returns a file's content without its checksum, where it has one.

    Raises:
        ChecksumError: the content has another one.
    """
    if not isinstance(content, dict) or _CHECKSUM not in content:
        return content
    written = content.pop(_CHECKSUM)
    if checksum({key: value for key, value in content.items() if key not in _ADDED}) != written:
        raise ChecksumError(f"{path} is damaged: its content is not what was written. Copy it again, or take another.")
    return content


def checksum(content: Any) -> str:
    """Returns a checksum of tensors, arrays, numbers and text in dicts and lists, by values, types and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        digest.update(f"{{{len(value)}".encode())
        for key, item in value.items():
            _add(digest, key)
            _add(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _add(digest, item)
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(f"{type(value).__name__}{value!r}".encode())


__all__ = [
    "ChecksumError",
    "InvalidCheckpointError",
    "SafeCheckpointer",
    "WritingError",
    "checksum",
    "read_checkpoint",
    "without_checksum",
    "write_checkpoint",
]
