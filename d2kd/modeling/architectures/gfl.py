"""GFL: class logits, and for every cell a distribution of the distance to each side of its box."""

from collections.abc import Callable

from torch import Tensor, nn

from d2kd.distillers import Prediction

from ..meta_arch.gfl import as_box, box_distances
from .base import NumClassesKey, register_architecture
from .dense_detector import DenseDetector


@register_architecture("GFL")
class GFL(DenseDetector):
    """GFL (arXiv 2006.04388)."""

    CLASSES = (NumClassesKey("MODEL.GFL.NUM_CLASSES"),)
    SCORE_THRESHOLD = "MODEL.GFL.SCORE_THRESH_TEST"
    LOSS_NORMALIZERS = ()

    def predictions(self) -> list[Prediction]:
        """Returns the class logits of every level, and the logits of the distances to the sides of boxes."""
        cells = {"place of cells (MODEL.META_ARCHITECTURE, MODEL.GFL.CELL_OFFSET)": self.model.anchor_generator.offset}
        score = {**cells, "meaning of a score (MODEL.META_ARCHITECTURE)": "class and overlap in one"}
        bins = {**cells, "distances that are told apart (MODEL.GFL.NUM_BINS)": self.model.num_bins}
        levels = list(enumerate(self.model.head_in_features))
        return [
            *(
                Prediction(f"head.cls_score@{i}", "class_logits", "anchor", p, "sigmoid", requires=score)
                for i, p in levels
            ),
            *(Prediction(f"head.bbox_pred@{i}", "box_distribution", "anchor", p, requires=bins) for i, p in levels),
        ]

    def predictor(self, prediction: Prediction, level: int) -> nn.Module:
        """As in the base class; that of distances has a factor a level."""
        predictor = super().predictor(prediction, level)
        return predictor if prediction.kind == "class_logits" else _OnLevel(predictor, level)

    def decoder_of_boxes(self) -> Callable[[Tensor], Tensor]:
        """As in the base class."""
        return lambda logits: as_box(box_distances(logits))


class _OnLevel(nn.Module):
    """A layer that is told for which level it runs."""

    def __init__(self, layer: nn.Module, level: int) -> None:
        super().__init__()
        self.layer, self.level = layer, level

    def forward(self, feature: Tensor) -> Tensor:
        predicted: Tensor = self.layer(feature, self.level)
        return predicted
