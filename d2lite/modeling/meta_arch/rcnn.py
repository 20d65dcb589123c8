"""Detectors that classify and refine region proposals (R-CNN), and the proposal network on its own."""

from collections.abc import Sequence

import torch
from torch import nn

from d2lite.config import CfgNode, configurable
from d2lite.modeling.backbone import Backbone, build_backbone
from d2lite.modeling.meta_arch.build import META_ARCH_REGISTRY
from d2lite.modeling.meta_arch.image_model import ImageModel, visualize_boxes
from d2lite.modeling.meta_arch.inputs import ground_truth, output_size
from d2lite.modeling.postprocessing import detector_postprocess
from d2lite.modeling.proposal_generator import build_proposal_generator
from d2lite.modeling.roi_heads import build_roi_heads
from d2lite.structures import ImageList, Instances
from d2lite.utils.events import get_event_storage


def _proposing_parts(cfg: CfgNode) -> dict:
    """The constructor arguments that both models have."""
    backbone = build_backbone(cfg)
    return {
        "backbone": backbone,
        "proposal_generator": build_proposal_generator(cfg, backbone.output_shape()),
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }


@META_ARCH_REGISTRY.register()
class GeneralizedRCNN(ImageModel):
    """Any model made of a backbone, a proposal generator and heads on the regions that it proposes: Faster, Mask
    and Cascade R-CNN, and, with proposals from the input, Fast R-CNN.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module | None,
        roi_heads: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str | None = None,
        vis_period: int = 0,
    ) -> None:
        """
        Args:
            backbone, pixel_mean, pixel_std: see `ImageModel`.
            proposal_generator: maps images and features to proposals; None to read them from the input.
            roi_heads: turns features and proposals into detections or losses.
            input_format: channel order of the input image, for the visualizations of `vis_period`.
            vis_period: iterations between two visualizations of training proposals; 0 for none.
        """
        super().__init__(backbone, pixel_mean, pixel_std)
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.input_format = input_format
        self.vis_period = vis_period
        assert vis_period == 0 or input_format is not None, "visualizations of the training need input_format"
        assert len(pixel_mean) == len(pixel_std), "pixel_mean and pixel_std have different lengths"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Constructor arguments from the configuration, with the parts of the model built."""
        parts = _proposing_parts(cfg)
        heads = build_roi_heads(cfg, parts["backbone"].output_shape())
        return {**parts, "roi_heads": heads, "input_format": cfg.INPUT.FORMAT, "vis_period": cfg.VIS_PERIOD}

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: one dict per image: "image" (C, H, W), in training "instances" (ground truth),
                "proposals" where there is no proposal generator, and optionally "height" and "width", the
                resolution wanted for the output.

        Returns:
            In training a dict of losses. Otherwise one {"instances": Instances} per image with `pred_boxes`,
            `scores`, `pred_classes` and, with a mask head, `pred_masks` (N, height, width) bool.
        """
        return self._losses(batched_inputs) if self.training else self.inference(batched_inputs)

    def _losses(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor]:
        images, features = self.extract_features(batched_inputs)
        truth = self._ground_truth(batched_inputs)  # checked while the device has work
        proposals, losses = self._propose(batched_inputs, images, features, truth)
        head_losses = self.roi_heads(images, features, proposals, truth)[1]
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        return {**head_losses, **losses}

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[dict[str, Instances]] | list[Instances]:
        """
        Args:
            batched_inputs: as in `forward`.
            detected_instances: boxes of each image at the network's resolution (`pred_boxes`,
                `pred_classes`). Only the other outputs, such as masks, are predicted for them.
            do_postprocess: whether predictions are mapped to the resolution that the input dicts request.

        Returns:
            As `forward`; without postprocessing the plain Instances at the network's resolution, with masks
            as probabilities (N, 1, M, M) inside the boxes.
        """
        assert not self.training, "inference was called on a model in training mode; call model.eval() first"
        images, features = self.extract_features(batched_inputs)
        if detected_instances is not None:
            given = [boxes.to(self.device) for boxes in detected_instances]
            found = self.roi_heads.forward_with_given_boxes(features, given)
        else:
            proposals = self._propose(batched_inputs, images, features, None)[0]
            found = self.roi_heads(images, features, proposals, None)[0]
        return self._postprocess(found, batched_inputs, images.image_sizes) if do_postprocess else found

    def _ground_truth(self, batched_inputs: list[dict]) -> list[Instances]:
        num_classes = getattr(self.roi_heads, "num_classes", None)
        return ground_truth(batched_inputs, self.device, num_classes, "MODEL.ROI_HEADS.NUM_CLASSES")

    def _propose(
        self,
        batched_inputs: list[dict],
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: list[Instances] | None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """The proposals of each image and, in training, the losses of the proposal generator."""
        if self.proposal_generator is None:
            assert "proposals" in batched_inputs[0], (
                "the model has no proposal generator and the input has no 'proposals' "
                "(MODEL.PROPOSAL_GENERATOR.NAME, MODEL.LOAD_PROPOSALS)"
            )
            return [x["proposals"].to(self.device) for x in batched_inputs], {}
        return self.proposal_generator(images, features, gt_instances)

    @staticmethod
    def _postprocess(
        instances: list[Instances], batched_inputs: list[dict], image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Instances]]:
        """Maps the predictions of each image to the resolution that its input dict requests."""
        return [
            {"instances": detector_postprocess(r, *output_size(x, size))}
            for r, x, size in zip(instances, batched_inputs, image_sizes)
        ]

    def visualize_training(self, batched_inputs: list[dict], proposals: list[Instances]) -> None:
        """Adds a visualization of each image to the event storage, see `visualize_boxes`.

        Args:
            batched_inputs: the input of a training step.
            proposals: with `proposal_boxes`, best first, for each image.
        """
        from d2lite.data.detection_utils import convert_image_to_rgb

        for x, found in zip(batched_inputs, proposals):
            image = convert_image_to_rgb(x["image"].permute(1, 2, 0).cpu(), self.input_format)
            picture = visualize_boxes(image, x["instances"].gt_boxes, found.proposal_boxes)
            get_event_storage().put_image("Left: ground truth; right: proposals", picture)


@META_ARCH_REGISTRY.register()
class ProposalNetwork(ImageModel):
    """Backbone and proposal generator only: trains and evaluates region proposals."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """
        Args:
            backbone, pixel_mean, pixel_std: see `ImageModel`.
            proposal_generator: maps images and features to proposals.
        """
        super().__init__(backbone, pixel_mean, pixel_std)
        self.proposal_generator = proposal_generator

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Constructor arguments from the configuration, with both parts of the model built."""
        return _proposing_parts(cfg)

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: as in `GeneralizedRCNN`.

        Returns:
            In training a dict of losses. Otherwise one {"proposals": Instances} per image with
            `proposal_boxes` and `objectness_logits`.
        """
        images, features = self.extract_features(batched_inputs)
        truth = ground_truth(batched_inputs, self.device) if self.training else None
        proposals, losses = self.proposal_generator(images, features, truth)
        if self.training:
            return losses
        return [
            {"proposals": detector_postprocess(r, *output_size(x, size))}
            for r, x, size in zip(proposals, batched_inputs, images.image_sizes)
        ]
