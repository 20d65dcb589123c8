"""How far a masked teacher's features are from the whole teacher's, and what it costs, by ratio and selector."""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d2kd.errors import ConfigError
from d2kd.layers import align_resolution

from ..distilled_model import DistilledModel
from ..taps import evaluation_mode
from ..teacher import BatchedInputs
from .dense import DensePass
from .masked import MaskedTeacher

#: Ways to choose patches: as the student looks, at random, objects first and the rest at random.
SELECTORS = ("student", "random", "objects")
#: Side of the resized image over that of the image, whose drift is what a teacher may have anyway.
RESIZED = 0.9


class Drift(NamedTuple):
    """What a way to mask the teacher does to its features, as a mean over images."""

    selector: str
    keep_ratio: float
    #: Mean cosine distance to the whole teacher's features, in [0, 2].
    distance: float
    #: Processor time of the masked pass over that of the whole one.
    time: float


class Gate(NamedTuple):
    """All that was measured."""

    drifts: list[Drift]
    #: Cosine distance of the whole teacher's features on images of `RESIZED` times their size.
    resized: float
    images: int

    def recommended(self, selector: str = "student") -> float | None:
        """Returns the smallest ratio whose distance is below that of resized images; None where none is."""
        good = [d.keep_ratio for d in self.drifts if d.selector == selector and d.distance < self.resized]
        return min(good, default=None)


@torch.no_grad()
def measure_drift(
    model: DistilledModel, batches: Iterable[BatchedInputs], ratios: Sequence[float], images: int
) -> Iterator[Gate]:
    """Yields what was measured so far, after every batch; an image that comes again is not measured again.

    Args:
        model: with a method whose teacher is masked.
        batches: in Detectron2's input format, with ground truth for the selector "objects"; images are told apart by
            their "file_name".
        ratios: shares of the patches to try, each in (0, 1].
        images: after so many it ends, or with the last batch.

    Raises:
        ConfigError: no method's teacher is masked.
    """
    masked: Any = model.passes.others.get(MaskedTeacher.__name__)
    if masked is None:
        raise ConfigError(
            "No method has the TEACHER_PASS MaskedTeacher, so there is nothing to measure: set it, e.g. "
            "DISTILL.FEATURE_MIMIC.TEACHER_PASS MaskedTeacher."
        )
    tries = [(selector, ratio) for selector in SELECTORS for ratio in ratios]
    dense = DensePass(masked.teacher, masked.taps)
    given = masked.how, masked.saliency
    totals, resized, seen, whole_time = {key: [0.0, 0.0] for key in tries}, 0.0, 0, 0.0
    known: set[str] = set()
    try:
        for batch in batches:
            batch = _unseen(batch, known)[: images - seen]
            if not batch:
                continue
            batch = [{**x, "image": x["image"].to(model.device)} for x in batch]
            guidance = _guidance(model, masked, given[1], batch)
            whole, seconds = _timed(partial(dense, batch))
            whole_time += seconds
            resized += len(batch) * _resized_distance(dense, batch, whole.maps)
            for selector, ratio in tries:
                masked.saliency = given[1] if selector == "student" else None
                objects = selector == "objects" and any("instances" in x for x in batch)
                masked.how = given[0]._replace(keep=0, keep_ratio=ratio, must_keep=objects)
                found, seconds = _timed(partial(masked, batch, guidance, {}))
                distances = [_distance(found.maps[t], whole.maps[t], found.valid.get(t)) for t in masked.taps]
                totals[selector, ratio][0] += len(batch) * sum(distances) / len(distances)
                totals[selector, ratio][1] += seconds
            seen += len(batch)
            drifts = [Drift(*key, total / seen, spent / whole_time) for key, (total, spent) in totals.items()]
            yield Gate(drifts, resized / seen, seen)
            if seen >= images:
                return
    finally:
        masked.how, masked.saliency = given


def _unseen(batch: BatchedInputs, known: set[str]) -> BatchedInputs:
    """The inputs whose files are not known yet, which they are from then on; those without a file are all kept."""
    fresh = []
    for inputs in batch:
        file = inputs.get("file_name")
        if file is None or file not in known:
            fresh.append(inputs)
        if file is not None:
            known.add(file)
    return fresh


def _guidance(model: DistilledModel, masked: MaskedTeacher, saliency: Any, batch: BatchedInputs) -> Any:
    if saliency is None:
        raise ConfigError("DISTILL.MASKED_TEACHER.SELECTOR is random; set it to student, both are measured.")
    masked.saliency = saliency
    with masked.watch() as guidance, evaluation_mode(model.student):
        model.student(batch)
    return guidance


def _timed(call: Any) -> tuple[Any, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter() if torch.cuda.is_available() else time.process_time()
    found = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return found, time.perf_counter() - start
    return found, time.process_time() - start


def _distance(ours: Tensor, theirs: Tensor, valid: Tensor | None) -> float:
    """Mean cosine distance over rows, or over the (valid) places of maps."""
    distances = 1 - F.cosine_similarity(ours.float(), theirs.float(), dim=1)
    return (distances if valid is None else distances[valid]).mean().item()


def _resized_distance(dense: DensePass, batch: BatchedInputs, whole: dict[str, Tensor]) -> float:
    """The distance of the whole teacher's features on smaller images, whose size is kept where it must be."""
    smaller = [{**x, "image": _resize(x["image"], RESIZED)} for x in batch]
    try:
        found = dense(smaller).maps
        ratio = 1 / RESIZED
    except (AssertionError, RuntimeError, ValueError):  # a network that takes one size only
        found, ratio = (
            dense([{**x, "image": _resize(_resize(x["image"], RESIZED), x["image"])} for x in batch]).maps,
            1.0,
        )
    distances = []
    for tap, theirs in whole.items():
        ours = found[tap]
        if ours.dim() == 4:
            theirs, ours = align_resolution(theirs, ours.float(), ratio)
        distances.append(_distance(ours, theirs, None))
    return sum(distances) / len(distances)


def _resize(image: Tensor, to: float | Tensor) -> Tensor:
    size = list(to.shape[-2:]) if isinstance(to, Tensor) else [max(1, round(n * to)) for n in image.shape[-2:]]
    resized = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    return resized.round().clamp(0, 255).to(image.dtype)
