"""Calibration: methods that look at training images between two steps."""

import copy
import itertools
from collections.abc import Iterable
from typing import Any

from d2kd.distillers import CalibrationRequest, Distiller
from d2kd.modeling import DistilledModel
from d2kd.rng import derive_seed
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
        """Runs the pass of every method that asks for one."""
        for method, distiller in self.model.distillers.items():
            assert isinstance(distiller, Distiller)
            request = distiller.calibration_request()
            if request is None:
                continue
            # or a resumed run, whose processes all have the main one's, would see others
            broadcast_buffers(self.model.student)
            batches = itertools.islice(self._loader(request), request.batches)
            distiller.calibrate(self.model.extract_features(method, batches))

    def _loader(self, request: CalibrationRequest) -> Iterable[Any]:
        if not hasattr(self.trainer.data_loader, "seed"):  # another loader, with one stream only
            return self.trainer.data_loader
        loader = copy.copy(self.trainer.data_loader)
        loader.seed, loader.start = derive_seed(loader.seed, request.step), 0
        return loader
