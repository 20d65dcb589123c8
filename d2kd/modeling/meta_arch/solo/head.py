"""The heads of SOLO: a class for every cell of a grid, and a mask for every cell, each at every level of a pyramid."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.layers import upcast_half
from detectron2.layers import Conv2d, get_norm

#: Of one level: what the mask branch gives for a batch, from which `BaseSOLOHead.cell_masks` makes single masks.
MaskMaps = Any


class BaseSOLOHead(nn.Module):
    """What both heads share: resized inputs, coordinate channels and the class branch (sections 3.1 to 3.3).

    Level i predicts `grids[i]` x `grids[i]` cells. Cells are numbered row by row.

    Attributes:
        grids: cells along a side, of every level.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        grids: Sequence[int],
        num_convs: int = 7,
        conv_dim: int = 256,
        norm: str = "GN",
        prior_prob: float = 0.01,
    ) -> None:
        """
        Args:
            in_channels: of every level of the pyramid.
            num_classes: K, without background.
            grids: cells along a side, of every level.
            num_convs: 3x3 convolutions of each branch.
            conv_dim: their width.
            norm: normalization behind each of them.
            prior_prob: what the untrained head gives to classes and pixels.
        """
        super().__init__()
        self.grids = list(grids)
        self._tower_settings = (in_channels, num_convs, conv_dim, norm)
        self._bias = -math.log((1 - prior_prob) / prior_prob)
        self.cls_tower = self._tower(coordinates=0)
        self.cls_score = nn.Conv2d(conv_dim if num_convs else in_channels, num_classes, 3, padding=1)

    def _tower(self, coordinates: int) -> nn.Sequential:
        in_channels, num_convs, conv_dim, norm = self._tower_settings
        channels = in_channels + coordinates
        layers: list[nn.Module] = []
        for _ in range(num_convs):
            layer = Conv2d(
                channels,
                conv_dim,
                kernel_size=3,
                padding=1,
                bias=not norm,
                norm=get_norm(norm, conv_dim),
                activation=F.relu,
            )
            layers.append(layer)
            channels = conv_dim
        return nn.Sequential(*layers)

    def _initialize(self, outputs: Sequence[nn.Module]) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.constant_(module.bias, self._bias if module in outputs else 0.0)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[MaskMaps]]:
        """
        Args:
            features: the pyramid, (N, C, Hi, Wi) of each level, finest first.

        Returns:
            Class logits (N, K, Gi, Gi) and mask maps of each level.
        """
        inputs = resize_pyramid(features)
        return self.class_logits(inputs), [self.mask_maps(level, x) for level, x in enumerate(inputs)]

    def class_logits(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Returns the logits (N, K, Gi, Gi) of each level, from what `resize_pyramid` gives."""
        cells = [_resize(x, (grid, grid)) for x, grid in zip(inputs, self.grids)]
        return [self.cls_score(self.cls_tower(x)) for x in cells]

    def mask_maps(self, level: int, inputs: Tensor) -> MaskMaps:
        """Returns what `cell_masks` makes the masks of a level from, given its input (N, C, h, w)."""
        raise NotImplementedError

    def mask_size(self, maps: MaskMaps) -> tuple[int, int]:
        """Returns height and width of the masks of a level, 2h and 2w."""
        raise NotImplementedError

    def cell_masks(self, level: int, maps: MaskMaps, image: int, cells: Tensor, size: Any = None) -> Tensor:
        """Returns the masks of some cells only; those of all cells of a level may take gigabytes.

        Args:
            level: of the pyramid.
            maps: of that level, see `mask_maps`.
            image: place of an image in the batch.
            cells: (P,) numbers of cells.
            size: (height, width) to which probabilities are resized; None leaves them at 2h x 2w.

        Returns:
            (P, height, width) probabilities, in float32 or more.
        """
        raise NotImplementedError


class SOLOHead(BaseSOLOHead):
    """The plain head: one mask channel for every cell."""

    def __init__(self, **arguments: Any) -> None:
        """Takes the arguments of `BaseSOLOHead`."""
        super().__init__(**arguments)
        self.mask_tower = self._tower(coordinates=2)
        width = self.cls_score.in_channels + (0 if len(self.mask_tower) else 2)
        self.mask_pred = nn.ModuleList([nn.Conv2d(width, grid**2, 1) for grid in self.grids])
        self._initialize([self.cls_score, *self.mask_pred])

    def mask_maps(self, level: int, inputs: Tensor) -> Tensor:
        """Returns the tower's features (N, C', h, w)."""
        return self.mask_tower(torch.cat([inputs, *coordinates(inputs)], dim=1))

    def mask_size(self, maps: Tensor) -> tuple[int, int]:
        """As in the base class."""
        return 2 * maps.shape[-2], 2 * maps.shape[-1]

    def cell_masks(self, level: int, maps: Tensor, image: int, cells: Tensor, size: Any = None) -> Tensor:
        """As in the base class."""
        return _resize_masks(self.cell_logits(level, maps, image, cells).sigmoid(), size)

    def cell_logits(self, level: int, maps: Tensor, image: int, cells: Tensor) -> Tensor:
        """Returns the mask logits (P, 2h, 2w) of some cells; arguments as of `cell_masks`.

        The 1x1 convolution comes before the upsampling here, and only for these cells: both are linear and commute, as
        the weights of bilinear interpolation sum to 1.
        """
        layer: Any = self.mask_pred[level]
        features = maps[image]
        weight, bias = layer.weight[cells].flatten(1), layer.bias[cells, None]
        logits = upcast_half(weight @ features.flatten(1)) + bias
        return _twice(logits.view(-1, *features.shape[1:]))


class DecoupledSOLOHead(BaseSOLOHead):
    """The decoupled head (section 5.1): a mask is the product of a map of its column and one of its row."""

    def __init__(self, **arguments: Any) -> None:
        """Takes the arguments of `BaseSOLOHead`."""
        super().__init__(**arguments)
        self.mask_tower_x, self.mask_tower_y = self._tower(coordinates=1), self._tower(coordinates=1)
        width = self.cls_score.in_channels + (0 if len(self.mask_tower_x) else 1)
        self.mask_pred_x = nn.ModuleList([nn.Conv2d(width, grid, 3, padding=1) for grid in self.grids])
        self.mask_pred_y = nn.ModuleList([nn.Conv2d(width, grid, 3, padding=1) for grid in self.grids])
        self._initialize([self.cls_score, *self.mask_pred_x, *self.mask_pred_y])

    def mask_maps(self, level: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits of columns and of rows, (N, G, 2h, 2w) each."""
        x, y = coordinates(inputs)
        columns = self.mask_tower_x(torch.cat([inputs, x], dim=1))
        rows = self.mask_tower_y(torch.cat([inputs, y], dim=1))
        return self.mask_pred_x[level](_twice(columns)), self.mask_pred_y[level](_twice(rows))

    def mask_size(self, maps: tuple[Tensor, Tensor]) -> tuple[int, int]:
        """As in the base class."""
        return maps[0].shape[-2], maps[0].shape[-1]

    def cell_masks(
        self, level: int, maps: tuple[Tensor, Tensor], image: int, cells: Tensor, size: Any = None
    ) -> Tensor:
        """As in the base class; the maps are resized, and not their products."""
        columns, rows = (_resize_masks(upcast_half(x[image]).sigmoid(), size) for x in maps)
        grid = self.grids[level]
        return columns[cells % grid] * rows[cells.div(grid, rounding_mode="floor")]


