"""The keys of DISTILL.CACHE."""

from d2kd.config import declare_keys
from d2kd.settings import setting

from .encoding import DTYPES

RUNS = ("batch", "image")

declare_keys(
    "DISTILL.CACHE",
    DIR=setting(
        "",
        "Folder where the teacher's features are kept, and read instead of running it; other runs may use it too. "
        '"" keeps none.',
    ),
    DTYPE=setting(
        "float32",
        "How they are kept: float32, as the teacher gave them | float16, off by 0.05 % at most | int8, 256 levels "
        "between the least and the largest number of each channel of an image.",
        choices=DTYPES,
    ),
    RUN=setting(
        "batch",
        "What the teacher sees where an entry is missing: batch, as without a cache, so that it gives the same to the "
        "bit; size and number of the images of a batch are part of an entry | image, each image alone, as in "
        "evaluation; an entry for each size and flip serves all batches.",
        choices=RUNS,
    ),
    MAX_GB=setting(
        100.0,
        "Most that the folder holds, in GB (10^9 bytes); entries that were not used for long make room.",
        above=0,
    ),
)
