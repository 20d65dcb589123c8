"""Base class of detectors that predict at every cell of a feature pyramid (RetinaNet, FCOS)."""

from collections.abc import Sequence

import torch
from torch import nn

from d2lite.layers import batched_nms
from d2lite.modeling.backbone import Backbone
from d2lite.modeling.meta_arch.image_model import MAX_VISUALIZED_BOXES, ImageModel, visualize_boxes
from d2lite.modeling.meta_arch.inputs import ground_truth, output_size
from d2lite.modeling.postprocessing import detector_postprocess
from d2lite.structures import Boxes, ImageList, Instances
from d2lite.utils.events import get_event_storage


def permute_to_N_HWA_K(tensor: torch.Tensor, K: int) -> torch.Tensor:
    """Rearranges predictions (N, A * K, H, W) of one level to (N, H * W * A, K)."""
    assert tensor.dim() == 4, f"expected predictions (N, A * K, H, W), got shape {list(tensor.shape)}"
    n, _, h, w = tensor.shape
    return tensor.view(n, -1, K, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, K)


class DenseDetector(ImageModel):
    """Base of one-stage detectors: backbone, a head that is applied to several of its features, and box
    decoding.

    A subclass defines `forward_training` and `forward_inference`, and `num_classes` where it is trained.
    `inference_single_image` needs its attributes.

    Attributes:
        test_score_thresh: detections need a higher score.
        test_topk_candidates: candidates of each level that enter non-maximum suppression.
        test_nms_thresh: overlap above which the lower score is suppressed.
        max_detections_per_image: detections kept in the end.
    """

    num_classes_key: str = "num_classes"
    """Setting of `num_classes`, named in the error about an annotation with a class out of range."""

    vis_period: int = 0
    input_format: str = "BGR"

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str] | None = None,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """
        Args:
            backbone, pixel_mean, pixel_std: see `ImageModel`.
            head: maps a list of features to a tuple of predictions, each a list with one (N, C, Hi, Wi) per
                feature.
            head_in_features: names of the features that the head takes; by default all, by increasing stride.
        """
        super().__init__(backbone, pixel_mean, pixel_std)
        self.head = head
        if head_in_features is None:
            shapes = backbone.output_shape()
            head_in_features = sorted(shapes, key=lambda name: shapes[name].stride)
        self.head_in_features = list(head_in_features)

    def forward(
        self, batched_inputs: list[dict], do_postprocess: bool = True
    ) -> dict[str, torch.Tensor] | list[dict[str, Instances]] | list[Instances]:
        """
        Args:
            batched_inputs: one dict per image: "image" (C, H, W), in training "instances" (Instances with
                `gt_boxes` and `gt_classes`), and optionally "height" and "width", the resolution wanted for
                the output.
            do_postprocess: whether predictions are mapped to that resolution.

        Returns:
            In training a dict of losses. Otherwise one {"instances": Instances} per image with `pred_boxes`,
            `scores` and `pred_classes`, or the plain Instances at the network's resolution without
            postprocessing.
        """
        images, features = self.extract_features(batched_inputs)
        features = [features[name] for name in self.head_in_features]
        predictions = self.head(features)

        if self.training:
            gt_instances = ground_truth(
                batched_inputs, self.device, getattr(self, "num_classes", None), self.num_classes_key
            )
            if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
                with torch.no_grad():
                    results = self.forward_inference(images, features, predictions)
                self.visualize_training(batched_inputs, results)
            return self.forward_training(images, features, predictions, gt_instances)

        results = self.forward_inference(images, features, predictions)
        if not do_postprocess:
            return results
        return [
            {"instances": detector_postprocess(r, *output_size(x, size))}
            for r, x, size in zip(results, batched_inputs, images.image_sizes)
        ]

    def forward_training(
        self,
        images: ImageList,
        features: list[torch.Tensor],
        predictions: Sequence[list[torch.Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:
        """The losses of a batch, from what the head returned for `features`."""
        raise NotImplementedError(f"{type(self).__name__} must define forward_training")

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: Sequence[list[torch.Tensor]]
    ) -> list[Instances]:
        """The detections of each image, at the network's resolution."""
        raise NotImplementedError(f"{type(self).__name__} must define forward_inference")

    def _transpose_dense_predictions(
        self, predictions: Sequence[list[torch.Tensor]], dims_per_anchor: Sequence[int]
    ) -> list[list[torch.Tensor]]:
        """Brings every kind of prediction, of K = `dims_per_anchor[i]` numbers, to (N, Hi * Wi * A, K)."""
        assert len(predictions) == len(dims_per_anchor), (
            f"the head gave {len(predictions)} kinds of predictions, expected {len(dims_per_anchor)}"
        )
        return [[permute_to_N_HWA_K(x, K) for x in levels] for levels, K in zip(predictions, dims_per_anchor)]

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        """Updates and returns the running average in the attribute `name`, first `initial_value`."""
        average = getattr(self, name, initial_value) * momentum + value * (1 - momentum)
        setattr(self, name, average)
        return average

    def _decode_per_level_predictions(
        self,
        anchors: Boxes,
        pred_scores: torch.Tensor,
        pred_deltas: torch.Tensor,
        score_thresh: float,
        topk_candidates: int,
        image_size: tuple[int, int],
    ) -> Instances:
        """The best candidates of one level of one image, by decreasing score.

        Args:
            anchors: R boxes.
            pred_scores: (R, K) in [0, 1].
            pred_deltas: (R, 4).
            score_thresh: only scores above this are kept.
            topk_candidates: maximum number of (anchor, class) pairs to keep.
            image_size: (height, width).
        """
        candidates = (pred_scores > score_thresh).flatten().nonzero().squeeze(1)
        scores = pred_scores.flatten()[candidates]
        scores, best = scores.topk(min(topk_candidates, len(scores)))
        candidates = candidates[best]

        num_classes = pred_scores.shape[1]
        index = candidates // num_classes
        boxes = self.box2box_transform.apply_deltas(pred_deltas[index], anchors.tensor[index])
        return Instances(image_size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=candidates % num_classes)

    def inference_single_image(
        self,
        anchors: list[Boxes],
        box_cls: list[torch.Tensor],
        box_delta: list[torch.Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """Decodes the candidates of all levels and keeps the best that do not overlap within a class, by the subclass's
        `test_score_thresh`, `test_topk_candidates`, `test_nms_thresh` and `max_detections_per_image`.

        Args:
            anchors: R_i boxes on each level.
            box_cls: scores (R_i, K) on each level.
            box_delta: deltas (R_i, 4) on each level.
            image_size: (height, width).
        """
        candidates = self._decode_multi_level_predictions(
            anchors, box_cls, box_delta, self.test_score_thresh, self.test_topk_candidates, image_size
        )
        keep = batched_nms(
            candidates.pred_boxes.tensor, candidates.scores, candidates.pred_classes, self.test_nms_thresh
        )
        return candidates[keep[: self.max_detections_per_image]]

    def _decode_multi_level_predictions(
        self,
        anchors: list[Boxes],
        pred_scores: list[torch.Tensor],
        pred_deltas: list[torch.Tensor],
        score_thresh: float,
        topk_candidates: int,
        image_size: tuple[int, int],
    ) -> Instances:
        """`_decode_per_level_predictions` of every level of one image, together."""
        return Instances.cat(
            [
                self._decode_per_level_predictions(
                    level_anchors, scores, deltas, score_thresh, topk_candidates, image_size
                )
                for level_anchors, scores, deltas in zip(anchors, pred_scores, pred_deltas)
            ]
        )

    def visualize_training(self, batched_inputs: list[dict], results: list[Instances]) -> None:
        """Adds a visualization of the first image to the event storage, see `visualize_boxes`.

        Args:
            batched_inputs: the input of a training step.
            results: detections at the network's resolution, for each image.
        """
        from d2lite.data.detection_utils import convert_image_to_rgb

        assert len(batched_inputs) == len(results), "one result is needed for each image"
        x, result = batched_inputs[0], results[0]
        image = convert_image_to_rgb(x["image"].permute(1, 2, 0).cpu(), self.input_format)
        result = detector_postprocess(result, image.shape[0], image.shape[1])
        picture = visualize_boxes(image, x["instances"].gt_boxes, result.pred_boxes)
        get_event_storage().put_image(
            f"Left: ground truth; right: {MAX_VISUALIZED_BOXES} highest scoring results", picture
        )
