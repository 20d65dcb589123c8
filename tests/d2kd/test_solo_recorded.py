"""SOLO against values recorded from the official implementation (tests/data/golden_mm), in float64 and float32."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.modeling.meta_arch.solo import SOLO, DecoupledSOLOHead, SOLOHead
from d2kd.modeling.meta_arch.solo.decoding import Masks, Sizes, Thresholds, detect, point_nms
from d2kd.modeling.meta_arch.solo.head import coordinates, resize_pyramid
from d2kd.modeling.meta_arch.solo.matrix_nms import FinalScores, mask_overlaps, matrix_nms
from d2kd.modeling.meta_arch.solo.targets import Truth, assign_targets, mass_centers
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
#: Recorded names of parts of the head, and ours; "conv" and "gn" of a layer are its own weight and its norm.
PARTS = {
    "mask_convs": "mask_tower",
    "mask_convs_x": "mask_tower_x",
    "mask_convs_y": "mask_tower_y",
    "cls_convs": "cls_tower",
    "conv_mask_list": "mask_pred",
    "conv_mask_list_x": "mask_pred_x",
    "conv_mask_list_y": "mask_pred_y",
    "conv_cls": "cls_score",
}


def our_name(recorded: str) -> str:
    part, *rest = recorded.split(".")
    return ".".join([PARTS[part], *({"gn": "norm"}.get(word, word) for word in rest if word != "conv")])


class Recorded(NamedTuple):
    """A file, its settings, and our model with its weights."""

    arrays: dict[str, np.ndarray]
    config: dict[str, Any]
    net: SOLO
    features: list[Tensor]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name]).to(self.features[0].dtype)

    def close(self, got: Tensor, name: str, *, float64: float = 1e-6, float32: float = 2e-4) -> None:
        """Fails where values are further from the recorded ones than the tolerance times the largest of these."""
        want = torch.from_numpy(np.asarray(self.arrays[name], dtype=np.float64))
        assert got.shape == want.shape, name
        tolerance = float64 if got.dtype == torch.float64 else float32
        error = (got.detach().double() - want).abs().max() if want.numel() else torch.zeros(())
        assert error <= tolerance * want.abs().max().clamp(min=1e-12) if want.numel() else True, (name, error)


class Pyramid(Backbone):
    """A pyramid that is given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"p{i}": ShapeSpec(channels=self.channels, stride=2**i) for i in range(2, 7)}


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> torch.dtype:
    return PRECISIONS[request.param]


@pytest.fixture(params=["solo", "solo_decoupled"])
def recorded(request: pytest.FixtureRequest, data_dir: Path, precision: torch.dtype) -> Recorded:
    return read(data_dir, request.param, precision)


