"""What every distillation method is: features of two networks in, named losses out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from d2kd.layers import TapShape, align_resolution, build_aligner, check_alignable
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

DISTILLERS = Registry("DISTILLERS")
DISTILLERS.__doc__ = "Distillation methods by the name that `DISTILL.METHODS` uses."


class NormAffine(NamedTuple):
    """Scale and shift of a batch norm, (C,) each."""

    weight: Tensor
    bias: Tensor


class TapPair(NamedTuple):
    """Two taps that are compared, and what is known of their maps."""

    student: str
    teacher: str
    student_shape: TapShape
    teacher_shape: TapShape
    # the prediction that both taps hold, "" for features: "dense logits", "region deltas", ...
    holds: str = ""
    # the last batch norm before the teacher's tap, where there is one
    teacher_norm: NormAffine | None = None


class Distiller(nn.Module):
    """Base of the methods that compare feature maps pair by pair.

    A subclass names its node below `DISTILL` in `CONFIG_NODE`, and implements `level_loss`. Its parameters (aligners,
    generation blocks, ...) are trained with the student and are never part of it. Losses are named by the student's
    tap.
    """

    CONFIG_NODE: str = ""
    #: "" for features, else what is predicted, "logits" or "deltas": decides which taps are the default.
    PREDICTION: str = ""

    def __init__(self, *, pairs: Sequence[TapPair], weight: float) -> None:
        """
        Args:
            pairs: the maps to compare, from the finest to the coarsest.
            weight: factor on the loss of every level; with 0 the student gets exactly no gradient from here.

        Raises:
            AlignmentError: a pair that cannot be aligned.
            ValueError: no pairs, a student's tap in two of them, or a negative weight.
        """
        super().__init__()
        if not pairs:
            raise ValueError(
                f"{type(self).__name__} has no feature maps to compare: name them in DISTILL.{self.CONFIG_NODE}.TAPS."
            )
        taps = [pair.student for pair in pairs]
        twice = sorted({tap for tap in taps if taps.count(tap) > 1})
        if twice:
            raise ValueError(
                f"DISTILL.{self.CONFIG_NODE}.TAPS names {', '.join(twice)} more than once; a tap of the student has "
                "one loss, so it can follow one of the teacher's only."
            )
        if weight < 0:
            raise ValueError(f"DISTILL.{self.CONFIG_NODE}.WEIGHT is {weight}; it must not be negative.")
        self.check_pairs(pairs)
        self.pairs: list[TapPair] = list(pairs)
        self.weight = float(weight)

    def check_pairs(self, pairs: Sequence[TapPair]) -> None:
        """Raises AlignmentError for a pair that the method cannot compare."""
        for pair in pairs:
            check_alignable(
                f"DISTILL.{self.CONFIG_NODE}.TAPS, {pair.student} <- {pair.teacher}",
                pair.student_shape,
                pair.teacher_shape,
            )

    @classmethod
    def from_config(cls, node: CfgNode, pairs: Sequence[TapPair]) -> dict[str, Any]:
        """Constructor arguments from the method's node of the configuration."""
        return {"pairs": pairs, "weight": node.WEIGHT}

    @classmethod
    def build(cls, cfg: CfgNode, pairs: Sequence[TapPair]) -> "Distiller":
        """The distiller that `cfg.DISTILL` describes."""
        return cls(**cls.from_config(cfg.DISTILL[cls.CONFIG_NODE], pairs))

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raises ValueError if the method was prepared for another teacher than this one, whose weights are loaded."""

    def build_aligners(self) -> nn.ModuleList:
        """One aligner a pair, from student to teacher channels."""
        return nn.ModuleList([build_aligner(p.student_shape, p.teacher_shape) for p in self.pairs])

    def factors_of_pairs(self, key: str, factors: Sequence[float]) -> list[float]:
        """Further factors on the losses, one a pair; () is 1 for each. `key` is their key in the method's node.

        Raises:
            ValueError: another number of them, or a negative one.
        """
        factors = [float(f) for f in factors] or [1.0] * len(self.pairs)
        if len(factors) != len(self.pairs):
            raise ValueError(
                f"DISTILL.{self.CONFIG_NODE}.{key} has {len(factors)} numbers for {len(self.pairs)} taps: "
                f"{', '.join(pair.student for pair in self.pairs)}."
            )
        if min(factors) < 0:
            raise ValueError(f"DISTILL.{self.CONFIG_NODE}.{key} is {factors}; no number in it must be negative.")
        return factors

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
        """
        Args:
            student: map (N, C, H, W) by tap name.
            teacher: the same of the teacher, without gradient.

        Returns:
            Weighted scalar loss by the student's tap name.
        """
        losses = {}
        for level, pair in enumerate(self.pairs):
            s, t = self.aligned(level, student, teacher)
            losses[pair.student] = self.weight * self.level_loss(level, s, t)
        return losses

    def aligned(self, level: int, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Both maps of a pair at equal H and W; no gradient for the teacher, nor for a student of weight 0."""
        pair = self.pairs[level]
        s, t = student[pair.student], teacher[pair.teacher].detach()
        if self.weight == 0:
            s = s.detach()
        if pair.student_shape.is_vector:
            return s, t
        return align_resolution(s, t, pair.teacher_shape.stride / pair.student_shape.stride)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Unweighted scalar loss of one pair of maps of equal H and W."""
        raise NotImplementedError
