"""Cascade R-CNN (arXiv 1712.00726): a sequence of box heads, each trained on the boxes of the previous one."""

from typing import Any

import torch
from torch import Tensor, nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import ShapeSpec
from d2lite.modeling.box_regression import Box2BoxTransform
from d2lite.modeling.matcher import Matcher
from d2lite.modeling.poolers import ROIPooler
from d2lite.modeling.roi_heads.base import ROI_HEADS_REGISTRY, build_pooler, log_sample_counts
from d2lite.modeling.roi_heads.box_head import build_box_head
from d2lite.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from d2lite.modeling.roi_heads.roi_heads import StandardROIHeads
from d2lite.structures import Boxes, Instances, pairwise_iou
from d2lite.utils.events import get_event_storage


@ROI_HEADS_REGISTRY.register()
class CascadeROIHeads(StandardROIHeads):
    """Standard heads whose `box_head` and `box_predictor` are lists with one module per stage."""

    @configurable
    def __init__(
        self,
        *,
        box_in_features: list[str],
        box_pooler: ROIPooler,
        box_heads: list[nn.Module],
        box_predictors: list[nn.Module],
        proposal_matchers: list[Matcher],
        **kwargs: Any,
    ) -> None:
        """
        Args:
            box_in_features: names of the feature maps for the boxes.
            box_pooler: pools them; shared by the stages.
            box_heads: one per stage.
            box_predictors: one per stage, with one box for all classes.
            proposal_matchers: one per stage; the first one labels the proposals themselves.
            kwargs: see `StandardROIHeads`.
        """
        if "proposal_matcher" in kwargs:
            raise ValueError("CascadeROIHeads takes `proposal_matchers`, one per stage, not `proposal_matcher`")
        if not len(box_heads) == len(box_predictors) == len(proposal_matchers):
            raise ValueError(
                f"A cascade needs as many box_heads ({len(box_heads)}) as box_predictors"
                f" ({len(box_predictors)}) and proposal_matchers ({len(proposal_matchers)})"
            )
        stages = dict(box_head=nn.ModuleList(box_heads), box_predictor=nn.ModuleList(box_predictors))
        kwargs.update(stages, proposal_matcher=proposal_matchers[0])
        super().__init__(box_in_features=box_in_features, box_pooler=box_pooler, **kwargs)
        self.num_cascade_stages = len(box_heads)
        self.proposal_matchers = proposal_matchers

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        arguments = super().from_config(cfg, input_shape)
        arguments.pop("proposal_matcher")
        return arguments

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        cascade, heads = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_HEADS
        if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise ValueError("CascadeROIHeads needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True")
        if len(cascade.BBOX_REG_WEIGHTS) != len(cascade.IOUS):
            raise ValueError(
                "MODEL.ROI_BOX_CASCADE_HEAD: BBOX_REG_WEIGHTS and IOUS must have one entry per stage, but"
                f" have {len(cascade.BBOX_REG_WEIGHTS)} and {len(cascade.IOUS)}"
            )
        if cascade.IOUS[0] != heads.IOU_THRESHOLDS[0]:
            raise ValueError(
                f"The first of MODEL.ROI_BOX_CASCADE_HEAD.IOUS ({cascade.IOUS[0]}) must be"
                f" MODEL.ROI_HEADS.IOU_THRESHOLDS ({heads.IOU_THRESHOLDS[0]})"
            )
        pooler, pooled_shape = build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)

        def stage(weights: tuple[float, ...]) -> tuple[nn.Module, nn.Module]:
            head, transform = build_box_head(cfg, pooled_shape), Box2BoxTransform(weights)
            return head, FastRCNNOutputLayers(cfg, head.output_shape, box2box_transform=transform)

        box_heads, predictors = zip(*map(stage, cascade.BBOX_REG_WEIGHTS))
        return {
            "box_in_features": heads.IN_FEATURES,
            "box_pooler": pooler,
            "box_heads": list(box_heads),
            "box_predictors": list(predictors),
            "proposal_matchers": [Matcher([iou], [0, 1], allow_low_quality_matches=False) for iou in cascade.IOUS],
        }

    def _box_losses(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        return self._forward_box(features, proposals, targets)

    def _forward_box(
        self,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> dict[str, Tensor] | list[Instances]:
        """Losses "<name>_stage<k>" of all stages (`targets` is needed for these), or N detections."""
        maps = [features[name] for name in self.box_in_features]
        sizes = [x.image_size for x in proposals]
        outputs: list[tuple] = []
        for k, predictor in enumerate(self.box_predictor):
            if k > 0:
                proposals = self._refine(outputs[-1], sizes, k, targets)
            outputs.append((predictor, self._run_stage(maps, proposals, k), proposals))
        if not self.training:
            return self._inference(outputs, sizes)
        losses = {}
        for k, (predictor, *results) in enumerate(outputs):
            with get_event_storage().name_scope(f"stage{k}"):
                losses.update((f"{name}_stage{k}", loss) for name, loss in predictor.losses(*results).items())
        return losses

    def _refine(
        self, output: tuple, sizes: list[tuple[int, int]], stage: int, targets: list[Instances] | None
    ) -> list[Instances]:
        """The proposals of a stage, from the output of the one before; with labels in training."""
        predictor, predictions, proposals = output
        refined = self._create_proposals_from_boxes(predictor.predict_boxes(predictions, proposals), sizes)
        return self._match_and_label_boxes(refined, stage, targets) if self.training else refined

    def _inference(self, outputs: list[tuple], image_sizes: list[tuple[int, int]]) -> list[Instances]:
        """Boxes of the last stage, with the mean of the scores of all stages (section 4.3 of the paper)."""
        stage_scores = [predictor.predict_probs(predictions, props) for predictor, predictions, props in outputs]
        scores = [sum(of_image) / self.num_cascade_stages for of_image in zip(*stage_scores)]
        last, *results = outputs[-1]
        limits = (last.test_score_thresh, last.test_nms_thresh, last.test_topk_per_image)
        return fast_rcnn_inference(last.predict_boxes(*results), scores, image_sizes, *limits)[0]

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        """Assigns all proposals of a later stage `gt_classes` and `gt_boxes`, in place; none is dropped."""
        for x, target in zip(proposals, targets):
            quality = pairwise_iou(target.gt_boxes, x.proposal_boxes)
            matched_idxs, labels = self.proposal_matchers[stage](quality)
            x.gt_classes = self._classes_of_matches(matched_idxs, labels, target.gt_classes)
            if len(target) > 0:
                x.gt_boxes = target.gt_boxes[matched_idxs]
            else:
                x.gt_boxes = Boxes(torch.zeros_like(x.proposal_boxes.tensor))
        if proposals:
            background = torch.stack([(x.gt_classes == self.num_classes).sum() for x in proposals]).tolist()
            with get_event_storage().name_scope(f"stage{stage}"):
                log_sample_counts([len(x) for x in proposals], background)
        return proposals

    def _run_stage(self, features: list[Tensor], proposals: list[Instances], stage: int) -> tuple[Tensor, Tensor]:
        """Scores and deltas of one stage for all proposals."""
        pooled = self.box_pooler(features, [x.proposal_boxes for x in proposals])
        if self.training and pooled.requires_grad:
            # the stages share the features; their gradients are averaged, not summed, for the backbone
            pooled.register_hook(lambda gradient: gradient / self.num_cascade_stages)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _create_proposals_from_boxes(self, boxes: list[Tensor], image_sizes: list[tuple[int, int]]) -> list[Instances]:
        """The predicted boxes (R_i, 4) of a stage as proposals of the next, clipped and without gradient."""
        proposals = []
        for image_boxes, size in zip(boxes, image_sizes):
            # NaN has no pyramid level; inference drops what is still not finite after the last stage
            image_boxes = Boxes(image_boxes.detach().nan_to_num())
            image_boxes.clip(size)
            if self.training:
                # inference keeps them: the stages' scores are averaged row by row
                image_boxes = image_boxes[image_boxes.nonempty()]
            proposals.append(Instances(size, proposal_boxes=image_boxes))
        return proposals