def read(data_dir: Path, kind: str, dtype: torch.dtype) -> Recorded:
    with np.load(data_dir / f"golden_mm/{kind}.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    config = json.loads(str(arrays["config_json"]))
    head = {"solo": SOLOHead, "solo_decoupled": DecoupledSOLOHead}[kind](
        in_channels=config["in_channels"],
        num_classes=config["num_classes"],
        grids=config["num_grids"],
        num_convs=config["stacked_convs"],
        conv_dim=config["channels"],
    )
    weights = {our_name(n.partition("/")[2]): torch.from_numpy(a) for n, a in arrays.items() if n.startswith("param/")}
    head.load_state_dict(weights, strict=True)
    net = SOLO(
        backbone=Pyramid(config["in_channels"]),
        head=head,
        head_in_features=[f"p{i}" for i in range(2, 7)],
        num_classes=config["num_classes"],
        scale_ranges=config["scale_ranges"],
        center_scale=config["pos_scale"],
        mask_loss_weight=config["dice"]["weight"],
        focal_loss_alpha=config["focal"]["alpha"],
        focal_loss_gamma=config["focal"]["gamma"],
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
    ).to(dtype)
    assert [level.stride for level in net.levels] == config["strides"]
    features = [torch.from_numpy(arrays[f"feat/{i}"]).to(dtype).requires_grad_() for i in range(5)]
    return Recorded(arrays, config, net, features)


def truths(case: Recorded) -> list[Truth]:
    arrays = [[torch.from_numpy(case.arrays[f"gt/{i}/{n}"]) for n in ("labels", "boxes", "masks")] for i in (0, 1)]
    return [Truth(labels, boxes, masks.bool()) for labels, boxes, masks in arrays]


def test_inputs_and_outputs(recorded):
    net, head = recorded.net, recorded.net.head
    inputs = resize_pyramid(recorded.features)
    for level in (0, 4):
        recorded.close(inputs[level], f"resized/{level}")
        recorded.close(torch.cat(coordinates(inputs[level][:1]), dim=1)[0], f"coord/level{level}_image0")
    logits, maps = head(recorded.features)
    size = head.mask_size(maps[0])
    for level, grid in enumerate(head.grids):
        recorded.close(logits[level], f"out/cls/{level}")
        recorded.close(point_nms(logits[level].sigmoid()), f"eval/cls/{level}")
        images, cells = range(1 if level < 2 else 2), torch.arange(grid**2)
        if isinstance(head, SOLOHead):
            masks = {"mask": torch.stack([head.cell_logits(level, maps[level], i, cells) for i in images])}
        else:
            masks = {f"mask_{axis}": values[: len(images)] for axis, values in zip("xy", maps[level])}
        for name, values in masks.items():
            recorded.close(values, f"out/{name}/{level}")
            if f"eval/{name}/{level}" in recorded.arrays:
                step = 1 if level == 0 else 2
                resized = F.interpolate(values[:1].sigmoid(), size, mode="bilinear")[..., ::step, ::step]
                recorded.close(resized, f"eval/{name}/{level}")
                whole = head.cell_masks(level, maps[level], 0, cells, size)
                product = resized[0] if name == "mask" else None
                assert product is None or torch.equal(product, whole[:, ::step, ::step])
    assert [level.stride for level in net.levels] == recorded.config["strides"]


def test_decoupled_masks_are_products_of_resized_maps(data_dir):
    case = read(data_dir, "solo_decoupled", torch.float64)
    maps = case.net.head(case.features)[1]
    size = case.net.head.mask_size(maps[0])
    whole = case.net.head.cell_masks(4, maps[4], 0, torch.arange(9), size)[:, ::2, ::2]
    x, y = case.tensor("eval/mask_x/4")[0], case.tensor("eval/mask_y/4")[0]
    torch.testing.assert_close(whole, (y[:, None] * x[None]).flatten(0, 1), rtol=0, atol=1e-6)


def test_targets(recorded):
    net = recorded.net
    sizes = [tuple(recorded.arrays[f"target/0/mask_targets/{level}"].shape[1:]) for level in range(5)]
    for image, truth in enumerate(truths(recorded)):
        centers = mass_centers(truth.masks)
        if f"target/{image}/centre_yx" in recorded.arrays:
            np.testing.assert_allclose(centers.numpy(), recorded.arrays[f"target/{image}/centre_yx"], rtol=1e-12)
        for level, found in enumerate(assign_targets(truth, net.levels, sizes, net.num_classes, net.center_scale)):
            where, grid = f"target/{image}", net.levels[level].grid
            np.testing.assert_array_equal(found.classes, recorded.arrays[f"{where}/cls/{level}"])
            np.testing.assert_array_equal(found.masks, recorded.arrays[f"{where}/mask_targets/{level}"])
            if f"{where}/positive_cells/{level}" in recorded.arrays:
                cells = recorded.arrays[f"{where}/positive_cells/{level}"].nonzero()[0]
            else:
                cells = recorded.arrays[f"{where}/positive_yx/{level}"] @ [grid, 1]
            np.testing.assert_array_equal(found.cells, cells)


def test_losses_and_gradients(recorded):
    net = recorded.net
    found = net.losses(*net.head(recorded.features), truths(recorded))
    for name in ("loss_mask", "loss_cls"):
        recorded.close(found[name], f"loss/{name}", float64=1e-9, float32=5e-5)
    total = sum(found.values())
    recorded.close(total, "loss/total", float64=1e-9, float32=5e-5)
    total.backward()
    for level, feature in enumerate(recorded.features):
        recorded.close(feature.grad, f"grad_feat/{level}", float32=1e-3)
    gradients = {name: p.grad for name, p in net.head.named_parameters()}
    names = recorded.arrays["grad_norm_names"]
    assert {our_name(name) for name in names} == gradients.keys()
    for name, norm in zip(names, recorded.arrays["grad_norms"]):
        gradient = gradients[our_name(name)]
        if norm < 1e-9:
            continue
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-6 if gradient.dtype == torch.float64 else 1e-3)
        if f"grad/{name}" in recorded.arrays:
            recorded.close(gradient, f"grad/{name}", float32=1e-3)
        else:
            flat, count = gradient.flatten(), len(recorded.arrays[f"grad_sample/{name}"])
            places = torch.from_numpy(np.linspace(0, len(flat) - 1, count).round().astype(int))
            recorded.close(flat[places], f"grad_sample/{name}", float32=1e-3)


