"""A copy of the teacher that computes the same features in less time: `DISTILL.TEACHER.FOLD_NORMS` and what follows."""

import copy
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from d2kd.errors import ConfigError
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d

from ..taps import Tap, resolve_tap
from ..teacher import Teacher

logger = logging.getLogger(__name__)

#: Values of DISTILL.TEACHER.COMPILE, and the mode of `torch.compile` that each stands for.
COMPILE_MODES = {"default": "default", "cudagraphs": "reduce-overhead"}
#: Norms that are a product and a sum in evaluation; subclasses may do more, and stay.
_FOLDED_TYPES = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)
#: A relative error of the features that is worth a warning; bfloat16 alone makes some 0.01.
LARGE_DRIFT = 0.05


class Acceleration(NamedTuple):
    """What makes the pass over the whole image faster; its features stay the same but for rounding.

    Attributes:
        fold_norms: multiply frozen batch norms into the convolutions before them.
        channels_last: keep the channels of weights and maps next to each other in memory.
        compile: "off", or a key of `COMPILE_MODES`.
        stream: run beside the student's forward pass, on a CUDA stream of its own.
    """

    fold_norms: bool = False
    channels_last: bool = False
    compile: str = "off"
    stream: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Acceleration":
        """
        Raises:
            ConfigError: COMPILE without a compiler, or its CUDA graphs together with a stream.
        """
        node = cfg.DISTILL.TEACHER
        acceleration = cls(node.FOLD_NORMS, node.CHANNELS_LAST, node.COMPILE, node.STREAM)
        if acceleration.stream and acceleration.compile == "cudagraphs":
            raise ConfigError(
                "DISTILL.TEACHER.STREAM is True, and DISTILL.TEACHER.COMPILE cudagraphs, whose graphs run on a stream "
                "of their own: set STREAM False, or COMPILE default."
            )
        if acceleration.compile != "off":
            _require_compiler(acceleration.compile, cfg.MODEL.DEVICE)
        if acceleration.stream and not cfg.MODEL.DEVICE.startswith("cuda"):
            logger.warning("DISTILL.TEACHER.STREAM is for CUDA; on %s it does nothing", cfg.MODEL.DEVICE)
        return acceleration

    def of(self, teacher: Teacher, taps: Sequence[str]) -> Teacher:
        """Returns a teacher that gives these taps faster; itself where nothing is asked for.

        The given one stays as it is: its names and numbers are what a student is initialized from, what tokens were
        learned on, and what is evaluated. Both share every tensor that needs no change.

        Raises:
            TapError: the teacher has no such feature.
        """
        if not (self.fold_norms or self.channels_last or self.compile != "off"):
            return teacher
        model = _sharing_copy(teacher.model)
        tapped = [resolve_tap(model, name) for name in taps]
        if self.fold_norms:
            count = fold_norms(model, [tap.module for tap in tapped])
            logger.info("Teacher: %d norms are folded into convolutions", count)
        if self.channels_last:
            _use_channels_last(model)
        if self.compile != "off":
            regions = list(_regions(model, tapped))
            for module in regions:
                module.forward = torch.compile(module.forward, mode=COMPILE_MODES[self.compile])
            logger.info("Teacher: %d parts are compiled, when an image size is new: this takes a while", len(regions))
        return teacher.sharing(model)


def _require_compiler(value: str, device: str) -> None:
    if device.startswith("cuda"):
        found, missing = find_spec("triton") is not None, "Triton (pip install triton)"
    else:
        names = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
        found, missing = any(shutil.which(name) for name in names if name), "a C++ compiler (g++, or another by CXX)"
    if not found:
        raise ConfigError(f"DISTILL.TEACHER.COMPILE is {value}, which needs {missing}: install it, or set it to off.")


