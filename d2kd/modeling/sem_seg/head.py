"""SEM_SEG_HEADS "ASPPHead" (DeepLabV3) and "PSPHead" (PSPNet): context, a classifier of pixels, an auxiliary head."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from d2kd.config import declare_keys
from d2kd.errors import ConfigError, require_choice
from d2kd.settings import NOT_EMPTY, setting
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.utils.events import get_event_storage, has_event_storage

from .aspp import ASPP, ASPP_FORMS
from .auxiliary import AuxiliaryHead
from .blocks import pixel_classifier
from .losses import LOSS_AVERAGES, pixel_accuracy, pixel_cross_entropy, resize_logits
from .pyramid_pooling import PyramidPooling

#: Iterations between two measurements of the accuracy in training: as often as the log shows it.
_ACCURACY_PERIOD = 20

declare_keys(  # SEM_SEG_HEAD.NAME "ASPPHead" and "PSPHead", beside Detectron2's keys: CONVS_DIM, NORM, LOSS_WEIGHT, ...
    "MODEL.SEM_SEG_HEAD",
    ASPP_CHANNELS=setting(256, "ASPPHead: channels of each branch.", at_least=1),
    ASPP_DILATIONS=setting(
        [12, 24, 36],
        "ASPPHead: dilations of the 3x3 branches, in cells; [12, 24, 36] is for an output stride of 8, half of them "
        "for 16.",
        items=int,
        at_least=1,
    ),
    ASPP_FORM=setting(
        "project",
        "ASPPHead: what brings the branches together. project: a 1x1 convolution, then a 3x3 one of CONVS_DIM "
        "channels, as in the paper | bottleneck: the 3x3 one alone, as mmsegmentation has it.",
        choices=ASPP_FORMS,
    ),
    ASPP_DROPOUT=setting(0.5, "ASPPHead of the form project: dropout behind the 1x1 convolution.", at_least=0, below=1),
    PSP_SCALES=setting(
        [1, 2, 3, 6], "PSPHead: regions along each side of the map.", items=int, at_least=1, rule=NOT_EMPTY
    ),
    PSP_CHANNELS=setting(0, "PSPHead: channels of each branch; 0 = CONVS_DIM.", at_least=0),
    DROPOUT=setting(0.1, "Share of the channels that is dropped before each classifier.", at_least=0, below=1),
    ALIGN_CORNERS=setting(
        False, "How maps are resized: with the centers of the corner pixels in the same place, or else the corners."
    ),
    LOSS_AVERAGE=setting(
        "valid",
        "What the sum over the pixels is divided by. valid: those that have a class | all: also those of IGNORE_VALUE, "
        "as mmsegmentation does.",
        choices=LOSS_AVERAGES,
    ),
    AUX_FEATURE=setting("", 'Feature of the auxiliary head, e.g. "res4"; "" has none.'),
    AUX_CHANNELS=setting(256, "Channels of the auxiliary head.", at_least=1),
    AUX_LOSS_WEIGHT=setting(0.4, "Factor on the loss of the auxiliary head.", at_least=0),
)


class PixelHead(nn.Module):
    """A module that sees context, a classifier of pixels, and in training an auxiliary head on an earlier map.

    Attributes:
        predictor: gives the logits, at the stride of the feature.
        auxiliary: None without. In evaluation it runs only where its layers are tapped.
        num_classes, ignore_value: what labels may be.
    """

    @configurable
    def __init__(
        self,
        *,
        context: nn.Module,
        context_channels: int,
        in_feature: str,
        stride: int,
        num_classes: int,
        auxiliary: AuxiliaryHead | None = None,
        auxiliary_feature: str = "",
        dropout: float = 0.1,
        align_corners: bool = False,
        ignore_value: int = 255,
        loss_weight: float = 1.0,
        auxiliary_loss_weight: float = 0.4,
        loss_average: str = "valid",
    ) -> None:
        """
        Args:
            context: from a feature to a map of `context_channels`.
            in_feature: what it takes.
            stride: of that feature, in pixels.
            num_classes: to score.
            auxiliary, auxiliary_feature: the auxiliary head and what it takes.
            dropout: share of the channels that is dropped before the classifier.
            align_corners: how logits are resized, see `resize_logits`.
            ignore_value: label of the pixels without a class.
            loss_weight, auxiliary_loss_weight: factors on the two losses.
            loss_average: one of `LOSS_AVERAGES`.
        """
        super().__init__()
        self.in_feature = in_feature
        self.stride = stride
        self.num_classes = num_classes
        self.context = context
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = pixel_classifier(context_channels, num_classes)
        self.auxiliary = auxiliary
        self.auxiliary_feature = auxiliary_feature
        self.align_corners = align_corners
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.loss_average = loss_average
        self._auxiliary_is_tapped = False

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments from MODEL.SEM_SEG_HEAD.

        Raises:
            ConfigError: a feature is not there, or they are several.
        """
        node = cfg.MODEL.SEM_SEG_HEAD
        if len(node.IN_FEATURES) != 1:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {list(node.IN_FEATURES)}; {cls.__name__} takes one feature, "
                'e.g. ["res5"].'
            )
        name, auxiliary = node.IN_FEATURES[0], None
        shape = _shape_of(input_shape, "IN_FEATURES", name)
        if node.AUX_FEATURE:
            channels = _shape_of(input_shape, "AUX_FEATURE", node.AUX_FEATURE).channels
            auxiliary = AuxiliaryHead(
                channels, node.AUX_CHANNELS, node.NUM_CLASSES, dropout=node.DROPOUT, norm=node.NORM
            )
        return {
            "context": cls.build_context(node, shape.channels),
            "context_channels": node.CONVS_DIM,
            "in_feature": name,
            "stride": shape.stride,
            "num_classes": node.NUM_CLASSES,
            "auxiliary": auxiliary,
            "auxiliary_feature": node.AUX_FEATURE,
            "dropout": node.DROPOUT,
            "align_corners": node.ALIGN_CORNERS,
            "ignore_value": node.IGNORE_VALUE,
            "loss_weight": node.LOSS_WEIGHT,
            "auxiliary_loss_weight": node.AUX_LOSS_WEIGHT,
            "loss_average": node.LOSS_AVERAGE,
        }

    @classmethod
    def build_context(cls, node: CfgNode, in_channels: int) -> nn.Module:
        """Returns the module between feature and classifier, which gives CONVS_DIM channels."""
        raise NotImplementedError

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """
        Args:
            features: maps (N, C, H, W) by name.
            targets: labels (N, H, W), needed in training.

        Returns:
            In training (None, losses); else (logits (N, num_classes, H * stride, W * stride), {}).
        """
        logits = self.layers(features)
        if not self.training:
            h, w = logits.shape[-2:]
            return resize_logits(logits, (h * self.stride, w * self.stride), self.align_corners), {}
        assert targets is not None
        auxiliary = None if self.auxiliary is None else self.auxiliary(features[self.auxiliary_feature])
        return None, self.losses(logits, targets, auxiliary)

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (N, num_classes, H, W) at the stride of the feature."""
        logits: Tensor = self.predictor(self.dropout(self.context(features[self.in_feature])))
        if self._auxiliary_is_tapped and not self.training:
            assert self.auxiliary is not None
            self.auxiliary(features[self.auxiliary_feature])
        return logits

    def losses(self, predictions: Tensor, targets: Tensor, auxiliary: Tensor | None = None) -> dict[str, Tensor]:
        """Cross entropies "loss_sem_seg" and, with an auxiliary head, "loss_sem_seg_aux", at the size of the labels.

        Args:
            predictions: logits as `layers` gives them.
            targets: (N, H, W) labels, in pixels of the input.
            auxiliary: logits of the auxiliary head.
        """
        losses = {"loss_sem_seg": self.loss_weight * self._loss("sem_seg/accuracy", predictions, targets)}
        if auxiliary is not None:
            loss = self._loss("sem_seg/accuracy_aux", auxiliary, targets)
            losses["loss_sem_seg_aux"] = self.auxiliary_loss_weight * loss
        return losses

    def _loss(self, accuracy: str, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a classifier; now and then its accuracy, in percent, goes to the log."""
        logits = resize_logits(logits, (targets.shape[-2], targets.shape[-1]), self.align_corners)
        if has_event_storage() and get_event_storage().iter % _ACCURACY_PERIOD == 0:
            value = pixel_accuracy(logits.detach(), targets, self.ignore_value)
            get_event_storage().put_scalar(accuracy, value.item())
        return pixel_cross_entropy(logits, targets, self.ignore_value, self.loss_average)

    @contextlib.contextmanager
    def while_tapped(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Runs the auxiliary head also in evaluation while one of its layers is tapped; see `FeatureTaps`."""
        before = self._auxiliary_is_tapped
        own = [] if self.auxiliary is None else list(self.auxiliary.modules())
        self._auxiliary_is_tapped = before or any(part is module for part in own for module in modules)
        try:
            yield
        finally:
            self._auxiliary_is_tapped = before


class ASPPHead(PixelHead):
    """DeepLabV3 (arXiv 1706.05587)."""

    @classmethod
    def build_context(cls, node: CfgNode, in_channels: int) -> nn.Module:
        """Returns the pyramid of dilated convolutions."""
        return ASPP(
            in_channels,
            node.ASPP_CHANNELS,
            node.CONVS_DIM,
            dilations=node.ASPP_DILATIONS,
            form=node.ASPP_FORM,
            dropout=node.ASPP_DROPOUT,
            norm=node.NORM,
        )


class PSPHead(PixelHead):
    """PSPNet (arXiv 1612.01105)."""

    @classmethod
    def build_context(cls, node: CfgNode, in_channels: int) -> nn.Module:
        """Returns the pyramid of pooled maps."""
        return PyramidPooling(
            in_channels,
            node.PSP_CHANNELS or node.CONVS_DIM,
            node.CONVS_DIM,
            scales=node.PSP_SCALES,
            align_corners=node.ALIGN_CORNERS,
            norm=node.NORM,
        )


def _shape_of(shapes: Mapping[str, ShapeSpec], key: str, name: str) -> Any:
    require_choice(f"MODEL.SEM_SEG_HEAD.{key}", name, shapes, " These are the outputs of the backbone.")
    return shapes[name]


for _head in (ASPPHead, PSPHead):
    if _head.__name__ not in SEM_SEG_HEADS_REGISTRY:
        SEM_SEG_HEADS_REGISTRY.register(_head)
