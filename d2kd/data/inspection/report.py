"""What was found in a dataset, as text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tabulate import tabulate

#: A class with so many times the objects of another one is told.
IMBALANCE = 20
#: Objects, or images, below which a class has few to learn from.
FEW = 10
#: Files that a line names.
_NAMED = 3


@dataclass
class Report:
    """What a dataset holds."""

    #: Name of the dataset, and how much there is.
    heading: str
    #: Rows with a line for each class, below those of `columns`.
    rows: list[list[object]] = field(default_factory=list)
    columns: Sequence[str] = ()
    #: Sizes and the like.
    facts: list[str] = field(default_factory=list)
    #: What may be a mistake.
    suspicions: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Returns all of it, with indented lines below the heading."""
        align = ["left", *["right"] * (len(self.columns) - 1)]
        table = tabulate(self.rows, self.columns, colalign=align, disable_numparse=True) if self.rows else ""
        lines = [self.heading, *(f"  {line}" for line in [*table.splitlines(), *self.facts])]
        if self.suspicions:
            lines += ["  look at:", *(f"  - {line}" for line in self.suspicions)]
        else:
            lines.append("  nothing suspicious")
        return "\n".join(lines)

    def suspect(
        self, what: str, count: int, files: Iterable[str] = (), hint: str = "", total: int | None = None
    ) -> None:
        """Adds a line "WHAT: 3 of 40 (a.jpg, b.jpg, ...). HINT", where the count is not 0."""
        if count:
            names = list(dict.fromkeys(files))
            more = ", ..." if len(names) > _NAMED else ""
            named = f" ({', '.join(names[:_NAMED])}{more})" if names else ""
            share = "" if total is None else f" of {total}"
            self.suspicions.append(f"{what}: {count}{share}{named}.{f' {hint}' if hint else ''}")

    def compare_classes(self, names: Sequence[str], counts: Sequence[int], what: str, is_train: bool) -> None:
        """Adds lines on classes that have no `what`, and in training few, or far fewer than others."""
        empty = [name for name, count in zip(names, counts) if not count]
        effect = "Nothing is learned of them." if is_train else "Their score is nan."
        self.suspect(f"classes without {what}", len(empty), empty, effect, len(names))
        if not is_train:
            return
        few = [f"{name}: {count}" for name, count in zip(names, counts) if 0 < count < FEW]
        self.suspect(f"classes with fewer than {FEW} {what}", len(few), few, total=len(names))
        present = [(count, name) for name, count in zip(names, counts) if count]
        if present and max(present)[0] > IMBALANCE * min(present)[0]:
            (least, rare), (most, common) = min(present), max(present)
            self.suspicions.append(
                f"class {common} has {most / least:.0f} times the {what} of {rare}. "
                "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler shows images of rare classes more often."
            )


def span(values: Sequence[float] | np.ndarray) -> str:
    """Returns the least, median and largest of some numbers, which must not be none."""
    low, middle, high = np.percentile(np.asarray(values, dtype=float), [0, 50, 100])
    return f"{low:.0f} to {high:.0f}, median {middle:.0f}"


def describe_sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """Returns a line on the sizes (width, height) of images."""
    if not sizes:
        return "images: none can be read"
    different = sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
    if len(different) == 1:
        return f"images: all of {different[0][0]} x {different[0][1]} pixels (width x height)"
    widths, heights = zip(*sizes)
    return (
        f"images: {len(different)} sizes from {different[0][0]} x {different[0][1]} to {different[-1][0]} x "
        f"{different[-1][1]} pixels (width x height); width {span(widths)}, height {span(heights)}"
    )
