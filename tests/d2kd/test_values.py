"""Every declared key, of d2kd and of Detectron2: wrong values are one line that names it, right ones pass."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import ROOT

from d2kd.cli import train
from d2kd.config import add_distill_config, check_values, config_check, get_key, leaves, list_settings
from d2kd.config_reader import read_config
from d2kd.detectron2_keys import DETECTRON2_KEYS
from d2kd.engine import argument_parser, launching, load_config, setup
from d2kd.errors import ConfigError, UserError
from d2kd.settings import Setting
from detectron2.config import get_cfg

SETTINGS = list_settings()
#: Keys that decide how a file is read, before there is a configuration to check.
READ_FIRST = ("DISTILL.IMPORTS", "VERSION")
#: Values of a type, one after another tried as what does not fit a rule.
SAMPLES: dict[type, list[Any]] = {
    str: ["", " ", "no such word", "a\nb"],
    int: [0, 1, 2],
    float: [0.25, 0.5, 1.0, 2.0],
    bool: [True, False],
    object: ["KEY", 1],
    dict: [{"NAME": "x"}],
}


def wrong_types(declared: Setting) -> list[Any]:
    """Values that no key of that type takes."""
    if declared.is_list:
        items = {str: [3, None], object: []}.get(declared.kind, [None, "x"])
        return [3, None, {"A": 1}, *([item] for item in items), *([[item]] for item in items)]
    others: list[Any] = [["x"], [], {"A": 1}, 1.5, True, "x", math.nan]
    right = (int, float) if declared.kind is float else (declared.kind,)
    return [*([None] if declared.default is not None else []), *(x for x in others if type(x) not in right)]


def out_of_range(declared: Setting) -> list[Any]:
    """Values of the right type that bounds, words or rule exclude."""
    kind = declared.kind
    values: list[Any] = []
    if declared.words:
        values += [f"{declared.words[-1]}x", "no such word", "a\nb"] if kind is str else [max(declared.words) + 1]
    if kind is float:
        values += [math.nan, -math.inf, *([] if declared.infinite else [math.inf])]
    if kind in (int, float):
        values += [2**70, -(2**70)]
        for bound, holds, words in declared.bounds:
            beyond = bound + (1 if words in ("at most", "below") else -1)
            values += [kind(beyond), *([] if holds(bound, bound) else [kind(bound)])]
    if declared.is_list:
        values = [[value] for value in values]
        good = declared.default or SAMPLES[kind]
        tried = [[], [good[0]] * 2, [good[0]] * 7, list(good)[::-1], *([x] for x in SAMPLES[kind])]
    else:
        tried = SAMPLES[kind]
    return values + [value for value in tried if not accepts(declared, value)]


def accepts(declared: Setting, value: Any) -> bool:
    try:
        declared.check("KEY", value)
    except ConfigError:
        return False
    return True


def at_the_bounds(declared: Setting) -> list[Any]:
    """Values that are just allowed."""
    kind = declared.kind
    bounds = [bound for bound, holds, _ in declared.bounds if holds(bound, bound) and abs(bound) < 2**31]
    values = [kind(bound) for bound in bounds] + list(declared.words)
    if declared.is_list:  # as many as by default, or one where each must be another
        many = len(declared.default) or 1
        values = [[value] * (many if accepts(declared, [value] * many) else 1) for value in values]
    return [value for value in values if accepts(declared, value)]


def error_of(key: str, value: Any, file: Path | None) -> str:
    """The message for a value, in a file or among the options; "" where there is none."""
    content: Any = value
    for part in reversed(key.split(".")):
        content = {part: content}
    if file is not None:
        file.write_text(yaml.safe_dump(content))
    try:
        load_config(str(file or ""), [] if file is not None else [key, value])
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", [key for key in SETTINGS if key not in READ_FIRST])
def test_wrong_values_are_one_line_with_the_key(key, tmp_path):
    declared = SETTINGS[key]
    wrong = wrong_types(declared) + out_of_range(declared)
    assert len(wrong) >= 3
    for i, value in enumerate(wrong):
        assert not accepts(declared, value), value
        message = error_of(key, value, tmp_path / "wrong.yaml" if i % 2 else None)
        assert key in message and "\n" not in message, (value, message)


@pytest.mark.parametrize("key", SETTINGS)
def test_right_values_pass(key):
    declared = SETTINGS[key]
    assert declared.check(key, declared.default) == declared.default or declared.is_list
    for value in at_the_bounds(declared):
        assert key in str(TOGETHER) or error_of(key, value, None) == "", value


def test_every_key_of_d2kd_is_declared_and_documented():
    cfg = get_cfg()
    plain = dict(leaves(cfg))
    add_distill_config(cfg)
    added = [key for key in dict(leaves(cfg)) if key not in plain and "GRID_DETECTOR" not in key]
    assert set(added) <= set(SETTINGS) and len(added) > 100
    assert all(SETTINGS[key].doc for key in added)


def test_rules_are_for_keys_of_detectron2():
    assert set(DETECTRON2_KEYS) <= set(dict(leaves(get_cfg())))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_and_defaults_pass(path):
    load_config(str(path))
    check_values(load_config(""))


TOGETHER = {
    "MODEL.PIXEL_STD is [1.0]; it must have 3": ["MODEL.PIXEL_STD", [1.0]],
    "MODEL.PIXEL_MEAN is": ["INPUT.FORMAT", "L", "MODEL.PIXEL_STD", [1.0]],
    "INPUT.MIN_SIZE_TRAIN is": ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"],
    "INPUT.CROP.SIZE is": ["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.5, 2.0]],
    "SOLVER.BASE_LR_END is": ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 1.0],
    "MODEL.RPN.IOU_LABELS is": ["MODEL.RPN.IOU_LABELS", [0, 1]],
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS is": ["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", [0.5]],
    "DISTILL.CHANNEL_MATCHING.REFRESH_PERIODS is": ["DISTILL.CHANNEL_MATCHING.REFRESH_STEPS", [1, 2, 3]],
    "DISTILL.FEATURE_MIMIC.TEACHER_PASS is": ["DISTILL.FEATURE_MIMIC.TEACHER_PASS", "DensPass"],
    "MODEL.ANCHOR_GENERATOR.SIZES is [[8], [16]]": ["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]]],
    "MODEL.FPN.OUT_CHANNELS is 48": ["MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 48],
    "MODEL.RESNETS.RES2_OUT_CHANNELS is 256": ["MODEL.RESNETS.DEPTH", 18],
    "MODEL.RESNETS.STEM_TYPE is 'deeplab', which has no effect": ["MODEL.RESNETS.STEM_TYPE", "deeplab"],
    "MODEL.RESNETS.RES4_DILATION is 2, which has no effect": ["MODEL.RESNETS.RES4_DILATION", 2],
    "MODEL.RESNETS.RES5_DILATION is 4": ["MODEL.RESNETS.RES5_DILATION", 4],
    "TEST.SLIDING_WINDOW.ENABLED is True": ["TEST.SLIDING_WINDOW.ENABLED", True],
    "Non-existent key: SOLVER.MAX_ITER.X": ["SOLVER.MAX_ITER.X", 5],
    "Did you mean SOLVER.MAX_ITER": ["SOLVER.MAX_ITER=", 5],
    "without '='; these are 1: SOLVER.MAX_ITER=5": ["SOLVER.MAX_ITER=5"],
    "Did you mean RetinaNet": ["MODEL.META_ARCHITECTURE", "RetinaNett"],
    "Did you mean build_vit_sfp_backbone": ["MODEL.BACKBONE.NAME", "build_vit_spf_backbone"],
    **{
        f"MODEL.VIT.{key} ": ["MODEL.BACKBONE.NAME", "build_vit_sfp_backbone", f"MODEL.VIT.{key}", value]
        for key, value in {
            "EMBED_DIM": 7,
            "IMG_SIZE": 8,
            "WINDOW_BLOCK_INDEXES": [12],
        }.items()
    },
}


@pytest.mark.parametrize("words", TOGETHER)
def test_values_that_do_not_go_together(words):
    with pytest.raises(ConfigError, match=rf"^[^\n]*{re.escape(words)}[^\n]*$"):
        read_config("", TOGETHER[words])


@pytest.mark.parametrize("options", [["SOLVER.GAMMA", -1], ["SOLVER.GAMMA"], ["SOLVER.GAMA", 1]])
def test_values_of_the_teacher(write_config, teacher, tmp_path, options):
    keys = {**teacher, "DISTILL__TEACHER__OPTS": options}
    words = "--teacher-config.*SOLVER.GAMMA" if len(options) == 2 else r"DISTILL\.TEACHER\.OPTS is .*KEY and value"
    with pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$"):
        setup(argument_parser().parse_args(["--config-file", str(write_config(**keys))]))
    assert not (tmp_path / "student").exists()


FLAGS = {
    "--num-gpus is 0": ["--num-gpus", "0"],
    "--num-gpus is -1": ["--num-gpus", "-1"],
    "--num-machines is 0": ["--num-machines", "0"],
    "--machine-rank is -1": ["--machine-rank", "-1"],
    "--machine-rank is 1": ["--machine-rank", "1"],
    "--dist-url is auto": ["--num-machines", "2"],
    "--method is ''": ["--method", ""],
    "Did you mean LogitKD?": ["--method", "LogitKd"],
    "DISTILL.METHODS[1] is ' LogitKD'": ["--method", "FeatureMimic, LogitKD"],
    "DISTILL.METHODS is ['LogitKD', 'LogitKD']": ["--method", "LogitKD,LogitKD"],
    "--teacher-config is ''": ["--teacher-config", ""],
    "--teacher-weights is ''": ["--teacher-weights", ""],
    "SOLVER.GAMMA is -1": ["--num-gpus", "2", "SOLVER.GAMMA", "-1"],
}


@pytest.mark.parametrize("words", FLAGS)
def test_flags_end_in_one_line_and_status_2(words, monkeypatch, capsys):
    told: list[str] = []
    monkeypatch.setattr(launching.logger, "error", lambda text, *values: told.append(text % values))
    with pytest.raises(SystemExit, match="^2$"):
        train.run(FLAGS[words])
    told += [line for line in capsys.readouterr().err.splitlines() if "error: " in line]  # what is seen at once
    assert len(told) == 1 and words in told[0] and "\n" not in told[0]


@pytest.mark.parametrize("value", [[[]], [[8], []], [[8], 16]])
def test_anchors_are_lists_of_one_form(value):
    with pytest.raises(ConfigError, match=r"ANCHOR_GENERATOR\.SIZES is .*a list for each level, or one for all"):
        read_config("", ["MODEL.ANCHOR_GENERATOR.SIZES", value])
    for right in ([8, 16], [[8, 16]]):
        read_config("", ["MODEL.ANCHOR_GENERATOR.SIZES", right])


def test_nodes_that_are_not_used_may_be_of_another_form():
    assert read_config("", ["MODEL.VIT.DEPTH", 6]).MODEL.VIT.DEPTH == 6


def test_steps_behind_the_end_have_no_effect_on_any_runtime():
    notices: list[str] = []
    options = ["MODEL.DEVICE", "cpu", "SOLVER.WARMUP_ITERS", 2, "SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (4, 6, 8)]
    cfg = load_config("", options, notices=notices)
    assert cfg.SOLVER.STEPS == (4,)
    assert notices == ["SOLVER.STEPS (4, 6, 8): those not below MAX_ITER, 6, have no effect."]
    assert load_config("", ["SOLVER.MAX_ITER", 9, "SOLVER.STEPS", (4, 6, 8)]).SOLVER.STEPS == (4, 6, 8)


def test_a_check_of_ones_own(monkeypatch):
    monkeypatch.setattr("d2kd.config._checks", [])

    @config_check
    def even(cfg):
        if get_key(cfg, "SEED") % 2:
            raise ConfigError("SEED is odd.")

    read_config("", ["SEED", 2])
    with pytest.raises(ConfigError, match="odd"):
        read_config("", ["SEED", 3])
