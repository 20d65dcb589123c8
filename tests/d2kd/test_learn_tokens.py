"""The first stage of receptive tokens: replaced taps, learning, resuming, two processes, wrong input."""

import json

import cv2
import numpy as np
import pytest
import torch
from helpers import same_tensors
from models import FASTER_RCNN, batch, config, model
from runs import in_two_processes, run_training, tool

import d2kd  # noqa: F401  (makes `detectron2` importable, also in processes that are spawned)
from d2kd.data.datasets import register_datasets
from d2kd.distillers.checksum import weights_checksum
from d2kd.distillers.receptive_tokens import TokenFile
from d2kd.engine import CheckpointError, DistillTrainer, NonFiniteLossError, load_config
from d2kd.engine.epochs import uses_epochs
from d2kd.errors import ConfigError
from d2kd.modeling import FeatureTaps, StrictLoadingError, TapError
from d2kd.token_learning import TokenLearner, TokenTrainer, learning_config
from d2kd.token_learning import pictures as token_pictures
from d2kd.token_learning import trainer as token_trainer
from d2kd.visualization.tokens import MaskRow, mask_picture
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

LEVELS = ["p3", "p4", "p5", "p6", "p7"]
#: Trained by two processes here; tests of the other methods do the same.
TOGETHER = ["ReceptiveTokens", "ChannelMatching"]


# --- replacing taps ---


def outputs(net, names, replace):
    net.eval()
    with torch.no_grad(), FeatureTaps(net, [*LEVELS, "res4", "head.bbox_pred@0"]).recording() as features:
        with FeatureTaps(net, names).replacing(replace) as before:
            net(batch())
    return features, before


@pytest.mark.parametrize(
    "names", [["p3", "p7"], ["res4"], ["res4.pre_relu"], ["head.bbox_pred@1"], ["backbone.fpn_lateral3"]]
)
def test_replacing_by_the_same_changes_nothing(names):
    net = model()
    plain, _ = outputs(net, [], lambda name, x: x)
    same, before = outputs(net, names, lambda name, x: x.clone())
    assert list(before) == names and all(torch.equal(plain[n], same[n]) for n in plain)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()) == 0


def test_what_is_behind_a_replaced_tap_computes_with_the_new_value():
    net = model()
    plain, _ = outputs(net, [], lambda name, x: x)
    doubled, before = outputs(net, ["p3", "p4"], lambda name, x: 2 * x)
    assert torch.equal(before["p3"], plain["p3"])
    assert not torch.equal(doubled["head.bbox_pred@0"], plain["head.bbox_pred@0"])
    other, before = outputs(net, ["res4.pre_relu"], lambda name, x: -x)
    assert torch.equal(before["res4.pre_relu"].relu(), plain["res4"])
    assert not torch.equal(other["p4"], plain["p4"]) and torch.equal(other["p5"], outputs_with_res4(net, before))


def outputs_with_res4(net, before):
    """p5 of the model with another input of its last stage."""
    replaced = torch.relu(-before["res4.pre_relu"])
    return outputs(net, ["res4"], lambda name, x: replaced)[0]["p5"]


def test_a_pre_relu_whose_block_does_not_end_there_cannot_be_replaced():
    net = model()
    block = net.backbone.bottom_up.res4[-1]
    whole = block.forward
    block.forward = lambda x: whole(x) * 2
    with pytest.raises(TapError, match="cannot be replaced"):
        outputs(net, ["res4.pre_relu"], lambda name, x: x)


# --- the learner ---


def learner(net=None, **changes):
    torch.manual_seed(0)
    return TokenLearner(net if net is not None else model(), **changes)


