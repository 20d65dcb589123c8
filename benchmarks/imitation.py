#!/usr/bin/env python
"""The loss of standardized FeatureMimic, forward and backward: fused, over the same written out.

    python benchmarks/imitation.py [--batch 2] [--channels 256] [--device cpu]

Both are run in turn on maps of the pyramid of an image; on the CPU it is processor time in one thread. Memory is what
is kept for the backward pass.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import timed
from torch import Tensor

from d2kd.layers import squared_error, standardize, standardized_error


def written_out(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss by its parts."""
    return squared_error(standardize(student), standardize(teacher), "mean")


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss that FeatureMimic uses."""
    return standardized_error(student, teacher, "mean")


def kept(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> int:
    """Returns the bytes of maps that the graph keeps beside its inputs."""
    held: dict[int, int] = {}
    given = {x.untyped_storage().data_ptr() for x in (student, teacher)}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = loss(student, teacher)
    del result
    return sum(held.values())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1216)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    print("| map | written out | fused | ratio | kept, written out | kept, fused |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for stride in (8, 16, 32, 64, 128):
        shape = (args.batch, args.channels, -(-args.height // stride), -(-args.width // stride))
        teacher = torch.randn(shape, device=args.device)
        student = (teacher + torch.randn_like(teacher)).requires_grad_()

        def step(
            loss: Callable[[Tensor, Tensor], Tensor], student: Tensor = student, teacher: Tensor = teacher
        ) -> None:
            student.grad = None
            loss(student, teacher).backward()

        seconds: dict[str, list[float]] = {"written out": [], "fused": []}
        for _ in range(args.repeats + 1):
            for name, loss in (("written out", written_out), ("fused", fused)):
                if args.device == "cpu":
                    start = time.process_time()
                    step(loss)
                    seconds[name].append(time.process_time() - start)
                else:
                    seconds[name].append(timed(lambda loss=loss: step(loss), args.device))
        slow, fast = (1000 * statistics.median(values[1:]) for values in seconds.values())
        memory = [kept(loss, student, teacher) / 2**20 for loss in (written_out, fused)]
        print(
            f"| {' x '.join(map(str, shape))} | {slow:.2f} ms | {fast:.2f} ms | {fast / slow:.2f} | "
            f"{memory[0]:.1f} MiB | {memory[1]:.1f} MiB |"
        )


if __name__ == "__main__":
    main()
