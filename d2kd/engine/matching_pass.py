"""Tracking passes of channel matching: features of training images, looked at before an assignment."""

import copy
import hashlib
import itertools

from torch import nn

from d2kd.data.loader import ResumableLoader
from d2kd.distillers import ChannelMatching
from d2kd.modeling import DistilledModel
from detectron2.engine.train_loop import HookBase

from .checkpoint import share_buffers


class MatchingPass(HookBase):
    """Runs the pass that a `ChannelMatching` with TRACKING "pass" asks for, before the step that it is due at.

    The images come from a stream of their own, so training sees every image that it would have seen. All processes
    take part.
    """

    def __init__(self, model: DistilledModel) -> None:
        """
        Args:
            model: student, teacher and methods, not wrapped for data parallelism.
        """
        self.model = model

    @staticmethod
    def needed_by(model: nn.Module) -> bool:
        """Whether a model has a method that asks for passes."""
        return isinstance(model, DistilledModel) and any(
            isinstance(d, ChannelMatching) and not d.schedule.online for d in model.distillers.values()
        )

    def before_step(self) -> None:
        """Tracks and assigns where that is due."""
        for distiller in self.model.distillers.values():
            if isinstance(distiller, ChannelMatching) and distiller.pass_due:
                self._run(distiller)

    def _run(self, distiller: ChannelMatching) -> None:
        share_buffers(self.model.student)  # or a resumed run, whose processes all have the main one's, would see others
        loader = self._loader(distiller.batches)
        for batched_inputs in itertools.islice(loader, distiller.schedule.batches_per_window):
            distiller.track(*self.model.observe(distiller, batched_inputs))
        distiller.refresh()

    def _loader(self, batches: int) -> ResumableLoader:
        loader = copy.copy(self.trainer.data_loader)
        key = f"{loader.seed},{batches}".encode()
        loader.seed, loader.start = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little"), 0
        return loader
