"""`d2kd benchmark`: what runs and exported files cost, each measured in a process of its own."""

import json
from types import SimpleNamespace

import pytest
import torch
from models import config, model
from test_cli import program

from d2kd.benchmarking import Measurement, Subject, SubjectError, benchmark_table, find_subjects, write_results
from d2kd.benchmarking.measuring import Settings
from d2kd.benchmarking.results import trades
from d2kd.benchmarking.worker import Facts, _Model
from d2kd.cli import benchmark
from d2kd.errors import UserError
from d2kd.export import export_model
from d2kd.modeling.checkpoint_files import write_checkpoint

SMALL = {"INPUT__MIN_SIZE_TEST": 64, "INPUT__MAX_SIZE_TEST": 120, "DATASETS__TEST": ["nowhere"], "DATASETS__TRAIN": []}


def write_run(folder, average_precision=None, width=8):
    """A finished run of an untrained student."""
    folder.mkdir()
    cfg = config(**SMALL, MODEL__FPN__OUT_CHANNELS=width)
    (folder / "config.yaml").write_text(cfg.dump())
    net = model(cfg)
    write_checkpoint(folder / "model_final.pth", {"model": net.state_dict()})
    if average_precision is not None:
        metrics = {"bbox": {"AP": average_precision, "AP50": 50.0}}
        (folder / "result.json").write_text(json.dumps({"metrics": metrics}))
    return cfg, net


def test_runs_and_exported_files_are_measured_in_one_table(tmp_path):
    cfg, net = write_run(tmp_path / "student", 30.0)
    _, teacher = write_run(tmp_path / "teacher", 40.0, width=32)
    export_model(cfg, net, tmp_path / "student/small.pt", "torchscript")
    models = [f"big={tmp_path / 'teacher'}", tmp_path / "student", tmp_path / "student/small.pt"]
    done = program("benchmark", *models, "--number", 2, "--rounds", 2, "--batch", 3, "--output", tmp_path / "cost")
    assert done.returncode == 0 and "drawn images are taken" in done.stdout + done.stderr and "big" in done.stdout

    content = json.loads((tmp_path / "cost/benchmark.json").read_text())
    big, small, exported = content["models"]
    assert [x["name"] for x in content["models"]] == ["big", "student", "student/small.pt"]
    assert big["metric"] == ["bbox", "AP", 40.0] and small["metric"] == exported["metric"] == ["bbox", "AP", 30.0]
    assert small["parameters"] == exported["parameters"] == sum(x.numel() for x in net.parameters())
    assert big["parameters"] == sum(x.numel() for x in teacher.parameters()) and exported["multiply_adds"] is None
    assert big["multiply_adds"] > small["multiply_adds"] > 1e6
    for found in content["models"]:
        assert 0 < found["latency_ms"]["median"] <= found["latency_ms"]["p95"] and found["latency_ms"]["runs"] == 4
        assert found["images_per_second"] > 0 and found["memory_bytes"] > 0 and found["sizes"] == [[64, 64]] * 2
    own = json.loads((tmp_path / "student/benchmark.json").read_text())
    assert (
        own["latency_ms"] == small["latency_ms"] and own["exported"]["small.pt"]["latency_ms"] == exported["latency_ms"]
    )
    assert not (tmp_path / "student/small.pt/benchmark.json").exists()
    text = (tmp_path / "cost/benchmark.md").read_text()
    assert "d2kd benchmark" in text and "![Metric" in text
    assert (tmp_path / "cost/benchmark.png").stat().st_size > 1000


def call(*arguments):
    """Runs the command in this process, and models in theirs."""
    return benchmark.main(benchmark.argument_parser().parse_args(list(map(str, arguments))), "d2kd benchmark")


def measurement(name, seconds, run=None, runtime=".pt"):
    facts = Facts(2_000_000, None, 4_000_000, [(64, 64)])
    return Measurement(Subject(name, f"x{runtime}", run=run), facts, seconds, [0.5], 4, 2**20)


def test_an_exported_file_starts_on_a_gpu_that_only_onnx_runtime_uses(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"12345")
    measured = object.__new__(_Model)  # as it is behind its constructor, which needs that GPU
    about = SimpleNamespace(model=SimpleNamespace(about={"parameters": 7}))
    measured.__dict__.update(cuda=True, exported=True, file=str(tmp_path / "model.onnx"), predictor=about, inputs=[])
    measured.settings = SimpleNamespace(warmup=0)
    # CUDA's counters are not there before PyTorch has started on it, and asking them raises, here as on a GPU
    facts = measured.start()
    assert (facts.parameters, facts.file_bytes) == (7, 5) and measured.memory() is None


