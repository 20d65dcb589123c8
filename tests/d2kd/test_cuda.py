"""What only a GPU can show: every method's step there against the CPU's, half precision, resuming, operators.

`bash benchmarks/gpu.sh tests` runs these. With D2KD_PRETEND_CUDA=1 they run on tensors that only say that they are on a
GPU (benchmarks/pretend_cuda.py), which finds tensors of both devices in one operator.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FASTER_RCNN, RETINANET, batch, config, model, write_teacher
from runs import ROOT, read_checkpoint, run_training
from torch import nn

from d2kd.engine.optimizer import build_optimizer
from d2kd.engine.train_step import NonFiniteLossError, TrainStep
from d2kd.layers import RandomMasks
from d2kd.modeling import Teacher, build_distilled_model
from d2kd.modeling.feature_cache import FeatureCache
from d2kd.modeling.padding import Padding
from d2kd.modeling.teacher_passes import CachedDensePass
from d2kd.modeling.teacher_passes.sparse_vit import SparseViT
from detectron2.layers import DeformConv, ModulatedDeformConv, batched_nms, paste_masks_in_image
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

sys.path.append(str(ROOT / "benchmarks"))
from recipe_steps import batch_for, recipe_config, recipe_step  # noqa: E402

pytestmark = pytest.mark.cuda

RECIPES = sorted(path.stem for path in (ROOT / "configs/PhotoDigits").glob("*_student*.yaml"))
STUDENTS = [name for name in RECIPES if name.endswith("_student")]
#: Of the first step, what does not hang on random numbers that a GPU draws otherwise.
DRAWS = ("MaskedGenerative", "MaskedTeacher", "combined")


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32, and the same algorithm in every step."""
    with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True, benchmark=False):
        yield


def recipe(name: str) -> Path:
    return ROOT / "configs/PhotoDigits" / f"{name}.yaml"


@pytest.mark.parametrize("name", RECIPES)
def test_the_losses_of_a_step_are_those_of_the_cpu_on_another_device(name, tmp_path):
    expected = recipe_step(recipe(name), tmp_path, "cpu")()
    found = recipe_step(recipe(name), tmp_path, "cuda")()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        drawn = any(word in name for word in DRAWS) and (key.startswith("distill") or key == "total_loss")
        assert found[key] == pytest.approx(value, rel=0.5 if drawn else 2e-3, abs=1e-4), key


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", RECIPES)
def test_half_precision_follows_float32(name, precision, tmp_path):
    exact = recipe_step(recipe(name), tmp_path, "cuda")()
    step = recipe_step(recipe(name), tmp_path, "cuda", precision)
    first = step()
    stable = [key for key in exact if not key.startswith("distill") and key != "total_loss"]
    assert [first[key] for key in stable] == pytest.approx([exact[key] for key in stable], rel=0.15, abs=0.05)
    for _ in range(2):  # with a refresh of assigned channels
        assert all(value == value and abs(value) < 1e6 for value in step().values())


@pytest.mark.parametrize(
    "option", ["FOLD_NORMS True", "CHANNELS_LAST True", "STREAM True", "COMPILE default", "COMPILE cudagraphs"]
)
def test_a_faster_teacher_changes_no_loss(option, tmp_path):
    key, value = option.split()
    if os.environ.get("D2KD_PRETEND_CUDA") == "1" and key in ("STREAM", "COMPILE"):
        pytest.skip("needs a real GPU")
    name = "retinanet_student_FeatureMimic"
    plain = recipe_step(recipe(name), tmp_path, "cuda")
    faster = recipe_step(recipe(name), tmp_path, "cuda", options=[f"DISTILL.TEACHER.{key}", value])
    for _ in range(3):  # graphs are recorded in the second call, and replayed in the third
        assert faster() == pytest.approx(plain(), rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STUDENTS)
def test_inference_on_the_device_finds_what_the_cpu_finds(name, precision, tmp_path):
    cfg = recipe_config(recipe(name), tmp_path, "cpu")
    torch.manual_seed(0)
    net = build_model(cfg).eval()
    inputs = batch_for(cfg)
    with torch.no_grad():
        expected = net(inputs)
        net.to("cuda")
        with torch.autocast("cuda", dtype=precision or torch.float16, enabled=precision is not None):
            found = net(inputs)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours.keys() == theirs.keys()
        for key in ("logits", "sem_seg", "scores"):
            if key in ours:
                tolerance = {"rtol": 1e-3, "atol": 1e-3} if precision is None else {"rtol": 0.1, "atol": 0.2}
                torch.testing.assert_close(ours[key].float().cpu(), theirs[key].float(), **tolerance)
        if "instances" in ours:
            assert ours["instances"].pred_classes.is_cuda and ours["instances"].scores.isfinite().all()


