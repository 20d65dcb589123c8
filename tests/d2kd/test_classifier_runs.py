"""Classifiers distilled in whole runs: exact resuming with mixed images, two processes, weight 0, one pass a step."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import same_tensors
from runs import in_two_processes, make_trainer, read_checkpoint, run_training, tool

import d2kd  # noqa: F401  (makes `detectron2` importable, also in processes that are spawned)
from d2kd.data.datasets import register_datasets
from d2kd.distillers import DISTILLERS
from d2kd.distillers.channel_matching.channel_groups import REDUCERS
from d2kd.engine import DistillTrainer, load_config
from d2kd.engine.checkpoint import CheckpointError
from d2kd.modeling import MethodError, TeacherError, build_distilled_model
from d2kd.modeling.backbone import load_pretrained_network
from detectron2.modeling import build_model
from detectron2.utils import comm

#: What each method compares in a MobileNetV2 and a ResNet.
METHODS: dict[str, dict[str, Any]] = {
    "FeatureMimic": {"DISTILL.FEATURE_MIMIC.TAPS": ["res3", "res4"]},
    "MaskedGenerative": {
        "DISTILL.MASKED_GENERATIVE.TAPS": ["res4"],
        "DISTILL.MASKED_GENERATIVE.MASK": "channel",
        "DISTILL.MASKED_GENERATIVE.MASK_RATIO": 0.15,
    },
    "ChannelMatching": {
        "DISTILL.CHANNEL_MATCHING.TAPS": ["res3.pre_relu", "res4.pre_relu"],
        "DISTILL.CHANNEL_MATCHING.REFRESH_PERIODS": [4],
        "DISTILL.CHANNEL_MATCHING.REFRESH_STEPS": [],
        "DISTILL.CHANNEL_MATCHING.TRACK_IMAGES": 16,
        "DISTILL.CHANNEL_MATCHING.REDUCER": "rd",
    },
    "LogitKD": {},
}
#: Everything that draws random numbers.
MIXED = {
    "DATALOADER.SAMPLER_TRAIN": "RepeatAugSampler",
    "INPUT.CLASSIFICATION.MIXUP": 0.8,
    "INPUT.CLASSIFICATION.CUTMIX": 1.0,
    "INPUT.CLASSIFICATION.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
    "INPUT.CLASSIFICATION.ERASING.PROB": 0.25,
    "MODEL.CLASSIFIER.LABEL_SMOOTHING": 0.1,
    "MODEL.TIMM.DROP_PATH_RATE": 0.1,
    "SOLVER.EMA.ENABLED": True,
}


@pytest.fixture
def write(digits: Path, tmp_path: Path, forget_datasets: None):
    """Writes the YAML of a small MobileNetV2 on the crops of PhotoDigits; arguments are keys with their values."""

    def write(name: str = "student", network: str = "mobilenetv2_035", **changes: Any) -> Path:
        folders = digits / "classification"
        keys = {
            "MODEL.META_ARCHITECTURE": "ImageClassifier",
            "MODEL.DEVICE": "cpu",
            "MODEL.BACKBONE.NAME": "build_timm_network",
            "MODEL.BACKBONE.FREEZE_AT": 0,
            "MODEL.TIMM.NAME": network,
            "MODEL.CLASSIFIER.NUM_CLASSES": 10,
            "INPUT.CLASSIFICATION.SIZE": 32,
            "DATASETS.REGISTER": [
                {"NAME": f"crops_{s}", "FORMAT": "folders", "IMAGES": str(folders / s)} for s in ("train", "val")
            ],
            "DATASETS.TRAIN": ["crops_train"],
            "DATASETS.TEST": ["crops_val"],
            "DATALOADER.NUM_WORKERS": 0,
            "TEST.IMS_PER_BATCH": 8,
            "SOLVER.IMS_PER_BATCH": 8,
            "SOLVER.BASE_LR": 0.01,
            "SOLVER.MAX_ITER": 6,
            "SOLVER.STEPS": [4],
            "SOLVER.WARMUP_ITERS": 2,
            "SOLVER.CHECKPOINT_PERIOD": 3,
            "SEED": 1,
            "OUTPUT_DIR": str(tmp_path / name),
            **changes,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(load_config("", [x for pair in keys.items() for x in pair]).dump())
        return path

    return write


@pytest.fixture
def teacher(write, tmp_path: Path) -> dict[str, Any]:
    """An untrained ResNet; the keys that name it."""
    path = write("teacher", "resnet18")
    torch.manual_seed(7)
    weights = tmp_path / "teacher.pth"
    torch.save({"model": build_model(load_config(str(path))).state_dict()}, weights)
    return {
        "DISTILL.TEACHER.CONFIG_FILE": str(path),
        "DISTILL.TEACHER.WEIGHTS": str(weights),
        "DISTILL.TEACHER.EVAL_FIRST": False,
        "DISTILL.INIT_FROM_TEACHER.ENABLED": False,
    }


def keys_of(method: str) -> dict[str, Any]:
    return {"DISTILL.METHODS": [method], **METHODS[method]}


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_is_bit_equal_with_mixed_images(write, teacher, tmp_path, method):
    path = write(**keys_of(method), **teacher, **MIXED)
    whole = run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True, DATALOADER__NUM_WORKERS=2)
    for name in ("model_final", "model_final_ema"):
        one, two = (read_checkpoint(tmp_path / part, name)["model"] for part in ("whole", "parts"))
        assert same_tensors(one, two), name
    results = [json.loads((tmp_path / part / "result.json").read_text())["metrics"] for part in ("whole", "parts")]
    assert results[0] == results[1] and {"classification", "classification_EMA"} <= results[0].keys()
    assert not same_tensors(read_checkpoint(tmp_path / "whole")["model"], whole.ema.model.state_dict())


def two_processes(path: str, output: str) -> None:
    trainer = make_trainer(Path(path), OUTPUT_DIR=output)
    trainer.resume_or_load(resume=False)
    trainer.train()
    torch.save(trainer.student.state_dict(), f"{output}/rank{comm.get_rank()}.pth")


@pytest.mark.parametrize("method", ["MaskedGenerative", "ChannelMatching"])
def test_two_processes_stay_in_step(write, teacher, tmp_path, method):
    mixed = {key: value for key, value in MIXED.items() if key != "SOLVER.EMA.ENABLED"}
    path = write(**keys_of(method), **teacher, **mixed)
    in_two_processes(two_processes, path, tmp_path / "student")
    first, second = (torch.load(tmp_path / f"student/rank{i}.pth") for i in (0, 1))
    # statistics of batch norms are each process's own, until they are shared for evaluation
    learned = {name for name in first if "running" not in name and "num_batches" not in name}
    assert same_tensors({k: first[k] for k in learned}, {k: second[k] for k in learned})


@pytest.mark.parametrize("method", METHODS)
def test_weight_zero_trains_the_same_student_as_no_teacher(write, teacher, tmp_path, method):
    run_training(write("alone", **MIXED))
    node = {"LogitKD": "LOGIT_KD", "FeatureMimic": "FEATURE_MIMIC"}.get(method)
    node = node or {"MaskedGenerative": "MASKED_GENERATIVE", "ChannelMatching": "CHANNEL_MATCHING"}[method]
    run_training(write("zero", **keys_of(method), **teacher, **MIXED, **{f"DISTILL.{node}.WEIGHT": 0.0}))
    assert same_tensors(read_checkpoint(tmp_path / "alone")["model"], read_checkpoint(tmp_path / "zero")["model"])


def test_each_network_runs_once_a_step_on_the_same_mixed_image(write, teacher):
    keys = {key: value for method in METHODS.values() for key, value in method.items()}
    cfg = load_config(str(write(**keys, **teacher, **{"DISTILL.METHODS": list(METHODS)}, **MIXED)))
    register_datasets(cfg)
    model = build_distilled_model(cfg).train()
    seen: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    for name, network in (("student", model.student), ("teacher", model.teacher.model)):
        stem = network.backbone.net
        stem = stem.conv_stem if name == "student" else stem.conv1
        stem.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0].detach().clone()))
    batch = next(iter(DistillTrainer.build_train_loader(cfg)))
    losses = model(batch)
    assert len(seen["student"]) == len(seen["teacher"]) == 1
    assert torch.equal(seen["student"][0], seen["teacher"][0]) and "target" in batch[0]
    assert {name.split("/")[1] for name in losses if name.startswith("distill/")} == set(METHODS)
    sum(losses.values()).backward()
    trained = [name for name, p in model.student.named_parameters() if p.grad is None]
    assert not trained


def test_the_teacher_has_its_own_pixels_and_channel_order(write, teacher, tmp_path):
    keys = {"MODEL.TIMM.DATA_CONFIG": False, "MODEL.PIXEL_STD": [2.0, 2.0, 2.0], "INPUT.FORMAT": "BGR"}
    cfg = load_config(str(write(**keys_of("LogitKD"), **teacher, **keys)))
    register_datasets(cfg)
    model = build_distilled_model(cfg).train()
    seen = []
    model.teacher.model.backbone.net.conv1.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    batch = [{"image": torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), "label": 1} for _ in range(2)]
    model(batch)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (torch.stack([x["image"] for x in batch]).flip(1) / 255 - mean) / std
    assert torch.allclose(seen[0], expected, atol=1e-4)


def test_the_final_checkpoint_evaluates_alike_from_the_command_line(write, teacher, tmp_path):
    path = write(**keys_of("LogitKD"), **teacher)
    run_training(path)
    trained = json.loads((tmp_path / "student/result.json").read_text())["metrics"]
    arguments = ("--config-file", path, "--eval-only", "--eval-teacher")
    weights = ("MODEL.WEIGHTS", tmp_path / "student/model_final.pth", "TEST.IMS_PER_BATCH", 3)
    output = tool("train_net", *arguments, *weights, "OUTPUT_DIR", tmp_path / "again").stdout
    assert json.loads((tmp_path / "again/result.json").read_text())["metrics"] == trained
    assert (tmp_path / "again/teacher/result.json").is_file() and "top1" in output


def test_a_teacher_may_take_its_librarys_weights_but_must_be_whole(write, teacher, tmp_path):
    torch.manual_seed(5)
    source = timm.create_model("resnet18", num_classes=10)
    torch.save(source.state_dict(), tmp_path / "library.pth")
    of_library = {**teacher, "DISTILL.TEACHER.WEIGHTS": ""}
    opts = ["MODEL.TIMM.WEIGHTS", str(tmp_path / "library.pth")]
    cfg = load_config(str(write(**keys_of("LogitKD"), **of_library, **{"DISTILL.TEACHER.OPTS": opts})))
    assert same_tensors(dict(build_distilled_model(cfg).teacher.model.backbone.net.state_dict()), source.state_dict())
    torch.save(timm.create_model("resnet18", num_classes=12).state_dict(), tmp_path / "library.pth")
    with pytest.raises(TeacherError, match=r"backbone alone: backbone\.net\.fc\.weight"):
        build_distilled_model(cfg)
    cfg = load_config(str(write(**keys_of("LogitKD"), **of_library)))
    with pytest.raises(TeacherError, match="The teacher has no weights"):
        build_distilled_model(cfg)


def test_a_teacher_that_does_not_take_the_students_images_is_told_before_training(write, tmp_path):
    path = write("teacher", "deit_tiny_patch16_224", **{"INPUT.CLASSIFICATION.SIZE": 48})
    torch.save({"model": build_model(load_config(str(path))).state_dict()}, tmp_path / "teacher.pth")
    names = {"DISTILL.TEACHER.CONFIG_FILE": str(path), "DISTILL.TEACHER.WEIGHTS": str(tmp_path / "teacher.pth")}
    cfg = load_config(str(write(**keys_of("LogitKD"), **names, **{"DISTILL.INIT_FROM_TEACHER.ENABLED": False})))
    with pytest.raises(TeacherError, match=r"The teacher gets the student's images: .* 32 x 32 pixels.*SIZE"):
        build_distilled_model(cfg)


def test_a_run_is_not_resumed_with_another_network(write, tmp_path):
    run_training(write())
    changed = {"SOLVER__MAX_ITER": 8, "MODEL__TIMM__NAME": "mobilenetv2_050"}  # as many parameters, of other shapes
    with pytest.raises(
        CheckpointError, match=r"Cannot resume .*it is of another model, where backbone\.net\.\S+ is of"
    ):
        run_training(write(), resume=True, **changed)


def test_training_starts_from_the_librarys_weights_and_those_of_a_checkpoint_go_on_top(write, tmp_path):
    source = timm.create_model("mobilenetv2_035", num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "library.pth")
    path = write(**{"MODEL.TIMM.WEIGHTS": str(tmp_path / "library.pth")})
    trainer = make_trainer(path)
    trainer.resume_or_load(resume=False)
    stem = trainer.student.backbone.net.conv_stem.weight
    assert torch.equal(stem, source.conv_stem.weight)
    other = build_model(load_config(str(path)))
    torch.save({"model": other.state_dict()}, tmp_path / "start.pth")
    trainer = make_trainer(path, MODEL__WEIGHTS=str(tmp_path / "start.pth"))
    trainer.resume_or_load(resume=False)
    assert same_tensors(trainer.student.state_dict(), other.state_dict())
    assert load_pretrained_network(load_config(str(write())), other) == set()


def test_a_method_that_needs_one_label_an_image_refuses_mixed_ones(write, teacher, monkeypatch):
    monkeypatch.setattr(DISTILLERS.get("LogitKD"), "HARD_LABELS", True)
    cfg = load_config(str(write(**keys_of("LogitKD"), **teacher, **{"INPUT.CLASSIFICATION.CUTMIX": 1.0})))
    with pytest.raises(MethodError, match=r"LogitKD needs .*INPUT\.CLASSIFICATION\.CUTMIX mixes"):
        build_distilled_model(cfg)


@pytest.fixture
def masked(write, tmp_path: Path) -> dict[str, Any]:
    """An untrained transformer as the teacher, of which the student's own transformer chooses the patches."""
    small = {"MODEL.TIMM.ARGS": ["depth", 2, "embed_dim", 48, "num_heads", 3, "patch_size", 8]}
    path = write("teacher", "deit_small_patch16_224", **small)
    torch.manual_seed(7)
    weights = tmp_path / "teacher.pth"
    torch.save({"model": build_model(load_config(str(path))).state_dict()}, weights)
    return {
        **small,
        "DISTILL.TEACHER.CONFIG_FILE": str(path),
        "DISTILL.TEACHER.WEIGHTS": str(weights),
        "DISTILL.TEACHER.EVAL_FIRST": False,
        "DISTILL.INIT_FROM_TEACHER.ENABLED": False,
        "DISTILL.METHODS": ["LogitKD"],
        "DISTILL.LOGIT_KD.TEACHER_PASS": "MaskedTeacher",
    }


