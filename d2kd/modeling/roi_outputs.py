"""What a teacher's box head says of the regions that the student sampled, from features it already has."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .taps import FeatureTaps, TapError

REGION_PREFIX = "roi_heads."
_PER_REGION = (f"{REGION_PREFIX}box_predictor", f"{REGION_PREFIX}box_head")

#: Boxes of each image (Detectron2's `Boxes`), one list a call of the student's box pooler.
Regions = list[Sequence]


class Stage(NamedTuple):
    """Head and predictor of one cascade stage; an R-CNN without a cascade has one."""

    head: nn.Module
    predictor: nn.Module
    # ".0", ".1", ... behind the names of head and predictor in a cascade, else ""
    suffix: str


def stages(model: nn.Module) -> list[Stage]:
    """The stages of the box head of an R-CNN; [] for other models."""
    heads = getattr(model, "roi_heads", None)
    predictor = getattr(heads, "box_predictor", None)
    if not isinstance(predictor, nn.Module):
        return []
    if isinstance(predictor, nn.ModuleList):
        return [Stage(h, p, f".{i}") for i, (h, p) in enumerate(zip(heads.box_head, predictor))]
    # the heads of "C4" models share a ResNet stage, and predict from its mean over the region
    head = heads.box_head if hasattr(heads, "box_head") else _MeanOf(heads.res5)
    return [Stage(head, predictor, "")]


class _MeanOf(nn.Module):
    """Mean over each region of what a module gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).mean(dim=(2, 3))


def is_region_tap(name: str) -> bool:
    """Whether a tap gives one row a region: it lies in the box head or box predictor."""
    return name.startswith(_PER_REGION)


def _stage_of(model: nn.Module, name: str) -> int:
    """Number of the stage that a region tap lies in."""
    for number, stage in enumerate(stages(model)):
        if name.startswith(tuple(f"{part}{stage.suffix}." for part in _PER_REGION)):
            return number
    raise TapError(f"Tap {name!r} lies in no stage of the {type(model).__name__}'s box head.")


def _pooler(model: nn.Module) -> nn.Module:
    heads = model.roi_heads
    return heads.box_pooler if hasattr(heads, "box_pooler") else heads.pooler


class SampledRegions:
    """Reads which regions a model's box head works on: sampled proposals, and refined ones in later cascade stages."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: an R-CNN.
        """
        self._pooler = _pooler(model)

    @contextlib.contextmanager
    def recording(self) -> Iterator[Regions]:
        """Yields a list that the forward pass inside fills: the regions of each stage, N `Boxes` each."""
        regions: Regions = []
        # the pooler is called with (features, boxes), so its rows and those of all that follows are exactly these boxes
        handle = self._pooler.register_forward_pre_hook(lambda module, args: regions.append(args[1]))
        try:
            yield regions
        finally:
            handle.remove()


class RegionOutputs:
    """Runs a model's pooler and box head, without backbone and proposals, on given regions."""

    def __init__(self, model: nn.Module, pairs: Sequence[tuple[int, str]]) -> None:
        """
        Args:
            model: an R-CNN.
            pairs: region taps of the model, each with the stage of the student whose regions it gets.

        Raises:
            TapError: the model has no such tap, or one is asked for on two kinds of regions.
        """
        heads = model.roi_heads
        #: Backbone outputs that the box head reads.
        self.in_features = list(heads.box_in_features if hasattr(heads, "box_in_features") else heads.in_features)
        self._pooler = _pooler(model)
        self._runs = []
        for student_stage, stage in dict.fromkeys((s, _stage_of(model, t)) for s, t in pairs):
            names = [t for s, t in pairs if (s, _stage_of(model, t)) == (student_stage, stage)]
            self._runs.append((student_stage, stages(model)[stage], FeatureTaps(model, names)))
        names = [tap.name for *_, taps in self._runs for tap in taps.taps]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise TapError(
                f"The teacher's taps {', '.join(twice)} are compared with several stages of the student's cascade: "
                "pair each with one stage."
            )

    def __call__(self, features: dict[str, Tensor], regions: Regions) -> dict[str, Tensor]:
        """
        Args:
            features: the model's backbone outputs, (N, C, H, W) by name.
            regions: of the student, in pixels of the padded image, which is the same frame for both models.

        Returns:
            The taps, (R, C) each, R the number of regions of that stage, rows in the student's order.
        """
        maps = [features[name] for name in self.in_features]
        outputs: dict[str, Tensor] = {}
        for student_stage, stage, taps in self._runs:
            with taps.recording() as recorded:
                stage.predictor(stage.head(self._pooler(maps, regions[student_stage])))
            outputs.update(recorded)
        return outputs


def student_stage(student: nn.Module, name: str) -> int:
    """The stage of the student on whose regions a teacher is to be read for one of the student's taps.

    Raises:
        TapError: the tap gives no rows of regions.
    """
    if not is_region_tap(name) or not stages(student):
        raise TapError(
            f"Tap {name!r} of the student does not lie in its box head, so a tap in the teacher's has no regions."
        )
    return _stage_of(student, name)
