"""Instance masks: as full-size bitmaps, as polygons, and as small grids within boxes."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Union

import numpy as np
import pycocotools.mask as mask_util
import torch
from torchvision.ops import roi_align

from d2lite.layers.mask_ops import paste_masks_in_image
from d2lite.structures.boxes import Boxes
from d2lite.utils.memory import retry_if_cuda_oom

Polygon = np.ndarray | torch.Tensor | Sequence[float]
"""[x0, y0, x1, y1, ...] in pixels."""

MIN_BOX_SIDE = 0.1
"""Minimum side of a box, in pixels, when its content is magnified."""


def polygon_area(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the area enclosed by a polygon with corners (x[i], y[i]), by the shoelace formula."""
    return 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))


def polygons_to_bitmask(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Rasterizes the polygons of one instance as COCO does.

    Args:
        polygons: each [x0, y0, x1, y1, ...] in pixels; their union is taken.
        height, width: of the bitmap.

    Returns:
        (height, width) booleans.
    """
    if len(polygons) == 0:
        return np.zeros((height, width), dtype=bool)
    coordinates = [np.asarray(p, dtype=np.float64).tolist() for p in polygons]
    rles = mask_util.frPyObjects(coordinates, height, width)
    return mask_util.decode(mask_util.merge(rles)).astype(bool)


def rasterize_polygons_within_box(polygons: list[np.ndarray], box: np.ndarray, mask_size: int) -> torch.Tensor:
    """Rasterizes the part of an instance that lies in a box on a square grid, the training target of Mask R-CNN.

    Args:
        polygons: each [x0, y0, x1, y1, ...] in pixels.
        box: (4,), XYXY in pixels.
        mask_size: side of the grid.

    Returns:
        (mask_size, mask_size) booleans.
    """
    corner = np.asarray(box[:2], dtype=np.float64)
    scale = mask_size / np.maximum(np.asarray(box[2:], dtype=np.float64) - corner, MIN_BOX_SIDE)
    in_grid = [((np.asarray(p, dtype=np.float64).reshape(-1, 2) - corner) * scale).ravel() for p in polygons]
    return torch.from_numpy(polygons_to_bitmask(in_grid, mask_size, mask_size))


class BitMasks:
    """Masks of N instances as bitmaps of the image's size.

    Attributes:
        tensor: (N, H, W) booleans.
        image_size: (height, width) in pixels.
    """

    def __init__(self, tensor: torch.Tensor | np.ndarray) -> None:
        """
        Args:
            tensor: (N, H, W); what is not 0 belongs to the instance.
        """
        tensor = torch.as_tensor(tensor).to(torch.bool)
        assert tensor.dim() == 3, f"BitMasks have shape (N, H, W), not {tuple(tensor.shape)}"
        self.tensor = tensor
        self.image_size = tuple(tensor.shape[1:])

    def to(self, *args: Any, **kwargs: Any) -> "BitMasks":
        """Returns these masks moved as by `torch.Tensor.to`."""
        return BitMasks(self.tensor.to(*args, **kwargs))

    @property
    def device(self) -> torch.device:
        """The device that holds the masks."""
        return self.tensor.device

    def __getitem__(self, item: int | slice | torch.Tensor) -> "BitMasks":
        """
        Args:
            item: an integer (one mask is left), a slice, or a boolean or integer tensor of one dimension.

        Returns:
            The selected masks. They may share memory with these.
        """
        if isinstance(item, int):
            return BitMasks(self.tensor[item].unsqueeze(0))
        selected = self.tensor[item]
        assert selected.dim() == 3, f"Indexing BitMasks with {item} does not give shape (N, H, W)"
        return BitMasks(selected)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Iterates over the masks, each (H, W)."""
        yield from self.tensor

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return f"BitMasks(num_instances={len(self)})"

    def nonempty(self) -> torch.Tensor:
        """Returns (N,) booleans: the mask has a pixel."""
        return self.tensor.flatten(1).any(dim=1)

    @staticmethod
    def from_polygon_masks(
        polygon_masks: Union["PolygonMasks", list[list[np.ndarray]]], height: int, width: int
    ) -> "BitMasks":
        """Rasterizes polygons, one list per instance, on an image of the given size."""
        if isinstance(polygon_masks, PolygonMasks):
            polygon_masks = polygon_masks.polygons
        bitmaps = [polygons_to_bitmask(polygons, height, width) for polygons in polygon_masks]
        return BitMasks(np.stack(bitmaps) if bitmaps else np.empty((0, height, width), dtype=bool))

    @staticmethod
    def from_roi_masks(roi_masks: "ROIMasks", boxes: torch.Tensor, height: int, width: int) -> "BitMasks":
        """Pastes masks given within boxes, (N, 4) XYXY, on an image of the given size."""
        return roi_masks.to_bitmasks(boxes, height, width)

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """Resamples each mask in its box to a square grid with ROIAlign (Mask R-CNN, section 3).

        Args:
            boxes: (N, 4), XYXY in pixels, one per mask.
            mask_size: side of the grid.

        Returns:
            (N, mask_size, mask_size) booleans, on the device of the masks: the instance covers half a cell.
        """
        assert len(boxes) == len(self), f"crop_and_resize got {len(boxes)} boxes for {len(self)} masks"
        boxes = boxes.to(device=self.device, dtype=torch.float32)
        index = torch.arange(len(boxes), device=self.device, dtype=boxes.dtype)[:, None]
        rois = torch.cat((index, boxes), dim=1)
        masks = self.tensor[:, None].float()
        return roi_align(masks, rois, (mask_size, mask_size), sampling_ratio=0, aligned=True)[:, 0] >= 0.5

    def get_bounding_boxes(self) -> Boxes:
        """Returns the tight boxes around the masks; an empty mask has the box (0, 0, 0, 0)."""
        x0, x1 = _extent(self.tensor.any(dim=1))
        y0, y1 = _extent(self.tensor.any(dim=2))
        return Boxes(torch.stack((x0, y0, x1, y1), dim=1))

    @staticmethod
    def cat(bitmasks_list: list["BitMasks"]) -> "BitMasks":
        """Concatenates masks of one image size."""
        assert isinstance(bitmasks_list, (list, tuple)) and bitmasks_list, "BitMasks.cat takes a list"
        assert all(isinstance(m, BitMasks) for m in bitmasks_list), "BitMasks.cat takes a list of BitMasks"
        return BitMasks(torch.cat([m.tensor for m in bitmasks_list], dim=0))


def _extent(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one past the last True in the rows of (N, L) booleans, (N,) each; 0 and 0 without any."""
    length = occupied.shape[1]
    position = torch.arange(length, device=occupied.device)
    end = torch.where(occupied, position + 1, 0).amax(dim=1)
    return torch.where(occupied, position, length).amin(dim=1).minimum(end), end


class PolygonMasks:
    """Masks of N instances as polygons, kept on the CPU.

    Attributes:
        polygons: for each instance a list of polygons, each a float64 array [x0, y0, x1, y1, ...] in pixels.
    """

    def __init__(self, polygons: list[list[Polygon]]) -> None:
        """
        Args:
            polygons: for each instance a list of polygons of at least 3 corners, [x0, y0, x1, y1, ...] each.

        Raises:
            ValueError: if the lists are not nested like this, or a polygon has too few or an odd number of
                coordinates.
        """
        if not isinstance(polygons, (list, tuple)):
            raise ValueError(f"PolygonMasks takes a list of instances, each a list of polygons, not {type(polygons)}")
        self.polygons: list[list[np.ndarray]] = [_instance_polygons(i, p) for i, p in enumerate(polygons)]

    def to(self, *args: Any, **kwargs: Any) -> "PolygonMasks":
        """Returns these polygons, which have no device."""
        return self

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return torch.device("cpu")

    def get_bounding_boxes(self) -> Boxes:
        """Returns the tight boxes around the polygons; an instance without any has the box (0, 0, 0, 0)."""
        boxes = np.zeros((len(self), 4), dtype=np.float32)
        for box, polygons in zip(boxes, self.polygons):
            if polygons:
                corners = np.concatenate(polygons).reshape(-1, 2)
                box[:2], box[2:] = corners.min(axis=0), corners.max(axis=0)
        return Boxes(torch.from_numpy(boxes))

    def nonempty(self) -> torch.Tensor:
        """Returns (N,) booleans: the instance has a polygon."""
        return torch.tensor([len(polygons) > 0 for polygons in self.polygons], dtype=torch.bool)

    def __getitem__(self, item: int | slice | list[int] | torch.Tensor | np.ndarray) -> "PolygonMasks":
        """
        Args:
            item: an integer (one instance is left), a slice, a list of integers, or a boolean or integer
                tensor or array of one dimension.
        """
        if isinstance(item, slice):
            return PolygonMasks(self.polygons[item])
        if isinstance(item, (int, np.integer)):
            return PolygonMasks([self.polygons[item]])
        index = np.asarray(item.cpu() if isinstance(item, torch.Tensor) else item)
        if index.size == 0 and index.dtype != bool:
            index = index.astype(np.int64)
        if index.ndim != 1 or index.dtype.kind not in "biu":
            raise ValueError(f"PolygonMasks cannot be indexed with {index.dtype} of shape {index.shape}")
        if index.dtype == bool:
            if len(index) != len(self):
                raise IndexError(f"A mask of length {len(index)} cannot index {len(self)} PolygonMasks")
            index = index.nonzero()[0]
        return PolygonMasks([self.polygons[i] for i in index])

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        """Iterates over the instances, each a list of polygons."""
        return iter(self.polygons)

    def __len__(self) -> int:
        return len(self.polygons)

    def __repr__(self) -> str:
        return f"PolygonMasks(num_instances={len(self)})"

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """Rasterizes each instance in its box on a square grid.

        Args:
            boxes: (N, 4), XYXY in pixels, one per instance.
            mask_size: side of the grid.

        Returns:
            (N, mask_size, mask_size) booleans, on the device of the boxes.
        """
        assert len(boxes) == len(self), f"crop_and_resize got {len(boxes)} boxes for {len(self)} masks"
        if len(self) == 0:
            return torch.empty(0, mask_size, mask_size, dtype=torch.bool, device=boxes.device)
        on_cpu = boxes.detach().cpu().numpy()
        grids = [rasterize_polygons_within_box(p, box, mask_size) for p, box in zip(self.polygons, on_cpu)]
        return torch.stack(grids).to(boxes.device)

    def area(self) -> torch.Tensor:
        """Returns the areas, (N,), in square pixels; where polygons of an instance overlap, both count."""
        areas = [sum(polygon_area(p[0::2], p[1::2]) for p in polygons) for polygons in self.polygons]
        return torch.tensor(areas, dtype=torch.float64)

    @staticmethod
    def cat(polymasks_list: list["PolygonMasks"]) -> "PolygonMasks":
        """Concatenates."""
        assert isinstance(polymasks_list, (list, tuple)) and polymasks_list, "PolygonMasks.cat takes a list"
        assert all(isinstance(m, PolygonMasks) for m in polymasks_list), "PolygonMasks.cat takes a list of PolygonMasks"
        return PolygonMasks(list(itertools.chain.from_iterable(m.polygons for m in polymasks_list)))


def _instance_polygons(index: int, polygons: list[Polygon]) -> list[np.ndarray]:
    if not isinstance(polygons, (list, tuple)):
        raise ValueError(
            f"PolygonMasks takes a list of instances, each a list of polygons; instance {index} is {type(polygons)}"
        )
    arrays = [np.asarray(p.cpu() if isinstance(p, torch.Tensor) else p, dtype=np.float64) for p in polygons]
    for array in arrays:
        if array.ndim != 1 or len(array) % 2 != 0 or len(array) < 6:
            raise ValueError(
                f"A polygon of instance {index} has shape {array.shape}: "
                "it must be [x0, y0, x1, y1, ...] with at least 3 corners"
            )
    return arrays


class ROIMasks:
    """Masks of N instances as small soft grids, each of which covers the instance's box.

    Attributes:
        tensor: (N, M, M), in [0, 1].
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.dim() != 3:
            raise ValueError(f"ROIMasks have shape (N, M, M), not {tuple(tensor.shape)}")
        self.tensor = tensor

    def to(self, device: torch.device) -> "ROIMasks":
        """Returns these masks on another device."""
        return ROIMasks(self.tensor.to(device))

    @property
    def device(self) -> torch.device:
        """The device that holds the masks."""
        return self.tensor.device

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __getitem__(self, item: slice | torch.Tensor) -> "ROIMasks":
        """Returns the masks selected by a slice, or a boolean or integer tensor of one dimension."""
        selected = self.tensor[item]
        if selected.dim() != 3:
            raise ValueError(f"Indexing ROIMasks with {item} does not give shape (N, M, M)")
        return ROIMasks(selected)

    def __repr__(self) -> str:
        return f"ROIMasks(num_instances={len(self)})"

    def to_bitmasks(self, boxes: torch.Tensor, height: int, width: int, threshold: float = 0.5) -> BitMasks:
        """Pastes the masks into an image.

        Args:
            boxes: (N, 4), XYXY in pixels of that image.
            height, width: of the image.
            threshold: from which value on a pixel belongs to the instance.

        Returns:
            Masks of the image's size.
        """
        paste = retry_if_cuda_oom(paste_masks_in_image)
        return BitMasks(paste(self.tensor, boxes, (height, width), threshold=threshold))
