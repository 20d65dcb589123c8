"""All stages, by name."""

from collections.abc import Sequence

from . import accuracy, memory, methods, teacher, tests, throughput, waits
from .base import Stage

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        tests.STAGE,
        *methods.STAGES,
        waits.STAGE,
        throughput.STAGE,
        *memory.STAGES,
        teacher.STAGE,
        accuracy.STAGE,
    )
}


def chosen(names: Sequence[str]) -> list[str]:
    """The stages of names: all without any, those of a group (`methods`), none for `table`.

    Raises:
        ValueError: there is no such stage.
    """
    if not names:
        return list(STAGES)
    found = []
    for name in names:
        if name == "table":
            continue
        group = [known for known in STAGES if name in (known, known.split("-")[0])]
        if not group:
            raise ValueError(f"there is no stage {name!r}: there are {', '.join(STAGES)} and table")
        found += [x for x in group if x not in found]
    return found
