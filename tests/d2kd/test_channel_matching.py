"""Channel matching against recorded values, its schedule, its state, several processes, and bad input."""

import logging

import pytest
import torch
from helpers import random_maps, same_tensors, tap_pair
from models import batch, config, model, write_teacher
from runs import ROOT, in_two_processes, read_checkpoint, run_training

import d2kd  # noqa: F401  (makes `detectron2` importable, also in processes that are spawned)
from d2kd.data.datasets import register_datasets
from d2kd.distillers import AlignmentError, ChannelMatching
from d2kd.distillers.channel_matching import distiller as distiller_module
from d2kd.distillers.channel_matching.assignment import AssignmentError
from d2kd.distillers.channel_matching.channel_groups import (
    REDUCERS,
    Reduced,
    gather_assigned,
    norm_margin,
    one_sided_error,
    reduce_groups,
    scale_to_unit,
)
from d2kd.distillers.channel_matching.distiller import assigned_student, build_adapter
from d2kd.distillers.channel_matching.schedule import MatchingSchedule
from d2kd.distillers.channel_matching.similarity import channel_distances
from d2kd.engine import DistillTrainer, NonFiniteLossError, load_config
from d2kd.engine.checkpoint import CheckpointError
from d2kd.errors import ConfigError
from d2kd.modeling import build_distilled_model
from d2kd.modeling.taps import last_norm
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

STAGES = {"div": (0, 1, 2), "shave": (0, 1, 2)}
CASES = [(case, stage) for case in STAGES for stage in STAGES[case]]
MATCHING = {
    "DISTILL__METHODS": ["ChannelMatching"],
    "DISTILL__CHANNEL_MATCHING__REFRESH_ITERS": [0, 2, 4],
    "DISTILL__CHANNEL_MATCHING__TRACK_IMAGES": 8,
}


def stage_pair(students=4, teachers=8, tap="res4.pre_relu", norm_scale=1.0):
    """A stage of both networks with that many channels; `norm_scale` is None where no norm ends the teacher's."""
    return tap_pair(tap, channels=(students, teachers), strides=(16.0, 16.0), norm_scale=norm_scale)


def groups(cols, students):
    return cols.view(-1, students).t()


def matching(pairs, iterations=(0,), images=1, **changes):
    settings = {"adapter": "none", "normalize": "none", "reduction": "batchmean", "images_per_iteration": 2, **changes}
    return ChannelMatching(pairs=pairs, refresh_iters=list(iterations), track_images=images, **settings)


def schedule_of(**changes):
    defaults = {"iterations": (), "periods": (5,), "steps": (), "images": 8, "tracking": "online"}
    return MatchingSchedule(**{**defaults, **changes})


def stage_maps(students=4, teachers=8, seed=0):
    """Random maps for the default `stage_pair`."""
    return random_maps("res4.pre_relu", (students, teachers), seed=seed)


