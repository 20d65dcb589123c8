"""What d2kd must know of an architecture beyond Detectron2's interface: one object, found by META_ARCHITECTURE."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from d2kd.config import get_key
from d2kd.distillers import Prediction
from d2kd.errors import ConfigError
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone.vit import ViT

logger = logging.getLogger(__name__)

#: What d2kd knows of architectures, by META_ARCHITECTURE; see `register_architecture`.
ARCHITECTURES: dict[str, type["Architecture"]] = {}


class NumClassesKey(NamedTuple):
    """A configuration key with a number of classes, and the field of a dataset's metadata that lists them."""

    key: str
    metadata: str = "thing_classes"


class ClassLayer(NamedTuple):
    """A layer with outputs for every class: its path, where it predicts, and how many numbers a class has."""

    path: str
    #: As in `Prediction`.
    location: str
    #: 4 for boxes, 1 for scores.
    width: int = 1

    @property
    def kind(self) -> str:
        """The field of a dataset's metadata that lists these classes."""
        return "stuff_classes" if self.location == "pixel" else "thing_classes"

    def groups(self, outputs: int, classes: int) -> int | None:
        """Returns how many times all classes stand one after the other among the outputs: once for every anchor.

        None where the layer has other outputs than for these classes, as class-agnostic ones do.
        """
        numbers = self.width * classes
        if self.location == "anchor":
            return outputs // numbers if outputs % numbers == 0 else None
        return 1 if outputs == numbers or self.has_background(outputs, classes) else None

    def has_background(self, outputs: int, classes: int) -> bool:
        """Returns whether the last output is that of the background."""
        return self.location != "anchor" and self.width == 1 and outputs == classes + 1


class HeadLayer(NamedTuple):
    """A layer of a head's branch, with its norm and activation."""

    #: Address of what it gives.
    tap: str
    modules: Sequence[nn.Module]
    #: Of what it gives.
    channels: int
    #: In words, what two such features must have in common beside this.
    form: str


class HeadBranch(NamedTuple):
    """The way through a head that ends in one prediction."""

    prediction: Prediction
    #: Before the predictor, the first one first.
    layers: Sequence[HeadLayer]
    predictor: nn.Module
    #: Input pixels a cell; 0 for heads on regions.
    stride: float = 0.0
    #: From what is predicted of boxes, (M, 4) deltas or (M, 4 * B) logits of distances, to boxes (M, 4) XYXY, in units
    #: of the anchor (or region, or cell) at the origin.
    decode: Callable[[Tensor], Tensor] | None = None


