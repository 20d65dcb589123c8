"""LD, and CrossKD of heads that predict distributions: the formulas written out, what learns, what is refused."""

import math

import pytest
import torch
from models import batch, config, write_teacher
from runs import in_two_processes
from test_gfl import GFL

from d2kd.distillers import LD, AlignmentError, CrossKD, HeadRest, LogitKD, Prediction, TapInfo, TapPair
from d2kd.distillers.divergence import distance_divergence
from d2kd.errors import ConfigError
from d2kd.layers import generalized_iou, soft_label_focal_loss
from d2kd.modeling import build_distilled_model
from d2kd.modeling.architectures import architecture_of
from d2kd.modeling.meta_arch.gfl import as_box, expected_distances
from d2kd.modeling.taps import FeatureTaps
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

SMALL = [(64, 64)]


def distilled(tmp_path, method="LD", teacher=None, **changes):
    named = write_teacher(tmp_path, config({**GFL, **(teacher or {})}))
    torch.manual_seed(0)
    net = build_distilled_model(config(GFL, DISTILL__METHODS=[method], **changes, **named)).train()
    with torch.no_grad():  # an untrained head sees nothing, and is sure of it
        for head in (net.teacher.model.head, net.student.head):
            head.cls_score.weight.mul_(8)
            head.bbox_pred.weight.mul_(20)
            head.cls_score.bias.fill_(-0.5)
    return net


def losses_of(net, images=SMALL):
    with EventStorage():
        losses = net(batch(images))
    return {name.split("/")[2]: loss for name, loss in losses.items() if name.startswith("distill/")}


def features_of(model, names, images=SMALL):
    taps = FeatureTaps(model, names)
    with torch.no_grad(), EventStorage(), taps.recording() as features:
        model(batch(images))
    return features


def softmax(values):
    total = sum(map(math.exp, values))
    return [math.exp(value) / total for value in values]


def divergence(ours, theirs, temperature):
    """T^2 KL of the teacher's distributions to the student's, the mean over four sides of five distances."""
    total = 0.0
    for side in range(4):
        s, t = (softmax([z / temperature for z in x[5 * side : 5 * side + 5]]) for x in (ours, theirs))
        total += sum(b * math.log(b / a) for a, b in zip(s, t))
    return temperature**2 * total / 4


@pytest.mark.parametrize("temperature, class_weight", [(10.0, 0.0), (2.0, 3.0)])
def test_losses_are_the_formulas(tmp_path, temperature, class_weight):
    keys = {"DISTILL__LD__TEMPERATURE": temperature, "DISTILL__LD__CLASS_WEIGHT": class_weight}
    net = distilled(tmp_path, **keys, DISTILL__LD__WEIGHT=0.5)
    names = [f"head.{layer}@{i}" for layer in ("bbox_pred", "cls_score") for i in range(5)]
    ours, theirs = (features_of(model, names) for model in (net.student, net.teacher.model))
    sums, weight, objects = dict.fromkeys(names, 0.0), 0.0, 0.0
    for i in range(5):
        boxes, classes = f"head.bbox_pred@{i}", f"head.cls_score@{i}"
        for y in range(theirs[boxes].shape[2]):
            for x in range(theirs[boxes].shape[3]):
                p, t = (maps[classes][0, :, y, x].sigmoid().tolist() for maps in (ours, theirs))
                weight += max(t) ** 2
                objects += sum(b * b for b in t)
                pair = (maps[boxes][0, :, y, x].tolist() for maps in (ours, theirs))
                sums[boxes] += max(t) ** 2 * divergence(*pair, temperature)
                for a, b in zip(p, t):
                    sums[classes] += abs(a - b) * (-b * math.log(a) - (1 - b) * math.log(1 - a))
    want = {name: 0.5 * x / weight if "bbox" in name else 0.5 * class_weight * x / objects for name, x in sums.items()}
    want = {name: x for name, x in want.items() if class_weight or "bbox" in name}
    found = {name: x.item() for name, x in losses_of(net).items()}
    assert weight > 10 and sum(sums.values()) > 0.1
    # levels that are too small for 64 pixels are left out with the boxes of small images only
    assert found == pytest.approx(want, rel=2e-4, abs=1e-9)


def test_the_divergence_is_that_of_the_sides():
    ours, theirs = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0)).unbind()
    want = [divergence(a, b, 3.0) for a, b in zip(ours.tolist(), theirs.tolist())]
    assert distance_divergence(ours, theirs, 3.0).tolist() == pytest.approx(want, rel=1e-4)
    assert distance_divergence(ours[:0], theirs[:0]).shape == (0,)


