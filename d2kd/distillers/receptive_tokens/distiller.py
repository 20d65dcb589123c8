"""ReceptiveTokens: imitation where masks of learned tokens look ("MasKD", 2023, arXiv 2205.14589); the second stage."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.layers import NORMALIZATIONS, mask_weights, standardize, weighted_error
from d2kd.layers.losses import EPS, center
from d2kd.layers.position_weights import weighted_standardized_error
from d2kd.settings import setting
from detectron2.config import CfgNode

from ..base import DISTILLERS, Distiller, FeatureMaps
from ..checksum import weights_checksum
from ..taps import TapPair, build_aligner
from .learn_settings import LearnSettings
from .token_file import TokenFile, TokenFileError
from .tokens import Tokens, token_masks, token_weights


@DISTILLERS.register()
class ReceptiveTokens(Distiller):
    """The teacher's maps, weighted by masks of learned tokens ("MasKD", arXiv 2205.14589).

    sum_t w_t sum_p (m_tp (s_p - t_p))^2 / sum_p m_tp, averaged over images and channels.
    The masks m come from the teacher's map, and after a warm-up ("customization") from the product of the teacher's and
    the (aligned) student's: a position counts where both respond to a token. Tokens are learned before, see
    `tools/learn_tokens.py`; here they are fixed, and no gradient flows through masks or weights.

    Example:
        >>> learned = TokenFile.load("tokens.pth")
        >>> method = ReceptiveTokens(pairs=pairs, tokens=[learned.tokens_for("p3", channels=256)], warmup_iters=1000)
        >>> losses = method({"p3": student_map}, {"p3": teacher_map})
    """

    RENAMED_KEYS = {
        "LEVEL_WEIGHTS": ("TAP_WEIGHTS", list),
        "REDUCTION": ("POSITION_WEIGHTS", lambda value: {"paper": "mask_sum", "mean": "unit_sum"}[value]),
    }
    DEFAULTS = {"WEIGHT": 4.0}
    NODES = {"LEARN": LearnSettings}

    file: str = setting(
        "", "The tokens of the teacher, as tools/learn_tokens.py writes them.", config_only=True, path=True
    )
    token_taps: list[str] = setting(
        [], "Whose tokens serve each pair of taps; [] takes those of the teacher's tap.", config_only=True
    )
    customize: bool = setting(
        True, "From iteration WARMUP_ITERS on, a mask is the product of the teacher's and the student's."
    )
    warmup_iters: int = setting(1000, "See CUSTOMIZE.", at_least=0, iterations=True)
    aligner: str = setting(
        "auto",
        "auto: a learned 1x1 convolution where channels differ | conv: everywhere, as in the official code.",
        choices=("auto", "conv"),
        key="ALIGN",
    )
    normalize: str = setting(
        "standardize",
        "none | standardize: bring each channel of the maps to zero mean and unit variance first. Masks are taken on "
        "the teacher's own scale: for them the standardized student is brought to the teacher's mean and deviation.",
        choices=NORMALIZATIONS,
    )
    position_weights: str = setting(
        "unit_sum",
        "mask_sum: a token's squared mask over the sum of its mask, as published | unit_sum: then also scaled so that "
        "the weights of an image sum to 1, which makes the loss a weighted mean.",
        choices=("mask_sum", "unit_sum"),
    )
    eps: float = setting(
        1e-12, "Added to the sums that the weights are divided by; 0 as in the official code.", at_least=0, at_most=1
    )

    def __init__(
        self,
        *,
        pairs: Sequence[TapPair],
        tokens: Sequence[Tokens],
        teacher_checksum: str | None = None,
        batches_per_iteration: int = 1,
        **settings: Any,
    ) -> None:
        """
        Args:
            pairs, settings: see `Distiller`.
            tokens: of each pair. Without a weighting branch all tokens weigh the same.
            teacher_checksum: of the weights that the tokens were learned on; None checks nothing.
            batches_per_iteration: calls of `forward` in training that make an iteration of the warm-up.
        """
        super().__init__(pairs=pairs, **settings)
        self.batches_per_iteration = batches_per_iteration
        self.calls = 0
        self.teacher_checksum = teacher_checksum
        self.levels = nn.ModuleList(_FixedTokens(level) for level in tokens)
        self.tokens_checksum = weights_checksum(self.levels.state_dict())
        self.align = nn.ModuleList([build_aligner(pair, always=self.aligner == "conv") for pair in self.pairs])

    @classmethod
    def from_config(cls, cfg: CfgNode, pairs: Sequence[TapPair]) -> dict[str, Any]:
        """As in the base class, with the tokens of FILE.

        Raises:
            TokenFileError: the token file does not fit the taps or their channels.
        """
        node = cfg.DISTILL[cls.NODE]
        learned = TokenFile.load(node.FILE)
        sources = list(node.TOKEN_TAPS) or [pair.teacher.name for pair in pairs]
        if len(sources) != len(pairs):
            raise TokenFileError(
                f"DISTILL.{cls.NODE}.TOKEN_TAPS names {len(sources)} taps, but {len(pairs)} are distilled."
            )
        return {
            **super().from_config(cfg, pairs),
            "tokens": [learned.tokens_for(tap, p.teacher.channels) for tap, p in zip(sources, pairs)],
            "teacher_checksum": learned.teacher,
            "batches_per_iteration": cfg.SOLVER.ACCUMULATE,
        }

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raises TokenFileError unless the tokens were learned on these very weights."""
        if self.teacher_checksum is None:
            return
        checksum = weights_checksum(teacher.state_dict())
        if checksum != self.teacher_checksum:
            raise TokenFileError(
                f"DISTILL.{self.NODE}.FILE was learned on another teacher (checksum {self.teacher_checksum}) "
                f"than the one in use ({checksum}). Learn tokens on DISTILL.TEACHER.WEIGHTS with tools/learn_tokens.py."
            )

    def forward(
        self, student: FeatureMaps, teacher: FeatureMaps, valid: FeatureMaps | None = None
    ) -> dict[str, Tensor]:
        losses = super().forward(student, teacher, valid)
        self.calls += self.training
        return losses

    @property
    def customizing(self) -> bool:
        """Whether the student's masks take part now."""
        return self.customize and self.calls >= self.warmup_iters * self.batches_per_iteration

    def level_loss(self, level: int, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
        s = self.align[level](student)
        tokens = self.levels[level]
        assert isinstance(tokens, _FixedTokens)
        if self.normalize == "none":
            return weighted_error(s, teacher, self._position_weights(tokens, teacher, s.detach(), tokens.tokens, valid))
        ours, theirs = center(s, valid), center(teacher, valid)
        # <e, dev * s + mean> = <e * dev, s> + <e, mean>, and s is the centered map over its own deviation
        scaled = tokens.tokens * torch.sqrt(theirs.variance + EPS) * ours.inverse
        bias = (tokens.tokens * theirs.mean).sum(1)
        weights = self._position_weights(tokens, teacher, ours.map, scaled, valid, bias)
        if valid is None:
            return weighted_standardized_error(s, ours, theirs, weights)
        return weighted_error(standardize(s, valid), standardize(teacher, valid), weights)

    @torch.no_grad()
    def _position_weights(
        self,
        level: "_FixedTokens",
        teacher: Tensor,
        student: Tensor,
        students_tokens: Tensor,
        valid: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        masks = token_masks(teacher, level.tokens)
        if self.customizing:
            masks *= token_masks(student, students_tokens, bias)
        if valid is not None:  # a position without the teacher's features is in no mask
            masks *= valid[:, None]
        return mask_weights(masks, level.weights(teacher), self.eps, mean=self.position_weights == "unit_sum")

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the position in the warm-up, for `state_dict`, and which tokens are in use."""
        return {"iterations": self.calls / self.batches_per_iteration, "tokens": self.tokens_checksum}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continues the warm-up of a checkpoint; its iterations may have had another number of batches.

        Raises:
            TokenFileError: the checkpoint was written with other tokens.
        """
        if state["tokens"] != self.tokens_checksum:
            raise TokenFileError(f"DISTILL.{self.NODE}.FILE holds other tokens than the run was started with")
        # version 0.1 counted batches
        self.calls = (
            round(state["iterations"] * self.batches_per_iteration) if "iterations" in state else state["calls"]
        )


class _FixedTokens(nn.Module):
    """The tokens of one level as buffers: they move with the distiller and are in its checkpoint, untrained."""

    tokens: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, level: Tokens) -> None:
        super().__init__()
        for name, value in level._asdict().items():
            self.register_buffer(name, None if value is None else value.clone())

    def weights(self, teacher: Tensor) -> Tensor:
        """Returns the weight of each token for each image, (N, T), rows of sum 1."""
        if self.weight is not None:
            assert self.bias is not None
            return token_weights(teacher, self.weight, self.bias)
        t = self.tokens.shape[0]
        return self.tokens.new_full((teacher.shape[0], t), 1.0 / t)
