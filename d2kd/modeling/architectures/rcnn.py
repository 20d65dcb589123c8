"""R-CNNs: a box head that works on regions, once or in the stages of a cascade."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from d2kd.distillers import AlignmentError, Prediction
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNNWithTTA

from .base import (
    Architecture,
    ClassLayer,
    HeadBranch,
    NumClassesKey,
    box_decoder,
    head_layers,
    register_architecture,
)
from .dense_detector import anchors, box_encoding

_PER_REGION = ("roi_heads.box_predictor", "roi_heads.box_head")


class Stage(NamedTuple):
    """Head and predictor of one cascade stage; an R-CNN without a cascade has one."""

    head: nn.Module
    predictor: nn.Module
    #: ".0", ".1", ... behind the names of head and predictor in a cascade, else "".
    suffix: str


@register_architecture("GeneralizedRCNN")
class GeneralizedRCNN(Architecture):
    """Faster, Mask and Cascade R-CNN, with a pyramid or as "C4" and "DC5"."""

    CLASSES: ClassVar[tuple[NumClassesKey, ...]] = (NumClassesKey("MODEL.ROI_HEADS.NUM_CLASSES"),)
    EVALUATOR_TYPES: ClassVar[tuple[str, ...]] = ("coco", "cityscapes_instance", "pascal_voc")
    SCORE_THRESHOLD = "MODEL.ROI_HEADS.SCORE_THRESH_TEST"
    SUPPORTS_TTA = True

    @classmethod
    def with_test_augmentation(cls, cfg: CfgNode, model: nn.Module) -> nn.Module:
        """Returns Detectron2's `GeneralizedRCNNWithTTA`."""
        return GeneralizedRCNNWithTTA(cfg, model)

    @property
    def stages(self) -> list[Stage]:
        """The stages of the box head; [] for models without one."""
        heads: Any = getattr(self.model, "roi_heads", None)
        predictor = getattr(heads, "box_predictor", None)
        if not isinstance(predictor, nn.Module):
            return []
        if isinstance(predictor, nn.ModuleList):
            return [Stage(h, p, f".{i}") for i, (h, p) in enumerate(zip(heads.box_head, predictor))]
        # the heads of "C4" models share a ResNet stage, and predict from its mean over the region
        head = heads.box_head if hasattr(heads, "box_head") else _MeanOf(heads.res5)
        return [Stage(head, predictor, "")]

    @property
    def pooler(self) -> nn.Module:
        """What cuts regions out of feature maps for the box head; called with (maps, boxes of each image)."""
        heads = self.model.roi_heads
        return heads.box_pooler if hasattr(heads, "box_pooler") else heads.pooler

    @property
    def _pooled_size(self) -> str:
        size: Any = getattr(self.pooler, "output_size", ())
        return "x".join(map(str, size))

    @property
    def pooled_features(self) -> list[str]:
        """Outputs of the backbone that the pooler reads."""
        heads = self.model.roi_heads
        return list(heads.box_in_features if hasattr(heads, "box_in_features") else heads.in_features)

    def stage_of(self, tap: str) -> int | None:
        """Returns the number of the stage in whose head or predictor a tap lies; None for none."""
        for number, stage in enumerate(self.stages):
            if f"{tap.partition('@')[0]}.".startswith(tuple(f"{part}{stage.suffix}." for part in _PER_REGION)):
                return number
        return None

    def predictions(self) -> list[Prediction]:
        """Returns class logits and box deltas of the box predictor, of each stage of a cascade."""
        found = super().predictions()
        for number, stage in enumerate(self.stages):
            sigmoid = bool(getattr(stage.predictor, "use_sigmoid_ce", False))
            tap = f"roi_heads.box_predictor{stage.suffix}"
            if isinstance(getattr(stage.predictor, "cls_score", None), nn.Module):
                activation = "sigmoid" if sigmoid else "softmax"
                # sigmoid classifiers have a column for the background too, and do not train it
                found.append(Prediction(f"{tap}.cls_score", "class_logits", "region", number, activation, int(sigmoid)))
            box_layer = getattr(stage.predictor, "bbox_pred", None)
            if isinstance(box_layer, nn.Module):
                requires = {
                    "class-agnostic setting of boxes (MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG)": (
                        box_layer.out_features == 4
                    ),
                    "encoding of boxes (MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS, of a cascade "
                    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS)": box_encoding(stage.predictor),
                }
                found.append(Prediction(f"{tap}.bbox_pred", "box_deltas", "region", number, requires=requires))
        return found

    def head_branches(self) -> list[HeadBranch]:
        """Returns the branches of classes and boxes of every stage; both go through all of the box head."""
        branches = []
        for prediction in self.predictions():
            if prediction.location != "region":
                continue
            stage = self.stages[prediction.place]
            if not isinstance(stage.head, nn.Sequential):  # of "C4" models, or of one's own
                return []
            is_boxes = prediction.kind == "box_deltas"
            # two names of one feature: losses are named by it
            call, size = 0 if is_boxes else None, f"of {self._pooled_size} cells"
            layers = head_layers(f"roi_heads.box_head{stage.suffix}", stage.head, call, size)
            decode = box_decoder(getattr(stage.predictor, "box2box_transform", None)) if is_boxes else None
            predictor = self.model.get_submodule(prediction.tap)
            branches.append(HeadBranch(prediction, layers, predictor, 0.0, decode))
        return branches

    def evidence(self) -> list[Prediction]:
        """Returns the objectness of the region proposal network, on every level."""
        return _objectness(self.model)

    def meanings(self) -> list[Prediction]:
        """As in the base class, with the boxes of the region proposal network."""
        return [*super().meanings(), *_deltas_of_proposals(self.model)]

    def class_layers(self) -> list[ClassLayer]:
        """Returns those of the box predictors and of the mask head."""
        masks = "roi_heads.mask_head.predictor"
        has_masks = masks in dict(self.model.named_modules())
        return super().class_layers() + ([ClassLayer(masks, "region")] if has_masks else [])