@pytest.mark.parametrize("changes", [{}, {"SELECTOR": "random"}, {"EXPLORE": 0.5}], ids=str)
def test_a_run_with_a_masked_teacher_resumes_bit_equal(write, masked, tmp_path, changes):
    keys = {**masked, **MIXED, **{f"DISTILL.MASKED_TEACHER.{key}": value for key, value in changes.items()}}
    path = write(network="deit_tiny_patch16_224", **keys)
    run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    drawn = {"OUTPUT_DIR": str(tmp_path / "parts"), "DISTILL__MASKED_TEACHER__VIS_PERIOD": 2}  # which changes nothing
    run_training(path, stop_at=3, **drawn)
    run_training(path, resume=True, **drawn)
    assert same_tensors(*(read_checkpoint(tmp_path / part)["model"] for part in ("whole", "parts")))
    pictures = {path.stem for path in (tmp_path / "parts/masking").glob("*.png")}
    assert pictures == {"0000001", "0000002", "0000003", "0000004", "0000006", "progress"}
    assert not (tmp_path / "whole/masking").exists()


def test_a_masked_teacher_in_two_processes_stays_in_step(write, masked, tmp_path):
    path = write(network="deit_tiny_patch16_224", **masked, **{"DISTILL.MASKED_TEACHER.EXPLORE": 0.25})
    in_two_processes(two_processes, path, tmp_path / "student")
    assert same_tensors(*(torch.load(tmp_path / f"student/rank{i}.pth") for i in (0, 1)))