@pytest.mark.parametrize("box_loss", ["giou", "kl"])
def test_cross_kd_of_distributions_is_the_formula(tmp_path, box_loss):
    net = distilled(tmp_path, "CrossKD", {"MODEL.FPN.OUT_CHANNELS": 96}, DISTILL__CROSS_KD__BOX_LOSS=box_loss)
    method, head = net.distillers["CrossKD"], net.teacher.model.head
    branches = architecture_of(net.teacher.model).head_branches()
    ours = features_of(net.student, [pair.student.name for pair in method.pairs])
    theirs = features_of(net.teacher.model, [pair.teacher.name for pair in method.pairs])
    found = losses_of(net)
    objects = sum(theirs[f"head.cls_score@{i}"].sigmoid().square().sum() for i in range(5))
    for i in range(5):
        branch, feature = branches[5 + i], method.pairs[5 + i].student.name
        with torch.no_grad():
            x = method.align[5 + i](ours[feature])
            for layer in branch.layers[1:]:
                for module in layer.modules:
                    x = module(x)
            x = (head.bbox_pred(x, i), theirs[f"head.bbox_pred@{i}"])
        weights = theirs[f"head.cls_score@{i}"].sigmoid().amax(1).square().flatten()
        flat = [z.movedim(1, -1).reshape(-1, 20) for z in x]
        if box_loss == "kl":
            of_cells = torch.tensor([divergence(a, b, 1.0) for a, b in zip(*(z.tolist() for z in flat))])
        else:
            of_cells = 1 - generalized_iou(*(as_box(expected_distances(z.view(-1, 4, 5))) for z in flat))
        want = (weights * of_cells).sum() / objects
        assert found[feature].item() == pytest.approx(want.item(), rel=1e-3)
    assert sum(found.values()) > 0.1


