"""RetinaNet, FCOS and their like: a head whose layers run once a feature level, one prediction an anchor or point."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from d2kd.distillers import Prediction

from .base import Architecture, HeadBranch, NumClassesKey, box_decoder, head_layers, register_architecture

_SUBNETS = {"class_logits": "cls_subnet", "box_deltas": "bbox_subnet", "box_distribution": "bbox_subnet"}


class DenseDetector(Architecture):
    """Detectron2's dense detectors: `head`, `head_in_features`, and `anchor_generator` where they have anchors."""

    EVALUATOR_TYPES = ("coco", "cityscapes_instance", "pascal_voc")
    LOSS_NORMALIZERS: ClassVar[tuple[str, ...]] = ("loss_normalizer",)

    def predictions(self) -> list[Prediction]:
        """Returns class logits and box deltas of every level."""
        return [*self._on_levels("class_logits", "cls_score", "sigmoid"), *self._on_levels("box_deltas", "bbox_pred")]

    def head_branches(self) -> list[HeadBranch]:
        """Returns the branches of classes and boxes on every level, where the head has Detectron2's two subnets."""
        branches, shapes, levels = [], self.feature_shapes(), list(self.model.head_in_features)
        for prediction in self.predictions():
            name = _SUBNETS[prediction.kind]
            subnet = getattr(self.model.head, name, None)
            if not isinstance(subnet, nn.Sequential):
                return []
            level = levels.index(prediction.place)
            layers = head_layers(f"head.{name}", subnet, level)
            decode = None if prediction.kind == "class_logits" else self.decoder_of_boxes()
            stride = float(shapes[prediction.place].stride or 0)
            branches.append(HeadBranch(prediction, layers, self.predictor(prediction, level), stride, decode))
        return branches

    def predictor(self, prediction: Prediction, level: int) -> nn.Module:
        """Returns the layer that makes a prediction on a level, from a feature (N, C, H, W)."""
        return self.model.get_submodule(prediction.tap.partition("@")[0])

    def decoder_of_boxes(self) -> Callable[[Tensor], Tensor] | None:
        """Returns how predictions of boxes become boxes, see `HeadBranch`; None where that is unknown."""
        return box_decoder(getattr(self.model, "box2box_transform", None))

    def _on_levels(self, kind: str, layer: str, activation: str = "") -> list[Prediction]:
        if not isinstance(getattr(self.model.head, layer, None), nn.Module):
            return []
        requires = {"encoding of boxes (BBOX_REG_WEIGHTS)": box_encoding(self.model)} if kind == "box_deltas" else {}
        return [
            Prediction(
                f"head.{layer}@{i}", kind, "anchor", level, activation, requires={**anchors(self.model, i), **requires}
            )
            for i, level in enumerate(self.model.head_in_features)
        ]


@register_architecture("RetinaNet")
class RetinaNet(DenseDetector):
    """RetinaNet (arXiv 1708.02002)."""

    CLASSES = (NumClassesKey("MODEL.RETINANET.NUM_CLASSES"),)
    SCORE_THRESHOLD = "MODEL.RETINANET.SCORE_THRESH_TEST"


@register_architecture("FCOS")
class FCOS(DenseDetector):
    """FCOS (arXiv 1904.01355); anchor-free, one point per location."""

    CLASSES = (NumClassesKey("MODEL.FCOS.NUM_CLASSES"),)
    SCORE_THRESHOLD = "MODEL.FCOS.SCORE_THRESH_TEST"


def anchors(module: nn.Module, level: int) -> dict[str, str]:
    """Returns what must be the same of a module's anchors on a level, as in `Prediction.requires`."""
    cells = list(getattr(getattr(module, "anchor_generator", None), "cell_anchors", ()))
    sizes = ", ".join(_size_of_anchor(box) for box in cells[level].tolist()) if cells else ""
    return {"anchors (width x height; MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS)": sizes}


def _size_of_anchor(box: Sequence[float]) -> str:
    if len(box) == 5:  # a rotated one: center, size and angle
        return f"{box[2]:.4g}x{box[3]:.4g} at {box[4]:.4g} degrees"
    return f"{box[2] - box[0]:.4g}x{box[3] - box[1]:.4g}"


def box_encoding(module: nn.Module) -> Any:
    """Returns how a module turns boxes into deltas: a class and its numbers."""
    transform = getattr(module, "box2box_transform", None)
    weights = getattr(transform, "weights", None)
    return type(transform).__name__, weights and tuple(weights), getattr(transform, "normalize_by_size", None)
