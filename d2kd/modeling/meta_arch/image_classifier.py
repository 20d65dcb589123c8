"""META_ARCHITECTURE "ImageClassifier": a whole network of timm or torchvision, or any backbone with a linear layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.config import config_check, declare_keys
from d2kd.errors import ConfigError, require_choice
from d2kd.settings import setting
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone

LOSSES = ("softmax", "sigmoid")

declare_keys(  # META_ARCHITECTURE "ImageClassifier"
    "MODEL.CLASSIFIER",
    NUM_CLASSES=setting(1000, "Classes.", at_least=1),
    IN_FEATURE=setting(
        "", 'Output of the backbone that is pooled and classified; "" takes the coarsest. Whole networks have a head.'
    ),
    DROPOUT=setting(0.0, "Dropout before the linear layer on a backbone.", at_least=0, below=1),
    LOSS=setting(
        "softmax",
        "softmax: cross entropy over the classes | sigmoid: binary cross entropy, the classes each for itself.",
        choices=LOSSES,
    ),
    LABEL_SMOOTHING=setting(0.0, "Share of a label that is spread evenly over all classes.", at_least=0, below=1),
)


class ImageClassifier(nn.Module):
    """Scores the classes of whole images of one size.

    Attributes:
        backbone: gives "class_logits" itself, or feature maps.
        head: pools one of these and classifies it; None where the backbone is a whole network.
        logits: the identity that all logits pass, the tap "logits".
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: "PooledClassifier | None",
        num_classes: int,
        loss: str = "softmax",
        label_smoothing: float = 0.0,
        pixel_mean: list[float],
        pixel_std: list[float],
    ) -> None:
        """
        Args:
            backbone: gives feature maps, or "class_logits" (N, num_classes).
            head: from feature maps to logits; None for a backbone with logits.
            num_classes: classes.
            loss: see `LOSSES`.
            label_smoothing: share of a label that is spread over all classes, in [0, 1).
            pixel_mean, pixel_std: of the channels of an image, in the order of its channels, 0 to 255.
        """
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.logits = nn.Identity()
        self.num_classes = num_classes
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments from the configuration.

        Raises:
            ConfigError: `MODEL.CLASSIFIER.IN_FEATURE` names what the backbone does not give.
        """
        node, backbone = cfg.MODEL.CLASSIFIER, build_backbone(cfg)
        return {
            "backbone": backbone,
            "head": None if "class_logits" in backbone.output_shape() else _build_head(node, backbone),
            "num_classes": node.NUM_CLASSES,
            "loss": node.LOSS,
            "label_smoothing": node.LABEL_SMOOTHING,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: each with "image", (3, H, W), 0 to 255, all of one size; in training with "label", the
                class, or "target", (num_classes,), a soft label with its smoothing.

        Returns:
            In training {"loss_cls": scalar}, else for each image {"scores": (num_classes,) probabilities}.
        """
        features = self.backbone(self.preprocess_image(batched_inputs))
        logits = self.logits(features["class_logits"] if self.head is None else self.head(features))
        if self.training:
            return {"loss_cls": self.classification_loss(logits, batched_inputs)}
        logits = logits.float()
        scores = logits.softmax(1) if self.loss == "softmax" else logits.sigmoid()
        return [{"scores": row} for row in scores]

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Returns the images of a batch as (N, 3, H, W), normalized.

        Raises:
            ConfigError: they have different sizes.
        """
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        if len({image.shape for image in images}) > 1:
            raise ConfigError(
                "An ImageClassifier takes images of one size, and a batch has "
                f"{sorted({tuple(image.shape) for image in images})}."
            )
        return torch.stack(images).float().sub_(self.pixel_mean).div_(self.pixel_std)

    def classification_loss(self, logits: Tensor, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Returns the mean loss over the images of a batch, from logits (N, num_classes)."""
        logits = logits.float()
        if "target" in batched_inputs[0]:
            target = torch.stack([x["target"] for x in batched_inputs]).to(logits.device, non_blocking=True)
            smoothing = 0.0
        else:
            target = torch.tensor([x["label"] for x in batched_inputs]).to(logits.device, non_blocking=True)
            smoothing = self.label_smoothing
        if self.loss == "softmax":
            return F.cross_entropy(logits, target, label_smoothing=smoothing)
        if target.dim() == 1:
            target = F.one_hot(target, self.num_classes).to(logits.dtype)
            target = target * (1 - smoothing) + smoothing / self.num_classes
        return F.binary_cross_entropy_with_logits(logits, target)


class PooledClassifier(nn.Module):
    """Mean over all positions of a feature map, dropout, and a linear layer."""

    def __init__(self, in_feature: str, channels: int, num_classes: int, dropout: float = 0.0) -> None:
        """
        Args:
            in_feature: the map to pool.
            channels: of it.
            num_classes: outputs.
            dropout: share of the pooled channels that is dropped in training.
        """
        super().__init__()
        self.in_feature = in_feature
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """{name: (N, C, H, W)} -> (N, num_classes)."""
        return self.fc(self.dropout(features[self.in_feature].mean((2, 3))))


def _build_head(node: CfgNode, backbone: Backbone) -> PooledClassifier:
    shapes = backbone.output_shape()
    name = node.IN_FEATURE or max(shapes, key=lambda n: shapes[n].stride or 1)
    require_choice("MODEL.CLASSIFIER.IN_FEATURE", name, shapes, " These are the outputs of the backbone.")
    return PooledClassifier(name, shapes[name].channels, node.NUM_CLASSES, node.DROPOUT)


@config_check
def check_classifier(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: a classifier is asked for what only detectors have.
    """
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier" and (cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON):
        key = "MASK_ON" if cfg.MODEL.MASK_ON else "KEYPOINT_ON"
        raise ConfigError(f"MODEL.{key} is True, and an ImageClassifier has no such head: set it False.")


if "ImageClassifier" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(ImageClassifier)