class Architecture:
    """What d2kd knows of every Detectron2 model: it has a backbone, with or without a bottom-up network inside.

    A family of models with more to say derives from it in a file of its own, under the META_ARCHITECTURE it describes:

    >>> @register_architecture("RetinaNet")
    ... class RetinaNetArchitecture(DenseDetector): ...

    Class methods depend on the configuration only, the others on a built model. Classes derived from a known
    META_ARCHITECTURE are known too.

    Attributes:
        KNOWN: whether d2kd knows more than what every Detectron2 model has.
        CLASSES: where the numbers of classes are configured.
        EVALUATOR_TYPES: values of `evaluator_type`, in a dataset's metadata, that predictions can be scored by; ()
            stands for all.
        SCORE_THRESHOLD: the key of the score below which the model gives no detection; "" for none.
        SUPPORTS_TTA: whether there is test-time augmentation (TEST.AUG), see `with_test_augmentation`.
        CLASSIFIES_IMAGES: whether the model takes images of one size, each with one label, and gives scores of classes.
        LOSS_NORMALIZERS: attributes of the model with running normalizers of its losses. They are in no `state_dict`,
            and belong to the state of a run.
    """

    KNOWN: ClassVar[bool] = True
    CLASSES: ClassVar[tuple[NumClassesKey, ...]] = ()
    EVALUATOR_TYPES: ClassVar[tuple[str, ...]] = ()
    SCORE_THRESHOLD: ClassVar[str] = ""
    SUPPORTS_TTA: ClassVar[bool] = False
    CLASSIFIES_IMAGES: ClassVar[bool] = False
    LOSS_NORMALIZERS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: of this architecture.
        """
        self.model: Any = model  # Detectron2's models are untyped

    # ---- what a configuration decides ----

    @classmethod
    def class_counts(cls, cfg: CfgNode) -> list[tuple[NumClassesKey, int]]:
        """Returns the numbers of classes that a configuration has, that of the predictions first."""
        counts = [(count, get_key(cfg, count.key)) for count in cls.CLASSES]
        return [(count, int(value)) for count, value in counts if value is not None]

    @classmethod
    def build_mapper(cls, cfg: CfgNode) -> Any:
        """Returns what turns a training record (a dict in Detectron2's format) into the model's input.

        None stands for the usual one: images with boxes, masks and label maps.
        """
        return None

    @classmethod
    def with_test_augmentation(cls, cfg: CfgNode, model: nn.Module) -> nn.Module:
        """Returns a model that predicts with test-time augmentation, where `SUPPORTS_TTA`."""
        raise NotImplementedError

    # ---- what a model has ----

    @property
    def bottom_up(self) -> str:
        """Path of the bottom-up network: of the whole backbone where there is no neck."""
        for name in ("bottom_up", "net"):  # FPN; ViTDet's simple feature pyramid
            if isinstance(getattr(self.backbone, name, None), nn.Module):
                return f"backbone.{name}"
        return "backbone"

    @property
    def backbone(self) -> nn.Module | None:
        """Bottom-up network and neck."""
        return getattr(self.model, "backbone", None)

    def feature_shapes(self) -> Mapping[str, Any]:
        """Returns the outputs of the backbone, finest first (Detectron2's `ShapeSpec` by name)."""
        return output_shapes(self.backbone)

    def pooled_levels(self) -> set[str]:
        """Returns the outputs of the backbone that merely pool the one below (R-CNN's p6)."""
        top = getattr(self.backbone, "top_block", None)
        if top is None or any(True for _ in top.parameters()):
            return set()
        return set(list(self.feature_shapes())[-top.num_levels :])

    def predictions(self) -> list[Prediction]:
        """Returns the model's prediction layers; here only the classifier on top of a backbone such as ResNet."""
        if "linear" in self.feature_shapes():
            return [Prediction("linear", "class_logits", "image", activation="softmax")]
        return []

    def head_branches(self) -> list[HeadBranch]:
        """Returns the branches of the head that give class logits and boxes, by level or stage; [] where unknown."""
        return []

    def evidence(self) -> list[Prediction]:
        """Returns the layers that say at every place whether there is an object, or what the pixels are of."""
        return [p for p in self.predictions() if p.kind == "class_logits" and p.location in ("anchor", "pixel")]

    def meanings(self) -> list[Prediction]:
        """Returns all that is known of what layers predict, and what else decides how it is read."""
        return [*self.predictions(), *self.evidence()]

    def class_layers(self) -> list[ClassLayer]:
        """Returns the layers with outputs for every class, by their path: those of `predictions` here."""
        named = dict(self.model.named_modules())
        layers = {}
        for prediction in self.predictions():
            path = prediction.tap.partition("@")[0]
            path = next((p for p in (path, f"{self.bottom_up}.{path}", f"backbone.{path}") if p in named), path)
            if prediction.kind == "class_logits":
                layers[path] = ClassLayer(path, prediction.location)
            elif prediction.kind == "box_deltas" and prediction.location == "region":
                layers[path] = ClassLayer(path, prediction.location, width=4)
        return list(layers.values())

    def is_channels_last(self, module: nn.Module) -> bool:
        """Returns whether a module gives (N, H, W, C), as the blocks of a vision transformer do."""
        for part in self.model.modules():
            if isinstance(part, ViT) and any(module is block for block in part.blocks):
                return True
            told: Any = getattr(part, "is_channels_last", None)  # of a network of another library
            if told is not None and told(module) and any(module is m for m in part.modules()):
                return True
        return False

    def prefix_tokens(self, module: nn.Module) -> int | None:
        """Returns how many tokens stand before those of the patches in what a module gives, (N, tokens, C).

        None where it is no block of a vision transformer of timm.
        """
        for part in self.model.modules():
            blocks = getattr(part, "blocks", None)
            if hasattr(part, "patch_embed") and isinstance(blocks, nn.Sequential | nn.ModuleList):
                if any(module is block for block in blocks):
                    # CaiT's class token comes behind these blocks
                    late = hasattr(part, "blocks_token_only")
                    return 0 if late else int(getattr(part, "num_prefix_tokens", 0))
        return None

    def probe_size(self) -> int:
        """Returns the side, in pixels, of a blank image that shows the shapes of features.

        Group norms of one channel a group refuse the one pixel that P7 has at 128.
        """
        norms = [module for module in self.model.modules() if isinstance(module, nn.GroupNorm)]
        return 256 if any(norm.num_channels == norm.num_groups for norm in norms) else 128

    def loss_normalizers(self) -> dict[str, Any]:
        """Returns the running loss normalizers, by attribute; some appear with the first batch only."""
        return {name: vars(self.model)[name] for name in self.LOSS_NORMALIZERS if name in vars(self.model)}

    def load_loss_normalizers(self, values: Mapping[str, Any]) -> None:
        """Sets the running loss normalizers to those that `loss_normalizers` has returned, before a batch or after."""
        for name in self.LOSS_NORMALIZERS:
            if name in values:
                setattr(self.model, name, values[name])
            else:
                vars(self.model).pop(name, None)


class UnknownArchitecture(Architecture):
    """A model that d2kd knows nothing of but its backbone."""

    KNOWN = False

    @classmethod
    def class_counts(cls, cfg: CfgNode) -> list[tuple[NumClassesKey, int]]:
        """Returns MODEL.<ITS NAME>.NUM_CLASSES, the usual place, if there is such a key."""
        count = NumClassesKey(f"MODEL.{cfg.MODEL.META_ARCHITECTURE.upper()}.NUM_CLASSES")
        value = get_key(cfg, count.key)
        return [] if value is None else [(count, int(value))]


def head_layers(path: str, branch: nn.Module, call: int | None = None, size: str = "") -> list[HeadLayer]:
    """Returns the layers of a branch whose modules run one after the other; a convolution or linear layer begins one.

    Args:
        path: of the branch in the model.
        branch: its children run in their order.
        call: which call of it in a forward pass the taps mean; None where there is one only.
        size: of its maps, in words, where that is the same for all images.
    """
    groups: list[list[tuple[str, nn.Module]]] = []
    for name, module in branch.named_children():
        begins = isinstance(module, nn.Conv2d | nn.Linear | nn.Flatten)
        if not groups or (begins and any(isinstance(m, nn.Conv2d | nn.Linear) for _, m in groups[-1])):
            groups.append([])
        groups[-1].append((name, module))
    layers = []
    for group in groups:
        widths = [getattr(m, "out_channels", getattr(m, "out_features", 0)) for _, m in group]
        tap = f"{path}.{group[-1][0]}" + ("" if call is None else f"@{call}")
        form = "vectors" if any(isinstance(m, nn.Linear) for _, m in group) else f"maps {size}".strip()
        layers.append(HeadLayer(tap, [m for _, m in group], max(widths), form))
    return layers


def box_decoder(transform: Any) -> Callable[[Tensor], Tensor] | None:
    """Returns how a `Box2BoxTransform` decodes deltas of an anchor of side 1 around the origin; None without one.

    Overlaps of boxes of one anchor do not change with its place, nor its width or height.
    """
    if transform is None:
        return None

    def decode(deltas: Tensor) -> Tensor:
        corner = deltas.new_full((len(deltas), 2), 0.5)  # made on the device: the host waits for a copy
        boxes: Tensor = transform.apply_deltas(deltas, torch.cat([-corner, corner], dim=1))
        return boxes

    return decode


def register_architecture(*names: str) -> Any:
    """Registers a class as the `Architecture` of some META_ARCHITECTURES; a decorator."""

    def register(cls: type[Architecture]) -> type[Architecture]:
        for name in names:
            if name in ARCHITECTURES:
                raise ValueError(f"{name} is registered already, as {ARCHITECTURES[name].__qualname__}.")
            ARCHITECTURES[name] = cls
        return cls

    return register


def architecture_class(cfg: CfgNode) -> type[Architecture]:
    """Returns the `Architecture` of `cfg.MODEL.META_ARCHITECTURE`, or of the nearest of its base classes."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    return _of_class(META_ARCH_REGISTRY.get(name)) if name in META_ARCH_REGISTRY else UnknownArchitecture


def architecture_of(model: nn.Module) -> Architecture:
    """Returns what d2kd knows of a model, by its class or the nearest of its base classes."""
    return _of_class(type(model))(model)


def output_shapes(module: nn.Module | None) -> Mapping[str, Any]:
    """Returns the outputs of a backbone or a part of it, finest first; {} where it does not tell them."""
    output_shape: Callable[[], Mapping[str, Any]] | None = getattr(module, "output_shape", None)
    return {} if output_shape is None else output_shape()


def _of_class(model_class: Any) -> type[Architecture]:
    for base in getattr(model_class, "__mro__", ()):
        if base.__name__ in ARCHITECTURES:
            return ARCHITECTURES[base.__name__]
    return UnknownArchitecture


def num_classes(cfg: CfgNode) -> tuple[str, int] | None:
    """Returns the configuration key and its number of classes; None for architectures without, or unknown to d2kd."""
    counts = architecture_class(cfg).class_counts(cfg)
    return (counts[0][0].key, counts[0][1]) if counts else None


def check_test_augmentation(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: `TEST.AUG.ENABLED` is set for an architecture that has no test-time augmentation.
    """
    if cfg.TEST.AUG.ENABLED and not architecture_class(cfg).SUPPORTS_TTA:
        raise ConfigError(
            f"TEST.AUG.ENABLED: there is no test-time augmentation for MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE}, as there is for GeneralizedRCNN: set it False."
        )


def warn_if_unknown(cfg: CfgNode, whose: str) -> None:
    """Logs what d2kd cannot do for an architecture that nobody has registered."""
    if not architecture_class(cfg).KNOWN:
        logger.warning(
            "%s: d2kd does not know MODEL.META_ARCHITECTURE %s. Its features can be distilled; its predictions "
            "(LogitKD, HeadRegression without TAPS) and running loss normalizers are unknown. "
            "To describe it, see docs/architectures.md.",
            whose,
            cfg.MODEL.META_ARCHITECTURE,
        )
