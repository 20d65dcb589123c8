"""Whether an exported file gives what the model gives: run in a process of its own, on images of other sizes."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .base import Exported, ExportError


class Tolerance(NamedTuple):
    """How far an exported file may be from the model."""

    #: Of scores, probabilities and logits.
    scores: float
    #: Of the sides of boxes, in pixels of the image that the network sees.
    boxes: float
    #: Share of detections, or of pixels, that must be so near.
    share: float = 1.0
    #: Least intersection over union of the masks of a detection: at their rims rounding decides.
    masks: float = 0.99


TOLERANCES = {
    "fp32": Tolerance(scores=1e-4, boxes=0.05),
    # half precision has three digits: near a threshold a detection may be there or not
    "fp16": Tolerance(scores=2e-2, boxes=2.0, share=0.9, masks=0.9),
}


class Agreement(NamedTuple):
    """What a verification has found."""

    #: Images, and their sizes (height, width).
    sizes: list[tuple[int, int]]
    #: What was compared: detections, pixels or scores.
    compared: int
    #: Greatest difference of scores, and of boxes in pixels (of those that are in both).
    scores: float
    boxes: float
    #: Seconds of the file, and of the model, for each image.
    seconds: list[float]

    def __str__(self) -> str:
        sizes = ", ".join(f"{width}x{height}" for height, width in self.sizes)
        what = "no detections" if not self.compared else f"{self.compared} values or detections"
        boxes = f", of boxes {self.boxes:.1e} px" if self.boxes else ""
        return f"{len(self.sizes)} inputs ({sizes}), {what}; greatest difference of scores {self.scores:.1e}{boxes}"


def verify(
    network: Exported, path: Path, images: Sequence[Tensor], tolerance: Tolerance, name: str = "", repeats: int = 0
) -> Agreement:
    """Compares a file with the model, in float32, on each of some images.

    Args:
        network: of the model itself, in float32.
        path: the file.
        images: (N, 3, H, W) each.
        tolerance: how far it may be.
        name: what to call the file in messages.
        repeats: more runs of each image, for its time.

    Raises:
        ExportError: it does not run, or gives anything else.
    """
    found, seconds = run_file(path, images, network.OUTPUTS, repeats)
    compare = _compare_detections if network.TASK == "detection" else _compare_values
    results = []
    for input_images, ours in zip(images, found):
        with torch.no_grad():
            theirs = network.eager(input_images)
        where = f"{name or path} on images of {input_images.shape[3]}x{input_images.shape[2]}"
        results.append(compare(theirs, ours, tolerance, where))
    everything, near = sum(x.number for x in results), sum(x.near for x in results)
    if near < tolerance.share * everything:
        worst = min(results, key=lambda x: x.near / max(x.number, 1))
        raise ExportError(f"{worst.words}. {near} of all {everything} agree. No file is kept.")
    sizes = [(x.shape[2], x.shape[3]) for x in images]
    scores = max((x.scores for x in results), default=0.0)
    boxes = max((x.boxes for x in results), default=0.0)
    return Agreement(sizes, everything, scores, boxes, seconds)


class _Comparison(NamedTuple):
    """What one input has shown."""

    number: int
    near: int  # of these
    scores: float
    boxes: float
    words: str


def run_file(
    path: Path, images: Sequence[Tensor], outputs: Sequence[str], repeats: int = 0
) -> tuple[list[tuple[Tensor, ...]], list[float]]:
    """Returns the outputs of a file for each of some images (N, 3, H, W), and the seconds that each took.

    Raises:
        ExportError: it does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder, "images.npz"), Path(folder, "results.npz")
        np.savez(given, **{str(i): x.numpy() for i, x in enumerate(images)})  # type: ignore[arg-type]
        runner = Path(__file__).with_name("runner.py")
        # from a folder of its own, so that a d2kd in the working directory is not there either
        command = [sys.executable, str(runner), str(path.resolve()), str(given), str(results), str(repeats)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "it was ended").splitlines()[-1]
            raise ExportError(f"The exported file does not run, and is not kept: {last[:400]}")
        with np.load(results) as file:
            found = [tuple(torch.from_numpy(file[f"{i}.{name}"]) for name in outputs) for i in range(len(images))]
            return found, file["seconds"].tolist()


def _compare_values(theirs: Sequence[Tensor], ours: Sequence[Tensor], tolerance: Tolerance, where: str) -> _Comparison:
    expected, given = theirs[0].float(), ours[0].float()
    if expected.shape != given.shape:
        raise ExportError(f"{where} gives {tuple(given.shape)}, the model {tuple(expected.shape)}. No file is kept.")
    # logits grow with what they are sums of, probabilities do not
    difference = (expected - given).abs() / expected.abs().clamp(min=1)
    worst, near = float(difference.max()), int((difference <= tolerance.scores).sum())
    words = f"{where} differs from the model by {worst:.2g}; {tolerance.scores:g} is allowed"
    return _Comparison(expected.numel(), near, worst, 0.0, words)


def _compare_detections(
    theirs: Sequence[Tensor], ours: Sequence[Tensor], tolerance: Tolerance, where: str
) -> _Comparison:
    """Finds for each detection of the model one in the file, of the same image and class, with the nearest box."""
    boxes, scores = _distances(theirs[0], ours[0]), (theirs[1][:, None] - ours[1][None]).abs()
    same = (theirs[2][:, None] == ours[2][None]) & (theirs[3][:, None] == ours[3][None])
    near = same & (boxes <= tolerance.boxes) & (scores <= tolerance.scores)
    masked = ""
    if len(theirs) > 4:
        near &= _mask_overlaps(theirs[4], ours[4]) >= tolerance.masks
        masked = f", masks to an IoU of {tolerance.masks:g}"
    pairs = _pairs(near, boxes)
    words = (
        f"{where} gives {len(ours[1])} detections, the model {len(theirs[1])}, and {len(pairs)} agree (boxes to "
        f"{tolerance.boxes:g} px, scores to {tolerance.scores:g}{masked})"
    )
    worst = [max((float(of[pair]) for pair in pairs), default=0.0) for of in (scores, boxes)]
    return _Comparison(max(len(theirs[1]), len(ours[1])), len(pairs), worst[0], worst[1], words)


def _distances(first: Tensor, second: Tensor) -> Tensor:
    return torch.cdist(first.double(), second.double(), p=float("inf"))


def _mask_overlaps(first: Tensor, second: Tensor) -> Tensor:
    """IoU (D, E) of masks (D, H, W) and (E, H, W); 1 of two empty ones."""
    a, b = first.flatten(1).float(), second.flatten(1).float()
    shared = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1) - shared
    return torch.where(union > 0, shared / union.clamp(min=1), torch.ones_like(union))


def _pairs(near: Tensor, cost: Tensor) -> list[tuple[int, int]]:
    """Pairs of rows and columns that are near, none used twice, as many as can be."""
    from scipy.optimize import linear_sum_assignment

    if not near.numel():
        return []
    rows, columns = linear_sum_assignment(torch.where(near, cost, torch.full_like(cost, 1e6)).numpy())
    return [(int(r), int(c)) for r, c in zip(rows, columns) if near[r, c]]
