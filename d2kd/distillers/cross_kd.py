"""CrossKD: the teacher's head reads features of the student's head, and what it says of them must be what it says."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from d2kd.errors import ConfigError
from d2kd.layers import generalized_iou, mean_over_processes, soft_label_focal_loss, upcast_half
from d2kd.settings import setting

from .base import DISTILLERS, Distiller, FeatureMaps
from .divergence import distance_divergence
from .predictions import scores_of_places
from .taps import AlignmentError, HeadRest, Prediction, TapPair, describe_layer

_BOXES = ("box_deltas", "box_distribution")


@DISTILLERS.register()
class CrossKD(Distiller):
    """Cross-head imitation (Wang et al., arXiv 2306.11369, section 3): task and teacher pull at different parameters.

    A feature in the student's head goes on through the rest of the teacher's, which is frozen; gradients pass it. These
    cross-head predictions follow the teacher's own, while those of the student follow the ground truth.

    Class scores, with probabilities p of the cross-head and t of the teacher: |p - t|^POWER times the cross entropy of
    p to the soft label t, which is binary for heads of independent classes (the quality focal loss of arXiv 2006.04388,
    equation 2). For softmax heads it is that of the classes, weighted by half of sum |p - t|.
    Boxes: 1 - GIoU to the teacher's box, or the L1 distance of the encoded numbers; of heads that predict distributions
    (GFL) also the divergence from the teacher's, as in the paper. A box weighs the square of the teacher's best class
    probability there, so that boxes of the background hardly count.

    Both are sums over all levels, divided by the sum of the teacher's squared probabilities (at least 1), a soft count
    of the objects that it sees. Of heads on regions, class scores are a mean over the regions, and boxes are divided by
    the sum of their weights (at least 1).
    As both predictions are the teacher's, its classes and anchors need not be the student's.
    Where all of the student's head behind the feature is the teacher's, and stays so
    (`DISTILL.INIT_FROM_TEACHER.FREEZE`), the cross-head's predictions are the student's own: nothing runs twice.
    """

    CONTINUES_HEAD = True

    position: int = setting(
        -1,
        "Layers of each branch of the student's head before the feature that enters the teacher's; -1 = all but the "
        "last, and at least one.",
        at_least=-1,
    )
    teacher_position: int = setting(
        -1,
        "Layers of the teacher's branches that are left out; -1 = so many that as many are left as the student has "
        "behind POSITION.",
        at_least=-1,
    )
    power: float = setting(
        1.0,
        "Exponent of the difference of probabilities that weighs class scores; 0 = cross entropy.",
        at_least=0,
        at_most=10,
    )
    box_weight: float = setting(1.0, "Factor on the losses of boxes, beside WEIGHT; 0 = class scores only.", at_least=0)
    box_loss: str = setting(
        "giou",
        "giou: of the decoded boxes | l1: of the encoded numbers | kl: of the distributions of a head that predicts "
        "such, the mean over the four sides.",
        choices=("giou", "l1", "kl"),
    )

    def __init__(self, *, pairs: Sequence[TapPair], **settings: Any) -> None:
        """
        Raises:
            ConfigError: a setting is out of range.
            AlignmentError: a pair has no rest of the teacher's head, or is no prediction of classes or boxes.
        """
        super().__init__(pairs=pairs, **settings)
        self._check_box_loss()
        self.align = nn.ModuleList([_aligner(pair) for pair in self.pairs])
        self._scores_of = scores_of_places(f"DISTILL.{self.NODE}", self.pairs)

    def _check_box_loss(self) -> None:
        key = f"DISTILL.{self.NODE}.BOX_LOSS is {self.box_loss}"
        for pair in self.pairs:
            kind = _kind(pair)
            if self.box_loss == "giou" and kind in _BOXES and _rest_of(pair).decode is None:
                other = "l1" if kind == "box_deltas" else "kl"
                raise ConfigError(f"{key}, and how boxes are encoded is unknown: set it to {other}.")
            if self.box_loss == "l1" and kind == "box_distribution":
                raise ConfigError(f"{key}, and the teacher predicts distributions of boxes: set it to giou or kl.")
            if self.box_loss == "kl" and kind == "box_deltas":
                raise ConfigError(f"{key}, and the teacher predicts boxes, no distributions: set it to giou or l1.")

    def check_pair(self, key: str, pair: TapPair) -> None:
        """Raises AlignmentError unless the teacher's tap is a prediction that its head's rest leads to."""
        of_regions = _on_regions(pair) and _kind(pair) == "box_distribution"
        if pair.teacher.rest is None or _kind(pair) not in ("class_logits", *_BOXES) or of_regions:
            raise AlignmentError(
                f"{key}, {pair}: {type(self).__name__} continues features of the student's head in the teacher's, up "
                "to class scores or boxes, and nothing is known of such a head here."
            )

    def forward(
        self, student: FeatureMaps, teacher: FeatureMaps, valid: FeatureMaps | None = None
    ) -> dict[str, Tensor]:
        """As in the base class; what the loss of a level is divided by depends on all of them."""
        maps = [self.aligned(level, student, teacher) for level in range(len(self.pairs))]
        labels = {level: _soft_labels(self.pairs[level], maps[level][1]) for level in dict.fromkeys(self._scores_of)}
        dense = [labels[level].square().sum() for level in labels if not _on_regions(self.pairs[level])]
        objects = mean_over_processes(sum(dense[1:], start=dense[0])).clamp(min=1) if dense else None
        losses = {}
        for level, pair in enumerate(self.pairs):
            scores = labels[self._scores_of[level]]
            loss = self._sum(level, *maps[level], scores)
            if objects is not None and not _on_regions(pair):
                loss = loss / objects
            elif _kind(pair) == "class_logits":
                loss = loss / max(1, len(scores))
            else:
                foreground = self._foreground(level, scores).amax(1).square().sum()
                loss = loss / mean_over_processes(foreground).clamp(min=1)
            factor = 1.0 if _kind(pair) == "class_logits" else self.box_weight
            losses[pair.name] = self.weight_of(level) * factor * loss
        return losses

    def aligned(self, level: int, student: FeatureMaps, teacher: FeatureMaps) -> tuple[Tensor, Tensor]:
        """Returns the student's feature and the teacher's prediction, maps cropped to the size that both have."""
        pair = self.pairs[level]
        s, t = student[pair.student.name], teacher[pair.teacher.name].detach()
        s = s.detach() if self.weight == 0 else s
        if not _on_regions(pair) and s.shape[-2:] != t.shape[-2:]:  # images are padded to other sizes
            height, width = min(s.shape[-2], t.shape[-2]), min(s.shape[-1], t.shape[-1])
            s, t = s[..., :height, :width], t[..., :height, :width]
        return s, t

    def _foreground(self, level: int, labels: Tensor) -> Tensor:
        """The probabilities of the classes without that of the background."""
        return labels[:, :-1] if _is_softmax(self.pairs[self._scores_of[level]]) else labels

    def _sum(self, level: int, feature: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """The loss of a pair, not divided by anything.

        Args:
            level: number of the pair.
            feature: of the student, (N, C, H, W), or with a row a region.
            target: what the teacher predicts.
            labels: the teacher's class probabilities at the same place.
        """
        pair = self.pairs[level]
        rest = _rest_of(pair)
        prediction = rest.run(self.align[level](feature))
        if _kind(pair) == "class_logits":
            return soft_label_focal_loss(_trained(pair, prediction), labels, self.power, _is_softmax(pair))
        weights, ours, theirs = _boxes(pair, self._foreground(level, labels), prediction, target)
        if self.box_loss == "kl":
            return (weights * distance_divergence(ours, theirs)).sum()
        if self.box_loss == "l1":
            return (weights * (upcast_half(ours) - upcast_half(theirs)).abs().sum(1)).sum()
        assert rest.decode is not None
        return (weights * (1 - generalized_iou(rest.decode(ours), rest.decode(theirs)))).sum()

    def describe_alignment(self, level: int) -> str:
        """As in the base class."""
        if self._is_predicted(level):
            return "none, the head is the teacher's"
        layer = describe_layer(self.align[level])
        return ", ".join(part for part in (layer, "then the rest of the teacher's head") if part)

    def in_teacher_channels(self, level: int, student: Tensor) -> Tensor | None:
        """Returns None, as a feature is compared by what it leads to; a prediction as it is."""
        return student if self._is_predicted(level) else None

    def _is_predicted(self, level: int) -> bool:
        """Whether the student's own prediction is compared, because its head is the teacher's."""
        return self.pairs[level].student.prediction is not None


def _boxes(pair: TapPair, foreground: Tensor, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (M,) and encoded boxes of both predictions, (M, 4), or (M, 4 * B) logits of their distances."""
    if not _on_regions(pair):
        anchors = 1 if _kind(pair) == "box_distribution" else theirs.shape[1] // 4
        weights = foreground.unflatten(1, (anchors, -1)).amax(2).flatten()
        flat = [x.unflatten(1, (anchors, -1)).movedim(2, -1).flatten(0, -2) for x in (ours, theirs)]
        return weights.square(), flat[0], flat[1]
    weights, classes = foreground.max(1)
    if theirs.shape[1] == 4:
        return weights.square(), ours, theirs
    index = classes[:, None, None].expand(-1, 1, 4)
    ours, theirs = (x.unflatten(1, (-1, 4)).gather(1, index)[:, 0] for x in (ours, theirs))
    return weights.square(), ours, theirs


