"""The folder of a run: nothing of the user's is lost in it, and killed or diverged runs go on as they should."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import same_tensors
from models import config, model
from runs import ROOT, command, environment, make_trainer, read_checkpoint, run_training, tool
from test_bad_input import error_of

from d2kd.cli import train
from d2kd.engine import DistillTrainer, NonFiniteLossError, argument_parser
from d2kd.engine.run_files import forget_replaced_run
from d2kd.engine.run_folder import FolderError, claimed_folder, locked, prepare_folder, remove_left_overs
from d2kd.errors import UserError
from d2kd.files import file_checksum
from d2kd.modeling.checkpoint_files import checksum, write_checkpoint


def run_tool(path, output, *arguments):
    """Runs `d2kd train` in this process."""
    flags, options = [a for a in arguments if a.startswith("--")], [a for a in arguments if not a.startswith("--")]
    train.main(argument_parser().parse_args(["--config-file", str(path), *flags, "OUTPUT_DIR", str(output), *options]))


# --- what is there stays ------------------------------------------------------------------------------------


def test_another_run_is_not_written_over(write_config, tmp_path):
    path, output = write_config(SOLVER__MAX_ITER=1, DATASETS__TEST=[]), tmp_path / "out"
    run_tool(path, output)
    before = {file.name: file.read_bytes() for file in output.iterdir() if file.suffix in (".pth", ".json", ".yaml")}
    with pytest.raises(FolderError, match=r"holds another run.*--resume.*OUTPUT_DIR.*--overwrite"):
        run_tool(path, output)
    assert before == {name: (output / name).read_bytes() for name in before}
    (output / "notes.txt").touch()
    run_tool(path, output, "--overwrite")
    assert (output / "notes.txt").exists()
    lines = (output / "metrics.json").read_text().splitlines()
    assert len(lines) == 1  # nothing of the run before is left in it
    run_tool(path, output, "--resume")


def contents(folder):
    """All files but the log, which goes on."""
    files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file() and p.name not in ("log.txt", ".lock")}
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize("wrong", ["teacher", "classes", "step"])
def test_a_start_that_fails_leaves_the_run_that_it_was_to_replace(write_config, teacher, tmp_path, wrong, monkeypatch):
    output = tmp_path / "out"
    run_tool(write_config(SOLVER__MAX_ITER=1, DATASETS__TEST=[]), output)
    before = contents(output)
    changes, message = {
        "teacher": ({**teacher, "DISTILL__TEACHER__WEIGHTS": str(tmp_path / "missing.pth")}, "missing.pth"),
        "classes": ({"MODEL__RETINANET__NUM_CLASSES": 7}, "NUM_CLASSES"),
        "step": ({}, "in the first step"),
    }[wrong]
    path = write_config(wrong, DATASETS__TEST=[], **changes)

    def fail(trainer):
        raise UserError("in the first step")

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "run_step", fail)
        with pytest.raises(UserError, match=message):
            run_tool(path, output, "--overwrite")
    assert contents(output) == before
    run_tool(write_config(SOLVER__MAX_ITER=1, DATASETS__TEST=[]), output, "--overwrite")
    assert not (output / ".replaced").exists()


def test_overwriting_removes_what_the_run_has_written_and_nothing_else(write_config, tmp_path):
    path, output = write_config(SOLVER__MAX_ITER=1, DATASETS__TEST=[]), tmp_path / "out"
    run_tool(path, output)
    kept = [
        "teacher/last_checkpoint",
        "teacher/result.json",
        "masks/mine.png",
        "features/mine.png",
        "evaluation/notes.txt",
    ]
    gone = ["benchmark.json", "masks/p3_0.png", "evaluation/result.json", "evaluation/inference/boxes.json"]
    for name in (*kept, *gone):
        (output / name).parent.mkdir(exist_ok=True, parents=True)
        (output / name).write_text("{}")
    run_tool(path, output, "--overwrite")
    assert [name for name in kept if not (output / name).exists()] == []
    assert [name for name in gone if (output / name).exists()] == []


def test_a_run_is_there_again_wherever_the_start_that_was_to_replace_it_was_killed(write_config, tmp_path, monkeypatch):
    path, output = write_config(SOLVER__MAX_ITER=1, DATASETS__TEST=[]), tmp_path / "out"
    run_tool(path, output)
    before, rename = contents(output), Path.rename
    cfg = config(OUTPUT_DIR=str(output))
    steps, starts = iter(range(1000)), []  # kept: one that is collected is left, not killed

    def killed(path, target):
        if next(steps) == dies_at:
            raise SystemExit
        return rename(path, target)

    for dies_at in range(30):  # before each of the files and folders that are moved there and back
        steps = iter(range(1000))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            for _ in range(2):
                starts.append(claimed_folder(cfg, resume=False, overwrite=True))
                with contextlib.suppress(SystemExit):
                    starts[-1].__enter__()
                    (output / "model_0000000.pth").write_text("of the killed one")
        with claimed_folder(cfg, resume=True, overwrite=False):
            assert contents(output) == before, dies_at
    assert next(steps) < dies_at, "it was never killed at the last of them"


def test_a_run_that_was_replaced_is_forgotten_wherever_that_was_killed(write_config, tmp_path, monkeypatch):
    path, output = write_config(SOLVER__MAX_ITER=1, DATASETS__TEST=[]), tmp_path / "out"
    run_tool(path, output)
    cfg = config(OUTPUT_DIR=str(output))
    start = claimed_folder(cfg, resume=False, overwrite=True)
    start.__enter__()
    (output / "metrics.json").write_text("of the new one")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(shutil, "rmtree", lambda path: sys.exit())
        forget_replaced_run(str(output))
    with claimed_folder(cfg, resume=True, overwrite=False) as done:
        assert not done and {str(name) for name in contents(output)} == {"metrics.json"}


def test_weights_alone_are_no_run_to_go_on_with(write_config, tmp_path):
    path, output = write_config(SOLVER__MAX_ITER=2, DATASETS__TEST=[]), tmp_path / "out"
    run_tool(path, output)
    write_checkpoint(output / "model_best.pth", {"model": read_checkpoint(output)["model"]})
    (output / "last_checkpoint").write_text("model_best.pth")
    with pytest.raises(UserError, match=r"Cannot resume from .*model_best\.pth: it has weights alone"):
        run_tool(path, output, "--resume")


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "DISTILL.TEACHER.WEIGHTS"])
def test_a_file_that_is_read_is_not_written_over(write_config, teacher, tmp_path, key):
    torch.save({"model": model(config(MODEL__RETINANET__NUM_CLASSES=10)).state_dict()}, tmp_path / "model_final.pth")
    with pytest.raises(FolderError, match=rf"{key} .*model_final\.pth lies in OUTPUT_DIR"):
        args = ["--config-file", str(write_config(**teacher)), "OUTPUT_DIR", str(tmp_path)]
        train.main(argument_parser().parse_args([*args, key, str(tmp_path / "model_final.pth")]))
    assert (tmp_path / "model_final.pth").exists()


@pytest.mark.parametrize("place", ["teachers", "inference", "evaluation/inference"])
def test_only_what_overwriting_removes_cannot_be_read(write_config, teacher, tmp_path, place):
    path, output = write_config(SOLVER__MAX_ITER=1, DATASETS__TEST=[], **teacher), tmp_path / "out"
    weights = output / place / "weights.pth"
    run_tool(path, output)
    (output / "evaluation").mkdir()
    (output / "evaluation" / "result.json").touch()
    weights.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(teacher["DISTILL__TEACHER__WEIGHTS"], weights)
    refused = pytest.raises(FolderError, match=r"DISTILL\.TEACHER\.WEIGHTS .*weights\.pth lies in OUTPUT_DIR")
    with contextlib.nullcontext() if place == "teachers" else refused:
        run_tool(path, output, "--overwrite", "DISTILL.TEACHER.WEIGHTS", str(weights))
    assert weights.exists()


def test_folders_that_take_no_files(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path / "file", "Not a directory|File exists"),
        (tmp_path / "file" / "below", "Not a dir"),
        ("", "is empty"),
    ):
        with pytest.raises(FolderError, match=rf"OUTPUT_DIR.*({words})"):
            prepare_folder(str(path))
    prepare_folder(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_is_one_line(write_config, tmp_path, monkeypatch):
    # no file may grow beyond 100 kB, as if the disk were full
    line = f"ulimit -f 100; exec {' '.join(command('train_net', '--config-file', write_config(DATASETS__TEST=[])))}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout[-3000:]
    assert "Cannot write" in done.stdout and not list((tmp_path / "student").glob("*.pth"))


def test_two_runs_in_one_folder_at_once(write_config, tmp_path):
    path, output = write_config(DATASETS__TEST=[], SOLVER__MAX_ITER=100000), tmp_path / "student"
    first = subprocess.Popen(
        command("train_net", "--config-file", path), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.time() + 120
        while not (output / "model_0000002.pth").exists():
            assert time.time() < deadline and first.poll() is None
            time.sleep(0.05)
        before = sorted(output.glob("model_*.pth"))
        for flag in ("--overwrite", "--resume"):
            with pytest.raises(FolderError, match="Another run is writing into OUTPUT_DIR"):
                run_tool(path, output, flag, "SOLVER.MAX_ITER", "7")
        assert set(before) <= set(output.glob("model_*.pth"))
        assert "MAX_ITER: 100000" in (output / "config.yaml").read_text()
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 143
    with locked(str(output)):
        pass


def test_left_overs_of_killed_writes_are_removed(tmp_path):
    for name in (".model_0000002.123.tmp.pth", "last_checkpoint.tmp77", "model_0000002.pth", "notes.tmp"):
        (tmp_path / name).touch()
    remove_left_overs(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"model_0000002.pth", "notes.tmp"}


def test_checkpoints_without_a_last_one(write_config, tmp_path):
    path, output = write_config(DATASETS__TEST=[]), tmp_path / "out"
    run_tool(path, output)
    (output / "last_checkpoint").unlink()
    with pytest.raises(FolderError, match=r"has checkpoints \(model_0000002\.pth, .*\), but no file last_checkpoint"):
        run_tool(path, output, "--resume")


def test_evaluations_leave_a_training_and_its_result_alone(write_config, tmp_path):
    path, output = write_config(), tmp_path / "student"
    run_training(path)
    before = {file: file.read_bytes() for file in output.rglob("*.json")}
    weights = ["MODEL.WEIGHTS", str(output / "model_0000002.pth")]
    args = argument_parser().parse_args(
        ["--config-file", str(path), "--eval-only", *weights, "SOLVER.BASE_LR", "9", "OUTPUT_DIR", str(output)]
    )
    config_yaml = (output / "config.yaml").read_bytes()
    train.main(args)
    assert all(file.read_bytes() == content for file, content in before.items())
    assert (output / "config.yaml").read_bytes() == config_yaml
    result = json.loads((output / "evaluation" / "result.json").read_text())
    assert result["datasets"] == ["digits_val"] and "AP" in result["metrics"]["bbox"]
    assert result["weights_checksum"] == file_checksum(output / "model_0000002.pth")
    assert (output / "evaluation" / "inference" / "coco_instances_results.json").exists()


def test_an_evaluation_under_other_settings_leaves_predictions_alone(write_config, tmp_path):
    path, output = write_config(), tmp_path / "student"
    run_training(path)

    def evaluate(*options):
        weights = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(output)]
        train.main(argument_parser().parse_args(["--config-file", str(path), "--eval-only", *weights, *options]))
        return (output / "log.txt").read_text()

    predictions = output / "inference/coco_instances_results.json"
    before = predictions.read_bytes()
    predictions.unlink()
    evaluate("TEST.EVAL_PERIOD", "3", "INPUT.MIN_SIZE_TRAIN", "(32,)")  # nothing that the weights notice
    assert predictions.read_bytes() == before and not (output / "evaluation").exists()
    for key, value in (("INPUT.MIN_SIZE_TEST", "32"), ("TEST.DETECTIONS_PER_IMAGE", "2")):
        log = evaluate(key, value)
        assert predictions.read_bytes() == before
        assert json.loads((output / "evaluation/result.json").read_text())["metrics"]["bbox"]
        assert f"go to {output / 'evaluation'}: the run of" in log and f"({key} is {value}, and was" in log
    (output / "config.yaml").write_text("[")
    assert "has no result and configuration to compare with" in evaluate() and predictions.read_bytes() == before


# --- killed anywhere ----------------------------------------------------------------------------------------

#: Scores of the evaluations, best at the second, so that the run stops early.
SCORES = {1: 1.0, 3: 3.0, 5: 2.0, 7: 1.5, 9: 4.0}


class Scripted(DistillTrainer):
    """Evaluates by a script; dies, as by `kill -9`, at a chosen file or evaluation."""

    die_at = -1
    reached = 0

    @classmethod
    def passes(cls) -> None:
        """A place where a process may be killed."""
        if cls.reached == cls.die_at:
            os._exit(9)
        cls.reached += 1

    @classmethod
    def test(cls, cfg, net, evaluators=None):
        cls.passes()
        number = cls.running.iter  # at the end, one higher than that of the last step
        return {"bbox": {"AP": SCORES.get(number) or SCORES[number - 1]}}

    def train(self):
        type(self).running = self
        return super().train()


def watch_writes():
    """Makes every file that is put into its place a place to die, before and after."""
    replace = Path.replace

    def watched(path, target):
        Scripted.passes()
        result = replace(path, target)
        Scripted.passes()
        return result

    Path.replace = watched


def run_scripted(path, output, die_at, resume):
    """What a process of its own does: it trains, dies where it should, or says how many such places there were."""
    torch.set_num_threads(1)
    watch_writes()
    Scripted.die_at = die_at
    run_training(path, trainer_class=Scripted, resume=resume, OUTPUT_DIR=str(output))
    (output / "places").write_text(str(Scripted.reached))


def outcome(output):
    """What a finished run has come to."""
    files = {p.name: read_checkpoint(output, p.stem)["model"] for p in output.glob("model_*.pth")}
    result = json.loads((output / "result.json").read_text())
    return files, {key: result[key] for key in ("metrics", "best", "stopped_early", "iterations")}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("patience", [2, 0], ids=["stops early", "to the end"])
def test_a_run_that_is_killed_anywhere_ends_as_the_undisturbed_one(write_config, tmp_path, monkeypatch, patience):
    changes = {
        "SOLVER__MAX_ITER": 10,
        "SOLVER__STEPS": [6],
        "SOLVER__EMA__ENABLED": True,
        "TEST__EVAL_PERIOD": 2,
        "TEST__BEST_CHECKPOINT__METRIC": "bbox/AP",
        "TEST__EARLY_STOP__PATIENCE": patience,
    }
    path = write_config(SOLVER__CHECKPOINT_PERIOD=2, **changes)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # else its server does not find this file
    context = multiprocessing.get_context("forkserver")  # its server has imported all, and run nothing
    context.set_forkserver_preload([__name__])

    def run(output, die_at=-1, resume=False):
        process = context.Process(target=run_scripted, args=(path, output, die_at, resume))
        process.start()
        process.join()
        return process.exitcode

    assert run(tmp_path / "whole") == 0
    places = int((tmp_path / "whole" / "places").read_text())
    files, result = outcome(tmp_path / "whole")
    assert places > 30 and result["stopped_early"] == bool(patience)
    picked = random.Random(0).sample(range(places), 12)
    for place in picked:
        output = tmp_path / f"killed_{place}"
        assert run(output, die_at=place) == 9
        assert run(output, resume=True) == 0
        killed_files, killed_result = outcome(output)
        assert killed_result == result and killed_files.keys() == files.keys(), place
        assert all(same_tensors(files[name], killed_files[name]) for name in files), place


# --- diverged -----------------------------------------------------------------------------------------------


def test_after_a_divergence_a_lower_rate_trains_on(write_config, tmp_path):
    path = write_config(DATASETS__TEST=[], SOLVER__MAX_ITER=12, SOLVER__CHECKPOINT_PERIOD=1, SOLVER__WARMUP_ITERS=0)
    run_training(path, stop_at=4)
    with pytest.raises(NonFiniteLossError, match=r"SOLVER\.BASE_LR.*--resume .*continues from model_000000\d\.pth"):
        run_training(path, resume=True, SOLVER__BASE_LR=1e6)
    for _ in range(2):  # a second wrong attempt costs nothing
        last = (tmp_path / "student" / "last_checkpoint").read_text()
        state = read_checkpoint(tmp_path / "student", Path(last).stem)["model"]
        assert all(value.isfinite().all() for value in state.values()) and int(last[6:13]) <= 4, last
        with pytest.raises(NonFiniteLossError):
            run_training(path, resume=True, SOLVER__BASE_LR=1e6)
    trainer = run_training(path, resume=True, SOLVER__BASE_LR=0.001)
    assert trainer.finished
    assert all(value.isfinite().all() for value in read_checkpoint(tmp_path / "student")["model"].values())


@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("rate", [3.0, 1e5])
def test_a_run_that_diverges_at_once_starts_anew(write_config, tmp_path, rate, period):
    keys = {"SOLVER__CHECKPOINT_PERIOD": period, "SOLVER__WARMUP_ITERS": 0, "SOLVER__STEPS": [12]}
    path = write_config(DATASETS__TEST=[], SOLVER__MAX_ITER=14, **keys)
    with pytest.raises(NonFiniteLossError, match=r"--resume .*(starts anew|continues from model_0000000\.pth)"):
        run_training(path, SOLVER__BASE_LR=rate)
    output = tmp_path / "student"
    run_tool(path, output, "--resume", "SOLVER.BASE_LR", "0.0001")
    assert (output / "result.json").exists()
    assert all(value.isfinite().all() for value in read_checkpoint(output)["model"].values())


def test_weights_that_the_last_step_ruins_are_not_delivered(write_config, tmp_path, monkeypatch):
    path = write_config(DATASETS__TEST=[])
    step = DistillTrainer.run_step

    def ruin(trainer):
        step(trainer)
        if trainer.iter == 5:
            with torch.no_grad():
                next(trainer.student.parameters()).fill_(float("inf"))

    monkeypatch.setattr(DistillTrainer, "run_step", ruin)
    with pytest.raises(NonFiniteLossError, match=r"after iteration 5: 1 weights.*not saved.*model_0000002\.pth"):
        run_training(path)
    assert (
        not (tmp_path / "student" / "model_final.pth").exists() and not (tmp_path / "student" / "result.json").exists()
    )
    monkeypatch.undo()
    assert run_training(path, resume=True).finished


# --- files --------------------------------------------------------------------------------------------------


def test_flipped_bits_are_noticed(write_config, tmp_path):
    path = write_config(DATASETS__TEST=[])
    run_training(path, stop_at=3)
    file = tmp_path / "student" / "model_final.pth"
    whole, dice = file.read_bytes(), random.Random(0)
    good = read_checkpoint(file.parent)["model"]
    for _ in range(25):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        file.write_bytes(damaged)
        try:
            trainer = make_trainer(path)
            trainer.resume_or_load(resume=True)
        except UserError as error:
            assert "model_final.pth" in str(error)
        else:  # in a part of the file that holds nothing
            assert same_tensors(trainer.student.state_dict(), good)


def test_checksums_tell_values_types_and_places_apart(tmp_path):
    content = {"a": torch.arange(4.0), "b": [1, "x", None, 2.5], "c": {"d": torch.zeros((), dtype=torch.bfloat16)}}
    others = [
        {**content, "a": torch.arange(4)},
        {**content, "a": torch.arange(4.0).reshape(2, 2)},
        {**content, "b": [1, "x", None, 2]},
        {**content, "b": ["x", 1, None, 2.5]},
        {**content, "c": {"e": torch.zeros((), dtype=torch.bfloat16)}},
    ]
    sums = [checksum(x) for x in (content, *others)]
    assert len(set(sums)) == len(sums) and checksum(dict(content)) == sums[0]
    write_checkpoint(tmp_path / "x.pth", content)
    assert checksum({k: v for k, v in torch.load(tmp_path / "x.pth").items() if k != "checksum"}) == sums[0]


# --- the start ----------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there(write_config, tmp_path, monkeypatch, capfd):
    assert "MODEL.DEVICE is 'mps'" in error_of(write_config(), tmp_path / "x", "MODEL.DEVICE", "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_tool(write_config(DATASETS__TEST=[], SOLVER__MAX_ITER=1, MODEL__DEVICE="cuda"), tmp_path / "out")
    shown = "".join(capfd.readouterr())
    assert "WARNING" in shown and "MODEL.DEVICE is cuda, and there is no CUDA device here" in shown


def test_no_configuration_at_all(tmp_path):
    with pytest.raises(UserError, match="--config-file is missing"):
        train.main(argument_parser().parse_args(["OUTPUT_DIR", str(tmp_path)]))


def test_parts_that_do_not_fit_are_one_line(write_config, tmp_path):
    message = error_of(write_config(MODEL__RESNETS__NORM="GN"), tmp_path / "out")
    assert "cannot be built" in message and "\n" not in message


def test_tokens_are_learned_with_the_teachers_weights_as_a_flag(write_config, tmp_path):
    torch.save({"model": model(config(MODEL__RETINANET__NUM_CLASSES=10)).state_dict()}, tmp_path / "teacher.pth")
    learn = ["DISTILL.RECEPTIVE_TOKENS.LEARN.ITERATIONS", 1, "DISTILL.RECEPTIVE_TOKENS.TAPS", "['p3']"]
    tool(
        "learn_tokens", "--config-file", write_config(), "--teacher-weights", tmp_path / "teacher.pth", *learn,
        "OUTPUT_DIR", tmp_path / "tokens",
    )  # fmt: skip
    assert (tmp_path / "tokens" / "tokens.pth").exists()
