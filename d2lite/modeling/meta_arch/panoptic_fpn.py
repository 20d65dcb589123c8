"""Panoptic FPN (arXiv 1901.02446): an R-CNN for things and a semantic branch for stuff on one backbone."""

import logging
from typing import Any

import torch
from torch import nn

from d2lite.config import CfgNode, configurable
from d2lite.modeling.meta_arch.build import META_ARCH_REGISTRY
from d2lite.modeling.meta_arch.inputs import output_size, semantic_labels
from d2lite.modeling.meta_arch.rcnn import GeneralizedRCNN
from d2lite.modeling.meta_arch.semantic_seg import build_sem_seg_head
from d2lite.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from d2lite.structures import Instances

__all__ = ["PanopticFPN", "combine_semantic_and_instance_outputs"]

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class PanopticFPN(GeneralizedRCNN):
    """Instances, per-pixel classes, and both merged into one segmentation."""

    @configurable
    def __init__(
        self,
        *,
        sem_seg_head: nn.Module,
        combine_overlap_thresh: float = 0.5,
        combine_stuff_area_thresh: float = 4096,
        combine_instances_score_thresh: float = 0.5,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            sem_seg_head: turns features (and, in training, labels) into (scores, losses).
            combine_overlap_thresh, combine_stuff_area_thresh, combine_instances_score_thresh: see
                `combine_semantic_and_instance_outputs`.
            kwargs: the arguments of `GeneralizedRCNN`.
        """
        super().__init__(**kwargs)
        self.sem_seg_head = sem_seg_head
        self.combine_overlap_thresh = combine_overlap_thresh
        self.combine_stuff_area_thresh = combine_stuff_area_thresh
        self.combine_instances_score_thresh = combine_instances_score_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        args = super().from_config(cfg)
        combine = cfg.MODEL.PANOPTIC_FPN.COMBINE
        if not combine.ENABLED:
            logger.warning(
                "MODEL.PANOPTIC_FPN.COMBINE.ENABLED has no effect; call inference(..., do_postprocess=False) instead."
            )
        _scale_instance_losses(args["roi_heads"], cfg.MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT)
        return {
            **args,
            "sem_seg_head": build_sem_seg_head(cfg, args["backbone"].output_shape()),
            "combine_overlap_thresh": combine.OVERLAP_THRESH,
            "combine_stuff_area_thresh": combine.STUFF_AREA_LIMIT,
            "combine_instances_score_thresh": combine.INSTANCES_CONFIDENCE_THRESH,
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """
        Args:
            batched_inputs: as in `GeneralizedRCNN`, and in training "sem_seg" (H, W): 0 for all
                things, stuff classes from 1.

        Returns:
            In training a dict of losses. Otherwise one dict per image: "instances", "sem_seg" (logits (C, H,
            W)) and "panoptic_seg" as returned by `combine_semantic_and_instance_outputs`.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        gt_instances = self._ground_truth(batched_inputs)
        gt_sem_seg = semantic_labels(batched_inputs, self.backbone, self.device, self.sem_seg_head)
        _, sem_seg_losses = self.sem_seg_head(features, gt_sem_seg)
        proposals, proposal_losses = self._propose(batched_inputs, images, features, gt_instances)
        _, detector_losses = self.roi_heads(images, features, proposals, gt_instances)
        return {**sem_seg_losses, **proposal_losses, **detector_losses}

    def inference(
        self, batched_inputs: list[dict], do_postprocess: bool = True
    ) -> list[dict] | tuple[list[Instances], torch.Tensor]:
        """
        Args:
            batched_inputs: as in `forward`.
            do_postprocess: whether predictions are mapped to the wanted resolution and merged.

        Returns:
            As `forward`; without postprocessing the instances of each image and the logits (N, C, H, W).
        """
        assert not self.training, "inference was called on a model in training mode; call model.eval() first"
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        sem_seg_results, _ = self.sem_seg_head(features, None)
        proposals, _ = self._propose(batched_inputs, images, features, None)
        detector_results, _ = self.roi_heads(images, features, proposals, None)
        if not do_postprocess:
            return detector_results, sem_seg_results
        return [
            self._merge(sem_seg, instances, size, *output_size(x, size))
            for sem_seg, instances, x, size in zip(
                sem_seg_results, detector_results, batched_inputs, images.image_sizes
            )
        ]

    def _merge(
        self, sem_seg: torch.Tensor, instances: Instances, image_size: tuple[int, int], height: int, width: int
    ) -> dict:
        sem_seg = sem_seg_postprocess(sem_seg, image_size, height, width)
        instances = detector_postprocess(instances, height, width)
        panoptic = combine_semantic_and_instance_outputs(
            instances,
            sem_seg.argmax(dim=0),
            self.combine_overlap_thresh,
            self.combine_stuff_area_thresh,
            self.combine_instances_score_thresh,
        )
        return {"sem_seg": sem_seg, "instances": instances, "panoptic_seg": panoptic}


def combine_semantic_and_instance_outputs(
    instance_results: Instances,
    semantic_results: torch.Tensor,
    overlap_threshold: float,
    stuff_area_thresh: float,
    instances_score_thresh: float,
) -> tuple[torch.Tensor, list[dict]]:
    """Merges detections and per-pixel classes: instances claim free pixels by decreasing score, then stuff fills
    the rest (arXiv 1901.02446, section 3.2).

    Args:
        instance_results: with `scores`, `pred_classes` and `pred_masks` (N, H, W) bool.
        semantic_results: (H, W) stuff classes, 0 for things.
        overlap_threshold: instances of which a larger part is already taken are dropped.
        stuff_area_thresh: stuff regions with fewer pixels are dropped.
        instances_score_thresh: instances with a lower score are dropped.

    Returns:
        panoptic_seg: (H, W) int32 ids of segments; 0 for none.
        segments_info: for each segment a dict with "id", "isthing" and "category_id"; things also have
            "score" and "instance_id" (their index in `instance_results`), stuff has "area".
    """
    panoptic_seg = torch.zeros_like(semantic_results, dtype=torch.int32)
    segments_info: list[dict] = []
    masks = instance_results.pred_masks.to(dtype=torch.bool, device=panoptic_seg.device)
    scores, order = instance_results.scores.sort(descending=True)
    classes = instance_results.pred_classes[order].tolist()
    for instance_id, score, category_id in zip(order.tolist(), scores.tolist(), classes):
        if score < instances_score_thresh:
            break
        mask = masks[instance_id]
        free = mask & (panoptic_seg == 0)
        area, free_area = torch.stack([mask.sum(), free.sum()]).tolist()
        if area == 0 or (area - free_area) / area > overlap_threshold:
            continue
        segment_id = len(segments_info) + 1
        panoptic_seg[free] = segment_id
        segments_info.append(
            {
                "id": segment_id,
                "isthing": True,
                "score": score,
                "category_id": category_id,
                "instance_id": instance_id,
            }
        )

    free_labels = semantic_results.masked_fill(panoptic_seg != 0, 0)
    labels, areas = free_labels.unique(return_counts=True)
    for label, area in zip(labels.tolist(), areas.tolist()):
        if label == 0 or area < stuff_area_thresh:
            continue
        segment_id = len(segments_info) + 1
        panoptic_seg[free_labels == label] = segment_id
        segments_info.append({"id": segment_id, "isthing": False, "category_id": label, "area": area})
    return panoptic_seg, segments_info


def _scale_instance_losses(roi_heads: nn.Module, weight: float) -> None:
    """Applies MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT to all losses of the box and mask heads."""
    if weight == 1.0:
        return
    for head in roi_heads.modules():
        own = getattr(head, "loss_weight", None)
        if isinstance(own, dict):
            own = {"loss_cls": 1.0, "loss_box_reg": 1.0, **own}  # what is not listed has weight 1
            head.loss_weight = {name: value * weight for name, value in own.items()}
        elif own is not None:
            head.loss_weight = own * weight
