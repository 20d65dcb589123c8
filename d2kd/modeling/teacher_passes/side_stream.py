"""The teacher on a CUDA stream of its own, beside the student: `DISTILL.TEACHER.STREAM`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """A block whose work on the GPU follows what was queued before it, and goes on beside what is queued after it.

    >>> with side_stream:
    ...     features = teacher(images)
    >>> losses = student(images)
    >>> side_stream.join(features.values())  # from here on they may be read

    Where it is not enabled, or there is no CUDA, it is any block.
    """

    def __init__(self, enabled: bool) -> None:
        """
        Args:
            enabled: whether to use CUDA's streams at all.
        """
        self._enabled = enabled and torch.cuda.is_available()
        self._stream: torch.cuda.Stream | None = None
        self._block: Any = None

    def __enter__(self) -> None:
        if self._enabled:
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            self._block = torch.cuda.stream(self._stream)
            self._block.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._enabled:
            self._block.__exit__(*error)

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Lets what is queued from here on wait for the block.

        Args:
            tensors: that were made in the block, and are read after it.
        """
        if self._stream is None:
            return
        current = torch.cuda.current_stream()
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)  # else the block's next work could take its memory while it is read
