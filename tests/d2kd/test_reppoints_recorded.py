"""RepPoints reproduces values recorded from the official implementation: head, boxes, assigners, neck, backbone."""

import re
from typing import Any

import pytest
import torch
from recorded_mm import TOLERANCES, assert_close, assert_gradients, below, read
from torch import Tensor, nn

from d2kd.modeling.backbone.reppoints_fpn import NormedFPN, StridedLevels
from d2kd.modeling.meta_arch.reppoints import (
    MomentTransform,
    RepPoints,
    RepPointsHead,
    assign_by_distance,
    assign_by_overlap,
    build_transform,
)
from d2kd.modeling.meta_arch.reppoints.points import Locations, as_points, flatten_levels, locations_of, place
from d2kd.modeling.padding import Padding
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import DeformBottleneckBlock
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

#: Recorded names of parameters, as patterns, and ours.
HEAD_NAMES = {
    r"moment_transfer": r"point_transform.log_scale",
    r"cls_convs\.(\d+)\.conv\.": r"head.cls_subnet.\1.",
    r"cls_convs\.(\d+)\.gn\.": r"head.cls_subnet.\1.norm.",
    r"reg_convs\.(\d+)\.conv\.": r"head.point_subnet.\1.",
    r"reg_convs\.(\d+)\.gn\.": r"head.point_subnet.\1.norm.",
    r"reppoints_pts_init_conv\.": r"head.initial_conv.",
    r"reppoints_pts_init_out\.": r"head.initial_points.",
    r"reppoints_cls_conv\.": r"head.cls_conv.",
    r"reppoints_cls_out\.": r"head.cls_score.",
    r"reppoints_pts_refine_conv\.": r"head.refined_conv.",
    r"reppoints_pts_refine_out\.": r"head.refined_points.",
}
NECK_NAMES = {
    rf"{recorded}\.{part}": ours + suffix
    for number in range(5)
    for recorded, ours in (
        (rf"lateral_convs\.{number}", f"fpn_lateral{number + 3}"),
        (rf"fpn_convs\.{number}", f"fpn_output{number + 3}" if number < 3 else f"top_block.p{number + 3}"),
    )
    for part, suffix in ((r"conv\.", "."), (r"gn\.", ".norm."))
}
BLOCK_NAMES = {
    r"conv2\.conv_offset\.": "conv2_offset.",
    r"bn(\d)\.": r"conv\1.norm.",
    r"downsample\.0\.": "shortcut.",
    r"downsample\.1\.": "shortcut.norm.",
}
TYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def renamed(name: str, table: dict[str, str]) -> str:
    for pattern, ours in table.items():
        name, count = re.subn(f"^{pattern}", ours, name)
        if count:
            return name
    return name