@pytest.mark.parametrize("base", [RETINANET, FASTER_RCNN], ids=["RetinaNet", "FasterRCNN"])
def test_a_failed_step_leaves_everything_as_it_was_on_the_device(base, tmp_path):
    cfg = config(base, MODEL__DEVICE="cuda", **write_teacher(tmp_path, config(base)))
    net = build_distilled_model(cfg)
    before = {name: value.clone() for name, value in net.state_dict().items() if torch.is_tensor(value)}
    broken = batch()
    step = TrainStep(net, [broken], build_optimizer(cfg, net))
    drawn = torch.cuda.get_rng_state()
    with torch.no_grad():
        next(net.student.parameters()).fill_(float("nan"))
        before["student." + next(net.student.named_parameters())[0]] = next(net.student.parameters()).clone()
    with EventStorage(), pytest.raises(NonFiniteLossError):
        step.run_step()
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
    after = net.state_dict()
    assert all(torch.equal(after[k].nan_to_num(), v.nan_to_num()) for k, v in before.items() if k in after)


@pytest.mark.parametrize("amp", ["float32", "float16"])
def test_a_resumed_run_goes_on_as_on_the_device_before(write_config, teacher, tmp_path, amp):
    methods = ["MaskedGenerative", "ChannelMatching", "LogitKD"]
    changes: dict[str, Any] = {"MODEL__DEVICE": "cuda", "DISTILL__METHODS": methods, **teacher}
    changes.update(DISTILL__CHANNEL_MATCHING__TRACK_IMAGES=8, SOLVER__AMP__ENABLED=amp != "float32")
    changes.update(SOLVER__AMP__PRECISION="float16" if amp != "float32" else "bfloat16", DATASETS__TEST=[])
    path = write_config(**changes)
    run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    whole, parts = (read_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    scalers = [x["trainer"]["_trainer"].get("grad_scaler") for x in (whole, parts)]
    assert scalers[0] == scalers[1] and (scalers[0] is not None) == (amp == "float16")
    # sums of several threads differ in their last digits
    for name, value in whole["model"].items():
        torch.testing.assert_close(parts["model"][name].float(), value.float(), rtol=1e-2, atol=1e-3)


def test_masks_have_a_generator_of_the_device_and_leave_the_global_one_alone():
    like = torch.zeros(2, 4, 8, 8, device="cuda", dtype=torch.float16)
    masks, before = RandomMasks(seed=3), torch.cuda.get_rng_state()
    first, second = masks(like, 0.5, "spatial"), masks(like, 0.5, "channel")
    assert first.is_cuda and first.dtype == torch.float16 and 0 < first.float().mean() < 1
    again = RandomMasks()
    again.load_state({"seed": 3, "draws": 1})
    assert torch.equal(again(like, 0.5, "channel"), second)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", ["plain", "modulated"])
def test_the_operator_of_deformable_convolution_is_that_of_the_cpu(kind, half):
    torch.manual_seed(0)
    conv: nn.Module = (DeformConv if kind == "plain" else ModulatedDeformConv)(4, 6, 3, padding=1)
    x, offset, mask = torch.randn(2, 4, 9, 7), torch.randn(2, 18, 9, 7), torch.rand(2, 9, 9, 7)
    inputs = [x, offset] if kind == "plain" else [x, offset, mask]
    expected, gradients = _with_gradients(conv, inputs, "cpu", False)
    found, ours = _with_gradients(conv.to("cuda"), inputs, "cuda", half)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if half else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.float(), expected, **tolerance)
    for a, b in zip(ours, gradients):
        torch.testing.assert_close(a.float(), b, rtol=10 * tolerance["rtol"], atol=10 * tolerance["atol"])


