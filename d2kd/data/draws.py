"""In how many ways a training augments an image: finitely many, so that all can be kept, or anew every time."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from d2kd.modeling.architectures import architecture_class
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from .loader import ResumableLoader, seed_way

#: What an augmentation chooses from, as augmentations that choose nothing; None where there is no end of it.
Ways = Sequence[Any] | None


def _ways_to_resize(augmentation: Any) -> Ways:
    if augmentation.is_range:
        low, high = augmentation.short_edge_length
        lengths: Sequence[int] = [low] if low == high else []
    else:
        lengths = list(dict.fromkeys(augmentation.short_edge_length))
    return [
        T.ResizeShortestEdge([int(length)], augmentation.max_size, "choice", augmentation.interp) for length in lengths
    ] or None


def _ways_to_flip(augmentation: Any) -> Ways:
    chances = [p for p, possible in ((0.0, augmentation.prob < 1), (1.0, augmentation.prob > 0)) if possible]
    return [T.RandomFlip(p, horizontal=augmentation.horizontal, vertical=augmentation.vertical) for p in chances]


#: By the augmentation's class, exactly: one derived from it may do more.
_WAYS: dict[str, Callable[[Any], Ways]] = {
    "ResizeShortestEdge": _ways_to_resize,
    "RandomFlip": _ways_to_flip,
    "Resize": lambda augmentation: [augmentation],
}


def ways_to_augment(mapper: Any) -> list[list[Any]] | None:
    """Returns every list of augmentations that a mapper's random numbers may come to.

    Args:
        mapper: of the training, or what wraps it.

    Returns:
        Lists of augmentations that choose nothing themselves; None where these are not finitely many, or unknown.
    """
    augmentations = getattr(_inner(mapper), "augmentations", None)
    if augmentations is None or not hasattr(augmentations, "augs"):
        return None
    ways = [_ways_of(augmentation) for augmentation in augmentations.augs]
    return None if any(way is None for way in ways) else [list(chosen) for chosen in itertools.product(*ways)]  # type: ignore[arg-type]


def endless_draws(cfg: CfgNode, loader: Any) -> str:
    """Returns what of a training's augmentation has no end of possible results, and what to change; "" for nothing.

    Args:
        cfg: of the training.
        loader: of the training.
    """
    if getattr(loader, "mix", None) is not None:
        return (
            "images are mixed with others (INPUT.CLASSIFICATION.MIXUP, CUTMIX), so that hardly one comes twice: set "
            "both to 0"
        )
    if getattr(loader, "draws", 0) or ways_to_augment(getattr(loader, "mapper", None)) is not None:
        return ""
    node, advice = cfg.INPUT, "set DATALOADER.DRAWS, e.g. to 8, for as many ways to augment each image"
    if node.CROP.ENABLED:
        return f"crops are cut at random (INPUT.CROP.ENABLED): {advice}"
    if node.MIN_SIZE_TRAIN_SAMPLING == "range" and len(set(node.MIN_SIZE_TRAIN)) > 1:
        sizes = "a list of sizes in MIN_SIZE_TRAIN"
        return f"INPUT.MIN_SIZE_TRAIN_SAMPLING is range: set it to choice, with {sizes}; or {advice}"
    if node.COLOR_AUG_SSD:
        return f"colors change at random (INPUT.COLOR_AUG_SSD): set it False, or {advice}"
    return f"images are augmented in ways that d2kd cannot count: {advice}"


def mixes_sizes(cfg: CfgNode, loader: Any) -> bool:
    """Returns whether batches of a training may hold images of several sizes.

    Args:
        cfg: of the training.
        loader: of the training.
    """
    records = getattr(loader, "records", None)
    if records is None:
        return True
    if loader.batch_size == 1 or architecture_class(cfg).CLASSIFIES_IMAGES:
        return False
    if len(set(cfg.INPUT.MIN_SIZE_TRAIN)) > 1 or cfg.INPUT.CROP.ENABLED or loader.draws:
        return True
    sizes = ((record.get("height"), record.get("width")) for record in records)
    first = next(sizes, None)
    # images with label maps do not say their size before they are read
    return any(size != first or None in size for size in itertools.chain([first] if first else [], sizes))


class EveryWay(Dataset[Any]):
    """Every image of a training, augmented in every way that the training may augment it; None for one that is skipped.

    Those of an image stand one after the other.
    """

    def __init__(self, loader: ResumableLoader) -> None:
        """
        Args:
            loader: of the training, of which `endless_draws` is "".
        """
        self.records = loader.records
        self.draws = loader.draws
        if self.draws:
            self.mappers = [loader.mapper] * self.draws
        else:
            ways = ways_to_augment(loader.mapper) or []
            self.mappers = [_with_augmentations(loader.mapper, way) for way in ways]

    def __len__(self) -> int:
        return len(self.records) * len(self.mappers)

    def __getitem__(self, number: int) -> Any:
        index, way = divmod(number, len(self.mappers))
        if self.draws:
            seed_way(index, way)
        return self.mappers[way](self.records[index])


def _with_augmentations(mapper: Any, augmentations: list[Any]) -> Any:
    changed = copy.copy(mapper)
    if hasattr(mapper, "mapper"):
        changed.mapper = _with_augmentations(mapper.mapper, augmentations)
    else:
        changed.augmentations = T.AugmentationList(augmentations)
    return changed


def _inner(mapper: Any) -> Any:
    while hasattr(mapper, "mapper"):
        mapper = mapper.mapper
    return mapper


def _ways_of(augmentation: Any) -> Ways:
    find = _WAYS.get(type(augmentation).__name__)
    if find is not None and type(augmentation) is getattr(T, type(augmentation).__name__):
        return find(augmentation)
    # a transform that is always the same
    fixed = getattr(augmentation, "tfm", None)
    return [augmentation] if isinstance(fixed, T.Transform) else None
