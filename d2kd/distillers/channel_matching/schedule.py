"""When channel matching looks at features and assigns channels anew."""

from bisect import bisect_right
from dataclasses import dataclass

from d2kd.errors import ConfigError

TRACKING = ("online", "pass")


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

    iterations: tuple[int, ...]
    periods: tuple[int, ...]
    steps: tuple[int, ...]
    images: int
    tracking: str
    images_per_iteration: int = 16
    batches_per_iteration: int = 1

    def __post_init__(self) -> None:
        if len(self.periods) != len(self.steps) + 1:
            raise ConfigError(
                f"DISTILL.CHANNEL_MATCHING.REFRESH_PERIODS is {list(self.periods)}; it must be one more than "
                f"REFRESH_STEPS, {list(self.steps)}."
            )

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
        """Returns whether list or rule name this iteration."""
        if self.iterations:
            return iteration in self.iterations
        return iteration % self.periods[bisect_right(self.steps, iteration)] == 0

    def tracks(self, batch: int) -> bool:
        """Returns whether this training batch, counted from 0, lies in a window, whose last batch is its refresh."""
        starting = batch < self.batches_per_window and self.due(0)
        # refreshes are at first batches of iterations, and nothing after them may be left over for the next one
        first = max(1, -(-batch // self.batches_per_iteration))
        last = (batch + self.batches_per_window - 1) // self.batches_per_iteration
        return starting or any(self.due(i) for i in range(first, last + 1))

    def refreshes(self, batch: int) -> bool:
        """Returns whether channels are assigned anew at this training batch, counted from 0."""
        if self.online and batch == self.batches_per_window - 1 and self.due(0):
            return True
        iteration, rest = divmod(batch, self.batches_per_iteration)
        return not rest and self.due(iteration) and (iteration > 0 or not self.online)
