"""What must agree between data, teacher, student and checkpoint: classes by name, limits, settings of a resumed run."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from models import FASTER_RCNN, RETINANET, batch, config, model, write_teacher
from runs import make_trainer, read_checkpoint, run_training
from test_bad_input import error_of

from d2kd.data.datasets import register_coco
from d2kd.engine import CheckpointError, DistillTrainer, load_config
from d2kd.engine.checkpoint import DistillCheckpointer, load_start
from d2kd.engine.evaluation import evaluate_teacher
from d2kd.errors import ConfigError, UserError
from d2kd.modeling import build_distilled_model, initialize_student, teacher_config
from d2kd.modeling.architectures import ClassLayer, architecture_of
from d2kd.modeling.checkpoint_files import write_checkpoint
from d2kd.modeling.classes import Classes, classes_of, match_classes
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage

DIGITS = [str(d) for d in range(10)]
#: Another order of three classes: place of the student's class in the teacher.
ORDER = (2, 0, 1)
CLASSIFIED = {"RetinaNet": RETINANET, "Faster R-CNN": FASTER_RCNN}


@pytest.fixture
def named_classes():
    """A registered dataset, "abc", with three classes."""
    DatasetCatalog.register("abc", lambda: [])
    MetadataCatalog.get("abc").thing_classes = ["a", "b", "c"]
    yield
    DatasetCatalog.remove("abc")
    MetadataCatalog.remove("abc")


def class_names(*names):
    return {"class_names": {"thing_classes": list(names)}}


def reordered(net):
    """The weights of a model whose three classes are numbered otherwise, class k as ORDER[k]."""
    state = net.state_dict()
    for layer in architecture_of(net).class_layers():
        for name in (f"{layer.path}.weight", f"{layer.path}.bias"):
            groups = layer.groups(len(state[name]), 3)
            numbers = state[name][: groups * 3 * layer.width].unflatten(0, (groups, 3, layer.width))
            moved = torch.empty_like(numbers)
            moved[:, list(ORDER)] = numbers
            state[name] = torch.cat([moved.flatten(0, 2), state[name][groups * 3 * layer.width :]])
    return state


def distilled(tmp_path, base, weights, extra, methods, **changes):
    path = write_teacher(tmp_path, config(base))
    torch.save({"model": weights, **extra}, path["DISTILL__TEACHER__WEIGHTS"])
    cfg = config(base, DISTILL__METHODS=methods, DATASETS__TRAIN=["abc"], **path, **changes)
    torch.manual_seed(0)
    return cfg, build_distilled_model(cfg).train()


# --- classes of the teacher -----------------------------------------------------------------------


@pytest.mark.parametrize("base", CLASSIFIED.values(), ids=CLASSIFIED)
def test_classes_in_another_order_are_matched_by_name(tmp_path, named_classes, base):
    net = model(config(base), seed=7)
    names = [name for _, name in sorted(zip(ORDER, "abc"))]
    losses, states = [], []
    for weights, extra in ((net.state_dict(), class_names(*"abc")), (reordered(net), class_names(*names))):
        cfg, student = distilled(tmp_path, base, weights, extra, ["LogitKD"])
        initialize_student(cfg, student)
        states.append({k: v.clone() for k, v in student.student.state_dict().items()})
        torch.manual_seed(1)
        with EventStorage():
            losses.append({name: loss.item() for name, loss in student(batch()).items() if "distill" in name})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_without_names_classes_are_matched_by_their_place_and_it_is_said(tmp_path, named_classes, caplog):
    net = model(seed=7)
    with caplog.at_level(logging.INFO, "d2kd"):
        cfg, student = distilled(tmp_path, RETINANET, net.state_dict(), {}, [])
    report = initialize_student(cfg, student)
    assert "head.cls_score.weight" in report.copied and not report.by_class
    assert "taken to be class k of the teacher, all 3: the names of the teacher's are not known" in caplog.text


@pytest.fixture
def unread(tmp_path):
    """Registers COCO files whose categories have these names, and reads none of them."""
    registered = []

    def register(name, *names):
        path = tmp_path / f"{name}.json"
        categories = [{"id": i, "name": n} for i, n in enumerate(names, start=1)]
        path.write_text(
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": "1.png", "height": 8, "width": 8}],
                    "annotations": [],
                    "categories": categories,
                }
            )
        )
        register_coco(name, str(path), str(tmp_path))
        registered.append(name)

    yield register
    for name in registered:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_names_are_known_before_a_dataset_is_loaded(tmp_path, unread, caplog):
    unread("ours", *"abc")
    unread("theirs", *"cab")
    net = model(seed=7)
    teacher = write_teacher(tmp_path, config(DATASETS__TRAIN=["theirs"]))
    torch.save({"model": net.state_dict()}, teacher["DISTILL__TEACHER__WEIGHTS"])
    cfg = config(DATASETS__TRAIN=["ours"], DISTILL__METHODS=["LogitKD"], **teacher)
    with caplog.at_level(logging.INFO, "d2kd"):
        student = build_distilled_model(cfg)
    report = initialize_student(cfg, student)
    assert "head.cls_score.weight" in report.by_class
    assert student.distillers["LogitKD"].pairs[0].teacher.order[:3] == (1, 2, 0)
    assert "taken to be class k" not in caplog.text


@pytest.mark.parametrize(
    ("names", "words"),
    [("abc", None), ("cab", "the same names in another order"), ("axc", "they differ from class 1 on"), ("abcd", None)],
)
def test_weights_to_start_from_that_were_trained_for_other_classes_are_told(tmp_path, names, words, caplog):
    of_file = config(MODEL__RETINANET__NUM_CLASSES=len(names))
    torch.save({"model": model(of_file).state_dict(), **class_names(*names)}, tmp_path / "start.pth")
    cfg, student = config(MODEL__WEIGHTS=str(tmp_path / "start.pth")), model(seed=1)
    with caplog.at_level(logging.WARNING, "d2kd"):
        load_start(cfg, student, DistillCheckpointer(student, class_names={"thing_classes": list("abc")}))
    assert ("head.cls_score has what was learned for the class of the same number" in caplog.text) == bool(words)
    assert (words or "") in caplog.text


def test_names_of_a_file_that_is_not_there_are_not_known(tmp_path, unread):
    unread("ours", *"abc")
    (tmp_path / "ours.json").unlink()
    assert classes_of(config(DATASETS__TRAIN=["ours"]))["thing_classes"].names is None
    unread("of_others", *"abcd")
    assert classes_of(config(DATASETS__TRAIN=["of_others"]))["thing_classes"].names is None


def test_classes_that_the_teacher_lacks_keep_their_own(tmp_path, named_classes, caplog):
    net = model(config(MODEL__RETINANET__NUM_CLASSES=4), seed=7)
    teacher = write_teacher(tmp_path, config(MODEL__RETINANET__NUM_CLASSES=4))
    torch.save({"model": net.state_dict(), **class_names("c", "x", "y", "a")}, teacher["DISTILL__TEACHER__WEIGHTS"])
    cfg = config(DATASETS__TRAIN=["abc"], DISTILL__METHODS=[], **teacher)
    torch.manual_seed(0)
    student = build_distilled_model(cfg)
    before = student.student.head.cls_score.weight.clone()
    with caplog.at_level(logging.WARNING, "d2kd"):
        report = initialize_student(cfg, student)
    after, theirs = student.student.head.cls_score.weight, net.head.cls_score.weight
    anchors = len(after) // 3
    for anchor in range(anchors):
        assert torch.equal(after[anchor * 3 + 0], theirs[anchor * 4 + 3])
        assert torch.equal(after[anchor * 3 + 1], before[anchor * 3 + 1])
        assert torch.equal(after[anchor * 3 + 2], theirs[anchor * 4 + 0])
    assert "head.cls_score.weight" in report.by_class and "by the names of classes, 2 of them" in caplog.text


@pytest.mark.parametrize("extra", [{}, class_names("x", "y", "z", "u", "v")], ids=["no names", "other names"])
def test_other_classes_are_left_out_with_a_warning(tmp_path, named_classes, extra, caplog):
    five = config(MODEL__RETINANET__NUM_CLASSES=5)
    teacher = write_teacher(tmp_path, five)
    torch.save({"model": model(five, seed=7).state_dict(), **extra}, teacher["DISTILL__TEACHER__WEIGHTS"])
    cfg = config(DATASETS__TRAIN=["abc"], DISTILL__METHODS=[], **teacher)
    student = build_distilled_model(cfg)
    before = student.student.head.cls_score.weight.clone()
    with caplog.at_level(logging.WARNING, "d2kd"):
        report = initialize_student(cfg, student)
    assert torch.equal(student.student.head.cls_score.weight, before)
    assert "head.bbox_pred.weight" in report.copied
    assert "head.cls_score keep their own values" in caplog.text and "3 classes (a, b, c)" in caplog.text


def test_the_same_number_of_other_classes_is_not_taken_for_the_same(tmp_path, named_classes):
    net = model(seed=7)
    cfg, student = distilled(tmp_path, RETINANET, net.state_dict(), class_names("x", "y", "z"), [])
    assert "head.cls_score.weight" not in initialize_student(cfg, student).copied
    with pytest.raises(UserError, match=r"LogitKD looks at class scores.*\(a, b, c\).*teacher 3 classes \(x, y, z\)"):
        distilled(tmp_path, RETINANET, net.state_dict(), class_names("x", "y", "z"), ["LogitKD"])


def test_names_of_the_teachers_data_stand_in_for_those_of_its_checkpoint(named_classes):
    assert classes_of(config(DATASETS__TRAIN=["abc"]))["thing_classes"].names == ("a", "b", "c")
    assert classes_of(config(DATASETS__TRAIN=["abc"], MODEL__RETINANET__NUM_CLASSES=4))["thing_classes"].names is None
    assert classes_of(config(DATASETS__TRAIN=["abc"]), {"thing_classes": "xyz"})["thing_classes"].names == (
        "x",
        "y",
        "z",
    )


def test_outputs_of_class_agnostic_layers_are_those_of_no_class():
    match = match_classes(
        {"thing_classes": Classes("A", 4, tuple("abcd"))}, {"thing_classes": Classes("B", 4, tuple("dcba"))}
    )["thing_classes"]
    assert match.known == (3, 2, 1, 0) and not match.same
    boxes = ClassLayer("bbox_pred", "region", width=4)
    assert boxes.groups(16, 4) == 1 and boxes.groups(4, 4) is None
    assert ClassLayer("cls_score", "region").has_background(5, 4)
    assert (
        ClassLayer("cls_score", "anchor").groups(12, 4) == 3 and ClassLayer("cls_score", "anchor").groups(5, 4) is None
    )


@pytest.fixture
def five_classes(write_config, teacher, tmp_path):
    """The keys that name a teacher with five classes."""
    five = config(MODEL__RETINANET__NUM_CLASSES=5)
    torch.save({"model": model(five).state_dict()}, tmp_path / "five.pth")
    return {
        "DISTILL__TEACHER__CONFIG_FILE": str(write_config("five", MODEL__RETINANET__NUM_CLASSES=5)),
        "DISTILL__TEACHER__WEIGHTS": str(tmp_path / "five.pth"),
        "DISTILL__TEACHER__EVAL_FIRST": True,
    }


def test_metrics_of_a_teacher_with_other_classes_are_not_defined(write_config, five_classes, tmp_path):
    message = error_of(write_config(**five_classes), tmp_path / "out", eval_teacher=True)
    assert "not defined" in message and "10 classes (0, 1, 2, 3, 4, ...)" in message and "5 classes" in message


def test_such_a_teacher_is_not_evaluated_first(write_config, five_classes, caplog):
    with caplog.at_level(logging.WARNING, "d2kd"):
        run_training(write_config(**five_classes), SOLVER__MAX_ITER=1)
    assert "not defined" in caplog.text and "It is not evaluated" in caplog.text


def test_teacher_and_student_are_evaluated_under_the_same_limits(write_config, teacher):
    path = write_config(TEST__DETECTIONS_PER_IMAGE=7, MODEL__RETINANET__SCORE_THRESH_TEST=0.3, **teacher)
    cfg = load_config(str(path))
    theirs = teacher_config(cfg)
    assert theirs.TEST.DETECTIONS_PER_IMAGE == 7 and theirs.MODEL.RETINANET.SCORE_THRESH_TEST == 0.3


# --- checkpoints ----------------------------------------------------------------------------------


def test_checkpoints_carry_the_names_of_classes(write_config, tmp_path):
    run_training(write_config(SOLVER__EMA__ENABLED=True, TEST__BEST_CHECKPOINT__METRIC="bbox/AP"))
    for name in ("model_final", "model_best", "model_final_ema"):
        assert read_checkpoint(tmp_path / "student", name)["class_names"] == {"thing_classes": DIGITS}


@pytest.mark.parametrize("named", [True, False])
def test_evaluating_a_checkpoint_of_other_classes(write_config, tmp_path, named):
    extra = class_names(*reversed(DIGITS)) if named else {}
    torch.save({"model": model(config(MODEL__RETINANET__NUM_CLASSES=10)).state_dict(), **extra}, tmp_path / "m.pth")
    arguments = write_config(), tmp_path / "out", "MODEL.WEIGHTS", tmp_path / "m.pth"
    if named:
        message = error_of(*arguments, eval_only=True)
        assert "m.pth has the classes (9, 8, 7" in message and "another order" in message
    else:
        cfg = load_config(str(arguments[0]), ["MODEL.WEIGHTS", str(tmp_path / "m.pth")])
        assert cfg.MODEL.WEIGHTS  # an older file, which does not tell: nothing to compare, and the data agree


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(write_config, teacher, tmp_path, value):
    state = torch.load(teacher["DISTILL__TEACHER__WEIGHTS"], weights_only=True)["model"]
    state["head.bbox_pred.bias"][0] = value
    torch.save({"model": state}, tmp_path / "bad.pth")
    keys = {**teacher, "DISTILL__TEACHER__WEIGHTS": str(tmp_path / "bad.pth")}
    message = error_of(write_config(**keys), tmp_path / "out")
    assert "bad.pth" in message and "head.bbox_pred.bias" in message and "infinite or NaN" in message
    state = model(config(MODEL__RETINANET__NUM_CLASSES=10)).state_dict()
    state["head.bbox_pred.bias"][0] = value
    torch.save({"model": state}, tmp_path / "start.pth")
    with pytest.raises(CheckpointError, match=r"MODEL\.WEIGHTS.*start\.pth.*head\.bbox_pred\.bias"):
        run_training(write_config(), MODEL__WEIGHTS=str(tmp_path / "start.pth"))


def test_weights_of_another_network_are_an_error(write_config, tmp_path):
    torch.save({"model": {"features.0.weight": torch.ones(3)}}, tmp_path / "vgg.pth")
    with pytest.raises(CheckpointError, match=r"nothing of it fits the backbone.*res2.*features\.0\.weight"):
        run_training(write_config(), MODEL__WEIGHTS=str(tmp_path / "vgg.pth"))


@pytest.mark.parametrize("wrapped", [False, True])
def test_torchvision_weights_are_understood(write_config, tmp_path, wrapped, caplog):
    resnet = torchvision.models.resnet18(weights=None)
    state = resnet.state_dict()
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "resnet18.pth")
    keys = {
        "MODEL__RESNETS__DEPTH": 18,
        "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
        "MODEL__RESNETS__STEM_OUT_CHANNELS": 64,
        "MODEL__RESNETS__WIDTH_PER_GROUP": 64,
    }
    path = write_config(**keys, MODEL__WEIGHTS=str(tmp_path / "resnet18.pth"))
    with caplog.at_level(logging.WARNING, "d2kd"):
        trainer = make_trainer(path)
        trainer.resume_or_load(resume=False)
    ours = trainer.student.backbone.bottom_up.res4[0].conv1
    assert torch.equal(ours.weight.cpu(), state["layer3.0.conv1.weight"])
    assert torch.equal(ours.norm.weight.cpu(), state["layer3.0.bn1.weight"])
    assert "set INPUT.FORMAT to RGB" in caplog.text


def test_frozen_stages_without_weights_are_told(write_config, caplog):
    trainer = make_trainer(write_config(MODEL__BACKBONE__FREEZE_AT=2))
    with caplog.at_level(logging.WARNING, "d2kd"):
        trainer.resume_or_load(resume=False)
    assert "first backbone.bottom_up.stem.conv1.weight, are frozen (MODEL.BACKBONE.FREEZE_AT is 2)" in caplog.text


# --- what cannot teach ----------------------------------------------------------------------------


def test_taps_in_frozen_stages(write_config, teacher, caplog):
    keys = {**teacher, "MODEL__BACKBONE__FREEZE_AT": 2}
    with pytest.raises(UserError, match=r"FeatureMimic compares res2.*FREEZE_AT is 2.*DISTILL\.FEATURE_MIMIC\.TAPS"):
        make_trainer(write_config(**keys, DISTILL__FEATURE_MIMIC__TAPS=["res2"]))
    keys["DISTILL__FEATURE_MIMIC__TAPS"] = ["res2", "res3"]
    with caplog.at_level(logging.WARNING, "d2kd"):
        make_trainer(write_config(**keys))
    assert "FeatureMimic compares res2, and no parameter up to there is trained" in caplog.text


def test_a_mask_that_drops_everything(write_config, teacher, tmp_path):
    keys = {**teacher, "DISTILL__METHODS": ["MaskedGenerative"], "DISTILL__MASKED_GENERATIVE__MASK_RATIO": 1.0}
    assert "MASK_RATIO is 1.0; it must be at least 0 and below 1" in error_of(write_config(**keys), tmp_path / "out")


def test_batch_norm_on_a_single_cell_names_the_tap(write_config, teacher, tmp_path):
    keys = {**teacher, "DISTILL__METHODS": ["ChannelMatching"], "DISTILL__CHANNEL_MATCHING__TAPS": ["p7"]}
    path = write_config(**keys, SOLVER__IMS_PER_BATCH=1, MODEL__RESNETS__NORM="FrozenBN")
    with pytest.raises(UserError, match=r"DISTILL\.CHANNEL_MATCHING\.TAPS, p7.*one value a channel"):
        run_training(path, SOLVER__MAX_ITER=1)


def test_batch_norm_of_the_student_on_a_single_cell(write_config):
    path = write_config(SOLVER__IMS_PER_BATCH=1, INPUT__MIN_SIZE_TRAIN=[16], INPUT__MAX_SIZE_TRAIN=16)
    with pytest.raises(UserError, match=r"backbone\.bottom_up\.res\S+ sees one value a channel.*SOLVER\.IMS_PER_BATCH"):
        run_training(path, SOLVER__MAX_ITER=1, MODEL__FPN__IN_FEATURES=["res3", "res4", "res5"])


# --- resuming -------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(write_config):
    """The YAML of a run that has stopped after three of six iterations."""
    path = write_config(DATASETS__TEST=[])
    run_training(path, stop_at=3)
    return path


@pytest.mark.parametrize(
    "change, words",
    [
        ({"SOLVER__OPTIMIZER": "AdamW"}, "SOLVER.OPTIMIZER was 'SGD' and is 'AdamW'"),
        ({"SOLVER__IMS_PER_BATCH": 2}, "SOLVER.IMS_PER_BATCH x SOLVER.ACCUMULATE was 4 and is 2"),
        ({"DATASETS__TRAIN": ["digits_val"]}, "DATASETS.TRAIN was ['digits_train'] and is ['digits_val']"),
    ],
)  # fmt: skip
def test_what_cannot_change_in_a_run(interrupted, tmp_path, change, words):
    before = (tmp_path / "student" / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError) as error:
        run_training(interrupted, resume=True, **change)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "student" / "config.yaml").read_bytes() == before


def test_the_same_images_in_smaller_batches(interrupted):
    run_training(interrupted, resume=True, SOLVER__IMS_PER_BATCH=2, SOLVER__ACCUMULATE=2)


def test_what_has_no_effect_is_told_and_config_yaml_has_what_is_in_force(interrupted, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "d2kd"):
        trainer = run_training(interrupted, resume=True, SEED=5, SOLVER__MAX_ITER=5)
    assert "SEED 5 has no effect on a resumed run: 1 is in force" in caplog.text
    assert "SOLVER.MAX_ITER is 5 from here on; it was 6" in caplog.text
    written = yaml.safe_load((tmp_path / "student" / "config.yaml").read_text())
    assert written["SEED"] == trainer.cfg.SEED == 1 and written["SOLVER"]["MAX_ITER"] == 5


def test_a_changed_schedule_is_in_force_from_the_next_iteration_on(interrupted, monkeypatch):
    rates = []
    step = DistillTrainer.run_step
    monkeypatch.setattr(
        DistillTrainer,
        "run_step",
        lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"]) or step(trainer),
    )
    changed = {"SOLVER__BASE_LR": 0.004, "SOLVER__MOMENTUM": 0.5, "SOLVER__STEPS": [5], "SOLVER__GAMMA": 0.5}
    trainer = run_training(interrupted, resume=True, **changed)
    assert rates == pytest.approx([0.004, 0.004, 0.002])
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.5


def test_data_with_other_classes(interrupted):
    MetadataCatalog.get("digits_train")  # its names are those of the checkpoint
    checkpoint = Path(interrupted).parent / "student" / "model_final.pth"
    content = read_checkpoint(checkpoint.parent)
    write_checkpoint(checkpoint, {**content, "class_names": {"thing_classes": DIGITS[::-1]}})
    with pytest.raises(CheckpointError, match=r"Cannot resume from .*it has the classes \(9, 8"):
        run_training(interrupted, resume=True)


# --- metrics, names and paths ---------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["bbox/mAP", "segm/AP", "AP", "bbox/AP-cat", "bbox_EMA/AP"])
def test_wrong_metrics_are_an_error_before_training(write_config, tmp_path, metric):
    message = error_of(write_config(TEST__BEST_CHECKPOINT__METRIC=metric), tmp_path / "out")
    assert f"TEST.BEST_CHECKPOINT.METRIC is {metric!r}" in message and "bbox/AP" in message


@pytest.mark.parametrize("metric", ["bbox/AP-3", "bbox_EMA/AP50"])
def test_right_metrics_pass(write_config, metric):
    DistillTrainer.check_config(
        load_config(str(write_config(TEST__BEST_CHECKPOINT__METRIC=metric, SOLVER__EMA__ENABLED=True)))
    )


def test_single_names_need_no_brackets(write_config, tmp_path):
    cfg = load_config(str(write_config()), ["DATASETS.TRAIN", "my_train", "DISTILL.METHODS", "LogitKD"])
    assert list(cfg.DATASETS.TRAIN) == ["my_train"] and list(cfg.DISTILL.METHODS) == ["LogitKD"]
    (tmp_path / "names.yaml").write_text("DATASETS: {TEST: my_val}\nDISTILL: {LOGIT_KD: {TAPS: linear}}\n")
    cfg = load_config(str(tmp_path / "names.yaml"))
    assert list(cfg.DATASETS.TEST) == ["my_val"] and list(cfg.DISTILL.LOGIT_KD.TAPS) == ["linear"]
    with pytest.raises(ConfigError, match=r"SOLVER\.STEPS"):
        load_config(str(write_config()), ["SOLVER.STEPS", "soon"])


def test_paths_are_looked_for_beside_the_yaml_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "cwd").mkdir()
    for name in ("base/w.pth", "base/ann.json", "top.pth", "tokens.pth", "teacher.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "base" / "base.yaml").write_text(
        "MODEL: {WEIGHTS: 'w.pth?matching_heuristics=True'}\n"
        "DATASETS: {REGISTER: [{NAME: mine, JSON: ann.json, IMAGES: gone}]}\n"
    )
    (tmp_path / "student.yaml").write_text(
        "_BASE_: base/base.yaml\nDISTILL: {TEACHER: {WEIGHTS: top.pth, CONFIG_FILE: teacher.yaml}, "
        "RECEPTIVE_TOKENS: {FILE: tokens.pth}}\n"
    )
    monkeypatch.chdir(tmp_path / "cwd")
    cfg = load_config("../student.yaml")
    assert cfg.MODEL.WEIGHTS == "../base/w.pth?matching_heuristics=True"
    assert cfg.DATASETS.REGISTER[0]["JSON"] == "../base/ann.json" and cfg.DATASETS.REGISTER[0]["IMAGES"] == "gone"
    assert cfg.DISTILL.TEACHER.WEIGHTS == "../top.pth" and cfg.DISTILL.TEACHER.CONFIG_FILE == "../teacher.yaml"
    assert cfg.DISTILL.RECEPTIVE_TOKENS.FILE == "../tokens.pth"
    (tmp_path / "cwd" / "top.pth").touch()  # the working directory comes first
    assert load_config("../student.yaml").DISTILL.TEACHER.WEIGHTS == "top.pth"


def test_evaluating_a_teacher_that_is_loaded(write_config, teacher, monkeypatch):
    trainer = make_trainer(write_config(**teacher))
    seen = []
    monkeypatch.setattr(DistillTrainer, "test", classmethod(lambda cls, cfg, net: seen.append(net) or {}))
    evaluate_teacher(DistillTrainer, trainer.cfg, trainer.distilled.teacher)
    assert seen == [trainer.distilled.teacher.model]


# --- images -------------------------------------------------------------------------------------------------

GRAY = {"INPUT__FORMAT": "L", "MODEL__PIXEL_MEAN": [110.0], "MODEL__PIXEL_STD": [58.0]}


@pytest.mark.parametrize("changes", [{"INPUT__FORMAT": "YUV-BT.601"}, {"INPUT__FORMAT": "HSV"}, GRAY])
def test_images_that_the_teacher_cannot_get_are_refused(changes, tmp_path):
    named = write_teacher(tmp_path, config(**changes))
    with pytest.raises(UserError, match=rf"INPUT.FORMAT is BGR, and {changes['INPUT__FORMAT']} in .*teacher.yaml"):
        build_distilled_model(config(**named))


def test_students_and_teachers_in_gray(tmp_path):
    net = build_distilled_model(config(**GRAY, **write_teacher(tmp_path, config(**GRAY)))).train()
    with EventStorage():
        losses = net([{**x, "image": x["image"][:1]} for x in batch()])
    assert any(name.startswith("distill/") for name in losses) and all(x.isfinite() for x in losses.values())


def test_a_copy_of_a_distilled_model_trains_and_shares_its_teacher(tmp_path):
    net = build_distilled_model(config(**write_teacher(tmp_path), DISTILL__METHODS=["FeatureMimic", "CrossKD"])).train()
    other = copy.deepcopy(net)
    ours = {id(tensor) for tensor in other.parameters()}
    assert other.teacher is net.teacher and not ours & {id(tensor) for tensor in net.parameters()}
    with EventStorage():
        losses, theirs = net(batch()), other(batch())
    assert losses == theirs
    sum(theirs.values()).backward()
    assert all(p.grad is None for p in net.parameters()) and any(p.grad is not None for p in other.parameters())
