"""Test-time augmentation: detections merged over several scales and flips of an image."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2lite.config import CfgNode, configurable
from d2lite.data.detection_utils import read_image
from d2lite.data.transforms import (
    HFlipTransform,
    NoOpTransform,
    RandomFlip,
    ResizeShortestEdge,
    ResizeTransform,
    TransformList,
    apply_augmentations,
)
from d2lite.layers import batched_nms
from d2lite.modeling.meta_arch.rcnn import GeneralizedRCNN
from d2lite.modeling.postprocessing import detector_postprocess
from d2lite.structures import Boxes, Instances

__all__ = ["DatasetMapperTTA", "GeneralizedRCNNWithTTA"]


class GeneralizedRCNNWithTTA(nn.Module):
    """A `GeneralizedRCNN` that sees every image at several scales, each plain and flipped. Boxes of all
    versions go through one non-maximum suppression; masks are predicted for the result in every version, and
    averaged.

    Takes and returns what `GeneralizedRCNN.forward` does in inference.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: Callable[[dict], list[dict]] | None = None,
        batch_size: int = 3,
    ) -> None:
        """
        Args:
            cfg: `ROI_HEADS.NMS_THRESH_TEST`, `TEST.DETECTIONS_PER_IMAGE` and `TEST.AUG` are used.
            model: a GeneralizedRCNN, maybe wrapped for distributed training.
            tta_mapper: makes the augmented versions of an input dict, each with "transforms" from the
                original to the augmented image; by default `DatasetMapperTTA(cfg)`.
            batch_size: augmented images that are processed together.
        """
        super().__init__()
        if isinstance(model, DistributedDataParallel):
            model = model.module
        assert isinstance(model, GeneralizedRCNN), (
            f"test-time augmentation (TEST.AUG.ENABLED) needs a GeneralizedRCNN, got {type(model).__name__}"
        )
        assert not cfg.MODEL.LOAD_PROPOSALS, "TEST.AUG.ENABLED does not support MODEL.LOAD_PROPOSALS"
        self.cfg = cfg.clone()
        self.model = model
        self.tta_mapper = DatasetMapperTTA(cfg) if tta_mapper is None else tta_mapper
        self.batch_size = batch_size

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """Detections {"instances": Instances} of each input dict, which needs "image" or "file_name"."""
        return [self._inference_one_image(self._with_image(x)) for x in batched_inputs]

    def _with_image(self, x: dict) -> dict:
        x = copy.copy(x)
        if "image" not in x:
            image = read_image(x["file_name"], self.model.input_format)
            x["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        x.setdefault("height", x["image"].shape[1])
        x.setdefault("width", x["image"].shape[2])
        return x

    def _inference_one_image(self, x: dict) -> dict[str, Instances]:
        size = (x["height"], x["width"])
        augmented = self.tta_mapper(x)
        transforms = [y.pop("transforms") for y in augmented]
        with _without_masks(self.model.roi_heads):
            outputs = self._batch_inference(augmented)
        merged = self._merge_boxes(outputs, transforms, size)
        if not getattr(self.model.roi_heads, "mask_on", False):
            return {"instances": merged}

        boxes = [self._boxes_in(merged, y, tfm) for y, tfm in zip(augmented, transforms)]
        outputs = self._batch_inference(augmented, boxes)
        merged.pred_masks = _mean_masks(outputs, transforms)
        return {"instances": detector_postprocess(merged, *size)}

    def _batch_inference(
        self, inputs: list[dict], detected_instances: list[Instances] | None = None
    ) -> list[Instances]:
        """Raw results of the model on all inputs, `batch_size` at a time."""
        outputs = []
        for i in range(0, len(inputs), self.batch_size):
            part = slice(i, i + self.batch_size)
            given = None if detected_instances is None else detected_instances[part]
            outputs += self.model.inference(inputs[part], given, do_postprocess=False)
        return outputs

    def _merge_boxes(
        self, outputs: list[Instances], transforms: list[TransformList], size: tuple[int, int]
    ) -> Instances:
        """The best boxes of all versions, in the original image of (height, width) `size`."""
        boxes = [
            torch.from_numpy(tfm.inverse().apply_box(output.pred_boxes.tensor.cpu().numpy()))
            for output, tfm in zip(outputs, transforms)
        ]
        scores = torch.cat([x.scores for x in outputs])
        classes = torch.cat([x.pred_classes for x in outputs])
        boxes = Boxes(torch.cat(boxes).to(scores))
        boxes.clip(size)
        keep = batched_nms(boxes.tensor, scores, classes, self.cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST)
        if self.cfg.TEST.DETECTIONS_PER_IMAGE >= 0:
            keep = keep[: self.cfg.TEST.DETECTIONS_PER_IMAGE]
        return Instances(size, pred_boxes=boxes[keep], scores=scores[keep], pred_classes=classes[keep])

    @staticmethod
    def _boxes_in(merged: Instances, augmented: dict, tfm: TransformList) -> Instances:
        """The merged detections in the coordinates of an augmented image."""
        boxes = merged.pred_boxes.tensor
        moved = torch.from_numpy(tfm.apply_box(boxes.cpu().numpy())).to(boxes)
        return Instances(
            tuple(augmented["image"].shape[1:]),
            pred_boxes=Boxes(moved),
            pred_classes=merged.pred_classes,
            scores=merged.scores,
        )


class DatasetMapperTTA:
    """Makes versions of an image at several scales, each also flipped on request."""

    @configurable
    def __init__(self, min_sizes: list[int], max_size: int, flip: bool) -> None:
        """
        Args:
            min_sizes: lengths of the shorter side.
            max_size: upper limit of the longer side.
            flip: whether horizontally flipped versions are added.
        """
        self.min_sizes = min_sizes
        self.max_size = max_size
        self.flip = flip

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Constructor arguments from TEST.AUG."""
        return {
            "min_sizes": cfg.TEST.AUG.MIN_SIZES,
            "max_size": cfg.TEST.AUG.MAX_SIZE,
            "flip": cfg.TEST.AUG.FLIP,
        }

    def __call__(self, dataset_dict: dict) -> list[dict]:
        """
        Args:
            dataset_dict: with "image" (C, H, W) and "height", "width" of the original image.

        Returns:
            Copies of it with "image" replaced, and "transforms" from the original to the augmented image
            added.
        """
        image = dataset_dict["image"].permute(1, 2, 0).numpy()
        original = (dataset_dict["height"], dataset_dict["width"])
        loaded = image.shape[:2]
        before = NoOpTransform() if loaded == original else ResizeTransform(*original, *loaded)

        augmented = []
        for min_size in self.min_sizes:
            resize = ResizeShortestEdge(min_size, self.max_size)
            for augs in ([resize], [resize, RandomFlip(prob=1.0)]) if self.flip else ([resize],):
                new_image, tfms = apply_augmentations(augs, np.copy(image))
                new = copy.deepcopy({k: v for k, v in dataset_dict.items() if k != "image"})
                new["image"] = torch.from_numpy(np.ascontiguousarray(new_image.transpose(2, 0, 1)))
                new["transforms"] = TransformList([before]) + tfms
                augmented.append(new)
        return augmented


@contextmanager
def _without_masks(roi_heads: nn.Module) -> Iterator[None]:
    """Disables the mask branch within the context."""
    mask_on = getattr(roi_heads, "mask_on", False)
    if not mask_on:
        yield
        return
    roi_heads.mask_on = False
    try:
        yield
    finally:
        roi_heads.mask_on = True


def _mean_masks(outputs: list[Instances], transforms: list[TransformList]) -> torch.Tensor:
    """Mask probabilities (N, 1, M, M), averaged over the versions after undoing their flips."""
    masks = []
    for output, tfm in zip(outputs, transforms):
        flipped = sum(isinstance(t, HFlipTransform) for t in tfm.transforms) % 2 == 1
        masks.append(output.pred_masks.flip(dims=[3]) if flipped else output.pred_masks)
    return torch.stack(masks).mean(dim=0)