@register_architecture("ProposalNetwork")
class ProposalNetwork(Architecture):
    """Detectron2's region proposal network alone."""

    EVALUATOR_TYPES = ("coco", "cityscapes_instance")

    def evidence(self) -> list[Prediction]:
        """Returns the objectness, on every level."""
        return _objectness(self.model)

    def meanings(self) -> list[Prediction]:
        """As in the base class, with the boxes of proposals."""
        return [*super().meanings(), *_deltas_of_proposals(self.model)]


def _objectness(model: Any) -> list[Prediction]:
    return _of_proposals(model, "objectness_logits", "objectness", {})


def _deltas_of_proposals(model: Any) -> list[Prediction]:
    """The boxes of the region proposal network, which no method compares."""
    encoding = box_encoding(model.proposal_generator) if hasattr(model, "proposal_generator") else None
    requires = {"encoding of boxes (MODEL.RPN.BBOX_REG_WEIGHTS)": encoding}
    return _of_proposals(model, "anchor_deltas", "box_deltas", requires)


def _of_proposals(model: Any, layer: str, kind: str, requires: Mapping[str, Any]) -> list[Prediction]:
    proposals: Any = getattr(model, "proposal_generator", None)
    if not isinstance(getattr(getattr(proposals, "rpn_head", None), layer, None), nn.Module):
        return []
    tap = f"proposal_generator.rpn_head.{layer}"
    return [
        Prediction(f"{tap}@{i}", kind, "anchor", level, requires={**anchors(proposals, i), **requires})
        for i, level in enumerate(proposals.in_features)
    ]


def is_region_tap(tap: str) -> bool:
    """Returns whether a tap gives one row per region: it lies in the box head or box predictor of an R-CNN.

    Raises:
        AlignmentError: it lies elsewhere in the heads on regions, whose rows are each model's own regions.
    """
    if tap.startswith("roi_heads.") and not tap.startswith(_PER_REGION):
        raise AlignmentError(
            f"Tap {tap!r} gives a row per region, and each model has its own regions there: of the heads on regions, "
            f"only {' and '.join(_PER_REGION)} can be compared."
        )
    return tap.startswith(_PER_REGION)


class _MeanOf(nn.Module):
    """Mean over each region of what a module gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).mean(dim=(2, 3))
