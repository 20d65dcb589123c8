"""Reads the recordings of segmentation networks, and the names that they have for our parameters.

Of the largest files some gradients are left out here; whoever has them whole can name their directory.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: D2KD_GOLDEN_MM names another directory with recordings of the same keys, to try them too.
FOLDER = Path(os.environ.get("D2KD_GOLDEN_MM", Path(__file__).parents[1] / "data/golden_mm"))
Rules = Sequence[tuple[str, str]]

RESNET: Rules = (
    (r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"\.bn([123])\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^stem\.([036])\.", lambda m: f"stem.conv{int(m[1]) // 3 + 1}."),
    (r"^stem\.([147])\.", lambda m: f"stem.conv{int(m[1]) // 3 + 1}.norm."),
    (r"^conv([123])\.", r"stem.conv\1."),
    (r"^bn([123])\.", r"stem.conv\1.norm."),
)
_BLOCKS = [f"res2.{i}" for i in range(3)] + [f"res3.{i}" for i in range(3)]
_BLOCKS += [f"res4.{i}" for i in range(7)] + [f"res5.{i}" for i in range(4)]
_ROWS = (1, 2, 3, 4, 3, 3, 1)


def _mobile_layer(number: int, layer: int) -> str:
    names = ("depthwise", "project") if number == 0 else ("expand", "depthwise", "project")
    return f"{_BLOCKS[number]}.{names[layer]}."


def _mmseg_block(match: re.Match) -> str:
    number = sum(_ROWS[: int(match[1]) - 1]) + int(match[2])
    return _mobile_layer(number, int(match[3])) + ("norm." if match[4] == "bn" else "")


def _maskd_block(match: re.Match) -> str:
    place = int(match[2])  # convolution, norm, activation, three times
    return _mobile_layer(int(match[1]) - 1, place // 3) + ("norm." if place % 3 == 1 else "")


MOBILENET: Rules = (
    (r"^conv1\.conv\.", "stem.conv1."),
    (r"^conv1\.bn\.", "stem.conv1.norm."),
    (r"^layer(\d)\.(\d)\.conv\.(\d)\.(conv|bn)\.", _mmseg_block),
    (r"^net\.features\.0\.0\.", "stem.conv1."),
    (r"^net\.features\.0\.1\.", "stem.conv1.norm."),
    (r"^net\.features\.(\d+)\.conv\.(\d)\.", _maskd_block),
)
HEAD: Rules = (
    (r"\.conv\.(?=weight$|bias$)", "."),
    (r"\.bn\.", ".norm."),
    (r"^(main|head)\.", "sem_seg_head."),
    (r"^(aux|auxlayer)\.", "sem_seg_head.auxiliary."),
    (r"auxiliary\.(convs\.0|block\.0)\.", "auxiliary.conv."),
    (r"auxiliary\.block\.1\.", "auxiliary.conv.norm."),
    (r"auxiliary\.(conv_seg|block\.4)\.", "auxiliary.predictor."),
    (r"head\.(conv_seg|classifier|block\.4)\.", "head.predictor."),
    (r"head\.(bottleneck|block\.0)\.", "head.context.bottleneck."),
    (r"head\.block\.1\.", "head.context.bottleneck.norm."),
    (r"head\.psp_modules\.(\d)\.1\.", r"head.context.branches.\1."),
    (r"head\.psp\.conv(\d)\.0\.", lambda m: f"head.context.branches.{int(m[1]) - 1}."),
    (r"head\.psp\.conv(\d)\.1\.", lambda m: f"head.context.branches.{int(m[1]) - 1}.norm."),
    (r"head\.image_pool\.1\.", "head.context.pooled."),
    (r"head\.aspp_modules\.(\d)\.", r"head.context.branches.\1."),
    (r"head\.aspp\.b([0-3])\.(block\.)?0\.", r"head.context.branches.\1."),
    (r"head\.aspp\.b([0-3])\.(block\.)?1\.", r"head.context.branches.\1.norm."),
    (r"head\.aspp\.b4\.gap\.1\.", "head.context.pooled."),
    (r"head\.aspp\.b4\.gap\.2\.", "head.context.pooled.norm."),
    (r"head\.aspp\.project\.0\.", "head.context.project."),
    (r"head\.aspp\.project\.1\.", "head.context.project.norm."),
)


def ours(name: str, rules: Rules) -> str:
    """Our name of a recorded parameter or buffer."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def head_name(name: str) -> str:
    """Our name of a parameter of a head."""
    return ours(name, HEAD)


class Recording:
    """One file: its configuration, and its arrays in float64 by name."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = {key: np.asarray(file[key]) for key in file.files}
        self.config: dict[str, Any] = json.loads(str(self.arrays["config_json"]))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> Tensor:
        array = self.arrays[key]
        return torch.from_numpy(array.astype(np.float64) if array.dtype.kind == "f" else array)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The arrays below a prefix, by the rest of their names."""
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by recorded name; made from seeds where the file has a table of them."""
        if "param_table_json" not in self.arrays:
            return self.under("param/")
        made = {}
        for name, shape, seed, scale, shift in json.loads(str(self.arrays["param_table_json"])):
            values = (np.random.RandomState(seed).standard_normal(shape) * scale + shift).astype(np.float16)
            values = np.abs(values) if name.endswith("running_var") else values
            made[name] = torch.from_numpy(values.astype(np.float64))
        return made


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads weights under our names; every parameter and running statistic must be there, and no other."""
    counters = {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}
    module.load_state_dict({**counters, **weights}, strict=True)


def assert_close(got: Tensor, want: Tensor, name: str, rel: float = 1e-6) -> None:
    """Fails where a float64 value is further away than the recordings' tolerance, in parts of the largest value."""
    assert got.shape == want.shape, (name, got.shape, want.shape)
    if want.dtype.is_floating_point:
        error, largest = (got.detach() - want).abs().max().item(), want.abs().max().item()
        assert error <= rel * largest, (name, error, largest)
    else:
        assert torch.equal(got.long(), want.long()), name


def assert_gradients(module: nn.Module, recorded: Recording, rename: Any) -> int:
    """Compares the gradients of all parameters that a file has; returns how many arrays these are."""
    gradients = {name: p.grad for name, p in module.named_parameters()}
    names, norms = recorded.arrays["grad_norm_names"].tolist(), recorded["grad_norms"].tolist()
    compared = 0
    assert {rename(name) for name in names} == set(gradients)
    for name, norm in zip(names, norms):
        if norm < 1e-9:
            continue
        got = gradients[rename(name)]
        assert abs(got.norm().item() - norm) <= 1e-6 * norm, name
        if f"grad/{name}" in recorded:
            assert_close(got, recorded[f"grad/{name}"], name)
        elif f"grad_sample/{name}" in recorded:
            want = recorded[f"grad_sample/{name}"]
            places = np.linspace(0, got.numel() - 1, len(want)).round().astype(np.int64)
            # against the gradient's own largest value: a sample may have none of it
            assert (got.flatten()[places] - want).abs().max() <= 1e-6 * got.abs().max(), name
        compared += 1
    return compared


def cotangent(x: Tensor) -> Tensor:
    """What outputs are multiplied with to make a loss of them."""
    return (0.7 * torch.arange(x.numel(), dtype=torch.double)).cos().view_as(x) / 16


def assert_statistics(module: nn.Module, recorded: Recording, rename: Any) -> None:
    """Compares running statistics after a training step."""
    state = module.state_dict()
    after = recorded.under("after/")
    assert after
    for name, want in after.items():
        assert_close(state[rename(name)], want, name)
