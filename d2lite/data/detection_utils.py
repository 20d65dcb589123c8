"""Training targets from the annotations of one image; re-exports the functions that read images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from fvcore.transforms.transform import CropTransform, HFlipTransform, Transform, TransformList

from d2lite.config import CfgNode
from d2lite.data import transforms as T
from d2lite.data.catalog import MetadataCatalog
from d2lite.data.image_reading import (
    SizeMismatchError,
    check_image_size,
    convert_image_to_rgb,
    convert_PIL_to_numpy,
    read_image,
)
from d2lite.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks, polygons_to_bitmask

__all__ = [
    "SizeMismatchError",
    "annotations_to_instances",
    "build_augmentation",
    "build_transform_gens",
    "check_image_size",
    "check_metadata_consistency",
    "convert_PIL_to_numpy",
    "convert_image_to_rgb",
    "filter_empty_instances",
    "gen_crop_transform_with_instance",
    "get_fed_loss_cls_weights",
    "read_image",
    "transform_instance_annotations",
]

ImageSize = tuple[int, int]


# --- Annotations ----------------------------------------------------------------------------------


def transform_instance_annotations(
    annotation: dict[str, Any],
    transforms: Transform | Sequence[Transform],
    image_size: ImageSize,
    *,
    keypoint_hflip_indices: np.ndarray | None = None,
) -> dict[str, Any]:
    """Applies the transforms of an image to the box, the segmentation and the key points of one annotation.

    Args:
        annotation: with "bbox" and "bbox_mode", and perhaps "segmentation": polygons or RLE, and "keypoints". It is
            changed.
        transforms: what was applied to the image.
        image_size: (height, width) after the transforms.
        keypoint_hflip_indices: which key point each is after a horizontal flip.

    Returns:
        The annotation, with the box as XYXY_ABS inside the image and an RLE as a mask (H, W) uint8.

    Raises:
        ValueError: key points are flipped without `keypoint_hflip_indices`.
    """
    if isinstance(transforms, (tuple, list)):
        transforms = TransformList(transforms)
    box = BoxMode.convert(np.array([annotation["bbox"]]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    height, width = image_size
    annotation["bbox"] = np.clip(transforms.apply_box(box)[0], 0, [width, height, width, height])
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    if "segmentation" in annotation:
        annotation["segmentation"] = _transform_segmentation(annotation["segmentation"], transforms, image_size)
    if "keypoints" in annotation:
        annotation["keypoints"] = _transform_keypoints(
            annotation["keypoints"], transforms, image_size, keypoint_hflip_indices
        )
    return annotation


def _transform_keypoints(
    keypoints: Any, transforms: Transform, image_size: ImageSize, flipped: np.ndarray | None
) -> np.ndarray:
    """Key points (K, 3) of x, y and visibility; those outside the image, or unlabeled, become zeros."""
    points = np.array(keypoints, dtype=float).reshape(-1, 3)
    moved = transforms.apply_coords(points[:, :2].copy())
    inside = ((moved >= 0) & (moved <= image_size[::-1])).all(axis=1)
    points = np.column_stack([moved, points[:, 2]]) * (inside & (points[:, 2] > 0))[:, None]
    if sum(isinstance(t, HFlipTransform) for t in getattr(transforms, "transforms", [transforms])) % 2:
        if flipped is None:
            raise ValueError("key points cannot be flipped without keypoint_hflip_indices, which say left from right")
        points = points[np.asarray(flipped)]
    return points


def _transform_segmentation(
    segmentation: Any, transforms: Transform, image_size: ImageSize
) -> list[np.ndarray] | np.ndarray:
    """Polygons stay polygons, RLE becomes a mask."""
    if isinstance(segmentation, list):
        # A copy: transforms may work in place.
        polygons = [np.array(p, dtype=float).reshape(-1, 2) for p in segmentation]
        return [p.reshape(-1) for p in transforms.apply_polygons(polygons)]
    if isinstance(segmentation, dict):
        mask = transforms.apply_segmentation(mask_util.decode(_compress_rle(segmentation)))
        assert tuple(mask.shape[:2]) == tuple(image_size), (
            f"a mask is {mask.shape[:2]} (height, width) after the transforms, its image {tuple(image_size)}"
        )
        return mask
    raise ValueError(f"a segmentation must be a list of polygons or an RLE dict, got {type(segmentation).__name__}")


def _compress_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """COCO's uncompressed RLE (counts as a list) as the compressed one."""
    return mask_util.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle


