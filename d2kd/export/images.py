"""Images to verify an export with: five, of different sizes, and a batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.data import detection_utils

from .base import Exported, ExportError

#: Shorter side, as a share of INPUT.MIN_SIZE_TEST, and width / height of each image.
_SHAPES = ((1.0, 4 / 3), (0.9, 3 / 4), (0.75, 1.0), (0.85, 16 / 9), (0.6, 3 / 5))
#: INPUT.MIN_SIZE_TEST 0 leaves images as they are.
_USUAL_SIDE = 480
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def example_images(cfg: CfgNode, network: Exported, images: Sequence[Any] = ()) -> list[Tensor]:
    """Returns five images (1, 3, H, W) of different sizes, and a batch (2, 3, H, W); float32, 0 to 255.

    Args:
        cfg: with the sizes that the model is tested on.
        network: whose size they have, where it takes one only.
        images: (H, W, 3) uint8 pictures to take, in turn; drawn ones without any.
    """
    sizes = _sizes(cfg) if not network.fixed_side else [(network.fixed_side, network.fixed_side)] * len(_SHAPES)
    pictures = list(images) or drawn_pictures(len(sizes))
    inputs = [_resized(pictures[i % len(pictures)], size) for i, size in enumerate(sizes)]
    return [*inputs, torch.cat([inputs[2], inputs[2].flip(3)])]


def read_folder(folder: str, input_format: str) -> list[Any]:
    """Returns the first images of a folder, (H, W, 3) uint8 in an order of channels.

    Raises:
        ExportError: there are none, or one cannot be read.
    """
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in _SUFFIXES)[: len(_SHAPES)]
    if not paths:
        raise ExportError(f"--images {folder} has no images ({', '.join(_SUFFIXES)}).")
    found = []
    for path in paths:
        try:
            found.append(detection_utils.read_image(str(path), format=input_format))
        except Exception as error:
            raise ExportError(f"--images: {path} cannot be read: {str(error).partition(chr(10))[0]}") from error
    return found


def _sizes(cfg: CfgNode) -> list[tuple[int, int]]:
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        node = cfg.INPUT.CLASSIFICATION
        shortest, longest = int(node.TEST_SIZE or node.SIZE), 10**6
    else:
        shortest, longest = int(cfg.INPUT.MIN_SIZE_TEST) or _USUAL_SIDE, int(cfg.INPUT.MAX_SIZE_TEST)
    sizes = []
    for share, proportion in _SHAPES:
        height, width = (1.0, proportion) if proportion >= 1 else (1 / proportion, 1.0)
        scale = min(share * shortest, longest / max(height, width))
        sizes.append((round(height * scale), round(width * scale)))
    return sizes


def drawn_pictures(number: int) -> list[Any]:
    """Returns pictures (96, 96, 3) uint8 that look a little like photographs."""
    return [_drawn(seed) for seed in range(number)]


def _drawn(seed: int) -> Any:
    """A picture of smooth colors and bright rectangles, (96, 96, 3)."""
    random = np.random.default_rng(seed)
    smooth = torch.from_numpy(random.uniform(0, 255, (1, 3, 8, 8)))
    picture = torch.nn.functional.interpolate(smooth, size=(96, 96), mode="bicubic")[0].permute(1, 2, 0).numpy()
    for _ in range(6):
        y, x, height, width = random.integers(0, 64, 2).tolist() + random.integers(6, 32, 2).tolist()
        picture[y : y + height, x : x + width] = random.uniform(0, 255, 3)
    return picture.clip(0, 255).astype(np.uint8)


def _resized(picture: Any, size: tuple[int, int]) -> Tensor:
    image = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    return torch.nn.functional.interpolate(image, size=size, mode="bilinear", align_corners=False).round()
