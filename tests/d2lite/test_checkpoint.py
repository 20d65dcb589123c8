"""Checkpoints: safe reading, complete writing, and matching of names, beyond the recorded cases."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from d2lite.checkpoint import Checkpointer, DetectionCheckpointer, InvalidCheckpointError, PeriodicCheckpointer
from d2lite.checkpoint.c2_model_loading import (
    align_and_update_state_dicts,
    convert_basic_c2_names,
    convert_c2_detectron_names,
)


class Payload:
    """Unpickling it would create a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_pickle(path, data, protocol=2):
    with open(path, "wb") as f:
        pickle.dump(data, f, protocol=protocol)
    return str(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_arrays_load(tmp_path, protocol):
    weights = OrderedDict(weight=np.arange(6, dtype=np.float32).reshape(3, 2), bias=np.ones(3, np.float64))
    extra = {"__author__": "someone", "scalar": np.float32(2.5), "tags": {"a"}, "raw": b"\xff\0"}
    model = nn.Linear(2, 3)
    path = write_pickle(tmp_path / "w.pkl", {"model": weights, **extra}, protocol)
    rest = DetectionCheckpointer(model).load(path)
    assert torch.equal(model.weight, torch.arange(6.0).view(3, 2)) and torch.equal(model.bias, torch.ones(3))
    assert rest == extra


def test_python_2_pickles_load(tmp_path):
    # pickle.dumps({"blobs": {"fc_w": "\xe9"}}, 0) of Python 2: its str may hold any byte.
    (tmp_path / "old.pkl").write_bytes(b"(dp0\nS'cfg'\np1\nS'\\xe9'\np2\nsS'blobs'\np3\n(dp4\ns.")
    rest = DetectionCheckpointer(nn.Linear(2, 3)).load(str(tmp_path / "old.pkl"))
    assert rest["__author__"] == "Caffe2"


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_code_is_refused(tmp_path, protocol):
    data = {"model": {"weight": np.ones((3, 2))}, "__author__": Payload(tmp_path / "made")}
    path = write_pickle(tmp_path / "evil.pkl", data, protocol)
    with pytest.raises(InvalidCheckpointError, match=r"Refused to load .*evil\.pkl.*mkdir.*convert"):
        DetectionCheckpointer(nn.Linear(2, 3)).load(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["evil.pth", "evil.pyth", "model_final"])
def test_a_torch_file_that_calls_code_is_refused(tmp_path, name):
    path = tmp_path / name
    torch.save({"model": {"weight": torch.ones(3, 2)}, "extra": Payload(tmp_path / "made")}, path)
    with pytest.raises(InvalidCheckpointError, match="Refused to load .*mkdir"):
        DetectionCheckpointer(nn.Linear(2, 3)).load(str(path))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name", ["os.system", "numpy.load", "builtins.eval", "builtins.getattr", "numpy.ndarray.tofile"]
)
def test_only_data_can_be_named(tmp_path, name):
    module, _, attribute = name.partition(".")
    opcodes = pickle.PROTO + b"\x04"
    for text in (module, attribute):
        opcodes += pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
    (tmp_path / "x.pkl").write_bytes(opcodes + pickle.STACK_GLOBAL + pickle.STOP)
    with pytest.raises(InvalidCheckpointError, match=f"Refused to load .*{name}"):
        DetectionCheckpointer(nn.Linear(2, 3)).load(str(tmp_path / "x.pkl"))


