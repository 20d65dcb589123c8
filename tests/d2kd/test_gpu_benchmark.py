"""benchmarks/gpu.sh: its dry run, what it does with stages that fail, and the tensors that pretend to be on a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, environment

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The program as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import gpu

    return gpu


def test_the_dry_run_passes_all_stages_and_changes_nothing_outside_its_folder(gpu, tmp_path):
    document = (ROOT / "docs/benchmarks.md").read_text()
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--dry", "--output", str(tmp_path)]
    clean = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "DETECTRON2_DATASETS")}
    variables = {**clean, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd="/", env=variables, text=True, capture_output=True, timeout=280)
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert done.returncode == 0, {name: x for name, x in records.items() if x["status"] != "ok"}
    assert set(records) == set(gpu.STAGES)
    assert all(record["status"] == "ok" and record["dry"] and record["rows"] for record in records.values())
    (trained,) = records["methods-bfloat16"]["rows"]
    assert trained["finite"] and trained["last loss"] > 0
    (cost,) = records["memory-r101-r50-2"]["rows"]
    assert cost["ratio"] > 0 and cost["peak MiB, distillation"] > 0
    assert records["waits"]["rows"][0]["waits"] >= records["waits"]["rows"][0]["in the student alone"]
    assert {row["outcome"] for row in records["tests"]["rows"]} == {"passed"}
    assert {row["run"] for row in records["accuracy"]["rows"]} == {"teacher", "baseline/seed1"}
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}: " in text for name in gpu.STAGES) and "Not run" not in text
    assert (ROOT / "docs/benchmarks.md").read_text() == document


class Ended:
    """A process that ends at once, or never."""

    pid = 2**22 + 1  # of no process

    def __init__(self, code: int | None) -> None:
        self.code = code

    def wait(self, timeout: float) -> int:
        if self.code is None:
            raise subprocess.TimeoutExpired("stage", timeout)
        return self.code


def test_a_stage_that_fails_stops_no_other_and_keeps_its_rows(gpu, tmp_path, monkeypatch):
    ran = []

    def start(command: list[str], *_: Any) -> Ended:
        name = command[2]
        ran.append(name)
        if name != "accuracy":
            gpu.Recorder(tmp_path, name, False).add({"recipe": name, "ok": name != "waits"})
        return Ended({"methods-float16": None, "tests": 3}.get(name, 0))

    monkeypatch.setattr(gpu, "started", start)
    names = ["methods-float32", "methods-float16", "tests", "waits", "accuracy"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *names, "--output", str(tmp_path)])
    assert gpu.main() == 1 and ran == names
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}
    assert {name: record["status"] == "ok" for name, record in records.items()} == {
        **dict.fromkeys(names, False),
        "methods-float32": True,
    }
    reasons = [records[name]["why"] for name in names]
    assert reasons[0] == "" and "stopped after" in reasons[1] and "status 3" in reasons[2]
    assert reasons[3] == "1 of 1 failed" and reasons[4] == "nothing was measured"
    assert records["methods-float16"]["rows"] == [{"recipe": "methods-float16", "ok": True}]
    text = (tmp_path / "gpu.md").read_text()
    assert (
        "| methods-float16 | failed: stopped after 465 s |" in text and "Not run: methods-bfloat16, throughput" in text
    )
    # what is there is kept by a run of others, and shown; these failures are not theirs
    monkeypatch.setattr(sys, "argv", ["gpu.py", "methods-float32", "--output", str(tmp_path)])
    assert gpu.main() == 0 and "1 of 1 failed" in (tmp_path / "gpu.md").read_text()


def test_a_stage_that_is_stopped_ends_its_programs(gpu, tmp_path):
    program = tmp_path / "sleeper.py"
    program.write_text(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    script = tmp_path / "stage.py"
    script.write_text(
        f"import sys; from pathlib import Path; sys.path.append({str(BENCHMARKS)!r})\n"
        "from gpu_stages import Context, Stage, base\n"
        "base.environment = lambda dry: {}\n"
        "base.end_programs_when_terminated()\n"
        f"out = Path({str(tmp_path)!r})\n"
        "base.Recorder(out, 'one', False).start()\n"
        f"Stage('one', '', lambda context: context.run([{str(program)!r}]), ()).work(out, False, 50)"
    )
    with open(tmp_path / "log", "w") as log:
        process = gpu.started([str(script)], environment(), log, log)
        pid = int(_when_there(tmp_path / "pid"))
        gpu._end(process)
    assert process.wait(5) == 143, (tmp_path / "log").read_text()
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # until its parent's parent has taken note
            os.kill(pid, 0)
            if "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[:1]:
                raise ProcessLookupError
            time.sleep(0.1)


def _when_there(path: Path) -> str:
    for _ in range(300):
        if path.is_file() and path.read_text():
            return path.read_text()
        time.sleep(0.1)
    raise AssertionError(path)


def test_without_a_gpu_a_stage_says_so(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu.Recorder(tmp_path, "waits", False).start()
    assert gpu.STAGES["waits"].work(tmp_path, False, 10) == 1
    assert "There is no CUDA device here: --dry runs the same on the CPU." in capsys.readouterr().err


def test_stages_are_chosen_by_name_or_group(gpu):
    assert gpu.chosen([]) == list(gpu.STAGES)
    assert gpu.chosen(["methods", "tests", "methods-float16"]) == [
        *(f"methods-{x}" for x in ("float32", "bfloat16", "float16")),
        "tests",
    ]
    assert gpu.chosen(["table"]) == []
    with pytest.raises(ValueError, match="no stage 'methodes'"):
        gpu.chosen(["methodes"])


PRETEND = """
import sys
sys.path.append("benchmarks")
import torch
from pretend_cuda import PretendCuda
from d2kd.layers import RandomMasks
from d2kd.modeling.teacher_passes.sparse_vit import SparseViT
from detectron2.modeling.backbone import ViT

