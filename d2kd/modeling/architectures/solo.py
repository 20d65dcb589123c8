"""SOLO: a class for every cell of a grid on every level, and a mask for it."""

from d2kd.distillers import Prediction

from .base import Architecture, NumClassesKey, register_architecture


@register_architecture("SOLO")
class SOLO(Architecture):
    """d2kd's SOLO (arXiv 1912.04488), plain or decoupled.

    It predicts no boxes, so HeadRegression finds nothing to compare. The masks of cells are no prediction here either:
    only those of the few cells with an instance are trained, and computed.
    """

    CLASSES = (NumClassesKey("MODEL.SOLO.NUM_CLASSES"),)
    EVALUATOR_TYPES = ("coco", "cityscapes_instance", "pascal_voc")
    SCORE_THRESHOLD = "MODEL.SOLO.SCORE_THRESH_TEST"

    def predictions(self) -> list[Prediction]:
        """Returns the class logits of the cells of every level."""
        found = []
        for i, (name, level) in enumerate(zip(self.model.head_in_features, self.model.levels)):
            cells = {"cells along a side of the grid (MODEL.SOLO.NUM_GRIDS)": level.grid}
            found.append(Prediction(f"head.cls_score@{i}", "class_logits", "anchor", name, "sigmoid", requires=cells))
        return found

    def evidence(self) -> list[Prediction]:
        """Returns none: grids are stretched over the image, and have no stride."""
        return []
