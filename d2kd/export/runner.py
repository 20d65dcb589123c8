"""Runs an exported file where neither d2kd nor Detectron2 is: `python runner.py FILE IMAGES.npz RESULTS.npz`.

IMAGES.npz has arrays "0", "1", ...: images (N, 3, H, W), float32. RESULTS.npz has "0.boxes", ...: the outputs for each
of them, by name, and "seconds", how long each took. With a fourth argument each is run so many times more, and the
median is what counts.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def open_file(
    path: str, device: str = "cpu", threads: int = 0
) -> tuple[dict[str, Any], Callable[[np.ndarray], list[np.ndarray]]]:
    """Returns what an exported file says of itself, and a function from images (N, 3, H, W) to its outputs.

    Raises:
        ValueError: d2kd has not written it, or the runtime lacks the device ("cpu" or "cuda").
    """
    if path.endswith(".onnx"):
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        provider = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise ValueError(
                f"does not run on {device}: this ONNX Runtime has no {provider} (pip install onnxruntime-gpu)"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0: as many as there are cores
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
        about = session.get_modelmeta().custom_metadata_map.get("d2kd.json", "")
        return _read(about), lambda images: session.run(None, {"images": images})
    import torch
    import torchvision  # noqa: F401  (its operators are in the file)

    files = {"d2kd.json": ""}
    network = torch.jit.load(path, map_location=device, _extra_files=files)

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            found = network(torch.from_numpy(images))
        return [x.numpy() for x in ([found] if isinstance(found, torch.Tensor) else found)]

    return _read(files["d2kd.json"]), run


def _read(about: str | bytes) -> dict[str, Any]:
    if not about:
        raise ValueError("was not written by d2kd export: it does not say what it takes and gives")
    return dict(json.loads(about))


def main(path: str, images: str, results: str, repeats: str = "0") -> None:
    """Runs the file on all images."""
    about, run = open_file(path)
    found: dict[str, np.ndarray] = {}
    seconds = []
    with np.load(images) as file:
        for key in file.files:
            taken = []
            for _ in range(1 + int(repeats)):
                start = time.perf_counter()
                outputs = run(file[key])
                taken.append(time.perf_counter() - start)
            seconds.append(statistics.median(taken[1:] or taken))
            found.update({f"{key}.{name}": value for name, value in zip(about["outputs"], outputs)})
    here = sorted(name for name in sys.modules if name.partition(".")[0] in ("d2kd", "d2lite", "detectron2"))
    assert not here, f"it was to run without {here}"
    np.savez(results, seconds=np.array(seconds), **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, whose modules have names that others may have
    main(*sys.argv[1:])
