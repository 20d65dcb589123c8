"""The default recipe, DISTILL.METHODS [auto]: what it comes to for which pairs, and that it is nothing but that."""

import pytest
import torch
import torch.distributed as dist
import yaml
from helpers import same_tensors
from models import FASTER_RCNN, batch, config, write_teacher
from runs import in_two_processes, read_checkpoint, run_training, train_in_step
from torch.nn.parallel import DistributedDataParallel

from d2kd.config import check_values, with_values
from d2kd.engine import build_optimizer, load_config
from d2kd.engine.compared_models import load_compared_models
from d2kd.errors import ConfigError, UserError
from d2kd.modeling import build_distilled_model
from detectron2.data import DatasetCatalog, MetadataCatalog

FROZEN = {
    "DISTILL.METHODS": ["FeatureMimic", "CrossKD"],
    "DISTILL.INIT_FROM_TEACHER.FREEZE": ["head"],
    "DISTILL.FEATURE_MIMIC.WEIGHT": 16.0,
    "DISTILL.CROSS_KD.WEIGHT": 4.0,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 10.0,
}
CLIPPED = {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 3.0}
INHERITED = {"DISTILL.INIT_FROM_TEACHER.LR_FACTOR": 0.3}
OWN = {"DISTILL.METHODS": ["FeatureMimic", "CrossKD"], "DISTILL.TASK_WEIGHT": 0.25}
TRAINED = {**OWN, **INHERITED}
OTHER_SIZES = [[20], [40], [80], [160], [320]]
PLAIN = {"DISTILL.METHODS": ["FeatureMimic"], **INHERITED}


