"""fvcore's checkpointer with safe reading, and with files that are complete or absent, never half-written."""

import logging
import os
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from torch import nn

from d2lite.checkpoint.safe_load import InvalidCheckpointError, load_torch_file
from d2lite.utils.file_io import PathManager

logger = logging.getLogger(__name__)


class Checkpointer(FvcoreCheckpointer):
    """Saves and loads a model and other objects with `state_dict` and `load_state_dict`."""

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, save_to_disk: bool = True, **checkpointables: Any
    ) -> None:
        """
        Args:
            model: the model; of one wrapped for data-parallel training the inner model is taken.
            save_dir: where to save, and to look for the last checkpoint.
            save_to_disk: False makes `save` do nothing.
            **checkpointables: saved under their names beside the model.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.path_manager = PathManager

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes `<save_dir>/<name>.pth` and makes it the last checkpoint.

        Args:
            name: file name without ending.
            **kwargs: extra entries of the file.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update((key, obj.state_dict()) for key, obj in self.checkpointables.items())
        data.update(kwargs)

        basename = f"{name}.pth"
        if os.path.basename(basename) != basename:
            raise ValueError(f"A checkpoint's name must not contain a directory, got '{name}'.")
        logger.info("Saving checkpoint to %s", os.path.join(self.save_dir, basename))
        self._write(basename, "wb", lambda f: torch.save(data, f))
        self.tag_last_checkpoint(basename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Records which file of `save_dir` a resumed run starts from."""
        self._write("last_checkpoint", "w", lambda f: f.write(last_filename_basename))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads a checkpoint into the model and the other objects.

        Args:
            path: a file, or an address that the path manager knows; empty loads nothing.
            checkpointables: names of the objects to load beside the model; None is all.

        Returns:
            What the file holds besides.

        Raises:
            FileNotFoundError: if there is no such file.
            InvalidCheckpointError: if it is no usable checkpoint.
        """
        return super().load(self._local_path(path) if path else path, checkpointables)

    def _local_path(self, path: str) -> str:
        local = path if os.path.isfile(path) else self.path_manager.get_local_path(path)
        if not os.path.isfile(local):
            raise FileNotFoundError(
                f"Checkpoint {path} not found. Check MODEL.WEIGHTS, or, when resuming, the name in the file "
                "'last_checkpoint' of the output directory."
            )
        return local

    def _load_file(self, f: str) -> dict[str, Any]:
        return load_torch_file(f)

    def _load_model(self, checkpoint: Any) -> Any:
        check_weights(checkpoint)
        return super()._load_model(checkpoint)

    def _write(self, basename: str, mode: str, write: Callable[[IO], Any]) -> None:
        path = os.path.join(self.save_dir, basename)
        # Not ".pth" at the end: a left-over must not be listed among the checkpoints.
        temporary = f"{path}.tmp{os.getpid()}"
        try:
            with self.path_manager.open(temporary, mode) as f:
                write(f)
            os.replace(self.path_manager.get_local_path(temporary), self.path_manager.get_local_path(path))
        except BaseException:
            if self.path_manager.exists(temporary):
                self.path_manager.rm(temporary)
            raise


def check_weights(checkpoint: Any) -> None:
    """Checks that a checkpoint is a dict whose "model" is a dict of tensors or arrays of numbers.

    Raises:
        InvalidCheckpointError: if it is not.
    """
    advice = "It was written by another program: save its weights as {'model': {name: tensor}}."
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict):
        raise InvalidCheckpointError(f"There is no dict of weights under 'model'. {advice}")
    for name, value in weights.items():
        is_array = isinstance(value, np.ndarray) and value.dtype.kind in "bifuc"
        if not (is_array or isinstance(value, torch.Tensor)):
            kind = type(value).__name__
            raise InvalidCheckpointError(f"The entry '{name}' of the weights is a {kind}, no tensor. {advice}")
