"""Inheriting: what is copied, what is not, and what is an error."""

import pytest
import torch
from helpers import same_tensors
from models import FASTER_RCNN, config, model, write_teacher
from runs import in_two_processes, make_trainer, read_checkpoint, run_training, train_in_step

from d2kd.errors import UserError
from d2kd.modeling import build_distilled_model
from d2kd.modeling.architectures import architecture_of
from d2kd.modeling.classes import Classes, match_classes
from d2kd.modeling.init_from_teacher import (
    InitializationError,
    InitializationReport,
    freeze_initialized,
    init_from_teacher,
    plan_initialization,
)


def changed(net, before):
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def matches(ours, theirs):
    """Different numbers of classes, whose names are not known."""
    numbers = {"thing_classes": Classes("A", ours, None)}, {"thing_classes": Classes("B", theirs, None)}
    return match_classes(*numbers)


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_neck_and_head_are_copied_and_the_body_keeps_its_own():
    student, teacher = model(seed=1), model(seed=2)
    before = snapshot(student)
    report = init_from_teacher(student, teacher)
    assert not report.other_shape and not report.absent
    assert all(torch.equal(student.state_dict()[n], teacher.state_dict()[n]) for n in report.copied)
    assert changed(student, before) <= set(report.copied)
    assert {"backbone.fpn_lateral3.weight", "backbone.top_block.p6.weight"} <= set(report.copied)
    assert "head.cls_score.weight" in report.copied
    assert not any(name.startswith("backbone.bottom_up.") for name in report.copied)


def test_other_widths_are_skipped_and_reported_with_both_shapes():
    student, teacher = model(seed=1), model(config(MODEL__RESNETS__RES2_OUT_CHANNELS=32), seed=2)
    report = init_from_teacher(student, teacher)
    assert ("backbone.fpn_lateral3.weight", (8, 32, 1, 1), (8, 64, 1, 1)) in report.other_shape
    assert "backbone.fpn_lateral3.bias" in report.copied and "head.cls_score.weight" in report.copied


def test_excluded_modules_keep_their_own():
    student = model(seed=1)
    before = snapshot(student)
    init_from_teacher(student, model(seed=2), exclude=["head."])
    assert not any(name.startswith("head.") for name in changed(student, before))
    with pytest.raises(InitializationError, match="heads"):
        init_from_teacher(student, model(seed=2), exclude=["heads"])


def test_layers_of_other_classes_keep_their_own():
    student, teacher = model(seed=1), model(config(MODEL__RETINANET__NUM_CLASSES=5), seed=2)
    before = snapshot(student)
    report = init_from_teacher(student, teacher, classes=matches(3, 5))
    assert set(report.by_class) == {"head.cls_score.weight", "head.cls_score.bias"}
    assert not any(name.startswith("head.cls_score") for name in changed(student, before))
    assert not init_from_teacher(student, teacher, exclude=["head.cls_score"], classes=matches(3, 5)).by_class


def test_layers_of_another_width_are_no_predictors_of_other_classes():
    narrow = model(config(MODEL__FPN__OUT_CHANNELS=4, MODEL__RETINANET__NUM_CLASSES=5), seed=2)
    report = init_from_teacher(model(seed=1), narrow, classes=matches(3, 5))
    assert "backbone.fpn_output3.weight" in [name for name, *_ in report.other_shape]
    assert set(report.by_class) == {"head.cls_score.bias"}


def test_another_architecture_shares_what_has_the_same_name():
    student, teacher = model(config(FASTER_RCNN), seed=1), model(seed=2)
    report = init_from_teacher(student, teacher)
    assert any(name.startswith("roi_heads.") for name in report.absent)
    assert "backbone.fpn_output3.weight" in report.copied


def test_the_student_is_not_tied_to_the_teacher():
    student, teacher = model(seed=1), model(seed=2)
    init_from_teacher(student, teacher)
    with torch.no_grad():
        student.head.cls_score.weight.add_(1)
    assert not torch.equal(student.head.cls_score.weight, teacher.head.cls_score.weight)


