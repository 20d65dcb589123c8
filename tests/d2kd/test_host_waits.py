"""Where a distillation step makes the host wait for the GPU: every place in d2kd, by method.

Each of these calls reads a number from the device, or copies one there, so that nothing is queued until the device has
done all that was queued before. They are counted on the CPU, where they take no time; which calls they are does not
depend on the device. The student's own model is not d2kd's to change, and is left out.
"""

import collections
import traceback
from pathlib import Path

import pytest
import torch
from models import FASTER_RCNN, RETINANET, batch, config, model, write_teacher
from test_fcos_vit import VIT_RCNN
from test_gfl import GFL
from torch import Tensor
from torch.overrides import TorchFunctionMode

import d2kd
import detectron2.modeling
from d2kd.engine.optimizer import build_optimizer
from d2kd.engine.rollback import StepSnapshot
from d2kd.engine.train_step import TrainStep
from d2kd.modeling import build_distilled_model
from d2kd.token_learning import TokenLearner
from detectron2.modeling.poolers import ROIPooler
from detectron2.utils.events import EventStorage

PACKAGE, RUNTIME = Path(d2kd.__file__).parent, Path(detectron2.modeling.__file__).parents[1]
READS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__),
    *(Tensor.__index__, Tensor.__contains__, Tensor.__format__, torch.equal),
    # the size of what these give is a number that the device knows
    *(torch.nonzero, Tensor.nonzero, torch.masked_select, Tensor.masked_select, torch.repeat_interleave),
    *(Tensor.repeat_interleave, torch.unique, torch.unique_consecutive, Tensor.unique, Tensor.unique_consecutive),
}
MAKES = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
#: The losses' way to the log: what stops a run that diverges, and one wait a step.
LOG = {"engine/train_step.py _record tolist": 1}


class HostWaits(TorchFunctionMode):
    """Counts calls by the innermost function of d2kd."""

    def __init__(self):
        super().__init__()
        self.places = collections.Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copies = func in MAKES and (func is Tensor.new_tensor or kwargs.get("device") is not None)
        if func in READS or copies or self._index_waits(func, args):
            self.note(func)
        return func(*args, **kwargs)

    def _index_waits(self, func, args):
        """A list is copied to the device, and a mask is counted, unless a number is written where it is True."""
        if func not in (Tensor.__getitem__, Tensor.__setitem__):
            return False
        fills = func is Tensor.__setitem__ and not isinstance(args[2], Tensor)
        indices = args[1] if isinstance(args[1], tuple) else (args[1],)
        masks = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        return any(isinstance(i, list) for i in indices) or (masks and not fills)

    def note(self, func):
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if path.is_relative_to(RUNTIME):  # a model of Detectron2 does it
                return
            if path.is_relative_to(PACKAGE):
                self.places[f"{path.relative_to(PACKAGE).as_posix()} {frame.name} {func.__name__}"] += 1
                return


def waits(tmp_path, base, methods, teacher=None, **changes):
    """Places in the third step."""
    named = write_teacher(tmp_path, config(teacher or base, **({} if teacher else {"MODEL__FPN__OUT_CHANNELS": 16})))
    if "ReceptiveTokens" in methods:
        learner = TokenLearner(model(config(base, MODEL__FPN__OUT_CHANNELS=16), seed=7))
        learner.export_tokens(dict.fromkeys(learner.taps, 0.0), 0).save(str(tmp_path / "tokens.pth"))
        changes["DISTILL__RECEPTIVE_TOKENS__FILE"] = str(tmp_path / "tokens.pth")
    cfg = config(base, DISTILL__METHODS=methods, **named, **changes)
    net = build_distilled_model(cfg)
    step = TrainStep(net, [batch()] * 3, build_optimizer(cfg, net))
    with EventStorage():
        step.run_step()
        step.run_step()
        with HostWaits() as found:
            step.run_step()
    return dict(found.places), net


