"""Which configuration key holds the number of classes of a model."""

from detectron2.config import CfgNode

_KEY_OF_ARCHITECTURE = {
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "FCOS": "MODEL.FCOS.NUM_CLASSES",
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "SemanticSegmentor": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
}


def num_classes(cfg: CfgNode) -> tuple[str, int] | None:
    """The configuration key and its number of classes; None for architectures without classes or unknown to d2kd."""
    key = _KEY_OF_ARCHITECTURE.get(cfg.MODEL.META_ARCHITECTURE)
    if key is None:
        return None
    node = cfg
    for part in key.split("."):
        node = node[part]
    return key, int(node)
