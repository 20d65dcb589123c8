"""When channel matching looks at features and assigns channels anew; and the settings of the published runs."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

TRACKING = ("online", "pass")

# With WEIGHT 1 an image weighs what it weighed. In classification, epochs are iterations at the published batch size.
# Those with three factors are for TAPS without res2.
_DETECTION = {
    "ADAPTER": "gn",
    "NORMALIZE": "none",
    "REDUCTION": "paper",
    "REFRESH_ITERS": [],
    "REFRESH_PERIODS": [5000, 31000],
    "REFRESH_STEPS": [20000],
    "TRACK_IMAGES": 2000,
    "TRACKING": "pass",
}
_CUB = {
    "ADAPTER": "bn",
    # the first stage differs in size and is left out; its factor would be 8e4
    "FACTORS": [4e4, 2e4, 1e4],
    "NORMALIZE": "none",
    "REDUCTION": "paper",
    "REFRESH_ITERS": [],
    "REFRESH_PERIODS": [2 * 94],
    "REFRESH_STEPS": [],
    "TRACK_IMAGES": 5994,
    "TRACKING": "pass",
}
#: Settings of the rows that the method's authors published, by name: what `DISTILL.CHANNEL_MATCHING.PRESET` replaces.
PRESETS: dict[str, dict[str, Any]] = {
    # the run on 8 GPUs had an eighth of its nominal weight, hence 8 * 5e7 and 8 * 5e6
    "coco_retinanet_r50_r18": {**_DETECTION, "FACTORS": [4e8, 4e8, 4e7, 4e7]},
    "coco_retinanet_r50_r18_without_res2": {**_DETECTION, "FACTORS": [4e8, 4e7, 4e7]},
    "imagenet_r50_mobilenet_v1": {
        **_CUB,
        "FACTORS": [8e4, 4e4, 2e4, 1e4],
        "REFRESH_PERIODS": [5005],
        "TRACK_IMAGES": 20480,
    },
    "cub200_r50_mobilenet_v2": _CUB,
    "cub200_r50_shufflenet_v2": _CUB,
}


def preset(name: str) -> dict[str, Any]:
    """The settings of a published row; none for "".

    Raises:
        ValueError: there is no such preset.
    """
    if name and name not in PRESETS:
        raise ValueError(f"DISTILL.CHANNEL_MATCHING.PRESET is {name!r}; it must be one of {', '.join(PRESETS)}.")
    return PRESETS[name] if name else {}


@dataclass(frozen=True)
class MatchingSchedule:
    """Refreshes at the iterations of a list, or by a rule; each rests on a window of images.

    Attributes:
        iterations: the refreshes; () follows the rule.
        periods: the rule: at multiples of `periods[0]`, from iteration `steps[0]` on of `periods[1]`, and so on.
        steps: ascending, one fewer than `periods`.
        images: images, of all processes, that an assignment rests on.
        tracking: "online" takes the training batches that lead up to a refresh (for that at iteration 0, those that
            follow it), "pass" a pass of its own over training images.
        images_per_iteration: of all processes.
        batches_per_iteration: batches that a process accumulates.
    """

    iterations: tuple[int, ...] = ()
    periods: tuple[int, ...] = (5000, 31000)
    steps: tuple[int, ...] = (20000,)
    images: int = 2000
    tracking: str = "online"
    images_per_iteration: int = 16
    batches_per_iteration: int = 1

    def __post_init__(self) -> None:
        for key, value, fits, rule in (
            ("TRACKING", self.tracking, self.tracking in TRACKING, f"one of {', '.join(TRACKING)}"),
            ("TRACK_IMAGES", self.images, self.images > 0, "positive"),
            ("REFRESH_ITERS", self.iterations, all(i >= 0 for i in self.iterations), "iterations, counted from 0"),
            ("REFRESH_STEPS", self.steps, list(self.steps) == sorted(self.steps), "ascending"),
            (
                "REFRESH_PERIODS",
                self.periods,
                len(self.periods) == len(self.steps) + 1 and all(p > 0 for p in self.periods),
                "positive, one more than REFRESH_STEPS",
            ),
        ):
            if not fits:
                raise ValueError(f"DISTILL.CHANNEL_MATCHING.{key} is {value!r}; it must be {rule}.")

    @property
    def online(self) -> bool:
        """Whether training batches are all that is looked at."""
        return self.tracking == "online"

    @property
    def window(self) -> int:
        """Iterations of a tracking window."""
        return -(-self.images // self.images_per_iteration)

    @property
    def batches_per_window(self) -> int:
        """Batches of a process in a tracking window."""
        return self.window * self.batches_per_iteration

    def due(self, iteration: int) -> bool:
        """Whether list or rule name this iteration."""
        if self.iterations:
            return iteration in self.iterations
        return iteration % self.periods[bisect_right(self.steps, iteration)] == 0

    def tracks(self, batch: int) -> bool:
        """Whether this training batch lies in a window, counted from 0: the last batch of a window is its refresh."""
        starting = batch < self.batches_per_window and self.due(0)
        # refreshes are at first batches of iterations, and nothing after them may be left over for the next one
        first = max(1, -(-batch // self.batches_per_iteration))
        last = (batch + self.batches_per_window - 1) // self.batches_per_iteration
        return starting or any(self.due(i) for i in range(first, last + 1))

    def refreshes(self, batch: int) -> bool:
        """Whether channels are assigned anew at this training batch, counted from 0."""
        if self.online and batch == self.batches_per_window - 1 and self.due(0):
            return True
        iteration, rest = divmod(batch, self.batches_per_iteration)
        return not rest and self.due(iteration) and (iteration > 0 or not self.online)
