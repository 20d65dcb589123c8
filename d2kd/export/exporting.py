"""The way from a trained model to a file that has been verified."""

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import d2kd
from d2kd.errors import require_choice
from d2kd.files import replacing
from detectron2.config import CfgNode

from .base import Exported, ExportError, exported
from .formats import OPSETS, WRITERS, require_packages
from .images import example_images
from .verification import TOLERANCES, Agreement, verify

logger = logging.getLogger(__name__)

#: Where a model finds nothing its scores hardly differ, and rounding decides which of some boxes suppresses the others.
COPY_TOLERANCES = {name: value._replace(share=0.9) for name, value in TOLERANCES.items()}
#: Buffers that stay in float32: pixel values and anchors have more digits than half precision.
_EXACT = ("pixel_mean", "pixel_std", "anchor_generator")


def export_model(
    cfg: CfgNode,
    model: nn.Module,
    target: str | Path,
    file_format: str,
    *,
    class_names: Mapping[str, Sequence[str]] | None = None,
    class_ids: Mapping[str, Sequence[int]] | None = None,
    precision: str = "fp32",
    opset: int = 17,
    images: Sequence[Any] = (),
    repeats: int = 0,
) -> Agreement:
    """Writes a trained model as ONNX or TorchScript, where the file gives what the model gives.

    Args:
        cfg: of the model.
        model: trained, on the CPU.
        target: file to write; it is there only if everything has succeeded.
        file_format: "onnx" or "torchscript".
        class_names: by kind, as in a checkpoint.
        class_ids: what files of results call the classes, by kind.
        precision: of weights and layers, "fp32" or "fp16"; images and results are float32 anyway.
        opset: of ONNX.
        images: to verify with, (H, W, 3) uint8 in the order of INPUT.FORMAT, at least one; without any they are drawn.
        repeats: more runs of each image, for the times in what is returned.

    Raises:
        ExportError: packages are missing, the architecture has no export, or the file does not agree with the model.
    """
    require_choice("--format", file_format, WRITERS)
    require_choice("--precision", precision, TOLERANCES)
    require_choice("--opset", opset, OPSETS)
    require_packages(file_format)
    reference = exported(model)
    inputs = example_images(cfg, reference, images)
    about = describe(cfg, reference, file_format, class_names or {}, precision, opset)
    about["class_ids"] = {kind: list(ids) for kind, ids in (class_ids or {}).items()}
    with replacing(target) as temporary, torch.no_grad():
        lowered = reference.lower_threshold(inputs)
        if lowered is not None:
            logger.info("There are hardly any detections on these images: a copy with a lower threshold is compared.")
            try:
                _write(reference, inputs, temporary, about)
                found = verify(reference, temporary, inputs, COPY_TOLERANCES[precision], str(target))
                logger.info("The copy: %s", found)
            finally:
                reference.restore_threshold(lowered)
        _write(reference, inputs, temporary, about)
        return verify(reference, temporary, inputs, TOLERANCES[precision], str(target), repeats)


def _write(reference: Exported, inputs: Sequence[Tensor], path: Path, about: Mapping[str, Any]) -> None:
    network = exported(in_half(reference.model)) if about["precision"] == "fp16" else reference
    # of another size than those that it is verified with, and a batch
    side = [side - 37 if side > 80 else side + 11 for side in inputs[0].shape[2:]]
    size = [reference.fixed_side] * 2 if reference.fixed_side else side
    example = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 255
    try:
        WRITERS[about["format"]](network, example, path, about, about["opset"] or 0)
    except Exception as error:  # of the exporter, which has no type of its own
        words = " ".join((str(error).strip() or type(error).__name__).split())[:300]
        raise ExportError(f"{about['architecture']} cannot be written as {about['format']}: {words}") from error


def in_half(model: nn.Module) -> nn.Module:
    """Returns a copy of a model with weights in half precision; pixel means and anchors keep their digits."""
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.half()
    for name, buffer in half.named_buffers():
        if buffer.is_floating_point() and not any(part in name for part in _EXACT):
            buffer.data = buffer.data.half()
    return half


def describe(
    cfg: CfgNode,
    network: Exported,
    file_format: str,
    class_names: Mapping[str, Sequence[str]],
    precision: str,
    opset: int,
) -> dict[str, Any]:
    """Returns what a file says of itself, for whoever uses it without d2kd."""
    resize: dict[str, Any] = {
        "rule": "shortest edge",
        "shortest": int(cfg.INPUT.MIN_SIZE_TEST),
        "longest at most": int(cfg.INPUT.MAX_SIZE_TEST),
    }
    if network.TASK == "classification":
        node = cfg.INPUT.CLASSIFICATION
        resize = {
            "rule": "center crop",
            "side": int(node.TEST_SIZE or node.SIZE),
            "crop_pct": float(node.CROP_PCT),
            # a random one is of the training
            "interpolation": "bicubic" if node.INTERPOLATION == "random" else str(node.INTERPOLATION),
        }
    about = {
        "d2kd": d2kd.__version__,
        "architecture": str(cfg.MODEL.META_ARCHITECTURE),
        "task": network.TASK,
        "format": file_format,
        "precision": precision,
        "opset": opset if file_format == "onnx" else None,
        "class_names": {kind: list(names) for kind, names in class_names.items()},
        "num_classes": network.num_classes,
        "parameters": sum(x.numel() for x in network.model.parameters()),
        "input": {
            "name": "images",
            "layout": "N, 3, height, width; float32",
            "channels": str(cfg.INPUT.FORMAT),
            "range": [0, 255],
            "resize": resize,
        },
        "outputs": list(network.OUTPUTS),
        "align_corners": network.align_corners,
    }
    assert json.dumps(about)
    return about
