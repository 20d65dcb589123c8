"""Everything that happens per region: sampling of proposals, pooling, boxes and masks."""

import torch
from torch import Tensor, nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import ShapeSpec
from d2lite.modeling.backbone.resnet import BottleneckBlock, ResNet
from d2lite.modeling.matcher import Matcher
from d2lite.modeling.poolers import ROIPooler
from d2lite.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from d2lite.modeling.roi_heads.box_head import build_box_head
from d2lite.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from d2lite.modeling.roi_heads.mask_head import build_mask_head
from d2lite.modeling.sampling import subsample_labels
from d2lite.structures import Boxes, ImageList, Instances, pairwise_iou
from d2lite.utils.events import get_event_storage
from d2lite.utils.registry import Registry

ROI_HEADS_REGISTRY = Registry("ROI_HEADS")
ROI_HEADS_REGISTRY.__doc__ = """
Modules that turn features and proposals into losses or detections.
Called as `cls(cfg, input_shape)` with `input_shape` a dict of feature name to :class:`ShapeSpec`.
"""


def build_roi_heads(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the heads named by `cfg.MODEL.ROI_HEADS.NAME` for features of `input_shape`."""
    name = cfg.MODEL.ROI_HEADS.NAME
    if name == "RROIHeads":
        raise NotImplementedError(
            "MODEL.ROI_HEADS.NAME is RROIHeads: d2lite leaves out rotated boxes; install Detectron2 to use"
            " them."
        )
    return ROI_HEADS_REGISTRY.get(name)(cfg, input_shape)


class ROIHeads(nn.Module):
    """Base class: chooses and labels the proposals that the heads are trained on."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_matcher: Matcher,
        proposal_append_gt: bool = True,
    ) -> None:
        """
        Args:
            num_classes: foreground classes, K; the label K is the background.
            batch_size_per_image: proposals per image that enter the losses.
            positive_fraction: largest part of them that may be foreground.
            proposal_matcher: labels proposals as 1 (foreground), 0 (background) or -1 (ignored) by their IoU.
            proposal_append_gt: add the ground truth to the proposals in training.
        """
        super().__init__()
        self.num_classes = num_classes
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.proposal_matcher = proposal_matcher
        self.proposal_append_gt = proposal_append_gt

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """
        Constructor arguments from MODEL.ROI_HEADS; subclasses add their own.

        Raises:
            NotImplementedError: MODEL.KEYPOINT_ON is set.
        """
        if cfg.MODEL.KEYPOINT_ON:
            raise NotImplementedError(
                "MODEL.KEYPOINT_ON is True: d2lite leaves out keypoints; install Detectron2 to use them."
            )
        heads = cfg.MODEL.ROI_HEADS
        return {
            "batch_size_per_image": heads.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": heads.POSITIVE_FRACTION,
            "num_classes": heads.NUM_CLASSES,
            "proposal_append_gt": heads.PROPOSAL_APPEND_GT,
            "proposal_matcher": Matcher(
                heads.IOU_THRESHOLDS, heads.IOU_LABELS, allow_low_quality_matches=False
            ),
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """
        Args:
            images: the N input images.
            features: feature maps (N, C, H_i, W_i) by name.
            proposals: N `Instances` with `proposal_boxes`, and `objectness_logits` in training.
            targets: N ground truths with `gt_boxes`, `gt_classes` and what the heads need, e.g. `gt_masks`;
                needed in training.

        Returns:
            N `Instances`, detections or (in training) sampled proposals; and the losses, empty outside
            training.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward()")

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        Match proposals with ground truth, and draw those that enter the losses.

        Args:
            proposals: N `Instances` with `proposal_boxes` and `objectness_logits`.
            targets: N ground truths with `gt_boxes`, `gt_classes` and maybe other `gt_*` fields.

        Returns:
            N `Instances` with the fields of the proposals, `gt_classes` (K for background), and, where the
            image has objects, all `gt_*` fields of the matched object; these mean nothing for background.

        Raises:
            ValueError: a class of the ground truth is not below the number of classes.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        sampled = [self._label_and_sample_image(p, t) for p, t in zip(proposals, targets)]
        self._check_classes_and_log(sampled, targets)
        return sampled

    def _label_and_sample_image(self, proposals: Instances, targets: Instances) -> Instances:
        quality = pairwise_iou(targets.gt_boxes, proposals.proposal_boxes)
        matched_idxs, matched_labels = self.proposal_matcher(quality)
        sampled_idxs, gt_classes = self._sample_proposals(matched_idxs, matched_labels, targets.gt_classes)
        proposals = proposals[sampled_idxs]
        proposals.gt_classes = gt_classes
        if len(targets) > 0:
            sampled_targets = matched_idxs[sampled_idxs]
            for name, value in targets.get_fields().items():
                if name.startswith("gt_") and not proposals.has(name):
                    proposals.set(name, value[sampled_targets])
        return proposals

    def _sample_proposals(
        self, matched_idxs: Tensor, matched_labels: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Draw from the R proposals of one image.

        Args:
            matched_idxs, matched_labels: (R,), what the matcher returned.
            gt_classes: (M,) classes of the ground truth.

        Returns:
            Indices (S,) of the drawn proposals, foreground first, and their classes (S,) in [0, K].
        """
        gt_classes = self._classes_of_matches(matched_idxs, matched_labels, gt_classes)
        foreground, background = subsample_labels(
            gt_classes, self.batch_size_per_image, self.positive_fraction, self.num_classes
        )
        sampled = torch.cat([foreground, background])
        return sampled, gt_classes[sampled]

    def _classes_of_matches(self, matched_idxs: Tensor, matched_labels: Tensor, gt_classes: Tensor) -> Tensor:
        """The class (R,) of each proposal: in [0, K], K for background, -1 where it is ignored."""
        if gt_classes.numel() == 0:
            return torch.full_like(matched_idxs, self.num_classes)
        classes = gt_classes[matched_idxs]
        return classes.masked_fill(matched_labels == 0, self.num_classes).masked_fill(
            matched_labels == -1, -1
        )

    def _check_classes_and_log(self, sampled: list[Instances], targets: list[Instances]) -> None:
        num_background = [(x.gt_classes == self.num_classes).sum() for x in sampled]
        largest = [x.gt_classes.max() for x in targets if len(x) > 0]
        # one read from the device for the counts and the check
        values = torch.stack(num_background + largest).tolist() if num_background else []
        background, largest = values[: len(sampled)], values[len(sampled) :]
        if largest and max(largest) >= self.num_classes:
            raise ValueError(
                f"The ground truth has class {max(largest)}, but MODEL.ROI_HEADS.NUM_CLASSES is"
                f" {self.num_classes}, so classes must be 0 to {self.num_classes - 1}. Set"
                " MODEL.ROI_HEADS.NUM_CLASSES to the dataset's number of classes, or check its annotations"
            )
        _log_sample_counts([len(x) for x in sampled], background)


def _log_sample_counts(sizes: list[int], num_background: list[int]) -> None:
    if not sizes:
        return
    storage = get_event_storage()
    storage.put_scalar("roi_head/num_fg_samples", (sum(sizes) - sum(num_background)) / len(sizes))
    storage.put_scalar("roi_head/num_bg_samples", sum(num_background) / len(sizes))


def select_foreground_proposals(
    proposals: list[Instances], bg_label: int
) -> tuple[list[Instances], list[Tensor]]:
    """
    The proposals with a class other than `bg_label` and -1 (ignored).

    Args:
        proposals: N `Instances` with `gt_classes`.
        bg_label: label of the background.

    Returns:
        N `Instances` with the foreground only, and N masks (R_i,) bool that say which these were.
    """
    assert isinstance(proposals, (list, tuple)), (
        f"expected a list of Instances, got {type(proposals).__name__}"
    )
    foreground, masks = [], []
    for x in proposals:
        mask = (x.gt_classes != -1) & (x.gt_classes != bg_label)
        # indices, because every field would otherwise look for the set bits again, and wait for them
        foreground.append(x[mask.nonzero().squeeze(1)])
        masks.append(mask)
    return foreground, masks


@ROI_HEADS_REGISTRY.register()
class StandardROIHeads(ROIHeads):
    """Boxes and, if wanted, masks, each with its own pooling and layers: the heads of FPN models."""

    @configurable
    def __init__(
        self,
        *,
        box_in_features: list[str],
        box_pooler: ROIPooler,
        box_head: nn.Module,
        box_predictor: nn.Module,
        mask_in_features: list[str] | None = None,
        mask_pooler: ROIPooler | None = None,
        mask_head: nn.Module | None = None,
        train_on_pred_boxes: bool = False,
        **kwargs: object,
    ) -> None:
        """
        Args:
            box_in_features: names of the feature maps for the boxes.
            box_pooler: pools them.
            box_head: from pooled features to the features of the predictor.
            box_predictor: from these to scores and boxes, see :class:`FastRCNNOutputLayers`.
            mask_in_features: names of the feature maps for the masks.
            mask_pooler: pools them. Without it the mask head gets the dict of feature maps itself.
            mask_head: from pooled features to losses or masks; None: no masks.
            train_on_pred_boxes: train the mask head on the boxes that the box predictor gives.
            kwargs: see :class:`ROIHeads`.
        """
        super().__init__(**kwargs)
        self.in_features = self.box_in_features = box_in_features
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_on = mask_in_features is not None
        if self.mask_on:
            self.mask_in_features = mask_in_features
            self.mask_pooler = mask_pooler
            self.mask_head = mask_head
        self.train_on_pred_boxes = train_on_pred_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        return {
            **super().from_config(cfg),
            "train_on_pred_boxes": cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES,
            **cls._init_box_head(cfg, input_shape),
            **cls._init_mask_head(cfg, input_shape),
        }

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        pooler, pooled_shape = _build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
        box_head = build_box_head(cfg, pooled_shape)
        return {
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "box_pooler": pooler,
            "box_head": box_head,
            "box_predictor": FastRCNNOutputLayers(cfg, box_head.output_shape),
        }

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if not cfg.MODEL.MASK_ON:
            return {}
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        if cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE:
            pooler, shape = _build_pooler(cfg, cfg.MODEL.ROI_MASK_HEAD, input_shape)
        else:
            pooler, shape = None, {name: input_shape[name] for name in names}
        return {"mask_in_features": names, "mask_pooler": pooler, "mask_head": build_mask_head(cfg, shape)}

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See :class:`ROIHeads`."""
        if not self.training:
            detections = self._forward_box(features, proposals)
            return self.forward_with_given_boxes(features, detections), {}
        assert targets is not None, "ROI heads need `targets` in training"
        proposals = self.label_and_sample_proposals(proposals, targets)
        losses = self._forward_box(features, proposals)
        # the masks get the proposals that the boxes were trained on, not the boxes' predictions
        losses.update(self._forward_mask(features, proposals))
        return proposals, losses

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """
        Predict what is left for given boxes: the masks. Only outside training.

        Args:
            features: feature maps (N, C, H_i, W_i) by name.
            instances: N `Instances` with `pred_boxes` and `pred_classes`.

        Returns:
            The same, with the field `pred_masks` (R_i, 1, M, M) if the model has masks.
        """
        assert not self.training, "forward_with_given_boxes() is for inference"
        assert instances[0].has("pred_boxes") and instances[0].has("pred_classes")
        return self._forward_mask(features, instances)

    def _forward_box(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        """Losses of the boxes, or N detections. May replace `proposal_boxes` by predictions in training."""
        maps = [features[name] for name in self.box_in_features]
        box_features = self.box_pooler(maps, [x.proposal_boxes for x in proposals])
        predictions = self.box_predictor(self.box_head(box_features))
        if not self.training:
            return self.box_predictor.inference(predictions, proposals)[0]
        losses = self.box_predictor.losses(predictions, proposals)
        if self.train_on_pred_boxes:
            with torch.no_grad():
                boxes = self.box_predictor.predict_boxes_for_gt_classes(predictions, proposals)
                for x, image_boxes in zip(proposals, boxes):
                    x.proposal_boxes = Boxes(image_boxes)
        return losses

    def _forward_mask(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        """Losses of the masks for the foreground of `instances`, or `instances` with masks."""
        if not self.mask_on:
            return {} if self.training else instances
        if self.training:
            instances = select_foreground_proposals(instances, self.num_classes)[0]
        if self.mask_pooler is not None:
            maps = [features[name] for name in self.mask_in_features]
            features = self.mask_pooler(
                maps, [x.proposal_boxes if self.training else x.pred_boxes for x in instances]
            )
        else:
            features = {name: features[name] for name in self.mask_in_features}
        return self.mask_head(features, instances)


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeads(ROIHeads):
    """The heads of "C4" models: the last ResNet stage runs on each region, shared by boxes and masks."""

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        pooler: ROIPooler,
        res5: nn.Module,
        box_predictor: nn.Module,
        mask_head: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """
        Args:
            in_features: name of the one feature map.
            pooler: pools it.
            res5: from pooled features to the features of box predictor and mask head.
            box_predictor: from their spatial mean to scores and boxes, see :class:`FastRCNNOutputLayers`.
            mask_head: from them to losses or masks; None: no masks.
            kwargs: see :class:`ROIHeads`.
        """
        super().__init__(**kwargs)
        self.in_features = in_features
        self.pooler = pooler
        self.res5 = nn.Sequential(*res5) if isinstance(res5, (list, tuple)) else res5
        self.box_predictor = box_predictor
        self.mask_on = mask_head is not None
        if self.mask_on:
            self.mask_head = mask_head

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        arguments = super().from_config(cfg)
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        if len(names) != 1:
            raise ValueError(
                f"Res5ROIHeads uses one feature map, but MODEL.ROI_HEADS.IN_FEATURES is {list(names)}"
            )
        pooler, pooled_shape = _build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
        res5, channels = cls._build_res5_block(cfg)
        arguments.update(in_features=names, pooler=pooler, res5=res5)
        arguments["box_predictor"] = FastRCNNOutputLayers(
            cfg, ShapeSpec(channels=channels, height=1, width=1)
        )
        if cfg.MODEL.MASK_ON:
            shape = ShapeSpec(channels=channels, height=pooled_shape.height, width=pooled_shape.width)
            arguments["mask_head"] = build_mask_head(cfg, shape)
        return arguments

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        """The last stage of the ResNet of the config, which its backbone lacks, and its output channels."""
        resnet = cfg.MODEL.RESNETS
        if resnet.DEFORM_ON_PER_STAGE[-1]:
            raise ValueError(
                "Res5ROIHeads has no deformable convolution: set the last of"
                " MODEL.RESNETS.DEFORM_ON_PER_STAGE to False"
            )
        factor = 2**3  # res5 has 8 times the channels of res2
        channels = resnet.RES2_OUT_CHANNELS * factor
        blocks = ResNet.make_stage(
            BottleneckBlock,
            3,
            stride_per_block=[2, 1, 1],
            in_channels=channels // 2,
            bottleneck_channels=resnet.NUM_GROUPS * resnet.WIDTH_PER_GROUP * factor,
            out_channels=channels,
            num_groups=resnet.NUM_GROUPS,
            norm=resnet.NORM,
            stride_in_1x1=resnet.STRIDE_IN_1X1,
        )
        return nn.Sequential(*blocks), channels

    def _shared_roi_transform(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        return self.res5(self.pooler(features, boxes))

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See :class:`ROIHeads`. In training the first result is empty."""
        if self.training:
            assert targets is not None, "ROI heads need `targets` in training"
            proposals = self.label_and_sample_proposals(proposals, targets)
        maps = [features[name] for name in self.in_features]
        box_features = self._shared_roi_transform(maps, [x.proposal_boxes for x in proposals])
        predictions = self.box_predictor(box_features.mean(dim=[2, 3]))
        if not self.training:
            detections, _ = self.box_predictor.inference(predictions, proposals)
            return self.forward_with_given_boxes(features, detections), {}
        losses = self.box_predictor.losses(predictions, proposals)
        if self.mask_on:
            foreground, masks = select_foreground_proposals(proposals, self.num_classes)
            losses.update(self.mask_head(box_features[torch.cat(masks)], foreground))
        return [], losses

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """See :meth:`StandardROIHeads.forward_with_given_boxes`."""
        assert not self.training, "forward_with_given_boxes() is for inference"
        assert instances[0].has("pred_boxes") and instances[0].has("pred_classes")
        if not self.mask_on:
            return instances
        maps = [features[name] for name in self.in_features]
        return self.mask_head(self._shared_roi_transform(maps, [x.pred_boxes for x in instances]), instances)


def _build_pooler(
    cfg: CfgNode, head: CfgNode, input_shape: dict[str, ShapeSpec]
) -> tuple[ROIPooler, ShapeSpec]:
    """The pooler that `head` (MODEL.ROI_BOX_HEAD or ROI_MASK_HEAD) asks for, and the shape of its output."""
    shapes = [input_shape[name] for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
    if len({shape.channels for shape in shapes}) != 1:
        raise ValueError(
            "A head is shared by all levels, but MODEL.ROI_HEADS.IN_FEATURES"
            f" {list(cfg.MODEL.ROI_HEADS.IN_FEATURES)} have {[shape.channels for shape in shapes]} channels"
        )
    pooler = ROIPooler(
        output_size=head.POOLER_RESOLUTION,
        scales=[1.0 / shape.stride for shape in shapes],
        sampling_ratio=head.POOLER_SAMPLING_RATIO,
        pooler_type=head.POOLER_TYPE,
    )
    height, width = pooler.output_size
    return pooler, ShapeSpec(channels=shapes[0].channels, height=height, width=width)