@pytest.mark.parametrize("case", ["div", "shave"])
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_golden_costs(golden, case, chunk):
    recorded = golden("matching_cost")
    for stage in STAGES[case]:
        name = f"{case}_st{stage}"
        total = sum(
            channel_distances(recorded[f"{name}_student_b{j}"], recorded[f"{name}_teacher_b{j}"], chunk).double()
            for j in (0, 1)
        )
        torch.testing.assert_close(total, recorded[f"{name}_cost_sum"], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(
            total / recorded[f"{case}_num_images"], recorded[f"{name}_cost_mean"], rtol=2e-5, atol=2e-5
        )


def test_an_empty_channel_is_at_distance_two_from_all():
    s, t = torch.randn(3, 2, 4, 4), torch.randn(3, 5, 4, 4)
    s[:, 1] = 0
    assert torch.equal(channel_distances(s, t)[1], torch.full((5,), 6.0))


def test_golden_margins(golden):
    recorded = golden("matching_margin")
    torch.testing.assert_close(
        norm_margin(recorded["weight"], recorded["bias"]).float(), recorded["margin"], rtol=1e-6, atol=0
    )


def test_margin_of_a_channel_that_is_switched_off():
    margin = norm_margin(torch.zeros(3), torch.tensor([-0.5, 0.0, 0.5]))
    torch.testing.assert_close(margin, torch.tensor([-0.5, 0.0, 0.0], dtype=torch.double), atol=1e-11, rtol=0)


@pytest.mark.parametrize("case, stage", CASES)
def test_golden_reducers(golden, case, stage):
    recorded = golden("matching_reduce")
    name = f"{case}_st{stage}"
    teacher, margin = recorded[f"{name}_teacher"], recorded[f"{name}_margin"].flatten()
    members = groups(recorded[f"{name}_cols"], int(recorded[f"{name}_sc"]))

    def check(got, kind):
        assert torch.equal(got.map, recorded[f"{name}_{kind}_t"])
        torch.testing.assert_close(got.margin, recorded[f"{name}_{kind}_m"].flatten(), rtol=0, atol=1e-6)

    check(reduce_groups(teacher, margin, members, "amp", None), "amp")
    check(reduce_groups(teacher, margin, members, "sp", None), "sp")
    signed = reduce_groups(teacher, margin, members, "amp_signed", None)
    assert torch.equal(signed.map, recorded[f"{name}_sp_t"])
    torch.testing.assert_close(signed.margin, recorded[f"{name}_amp_m"].flatten(), rtol=0, atol=1e-6)
    check(
        gather_assigned(
            teacher, margin[members], members, recorded[f"{name}_rd_t_pick"], recorded[f"{name}_rd_m_pick"]
        ),
        "rd",
    )
    check(reduce_groups(teacher, margin, recorded[f"{name}_sm_cols"][:, None], "sm", None), "sm")


def test_random_reducer_draws_every_member_anywhere():
    teacher = torch.arange(8.0).view(1, 8, 1, 1).expand(2, 8, 40, 40)
    members = torch.tensor([[1, 3, 5], [0, 2, 7]])
    reduced = reduce_groups(teacher, torch.arange(8.0), members, "rd", lambda shape, device: torch.rand(shape))
    assert [set(channel.unique().tolist()) for channel in reduced.map.transpose(0, 1)] == [{1, 3, 5}, {0, 2, 7}]
    assert all(m in group for m, group in zip(reduced.margin.tolist(), members.tolist()))


def test_golden_loss_and_gradient(golden):
    recorded = golden("matching_loss")
    source = recorded["source"].requires_grad_()
    loss = one_sided_error(source, Reduced(recorded["target"], recorded["margin"].flatten()), "batchmean") * len(source)
    loss.backward()
    torch.testing.assert_close(loss, recorded["loss"].to(loss.dtype), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(source.grad, recorded["grad_source"], rtol=2e-5, atol=2e-5)
    mean = one_sided_error(source, Reduced(recorded["target"], recorded["margin"].flatten()), "mean")
    assert mean.item() * source.numel() == pytest.approx(float(recorded["loss"]), rel=1e-5)


def load_level(distiller, level, recorded, name, norm):
    distiller.get_buffer(f"margin{level}").copy_(recorded[f"{name}_margin"].flatten())
    members = distiller.get_buffer(f"assignment{level}")
    members.copy_(groups(recorded[f"{name}_cols"], len(members)))
    distiller.adapters[level].load_state_dict(
        {
            **distiller.adapters[level].state_dict(),
            "weight": recorded[f"{norm}_weight"],
            "bias": recorded[f"{norm}_bias"],
        }
    )


@pytest.mark.parametrize("case", ["div", "shave"])
def test_golden_classification(golden, case):
    recorded = golden("matching_forward_cls")
    stages = [i for i in STAGES[case] if i not in recorded[f"{case}_fwd_ignore"].tolist()]
    shapes = [(recorded[f"{case}_fwd_student{i}"].shape[1], recorded[f"{case}_st{i}_teacher"].shape[1]) for i in stages]
    pairs = [stage_pair(s, t, f"s{i}") for i, (s, t) in zip(stages, shapes)]
    distiller = matching(pairs, adapter="bn", tap_weights=[0.5 ** (2 - i) for i in stages])
    for level, i in enumerate(stages):
        load_level(distiller, level, recorded, f"{case}_st{i}", f"{case}_fwd_bn{i}")
    distiller._assigned, distiller.batches = True, 5
    students = {f"s{i}": recorded[f"{case}_fwd_student{i}"].requires_grad_() for i in stages}
    losses = distiller(students, {f"s{i}": recorded[f"{case}_st{i}_teacher"] for i in stages})
    total = sum(losses.values()) * 2  # recorded: the sum over two images
    total.backward()
    assert total.item() == pytest.approx(float(recorded[f"{case}_fwd_loss_distill"]), rel=1e-5)
    for level, i in enumerate(stages):
        norm = distiller.adapters[level]
        for got, key in (
            (students[f"s{i}"].grad, f"grad_student{i}"),
            (norm.weight.grad, f"grad_bn{i}_weight"),
            (norm.bias.grad, f"grad_bn{i}_bias"),
            (norm.running_mean, f"bn{i}_running_mean"),
            (norm.running_var, f"bn{i}_running_var"),
        ):
            torch.testing.assert_close(got, recorded[f"{case}_fwd_{key}"], rtol=1e-4, atol=1e-4)


def test_golden_detection(golden):
    recorded = golden("matching_forward_det")
    levels = range(4)
    pairs = [
        stage_pair(recorded[f"st{i}_student"].shape[1], recorded[f"st{i}_teacher"].shape[1], f"s{i}") for i in levels
    ]
    distiller = matching(pairs, adapter="gn", tap_weights=[1 / f for f in recorded["loss_factors"][:4].tolist()])
    for i in levels:
        assert distiller.adapters[i].num_groups == int(recorded["num_groups"])
        load_level(distiller, i, recorded, f"st{i}", f"st{i}_gn")
    distiller._assigned, distiller.batches = True, 5
    students = {f"s{i}": recorded[f"st{i}_student"].requires_grad_() for i in levels}
    total = sum(distiller(students, {f"s{i}": recorded[f"st{i}_teacher"] for i in levels}).values()) * 2
    total.backward()
    assert total.item() == pytest.approx(float(recorded["loss_distill"]), rel=1e-4)
    for i in levels:
        got, want = students[f"s{i}"].grad, recorded[f"st{i}_grad_student"]
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_golden_costs_lead_to_the_golden_assignment_through_the_distiller(golden):
    costs, want = golden("matching_cost"), golden("matching_assign")
    for case, stage in CASES:
        name = f"{case}_st{stage}"
        s, t = (costs[f"{name}_{who}_b0"].shape[1] for who in ("student", "teacher"))
        distiller = matching([stage_pair(s, t)])
        for j in (0, 1):
            both = [{"res4.pre_relu": costs[f"{name}_{who}_b{j}"]} for who in ("student", "teacher")]
            distiller.track(*both)
        assert distiller.statistics.images == int(costs[f"{case}_num_images"])
        distiller.refresh()
        assert torch.equal(assigned_student(distiller.assignment0, t), want[f"{name}_owner"])
        assert distiller.statistics.images == 0


def test_rule_of_the_published_detection_run():
    schedule = schedule_of(periods=(5000, 31000), steps=(20000,), images=2000, images_per_iteration=16)
    assert [i for i in range(90000) if schedule.due(i)] == [0, 5000, 10000, 15000, 31000, 62000]
    refreshes = [i for i in range(32000) if schedule.refreshes(i)]
    # online, the first window follows the start, the others end at their refresh
    assert refreshes == [124, 5000, 10000, 15000, 31000]
    tracked = [i for i in range(6000) if schedule.tracks(i)]
    assert tracked == [*range(125), *range(4876, 5001)]


def test_schedule_counts_iterations_not_accumulated_batches():
    schedule = schedule_of(iterations=(3,), images_per_iteration=4, batches_per_iteration=2)
    assert [b for b in range(10) if schedule.refreshes(b)] == [6]
    assert [b for b in range(10) if schedule.tracks(b)] == [3, 4, 5, 6]


def test_an_assignment_rests_on_its_own_window_with_accumulation_too():
    distiller = matching([stage_pair()], (0, 5), 8, images_per_iteration=8, batches_per_iteration=4)
    seen = []
    for step in range(24):
        distiller(*stage_maps(seed=step))
        seen.append(distiller.statistics.images)
    assert seen == [2, 4, 6, *[0] * 14, 2, 4, 6, *[0] * 4]


def test_online_assigns_from_the_first_batch_then_from_whole_windows():
    distiller = matching([stage_pair()], iterations=(0, 5), images=6)
    seen = []
    for step in range(8):
        before = distiller.assignment0.clone()
        distiller(*stage_maps(seed=step))
        seen.append((distiller.statistics.images, not torch.equal(before, distiller.assignment0)))
    assert [images for images, _ in seen] == [2, 4, 0, 2, 4, 0, 0, 0]
    assert seen[0][1] and not any(moved for i, (_, moved) in enumerate(seen) if i in (1, 3, 4, 6, 7))
    alone = matching([stage_pair()])
    for step in (3, 4, 5):
        alone.track(*stage_maps(seed=step))
    alone.refresh()
    assert torch.equal(alone.assignment0, distiller.assignment0)


def test_a_list_without_the_start_forgets_the_first_batch():
    distiller = matching([stage_pair()], iterations=(3,), images=4)
    seen = []
    for step in range(5):
        distiller(*stage_maps(seed=step))
        seen.append((distiller.assigned, distiller.statistics.images))
    assert seen == [(True, 0), (True, 0), (True, 2), (True, 0), (True, 0)]


@pytest.mark.parametrize("reducer", REDUCERS)
def test_state_round_trip_continues_bit_by_bit(reducer):
    make = lambda: matching([stage_pair()], iterations=(0, 4), images=4, reducer=reducer, adapter="bn")  # noqa: E731
    one = make()
    for step in range(3):
        one(*stage_maps(seed=step))
    other = make()
    other.load_state_dict(one.state_dict())
    for step in range(3, 7):
        losses = [d(*stage_maps(seed=step))["res4.pre_relu"].item() for d in (one, other)]
        assert losses[0] == losses[1]
    a, b = one.state_dict(), other.state_dict()
    assert a.pop("_extra_state") == b.pop("_extra_state") and same_tensors(a, b)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_weight_zero_gives_the_student_no_gradient_and_every_parameter_one(reducer):
    distiller = matching([stage_pair()], weight=0.0, reducer=reducer, adapter="bn")
    student, teacher = stage_maps()
    student["res4.pre_relu"].requires_grad_()
    loss = distiller(student, teacher)["res4.pre_relu"]
    loss.backward()
    assert loss.item() == 0 and student["res4.pre_relu"].grad is None
    assert all(p.grad is not None and not p.grad.any() for p in distiller.parameters())


def test_standardized_loss_does_not_see_the_scale_of_the_teacher():
    values = []
    for scale in (1.0, 100.0):
        distiller = matching([stage_pair(norm_scale=scale)], normalize="standardize", reduction="mean", adapter="bn")
        student, teacher = stage_maps()
        values.append(distiller(student, {k: scale * t for k, t in teacher.items()})["res4.pre_relu"].item())
    assert values[1] == pytest.approx(values[0], rel=1e-3)
    reduced = scale_to_unit(Reduced(100 * teacher["res4.pre_relu"] + 30, torch.zeros(8)))
    assert reduced.map.mean() > 0.1  # not centered: zero stays where the ReLU cuts


def test_sparse_matching_gives_one_channel_and_may_use_the_remainder():
    student, teacher = stage_maps(3, 7)
    teacher["res4.pre_relu"][:, 6] = student["res4.pre_relu"][:, 1]
    distiller = matching([stage_pair(3, 7)], reducer="sm")
    distiller(student, teacher)
    assert distiller.assignment0.shape == (3, 1) and distiller.assignment0[1].item() == 6


def test_margins_from_activations_where_the_teacher_has_no_norm():
    distiller = matching([stage_pair(norm_scale=None)], images=2)
    assert not distiller.margin0.any()
    student, teacher = stage_maps()
    t = teacher["res4.pre_relu"]
    t[:, 3] = t[:, 3].abs()
    distiller(student, teacher)
    want = torch.stack([c[c < 0].mean() if (c < 0).any() else c.new_tensor(0.0) for c in t.transpose(0, 1)])
    torch.testing.assert_close(distiller.margin0, want)
    assert distiller.margin0[3] == 0


@pytest.mark.parametrize("norm, found", [("BN", True), ("FrozenBN", True), ("GN", False), ("", False)])
def test_margins_come_from_the_batch_norm_that_ends_the_stage(norm, found):
    wide = {f"MODEL__RESNETS__{key}": 32 for key in ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP")}
    net = model(config(MODEL__RESNETS__NORM=norm, **wide))
    got = last_norm(net, "res4.pre_relu")
    assert got is (net.backbone.bottom_up.res4[-1].conv3.norm if found else None)
    assert last_norm(net, "p3") is None


def test_a_norm_after_the_shortcut_is_not_taken():
    net = model(config(MODEL__RESNETS__DEPTH=18, MODEL__RESNETS__RES2_OUT_CHANNELS=64))
    net.backbone.bottom_up.res4 = net.backbone.bottom_up.res4[:1]  # a stage of one block, with a shortcut
    assert last_norm(net, "res4.pre_relu") is net.backbone.bottom_up.res4[0].conv2.norm


def test_groups_of_the_adapter_divide_narrow_maps():
    assert build_adapter("gn", 64).num_groups == 32 and build_adapter("gn", 48).num_groups == 16
    assert build_adapter("syncbn", 8)(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)


def distilled(tmp_path, teacher=None, **changes):
    named = write_teacher(tmp_path, teacher or config(MODEL__RESNETS__RES2_OUT_CHANNELS=32))
    return build_distilled_model(config(**{**MATCHING, **named, **changes}))


def test_a_step_runs_every_body_once_and_no_teacher_head(tmp_path):
    net = distilled(tmp_path).train()
    calls = []
    for who, body in (("student", net.student.backbone.bottom_up), ("teacher", net.teacher.model.backbone.bottom_up)):
        body.stem.register_forward_hook(lambda *args, who=who: calls.append(who))
    net.teacher.model.head.register_forward_hook(lambda *args: calls.append("head"))
    with EventStorage():
        losses = net(batch())
    assert sorted(calls) == ["student", "teacher"]
    levels = [f"distill/ChannelMatching/res{i}.pre_relu" for i in (2, 3, 4, 5)]
    assert [name for name in losses if name.startswith("distill")] == levels
    sum(losses[name] for name in levels).backward()
    assert net.student.backbone.bottom_up.res2[0].conv1.weight.grad.abs().sum() > 0


def test_margins_follow_the_weights_that_were_loaded(tmp_path):
    net = distilled(tmp_path, MODEL__RESNETS__NORM="BN")
    norm = net.teacher.model.backbone.bottom_up.res5[-1].conv3.norm
    with torch.no_grad():
        norm.weight.fill_(2.0)
        norm.bias.fill_(-0.3)
    weights_file = tmp_path / "changed.pth"
    torch.save({"model": net.teacher.model.state_dict()}, weights_file)
    named = {"CONFIG_FILE": str(tmp_path / "teacher.yaml"), "WEIGHTS": str(weights_file)}
    again = build_distilled_model(config(**MATCHING, **{f"DISTILL__TEACHER__{k}": v for k, v in named.items()}))
    want = norm_margin(torch.tensor([2.0]), torch.tensor([-0.3])).float()
    margin = again.distillers["ChannelMatching"].margin3
    torch.testing.assert_close(margin, want.expand_as(margin))


#: Of each recipe with published settings: tap weights, the first refreshes, the images that each rests on, adapter.
PUBLISHED = {
    "COCO/retinanet_R18_R50_ChannelMatching_1x": (
        [1 / 4e8, 1 / 4e8, 1 / 4e7, 1 / 4e7],
        [0, 5000, 10000, 15000, 31000, 62000],
        2000,
        torch.nn.GroupNorm,
    ),
    "ImageNet/mobilenetv1_R50_ChannelMatching_130e": (
        [1 / 8e4, 1 / 4e4, 1 / 2e4, 1 / 1e4],
        [0, 5005, 10010, 15015, 20020, 25025],
        20480,
        torch.nn.BatchNorm2d,
    ),
    "CUB200/mobilenetv2_R50_ChannelMatching": (
        [1 / 4e4, 1 / 2e4, 1 / 1e4],
        [0, 188, 376, 564, 752, 940],
        5994,
        torch.nn.BatchNorm2d,
    ),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_have_the_published_numbers(recipe):
    cfg = load_config(str(ROOT / f"configs/{recipe}.yaml"))
    taps = cfg.DISTILL.CHANNEL_MATCHING.TAPS
    distiller = ChannelMatching.build(cfg, [stage_pair(32, 64, tap) for tap in taps])
    assert (distiller.normalize, distiller.reduction) == ("none", "batchmean")
    assert (distiller.reducer, distiller.weight) == ("amp", 1.0)
    assert distiller.tap_weights == pytest.approx(PUBLISHED[recipe][0])
    refreshes = [i for i in range(65000) if distiller.schedule.due(i)][:6]
    assert (refreshes, distiller.schedule.images) == PUBLISHED[recipe][1:3]
    assert not distiller.schedule.online and type(distiller.adapters[0]) is PUBLISHED[recipe][3]


def test_a_preset_of_version_0_1_is_an_error_that_names_the_recipes():
    with pytest.raises(
        ConfigError, match=r"DISTILL\.CHANNEL_MATCHING\.PRESET coco_retinanet.*configs/COCO/retinanet_R18_R50"
    ):
        load_config("", ["DISTILL.CHANNEL_MATCHING.PRESET", "coco_retinanet_r50_r18"])


def test_more_student_than_teacher_channels_is_an_error_with_both(tmp_path):
    where = r"DISTILL\.CHANNEL_MATCHING\.TAPS, res2\.pre_relu <- res2\.pre_relu: "
    message = where + r"the student's map has 32 channels, the teacher's only 16.*DISTILL\.CHANNEL_MATCHING\.TAPS\b"
    with pytest.raises(AlignmentError, match=message):
        distilled(tmp_path, teacher=config(), MODEL__RESNETS__RES2_OUT_CHANNELS=32)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"reducer": "max"}, "REDUCER"),
        ({"remainder": "keep"}, "REMAINDER"),
        ({"adapter": "ln"}, "ADAPTER"),
        ({"tap_weights": [1.0, 2.0]}, "TAP_WEIGHTS"),
        ({"tap_weights": [-1.0]}, "TAP_WEIGHTS"),
        ({"assignment_solver": "lp"}, "ASSIGNMENT_SOLVER"),
        ({"tracking": "never"}, "TRACKING"),
        ({"images": 0}, "TRACK_IMAGES"),
        ({"weight": -1.0}, "WEIGHT"),
    ],
)
def test_arguments_out_of_range_name_the_key(changes, key):
    with pytest.raises(ValueError, match=rf"DISTILL\.CHANNEL_MATCHING\.{key}\b"):
        matching([stage_pair()], **changes)