@pytest.mark.parametrize(
    "student, teacher, recipe, reason",
    [
        ({}, {}, FROZEN, ""),
        ({}, {"MODEL.RESNETS.RES2_OUT_CHANNELS": 32}, FROZEN, ""),
        ({}, {"MODEL.FPN.OUT_CHANNELS": 12}, TRAINED, "head.cls_subnet.0.weight is not taken from the teacher"),
        ({}, {"MODEL.RETINANET.NUM_CONVS": 2}, TRAINED, "The teacher has head.cls_subnet.2.weight too"),
        ({}, {"MODEL.ANCHOR_GENERATOR.SIZES": OTHER_SIZES}, TRAINED, "must have the same anchors"),
        ({}, {"MODEL.RETINANET.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0)}, TRAINED, "the same encoding of boxes"),
        ({"MODEL.RETINANET.NUM_CONVS": 2}, {}, TRAINED, "head.cls_subnet.2.weight is not taken"),
        ({"MODEL.RETINANET.NUM_CLASSES": 2}, {}, PLAIN, "the classes differ"),
        ({}, {"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]]}, TRAINED, "head.cls_score.weight is not taken"),
        ({}, FASTER_RCNN, PLAIN, "the heads do not correspond"),
        ({"DISTILL.INIT_FROM_TEACHER.ENABLED": False}, {}, OWN, "ENABLED is False"),
        ({"DISTILL.INIT_FROM_TEACHER.EXCLUDE": ["head.cls_score"]}, {}, TRAINED, "head.cls_score.weight is not taken"),
        ({"DISTILL.TASK_WEIGHT": 0.5}, {}, FROZEN, ""),
        (CLIPPED, {}, {key: value for key, value in FROZEN.items() if "CLIP" not in key}, ""),
        ({"DISTILL.FEATURE_MIMIC.WEIGHT": 3.0}, {}, FROZEN, ""),
        ({"DISTILL.INIT_FROM_TEACHER.FREEZE": ["head", "backbone.fpn_output3"]}, {}, FROZEN, ""),
        ({"DISTILL.INIT_FROM_TEACHER.FREEZE": ["head.cls_score"]}, {}, TRAINED, "without head.cls_subnet.0.weight"),
        ({"DISTILL.INIT_FROM_TEACHER.FREEZE": ["backbone.fpn_output3"]}, {}, TRAINED, "without head.cls_subnet.0"),
    ],
)
def test_comes_to_what_fits(student, teacher, recipe, reason, tmp_path, caplog):
    named = write_teacher(tmp_path, config(**{key.replace(".", "__"): value for key, value in teacher.items()}))
    changes = {key.replace(".", "__"): value for key, value in student.items()}
    with caplog.at_level("INFO", "d2kd"):
        net = build_distilled_model(config(**named, **changes))
    assert net.recipe == {key: value for key, value in recipe.items() if key not in student}
    assert list(net.distillers) == recipe["DISTILL.METHODS"]
    assert net.task_weight == student.get("DISTILL.TASK_WEIGHT", recipe.get("DISTILL.TASK_WEIGHT", 1.0))
    frozen = [name for name, parameter in net.student.named_parameters() if not parameter.requires_grad]
    prefixes = {**recipe, **student}.get("DISTILL.INIT_FROM_TEACHER.FREEZE", ["nothing"])
    assert frozen == [n for n, _ in net.student.named_parameters() if n.startswith(tuple(prefixes))]
    assert "DISTILL.METHODS is auto, and comes to METHODS" in caplog.text and reason in caplog.text


@pytest.mark.parametrize(
    "teacher, reason",
    [
        ({"MODEL.ROI_BOX_HEAD.NUM_FC": 2}, "The teacher has roi_heads.box_head.fc2.weight too"),
        ({"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0)}, "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS"),
        ({"MODEL.RPN.BBOX_REG_WEIGHTS": (2.0, 2.0, 1.0, 1.0)}, "MODEL.RPN.BBOX_REG_WEIGHTS"),
        (
            {"MODEL.ANCHOR_GENERATOR.SIZES": OTHER_SIZES},
            "objectness_logits: student and teacher must have the same anchors",
        ),
        ({"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True}, "softmax class_logits, the teacher's region sigmoid"),
    ],
)
def test_trains_heads_of_an_rcnn_that_are_read_otherwise(teacher, reason, tmp_path, caplog):
    named = write_teacher(tmp_path, config(FASTER_RCNN, **{k.replace(".", "__"): v for k, v in teacher.items()}))
    with caplog.at_level("INFO", "d2kd"):
        net = build_distilled_model(config(FASTER_RCNN, **named))
    assert net.recipe == TRAINED and reason in caplog.text
    assert all(p.requires_grad for p in net.student.roi_heads.parameters())


def test_keeps_proposals_and_region_heads_of_an_rcnn(tmp_path):
    net = build_distilled_model(config(FASTER_RCNN, **write_teacher(tmp_path, config(FASTER_RCNN))))
    assert net.recipe["DISTILL.INIT_FROM_TEACHER.FREEZE"] == ["proposal_generator", "roi_heads"]
    assert all(p.requires_grad == name.startswith("backbone") for name, p in net.student.named_parameters())


def test_methods_that_are_named_are_left_alone(tmp_path):
    net = build_distilled_model(config(**write_teacher(tmp_path), DISTILL__METHODS=["FeatureMimic"]))
    assert not net.recipe and net.task_weight == 1.0 and net.distillers["FeatureMimic"].weight == 4.0
    assert all(parameter.requires_grad for parameter in net.student.parameters())


def test_stands_alone():
    with pytest.raises(ConfigError, match=r"METHODS .*must name each once, and auto alone"):
        check_values(config(DISTILL__METHODS=["auto", "LogitKD"]))


def test_is_the_same_training_as_what_it_comes_to_and_says_so(write_config, teacher, tmp_path):
    trainer = run_training(write_config("auto", **teacher), OUTPUT_DIR=str(tmp_path / "auto"))
    explicit = {key.replace(".", "__"): value for key, value in FROZEN.items()}
    run_training(write_config("explicit", **teacher, **explicit), OUTPUT_DIR=str(tmp_path / "explicit"))
    ours = read_checkpoint(tmp_path / "auto")
    assert same_tensors(ours["model"], read_checkpoint(tmp_path / "explicit")["model"])
    written = yaml.safe_load((tmp_path / "auto/config.yaml").read_text())["DISTILL"]
    assert written["METHODS"] == trainer.cfg.DISTILL.METHODS == ours["methods"] == ["FeatureMimic", "CrossKD"]
    assert written["INIT_FROM_TEACHER"]["FREEZE"] == ["head"] and written["CROSS_KD"]["WEIGHT"] == 4


def test_is_resumed_bit_by_bit_by_its_own_yaml_and_by_that_of_the_run(write_config, teacher, tmp_path):
    path = write_config(**teacher)
    run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    whole = read_checkpoint(tmp_path / "whole")["model"]
    for name in ("own", "of the run"):
        parts = tmp_path / name
        run_training(path, OUTPUT_DIR=str(parts), stop_at=3)
        run_training(path if name == "own" else parts / "config.yaml", OUTPUT_DIR=str(parts), resume=True)
        assert same_tensors(whole, read_checkpoint(parts)["model"])


def test_a_run_of_the_former_default_says_why_it_cannot_go_on(write_config, teacher, tmp_path):
    output = {"OUTPUT_DIR": str(tmp_path / "run")}
    run_training(write_config("former", **teacher, DISTILL__METHODS=["FeatureMimic"]), **output, stop_at=3)
    wanted = r"with DISTILL.METHODS \['FeatureMimic'\], and this run is one with .* \['FeatureMimic', 'CrossKD'\]"
    with pytest.raises(UserError, match=wanted):
        run_training(write_config("now", **teacher), **output, resume=True)


def test_two_processes_stay_in_step(write_config, teacher, tmp_path):
    in_two_processes(train_in_step, write_config(**teacher), tmp_path / "two")


def test_a_trained_student_is_compared_with_its_aligners(write_config, tmp_path):
    named = write_teacher(tmp_path, config(MODEL__FPN__OUT_CHANNELS=12, MODEL__RETINANET__NUM_CLASSES=10))
    path = write_config(**named, MODEL__FPN__OUT_CHANNELS=8)
    trainer = run_training(path, OUTPUT_DIR=str(tmp_path / "run"))
    assert list(trainer.distilled.distillers) == ["FeatureMimic", "CrossKD"]
    compared = load_compared_models(load_config(str(path)), str(tmp_path / "run/model_final.pth"))
    assert list(compared.distillers) == ["FeatureMimic", "CrossKD"]
    ours = compared.distillers["FeatureMimic"].state_dict()
    assert ours and same_tensors(ours, trainer.distilled.distillers["FeatureMimic"].state_dict())


def test_clips_in_a_loop_of_ones_own(tmp_path):
    def moved(**changes):
        cfg = config(**write_teacher(tmp_path), SOLVER__BASE_LR=1.0, SOLVER__MOMENTUM=0.0, SOLVER__WEIGHT_DECAY=0.0)
        torch.manual_seed(0)
        net = build_distilled_model(with_values(cfg, changes)).train()
        optimizer = build_optimizer(with_values(cfg, changes), net)
        trained = [p for p in net.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        (1e4 * sum(net(batch()).values())).backward()
        optimizer.step()
        return torch.cat([(p - b).flatten() for p, b in zip(trained, before)]).norm().item()

    assert moved() == pytest.approx(10, rel=1e-3)
    assert moved(**{"DISTILL.METHODS": ["FeatureMimic"]}) > 1000


def test_the_optimizer_of_a_data_parallel_model_is_that_of_the_model(tmp_path):
    cfg = config(**write_teacher(tmp_path), DISTILL__METHODS=["FeatureMimic"], MODEL__RETINANET__NORM="BN")
    net = build_distilled_model(with_values(cfg, {"DISTILL.INIT_FROM_TEACHER.LR_FACTOR": 0.1}))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        slow = with_values(cfg, {"DISTILL.INIT_FROM_TEACHER.LR_FACTOR": 0.1})
        plain, wrapped = (build_optimizer(slow, x) for x in (net, DistributedDataParallel(net)))
    finally:
        dist.destroy_process_group()
    rates = [{id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]} for optimizer in (plain, wrapped)]
    assert rates[0] == rates[1] and len(set(rates[0].values())) == 2


@pytest.mark.parametrize(
    ("names", "recipe"), [("cab", TRAINED), ("abc", FROZEN), ("abx", PLAIN)], ids=["reordered", "same", "others"]
)
def test_the_same_classes_in_another_order_have_corresponding_heads(names, recipe, tmp_path):
    named = write_teacher(tmp_path)
    saved = torch.load(named["DISTILL__TEACHER__WEIGHTS"])
    torch.save({**saved, "class_names": {"thing_classes": list(names)}}, named["DISTILL__TEACHER__WEIGHTS"])
    DatasetCatalog.register("abc", lambda: [])
    MetadataCatalog.get("abc").thing_classes = ["a", "b", "c"]
    try:
        assert build_distilled_model(config(DATASETS__TRAIN=["abc"], **named)).recipe == recipe
    finally:
        DatasetCatalog.remove("abc")
        MetadataCatalog.remove("abc")
