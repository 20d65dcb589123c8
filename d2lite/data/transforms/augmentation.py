"""The interface of augmentations, which choose a transform from the inputs and apply it to all of them."""

import inspect
import pprint
from collections.abc import Sequence
from typing import Any

import numpy as np
from fvcore.transforms.transform import Transform, TransformList

__all__ = [
    "Augmentation",
    "AugmentationList",
    "AugInput",
    "StandardAugInput",
    "TransformGen",
    "apply_augmentations",
    "apply_transform_gens",
]


class Augmentation:
    """A policy that chooses a `Transform` for given inputs.

    Subclasses implement `get_transform`. Its argument names determine which attributes of the `AugInput` it takes;
    a single argument always means the image. `input_args` overrides the names.
    """

    input_args: tuple[str, ...] | None = None

    def get_transform(self, *args: Any) -> Transform:
        """Chooses the transform from the inputs that `input_args` names."""
        raise NotImplementedError(f"{type(self).__name__} has no get_transform")

    def __call__(self, aug_input: "AugInput") -> Transform:
        """Chooses a transform, applies it to `aug_input` in place and returns it."""
        transform = self.get_transform(*_required_inputs(self, aug_input))
        assert isinstance(transform, (Transform, TransformList)), (
            f"{type(self).__name__}.get_transform must return a Transform, got {type(transform).__name__}"
        )
        aug_input.transform(transform)
        return transform

    def _init(self, params: dict[str, Any] | None = None) -> None:
        """Stores the constructor's arguments (its `locals()`) as attributes."""
        for name, value in (params or {}).items():
            if name != "self" and not name.startswith("_"):
                setattr(self, name, value)

    def _rand_range(self, low: float = 1.0, high: float | None = None, size: int | None = None) -> Any:
        """Uniform in [low, high), or in [0, low) when `high` is None."""
        bounds = (0, low) if high is None else (low, high)
        return np.random.uniform(*bounds, size)

    def __repr__(self) -> str:
        """The class name and the constructor arguments that differ from their defaults."""
        given = []
        for name, param in inspect.signature(type(self).__init__).parameters.items():
            if name == "self":
                continue
            if param.kind in (param.VAR_POSITIONAL, param.VAR_KEYWORD) or not hasattr(self, name):
                return super().__repr__()
            value = getattr(self, name)
            # By identity, so that a value equal to its default is still shown.
            if value is not param.default:
                text = pprint.pformat(value)
                given.append(f"{name}={'...' if chr(10) in text else text}")
        return f"{type(self).__name__}({', '.join(given)})"

    __str__ = __repr__


class AugmentationList(Augmentation):
    """Applies augmentations (or plain transforms) one after the other."""

    def __init__(self, augs: Sequence[Augmentation | Transform]) -> None:
        """
        Args:
            augs: augmentations or transforms, first to last.
        """
        self.augs = list(map(_as_augmentation, augs))

    def __call__(self, aug_input: "AugInput") -> TransformList:
        """Applies all of them to `aug_input` in place and returns the transforms chosen."""
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"AugmentationList[{', '.join(str(x) for x in self.augs)}]"

    __str__ = __repr__


class AugInput:
    """The inputs of augmentations: an image with, optionally, its boxes and its label map.

    `image` is (H, W) or (H, W, C), uint8 in [0, 255] or floating; `boxes` (N, 4) XYXY in pixels; `sem_seg`
    (H, W).
    """

    def __init__(
        self,
        image: np.ndarray,
        *,
        boxes: np.ndarray | None = None,
        sem_seg: np.ndarray | None = None,
    ) -> None:
        _check_image(image)
        self.image = image
        self.boxes = boxes
        self.sem_seg = sem_seg

    def transform(self, tfm: Transform) -> None:
        """Applies a transform to everything here, in place."""
        methods = {"image": tfm.apply_image, "boxes": tfm.apply_box, "sem_seg": tfm.apply_segmentation}
        for name, apply in methods.items():
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, apply(value))

    def apply_augmentations(self, augmentations: Sequence[Augmentation | Transform]) -> TransformList:
        """Applies augmentations in place and returns the transforms chosen."""
        chain = AugmentationList(augmentations)
        return chain(self)


def apply_augmentations(
    augmentations: Sequence[Augmentation | Transform], inputs: AugInput | np.ndarray
) -> tuple[AugInput | np.ndarray, TransformList]:
    """Applies augmentations to an image or an `AugInput`.

    Returns:
        The transformed image, or the same `AugInput`, and the transforms chosen.
    """
    is_image = isinstance(inputs, np.ndarray)
    aug_input = AugInput(inputs) if is_image else inputs
    transforms = aug_input.apply_augmentations(augmentations)
    return (aug_input.image if is_image else aug_input), transforms


# earlier names
TransformGen, StandardAugInput, apply_transform_gens = Augmentation, AugInput, apply_augmentations


class _FixedAugmentation(Augmentation):
    """Always chooses the same transform."""

    def __init__(self, tfm: Transform) -> None:
        self.tfm = tfm

    def get_transform(self, *args: Any) -> Transform:
        return self.tfm

    def __call__(self, aug_input: AugInput) -> Transform:
        aug_input.transform(self.tfm)
        return self.tfm

    def __repr__(self) -> str:
        return repr(self.tfm)

    __str__ = __repr__


def _as_augmentation(tfm_or_aug: Augmentation | Transform) -> Augmentation:
    """Wraps a plain transform as an augmentation."""
    assert isinstance(tfm_or_aug, (Augmentation, Transform)), (
        f"expected an Augmentation or a Transform, got {type(tfm_or_aug).__name__}"
    )
    return _FixedAugmentation(tfm_or_aug) if isinstance(tfm_or_aug, Transform) else tfm_or_aug


def _required_inputs(aug: Augmentation, aug_input: Any) -> list[Any]:
    """The attributes of `aug_input` that the augmentation's `get_transform` takes."""
    names = aug.input_args if aug.input_args is not None else _argument_names(type(aug))
    missing = [name for name in names if not hasattr(aug_input, name)]
    if missing:
        raise AttributeError(
            f"{type(aug).__name__}.get_transform needs {missing[0]!r}, which the augmentation input lacks; "
            f"it has {sorted(k for k in vars(aug_input) if not k.startswith('_'))}"
        )
    return [getattr(aug_input, name) for name in names]


def _argument_names(aug_class: type) -> tuple[str, ...]:
    """Names of the inputs in the signature of `get_transform`."""
    params = list(inspect.signature(aug_class.get_transform).parameters.values())[1:]
    if len(params) == 1 and params[0].kind is not params[0].VAR_KEYWORD:
        return ("image",)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in params):
        raise TypeError(f"cannot infer the inputs of {aug_class.__name__} from its get_transform; set input_args")
    return tuple(p.name for p in params)


def _check_image(image: np.ndarray) -> None:
    """Asserts that an image has a type and shape that transforms work on."""
    assert isinstance(image, np.ndarray), f"an image must be a numpy array, got {type(image).__name__}"
    is_valid = image.dtype == np.uint8 or np.issubdtype(image.dtype, np.floating)
    assert is_valid, f"an image must be uint8 or floating, got {image.dtype}"
    assert image.ndim in (2, 3), f"an image must be (H, W) or (H, W, C), got shape {image.shape}"
