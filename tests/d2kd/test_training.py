"""Whole training runs: plain student checkpoints, exact resuming, several processes, failures."""

import json
import logging
import os
import signal
import subprocess
import time

import pytest
import torch
from helpers import same_tensors
from models import FASTER_RCNN, batch, config, write_teacher
from runs import (
    ROOT,
    command,
    environment,
    in_two_processes,
    make_trainer,
    read_checkpoint,
    run_training,
    tool,
    train_in_step,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import d2kd  # noqa: F401  (makes `detectron2` importable, also in processes that are spawned)
from d2kd.data.datasets import register_datasets
from d2kd.engine import DistillTrainer, NonFiniteLossError, load_config
from d2kd.modeling import build_distilled_model
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

METHODS = ["FeatureMimic", "MaskedGenerative"]


@pytest.mark.parametrize("method", METHODS)
def test_final_checkpoint_is_the_plain_student(write_config, teacher, tmp_path, method):
    path = write_config(DISTILL__METHODS=[method], **teacher)
    trainer = run_training(path)
    student = build_model(load_config(str(path)))
    problems = DetectionCheckpointer(student)._load_model(
        {"model": dict(read_checkpoint(tmp_path / "student")["model"])}
    )
    assert not problems.missing_keys and not problems.unexpected_keys and not problems.incorrect_shapes
    assert same_tensors(student.state_dict(), trainer.student.state_dict())
    detections = tmp_path / "student/inference/coco_instances_results.json"
    during_training = detections.read_text()
    detections.unlink()
    final = tmp_path / "student/model_final.pth"
    evaluation = tool("train_net", "--config-file", path, "--eval-only", "MODEL.WEIGHTS", final)
    assert len(json.loads(during_training)) > 10 and detections.read_text() == during_training
    first = evaluation.stdout.splitlines()[0]
    assert "Runtime" in first and "torch" in first and "device cpu" in first and "seed 1" in first


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_is_bit_equal_also_with_other_workers(write_config, teacher, tmp_path, method):
    path = write_config(DISTILL__METHODS=[method], **teacher)
    run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    assert not (tmp_path / "parts/result.json").exists()
    run_training(path, OUTPUT_DIR=str(tmp_path / "parts"), resume=True, DATALOADER__NUM_WORKERS=2)
    whole, parts = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    assert same_tensors(whole["model"], parts["model"])
    assert same_tensors(
        {k: v for k, v in whole["distillers"].items() if torch.is_tensor(v)},
        {k: v for k, v in parts["distillers"].items() if torch.is_tensor(v)},
    )


def test_killed_and_resumed_is_bit_equal(write_config, teacher, tmp_path):
    path = write_config(DISTILL__METHODS=["MaskedGenerative"], SOLVER__MAX_ITER=60, DATASETS__TEST=[], **teacher)
    arguments = ["--config-file", path, "DATALOADER.NUM_WORKERS", 1, "OUTPUT_DIR"]
    tool("train_net", *arguments, tmp_path / "whole")
    process = subprocess.Popen(
        command("train_net", *arguments, tmp_path / "killed"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while not (tmp_path / "killed/model_0000008.pth").exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/model_final.pth").exists()
    tool("train_net", "--resume", *arguments, tmp_path / "killed")
    assert same_tensors(read_checkpoint(tmp_path / "whole")["model"], read_checkpoint(tmp_path / "killed")["model"])


def test_offers_what_users_of_the_default_trainer_rely_on():
    offered = {name for name in vars(DefaultTrainer) if not name.startswith("_")}
    assert offered and offered <= set(dir(DistillTrainer))


@pytest.mark.parametrize(
    "number, send, processes",
    [(signal.SIGINT, os.killpg, 1), (signal.SIGTERM, os.killpg, 2), (signal.SIGINT, os.kill, 2)],
)
def test_a_signal_saves_and_resumes_bit_equal(write_config, teacher, tmp_path, number, send, processes):
    keys = {"SOLVER__MAX_ITER": 36, "SOLVER__CHECKPOINT_PERIOD": 1000, "DATASETS__TEST": []}
    path = write_config(DATALOADER__NUM_WORKERS=2, **keys, **teacher)
    arguments = ["--config-file", path, "--num-gpus", processes, "OUTPUT_DIR"]
    tool("train_net", *arguments, tmp_path / "whole")
    process = subprocess.Popen(
        command("train_net", *arguments, tmp_path / "stopped"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if "iter: 19" in line:
            send(process.pid, number)  # a terminal or a scheduler tells the loading processes too
            break
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and output.count("finishing this iteration") == 1
    assert "continue with --resume" in output and "Traceback" not in output
    tool("train_net", "--resume", *arguments, tmp_path / "stopped")
    assert same_tensors(read_checkpoint(tmp_path / "whole")["model"], read_checkpoint(tmp_path / "stopped")["model"])


def test_processes_of_torchrun_train_what_those_of_num_gpus_do(write_config, teacher, tmp_path):
    path = write_config(SOLVER__MAX_ITER=4, DATASETS__TEST=[], **teacher)
    tool("train_net", "--config-file", path, "--num-gpus", 2, "OUTPUT_DIR", tmp_path / "started")
    python, *rest = command("train_net", "--config-file", path, "OUTPUT_DIR", tmp_path / "joined")
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, *rest], cwd=ROOT, env=environment(), check=True, timeout=300)
    assert same_tensors(read_checkpoint(tmp_path / "started")["model"], read_checkpoint(tmp_path / "joined")["model"])


@pytest.mark.parametrize("base", [None, FASTER_RCNN], ids=["RetinaNet", "FasterRCNN"])
@pytest.mark.parametrize("method", METHODS)
def test_weight_zero_gives_bit_equal_student_gradients(tmp_path, base, method):
    bases = {} if base is None else {"base": base}
    node = {"FeatureMimic": "FEATURE_MIMIC", "MaskedGenerative": "MASKED_GENERATIVE"}[method]
    named = write_teacher(tmp_path, config(MODEL__RESNETS__RES2_OUT_CHANNELS=32, **bases))
    cfg = config(DISTILL__METHODS=[method], **{f"DISTILL__{node}__WEIGHT": 0.0}, **named, **bases)
    gradients = []
    for build in (build_model, build_distilled_model):
        torch.manual_seed(3)
        net = build(cfg).train()
        with EventStorage():
            losses = net(batch())
        sum(losses.values()).backward()
        student = getattr(net, "student", net)
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    assert any(name.startswith("distill/") for name in losses)
    assert same_tensors(*gradients)


def _two_processes(path: str, output: str, method: str) -> None:
    trainer = train_in_step(path, output, "DISTILL.METHODS", [method], "DATASETS.TEST", [])
    own, other = statistics = comm.all_gather([b.double().sum().item() for b in trainer.student.buffers()])
    assert own != other  # each process has seen other images
    DistillTrainer.test = classmethod(lambda cls, cfg, model: {})
    trainer.evaluation.run()
    assert comm.all_gather([b.double().sum().item() for b in trainer.student.buffers()]) == [statistics[0]] * 2


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_stay_in_step(write_config, teacher, tmp_path, method):
    path = write_config(**teacher)
    in_two_processes(_two_processes, path, tmp_path / "two", method)
    assert len(read_checkpoint(tmp_path / "two")["trainer"]["process_states"]) == 2


def test_loss_that_is_not_finite_names_itself_and_keeps_the_state_before(write_config, teacher, tmp_path):
    path = write_config(**teacher)
    cfg = load_config(str(path))
    register_datasets(cfg)
    torch.manual_seed(1)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    good = {}
    plain = trainer.distilled.distillers["FeatureMimic"].level_loss

    def level_loss(level, student, teacher_map):
        if trainer.iter == 4 and level == 1:
            good.update({k: v.detach().clone() for k, v in trainer.student.named_parameters()})
            return plain(level, student * float("nan"), teacher_map)
        return plain(level, student, teacher_map)

    trainer.distilled.distillers["FeatureMimic"].level_loss = level_loss
    with pytest.raises(NonFiniteLossError, match=r"iteration 4: distill/FeatureMimic/p4 = nan.*model_before_failure"):
        trainer.train()
    kept = read_checkpoint(tmp_path / "student", "model_before_failure_0000004")
    assert kept["iteration"] == 3 and all(torch.equal(kept["model"][k], v) for k, v in good.items())
    assert all(torch.isfinite(v).all() for v in kept["model"].values())
    resumed = run_training(path, resume=True)
    assert resumed.start_iter == 3  # from the last regular checkpoint
    run_training(path, OUTPUT_DIR=str(tmp_path / "whole"))
    assert same_tensors(read_checkpoint(tmp_path / "student")["model"], read_checkpoint(tmp_path / "whole")["model"])


def test_evaluation_in_between_changes_nothing(write_config, teacher, tmp_path):
    path = write_config(**teacher)
    run_training(path, OUTPUT_DIR=str(tmp_path / "a"))
    run_training(path, OUTPUT_DIR=str(tmp_path / "b"), TEST__EVAL_PERIOD=2)
    assert same_tensors(read_checkpoint(tmp_path / "a")["model"], read_checkpoint(tmp_path / "b")["model"])


def test_metrics_are_on_the_disk_before_a_checkpoint_says_that_they_were_made(write_config, teacher, tmp_path):
    path = write_config(SOLVER__CHECKPOINT_PERIOD=3, TEST__EVAL_PERIOD=3, **teacher)
    trainer, seen = make_trainer(path, SOLVER__MAX_ITER=6), []
    save, log = trainer.save, tmp_path / "student/metrics.json"

    def rows():
        found = [json.loads(line) for line in log.read_text().splitlines()]
        return [row["iteration"] for row in found if "bbox/AP" in row]

    trainer.resume_or_load(resume=False)
    trainer.save = lambda name, **options: (seen.append((name, rows())), save(name, **options))
    trainer.train()
    # the checkpoint is written before the evaluation, and renewed after it
    assert seen[:2] == [("model_0000002", []), ("model_0000002", [2])]
    assert rows() == [2, 6] or rows() == [2, 5]


def test_a_run_that_was_stopped_before_its_result_is_completed(write_config, teacher, tmp_path):
    path = write_config(SOLVER__EMA__ENABLED=True, **teacher)
    run_training(path)
    result = tmp_path / "student/result.json"
    before, trained = json.loads(result.read_text()), (tmp_path / "student/model_final.pth").stat().st_mtime_ns
    result.unlink()
    run_training(path, resume=True)
    assert json.loads(result.read_text()) == before
    assert run_training(path, resume=True).train() is None
    assert (tmp_path / "student/model_final.pth").stat().st_mtime_ns == trained
    with pytest.raises(NonFiniteLossError):
        run_training(path, SOLVER__BASE_LR=1e18, SOLVER__WARMUP_ITERS=0)
    assert not result.exists()  # what stood there was that of another run


def test_losses_of_every_level_are_in_the_log(write_config, teacher, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run_training(write_config(DISTILL__METHODS=METHODS, SOLVER__MAX_ITER=20, DATASETS__TEST=[], **teacher))
    lines = [json.loads(line) for line in (tmp_path / "student/metrics.json").read_text().splitlines()]
    want = {f"distill/{method}/p{level}" for method in METHODS for level in (3, 4)}
    assert want | {"loss_cls", "loss_box_reg", "total_loss", "distill_loss", "lr"} <= set(lines[-1])
    line = [x.getMessage() for x in caplog.records if x.name.endswith("distill_printer")][-1]
    assert all(f"{method}: p3 {lines[-1][f'distill/{method}/p3']:.4g}, p4 " in line for method in METHODS)
    (events,) = (tmp_path / "student").glob("events.out.tfevents.*")
    assert want <= set(EventAccumulator(str(events)).Reload().Tags()["scalars"])


def test_teacher_is_evaluated_first_with_its_own_result(write_config, teacher, tmp_path):
    path = write_config(**{**teacher, "DISTILL__TEACHER__EVAL_FIRST": True})
    run_training(path)
    first = json.loads((tmp_path / "student/teacher/result.json").read_text())
    tool("train_net", "--config-file", path, "--eval-teacher", "OUTPUT_DIR", tmp_path / "again")
    again = json.loads((tmp_path / "again/teacher/result.json").read_text())
    assert first["metrics"] == again["metrics"] and first["params"] > 0


def test_export_of_any_iteration(write_config, teacher, tmp_path):
    path = write_config(DATASETS__TEST=[], **teacher)
    run_training(path)
    source, target = tmp_path / "student/model_0000002.pth", tmp_path / "exported.pth"
    target.write_text("an earlier export")
    options = ["MODEL.RETINANET.NUM_CLASSES", 7]
    done = tool("export_student", source, target, "--config-file", path, *options, check=False)
    assert done.returncode == 2 and target.read_text() == "an earlier export"
    tool("export_student", source, target, "--config-file", path)
    exported = torch.load(target, weights_only=True)
    assert list(exported) == ["model", "class_names", "checksum"] and same_tensors(
        exported["model"], torch.load(source, weights_only=True)["model"]
    )
    assert target.stat().st_size < source.stat().st_size / 1.5


def test_a_checkpointer_that_has_resumed_reads_other_files_again(write_config, teacher, tmp_path):
    path = write_config(DATASETS__TEST=[], **teacher)
    run_training(path, stop_at=3)
    trainer = run_training(path, resume=True)
    weights = tmp_path / "weights.pth"
    torch.save({"model": trainer.student.state_dict()}, weights)
    trainer.checkpointer.load(str(weights), checkpointables=[])


class AsWithDetectron2(DistillTrainer):
    """What users of DefaultTrainer override, with Detectron2's own signatures."""

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=f"{cfg.OUTPUT_DIR}/own")


def test_overridden_as_a_default_trainer(write_config, tmp_path, caplog):
    path = write_config(SOLVER__EMA__ENABLED=True)
    run_training(path, stop_at=3, trainer_class=AsWithDetectron2)
    trainer = run_training(path, resume=True, trainer_class=AsWithDetectron2)
    assert trainer.start_iter == 3 and set(trainer.evaluation.results) == {"bbox", "bbox_EMA"}
    assert (tmp_path / "student/own").is_dir() and (tmp_path / "student/inference_EMA/own").is_dir()
