"""Measures models in turn, each in a process of its own: others' memory is not counted, and drift hits all alike."""

import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from d2kd.interrupts import held_back_in_new_processes

from .subjects import Subject, SubjectError
from .worker import Facts, serve

#: Seconds that a process may take to end.
_PATIENCE = 10


@dataclass(frozen=True)
class Settings:
    """How models are measured.

    Attributes:
        device: "cpu", "cuda", ...
        threads: of the CPU; 0 leaves it to PyTorch and ONNX Runtime.
        batch: images at once, for the throughput.
        rounds: how often every model runs all images.
        warmup: runs of every model that do not count.
        images: paths, or uint8 (H, W, 3) BGR.
    """

    device: str = "cpu"
    threads: int = 0
    batch: int = 8
    rounds: int = 10
    warmup: int = 3
    images: Sequence[str | np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class Measurement:
    """What a model costs.

    Attributes:
        subject: the model.
        facts: what does not depend on time.
        seconds: of one image each, from the prepared input to the detections, all rounds.
        batch_seconds: of a batch each.
        batch: images in it.
        memory: most bytes that weights and computation have taken, with batches; None where that is unknown.
    """

    subject: Subject
    facts: Facts
    seconds: Sequence[float]
    batch_seconds: Sequence[float]
    batch: int
    memory: int | None

    @property
    def median(self) -> float:
        """Median latency of an image, in milliseconds."""
        return 1000 * statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """Latency that 95 % of the images do not exceed, in milliseconds."""
        return 1000 * float(np.percentile(self.seconds, 95, method="higher"))

    @property
    def throughput(self) -> float:
        """Images a second, in batches."""
        return self.batch / statistics.median(self.batch_seconds)

    def as_json(self) -> dict[str, Any]:
        """Returns the content of a benchmark.json."""
        return {
            "name": self.subject.name,
            "runtime": self.subject.runtime,
            "latency_ms": {"median": self.median, "p95": self.p95, "runs": len(self.seconds)},
            "images_per_second": self.throughput,
            "batch": self.batch,
            "memory_bytes": self.memory,
            **asdict(self.facts),
        }


def measure(subjects: Sequence[Subject], settings: Settings) -> list[Measurement]:
    """Measures models in turn: in each round every one runs every image once, and then a batch.

    Raises:
        SubjectError: one cannot be built or run.
    """
    with ExitStack() as stack:
        # one after the other: two that are built at a time would need the memory of both
        workers = [stack.enter_context(_worker(subject, settings)) for subject in subjects]
        facts = [worker.ask("start") for worker in workers]
        seconds: list[list[float]] = [[] for _ in workers]
        batches: list[list[float]] = [[] for _ in workers]
        for _ in range(settings.rounds):
            for worker, singles, together in zip(workers, seconds, batches):
                singles += worker.ask("images")
                together.append(worker.ask("batch"))
        memory = [worker.ask("memory") for worker in workers]
    return [
        Measurement(subject, fact, singles, together, settings.batch, most)
        for subject, fact, singles, together, most in zip(subjects, facts, seconds, batches, memory)
    ]


class _Worker:
    """A process that has built a model."""

    def __init__(self, subject: Subject, connection: Connection) -> None:
        self.subject, self.connection = subject, connection

    def ask(self, what: str) -> Any:
        """Returns the answer of the process.

        Raises:
            SubjectError: it has failed, or ended.
        """
        try:
            self.connection.send(what)
            found, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise SubjectError(f"{self.subject.name}: its process has ended; is there memory enough?") from error
        if not found:
            raise SubjectError(f"{self.subject.name}: {answer}")
        return answer


@contextmanager
def _worker(subject: Subject, settings: Settings) -> Iterator[_Worker]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, subject, settings), daemon=True)
    with held_back_in_new_processes():
        process.start()
    there.close()
    try:
        yield _Worker(subject, here)
    except KeyboardInterrupt:
        process.kill()  # it may be importing, or in the middle of a round
        raise
    finally:
        here.close()  # which ends the process
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