@pytest.mark.parametrize(
    "name, value", [("refresh_periods", [5, 6]), ("refresh_steps", [9, 3]), ("refresh_steps", [-1])]
)
def test_schedule_out_of_range_names_the_key(name, value):
    settings = {"refresh_periods": [5], "refresh_steps": [], name: value}
    with pytest.raises(ValueError, match=rf"DISTILL\.CHANNEL_MATCHING\.{name.upper()}\b"):
        matching([stage_pair()], **settings)


def test_features_that_are_not_finite_are_an_error_and_leave_the_statistics_alone():
    distiller = matching([stage_pair()], iterations=(0, 3), images=4)
    student, teacher = stage_maps()
    student["res4.pre_relu"][0, 0, 0, 0] = float("nan")
    with pytest.raises(AssignmentError, match="finite"):
        distiller(student, teacher)
    assert distiller.statistics.images == 0 and not distiller.statistics.sums.any()


def test_pass_outside_the_trainer_says_what_to_do():
    with pytest.raises(AssignmentError, match=r"DISTILL\.CHANNEL_MATCHING\.TRACKING\b"):
        matching([stage_pair()], tracking="pass")(*stage_maps())


@pytest.mark.parametrize("tracking", ["online", "pass"])
def test_interrupted_and_resumed_is_bit_equal(write_config, teacher, tmp_path, tracking):
    path = write_config(**MATCHING, DISTILL__CHANNEL_MATCHING__TRACKING=tracking, DATASETS__TEST=[], **teacher)
    whole = run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    a, b = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    assert same_tensors(a["model"], b["model"])
    extra = "ChannelMatching._extra_state"
    assert a["distillers"].pop(extra) == b["distillers"].pop(extra) and same_tensors(a["distillers"], b["distillers"])
    assert whole.distilled.distillers["ChannelMatching"].batches == 6


