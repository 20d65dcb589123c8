"""Maps of a teacher and its student made comparable: common scales, colors and numbers."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2kd.layers import linear_cka, principal_axes, ridge_weights, standardize_channels

from .feature_recording import TEACHER, MapPair, RecordedMap

logger = logging.getLogger(__name__)

#: Colors span what lies between these quantiles of a component.
_SPAN = 0.02, 0.98
FITTED = "each student's channels were fitted to the teacher's (ridge regression) on {where}"


@dataclass(frozen=True)
class ImageMaps:
    """What is shown of a pair over one image, by role: "teacher" and the names of students.

    Attributes:
        means: (H, W), the mean over the channels, each standardized over all images.
        colors: (H, W, 3) in [0, 1], the first three principal components.
        differences: (H, W) of students, the root mean square over the channels of standardized student - teacher.
    """

    means: Mapping[str, np.ndarray]
    colors: Mapping[str, np.ndarray]
    differences: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Similarity:
    """How like its teacher a student is at a pair.

    Attributes:
        cosine: of the standardized channels at each position, averaged over positions and images.
        cka: linear CKA of its own channels, over the positions of all images.
        difference: root mean square of standardized student - teacher, averaged over images; 0 for equal maps, 1.41
            for unrelated ones.
    """

    cosine: float
    cka: float
    difference: float


@dataclass(frozen=True)
class TapComparison:
    """A pair of taps over some images.

    Attributes:
        pair: which one.
        how: how the student's channels became the teacher's, in words.
        channels: of student and teacher.
        positions: of all images together.
        variance: shares of the variance of the components.
        numbers: by the student's role.
        maps: of each image.
    """

    pair: MapPair
    how: str
    channels: tuple[int, int]
    positions: int
    variance: list[float]
    numbers: Mapping[str, Similarity]
    maps: list[ImageMaps]


def compare(pair: MapPair, recorded: Sequence[RecordedMap], shared_by: str = "") -> TapComparison:
    """Compares the maps of a pair over some images.

    Every channel is standardized over the positions of all images. Where the student's channels are aligned, the
    principal components are those of teacher and student `shared_by` together. Otherwise they are the teacher's, and
    each student's channels are fitted to the teacher's by ridge regression: for each image on the positions of the
    others, so that a picture shows what the student knows of the teacher, and not how well a fit can bend.

    Args:
        pair: which one.
        recorded: its maps over each image.
        shared_by: the role whose maps shape the components beside the teacher's; by default that of the last student.
    """
    shapes = [m.teacher.shape[1:] for m in recorded]
    roles = list(recorded[0].students)
    raw_teacher = _positions([m.teacher for m in recorded])
    raw = {role: _positions([m.students[role] for m in recorded]) for role in roles}
    teacher = standardize_channels(raw_teacher)
    own = {role: standardize_channels(x) for role, x in raw.items()}
    counts = [height * width for height, width in shapes]
    if pair.align is not None:
        aligned = {r: standardize_channels(_positions([m.aligned[r] for m in recorded])) for r in roles}
        how, sets = pair.how, [teacher, aligned[shared_by or roles[-1]]]
    else:
        aligned = {role: standardize_channels(_fitted(own[role], teacher, counts)) for role in roles}
        where = "the other images shown" if len(counts) > 1 else "this one image, which flatters it"
        how, sets = FITTED.format(where=where), [teacher]
    axes, variance = principal_axes(sets)
    everyone = {TEACHER: teacher, **aligned}
    low, high = _span([x @ axes for x in sets])
    colors = {role: _colors(x @ axes, low, high) for role, x in everyone.items()}
    means = {TEACHER: teacher.mean(1), **{role: x.mean(1) for role, x in own.items()}}
    apart = {role: (x - teacher).square().mean(1) for role, x in aligned.items()}
    numbers = {
        role: Similarity(
            _mean_of(_cosine(x, teacher), counts), linear_cka(raw[role], raw_teacher), _rms(apart[role], counts)
        )
        for role, x in aligned.items()
    }
    maps = [
        ImageMaps(
            {role: part[i].reshape(shape).numpy() for role, part in _split(means, counts).items()},
            {role: part[i].reshape(*shape, 3).numpy() for role, part in _split(colors, counts).items()},
            {role: part[i].reshape(shape).sqrt().numpy() for role, part in _split(apart, counts).items()},
        )
        for i, shape in enumerate(shapes)
    ]
    channels = raw[roles[0]].shape[1], raw_teacher.shape[1]
    return TapComparison(pair, how, channels, sum(counts), variance.tolist(), numbers, maps)


def _positions(maps: Sequence[Tensor]) -> Tensor:
    """A row for each position of all maps."""
    return torch.cat([x.flatten(1).T for x in maps]).double()


def _fitted(student: Tensor, teacher: Tensor, counts: Sequence[int]) -> Tensor:
    """What a linear fit makes of the student at each image, from the other images; of a single one from itself.

    Both are standardized over all images, so that the mean of the others tells that of the image itself: each fit is
    of the others less their own mean, or it would find the image's mean again with any student.
    """
    if len(counts) == 1:
        return student @ ridge_weights(student, teacher)
    parts = []
    images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    for image in range(len(counts)):
        here = images == image
        others, theirs = student[~here], teacher[~here]
        parts.append(student[here] @ ridge_weights(others - others.mean(0), theirs - theirs.mean(0)))
    return torch.cat(parts)


def _span(projections: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    quantiles = np.quantile(torch.cat(list(projections)).numpy(), _SPAN, axis=0)
    return torch.from_numpy(quantiles[0]), torch.from_numpy(quantiles[1])


def _colors(projected: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(P, 3) in [0, 1]; components that are missing or constant are half of it."""
    spread = high - low
    flat = spread <= 1e-9
    scaled = ((projected - low) / spread.masked_fill(flat, 1)).clamp(0, 1).masked_fill(flat, 0.5)
    missing = 3 - scaled.shape[1]
    return torch.cat([scaled, scaled.new_full((len(scaled), missing), 0.5)], dim=1)


def _split(parts: Mapping[str, Tensor], counts: Sequence[int]) -> dict[str, list[Tensor]]:
    return {role: list(x.split(list(counts))) for role, x in parts.items()}


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return torch.cosine_similarity(x, y, dim=1)


def _mean_of(values: Tensor, counts: Sequence[int]) -> float:
    return float(torch.stack([part.mean() for part in values.split(list(counts))]).mean())


def _rms(squares: Tensor, counts: Sequence[int]) -> float:
    return float(torch.stack([part.mean().sqrt() for part in squares.split(list(counts))]).mean())
