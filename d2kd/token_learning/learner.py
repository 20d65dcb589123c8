"""TokenLearner: a frozen teacher whose taps are replaced by their masked versions; its own task teaches the tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from d2kd.distillers.checksum import weights_checksum
from d2kd.distillers.receptive_tokens import LearnedLevel, TokenFile
from d2kd.distillers.receptive_tokens.tokens import TokenMasks, dice
from d2kd.modeling import FeatureTaps, TapError, evaluation_mode
from d2kd.modeling.architectures import architecture_of
from d2kd.modeling.taps import describe_taps
from d2kd.rng import preserve_rng_state


class LevelMasks(NamedTuple):
    """Masks of the tokens of one tap over a batch."""

    masks: Tensor  # (N, T, H, W), values in [0, 1]
    gate: Tensor  # (N, H, W), what the map is multiplied with
    stride: float  # pixels of the input per cell


class TokenLearner(nn.Module):
    """The first stage of receptive tokens ("MasKD", arXiv 2205.14589): the teacher's task losses, and Dice.

    Only tokens and weighting branches are parameters. The teacher is no submodule: it is in no `state_dict` and no
    data-parallel wrapper. It runs in training mode, for its losses, but with its backbone, norms and dropouts in
    evaluation mode.
    """

    teacher: nn.Module

    def __init__(
        self, teacher: nn.Module, taps: Sequence[str] = (), num_tokens: int = 6, weighting: bool = True
    ) -> None:
        """
        Args:
            teacher: a Detectron2 model with its weights; it is frozen here.
            taps: features to mask; none means all outputs of the backbone.
            num_tokens: tokens per tap.
            weighting: learn a weight for each token and image.

        Raises:
            TapError: the teacher has no such feature, or it is no map (N, C, H, W).
        """
        super().__init__()
        object.__setattr__(self, "teacher", teacher.requires_grad_(False))
        self.taps = list(dict.fromkeys(taps)) or list(architecture_of(teacher).feature_shapes())
        self.teacher_checksum = weights_checksum(teacher.state_dict())
        shapes = describe_taps(teacher, self.taps)
        for name, shape in shapes.items():
            if shape.is_vector:
                raise TapError(f"Tap {name!r} gives vectors (R, C); only feature maps (N, C, H, W) can be masked.")
        self.strides = {name: shape.stride for name, shape in shapes.items()}
        device = next(teacher.parameters()).device
        self.levels = nn.ModuleList(TokenMasks(shapes[n].channels, num_tokens, weighting) for n in self.taps).to(device)
        self._hooks = FeatureTaps(teacher, self.taps)
        #: Taps whose masked map has had a gradient from the teacher's task.
        self.taps_with_gradient: set[str] = set()
        self.train()

    def train(self, mode: bool = True) -> "TokenLearner":
        """Also puts the teacher in that mode, as far as its losses need it."""
        super().train(mode)
        self.teacher.train(mode)
        self.teacher.get_submodule("backbone").eval()
        for module in self.teacher.modules():
            if isinstance(module, (_NormBase, _DropoutNd)):
                module.eval()
        return self

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """
        Args:
            batched_inputs: Detectron2's input format with ground truth.

        Returns:
            The teacher's task losses and "loss_dice/<tap>", all scalar.
        """
        overlaps: dict[str, Tensor] = {}

        def mask(name: str, feature: Tensor) -> Tensor:
            masked, masks = self._level(name)(feature)
            overlaps[f"loss_dice/{name}"] = dice(masks)
            if name not in self.taps_with_gradient and masked.requires_grad:
                masked.register_hook(lambda gradient: self.taps_with_gradient.add(name))
            return masked

        with self._hooks.replacing(mask):
            losses = dict(self.teacher(batched_inputs))
        return {**losses, **overlaps}

    def check_gradients(self) -> None:
        """Raises TapError, after a first step, for taps that the teacher's losses do not depend on."""
        missed = [name for name in self.taps if name not in self.taps_with_gradient]
        if missed:
            raise TapError(
                f"The teacher's losses do not depend on {', '.join(missed)}: nothing can be learned there. Take them "
                "out of DISTILL.RECEPTIVE_TOKENS.TAPS (TEACHER_TAPS)."
            )

    @torch.no_grad()
    def compute_masks(self, batched_inputs: list[dict[str, Any]]) -> dict[str, LevelMasks]:
        """Returns the masks over a batch, by tap."""
        seen: dict[str, LevelMasks] = {}

        def mask(name: str, feature: Tensor) -> Tensor:
            level = self._level(name)
            masked, masks = level(feature)
            seen[name] = LevelMasks(masks, level.gate(feature, masks), self.strides[name])
            return masked

        device = next(self.levels.parameters()).device
        with evaluation_mode(self), preserve_rng_state(device), self._hooks.replacing(mask):
            self.teacher(batched_inputs)
        return seen

    def export_tokens(self, overlaps: dict[str, float], iterations: int) -> TokenFile:
        """Returns what the second stage needs, with the Dice overlap by tap."""
        levels = {name: LearnedLevel(self._level(name).export(), overlaps[name]) for name in self.taps}
        return TokenFile(self.teacher_checksum, levels, iterations)

    def _level(self, tap: str) -> TokenMasks:
        level = self.levels[self.taps.index(tap)]
        assert isinstance(level, TokenMasks)
        return level