@pytest.mark.parametrize(("before", "after"), [((4, 1), (2, 2)), ((2, 2), (4, 1))])
def test_a_resumed_run_refreshes_when_due_whatever_the_batches_of_an_iteration(
    write_config, teacher, tmp_path, before, after, caplog
):
    settings = {**MATCHING, "DISTILL__CHANNEL_MATCHING__REFRESH_ITERS": [0, 5], "DATASETS__TEST": []}
    path = write_config(**settings, **teacher)
    batches = [{"SOLVER__IMS_PER_BATCH": images, "SOLVER__ACCUMULATE": times} for images, times in (before, after)]
    run_training(path, stop_at=4, **batches[0])
    with caplog.at_level(logging.INFO, "d2kd"):
        trainer = run_training(path, resume=True, **batches[1])
    matching = trainer.distilled.distillers["ChannelMatching"]
    assert matching.batches == 6 * after[1] and matching.schedule.refreshes(5 * after[1])
    assert caplog.text.count("images: mean distance") == len(matching.pairs)


def _interrupted(path, output):
    torch.set_num_threads(1)
    run_training(path, OUTPUT_DIR=f"{output}/whole")
    run_training(path, OUTPUT_DIR=f"{output}/parts", stop_at=3)
    run_training(path, OUTPUT_DIR=f"{output}/parts", resume=True)


