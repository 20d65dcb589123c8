"""A process that builds a model and runs it when it is asked to."""

import contextlib
import ctypes
import gc
import logging
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2kd.errors import UserError
from d2kd.interrupts import raise_interrupts

if TYPE_CHECKING:
    from .measuring import Settings
    from .subjects import Subject


@dataclass(frozen=True)
class Facts:
    """What a model is.

    Attributes:
        parameters: numbers that it has learned; None where a file does not tell.
        multiply_adds: of all images that are measured, on average; None of an exported file.
        file_bytes: of an exported file, or of the weights of a checkpoint without optimizer and distillers.
        sizes: (height, width) of the images as the network sees them.
    """

    parameters: int | None
    multiply_adds: int | None
    file_bytes: int
    sizes: list[tuple[int, int]]


def serve(connection: Connection, subject: "Subject", settings: "Settings") -> None:
    """Answers "start", "images", "batch" and "memory" with (True, answer) or (False, what went wrong)."""
    logging.disable(logging.WARNING)
    model = None
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the other end is closed, or Ctrl-C came
        raise_interrupts()
        while True:
            question = connection.recv()
            try:
                model = _Model(subject, settings) if model is None else model
                connection.send((True, getattr(model, question)()))
            except UserError as error:
                connection.send((False, str(error)))
            except Exception as error:  # is told in one line where the command runs
                text = " ".join((str(error).strip() or type(error).__name__).split())
                connection.send((False, f"{type(error).__name__}: {text[:300]}"))


class _Model:
    """The model, and its inputs."""

    def __init__(self, subject: "Subject", settings: "Settings") -> None:
        import torch

        from d2kd.engine import load_config
        from d2kd.prediction import Predictor

        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.cuda = settings.device.startswith("cuda")
        self.settings = settings
        self.before = _start_counting_memory()
        if subject.exported:
            self.predictor = Predictor.from_file(subject.weights, settings.device, settings.threads)
        else:
            options = [*subject.options, "MODEL.DEVICE", settings.device]
            cfg = load_config(subject.config_file, options, subject.imports, trains=False)
            self.predictor = Predictor.from_config(cfg, subject.weights)
        self.exported, self.file = subject.exported, subject.weights
        self.inputs = [self.predictor.prepare(image) for image in settings.images]

    def start(self) -> Facts:
        """Warms up, and tells what the model is."""
        for _ in range(self.settings.warmup):
            self.run(self.inputs[:1])
        model: Any = self.predictor.model
        if self.exported:
            parameters, work = model.about.get("parameters"), None
            size = os.path.getsize(self.file)
        else:
            parameters = sum(x.numel() for x in model.parameters())
            work = self.multiply_adds()
            size = sum(x.numel() * x.element_size() for x in model.state_dict().values())
        sizes = [(int(x["image"].shape[-2]), int(x["image"].shape[-1])) for x in self.inputs]
        if self.cuda and not self.exported:  # with ONNX Runtime, PyTorch has not started on the GPU: there is none yet
            import torch

            torch.cuda.reset_peak_memory_stats()
        if not self.cuda and not self.exported:  # what loading has taken, of a whole checkpoint, is not the model's
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # glibc keeps what was freed
                ctypes.CDLL(None).malloc_trim(0)
            _start_counting_memory()
        return Facts(parameters, work, size, sizes)

    def multiply_adds(self) -> int:
        """Returns those of convolutions and products of matrices, of an image, on average."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        # of attention in one operator the counter knows some devices' only: here it is products of matrices
        counter, fast = FlopCounterMode(display=False), torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH), counter:
                for inputs in self.inputs:
                    self.run([inputs])
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        return int(counter.get_total_flops() // (2 * len(self.inputs)))

    def images(self) -> list[float]:
        """Returns the seconds of every image, alone."""
        return [self.time(lambda: self.run([inputs])) for inputs in self.inputs]  # noqa: B023

    def batch(self) -> float:
        """Returns the seconds of a batch, of the images in turn."""
        chosen = [self.inputs[i % len(self.inputs)] for i in range(self.settings.batch)]
        return self.time(lambda: self.run(chosen))

    def run(self, inputs: list[dict[str, Any]]) -> None:
        """Runs the network, with all that follows it."""
        import torch

        with torch.no_grad():
            self.predictor.model(inputs)

    def time(self, call: Callable[[], None]) -> float:
        """Returns the seconds of a call, until the device has done its work."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def memory(self) -> int | None:
        """Returns the most bytes that the model has taken since it was built."""
        if self.cuda:
            import torch

            return None if self.exported else int(torch.cuda.max_memory_allocated())
        return max(_most_memory() - self.before, 0)


def _start_counting_memory() -> int:
    """Returns the bytes that this process has, from which on the most is counted."""
    with contextlib.suppress(OSError):  # only Linux forgets what was before
        Path("/proc/self/clear_refs").write_text("5")
    return _most_memory()


def _most_memory() -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if os.uname().sysname == "Darwin" else 1024 * most
