"""Segmentors: a head that scores every pixel; alone, or beside an R-CNN in PanopticFPN."""

from torch import nn

from d2kd.distillers import Prediction

from .base import Architecture, NumClassesKey, register_architecture
from .rcnn import GeneralizedRCNN


@register_architecture("SemanticSegmentor")
class SemanticSegmentor(Architecture):
    """Detectron2's SemanticSegmentor, whatever its head."""

    CLASSES = (NumClassesKey("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "stuff_classes"),)
    EVALUATOR_TYPES = ("sem_seg", "cityscapes_sem_seg")

    def predictions(self) -> list[Prediction]:
        """Returns the logits of the head's last layer, before its upsampling."""
        return super().predictions() + pixel_logits(self.model)


@register_architecture("PanopticFPN")
class PanopticFPN(GeneralizedRCNN):
    """An R-CNN and a segmentor on one backbone."""

    CLASSES = (*GeneralizedRCNN.CLASSES, *SemanticSegmentor.CLASSES)
    EVALUATOR_TYPES = (*GeneralizedRCNN.EVALUATOR_TYPES, *SemanticSegmentor.EVALUATOR_TYPES)
    SUPPORTS_TTA = False  # it would leave the segmentation out

    def predictions(self) -> list[Prediction]:
        """Returns those of the R-CNN and of the segmentor."""
        return super().predictions() + pixel_logits(self.model)


def pixel_logits(model: nn.Module) -> list[Prediction]:
    """Returns the class logits of a model's `sem_seg_head`."""
    if isinstance(getattr(getattr(model, "sem_seg_head", None), "predictor", None), nn.Module):
        return [Prediction("sem_seg_head.predictor", "class_logits", "pixel", activation="softmax")]
    return []