def raises(call):
    try:
        call()
    except (RuntimeError, TypeError) as error:
        return str(error)

def waits(depth):
    torch.manual_seed(0)
    windows = list(range(depth))
    net = ViT(32, 4, embed_dim=8, depth=depth, num_heads=2, window_size=3, window_block_indexes=windows).cuda()
    kept = torch.arange(0, 60, 3).expand(2, -1).cuda()
    gpu.waits.clear()
    with torch.no_grad():
        SparseViT(net)(torch.zeros(2, 3, 32, 32, device="cuda"), kept)
    return sum(gpu.waits.values())

with PretendCuda() as gpu:
    x = torch.arange(6.0, device="cuda").requires_grad_()
    assert "same device" in raises(lambda: x + torch.ones(6))
    assert "numpy" in raises(lambda: x.detach().numpy())
    assert "generator" in raises(lambda: torch.rand(2, device="cuda", generator=torch.Generator()))
    assert RandomMasks()(torch.ones(2, 3, 4, 4, device="cuda"), 0.5, "spatial").is_cuda
    net = torch.nn.Linear(6, 2).to("cuda")
    assert all(p.device == x.device for p in net.parameters())
    net(x).sum().backward()
    assert x.grad.is_cuda and not gpu.waits.total() - 2  # of the two parameters
    gpu.waits.clear()
    assert x.tolist() == list(range(6)) and x[x > 2].shape == (3,) and x.sum().item() == 15 and int(x.max()) == 5
    assert gpu.waits.total() == 4, gpu.waits
    y = x.detach().cpu()
    assert not y.is_cuda and y.numpy().sum() == 15 and gpu.waits.total() == 5
    few, many = waits(1), waits(4)
    assert 0 < few == many, (few, many)
assert raises(lambda: torch.ones(1).cuda())
"""


def test_pretended_devices_are_told_apart_and_waits_counted():
    done = subprocess.run(
        [sys.executable, "-c", PRETEND], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
