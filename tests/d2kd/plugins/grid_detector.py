"""A dense detector of a stranger: a META_ARCH that derives from no other, with layers of its own names."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.config import config_keys
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances


@config_keys
def add_grid_detector_keys(cfg: CfgNode) -> None:
    """Adds MODEL.GRID_DETECTOR."""
    node = cfg.MODEL.GRID_DETECTOR = CfgNode()
    node.NUM_CLASSES = 10
    node.LEVELS = ["p3", "p4"]


@META_ARCH_REGISTRY.register()
class GridDetector(nn.Module):
    """Each cell inside an object scores its class, and tells how far its sides are, in strides."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        node = cfg.MODEL.GRID_DETECTOR
        self.backbone = build_backbone(cfg, ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)))
        self.levels = list(node.LEVELS)
        shapes = [self.backbone.output_shape()[level] for level in self.levels]
        self.strides = [shape.stride for shape in shapes]
        self.class_layer = nn.Conv2d(shapes[0].channels, node.NUM_CLASSES, kernel_size=3, padding=1)
        self.side_layer = nn.Conv2d(shapes[0].channels, 4, kernel_size=3, padding=1)
        nn.init.constant_(self.class_layer.bias, -4.0)
        self.usual_positives = 10.0
        self.register_buffer("mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1), False)
        self.register_buffer("deviation", torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1), False)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, else detections, in Detectron2's format."""
        pixels = [(x["image"].to(self.mean.device) - self.mean) / self.deviation for x in batched_inputs]
        images = ImageList.from_tensors(pixels, self.backbone.size_divisibility)
        features = self.backbone(images.tensor)
        scores = [self.class_layer(features[level]) for level in self.levels]
        sides = [F.softplus(self.side_layer(features[level])) for level in self.levels]
        if self.training:
            return self.losses(scores, sides, [x["instances"].to(self.mean.device) for x in batched_inputs])
        return [
            {"instances": detector_postprocess(self.detections(i, scores, sides, size), x["height"], x["width"])}
            for i, (x, size) in enumerate(zip(batched_inputs, images.image_sizes))
        ]

    def losses(self, scores: list[Tensor], sides: list[Tensor], truth: list[Instances]) -> dict[str, Tensor]:
        """Binary cross entropy of all cells, L1 of those inside an object, over the usual number of these."""
        class_loss = side_loss = scores[0].sum() * 0
        positives = 0
        for score, side, stride in zip(scores, sides, self.strides):
            target = torch.zeros_like(score)
            for i, objects in enumerate(truth):
                for (x0, y0, x1, y1), kind in zip((objects.gt_boxes.tensor / stride).tolist(), objects.gt_classes):
                    x, y = int((x0 + x1) / 2), int((y0 + y1) / 2)
                    if not (0 <= x < score.shape[3] and 0 <= y < score.shape[2]):
                        continue
                    target[i, kind, y, x] = 1
                    want = side.new_tensor([x + 0.5 - x0, y + 0.5 - y0, x1 - x - 0.5, y1 - y - 0.5])
                    side_loss = side_loss + F.l1_loss(side[i, :, y, x], want)
                    positives += 1
            class_loss = class_loss + F.binary_cross_entropy_with_logits(score, target, reduction="sum")
        self.usual_positives = 0.9 * self.usual_positives + 0.1 * max(1, positives)
        return {"loss_class": class_loss / self.usual_positives, "loss_side": side_loss / self.usual_positives}

    def detections(self, image: int, scores: list[Tensor], sides: list[Tensor], size: tuple[int, int]) -> Instances:
        """The twenty best cells of an image."""
        boxes, values, kinds = [], [], []
        for score, side, stride in zip(scores, sides, self.strides):
            value, kind = score[image].sigmoid().max(0)
            y, x = torch.meshgrid(*(torch.arange(n, device=value.device) + 0.5 for n in value.shape), indexing="ij")
            left, top, right, bottom = side[image]
            boxes.append(stride * torch.stack([x - left, y - top, x + right, y + bottom], -1).flatten(0, 1))
            values.append(value.flatten())
            kinds.append(kind.flatten())
        found = Instances(
            size, pred_boxes=Boxes(torch.cat(boxes)), scores=torch.cat(values), pred_classes=torch.cat(kinds)
        )
        return found[batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, 0.5)[:20]]