def test_arrays_and_numpy_scalars_inside_torch_files_load(tmp_path):
    data = {
        "model": {"weight": np.full((3, 2), 2.0, np.float16), "bias": torch.ones(3)},
        "iteration": np.int64(7),
        "best": np.float64(0.25),
        "names": np.array(["a", "b"]),
    }
    torch.save(data, tmp_path / "np.pth")
    model = nn.Linear(2, 3)
    rest = DetectionCheckpointer(model).load(str(tmp_path / "np.pth"))
    assert torch.equal(model.weight, torch.full((3, 2), 2.0))
    assert (rest["iteration"], rest["best"], rest["names"].tolist()) == (7, 0.25, ["a", "b"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"PK\x03\x04 and then nothing", "truncated or not a checkpoint"),
        (b"\x80\x02}q\x00X\x05", "truncated or not a checkpoint"),
        (b"hello world, this is a text file", "truncated or not a checkpoint"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.pkl"])
def test_foreign_files_are_one_clear_error(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidCheckpointError, match=rf"Cannot load .*{name}: .*{reason}.*Download") as caught:
        DetectionCheckpointer(nn.Linear(2, 3)).load(str(tmp_path / name))
    assert caught.value.__cause__ is None and "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.95])
def test_truncated_files_are_one_clear_error(tmp_path, fraction):
    torch.save({"model": nn.Linear(30, 30).state_dict()}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(InvalidCheckpointError, match=r"Cannot load .*w\.pth: it is truncated or not a checkpoint"):
        DetectionCheckpointer(nn.Linear(30, 30)).load(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([1, 2], "no dict of weights under 'model'"),
        ({"model": [1]}, "no dict of weights under 'model'"),
        ({"state_dict": {"weight": torch.ones(1)}, "epoch": 3}, "The entry 'state_dict' .* is a dict"),
    ],
)
def test_files_without_weights_are_named(tmp_path, data, reason):
    torch.save(data, tmp_path / "w.pth")
    with pytest.raises(InvalidCheckpointError, match=rf"Cannot load .*w\.pth: .*{reason}"):
        DetectionCheckpointer(nn.Linear(2, 3)).load(str(tmp_path / "w.pth"))


def test_missing_files_and_unknown_options(tmp_path):
    checkpointer = DetectionCheckpointer(nn.Linear(2, 3))
    assert checkpointer.load("") == {}
    with pytest.raises(FileNotFoundError, match=r"none\.pth not found. Check MODEL.WEIGHTS"):
        checkpointer.load(str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="unknown option 'matching=1'"):
        checkpointer.load(str(tmp_path / "none.pth?matching=1"))


def test_a_question_mark_in_a_file_name(tmp_path):
    model = nn.Linear(2, 3)
    torch.save(model.state_dict(), tmp_path / "w?x=1.pth")
    other = nn.Linear(2, 3)
    DetectionCheckpointer(other).load(str(tmp_path / "w?x=1.pth"))
    assert torch.equal(model.weight, other.weight)


def test_a_failed_save_leaves_the_last_checkpoint_alone(tmp_path):
    model = nn.Linear(2, 3)
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0", iteration=0)
    content = (tmp_path / "model_0.pth").read_bytes()
    with pytest.raises(AttributeError):
        checkpointer.save("model_0", broken=lambda: None)
    with pytest.raises(AttributeError):
        checkpointer.save("model_1", broken=lambda: None)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth"]
    assert (tmp_path / "model_0.pth").read_bytes() == content
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0.pth")


def test_names_with_directories_are_refused_and_saving_can_be_off(tmp_path):
    with pytest.raises(ValueError, match="must not contain a directory"):
        DetectionCheckpointer(nn.Linear(2, 3), str(tmp_path)).save("a/b")
    DetectionCheckpointer(nn.Linear(2, 3), str(tmp_path), save_to_disk=False).save("model")
    assert os.listdir(tmp_path) == []


def test_periodic_checkpointer_keeps_the_latest(tmp_path):
    checkpointer = Checkpointer(nn.Linear(2, 3), str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, 2, max_iter=7, max_to_keep=2)
    for iteration in range(7):
        periodic.step(iteration)
    expected = ["last_checkpoint", "model_0000003.pth", "model_0000005.pth", "model_final.pth"]
    assert sorted(os.listdir(tmp_path)) == expected
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_data_parallel_model_is_saved_plain(tmp_path):
    model = nn.Linear(2, 3)
    DetectionCheckpointer(nn.DataParallel(model), str(tmp_path)).save("model")
    assert list(torch.load(tmp_path / "model.pth", weights_only=True)["model"]) == ["weight", "bias"]


def nested_model():
    model = nn.Module()
    model.block1 = nn.Module()
    model.block1.layer1 = nn.Linear(2, 3)
    model.layer2 = nn.Linear(3, 2)
    model.res = nn.Module()
    model.res.layer2 = nn.Linear(3, 2)
    return model


def short_state():
    model = nn.Module()
    model.layer1 = nn.Linear(2, 3)
    model.layer2 = nn.Linear(3, 2)
    model.res = nn.Module()
    model.res.layer2 = nn.Linear(3, 2)
    return model.state_dict()


@pytest.mark.parametrize("parallel", [False, True])
def test_the_longest_ending_matches(parallel):
    model, state = nested_model(), short_state()
    wrapped = nn.DataParallel(model) if parallel else model
    wrapped.load_state_dict(align_and_update_state_dicts(wrapped.state_dict(), state))
    for value, expected in zip(model.state_dict().values(), state.values()):
        assert torch.equal(value, expected) and value is not expected


def test_heuristics_with_a_parallel_prefix(tmp_path):
    state = short_state()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    model = nested_model()
    rest = DetectionCheckpointer(model).load(str(tmp_path / "w.pth") + "?matching_heuristics=True")
    assert torch.equal(model.block1.layer1.weight, state["layer1.weight"])
    assert rest == {"matching_heuristics": True}


def test_ambiguous_and_misfitting_entries(caplog):
    model = {"a.fc.weight": torch.zeros(2), "b.fc.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match="'fc.weight' matches both 'a.fc.weight' and 'b.fc.weight'"):
        align_and_update_state_dicts(model, {"fc.weight": torch.ones(2)}, c2_conversion=False)
    wrong = {"a.fc.weight": torch.ones(3), "extra": torch.ones(1)}
    assert set(align_and_update_state_dicts(model, wrong, c2_conversion=False)) == {"a.fc.weight", "extra"}
    assert "Skipped 'a.fc.weight' (3,)" in caplog.text


def test_a_lazy_module_takes_what_it_gets():
    lazy = nn.Module()
    lazy.layer = nn.LazyLinear(10)
    weights = nn.Linear(5, 10).state_dict()
    state = align_and_update_state_dicts(lazy.state_dict(), weights, c2_conversion=False)
    lazy.load_state_dict(state)
    assert lazy.layer.weight.shape == (10, 5)


def test_caffe2_names():
    names = {
        "conv1_w": "stem.conv1.weight",
        "res_conv1_bn_b": "stem.conv1.norm.bias",
        "conv1_gn_s": "stem.conv1.norm.weight",
        "res4_22_branch2b_w": "res4.22.conv2.weight",
        "res3_0_branch2b_offset_b": "res3.0.conv2_offset.bias",
        "res5_0_branch1_bn_riv": "res5.0.shortcut.norm.running_var",
        "pred_w": "linear.weight",
    }
    assert convert_basic_c2_names(names) == list(names.values())
    detector = {
        "fpn_inner_res2_2_sum_lateral_gn_s": "fpn_lateral2.norm.weight",
        "fpn_7_b": "top_block.p7.bias",
        "conv_rpn_w": "proposal_generator.rpn_head.conv.weight",
        "retnet_cls_conv_n2_fpn3_w": "head.cls_subnet.4.weight",
        "retnet_bbox_pred_fpn3_b": "head.bbox_pred.bias",
        "head_conv4_w": "box_head.conv4.weight",
    }
    weights, originals = convert_c2_detectron_names({name: torch.rand(8) for name in detector})
    assert list(weights) == list(detector.values())
    assert originals == {new: old for old, new in detector.items()}


def test_caffe2_background_class_moves():
    rows = torch.arange(3.0)
    blobs = {name: rows for name in ("cls_score_b", "mask_fcn_logits_b", "retnet_cls_pred_fpn3_b")}
    weights, _ = convert_c2_detectron_names({**blobs, "bbox_pred_b": torch.arange(12.0)})
    assert weights["box_predictor.cls_score.bias"].tolist() == [1, 2, 0]
    assert weights["box_predictor.bbox_pred.bias"].tolist() == list(range(4, 12))
    assert weights["mask_head.predictor.bias"].tolist() == [1, 2]
    assert weights["head.cls_score.bias"].tolist() == [0, 1, 2]
    agnostic, _ = convert_c2_detectron_names({"mask_fcn_logits_b": torch.ones(1)})
    assert agnostic["mask_head.predictor.bias"].tolist() == [1]
