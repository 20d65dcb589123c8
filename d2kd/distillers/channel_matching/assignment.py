"""Which teacher channels belong to which student channel, at the least cost: OR-Tools, and SciPy as the check."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from d2kd.errors import UserError, require_choice

#: Costs are compared as integers, in units of 1 / SCALE.
SCALE = 1e5
REMAINDERS = ("shave", "best")
#: Up to so many copies of a student channel, and so large a share of teacher channels left out, OR-Tools solves a
#: square assignment, beyond them a flow; measured from 256 to 2048 channels (`benchmarks/channel_matching.py`).
MOST_COPIES, MOST_LEFT_OUT = 3, 0.125


class AssignmentError(UserError):
    """Costs that cannot be solved, a solver that is not there, or an assignment of another run."""


def assign_channels(cost: Tensor, per_student: int, remainder: str = "shave", solver: str = "ortools") -> Tensor:
    """Gives every student channel `per_student` teacher channels of its own so that the sum of costs is least.

    One row of capacity k stands for the paper's k equal rows: the problem is k times smaller, with the same optima.

    Args:
        cost: (Cs, Ct), finite.
        per_student: k, with k * Cs <= Ct.
        remainder: where k * Cs < Ct, "shave" leaves the last channels out, "best" those that are best left out.
        solver: "ortools" or "scipy".

    Returns:
        (Cs, k) int64 on the CPU: teacher channels in ascending order; their order within a row means nothing.

    Raises:
        AssignmentError: costs are not finite, the solver is not installed or found no optimum.
        ConfigError: unknown solver or remainder.
        ValueError: there are not so many teacher channels.
    """
    cs, ct = cost.shape
    if not 1 <= per_student * cs <= ct:
        raise ValueError(f"{cs} student channels cannot have {per_student} of {ct} teacher channels each.")
    require_choice("DISTILL.CHANNEL_MATCHING.ASSIGNMENT_SOLVER", solver, SOLVERS)
    require_choice("DISTILL.CHANNEL_MATCHING.REMAINDER", remainder, REMAINDERS)
    integers = quantize(cost)
    if remainder == "shave":
        integers = integers[:, : per_student * cs].contiguous()
    return SOLVERS[solver](integers, per_student).sort(dim=1).values


def quantize(cost: Tensor) -> Tensor:
    """Returns costs as integers, truncated: int64 on the CPU.

    Raises:
        AssignmentError: a cost is infinite or NaN.
    """
    if not bool(torch.isfinite(cost).all()):
        raise AssignmentError("Channel distances are not finite: the tapped features hold infinities or NaN.")
    return (cost.detach().double().cpu() * SCALE).long()


def total_cost(cost: Tensor, assignment: Tensor) -> int:
    """Returns the integer cost of an assignment (Cs, k) as `assign_channels` returns it."""
    return int(quantize(cost).gather(1, assignment.cpu()).sum())


def _ortools(cost: Tensor, per_student: int) -> Tensor:
    """By shape: k copies of every row to a square assignment where they fill it, else capacities in a flow.

    Copies multiply the arcs, so a flow is the smaller problem from k = 4 on, or where many channels stay out; below,
    the assignment solver is the faster one. SciPy is faster than both where most channels have a nearest one of their
    own, and needs seconds where many want the same ones, as in a network that has not learned (`docs/benchmarks.md`).
    """
    cs, ct = cost.shape
    copies = per_student * cs
    square = per_student <= MOST_COPIES and ct - copies <= MOST_LEFT_OUT * ct
    return (_assignment if square else _flow)(cost, per_student)


def _assignment(cost: Tensor, per_student: int) -> Tensor:
    solver: Any = _or_tools().linear_sum_assignment.SimpleLinearSumAssignment()
    cs, ct = cost.shape
    rows = cost.new_zeros(ct, ct)  # those behind the copies take what stays out
    rows[: per_student * cs] = cost.repeat_interleave(per_student, dim=0)
    # the same optima, as every row and every column is used once; up to ten times faster than with what all have in
    # common, since the solver's prices start at zero and would have to rise to it first
    rows -= rows.amin(dim=1, keepdim=True)
    rows -= rows.amin(dim=0, keepdim=True)
    number = torch.arange(ct, dtype=torch.int32)
    left, right = number.repeat_interleave(ct), number.repeat(ct)
    solver.add_arcs_with_cost(left.numpy(), right.numpy(), rows.flatten().numpy())
    _check_status(solver.solve(), solver.OPTIMAL)
    return torch.tensor([solver.right_mate(row) for row in range(per_student * cs)]).view(cs, per_student)


def _flow(cost: Tensor, per_student: int) -> Tensor:
    flow: Any = _or_tools().min_cost_flow.SimpleMinCostFlow()
    cs, ct = cost.shape
    # the solver starts from the greatest cost: a common part would only make it work longer
    arc_costs = (cost - cost.min()).t().flatten().numpy()
    students = torch.arange(cs, dtype=torch.int32).repeat(ct)
    teachers = torch.arange(ct, dtype=torch.int32).repeat_interleave(cs)
    capacities = torch.ones_like(teachers).numpy()
    arcs = flow.add_arcs_with_capacity_and_unit_cost(teachers.numpy(), (students + ct).numpy(), capacities, arc_costs)
    supplies = torch.cat([torch.ones(ct, dtype=torch.long), torch.full((cs,), -per_student)])
    flow.set_nodes_supplies(torch.arange(ct + cs, dtype=torch.int32).numpy(), supplies.numpy())
    # k * Cs < Ct leaves teacher channels unassigned, so the greatest flow is solved for, at minimum cost
    _check_status(flow.solve() if per_student * cs == ct else flow.solve_max_flow_with_min_cost(), flow.OPTIMAL)
    chosen = torch.from_numpy(flow.flows(arcs)).view(ct, cs).t().nonzero()
    return chosen[:, 1].view(cs, per_student)


def _or_tools() -> Any:
    """The solvers of OR-Tools, which is imported where it is needed."""
    try:
        from ortools.graph import python
        from ortools.graph.python import linear_sum_assignment, min_cost_flow  # noqa: F401  (makes them its attributes)
    except ImportError as error:
        raise AssignmentError(
            f"OR-Tools cannot be imported ({error}): pip install ortools, or set "
            "DISTILL.CHANNEL_MATCHING.ASSIGNMENT_SOLVER scipy."
        ) from error
    return python


def _check_status(status: object, optimal: object) -> None:
    if status != optimal:
        raise AssignmentError(f"OR-Tools found no optimal assignment of channels: {status}.")


def _scipy(cost: Tensor, per_student: int) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(cost.repeat_interleave(per_student, dim=0).numpy())
    return torch.from_numpy(columns).view(cost.shape[0], per_student)


SOLVERS: dict[str, Callable[[Tensor, int], Tensor]] = {"ortools": _ortools, "scipy": _scipy}
