"""The keys of an image classifier's inputs, INPUT.CLASSIFICATION: crops, augmentation, mixing; see docs/keys.md.

`d2kd.data.classification` reads them. They stand here because they are part of every configuration, whatever is
imported.
"""

from typing import Any

from d2kd.settings import SORTED, Rule, Setting, setting

#: How images are resampled, by Pillow's names; "random" is one of two in training.
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming", "random")
#: How many images share the random numbers of a mix.
MIX_MODES = ("batch", "pair", "elem")
#: What an erased rectangle is filled with.
ERASING_MODES = ("const", "rand", "pixel")


def _range(default: list[float], doc: str, **bounds: Any) -> Any:
    words = "must be two numbers, the smaller one first"
    return setting(
        default, doc, rule=Rule(words, lambda pair: len(pair) == 2 and SORTED.holds(list(pair))), above=0, **bounds
    )


_NODE: dict[str, Setting] = {
    "SIZE": setting(224, "Side of the square that the network sees in training, in pixels.", at_least=1),
    "TEST_SIZE": setting(0, "Side in evaluation, in pixels; 0 = SIZE.", at_least=0),
    "CROP_PCT": setting(
        0.875,
        "In evaluation the shorter side becomes TEST_SIZE / CROP_PCT, and the center is cut out.",
        above=0,
        at_most=1,
    ),
    "INTERPOLATION": setting(
        "bicubic",
        "How images are resampled. random: bilinear or bicubic in training, and bicubic in evaluation.",
        choices=INTERPOLATIONS,
    ),
    "SCALE": _range(
        [0.08, 1.0], "Area of a random crop in training, as a share of the image: smallest and largest.", at_most=1
    ),
    "RATIO": _range([3 / 4, 4 / 3], "Width over height of a random crop, before it is made square."),
    "HFLIP": setting(0.5, "Probability of a horizontal flip.", at_least=0, at_most=1),
    "VFLIP": setting(0.0, "Probability of a vertical flip.", at_least=0, at_most=1),
    "COLOR_JITTER": setting(
        0.4,
        "Largest relative change of brightness, contrast and saturation; 0 = none. AUTO_AUGMENT takes its place (but "
        "for 3a).",
        at_least=0,
        at_most=10,
    ),
    "AUTO_AUGMENT": setting(
        "",
        'timm\'s policy, e.g. "rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "v0", "original-mstd0.5", "3a"; "" = none.',
    ),
    "ERASING.PROB": setting(0.0, "Probability that a random rectangle of an image is erased.", at_least=0, at_most=1),
    "ERASING.MODE": setting(
        "pixel",
        "What it is filled with: const (the mean) | rand (one random color) | pixel (a random color for each pixel).",
        choices=ERASING_MODES,
    ),
    "ERASING.COUNT": setting(1, "Largest number of rectangles in an image, whose area they share.", at_least=1),
    "MIXUP": setting(0.0, "alpha of mixup, the blend of two images and their labels; 0 = off.", at_least=0),
    "CUTMIX": setting(0.0, "alpha of cutmix, a rectangle of another image with its label; 0 = off.", at_least=0),
    "MIX_PROB": setting(1.0, "Probability that mixup or cutmix is applied.", at_least=0, at_most=1),
    "MIX_SWITCH_PROB": setting(
        0.5, "Probability of cutmix, and not mixup, where both are on.", at_least=0, at_most=1
    ),
    "MIX_MODE": setting(
        "batch",
        "What is mixed in one way: the whole batch | each pair of images | each image (elem).",
        choices=MIX_MODES,
    ),
}  # fmt: skip

INPUT_KEYS: dict[str, Setting] = {f"INPUT.CLASSIFICATION.{key}": declared for key, declared in _NODE.items()}
