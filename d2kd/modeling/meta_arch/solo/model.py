"""META_ARCHITECTURE "SOLO" (arXiv 1912.04488): instance masks without boxes, from every cell of a grid."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.config import config_check, declare_keys
from d2kd.detectron2_keys import NORMS
from d2kd.errors import ConfigError
from d2kd.layers import mean_over_processes, upcast_half
from d2kd.settings import Rule, setting
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks
from detectron2.utils import comm

from ..levels import levels_of
from .decoding import NMS, Masks, Sizes, Thresholds, detect, point_nms
from .head import BaseSOLOHead, DecoupledSOLOHead, MaskMaps, SOLOHead, head_strides
from .losses import COUNT_EPS, dice_losses, focal_loss_sum
from .targets import Level, LevelTargets, Truth, assign_targets

HEADS = {"plain": SOLOHead, "decoupled": DecoupledSOLOHead}

_LEVELS = Rule("must name three levels or more", lambda names: len(names) >= 3)


class SOLO(nn.Module):
    """Segments instances by their place: an instance is the class and the mask of the cell that its center lies in.

    Attributes:
        backbone: gives a pyramid.
        head: see `BaseSOLOHead`.
        head_in_features: the levels that the head takes, finest first.
        levels: grid, scales and stride of each.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: BaseSOLOHead,
        head_in_features: Sequence[str],
        num_classes: int,
        scale_ranges: Sequence[tuple[float, float]],
        center_scale: float = 0.2,
        mask_loss_weight: float = 3.0,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        thresholds: Thresholds = Thresholds(),
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """
        Args:
            backbone: gives the levels.
            head: plain or decoupled.
            head_in_features: levels, finest first, three or more.
            num_classes: without background.
            scale_ranges: for each level, the root of the area of boxes that it learns, in pixels.
            center_scale: side of the center region as a share of that of the box.
            mask_loss_weight: factor on the Dice loss.
            focal_loss_alpha, focal_loss_gamma: of the focal loss.
            thresholds: what becomes a detection.
            pixel_mean, pixel_std: of the channels of an image.
        """
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.head_in_features = list(head_in_features)
        shapes = backbone.output_shape()
        strides = head_strides([shapes[name].stride for name in self.head_in_features])
        self.levels = [
            Level(grid, (low, high), stride) for grid, (low, high), stride in zip(head.grids, scale_ranges, strides)
        ]
        self.num_classes = num_classes
        self.center_scale = center_scale
        self.mask_loss_weight = mask_loss_weight
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.thresholds = thresholds
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments from the configuration.

        Raises:
            ConfigError: `MODEL.SOLO.IN_FEATURES` names what the backbone does not give.
        """
        node, backbone = cfg.MODEL.SOLO, build_backbone(cfg)
        levels = levels_of(backbone, "MODEL.SOLO.IN_FEATURES", node.IN_FEATURES)
        head = HEADS[node.HEAD](
            in_channels=levels[0].channels,
            num_classes=node.NUM_CLASSES,
            grids=node.NUM_GRIDS,
            num_convs=node.NUM_CONVS,
            conv_dim=node.CONV_DIM,
            norm=node.NORM,
            prior_prob=node.PRIOR_PROB,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "scale_ranges": node.SCALE_RANGES,
            "center_scale": node.CENTER_SCALE,
            "mask_loss_weight": node.MASK_LOSS_WEIGHT,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "thresholds": Thresholds(
                score=node.SCORE_THRESH_TEST,
                mask=node.MASK_THRESH_TEST,
                nms=node.NMS,
                sigma=node.NMS_SIGMA,
                overlap=node.NMS_THRESH_TEST,
                candidates=node.TOPK_CANDIDATES_TEST,
                final_score=node.FINAL_SCORE_THRESH_TEST,
                limit=cfg.TEST.DETECTIONS_PER_IMAGE,
            ),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: one dict an image: "image" (3, H, W), in training "instances" (with `gt_boxes`,
                `gt_classes` and, unless there are none, `gt_masks`), and optionally "height" and "width" of the output.

        Returns:
            In training {"loss_mask", "loss_cls"}, else for each image {"instances": see `detect`}, those that have a
            pixel.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        logits, maps = self.head([features[name] for name in self.head_in_features])
        extent = (images.tensor.shape[-2], images.tensor.shape[-1])
        if self.training:
            truths = [self._truth(x, extent) for x in batched_inputs]
            return self.losses(logits, maps, truths)
        return self._detections(logits, maps, batched_inputs, images)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalizes, pads and batches the images."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        normalized = [(image - self.pixel_mean) / self.pixel_std for image in images]
        # masks are predicted at fractions of the stride: all levels must divide the image
        divisor = max(self.backbone.size_divisibility, *(level.stride for level in self.levels))
        return ImageList.from_tensors(normalized, divisor, padding_constraints=self.backbone.padding_constraints)

    def losses(self, logits: Sequence[Tensor], maps: Sequence[MaskMaps], truths: Sequence[Truth]) -> dict[str, Tensor]:
        """Returns "loss_mask", the mean over all cells with an instance, and "loss_cls", divided by their number + 1.

        Both are over the images of all processes. Without instances they are 0 and the loss of background, connected
        to all parameters.

        Args:
            logits, maps: what the head gives, of each level.
            truths: of each image.
        """
        sizes = [self.head.mask_size(x) for x in maps]
        targets = [assign_targets(t, self.levels, sizes, self.num_classes, self.center_scale) for t in truths]
        dice, focal = [], []
        for level, of_images in enumerate(zip(*targets)):
            dice += [self._dice(level, maps[level], image, target) for image, target in enumerate(of_images)]
            classes = torch.stack([target.classes for target in of_images])
            focal.append(focal_loss_sum(logits[level], classes, self.focal_loss_alpha, self.focal_loss_gamma))
        found = torch.cat(dice)
        processes = comm.get_world_size()
        cells = processes * mean_over_processes(found.new_tensor(float(len(found))))
        return {
            # gradients are averaged over processes: this is what one process with all images would have
            "loss_mask": self.mask_loss_weight * found.sum() * processes / cells.clamp(min=1),
            "loss_cls": torch.stack(focal).sum() * processes / (cells + 1 + COUNT_EPS),
        }

    def _dice(self, level: int, maps: MaskMaps, image: int, target: LevelTargets) -> Tensor:
        return dice_losses(self.head.cell_masks(level, maps, image, target.cells), target.masks)

    def _truth(self, x: dict[str, Any], extent: tuple[int, int]) -> Truth:
        """The instances of an image, with masks of the size of the batch.

        Raises:
            ConfigError: they have no masks, or a class that the model lacks.
        """
        instances: Instances = x["instances"]
        highest = int(instances.gt_classes.max()) if len(instances) else 0
        if highest >= self.num_classes:
            raise ConfigError(
                f"An instance of {x.get('file_name', 'an image')} has the class {highest}, and MODEL.SOLO.NUM_CLASSES "
                f"is {self.num_classes}: classes are counted from 0."
            )
        masks = torch.zeros(len(instances), *extent, dtype=torch.bool, device=self.device)
        if len(instances):
            bitmaps = _bitmaps(instances, x.get("file_name", "an image")).to(self.device, non_blocking=True)
            masks[:, : bitmaps.shape[1], : bitmaps.shape[2]] = bitmaps
        classes, boxes = instances.gt_classes, instances.gt_boxes.tensor
        classes, boxes = (x.to(self.device, non_blocking=True) for x in (classes, boxes))
        return Truth(classes, boxes, masks)

    def _detections(
        self,
        logits: Sequence[Tensor],
        maps: Sequence[MaskMaps],
        batched_inputs: list[dict[str, Any]],
        images: ImageList,
    ) -> list[dict[str, Instances]]:
        with torch.no_grad():
            scores = [point_nms(upcast_half(x).sigmoid()) for x in logits]
        size = self.head.mask_size(maps[0])
        strides = [level.stride for level in self.levels]
        found = []
        for i, (x, (height, width)) in enumerate(zip(batched_inputs, images.image_sizes)):
            sizes = Sizes(size, (height, width), (int(x.get("height", height)), int(x.get("width", width))))
            of_image = [level[i] for level in scores]
            masks = Masks(self.head, maps, i, size)
            instances = detect(of_image, masks, strides, sizes, self.thresholds)
            visible = instances.pred_boxes.nonempty()
            # indexing copies all masks
            found.append({"instances": instances if bool(visible.all()) else instances[visible]})
        return found


def _bitmaps(instances: Instances, where: str) -> Tensor:
    """Masks (M, H, W) bool of instances, whatever INPUT.MASK_FORMAT made of them."""
    if not instances.has("gt_masks"):
        raise ConfigError(
            f"SOLO learns masks, and the instances of {where} have none: set MODEL.MASK_ON True, and take a dataset "
            "with segmentations."
        )
    masks: Any = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return getattr(masks, "tensor", masks).bool()


_ASCENDING_PAIRS = Rule(
    "must be pairs of an upper end not below the lower one",
    lambda ranges: all(isinstance(r, list) and len(r) == 2 and r[0] <= r[1] for r in ranges),
)

declare_keys(  # META_ARCHITECTURE "SOLO", with BACKBONE.NAME "build_resnet_fpn_backbone"; MODEL.MASK_ON must be True
    "MODEL.SOLO",
    NUM_CLASSES=setting(80, "Classes.", at_least=1),
    IN_FEATURES=setting(
        ["p2", "p3", "p4", "p5", "p6"],
        "Levels of the pyramid that the head takes, finest first. It halves the first one, and enlarges the last one "
        "to the size of that before it.",
        rule=_LEVELS,
    ),
    HEAD=setting(
        "plain",
        "plain: a mask channel for every cell | decoupled: one for every row and column, whose products are the masks.",
        choices=tuple(HEADS),
    ),
    NUM_GRIDS=setting([40, 36, 24, 16, 12], "Cells along a side, of every level.", at_least=1, at_most=1000),
    SCALE_RANGES=setting(
        [[1.0, 96.0], [48.0, 192.0], [96.0, 384.0], [192.0, 768.0], [384.0, 2048.0]],
        "Instances that a level learns: least and largest root of the area of the box, in pixels of the input.",
        items=float,
        at_least=0,
        rule=_ASCENDING_PAIRS,
    ),
    CENTER_SCALE=setting(
        0.2,
        "Side of the region around its center whose cells learn an instance, as a share of that of its box.",
        at_least=0,
        at_most=1,
    ),
    NUM_CONVS=setting(7, "Convolutions in each branch of the head.", at_least=0),
    CONV_DIM=setting(256, "Their channels.", at_least=1),
    NORM=setting("GN", "Normalization in the head.", choices=NORMS),
    PRIOR_PROB=setting(0.01, "What the untrained head gives to every class and pixel.", above=0, below=1),
    MASK_LOSS_WEIGHT=setting(3.0, "Factor on the Dice loss of the masks.", at_least=0),
    FOCAL_LOSS_ALPHA=setting(
        0.25, "Weight of objects against background in the loss; -1 weighs both alike.", at_least=-1, at_most=1
    ),
    FOCAL_LOSS_GAMMA=setting(2.0, "How little what is right already counts in the loss.", at_least=0, at_most=100),
    SCORE_THRESH_TEST=setting(
        0.1, "Least score of a class for a cell to enter NMS; negative admits all.", at_least=-1, below=1
    ),
    MASK_THRESH_TEST=setting(0.5, "Least probability of a pixel of a mask.", above=0, below=1),
    TOPK_CANDIDATES_TEST=setting(500, "Masks of an image that enter NMS.", at_least=1),
    NMS=setting(
        "gaussian",
        "How scores of duplicates are lowered: matrix NMS, gaussian or linear | mask: duplicates are removed.",
        choices=NMS,
    ),
    NMS_SIGMA=setting(2.0, "How much gaussian matrix NMS lowers scores.", above=0, at_most=1000),
    NMS_THRESH_TEST=setting(0.5, "Overlap that suppresses the weaker of two masks, for NMS mask.", above=0, at_most=1),
    FINAL_SCORE_THRESH_TEST=setting(
        0.05,
        "Least score after NMS, which is class times mean probability of the mask; 0 admits all.",
        at_least=0,
        below=1,
    ),
)


@config_check
def check_solo(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: lists of different lengths, a width that the norm cannot have, or no masks.
    """
    if cfg.MODEL.META_ARCHITECTURE != "SOLO":
        return
    node = cfg.MODEL.SOLO
    for key in ("NUM_GRIDS", "SCALE_RANGES"):
        if len(node[key]) != len(node.IN_FEATURES):
            raise ConfigError(
                f"MODEL.SOLO.{key} has {len(node[key])} entries for {len(node.IN_FEATURES)} levels "
                "(MODEL.SOLO.IN_FEATURES); it must have one for each."
            )
    if node.NORM == "GN" and node.NUM_CONVS and node.CONV_DIM % 32:
        raise ConfigError(f"MODEL.SOLO.CONV_DIM is {node.CONV_DIM}; it must be a multiple of 32 with NORM GN.")
    if not cfg.MODEL.MASK_ON:
        raise ConfigError("MODEL.MASK_ON is False, and SOLO learns masks: set it True.")
    if cfg.MODEL.KEYPOINT_ON:
        raise ConfigError("MODEL.KEYPOINT_ON is True, and SOLO has no such head: set it False.")


if "SOLO" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(SOLO)
