"""Axis-aligned boxes in absolute (x0, y0, x1, y1) coordinates, their box formats, and pairwise measures."""

import math
from collections.abc import Sequence
from enum import IntEnum, unique
from typing import TypeVar

import numpy as np
import torch
from torch import device

RawBoxes = TypeVar("RawBoxes", list, tuple, np.ndarray, torch.Tensor)


@unique
class BoxMode(IntEnum):
    """Encodings of a box. "ABS": pixels; "REL": shares of the image's size."""

    XYXY_ABS = 0
    """(x0, y0, x1, y1)"""
    XYWH_ABS = 1
    """(x0, y0, width, height)"""
    XYXY_REL = 2
    """(x0, y0, x1, y1), each in [0, 1]"""
    XYWH_REL = 3
    """(x0, y0, width, height), each in [0, 1]"""
    XYWHA_ABS = 4
    """(x_center, y_center, width, height, counter-clockwise angle in degrees)"""

    @staticmethod
    def convert(box: RawBoxes, from_mode: "BoxMode", to_mode: "BoxMode") -> RawBoxes:
        """Converts boxes between the absolute formats.

        Args:
            box: one box as a list or tuple of k numbers, or boxes as an array or tensor of shape (N, k),
                where k is 5 for XYWHA_ABS and 4 else.
            from_mode: format of `box`.
            to_mode: format wanted. A rotated box becomes the smallest upright box around it.

        Returns:
            The converted boxes, of the same type; `box` itself if the modes are equal.

        Raises:
            AssertionError: if a format is relative, or the number of coordinates does not fit `from_mode`.
            NotImplementedError: if there is no conversion between these formats.
        """
        if from_mode == to_mode:
            return box
        from_mode, to_mode = BoxMode(from_mode), BoxMode(to_mode)
        for mode in (from_mode, to_mode):
            assert mode not in (BoxMode.XYXY_REL, BoxMode.XYWH_REL), (
                f"BoxMode.convert cannot convert {from_mode.name} to {to_mode.name}: "
                "a relative format needs the image size."
            )
        expected = 5 if from_mode == BoxMode.XYWHA_ABS else 4
        if isinstance(box, (list, tuple)):
            assert len(box) == expected, f"A box in {from_mode.name} has {expected} numbers: {box}"
            return type(box)(_convert_coordinates(box, from_mode, to_mode))
        assert box.shape[-1] == expected, (
            f"Boxes in {from_mode.name} have shape (N, {expected}), not {tuple(box.shape)}"
        )
        is_numpy = isinstance(box, np.ndarray)
        coordinates = torch.from_numpy(box) if is_numpy else box
        converted = torch.stack(_convert_coordinates(coordinates.unbind(-1), from_mode, to_mode), dim=-1)
        return converted.numpy() if is_numpy else converted


def _convert_coordinates(c: Sequence, from_mode: BoxMode, to_mode: BoxMode) -> list:
    """Converts a sequence of coordinates, each a number or a tensor of shape (N,)."""
    if from_mode == BoxMode.XYXY_ABS and to_mode == BoxMode.XYWH_ABS:
        return [c[0], c[1], c[2] - c[0], c[3] - c[1]]
    if from_mode == BoxMode.XYWH_ABS and to_mode == BoxMode.XYXY_ABS:
        return [c[0], c[1], c[0] + c[2], c[1] + c[3]]
    if from_mode == BoxMode.XYWH_ABS and to_mode == BoxMode.XYWHA_ABS:
        return [c[0] + c[2] / 2, c[1] + c[3] / 2, c[2], c[3], c[2] * 0]
    if from_mode == BoxMode.XYWHA_ABS and to_mode == BoxMode.XYXY_ABS:
        x, y, w, h, angle = c
        is_tensor = isinstance(angle, torch.Tensor)
        radians = torch.deg2rad(angle) if is_tensor else math.radians(angle)
        cos, sin = (f(radians) for f in ((torch.cos, torch.sin) if is_tensor else (math.cos, math.sin)))
        half_w = (abs(cos) * w + abs(sin) * h) / 2
        half_h = (abs(sin) * w + abs(cos) * h) / 2
        return [x - half_w, y - half_h, x + half_w, y + half_h]
    raise NotImplementedError(
        f"Conversion of boxes from {from_mode.name} to {to_mode.name}: rotated boxes are left out of d2lite."
    )


