"""Assignment of channels: recorded optima, both solvers, ties, remainders, errors."""

import builtins

import pytest
import torch

from d2kd.distillers.channel_matching.assignment import AssignmentError, assign_channels, quantize, total_cost

SHAPES = [(1, 1), (3, 3), (4, 16), (5, 17), (7, 12), (16, 16), (2, 9)]


def costs(kind, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(shape, generator=generator, dtype=torch.double)
    return {
        "random": 4 * uniform,
        "tied": (4 * uniform).round(),
        "constant": torch.full(shape, 2.0, dtype=torch.double),
        "nearly constant": 2 + 3e-5 * uniform,
    }[kind]


def groups(columns, students):
    return columns.view(-1, students).t().sort(dim=1).values


@pytest.mark.parametrize("solver", ["ortools", "scipy"])
@pytest.mark.parametrize("case", ["div", "shave"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_golden(golden, case, stage, solver):
    recorded = golden("matching_assign")
    name = f"{case}_st{stage}"
    cost = recorded[f"{name}_cost_mean"]
    students, teachers = cost.shape
    members = assign_channels(cost, teachers // students, "shave", solver)
    owner = [-1] * teachers
    for student, channels in enumerate(members.tolist()):
        for channel in channels:
            owner[channel] = student
    assert owner == recorded[f"{name}_owner"].tolist()
    assert torch.equal(members, groups(recorded[f"{name}_cols"], students))
    assert total_cost(cost, members) == int(recorded[f"{name}_int_cost"])

    sparse = assign_channels(cost, 1, "best", solver)
    assert sparse[:, 0].tolist() == recorded[f"{name}_sm_cols"].tolist()
    assert total_cost(cost, sparse) == int(recorded[f"{name}_sm_int_cost"])


@pytest.mark.parametrize("remainder", ["shave", "best"])
@pytest.mark.parametrize("kind", ["random", "tied", "constant", "nearly constant"])
@pytest.mark.parametrize("shape", SHAPES)
def test_solvers_find_the_same_cost(shape, kind, remainder):
    for seed in range(3):
        cost = costs(kind, shape, seed)
        found = [assign_channels(cost, shape[1] // shape[0], remainder, solver) for solver in ("ortools", "scipy")]
        for members in found:
            assert members.shape == (shape[0], shape[1] // shape[0])
            assert len(set(members.flatten().tolist())) == members.numel()
        assert total_cost(cost, found[0]) == total_cost(cost, found[1])


def test_the_optimum_is_the_least_of_all_assignments():
    import itertools

    cost = costs("random", (2, 4))
    best = min(
        total_cost(cost, torch.tensor([pair, [c for c in range(4) if c not in pair]]))
        for pair in itertools.combinations(range(4), 2)
    )
    assert total_cost(cost, assign_channels(cost, 2)) == best


@pytest.mark.parametrize("solver", ["ortools", "scipy"])
def test_best_may_use_the_last_channels_and_is_never_dearer(solver):
    cost = torch.full((2, 5), 3.0)
    cost[:, 4] = 0.0
    assert 4 not in assign_channels(cost, 2, "shave", solver)
    assert 4 in assign_channels(cost, 2, "best", solver)


def test_costs_are_truncated_towards_zero():
    assert quantize(torch.tensor([1.999999, -0.0000199], dtype=torch.double)).tolist() == [199999, -1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_costs_that_are_not_finite_are_an_error(value):
    cost = torch.ones(2, 4)
    cost[1, 2] = value
    with pytest.raises(AssignmentError, match="not finite"):
        assign_channels(cost, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"per_student": 3}, "cannot have 3"),
        ({"solver": "cplex"}, r"DISTILL\.CHANNEL_MATCHING\.ASSIGNMENT_SOLVER\b"),
        ({"remainder": "keep"}, r"DISTILL\.CHANNEL_MATCHING\.REMAINDER\b"),
    ],
)
def test_arguments_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        assign_channels(torch.ones(2, 4), **{"per_student": 2, **change})


def test_without_or_tools_the_error_says_what_to_do(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("ortools"):
            raise ImportError("no ortools here")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(AssignmentError, match=r"DISTILL\.CHANNEL_MATCHING\.ASSIGNMENT_SOLVER scipy"):
        assign_channels(torch.ones(2, 4), 2)
    assert assign_channels(torch.ones(2, 4), 2, solver="scipy").shape == (2, 2)
