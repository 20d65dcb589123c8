"""Deterministic image transforms that fvcore does not have: resize, extent, rotation and color changes."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.transforms.transform import HFlipTransform, NoOpTransform, Transform
from PIL import Image

__all__ = ["ExtentTransform", "ResizeTransform", "RotationTransform", "ColorTransform", "PILColorTransform"]

NEAREST, BILINEAR, BICUBIC = (int(getattr(Image.Resampling, k)) for k in ("NEAREST", "BILINEAR", "BICUBIC"))
_TORCH_MODES = {NEAREST: "nearest", BILINEAR: "bilinear", BICUBIC: "bicubic"}


class ResizeTransform(Transform):
    """Resizes an image of (h, w) pixels to (new_h, new_w)."""

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None) -> None:
        """
        Args:
            h, w: size of the input, in pixels.
            new_h, new_w: size of the output, in pixels.
            interp: a PIL resampling number; bilinear when None.
        """
        super().__init__()
        interp = BILINEAR if interp is None else interp
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resizes (H, W), (H, W, C) or (N, H, W, C).

        uint8 goes through PIL, which antialiases when it downsamples; other types go through
        `torch.nn.functional.interpolate`, which does not.
        """
        height, width = img.shape[:2] if img.ndim < 4 else img.shape[1:3]
        assert (height, width) == (self.h, self.w), (
            f"ResizeTransform is for images of {self.h} x {self.w} (height x width), got {height} x {width}"
        )
        interp = self.interp if interp is None else interp
        if img.dtype == np.uint8 and img.ndim < 4:
            return _apply_pil(img, lambda image: image.resize((self.new_w, self.new_h), interp))
        return _interpolate(img, (self.new_h, self.new_w), interp)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Scales points (N, 2), given as (x, y). Integers stay integers, truncated toward 0, as in Detectron2."""
        scale = np.array([self.new_w * 1.0 / self.w, self.new_h * 1.0 / self.h])
        return (coords * scale).astype(coords.dtype, copy=False)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resizes a label map (H, W) to its nearest labels."""
        return self.apply_image(segmentation, interp=NEAREST)

    def inverse(self) -> "ResizeTransform":
        """The resize back to (h, w)."""
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)


class ExtentTransform(Transform):
    """Takes a rectangle of the input, which may extend beyond it, and resizes it to the output size.

    Label maps are resized as images are, as in Detectron2: give the nearest resampling number for them.
    """

    def __init__(
        self,
        src_rect: Sequence[float],
        output_size: tuple[int, int],
        interp: int = BILINEAR,
        fill: int = 0,
    ) -> None:
        """
        Args:
            src_rect: (x0, y0, x1, y1) in input pixels.
            output_size: (height, width) of the output.
            interp: a PIL resampling number.
            fill: value of the pixels that lie outside the input.
        """
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Transforms (H, W) or (H, W, C)."""
        height, width = self.output_size
        interp = self.interp if interp is None else interp

        def extent(image: Image.Image) -> Image.Image:
            fill = self.fill if len(image.getbands()) == 1 else (self.fill,) * len(image.getbands())
            method = Image.Transform.EXTENT
            return image.transform((width, height), method, tuple(self.src_rect), interp, fillcolor=fill)

        return _apply_pil(img, extent)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Transforms points (N, 2), given as (x, y)."""
        x0, y0, x1, y1 = self.src_rect
        height, width = self.output_size
        scale = np.array([width / (x1 - x0), height / (y1 - y0)])
        return ((coords - np.array([x0, y0])) * scale).astype(np.float32)


class RotationTransform(Transform):
    """Rotates counter-clockwise by an angle; what comes from outside the input is 0."""

    def __init__(
        self,
        h: int,
        w: int,
        angle: float,
        expand: bool = True,
        center: tuple[float, float] | None = None,
        interp: int | str | None = None,
    ) -> None:
        """
        Args:
            h, w: size of the input, in pixels.
            angle: degrees, counter-clockwise.
            expand: make the output large enough for the whole rotated image; `center` then has no effect.
            center: (x, y) of the center of rotation; the image center when None.
            interp: "bilinear" (default) or "nearest", or OpenCV's numbers for them (1, 0).
        """
        super().__init__()
        middle = np.array([w / 2, h / 2])
        center = middle if center is None or expand else np.asarray(center, dtype=float)
        self._set_attributes(locals())
        cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
        self.bound_h, self.bound_w = h, w
        if expand:
            size = (h * abs(sin) + w * abs(cos), h * abs(cos) + w * abs(sin))
            self.bound_w, self.bound_h = (int(v) for v in np.rint(size))
        # output = rotation @ (input - center) + target
        self.rotation = np.array([[cos, sin], [-sin, cos]])
        self.target = np.array([self.bound_w / 2, self.bound_h / 2]) if expand else center

    def apply_image(self, img: np.ndarray, interp: int | str | None = None) -> np.ndarray:
        """Rotates (H, W) or (H, W, C) to (bound_h, bound_w[, C])."""
        interp = self.interp if interp is None else interp
        if img.size == 0 or (self.angle % 360 == 0 and (self.h, self.w) == (self.bound_h, self.bound_w)):
            return img
        mode = "nearest" if interp in (0, "nearest") else "bilinear"
        planes = np.ascontiguousarray(np.atleast_3d(img).transpose(2, 0, 1), dtype=np.float64)
        out = F.grid_sample(torch.from_numpy(planes)[None], self._grid()[None], mode=mode, align_corners=False)[0]
        out = out.permute(1, 2, 0).numpy()
        if not np.issubdtype(img.dtype, np.floating):
            out = np.rint(out)
        return out.reshape(self.bound_h, self.bound_w, *img.shape[2:]).astype(img.dtype)

    def _grid(self) -> torch.Tensor:
        """Source position of each output pixel center, (bound_h, bound_w, 2), in grid_sample's [-1, 1]."""
        ys, xs = np.mgrid[: self.bound_h, : self.bound_w] + 0.5
        source = (np.stack([xs, ys], -1) - self.target) @ self.rotation + self.center
        return torch.from_numpy(source * (2 / np.array([self.w, self.h])) - 1)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Rotates points (N, 2), given as (x, y)."""
        coords = np.asarray(coords, dtype=float)
        if len(coords) == 0:
            return coords
        return (coords - self.center) @ self.rotation.T + self.target

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Rotates a label map (H, W) with nearest labels."""
        return self.apply_image(segmentation, interp="nearest")

    def inverse(self) -> "RotationTransform":
        """The rotation back to an image of (h, w)."""
        size = (self.bound_h, self.bound_w)
        back = RotationTransform(*size, -self.angle, self.expand, self.target, self.interp)
        back.bound_h, back.bound_w = self.h, self.w
        back.center, back.target = self.target, self.center
        return back


