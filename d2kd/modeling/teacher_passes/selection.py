"""Which patches a masked teacher computes: what must be kept, what is explored, and what the student looks at most."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d2kd.layers import ranks_of

#: Share of the kept patches that objects may take.
MOST_OF_OBJECTS = 0.5


class Selection(NamedTuple):
    """How patches are chosen; see the keys of DISTILL.MASKED_TEACHER."""

    keep_ratio: float = 0.5
    keep: int = 0
    explore: float = 0.0
    must_keep: bool = False
    window_floor: int = 0
    unit: str = "token"

    def number(self, available: int) -> int:
        """Returns how many of the available patches are kept: at least one, at most all."""
        return max(1, min(available, self.keep or round(self.keep_ratio * available)))


def select(
    how: Selection,
    scores: Tensor,
    valid: Tensor,
    *,
    objects: Tensor | None = None,
    random: Tensor | None = None,
    window: int = 0,
    available: int | None = None,
) -> Tensor:
    """Returns the patches that are kept of each image, (N, K), ascending; the same number of each.

    Args:
        how: the numbers.
        scores: (N, H, W), larger is better.
        valid: (N, H, W) bool, False for patches that lie wholly in the padding: these are never kept.
        objects: (N, H, W) bool, patches of objects, with `must_keep`.
        random: (N, H, W) in [0, 1), for what is explored.
        window: side of the windows of the teacher in patches, for `window_floor` and the unit "window".
        available: valid patches of the image that has the fewest; None counts them, for which the host waits.
    """
    keep = how.number(int(valid.flatten(1).sum(1).min()) if available is None else available)
    # ranks in (0, 1), so that what is kept for another reason can be set above all of them
    rank = ranks_of(scores.flatten(1)).view(scores.shape)
    if how.unit == "window" and window:
        rank = _by_window(rank, valid, window)
    priority = rank.masked_fill(~valid, -1.0)
    if how.window_floor and window:
        priority = priority + 1.0 * (_first_of_windows(priority, valid, window, how.window_floor))
    if how.explore and random is not None:
        chosen = _top(random.masked_fill(~valid, -1.0), round(how.explore * keep))
        priority = priority + 2.0 * (chosen & valid)
    if how.must_keep and objects is not None:
        chosen = _top(rank.masked_fill(~(objects & valid), -1.0), int(MOST_OF_OBJECTS * keep))
        priority = priority + 4.0 * (chosen & objects & valid)
    return priority.flatten(1).topk(keep, dim=1).indices.sort(1).values


def _top(scores: Tensor, number: int) -> Tensor:
    """(N, H, W) bool: the `number` largest of each image."""
    flat = scores.flatten(1)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    return chosen.scatter_(1, flat.topk(min(number, flat.shape[1]), dim=1).indices, True).view(scores.shape)


def _windows(maps: Tensor, window: int, fill: float) -> Tensor:
    """(N, H, W) -> (N, windows, window * window), padded."""
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (0, -width % window, 0, -height % window), value=fill)
    return padded.unfold(1, window, window).unfold(2, window, window).flatten(3).flatten(1, 2)


def _from_windows(windows: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    rows, columns = -(-size[0] // window), -(-size[1] // window)
    maps = windows.view(-1, rows, columns, window, window).transpose(2, 3).reshape(-1, rows * window, columns * window)
    return maps[:, : size[0], : size[1]]


def _by_window(rank: Tensor, valid: Tensor, window: int) -> Tensor:
    """Ranks of whole windows, by the mean of the better half of their patches; within one, that of the patches."""
    values = _windows(rank.masked_fill(~valid, 0.0), window, 0.0)
    half = max(1, window * window // 2)
    score = values.topk(half, dim=2).values.mean(2)
    of_window = ranks_of(score)[..., None] + values / (values.shape[1] + 1) / 2
    return _from_windows(of_window, window, (rank.shape[1], rank.shape[2])).clamp(max=0.999)


def _first_of_windows(priority: Tensor, valid: Tensor, window: int, floor: int) -> Tensor:
    """(N, H, W) bool: the best `floor` patches of every window."""
    values = _windows(priority, window, -1.0)
    best = values.topk(min(floor, values.shape[2]), dim=2).indices
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter_(2, best, True)
    return _from_windows(chosen, window, (priority.shape[1], priority.shape[2])) & valid


def patches_of_objects(boxes: Sequence[Any], grid: tuple[int, int], patch: int, dilation: int = 1) -> Tensor:
    """Returns which patches lie in a box, or next to one.

    Args:
        boxes: of each image, (B, 4) tensors: left, top, right and bottom in pixels of the image that the model gets.
        grid: rows and columns of the patches.
        patch: their side in pixels.
        dilation: patches around.

    Returns:
        (N, rows, columns) bool.
    """
    maps = []
    for of_image in boxes:
        rows = torch.arange(grid[0], device=of_image.device)
        columns = torch.arange(grid[1], device=of_image.device)
        low = (of_image[:, :2] / patch).floor() - dilation
        high = (of_image[:, 2:] / patch).ceil() + dilation
        tall = (rows >= low[:, 1:2]) & (rows < high[:, 1:2])
        wide = (columns >= low[:, 0:1]) & (columns < high[:, 0:1])
        maps.append((tall[:, :, None] & wide[:, None, :]).any(0))
    return torch.stack(maps)


def fewest_patches(sizes: Sequence[tuple[int, int]], grid: tuple[int, int], patch: int) -> int:
    """Returns how many of `valid_patches` the image has that has the fewest."""
    return min(min(-(-height // patch), grid[0]) * min(-(-width // patch), grid[1]) for height, width in sizes)


def valid_patches(sizes: Sequence[tuple[int, int]], grid: tuple[int, int], patch: int, device: Any) -> Tensor:
    """Returns which patches hold pixels of their image, (N, rows, columns) bool.

    Args:
        sizes: height and width of each image in pixels, without padding.
        grid: rows and columns of the patches.
        patch: their side in pixels.
        device: of the result.
    """
    rows, columns = torch.arange(grid[0], device=device) * patch, torch.arange(grid[1], device=device) * patch
    return torch.stack([(rows < height)[:, None] & (columns < width)[None] for height, width in sizes])
