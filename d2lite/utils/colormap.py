"""Distinct colors for classes and instances."""

import colorsys
from collections.abc import Sequence

import matplotlib.colors as mplc
import numpy as np

__all__ = ["brighten", "colormap", "palette_color", "random_color", "random_colors", "scale_lightness"]

Color = str | Sequence[float]
"""A color name of matplotlib, or RGB in [0, 1]."""

# Hues a golden section apart stay distant from each other; three shades keep later rounds distinct as well.
_GOLDEN_SECTION = (5**0.5 - 1) / 2
_SHADES = ((0.75, 0.95), (0.95, 0.75), (0.5, 1.0))
_COLORS = np.array(
    [colorsys.hsv_to_rgb(0.02 + i * _GOLDEN_SECTION, *_SHADES[i // 8 % len(_SHADES)]) for i in range(96)],
    dtype=np.float32,
)

# A separate generator, because visualization must not change the random numbers of training.
_GENERATOR = np.random.default_rng()


def colormap(rgb: bool = False, maximum: int = 255) -> np.ndarray:
    """Returns the palette, float32, (96, 3).

    Args:
        rgb: channel order RGB instead of BGR.
        maximum: largest value of a channel, 255 or 1.
    """
    assert maximum in (255, 1), f"maximum must be 255 or 1, not {maximum}"
    colors = _COLORS * maximum
    return colors if rgb else colors[:, ::-1]


def random_color(rgb: bool = False, maximum: int = 255) -> np.ndarray:
    """Returns one color of the palette, (3,). Arguments as in `colormap`."""
    return random_colors(1, rgb, maximum)[0]


def random_colors(N: int, rgb: bool = False, maximum: int = 255) -> list:
    """Returns `N` colors of the palette, without repetition up to its size. Arguments as in `colormap`."""
    palette = colormap(rgb, maximum)
    rounds = [_GENERATOR.permutation(len(palette)) for _ in range(-(-N // len(palette)))]
    return [palette[i] for i in np.concatenate(rounds)[:N]] if rounds else []


def palette_color(index: int) -> tuple[float, ...]:
    """Returns the RGB color of a class or instance, in [0, 1]; indices beyond the palette start over."""
    palette = colormap(rgb=True, maximum=1)
    return tuple(float(c) for c in palette[index % len(palette)])


def scale_lightness(color: Color, factor: float) -> tuple[float, float, float]:
    """Returns the RGB color, in [0, 1], with its HLS lightness multiplied."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*mplc.to_rgb(color))
    return colorsys.hls_to_rgb(hue, min(1.0, lightness * factor), saturation)


def brighten(color: Color) -> tuple[float, ...]:
    """Returns a shade of a color, RGB in [0, 1], that can be read on black."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*mplc.to_rgb(color))
    return colorsys.hls_to_rgb(hue, max(lightness, 0.75), saturation)
