"""The pass over the whole image, from the disk: the teacher runs on the images alone that are not there."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..feature_cache import FOUND, Canvas, FeatureCache, Found, Size, decode, paste
from ..teacher import BatchedInputs, Teacher
from .base import TeacherFeatures
from .dense import DensePass


class CachedDensePass(DensePass):
    """Reads the teacher's features, and runs it, one image at a time, for those that are not there.

    An image alone gives the same bits whatever else is in its batch, or in the cache: a run ends equal with an empty,
    a half-filled and a full one. What was just computed is compared as it will be read.
    """

    def __init__(self, teacher: Teacher, taps: Iterable[str], cache: FeatureCache) -> None:
        """
        Args:
            teacher: of the cache.
            taps: that it keeps.
            cache: what was computed so far.

        Raises:
            TapError: the teacher has no such feature.
        """
        super().__init__(teacher, taps)
        self.cache = cache
        self._canvas = Canvas(teacher.model)
        self._blanks: tuple[Size, dict[str, Tensor]] | None = None

    def uncached(self) -> DensePass:
        """Returns the pass that runs the teacher in every step."""
        return DensePass(self.teacher, self.taps)

    @torch.no_grad()
    def __call__(
        self, batched_inputs: BatchedInputs, guidance: Any = None, dense: Mapping[str, Tensor] | None = None
    ) -> TeacherFeatures:
        """As in the base class."""
        found = self.cache.find(batched_inputs)
        images = [self._features(x, of_image) for x, of_image in zip(batched_inputs, found)]
        if len({of_image.canvas for of_image in found}) > 1:
            blank = self._blank(batched_inputs)
            images = [{tap: paste(blank[tap], x) for tap, x in features.items()} for features in images]
        return TeacherFeatures({tap: torch.cat([features[tap] for features in images]) for tap in self.taps}, {})

    def _features(self, inputs: Mapping[str, Any], found: Found) -> dict[str, Tensor]:
        """Of one image, by tap; all contiguous, so that what is computed with them takes one way."""
        device = inputs["image"].device
        # the loader may have looked before this process has written
        entry = found.entry or self.cache.reader.find(found.key)
        if entry is not None:
            self.cache.hits += 1
            return decode(entry, device)
        self.cache.misses += 1
        return self._compute({k: v for k, v in inputs.items() if k != FOUND}, found)

    def _compute(self, inputs: dict[str, Any], found: Found, blank: bool = False) -> dict[str, Tensor]:
        with self._canvas(found.canvas, blank):
            computed = self.direct([inputs]).maps
        entry = self.cache.keep(found.key, computed)
        if entry is None:
            return {tap: x.contiguous() for tap, x in computed.items()}
        return decode(entry, inputs["image"].device)

    def _blank(self, batched_inputs: BatchedInputs) -> dict[str, Tensor]:
        """What lies around the maps of images that are padded as if they were alone: those of nothing."""
        images = [x["image"] for x in batched_inputs]
        canvas = self._canvas.padding.canvas([(int(x.shape[-2]), int(x.shape[-1])) for x in images])
        if self._blanks is None or self._blanks[0] != canvas:
            found = self.cache.blank(canvas)
            inputs = {"image": images[0].new_zeros(images[0].shape[0], *canvas)}
            features = decode(found.entry, images[0].device) if found.entry else self._compute(inputs, found, True)
            self._blanks = canvas, features
        return self._blanks[1]
