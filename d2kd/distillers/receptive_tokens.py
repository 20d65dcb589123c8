"""ReceptiveTokens: imitation where masks of learned tokens look ("MasKD", 2023, arXiv 2205.14589); the second stage."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.layers import check_reduction, normalize
from d2kd.layers.losses import at_least_float32
from d2kd.layers.normalize import check_mode
from d2kd.layers.tokens import Tokens, mask_weights, token_masks, token_weights, weighted_error
from detectron2.config import CfgNode

from .base import DISTILLERS, Distiller, TapPair
from .token_file import TokenFile, TokenFileError, weights_checksum

_EPS = 1e-6  # of the standardisation, see `d2kd.layers.normalize`


@DISTILLERS.register()
class ReceptiveTokens(Distiller):
    """sum_t w_t sum_p (m_tp (s_p - t_p))^2 / sum_p m_tp, averaged over images and channels.

    The masks m come from the teacher's map, and after a warm-up ("customisation") from the product of the teacher's and
    the (aligned) student's: a position counts where both respond to a token. Tokens are learned before, see
    `tools/learn_tokens.py`; here they are fixed, and no gradient flows through masks or weights.
    """

    CONFIG_NODE = "RECEPTIVE_TOKENS"

    def __init__(
        self,
        *,
        pairs: Sequence[TapPair],
        weight: float,
        tokens: Sequence[Tokens],
        level_weights: Sequence[float] = (),
        customize: bool = True,
        warmup: int = 0,
        align: str = "auto",
        normalize: str = "none",
        reduction: str = "paper",
        eps: float = 1e-12,
        teacher_checksum: str | None = None,
    ) -> None:
        """
        Args:
            pairs, weight: see `Distiller`.
            tokens: of each pair. Without a weighting branch all tokens weigh the same.
            level_weights: factor for each pair; none means 1.
            customize: use the student's masks too, after the warm-up.
            warmup: calls of `forward` in training before that.
            align: "auto": a 1x1 convolution where channels differ; "conv": everywhere, as the official code has it.
            normalize: "none" or "standardize" (both maps, channel by channel). Masks are taken on the teacher's own
                scale: for them the standardised student is brought to the teacher's mean and deviation.
            reduction: "paper"; or "mean": the weights of an image's positions are scaled to the sum 1.
            eps: added to the denominator; 0 as in the official code.
            teacher_checksum: of the weights that the tokens were learned on; None checks nothing.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__(pairs=pairs, weight=weight)
        check_mode(normalize)
        check_reduction(reduction)
        if align not in ("auto", "conv"):
            raise ValueError(f"DISTILL.{self.CONFIG_NODE}.ALIGN is {align!r}; it must be auto or conv.")
        if warmup < 0:
            raise ValueError(f"DISTILL.{self.CONFIG_NODE}.WARMUP_ITERS is {warmup}; it must not be negative.")
        if eps < 0:
            raise ValueError(f"DISTILL.{self.CONFIG_NODE}.EPS is {eps}; it must not be negative.")
        self.level_weights = self.factors_of_pairs("LEVEL_WEIGHTS", level_weights)
        self.customize = customize
        self.warmup = warmup
        self.calls = 0
        self.normalize = normalize
        self.reduction = reduction
        self.eps = eps
        self.teacher_checksum = teacher_checksum
        self.levels = nn.ModuleList(_FixedTokens(level) for level in tokens)
        self.tokens_checksum = weights_checksum(self.levels.state_dict())
        self.align = self.build_aligners() if align == "auto" else _convolutions(self.pairs)

    @classmethod
    def build(cls, cfg: CfgNode, pairs: Sequence[TapPair]) -> "ReceptiveTokens":
        """The distiller that `cfg.DISTILL.RECEPTIVE_TOKENS` describes.

        Raises:
            TokenFileError: the token file does not fit the taps or their channels.
        """
        arguments = cls.from_config(cfg.DISTILL[cls.CONFIG_NODE], pairs)
        # one call a batch: the warm-up is counted in iterations
        return cls(**{**arguments, "warmup": arguments["warmup"] * cfg.SOLVER.ACCUMULATE})

    @classmethod
    def from_config(cls, node: CfgNode, pairs: Sequence[TapPair]) -> dict[str, Any]:
        learned = TokenFile.load(node.FILE)
        sources = list(node.TOKEN_TAPS) or [pair.teacher for pair in pairs]
        if len(sources) != len(pairs):
            raise TokenFileError(
                f"DISTILL.{cls.CONFIG_NODE}.TOKEN_TAPS names {len(sources)} taps, but {len(pairs)} are distilled."
            )
        return {
            **super().from_config(node, pairs),
            "tokens": [learned.tokens_for(tap, p.teacher_shape.channels) for tap, p in zip(sources, pairs)],
            "level_weights": list(node.LEVEL_WEIGHTS),
            "customize": node.CUSTOMIZE,
            "warmup": node.WARMUP_ITERS,
            "align": node.ALIGN,
            "normalize": node.NORMALIZE,
            "reduction": node.REDUCTION,
            "eps": node.EPS,
            "teacher_checksum": learned.teacher,
        }

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raises TokenFileError unless the tokens were learned on these very weights."""
        if self.teacher_checksum is None:
            return
        checksum = weights_checksum(teacher.state_dict())
        if checksum != self.teacher_checksum:
            raise TokenFileError(
                f"DISTILL.{self.CONFIG_NODE}.FILE was learned on another teacher (checksum {self.teacher_checksum}) "
                f"than the one in use ({checksum}). Learn tokens on DISTILL.TEACHER.WEIGHTS with tools/learn_tokens.py."
            )

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = super().forward(student, teacher)
        self.calls += self.training
        return losses

    @property
    def customizing(self) -> bool:
        """Whether the student's masks take part now."""
        return self.customize and self.calls >= self.warmup

    def level_loss(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        s = normalize(self.align[level](student), self.normalize)
        position_weights = self._position_weights(self.levels[level], s.detach(), teacher)
        return self.level_weights[level] * weighted_error(s, normalize(teacher, self.normalize), position_weights)

    @torch.no_grad()
    def _position_weights(self, level: "_FixedTokens", student: Tensor, teacher: Tensor) -> Tensor:
        masks = token_masks(teacher, level.tokens)
        if self.customizing:
            masks *= token_masks(student, *self._tokens_for_student(level, teacher))
        return mask_weights(masks, level.weights(teacher), self.eps, mean=self.reduction == "mean")

    def _tokens_for_student(self, level: "_FixedTokens", teacher: Tensor) -> Sequence[Tensor]:
        """Tokens, and a bias where the student is standardised: <e, dev * s + mean> = <e * dev, s> + <e, mean>."""
        if self.normalize == "none":
            return (level.tokens,)
        variance, mean = torch.var_mean(at_least_float32(teacher), dim=(0, 2, 3), correction=0)
        return level.tokens * torch.sqrt(variance + _EPS), (level.tokens * mean).sum(1)

    def get_extra_state(self) -> dict[str, Any]:
        """The position in the warm-up, for `state_dict`, and which tokens are in use."""
        return {"calls": self.calls, "tokens": self.tokens_checksum}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continues the warm-up of a checkpoint.

        Raises:
            TokenFileError: the checkpoint was written with other tokens.
        """
        if state["tokens"] != self.tokens_checksum:
            raise TokenFileError(f"DISTILL.{self.CONFIG_NODE}.FILE holds other tokens than the run was started with")
        self.calls = int(state["calls"])


class _FixedTokens(nn.Module):
    """The tokens of one level as buffers: they move with the distiller and are in its checkpoint, untrained."""

    def __init__(self, level: Tokens) -> None:
        super().__init__()
        for name, value in level._asdict().items():
            self.register_buffer(name, None if value is None else value.clone())

    def weights(self, teacher: Tensor) -> Tensor:
        """(N, T), rows of sum 1."""
        if self.weight is not None:
            return token_weights(teacher, self.weight, self.bias)
        t = self.tokens.shape[0]
        return self.tokens.new_full((teacher.shape[0], t), 1.0 / t)


def _convolutions(pairs: Sequence[TapPair]) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(p.student_shape.channels, p.teacher_shape.channels, kernel_size=1) for p in pairs)