def test_losses_reach_every_token_and_nothing_of_the_teacher():
    net = model()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    learning = learner(net, num_tokens=3)
    with EventStorage():
        losses = learning(batch())
    assert {f"loss_dice/{n}" for n in LEVELS} < set(losses) and {"loss_cls", "loss_box_reg"} < set(losses)
    sum(losses.values()).backward()
    # the untrained head hardly sees its input: some gradients are as small as float32 can tell
    assert all(p.grad is not None for p in learning.parameters())
    assert all(level.tokens.grad.abs().sum() > 0 for level in learning.levels)
    assert learning.levels[2].weighting.conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # also the statistics of its norms
    assert not any(k.startswith("teacher") for k in learning.state_dict())
    learning.check_gradients()


def test_masks_of_saturated_tokens_leave_the_teacher_as_it_is():
    net = model(config(FASTER_RCNN))
    learning = learner(net, taps=["p2", "p6"], num_tokens=1, weighting=False)
    plain = FeatureTaps(net, ["p2", "p6"])
    net.eval()
    with torch.no_grad(), plain.recording() as features:
        net(batch())
    for level, name in zip(learning.levels, ["p2", "p6"]):
        level.tokens.data.zero_()  # every mask is 1/2
        seen = learning.compute_masks(batch())[name]
        assert (
            torch.equal(seen.gate, torch.full_like(seen.gate, 0.5))
            and seen.masks.shape[-2:] == features[name].shape[-2:]
        )
    assert learning.training and net.training and not net.backbone.training


def test_one_token_learns_with_a_dice_of_zero():
    learning = learner(num_tokens=1)
    with EventStorage():
        losses = learning(batch())
    assert all(losses[f"loss_dice/{n}"].item() == 0 for n in LEVELS)
    assert all(torch.isfinite(v) for v in losses.values())


def test_a_tap_that_no_loss_depends_on_is_an_error():
    learning = learner(taps=["p3", "res2"])
    learning.teacher.backbone.bottom_up.res3.register_forward_pre_hook(lambda m, x: (x[0].detach(),))
    with EventStorage():
        sum(learning(batch()).values()).backward()
    with pytest.raises(TapError, match="do not depend on res2:"):
        learning.check_gradients()


def test_vectors_cannot_be_masked():
    with pytest.raises(TapError, match="vectors"):
        learner(model(config(FASTER_RCNN)), taps=["roi_heads.box_head"])


def test_mixed_precision_keeps_masks_and_dice_in_float32():
    learning = learner(num_tokens=2)
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = learning(batch())
        seen = learning.compute_masks(batch())
    assert all(losses[f"loss_dice/{n}"].dtype == torch.float32 and seen[n].masks.dtype == torch.float32 for n in LEVELS)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in learning.parameters())


# --- whole runs ---


@pytest.fixture
def teacher_yaml(write_config, tmp_path):
    weights = tmp_path / "teacher.pth"
    cfg = load_config(str(write_config("teacher")))
    torch.save({"model": model(cfg, seed=3).state_dict()}, weights)
    keys = {"ITERATIONS": 6, "PERIOD": 3, "NUM_TOKENS": 3, "PICTURES": 2}
    changes = {f"DISTILL__RECEPTIVE_TOKENS__LEARN__{k}": v for k, v in keys.items()}
    return write_config("teacher", MODEL__WEIGHTS=str(weights), **changes)


def run(path, *, kind=TokenTrainer, **changes):
    return run_training(path, trainer_class=kind, **changes)


def test_a_run_writes_tokens_pictures_and_progress(teacher_yaml, tmp_path):
    result = tool("learn_tokens", "--config-file", teacher_yaml)
    assert "eta:" in result.stdout and "tokens.pth" in result.stdout
    learned = TokenFile.load(str(tmp_path / "teacher/tokens.pth"))
    cfg = load_config(str(teacher_yaml))
    net = model(cfg)
    net.load_state_dict(torch.load(cfg.MODEL.WEIGHTS)["model"])
    assert learned.teacher == weights_checksum(net.state_dict()) and learned.iterations == 6
    assert list(learned.levels) == LEVELS
    for level in learned.levels.values():
        assert level.tokens.tokens.shape == (3, 8) and level.tokens.weight.shape == (3, 8, 3, 3)
        assert 0 < level.dice <= 1
    logged = [json.loads(line) for line in (tmp_path / "teacher/metrics.json").read_text().splitlines()]
    assert any("loss_dice/p3" in line and "loss_cls" in line for line in logged)
    pictures = sorted(p.name for p in (tmp_path / "teacher/masks").iterdir())
    assert pictures == ["0000003_0.png", "0000003_1.png", "final_0.png", "final_1.png"]
    assert cv2.imread(str(tmp_path / "teacher/masks/final_0.png")) is not None


