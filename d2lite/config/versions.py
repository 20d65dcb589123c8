"""Key names of older config versions, and the renaming in both directions."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2lite.config.config import CfgNode

LATEST_VERSION = 2

# {version: keys renamed when that version was replaced by the next one, old name -> new name}
_RENAMED: dict[int, dict[str, str]] = {
    0: {"MODEL.RPN_HEAD.NAME": "MODEL.RPN.HEAD_NAME"},
    1: {
        "MODEL.WEIGHT": "MODEL.WEIGHTS",
        "MODEL.PANOPTIC_FPN.SEMANTIC_LOSS_SCALE": "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
        "MODEL.PANOPTIC_FPN.RPN_LOSS_SCALE": "MODEL.RPN.LOSS_WEIGHT",
        "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_SCALE": "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT",
        "MODEL.PANOPTIC_FPN.COMBINE_ON": "MODEL.PANOPTIC_FPN.COMBINE.ENABLED",
        "MODEL.PANOPTIC_FPN.COMBINE_OVERLAP_THRESHOLD": "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH",
        "MODEL.PANOPTIC_FPN.COMBINE_STUFF_AREA_LIMIT": "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT",
        "MODEL.PANOPTIC_FPN.COMBINE_INSTANCES_CONFIDENCE_THRESHOLD": (
            "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH"
        ),
        "MODEL.ROI_HEADS.SCORE_THRESH": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "MODEL.ROI_HEADS.NMS": "MODEL.ROI_HEADS.NMS_THRESH_TEST",
        "MODEL.RETINANET.INFERENCE_SCORE_THRESHOLD": "MODEL.RETINANET.SCORE_THRESH_TEST",
        "MODEL.RETINANET.INFERENCE_TOPK_CANDIDATES": "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
        "MODEL.RETINANET.INFERENCE_NMS_THRESHOLD": "MODEL.RETINANET.NMS_THRESH_TEST",
        "TEST.DETECTIONS_PER_IMG": "TEST.DETECTIONS_PER_IMAGE",
        "TEST.AUG_ON": "TEST.AUG.ENABLED",
        "TEST.AUG_MIN_SIZES": "TEST.AUG.MIN_SIZES",
        "TEST.AUG_MAX_SIZE": "TEST.AUG.MAX_SIZE",
        "TEST.AUG_FLIP": "TEST.AUG.FLIP",
    },
}


def upgrade_config(cfg: "CfgNode", to_version: int | None = None) -> "CfgNode":
    """Returns a copy of `cfg` with the key names of `to_version` (None: the latest), which is not older."""
    to_version = LATEST_VERSION if to_version is None else to_version
    if cfg.VERSION > to_version:
        raise ValueError(f"Cannot upgrade a config of version {cfg.VERSION} to version {to_version}.")
    cfg = cfg.clone()
    for version in range(cfg.VERSION, to_version):
        for old, new in _RENAMED[version].items():
            _move(cfg, old, new)
    cfg.VERSION = to_version
    return cfg


def downgrade_config(cfg: "CfgNode", to_version: int) -> "CfgNode":
    """Returns a copy of `cfg` with the key names of `to_version`, which is not newer."""
    if cfg.VERSION < to_version:
        raise ValueError(f"Cannot downgrade a config of version {cfg.VERSION} to version {to_version}.")
    cfg = cfg.clone()
    for version in reversed(range(to_version, cfg.VERSION)):
        for old, new in _RENAMED[version].items():
            _move(cfg, new, old)
    cfg.VERSION = to_version
    return cfg


def upgrade_old_keys(loaded: dict[str, Any], version: int | None) -> bool:
    """Renames, in place, the old keys of a config file that is to be merged into a config of `version`.

    A file without a VERSION may be of any version: whatever old names it has are renamed.

    Returns:
        Whether any key was renamed.

    Raises:
        ValueError: if the file has a newer version than the config.
    """
    if version is None:
        return False
    found = loaded.get("VERSION", 0)
    if not isinstance(found, int) or not 0 <= found <= version:
        raise ValueError(f"Cannot merge a file of VERSION {found!r} into a config of VERSION {version}.")
    moved = [_move(loaded, old, new) for v in range(found, version) for old, new in _RENAMED[v].items()]
    loaded["VERSION"] = version
    return any(moved)


def _move(tree: dict[str, Any], source: str, target: str) -> bool:
    """Moves the value at a dotted key, drops a parent left empty, and returns whether there was a value."""
    parent, name = _parent(tree, source)
    if parent is None or name not in parent:
        return False
    value = parent.pop(name)
    grandparent, parent_name = _parent(tree, source.rpartition(".")[0])
    if not parent and grandparent is not None:
        del grandparent[parent_name]
    for part in target.split(".")[:-1]:
        tree = tree.setdefault(part, type(tree)())
    tree[target.split(".")[-1]] = value
    return True


def _parent(tree: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that would hold a dotted key (None if there is none), and the last part of the key."""
    *path, name = key.split(".")
    for part in path:
        tree = tree.get(part)
        if not isinstance(tree, dict):
            return None, name
    return tree, name
