"""Methods, architectures and teacher passes of a stranger, from files outside the package (those in plugins/)."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import yaml
from documentation import code_block
from runs import TINY, read_checkpoint, run_training, tool
from torch import Tensor

from d2kd import config
from d2kd.config_reader import read_config
from d2kd.data.datasets import register_datasets
from d2kd.distillers import DISTILLERS
from d2kd.engine import DistillTrainer, load_config
from d2kd.engine.train_step import NonFiniteLossError
from d2kd.errors import ConfigError, UserError
from d2kd.layers import standardize
from d2kd.modeling.teacher_passes import TEACHER_PASSES
from d2kd.plugins import import_plugins
from detectron2.utils.events import EventStorage

PLUGINS = Path(__file__).parent / "plugins"
SALIENT = {"DISTILL__FEATURE_MIMIC__TEACHER_PASS": "SalientPass"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the YAMLs of a test lie, with the plugins beside them."""
    for path in PLUGINS.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture
def student(write_config: Callable[..., Path], teacher: dict[str, Any], directory: Path) -> Path:
    """The YAML of a RetinaNet with a teacher; it imports nothing."""
    return write_config(**teacher)


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def train(path: Path, *arguments: Any, check: bool = True) -> CompletedProcess:
    """Three iterations in a process of its own; flags come before keys and values."""
    return tool("train_net", "--config-file", path, *arguments, "SOLVER.MAX_ITER", 3, check=check)


def last_metrics(output: Path) -> dict[str, float]:
    """The last line of metrics.json that has losses."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [line for line in lines if "total_loss" in line][-1]


def distilled(output: Path) -> set[str]:
    """Names of the losses of distillation in a run's metrics."""
    return {name for name in last_metrics(output) if name.startswith("distill/")}


def the_error(process: CompletedProcess) -> str:
    """The one line with which a program ends because of its user."""
    assert process.returncode == 2, process.stdout
    assert "Traceback" not in process.stdout
    errors = [line for line in process.stdout.splitlines() if "ERROR" in line]
    assert len(errors) == 1 and process.stdout.splitlines()[-1] == errors[0], process.stdout
    return errors[0]


# ---- a method ----


def test_method_by_flag(student: Path, directory: Path) -> None:
    flags = ["--import", PLUGINS / "cosine_mimic.py", "--method", "CosineMimic,FeatureMimic"]
    run = train(student, *flags, "DISTILL.COSINE_MIMIC.POWER", 2, "DISTILL.COSINE_MIMIC.TAP_WEIGHTS", "[1, 0]")
    assert "CosineMimic at p3, p4" in run.stdout
    losses = last_metrics(directory / "student")
    assert losses["distill/CosineMimic/p3"] > 0 == losses["distill/CosineMimic/p4"]
    assert "distill/FeatureMimic/p3" in losses
    kept = yaml.safe_load((directory / "student" / "config.yaml").read_text())["DISTILL"]
    assert kept["IMPORTS"] == [str(PLUGINS / "cosine_mimic.py")] and kept["COSINE_MIMIC"]["POWER"] == 2.0
    assert read_checkpoint(directory / "student")["methods"] == ["CosineMimic", "FeatureMimic"]


def test_method_by_a_file_beside_the_yaml(student: Path, directory: Path) -> None:
    own = {"IMPORTS": ["cosine_mimic.py"], "METHODS": ["CosineMimic"], "COSINE_MIMIC": {"POWER": 2.0}}
    train(write_yaml(directory / "own.yaml", {"_BASE_": student.name, "DISTILL": own}))
    assert distilled(directory / "student") == {"distill/CosineMimic/p3", "distill/CosineMimic/p4"}
    again = tool("train_net", "--config-file", directory / "student" / "config.yaml", "--resume")  # finds the file too
    assert "Nothing to do" in again.stdout


