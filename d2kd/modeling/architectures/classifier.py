"""Classifiers of whole images: one label an image, and one distribution over the classes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from d2kd.distillers import Prediction

from .base import Architecture, ClassLayer, NumClassesKey, output_shapes, register_architecture


@register_architecture("ImageClassifier")
class ImageClassifier(Architecture):
    """d2kd's ImageClassifier, on a whole network or on a backbone."""

    CLASSES = (NumClassesKey("MODEL.CLASSIFIER.NUM_CLASSES"),)
    CLASSIFIES_IMAGES = True
    EVALUATOR_TYPES = ("classification",)

    def feature_shapes(self) -> Mapping[str, Any]:
        """Returns the stages of a whole network, or else the outputs of the backbone, finest first."""
        stages = getattr(self.backbone, "stage_shapes", None)
        return output_shapes(self.backbone) if stages is None else stages()

    def probe_size(self) -> int:
        """Returns the side of the images that the network was built for, where it takes no other."""
        return getattr(self.backbone, "fixed_side", None) or super().probe_size()

    def predictions(self) -> list[Prediction]:
        """Returns the logits, whatever makes them."""
        return [Prediction("logits", "class_logits", "image", activation=self.model.loss)]

    def class_layers(self) -> list[ClassLayer]:
        """Returns the linear layers with one output a class: the last one of the head or of the whole network."""
        head = "head" if self.model.head is not None else "backbone"
        layers = [
            f"{head}.{path}"
            for path, module in self.model.get_submodule(head).named_modules()
            if isinstance(module, nn.Linear) and module.out_features == self.model.num_classes
        ]
        return [ClassLayer("logits", "image"), *(ClassLayer(path, "image") for path in layers[-1:])]