def annotations_to_instances(
    annos: list[dict[str, Any]], image_size: ImageSize, mask_format: str = "polygon"
) -> Instances:
    """The training targets of one image from its annotations.

    Args:
        annos: annotations, as `transform_instance_annotations` returns them.
        image_size: (height, width).
        mask_format: "polygon" or "bitmask".

    Returns:
        `Instances` with `gt_boxes`, `gt_classes` (N,) int64, and `gt_masks` where there are segmentations.

    Raises:
        ValueError: if only some annotations have a segmentation, or one does not fit `mask_format`.
    """
    target = Instances(image_size)
    target.gt_boxes = Boxes(torch.from_numpy(_stack_boxes(annos)))
    target.gt_classes = torch.tensor([int(a["category_id"]) for a in annos], dtype=torch.int64)
    segmentations = [a["segmentation"] for a in annos if "segmentation" in a]
    if segmentations:
        if len(segmentations) < len(annos):
            raise ValueError(
                f"{len(annos) - len(segmentations)} of the {len(annos)} annotations of an image have no "
                "segmentation; masks need one for each, so drop these annotations from the dataset"
            )
        to_masks = _polygon_masks if mask_format == "polygon" else _bit_masks
        assert mask_format in ("polygon", "bitmask"), f'mask_format is "polygon" or "bitmask", got {mask_format!r}'
        target.gt_masks = to_masks(segmentations, image_size)
    return target


def _stack_boxes(annos: list[dict[str, Any]]) -> np.ndarray:
    """Boxes (N, 4) XYXY, float32."""
    if not annos:
        return np.zeros((0, 4), dtype=np.float32)
    boxes = np.array([a["bbox"] for a in annos], dtype=float)
    modes = {a["bbox_mode"] for a in annos}
    if len(modes) == 1:
        boxes = BoxMode.convert(boxes, modes.pop(), BoxMode.XYXY_ABS)
    else:
        rows = [BoxMode.convert(b[None], a["bbox_mode"], BoxMode.XYXY_ABS) for b, a in zip(boxes, annos)]
        boxes = np.concatenate(rows)
    return boxes.astype(np.float32)


def _polygon_masks(segmentations: list[Any], image_size: ImageSize) -> PolygonMasks:
    try:
        return PolygonMasks(segmentations)
    except ValueError as e:
        raise ValueError(
            "the annotations have segmentations that are not polygons; set INPUT.MASK_FORMAT to bitmask"
        ) from e


def _bit_masks(segmentations: list[Any], image_size: ImageSize) -> BitMasks:
    return BitMasks(torch.from_numpy(np.stack([_to_bitmask(s, image_size) for s in segmentations])))


def _to_bitmask(segmentation: Any, image_size: ImageSize) -> np.ndarray:
    """Polygons, an RLE or a mask as a mask (H, W)."""
    if isinstance(segmentation, list):
        return polygons_to_bitmask(segmentation, *image_size).astype(bool)
    if isinstance(segmentation, dict):
        return mask_util.decode(_compress_rle(segmentation)).astype(bool)
    if isinstance(segmentation, np.ndarray):
        assert segmentation.ndim == 2, f"a mask must be (H, W), got shape {segmentation.shape}"
        return segmentation.astype(bool)
    raise ValueError(
        "cannot make a bit mask from a segmentation of type "
        f"{type(segmentation).__name__}: polygons as a list, an RLE dict, or a mask array are possible"
    )


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
) -> Instances | tuple[Instances, torch.Tensor]:
    """Drops instances whose box (a side of at most `box_threshold` pixels) or mask is empty.

    Returns:
        The instances that are kept, and with `return_mask` also which ones (N,) bool.
    """
    assert by_box or by_mask, "nothing to filter by: set by_box or by_mask"
    keep = torch.ones(len(instances), dtype=torch.bool)
    if by_box:
        keep &= instances.gt_boxes.nonempty(threshold=box_threshold)
    if by_mask and instances.has("gt_masks"):
        keep &= instances.gt_masks.nonempty()
    kept = instances if keep.all() else instances[keep]
    return (kept, keep) if return_mask else kept