def _with_gradients(net: nn.Module, inputs: list[torch.Tensor], device: str, half: bool) -> tuple[Any, list[Any]]:
    leaves = [x.to(device).detach().requires_grad_() for x in inputs]
    with torch.autocast(device, dtype=torch.float16, enabled=half):
        out = net(*leaves)
    out.float().square().mean().backward()
    return out.detach().cpu(), [leaf.grad.cpu() for leaf in leaves]


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2", "ROIPool"])
def test_the_operator_that_pools_regions_is_that_of_the_cpu(kind):
    torch.manual_seed(0)
    pooler = ROIPooler(3, (1 / 4, 1 / 8), 2, kind)
    maps = [torch.randn(2, 4, 32, 32), torch.randn(2, 4, 16, 16)]
    boxes = [Boxes(torch.tensor([[2.0, 3, 60, 70], [5, 5, 20, 30]])), Boxes(torch.zeros(0, 4))]
    expected = pooler(maps, boxes)
    found = pooler([m.cuda() for m in maps], [b.to("cuda") for b in boxes])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    if kind == "ROIPool":
        return
    with torch.autocast("cuda", dtype=torch.float16):
        half = pooler([m.cuda().half() for m in maps], [b.to("cuda") for b in boxes])
    torch.testing.assert_close(half.float().cpu(), expected, rtol=2e-2, atol=2e-2)


def test_the_operators_of_suppression_and_pasting_are_those_of_the_cpu():
    torch.manual_seed(0)
    corner = torch.rand(60, 2) * 50
    boxes, scores, classes = torch.cat([corner, corner + 20], dim=1), torch.rand(60), torch.randint(3, (60,))
    expected = batched_nms(boxes, scores, classes, 0.5)
    assert batched_nms(boxes.cuda(), scores.cuda(), classes.cuda(), 0.5).tolist() == expected.tolist()
    masks = torch.rand(5, 28, 28)
    whole = paste_masks_in_image(masks, Boxes(boxes[:5]), (80, 90))
    pasted = paste_masks_in_image(masks.cuda(), Boxes(boxes[:5].cuda()), (80, 90)).cpu()
    assert (pasted != whole).float().mean() < 1e-3


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@torch.no_grad()
def test_a_masked_teacher_sees_on_the_device_what_it_sees_on_the_cpu(half, tmp_path):
    cfg = recipe_config(recipe("retinanet_vit_student"), tmp_path, "cpu")
    torch.manual_seed(0)
    network = build_model(cfg).eval().backbone.net
    images = torch.randn(2, 3, 128, 128)
    kept = torch.stack([torch.randperm(256)[:90].sort().values for _ in range(2)])
    expected = SparseViT(network)(images, kept)
    with torch.autocast("cuda", dtype=torch.float16, enabled=half):
        found = SparseViT(network.to("cuda"))(images.cuda(), kept.cuda())
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if half else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found.float().cpu(), expected, **tolerance)


def test_images_without_objects_train_on_the_device(tmp_path):
    for base in (RETINANET, FASTER_RCNN):
        cfg = config(base, MODEL__DEVICE="cuda", **write_teacher(tmp_path, config(base)))
        net = build_distilled_model(cfg)
        empty = batch()
        for x in empty:
            x["instances"] = Instances(
                x["instances"].image_size, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long()
            )
        with EventStorage() as storage:
            TrainStep(net, [empty], build_optimizer(cfg, net)).run_step()
        assert storage.latest()["total_loss"][0] < 1e6


def test_a_model_moves_between_devices():
    net = model(config())
    there = net.to("cuda")
    assert there.device.type == "cuda"
    there.eval()
    with torch.no_grad():
        assert there(batch())[0]["instances"].pred_boxes.tensor.is_cuda


@pytest.mark.parametrize("alone", [False, True])
def test_features_from_the_disk_are_those_that_the_teacher_gives(tmp_path, alone):
    teacher = Teacher(model(config(MODEL__DEVICE="cuda"), seed=7))
    cache = FeatureCache(str(tmp_path), {}, Padding.of(teacher.model), dtype="float32", alone=alone, max_bytes=10**9)
    dense = CachedDensePass(teacher, ["p3", "p5"], cache)
    images = [{**x, "image": x["image"].cuda()} for x in batch([(96, 128)] * 3)]
    plain = dense.uncached()(images[:1] if alone else images).maps
    first = dense(images).maps
    cache.flush()
    second = dense(images).maps
    mixed = dense([images[2], *images[:2]]).maps
    assert cache.misses == 3
    for tap, expected in plain.items():
        assert first[tap].is_cuda and torch.equal(first[tap][: len(expected)], expected)
        assert torch.equal(first[tap], second[tap]) and torch.equal(mixed[tap][1:], first[tap][:2])
