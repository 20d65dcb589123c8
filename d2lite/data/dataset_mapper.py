"""Turns a dataset dict into the input of a model: reads the image, augments it, and makes the targets."""

import logging
from typing import Any

import numpy as np
import torch

from d2lite.config import CfgNode, configurable
from d2lite.data import detection_utils as utils
from d2lite.data import transforms as T

logger = logging.getLogger(__name__)


class DatasetMapper:
    """The default mapper, for detection, instance and semantic segmentation.

    It returns the dict with "image" (C, H, W) uint8, in training with "instances", and with "sem_seg" (H, W)
    int64 where the dict has "sem_seg_file_name".
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: list[T.Augmentation | T.Transform],
        image_format: str,
        use_instance_mask: bool = False,
        use_keypoint: bool = False,
        instance_mask_format: str = "polygon",
        keypoint_hflip_indices: np.ndarray | None = None,
        precomputed_proposal_topk: int | None = None,
        recompute_boxes: bool = False,
    ) -> None:
        """
        Args:
            is_train: whether targets are wanted.
            augmentations: augmentations or transforms, first to last.
            image_format: as for `detection_utils.read_image`.
            use_instance_mask: keep the segmentations.
            use_keypoint, keypoint_hflip_indices, precomputed_proposal_topk: left out of d2lite.
            instance_mask_format: "polygon" or "bitmask".
            recompute_boxes: take the boxes from the transformed masks, which are tighter after a crop.

        Raises:
            NotImplementedError: for keypoints or precomputed proposals.
        """
        if use_keypoint or keypoint_hflip_indices is not None:
            raise NotImplementedError("MODEL.KEYPOINT_ON: d2lite has no keypoints; Detectron2 has them")
        if precomputed_proposal_topk is not None:
            raise NotImplementedError("MODEL.LOAD_PROPOSALS: d2lite has no stored proposals; Detectron2 has them")
        assert use_instance_mask or not recompute_boxes, "recompute_boxes needs use_instance_mask"
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.use_instance_mask = use_instance_mask
        self.instance_mask_format = instance_mask_format
        self.recompute_boxes = recompute_boxes
        logger.info("Augmentations in %s: %s", "training" if is_train else "inference", augmentations)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Constructor arguments from a config."""
        augmentations = utils.build_augmentation(cfg, is_train)
        crop = cfg.INPUT.CROP
        if crop.ENABLED and is_train:
            augmentations.insert(0, T.RandomCrop(crop.TYPE, crop.SIZE))
        split = "TRAIN" if is_train else "TEST"
        return {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "use_instance_mask": cfg.MODEL.MASK_ON,
            "instance_mask_format": cfg.INPUT.MASK_FORMAT,
            "use_keypoint": cfg.MODEL.KEYPOINT_ON,
            "precomputed_proposal_topk": (
                cfg.DATASETS[f"PRECOMPUTED_PROPOSAL_TOPK_{split}"] if cfg.MODEL.LOAD_PROPOSALS else None
            ),
            "recompute_boxes": cfg.MODEL.MASK_ON and crop.ENABLED and is_train,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """
        Args:
            dataset_dict: the annotations of one image, in Detectron2's standard format. It is not changed.

        Returns:
            What the model takes.
        """
        example = dict(dataset_dict)
        image = utils.read_image(example["file_name"], self.image_format)
        utils.check_image_size(example, image)
        labels = example.pop("sem_seg_file_name", None)
        inputs = T.AugInput(image, sem_seg=None if labels is None else utils.read_image(labels, "L")[:, :, 0])
        transforms = self.augmentations(inputs)
        example["image"] = _to_chw(inputs.image)
        if inputs.sem_seg is not None:
            example["sem_seg"] = torch.from_numpy(inputs.sem_seg.astype(np.int64))
        if self.is_train and "annotations" in example:
            self._transform_annotations(example, transforms, inputs.image.shape[:2])
        example.pop("annotations", None)
        return example

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        """Replaces "annotations" by "instances"; crowd annotations are left out."""
        unwanted = {"keypoints"} if self.use_instance_mask else {"keypoints", "segmentation"}
        single = [anno for anno in dataset_dict.pop("annotations") if anno.get("iscrowd", 0) == 0]
        wanted = [{k: v for k, v in anno.items() if k not in unwanted} for anno in single]
        annos = [utils.transform_instance_annotations(anno, transforms, image_shape) for anno in wanted]
        found = utils.annotations_to_instances(annos, image_shape, mask_format=self.instance_mask_format)
        # An image without annotations has no masks either.
        if self.recompute_boxes and found.has("gt_masks"):
            found.gt_boxes = found.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(found)


def _to_chw(image: np.ndarray) -> torch.Tensor:
    """(H, W, C) or (H, W) as a contiguous tensor (C, H, W)."""
    image = image if image.ndim == 3 else image[:, :, None]
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