# --- Augmentation and metadata --------------------------------------------------------------------


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations of INPUT: resize, and a flip in training."""
    node = cfg.INPUT
    if not is_train:
        return [T.ResizeShortestEdge(node.MIN_SIZE_TEST, node.MAX_SIZE_TEST, "choice")]
    augmentations = [T.ResizeShortestEdge(node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING)]
    if node.RANDOM_FLIP != "none":
        horizontal, vertical = node.RANDOM_FLIP == "horizontal", node.RANDOM_FLIP == "vertical"
        augmentations.append(T.RandomFlip(horizontal=horizontal, vertical=vertical))
    return augmentations


build_transform_gens = build_augmentation


def gen_crop_transform_with_instance(
    crop_size: Sequence[int], image_size: Sequence[int], instance: dict[str, Any]
) -> CropTransform:
    """A random crop that contains the center of an instance's box.

    Args:
        crop_size: (height, width) of the crop.
        image_size: (height, width) of the image.
        instance: an annotation with "bbox" and "bbox_mode".
    """
    crop, size = np.asarray(crop_size, dtype=np.int32), np.asarray(image_size, dtype=np.int32)
    box = BoxMode.convert(np.array([instance["bbox"]], float), instance["bbox_mode"], BoxMode.XYXY_ABS)[0]
    center = np.array([box[1] + box[3], box[0] + box[2]]) * 0.5
    assert (center >= 0).all() and (center <= size).all(), (
        f"the box {box.tolist()} has its center outside the image of {tuple(size)} (height, width)"
    )
    assert (crop <= size).all(), f"the crop {tuple(crop)} is larger than the image {tuple(size)} (height, width)"
    low = np.maximum(np.floor(center).astype(np.int32) - crop, 0)
    high = np.minimum(size - crop, np.ceil(center).astype(np.int32))
    y0 = int(np.random.randint(low[0], high[0] + 1))
    x0 = int(np.random.randint(low[1], high[1] + 1))
    return CropTransform(x0, y0, int(crop[1]), int(crop[0]), int(size[1]), int(size[0]))


def check_metadata_consistency(key: str, dataset_names: Sequence[str]) -> None:
    """Checks that several datasets agree on a metadata value.

    Raises:
        AttributeError: if one does not have it.
        ValueError: if they differ.
    """
    if not dataset_names:
        return
    values = [getattr(MetadataCatalog.get(name), key) for name in dataset_names]
    for name, value in zip(dataset_names, values):
        if value != values[0]:
            raise ValueError(
                f"datasets {dataset_names[0]!r} and {name!r} differ in metadata {key!r}: {values[0]!r} != {value!r}"
            )


def get_fed_loss_cls_weights(dataset_names: str | Sequence[str], freq_weight_power: float = 1.0) -> torch.Tensor:
    """Sampling weight of each class for the federated loss: (number of its images) ** freq_weight_power.

    Source: Zhou et al., "Probabilistic two-stage detection" (2021), section 4.

    Args:
        dataset_names: datasets whose metadata has "class_image_count", [{"id", "image_count"}, ...].
        freq_weight_power: exponent.

    Returns:
        (number of classes,) float32, ordered by category id.
    """
    names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
    check_metadata_consistency("class_image_count", names)
    counts = sorted(MetadataCatalog.get(names[0]).class_image_count, key=lambda c: c["id"])
    return torch.tensor([c["image_count"] for c in counts], dtype=torch.float32) ** freq_weight_power
