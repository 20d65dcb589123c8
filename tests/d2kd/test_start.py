"""What starts at once: programs before they train, `import d2kd`, and what is registered in whichever order."""

import argparse
import importlib
import json
import os
import subprocess
import sys

import pytest
from runs import ROOT

import d2kd
from d2kd.arguments import run_parser
from d2kd.cli import COMMANDS, listing, mistakes, names, registered
from d2kd.config import list_settings
from d2kd.files import CONFIGS, near_configs
from d2kd.runtime import is_d2lite
from detectron2.engine import default_argument_parser

STUB = ROOT / "tests/detectron2_stub"
#: What takes most of the time of starting.
HEAVY = ("torch", "torchvision", "timm", "cv2", "scipy", "matplotlib", "pycocotools")

#: There is a table of names for d2kd on its own runtime only.
with_table = pytest.mark.skipif(not is_d2lite(), reason="Detectron2 is imported to list what it has")


def run_python(program, *paths, **variables):
    """Runs a program in a process of its own; returns what it prints, by lines."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])), **variables}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def heavy_imports(*arguments):
    """Runs command lines of d2kd in one process; returns the status of each, and which heavy modules it has left."""
    program = f"""
import contextlib, io, json, sys
from d2kd.cli import main
status = []
for line in {arguments!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status.append(main(line.split()))
        except SystemExit as end:
            status.append(end.code)
print(json.dumps([status, [name for name in {HEAVY!r} if name in sys.modules]]))
"""
    return json.loads(run_python(program)[-1])


@with_table
def test_help_lists_and_typing_errors_import_nothing_heavy():
    right = [
        "--help",
        "--version",
        *(f"{name} --help" for name in COMMANDS),
        *(f"list {kind}" for kind in listing.KINDS),
    ]
    recipe = "--config-file PhotoDigits/retinanet_student.yaml"
    wrong = [
        "trains",
        "train --confg-file x",
        "train --config-file COCO/retinanet_R50_1y.yaml",
        f"train {recipe} SOLVER.BASE_LT 1",
        f"train {recipe} DISTILL.MASKD_GENERATIVE.WEIGHT 1",
        f"train {recipe} SOLVER.BASE_LR",
        f"train {recipe} --teacher-config COCO/none.yaml",
        f"train {recipe} --teacher-config PhotoDigits/retinanet_teacher.yaml --method FeatureMimick",
        f"eval {recipe} SOLVER.BASE_LR 1 --resume",
        f"masking-gate {recipe} SOLVER.BASE_LT 1",
        f"export a.pth b.pth {recipe} SOLVER.BASE_LT 1",
    ]
    status, heavy = heavy_imports(*right, *wrong[:5], *wrong[6:])
    assert status == [0] * len(right) + [2] * (len(wrong) - 1) and not heavy


@pytest.mark.parametrize("tool", ["train_net", "learn_tokens", "report", "export_student", "masking_gate"])
def test_programs_in_tools_import_nothing_heavy_for_their_help(tool):
    program = f"""
import runpy, sys
sys.argv = ["tools/{tool}.py", "--help"]
try:
    runpy.run_path("tools/{tool}.py", run_name="__main__")
except SystemExit as end:
    print(end.code, *[name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run_python(program)[-1] == "0"


# ---- what is found early is what would be found later ----


def arguments(*words, imports=()):
    words = ["--config-file", "PhotoDigits/retinanet_student.yaml", *words]
    args = importlib.import_module("d2kd.arguments").argument_parser().parse_args(words)
    args.imports = list(imports)
    return args


@with_table
@pytest.mark.parametrize(
    "words, message",
    [
        (["SOLVER.BASE_LT", "1"], "Non-existent key: SOLVER.BASE_LT. Did you mean SOLVER.BASE_LR"),
        (["--method", "FeatureMimick", "--teacher-config", "COCO/retinanet_R101.yaml"], "Did you mean FeatureMimic"),
        (["--teacher-config", "COCO/retinanet_R100.yaml"], "Did you mean configs/COCO/retinanet_R101.yaml"),
        (["SOLVER.BASE_LR", "1", "--resume"], "--resume: flags go before the first KEY VALUE."),
    ],
)
def test_typing_errors_are_told_in_the_same_words_early_and_late(words, message):
    args = arguments(*words)
    with pytest.raises(d2kd.errors.UserError) as early:
        mistakes.check_command_line(args)
    with pytest.raises(d2kd.errors.UserError) as late:
        d2kd.engine.setup(arguments(*words))
    assert message in str(early.value)
    assert str(early.value).partition(" Did you")[0].rstrip(".") == str(late.value).partition(" Did you")[0].rstrip(".")


@pytest.mark.parametrize(
    "words, imports",
    [
        (["SOLVER.BASE_LR", "0.1"], ()),
        (["DISTILL.INHERIT.ENABLED", "False"], ()),  # an old name
        (["DISTILL.MY_METHOD.POWER", "2"], ["my_method.py"]),
        (["DISTILL.MY_METHOD.POWER", "2", "DISTILL.IMPORTS", "['my_method.py']"], ()),
        (["SOLVER.BASE_LR"], ()),  # no pair: left to the reader, which says so
    ],
)
def test_what_may_be_right_is_not_a_mistake(words, imports):
    mistakes.check_command_line(arguments(*words, imports=imports))


@with_table
def test_keys_of_what_a_yaml_imports_are_not_judged(tmp_path):
    (tmp_path / "base.yaml").write_text("DISTILL: {IMPORTS: [my_method.py]}\n")
    path = tmp_path / "student.yaml"
    path.write_text("_BASE_: base.yaml\n")
    args = arguments("DISTILL.MY_METHOD.POWR", "2")
    with pytest.raises(d2kd.errors.ConfigError, match="Non-existent"):
        mistakes.check_command_line(args)
    args.config_file = str(path)
    mistakes.check_command_line(args)


@with_table
def test_keys_that_are_newer_than_the_table_are_not_judged(monkeypatch):
    table = {**names.kept_table(), "keys": ["SOLVER.BASE_LR"]}
    monkeypatch.setattr(mistakes, "kept_table", lambda: table)
    mistakes.check_command_line(arguments("SOLVER.MAX_EPOCHS", "2", "DISTILL.FEATURE_MIMIC.WEIGHT", "3"))


@with_table
def test_every_recipe_and_key_passes():
    for path in CONFIGS.glob("*/*.yaml"):
        args = arguments()
        args.config_file = str(path)
        mistakes.check_command_line(args)
    keys = [key for key in list_settings() if "IMPORTS" not in key and "CONFIG_FILE" not in key]
    mistakes.check_command_line(arguments(*(word for key in keys for word in (key, "1"))))


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("configs/COCO/retinanet_R50_FetureMimic.yaml", "configs/COCO/retinanet_R50_R101_FeatureMimic_1x.yaml"),
        ("COCO/retinanet_R50_1y.yaml", "configs/COCO/retinanet_R50_1x.yaml"),
        ("retinanet_student.yaml", "configs/PhotoDigits/retinanet_student.yaml"),
    ],
)
def test_near_matches_of_recipes(typed, meant):
    assert near_configs(typed).startswith(f" Did you mean {meant}")


def test_near_matches_of_files_of_ones_own(tmp_path):
    (tmp_path / "zebras.yaml").write_text("")
    assert near_configs(str(tmp_path / "zebra.yaml")) == f" Did you mean {tmp_path / 'zebras.yaml'}?"
    assert near_configs(str(tmp_path / "quux.yaml")) == ""


# ---- the table of names ----


def test_every_kind_that_is_listed_is_in_the_table():
    kept = json.loads((ROOT / "d2kd/cli/names.json").read_text())["names"]
    assert {*kept, "recipes"} == set(listing.KINDS) == {*registered.registered_names(), "recipes"}
    assert all(text for found in kept.values() for text in found.values())


@pytest.fixture
def forget_table():
    names.kept_table.cache_clear()
    yield
    names.kept_table.cache_clear()


def test_without_its_table_a_list_is_what_is_registered(monkeypatch, forget_table):
    monkeypatch.setattr(names, "registrations", lambda: "of other sources")
    assert names.kept_table() is None
    assert any(line.startswith("FeatureMimic ") for line in listing.lines("methods"))


def test_installed_packages_put_the_table_aside(monkeypatch, forget_table):
    monkeypatch.setattr(names, "entry_points", lambda group: ["one"])
    assert names.kept_table() is None


def test_a_line_that_registers_changes_the_checksum(monkeypatch):
    before = names.registrations()
    text = names.source()
    monkeypatch.setattr(names, "source", lambda: text + "# a comment\n")
    assert names.registrations() == before
    monkeypatch.setattr(names, "source", lambda: text + "@DISTILLERS.register()\nclass New(Distiller):\n")
    assert names.registrations() != before


# ---- import d2kd ----

HAS_ALL = """
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
assert "SOLO" in META_ARCH_REGISTRY and "FCOS" in META_ARCH_REGISTRY and "RetinaNet" in META_ARCH_REGISTRY
assert "build_vit_backbone" in BACKBONE_REGISTRY and "PSPHead" in SEM_SEG_HEADS_REGISTRY
"""
HAS_KEYS = """
from detectron2.config import get_cfg
cfg = get_cfg()
add_distill_config(cfg)
assert cfg.DISTILL.MASKED_GENERATIVE.MASK_RATIO and cfg.MODEL.SOLO.NUM_CLASSES and cfg.DISTILL.MASKED_TEACHER
"""
#: What a program may do first, and what must be there then.
ORDERS = {
    "registries": "import d2kd" + HAS_ALL,
    "a part of the package": "import d2kd, detectron2.modeling.backbone" + HAS_ALL,
    "Detectron2 before d2kd": "import d2lite.alias; d2lite.alias.install(); import detectron2.modeling; import d2kd"
    + HAS_ALL,
    "engine of Detectron2": "import d2kd; from detectron2.engine import DefaultTrainer" + HAS_ALL,
    "methods": "from d2kd.distillers import DISTILLERS; assert 'LogitKD' in DISTILLERS" + HAS_ALL,
    "keys": "from d2kd import add_distill_config" + HAS_KEYS + HAS_ALL,
    "keys of the module": "from d2kd.config import add_distill_config, list_settings; list_settings()" + HAS_KEYS,
    "an architecture": "from d2kd.modeling.meta_arch.fcos import FCOS" + HAS_ALL,
    "a pass": "import d2kd.modeling.teacher_passes; from d2kd import DISTILLERS" + HAS_ALL,
    "the engine": "from d2kd.engine import load_config; load_config('PhotoDigits/solo_student.yaml')" + HAS_ALL,
    "the loader of the registries": "import d2kd, detectron2.modeling as m"
    + """
assert m.__spec__.loader is not None and "Registering" not in f"{type(m.__spec__.loader)} {type(m.__loader__)}"
assert d2kd.RUNTIME is d2kd.runtime.RUNTIME and d2kd.RUNTIME.version
""",
    # python -m d2kd.cli.registered > d2kd/cli/names.json
    "the table of names": "import json; from d2kd.cli.registered import table"
    + """
assert json.load(open("d2kd/cli/names.json", encoding="utf-8")) == table()
""",
    "attributes": "import d2kd; d2kd.modeling.DistilledModel; d2kd.engine.DistillTrainer" + HAS_ALL,
}


#: The alias is that of the stub there, and these say no more there than the others do.
STUB_SKIPS = """
kept = ("registries", "methods", "keys", "an architecture", "the loader of the registries")
orders = {name: orders[name] for name in kept}
"""


@pytest.mark.parametrize("paths", [(), (STUB,)], ids=["d2lite", "stub"])
def test_everything_is_registered_in_every_order_of_imports(paths):
    """In a process each, which are forked from one that has imported what others have written."""
    program = f"""
import gc, os, sys, traceback
import torch, torchvision, timm, cv2, scipy, pycocotools.coco, torch.utils.tensorboard, matplotlib
import matplotlib.pyplot, scipy.optimize, fvcore.nn
orders = {ORDERS!r}
{STUB_SKIPS if paths else ""}
failed = []
gc.freeze()
for name, text in orders.items():
    child = os.fork()
    if not child:
        try:
            exec(text, {{}})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(failed)
"""
    assert run_python(program, *paths)[-1] == "[]"


@pytest.mark.parametrize("paths", [(), (STUB,)], ids=["d2lite", "stub"])
def test_importing_d2kd_imports_nothing_heavy(paths):
    program = f"""
import sys
import d2kd, d2kd.arguments, d2kd.errors, d2kd.files, d2kd.plugins, d2kd.runtime
print("detectron2" in sys.modules, d2kd.runtime.is_d2lite(), *[name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run_python(program, *paths)[-1] == f"False {not paths}"


def test_a_folder_of_the_name_is_no_installation(tmp_path):
    """A clone of Detectron2 in the working directory, say, which has the package inside."""
    (tmp_path / "detectron2/tools").mkdir(parents=True)
    program = "import d2kd.runtime; from detectron2.config import get_cfg; print(d2kd.runtime.is_d2lite())"
    assert run_python(program, tmp_path)[-1] == "True"


def test_the_names_of_the_package():
    assert set(d2kd._LAZY) | {"Runtime", "__version__"} == set(d2kd.__all__) <= set(dir(d2kd))
    for name in d2kd.__all__:
        assert getattr(d2kd, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        _ = d2kd.distil
    with pytest.raises(ImportError):
        exec("from d2kd import distil")


def test_arguments_are_those_of_detectron2():
    def declared(parser: argparse.ArgumentParser) -> dict:
        return {a.dest: (a.option_strings, a.default, a.type, a.nargs, a.const) for a in parser._actions}

    theirs = declared(default_argument_parser())
    ours = declared(run_parser())
    theirs.pop("dist_url"), ours.pop("dist_url")  # a port of this user there, where there is Detectron2
    assert ours == theirs
