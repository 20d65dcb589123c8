"""META_ARCHITECTURE "RepPoints", built from the node MODEL.REPPOINTS: training and inference (arXiv 1904.11490)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.layers import mean_over_processes, sigmoid_focal_loss
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage

from ...padding import Padding
from ..dense_arguments import dense_arguments
from .assigners import IGNORED, assign_by_distance, assign_by_overlap
from .build import build_head
from .head import PointMaps
from .points import Locations, as_points, build_transform, flatten_levels, locations_of, place
from .targets import StageTargets, stage_targets

#: Added to what losses are divided by, as in the recorded values.
EPS = torch.finfo(torch.float32).eps


class RepPoints(DenseDetector):
    """Every location of a pyramid predicts points, moves them to where an object is, and reads its class there.

    A box is made of the points by a transform, and is what the losses see.
    """

    num_classes_key = "MODEL.REPPOINTS.NUM_CLASSES"

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        point_transform: nn.Module,
        num_classes: int,
        base_scale: float = 4.0,
        locations_per_object: int = 1,
        iou_thresholds: Sequence[float] = (0.4, 0.5),
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.11,
        initial_loss_weight: float = 0.5,
        refined_loss_weight: float = 1.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        vis_period: int = 0,
        input_format: str = "BGR",
    ) -> None:
        """
        Args:
            backbone, pixel_mean, pixel_std: see Detectron2's `DenseDetector`.
            head: maps a list of features to `PointMaps`.
            head_in_features: names of the features that the head takes; their strides are powers of 2.
            point_transform: maps points (..., P, 2) of x and y to boxes (..., 4).
            num_classes: K, without background.
            base_scale: sides of an object, in strides, on the level that learns it; the unit of box errors.
            locations_per_object: that learn the first points of an object.
            iou_thresholds: of the refined stage: below the first a location is background, from the second an object.
            focal_loss_alpha, focal_loss_gamma: parameters of the focal loss.
            smooth_l1_beta: where smooth L1 turns from quadratic to linear, in sides of `base_scale` strides.
            initial_loss_weight, refined_loss_weight: factors on the losses of the two sets of points.
            test_score_thresh: detections need a higher score.
            test_topk_candidates: candidates of each level that enter non-maximum suppression.
            test_nms_thresh: overlap above which the lower score is suppressed.
            max_detections_per_image: detections kept in the end.
            vis_period: iterations between pictures of the training; 0 makes none.
            input_format: channel order of the images, for those pictures.
        """
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        shapes = backbone.output_shape()
        self.strides = [int(shapes[name].stride or 1) for name in head_in_features]
        self.point_transform = point_transform
        self.num_classes = num_classes
        self.base_scale = base_scale
        self.locations_per_object = locations_per_object
        self.iou_thresholds = tuple(iou_thresholds)
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.smooth_l1_beta = smooth_l1_beta
        self.initial_loss_weight = initial_loss_weight
        self.refined_loss_weight = refined_loss_weight
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
            ConfigError: `MODEL.REPPOINTS.IN_FEATURES` names what the backbone does not give, or no pyramid; or NORM
                does not fit it.
        """
        node = cfg.MODEL.REPPOINTS
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "head": build_head(node, backbone),
            "point_transform": build_transform(node.TRANSFORM, node.MOMENT_MULTIPLIER),
            "base_scale": node.BASE_SCALE,
            "locations_per_object": node.LOCATIONS_PER_OBJECT,
            "iou_thresholds": node.IOU_THRESHOLDS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "smooth_l1_beta": node.SMOOTH_L1_BETA,
            "initial_loss_weight": node.INITIAL_LOSS_WEIGHT,
            "refined_loss_weight": node.REFINED_LOSS_WEIGHT,
            **dense_arguments(cfg, node),
        }

    def forward(self, batched_inputs: list[dict[str, Any]], **kwargs: Any) -> Any:
        """As in Detectron2's `DenseDetector`; detections have `pred_points` too, (N, P, 2) x and y in their pixels."""
        outputs = super().forward(batched_inputs, **kwargs)
        if not self.training:
            for inputs, output in zip(batched_inputs, outputs):
                if isinstance(output, dict):  # scaled to the wanted size, but for the points
                    found, (height, width) = output["instances"], inputs["image"].shape[-2:]
                    sizes = found.image_size[1] / width, found.image_size[0] / height
                    found.pred_points = found.pred_points * found.pred_points.new_tensor(sizes)
        return outputs

    def forward_training(
        self, images: ImageList, features: list[Tensor], predictions: PointMaps, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """The losses of a batch, from what the head returned for `features`; see `losses`."""
        locations = locations_of(features, self.strides)
        flat = [flatten_levels(maps) for maps in predictions]
        initial, refined = self.label_locations(locations, flat[1], images.image_sizes, gt_instances)
        totals = torch.stack([initial.num_foreground(), refined.num_foreground()]).to(flat[0].dtype)
        storage = get_event_storage()
        for name, total in zip(("num_pos_initial", "num_pos_refined"), totals.tolist()):
            storage.put_scalar(name, total / len(gt_instances))
        return self.losses(flat, locations, initial, refined, mean_over_processes(totals))

    @torch.no_grad()
    def label_locations(
        self,
        locations: Locations,
        initial_points: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        gt_instances: Sequence[Instances],
    ) -> tuple[StageTargets, StageTargets]:
        """Gives the locations of a batch to the objects in it, for both stages.

        Args:
            locations: R of them.
            initial_points: (N, R, 2P) as the head gives them; their boxes are the candidates of the second stage.
            image_sizes: (height, width) of each image; what the padding of the batch adds to it learns nothing.
            gt_instances: for each image.
        """
        candidates = place(self.point_transform(as_points(initial_points)), locations.xy, locations.strides)
        initial: list[Tensor] = []
        refined: list[Tensor] = []
        padding = Padding.of(self)
        for boxes, size, truth in zip(candidates, image_sizes, gt_instances):
            inside = locations.inside(*padding.canvas([(int(size[0]), int(size[1]))]))
            objects = truth.gt_boxes.tensor.to(boxes.dtype)
            xy, strides = locations.xy[inside], locations.strides[inside]
            by_distance = assign_by_distance(xy, strides, objects, self.base_scale, self.locations_per_object)
            by_overlap = assign_by_overlap(boxes[inside], objects, *self.iou_thresholds)
            for matches, found in ((initial, by_distance), (refined, by_overlap)):
                matches.append(found.new_full(inside.shape, IGNORED).masked_scatter(inside, found))
        first, second = (stage_targets(matches, gt_instances, self.num_classes) for matches in (initial, refined))
        return first, second

    def losses(
        self,
        predictions: Sequence[Tensor],
        locations: Locations,
        initial: StageTargets,
        refined: StageTargets,
        totals: Tensor,
    ) -> dict[str, Tensor]:
        """
        Args:
            predictions: logits (N, R, K), first and refined points (N, R, 2P).
            locations: R of them.
            initial, refined: targets of the two stages.
            totals: (2,) what the losses of the two stages are divided by: their foreground locations.

        Returns:
            "loss_cls" (focal), "loss_pts_init" and "loss_pts_refine" (smooth L1 of boxes, in sides of `base_scale`
            strides).
        """
        logits, first, second = predictions
        of_initial, of_refined = totals + EPS
        focal = sigmoid_focal_loss(logits, refined.labels, self.focal_loss_alpha, self.focal_loss_gamma)
        return {
            "loss_cls": (focal * refined.counts[..., None]).sum() / of_refined,
            "loss_pts_init": self.initial_loss_weight * self._box_loss(first, locations, initial) / of_initial,
            "loss_pts_refine": self.refined_loss_weight * self._box_loss(second, locations, refined) / of_refined,
        }

    def _box_loss(self, points: Tensor, locations: Locations, targets: StageTargets) -> Tensor:
        image, index = targets.foreground.nonzero(as_tuple=True)
        strides = locations.strides[index]
        boxes = place(self.point_transform(as_points(points[image, index])), locations.xy[index], strides)
        unit = self.base_scale * strides[:, None]
        target = targets.boxes[image, index].to(boxes.dtype)
        return F.smooth_l1_loss(boxes / unit, target / unit, beta=self.smooth_l1_beta, reduction="sum")

    def forward_inference(self, images: ImageList, features: list[Tensor], predictions: PointMaps) -> list[Instances]:
        """The detections of each image, at the network's resolution: boxes, scores, classes and points."""
        locations = locations_of(features, self.strides)
        logits, points = flatten_levels(predictions.logits), flatten_levels(predictions.refined)
        return [
            self.inference_single_image(locations, scores, channels, size)
            for scores, channels, size in zip(logits.sigmoid(), points, images.image_sizes)
        ]

    def inference_single_image(
        self, locations: Locations, scores: Tensor, points: Tensor, image_size: tuple[int, int]
    ) -> Instances:
        """Decodes the best candidates of each level and keeps those that do not overlap within a class.

        Args:
            locations: R of them.
            scores: (R, K) in [0, 1].
            points: (R, 2P) as the head gives them.
            image_size: (height, width).
        """
        best = [self._candidates(of_level) for of_level in scores.split(locations.per_level)]
        starts = [sum(locations.per_level[:level]) for level in range(len(best))]
        index = torch.cat([start + location for start, (location, _) in zip(starts, best)])
        classes = torch.cat([label for _, label in best])
        xy, strides, found = locations.xy[index], locations.strides[index], as_points(points[index])
        boxes = Boxes(place(self.point_transform(found), xy, strides))
        boxes.clip(image_size)
        candidates = Instances(
            image_size,
            pred_boxes=boxes,
            scores=scores[index, classes],
            pred_classes=classes,
            pred_points=place(found, xy, strides),
        )
        candidates = candidates[boxes.nonempty()]
        keep = batched_nms(
            candidates.pred_boxes.tensor, candidates.scores, candidates.pred_classes, self.test_nms_thresh
        )
        return candidates[keep[: self.max_detections_per_image]]

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Locations and classes of the best pairs of both on a level, best first."""
        pairs = (scores > self.test_score_thresh).flatten().nonzero().squeeze(1)
        best = scores.flatten()[pairs].topk(min(self.test_topk_candidates, len(pairs))).indices
        pairs, num_classes = pairs[best], scores.shape[1]
        return pairs // num_classes, pairs % num_classes


if "RepPoints" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(RepPoints)
