"""Writing a network as ONNX or TorchScript, with what its user must know inside the file."""

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Exported, ExportError
from .layers import graph_layers

#: What is in every file: JSON under this name, in the metadata of ONNX or the extra files of TorchScript.
ABOUT = "d2kd.json"
#: Opsets of ONNX that all versions of PyTorch from 2.6 write by the exporter that is used here.
OPSETS = range(16, 21)


def require_packages(file_format: str) -> None:
    """
    Raises:
        ExportError: the packages of a format are not installed.
    """
    if file_format != "onnx":
        return
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"--format onnx needs {', '.join(missing)}, not installed here: pip install 'd2kd[onnx]'")


def write_torchscript(network: Exported, example: Tensor, path: Path, about: Mapping[str, Any], opset: int) -> None:
    """Writes a TorchScript file; see `WRITERS`."""
    network.for_onnx = False
    with graph_layers(network), quiet(), torch.no_grad():
        traced: Any = torch.jit.trace(network, (example,), check_trace=False)
        traced.save(str(path), _extra_files={ABOUT: json.dumps(about)})


def write_onnx(network: Exported, example: Tensor, path: Path, about: Mapping[str, Any], opset: int) -> None:
    """Writes an ONNX file; see `WRITERS`.

    By PyTorch's exporter from traces: it writes the opset that it is asked for, on all versions from 2.6, where the one
    from `torch.export` writes its newest and converts, and has no operators with as many results as there are
    detections before 2.7.
    """
    import onnx

    network.for_onnx = True
    size = {2: "height", 3: "width"} if not network.fixed_side else {}
    free: dict[str, dict[int, str]] = {"images": {0: "batch", **size}}
    for name in network.OUTPUTS:
        free[name] = {0: "detections" if network.TASK == "detection" else "batch"}
    if network.TASK == "segmentation":
        free["logits"].update({2: "height", 3: "width"})
    with graph_layers(network), quiet(), torch.no_grad():
        torch.onnx.export(
            network,
            (example,),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["images"],
            output_names=list(network.OUTPUTS),
            dynamic_axes=free,
        )
    content = onnx.load(str(path))
    entry = content.metadata_props.add()
    entry.key, entry.value = ABOUT, json.dumps(about)
    onnx.save(content, str(path))


#: From a network, images to trace it with, a path, what is to be told and the opset: writes the file.
WRITERS: dict[str, Callable[[Exported, Tensor, Path, Mapping[str, Any], int], None]] = {
    "torchscript": write_torchscript,
    "onnx": write_onnx,
}
SUFFIXES = {"torch": (".pth",), "torchscript": (".pt", ".ts"), "onnx": (".onnx",)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leaves out the tracer's warnings, since that a file is right on other sizes is verified, and printed graphs."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
