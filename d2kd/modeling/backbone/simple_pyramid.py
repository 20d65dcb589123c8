"""Detectron2's simple feature pyramid with the padding that it means."""

from collections.abc import Sequence
from typing import Any

from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid


class PaddedPyramid(SimpleFeaturePyramid):
    """Detectron2's `SimpleFeaturePyramid` whose images are padded to whole cells of its coarsest level.

    Detectron2's own asks for that under a name that its batches do not know, so that without `square_pad` the right and
    lower borders of images would be cut off.
    """

    def __init__(self, net: Backbone, in_feature: str, *, scale_factors: Sequence[float], **others: Any) -> None:
        """Takes the arguments of `SimpleFeaturePyramid`."""
        super().__init__(net, in_feature, scale_factors=scale_factors, **others)
        stride = net.output_shape()[in_feature].stride
        assert stride is not None
        self._coarsest = int(stride / min(scale_factors))

    @property
    def padding_constraints(self) -> dict[str, int]:
        """As Detectron2's backbones give them: `size_divisibility` and `square_size`, in pixels."""
        return {**super().padding_constraints, "size_divisibility": self._coarsest}
