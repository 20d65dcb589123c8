"""Wrong input of tools/train_net.py: one clear error that names what to change, before any training."""

import json
from pathlib import Path

import pytest
import torch
from models import config, model
from runs import tool

from d2kd.cli import train
from d2kd.engine import CheckpointError, argument_parser, load_config
from d2kd.errors import ConfigError, UserError


def error_of(path, output, *options, **flags) -> str:
    """The message of the error that `d2kd train` raises; checks that nothing was trained."""
    arguments = ["--config-file", str(path)]
    for name, value in flags.items():
        arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    args = argument_parser().parse_args([*arguments, "OUTPUT_DIR", str(output), *map(str, options)])
    with pytest.raises(UserError) as error:
        train.main(args)
    left = {p.name for p in Path(output).glob("*")} if Path(output).exists() else set()
    assert not {name for name in left if name.endswith((".pth", ".tmp")) or name == "metrics.json"}, left
    return str(error.value)


@pytest.fixture
def distil(write_config, teacher, tmp_path):
    """Calls `error_of` on a distillation run with some keys changed."""

    def call(*options, **changes):
        return error_of(write_config(**{**teacher, **changes}), tmp_path / "out", *options)

    return call


def test_missing_teacher_weights(distil, tmp_path):
    message = distil(DISTILL__TEACHER__WEIGHTS=str(tmp_path / "no.pth"))
    assert "no.pth" in message and "--teacher-weights" in message and "no such file" in message


@pytest.mark.parametrize("flags, named", [({"teacher_weights": "t.pth"}, "t.pth"), ({"method": "LogitKD"}, "LogitKD")])
def test_distillation_without_a_teachers_config(write_config, tmp_path, flags, named):
    message = error_of(write_config(), tmp_path / "out", **flags)
    assert named in message and "--teacher-config" in message


def test_flags_behind_options(write_config, tmp_path):
    with pytest.raises(ConfigError, match="--resume: flags go before"):
        load_config(str(write_config()), ["OUTPUT_DIR", str(tmp_path), "--resume"])


def test_nothing_to_train_on(write_config, tmp_path):
    assert "DATASETS.TRAIN is empty" in error_of(write_config(DATASETS__TRAIN=[]), tmp_path / "out")


def test_teacher_without_weights(distil):
    assert "DISTILL.TEACHER.WEIGHTS" in distil(DISTILL__TEACHER__WEIGHTS="")


def test_teacher_weights_of_the_zoo_without_a_network(distil):
    assert "detectron2://" in distil(DISTILL__TEACHER__WEIGHTS="detectron2://COCO-Detection/none/1/model_final.pkl")


def test_missing_teacher_config(distil, tmp_path):
    message = distil(DISTILL__TEACHER__CONFIG_FILE=str(tmp_path / "no.yaml"))
    assert "no.yaml" in message and "--teacher-config" in message


@pytest.mark.parametrize("keep", [0, 100, 0.5, -20])
def test_truncated_teacher(distil, teacher, tmp_path, keep):
    whole = Path(teacher["DISTILL__TEACHER__WEIGHTS"]).read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    message = distil(DISTILL__TEACHER__WEIGHTS=str(cut))
    assert "cut.pth" in message and "teacher" in message