class ColorTransform(Transform):
    """Applies a function to the pixel values; coordinates and labels stay as they are."""

    def __init__(self, op: Callable[[np.ndarray], np.ndarray]) -> None:
        """
        Args:
            op: takes and returns an image array of the same height and width.

        Raises:
            ValueError: if `op` cannot be called.
        """
        if not callable(op):
            raise ValueError(f"op must be callable, got {type(op).__name__}")
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Returns op(img)."""
        return self.op(img)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Returns the points unchanged."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Returns the label map unchanged."""
        return segmentation

    def inverse(self) -> Transform:
        """Returns the identity, because no coordinate changes."""
        return NoOpTransform()


class PILColorTransform(ColorTransform):
    """A `ColorTransform` whose function takes and returns PIL images."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Returns op of the image, as an array."""
        return np.asarray(self.op(Image.fromarray(img)))


def _apply_pil(img: np.ndarray, operation: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Applies a PIL operation that treats all channels alike to (H, W) or (H, W, C)."""
    if img.ndim == 2:
        return np.asarray(operation(Image.fromarray(img)))
    if img.dtype == np.uint8 and img.shape[2] == 3:
        if img.strides[2] < 0:
            # A BGR view of RGB memory: PIL needs no copy if it gets the channels in the order of memory.
            return _apply_pil(img[:, :, ::-1], operation)[:, :, ::-1]
        return np.asarray(operation(Image.fromarray(img)))
    return np.stack([_apply_pil(img[:, :, c], operation) for c in range(img.shape[2])], axis=2)


def _interpolate(img: np.ndarray, size: tuple[int, int], interp: int) -> np.ndarray:
    """Resizes (H, W), (H, W, C) or (N, H, W, C) of any type with torch."""
    if interp not in _TORCH_MODES:
        raise ValueError(f"images of type {img.dtype} resize with the PIL numbers {sorted(_TORCH_MODES)}, got {interp}")
    batch = img.reshape((1,) * (img.ndim < 4) + img.shape + (1,) * (img.ndim == 2))
    is_float = np.issubdtype(img.dtype, np.floating)
    planes = torch.from_numpy(np.ascontiguousarray(batch if is_float else batch.astype(np.float64)))
    mode = _TORCH_MODES[interp]
    corners = {} if mode == "nearest" else {"align_corners": False}
    out = F.interpolate(planes.permute(0, 3, 1, 2), size=size, mode=mode, **corners)
    out = out.permute(0, 2, 3, 1).numpy()
    if not is_float:
        low, high = (0, 1) if img.dtype == bool else (np.iinfo(img.dtype).min, np.iinfo(img.dtype).max)
        out = np.rint(out).clip(low, high).astype(img.dtype)
    return out.reshape(img.shape[:-3] + size + img.shape[-1:] if img.ndim > 2 else size)


def _resize_rotated_box(transform: ResizeTransform, boxes: np.ndarray) -> np.ndarray:
    """Resizes rotated boxes (N, 5): x and y of the center, width, height, counter-clockwise angle in degrees.

    Unequal scaling turns them into parallelograms; what is returned has the lengths of their sides and the
    direction of the side along the height.
    """
    scale_x, scale_y = transform.new_w / transform.w, transform.new_h / transform.h
    x, y, width, height, angle = np.asarray(boxes, dtype=np.float64).T
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    width = width * np.hypot(scale_x * cos, scale_y * sin)
    height = height * np.hypot(scale_x * sin, scale_y * cos)
    angle = np.rad2deg(np.arctan2(scale_x * sin, scale_y * cos))
    return np.stack([x * scale_x, y * scale_y, width, height, angle], axis=1)


def _flip_rotated_box(transform: HFlipTransform, boxes: np.ndarray) -> np.ndarray:
    x, y, width, height, angle = np.asarray(boxes, dtype=np.float64).T
    return np.stack([transform.width - x, y, width, height, -angle], axis=1)


ResizeTransform.register_type("rotated_box", _resize_rotated_box)
HFlipTransform.register_type("rotated_box", _flip_rotated_box)
NoOpTransform.register_type("rotated_box", lambda transform, boxes: boxes)
