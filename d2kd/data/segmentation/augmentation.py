"""How images and label maps are varied in training: size, crop, flip, and colors."""

from typing import Any

import cv2
import numpy as np

from d2kd.errors import ConfigError
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T

from .resized_crop import ResizedCrop


class PhotometricDistortion(T.Augmentation):
    """Changes brightness, contrast, saturation and hue, each of them in half of the images.

    The distortion of SSD (Liu et al., arXiv 1512.02325, section 2.2), with the ranges of recipes of segmentation.
    Contrast comes before or after saturation and hue, with equal chance.
    """

    def __init__(
        self,
        image_format: str,
        brightness: float = 32.0,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 18.0,
    ) -> None:
        """
        Args:
            image_format: "BGR" or "RGB".
            brightness: most that is added to or taken from the values, of 0 to 255.
            contrast, saturation: ranges of the factors.
            hue: most that it is turned by either way, of 180.

        Raises:
            ValueError: another format.
        """
        super().__init__()
        if image_format not in ("BGR", "RGB"):
            raise ValueError(f"image_format is {image_format}; colors are distorted in BGR or RGB images.")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draws what is changed, by how much."""
        shift = np.random.uniform(-self.brightness, self.brightness) if _chance() else 0.0
        early = _chance()
        contrast = np.random.uniform(*self.contrast) if _chance() else 1.0
        saturation = np.random.uniform(*self.saturation) if _chance() else 1.0
        turn = int(np.random.uniform(-self.hue, self.hue)) if _chance() else 0
        values = np.arange(256, dtype=np.float64)
        brighter, stronger = _table(values + shift), _table(values * contrast)
        first, last = (stronger[brighter], _table(values)) if early else (brighter, stronger)
        return T.ColorTransform(lambda pixels: self._distort(pixels, first, saturation, turn, last))

    def _distort(
        self, pixels: np.ndarray, first: np.ndarray, saturation: float, turn: int, last: np.ndarray
    ) -> np.ndarray:
        """Tables of 256 values take the place of arithmetic on pixels, which are uint8 (H, W, 3)."""
        changed = cv2.LUT(pixels, first)
        if saturation != 1.0 or turn:
            rgb = self.image_format == "RGB"
            hsv = cv2.cvtColor(changed, cv2.COLOR_RGB2HSV if rgb else cv2.COLOR_BGR2HSV)
            values = np.arange(256)
            tables = np.stack([(values + turn) % 180, _table(values * saturation), values], axis=-1)
            hsv = cv2.LUT(hsv, tables.astype(np.uint8)[None])
            changed = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB if rgb else cv2.COLOR_HSV2BGR)
        return cv2.LUT(changed, last)


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[Any]:
    """Returns what INPUT asks for in segmentors: resize, crop, flip, colors, in that order.

    Detectron2's own mapper would crop first, so that a crop of so many pixels would be resized; recipes of segmentation
    cut it out of the resized image. Images that are smaller are padded when the batch is made, with pixels that are
    ignored.

    Raises:
        ConfigError: INPUT.COLOR_AUG_SSD with images that have no colors.
    """
    augmentations: list[Any] = list(detection_utils.build_augmentation(cfg, is_train))
    if not is_train:
        return augmentations
    crop = cfg.INPUT.CROP
    if crop.ENABLED:
        ignored = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        augmentations[0] = ResizedCrop(augmentations[0], crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, ignored)
    if cfg.INPUT.COLOR_AUG_SSD:
        if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
            raise ConfigError(
                f"INPUT.COLOR_AUG_SSD distorts colors, and INPUT.FORMAT is {cfg.INPUT.FORMAT}: set it to False, or the "
                "format to BGR or RGB."
            )
        augmentations.append(PhotometricDistortion(cfg.INPUT.FORMAT))
    return augmentations


def _chance() -> bool:
    return bool(np.random.randint(2))


def _table(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)