def test_two_processes_with_passes_resume_bit_equal(write_config, teacher, tmp_path):
    # a pass looks at the student with its batch statistics, which differ between processes and are saved of one only
    changes = {"DISTILL__CHANNEL_MATCHING__TRACKING": "pass", "MODEL__RESNETS__NORM": "BN", "DATASETS__TEST": []}
    in_two_processes(_interrupted, write_config(**MATCHING, **changes, **teacher), tmp_path)
    whole, parts = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    assert same_tensors(whole["model"], parts["model"])
    assert whole["distillers"].keys() == parts["distillers"].keys()
    members = [k for k in whole["distillers"] if "assignment" in k]
    assert members and all(torch.equal(whole["distillers"][k], parts["distillers"][k]) for k in members)


def test_a_failed_step_leaves_no_trace(write_config, teacher, tmp_path):
    path = write_config(**MATCHING, DATASETS__TEST=[], **teacher)
    cfg = load_config(str(path))
    register_datasets(cfg)
    torch.manual_seed(cfg.SEED)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    distiller = trainer.distilled.distillers["ChannelMatching"]
    plain = distiller.level_loss
    distiller.level_loss = lambda level, s, t: plain(level, s, t) * (float("nan") if trainer.iter == 4 else 1.0)
    with pytest.raises(NonFiniteLossError, match="iteration 4"):
        trainer.train()
    run_training(path, resume=True)
    run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    a, b = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "student")
    assert same_tensors(a["model"], b["model"])
    extra = "ChannelMatching._extra_state"
    assert a["distillers"].pop(extra) == b["distillers"].pop(extra) and same_tensors(a["distillers"], b["distillers"])


