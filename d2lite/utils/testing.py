"""Helpers for tests."""

import os

import numpy as np
import torch
from torch import nn

from d2lite.config import get_cfg
from d2lite.structures import Boxes, Instances, ROIMasks

__all__ = ["assert_instances_allclose", "get_model_no_weights", "get_sample_coco_image", "random_boxes"]


def get_model_no_weights(config_path: str) -> nn.Module:
    """
    Build the model of a YAML config with random weights, on the CPU where there is no GPU.

    Args:
        config_path: a path, or one below the folder of Detectron2's `configs` that `$D2_CONFIGS` names, such as
            "COCO-Detection/retinanet_R_50_FPN_1x.yaml".
    """
    from d2lite.modeling import build_model

    if not os.path.isfile(config_path):
        config_path = os.path.join(os.environ.get("D2_CONFIGS", ""), config_path)
    cfg = get_cfg()
    cfg.merge_from_file(config_path)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def random_boxes(num_boxes: int, max_coord: float = 100, device: str = "cpu") -> torch.Tensor:
    """Return random XYXY boxes, (num_boxes, 4), with sides of at least 1 and coordinates up to `max_coord`."""
    corners = (torch.rand(num_boxes, 4, device=device) * (max_coord * 0.5)).clamp_(min=1.0)
    corners[:, 2:] += corners[:, :2]
    return corners


def get_sample_coco_image(tensor: bool = True) -> "torch.Tensor | np.ndarray":
    """
    Return an image of COCO's usual size, always the same, without needing COCO.

    Args:
        tensor: whether as a uint8 tensor (3, 480, 640), else as an array (480, 640, 3). BGR.
    """
    coarse = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    image = np.kron(coarse, np.ones((32, 32, 1), dtype=np.uint8))
    return torch.from_numpy(image.transpose(2, 0, 1).copy()) if tensor else image


def assert_instances_allclose(
    input: Instances, other: Instances, *, rtol: float = 1e-5, msg: str = "", size_as_tensor: bool = False
) -> None:
    """
    Raise AssertionError unless both have the same fields with nearly the same content.

    Args:
        input, other: what to compare.
        rtol: tolerance relative to the image's size for boxes, and to the largest value for other numbers;
            integers must be equal.
        msg: put before the error message.
        size_as_tensor: the image sizes may be tensors.
    """
    msg = f"{msg}: " if msg else ""
    sizes = [
        tuple(torch.as_tensor(x.image_size).tolist() if size_as_tensor else x.image_size)
        for x in (input, other)
    ]
    assert sizes[0] == sizes[1], f"{msg}image sizes are {sizes[0]} and {sizes[1]}"
    names = [sorted(x.get_fields()) for x in (input, other)]
    assert names[0] == names[1], f"{msg}fields are {names[0]} and {names[1]}"
    for name in names[0]:
        a, b = input.get(name), other.get(name)
        scale = float(np.prod(sizes[0])) ** 0.5 if isinstance(a, Boxes) else None
        if isinstance(a, (Boxes, ROIMasks)):
            a, b = a.tensor, b.tensor
        assert isinstance(a, torch.Tensor), f"{msg}field {name} of type {type(a)} cannot be compared"
        assert _is_close(a, b, rtol, scale), f"{msg}field {name} differs: {a} and {b}"


def _is_close(a: torch.Tensor, b: torch.Tensor, rtol: float, scale: "float | None") -> bool:
    if a.shape != b.shape or not a.dtype.is_floating_point:
        return torch.equal(a, b)
    if scale is None:
        scale = a.abs().max().item() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=rtol * scale)