def test_teacher_that_is_no_checkpoint(distil, tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint")
    assert "text.pth" in distil(DISTILL__TEACHER__WEIGHTS=str(tmp_path / "text.pth"))


def test_teacher_keys_that_do_not_fit(distil, tmp_path):
    torch.save({"model": model(config(MODEL__RETINANET__NUM_CLASSES=10)).state_dict()}, tmp_path / "narrow.pth")
    message = distil(DISTILL__TEACHER__WEIGHTS=str(tmp_path / "narrow.pth"))
    assert "of another shape" in message and "checkpoint (" in message and "model (" in message


def test_teacher_keys_that_are_missing_or_unknown(distil, teacher, tmp_path):
    state = torch.load(teacher["DISTILL__TEACHER__WEIGHTS"], weights_only=True)["model"]
    state["head.surplus"] = state.pop("head.bbox_pred.bias")
    torch.save({"model": state}, tmp_path / "other.pth")
    message = distil(DISTILL__TEACHER__WEIGHTS=str(tmp_path / "other.pth"))
    assert "missing in the checkpoint: head.bbox_pred.bias" in message and "not in the model: head.surplus" in message


def test_unknown_method_names_near_matches(distil):
    message = distil(DISTILL__METHODS=["FeatureMimik"])
    assert "FeatureMimik" in message and "Did you mean FeatureMimic" in message


@pytest.mark.parametrize("key", ["META_ARCHITECTURE", "BACKBONE__NAME"])
def test_unknown_architecture_names_near_matches(distil, write_config, tmp_path, key):
    wrong, right = {
        "META_ARCHITECTURE": ("Retinanet", "RetinaNet"),
        "BACKBONE__NAME": ("build_retinanet_resnet_fpn", "build_retinanet_resnet_fpn_backbone"),
    }[key]
    alone = error_of(write_config(**{f"MODEL__{key}": wrong}), tmp_path / "alone")
    for message in (distil(**{f"MODEL__{key}": wrong}), alone):
        assert f"MODEL.{key.replace('__', '.')} is '{wrong}'" in message and f"Did you mean {right}" in message
    teacher_yaml = write_config("other_teacher", **{f"MODEL__{key}": wrong})
    message = distil(DISTILL__TEACHER__CONFIG_FILE=str(teacher_yaml))
    assert "--teacher-config" in message and f"Did you mean {right}" in message


def test_values_of_a_method_that_are_out_of_range(distil):
    message = distil(DISTILL__FEATURE_MIMIC__NORMALIZE="wide")
    assert "DISTILL.FEATURE_MIMIC.NORMALIZE is 'wide'" in message and "standardize" in message
    assert "DISTILL.FEATURE_MIMIC.WEIGHT is -1.0" in distil(DISTILL__FEATURE_MIMIC__WEIGHT=-1.0)


@pytest.mark.parametrize("precision", ["float16", "half"])
def test_impossible_precision(distil, precision):
    message = distil(SOLVER__AMP__ENABLED=True, SOLVER__AMP__PRECISION=precision)
    assert "SOLVER.AMP.PRECISION" in message and "bfloat16" in message


def test_nothing_to_do_with_a_teacher(distil):
    assert "DISTILL.METHODS" in distil(DISTILL__METHODS=[], DISTILL__INIT_FROM_TEACHER__ENABLED=False)


@pytest.mark.parametrize("key", ["TAPS", "TEACHER_TAPS"])
def test_unknown_tap_names_near_matches(distil, key):
    message = distil(**{"DISTILL__FEATURE_MIMIC__TAPS": ["p4"], f"DISTILL__FEATURE_MIMIC__{key}": ["p44"]})
    assert "'p44'" in message and "Did you mean p4" in message


def test_maps_that_cannot_be_aligned(distil):
    message = distil(DISTILL__FEATURE_MIMIC__TAPS=["p3"], DISTILL__FEATURE_MIMIC__TEACHER_TAPS=["p7"])
    assert "stride 8" in message and "stride 128" in message and "DISTILL.FEATURE_MIMIC.TAPS" in message


def test_taps_that_do_not_pair_up(distil):
    message = distil(DISTILL__FEATURE_MIMIC__TAPS=["p3", "p4"], DISTILL__FEATURE_MIMIC__TEACHER_TAPS=["p3"])
    assert "2 features" in message and "TEACHER_TAPS 1" in message


def test_unknown_key_names_near_matches(write_config, tmp_path):
    message = error_of(write_config(), tmp_path / "out", "DISTILL.METHOD", "x")
    assert "DISTILL.METHOD" in message and "DISTILL.METHODS" in message


def test_missing_config_file(tmp_path):
    assert "no.yaml" in error_of(tmp_path / "no.yaml", tmp_path / "out")


def test_class_counts_of_data_and_model(write_config, tmp_path):
    message = error_of(write_config(MODEL__RETINANET__NUM_CLASSES=9), tmp_path / "out")
    assert "10" in message and "9" in message and "MODEL.RETINANET.NUM_CLASSES" in message


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda c: c.pop("images"), ["images"]),
        (lambda c: c["annotations"][0].update(image_id=99999), ["99999", "image"]),
        (lambda c: c["annotations"][0].update(bbox=[900, 900, 20, 20]), ["outside"]),
        (lambda c: c["annotations"][0].update(category_id=77), ["77", "categor"]),
    ],
    ids=["no images", "no such image", "box outside", "no such category"],
)
def test_annotations_that_are_not_coco(write_config, tmp_path, digits, damage, words):
    content = json.loads((digits / "annotations/instances_train.json").read_text())
    damage(content)
    (tmp_path / "bad.json").write_text(json.dumps(content))
    name = f"bad_{tmp_path.name}"
    register = [{"NAME": name, "JSON": str(tmp_path / "bad.json"), "IMAGES": str(digits / "train")}]
    keys = {"DATASETS__REGISTER": register, "DATASETS__TRAIN": [name], "DATASETS__TEST": []}
    message = error_of(write_config(**keys), tmp_path / "out")
    assert "bad.json" in message and all(word in message for word in words)