def test_body_of_models_with_and_without_a_neck():
    assert architecture_of(model()).bottom_up == "backbone.bottom_up"
    plain = config(
        MODEL__BACKBONE__NAME="build_resnet_backbone",
        MODEL__META_ARCHITECTURE="ProposalNetwork",
        MODEL__RESNETS__OUT_FEATURES=["res4"],
        MODEL__ANCHOR_GENERATOR__SIZES=[[32]],
    )
    assert architecture_of(model(plain)).bottom_up == "backbone"


# ---- modules that stay the teacher's ----


def frozen(modules, student=None, teacher=None, exclude=(), classes=None):
    student = model(seed=1) if student is None else student
    plan = plan_initialization(student, model(seed=2) if teacher is None else teacher, exclude, classes)
    freeze_initialized(student, plan, modules)
    return student


def test_frozen_modules_have_no_gradient_and_all_others_do():
    student = frozen(["head", "backbone.fpn_lateral3.bias"])
    still = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    other = {name for name in still if not name.startswith("head.")}
    assert other == {"backbone.fpn_lateral3.bias"}
    assert still - other == {name for name, _ in student.named_parameters() if name.startswith("head.")}
    assert all(parameter.requires_grad for parameter in frozen([]).parameters())


@pytest.mark.parametrize(
    "modules, options, reason",
    [
        (["heads"], {}, "'heads', but nothing in the student starts so"),
        (["head", "backbone.bottom_up.stem"], {}, "stem.* the student keeps its own"),
        (["head"], {"exclude": ["head.bbox_pred"]}, "head.bbox_pred.* the student keeps its own"),
        (["head"], {"classes": matches(3, 5)}, "head.cls_score.* the classes differ"),
        (["backbone"], {}, "backbone.bottom_up.* the student keeps its own"),
        (["backbone.fpn"], {}, r"fpn_lateral3.weight .*\(8, 64, 1, 1\) here and \(8, 32, 1, 1\) there"),
        (["backbone.fpn_output6"], {}, "backbone.fpn_output6.* it has no such layer"),
        (["head.cls_subnet"], {}, "The teacher has head.cls_subnet.2.weight too"),
        (["head.bbox_pred"], {}, "must have the same encoding of boxes"),
    ],
)
def test_only_what_is_taken_as_a_whole_can_be_frozen(modules, options, reason):
    wide = config(MODEL__RESNETS__RES2_OUT_CHANNELS=32)
    student, teacher = model(seed=1), model(seed=2)
    if "fpn_lateral3" in reason:
        student = model(wide, seed=1)
    elif "fpn_output6" in reason:
        student.backbone.fpn_output6 = torch.nn.Conv2d(8, 8, 3)
    elif "cls_subnet" in reason:
        teacher = model(config(MODEL__RETINANET__NUM_CONVS=2), seed=2)
    elif "encoding" in reason:
        teacher = model(config(MODEL__RETINANET__BBOX_REG_WEIGHTS=(10.0, 10.0, 5.0, 5.0)), seed=2)
    elif "classes" in options:
        teacher = model(config(MODEL__RETINANET__NUM_CLASSES=5), seed=2)
    with pytest.raises(InitializationError, match=f"FREEZE names .*{reason}"):
        frozen(modules, student, teacher, **options)
    assert all(p.requires_grad for p in student.parameters()), "half of it was frozen"


def test_layers_whose_outputs_are_read_otherwise_are_told_where_they_are_taken(caplog):
    student = model(config(MODEL__RETINANET__BBOX_REG_WEIGHTS=(10.0, 10.0, 5.0, 5.0)), seed=1)
    report = init_from_teacher(student, model(seed=2))
    assert (
        list(report.other_meaning) == ["head.bbox_pred"] and "means something else here: head.bbox_pred" in caplog.text
    )
    assert not init_from_teacher(student, model(seed=2), exclude=["head.bbox_pred"]).other_meaning


