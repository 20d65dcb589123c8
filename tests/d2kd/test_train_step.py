"""One optimizer step: accumulation and mixed precision."""

from typing import Any

import pytest
import torch
from models import FASTER_RCNN, RETINANET, batch, config, model, write_teacher
from torch import Tensor, nn

from d2kd.engine.optimizer import build_optimizer
from d2kd.engine.train_step import NonFiniteLossError, TrainStep
from d2kd.modeling import build_distilled_model
from detectron2.utils.events import EventStorage


class Regression(nn.Module):
    """A model without batch statistics whose loss is a mean over images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 1, 3))

    def forward(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        x = self.net(torch.stack([i["image"] for i in inputs]))
        return {"loss_a": x.square().mean(), "loss_b": (x - 1).abs().mean()}


def images(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    return [{"image": torch.randn(3, 12, 12, generator=generator)} for _ in range(count)]


def trained(batches: list[Any], accumulate: int, steps: int = 2, precision: torch.dtype | None = None) -> tuple:
    net = Regression()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step = TrainStep(net, batches, optimizer, accumulate=accumulate, precision=precision)
    logged = []
    with EventStorage() as storage:
        for _ in range(steps):
            step.run_step()
            logged.append({k: v for k, (v, _) in storage.latest().items() if "loss" in k})
    return net, logged


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("k", [2, 3])
def test_k_batches_of_n_are_one_batch_of_k_times_n(k, precision):
    data = images(2 * k * 2)
    small = [data[i : i + 2] for i in range(0, len(data), 2)]
    large = [data[i : i + 2 * k] for i in range(0, len(data), 2 * k)]
    (a, logged_a), (b, logged_b) = trained(small, k, precision=precision), trained(large, 1, precision=precision)
    close = {"rtol": 1e-5, "atol": 1e-6} if precision is None else {"rtol": 2e-2, "atol": 2e-2}
    for ours, theirs in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(ours, theirs, **close)
    for ours, theirs in zip(logged_a, logged_b):
        assert ours == pytest.approx(theirs, rel=1e-5 if precision is None else 2e-2)
    # the data made a difference: another order of the large batches ends elsewhere
    other, _ = trained(large[::-1], 1, precision=precision)
    assert not torch.allclose(b.net[0].weight, other.net[0].weight, rtol=1e-4)


def test_accumulate_must_be_positive():
    with pytest.raises(ValueError, match=r"SOLVER\.ACCUMULATE is 0"):
        trained([images(2)], 0)


def detector_step(base: dict[str, Any], device: str, precision: torch.dtype | None, teacher: dict[str, Any]) -> tuple:
    """Losses by step, and the model, of three steps of distillation."""
    cfg = config(base, MODEL__DEVICE=device, SOLVER__BASE_LR=0.0001, **teacher)
    torch.manual_seed(1)
    net = build_distilled_model(cfg)
    step = TrainStep(net, [batch()] * 3, build_optimizer(cfg, net), precision=precision)
    losses = []
    with EventStorage() as storage:
        for _ in range(3):
            torch.manual_seed(2)
            step.run_step()
            losses.append({k: v for k, (v, _) in storage.latest().items() if "loss" in k or k.startswith("distill/")})
    return losses, net, step


@pytest.mark.parametrize(
    "device, precision",
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.cuda),
        pytest.param("cuda", torch.float16, marks=pytest.mark.cuda),
    ],
    ids=["cpu-bfloat16", "cuda-bfloat16", "cuda-float16"],
)
@pytest.mark.parametrize("base", [RETINANET, FASTER_RCNN], ids=["RetinaNet", "FasterRCNN"])
def test_mixed_precision_follows_float32_and_keeps_float32_weights(tmp_path, base, device, precision):
    teacher = write_teacher(tmp_path, config(base, MODEL__RESNETS__RES2_OUT_CHANNELS=32))
    exact, *_ = detector_step(base, device, None, teacher)
    mixed, net, step = detector_step(base, device, precision, teacher)
    # standardized maps of one or four cells (p6, p7) turn small differences into large ones
    stable = [n for n in exact[0] if not n.endswith(("p6", "p7")) and n not in ("total_loss", "distill_loss")]
    assert [mixed[0][n] for n in stable] == pytest.approx([exact[0][n] for n in stable], rel=0.1, abs=0.02)
    assert sum(mixed[2][n] for n in stable) == pytest.approx(sum(exact[2][n] for n in stable), rel=0.1)
    assert mixed[0] != exact[0]
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in net.parameters())
    assert step.scaler.is_enabled() == (precision == torch.float16)
    # inference, too, runs under autocast
    net.eval()
    with torch.no_grad(), torch.autocast(device, dtype=precision):
        assert len(net(batch())) == 2


@pytest.mark.cuda
def test_loss_scale_is_part_of_the_state():
    net = Regression().cuda()
    data = [[{"image": x["image"].cuda()} for x in images(2)]]
    step = TrainStep(net, data, torch.optim.SGD(net.parameters(), lr=0.1), precision=torch.float16)
    with EventStorage():
        step.run_step()
    other = TrainStep(net, data, torch.optim.SGD(net.parameters(), lr=0.1), precision=torch.float16)
    step.scaler.update(128.0)
    other.load_state_dict(step.state_dict())
    assert other.scaler.get_scale() == 128.0


def test_mixed_precision_leaves_the_plain_model_as_it_was():
    net = model(config())
    step = TrainStep(net, [batch()], build_optimizer(config(), net), precision=torch.bfloat16)
    with EventStorage():
        step.run_step()
    assert not torch.is_autocast_enabled("cpu")


class Broken(nn.Module):
    """A finite loss whose gradient is not, or proposals that Detectron2 refuses."""

    def __init__(self, refuses: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.weight = nn.Parameter(torch.zeros(1))
        self.refuses = refuses

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        loss = self.norm(inputs).sum() + self.weight.abs().sqrt().sum()
        if self.refuses:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        return {"loss": loss}


@pytest.mark.parametrize("refuses, words", [(False, "grad_norm = nan"), (True, "contain Inf/NaN[.] Try")])
def test_nothing_is_updated_where_only_the_gradient_or_the_model_tells_that_it_has_diverged(refuses, words):
    net, saved = Broken(refuses), []
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step = TrainStep(net, [torch.randn(4, 1)], optimizer, before_raising=lambda: saved.append(1) or " Saved.")
    with EventStorage(), pytest.raises(NonFiniteLossError, match=f"{words}.*Saved"):
        step.run_step()
    assert saved and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_loss_scale_that_falls_for_ever_stops_the_run():
    net = Broken(refuses=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step = TrainStep(net, [torch.randn(4, 1)] * 40, optimizer, precision=torch.float16)
    with EventStorage() as storage, pytest.raises(NonFiniteLossError, match="overflow float16"):
        for step.iter in range(60):
            step.run_step()
    assert step.iter == 40 and storage.latest()["grad_scale"][0] < 2.0**-14
    healthy = Regression()
    data = [images(2)] * 40
    again = TrainStep(healthy, data, torch.optim.SGD(healthy.parameters(), lr=1e-3), precision=torch.float16)
    again.load_state_dict({**step.state_dict(), "optimizer": again.optimizer.state_dict()})
    with EventStorage():
        for again.iter in range(40, 60):
            again.run_step()


def test_the_norm_of_the_gradient_is_logged():
    net = Regression()
    step = TrainStep(net, [images(2)], torch.optim.SGD(net.parameters(), lr=0.0))
    with EventStorage() as storage:
        step.run_step()
    want = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()
    assert storage.latest()["grad_norm"][0] == pytest.approx(want, rel=1e-5)
