"""Loading a checkpoint of which every key must fit."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from d2kd.errors import UserError

from .backbone import load_bare_network
from .checkpoint_files import SafeCheckpointer

logger = logging.getLogger(__name__)


class StrictLoadingError(UserError):
    """A checkpoint that cannot be read, or does not fit its model."""


class _Problems(NamedTuple):
    """What did not fit, as fvcore's checkpointer tells it."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    incorrect_shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


class _StrictCheckpointer(SafeCheckpointer):
    """Keeps what did not fit, for `load_strictly` to judge."""

    problems: Any = None

    def _load_model(self, checkpoint: Any) -> Any:
        require_finite(checkpoint["model"])
        filled = load_bare_network(self.model, checkpoint["model"])
        if filled:  # a library's classifier, of which these are all weights, or the backbone alone
            left = [name for name in self.model.state_dict() if name not in filled]
            self.problems = _Problems(left, [], [])
        else:
            self.problems = super()._load_model(checkpoint)
        return self.problems


def load_strictly(model: nn.Module, path: str, who: str, keys: str) -> dict[str, Any]:
    """Loads a checkpoint of which every key must fit.

    Args:
        model: takes the weights.
        path: anything that Detectron2's checkpointer reads.
        who: whose weights these are, for messages.
        keys: the configuration keys that decide, for messages.

    Returns:
        What the file holds beside the weights.

    Raises:
        StrictLoadingError: the file cannot be read, a key is missing, unexpected or of another shape, or a weight is
            not finite.
    """
    checkpointer = _StrictCheckpointer(model)
    incompatible_log = logging.getLogger("fvcore.common.checkpoint")
    level = incompatible_log.level
    incompatible_log.setLevel(logging.ERROR)  # the error below says it all, once
    try:
        rest = checkpointer.load(path, checkpointables=[])
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
    return dict(rest)


def require_finite(weights: Mapping[str, Any]) -> None:
    """
    Args:
        weights: tensors or NumPy arrays by name.

    Raises:
        StrictLoadingError: some are infinite or NaN, which everything that is computed with them would be too.
    """
    bad = [name for name, value in weights.items() if not bool(torch.as_tensor(value).isfinite().all())]
    if bad:
        raise StrictLoadingError(
            f"{len(bad)} of its {len(weights)} tensors have infinite or NaN values, first {bad[0]}. Take an earlier "
            "checkpoint: these weights are of a training that failed."
        )


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