class Recorded(Backbone):
    """Gives the recorded features, whatever the image."""

    size_divisibility = 32

    def __init__(self, features: dict[str, Tensor], strides: list[int]) -> None:
        super().__init__()
        self.features = features
        self._out_features = list(features)
        self._out_feature_strides = dict(zip(features, strides))
        self._out_feature_channels = {name: x.shape[1] for name, x in features.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.features


class Case:
    """A recorded head in a model of ours."""

    def __init__(self, data_dir: Any, name: str, dtype: torch.dtype) -> None:
        self.recorded = read(data_dir, name, dtype)
        self.setup = setup = self.recorded["config_json"]
        self.tolerances = TOLERANCES[dtype]
        levels = range(len(setup["strides"]))
        self.features = {f"p{i + 3}": self.recorded[f"feat/{i}"].requires_grad_() for i in levels}
        head = RepPointsHead(
            in_channels=setup["channels"],
            num_classes=setup["num_classes"],
            conv_dim=setup["channels"],
            point_dim=setup["channels"],
            num_convs=setup["stacked_convs"],
            num_points=setup["num_points"],
            gradient_multiplier=setup["gradient_mul"],
        )
        thresholds = setup["iou_assigner"]
        self.model = RepPoints(
            backbone=Recorded(self.features, setup["strides"]),
            head=head,
            head_in_features=list(self.features),
            point_transform=build_transform(setup["transform"]),
            num_classes=setup["num_classes"],
            base_scale=setup["point_base_scale"],
            locations_per_object=setup["point_assigner"]["pos_num"],
            iou_thresholds=(thresholds["neg"], thresholds["pos"]),
            focal_loss_alpha=setup["focal"]["alpha"],
            focal_loss_gamma=setup["focal"]["gamma"],
            smooth_l1_beta=setup["smooth_l1_beta"],
            initial_loss_weight=setup["weight_init"],
            refined_loss_weight=setup["weight_refine"],
            test_score_thresh=setup["test"]["score_thr"],
            test_topk_candidates=setup["test"]["nms_pre"],
            test_nms_thresh=setup["test"]["nms_iou"],
            max_detections_per_image=setup["test"]["max_per_img"],
            pixel_mean=[0.0] * 3,
            pixel_std=[1.0] * 3,
        ).to(dtype)
        parameters = below(self.recorded, "param/")
        self.model.load_state_dict({renamed(k, HEAD_NAMES): v for k, v in parameters.items()}, strict=True)
        named = dict(self.model.named_parameters())
        self.parameters = {name: named[renamed(name, HEAD_NAMES)] for name in parameters}
        self.sizes = [tuple(size) for size in self.recorded["image_shape"].tolist()]
        self.truth = [
            Instances(
                size,
                gt_boxes=Boxes(self.recorded[f"gt/{i}/boxes"]),
                gt_classes=self.recorded[f"gt/{i}/labels"],
            )
            for i, size in enumerate(self.sizes)
        ]
        self.locations = locations_of(list(self.features.values()), setup["strides"])

    def batch(self, sizes: str = "image_shape") -> list[dict[str, Any]]:
        """Blank images, with the sizes that detections are wanted in."""
        wanted = self.recorded[sizes].tolist()
        return [
            {"image": torch.zeros(3, *size), "instances": truth, "height": h, "width": w}
            for size, truth, (h, w) in zip(self.sizes, self.truth, wanted)
        ]

    def targets(self) -> Any:
        points = flatten_levels(self.model.head(list(self.features.values())).initial)
        return self.model.label_locations(self.locations, points, self.sizes, self.truth)


@pytest.fixture(params=["reppoints_moment", "reppoints_moment_noboxes"])
def name(request):
    return request.param


@TYPES
def test_outputs_of_the_head(data_dir, name, dtype):
    case = Case(data_dir, name, dtype)
    maps = case.model.head(list(case.features.values()))
    for ours, theirs in (("logits", "cls"), ("initial", "pts_init"), ("refined", "pts_refine")):
        for level, found in enumerate(getattr(maps, ours)):
            key = f"out/{theirs}/{level}"
            assert_close(found, case.recorded[key], case.tolerances[1], key)
    for level, points in enumerate(maps.refined):
        boxes = case.model.point_transform(as_points(points.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        assert_close(boxes, case.recorded[f"test/box_offsets/{level}"], case.tolerances[1], f"box_offsets/{level}")


@TYPES
def test_locations_and_targets(data_dir, name, dtype):
    case = Case(data_dir, name, dtype)
    recorded = case.recorded
    strides = case.locations.strides[:, None]
    assert torch.equal(torch.cat([case.locations.xy, strides, strides], dim=1), recorded["target/points"])
    initial, refined = case.targets()
    points = flatten_levels(case.model.head(list(case.features.values())).initial)
    candidates = place(case.model.point_transform(as_points(points)), case.locations.xy, case.locations.strides)
    for image, size in enumerate(case.sizes):
        padded = Padding.of(case.model).canvas([(int(size[0]), int(size[1]))])
        assert padded == tuple(recorded["image_pad_shape"][image].tolist())
        inside = case.locations.inside(*padded)
        assert torch.equal(inside, recorded[f"target/valid/{image}"].bool())
        wanted = recorded[f"target/refine/{image}/candidate_boxes"]
        assert_close(candidates[image], wanted, case.tolerances[1], "candidates")
        for stage, found in (("init", initial), ("refine", refined)):
            wanted = below(recorded, f"target/{stage}/{image}/")
            assert torch.equal(found.labels[image], wanted["labels"])
            if stage == "refine":  # the first stage learns no classes
                assert torch.equal(found.counts[image], wanted["label_weights"].bool())
            assert torch.equal(found.boxes[image].to(dtype), wanted["box_targets"])
            assert torch.equal(found.foreground[image], wanted["box_weights"][:, 0].bool())
            assert found.foreground[image].sum() == wanted["num_pos"]
    assert initial.num_foreground() == recorded["target/init/avg_factor"]
    assert refined.num_foreground() == recorded["target/refine/avg_factor"]


@TYPES
def test_losses_and_gradients(data_dir, name, dtype):
    case = Case(data_dir, name, dtype)
    with EventStorage():
        losses = case.model.train()(case.batch())
    assert losses.keys() == {"loss_cls", "loss_pts_init", "loss_pts_refine"}
    for key, found in losses.items():
        assert found.item() == pytest.approx(case.recorded[f"loss/{key}"].item(), rel=case.tolerances[0])
    total = sum(losses.values())
    assert total.item() == pytest.approx(case.recorded["loss/total"].item(), rel=case.tolerances[0])
    total.backward()
    assert_gradients(case.parameters, case.recorded, case.tolerances[2])
    for level, feature in enumerate(case.features.values()):
        assert_close(feature.grad, case.recorded[f"grad_feat/{level}"], case.tolerances[2], f"grad_feat/{level}")


@TYPES
def test_losses_of_each_level(data_dir, name, dtype):
    case = Case(data_dir, name, dtype)
    targets = case.targets()
    maps = case.model.head(list(case.features.values()))
    flat = [flatten_levels(levels) for levels in maps]
    totals = torch.stack([stage.num_foreground() for stage in targets]).to(dtype)
    start = 0
    for level, count in enumerate(case.locations.per_level):
        part = slice(start, start + count)
        locations = Locations(case.locations.xy[part], case.locations.strides[part], [count])
        of_level = [type(stage)(*(x[:, part] for x in stage)) for stage in targets]
        losses = case.model.losses([x[:, part] for x in flat], locations, *of_level, totals)
        for key, found in losses.items():
            wanted = case.recorded[f"loss/{key}_per_level"][level].item()
            assert found.item() == pytest.approx(wanted, rel=case.tolerances[0], abs=1e-12)
        start += count


@TYPES
@pytest.mark.parametrize("variant", ["input", "original", "capped"])
def test_detections(data_dir, name, dtype, variant):
    case = Case(data_dir, name, dtype)
    model = case.model.eval()
    if variant == "capped":
        model.test_topk_candidates, model.test_score_thresh, model.max_detections_per_image = 40, 0.02, 10
    with torch.no_grad():
        outputs = model(case.batch("image_ori_shape" if variant == "original" else "image_shape"))
    for image, output in enumerate(outputs):
        found, wanted = output["instances"], below(case.recorded, f"test/{variant}/{image}/")
        assert len(found) == len(wanted["scores"])
        side = wanted["boxes"].max()
        # near-equal scores may come in another order
        apart = (found.pred_boxes.tensor[:, None] - wanted["boxes"]).abs().amax(2) / side
        apart += (found.scores[:, None] - wanted["scores"]).abs() / wanted["scores"].max()
        apart += (found.pred_classes[:, None] != wanted["labels"]) * 1.0
        best = apart.min(dim=0)
        assert best.values.max() <= 2 * max(case.tolerances[1], 1e-6)
        assert len(set(best.indices.tolist())) == len(found)


@TYPES
def test_candidates_of_detections(data_dir, name, dtype):
    case = Case(data_dir, name, dtype)
    model = case.model.eval()
    model.test_nms_thresh, model.max_detections_per_image = 1.0, 10**6
    with torch.no_grad():
        found = [len(output["instances"]) for output in model(case.batch())]
    assert found == case.recorded["test/num_candidates"].tolist()


@TYPES
@pytest.mark.parametrize("order", ["yx", "xy"])
@pytest.mark.parametrize("method", ["moment0", "moment1", "minmax", "partial_minmax"])
def test_boxes_of_points(data_dir, dtype, method, order):
    recorded = read(data_dir, "reppoints_pieces", dtype)
    wanted = below(recorded, f"p2b/{method}/{order}/")
    if not wanted:
        pytest.skip("not recorded")
    transform = build_transform(method.rstrip("01")).to(dtype)
    row = int(method[-1]) if method.startswith("moment") else 0
    if isinstance(transform, MomentTransform):
        with torch.no_grad():
            transform.log_scale.copy_(recorded["p2b/moment_transfer"][row])
    channels = recorded["p2b/points_yx"].clone().requires_grad_()
    points = as_points(channels) if order == "yx" else channels.unflatten(-1, (-1, 2))
    boxes = transform(points)
    assert_close(boxes, wanted["boxes"], TOLERANCES[dtype][1], "boxes")
    cotangent = recorded["p2b/cotangent"]
    (gradient,) = torch.autograd.grad((boxes * cotangent).sum(), channels, retain_graph=True)
    assert gradient.isfinite().all()
    regular = torch.ones(len(gradient), dtype=torch.bool)
    regular[3:5] = False
    assert_close(gradient[regular], wanted["grad_points"][regular], TOLERANCES[dtype][2], "grad_points")
    if isinstance(transform, MomentTransform):
        assert gradient[~regular].abs().max() > 0  # of the center
        (gradient,) = torch.autograd.grad((boxes * cotangent)[regular].sum(), transform.log_scale)
        assert_close(gradient, wanted["grad_moment_transfer"], TOLERANCES[dtype][2], "grad_moment_transfer")


@TYPES
def test_assignments(data_dir, dtype):
    recorded = read(data_dir, "reppoints_pieces", dtype)
    points, boxes, labels = (recorded[f"pa/{key}"] for key in ("points", "boxes", "labels"))
    for count in (1, 3):
        used = int(recorded[f"pa/pos_num{count}/num_points_used"])
        some = points[points[:, 2] <= 32] if used < len(points) else points
        assert len(some) == used
        matches = assign_by_distance(some[:, :2], some[:, 2], boxes, count=count)
        assert torch.equal(matches + 1, recorded[f"pa/pos_num{count}/gt_index"])
        found = torch.where(matches >= 0, labels[matches], -1)
        assert torch.equal(found, recorded[f"pa/pos_num{count}/label"])
    for case in ("near", "with_unreached_gt"):
        wanted = below(recorded, f"ia/{case}/")
        matches = assign_by_overlap(wanted["candidates"], wanted["boxes"])
        assert torch.equal(matches + 1, wanted["gt_index"])
        assert torch.equal(torch.where(matches >= 0, wanted["labels"][matches], -1), wanted["label"])


class Pyramid(Backbone):
    """Gives the recorded stages."""

    def __init__(self, stages: dict[str, Tensor], strides: list[int]) -> None:
        super().__init__()
        self.stages, self.strides = stages, strides

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {n: ShapeSpec(channels=x.shape[1], stride=s) for (n, x), s in zip(self.stages.items(), self.strides)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.stages


@TYPES
def test_pyramid(data_dir, dtype):
    recorded = read(data_dir, "fpn_necks", dtype)
    stages = {f"res{i + 2}": recorded[f"in/{i}"] for i in range(4)}
    used, channels = ["res3", "res4", "res5"], recorded["reppoints/out/0"].shape[1]
    neck = NormedFPN(
        Pyramid(stages, recorded["config_json"]["strides_in"]),
        used,
        channels,
        norm="GN",
        top_block=StridedLevels(stages["res5"].shape[1], channels, "GN", "res5"),
    ).to(dtype)
    parameters = below(recorded, "reppoints/param/")
    neck.load_state_dict({renamed(k, NECK_NAMES): v for k, v in parameters.items()}, strict=True)
    outputs = neck(torch.zeros(1))
    assert list(outputs) == ["p3", "p4", "p5", "p6", "p7"]
    for level, found in enumerate(outputs.values()):
        assert_close(found, recorded[f"reppoints/out/{level}"], TOLERANCES[dtype][1], f"level {level}")


@TYPES
def test_deformable_block(data_dir, dtype):
    recorded = read(data_dir, "dcn_resnext_block", dtype)
    setup = recorded["config_json"]
    block: nn.Module = DeformBottleneckBlock(
        setup["in_channels"],
        setup["out_channels"],
        bottleneck_channels=setup["width"],
        stride=setup["stride"],
        num_groups=setup["groups"],
        norm="BN",
        deform_num_groups=setup["deform_groups"],
    ).to(dtype)
    block.eval()
    parameters = {renamed(k, BLOCK_NAMES): v for k, v in below(recorded, "param/").items()}
    counters = {k: v for k, v in block.state_dict().items() if k.endswith("num_batches_tracked")}
    block.load_state_dict({**parameters, **counters}, strict=True)
    x = recorded["in/x"].clone().requires_grad_()
    out = block(x)
    assert_close(out, recorded["out"], TOLERANCES[dtype][1], "out")
    cotangent = ((0.7 * torch.arange(out.numel(), dtype=torch.float64)).cos().view_as(out) / 16).to(dtype)
    total = (out * cotangent).sum()
    wanted = recorded["sum_out_times_cotangent"].item()
    assert total.item() == pytest.approx(wanted, rel=TOLERANCES[dtype][0])
    total.backward()
    assert_close(x.grad, recorded["grad_x"], TOLERANCES[dtype][2], "grad_x")
    named = dict(block.named_parameters())
    ours = {name: named[renamed(name, BLOCK_NAMES)] for name in recorded["grad_norm_names"]}
    assert_gradients(ours, recorded, TOLERANCES[dtype][2])
