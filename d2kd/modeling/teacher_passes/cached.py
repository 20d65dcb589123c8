"""The pass over the whole image, from the disk: the teacher runs for the images alone that are not there."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from d2kd.errors import ConfigError

from ..feature_cache import Entry, FeatureCache, Found, decode, paste, without_images
from ..padding import Size
from ..teacher import BatchedInputs, Teacher
from .acceleration import Acceleration
from .base import TeacherFeatures
from .dense import DensePass


class CachedDensePass(DensePass):
    """Reads the teacher's features, and runs it for those that are not there.

    In a batch with a missing image the teacher sees the whole batch, so that it gives what it gives without a cache;
    or each missing image alone. What was computed is compared as it will be read. So a run ends equal with an empty, a
    half-filled and a full cache.
    """

    def __init__(
        self, teacher: Teacher, taps: Iterable[str], cache: FeatureCache, acceleration: Acceleration | None = None
    ) -> None:
        """
        Args:
            teacher: of the cache.
            taps: that it keeps.
            cache: what was computed so far.
            acceleration: what makes the teacher faster, by default nothing.

        Raises:
            TapError: the teacher has no such feature.
        """
        super().__init__(teacher, taps, acceleration)
        self.cache = cache
        self._acceleration = acceleration
        self._blanks: tuple[Size, dict[str, Tensor]] | None = None

    def uncached(self) -> DensePass:
        """Returns the pass that runs the teacher in every step."""
        return DensePass(self.teacher, self.taps, self._acceleration)

    @torch.no_grad()
    def __call__(
        self, batched_inputs: BatchedInputs, guidance: Any = None, dense: Mapping[str, Tensor] | None = None
    ) -> TeacherFeatures:
        """As in the base class."""
        found = self.cache.find(batched_inputs)
        images = self._features(batched_inputs, found)
        # pinning memory makes lists of tuples in some versions of PyTorch
        if len({tuple(of_image.canvas) for of_image in found}) > 1:
            blank = self._blank(batched_inputs)
            images = [{tap: paste(blank[tap], x) for tap, x in features.items()} for features in images]
        return TeacherFeatures({tap: torch.cat([features[tap] for features in images]) for tap in self.taps}, {})

    def _features(self, batched_inputs: BatchedInputs, found: Sequence[Found]) -> list[dict[str, Tensor]]:
        """Of each image, by tap; all of them contiguous, so that what follows computes with them in one way."""
        device = batched_inputs[0]["image"].device
        # the loader may have looked before this process has written
        entries = [of_image.entry or self.cache.reader.find(of_image.key) for of_image in found]
        missing = [number for number, entry in enumerate(entries) if entry is None]
        self.cache.hits += len(found) - len(missing)
        self.cache.misses += len(missing)
        computed = self._run(batched_inputs, found, missing)
        return [computed[number] if entry is None else decode(entry, device) for number, entry in enumerate(entries)]

    def _run(
        self, batched_inputs: BatchedInputs, found: Sequence[Found], missing: Sequence[int]
    ) -> dict[int, dict[str, Tensor]]:
        """What the teacher gives for the missing images, (1, ...) each, by tap."""
        device = batched_inputs[0]["image"].device
        if self.cache.reader.alone:
            return {n: self._kept(found[n].key, self.direct([batched_inputs[n]]).maps, device) for n in missing}
        maps = self.direct(batched_inputs).maps if missing else {}
        for tap, x in maps.items():
            if len(x) != len(batched_inputs):
                raise ConfigError(
                    f"DISTILL.CACHE keeps features of single images, and the teacher's tap {tap} gives "
                    f"{tuple(x.shape)} for {len(batched_inputs)} of them: compare another tap, or set "
                    'DISTILL.CACHE.DIR to "".'
                )
        return {n: self._kept(found[n].key, {tap: x[n : n + 1] for tap, x in maps.items()}, device) for n in missing}

    def _kept(self, key: str, computed: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        entry: Entry | None = self.cache.keep(key, computed)
        if entry is None:
            return {tap: x.clone(memory_format=torch.contiguous_format) for tap, x in computed.items()}
        return decode(entry, device)

    def _blank(self, batched_inputs: BatchedInputs) -> dict[str, Tensor]:
        """What lies around the maps of images that the teacher sees alone: those of padding."""
        images = [x["image"] for x in batched_inputs]
        canvas = self.cache.reader.padding.canvas([(int(x.shape[-2]), int(x.shape[-1])) for x in images])
        if self._blanks is None or self._blanks[0] != canvas:
            found = self.cache.blank(canvas)
            if found.entry is None:
                with without_images(self._faster.model):
                    computed = self.direct([{"image": images[0].new_zeros(len(images[0]), *canvas)}]).maps
                features = self._kept(found.key, computed, images[0].device)
            else:
                features = decode(found.entry, images[0].device)
            self._blanks = canvas, features
        return self._blanks[1]