def _soft_labels(pair: TapPair, logits: Tensor) -> Tensor:
    """Probabilities of all classes that are trained, (N, A * K, H, W), or (R, K), K + 1 of a softmax.

    Args:
        pair: whose teacher's tap gives the logits.
    """
    logits = upcast_half(_trained(pair, logits))
    return logits.softmax(1) if _is_softmax(pair) else logits.sigmoid()


def _trained(pair: TapPair, logits: Tensor) -> Tensor:
    """The logits of the classes that are trained."""
    unused = _prediction(pair).unused_channels
    return logits[:, :-unused] if unused else logits


def _aligner(pair: TapPair) -> nn.Module:
    """What brings the student's feature to the channels that the teacher's layers take."""
    ours, theirs = pair.student.channels, _rest_of(pair).channels
    if ours == theirs:
        return nn.Identity()
    return nn.Linear(ours, theirs) if pair.student.is_vector else nn.Conv2d(ours, theirs, kernel_size=1)


def _rest_of(pair: TapPair) -> HeadRest:
    assert pair.teacher.rest is not None
    return pair.teacher.rest


def _prediction(pair: TapPair) -> Prediction:
    return pair.teacher.prediction or Prediction(pair.teacher.name, "", "")


def _kind(pair: TapPair) -> str:
    return _prediction(pair).kind


def _on_regions(pair: TapPair) -> bool:
    return _prediction(pair).location == "region"


def _is_softmax(pair: TapPair) -> bool:
    return _prediction(pair).activation == "softmax"
