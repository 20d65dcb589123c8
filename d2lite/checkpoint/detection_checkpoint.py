"""Checkpointer for detectors: its own files, Detectron2's, Caffe2's and pycls'."""

import logging
import os
from typing import Any
from urllib.parse import parse_qs

from fvcore.common.checkpoint import _strip_prefix_if_present
from torch import nn

from d2lite.checkpoint.c2_model_loading import align_and_update_state_dicts
from d2lite.checkpoint.checkpointer import Checkpointer, check_weights
from d2lite.checkpoint.safe_load import InvalidCheckpointError, load_pickle_file, load_torch_file
from d2lite.utils import comm

logger = logging.getLogger(__name__)


class DetectionCheckpointer(Checkpointer):
    """Reads `.pth` and `.pkl` files of Detectron2, Caffe2's `.pkl` and pycls' `.pyth`.

    A path may end in `?matching_heuristics=True`: the checkpoint's names are then matched to the model's by
    their endings. Files of Caffe2 and pycls, and files with an entry "matching_heuristics",
    are always matched that way.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: the model, wrapped for data-parallel training or not.
            save_dir: where to save, and to look for the last checkpoint.
            save_to_disk: None lets the main process save, and no other.
            **checkpointables: saved under their names beside the model.
        """
        if save_to_disk is None:
            save_to_disk = comm.is_main_process()
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._use_heuristics = False

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads a checkpoint into the model and the other objects. All processes must call this together.

        Args:
            path: a file, or an address that the path manager knows, with or without
                `?matching_heuristics=True`; empty loads nothing.
            checkpointables: names of the objects to load beside the model; None is all.

        Returns:
            What the file holds besides.

        Raises:
            FileNotFoundError: if a process does not find the file.
            InvalidCheckpointError: if it is no usable checkpoint.
            ValueError: if the path has other options than `matching_heuristics`.
        """
        path, self._use_heuristics = _split_options(path)
        return super().load(path, checkpointables)

    def _local_path(self, path: str) -> str:
        if comm.get_world_size() == 1:
            return super()._local_path(path)
        # One process that fails alone would leave the others waiting for it.
        try:
            local, problem = super()._local_path(path), None
        except Exception as error:
            local, problem = "", error
        found = comm.all_gather(problem is None)
        if problem is not None:
            raise problem
        if not all(found):
            ranks = [rank for rank, ok in enumerate(found) if not ok]
            raise FileNotFoundError(f"Checkpoint {path} is missing where ranks {ranks} run; copy it there.")
        return local

    def _load_file(self, f: str) -> dict[str, Any]:
        extension = os.path.splitext(f)[1]
        if extension == ".pkl":
            checkpoint = _from_pickle(load_pickle_file(f), f)
        elif extension == ".pyth":
            checkpoint = _from_pycls(load_torch_file(f), f)
        else:
            checkpoint = load_torch_file(f)
            if isinstance(checkpoint, dict) and "model" not in checkpoint:
                checkpoint = {"model": checkpoint}
        if self._use_heuristics and isinstance(checkpoint, dict):
            checkpoint["matching_heuristics"] = True
        try:
            check_weights(checkpoint)
        except InvalidCheckpointError as error:
            raise InvalidCheckpointError(f"Cannot load {f}: {error}") from None
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if checkpoint.get("matching_heuristics", False):
            self._convert_ndarray_to_tensor(checkpoint["model"])
            _strip_prefix_if_present(checkpoint["model"], "module.")
            is_caffe2 = checkpoint.get("__author__") == "Caffe2"
            checkpoint["model"] = align_and_update_state_dicts(
                self.model.state_dict(), checkpoint["model"], c2_conversion=is_caffe2
            )
        incompatible = super()._load_model(checkpoint)
        _drop_constants(incompatible.missing_keys, incompatible.unexpected_keys)
        return incompatible


def _drop_constants(missing: list[str], unexpected: list[str]) -> None:
    """Removes keys that the config determines and that only some versions save."""
    missing[:] = [key for key in missing if key not in ("pixel_mean", "pixel_std")]
    unexpected[:] = [key for key in unexpected if "anchor_generator.cell_anchors" not in key]


def _split_options(path: str) -> tuple[str, bool]:
    """Splits `?matching_heuristics=True` off a path."""
    if "?" not in path or os.path.isfile(path):
        return path, False
    file, _, query = path.rpartition("?")
    options = parse_qs(query, keep_blank_values=True)
    heuristics = options.pop("matching_heuristics", ["False"])
    if options or heuristics not in (["True"], ["False"]):
        raise ValueError(f"'{path}': unknown option '{query}'; known is '?matching_heuristics=True'.")
    return file, heuristics == ["True"]


def _from_pickle(data: Any, path: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InvalidCheckpointError(f"Cannot load {path}: it holds a {type(data).__name__}, not a dict of weights.")
    if "model" in data and "__author__" in data:
        logger.info("The checkpoint was written by '%s'.", data["__author__"])
        return data
    blobs = data.get("blobs", data)
    weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _from_pycls(data: Any, path: str) -> dict[str, Any]:
    if not isinstance(data, dict) or "model_state" not in data:
        raise InvalidCheckpointError(f"Cannot load {path}: pycls' .pyth files have weights under 'model_state'.")
    return {"model": data["model_state"], "__author__": "pycls", "matching_heuristics": True}
