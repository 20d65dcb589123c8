"""Lets code that says `from detectron2... import ...` run on d2lite, and explains what d2lite leaves out."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_ADVICE = "d2lite does not have it; Detectron2 does: install Detectron2 and set D2KD_RUNTIME=detectron2."

# Names of Detectron2's API that d2lite leaves out, by what they belong to.
LEFT_OUT_NAMES = {
    "rotated boxes": (
        "RotatedBoxes",
        "RotatedAnchorGenerator",
        "RotatedFastRCNNOutputLayers",
        "Box2BoxTransformRotated",
        "RRPN",
        "RROIHeads",
        "ROIAlignRotated",
        "nms_rotated",
        "batched_nms_rotated",
        "pairwise_iou_rotated",
        "RotatedCOCOEvaluator",
    ),
    "keypoints": (
        "Keypoints",
        "heatmaps_to_keypoints",
        "KRCNNConvDeconvUpsampleHead",
        "BaseKeypointRCNNHead",
        "build_keypoint_head",
        "ROI_KEYPOINT_HEAD_REGISTRY",
    ),
    "lazy configs": ("LazyConfig", "LazyCall", "instantiate"),
    "LVIS": ("LVISEvaluator", "register_lvis_instances", "load_lvis_json", "get_lvis_instances_meta"),
    "panoptic data": ("COCOPanopticEvaluator", "register_coco_panoptic", "register_coco_panoptic_separated"),
    "Cityscapes' own evaluation": ("CityscapesInstanceEvaluator", "CityscapesSemSegEvaluator"),
    "a crop by overlap": ("MinIoURandomCrop",),
    "layers of other models": ("DepthwiseSeparableConv2d", "ASPP"),
    "stored proposals": ("load_proposals_into_dataset",),
    "other backbones": ("MViT", "SwinTransformer", "RegNet", "build_regnet_backbone", "build_regnet_fpn_backbone"),
}
_REASON = {name: what for what, names in LEFT_OUT_NAMES.items() for name in names}


class _LeftOutFinder(importlib.abc.MetaPathFinder):
    """Last resort of the import system for `d2lite.*`: a clear error instead of a bare 'cannot import name'."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> None:
        if not fullname.startswith("d2lite."):
            return None
        parent, _, name = fullname.rpartition(".")
        if name in _REASON:
            raise ImportError(f"{name} ({_REASON[name]}) is not in {parent}: {_ADVICE}", name=fullname)
        raise ModuleNotFoundError(f"There is no module {fullname}: {_ADVICE}", name=fullname)


class _AliasFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Resolves `alias` and `alias.x.y` to the very module objects of `d2lite` and `d2lite.x.y`."""

    def __init__(self, alias: str) -> None:
        self.alias = alias

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.alias and not fullname.startswith(self.alias + "."):
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        try:
            module = importlib.import_module("d2lite" + spec.name[len(self.alias) :])
        except ModuleNotFoundError as e:
            # Callers compare the name with the one that they asked for.
            if (e.name or "").split(".")[0] == "d2lite":
                raise ModuleNotFoundError(e.msg, name=self.alias + e.name[len("d2lite") :]) from None
            raise
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just put the alias's spec on a module that was loaded under its own name.
        module.__spec__ = module.__spec__.loader_state


def install(alias: str = "detectron2") -> None:
    """Makes `import <alias>` and its submodules resolve to d2lite. Calling it again does nothing.

    Raises:
        RuntimeError: if another package is already imported under that name.
    """
    if any(isinstance(finder, _AliasFinder) and finder.alias == alias for finder in sys.meta_path):
        return
    if alias in sys.modules:
        raise RuntimeError(f"'{alias}' is already imported from {getattr(sys.modules[alias], '__file__', '?')}.")
    sys.meta_path.insert(0, _AliasFinder(alias))


def explain_left_out() -> None:
    """Adds the finder that explains missing parts of the API, once."""
    if not any(isinstance(finder, _LeftOutFinder) for finder in sys.meta_path):
        sys.meta_path.append(_LeftOutFinder())
