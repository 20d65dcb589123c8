"""META_ARCHITECTURE "GFL", built from the node MODEL.GFL: training and inference (arXiv 2006.04388)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.layers import generalized_iou, mean_over_processes, paired_iou, soft_label_focal_loss, upcast_half
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage

from ...padding import Padding
from ..dense_arguments import dense_arguments
from .assigner import assign_by_statistics
from .build import build_head
from .distribution import SIDES, as_box, box_distances, distribution_focal_loss


class GFL(DenseDetector):
    """Every cell of a pyramid predicts classes, and a distribution of the distance to each side of a box.

    The score of a class is the overlap of that box with the object, so that there is no centerness beside it. Objects
    are given to cells by ATSS (arXiv 1912.02424); what the padding of a batch adds to an image learns the background. A
    cell is represented by a box of the size of the stride around its
    center, as in Detectron2's FCOS.
    """

    num_classes_key = "MODEL.GFL.NUM_CLASSES"

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        num_classes: int,
        num_bins: int,
        cell_offset: float = 0.0,
        anchor_scale: float = 8.0,
        candidates_per_level: int = 9,
        quality_focal_loss_beta: float = 2.0,
        box_loss_weight: float = 2.0,
        distribution_loss_weight: float = 0.25,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        vis_period: int = 0,
        input_format: str = "BGR",
    ) -> None:
        """
        Args:
            backbone, pixel_mean, pixel_std: see Detectron2's `DenseDetector`.
            head: maps a list of features to lists of logits (N, K, Hi, Wi) and (N, 4 * B, Hi, Wi).
            head_in_features: names of the features that the head takes.
            num_classes: K, without background.
            num_bins: B, whole numbers of strides, from 0, that the distance to a side is a mean of.
            cell_offset: where in a cell its center is, in strides from its upper left corner.
            anchor_scale: side of a cell's anchor, in strides.
            candidates_per_level: cells of each level that an object is given to some of.
            quality_focal_loss_beta: how little scores that are right already count.
            box_loss_weight, distribution_loss_weight: factors on the losses of boxes and of their distributions.
            test_score_thresh: detections need a higher score.
            test_topk_candidates: candidates of each level that enter non-maximum suppression.
            test_nms_thresh: overlap above which the lower score is suppressed.
            max_detections_per_image: detections kept in the end.
            vis_period: iterations between pictures of the training; 0 makes none.
            input_format: channel order of the images, for those pictures.
        """
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        shapes = backbone.output_shape()
        strides = [int(shapes[name].stride) for name in head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[stride] for stride in strides], aspect_ratios=[1.0], strides=strides, offset=cell_offset
        )
        self.box2box_transform = Box2BoxTransformLinear(normalize_by_size=True)
        self.num_classes = num_classes
        self.num_bins = num_bins
        self.anchor_scale = anchor_scale
        self.candidates_per_level = candidates_per_level
        self.quality_focal_loss_beta = quality_focal_loss_beta
        self.box_loss_weight = box_loss_weight
        self.distribution_loss_weight = distribution_loss_weight
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.vis_period = vis_period
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments from the configuration.

        Raises:
            ConfigError: `MODEL.GFL.IN_FEATURES` names what the backbone does not give, or NORM does not fit it.
        """
        node = cfg.MODEL.GFL
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "head": build_head(node, backbone),
            "num_bins": node.NUM_BINS,
            "cell_offset": node.CELL_OFFSET,
            "anchor_scale": node.ANCHOR_SCALE,
            "candidates_per_level": node.CANDIDATES_PER_LEVEL,
            "quality_focal_loss_beta": node.QUALITY_FOCAL_LOSS_BETA,
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "distribution_loss_weight": node.DISTRIBUTION_LOSS_WEIGHT,
            **dense_arguments(cfg, node),
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Sequence[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """The losses of a batch, from what the head returned for `features`; see `losses`."""
        cells = self.anchor_generator(features)
        labels, boxes = self.label_cells(cells, gt_instances, images)
        levels = self._transpose_dense_predictions(predictions, [self.num_classes, SIDES * self.num_bins])
        logits, bins = (upcast_half(torch.cat(of_levels, dim=1)) for of_levels in levels)
        return self.losses(Boxes.cat(cells).tensor, logits, bins, labels, boxes)

    @torch.no_grad()
    def label_cells(
        self, cells: Sequence[Boxes], gt_instances: Sequence[Instances], images: ImageList
    ) -> tuple[Tensor, Tensor]:
        """Gives the cells of all levels, R in total, to the objects of each of N images.

        What an image gets in a batch of larger ones beside its own padding is background, and no candidate: which cells
        an object has does not depend on the other images.

        Returns:
            (N, R) int64, a class in [0, K), or K for background; and (N, R, 4) the object's box, any for background.
        """
        labels, boxes = [], []
        together, per_level = Boxes.cat(list(cells)).tensor, [len(of_level) for of_level in cells]
        centers, padding = (together[:, :2] + together[:, 2:]) / 2, Padding.of(self)
        for truth, size in zip(gt_instances, images.image_sizes):
            height, width = padding.canvas([(int(size[0]), int(size[1]))])
            usable = None
            if (height, width) != tuple(images.tensor.shape[-2:]):
                usable = (centers[:, 0] < width) & (centers[:, 1] < height)
            objects = truth.gt_boxes.tensor.to(together.dtype)
            matches = assign_by_statistics(
                together, per_level, objects, self.anchor_scale, self.candidates_per_level, usable
            )
            label, box = torch.full_like(matches, self.num_classes), torch.zeros_like(together)
            if len(truth):  # no mask as index: its size is a number that the host would wait for
                index = matches.clamp(min=0)
                label = torch.where(matches >= 0, truth.gt_classes[index], self.num_classes)
                box = objects[index]
            labels.append(label)
            boxes.append(box)
        return torch.stack(labels), torch.stack(boxes)

    def losses(self, cells: Tensor, logits: Tensor, bins: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """
        Args:
            cells: (R, 4).
            logits: (N, R, K) of classes.
            bins: (N, R, 4 * B) of distances.
            labels, boxes: see `label_cells`.

        Returns:
            "loss_cls": the quality focal loss (equation 2), divided by the number of foreground cells. "loss_box_reg",
            1 - GIoU, and "loss_dfl", the distribution focal loss (equation 6): weighted by the best score of a cell,
            divided by the sum of these weights. All are divided by 1 at least.
        """
        image, index = (labels < self.num_classes).nonzero(as_tuple=True)
        get_event_storage().put_scalar("num_pos_cells", len(image) / len(labels))
        found = bins[image, index]
        distances = self.box2box_transform.get_deltas(cells[index], boxes[image, index])
        predicted, wanted = as_box(box_distances(found)), as_box(distances)
        quality = torch.zeros_like(logits)
        quality[image, index, labels[image, index]] = paired_iou(predicted.detach(), wanted)
        weights = logits[image, index].detach().sigmoid().amax(dim=1)
        totals = torch.stack([torch.ones_like(weights).sum(), weights.sum()])
        foreground, weight = mean_over_processes(totals).clamp(min=1)
        loss_cls = soft_label_focal_loss(logits, quality, self.quality_focal_loss_beta)
        loss_box = (weights * (1 - generalized_iou(predicted, wanted))).sum()
        of_sides = distribution_focal_loss(found.unflatten(1, (SIDES, -1)), distances)
        loss_dfl = (weights * of_sides.mean(dim=1)).sum()
        return {
            "loss_cls": loss_cls / foreground,
            "loss_box_reg": self.box_loss_weight * loss_box / weight,
            "loss_dfl": self.distribution_loss_weight * loss_dfl / weight,
        }

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: Sequence[list[Tensor]]
    ) -> list[Instances]:
        """The detections of each image, at the network's resolution."""
        cells = self.anchor_generator(features)
        logits, bins = self._transpose_dense_predictions(predictions, [self.num_classes, SIDES * self.num_bins])
        scores = [upcast_half(of_level).sigmoid() for of_level in logits]
        distances = [box_distances(of_level) for of_level in bins]
        results = []
        for i, image_size in enumerate(images.image_sizes):
            found = self._decode_multi_level_predictions(
                cells,
                [of_level[i] for of_level in scores],
                [of_level[i] for of_level in distances],
                self.test_score_thresh,
                self.test_topk_candidates,
                image_size,
            )
            keep = batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, self.test_nms_thresh)
            results.append(found[keep[: self.max_detections_per_image]])
        return results


if "GFL" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(GFL)
