"""Schedules of the learning rate: Detectron2's, and the polynomial one of segmentors."""

from fvcore.common.param_scheduler import ParamScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver.lr_scheduler import WarmupParamScheduler


class PolynomialDecay(ParamScheduler):
    """(1 - end) (1 - x)^power + end, where x goes from 0 to 1 ("poly", arXiv 1506.04579, with a floor)."""

    def __init__(self, power: float, end: float = 0.0) -> None:
        """
        Args:
            power: 1 is a straight line.
            end: last value; the first one is 1.
        """
        self._power = power
        self._end = end

    def __call__(self, where: float) -> float:
        """Returns the factor at a place from 0 to 1 in the training."""
        return (1.0 - self._end) * (1.0 - min(where, 1.0)) ** self._power + self._end


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Returns what `SOLVER.LR_SCHEDULER_NAME` names, to be stepped once an iteration.

    "WarmupPolyLR" falls from BASE_LR to BASE_LR_END; all others are Detectron2's. A resumed run goes on where it was:
    the state is a position and the base rates.
    """
    node = cfg.SOLVER
    if node.LR_SCHEDULER_NAME != "WarmupPolyLR":
        scheduler: LRScheduler = solver.build_lr_scheduler(cfg, optimizer)
        return scheduler
    schedule = WarmupParamScheduler(
        PolynomialDecay(node.POLY_LR_POWER, node.BASE_LR_END / node.BASE_LR),
        node.WARMUP_FACTOR,
        min(node.WARMUP_ITERS / node.MAX_ITER, 1.0),
        node.WARMUP_METHOD,
        node.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=node.MAX_ITER)
