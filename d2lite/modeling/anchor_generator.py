"""Anchor boxes: the reference boxes that dense heads and the RPN classify and refine."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import ShapeSpec
from d2lite.structures import Boxes
from d2lite.utils.registry import Registry

ANCHOR_GENERATOR_REGISTRY = Registry("ANCHOR_GENERATOR")
"""Modules that turn a list of feature maps into a list of `Boxes`, one per level.

Called as `cls(cfg, input_shape)` with `input_shape` a list of `ShapeSpec`.
"""


def build_anchor_generator(cfg: CfgNode, input_shape: list[ShapeSpec]) -> nn.Module:
    """Builds the generator named by `cfg.MODEL.ANCHOR_GENERATOR.NAME` for feature maps of `input_shape`."""
    name = cfg.MODEL.ANCHOR_GENERATOR.NAME
    if name == "RotatedAnchorGenerator":
        message = "d2lite leaves out rotated boxes; install Detectron2 to use them."
        raise NotImplementedError(f"MODEL.ANCHOR_GENERATOR.NAME is {name}: {message}")
    return ANCHOR_GENERATOR_REGISTRY.build(name, cfg, input_shape)


@ANCHOR_GENERATOR_REGISTRY.register()
class DefaultAnchorGenerator(nn.Module):
    """Axis-aligned anchors of fixed sizes and aspect ratios at every cell of every feature map
    (Faster R-CNN, arXiv 1506.01497, section 3.1.1).

    The anchors of one batch shape are computed once and cached for later batches of that shape.
    """

    box_dim: int = 4
    """Numbers that describe one anchor."""

    cache_size: int = 32
    """Number of batch shapes in the cache, which drops the least recently used one."""

    @configurable
    def __init__(
        self,
        *,
        sizes: Sequence[float] | Sequence[Sequence[float]],
        aspect_ratios: Sequence[float] | Sequence[Sequence[float]],
        strides: Sequence[int],
        offset: float = 0.5,
    ) -> None:
        """
        Args:
            sizes: anchor sizes (square root of the area, in pixels of the input image): one list for
                each level, or a single (possibly flat) list for all levels.
            aspect_ratios: height / width of the anchors, in the same form as `sizes`.
            strides: stride of each level, in pixels.
            offset: where the center of the first anchor lies, as a fraction of the stride, in [0, 1).
        """
        super().__init__()
        assert 0.0 <= offset < 1.0, f"the anchor offset must be in [0, 1), got {offset}"
        self.strides = list(strides)
        self.offset = offset
        sizes = _one_per_level(sizes, len(self.strides), "sizes")
        aspect_ratios = _one_per_level(aspect_ratios, len(self.strides), "aspect_ratios")
        self.cell_anchors = BufferList(self.generate_cell_anchors(s, a).float() for s, a in zip(sizes, aspect_ratios))
        # The keys are strings because TorchScript rejects a module with a dict of other keys.
        self._cache: OrderedDict[str, list[tuple[torch.Tensor, int]]] = OrderedDict()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        """Constructor arguments from MODEL.ANCHOR_GENERATOR, and the strides of `input_shape`."""
        node, strides = cfg.MODEL.ANCHOR_GENERATOR, [shape.stride for shape in input_shape]
        return dict(sizes=node.SIZES, aspect_ratios=node.ASPECT_RATIOS, strides=strides, offset=node.OFFSET)

    @property
    @torch.jit.unused
    def num_anchors(self) -> list[int]:
        """Anchors per location, for each level (same as `num_cell_anchors`)."""
        return self.num_cell_anchors

    @property
    @torch.jit.unused
    def num_cell_anchors(self) -> list[int]:
        """Anchors per location, for each level."""
        return [len(anchors) for anchors in self.cell_anchors]

    def generate_cell_anchors(
        self,
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1, 2),
    ) -> torch.Tensor:
        """Anchors centered at (0, 0).

        Returns:
            (len(sizes) * len(aspect_ratios), 4) XYXY boxes; the aspect ratio varies fastest. A box of size
            `s` and aspect ratio `a` has area s^2 and height / width = a.
        """
        half = []
        for size in sizes:
            for ratio in aspect_ratios:
                width = math.sqrt(size**2.0 / ratio)
                half.append((width / 2.0, ratio * width / 2.0))
        half = torch.tensor(half).reshape(-1, 2)
        return torch.cat([-half, half], dim=1)

    def forward(self, features: list[torch.Tensor]) -> list[Boxes]:
        """
        Args:
            features: one feature map (N, C, Hi, Wi) per level.

        Returns:
            One `Boxes` of Hi * Wi * num_anchors[i] anchors per level, ordered by row, column, anchor.
            They are shared between calls: do not change them in place.
        """
        grid_sizes = [(int(feature.shape[-2]), int(feature.shape[-1])) for feature in features]
        if not torch.jit.is_scripting():
            return [Boxes(x) for x in self._grid_anchors(grid_sizes)]
        anchors: list[Boxes] = []
        for i, (_, cell) in enumerate(self.cell_anchors.named_buffers()):
            anchors.append(Boxes(_shift_anchors(cell, grid_sizes[i], self.strides[i], self.offset)))
        return anchors

    @torch.jit.unused
    def _grid_anchors(self, grid_sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        cells = list(self.cell_anchors)
        key = f"{grid_sizes} {cells[0].device} {cells[0].dtype}"
        entry = self._cache.get(key)
        if entry is None or any(x._version != version for x, version in entry):
            # Tensors created in inference mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                anchors = [
                    _shift_anchors(cell, size, stride, self.offset)
                    for cell, size, stride in zip(cells, grid_sizes, self.strides, strict=True)
                ]
            self._cache[key] = entry = [(x, x._version) for x in anchors]
            if len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return [x for x, _ in entry]


class BufferList(nn.Module):
    """A list of tensors that follow their module's device and dtype, but are not saved with it."""

    def __init__(self, buffers: Sequence[torch.Tensor] | Iterator[torch.Tensor]) -> None:
        super().__init__()
        for tensor in buffers:
            self.register_buffer(str(len(self)), tensor, persistent=False)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from self._buffers.values()

    def __getitem__(self, index: int) -> torch.Tensor:
        return list(self._buffers.values())[index]


def _one_per_level(params: Sequence, num_levels: int, name: str) -> list:
    """Repeats a single list of anchor parameters for every level, or checks that there is one for each."""
    assert isinstance(params, Sequence) and len(params) > 0, f"anchor {name} must be a list, got {params!r}"
    if not isinstance(params[0], Sequence):
        params = [params]
    if len(params) == 1:
        params = list(params) * num_levels
    assert len(params) == num_levels, (
        f"anchor {name} has {len(params)} lists for {num_levels} feature levels; "
        f"give one list, or one per level (MODEL.ANCHOR_GENERATOR.{name.upper()})"
    )
    return list(params)


def _shift_anchors(cell: torch.Tensor, size: tuple[int, int], stride: int, offset: float) -> torch.Tensor:
    """Copies of the `cell` anchors (A, 4) at every point of a (H, W) grid: (H * W * A, 4)."""
    height, width = size
    y = (torch.arange(height, dtype=cell.dtype, device=cell.device) + offset) * stride
    x = (torch.arange(width, dtype=cell.dtype, device=cell.device) + offset) * stride
    y, x = torch.meshgrid(y, x, indexing="ij")
    shift = torch.stack([x, y, x, y], dim=-1)
    return (shift[:, :, None] + cell).reshape(-1, 4)
