"""Base class of heads on regions: sampling of proposals and pooling of features."""

import torch
from torch import Tensor, nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import ShapeSpec
from d2lite.modeling.matcher import Matcher
from d2lite.modeling.poolers import ROIPooler
from d2lite.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from d2lite.modeling.sampling import subsample_labels
from d2lite.structures import ImageList, Instances, pairwise_iou
from d2lite.utils.events import get_event_storage
from d2lite.utils.registry import Registry

ROI_HEADS_REGISTRY = Registry("ROI_HEADS")
"""Modules that turn features and proposals into losses or detections.

Called as `cls(cfg, input_shape)` with `input_shape` a dict of feature name to `ShapeSpec`.
"""


def build_roi_heads(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Builds the heads named by `cfg.MODEL.ROI_HEADS.NAME` for features of `input_shape`."""
    name = cfg.MODEL.ROI_HEADS.NAME
    if name == "RROIHeads":
        raise NotImplementedError(
            "MODEL.ROI_HEADS.NAME is RROIHeads: d2lite leaves out rotated boxes; install Detectron2 to use them."
        )
    return ROI_HEADS_REGISTRY.build(name, cfg, input_shape)


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
            positive_fraction: maximum fraction of them that may be foreground.
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
        """Constructor arguments from MODEL.ROI_HEADS; subclasses add their own.

        Raises:
            NotImplementedError: if MODEL.KEYPOINT_ON is set.
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
            "proposal_matcher": Matcher(heads.IOU_THRESHOLDS, heads.IOU_LABELS, allow_low_quality_matches=False),
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

    def _check_given_boxes(self, instances: list[Instances]) -> None:
        """Raises AssertionError unless `forward_with_given_boxes` can be called with `instances`."""
        assert not self.training, "forward_with_given_boxes() is for inference"
        missing = [field for field in ("pred_boxes", "pred_classes") if not instances[0].has(field)]
        assert not missing, f"the given instances have no {' and no '.join(missing)}"

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """Matches proposals with ground truth, and samples those that enter the losses.

        Args:
            proposals: N `Instances` with `proposal_boxes` and `objectness_logits`.
            targets: N ground truths with `gt_boxes`, `gt_classes` and maybe other `gt_*` fields.

        Returns:
            N `Instances` with the fields of the proposals, `gt_classes` (K for background), and, where the
            image has objects, all `gt_*` fields of the matched object; these are undefined for background.

        Raises:
            ValueError: if a class of the ground truth is not below the number of classes.
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
        """Samples from the R proposals of one image.

        Args:
            matched_idxs, matched_labels: (R,), what the matcher returned.
            gt_classes: (M,) classes of the ground truth.

        Returns:
            Indices (S,) of the sampled proposals, foreground first, and their classes (S,) in [0, K].
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
        return classes.masked_fill(matched_labels == 0, self.num_classes).masked_fill(matched_labels == -1, -1)

    def _check_classes_and_log(self, sampled: list[Instances], targets: list[Instances]) -> None:
        num_background = [(x.gt_classes == self.num_classes).sum() for x in sampled]
        largest = [x.gt_classes.max() for x in targets if len(x) > 0]
        # one synchronization with the device for the counts and the check
        values = torch.stack(num_background + largest).tolist() if num_background else []
        background, largest = values[: len(sampled)], values[len(sampled) :]
        if largest and max(largest) >= self.num_classes:
            raise ValueError(
                f"The ground truth has class {max(largest)}, but MODEL.ROI_HEADS.NUM_CLASSES is"
                f" {self.num_classes}, so classes must be 0 to {self.num_classes - 1}. Set"
                " MODEL.ROI_HEADS.NUM_CLASSES to the dataset's number of classes, or check its annotations"
            )
        log_sample_counts([len(x) for x in sampled], background)


def log_sample_counts(sizes: list[int], num_background: list[int]) -> None:
    """Records how many of the sampled proposals, `sizes` per image, are foreground and background, on average."""
    if not sizes:
        return
    storage = get_event_storage()
    storage.put_scalar("roi_head/num_fg_samples", (sum(sizes) - sum(num_background)) / len(sizes))
    storage.put_scalar("roi_head/num_bg_samples", sum(num_background) / len(sizes))


def select_foreground_proposals(proposals: list[Instances], bg_label: int) -> tuple[list[Instances], list[Tensor]]:
    """The proposals with a class other than `bg_label` and -1 (ignored).

    Args:
        proposals: N `Instances` with `gt_classes`.
        bg_label: label of the background.

    Returns:
        N `Instances` with the foreground only, and N masks (R_i,) bool that mark these.
    """
    assert isinstance(proposals, (list, tuple)), f"expected a list of Instances, got {type(proposals).__name__}"
    foreground, masks = [], []
    for x in proposals:
        mask = (x.gt_classes != -1) & (x.gt_classes != bg_label)
        # indices, because with a mask every field would repeat nonzero() and its synchronization
        foreground.append(x[mask.nonzero().squeeze(1)])
        masks.append(mask)
    return foreground, masks


def build_pooler(cfg: CfgNode, head: CfgNode, input_shape: dict[str, ShapeSpec]) -> tuple[ROIPooler, ShapeSpec]:
    """The pooler that `head` (MODEL.ROI_BOX_HEAD or ROI_MASK_HEAD) configures, and the shape of its output."""
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
