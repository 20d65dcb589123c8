"""Segmentors: a head that scores every pixel; alone, or beside an R-CNN in PanopticFPN."""

from torch import nn

from d2kd.distillers import Prediction
from detectron2.config import CfgNode

from ..sem_seg.test_augmentation import SegmentorWithTTA
from .base import Architecture, NumClassesKey, register_architecture
from .rcnn import GeneralizedRCNN


@register_architecture("SemanticSegmentor")
class SemanticSegmentor(Architecture):
    """Detectron2's SemanticSegmentor and d2kd's Segmentor, whatever their head."""

    CLASSES = (NumClassesKey("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "stuff_classes"),)
    EVALUATOR_TYPES = ("sem_seg", "cityscapes_sem_seg")
    SUPPORTS_TTA = True

    @classmethod
    def with_test_augmentation(cls, cfg: CfgNode, model: nn.Module) -> nn.Module:
        """Returns a segmentor that averages over scales and flips."""
        return SegmentorWithTTA(cfg, model)

    def predictions(self) -> list[Prediction]:
        """Returns the logits of the last layer of head and auxiliary head, before their upsampling."""
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
    """Returns the class logits of a model's `sem_seg_head`, and of its auxiliary head where there is one."""
    places = {"sem_seg_head.predictor": None, "sem_seg_head.auxiliary.predictor": "auxiliary"}
    named = dict(model.named_modules())
    return [
        Prediction(tap, "class_logits", "pixel", place, activation="softmax")
        for tap, place in places.items()
        if tap in named
    ]
