"""`--check`: it says what a training does, in its numbers and its errors, and leaves nothing behind."""

import json
import re
from pathlib import Path

import pytest
import torch
from models import FASTER_RCNN, config, model
from runs import ROOT, run_training, tool
from torch import nn

from d2kd.cli import train
from d2kd.distillers import build_aligner, taps
from d2kd.engine import argument_parser, check_report
from d2kd.engine.check import run_steps
from d2kd.errors import ConfigError, UserError
from d2kd.modeling import TeacherError

pytestmark = pytest.mark.usefixtures("forget_datasets")


def check(path, *options, flags=()):
    """What `d2kd train --check` prints."""
    return train.main(argument_parser().parse_args(["--check", "--config-file", str(path), *flags, *map(str, options)]))


def rows(text):
    """The rows of the table as lists of cells; a row of the task has fewer."""
    lines = text.strip("\n").split("\n\n")[0].splitlines()
    return [re.split(r" {2,}", line) for line in lines]


def facts(text):
    """The lines below the table, by what they are about; several of one name are joined."""
    found = {}
    lines = re.sub(r"\n +", " ", text.strip("\n").split("\n\n")[1]).splitlines()  # long ones are wrapped
    for line in lines:
        name, fact = re.split(r" {2,}", line, maxsplit=1)
        found[name] = f"{found[name]}\n{fact}" if name in found else fact
    return found


def percent(cell):
    return float(cell.removesuffix(" %"))


@pytest.fixture
def pair(write_config, teacher):
    """A student with wider features than its teacher's, so that there is something to align."""
    return write_config(**teacher, MODEL__FPN__OUT_CHANNELS=16, DISTILL__METHODS=["FeatureMimic", "LogitKD"], SEED=3)


