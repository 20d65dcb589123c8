"""What every dense detector here takes from a configuration in the same way."""

from typing import Any

from detectron2.config import CfgNode


def dense_arguments(cfg: CfgNode, node: CfgNode) -> dict[str, Any]:
    """Returns the constructor's arguments on classes, levels, inference, pixels and pictures.

    Args:
        cfg: of the model.
        node: that of its architecture, e.g. MODEL.FCOS.
    """
    return {
        "head_in_features": list(node.IN_FEATURES),
        "num_classes": node.NUM_CLASSES,
        "test_score_thresh": node.SCORE_THRESH_TEST,
        "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
        "test_nms_thresh": node.NMS_THRESH_TEST,
        "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "vis_period": cfg.VIS_PERIOD,
        "input_format": cfg.INPUT.FORMAT,
    }
