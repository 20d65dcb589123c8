"""What channel matching remembers of the features: sums over images, the same on every process."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detectron2.utils import comm

from ..taps import TapPair
from .similarity import channel_distances


class MatchingStatistics(nn.Module):
    """Channel distances of every pair of maps, and the teacher's negative values where no norm tells their mean.

    All of it lies in one buffer: one transfer between processes a batch, and one entry in a checkpoint.
    """

    sums: Tensor

    def __init__(self, pairs: Sequence[TapPair]) -> None:
        super().__init__()
        self.shapes = [(p.student.channels, p.teacher.channels) for p in pairs]
        self.with_norm = [p.teacher.norm is not None for p in pairs]
        sizes = [(s * t, 0 if norm else 2 * t) for (s, t), norm in zip(self.shapes, self.with_norm)]
        self.sizes = [size for level in sizes for size in level] + [1]
        self.register_buffer("sums", torch.zeros(sum(self.sizes), dtype=torch.float64))

    @torch.no_grad()
    def add(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
        """Adds a batch of maps (N, C, H, W) of every level, of all processes.

        A batch whose maps are not finite is left out: whatever stops the run for it must not leave broken sums behind.
        """
        parts = []
        for s, t, norm in zip(students, teachers, self.with_norm):
            parts.append(channel_distances(s, t).flatten())
            if not norm:
                parts += [t.clamp(max=0).sum((0, 2, 3), dtype=parts[0].dtype), (t < 0).sum((0, 2, 3))]
        images = parts[0].new_full((1,), len(students[0]))  # a number copied to a GPU would make the host wait
        batch = torch.cat([*parts, images])
        if comm.get_world_size() > 1:
            dist.all_reduce(batch)
        finite = batch.sum().isfinite()
        self.sums += batch.nan_to_num_(0.0, 0.0, 0.0).mul_(finite)

    def cost(self, level: int) -> Tensor:
        """Returns the sum of the distances, (Cs, Ct) in float64."""
        return self._part(2 * level).view(self.shapes[level])

    def mean_negative(self, level: int) -> Tensor:
        """Returns the mean of a teacher channel's negative values, (Ct,); 0 where there are none."""
        total, count = self._part(2 * level + 1).view(2, -1)
        return total / count.clamp(min=1)

    @property
    def images(self) -> int:
        """Images so far, of all processes."""
        return int(self.sums[-1])

    def reset(self) -> None:
        """Forgets everything."""
        self.sums.zero_()

    def _part(self, number: int) -> Tensor:
        return self.sums.split(self.sizes)[number]
