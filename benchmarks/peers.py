#!/usr/bin/env python
"""Speed of d2kd's detectors beside those of other libraries that pip installs, as ratios of one run.

    python benchmarks/peers.py                                    # torchvision
    pip install mayaku && python benchmarks/peers.py --only mayaku
    python benchmarks/peers.py --size 800 --batch 2 --processor-time --device cuda

The same network on both sides (R50, frozen norms, two stages frozen, FPN of 256 channels, 80 classes, the same numbers
of anchors, proposals and regions), images of the same size, and objects. Both sides live in one process and take
turns; a ratio is d2kd's time over the peer's, the median over the rounds. Weights are random, with settled norms.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from common import random_batch, timed
from torch import nn

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.engine import load_config
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

CLASSES = 80
#: anchors at a place, of a two-stage detector
RATIOS = 3
Batch = list[dict[str, Any]]


class Side(NamedTuple):
    """A detector, and how it is called."""

    model: nn.Module
    losses: Callable[[nn.Module, Batch], dict[str, torch.Tensor]]
    detect: Callable[[nn.Module, Batch], Any]


class Peer(NamedTuple):
    """A detector of another library, and the configuration of d2kd that is the same network."""

    build: Callable[[int], Side]
    config: str
    masks: bool = False
    options: tuple[Any, ...] = ()


def ours(peer: Peer, device: str) -> Side:
    """d2kd's, with the strides of the peers' bottlenecks."""
    options = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", device, "MODEL.RESNETS.STRIDE_IN_1X1", False, *peer.options]
    model = build_model(load_config(peer.config, options))
    return Side(model, lambda m, batch: m(batch), lambda m, batch: m(batch))


def _torchvision(model: nn.Module, masks: bool) -> Side:
    def images(batch: Batch) -> list[torch.Tensor]:
        device = next(model.parameters()).device
        return [x["image"].to(device, torch.float32) / 255 for x in batch]

    def losses(m: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        first = 0 if not hasattr(m, "rpn") else 1  # class 0 is the background of a two-stage detector
        truth = []
        for x in batch:
            instances = x["instances"].to(next(m.parameters()).device)
            truth.append({"boxes": instances.gt_boxes.tensor, "labels": instances.gt_classes + first})
            if masks:
                height, width = instances.image_size
                truth[-1]["masks"] = _bitmaps(instances.gt_masks.polygons, height, width).to(truth[-1]["boxes"].device)
        return m(images(batch), truth)

    return Side(model, losses, lambda m, batch: m(images(batch)))


def _bitmaps(polygons: list[list[Any]], height: int, width: int) -> torch.Tensor:
    import numpy as np
    from pycocotools import mask

    codes = [mask.merge(mask.frPyObjects([p.tolist() for p in outline], height, width)) for outline in polygons]
    return torch.from_numpy(np.stack([mask.decode(code) for code in codes]))


def _torchvision_backbone(stages: list[int], extra: nn.Module) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, trainable_layers=3, returned_layers=stages, extra_blocks=extra
    )


def torchvision_retinanet(size: int) -> Side:
    """torchvision.models.detection.RetinaNet."""
    from torchvision.models.detection import RetinaNet
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    backbone = _torchvision_backbone([2, 3, 4], LastLevelP6P7(2048, 256))
    return _torchvision(RetinaNet(backbone, CLASSES, min_size=size, max_size=size), masks=False)


def _torchvision_rcnn(size: int, masks: bool) -> Side:
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    backbone = _torchvision_backbone([1, 2, 3, 4], LastLevelMaxPool())
    counts = {"rpn_post_nms_top_n_train": 1000}
    kind = MaskRCNN if masks else FasterRCNN
    return _torchvision(kind(backbone, CLASSES + 1, min_size=size, max_size=size, **counts), masks)


def torchvision_faster_rcnn(size: int) -> Side:
    """torchvision.models.detection.FasterRCNN."""
    return _torchvision_rcnn(size, masks=False)


def torchvision_mask_rcnn(size: int) -> Side:
    """torchvision.models.detection.MaskRCNN."""
    return _torchvision_rcnn(size, masks=True)


def _mayaku_batch(batch: Batch, masks: bool) -> Batch:
    from mayaku.structures import Boxes, Instances, PolygonMasks

    converted = []
    for x in batch:
        truth = Instances(x["instances"].image_size)
        truth.gt_boxes, truth.gt_classes = Boxes(x["instances"].gt_boxes.tensor), x["instances"].gt_classes
        if masks:
            truth.gt_masks = PolygonMasks(x["instances"].gt_masks.polygons)
        converted.append({**{k: x[k] for k in ("image", "height", "width")}, "instances": truth})
    return converted


def _mayaku(masks: bool) -> Side:
    from mayaku.config import schemas
    from mayaku.models.detectors import build_faster_rcnn, build_mask_rcnn

    kind = {"meta_architecture": "mask_rcnn", "mask_on": True, "roi_mask_head": schemas.ROIMaskHeadConfig()}
    config = schemas.MayakuConfig(
        model=schemas.ModelConfig(device="cpu", **(kind if masks else {})),
        test=schemas.TestConfig(detections_per_image=100),
        auto_config=schemas.AutoConfig(enabled=False),
    )
    model = (build_mask_rcnn if masks else build_faster_rcnn)(config)
    return Side(model, lambda m, b: m(_mayaku_batch(b, masks)), lambda m, b: m(_mayaku_batch(b, masks)))


#: torchvision takes four samples a cell of a region, Detectron2 and mayaku one a pixel
_SAMPLES = ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2, "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 2)
PEERS = {
    "torchvision_retinanet": Peer(torchvision_retinanet, "configs/COCO/retinanet_R50_1x.yaml"),
    "torchvision_faster_rcnn": Peer(torchvision_faster_rcnn, "configs/COCO/faster_rcnn_R50_1x.yaml", options=_SAMPLES),
    "torchvision_mask_rcnn": Peer(
        torchvision_mask_rcnn, "configs/COCO/mask_rcnn_R50_1x.yaml", masks=True, options=_SAMPLES
    ),
    "mayaku_faster_rcnn": Peer(lambda _: _mayaku(masks=False), "configs/COCO/faster_rcnn_R50_1x.yaml"),
    "mayaku_mask_rcnn": Peer(lambda _: _mayaku(masks=True), "configs/COCO/mask_rcnn_R50_1x.yaml", masks=True),
}


@torch.no_grad()
def settle(side: Side, batch: Batch) -> None:
    """Gives norms the statistics of a batch, whatever library they are of; see `common.settle_norms`."""

    def hook(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3))

    norms = [module for module in side.model.modules() if getattr(module, "running_var", None) is not None]
    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    side.detect(side.model.eval(), batch)
    for handle in handles:
        handle.remove()


def find_the_same(model: nn.Module) -> None:
    """Lets a two-stage detector propose anchors, and give each region the class 1.

    So both sides have regions of similar sizes, and as many detections; what random heads find would differ.
    """
    for name, layer in model.named_modules():
        if "rpn" in name.lower() or "proposal_generator" in name:
            if isinstance(layer, nn.Conv2d) and layer.out_channels == 4 * RATIOS:
                nn.init.zeros_(layer.weight)
        elif isinstance(layer, nn.Linear) and layer.out_features == CLASSES + 1:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            layer.bias.data[1] = math.log(CLASSES)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both sides, and the ratio, in training and inference."""
    peer = PEERS[name]
    torch.manual_seed(0)
    batch = random_batch(args.size, args.batch, CLASSES, peer.masks)
    sides = {"d2kd": ours(peer, args.device), "peer": peer.build(args.size)}
    clock = time.process_time if args.processor_time else time.perf_counter
    result: dict[str, Any] = {"peer": name, "device": args.device, "size": args.size, "batch": args.batch}
    calls: dict[str, dict[str, Callable[[], Any]]] = {"train": {}, "inference": {}}
    for label, side in sides.items():
        side.model.to(args.device)
        settle(side, batch)
        find_the_same(side.model)
        result[f"{label}_detections"] = detections(side.detect(side.model.eval(), batch))
        calls["train"][label], calls["inference"][label] = training(side, batch), inference(side, batch)
        result[f"{label}_trained_millions"] = round(
            sum(p.numel() for p in side.model.parameters() if p.requires_grad) / 1e6, 2
        )
    with EventStorage():
        for mode, of_mode in calls.items():
            rounds = []
            for number in range(args.repeats + 1):
                labels = list(of_mode)[:: -1 if number % 2 else 1]
                rounds.append({label: timed(of_mode[label], args.device, clock) for label in labels})
            seconds = {label: round(statistics.median(r[label] for r in rounds[1:]), 4) for label in of_mode}
            ratio = statistics.median(r["d2kd"] / r["peer"] for r in rounds[1:])
            result[mode] = {**seconds, "ratio": round(ratio, 3)}
    return result


def detections(outputs: list[dict[str, Any]]) -> int:
    """How many there are, in the formats of all three libraries."""
    return sum(len(x["instances"] if "instances" in x else x["boxes"]) for x in outputs)


def training(side: Side, batch: Batch) -> Callable[[], None]:
    """A step that leaves the weights as they are."""
    optimizer = torch.optim.SGD([p for p in side.model.parameters() if p.requires_grad], lr=0.0)

    def step() -> None:
        side.model.train()
        optimizer.zero_grad()
        sum(side.losses(side.model, batch).values()).backward()
        optimizer.step()

    return step


def inference(side: Side, batch: Batch) -> Callable[[], None]:
    """Detections of a batch."""

    @torch.no_grad()
    def call() -> None:
        side.detect(side.model.eval(), batch)

    return call


def main() -> None:
    """Writes one JSON line a peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="torchvision", help="peers whose name contains this")
    parser.add_argument("--size", type=int, default=512, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processor-time", action="store_true", help="by the processor's clock: on a busy machine")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    for name in (n for n in PEERS if args.only in n):
        sys.stdout.write(json.dumps(measure(name, args)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
