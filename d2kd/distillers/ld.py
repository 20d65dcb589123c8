"""LD: the student's distributions of the distances to the sides of boxes follow the teacher's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2kd.layers import mean_over_processes, soft_label_focal_loss, upcast_half
from d2kd.settings import setting

from .base import DISTILLERS, FeatureMaps
from .divergence import distance_divergence
from .predictions import PredictionDistiller, scores_of_places
from .taps import AlignmentError, TapPair


@DISTILLERS.register()
class LD(PredictionDistiller):
    """Localization distillation (Zheng et al., arXiv 2102.12252), for heads that predict distributions of distances.

    The loss of a cell is T^2 KL of the teacher's distributions to the student's, the mean over the four sides (equation
    3, which is of one side; T^2 keeps the gradient's size when T changes). The paper takes cells that learn an object,
    and those around them that it calls valuable. Here each cell weighs the square of the teacher's best class
    probability there, which says where its boxes are worth following without ground truth, and the background hardly
    counts. The sum is divided by that of the weights over all levels (at least 1).

    With CLASS_WEIGHT the classes follow too, by the loss that `CrossKD` has: |p - t| times the binary cross entropy of
    the student's probability p to the teacher's t, divided by the sum of the squared t (at least 1).

    Example:
        >>> cls = Prediction("head.cls_score@0", "class_logits", "anchor", "p3", "sigmoid")
        >>> box = Prediction("head.bbox_pred@0", "box_distribution", "anchor", "p3")
        >>> taps = [TapInfo(cls.tap, 80, 8, cls), TapInfo(box.tap, 68, 8, box)]
        >>> losses = LD(pairs=[TapPair(tap, tap) for tap in taps])(student_maps, teacher_maps)
    """

    PREDICTION = ("box_distribution", "class_logits")

    temperature: float = setting(
        10.0, "Divides the logits of distances; their loss is multiplied by its square.", above=0, at_most=1000
    )
    class_weight: float = setting(
        0.0, "Factor on the losses of classes, beside WEIGHT; 0 = distances only.", at_least=0
    )

    def __init__(self, *, pairs: Sequence[TapPair], **settings: Any) -> None:
        """
        Raises:
            AlignmentError: other classes or distances, or distances where no classes are predicted.
            ConfigError: a setting is out of range.
        """
        super().__init__(pairs=pairs, **settings)
        if not any(self._is_box(pair) for pair in self.pairs):
            raise AlignmentError(f"DISTILL.{self.NODE}.TAPS names no distances to the sides of boxes.")
        self._scores_of = scores_of_places(f"DISTILL.{self.NODE}.TAPS", self.pairs)

    def check_pair(self, key: str, pair: TapPair) -> None:
        """Raises AlignmentError unless both predict the same distances, or scores of classes that exclude no other."""
        super().check_pair(key, pair)
        prediction = pair.teacher.prediction
        if prediction is not None and prediction.kind == "class_logits" and prediction.activation != "sigmoid":
            raise AlignmentError(
                f"{key}, {pair}: LD weighs by the scores of sigmoid heads; this is {prediction.activation}."
            )

    def teaches(self, level: int) -> bool:
        """As in the base class: classes are followed with CLASS_WEIGHT only."""
        return self._is_box(self.pairs[level]) or self.class_weight > 0

    @staticmethod
    def _is_box(pair: TapPair) -> bool:
        return pair.teacher.prediction is not None and pair.teacher.prediction.kind == "box_distribution"

    def forward(
        self, student: FeatureMaps, teacher: FeatureMaps, valid: FeatureMaps | None = None
    ) -> dict[str, Tensor]:
        """As in the base class; what the loss of a level is divided by depends on all of them."""
        maps = [self.aligned(level, student, teacher) for level in range(len(self.pairs))]
        labels = {level: upcast_half(maps[level][1]).sigmoid() for level in dict.fromkeys(self._scores_of)}
        weights = {level: t.amax(1).square() for level, t in labels.items()}
        sums = [torch.stack([w.sum(), labels[level].square().sum()]) for level, w in weights.items()]
        weight, objects = mean_over_processes(torch.stack(sums).sum(0)).clamp(min=1)
        losses = {}
        for level, pair in enumerate(self.pairs):
            (s, t), scores = maps[level], self._scores_of[level]
            if not self.teaches(level):
                continue
            if self._is_box(pair):
                ours, theirs = (x.movedim(1, -1).flatten(0, -2) for x in (s, t))
                divergence = distance_divergence(ours, theirs, self.temperature)
                loss = (weights[scores].flatten() * divergence).sum() / weight
            else:
                loss = self.class_weight * soft_label_focal_loss(s, labels[level], 1.0) / objects
            losses[pair.name] = self.weight_of(level) * loss
        return losses
