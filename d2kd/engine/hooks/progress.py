"""When the log and the files of metrics are written: every so many iterations, and the first signs of life."""

from collections.abc import Sequence

from detectron2.engine import hooks
from detectron2.utils.events import CommonMetricPrinter, EventWriter

from ..writers import DistillPrinter

#: Iterations of this process, counted from 1, whose losses go to the log at once.
_FIRST = (1, 5)


class ProgressWriter(hooks.PeriodicWriter):
    """Detectron2's hook; the log (but no file of metrics) also gets a line after the first and the fifth iteration.

    So one sees at once that a training runs, and how fast; also one that is resumed.
    """

    def __init__(self, writers: Sequence[EventWriter], period: int = 20) -> None:
        """
        Args:
            writers: each has `write` and `close`.
            period: in iterations.
        """
        super().__init__(writers, period=period)
        self._every = period
        self._printers = [writer for writer in writers if isinstance(writer, (CommonMetricPrinter, DistillPrinter))]
        self._files = [writer for writer in writers if writer not in self._printers]

    def write_files(self) -> None:
        """Writes what is new to the files of metrics now."""
        for writer in self._files:
            writer.write()

    def after_step(self) -> None:
        """Writes where it is time."""
        super().after_step()
        done = self.trainer.iter + 1
        written = done % self._every == 0 or done == self.trainer.max_iter
        if done - self.trainer.start_iter in _FIRST and not written:
            for printer in self._printers:
                printer.write()