def test_batch_norms_that_are_frozen_keep_their_statistics_whoever_calls_train():
    student, teacher = torch.nn.ModuleDict(), torch.nn.ModuleDict()
    for network in (student, teacher):
        network["head"] = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.BatchNorm2d(2))
        network["other"] = torch.nn.BatchNorm2d(2)
    plan = InitializationReport([f"head.{n}" for n in student["head"].state_dict()], [], [], {})
    freeze_initialized(student, plan, ["head"])
    before = snapshot(student)
    images = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        student.train()
        student["other"](student["head"](images))
    assert changed(student, before) == {f"other.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}


FROZEN = {
    "DISTILL__METHODS": ["FeatureMimic", "CrossKD"],
    "DISTILL__TASK_WEIGHT": 0.5,
    "DISTILL__INIT_FROM_TEACHER__FREEZE": ["head"],
    "SOLVER__EMA__ENABLED": True,
}


def test_a_training_keeps_frozen_modules_also_when_resumed(write_config, teacher, tmp_path, caplog):
    path = write_config(**teacher, **FROZEN)
    with caplog.at_level("WARNING", "d2kd"):
        trainer = run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    assert "are frozen" not in caplog.text, "the head has the teacher's values, not random ones"
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in trainer.student.head.parameters()}
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    whole = read_checkpoint(tmp_path / "whole")["model"]
    assert same_tensors(whole, read_checkpoint(tmp_path / "parts")["model"])
    theirs = torch.load(teacher["DISTILL__TEACHER__WEIGHTS"])["model"]
    assert all(torch.equal(whole[name], theirs[name]) for name in whole if name.startswith("head."))
    assert not torch.equal(whole["backbone.fpn_output3.weight"], theirs["backbone.fpn_output3.weight"])
    with pytest.raises(UserError, match=r"FREEZE was \['head'\] and is \[\], and cannot change within a run"):
        run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True, DISTILL__INIT_FROM_TEACHER__FREEZE=[])


def test_two_processes_with_frozen_modules_stay_in_step(write_config, teacher, tmp_path):
    in_two_processes(train_in_step, write_config(**teacher, **FROZEN), tmp_path / "two")
    ours, theirs = read_checkpoint(tmp_path / "two")["model"], torch.load(teacher["DISTILL__TEACHER__WEIGHTS"])["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("head."))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_what_is_initialized_learns_at_a_rate_of_its_own(write_config, teacher, optimizer):
    solver = {"SOLVER__OPTIMIZER": optimizer, "SOLVER__BIAS_LR_FACTOR": 2.0, "SOLVER__BASE_LR": 0.01}
    method = {"DISTILL__METHODS": ["MaskedGenerative"], "DISTILL__INIT_FROM_TEACHER__LR_FACTOR": 0.1}
    trainer = make_trainer(write_config(**teacher, **solver, **method))
    groups = trainer.optimizer.param_groups
    assert all(group["params"] for group in groups)
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    for name, parameter in trainer.student.named_parameters():
        if parameter.requires_grad:
            own = (
                "backbone.bottom_up.",
                "backbone.fpn_lateral",
                "backbone.top_block.p6.",
            )  # the latter of other widths
            taken = not name.startswith(own)
            expected = 0.01 * (0.1 if taken else 1.0) * (2.0 if name.endswith("bias") else 1.0)
            assert rates[id(parameter)] == pytest.approx(expected), name
    others = [p for p in trainer.distilled.distillers.parameters() if p.requires_grad]
    assert others and all(rates[id(p)] >= 0.01 for p in others)


def test_a_rate_of_its_own_goes_on_when_resumed(write_config, teacher, tmp_path):
    factor = {"DISTILL__INIT_FROM_TEACHER__LR_FACTOR": 0.1, "SOLVER__WARMUP_ITERS": 0}
    path, start = write_config(**teacher, **factor), {}
    for stop, folder in ((None, "whole"), (3, "parts")):
        trainer = run_training(path, OUTPUT_DIR=str(tmp_path / folder), stop_at=stop)
        start[folder] = [group["lr"] for group in trainer.optimizer.param_groups]
    assert len(set(start["whole"])) > 1
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    assert same_tensors(read_checkpoint(tmp_path / "whole")["model"], read_checkpoint(tmp_path / "parts")["model"])
    with pytest.raises(UserError, match=r"LR_FACTOR was 0\.1 and is 1\.0, and cannot change within a run"):
        run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True, DISTILL__INIT_FROM_TEACHER__LR_FACTOR=1.0)