def test_a_masked_teacher_of_weight_zero_changes_nothing(write, masked, tmp_path):
    run_training(write("alone", "deit_tiny_patch16_224", **{"MODEL.TIMM.ARGS": masked["MODEL.TIMM.ARGS"]}, **MIXED))
    run_training(write("zero", "deit_tiny_patch16_224", **masked, **MIXED, **{"DISTILL.LOGIT_KD.WEIGHT": 0.0}))
    assert same_tensors(read_checkpoint(tmp_path / "alone")["model"], read_checkpoint(tmp_path / "zero")["model"])


def test_fine_tuning_from_other_classes_says_what_is_initialized_anew(write, tmp_path, caplog):
    torch.manual_seed(2)
    other = build_model(load_config(str(write("other", **{"MODEL.CLASSIFIER.NUM_CLASSES": 12}))))
    torch.save({"model": other.state_dict()}, tmp_path / "start.pth")
    trainer = make_trainer(write(), MODEL__WEIGHTS=str(tmp_path / "start.pth"))
    before = trainer.student.backbone.net.classifier.weight.clone()
    trainer.resume_or_load(resume=False)
    net = trainer.student.backbone.net
    assert torch.equal(net.classifier.weight, before)
    assert torch.equal(net.conv_stem.weight, other.backbone.net.conv_stem.weight)
    assert "Initialized anew, as MODEL.WEIGHTS has them in another shape (for other classes?): " in caplog.text
    assert "backbone.net.classifier.weight (10, 1280), not (12, 1280)" in caplog.text


@pytest.mark.parametrize("reducer", REDUCERS)
def test_every_reducer_matches_channels_of_classifiers(write, teacher, tmp_path, reducer):
    keys = {**keys_of("ChannelMatching"), "DISTILL.CHANNEL_MATCHING.REDUCER": reducer, "SOLVER.MAX_ITER": 3}
    trainer = run_training(write(**keys, **teacher, **{"SOLVER.STEPS": [], "SOLVER.CHECKPOINT_PERIOD": 9}))
    losses = {name: value for name, (value, _) in trainer.storage.latest().items() if name.startswith("distill/")}
    assert losses.keys() == {f"distill/ChannelMatching/res{i}.pre_relu" for i in (3, 4)}
    assert all(0 < loss < 1e4 for loss in losses.values())