def test_images_that_training_leaves_out_are_not_drawn(teacher_yaml, digits, tmp_path, monkeypatch):
    content = json.loads((digits / "annotations/instances_train.json").read_text())
    content["images"][0]["file_name"] = "missing.png"
    (tmp_path / "some.json").write_text(json.dumps(content))
    register = [{"NAME": "some", "JSON": str(tmp_path / "some.json"), "IMAGES": str(digits / "train")}]
    drawn = []
    monkeypatch.setattr(token_pictures, "mask_picture", lambda image, rows: drawn.append(image) or image)
    datasets = {"DATASETS__REGISTER": register, "DATASETS__TRAIN": ("some",), "DATASETS__TEST": ()}
    trainer = run(teacher_yaml, DATASETS__ON_BAD_IMAGE="skip", DISTILL__RECEPTIVE_TOKENS__LEARN__PERIOD=9, **datasets)
    assert trainer.finished and len(drawn) == 2
    for image, entry in zip(drawn, content["images"][1:]):
        source = cv2.imread(str(digits / "train" / entry["file_name"]))
        assert np.abs(cv2.resize(source, image.shape[1::-1]).astype(float) - image).mean() < 10


def test_interrupted_and_resumed_is_bit_equal(teacher_yaml, tmp_path):
    whole = run(teacher_yaml, OUTPUT_DIR=str(tmp_path / "whole"))
    run(teacher_yaml, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    parts = run(teacher_yaml, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    assert parts.start_iter == 3 and same_tensors(whole.learner.state_dict(), parts.learner.state_dict())
    assert whole.learner.teacher.loss_normalizer == parts.learner.teacher.loss_normalizer
    learned = TokenFile.load(str(tmp_path / "whole/tokens.pth"))
    (tmp_path / "whole/tokens.pth").unlink()  # killed before it wrote that: what is missing is made up for
    run(teacher_yaml, OUTPUT_DIR=str(tmp_path / "whole"), resume=True)
    again = TokenFile.load(str(tmp_path / "whole/tokens.pth"))
    assert torch.equal(again.levels["p3"].tokens.tokens, learned.levels["p3"].tokens.tokens)
    assert again.levels["p3"].dice == learned.levels["p3"].dice and again.iterations == learned.iterations
    assert TokenFile.load(str(tmp_path / "parts/tokens.pth")).levels["p3"].dice == learned.levels["p3"].dice
    first = run(teacher_yaml, OUTPUT_DIR=str(tmp_path / "one"), DISTILL__RECEPTIVE_TOKENS__LEARN__ITERATIONS=1)
    assert not same_tensors(whole.learner.state_dict(), first.learner.state_dict())


def test_a_failed_step_leaves_the_teachers_normalizer_alone(teacher_yaml):
    cfg = load_config(str(teacher_yaml))
    register_datasets(cfg)
    torch.manual_seed(cfg.SEED)
    trainer, seen = TokenTrainer(cfg), []
    plain = trainer.learner.forward

    def forward(inputs):
        seen.append(getattr(trainer.learner.teacher, "loss_normalizer", None))  # there from the first batch on
        return {name: loss * (float("nan") if len(seen) == 3 else 1.0) for name, loss in plain(inputs).items()}

    trainer.learner.forward = forward
    with pytest.raises(NonFiniteLossError, match="iteration 2"):
        trainer.train()
    assert seen[2] != seen[1] and trainer.learner.teacher.loss_normalizer == seen[2]


def test_another_teacher_or_other_taps_cannot_resume(teacher_yaml, tmp_path):
    run(teacher_yaml, OUTPUT_DIR=str(tmp_path / "run"), stop_at=3)
    other = tmp_path / "other.pth"
    torch.save({"model": model(load_config(str(teacher_yaml)), seed=4).state_dict()}, other)
    with pytest.raises(CheckpointError, match="another teacher"):
        run(teacher_yaml, resume=True, OUTPUT_DIR=str(tmp_path / "run"), MODEL__WEIGHTS=str(other))
    with pytest.raises(CheckpointError):
        run(teacher_yaml, resume=True, OUTPUT_DIR=str(tmp_path / "run"), DISTILL__RECEPTIVE_TOKENS__TAPS="['p3']")


def _two_processes(path, output):
    trainer = run(path, OUTPUT_DIR=output)
    states = comm.all_gather(trainer.learner.state_dict())
    assert same_tensors(states[0], states[1])
    seen = comm.all_gather(trainer.data_loader.seed)
    assert seen[0] == seen[1]


def test_two_processes_agree(teacher_yaml, tmp_path):
    in_two_processes(_two_processes, teacher_yaml, tmp_path / "two")
    assert list(TokenFile.load(str(tmp_path / "two/tokens.pth")).levels) == LEVELS


def _students_in_step(path, output):
    trainer = run(path, kind=DistillTrainer, OUTPUT_DIR=output)
    assert not trainer.model.find_unused_parameters
    assert list(trainer.distilled.distillers) == TOGETHER
    first, second = comm.all_gather([p.detach() for p in trainer.distilled.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_two_processes_of_a_student_of_the_tokens_stay_in_step(teacher_yaml, write_config, tmp_path):
    run(teacher_yaml, DISTILL__RECEPTIVE_TOKENS__LEARN__ITERATIONS=1)
    student = write_config(
        "student",
        DISTILL__TEACHER__CONFIG_FILE=str(teacher_yaml),
        DISTILL__TEACHER__EVAL_FIRST=False,
        DISTILL__METHODS=TOGETHER,
        DISTILL__RECEPTIVE_TOKENS__FILE=str(tmp_path / "teacher/tokens.pth"),
        DISTILL__RECEPTIVE_TOKENS__WARMUP_ITERS=2,
        DISTILL__CHANNEL_MATCHING__REFRESH_ITERS=[0, 2],
        DATASETS__TEST=[],
        SOLVER__MAX_ITER=4,
    )
    in_two_processes(_students_in_step, student, tmp_path / "students")


def test_a_student_of_the_tokens_resumes_bit_equal(teacher_yaml, write_config, tmp_path):
    run(teacher_yaml, DISTILL__RECEPTIVE_TOKENS__LEARN__ITERATIONS=1)
    student = write_config(
        "student",
        DISTILL__TEACHER__CONFIG_FILE=str(teacher_yaml),
        DISTILL__TEACHER__EVAL_FIRST=False,
        DISTILL__METHODS=["ReceptiveTokens"],
        DISTILL__RECEPTIVE_TOKENS__FILE=str(tmp_path / "teacher/tokens.pth"),
        DISTILL__RECEPTIVE_TOKENS__WARMUP_ITERS=4,
        DATASETS__TEST=[],
    )
    whole = run(student, kind=DistillTrainer, OUTPUT_DIR=str(tmp_path / "whole"))
    run(student, kind=DistillTrainer, OUTPUT_DIR=str(tmp_path / "parts"), stop_at=3)
    parts = run(student, kind=DistillTrainer, OUTPUT_DIR=str(tmp_path / "parts"), resume=True)
    assert parts.start_iter == 3 and same_tensors(whole.student.state_dict(), parts.student.state_dict())
    plain = run(student, kind=DistillTrainer, DISTILL__RECEPTIVE_TOKENS__CUSTOMIZE=False)
    assert not same_tensors(whole.student.state_dict(), plain.student.state_dict())  # the warm-up ended after resuming
    state = torch.load(tmp_path / "parts/model_final.pth", weights_only=True)
    assert state["distillers"]["ReceptiveTokens._extra_state"]["iterations"] == 6
    assert not any("tokens" in key for key in state["model"])


def test_masks_that_are_the_same_all_over_are_told(teacher_yaml, monkeypatch):
    told = []
    monkeypatch.setattr(token_trainer.logger, "warning", lambda message, *args: told.append(message % args))
    trainer = run(teacher_yaml, DISTILL__RECEPTIVE_TOKENS__LEARN__ITERATIONS=1)
    for size, flat in ((0.0, True), (1e4, False)):
        for level in trainer.learner.levels:
            level.tokens.data.normal_(std=size) if size else level.tokens.data.zero_()
        told.clear()
        trainer._pictures.draw("test")
        trainer._write_tokens()
        assert any("Most masks of p3, p4, p5 are" in message for message in told) == flat  # the others are one cell


def test_wrong_input(teacher_yaml, tmp_path):
    for error, changes in (
        (ConfigError, dict(MODEL__WEIGHTS="''")),
        (ConfigError, dict(DISTILL__TEACHER__CONFIG_FILE=str(teacher_yaml))),
        (StrictLoadingError, dict(MODEL__WEIGHTS=str(tmp_path / "missing.pth"))),
        (TapError, dict(DISTILL__RECEPTIVE_TOKENS__TAPS="['p33']")),
    ):
        with pytest.raises(error):
            run(teacher_yaml, **changes)


@pytest.mark.parametrize(
    "key, value", [("NUM_TOKENS", 0), ("ITERATIONS", 0), ("BASE_LR", 0.0), ("WEIGHT_DECAY", -1.0), ("PICTURES", -1)]
)
def test_numbers_out_of_range_name_the_key(key, value):
    cfg = config(MODEL__WEIGHTS="teacher.pth", **{f"DISTILL__RECEPTIVE_TOKENS__LEARN__{key}": value})
    with pytest.raises(ConfigError, match=rf"DISTILL\.RECEPTIVE_TOKENS\.LEARN\.{key} is {value}"):
        TokenTrainer(cfg)


# --- pictures ---


def test_pictures_show_where_a_mask_is_on():
    image = np.full((64, 96, 3), 128, np.uint8)
    left = np.zeros((1, 4, 8), np.float32)  # reaches 32 pixels beyond the image, into the padding
    left[:, :, :3] = 1
    picture = mask_picture(image, {"p4": MaskRow(left, left[0], stride=16.0)}).astype(int)
    tile = picture[4:100, 168 + 4 : 168 + 164]
    on, off = tile[:, :40].mean((0, 1)), tile[:, -40:].mean((0, 1))
    assert on[2] - off[2] > 80 and picture.shape[1] == 3 * 168  # image, one token, gate


def test_pictures_of_masks_smaller_than_the_image():
    picture = mask_picture(np.zeros((10, 50, 3), np.uint8), {"p7": MaskRow(np.ones((2, 1, 1)), np.ones((1, 1)), 8.0)})
    assert picture.dtype == np.uint8 and picture.shape[1] == 4 * 168


def test_lengths_in_epochs_of_the_teacher_are_not_those_of_the_tokens():
    cfg = learning_config(config(SOLVER__MAX_EPOCHS=12.0, SOLVER__WARMUP_EPOCHS=1.0, SOLVER__STEP_EPOCHS=[8.0, 11.0]))
    assert cfg.SOLVER.MAX_ITER == cfg.DISTILL.RECEPTIVE_TOKENS.LEARN.ITERATIONS and not uses_epochs(cfg)
