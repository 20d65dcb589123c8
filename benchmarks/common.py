"""What the speed benchmarks share: random training batches, timing, peak and transient memory."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import d2kd  # noqa: F401  (makes `detectron2` importable)
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances, PolygonMasks


def random_batch(size: int | tuple[int, int], count: int, classes: int, masks: bool = False) -> list[dict[str, Any]]:
    """`count` noise images with eight objects each, and a class for every pixel.

    Args:
        size: side of the images in pixels, or height and width.
        count: images.
        classes: of objects and pixels.
        masks: with octagons as outlines of the objects.
    """
    height, width = (size, size) if isinstance(size, int) else size
    extent = torch.tensor([width, height])
    inputs = []
    for _ in range(count):
        corner = torch.rand(8, 2) * extent * 0.6
        boxes = torch.cat([corner, corner + extent * 0.05 + torch.rand(8, 2) * extent * 0.3], dim=1)
        truth = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=torch.randint(classes, (8,)))
        if masks:
            truth.gt_masks = PolygonMasks([[_octagon(box).numpy()] for box in boxes])
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        labels = torch.randint(classes, (height, width))
        inputs.append({"image": image, "height": height, "width": width, "instances": truth, "sem_seg": labels})
    return inputs


@torch.no_grad()
def settle_norms(model: nn.Module, batch: list[dict[str, Any]]) -> None:
    """Gives frozen batch norms the statistics of a batch, as those of trained weights have.

    With random weights and statistics of 0 and 1 each block doubles its map: logits of 10^3 then make losses of 10^4,
    whose gradients are below the smallest normal number in most places, and slow.
    """

    def settle(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3))

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    handles = [norm.register_forward_pre_hook(settle) for norm in norms]
    model.backbone(model.preprocess_image(batch).tensor)
    for handle in handles:
        handle.remove()


def _octagon(box: torch.Tensor) -> torch.Tensor:
    angle = torch.arange(8) * (torch.pi / 4)
    center, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    return (center + half * torch.stack([angle.cos(), angle.sin()], dim=1)).flatten().double()


def timed(call: Callable[[], None], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, by a clock; `time.process_time` is for the CPU of a busy machine."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = clock()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - start


def peak_memory_mib(device: str) -> float:
    """Peak memory of this process in MiB: allocated on the GPU, or resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the process that started this one too
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def transient_mib(call: Callable[[], None], device: str) -> float:
    """Largest amount of memory that a call has allocated at a time, in MiB."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20