def test_no_image_with_annotations(write_config, tmp_path, digits):
    content = json.loads((digits / "annotations/instances_train.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    name = f"empty_{tmp_path.name}"
    register = [{"NAME": name, "JSON": str(tmp_path / "empty.json"), "IMAGES": str(digits / "train")}]
    keys = {"DATASETS__REGISTER": register, "DATASETS__TRAIN": [name], "DATASETS__TEST": []}
    message = error_of(write_config(**keys), tmp_path / "out")
    assert name in message and "DATALOADER.FILTER_EMPTY_ANNOTATIONS" in message


@pytest.mark.parametrize("content", [None, b"no checkpoint"])
def test_student_weights_that_cannot_be_read(write_config, tmp_path, content):
    if content is not None:
        (tmp_path / "start.pth").write_bytes(content)
    options = ["OUTPUT_DIR", str(tmp_path / "out"), "MODEL.WEIGHTS", str(tmp_path / "start.pth")]
    with pytest.raises(CheckpointError, match=r"MODEL\.WEIGHTS\b.*start\.pth"):
        train.main(argument_parser().parse_args(["--config-file", str(write_config()), *options]))


def test_eval_only_demands_every_key(write_config, tmp_path):
    torch.save({"model": model(config(MODEL__RETINANET__NUM_CLASSES=10)).backbone.state_dict()}, tmp_path / "part.pth")
    message = error_of(write_config(), tmp_path / "out", "MODEL.WEIGHTS", tmp_path / "part.pth", eval_only=True)
    assert "missing in the checkpoint" in message
    output = tmp_path / "new"
    assert "nothing to evaluate" in error_of(write_config(), output, eval_only=True)
    assert "nothing to evaluate" in error_of(write_config(), output, eval_only=True, resume=True)
    missing = error_of(write_config(MODEL__WEIGHTS=str(tmp_path / "none.pth")), output, eval_only=True)
    assert missing == f"MODEL.WEIGHTS is {str(tmp_path / 'none.pth')!r}: there is no such file."
    assert not output.exists()


def test_an_error_in_two_processes_is_one_line(write_config, tmp_path):
    done = tool("train_net", "--config-file", write_config(), "--num-gpus", 2, "SOLVER.BASE_LT", 1, check=False)
    assert done.returncode == 2 and "SOLVER.BASE_LR" in done.stdout and "Traceback" not in done.stdout


def test_resuming_with_other_methods(write_config, teacher, tmp_path):
    tool("train_net", "--config-file", write_config(DATASETS__TEST=[], DISTILL__METHODS=["FeatureMimic"], **teacher))
    others = {"['MaskedGenerative']": {"DISTILL__METHODS": ["MaskedGenerative"], **teacher}, "without a teacher": {}}
    others["['LogitKD']"] = {"DISTILL__METHODS": ["LogitKD"], **teacher}  # no state either: nothing else would fail
    for named, other in others.items():
        path = write_config(DATASETS__TEST=[], **other)
        finished = tool("train_net", "--resume", "--config-file", path, "SOLVER.MAX_ITER", 9, check=False)
        assert finished.returncode == 2
        assert "Cannot resume from" in finished.stdout and "Traceback" not in finished.stdout
        assert "with DISTILL.METHODS ['FeatureMimic'], and this run is one" in finished.stdout
        assert named in finished.stdout