def resize_pyramid(features: Sequence[Tensor]) -> list[Tensor]:
    """Returns the levels as the head takes them: the first one halved, the last one as large as that before it."""
    first, *middle, last = features
    size = middle[-1].shape[-2:]
    return [
        F.interpolate(first, scale_factor=0.5, mode="bilinear", align_corners=False),
        *middle,
        _resize(last, (size[0], size[1])),
    ]


def head_strides(strides: Sequence[int]) -> list[int]:
    """Returns the strides of the levels that `resize_pyramid` gives, from those of a pyramid, in pixels."""
    first, *middle, _ = strides
    return [2 * first, *middle, middle[-1]]


def coordinates(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where the positions of a map (N, C, H, W) lie: x and y, (N, 1, H, W) each, from -1 to 1."""
    n, _, height, width = x.shape
    columns = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype)
    rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)
    return columns.expand(n, 1, height, width), rows[:, None].expand(n, 1, height, width)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _twice(x: Tensor) -> Tensor:
    batch = x if x.dim() == 4 else x[None]
    if not batch.numel():  # there is nothing to interpolate, and PyTorch refuses it
        return x.new_empty(*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1]) + x.sum()
    large = F.interpolate(batch, scale_factor=2.0, mode="bilinear", align_corners=False)
    return large if x.dim() == 4 else large[0]


def _resize_masks(masks: Tensor, size: Any) -> Tensor:
    """(P, h, w) to (P, *size)."""
    if size is None or tuple(masks.shape[1:]) == tuple(size):
        return masks
    return _resize(masks[None], size)[0] if len(masks) else masks.new_empty(0, *size)
