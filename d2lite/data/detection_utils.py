"""Reading images, and turning annotations into the training targets of one image."""

import logging
import struct
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import pycocotools.mask as mask_util
import torch
from fvcore.transforms.transform import CropTransform, Transform, TransformList
from PIL import Image

from d2lite.config import CfgNode
from d2lite.data import transforms as T
from d2lite.data.catalog import MetadataCatalog
from d2lite.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks, polygons_to_bitmask
from d2lite.utils.file_io import PathManager

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

logger = logging.getLogger(__name__)

ImageSize = Tuple[int, int]

# ITU-R BT.601, for RGB and YUV in [0, 1]: yuv = rgb @ matrix.T
_RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])
_YUV_TO_RGB = np.array([[1.0, 0.0, 1.13983], [1.0, -0.39465, -0.58060], [1.0, 2.03211, 0.0]])

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class SizeMismatchError(ValueError):
    """An image does not have the width and height that its dataset gives."""


# --- Images ---------------------------------------------------------------------------------------


def read_image(file_name: str, format: Optional[str] = None) -> np.ndarray:
    """Reads an image file, turned upright as its EXIF orientation says.

    Args:
        file_name: a path that the path manager knows.
        format: a PIL mode, "BGR" or "YUV-BT.601"; None keeps the file's.

    Returns:
        (H, W, C) uint8 in [0, 255]; (H, W, 1) for "L"; float in [0, 1] for YUV. It may be a read-only view.
    """
    with PathManager.open(file_name, "rb") as f:
        return convert_PIL_to_numpy(_apply_exif_orientation(Image.open(f)), format)


def _apply_exif_orientation(image: Image.Image) -> Image.Image:
    """The image turned upright; a damaged EXIF block leaves it as it is."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def convert_PIL_to_numpy(image: Image.Image, format: Optional[str]) -> np.ndarray:
    """A PIL image as an array in the given format; see `read_image`."""
    if format is not None:
        mode = "RGB" if format in ("BGR", "YUV-BT.601") else format
        image = image if image.mode == mode else image.convert(mode)
    array = np.asarray(image)
    if format == "L":
        return array[:, :, None]
    if format == "BGR":
        return array[:, :, ::-1]
    if format == "YUV-BT.601":
        return (array / 255.0) @ _RGB_TO_YUV.T
    return array


def convert_image_to_rgb(image: Union[np.ndarray, torch.Tensor], format: str) -> np.ndarray:
    """An image (H, W, C) in a format of `read_image` as RGB (H, W, 3) uint8; "L" gives (H, W)."""
    image = image.cpu().numpy() if isinstance(image, torch.Tensor) else image
    if format == "BGR":
        return image[:, :, [2, 1, 0]]
    if format == "YUV-BT.601":
        return ((image @ _YUV_TO_RGB.T) * 255.0).clip(0, 255).astype(np.uint8)
    if format == "L":
        return image[:, :, 0]
    image = image.astype(np.uint8)
    return image if format == "RGB" else np.asarray(Image.fromarray(image, mode=format).convert("RGB"))


def check_image_size(dataset_dict: Dict[str, Any], image: np.ndarray) -> None:
    """Compares an image with "width" and "height" of its dataset dict, and sets them where they are missing.

    Raises:
        SizeMismatchError: if they differ.
    """
    height, width = image.shape[:2]
    if "width" in dataset_dict or "height" in dataset_dict:
        expected = (dataset_dict.get("width", width), dataset_dict.get("height", height))
        if expected != (width, height):
            where = f" of {dataset_dict['file_name']}" if "file_name" in dataset_dict else ""
            raise SizeMismatchError(
                f"the image{where} is {width} x {height} (width x height), but its dataset says "
                f"{expected[0]} x {expected[1]}; check the annotations and the EXIF orientation"
            )
    dataset_dict.setdefault("width", width)
    dataset_dict.setdefault("height", height)


# --- Annotations ----------------------------------------------------------------------------------


def transform_instance_annotations(
    annotation: Dict[str, Any],
    transforms: Union[Transform, Sequence[Transform]],
    image_size: ImageSize,
    *,
    keypoint_hflip_indices: Optional[np.ndarray] = None,
) -> Dict[str, Any]:
    """Moves the box and the segmentation of one annotation as its image was moved.

    Args:
        annotation: with "bbox" and "bbox_mode", and perhaps "segmentation": polygons or RLE. It is changed.
        transforms: what was applied to the image.
        image_size: (height, width) after the transforms.

    Returns:
        the annotation, with the box as XYXY_ABS inside the image and an RLE as a mask (H, W) uint8.
    """
    if keypoint_hflip_indices is not None or "keypoints" in annotation:
        raise NotImplementedError("key points are not part of d2lite; Detectron2 has them")
    if isinstance(transforms, (tuple, list)):
        transforms = TransformList(transforms)
    box = BoxMode.convert(np.array([annotation["bbox"]]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    height, width = image_size
    annotation["bbox"] = np.clip(transforms.apply_box(box)[0], 0, [width, height, width, height])
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    if "segmentation" in annotation:
        annotation["segmentation"] = _transform_segmentation(
            annotation["segmentation"], transforms, image_size
        )
    return annotation


def _transform_segmentation(
    segmentation: Any, transforms: Transform, image_size: ImageSize
) -> Union[List[np.ndarray], np.ndarray]:
    """Polygons stay polygons, RLE becomes a mask."""
    if isinstance(segmentation, list):
        # A copy: transforms may work in place.
        polygons = [np.array(p, dtype=float).reshape(-1, 2) for p in segmentation]
        return [p.reshape(-1) for p in transforms.apply_polygons(polygons)]
    if isinstance(segmentation, dict):
        mask = transforms.apply_segmentation(mask_util.decode(_compressed(segmentation)))
        assert tuple(mask.shape[:2]) == tuple(image_size), (
            f"a mask is {mask.shape[:2]} (height, width) after the transforms, its image {tuple(image_size)}"
        )
        return mask
    raise ValueError(
        f"a segmentation must be a list of polygons or an RLE dict, got {type(segmentation).__name__}"
    )


def _compressed(rle: Dict[str, Any]) -> Dict[str, Any]:
    """COCO's uncompressed RLE (counts as a list) as the compressed one."""
    return mask_util.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle


def annotations_to_instances(
    annos: List[Dict[str, Any]], image_size: ImageSize, mask_format: str = "polygon"
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
        assert mask_format in ("polygon", "bitmask"), (
            f'mask_format is "polygon" or "bitmask", got {mask_format!r}'
        )
        target.gt_masks = to_masks(segmentations, image_size)
    return target


def _stack_boxes(annos: List[Dict[str, Any]]) -> np.ndarray:
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


def _polygon_masks(segmentations: List[Any], image_size: ImageSize) -> PolygonMasks:
    try:
        return PolygonMasks(segmentations)
    except ValueError as e:
        raise ValueError(
            "the annotations have segmentations that are no polygons; set INPUT.MASK_FORMAT to bitmask"
        ) from e


def _bit_masks(segmentations: List[Any], image_size: ImageSize) -> BitMasks:
    return BitMasks(torch.from_numpy(np.stack([_to_bitmask(s, image_size) for s in segmentations])))


def _to_bitmask(segmentation: Any, image_size: ImageSize) -> np.ndarray:
    """Polygons, an RLE or a mask as a mask (H, W)."""
    if isinstance(segmentation, list):
        return polygons_to_bitmask(segmentation, *image_size).astype(bool)
    if isinstance(segmentation, dict):
        return mask_util.decode(_compressed(segmentation)).astype(bool)
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
) -> Union[Instances, Tuple[Instances, torch.Tensor]]:
    """Drops instances whose box (a side of at most `box_threshold` pixels) or mask is empty.

    Returns:
        the instances that are kept, and with `return_mask` also which ones (N,) bool.
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


def build_augmentation(cfg: CfgNode, is_train: bool) -> List[T.Augmentation]:
    """The augmentations that INPUT asks for: resize, and a flip in training."""
    node = cfg.INPUT
    if not is_train:
        return [T.ResizeShortestEdge(node.MIN_SIZE_TEST, node.MAX_SIZE_TEST, "choice")]
    augmentations = [
        T.ResizeShortestEdge(node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING)
    ]
    if node.RANDOM_FLIP != "none":
        horizontal, vertical = node.RANDOM_FLIP == "horizontal", node.RANDOM_FLIP == "vertical"
        augmentations.append(T.RandomFlip(horizontal=horizontal, vertical=vertical))
    return augmentations


build_transform_gens = build_augmentation


def gen_crop_transform_with_instance(
    crop_size: Sequence[int], image_size: Sequence[int], instance: Dict[str, Any]
) -> CropTransform:
    """A random crop that contains the centre of an instance's box.

    Args:
        crop_size: (height, width) of the crop.
        image_size: (height, width) of the image.
        instance: an annotation with "bbox" and "bbox_mode".
    """
    crop, size = np.asarray(crop_size, dtype=np.int32), np.asarray(image_size, dtype=np.int32)
    box = BoxMode.convert(np.array([instance["bbox"]], float), instance["bbox_mode"], BoxMode.XYXY_ABS)[0]
    center = np.array([box[1] + box[3], box[0] + box[2]]) * 0.5
    assert (center >= 0).all() and (center <= size).all(), (
        f"the box {box.tolist()} has its centre outside the image of {tuple(size)} (height, width)"
    )
    assert (crop <= size).all(), (
        f"the crop {tuple(crop)} is larger than the image {tuple(size)} (height, width)"
    )
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
                f"datasets {dataset_names[0]!r} and {name!r} differ in metadata {key!r}: "
                f"{values[0]!r} != {value!r}"
            )


def get_fed_loss_cls_weights(
    dataset_names: Union[str, Sequence[str]], freq_weight_power: float = 1.0
) -> torch.Tensor:
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