def test_the_table_is_that_of_a_training(pair, tmp_path, capsys):
    text = check(pair)
    assert text in capsys.readouterr().out
    table = rows(text)
    assert table[0] == [
        *("method", "student tap", "teacher tap", "student", "teacher", "strides", "aligner", "loss", "gradient"),
    ]
    by_tap = {row[1]: row for row in table[1:] if row[0] == "FeatureMimic"}
    assert by_tap["p3"][2:7] == ["p3", "4x16x8x8", "4x8x8x8", "8 / 8", "1x1 conv 16 -> 8"]
    assert by_tap["p4"][2:7] == ["p4", "4x16x4x4", "4x8x4x4", "16 / 16", "1x1 conv 16 -> 8"]
    shares = [percent(row[-1]) for row in table[1:] if row[-1].endswith("%")]
    assert len(shares) == 1 + len([row for row in table if row[0] in ("FeatureMimic", "LogitKD")])
    assert sum(shares) == pytest.approx(100, abs=0.5) and min(shares) > 0
    # the first iteration of a training with this seed has the same losses
    run_training(pair, SOLVER__MAX_ITER=1, SOLVER__STEPS=(), DATASETS__TEST=(), OUTPUT_DIR=str(tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[0])
    told = {f"distill/{row[0]}/{row[1]}": float(row[-2]) for row in table[1:] if len(row) == 9}
    told |= {row[0].removeprefix("task: "): float(row[1]) for row in table[1:] if row[0].startswith("task: ")}
    assert len(told) >= 6 and all(metrics[name] == pytest.approx(loss, rel=1e-3) for name, loss in told.items())


def test_nothing_is_written(pair, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    text = check(pair)
    assert "Nothing was written." in text and sorted(tmp_path.rglob("*")) == before
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "model_final.pth").write_text("of another run")
    (folder / ".x.123.tmp").write_text("left by a killed write")
    kept = {path.name: path.read_text() for path in folder.iterdir()}
    text = check(pair, "DISTILL.METHODS", "['FeatureMimic']")
    assert facts(text)["folder"].startswith(f"OUTPUT_DIR {folder} holds another run.")
    assert {path.name: path.read_text() for path in folder.iterdir()} == kept


def test_no_cache_of_features_is_made_but_its_folder_is_looked_at(pair, tmp_path):
    check(pair, "DISTILL.CACHE.DIR", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="DISTILL.CACHE.DIR is .* cannot be written .*file is a file"):
        check(pair, "DISTILL.CACHE.DIR", tmp_path / "file/cache")


def test_what_it_tells_of_networks_data_and_time(pair):
    told = facts(check(pair, "SOLVER.ACCUMULATE", 2, "MODEL.BACKBONE.FREEZE_AT", 2))
    parameters = sum(
        p.numel()
        for p in model(config(MODEL__RESNETS__RES2_OUT_CHANNELS=32, MODEL__RETINANET__NUM_CLASSES=10)).parameters()
    )
    assert f"RetinaNet of teacher.yaml: {parameters / 1e6:.4g} M parameters" in told["teacher"]
    assert told["frozen"].startswith("backbone.bottom_up.{stem, res2} (MODEL.BACKBONE.FREEZE_AT 2)")
    assert "digits_train, 24 images; here 4 of 64x64 pixels" in told["data"]
    assert "for 6 iterations of 2 batches" in told["time"] and "GB" in told["memory"]
    inherited, other = told["inherited"], told["not inherited"]
    assert "head.cls_subnet.0" not in inherited.splitlines()[0] and "backbone.fpn_lateral3 is 16x" in other
    assert "backbone.bottom_up: the student's own backbone" in other


def test_classes_are_told_by_their_names(write_config, teacher, tmp_path):
    saved = torch.load(teacher["DISTILL__TEACHER__WEIGHTS"])
    names = ["1", "0", *(f"other {n}" for n in range(8))]
    torch.save({**saved, "class_names": {"thing_classes": names}}, teacher["DISTILL__TEACHER__WEIGHTS"])
    told = facts(check(write_config(**teacher)))
    assert "class by class: head.cls_score, for 2 of 10 by their names (0, 1); not for 2, 3," in told["inherited"]


def test_without_inheriting_it_says_so(pair):
    told = facts(check(pair, "DISTILL.INIT_FROM_TEACHER.ENABLED", False, "DISTILL.METHODS", "['FeatureMimic']"))
    assert told["inherited"] == "nothing: DISTILL.INIT_FROM_TEACHER.ENABLED is False"


def test_the_rate_of_what_is_inherited_is_told(pair):
    options = ["DISTILL.METHODS", "['FeatureMimic']", "DISTILL.INIT_FROM_TEACHER.LR_FACTOR"]
    assert "at 0.1 of the learning rate (DISTILL" in facts(check(pair, *options, 0.1))["inherited"]
    assert "learning rate" not in facts(check(pair, *options, 1.0))["inherited"]


def test_frozen_parts_say_which_key_froze_them(pair):
    options = ["MODEL.BACKBONE.FREEZE_AT", 1, "DISTILL.INIT_FROM_TEACHER.FREEZE", "['head.bbox_pred.bias']"]
    told = facts(check(pair, *options))["frozen"]
    assert told.startswith(
        "backbone.bottom_up.stem (MODEL.BACKBONE.FREEZE_AT 1); head.bbox_pred.bias (DISTILL.INIT_FROM_TEACHER.FREEZE)"
    )


def test_shares_follow_the_balance(pair):
    def ratio(wanted):
        options = [
            "DISTILL.BALANCE",
            "gradient",
            "DISTILL.BALANCE_RATIO",
            wanted,
            "DISTILL.METHODS",
            "['FeatureMimic']",
        ]
        method, task = (percent(row[-1]) for row in rows(check(pair, *options, *taps)) if row[-1].endswith("%"))
        return method / task

    taps = ["DISTILL.FEATURE_MIMIC.TAPS", "['p3']", "DISTILL.FEATURE_MIMIC.WEIGHT", 100.0]
    assert ratio(0.25) == pytest.approx(0.5 * ratio(0.5), rel=0.02)
    taps = ["DISTILL.FEATURE_MIMIC.TAPS", "['res5']", "DISTILL.FEATURE_MIMIC.WEIGHT", 0.01]
    assert ratio(1.0) > 0.1  # also where a tap lies before what the backbone gives to the heads


def test_a_method_without_weight_has_no_effect(pair):
    told = facts(check(pair, "DISTILL.FEATURE_MIMIC.WEIGHT", 0, "DISTILL.FEATURE_MIMIC.TAPS", "['p4']"))
    assert told["no effect"] == "FeatureMimic at p4: the gradient of this batch is 0"


def test_plain_training(write_config):
    text = check(write_config())
    assert [row[0] for row in rows(text)] == ["method", "task: loss_cls", "task: loss_box_reg", "task"]
    assert "teacher" not in facts(text) and facts(text)["frozen"] == "nothing"


def test_a_box_head_and_a_method_that_looks_at_images_first(write_config, tmp_path):
    rcnn = {key.replace(".", "__"): value for key, value in {**FASTER_RCNN, "MODEL.ROI_HEADS.NUM_CLASSES": 10}.items()}
    path = write_config("teacher", **rcnn)
    torch.save({"model": model(config(FASTER_RCNN, MODEL__ROI_HEADS__NUM_CLASSES=10)).state_dict()}, tmp_path / "t.pth")
    methods = {"DISTILL__METHODS": ["ChannelMatching", "HeadRegression"]}
    methods |= {"DISTILL__CHANNEL_MATCHING__TRACKING": "pass", "DISTILL__CHANNEL_MATCHING__TAPS": ["res4.pre_relu"]}
    teacher = {"DISTILL__TEACHER__CONFIG_FILE": str(path), "DISTILL__TEACHER__WEIGHTS": str(tmp_path / "t.pth")}
    table = rows(check(write_config(**rcnn, **methods, **teacher)))
    assert table[1][0] == "ChannelMatching" and table[1][6] == "64 channels assigned to 64"
    assert table[2][:2] == ["HeadRegression", "roi_heads.box_predictor.bbox_pred"]
    assert table[2][3] == table[2][4] and re.fullmatch(r"\d+x40", table[2][3]) and table[2][5] == "-"


def test_what_a_training_would_refuse_is_refused_in_its_words(write_config, teacher, tmp_path):
    teacher = {**teacher, "DISTILL__TEACHER__WEIGHTS": str(tmp_path / "none.pth")}
    with pytest.raises(TeacherError, match="none.pth.*no such file"):
        check(write_config(**teacher))
    Path(tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="broken.pth"):
        check(write_config(), "MODEL.WEIGHTS", tmp_path / "broken.pth")
    with pytest.raises(UserError, match="nothing.json"):
        entry = {"NAME": "gone", "JSON": str(tmp_path / "nothing.json"), "IMAGES": str(tmp_path)}
        check(write_config(DATASETS__REGISTER=[entry], DATASETS__TRAIN=["gone"], DATASETS__TEST=[]))
    with pytest.raises(UserError, match="Not finite at iteration 0"):
        check(write_config(), "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.1, "MODEL.PIXEL_STD", "[1e-39, 1e-39, 1e-39]")
    with pytest.raises(ConfigError, match="--check is for trainings"):
        check(write_config(), flags=["--eval-only"])
    assert not (tmp_path / "student").exists()


def test_a_run_that_is_continued(write_config, tmp_path):
    path = write_config(DATASETS__TEST=())
    run_training(path, stop_at=3)
    told = facts(check(path, flags=["--resume"]))
    assert told["starts from"] == "iteration 3 of OUTPUT_DIR" and "for 3 iterations" in told["time"]


def test_weights_stay_as_they_are(write_config, tmp_path):
    from runs import make_trainer

    trainer = make_trainer(write_config(SOLVER__WEIGHT_DECAY=0.1))
    before = {name: p.clone() for name, p in trainer.student.named_parameters()}
    step = run_steps(trainer)
    assert not step.without_gradient and step.seconds > 0
    assert all(torch.equal(before[name], p) for name, p in trainer.student.named_parameters())


def test_two_processes_print_once(pair):
    done = tool("train_net", "--check", "--num-gpus", 2, "--config-file", pair)
    assert done.stdout.count("Checked: a training can start.") == 1 and "in 2 processes" in done.stdout
    assert not (pair.parent / "student").exists()


def test_the_pairs_of_the_documentation_are_those_that_were_printed():
    printed = (ROOT / "benchmarks/results/check_pairs.txt").read_text()
    blocks = re.findall(r"```\n(\$ d2kd train --check.*?)```", (ROOT / "docs/check.md").read_text(), re.DOTALL)
    assert len(blocks) == 3 and all(block.strip() in printed for block in blocks)
    assert "roi_heads.box_predictor.{cls_score, bbox_pred}, for 2 of 3 by their names" in re.sub(r"\s+", " ", printed)


# ---- words ----


def test_frozen_modules_are_the_largest():
    network = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), nn.Linear(1, 1), nn.ReLU())
    for name in ("0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "1.bias"):
        network.get_parameter(name).requires_grad_(False)
    assert list(check_report._frozen_modules(network, "")) == ["0", "1.bias"]


@pytest.mark.parametrize(
    "seconds, text", [(3.4, "3 s"), (90, "1 min 30 s"), (3 * 3600 + 61, "3 h 1 min"), (200000, "2 days 7 h")]
)
def test_durations(seconds, text):
    assert check_report._duration(seconds) == text


def test_names_that_begin_alike_stand_together():
    assert check_report._listed(["a.b.x", "a.b.y", "c", "d.e"]) == "a.b.{x, y}, c, d.e"
    assert check_report._listed([f"m{n}.x" for n in range(9)]).endswith("m5.x, and 3 more")


def test_layers_in_words():
    pair = taps.TapPair(taps.TapInfo("p3", 4, 8), taps.TapInfo("p3", 6, 8))
    assert taps.describe_layer(build_aligner(pair)) == "1x1 conv 4 -> 6"
    assert taps.describe_layer(nn.Identity()) == "" and taps.describe_layer(nn.Sequential()) == "Sequential"