def test_proposals_are_predictors_too(tmp_path, caplog):
    named = {**write_teacher(tmp_path, config(FASTER_RCNN)), "DISTILL__TASK_WEIGHT": 0.0}

    def build(*modules):
        caplog.clear()
        return build_distilled_model(config(FASTER_RCNN, **named, DISTILL__INIT_FROM_TEACHER__FREEZE=list(modules)))

    build("roi_heads")
    assert "no method trains proposal_generator.rpn_head.objectness_logits.weight" in caplog.text
    build("roi_heads", "proposal_generator")
    assert "weight decay" not in caplog.text


def test_nothing_can_be_frozen_that_is_not_initialized(write_config, teacher):
    path = write_config(**teacher, **FROZEN, DISTILL__INIT_FROM_TEACHER__ENABLED=False)
    with pytest.raises(UserError, match=r"FREEZE is \['head'\], and ENABLED there is False"):
        make_trainer(path)


def test_a_rate_of_nothing_is_said_to_have_no_effect(write_config, teacher, caplog):
    keys = {"DISTILL__INIT_FROM_TEACHER__ENABLED": False, "DISTILL__INIT_FROM_TEACHER__LR_FACTOR": 0.5}
    trainer = make_trainer(write_config(**teacher, **keys))
    assert "LR_FACTOR has no effect: ENABLED there is False" in caplog.text
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {trainer.cfg.SOLVER.BASE_LR}


def test_without_the_task_predictors_must_come_from_somewhere(write_config, teacher, caplog):
    alone = {**teacher, "DISTILL__TASK_WEIGHT": 0.0, "DISTILL__METHODS": ["FeatureMimic", "CrossKD"]}
    make_trainer(write_config("frozen", **alone, DISTILL__INIT_FROM_TEACHER__FREEZE=["head"]))
    assert "weight decay" not in caplog.text
    make_trainer(write_config("decays", **alone))
    assert "trains head.cls_score.weight, head.cls_score.bias, head.bbox_pred.weight" in caplog.text
    assert "weight decay alone changes them" in caplog.text
    caplog.clear()
    imitated = {**alone, "DISTILL__METHODS": ["LogitKD", "HeadRegression"]}
    make_trainer(write_config("imitated", **imitated, DISTILL__INIT_FROM_TEACHER__ENABLED=False))
    assert "weight decay" not in caplog.text
    with pytest.raises(UserError, match=r"no method trains head.cls_score.weight.* random weights.* TASK_WEIGHT above"):
        make_trainer(write_config("random", **alone, DISTILL__INIT_FROM_TEACHER__ENABLED=False))
    started = {"DISTILL__INIT_FROM_TEACHER__ENABLED": False, "MODEL__WEIGHTS": "resnet.pth"}
    make_trainer(write_config("started", **alone, **started))
    assert "as the weights of the start have them, and random where those have none" in caplog.text


def test_a_weight_of_the_task_beside_no_method_is_said_to_do_nothing(teacher, caplog):
    cfg = config(**teacher, DISTILL__METHODS=[], DISTILL__TASK_WEIGHT=0.25)
    build_distilled_model(cfg)
    assert "DISTILL.TASK_WEIGHT has no effect" in caplog.text
    caplog.clear()
    build_distilled_model(config(**teacher, DISTILL__METHODS=[]))
    assert "no effect" not in caplog.text
