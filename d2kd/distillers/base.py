"""What every distillation method is: features of two networks in, named losses out."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from d2kd.config import RenamedKey, config_check, config_keys, declare_keys, key_settings, renamed_keys
from d2kd.errors import ConfigError
from d2kd.layers import NORMALIZATIONS, REDUCTIONS, align_resolution, align_validity
from d2kd.settings import Configurable, Rule, Setting, setting
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from .taps import AlignmentError, TapPair, build_aligner, check_alignable, describe_layer
from .weight_schedule import MethodSchedule, weight_schedule

DISTILLERS = Registry("DISTILLERS")
DISTILLERS.__doc__ = "Distillation methods by the name that `DISTILL.METHODS` uses."

#: In place of the methods: what is best for the two networks, see `d2kd.modeling.default_recipe`.
AUTO = "auto"

declare_keys(
    "DISTILL",
    METHODS=setting(
        [AUTO],
        "Methods to train with, by name; several are added up. [] initializes from the teacher only. auto, alone, is "
        "the default recipe, by what fits: FeatureMimic, with CrossKD and less of the task where the heads correspond, "
        "behind the teacher's own head where that fits the student; the log says what it came to.",
        choices=lambda: [AUTO, *sorted(name for name, _ in DISTILLERS)],
        rule=Rule(
            "must name each once, and auto alone",
            lambda values: len(set(values)) == len(values) and (len(values) == 1 or AUTO not in values),
        ),
        hint=" A method of your own: name its file with --import.",
    ),
)

#: What a method sees of one network: a map (N, C, H, W), or vectors (R, C), by tap name.
FeatureMaps = Mapping[str, Tensor]


class CalibrationRequest(NamedTuple):
    """A request for features of training batches, both networks in evaluation mode, before the next step."""

    #: Batches of this process.
    batches: int
    #: Number of the step; decides which images are seen.
    step: int


class Distiller(Configurable, nn.Module):
    """Base of all methods. They compare the features of pairs of taps, and return one loss per pair.

    A subclass implements `level_loss` and declares its settings with `setting`: each is an argument of the constructor
    and a key of the method's YAML node. Its parameters (aligners, generation blocks, ...) are trained with the student
    and are never part of it.

    Example:
        >>> @DISTILLERS.register()
        ... class CosineMimic(Distiller):
        ...     power: float = setting(1.0, "Exponent of the distance.", above=0)
        ...
        ...     def __init__(self, *, pairs, **settings):
        ...         super().__init__(pairs=pairs, **settings)
        ...         self.align = self.build_aligners()
        ...
        ...     def level_loss(self, level, student, teacher):
        ...         similarity = torch.cosine_similarity(self.align[level](student), teacher)
        ...         return (1 - similarity).pow(self.power).mean()

    Attributes:
        pairs: the taps to compare, from the finest to the coarsest.
        NODE: the YAML node below DISTILL, by default the class name in capitals: `CosineMimic` has COSINE_MIMIC.
        RENAMED_KEYS: what has become of former keys of the node: by key, the new one ("" for none) and how its value is
            converted.
        PREDICTION: kind of the predictions that are compared, "class_logits", "box_deltas" or "box_distribution", or
            several of them; "" compares features. Decides which taps are the default.
        CONTINUES_HEAD: whether features in the student's head go on through the rest of the teacher's, and what comes
            out is compared with the teacher's predictions. The settings `position` and `teacher_position` then say
            where, and the `TapInfo` of the teacher has a `rest`.
        HARD_LABELS: whether it uses the one class that an image is labelled with, so that mixed images are an error.
    """

    pairs: list[TapPair]

    NODE: ClassVar[str] = ""
    NODES = {MethodSchedule.NAME: MethodSchedule}
    RENAMED_KEYS: ClassVar[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {}
    PREDICTION: ClassVar[str | tuple[str, ...]] = ""
    CONTINUES_HEAD: ClassVar[bool] = False
    HARD_LABELS: ClassVar[bool] = False

    weight: float = setting(
        1.0, "Factor on all losses. With 0 the student trains exactly as without distillation.", at_least=0
    )
    tap_weights: list[float] = setting(
        [], "Further factors, one per pair of taps, in the order of TAPS; [] is 1 for each.", items=float, at_least=0
    )
    taps: list[str] = setting(
        [],
        'Student taps to compare, e.g. ["p3", "res4", "res4.pre_relu", "head.bbox_pred@0"]; [] takes what both '
        "networks have: pyramid levels, or predictions.",
        config_only=True,
    )
    teacher_taps: list[str] = setting(
        [], "Teacher taps, one for each student tap; [] takes the same names.", config_only=True
    )
    teacher_pass: str = setting(
        "auto",
        "How the teacher computes the features, by a name in TEACHER_PASSES. auto: over the whole image; for taps in a "
        "box head on the regions that the student sampled.",
        config_only=True,
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "NODE" not in vars(cls):
            cls.NODE = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).upper()

    def __init__(self, *, pairs: Sequence[TapPair], **settings: Any) -> None:
        """
        Args:
            pairs: the taps to compare, from the finest to the coarsest.
            settings: by name; the class declares them with their defaults.

        Raises:
            AlignmentError: a pair that the method cannot compare.
            ConfigError: a setting is out of range, there are no pairs, or a tap of the student is in two of them.
        """
        super().__init__()
        self.configure(settings, f"DISTILL.{self.NODE}")
        if not pairs:
            raise ConfigError(
                f"{type(self).__name__} has no features to compare: name them in DISTILL.{self.NODE}.TAPS."
            )
        names = [pair.name for pair in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"DISTILL.{self.NODE}.TAPS names {', '.join(twice)} more than once; a tap of the student has one loss, "
                "so it can follow one of the teacher's only."
            )
        if self.tap_weights and len(self.tap_weights) != len(pairs):
            raise ConfigError(
                f"DISTILL.{self.NODE}.TAP_WEIGHTS has {len(self.tap_weights)} numbers for {len(pairs)} taps: "
                f"{', '.join(names)}."
            )
        for pair in pairs:
            self.check_pair(f"DISTILL.{self.NODE}.TAPS", pair)
        self.pairs = list(pairs)
        #: of the objects of each image, (M, 4) XYXY in pixels of what the student sees; set before `forward` is called
        #: where `uses_boxes`
        self.boxes: Sequence[Tensor] | None = None
        #: indices of the teacher's classes in the student's order, by level and device
        self._class_orders: dict[tuple[int, torch.device], Tensor] = {}
        #: teacher stride / student stride of every pair; None where the features are vectors
        self._stride_ratios = [None if s.is_vector else t.stride / s.stride for s, t in pairs]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.SETTINGS and isinstance(value, (nn.Module, Tensor)):
            raise TypeError(f"{type(self).__name__}.{name} is a setting: give the module or tensor another name.")
        super().__setattr__(name, value)

    @classmethod
    def from_config(cls, cfg: CfgNode, pairs: Sequence[TapPair]) -> dict[str, Any]:
        """Returns the constructor's arguments; a subclass adds those that are no keys."""
        return {"pairs": pairs, **cls.arguments(cfg.DISTILL[cls.NODE])}

    @classmethod
    def build(cls, cfg: CfgNode, pairs: Sequence[TapPair]) -> "Distiller":
        """Returns the distiller that `cfg.DISTILL` describes."""
        return cls(**cls.from_config(cfg, pairs))

    @classmethod
    def predictions(cls) -> tuple[str, ...]:
        """Returns the kinds in `PREDICTION`; none for a method that compares features."""
        kinds = (cls.PREDICTION,) if isinstance(cls.PREDICTION, str) else cls.PREDICTION
        return tuple(kind for kind in kinds if kind)

    @classmethod
    def takes_validity(cls) -> bool:
        """Returns whether `level_loss` has a `valid` argument, so that the teacher may compute parts of a map only."""
        return "valid" in inspect.signature(cls.level_loss).parameters

    @property
    def uses_boxes(self) -> bool:
        """Whether it looks at `boxes`, the ground truth of the images."""
        return False

    def check_pair(self, key: str, pair: TapPair) -> None:
        """Raises AlignmentError, naming the key, for a pair that the method cannot compare."""
        check_alignable(key, pair)

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raises UserError if the method was prepared for another teacher than this one, whose weights are loaded."""

    def teaches(self, level: int) -> bool:
        """Returns whether a pair has a loss; some may be looked at only."""
        return True

    def calibration_request(self) -> CalibrationRequest | None:
        """Returns what the method wants to see before the next step; None for nothing."""
        return None

    def calibrate(self, batches: Iterable[tuple[FeatureMaps, FeatureMaps]]) -> None:
        """Consumes the requested features (student's, teacher's); all processes call it."""

    def changing_buffers(self) -> Iterable[Tensor]:
        """Returns the buffers that the next step may change: they are copied before it, and put back if it fails.

        By default all of them. A method with large ones that hardly ever change leaves these out at other times.
        """
        return self.buffers()

    def forward(
        self, student: FeatureMaps, teacher: FeatureMaps, valid: FeatureMaps | None = None
    ) -> dict[str, Tensor]:
        """
        Args:
            student: features by tap name.
            teacher: the same of the teacher, without gradient.
            valid: (N, H, W) bool by the teacher's tap: where its map was computed; taps without one are whole.

        Returns:
            Weighted scalar losses by the student's tap name.
        """
        losses = {}
        for level, (ours, theirs) in enumerate(self.pairs):
            known = valid.get(theirs.name) if valid else None
            if known is None:
                loss = self._loss(level, *self.aligned(level, student, teacher))
            else:
                # positions that the teacher did not compute may hold anything, even NaN
                whole = teacher[theirs.name].where(known[:, None], 0)
                s, t = self.aligned(level, student, {theirs.name: whole})
                known = self.align_valid(level, known, (s.shape[-2], s.shape[-1]))
                loss = self._loss(level, s, t, valid=known)  # it takes `valid`, see `takes_validity`
            losses[ours.name] = self.weight_of(level) * loss
        return losses

    def _loss(self, level: int, student: Tensor, teacher: Tensor, **valid: Tensor) -> Tensor:
        level_loss: Callable[..., Tensor] = self.level_loss
        try:
            return level_loss(level, student, teacher, **valid)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise AlignmentError(
                f"DISTILL.{self.NODE}.TAPS, {self.pairs[level]}: the map is {tuple(student.shape)} (N, C, H, W), one "
                "value a channel, and batch norm needs more. Leave that tap out, or take larger images "
                "(INPUT.MIN_SIZE_TRAIN) or more of them (SOLVER.IMS_PER_BATCH)."
            ) from error

    def build_aligners(self) -> nn.ModuleList:
        """Returns one aligner per pair, from student to teacher channels."""
        return nn.ModuleList([build_aligner(pair) for pair in self.pairs])

    def describe_alignment(self, level: int) -> str:
        """Returns in words how the maps of a pair are brought to one shape, for people to read."""
        theirs = self.pairs[level].teacher
        aligners = getattr(self, "align", None)
        parts = [describe_layer(aligners[level])] if isinstance(aligners, nn.ModuleList) else []
        ratio = self._stride_ratios[level]
        if ratio is not None and ratio != 1.0:
            parts.append(f"teacher resampled x{ratio:g}")
        if theirs.order is not None:
            parts.append("teacher's classes in the student's order")
        return ", ".join(part for part in parts if part) or "none"

    def weight_of(self, level: int) -> float:
        """Returns the factor on the loss of a pair."""
        return self.weight * self.tap_weights[level] if self.tap_weights else self.weight

    def aligned(self, level: int, student: FeatureMaps, teacher: FeatureMaps) -> tuple[Tensor, Tensor]:
        """Returns both maps of a pair at equal H and W; no gradient for the teacher, nor for a student of weight 0."""
        ours, theirs = self.pairs[level]
        s, t = student[ours.name], self.teacher_feature(level, teacher).detach()
        if self.weight == 0:
            s = s.detach()
        ratio = self._stride_ratios[level]
        if ratio is None or (ratio == 1.0 and s.shape[-2:] == t.shape[-2:]):
            return s, t
        return align_resolution(s, t, ratio)

    def align_valid(self, level: int, valid: Tensor, size: tuple[int, int]) -> Tensor:
        """Returns where the teacher's map of a pair, as `aligned` gives it, is known: (N, H, W) bool.

        Args:
            level: number of the pair.
            valid: (N, Ht, Wt) bool, where it was computed.
            size: H and W.
        """
        return align_validity(valid, self._stride_ratios[level] or 1.0, size)

    def in_teacher_channels(self, level: int, student: Tensor) -> Tensor | None:
        """Returns a student's map in the channels of the teacher's, as the method compares the two; without resampling.

        None where it compares otherwise, so that a channel of one stands for none of the other.

        Args:
            level: number of the pair.
            student: (N, C, H, W).
        """
        aligners = getattr(self, "align", None)
        return aligners[level](student) if isinstance(aligners, nn.ModuleList) else None

    def teacher_feature(self, level: int, teacher: FeatureMaps) -> Tensor:
        """Returns the teacher's feature of a pair, with its classes in the student's order where it predicts them."""
        tap = self.pairs[level].teacher
        feature = teacher[tap.name]
        if tap.order is None:
            return feature
        # kept on the device: a list as index is copied there, for which the host waits
        order = self._class_orders.get((level, feature.device))
        if order is None:
            order = self._class_orders[level, feature.device] = torch.tensor(tap.order, device=feature.device)
        return feature.index_select(1, order)

    def level_loss(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the unweighted scalar loss of one pair of maps of equal H and W.

        A method that also takes `valid: Tensor | None = None`, (N, H, W) bool, can be used with teachers that compute
        parts of a map only; its loss is then over the valid positions.
        """
        raise NotImplementedError


