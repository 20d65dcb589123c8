"""Calibration: methods that look at training images between two steps."""

import itertools
from typing import Any

from d2kd.data.loader import side_stream
from d2kd.distillers import Distiller
from d2kd.modeling import DistilledModel
from detectron2.engine.train_loop import HookBase

from ..checkpoint import broadcast_buffers


class CalibrationHook(HookBase):
    """Shows the methods that ask for it (`Distiller.calibration_request`) features of training images before a step.

    The images come from a stream of their own, so training sees every image that it would have seen. All processes
    take part.
    """

    def __init__(self, model: DistilledModel) -> None:
        """
        Args:
            model: student, teacher and methods, not wrapped for data parallelism.
        """
        self.model = model

    def before_step(self) -> None:
        """Runs the pass of every method that asks for one, where methods take part."""
        if self.model.takes_part(self.trainer.iter):
            calibrate(self.model, self.trainer.data_loader)


def calibrate(model: DistilledModel, loader: Any, at_most: int | None = None) -> dict[str, int]:
    """Shows the methods that ask for it features of training images; to be called before each step.

    Args:
        model: student, teacher and methods, not wrapped for data parallelism.
        loader: of the training; its images stay those that they would have been.
        at_most: batches that a method is shown; None shows all that it asks for.

    Returns:
        By method, how many batches it asks for.
    """
    asked = {}
    for method, distiller in model.distillers.items():
        assert isinstance(distiller, Distiller)
        if model.is_over(method):  # it no longer teaches
            continue
        request = distiller.calibration_request()
        if request is None:
            continue
        asked[method] = request.batches
        # or a resumed run, whose processes all have the main one's, would see others
        broadcast_buffers(model.student)
        count = request.batches if at_most is None else min(request.batches, at_most)
        distiller.calibrate(model.extract_features(method, itertools.islice(side_stream(loader, request.step), count)))
    return asked
