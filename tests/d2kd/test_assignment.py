"""Assignment of channels: recorded optima, both solvers, ties, remainders, errors."""

import sys
from types import SimpleNamespace

import pytest
import torch
from ortools.graph.python import linear_sum_assignment

from d2kd.distillers.channel_matching import assignment
from d2kd.distillers.channel_matching.assignment import (
    AssignmentError,
    _assignment,
    _flow,
    assign_channels,
    quantize,
    total_cost,
)

#: Equal channels, whole multiples, and remainders; OR-Tools solves some of each as an assignment and some as a flow.
SHAPES = [(1, 1), (3, 3), (16, 16), (40, 40), (4, 16), (8, 16), (5, 15), (5, 17), (7, 12), (7, 15), (2, 9), (30, 62)]


def costs(kind, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(shape, generator=generator, dtype=torch.double)
    return {
        "random": 4 * uniform,
        "tied": (4 * uniform).round(),
        "constant": torch.full(shape, 2.0, dtype=torch.double),
        "nearly constant": 2 + 3e-5 * uniform,
        "switched off": torch.cat([torch.full_like(uniform[:1], 2.0), 4 * uniform[1:]]),
        # as between networks that have not learned: all channels want the same ones
        "product": 4 * uniform[:, :1] * uniform[:1],
        "negative": uniform - 8,
        "large": 1e6 * uniform,
    }[kind]


KINDS = ("random", "tied", "constant", "nearly constant", "switched off", "product", "negative", "large")


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
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_solvers_find_the_same_cost(shape, kind, remainder):
    for seed in range(3):
        cost = costs(kind, shape, seed)
        found = [assign_channels(cost, shape[1] // shape[0], remainder, solver) for solver in ("ortools", "scipy")]
        for members in found:
            assert members.shape == (shape[0], shape[1] // shape[0])
            assert len(set(members.flatten().tolist())) == members.numel()
        assert total_cost(cost, found[0]) == total_cost(cost, found[1])


@pytest.mark.parametrize("students, teachers", [(6, 6), (3, 6), (2, 8), (5, 6)])
@pytest.mark.parametrize("solver", ["ortools", "scipy"])
@pytest.mark.parametrize("kind", ["tied", "constant", "product"])
def test_where_optima_tie_the_same_costs_give_the_same_one(kind, solver, students, teachers):
    cost = costs(kind, (students, teachers))
    first = assign_channels(cost, teachers // students, "best", solver)
    assert torch.equal(assign_channels(cost.clone(), teachers // students, "best", solver), first)


@pytest.mark.parametrize("solver", ["ortools", "scipy"])
def test_what_a_row_or_column_has_in_common_decides_nothing(solver):
    cost = costs("random", (12, 12))
    shifted = cost + torch.arange(12)[:, None] + torch.arange(12)
    assert torch.equal(assign_channels(shifted, 1, solver=solver), assign_channels(cost, 1, solver=solver))


def test_two_copies_of_half_as_many_channels_are_solved_as_the_flow_that_they_stand_for():
    for kind in KINDS:
        cost = quantize(costs(kind, (20, 40)))
        found = [int(cost.gather(1, solve(cost, 2)).sum()) for solve in (_assignment, _flow)]
        assert found[0] == found[1], kind


def test_or_tools_gets_equal_channels_without_what_they_have_in_common(monkeypatch):
    """With it 2048 channels took up to 11 s instead of 0.7 (benchmarks/channel_matching.py)."""
    given = []

    class Recorder:
        def __init__(self):
            self.solver = linear_sum_assignment.SimpleLinearSumAssignment()

        def add_arcs_with_cost(self, left, right, arc_costs):
            given.append(torch.from_numpy(arc_costs))
            self.solver.add_arcs_with_cost(left, right, arc_costs)

        def __getattr__(self, name):
            return getattr(self.solver, name)

    solvers = SimpleNamespace(linear_sum_assignment=SimpleNamespace(SimpleLinearSumAssignment=Recorder))
    monkeypatch.setattr(assignment, "_or_tools", lambda: solvers)
    assign_channels(costs("negative", (9, 9)), 1)
    reduced = given[0].view(9, 9)
    assert reduced.amin(0).tolist() == reduced.amin(1).tolist() == [0] * 9
    assert reduced.max() < 1e5  # of costs between -8e5 and -7e5


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


@pytest.mark.parametrize("students", [1, 2])
def test_without_or_tools_the_error_says_what_to_do(monkeypatch, students):
    for name in ("ortools.graph", "ortools.graph.python"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it is an ImportError
    cost = torch.ones(students, 4)
    with pytest.raises(AssignmentError, match=r"DISTILL\.CHANNEL_MATCHING\.ASSIGNMENT_SOLVER scipy"):
        assign_channels(cost, 4 // students)
    assert assign_channels(cost, 4 // students, solver="scipy").shape == (students, 4 // students)
