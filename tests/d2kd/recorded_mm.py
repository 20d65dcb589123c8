"""Reads tests/data/golden_mm, values recorded from other implementations, and compares with their tolerances."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: Relative to the largest value recorded: losses, other values, gradients.
TOLERANCES = {torch.float64: (1e-8, 1e-6, 1e-6), torch.float32: (5e-5, 2e-4, 1e-3)}


def read(data_dir: Path, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arrays of a file by their names; floating-point ones are of that type, the configuration is a dictionary."""
    with np.load(data_dir / "golden_mm" / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: np.asarray(file[key]) for key in file.files}
    found: dict[str, Any] = {}
    for key, value in arrays.items():
        if value.dtype.kind == "U":
            found[key] = json.loads(str(value)) if value.ndim == 0 else value.tolist()
        else:
            tensor = torch.from_numpy(value)
            found[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return found


def below(recorded: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What is below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}


def assert_close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """The largest difference is at most `tolerance` times the largest value recorded."""
    assert found.shape == wanted.shape, what
    largest = wanted.abs().max().item() if wanted.numel() else 0.0
    difference = (found.detach() - wanted).abs().max().item() if wanted.numel() else 0.0
    assert difference <= tolerance * largest, f"{what}: {difference:.2g} of {largest:.2g}"


def assert_gradients(named: dict[str, nn.Parameter], recorded: dict[str, Any], tolerance: float) -> None:
    """Gradients of parameters, by the recorded names: whole ones, samples of large ones, and the norm of each."""
    norms = dict(zip(recorded["grad_norm_names"], recorded["grad_norms"]))
    assert named.keys() == norms.keys()
    compared = set()
    for name, parameter in named.items():
        gradient = parameter.grad
        assert gradient is not None, name
        if norms[name] < 1e-9:
            continue
        assert abs(gradient.norm() / norms[name] - 1).item() <= tolerance, name
        for key, values in ((f"grad/{name}", gradient), (f"grad_sample/{name}", gradient.flatten())):
            if key in recorded:
                if key.startswith("grad_sample/"):
                    count = len(recorded[key])
                    places = np.linspace(0, values.numel() - 1, count).round().astype(int)
                    values = values[torch.from_numpy(places)]
                assert_close(values, recorded[key], tolerance, key)
                compared.add(name)
    assert compared == {name for name, norm in norms.items() if norm >= 1e-9}
