"""--format torch: a student for plain Detectron2, that is weights, a YAML without keys of d2kd, and class names."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2kd.files import replacing
from d2kd.modeling import build_network, load_strictly
from d2kd.modeling.checkpoint_files import write_checkpoint
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

from .base import ExportError

logger = logging.getLogger(__name__)

_MARK = "# Written by d2kd export.\n"


def export_plain(
    cfg: CfgNode,
    model: nn.Module,
    target: str | Path,
    class_names: Mapping[str, Sequence[str]] | None = None,
) -> list[Path]:
    """Writes STUDENT.pth, STUDENT.yaml, which names it, and STUDENT.txt, a class a line.

    Args:
        cfg: of the model.
        model: trained, on the CPU.
        target: STUDENT.pth.
        class_names: by kind, as in a checkpoint; without any there is no STUDENT.txt.

    Returns:
        The files.

    Raises:
        ExportError: plain Detectron2 does not have the model, or builds another one from the YAML; or one of the files
            beside STUDENT.pth is there, and not of an earlier export.
    """
    target, names = Path(target), dict(class_names or {})
    require_detectron2s_own(cfg)
    plain = plain_config(cfg)
    plain.MODEL.WEIGHTS = target.name
    listed = next((list(value) for value in names.values() if value), [])
    files = [target, target.with_suffix(".yaml"), *([target.with_suffix(".txt")] if listed else [])]
    _require_free(files)
    with contextlib.ExitStack() as stack:
        weights, text, *lines = (stack.enter_context(replacing(file)) for file in files)
        write_checkpoint(weights, {"model": model.state_dict(), "class_names": names})
        text.write_text(_MARK + plain.dump(), encoding="utf-8")
        if listed:
            lines[0].write_text("".join(f"{name}\n" for name in listed), encoding="utf-8")
        _verify(model, text, weights)
    return files


def _require_free(files: Sequence[Path]) -> None:
    """Refuses to write over a YAML or a list of somebody's own, such as the YAML of the run."""
    target, config, *_ = files
    if config.is_file() and config.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        return
    for file in files[1:]:
        if file.exists():
            raise ExportError(
                f"{file} is there, which --format torch writes beside {target.name}, and is not of an earlier export: "
                f"choose another name or folder than {target}."
            )


def plain_config(cfg: CfgNode) -> CfgNode:
    """Returns Detectron2's own keys of a configuration, without datasets that d2kd has registered."""
    plain = get_cfg()
    _take(plain, cfg)
    plain.DATASETS.TRAIN = plain.DATASETS.TEST = ()
    plain.OUTPUT_DIR = "./output"
    plain.MODEL.DEVICE = get_cfg().MODEL.DEVICE
    return plain


def _take(plain: CfgNode, cfg: CfgNode) -> None:
    for key, value in plain.items():
        if isinstance(value, CfgNode):
            _take(value, cfg[key])
        elif key in cfg:
            plain[key] = cfg[key]


def require_detectron2s_own(cfg: CfgNode) -> None:
    """
    Raises:
        ExportError: architecture, backbone or head are d2kd's, or of an imported file.
    """
    used = [("META_ARCHITECTURE", META_ARCH_REGISTRY), ("BACKBONE.NAME", BACKBONE_REGISTRY)]
    if "Segmentor" in cfg.MODEL.META_ARCHITECTURE:
        used.append(("SEM_SEG_HEAD.NAME", SEM_SEG_HEADS_REGISTRY))
    for key, registry in used:
        name: Any = cfg.MODEL
        for part in key.split("."):
            name = name[part]
        if registry.get(name).__module__.partition(".")[0] not in ("detectron2", "d2lite"):
            raise ExportError(
                f"MODEL.{key} is {name}, which plain Detectron2 does not have, so that no YAML of its keys builds it. "
                "--format onnx or torchscript needs neither d2kd nor Detectron2; without --format the weights are "
                "written alone."
            )


def _verify(model: nn.Module, config: Path, weights: Path) -> None:
    """Builds the model from what was written, and compares them on five images."""
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.MODEL.DEVICE = "cpu"
    again = build_network(cfg, str(config)).eval()
    load_strictly(again, str(weights), "exported student", "its YAML")
    model = model.eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for height, width in ((96, 128), (128, 96), (100, 100), (90, 160), (160, 96)):
            inputs = [{"image": torch.rand(3, height, width, generator=random) * 255}]
            if not _same(model(inputs)[0], again(inputs)[0]):
                raise ExportError("The YAML of plain Detectron2 builds another model than --config-file. No file kept.")


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return set(first) == set(second) and all(_same(first[key], second[key]) for key in first)
    if hasattr(first, "get_fields"):
        return _same(first.get_fields(), second.get_fields())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    return _same(first.tensor, second.tensor) if hasattr(first, "tensor") else bool(first == second)