def test_assignments_of_another_teacher_are_an_error(write_config, teacher, tmp_path):
    path = write_config(**MATCHING, DATASETS__TEST=[], **teacher)
    run_training(path, stop_at=3)
    state = torch.load(teacher["DISTILL__TEACHER__WEIGHTS"], weights_only=True)
    state["model"]["backbone.bottom_up.res2.0.conv1.weight"] += 0.01
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="another teacher"):
        run_training(path, resume=True, DISTILL__TEACHER__WEIGHTS=str(tmp_path / "other.pth"))


def _rank_losses():
    distiller = matching([stage_pair(4, 9, norm_scale=None)], iterations=(0, 2), images=4)
    half = slice(comm.get_rank(), comm.get_rank() + 1) if comm.get_world_size() > 1 else slice(0, 2)
    losses = []
    for step in range(4):
        student, teacher = ({k: v[half] for k, v in m.items()} for m in stage_maps(4, 9, seed=step))
        losses.append(distiller(student, teacher)["res4.pre_relu"].item())
    return losses, distiller


def _error_when_the_main_process_has_no_solver():
    def fail(*args):
        raise AssignmentError("no solver")

    if comm.is_main_process():
        distiller_module.assign_channels = fail
    with pytest.raises(AssignmentError) as error:
        matching([stage_pair()])(*stage_maps())
    return str(error.value)


