"""Reading configurations: old keys, bases, imports, whole numbers, and one line for what is wrong."""

from pathlib import Path
from typing import Any

import pytest

from d2kd.config_reader import read_config
from d2kd.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a YAML file."""

    def write_file(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_file


RENAMED = {
    "DISTILL.INHERIT.ENABLED": (False, "DISTILL.INIT_FROM_TEACHER.ENABLED", False),
    "DISTILL.INHERIT.EXCLUDE": (["head."], "DISTILL.INIT_FROM_TEACHER.EXCLUDE", ["head."]),
    "DISTILL.CHANNEL_MATCHING.SOLVER": ("scipy", "DISTILL.CHANNEL_MATCHING.ASSIGNMENT_SOLVER", "scipy"),
    "DISTILL.CHANNEL_MATCHING.FACTORS": ([2, 4.0], "DISTILL.CHANNEL_MATCHING.TAP_WEIGHTS", [0.5, 0.25]),
    "DISTILL.CHANNEL_MATCHING.REDUCTION": ("paper", "DISTILL.CHANNEL_MATCHING.REDUCTION", "batchmean"),
    "DISTILL.MASKED_GENERATIVE.REDUCTION": ("paper", "DISTILL.MASKED_GENERATIVE.REDUCTION", "batchmean"),
    "DISTILL.FEATURE_MIMIC.REDUCTION": ("paper", "DISTILL.FEATURE_MIMIC.REDUCTION", "batchmean"),
    "DISTILL.RECEPTIVE_TOKENS.REDUCTION": ("paper", "DISTILL.RECEPTIVE_TOKENS.POSITION_WEIGHTS", "mask_sum"),
    "DISTILL.RECEPTIVE_TOKENS.LEVEL_WEIGHTS": ([1.0], "DISTILL.RECEPTIVE_TOKENS.TAP_WEIGHTS", [1.0]),
}


def value_of(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("old", RENAMED)
def test_old_keys_are_accepted_with_one_line(write, old):
    value, new, want = RENAMED[old]
    *path, name = old.split(".")
    text = f"{{{name}: {value}}}"
    for part in reversed(path):
        text = f"{{{part}: {text}}}"
    notices: list[str] = []
    cfg = read_config(write("old.yaml", text), notices=notices)
    assert value_of(cfg, new) == want
    assert len(notices) == 1 and old in notices[0] and new in notices[0] and "old.yaml" in notices[0]
    notices.clear()
    assert value_of(read_config("", [old, str(value)], notices=notices), new) == want
    assert len(notices) == 1 and "command line" in notices[0]


def test_new_keys_are_read_without_a_word(write):
    notices: list[str] = []
    read_config(write("new.yaml", "DISTILL: {FEATURE_MIMIC: {REDUCTION: mean}}"), notices=notices)
    assert not notices


def test_a_child_overrides_its_base_whichever_names_they_use(write):
    write("old.yaml", "DISTILL: {INHERIT: {ENABLED: False}, CHANNEL_MATCHING: {FACTORS: [2.0]}}")
    new = write(
        "new.yaml",
        "_BASE_: old.yaml\nDISTILL: {INIT_FROM_TEACHER: {ENABLED: True}, CHANNEL_MATCHING: {TAP_WEIGHTS: [9.0]}}",
    )
    cfg = read_config(new)
    assert cfg.DISTILL.INIT_FROM_TEACHER.ENABLED and cfg.DISTILL.CHANNEL_MATCHING.TAP_WEIGHTS == [9.0]
    cfg = read_config(write("last.yaml", "_BASE_: new.yaml\nDISTILL: {INHERIT: {ENABLED: False}}"))
    assert not cfg.DISTILL.INIT_FROM_TEACHER.ENABLED


@pytest.mark.parametrize("text", ["DISTILL: {INHERIT: }", "DISTILL: {INHERIT: {}}", "", "DISTILL: {}"])
def test_empty_nodes_change_nothing(write, text):
    assert read_config(write("empty.yaml", text)).DISTILL.INIT_FROM_TEACHER.ENABLED


@pytest.mark.parametrize(
    "key, value",
    [
        ("CHANNEL_MATCHING.FACTORS", "[0]"),
        ("CHANNEL_MATCHING.FACTORS", "2"),
        ("CHANNEL_MATCHING.FACTORS", "[a]"),
        ("RECEPTIVE_TOKENS.REDUCTION", "foo"),
        ("RECEPTIVE_TOKENS.REDUCTION", "3"),
    ],
)
def test_old_keys_with_values_that_have_no_new_one_are_named(key, value):
    with pytest.raises(ConfigError, match=rf"DISTILL\.{key} is .*; it is DISTILL\.\w+\.\w+ now"):
        read_config("", [f"DISTILL.{key}", value])


@pytest.mark.parametrize("base", ["_BASE_: [a.yaml,\n  b.yaml]", "_BASE_: # both\n  - a.yaml\n  - b.yaml"])
def test_lists_of_bases(write, base):
    write("a.yaml", "SEED: 1")
    write("b.yaml", "SEED: 2")
    assert read_config(write("child.yaml", f"{base}\nVIS_PERIOD: 3")).SEED == 2


def test_a_missing_base_is_named(write):
    with pytest.raises(ConfigError, match=r"child\.yaml: .*missing\.yaml"):
        read_config(write("child.yaml", "_BASE_: missing.yaml"))


def test_each_file_imports_what_lies_beside_it_and_all_add_up(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bases/plugin_of_base.py", "plugin_of_base.py", "plugin_of_child.py"):
        write(name, "")
    write("bases/base.yaml", "DISTILL: {IMPORTS: plugin_of_base.py}")
    child = write("child.yaml", "_BASE_: bases/base.yaml\nDISTILL: {IMPORTS: [plugin_of_child.py]}")
    beside = [str(tmp_path / name) for name in ("bases/plugin_of_base.py", "plugin_of_child.py")]
    assert read_config(child).DISTILL.IMPORTS == beside
    assert read_config(child, ["DISTILL.IMPORTS", "[]"]).DISTILL.IMPORTS == []
    assert read_config(child, imports=["plugin_of_base.py"]).DISTILL.IMPORTS[2:] == [
        str(tmp_path / "plugin_of_base.py")
    ]


@pytest.mark.parametrize("value", ["5", "{a: 1}", "[[x.py]]", "~"])
def test_imports_that_are_no_names(write, value):
    with pytest.raises(ConfigError, match=r"DISTILL\.IMPORTS is"):
        read_config(write("wrong.yaml", f"DISTILL: {{IMPORTS: {value}}}"))


def test_whole_numbers_set_floats_in_files_and_options(write):
    cfg = read_config(write("whole.yaml", "SOLVER: {BASE_LR: 1}\nDISTILL: {FEATURE_MIMIC: {WEIGHT: 4}}"))
    assert (cfg.SOLVER.BASE_LR, cfg.DISTILL.FEATURE_MIMIC.WEIGHT) == (1.0, 4.0)
    assert type(read_config("", ["SOLVER.BASE_LR", "2"]).SOLVER.BASE_LR) is float


def test_wrong_types_are_told_in_one_sentence(write):
    with pytest.raises(ConfigError, match=r"SOLVER\.MAX_ITER is many; it must be of type int"):
        read_config(write("wrong.yaml", "SOLVER: {MAX_ITER: many}"))


@pytest.mark.parametrize("options", [["SEED"], [1, 2], [["a", "b"]]])
def test_options_that_are_no_pairs(options):
    with pytest.raises(ConfigError, match=r"Options of DISTILL\.TEACHER\.OPTS come in pairs"):
        read_config("", options, source="DISTILL.TEACHER.OPTS")


@pytest.mark.parametrize("node", ["DISTILL", "DISTILL: {FEATURE_MIMIC: }", "SOLVER"])
def test_a_child_with_an_empty_node_does_not_lose_what_its_base_says(write, node):
    write("base.yaml", "SOLVER: {BASE_LR: 0.5}\nDISTILL: {FEATURE_MIMIC: {WEIGHT: 7.0}}")
    text = node if ":" in node else f"{node}:"
    with pytest.raises(ConfigError, match=r"child\.yaml: .*(is None; it must be a mapping of keys|cannot be set)"):
        read_config(write("child.yaml", f"_BASE_: base.yaml\n{text}"))


@pytest.mark.parametrize("options", [["DISTILL", None], ["", 1], ["DISTILL.FEATURE_MIMIC", None]])
def test_null_nodes_and_empty_keys_among_the_options(options):
    with pytest.raises(ConfigError, match="In the command line"):
        read_config("", options)


def test_a_number_beyond_a_float_is_told_in_one_sentence():
    with pytest.raises(ConfigError, match=r"SOLVER\.BASE_LR is 1"):
        read_config("", ["SOLVER.BASE_LR", "1" + "0" * 400])


@pytest.mark.parametrize("base", ["5", "{a: b}", "child.yaml"])
def test_bases_that_are_no_paths_or_go_in_circles(write, base):
    with pytest.raises(ConfigError, match=r"child\.yaml"):
        read_config(write("child.yaml", f"_BASE_: {base}"))


def test_each_file_is_named_beside_its_own_old_keys(write):
    write("base.yaml", "DISTILL: {INHERIT: {ENABLED: False}}")
    notices: list[str] = []
    child = write("child.yaml", "_BASE_: base.yaml\nDISTILL: {CHANNEL_MATCHING: {SOLVER: scipy}}")
    read_config(child, notices=notices)
    told = {name: [line for line in notices if name in line] for name in ("base.yaml", "child.yaml")}
    assert len(notices) == 2 and "INHERIT" in told["base.yaml"][0] and "SOLVER" in told["child.yaml"][0]


def test_of_a_length_in_iterations_and_in_epochs_counts_what_was_said_last(write):
    write("base.yaml", "SOLVER: {MAX_EPOCHS: 50, WARMUP_EPOCHS: 2, STEP_EPOCHS: [30, 40], MAX_ITER: 12}")
    child = write("child.yaml", "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 7, BASE_LR: 0.5}")
    leaf = write("leaf.yaml", "_BASE_: child.yaml\nSOLVER: {WARMUP_EPOCHS: 1}")

    def lengths(path, *options):
        notices: list[str] = []
        solver = read_config(path, options, notices=notices).SOLVER
        return solver.MAX_ITER, solver.MAX_EPOCHS, solver.WARMUP_EPOCHS, list(solver.STEP_EPOCHS), len(notices)

    assert lengths(write("same.yaml", "_BASE_: base.yaml")) == (12, 50, 2, [30, 40], 0)
    assert lengths(child) == lengths(child, "SEED", 3) == (7, 0, 2, [30, 40], 1)
    assert lengths(leaf) == (7, 0, 1, [30, 40], 1)
    assert lengths(leaf, "SOLVER.MAX_EPOCHS", 3) == (7, 3, 1, [30, 40], 1)
    assert lengths(leaf, "SOLVER.STEPS", [4], "SOLVER.WARMUP_ITERS", 5) == (7, 0, 0, [], 2)
    assert lengths(write("base2.yaml", "SOLVER: {MAX_EPOCHS: 50, MAX_ITER: 12}"), "SOLVER.MAX_ITER", 12)[:2] == (12, 0)
