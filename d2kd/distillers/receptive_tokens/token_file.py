"""Files of learned receptive tokens: the tokens, and what identifies the teacher that they belong to."""

import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2kd.errors import UserError
from d2kd.files import replacing
from detectron2.utils.file_io import PathManager

from .tokens import Tokens

_FORMAT = "d2kd receptive tokens 1"
_LEARN = (
    "Learn the tokens of this teacher: tools/learn_tokens.py --config-file <teacher.yaml> MODEL.WEIGHTS <teacher.pth>."
)


class TokenFileError(UserError):
    """A token file that is missing or broken, or belongs to another teacher, other taps or other channels."""


class LearnedLevel(NamedTuple):
    """The tokens of one tap, and the Dice overlap (0 to 1) that they had in the end."""

    tokens: Tokens
    dice: float


class TokenFile(NamedTuple):
    """What the first stage writes and the second reads.

    `teacher` is the checksum of the teacher's weights (`weights_checksum`), `levels` are by the teacher's tap.
    """

    teacher: str
    levels: dict[str, LearnedLevel]
    iterations: int

    def save(self, path: str) -> None:
        """Writes the file."""
        levels = {
            tap: {"channels": level.tokens.tokens.shape[1], "dice": float(level.dice), **_present(level.tokens)}
            for tap, level in self.levels.items()
        }
        content = {
            "format": _FORMAT,
            "teacher": self.teacher,
            "taps": list(self.levels),
            "num_tokens": next(iter(self.levels.values())).tokens.tokens.shape[0],
            "iterations": self.iterations,
            "levels": levels,
        }
        with replacing(path) as temporary:
            torch.save(content, temporary)

    @classmethod
    def load(cls, path: str) -> "TokenFile":
        """Reads a file without executing code.

        Raises:
            TokenFileError: there is no such file, or it is not a token file.
        """
        if not path or not PathManager.isfile(path):
            given = f"is {path!r}: there is no such file" if path else "is empty"
            raise TokenFileError(f"DISTILL.RECEPTIVE_TOKENS.FILE {given}. {_LEARN}")
        try:
            content = torch.load(PathManager.get_local_path(path), map_location="cpu", weights_only=True)
        except Exception as error:
            # torch's own words advise to read without this protection
            reason = "it is no file of torch.save" if isinstance(error, pickle.UnpicklingError) else error
            raise TokenFileError(f"DISTILL.RECEPTIVE_TOKENS.FILE {path} cannot be read: {reason}. {_LEARN}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise TokenFileError(f"DISTILL.RECEPTIVE_TOKENS.FILE {path} is not a token file. {_LEARN}")
        try:
            levels = {tap: _level(content["levels"][tap]) for tap in content["taps"]}
            return cls(str(content["teacher"]), levels, int(content["iterations"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TokenFileError(f"DISTILL.RECEPTIVE_TOKENS.FILE {path} is damaged: {error!r}. {_LEARN}") from error

    def tokens_for(self, tap: str, channels: int) -> Tokens:
        """The tokens for a map of the teacher.

        Raises:
            TokenFileError: there are none for this tap, or they are for another number of channels.
        """
        if tap not in self.levels:
            raise TokenFileError(
                f"DISTILL.RECEPTIVE_TOKENS.FILE has no tokens for the teacher's {tap!r}; it has them for "
                f"{', '.join(self.levels)}. Change TAPS / TEACHER_TAPS (or TOKEN_TAPS), or learn them for this tap."
            )
        tokens = self.levels[tap].tokens
        if tokens.tokens.shape[1] != channels:
            raise TokenFileError(
                f"DISTILL.RECEPTIVE_TOKENS.FILE: the tokens of {tap!r} are for {tokens.tokens.shape[1]} channels, but "
                f"the teacher's map has {channels}. {_LEARN}"
            )
        return tokens


def _present(tokens: Tokens) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tokens._asdict().items() if value is not None}


def _level(content: Mapping[str, Any]) -> LearnedLevel:
    tokens = Tokens(content["tokens"], content.get("weight"), content.get("bias"))
    t, c = tokens.tokens.shape
    if tokens.weight is not None:
        fits = tokens.weight.shape == (t, c, 3, 3) and tokens.bias is not None and tokens.bias.shape == (t,)
        if not fits:
            raise ValueError(f"weighting branch of shape {tuple(tokens.weight.shape)} for tokens of shape {(t, c)}")
    return LearnedLevel(tokens, float(content["dice"]))
