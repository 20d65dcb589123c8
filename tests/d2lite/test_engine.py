"""The training loop, its hooks, the default trainer and the launcher."""

import gc
import json
import logging
import math
import os
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from d2lite.checkpoint import DetectionCheckpointer
from d2lite.config import get_cfg
from d2lite.engine import (
    AMPTrainer,
    DefaultPredictor,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    hooks,
    launch,
)
from d2lite.evaluation import DatasetEvaluator
from d2lite.modeling import META_ARCH_REGISTRY
from d2lite.utils import comm
from d2lite.utils.events import EventStorage, JSONWriter


class TwoLosses(nn.Module):
    """A layer whose two losses depend on the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        return {"loss_square": y.square().mean(), "loss_abs": y.abs().mean()}


class NotFiniteFrom(TwoLosses):
    def __init__(self, call):
        super().__init__()
        self.calls, self.call = 0, call

    def forward(self, x):
        losses = super().forward(x)
        self.calls += 1
        if self.calls > self.call:
            losses["loss_abs"] = losses["loss_abs"] * math.nan
        return losses


def batches(start=0):
    while True:
        yield torch.randn(3, 4, generator=torch.Generator().manual_seed(start))
        start += 1


def make_trainer(model=None, cls=SimpleTrainer, start=0, **kwargs):
    model = model or TwoLosses()
    return cls(model, batches(start), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), **kwargs)


def values(trainer, name):
    return trainer.storage.history(name).values()


def test_hooks_run_in_order_at_their_points():
    calls = []

    class Recorder(HookBase):
        pass

    for point in ("before_train", "after_train", "before_step", "after_backward", "after_step"):
        setattr(Recorder, point, lambda self, point=point: calls.append((point, self.trainer.iter)))
    trainer = make_trainer()
    trainer.register_hooks([Recorder(), None])
    trainer.train(3, 5)
    step = ["before_step", "after_backward", "after_step"]
    expected = [("before_train", 3), *((p, 3) for p in step), *((p, 4) for p in step), ("after_train", 5)]
    assert calls == expected


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failures_are_logged_with_their_iteration_and_after_train_runs(error, caplog):
    done = []

    def fail(trainer):
        if trainer.iter == 2:
            raise error("stop")

    trainer = make_trainer()
    after = hooks.CallbackHook(after_train=lambda t: done.append((t.iter, t.storage.iter)))
    trainer.register_hooks([hooks.IterationTimer(), hooks.CallbackHook(after_step=fail), after])
    with pytest.raises(error):
        trainer.train(0, 5)
    assert done == [(2, 2)]
    assert "at iteration 2" in caplog.text


def test_trainers_are_freed():
    trainer = make_trainer()
    trainer.register_hooks([hooks.IterationTimer(), hooks.EvalHook(0, lambda: None)])
    reference = weakref.ref(trainer)
    trainer.train(0, 2)
    gc.disable()
    try:
        del trainer
        assert reference() is None, "a reference cycle keeps the trainer alive"
    finally:
        gc.enable()


def test_only_hooks_can_be_registered():
    with pytest.raises(TypeError, match="must be a HookBase, got int"):
        make_trainer().register_hooks([3])


def test_zero_iterations():
    trainer = make_trainer()
    trainer.train(4, 4)
    assert trainer.iter == 4
    with pytest.raises(NotImplementedError):
        TrainerBase().train(0, 1)


@pytest.mark.parametrize("zero_grad_before_forward", [False, True])
def test_steps_equal_a_plain_loop(zero_grad_before_forward):
    trainer = make_trainer(zero_grad_before_forward=zero_grad_before_forward)
    trainer.train(0, 4)
    model = TwoLosses()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _, batch in zip(range(4), batches()):
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        optimizer.step()
    assert torch.equal(trainer.model.layer.weight, model.layer.weight)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("period", [1, 3])
def test_losses_are_recorded(period, asynchronous):
    trainer = make_trainer(gather_metric_period=period, async_write_metrics=asynchronous)
    trainer.train(0, 7)
    iterations = [iteration for _, iteration in values(trainer, "total_loss")]
    assert iterations == [i for i in range(7) if (i + 1) % period == 0]
    parts = zip(values(trainer, "loss_square"), values(trainer, "loss_abs"), values(trainer, "total_loss"))
    assert all(math.isclose(a[0] + b[0], total[0], rel_tol=1e-6) for a, b, total in parts)
    assert len(values(trainer, "data_time")) == len(iterations)


def test_held_back_losses_are_written_once_and_in_order():
    written = []

    class Recording(SimpleTrainer):
        def _write_metrics(self, loss_dict, data_time, prefix="", iter=None):
            written.append(self.iter if iter is None else iter)

    trainer = make_trainer(cls=Recording)
    late = lambda k: SimpleNamespace(wait=dict, data_time=0.0, iteration=k)  # noqa: E731
    trainer._pending_metrics = late(-1)
    hold = hooks.CallbackHook(after_step=lambda t: t.iter == 2 and setattr(t, "_pending_metrics", late(99)))
    trainer.register_hooks([hold, hooks.CallbackHook(after_train=lambda t: written.append("after_train"))])
    trainer.train(0, 3)
    assert written == [-1, 0, 1, 2, 99, "after_train"]


def test_a_model_may_return_one_loss():
    class OneLoss(TwoLosses):
        def forward(self, x):
            return super().forward(x)["loss_abs"]

    trainer = make_trainer(OneLoss())
    trainer.train(0, 2)
    assert set(trainer.storage.histories()) == {"total_loss", "data_time"}


def test_losses_that_are_not_finite_stop_before_the_update():
    trainer = make_trainer(NotFiniteFrom(3))
    with pytest.raises(FloatingPointError, match="in iteration 3.\nNot finite: loss_abs\n.*'loss_square'"):
        trainer.train(0, 9)
    assert torch.isfinite(trainer.model.layer.weight).all()


def test_a_model_in_eval_mode_is_refused():
    trainer = make_trainer()
    trainer.register_hooks([hooks.CallbackHook(after_step=lambda t: t.model.eval())])
    with pytest.raises(RuntimeError, match="in eval mode"):
        trainer.train(0, 3)


def test_data_loader_is_opened_late_and_can_be_replaced():
    opened = []

    class Loader:
        def __iter__(self):
            opened.append(1)
            return batches()

    model = TwoLosses()
    trainer = SimpleTrainer(model, Loader(), torch.optim.SGD(model.parameters(), 0.1))
    assert not opened
    trainer.train(0, 2)
    trainer.reset_data_loader(Loader)
    trainer.train(2, 4)
    assert len(opened) == 2


def resumable(cls, folder, start=0):
    """A trainer with every kind of state, and its checkpointer."""
    options = {"precision": torch.bfloat16} if cls is AMPTrainer else {}
    trainer = make_trainer(cls=cls, start=start, **options)
    checkpointer = DetectionCheckpointer(trainer.model, str(folder), trainer=trainer)
    metrics = iter([0.5, 0.9, 0.1, 0.2])
    trainer.register_hooks(
        [
            hooks.LRScheduler(scheduler=torch.optim.lr_scheduler.StepLR(trainer.optimizer, 3, 0.5)),
            hooks.EvalHook(2, lambda: {"ap": next(metrics)}),
            hooks.BestCheckpointer(2, checkpointer, "ap", file_prefix="best"),
            hooks.PeriodicCheckpointer(checkpointer, 4),
        ]
    )
    return trainer, checkpointer


@pytest.mark.parametrize("cls", [SimpleTrainer, AMPTrainer])
def test_resuming_is_exact(tmp_path, cls):
    whole, _ = resumable(cls, tmp_path)
    whole.train(0, 8)
    resumed, checkpointer = resumable(cls, tmp_path, start=4)
    checkpointer.load(str(tmp_path / "model_0000003.pth"))
    assert resumed.iter == 3
    hooks_state = resumed.state_dict()["hooks"]
    assert hooks_state["LRScheduler"]["last_epoch"] == 4
    assert hooks_state["BestCheckpointer"] == {"best_metric": 0.9, "best_iter": 3}
    resumed.train(resumed.iter + 1, 8)
    assert torch.equal(whole.model.layer.weight, resumed.model.layer.weight)
    assert resumed.state_dict()["hooks"] == whole.state_dict()["hooks"]


def test_state_of_an_unknown_hook_is_ignored(caplog):
    trainer = make_trainer()
    trainer.load_state_dict({**trainer.state_dict(), "iteration": 6, "hooks": {"Gone": {"x": 1}}})
    assert trainer.iter == 6 and "Gone" in caplog.text


@pytest.mark.parametrize(("total", "period", "calls"), [(30, 15, 2), (31, 15, 3), (20, 0, 1)])
def test_evaluation_runs_periodically_and_once_at_the_end(total, period, calls):
    results = []
    trainer = make_trainer()
    evaluate = lambda: results.append(1) or {"a": {"b": np.float32(2)}}  # noqa: E731
    trainer.register_hooks([hooks.EvalHook(period, evaluate)])
    trainer.train(0, total)
    assert len(results) == calls
    assert trainer.storage.latest()["a/b"] == (2.0, total)


def test_evaluation_results_must_be_numbers():
    for result, error in (([1], "must return a dict, got list"), ({"x": {"y": "z"}}, "got 'x/y: z'")):
        trainer = make_trainer()
        trainer.register_hooks([hooks.EvalHook(1, lambda result=result: result)])
        with pytest.raises((TypeError, ValueError), match=error):
            trainer.train(0, 3)


@pytest.mark.parametrize(
    ("mode", "metrics", "saves"),
    [
        ("max", [0.3, 0.4, 0.35, 0.5], 3),
        ("min", [1.0, 0.8, 0.9, 0.9], 2),
        ("min", [math.nan, 0.8, 0.9, 0.9], 1),
    ],
)
def test_the_best_checkpoint(mode, metrics, saves):
    saved = []
    checkpointer = SimpleNamespace(save=lambda name, **extra: saved.append((name, extra["iteration"])))
    trainer = make_trainer()
    metric = iter(metrics)
    trainer.register_hooks(
        [
            hooks.EvalHook(10, lambda: {"m": next(metric)}),
            hooks.BestCheckpointer(10, checkpointer, "m", mode=mode),
        ]
    )
    trainer.train(0, 40)
    assert len(saved) == saves and {name for name, _ in saved} == {"model_best"}
    with pytest.raises(ValueError, match="'max' or 'min'"):
        hooks.BestCheckpointer(10, checkpointer, "m", mode="best")


def test_metrics_are_written_periodically_and_at_the_end(tmp_path):
    trainer = make_trainer()
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    evaluation = hooks.EvalHook(0, lambda: {"ap": 1})
    trainer.register_hooks([hooks.IterationTimer(), evaluation, hooks.PeriodicWriter([writer], period=10)])
    trainer.train(0, 25)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [9, 19, 24, 25]
    assert lines[-1]["ap"] == 1
    assert len(values(trainer, "time")) == 23, "the first two iterations are not timed"
    with pytest.raises(TypeError, match="EventWriters, got str"):
        hooks.PeriodicWriter(["x"])


def test_the_reported_learning_rate_is_that_of_most_parameters():
    p = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    best = hooks.LRScheduler.get_best_param_group_id
    assert best(torch.optim.SGD([{"params": p[:1], "lr": 1}, {"params": p[1:], "lr": 2}])) == 1
    assert best(torch.optim.SGD([{"params": [q], "lr": lr} for q, lr in zip(p, (1, 2, 2, 3))])) == 1


def test_precise_bn_sets_the_average_of_the_batches():
    model = nn.Sequential(nn.BatchNorm1d(4))
    data = [torch.randn(8, 4) for _ in range(5)]
    hooks.PreciseBN(1, model, data, 5).update_stats()
    torch.testing.assert_close(model[0].running_mean, torch.cat(data).mean(0))
    frozen = nn.Sequential(nn.BatchNorm1d(4)).eval()
    hooks.PreciseBN(1, frozen, data, 5).update_stats()
    assert torch.equal(frozen[0].running_mean, torch.zeros(4))


def test_profilers_write_their_files(tmp_path):
    trainer = make_trainer()
    at_one = lambda t: t.iter == 1  # noqa: E731
    trainer.register_hooks([hooks.AutogradProfiler(at_one, str(tmp_path)), hooks.TorchMemoryStats()])
    trainer.train(0, 3)
    assert os.listdir(tmp_path) == ["profiler-trace-iter1.json"]
    trainer = make_trainer()
    trainer.register_hooks([hooks.TorchProfiler(at_one, str(tmp_path), save_tensorboard=False)])
    trainer.train(0, 3)
    assert "profiler-cpu_time_total-iter1.txt" in os.listdir(tmp_path / "log")


def test_half_precision_updates_and_saves_its_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    trainer = make_trainer(cls=AMPTrainer, grad_scaler=scaler, log_grad_scaler=True)
    before = trainer.model.layer.weight.clone()
    trainer.train(0, 3)
    assert not torch.equal(before, trainer.model.layer.weight)
    assert [value for value, _ in values(trainer, "[metric]grad_scaler")] == [64.0] * 3
    other = make_trainer(cls=AMPTrainer)
    other.load_state_dict(trainer.state_dict())
    assert other.grad_scaler.get_scale() == 64.0
    assert "grad_scaler" not in make_trainer(cls=AMPTrainer, precision=torch.bfloat16).state_dict()


@META_ARCH_REGISTRY.register()
class EngineTestModel(TwoLosses):
    def __init__(self, cfg):
        super().__init__()


@META_ARCH_REGISTRY.register()
class EngineTestEcho(nn.Module):
    """Returns its input."""

    def __init__(self, cfg):
        super().__init__()

    def forward(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        return batch


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_predictor_prepares_the_image(image_format, tmp_path):
    torch.save({}, tmp_path / "empty.pth")
    options = ["INPUT.FORMAT", image_format, "INPUT.MIN_SIZE_TEST", 10, "INPUT.MAX_SIZE_TEST", 30]
    cfg = tiny_cfg(tmp_path, *options)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = "EngineTestEcho", str(tmp_path / "empty.pth")
    predictor = DefaultPredictor(cfg)
    image = np.broadcast_to(np.array([10, 20, 30], np.uint8), (20, 40, 3))
    result = predictor(image)
    assert (result["height"], result["width"]) == (20, 40)
    assert result["image"].shape == (3, 10, 20) and result["image"].dtype == torch.float32
    assert result["image"][:, 0, 0].tolist() == ([10, 20, 30] if image_format == "BGR" else [30, 20, 10])
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(ValueError, match="INPUT.FORMAT BGR or RGB, got 'L'"):
        DefaultPredictor(cfg)


class TinyTrainer(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return batches()

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return [torch.zeros(1, 4)] * 3


class CountingEvaluator(DatasetEvaluator):
    def reset(self):
        self.count = 0

    def process(self, inputs, outputs):
        self.count += 1

    def evaluate(self):
        return {"task": {"count": self.count}}


def tiny_cfg(folder, *opts):
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE, cfg.OUTPUT_DIR = "cpu", "EngineTestModel", str(folder)
    cfg.merge_from_list(["SOLVER.MAX_ITER", 6, "SOLVER.STEPS", "(4,)", "SOLVER.WARMUP_ITERS", 2, *opts])
    return cfg


def test_default_trainer_trains_saves_and_resumes(tmp_path):
    whole = TinyTrainer(tiny_cfg(tmp_path / "whole", "SOLVER.CHECKPOINT_PERIOD", 3))
    whole.resume_or_load()
    assert whole.train() is None
    files = {"model_0000002.pth", "model_0000005.pth", "model_final.pth", "last_checkpoint", "metrics.json"}
    assert files <= set(os.listdir(tmp_path / "whole"))
    saved = torch.load(tmp_path / "whole" / "model_0000002.pth", weights_only=True)
    assert set(saved) == {"model", "trainer", "iteration"} and saved["iteration"] == 2
    assert set(saved["trainer"]) == {"iteration", "hooks", "_trainer"}

    (tmp_path / "whole" / "last_checkpoint").write_text("model_0000002.pth")
    resumed = TinyTrainer(tiny_cfg(tmp_path / "whole", "SOLVER.CHECKPOINT_PERIOD", 3))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3
    resumed.data_loader = batches(3)
    resumed.train()
    assert torch.equal(resumed.model.layer.weight, whole.model.layer.weight)
    assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()


def test_default_trainers_parts_are_those_of_the_inner_trainer(tmp_path):
    trainer = TinyTrainer(tiny_cfg(tmp_path))
    for name in ("model", "data_loader", "optimizer"):
        assert getattr(trainer, name) is getattr(trainer._trainer, name)
        setattr(trainer, name, marker := nn.Linear(1, 1))
        assert getattr(trainer._trainer, name) is marker
    seen = []
    trainer = TinyTrainer(tiny_cfg(tmp_path, "SOLVER.AMP.ENABLED", True))
    assert isinstance(trainer._trainer, AMPTrainer)
    hook = HookBase()
    hook.after_backward = lambda: seen.append(trainer.iter)
    trainer.register_hooks([hook])
    trainer.train()
    assert seen == list(range(6))


def test_default_trainer_evaluates(tmp_path, caplog):
    cfg = tiny_cfg(tmp_path, "DATASETS.TEST", "('one',)")
    cfg.TEST.EXPECTED_RESULTS = [["task", "count", 3, 0]]
    with pytest.raises(NotImplementedError, match="TinyTrainer has no evaluator for 'one'"):
        TinyTrainer.build_evaluator(cfg, "one")
    assert TinyTrainer.test(cfg, TwoLosses()) == {}
    assert "No evaluation on one" in caplog.text
    assert TinyTrainer.test(cfg, TwoLosses(), [CountingEvaluator()]) == {"task": {"count": 3}}
    with pytest.raises(ValueError, match="1 test datasets, but 2 evaluators"):
        TinyTrainer.test(cfg, TwoLosses(), [CountingEvaluator(), CountingEvaluator()])

    class Evaluating(TinyTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return CountingEvaluator()

    assert Evaluating(cfg).train() == {"task": {"count": 3}}


def test_scaling_to_the_number_of_processes():
    cfg = get_cfg()
    assert DefaultTrainer.auto_scale_workers(cfg, 8) is cfg
    opts = ["SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.STEPS", "(600, 800)", "SOLVER.MAX_ITER", 1000]
    cfg.merge_from_list([*opts, "TEST.EVAL_PERIOD", 50, "SOLVER.BASE_LR", 0.02])
    cfg.freeze()
    scaled = DefaultTrainer.auto_scale_workers(cfg, 4)
    solver = scaled.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (8, 0.01)
    assert (solver.MAX_ITER, solver.STEPS) == (2000, (1200, 1600))
    assert (scaled.TEST.EVAL_PERIOD, solver.REFERENCE_WORLD_SIZE, scaled.is_frozen()) == (100, 4, True)
    assert cfg.SOLVER.IMS_PER_BATCH == 16, "the given config must stay as it is"
    assert DefaultTrainer.auto_scale_workers(scaled, 4) is scaled


def test_setup_writes_config_and_log(tmp_path):
    cfg = tiny_cfg(tmp_path / "out", "SEED", 5)
    default_setup(cfg, {})
    draw = torch.rand(1)
    default_setup(cfg, {})
    assert torch.equal(draw, torch.rand(1)), "the seed must be set"
    other = get_cfg()
    other.merge_from_file(str(tmp_path / "out" / "config.yaml"))
    assert other.SOLVER == cfg.SOLVER and other.INPUT == cfg.INPUT and other.SEED == 5
    logging.getLogger("d2lite.test").info("hello")
    lines = (tmp_path / "out" / "log.txt").read_text().splitlines()
    assert "Runtime: d2lite" in lines[0] and torch.__version__ in lines[0]
    assert "Device: cpu; seed: 5" in lines[1]
    assert any("hello" in line for line in lines)
    cfg.FLOAT32_PRECISION = "low"
    with pytest.raises(ValueError, match="FLOAT32_PRECISION is 'low'; known are highest, high, medium"):
        default_setup(cfg, {})


def test_argument_parser():
    command = "--config-file a.yaml --num-gpus 2 SOLVER.MAX_ITER 5"
    args = default_argument_parser().parse_args(command.split())
    assert (args.config_file, args.num_gpus, args.opts) == ("a.yaml", 2, ["SOLVER.MAX_ITER", "5"])
    assert (args.resume, args.eval_only, args.num_machines, args.machine_rank) == (False, False, 1, 0)


def train_together(folder):
    """Body of the processes: each rank has other data, and all must end in the same weights."""
    model = create_ddp_model(TwoLosses(), broadcast_buffers=False)
    trainer = SimpleTrainer(model, batches(100 * comm.get_rank()), torch.optim.SGD(model.parameters(), 0.1))
    trainer.train(0, 3)
    weights = comm.all_gather(model.module.layer.weight.detach())
    assert torch.equal(weights[0], weights[1])
    model = NotFiniteFrom(1 if comm.get_rank() == 1 else 99)
    trainer = SimpleTrainer(model, batches(), torch.optim.SGD(model.parameters(), 0.1))
    try:
        trainer.train(0, 3)
    except FloatingPointError:
        stopped = trainer.iter
    result = {"world": comm.get_world_size(), "local": comm.get_local_rank(), "stopped": stopped}
    with open(os.path.join(folder, f"rank{comm.get_rank()}.json"), "w") as f:
        json.dump(result, f)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would need two GPUs")
def test_two_processes_stay_in_step_and_stop_together(tmp_path):
    launch(train_together, 2, dist_url="auto", args=(str(tmp_path),))
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks == [{"world": 2, "local": rank, "stopped": 1} for rank in range(2)]


def test_launch_without_processes():
    assert launch(lambda a, b: a + b, 1, args=(1, 2)) == 3
    with pytest.raises(ValueError, match="--dist-url must name the first one"):
        launch(print, 1, num_machines=2)


def test_hooks_may_report_inside_an_event_storage():
    with EventStorage() as outer:
        trainer = make_trainer()
        trainer.train(0, 2)
    assert not outer.histories(), "the training must use a storage of its own"