def _sharing_copy(model: nn.Module) -> nn.Module:
    """Returns other modules over the same parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def fold_norms(model: nn.Module, keep: Sequence[nn.Module] = ()) -> int:
    """Multiplies frozen batch norms into the convolutions before them, in place; returns how many.

    A convolution and its norm are those of a layer of Detectron2 (`layer.norm`), or neighbors in an `nn.Sequential`. A
    convolution that several places share, or a norm that is more than a product and a sum, stays.

    Args:
        model: in evaluation mode.
        keep: modules whose output is wanted as it is.
    """
    kept = {id(module) for module in keep}
    places = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    count = 0
    for convolution, norm, remove in list(_convolutions_with_norms(model)):
        shared = places.count(id(convolution)) > 1 or places.count(id(norm)) > 1
        if shared or type(norm) not in _FOLDED_TYPES or norm.running_var is None:
            continue
        # a layer of Detectron2 ends with its norm, one in front of a neighbor gives what that gets
        if id(norm) in kept or (id(convolution) in kept and getattr(convolution, "norm", None) is not norm):
            continue
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        convolution.weight = nn.Parameter(weight.detach(), requires_grad=False)
        convolution.bias = nn.Parameter(bias.detach(), requires_grad=False)
        remove()
        count += 1
    return count


def _convolutions_with_norms(model: nn.Module) -> Iterator[tuple[nn.Conv2d, Any, Callable[[], None]]]:
    """Yields each convolution, its norm, and how the norm is taken away."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and isinstance(getattr(module, "norm", None), nn.Module):
            yield module, module.norm, lambda layer=module: setattr(layer, "norm", None)  # type: ignore[misc]
        elif type(module) is nn.Sequential:
            for (_, first), (name, second) in itertools.pairwise(module.named_children()):
                if type(first) is nn.Conv2d:
                    yield first, second, lambda s=module, n=name: setattr(s, n, nn.Identity())  # type: ignore[misc]


def _use_channels_last(model: nn.Module) -> None:
    """Gives convolutions weights in that order; theirs are then the maps too, whatever order these come in."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().clone(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight, requires_grad=False)


def _regions(model: nn.Module, taps: Sequence[Tap]) -> Iterator[nn.Module]:
    """Yields the largest modules that can be compiled: no tap reads what is inside of them.

    That is the backbone or its parts, and behind it sequences of layers; more of a detector deals with more than maps.
    """
    inside = {id(tap.module) for tap in taps}
    whole = {id(m) for tap in taps if tap.pre_relu for m in tap.module.modules()}
    backbone = getattr(model, "backbone", None)
    stack = list(model.children())
    in_backbone = {id(m) for m in backbone.modules()} if isinstance(backbone, nn.Module) else set()
    while stack:
        module = stack.pop()
        if id(module) in whole or next(module.parameters(), None) is None:
            continue
        read = any(id(m) in inside for m in module.modules() if m is not module)
        if not read and (id(module) in in_backbone or type(module) is nn.Sequential) and _runs(module):
            yield module
        else:
            stack.extend(module.children())


def _runs(module: nn.Module) -> bool:
    """Whether it is called, unlike a list of modules."""
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict))


@torch.no_grad()
def report_drift(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Logs how far features are from those in float32 and of the unchanged teacher; a warning where that is far.

    Args:
        found, exact: (N, C, H, W) or (N, C) by tap.

    Returns:
        The norm of the difference over that of the exact feature, by tap.
    """
    drift = {}
    for tap, want in exact.items():
        difference = found[tap].float() - want.float()
        drift[tap] = (difference.norm() / want.float().norm().clamp(min=torch.finfo(torch.float32).tiny)).item()
    text = ", ".join(f"{tap} {value:.2g}" for tap, value in drift.items())
    if all(value <= LARGE_DRIFT for value in drift.values()):  # not of NaN
        logger.info("Teacher: relative error of its faster features on the first images: %s", text)
    else:
        logger.warning(
            "The teacher's faster features are far from those in float32, relative error on the first images: %s. Set "
            "DISTILL.TEACHER.PRECISION float32, or FOLD_NORMS, CHANNELS_LAST and COMPILE back, whichever is at fault.",
            text,
        )
    return drift
