"""META_ARCHITECTURE "Segmentor": Detectron2's SemanticSegmentor, which predicts from whole images or from windows."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from d2kd.config import config_check, declare_keys
from d2kd.errors import ConfigError
from d2kd.settings import length, setting
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor
from detectron2.structures import ImageList

from ..sem_seg import SlidingWindows, resize_logits

declare_keys(  # META_ARCHITECTURE "Segmentor"
    "TEST.SLIDING_WINDOW",
    ENABLED=setting(False, "Predict from overlapping windows, whose logits are averaged; False sees images whole."),
    SIZE=setting([769, 769], "Height and width of a window, in pixels.", at_least=1, rule=length(2)),
    STRIDE=setting(
        [513, 513],
        "Rows and columns from one window to the next, in pixels; at most its SIZE.",
        at_least=1,
        rule=length(2),
    ),
    BATCH=setting(4, "Windows that are predicted together.", at_least=1),
)


class Segmentor(SemanticSegmentor):
    """It trains as Detectron2's SemanticSegmentor does, and has its parameter names.

    In evaluation logits are resized to the image itself, also where its sides are no multiples of the stride. Images of
    one size are predicted together, others one by one, as padding would change what pooling sees.
    """

    @configurable
    def __init__(self, *, windows: SlidingWindows | None = None, **kwargs: Any) -> None:
        """
        Args:
            windows: to predict from; None predicts from whole images.
            kwargs: of Detectron2's SemanticSegmentor.
        """
        super().__init__(**kwargs)
        self.windows = windows
        self._is_tapped = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments from the configuration."""
        node = cfg.TEST.SLIDING_WINDOW
        size, stride = (int(node.SIZE[0]), int(node.SIZE[1])), (int(node.STRIDE[0]), int(node.STRIDE[1]))
        windows = SlidingWindows(size, stride, node.BATCH) if node.ENABLED else None
        return {**super().from_config(cfg), "windows": windows}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: one dict an image: "image" (C, H, W), in training "sem_seg" (H, W), and optionally "height"
                and "width", the size wanted.

        Returns:
            In training a dict of losses; else {"sem_seg": (num_classes, height, width) logits} for each image.
        """
        if self.training:
            return super().forward(batched_inputs)
        images = [
            (x["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        found = []
        for x, image, logits in zip(batched_inputs, images, self.image_logits(images)):
            size = (x.get("height", image.shape[-2]), x.get("width", image.shape[-1]))
            found.append({"sem_seg": resize_logits(logits[None], size, self._align_corners)[0]})
        return found

    def image_logits(self, images: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields the logits (K, H, W) of each image, in its own size.

        Args:
            images: (C, H, W) each, normalized.
        """
        if self._is_tapped or len({image.shape for image in images}) == 1 and self.windows is None:
            yield from self.batch_logits(images)
            return
        for image in images:
            yield from [self.windows(image, self.batch_logits)] if self.windows else self.batch_logits([image])

    def batch_logits(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Returns the logits (K, H, W) of images (C, H, W) that pass the network together, padded to one size."""
        batch = ImageList.from_tensors(
            list(images), self.backbone.size_divisibility, padding_constraints=self.backbone.padding_constraints
        )
        logits = self.sem_seg_head.layers(self.backbone(batch.tensor))
        logits = resize_logits(logits, (batch.tensor.shape[-2], batch.tensor.shape[-1]), self._align_corners)
        return [x[:, :h, :w] for x, (h, w) in zip(logits, batch.image_sizes)]

    @property
    def _align_corners(self) -> bool:
        return bool(getattr(self.sem_seg_head, "align_corners", False))

    @contextlib.contextmanager
    def while_tapped(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Sees a batch in one pass, without windows, while layers are tapped; see `FeatureTaps`."""
        before, self._is_tapped = self._is_tapped, True
        try:
            yield
        finally:
            self._is_tapped = before


@config_check
def check_windows(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: windows leave gaps between them, or another architecture has none.
    """
    node = cfg.TEST.SLIDING_WINDOW
    if not node.ENABLED:
        return
    name = cfg.MODEL.META_ARCHITECTURE
    if name in META_ARCH_REGISTRY and not issubclass(META_ARCH_REGISTRY.get(name), Segmentor):
        raise ConfigError(
            f"TEST.SLIDING_WINDOW.ENABLED is True, and MODEL.META_ARCHITECTURE {name} has no sliding windows: take "
            "Segmentor (the weights of a SemanticSegmentor fit), or set it False."
        )
    if any(stride > size for stride, size in zip(node.STRIDE, node.SIZE)):
        raise ConfigError(
            f"TEST.SLIDING_WINDOW.STRIDE is {list(node.STRIDE)}; it must be at most SIZE, {list(node.SIZE)}, or "
            "pixels between two windows would be in none."
        )


if "Segmentor" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(Segmentor)