class Boxes:
    """Boxes of one image, stored as one float32 tensor.

    Attributes:
        tensor: (N, 4), each row (x0, y0, x1, y1) in pixels.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        """
        Args:
            tensor: (N, 4), or what `torch.as_tensor` takes. Without elements it becomes (0, 4).
        """
        if not isinstance(tensor, torch.Tensor):
            tensor = torch.as_tensor(tensor)
        tensor = tensor.to(torch.float32)
        if tensor.numel() == 0:
            tensor = tensor.reshape(-1, 4)
        assert tensor.dim() == 2 and tensor.size(1) == 4, f"Boxes have shape (N, 4), not {list(tensor.shape)}"
        self.tensor = tensor

    def clone(self) -> "Boxes":
        """Returns a copy with its own memory."""
        return Boxes(self.tensor.clone())

    def to(self, device: torch.device) -> "Boxes":
        """Returns these boxes on another device."""
        return Boxes(self.tensor.to(device=device))

    def area(self) -> torch.Tensor:
        """Returns the areas, (N,), in square pixels."""
        x0, y0, x1, y1 = self.tensor.unbind(1)
        return (x1 - x0) * (y1 - y0)

    def clip(self, box_size: tuple[int, int]) -> None:
        """Clips the boxes, in place, to an image of size (height, width)."""
        height, width = box_size
        x0, y0, x1, y1 = self.tensor.unbind(1)
        self.tensor = torch.stack(
            (x0.clamp(0, width), y0.clamp(0, height), x1.clamp(0, width), y1.clamp(0, height)), dim=1
        )

    def nonempty(self, threshold: float = 0.0) -> torch.Tensor:
        """Returns (N,) booleans: both sides are longer than `threshold` pixels."""
        return ((self.tensor[:, 2:] - self.tensor[:, :2]) > threshold).all(dim=1)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: int = 0) -> torch.Tensor:
        """Returns (N,) booleans: the box exceeds a reference box at (0, 0) of size (height, width) by less than
        `boundary_threshold` pixels at its right and lower end, and at most that at its left and upper end.
        """
        height, width = box_size
        x0, y0, x1, y1 = self.tensor.unbind(1)
        margin = boundary_threshold
        return (x0 >= -margin) & (y0 >= -margin) & (x1 < width + margin) & (y1 < height + margin)

    def get_centers(self) -> torch.Tensor:
        """Returns the centers, (N, 2), as (x, y)."""
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiplies the coordinates, in place."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    @classmethod
    @torch.jit.unused
    def cat(cls, boxes_list: list["Boxes"]) -> "Boxes":
        """Concatenates; an empty list gives no boxes."""
        assert isinstance(boxes_list, (list, tuple)), f"Boxes.cat takes a list, not {type(boxes_list)}"
        assert all(isinstance(boxes, Boxes) for boxes in boxes_list), "Boxes.cat takes a list of Boxes"
        if not boxes_list:
            return cls(torch.empty(0))
        return cls(torch.cat([boxes.tensor for boxes in boxes_list], dim=0))

    @property
    def device(self) -> device:
        """The device that holds the boxes."""
        return self.tensor.device

    def __getitem__(self, item) -> "Boxes":
        """
        Args:
            item: an integer (one box is left), a slice, or a boolean or integer tensor of one dimension.
                (It has no annotation because TorchScript does not support slices.)

        Returns:
            The selected boxes. They may share memory with these.
        """
        if isinstance(item, int):
            return Boxes(self.tensor[item].view(1, -1))
        selected = self.tensor[item]
        assert selected.dim() == 2, f"Indexing Boxes with {item} does not give shape (N, 4)"
        return Boxes(selected)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    # Without annotation: TorchScript does not support iterators, and reads annotations of unused methods too.
    @torch.jit.unused
    def __iter__(self):  # type: ignore[no-untyped-def]
        """Iterates over the rows of the tensor, each of shape (4,)."""
        return iter(self.tensor)

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"


def _overlap(lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Area between broadcast corners (..., 2), 0 where they do not overlap."""
    sides = (upper - lower).clamp_(min=0)
    return sides[..., 0] * sides[..., 1]


def pairwise_intersection(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Returns the areas shared by each of N and each of M boxes, (N, M), in square pixels."""
    a, b = boxes1.tensor[:, None], boxes2.tensor[None]
    return _overlap(torch.max(a[..., :2], b[..., :2]), torch.min(a[..., 2:], b[..., 2:]))


def _ratio(intersection: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    # Degenerate boxes have 0 / 0; they overlap nothing.
    return torch.where(intersection > 0, intersection / total, intersection.new_zeros(()))


def pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Returns intersection over union of each of N and each of M boxes, (N, M), in [0, 1]."""
    intersection = pairwise_intersection(boxes1, boxes2)
    return _ratio(intersection, boxes1.area()[:, None] + boxes2.area() - intersection)


def pairwise_ioa(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Returns intersection over the area of `boxes2` of each of N and each of M boxes, (N, M), in [0, 1]."""
    return _ratio(pairwise_intersection(boxes1, boxes2), boxes2.area())


def matched_pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> torch.Tensor:
    """Returns intersection over union of the i-th boxes of two lists of N, (N,), in [0, 1]."""
    assert len(boxes1) == len(boxes2), (
        f"matched_pairwise_iou needs as many boxes in both lists, not {len(boxes1)} and {len(boxes2)}"
    )
    a, b = boxes1.tensor, boxes2.tensor
    intersection = _overlap(torch.max(a[:, :2], b[:, :2]), torch.min(a[:, 2:], b[:, 2:]))
    return _ratio(intersection, boxes1.area() + boxes2.area() - intersection)


def pairwise_point_box_distance(points: torch.Tensor, boxes: Boxes) -> torch.Tensor:
    """Returns the distances of P points to the sides of M boxes, in pixels.

    Args:
        points: (P, 2), each (x, y).
        boxes: M boxes.

    Returns:
        (P, M, 4), each (left, top, right, bottom), positive where the point is on the inner side.
    """
    points = points[:, None]
    return torch.cat((points - boxes.tensor[:, :2], boxes.tensor[:, 2:] - points), dim=2)
