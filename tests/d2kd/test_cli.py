"""The console program `d2kd`: what it lists, which command gets which arguments, and how mistakes end."""

import importlib
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, environment

import d2kd
from d2kd import cli, files
from d2kd.cli import COMMANDS, listing
from d2kd.engine import load_config
from d2kd.interrupts import held_back_in_new_processes, raise_interrupts

#: The command that does the same as a program in tools/.
PROGRAMS = {
    "train_net": "train",
    "learn_tokens": "learn-tokens",
    "export_student": "export",
    "masking_gate": "masking-gate",
    "report": "report",
}


def program(*arguments, cwd=ROOT):
    """Runs `python -m d2kd.cli` in a process of its own."""
    command = [sys.executable, "-m", "d2kd.cli", *map(str, arguments)]
    variables = {**environment(), "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def called(monkeypatch):
    """Calls the dispatcher with a command's `run` replaced; returns the arguments that reach it."""
    monkeypatch.setattr(sys, "argv", ["d2kd"])

    def call(name, *arguments):
        seen = []
        monkeypatch.setattr(importlib.import_module(f"d2kd.cli.{COMMANDS[name].module}"), "run", seen.append)
        assert cli.main([name, *arguments]) == 0 and sys.argv[0] == f"d2kd {name}"
        return seen[0]

    return call


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_reach_the_command(called, name):
    first = ["--eval-only"] if name == "eval" else []
    assert called(name, "--resume", "KEY", "1") == [*first, "--resume", "KEY", "1"]


@pytest.mark.parametrize("arguments, status", [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help_lists_the_commands(capsys, arguments, status):
    assert cli.main(arguments) == status
    printed = capsys.readouterr()
    lines = (printed.err if status else printed.out).splitlines()
    for name, command in COMMANDS.items():
        assert f"  {name:12}  {command.help}" in lines


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"d2kd {d2kd.__version__}\n"


@pytest.mark.parametrize(
    "name, near",
    [("trains", "train"), ("train_net", "train"), ("evaluate", "eval"), ("learn_tokens", "learn-tokens")],
)
def test_unknown_command_names_a_near_match(capsys, name, near):
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == f"d2kd: '{name}' is not a command. Did you mean {near}?\n"


def test_unknown_command_without_a_near_match(capsys):
    assert cli.main(["quux"]) == 2
    assert capsys.readouterr().err == f"d2kd: 'quux' is not a command. There are {', '.join(COMMANDS)}.\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name):
    run = program(name, "--help")
    assert run.returncode == 0, run.stderr
    module = importlib.import_module(f"d2kd.cli.{COMMANDS[name].module}")
    assert f"{name} [-h]" in run.stdout.splitlines()[0] and module.__doc__.splitlines()[0] in run.stdout


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_mistake_is_one_line(name):
    run = program(name, "--config-file", "configs/none.yaml")
    assert run.returncode == 2 and "Traceback" not in run.stdout + run.stderr
    assert "'configs/none.yaml': there is no such file" in (run.stdout + run.stderr).splitlines()[-1]


def test_a_mistake_in_two_processes_is_one_line_too(tmp_path):
    options = ["--config-file", "PhotoDigits/retinanet_student.yaml", "--num-gpus", 2, "SOLVER.BASE_LT", 1]
    run = program("train", *options, cwd=tmp_path)  # the recipe is found from here too
    assert run.returncode == 2 and "SOLVER.BASE_LR" in run.stderr and "Traceback" not in run.stdout + run.stderr


def test_report_ends_with_one_line(tmp_path):
    run = program("report", "--run", f"a={tmp_path / 'nothing'}", "--output", tmp_path / "out")
    *_, last = run.stdout.splitlines()
    assert run.returncode == 2 and "'a'" in last and "has not finished" in last
    assert "Traceback" not in run.stdout + run.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train", "learn_tokens"])
def test_functions_can_be_sent_to_processes_that_are_spawned(name):
    module = importlib.import_module(f"d2kd.cli.{name}")
    assert pickle.loads(pickle.dumps(module.main)) is module.main


def test_recipes_are_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = load_config("configs/COCO/retinanet_R50_1x.yaml", ["DISTILL.TEACHER.CONFIG_FILE", "COCO/retinanet_R101.yaml"])
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert cfg.DISTILL.TEACHER.CONFIG_FILE == str(files.CONFIGS / "COCO/retinanet_R101.yaml")


@pytest.mark.parametrize("tool, name", PROGRAMS.items())
def test_programs_in_tools_are_thin(tool, name):
    module = importlib.import_module(f"d2kd.cli.{COMMANDS[name].module}")
    assert runpy.run_path(str(ROOT / f"tools/{tool}.py"))["run"] is module.run


@pytest.mark.parametrize(
    "kind, name, text",
    [
        ("methods", "LogitKD", "Divergence of the student's class probabilities"),
        ("architectures", "SOLO", "Segments instances by their place"),
        ("architectures", "Segmentor", "It trains as Detectron2's SemanticSegmentor"),
        ("backbones", "build_timm_backbone", "The network of MODEL.TIMM"),
        ("heads", "PSPHead", "PSPNet (arXiv 1612.01105)"),
        ("passes", "MaskedTeacher", "Runs a vision transformer"),
        ("recipes", "configs/COCO/retinanet_R50_1x.yaml", "Baseline"),
    ],
)
def test_lists_have_a_line_of_help_for_each_name(kind, name, text):
    found = dict(line.split("  ", 1) for line in listing.lines(kind))
    assert found[name].strip().startswith(text)
    assert all(help_.strip() and "\n" not in help_ for help_ in found.values())


def test_a_list_is_narrowed_by_words_and_knows_what_was_imported(tmp_path):
    names = [line.split()[0] for line in listing.lines("recipes", ["reppoints", "MASKEDGENERATIVE"])]
    assert names == [
        "configs/COCO/reppoints_R50_X101_MaskedGenerative_2x.yaml",
        "configs/PhotoDigits/reppoints_student_MaskedGenerative.yaml",
    ]
    run = program("list", "architectures", "Grid", "--import", str(ROOT / "tests/d2kd/plugins/grid_detector.py"))
    assert run.returncode == 0 and run.stdout.splitlines()[-1].split() == [
        "GridDetector", "d2kd", "knows", "its", "features", "only.",
    ]  # fmt: skip
    nothing = program("list", "methods", "quux")
    assert nothing.returncode == 1 and "No methods with quux." in nothing.stdout


def take_ctrl_c():
    """A shell lets what it starts in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    "tool, arguments",
    [("-m", "d2kd.cli train"), ("-m", "d2kd.cli predict x.png"), (str(ROOT / "tools/train_net.py"), "")],
    ids=["train", "predict", "tool"],
)
def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path, tool, arguments):
    """A package that stands for PyTorch waits for it, and catches what an import raises, as extension modules do."""
    (tmp_path / "torch.py").write_text(
        "import sys, time\nprint('importing', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException as error:\n    raise ImportError('no torch') from error\n"
    )
    command = [sys.executable, tool, *arguments.split(), "--config-file", "PhotoDigits/retinanet_student.yaml"]
    variables = {**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=variables, preexec_fn=take_ctrl_c, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130 and process.stderr.read() == "Interrupted.\n"


def wait_in_vain(connection):
    """Answers when Ctrl-C gets through, which it has been sent before."""
    connection.send("started")
    connection.recv()
    try:
        raise_interrupts()
        connection.send("nothing")
    except KeyboardInterrupt:
        connection.send("interrupted")


def interrupt_new_process():
    """What the next test runs in a process of its own: another thread than the main one would take its signals."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    seen = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with held_back_in_new_processes(lambda number, frame: seen.append(number)):
        process = context.Process(target=wait_in_vain, args=(there,))
        process.start()
        os.kill(process.pid, signal.SIGINT)  # long before it has imported anything
        assert here.recv() == "started"
        os.kill(os.getpid(), signal.SIGINT)
        while not seen:
            time.sleep(0.01)
    here.send("go on")
    assert here.recv() == "interrupted" and seen == [signal.SIGINT]
    process.join(30)
    assert process.exitcode == 0 and signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no masks of signals on this system")
def test_ctrl_c_waits_in_new_processes_until_they_work():
    variables = {**environment(), "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{ROOT}"}
    program = "import test_cli; test_cli.interrupt_new_process()"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=variables, timeout=120, capture_output=True, text=True, preexec_fn=take_ctrl_c)
    assert done.returncode == 0, done.stderr