def test_method_of_an_installed_package_beside_a_broken_one(
    student: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = directory / "site"
    for package, code in (("cosine", (PLUGINS / "cosine_mimic.py").read_text()), ("broken", "import not_there\n")):
        (site / package).mkdir(parents=True)
        (site / package / "__init__.py").write_text(code)
        metadata = site / f"{package}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[d2kd.methods]\n{package} = {package}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
    run = train(student, "--method", "CosineMimic", "DISTILL.COSINE_MIMIC.POWER", 0.5)
    assert "Left out entry point broken = broken (d2kd.methods): No module named 'not_there'" in run.stdout
    assert "Traceback" not in run.stdout
    assert distilled(directory / "student") == {"distill/CosineMimic/p3", "distill/CosineMimic/p4"}


@pytest.mark.parametrize(
    "value, message",
    [
        ("[1, 2]", r"DISTILL\.COSINE_MIMIC\.POWER"),
        ("strong", r"DISTILL\.COSINE_MIMIC\.POWER"),
        ("0", r"DISTILL\.COSINE_MIMIC\.POWER is 0\.0; it must be above 0 and at most 4\."),
        ("9", r"DISTILL\.COSINE_MIMIC\.POWER is 9\.0; it must be above 0 and at most 4\."),
    ],
)
def test_settings_of_a_method_are_checked(
    student: Path, value: str, message: str, stranger: Callable[..., None]
) -> None:
    stranger("cosine_mimic.py")
    with pytest.raises(UserError, match=message) as caught:
        run_training(student, DISTILL__METHODS=["CosineMimic"], DISTILL__COSINE_MIMIC__POWER=value)
    assert "\n" not in str(caught.value)


def test_wrong_setting_ends_the_program_with_one_line(student: Path) -> None:
    flags = ["--import", PLUGINS / "cosine_mimic.py", "--method", "CosineMimic"]
    assert "DISTILL.COSINE_MIMIC.POWER is 9.0; it must be above 0 and at most 4." in the_error(
        train(student, *flags, "DISTILL.COSINE_MIMIC.POWER", 9, check=False)
    )


@pytest.mark.parametrize(
    "code, message",
    [
        (None, "DISTILL.IMPORTS (--import) mine.py: there is no such file; tried "),
        ("def f(:\n", "mine.py cannot be imported: SyntaxError: "),
        ("import not_there\n", "mine.py cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
        (
            "from d2kd.distillers import DISTILLERS, Distiller\n\n\n"
            "@DISTILLERS.register()\nclass FeatureMimic(Distiller):\n    pass\n",
            "mine.py cannot be imported: AssertionError: An object named 'FeatureMimic' was already registered",
        ),
    ],
    ids=["absent", "syntax", "import", "twice"],
)
def test_file_that_cannot_be_imported(student: Path, directory: Path, code: str | None, message: str) -> None:
    if code is not None:
        (directory / "mine.py").write_text(code)
    own = write_yaml(directory / "own.yaml", {"_BASE_": student.name, "DISTILL": {"IMPORTS": ["mine.py"]}})
    error = the_error(train(own, check=False))
    assert message in error
    assert not (directory / "student").exists()


def test_file_with_dots_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "my.method-v2.py"
    file.write_text("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 0\n")
    import_plugins([str(file)])
    assert sys.modules.pop("my_method_v2").A(3).x == 3


@pytest.mark.parametrize("name", ["no_such_module", "no_such_package.methods", 5])
def test_module_that_is_not_there(student: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match=rf"DISTILL\.IMPORTS \(--import\).*{name}"):
        read_config(str(student), imports=[name])


# ---- an architecture ----


@pytest.fixture(scope="module")
def grid(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A trained teacher of GridDetector: its YAMLs and checkpoint. docs/architectures.md makes "known" ones known."""
    directory = tmp_path_factory.mktemp("grid")
    for path in PLUGINS.glob("*.py"):
        shutil.copy(path, directory)
    (directory / "grid_architecture.py").write_text(code_block("architectures.md", "Registering one"))
    register = [
        {"NAME": f"digits_{s}", "JSON": str(digits / f"annotations/instances_{s}.json"), "IMAGES": str(digits / s)}
        for s in ("train", "val")
    ]
    flat = {
        **{key: value for key, value in TINY.items() if "RETINANET" not in key},
        "VERSION": 2,
        "SEED": 1,
        "DATASETS.REGISTER": register,
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "GridDetector",
        "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 8,
        "MODEL.GRID_DETECTOR.NUM_CLASSES": 10,
        "DISTILL.IMPORTS": ["grid_detector.py"],
        "DISTILL.TEACHER.EVAL_FIRST": False,
    }
    shared = write_yaml(directory / "unknown.yaml", nested(flat))
    known = {"IMPORTS": ["grid_detector.py", "grid_architecture.py", "cosine_mimic.py"], "COSINE_MIMIC": {"POWER": 2.0}}
    write_yaml(directory / "known.yaml", {"_BASE_": shared.name, "DISTILL": known})
    output = str(directory / "teacher")
    wide = {"MODEL": {"RESNETS": {"RES2_OUT_CHANNELS": 32}}, "OUTPUT_DIR": output}
    paths = {}
    for name in ("known", "unknown"):
        paths[name] = write_yaml(directory / f"{name}_teacher.yaml", {"_BASE_": f"{name}.yaml", **wide})
    train(paths["known"])
    return {"directory": directory, "weights": f"{output}/model_final.pth", **paths}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Keys "A.B" as a tree."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def distil_grid(grid: dict[str, Any], name: str, methods: list[str], *options: Any, check: bool = True) -> Any:
    """Trains a GridDetector by distillation, with a YAML beside that of its teacher; its output, and the process."""
    output = grid["directory"] / "_".join([name, *methods])
    teacher = {"CONFIG_FILE": grid[name].name, "WEIGHTS": grid["weights"]}
    content = {"_BASE_": f"{name}.yaml", "OUTPUT_DIR": str(output), "DISTILL": {"TEACHER": teacher, "METHODS": methods}}
    path = write_yaml(grid["directory"] / f"{output.name}.yaml", content)
    return output, train(path, *options, check=check)


def test_architecture_of_a_stranger_trains_and_is_evaluated(grid: dict[str, Any]) -> None:
    output = Path(grid["weights"]).parent
    assert "bbox" in json.loads((output / "result.json").read_text())["metrics"]
    running = read_checkpoint(output)["trainer"]["process_states"][0]["running"]
    assert list(running) == ["usual_positives"] and running["usual_positives"] != 10.0


def test_every_kind_of_method_knows_the_architecture_of_a_stranger(grid: dict[str, Any]) -> None:
    methods = ["LogitKD", "HeadRegression", "FeatureMimic", "CosineMimic"]
    output, run = distil_grid(grid, "known", methods)
    assert "does not know MODEL.META_ARCHITECTURE" not in run.stdout
    assert "Initialized" in run.stdout and "class_layer" in run.stdout  # from the teacher
    assert distilled(output) == {
        *(f"distill/LogitKD/class_layer@{i}" for i in (0, 1)),
        *(f"distill/HeadRegression/side_layer@{i}" for i in (0, 1)),
        *(f"distill/{method}/{level}" for method in ("FeatureMimic", "CosineMimic") for level in ("p3", "p4")),
    }
    assert read_checkpoint(output)["trainer"]["process_states"][0]["running"]["usual_positives"] != 10.0


def test_class_counts_of_the_architecture_of_a_stranger_are_checked(grid: dict[str, Any]) -> None:
    _, run = distil_grid(grid, "known", ["LogitKD"], "MODEL.GRID_DETECTOR.NUM_CLASSES", 7, check=False)
    assert "MODEL.GRID_DETECTOR.NUM_CLASSES" in the_error(run)


def test_features_of_an_unknown_architecture_are_distilled(grid: dict[str, Any]) -> None:
    output, run = distil_grid(grid, "unknown", ["FeatureMimic"])
    assert distilled(output) == {"distill/FeatureMimic/p3", "distill/FeatureMimic/p4"}
    for whose in ("Student", "Teacher"):
        assert f"{whose}: d2kd does not know MODEL.META_ARCHITECTURE GridDetector." in run.stdout
    assert "docs/architectures.md" in run.stdout


def test_predictions_of_an_unknown_architecture_must_be_named(grid: dict[str, Any]) -> None:
    _, run = distil_grid(grid, "unknown", ["LogitKD"], check=False)
    assert "Name the modules in DISTILL.LOGIT_KD.TAPS" in the_error(run)
    taps = ["DISTILL.LOGIT_KD.TAPS", "['class_layer@0']", "DISTILL.LOGIT_KD.FORM", "sigmoid"]
    output, _ = distil_grid(grid, "unknown", ["LogitKD"], *taps)
    assert distilled(output) == {"distill/LogitKD/class_layer@0"}


# ---- a pass of the teacher ----


@pytest.fixture
def stranger() -> Iterator[Callable[..., None]]:
    """Imports plugins into this process; what they registered is forgotten afterwards."""
    registries = [DISTILLERS._obj_map, TEACHER_PASSES._obj_map]
    before = [dict(registry) for registry in registries]
    adders = list(config._key_adders)
    added: list[str] = []

    def load(*names: str) -> None:
        modules = set(sys.modules)
        import_plugins([str(PLUGINS / name) for name in names])
        added.extend(set(sys.modules) - modules)

    yield load
    for registry, content in zip(registries, before):
        registry.clear()
        registry.update(content)
    config._key_adders[:] = adders
    for name in added:
        del sys.modules[name]


def build(path: Path, **changes: Any) -> DistillTrainer:
    """The trainer of a configuration, ready for its first step."""
    cfg = load_config(str(path), [x for key, value in changes.items() for x in (key.replace("__", "."), value)])
    register_datasets(cfg)
    torch.manual_seed(1)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer


def seen_by(trainer: DistillTrainer, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the stranger's pass got and gave: (maps of the student, whole maps of the teacher, result)."""
    calls: list[Any] = []
    given = trainer.distilled.passes.others["SalientPass"]
    plain = type(given).__call__

    def call(self: Any, inputs: Any, guidance: Any, dense: Any) -> Any:
        calls.append((dict(guidance), dict(dense), plain(self, inputs, guidance, dense)))
        return calls[-1][-1]

    monkeypatch.setattr(type(given), "__call__", call)
    return calls


@pytest.mark.parametrize("normalize", ["none", "standardize"])
def test_loss_is_the_mean_over_what_a_pass_computed(
    student: Path, stranger: Callable[..., None], normalize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger("salient_pass.py")
    changes = {"DISTILL__METHODS": ["FeatureMimic"], "DISTILL__FEATURE_MIMIC__NORMALIZE": normalize}
    trainer = build(student, **SALIENT, **changes)
    calls = seen_by(trainer, monkeypatch)
    with EventStorage():
        losses = trainer.distilled(next(iter(trainer.data_loader)))
    (ours, theirs, result), *more = calls
    assert not more
    for level in ("p3", "p4"):
        known = result.valid[level]
        assert 0 < known.sum() < known.numel()

        def rows(maps: Tensor, known: Tensor = known) -> Tensor:
            rows = maps.movedim(1, -1)[known]
            return standardize(rows[:, :, None, None])[:, :, 0, 0] if normalize == "standardize" else rows

        want = 4.0 * (rows(ours[level]) - rows(theirs[level])).square().mean()
        assert losses[f"distill/FeatureMimic/{level}"].item() == pytest.approx(want.item(), rel=1e-5)


def test_teacher_runs_once_a_step_whatever_the_passes(
    student: Path, stranger: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger("salient_pass.py")
    trainer = build(student, **SALIENT, DISTILL__METHODS=["FeatureMimic", "MaskedGenerative", "LogitKD"])
    calls = seen_by(trainer, monkeypatch)
    ran = []
    trainer.distilled.teacher.model.backbone.register_forward_pre_hook(lambda module, args: ran.append(module))
    batches = iter(trainer.data_loader)
    for step in (1, 2):
        with EventStorage():
            losses = trainer.distilled(next(batches))
        assert len(ran) == len(calls) == step
    assert {name.split("/")[1] for name in losses if "/" in name} == {"FeatureMimic", "MaskedGenerative", "LogitKD"}


def test_draws_of_a_pass_are_rolled_back_with_a_failed_step(student: Path, stranger: Callable[..., None]) -> None:
    stranger("salient_pass.py")
    trainer = build(student, **SALIENT)
    plain = trainer.distilled.distillers["FeatureMimic"].level_loss
    drawn = []

    def level_loss(level: int, s: Tensor, t: Tensor, valid: Tensor | None = None) -> Tensor:
        drawn.append(trainer.distilled.passes.state_dict())
        return plain(level, s * float("nan") if trainer.iter == 4 else s, t, valid)

    trainer.distilled.distillers["FeatureMimic"].level_loss = level_loss
    with pytest.raises(NonFiniteLossError, match="iteration 4"):
        trainer.train()
    assert drawn[-1] == {"SalientPass": {"seed": 5, "draws": 10}}  # two levels in each of five steps
    assert trainer.distilled.passes.state_dict() == {"SalientPass": {"seed": 5, "draws": 8}}
    kept = read_checkpoint(Path(trainer.cfg.OUTPUT_DIR), "model_before_failure_0000004")
    assert kept["teacher_passes"] == {"SalientPass": {"seed": 5, "draws": 8}}


def test_run_with_a_pass_of_a_stranger_resumes_from_its_checkpoint(student: Path, directory: Path) -> None:
    own = {"IMPORTS": ["salient_pass.py"], "FEATURE_MIMIC": {"TEACHER_PASS": "SalientPass"}}
    path = write_yaml(directory / "own.yaml", {"_BASE_": student.name, "DISTILL": own})
    outputs = [directory / "whole", directory / "resumed"]
    tool("train_net", "--config-file", path, "OUTPUT_DIR", outputs[0])
    outputs[1].mkdir()
    shutil.copy(outputs[0] / "model_0000002.pth", outputs[1])
    (outputs[1] / "last_checkpoint").write_text("model_0000002.pth")
    run = tool("train_net", "--config-file", path, "--resume", "OUTPUT_DIR", outputs[1])
    assert "next is iteration 3" in run.stdout
    whole, resumed = (read_checkpoint(output) for output in outputs)
    assert whole["teacher_passes"] == resumed["teacher_passes"] == {"SalientPass": {"seed": 5, "draws": 12}}
    assert whole["model"].keys() == resumed["model"].keys()
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())


@pytest.mark.parametrize(
    "method, node", [("HeadRegression", "HEAD_REGRESSION"), ("ChannelMatching", "CHANNEL_MATCHING")]
)
def test_sparse_pass_for_a_method_that_needs_whole_maps(
    student: Path, stranger: Callable[..., None], method: str, node: str
) -> None:
    stranger("salient_pass.py")
    needs = rf"DISTILL\.{node}\.TEACHER_PASS is SalientPass, which computes parts .*{method} needs whole maps"
    with pytest.raises(ConfigError, match=needs):
        build(student, DISTILL__METHODS=[method], **{f"DISTILL__{node}__TEACHER_PASS": "SalientPass"})


def test_unknown_pass_is_an_error_that_lists_those_there_are(student: Path, stranger: Callable[..., None]) -> None:
    stranger("salient_pass.py")
    with pytest.raises(ConfigError, match=r"FEATURE_MIMIC\.TEACHER_PASS is 'Salient'.*SalientPass.*Did you mean"):
        build(student, DISTILL__FEATURE_MIMIC__TEACHER_PASS="Salient")
