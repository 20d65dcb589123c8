"""Building blocks shared by all models: norms, convolutions, RoI and mask operators, box losses."""

from d2lite.layers.batch_norm import (
    CycleBatchNormList,
    FrozenBatchNorm2d,
    LayerNorm,
    NaiveSyncBatchNorm,
    get_norm,
)
from d2lite.layers.blocks import CNNBlockBase
from d2lite.layers.deform_conv import DeformConv, ModulatedDeformConv
from d2lite.layers.losses import ciou_loss, diou_loss
from d2lite.layers.mask_ops import paste_masks_in_image
from d2lite.layers.nms import batched_nms, nms
from d2lite.layers.roi_align import ROIAlign, roi_align
from d2lite.layers.shape_spec import ShapeSpec
from d2lite.layers.wrappers import (
    BatchNorm2d,
    Conv2d,
    ConvTranspose2d,
    Linear,
    cat,
    cross_entropy,
    empty_input_loss_func_wrapper,
    interpolate,
    move_device_like,
    nonzero_tuple,
    shapes_to_tensor,
)

__all__ = [
    "BatchNorm2d",
    "CNNBlockBase",
    "Conv2d",
    "ConvTranspose2d",
    "CycleBatchNormList",
    "DeformConv",
    "FrozenBatchNorm2d",
    "LayerNorm",
    "Linear",
    "ModulatedDeformConv",
    "NaiveSyncBatchNorm",
    "ROIAlign",
    "ShapeSpec",
    "batched_nms",
    "cat",
    "ciou_loss",
    "cross_entropy",
    "diou_loss",
    "empty_input_loss_func_wrapper",
    "get_norm",
    "interpolate",
    "move_device_like",
    "nms",
    "nonzero_tuple",
    "paste_masks_in_image",
    "roi_align",
    "shapes_to_tensor",
]