def test_numbers_of_the_table_are_medians_percentiles_and_ratios():
    slow, fast = measurement("slow", [0.1] * 19 + [0.9]), measurement("fast", [0.05, 0.01, 0.02])
    assert (slow.median, slow.throughput) == (pytest.approx(100), pytest.approx(8))
    assert measurement("x", [i / 1000 for i in range(1, 101)]).p95 == pytest.approx(96)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in benchmark_table([slow, fast]).splitlines()]
    assert rows[0][:6] == ["model", "runtime", "ms", "ms p95", "of the first", "images/s"]
    assert rows[0][6:] == ["memory, MiB", "parameters", "multiply-adds", "size, MB"]
    assert rows[3] == ["fast", "TorchScript", "20.0", "50.0", "0.20", "8.0", "1", "2.00 M", "-", "4.0"]


def test_only_metrics_of_one_kind_are_drawn(tmp_path):
    runs = []
    for number, metrics in enumerate(({"bbox": {"AP": 10.0}}, {"sem_seg": {"mIoU": 70.0}}, {"bbox": {"AP": 20.0}}, {})):
        runs.append(tmp_path / str(number))
        runs[-1].mkdir()
        (runs[-1] / "result.json").write_text(json.dumps({"metrics": metrics}))
    found = [measurement(str(i), [0.1], run) for i, run in enumerate(runs)]
    assert [(x.name, x.metric) for x in trades(found)] == [("0", 10.0), ("2", 20.0)]
    files = write_results(tmp_path / "out", [measurement("a", [0.1])], Settings())
    assert [x.name for x in files] == ["benchmark.json", "benchmark.md"]


def test_what_cannot_be_measured_is_one_line(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pt").write_bytes(b"no network")
    for given, message in (
        ([("", str(tmp_path / "none"))], "There is no .*none: name the folder of a finished run"),
        ([("", str(tmp_path / "empty"))], "empty is no finished run: there is no .*model_final.pth"),
        ([("a", str(tmp_path / "run")), ("a", str(tmp_path / "run"))], "Two of what is to be measured are called a"),
    ):
        with pytest.raises(SubjectError, match=message):
            find_subjects(given)
    for arguments, message in (
        ([], "There is nothing to measure"),
        (["run", "--weights", "x.pth"], "--weights needs --config-file"),
        (["x", "--rounds", "0"], "--rounds is 0; it must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark.check_arguments(benchmark.argument_parser().parse_args(arguments))
    with pytest.raises(UserError, match="x.pt cannot be read as torchscript"):
        call(tmp_path / "x.pt", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()

    (tmp_path / "run/config.yaml").write_text(config(**SMALL, MODEL__FPN__OUT_CHANNELS=16).dump())
    with pytest.raises(UserError, match="^run: .*does not fit|^run: .*shape") as caught:
        call(tmp_path / "run", "--number", 1)
    assert "Traceback" not in str(caught.value)


def test_products_of_attention_are_counted_in_one_operator_too():
    torch.manual_seed(0)
    length, width, heads, inner = 20, 32, 4, 48
    layer = torch.nn.TransformerEncoderLayer(width, heads, inner, batch_first=True).eval()  # has a fast path
    tokens = torch.randn(1, length, width)

    def attention(_):
        parts = tokens.view(1, length, heads, -1).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(parts, parts, parts)

    products = 2 * length * length * width
    projections = 4 * length * width * width + 2 * length * width * inner
    for network, want in ((attention, products), (lambda _: layer(tokens), products + projections)):
        measured = object.__new__(_Model)
        measured.__dict__.update(inputs=[{}, {}], predictor=SimpleNamespace(model=network))
        assert measured.multiply_adds() == want


def test_what_a_checkpoint_holds_beside_the_weights_is_no_memory_of_the_model(tmp_path):
    _, net = write_run(tmp_path / "plain")
    write_run(tmp_path / "trained")
    ballast = {"model": net.state_dict(), "optimizer": {"state": torch.zeros(50_000_000)}}  # 200 MB
    write_checkpoint(tmp_path / "trained/model_final.pth", ballast)
    call(tmp_path / "plain", tmp_path / "trained", "--number", 1, "--rounds", 1, "--output", tmp_path / "cost")
    plain, trained = json.loads((tmp_path / "cost/benchmark.json").read_text())["models"]
    assert abs(trained["memory_bytes"] - plain["memory_bytes"]) < 100e6


def test_the_teacher_is_measured_as_it_teaches(tmp_path):
    cfg, _ = write_run(tmp_path / "teacher")
    options = ["INPUT.MIN_SIZE_TEST", 96]
    named = ["DISTILL.TEACHER.CONFIG_FILE", tmp_path / "teacher/config.yaml", "DISTILL.TEACHER.OPTS", options]
    named += ["DISTILL.TEACHER.WEIGHTS", tmp_path / "teacher/model_final.pth"]
    write_run(tmp_path / "student")
    run = ["--config-file", tmp_path / "student/config.yaml", "--weights", tmp_path / "student/model_final.pth"]
    args = benchmark.argument_parser().parse_args(list(map(str, [*run, "--opts", *named])))
    teacher, student = benchmark._of_config(args)
    assert teacher.name == "teacher" and list(teacher.options) == options