#: What the recorded detections were made with, beside the settings of the file.
DETECTIONS = {
    "published": {},
    "linear": {"nms": "linear"},
    "capped": {"candidates": 20, "final_score": 0.02, "limit": 6},
}


@pytest.mark.parametrize("name", DETECTIONS)
def test_detections(recorded, name):
    net, test = recorded.net, recorded.config["test"]
    thresholds = Thresholds(
        score=test["score_thr"],
        mask=test["mask_thr"],
        nms=test["kernel"],
        sigma=test["sigma"],
        candidates=test["nms_pre"],
        final_score=test["filter_thr"],
        limit=test["max_per_img"],
    )
    thresholds = replace(thresholds, **DETECTIONS[name])
    logits, maps = net.head(recorded.features)
    scores = [point_nms(x.sigmoid()) for x in logits]
    size = net.head.mask_size(maps[0])
    for i in (0, 1):
        shapes = [tuple(recorded.arrays[key][i].tolist()) for key in ("image_shape", "image_ori_shape")]
        masks = Masks(net.head, maps, i, size)
        found = detect([x[i] for x in scores], masks, recorded.config["strides"], Sizes(size, *shapes), thresholds)
        where = f"test/{name}/{i}"
        recorded.close(found.scores, f"{where}/scores")
        np.testing.assert_array_equal(found.pred_classes, recorded.arrays[f"{where}/labels"])
        exact = found.scores.dtype == torch.float64
        areas = found.pred_masks.flatten(1).sum(1).numpy()
        np.testing.assert_allclose(areas, recorded.arrays[f"{where}/mask_areas"], rtol=0, atol=0 if exact else 3)
        if name == "published":
            packed = np.packbits(found.pred_masks[:12].flatten(1).numpy(), axis=1)
            assert np.unpackbits(packed ^ recorded.arrays[f"{where}/masks_first12_packed"]).sum() <= (0 if exact else 3)


def test_matrix_nms_of_the_recording(data_dir, precision):
    with np.load(data_dir / "golden_mm/matrix_nms.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    masks, classes = torch.from_numpy(arrays["masks"]).bool(), torch.from_numpy(arrays["labels"])
    scores = torch.from_numpy(arrays["scores"]).to(precision)
    variants = {name.partition("/")[0] for name in arrays if "/" in name}
    assert len(variants) == 6
    for variant in variants:
        given = json.loads(str(arrays[f"{variant}/args_json"]))
        order = scores.argsort(descending=True, stable=True)[: given.get("nms_pre")]
        overlaps = mask_overlaps(masks[order], precision)
        final = FinalScores(given.get("filter_thr", 0.0), given.get("max_num", 100))
        kernel = given["kernel"], given.get("sigma", 2.0)
        lowered, kept = matrix_nms(overlaps, classes[order], scores[order], *kernel, final)
        np.testing.assert_array_equal(order[kept], arrays[f"{variant}/kept_index"])
        np.testing.assert_array_equal(classes[order[kept]], arrays[f"{variant}/labels"])
        tolerance = 1e-6 if precision == torch.float64 else 2e-4
        np.testing.assert_allclose(lowered, arrays[f"{variant}/scores"], rtol=0, atol=tolerance)


class Stages(Backbone):
    """A ResNet whose stages are given."""

    def __init__(self, stages: list[Tensor]) -> None:
        super().__init__()
        self.stages = {f"res{i}": x for i, x in enumerate(stages, 2)}

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.stages

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {n: ShapeSpec(channels=x.shape[1], stride=2 ** int(n[3:])) for n, x in self.stages.items()}


def test_detectron2s_pyramid_is_the_recorded_one(data_dir):
    with np.load(data_dir / "golden_mm/fpn_solo.npz", allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]).double() for name in file.files if file[name].dtype.kind == "f"}
    stages = Stages([arrays[f"in/{i}"] for i in range(4)])
    neck = FPN(stages, list(stages.stages), 16, top_block=LastLevelMaxPool()).double()
    parts = {"lateral_convs": "fpn_lateral", "fpn_convs": "fpn_output"}
    weights = {}
    for name in (name.removeprefix("solo/param/") for name in arrays if name.startswith("solo/param/")):
        part, level, _, kind = name.split(".")
        weights[f"{parts[part]}{int(level) + 2}.{kind}"] = arrays[f"solo/param/{name}"]
    neck.load_state_dict(weights, strict=True)
    for i, level in enumerate(neck(torch.zeros(1, 3, 128, 160)).values()):
        want = arrays[f"solo/out/{i}"]
        torch.testing.assert_close(level, want, rtol=0, atol=1e-6 * want.abs().max().item())
