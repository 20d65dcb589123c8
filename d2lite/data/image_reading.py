"""Reading images: channel orders, upright orientation, and the size given by the dataset."""

import struct
from typing import Any

import numpy as np
import torch
from PIL import Image

from d2lite.utils.file_io import PathManager

__all__ = ["SizeMismatchError", "check_image_size", "convert_PIL_to_numpy", "convert_image_to_rgb", "read_image"]

# ITU-R BT.601, for RGB and YUV in [0, 1]: yuv = rgb @ matrix.T
_RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])
_YUV_TO_RGB = np.array([[1.0, 0.0, 1.13983], [1.0, -0.39465, -0.58060], [1.0, 2.03211, 0.0]])

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class SizeMismatchError(ValueError):
    """An image does not have the width and height that its dataset gives."""


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Reads an image file, rotated upright by its EXIF orientation.

    Args:
        file_name: a path that the path manager knows.
        format: a PIL mode, "BGR" or "YUV-BT.601"; None keeps the file's.

    Returns:
        (H, W, C) uint8 in [0, 255]; (H, W, 1) for "L"; float in [0, 1] for YUV. It may be a read-only view.
    """
    with PathManager.open(file_name, "rb") as f:
        image = Image.open(f)
        # before EXIF data is asked for, which decodes PNG files too, but in vain the second time: half an image
        image.load()
        # Pillow has turned TIFF files by that, and some versions of it leave the tag
        return convert_PIL_to_numpy(image if image.format == "TIFF" else _apply_exif_orientation(image), format)


def _apply_exif_orientation(image: Image.Image) -> Image.Image:
    """The image rotated upright; a damaged EXIF block leaves it as it is."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def convert_PIL_to_numpy(image: Image.Image, format: str | None) -> np.ndarray:
    """A PIL image as an array in the given format; see `read_image`."""
    if format is not None:
        mode = "RGB" if format in ("BGR", "YUV-BT.601") else format
        image = image if image.mode == mode else image.convert(mode)
    array = np.asarray(image)
    if format == "L":
        return array[:, :, None]
    if format == "BGR":
        return array[:, :, ::-1]
    if format == "YUV-BT.601":
        return (array / 255.0) @ _RGB_TO_YUV.T
    return array


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """An image (H, W, C) in a format of `read_image` as RGB (H, W, 3) uint8; "L" gives (H, W)."""
    image = image.cpu().numpy() if isinstance(image, torch.Tensor) else image
    if format == "BGR":
        return image[:, :, [2, 1, 0]]
    if format == "YUV-BT.601":
        return ((image @ _YUV_TO_RGB.T) * 255.0).clip(0, 255).astype(np.uint8)
    if format == "L":
        return image[:, :, 0]
    image = image.astype(np.uint8)
    return image if format == "RGB" else np.asarray(Image.fromarray(image, mode=format).convert("RGB"))


def check_image_size(dataset_dict: dict[str, Any], image: np.ndarray) -> None:
    """Compares an image with "width" and "height" of its dataset dict, and sets them where they are missing.

    Raises:
        SizeMismatchError: if they differ.
    """
    height, width = image.shape[:2]
    if "width" in dataset_dict or "height" in dataset_dict:
        expected = (dataset_dict.get("width", width), dataset_dict.get("height", height))
        if expected != (width, height):
            where = f" of {dataset_dict['file_name']}" if "file_name" in dataset_dict else ""
            raise SizeMismatchError(
                f"the image{where} is {width} x {height} (width x height), but its dataset gives "
                f"{expected[0]} x {expected[1]}; check the annotations and the EXIF orientation"
            )
    dataset_dict.setdefault("width", width)
    dataset_dict.setdefault("height", height)