@pytest.mark.parametrize("method", ["LD", "CrossKD"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_the_student_learns_and_the_teacher_nothing(tmp_path, method, precision):
    net = distilled(tmp_path, method, DISTILL__CROSS_KD__BOX_LOSS="kl")
    with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
        losses = losses_of(net, [(64, 64), (96, 64)])
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values()) and sum(losses.values()) > 0
    assert all(p.grad is None for p in net.teacher.model.parameters())
    learned = {name for name, p in net.student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("bottom_up" in name for name in learned) and any("bbox_subnet.0" in name for name in learned)
    assert any("bbox_pred" in name for name in learned) == (method == "LD")
    assert not any("cls_score" in name for name in learned)  # of LD: the classes weigh, and are not followed


def test_it_works_in_a_loop_without_a_storage(tmp_path):
    net = distilled(tmp_path, DISTILL__BALANCE="gradient")
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        sum(net(batch()).values()).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in net.student.parameters())


def test_a_student_that_is_the_teacher_has_nothing_to_learn(tmp_path):
    net = distilled(tmp_path, DISTILL__LD__CLASS_WEIGHT=1.0)
    net.student.load_state_dict(net.teacher.model.state_dict())
    for part in (net.student.backbone, net.student.head):  # batch norms keep to their averages
        part.eval()
    assert all(abs(loss.item()) < 1e-6 for loss in losses_of(net).values())


def test_with_weight_zero_the_student_learns_nothing_of_it(tmp_path):
    losses = losses_of(distilled(tmp_path, DISTILL__LD__WEIGHT=0.0))
    assert losses and all(loss.item() == 0 and not loss.requires_grad for loss in losses.values())


def test_the_students_classes_weigh_whatever_their_order_in_the_teacher():
    """Of a teacher with more classes, a box of one that the student does not know weighs nothing."""
    classes, boxes = pair("class_logits", 3), pair("box_distribution", 20)
    classes = TapPair(classes.student, classes.teacher._replace(order=(3, 0, 1)))
    method = LD(pairs=[boxes, classes], class_weight=1.0, weight=1.0, temperature=2.0)
    generator = torch.Generator().manual_seed(0)
    s, t, p, q = (torch.randn(1, n, 2, 2, generator=generator) for n in (20, 20, 3, 4))
    q[0, 2] = 10.0  # sure of the one that the student does not have
    found = method({boxes.name: s, classes.name: p}, {boxes.teacher.name: t, classes.teacher.name: q})
    q = q[:, [3, 0, 1]].sigmoid()
    weights = q.amax(1).square().flatten()
    flat = [x.movedim(1, -1).reshape(-1, 20) for x in (s, t)]
    want = (weights * distance_divergence(*flat, 2.0)).sum() / weights.sum().clamp(min=1)
    torch.testing.assert_close(found[boxes.name], want)
    want = soft_label_focal_loss(p, q, 1.0) / q.square().sum().clamp(min=1)
    torch.testing.assert_close(found[classes.name], want)


def test_unknown_classes_are_refused(tmp_path):
    """Where the teacher has other classes and nobody knows which, its confidence says nothing."""
    with pytest.raises(ValueError, match="LD looks at class scores: the student has 3 classes"):
        distilled(tmp_path, teacher={"MODEL.GFL.NUM_CLASSES": 5}, DISTILL__INIT_FROM_TEACHER__ENABLED=False)


def test_a_head_that_ld_alone_would_leave_random_is_refused(tmp_path):
    keys = {"DISTILL__TASK_WEIGHT": 0.0, "DISTILL__INIT_FROM_TEACHER__ENABLED": False}
    with pytest.raises(ValueError, match=r"TASK_WEIGHT is 0, and no method trains head\.cls_score"):
        distilled(tmp_path, **keys)
    distilled(tmp_path, **keys, DISTILL__LD__CLASS_WEIGHT=1.0)


def pair(kind, channels, place="p3", decode=None):
    tap = f"head.{kind}@0"
    rest = HeadRest(lambda x: x, channels, decode)
    activation = "sigmoid" if kind == "class_logits" else ""
    info = TapInfo(tap, channels, 8, Prediction(tap, kind, "anchor", place, activation), rest=rest)
    return TapPair(info, info)


def test_distances_without_classes_are_refused():
    with pytest.raises(AlignmentError, match=r"DISTILL\.LD\.TAPS, .*: the class logits of the same place \(anchor"):
        LD(pairs=[pair("class_logits", 3, "p4"), pair("box_distribution", 20)])
    with pytest.raises(ConfigError, match=r"LD\.CLASS_WEIGHT"):
        LD(pairs=[pair("class_logits", 3), pair("box_distribution", 20)], class_weight=-1.0)


@pytest.mark.parametrize(
    "kind, box_loss, words",
    [
        ("box_deltas", "kl", "is kl, and the teacher predicts boxes, no distributions: set it to giou or l1"),
        ("box_distribution", "l1", "is l1, and the teacher predicts distributions of boxes: set it to giou or kl"),
        ("box_distribution", "giou", "is giou, and how boxes are encoded is unknown: set it to kl"),
        ("box_deltas", "giou", "is giou, and how boxes are encoded is unknown: set it to l1"),
    ],
)  # fmt: skip
def test_losses_of_boxes_that_do_not_fit_the_head(kind, box_loss, words):
    with pytest.raises(ConfigError, match=rf"BOX_LOSS {words}"):
        CrossKD(pairs=[pair("class_logits", 3), pair(kind, 20)], box_loss=box_loss)


def _mean_losses(path):
    """What each of two processes does with an image of two, of which the teacher is sure in 36 cells and in 2."""
    torch.manual_seed(0)
    pairs = [pair("class_logits", 3), pair("box_distribution", 20)]
    methods = [LD(pairs=pairs, class_weight=1.0), LogitKD(pairs=pairs[:1]), CrossKD(pairs=pairs, box_loss="kl")]
    teacher, student = ({p.student.name: torch.randn(2, p.student.channels, 16, 16) for p in pairs} for _ in range(2))
    scores = teacher[pairs[0].student.name].sub_(6)
    scores[0, 0, :6, :6] = scores[1, 0, 8, 8:10] = 4.0
    mine = slice(comm.get_rank(), None, comm.get_world_size())
    teacher, student = ({name: x[mine] for name, x in maps.items()} for maps in (teacher, student))
    losses = [torch.stack(list(method(student, teacher).values())).sum() for method in methods]
    values = torch.stack(losses).detach()
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(values)
    if comm.is_main_process():
        torch.save(values / comm.get_world_size(), path)


def test_two_processes_have_the_losses_of_one(tmp_path):
    in_two_processes(_mean_losses, tmp_path / "two.pth")
    _mean_losses(str(tmp_path / "one.pth"))
    two, one = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("two", "one"))
    torch.testing.assert_close(two, one)
