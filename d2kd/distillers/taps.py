"""Metadata of the features that a method compares, filled in by `d2kd.modeling.taps`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from d2kd.errors import UserError

#: Teacher and student strides may differ by this factor at most; beyond it the maps show different things.
MAX_STRIDE_RATIO = 8


class AlignmentError(UserError):
    """Two features that cannot be compared."""


class Prediction(NamedTuple):
    """What a tap predicts, if it is a prediction layer (or one call of it)."""

    #: Address of the tap.
    tap: str
    #: What is predicted: "class_logits", "box_deltas", "box_distribution" (of the distance to each side of a box, four
    #: times as many logits as there are distances), or another word that architectures and methods agree on.
    kind: str
    #: Where: "anchor" (or grid cell, point: every position of a feature map), "region", "pixel" or "image" ...
    location: str
    #: ... and at which of several places: the feature map's name, the stage of a cascade. Predictions of two models
    #: that agree in kind, location and place can be compared.
    place: Any = None
    #: How logits become probabilities: "softmax" or "sigmoid".
    activation: str = ""
    #: Output channels at the end that are not trained (a background column of a sigmoid classifier).
    unused_channels: int = 0
    #: What must be the same in both models for the numbers to mean the same, by description (with the configuration
    #: key), e.g. {"encoding of boxes (BBOX_REG_WEIGHTS)": (1, 1, 1, 1)}.
    requires: Mapping[str, Any] = {}


class NormAffine(NamedTuple):
    """Scale and shift of a batch norm, (C,) each."""

    weight: Tensor
    bias: Tensor


class HeadRest(NamedTuple):
    """The frozen layers that lead from a feature in a head to its prediction; for methods that continue in them."""

    #: From a feature (N, C, H, W), or (R, ...) with a row a region, to the prediction.
    run: Callable[[Tensor], Tensor]
    #: C.
    channels: int
    #: From what is predicted of boxes, (M, 4) deltas or (M, 4 * B) logits of distances, to boxes (M, 4) XYXY in units
    #: of the anchor; None for classes.
    decode: Callable[[Tensor], Tensor] | None = None


class TapInfo(NamedTuple):
    """A tapped feature: its address and what is known of it before training."""

    name: str
    channels: int
    #: Input pixels per cell (may be a fraction); 0 for features (R, C) that are one vector per region or image.
    stride: float
    #: What it predicts, if it is a prediction.
    prediction: Prediction | None = None
    #: The last batch norm before it, where there is one.
    norm: NormAffine | None = None
    #: Whether a gradient that reaches it reaches parameters that are trained.
    trainable: bool = True
    #: Channels to take, in this order, where these are classes that the other network has in another one; None for all.
    order: tuple[int, ...] | None = None
    #: What leads to this prediction from the other network's feature, for methods with `CONTINUES_HEAD`.
    rest: HeadRest | None = None

    @property
    def is_vector(self) -> bool:
        """Whether the feature is (R, C) and not a map (N, C, H, W)."""
        return self.stride == 0


class TapPair(NamedTuple):
    """Two taps that are compared."""

    student: TapInfo
    teacher: TapInfo

    @property
    def name(self) -> str:
        """Name of the loss: the student's tap."""
        return self.student.name

    def __str__(self) -> str:
        return f"{self.student.name} <- {self.teacher.name}"


def check_alignable(key: str, pair: TapPair) -> None:
    """Raises AlignmentError, with both shapes and the key to change, for maps that are too far apart."""
    student, teacher = pair
    if student.is_vector or teacher.is_vector:
        raise AlignmentError(
            f"{key}, {pair}: this method compares maps (N, C, H, W), and one of these is a vector (R, C) a region or "
            "image."
        )
    if max(student.stride, teacher.stride) > MAX_STRIDE_RATIO * min(student.stride, teacher.stride):
        raise AlignmentError(
            f"{key}, {pair}: the student's map has {student.channels} channels at stride {student.stride:g}, the "
            f"teacher's {teacher.channels} at stride {teacher.stride:g}. Strides may differ by a factor of "
            f"{MAX_STRIDE_RATIO} at most."
        )


def build_aligner(pair: TapPair, always: bool = False) -> nn.Module:
    """Returns a 1x1 convolution (with bias) from student to teacher channels.

    Args:
        always: also where the channels are equal, and the identity would do.
    """
    ours, theirs = pair.student.channels, pair.teacher.channels
    return nn.Conv2d(ours, theirs, kernel_size=1) if always or ours != theirs else nn.Identity()


def describe_layer(layer: nn.Module) -> str:
    """Returns a layer in words: "1x1 conv 64 -> 128", "" for the identity."""
    if isinstance(layer, nn.Identity):
        return ""
    if isinstance(layer, nn.Conv2d):
        size = "x".join(map(str, layer.kernel_size))
        return f"{size} conv {layer.in_channels} -> {layer.out_channels}"
    return type(layer).__name__
