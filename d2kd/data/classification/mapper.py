"""From a record to the input of an image classifier: timm's augmentation, on images as d2kd reads them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from d2kd.config import config_check
from d2kd.errors import ConfigError
from d2kd.modeling.architectures import architecture_class
from detectron2.config import CfgNode, configurable

from ..images import frame_image, read_rgb
from .policies import allow_no_bits, check_policy

#: Values of INPUT.FORMAT for classifiers.
_FORMATS = ("RGB", "BGR")


class ClassificationMapper:
    """Reads, augments and crops one image, as timm's training and evaluation do.

    Random numbers come from the global states of `random`, numpy and torch, which timm draws from.

    Attributes:
        READS_WHOLE: it needs no look at a file before: what cannot be used fails here.
    """

    READS_WHOLE = True

    @configurable
    def __init__(self, transform: Any, *, bgr: bool = False) -> None:
        """
        Args:
            transform: from an RGB image of Pillow's to a tensor (3, H, W) uint8.
            bgr: whether the model wants blue first.
        """
        self.transform = transform
        self.bgr = bgr

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Constructor arguments from a configuration."""
        return {"transform": build_transform(cfg, is_train), "bgr": cfg.INPUT.FORMAT == "BGR"}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: a record with `file_name` and `label`. It is not changed.

        Returns:
            The record with `image`, (3, S, S) uint8 in the order of INPUT.FORMAT, and `height` and `width` of the file.
        """
        dataset_dict = dict(dataset_dict)
        frame = dataset_dict.pop("frame", None)
        image = read_rgb(dataset_dict["file_name"]) if frame is None else frame_image(frame)
        width, height = image.size
        pixels: Tensor = self.transform(image)
        return {**dataset_dict, "image": pixels.flip(0) if self.bgr else pixels, "height": height, "width": width}


def build_transform(cfg: CfgNode, is_train: bool) -> Any:
    """Returns timm's transform of a configuration, up to uint8: no normalization, and no erasing.

    Args:
        cfg: gives INPUT.CLASSIFICATION, and the mean color for what rotated images leave open.
        is_train: whether to augment, or to cut out the center.
    """
    from timm.data.transforms_factory import create_transform  # slow, and of no use to detectors

    node = cfg.INPUT.CLASSIFICATION
    random = node.INTERPOLATION == "random"
    transform = create_transform(
        node.SIZE if is_train or not node.TEST_SIZE else node.TEST_SIZE,
        is_training=is_train,
        use_prefetcher=True,
        scale=tuple(node.SCALE),
        ratio=tuple(node.RATIO),
        hflip=node.HFLIP,
        vflip=node.VFLIP,
        color_jitter=node.COLOR_JITTER,
        auto_augment=node.AUTO_AUGMENT or None,
        interpolation="bicubic" if random and not is_train else node.INTERPOLATION,
        mean=tuple(min(max(value / 255, 0.0), 1.0) for value in _rgb(cfg, cfg.MODEL.PIXEL_MEAN)),
        crop_pct=node.CROP_PCT,
    )
    allow_no_bits(transform)
    return transform


def _rgb(cfg: CfgNode, values: Sequence[float]) -> Sequence[float]:
    return values[::-1] if cfg.INPUT.FORMAT == "BGR" else values


@config_check
def check_inputs(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: what an image classifier cannot work with in INPUT or in the batch size.
    """
    if not architecture_class(cfg).CLASSIFIES_IMAGES:
        return
    node = cfg.INPUT.CLASSIFICATION
    if cfg.INPUT.FORMAT not in _FORMATS:
        raise ConfigError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; an image classifier takes {' or '.join(_FORMATS)}.")
    check_policy("INPUT.CLASSIFICATION.AUTO_AUGMENT", node.AUTO_AUGMENT, lambda: build_transform(cfg, True))
    require_pairs(cfg, cfg.SOLVER.IMS_PER_BATCH)


def require_pairs(cfg: CfgNode, batch_size: int, where: str = "") -> None:
    """Checks that a batch consists of pairs where labels are mixed.

    Args:
        cfg: of a classifier.
        batch_size: images of a batch.
        where: " on each of 3 processes", for the message.

    Raises:
        ConfigError: its size is odd.
    """
    node = cfg.INPUT.CLASSIFICATION
    if (node.MIXUP > 0 or node.CUTMIX > 0) and batch_size % 2:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}{where}; with INPUT.CLASSIFICATION.MIXUP or CUTMIX "
            "images are mixed in pairs, so that each process needs an even number of them."
        )
