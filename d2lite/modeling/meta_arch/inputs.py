"""Input handling of all models: batching images, and fetching and checking the targets."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from d2lite.structures import BitMasks, Boxes, ImageList, Instances


def batch_images(
    batched_inputs: Sequence[dict], backbone: nn.Module, pixel_mean: torch.Tensor, pixel_std: torch.Tensor
) -> ImageList:
    """Normalizes the images (C, H, W) of a batch on the model's device, and pads them to a size that the backbone
    can take.

    Args:
        batched_inputs: dicts with the key "image".
        backbone: its `size_divisibility` and `padding_constraints` are respected.
        pixel_mean, pixel_std: (C, 1, 1).
    """
    device = pixel_mean.device
    images = [(x["image"].to(device, non_blocking=True) - pixel_mean) / pixel_std for x in batched_inputs]
    return ImageList.from_tensors(images, backbone.size_divisibility, padding_constraints=backbone.padding_constraints)


def ground_truth(
    batched_inputs: Sequence[dict], device: torch.device, num_classes: int | None = None, config_key: str = ""
) -> list[Instances]:
    """The annotated instances of each image, checked, on `device`.

    Args:
        batched_inputs: dicts with the key "instances".
        device: where the instances are needed.
        num_classes: the classes of the model; None if classes are not checked.
        config_key: the config key that sets `num_classes`, for the error message.

    Raises:
        AssertionError: if an image has no annotations at all (an empty Instances is fine).
        ValueError: for a class that the model does not have, or a box that is empty or not finite.
    """
    for x in batched_inputs:
        assert "instances" in x, (
            f"instance annotations are missing in training: {_name(x)} has no 'instances' "
            "(is the dataset mapper made with is_train=True?)"
        )
        if len(x["instances"]) > 0:
            _check_boxes(x)
            if num_classes is not None:
                _check_classes(x, num_classes, config_key)
    return [x["instances"]._map(lambda value: _queued(value, device)) for x in batched_inputs]


def _queued(value: Any, device: torch.device) -> Any:
    """A field on its way to the device: the host does not wait for what is queued there."""
    if isinstance(value, Boxes):
        return Boxes(value.tensor.to(device, non_blocking=True))
    if isinstance(value, (torch.Tensor, BitMasks)):
        return value.to(device, non_blocking=True)
    return value.to(device) if hasattr(value, "to") else value


def _check_boxes(x: dict) -> None:
    boxes = x["instances"].gt_boxes.tensor
    good = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
    if not good.all():
        i = int(good.logical_not().nonzero()[0])
        raise ValueError(
            f"gt_boxes[{i}] of {_name(x)} is {boxes[i].tolist()}: a box needs x0 < x1, y0 < y1 and finite "
            "numbers. Drop such boxes in the dataset mapper (filter_empty_instances)."
        )


def _check_classes(x: dict, num_classes: int, config_key: str) -> None:
    classes = x["instances"].gt_classes
    low, high = (int(c) for c in classes.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"gt_classes of {_name(x)} contains class {low if low < 0 else high}, but the model has "
            f"{num_classes} classes, 0 to {num_classes - 1}. Set {config_key} to the number of classes "
            "of the dataset."
        )


def semantic_labels(
    batched_inputs: Sequence[dict], backbone: nn.Module, device: torch.device, head: nn.Module
) -> torch.Tensor:
    """The per-pixel labels of a batch, checked and padded like its images with `head.ignore_value`: (N, H, W)
    int64.

    Raises:
        AssertionError: if an image has no labels.
        ValueError: for a label that is neither one of `head.num_classes` classes nor `head.ignore_value`.
    """
    for x in batched_inputs:
        assert "sem_seg" in x, (
            f"per-pixel labels are missing in training: {_name(x)} has no 'sem_seg' "
            "(does the dataset have sem_seg_file_name?)"
        )
        _check_labels(x, getattr(head, "num_classes", None), head.ignore_value)
    return ImageList.from_tensors(
        [x["sem_seg"].to(device, non_blocking=True) for x in batched_inputs],
        backbone.size_divisibility,
        head.ignore_value,
        backbone.padding_constraints,
    ).tensor


def _check_labels(x: dict, num_classes: int | None, ignore_value: int) -> None:
    if num_classes is None:
        return
    labels = x["sem_seg"]
    bad = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_value)
    if bad.any():
        raise ValueError(
            f"sem_seg of {_name(x)} contains label {int(labels[bad][0])}, but the model has {num_classes} "
            f"classes, 0 to {num_classes - 1}, and ignores {ignore_value}. "
            "Set MODEL.SEM_SEG_HEAD.NUM_CLASSES to the number of classes of the dataset and "
            "MODEL.SEM_SEG_HEAD.IGNORE_VALUE to its void label."
        )


def output_size(x: dict, image_size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) wanted for the predictions of one input, by default that of the network input."""
    return x.get("height", image_size[0]), x.get("width", image_size[1])


def _name(x: dict) -> str:
    return f"image '{x['file_name']}'" if "file_name" in x else f"image {x.get('image_id', '(no file_name)')}"
