"""Loading a checkpoint of which every key must fit."""

import logging
from typing import Any

from torch import nn

from d2kd.errors import UserError
from detectron2.checkpoint import DetectionCheckpointer

logger = logging.getLogger(__name__)


class StrictLoadingError(UserError):
    """A checkpoint that cannot be read, or does not fit its model."""


class _StrictCheckpointer(DetectionCheckpointer):
    """Keeps what did not fit, for `load_strictly` to judge."""

    problems: Any = None

    def _load_model(self, checkpoint: Any) -> Any:
        self.problems = super()._load_model(checkpoint)
        return self.problems


def load_strictly(model: nn.Module, path: str, who: str, keys: str) -> None:
    """Loads a checkpoint of which every key must fit.

    Args:
        model: takes the weights.
        path: anything that Detectron2's checkpointer reads.
        who: whose weights these are, for messages.
        keys: the configuration keys that decide, for messages.

    Raises:
        StrictLoadingError: the file cannot be read, or a key is missing, unexpected or of another shape.
    """
    checkpointer = _StrictCheckpointer(model)
    incompatible_log = logging.getLogger("fvcore.common.checkpoint")
    level = incompatible_log.level
    incompatible_log.setLevel(logging.ERROR)  # the error below says it all, once
    try:
        checkpointer.load(path, checkpointables=[])
    except Exception as error:
        raise StrictLoadingError(f"The {who}'s checkpoint {path} cannot be read: {error}") from error
    finally:
        incompatible_log.setLevel(level)
    problems = describe_problems(checkpointer.problems)
    if problems:
        raise StrictLoadingError(
            f"The {who}'s checkpoint {path} does not fit its configuration ({keys}):\n" + "\n".join(problems)
        )
    logger.info("Loaded the %s's weights from %s: every key fits.", who, path)


def describe_problems(incompatible: Any, limit: int = 8) -> list[str]:
    """Returns lines on missing, unexpected and mis-shaped keys; empty where all fit."""
    if incompatible is None:
        return []
    shapes = [
        f"{name}: checkpoint {tuple(theirs)}, model {tuple(ours)}"
        for name, theirs, ours in incompatible.incorrect_shapes
    ]
    misshaped = {name for name, *_ in incompatible.incorrect_shapes}
    lines = []
    for title, names in (
        ("missing in the checkpoint", [n for n in incompatible.missing_keys if n not in misshaped]),
        ("not in the model", incompatible.unexpected_keys),
        ("of another shape", shapes),
    ):
        if names:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            lines.append(f"  {len(names)} {title}: {', '.join(sorted(names)[:limit])}{more}")
    return lines