class FeatureDistiller(Distiller):
    """Base of the methods that compare feature maps by their squared error."""

    normalize: str = setting(
        "standardize",
        "none | standardize: bring each channel of the maps to zero mean and unit variance first.",
        choices=NORMALIZATIONS,
    )
    reduction: str = setting(
        "mean",
        "mean: over all elements | batchmean: sum over channels and positions, mean over images.",
        choices=REDUCTIONS,
        renamed_values={"paper": "batchmean"},
    )


@config_keys
def add_method_keys(cfg: CfgNode) -> None:
    """Adds the node of every registered method to `cfg.DISTILL`."""
    for name, method in DISTILLERS:
        if method.NODE in cfg.DISTILL:
            raise ConfigError(
                f"The method {name} has the node DISTILL.{method.NODE}, which is taken: give its class another NODE."
            )
        cfg.DISTILL[method.NODE] = method.default_node()


@key_settings
def method_settings() -> Iterator[tuple[str, Setting]]:
    """Yields the keys of all methods with their declarations."""
    for _, method in DISTILLERS:
        yield from method.list_keys(f"DISTILL.{method.NODE}")


@config_check
def check_schedules(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: the schedule of a method's weight contradicts itself or the length of the training.
    """
    for _, method in DISTILLERS:
        if method.NODE in cfg.DISTILL:
            weight_schedule(cfg, method.NODE)


@renamed_keys
def renamed_method_keys() -> Iterator[RenamedKey]:
    """Yields the keys of all methods that had other names before."""
    for _, method in DISTILLERS:
        node = f"DISTILL.{method.NODE}."
        for old, (new, convert) in method.RENAMED_KEYS.items():
            yield RenamedKey(node + old, new and node + new, convert)
