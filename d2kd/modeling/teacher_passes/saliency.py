"""What a student looks at: the attention of its last block, the scores of its head, or the strength of its last map."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.errors import ConfigError
from d2kd.layers import attention_saliency, ranks_of, resample_saliency

from ..architectures import architecture_of
from ..taps import FeatureTaps, describe_taps
from .sparse_vit import position_bias, vit_of

#: Values of `DISTILL.MASKED_TEACHER.SALIENCY`.
SALIENCIES = ("auto", "attention", "evidence", "magnitude", "both")
#: Queries whose attention stands for that of all, in a transformer without a class token.
MAX_QUERIES = 256


#: Height and width in pixels of the images of a batch, without padding; None where there is no padding.
Sizes = Sequence[tuple[int, int]] | None


class Saliency:
    """Watches a student's forward pass, and says how much it looks at each cell of a grid."""

    def watch(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context for the forward pass; what it yields is what `__call__` takes."""
        raise NotImplementedError

    def __call__(self, seen: Any, sizes: Sizes = None) -> tuple[Tensor, float]:
        """Returns the saliency, (N, H, W), without gradient and in float32, and its stride in pixels.

        Args:
            seen: what the context has yielded.
            sizes: of the images. What lies in the padding beyond them may have any saliency.
        """
        raise NotImplementedError


class _Recorded(Saliency):
    """Watches by taps."""

    def __init__(self, taps: FeatureTaps) -> None:
        """
        Args:
            taps: of the student.
        """
        self.taps = taps

    def watch(self) -> contextlib.AbstractContextManager[Mapping[str, Tensor]]:
        """Returns the context of the taps."""
        return self.taps.recording()


class AttentionSaliency(Saliency):
    """The attention of the last block of a vision transformer of timm: of its class token, if it has one.

    Of that block only queries and keys are needed, and of the class token's row only: it may stay fused.
    """

    def __init__(self, network: Any) -> None:
        """
        Args:
            network: timm's.
        """
        self.attention: Any = network.blocks[-1].attn
        self.patches: Any = network.patch_embed
        self.prefix = int(getattr(network, "num_prefix_tokens", 0))

    def watch(self) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        """Yields a dict with "qkv"."""
        return _outputs_of(self.attention.qkv)

    def __call__(self, seen: dict[str, Tensor], sizes: Sizes = None) -> tuple[Tensor, float]:
        """As in the base class."""
        attention, qkv = self.attention, seen["qkv"]
        query, key, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        with torch.no_grad():
            query, key = attention.q_norm(query), attention.k_norm(key)
        scores = attention_saliency(query, key, attention.scale, self.prefix)
        return scores.unflatten(1, grid_of(self.patches)), float(self.patches.patch_size[0])


class ReceivedAttention(Saliency):
    """How much the patches of Detectron2's plain vision transformer are attended to in its last global block.

    That is the mean over heads and queries of the image, by at most `MAX_QUERIES` of these, evenly spread: patches of
    the padding have no say.
    """

    def __init__(self, network: Any) -> None:
        """
        Args:
            network: Detectron2's `ViT`.

        Raises:
            ConfigError: it has no global block.
        """
        blocks = [block for block in network.blocks if not block.window_size]
        if not blocks:
            raise ConfigError(
                "DISTILL.MASKED_TEACHER.SALIENCY is attention, and the student's transformer has windows only "
                "(MODEL.VIT.WINDOW_BLOCK_INDEXES): set it to evidence or magnitude."
            )
        self.attention: Any = blocks[-1].attn
        self.stride = float(network.patch_embed.proj.stride[0])

    def watch(self) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        """Yields a dict with "qkv", and the map that it is of."""
        return _outputs_of(self.attention.qkv)

    @torch.no_grad()
    def __call__(self, seen: dict[str, Tensor], sizes: Sizes = None) -> tuple[Tensor, float]:
        """As in the base class."""
        n, rows, columns, _ = seen["x"].shape
        qkv = seen["qkv"].reshape(n, rows * columns, 3, self.attention.num_heads, -1).float()
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        places = self._queries(sizes or [], n, (rows, columns)).to(query.device)
        chosen = places[..., 0] * columns + places[..., 1]
        query = query.gather(2, chosen[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        with torch.autocast(query.device.type, enabled=False):
            logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
            if self.attention.use_rel_pos:
                everywhere = torch.arange(rows * columns, device=query.device)
                of_keys = torch.stack([everywhere // columns, everywhere % columns], dim=-1).expand(n, -1, -1)
                logits += position_bias(self.attention, query, places, of_keys, (rows, columns))
        return logits.softmax(-1).mean((1, 2)).unflatten(1, (rows, columns)), self.stride

    def _queries(self, sizes: Sequence[tuple[int, int]], images: int, grid: tuple[int, int]) -> Tensor:
        """Returns rows and columns, (N, K, 2), of queries that are evenly spread over the patches of each image."""
        held = [tuple(min(g, math.ceil(s / self.stride)) for g, s in zip(grid, size)) for size in sizes]
        width = torch.tensor([columns for _, columns in held or [grid] * images])[:, None]
        number = torch.tensor([rows * columns for rows, columns in held or [grid] * images])[:, None]
        count = min(MAX_QUERIES, int(number.min()))
        places = torch.arange(count) * number // count
        return torch.stack([places // width, places % width], dim=-1)


class EvidenceSaliency(_Recorded):
    """What a dense head finds at each place.

    In detectors that is the best score of any class, over all levels and anchors, and in R-CNNs the best objectness; in
    segmentors the entropy of the classes of a pixel, in nats, which is large where the student is undecided.
    """

    def __init__(self, student: nn.Module) -> None:
        """
        Args:
            student: a model whose architecture has `evidence`.
        """
        found = architecture_of(student).evidence()
        self.of_pixels = {p.tap for p in found if p.location == "pixel"}
        self.strides = {tap: info.stride for tap, info in describe_taps(student, [p.tap for p in found]).items()}
        super().__init__(FeatureTaps(student, list(self.strides)))

    @torch.no_grad()
    def __call__(self, seen: Mapping[str, Tensor], sizes: Sizes = None) -> tuple[Tensor, float]:
        """As in the base class, at the stride of the finest level."""
        best = {tap: self._evidence(tap, seen[tap].detach().float()) for tap in self.strides}
        finest = min(self.strides, key=lambda tap: self.strides[tap])
        grid = (best[finest].shape[-2], best[finest].shape[-1])
        maps = [resample_saliency(best[t], s / self.strides[finest], grid) for t, s in self.strides.items()]
        return torch.stack(maps).amax(0), self.strides[finest]

    def _evidence(self, tap: str, logits: Tensor) -> Tensor:
        if tap in self.of_pixels:
            return torch.special.entr(logits.softmax(1)).sum(1)
        return logits.amax(1).sigmoid()


class MagnitudeSaliency(_Recorded):
    """The mean over channels of the absolute values in a map of stride 16, or else the coarsest of the backbone."""

    def __init__(self, student: nn.Module) -> None:
        """
        Args:
            student: with a backbone that gives maps.
        """
        shapes = architecture_of(student).feature_shapes()
        name = next((name for name, shape in shapes.items() if shape.stride == 16), list(shapes)[-1])
        self.stride = float(shapes[name].stride or 1)
        super().__init__(FeatureTaps(student, [name]))

    @torch.no_grad()
    def __call__(self, seen: Mapping[str, Tensor], sizes: Sizes = None) -> tuple[Tensor, float]:
        """As in the base class."""
        (maps,) = seen.values()
        return maps.detach().float().abs().mean(1), self.stride


class RankedSaliency(Saliency):
    """The mean of the ranks of two saliencies: their scales need not fit, and single peaks do not outshine the rest."""

    def __init__(self, first: Saliency, second: Saliency) -> None:
        """
        Args:
            first: its grid is that of the result.
            second: is brought to that grid.
        """
        self.first, self.second = first, second

    @contextlib.contextmanager
    def watch(self) -> Iterator[tuple[Any, Any]]:
        """Yields what both have seen."""
        with self.first.watch() as first, self.second.watch() as second:
            yield first, second

    def __call__(self, seen: tuple[Any, Any], sizes: Sizes = None) -> tuple[Tensor, float]:
        """As in the base class, in (0, 1)."""
        (first, stride), (second, other) = self.first(seen[0], sizes), self.second(seen[1], sizes)
        second = resample_saliency(second, other / stride, (first.shape[1], first.shape[2]))
        ranks = [ranks_of(maps.flatten(1)).view(first.shape) for maps in (first, second)]
        return (ranks[0] + ranks[1]) / 2, stride


def build_saliency(kind: str, student: nn.Module) -> Saliency:
    """Returns what watches a student.

    Args:
        kind: of `SALIENCIES`; "auto" takes the first of the others that the student has.
        student: the model.

    Raises:
        ConfigError: it has not what is asked for.
    """
    if kind == "both":
        return RankedSaliency(build_saliency("evidence", student), _without_evidence(student))
    architecture, attention = architecture_of(student), _attention(student) if kind in ("auto", "attention") else None
    if attention is not None:
        return attention
    if kind in ("auto", "evidence") and architecture.evidence():
        return EvidenceSaliency(student)
    if kind in ("auto", "magnitude") and architecture.feature_shapes():
        return MagnitudeSaliency(student)
    has = {
        "attention": "is no vision transformer whose last block has queries and keys for all tokens",
        "evidence": "has no head that scores every place",
    }
    raise ConfigError(
        f"DISTILL.MASKED_TEACHER.SALIENCY is {kind}, and the student "
        f"{has.get(kind, 'has a backbone that gives no maps that d2kd knows')}: choose another one."
    )


def _attention(student: nn.Module) -> Saliency | None:
    network, detector = transformer_of(student), vit_of(student)
    if detector is not None:
        return ReceivedAttention(detector)
    if network is not None and hasattr(getattr(network.blocks[-1], "attn", None), "q_norm"):
        return AttentionSaliency(network)
    return None


def _without_evidence(student: nn.Module) -> Saliency:
    return _attention(student) or build_saliency("magnitude", student)


@contextlib.contextmanager
def _outputs_of(projection: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that the next pass of a module fills: "x", what it gets, and "qkv", what it gives."""
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(x=args[0].detach(), qkv=output.detach())

    with projection.register_forward_hook(note):
        yield seen


def transformer_of(model: nn.Module) -> Any | None:
    """Returns the vision transformer of timm in a model: a module with `patch_embed` and `blocks`; None without."""
    for module in model.modules():
        blocks = getattr(module, "blocks", None)
        if hasattr(module, "patch_embed") and isinstance(blocks, nn.Sequential) and len(blocks):
            return module
    return None


def grid_of(patch_embed: Any) -> tuple[int, int]:
    """Returns how many patches an image has, (H, W)."""
    height, width = patch_embed.grid_size
    return int(height), int(width)
