"""Classification and box regression of regions (Fast R-CNN, arXiv 1504.08083)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2lite.config import CfgNode, configurable
from d2lite.layers import ShapeSpec, cross_entropy
from d2lite.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from d2lite.modeling.roi_heads.box_inference import fast_rcnn_inference, fast_rcnn_inference_single_image
from d2lite.structures import Instances
from d2lite.utils.events import get_event_storage

__all__ = ["FastRCNNOutputLayers", "fast_rcnn_inference", "fast_rcnn_inference_single_image"]


class FastRCNNOutputLayers(nn.Module):
    """Two linear layers on the feature vector of a region: scores of the classes, and box deltas."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec | int,
        *,
        box2box_transform: Box2BoxTransform,
        num_classes: int,
        test_score_thresh: float = 0.0,
        test_nms_thresh: float = 0.5,
        test_topk_per_image: int = 100,
        cls_agnostic_bbox_reg: bool = False,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        loss_weight: float | dict[str, float] = 1.0,
        use_fed_loss: bool = False,
        use_sigmoid_ce: bool = False,
        get_fed_loss_cls_weights: Callable[[], Tensor] | None = None,
        fed_loss_num_classes: int = 50,
    ) -> None:
        """
        Args:
            input_shape: of the features, or their number.
            box2box_transform: how deltas encode boxes relative to proposals.
            num_classes: foreground classes, K.
            test_score_thresh, test_nms_thresh, test_topk_per_image: see `fast_rcnn_inference`.
            cls_agnostic_bbox_reg: one box for all classes instead of one per class.
            box_reg_loss_type: "smooth_l1" (L1 for a `smooth_l1_beta` of 0), "giou", "diou" or "ciou".
            loss_weight: one factor for both losses, or one per name ("loss_cls", "loss_box_reg").
            use_fed_loss: use only a sample of the classes in the classification loss (federated loss,
                arXiv 2103.07461); needs `use_sigmoid_ce`.
            use_sigmoid_ce: K independent binary classifications instead of a softmax over K + 1 classes.
            get_fed_loss_cls_weights: returns the weights (K,) by which the federated loss samples classes.
            fed_loss_num_classes: minimum number of classes that the federated loss uses per batch.
        """
        super().__init__()
        if isinstance(input_shape, int):
            input_shape = ShapeSpec(channels=input_shape)
        input_size = input_shape.channels * (input_shape.width or 1) * (input_shape.height or 1)
        self.num_classes = num_classes
        num_boxes = 1 if cls_agnostic_bbox_reg else num_classes
        self.cls_score = nn.Linear(input_size, num_classes + 1)
        self.bbox_pred = nn.Linear(input_size, num_boxes * len(box2box_transform.weights))
        _init_output_layer(self.cls_score, std=0.01)
        _init_output_layer(self.bbox_pred, std=0.001)
        if use_sigmoid_ce:
            # every class starts at a probability of 1 %, as in RetinaNet (arXiv 1708.02002, section 3.3)
            nn.init.constant_(self.cls_score.bias, -math.log((1 - 0.01) / 0.01))
        self.box2box_transform = box2box_transform
        self.smooth_l1_beta = smooth_l1_beta
        self.test_score_thresh = test_score_thresh
        self.test_nms_thresh = test_nms_thresh
        self.test_topk_per_image = test_topk_per_image
        self.box_reg_loss_type = box_reg_loss_type
        if not isinstance(loss_weight, dict):
            loss_weight = {"loss_cls": loss_weight, "loss_box_reg": loss_weight}
        self.loss_weight = loss_weight
        self.use_fed_loss = use_fed_loss
        self.use_sigmoid_ce = use_sigmoid_ce
        self.fed_loss_num_classes = fed_loss_num_classes
        if use_fed_loss:
            self.register_buffer("fed_loss_cls_weights", self._fed_loss_weights(get_fed_loss_cls_weights))

    def _fed_loss_weights(self, get_weights: Callable[[], Tensor] | None) -> Tensor:
        if not self.use_sigmoid_ce:
            raise ValueError("MODEL.ROI_BOX_HEAD.USE_FED_LOSS needs MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE")
        if get_weights is None:
            raise ValueError("The federated loss needs `get_fed_loss_cls_weights`")
        weights = get_weights()
        if len(weights) != self.num_classes:
            raise ValueError(
                f"The federated loss has weights of {len(weights)} classes for {self.num_classes} classes"
                " (MODEL.ROI_HEADS.NUM_CLASSES)"
            )
        return weights

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Constructor arguments from MODEL.ROI_BOX_HEAD and MODEL.ROI_HEADS."""
        head, heads = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS
        return {
            "input_shape": input_shape,
            "box2box_transform": Box2BoxTransform(weights=head.BBOX_REG_WEIGHTS),
            "num_classes": heads.NUM_CLASSES,
            "cls_agnostic_bbox_reg": head.CLS_AGNOSTIC_BBOX_REG,
            "smooth_l1_beta": head.SMOOTH_L1_BETA,
            "test_score_thresh": heads.SCORE_THRESH_TEST,
            "test_nms_thresh": heads.NMS_THRESH_TEST,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "box_reg_loss_type": head.BBOX_REG_LOSS_TYPE,
            "loss_weight": {"loss_box_reg": head.BBOX_REG_LOSS_WEIGHT},
            "use_fed_loss": head.USE_FED_LOSS,
            "use_sigmoid_ce": head.USE_SIGMOID_CE,
            "get_fed_loss_cls_weights": lambda: _class_frequency_weights(
                cfg.DATASETS.TRAIN, head.FED_LOSS_FREQ_WEIGHT_POWER
            ),
            "fed_loss_num_classes": head.FED_LOSS_NUM_CLASSES,
        }

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: features (R, ...) of R regions.

        Returns:
            Logits (R, K + 1), the background last, and deltas (R, 4 * K) or (R, 4).
        """
        x = x.flatten(1)
        return self.cls_score(x), self.bbox_pred(x)

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        """
        Args:
            predictions: what `forward` returned for all proposals.
            proposals: with `proposal_boxes`, `gt_classes`, and `gt_boxes` where there is ground truth.

        Returns:
            "loss_cls" and "loss_box_reg".
        """
        scores, deltas = predictions
        if proposals:
            gt_classes = torch.cat([p.gt_classes for p in proposals])
            boxes = torch.cat([p.proposal_boxes.tensor for p in proposals]).detach()
            # images without ground truth have background only, whose box is never read
            gt_boxes = torch.cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals])
        else:
            gt_classes = torch.empty(0, dtype=torch.int64, device=scores.device)
            boxes = gt_boxes = torch.empty(0, 4, device=scores.device)
        _log_classification_stats(scores, gt_classes)
        classify = self.sigmoid_cross_entropy_loss if self.use_sigmoid_ce else cross_entropy
        losses = {
            "loss_cls": classify(scores, gt_classes),
            "loss_box_reg": self.box_reg_loss(boxes, gt_boxes, deltas, gt_classes),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def box_reg_loss(self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor) -> Tensor:
        """Regression loss of the foreground, summed and divided by the number of all regions R. So every
        foreground region weighs the same, however many there are in its image.

        Args:
            proposal_boxes, gt_boxes: (R, 4).
            pred_deltas: (R, 4) or (R, 4 * K).
            gt_classes: (R,) in [0, K], where K is the background.
        """
        foreground = ((gt_classes >= 0) & (gt_classes < self.num_classes)).nonzero().squeeze(1)
        box_dim = proposal_boxes.shape[1]
        if pred_deltas.shape[1] == box_dim:
            deltas = pred_deltas[foreground]
        else:
            deltas = pred_deltas.unflatten(1, (-1, box_dim))[foreground, gt_classes[foreground]]
        loss = _dense_box_regression_loss(
            [proposal_boxes[foreground]],
            self.box2box_transform,
            [deltas[None]],
            [gt_boxes[foreground]],
            torch.ones_like(foreground, dtype=torch.bool)[None],
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        return loss / max(gt_classes.numel(), 1.0)

    def sigmoid_cross_entropy_loss(self, pred_class_logits: Tensor, gt_classes: Tensor) -> Tensor:
        """Binary cross entropy summed over the classes, and averaged over the regions.

        Args:
            pred_class_logits: (R, K + 1); the last column, the background, is not used.
            gt_classes: (R,) in [0, K].
        """
        if gt_classes.numel() == 0:
            return pred_class_logits.sum() * 0
        num_classes = pred_class_logits.shape[1] - 1
        target = F.one_hot(gt_classes, num_classes + 1)[:, :num_classes].to(pred_class_logits.dtype)
        loss = F.binary_cross_entropy_with_logits(pred_class_logits[:, :num_classes], target, reduction="none")
        if self.use_fed_loss:
            counted = self.get_fed_loss_classes(
                gt_classes, self.fed_loss_num_classes, num_classes, self.fed_loss_cls_weights
            )
            loss = loss[:, counted[counted < num_classes]]
        return loss.sum() / len(gt_classes)

    def get_fed_loss_classes(
        self, gt_classes: Tensor, num_fed_loss_classes: int, num_classes: int, weight: Tensor
    ) -> Tensor:
        """The classes that the federated loss uses: all that occur, and samples of the others.

        Args:
            gt_classes: (R,) in [0, num_classes].
            num_fed_loss_classes: minimum number of classes.
            num_classes: K.
            weight: (K,) sampling weight of each class.

        Returns:
            (S,) distinct classes; the background is among them if it occurs.
        """
        present = gt_classes.unique()
        missing = num_fed_loss_classes - len(present)
        if missing <= 0:
            return present
        chance = F.pad(weight.to(gt_classes.device, torch.float32), (0, 1)).index_fill(0, present, 0)
        return torch.cat([present, torch.multinomial(chance, missing, replacement=False)])

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Returns the results of `fast_rcnn_inference` for the `predictions` of `forward`."""
        return fast_rcnn_inference(
            self.predict_boxes(predictions, proposals),
            self.predict_probs(predictions, proposals),
            [x.image_size for x in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )

    def predict_boxes_for_gt_classes(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> list[Tensor]:
        """The boxes (R_i, 4) predicted for the true class of each region (any class, for the background)."""
        if not proposals:
            return []
        boxes = torch.cat(self.predict_boxes(predictions, proposals))
        if boxes.shape[1] > 4:
            boxes = boxes.unflatten(1, (-1, 4))
            classes = torch.cat([p.gt_classes for p in proposals]).clamp(0, boxes.shape[1] - 1)
            boxes = boxes[torch.arange(len(boxes), device=boxes.device), classes]
        return list(boxes.split([len(p) for p in proposals]))

    def predict_boxes(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[Tensor, ...] | list[Tensor]:
        """The boxes (R_i, 4 * K) or (R_i, 4) predicted for each region, one tensor per image."""
        if not proposals:
            return []
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        decoded = self.box2box_transform.apply_deltas(predictions[1], boxes)
        return decoded.split([len(p) for p in proposals])

    def predict_probs(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[Tensor, ...] | list[Tensor]:
        """The probabilities (R_i, K + 1) of the classes of each region, one tensor per image."""
        scores = predictions[0]
        probs = scores.sigmoid() if self.use_sigmoid_ce else scores.softmax(dim=-1)
        return probs.split([len(p) for p in proposals])


def _init_output_layer(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)


def _class_frequency_weights(dataset_names: list[str], power: float) -> Tensor:
    """Number of training images with each class, to the given power: (K,), from the datasets' metadata."""
    from d2lite.data import MetadataCatalog  # only this rarely used loss needs the data package

    counts = [getattr(MetadataCatalog.get(name), "class_image_count", None) for name in dataset_names]
    if not counts or counts[0] is None or any(c != counts[0] for c in counts[1:]):
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS needs the metadata `class_image_count`, a list of"
            " {'id', 'image_count'}, the same for all of DATASETS.TRAIN"
            f" {list(dataset_names)}"
        )
    ordered = sorted(counts[0], key=lambda entry: entry["id"])
    return torch.tensor([entry["image_count"] for entry in ordered], dtype=torch.float32) ** power


def _log_classification_stats(pred_logits: Tensor, gt_classes: Tensor, prefix: str = "fast_rcnn") -> None:
    """Logs the accuracy over all regions, and over the foreground, and the part of it taken for background."""
    total = gt_classes.numel()
    if total == 0:
        return
    background = pred_logits.shape[1] - 1
    predicted = pred_logits.argmax(dim=1)
    foreground = (gt_classes >= 0) & (gt_classes < background)
    right = predicted == gt_classes
    masks = [foreground, right, foreground & right, foreground & (predicted == background)]
    num_fg, num_right, fg_right, fg_missed = torch.stack(masks).sum(dim=1).tolist()
    storage = get_event_storage()
    storage.put_scalar(f"{prefix}/cls_accuracy", num_right / total)
    if num_fg > 0:
        storage.put_scalar(f"{prefix}/fg_cls_accuracy", fg_right / num_fg)
        storage.put_scalar(f"{prefix}/false_negative", fg_missed / num_fg)