def _two_ranks(path):
    losses, distiller = _rank_losses()
    state = [distiller.assignment0, distiller.margin0, distiller.statistics.sums]
    everyone = comm.all_gather((losses, state, _error_when_the_main_process_has_no_solver()))
    if comm.is_main_process():
        torch.save(everyone, path)


def test_two_processes_agree_equal_one_and_fail_together(tmp_path):
    in_two_processes(_two_ranks, tmp_path / "two.pth")
    two = torch.load(tmp_path / "two.pth", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(two[0][1], two[1][1]))
    losses, distiller = _rank_losses()
    assert torch.equal(two[0][1][0], distiller.assignment0)
    mean = torch.tensor([rank[0] for rank in two]).mean(dim=0)
    torch.testing.assert_close(mean, torch.tensor(losses), rtol=1e-5, atol=1e-5)
    assert two[0][2] == "no solver" and "main process" in two[1][2]


@pytest.mark.parametrize("freeze_at", [1, 2])
def test_published_student_has_group_norm_in_the_last_block_of_stages_that_are_not_frozen(freeze_at):
    name = "build_retinanet_resnet_fpn_last_norm_backbone"
    narrow = {"MODEL__RESNETS__DEPTH": 18, "MODEL__RESNETS__RES2_OUT_CHANNELS": 64, "MODEL__RESNETS__NORM": "FrozenBN"}
    net = model(config(MODEL__BACKBONE__NAME=name, MODEL__BACKBONE__FREEZE_AT=freeze_at, **narrow))
    body = net.backbone.bottom_up
    for number, stage in enumerate((body.res2, body.res3, body.res4, body.res5), start=2):
        kinds = [type(block.conv2.norm).__name__ for block in stage]
        assert kinds == ["FrozenBatchNorm2d", "FrozenBatchNorm2d" if number <= freeze_at else "GroupNorm"]
        assert all(p.requires_grad == (number > freeze_at) for p in stage.parameters())
    state = {f"backbone.bottom_up.res4.1.conv2.norm.{key}": torch.full((256,), 0.5) for key in ("weight", "bias")}
    net.load_state_dict(state, strict=False)
    assert body.res4[1].conv2.norm.bias[0].item() == 0.5


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_the_error_of_no_image_is_zero_and_connected(reduction):
    source = torch.zeros(0, 4, 3, 3, requires_grad=True)
    loss = one_sided_error(source, Reduced(torch.zeros(0, 4, 3, 3), torch.zeros(4)), reduction)
    loss.backward()
    assert loss == 0 and source.grad.shape == source.shape