@pytest.mark.parametrize(
    "methods, changes",
    [
        (["FeatureMimic", "MaskedGenerative"], {}),
        (["ReceptiveTokens"], {"DISTILL__RECEPTIVE_TOKENS__WARMUP_ITERS": 0}),
        (["LogitKD", "HeadRegression", "CrossKD"], {}),
        (["ChannelMatching"], {"DISTILL__CHANNEL_MATCHING__TAPS": ["res4.pre_relu"]}),
        (
            ["ChannelMatching"],
            {"DISTILL__CHANNEL_MATCHING__TAPS": ["res4.pre_relu"], "DISTILL__CHANNEL_MATCHING__TRACK_IMAGES": 1},
        ),
        (["FeatureMimic"], {"DISTILL__BALANCE": "gradient", "DISTILL__BALANCE_PERIOD": 1}),
    ],
    ids=["features", "tokens", "predictions", "matching in its window", "matching", "balance"],
)
def test_a_step_of_a_dense_detector_waits_for_its_losses_alone(tmp_path, methods, changes):
    assert waits(tmp_path, RETINANET, methods, **changes)[0] == LOG


def test_a_step_of_gfl_waits_for_its_losses_and_the_number_of_its_foreground(tmp_path):
    changes = {"DISTILL__LD__CLASS_WEIGHT": 1.0, "DISTILL__CROSS_KD__BOX_LOSS": "kl"}
    found, _ = waits(tmp_path, GFL, ["LD", "CrossKD"], teacher={**GFL, "MODEL.FPN.OUT_CHANNELS": 96}, **changes)
    assert found == {**LOG, "modeling/meta_arch/gfl/model.py losses nonzero": 1}


def test_a_step_on_the_regions_of_the_student_waits_for_its_losses_alone(tmp_path, monkeypatch):
    found, net = waits(tmp_path, FASTER_RCNN, ["LogitKD", "HeadRegression", "CrossKD"])
    assert found == LOG
    if not hasattr(ROIPooler, "sort_by_level"):
        pytest.skip("Detectron2's pooler reads the levels itself")
    counted, plain = [], ROIPooler.sort_by_level
    monkeypatch.setattr(ROIPooler, "sort_by_level", lambda self, *args: counted.append(1) or plain(self, *args))
    with EventStorage():
        net(batch())
    assert len(counted) == 1  # the student's: the teacher's pooler knows the levels of the same boxes


def test_a_masked_teacher_waits_where_the_students_choice_decides_sizes(tmp_path):
    changes = {
        "DISTILL__FEATURE_MIMIC__TAPS": ["res4"],
        "DISTILL__FEATURE_MIMIC__TEACHER_TAPS": ["last_feat"],
        "DISTILL__FEATURE_MIMIC__TEACHER_PASS": "MaskedTeacher",
        "DISTILL__MASKED_TEACHER__MUST_KEEP": True,
    }
    found, _ = waits(tmp_path, RETINANET, ["FeatureMimic"], teacher=VIT_RCNN, **changes)
    assert found.pop("engine/train_step.py _record tolist") == 1
    assert all(place.startswith("modeling/teacher_passes/sparse_vit.py") for place in found), found


def test_the_count_sees_what_waits():
    x = torch.arange(6.0)
    with HostWaits() as found:
        found.note = lambda func: found.places.update([func.__name__])
        bool(x.sum() > 0), x.tolist(), x[[1, 2]], x[x > 3], torch.tensor(1.0, device="cpu"), x.new_tensor([1.0])
        x[x > 3] = 0.0  # writes where a mask is True: no wait
        torch.full((1,), 2.0, device="cpu"), x[1:3], x[None]
    assert found.places == {"__bool__": 1, "tolist": 1, "__getitem__": 2, "tensor": 1, "new_tensor": 1}


def test_statistics_of_matching_are_copied_in_windows_only(tmp_path):
    changes = {
        "DISTILL__CHANNEL_MATCHING__TAPS": ["res4.pre_relu"],
        "DISTILL__CHANNEL_MATCHING__REFRESH_ITERS": [0, 5],
        "DISTILL__CHANNEL_MATCHING__TRACK_IMAGES": 2,
        "SOLVER__IMS_PER_BATCH": 2,
    }
    _, net = waits(tmp_path, RETINANET, ["ChannelMatching"], **changes)
    method, snapshot = net.distillers["ChannelMatching"], StepSnapshot(net, net.student)
    copied = {}
    for method.batches in range(7):
        snapshot.save()
        copied[method.batches] = any(live is method.statistics.sums for live, _ in snapshot._copies.values())
        before = {name: value.clone() for name, value in method.state_dict().items() if isinstance(value, Tensor)}
        with EventStorage():
            net(batch())
        snapshot.restore()
        after = method.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items()), method.batches
    assert copied == {0: True, 1: False, 2: False, 3: False, 4: False, 5: True, 6: False}
