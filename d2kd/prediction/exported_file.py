"""An exported file in the place of the model that it was made from."""

import contextlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.config import add_distill_config
from d2kd.data.mapper import build_mapper, wrap_mapper
from d2kd.export import SUFFIXES, ExportError, require_packages
from d2kd.export.runner import open_file
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes, Instances

from .classes import ClassList, numbered


class ExportedModel(nn.Module):
    """Runs an exported file with the input and output of Detectron2's models."""

    def __init__(self, path: str | os.PathLike[str], device: str = "cpu", threads: int = 0) -> None:
        """
        Args:
            path: .onnx, .pt or .ts, as `d2kd export` writes it.
            device: "cpu", or "cuda" for ONNX.
            threads: of ONNX Runtime; 0 for as many as there are cores.

        Raises:
            ExportError: it cannot be read, was not written by d2kd, or does not run on the device.
        """
        super().__init__()
        self.path = os.fspath(path)
        self.about, self.run = open_exported(self.path, device, threads)
        self.task = str(self.about["task"])

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """
        Args:
            batched_inputs: one dict an image: "image" (3, H, W), and optionally "height" and "width" of the output.

        Returns:
            For each {"instances"}, {"sem_seg"} or {"scores"}, as Detectron2's models give them.

        Raises:
            ExportError: the file does not take these images.
        """
        found: list[dict[str, Any]] = []
        for _, same in itertools.groupby(batched_inputs, key=lambda x: tuple(x["image"].shape)):
            inputs = list(same)
            images = torch.stack([torch.as_tensor(x["image"]).float() for x in inputs])
            try:
                outputs = [torch.from_numpy(np.ascontiguousarray(x)) for x in self.run(images.numpy())]
            except Exception as error:  # of the runtime, which has no type of its own
                raise ExportError(f"{self.path} does not take {tuple(images.shape)}: {_line(error)}") from error
            found += [self._of_image(outputs, i, x) for i, x in enumerate(inputs)]
        return found

    def _of_image(self, outputs: Sequence[Tensor], number: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
        height, width = inputs["image"].shape[-2:]
        size = int(inputs.get("height", height)), int(inputs.get("width", width))
        if self.task == "classification":
            return {"scores": outputs[0][number]}
        if self.task == "segmentation":
            logits = outputs[0][number][None]
            if tuple(logits.shape[2:]) != size:
                corners = bool(self.about.get("align_corners", False))
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=corners)
            return {"sem_seg": logits[0]}
        boxes, scores, classes, image, *masks = outputs
        mine = (image == number).nonzero()[:, 0]
        instances = Instances(size, scores=scores[mine], pred_classes=classes[mine])
        instances.pred_boxes = Boxes(boxes[mine])
        instances.pred_boxes.scale(size[1] / width, size[0] / height)
        instances.pred_boxes.clip(size)
        if masks:
            instances.pred_masks = _resized_masks(masks[0][mine], size)
        return {"instances": instances}


def _resized_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (D, H, W) bool in another size, one at a time since they are large."""
    if tuple(masks.shape[1:]) == size or not len(masks):
        return masks if len(masks) else masks.new_zeros(0, *size)
    resized = [F.interpolate(x[None, None].float(), size=size, mode="bilinear", align_corners=False) for x in masks]
    return torch.stack([x[0, 0] >= 0.5 for x in resized])


def open_exported(
    path: str, device: str = "cpu", threads: int = 0
) -> tuple[dict[str, Any], Callable[[np.ndarray], list[np.ndarray]]]:
    """Returns what an exported file says of itself, and a function from images (N, 3, H, W) to its outputs.

    Raises:
        ExportError: see `ExportedModel`.
    """
    kind = "onnx" if path.endswith(SUFFIXES["onnx"]) else "torchscript"
    require_packages(kind)
    if not os.path.isfile(path):
        raise ExportError(f"There is no exported file {path}.")
    if kind == "torchscript" and device != "cpu":
        raise ExportError(f"{path} was traced on the CPU and runs there only: take --device cpu, or export to ONNX.")
    with contextlib.redirect_stderr(None):
        try:
            about, run = open_file(path, device, threads)
        except ValueError as error:  # by open_file itself
            raise ExportError(f"{path} {error}") from error
        except Exception as error:  # of the runtime, which has no type of its own
            raise ExportError(f"{path} cannot be read as {kind}: {_line(error)}") from error
    missing = [key for key in ("task", "outputs", "input", "class_names", "num_classes") if key not in about]
    if missing:
        raise ExportError(f"{path} does not say its {', '.join(missing)}: export it again with `d2kd export`.")
    return about, run


def _line(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:200]


def mapper_of(about: Mapping[str, Any]) -> Any:
    """Returns what turns an image file or frame into the input of an exported network, as in an evaluation."""
    cfg, resize = get_cfg(), about["input"]["resize"]
    add_distill_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = about["architecture"]
    cfg.INPUT.FORMAT = about["input"]["channels"]
    if about["task"] == "classification":
        _set(
            cfg.INPUT.CLASSIFICATION,
            SIZE=resize["side"],
            TEST_SIZE=resize["side"],
            CROP_PCT=resize["crop_pct"],
            INTERPOLATION=resize["interpolation"],
        )
    else:
        _set(cfg.INPUT, MIN_SIZE_TEST=resize["shortest"], MAX_SIZE_TEST=resize["longest at most"])
    return wrap_mapper(build_mapper(cfg, is_train=False), "error", evaluates=True, advice="")


def _set(node: CfgNode, **values: Any) -> None:
    for key, value in values.items():
        node[key] = value


def classes_of(about: Mapping[str, Any]) -> dict[str, ClassList]:
    """Returns the classes that an exported file names, or their numbers."""
    kind = "stuff_classes" if about["task"] == "segmentation" else "thing_classes"
    first, number = (0 if kind == "stuff_classes" else 1), int(about["num_classes"])
    names, ids = (list((about.get(key) or {}).get(kind) or ()) for key in ("class_names", "class_ids"))
    if len(names) != number:
        return {kind: numbered(number, first)}
    return {kind: ClassList(names, ids if len(ids) == number else range(first, first + number))}
