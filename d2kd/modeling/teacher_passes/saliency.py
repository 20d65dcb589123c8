"""What a student looks at: the attention of its last block, or the strength of its last map."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.errors import ConfigError
from d2kd.layers import attention_saliency

from ..architectures import architecture_of
from ..taps import FeatureTaps

#: Values of `DISTILL.MASKED_TEACHER.SALIENCY`.
SALIENCIES = ("auto", "attention", "magnitude")


class Saliency:
    """Watches a student's forward pass, and says how much it looks at each cell of a grid."""

    def watch(self) -> contextlib.AbstractContextManager[dict[str, Any]]:
        """Returns a context for the forward pass; what it yields is what `__call__` takes."""
        raise NotImplementedError

    def __call__(self, seen: dict[str, Any]) -> tuple[Tensor, tuple[int, int]]:
        """Returns the saliency, (N, H * W), without gradient and in float32, and its grid (H, W)."""
        raise NotImplementedError


class AttentionSaliency(Saliency):
    """The attention of the last block of a vision transformer of timm: of its class token, if it has one."""

    def __init__(self, network: Any) -> None:
        """
        Args:
            network: timm's.
        """
        self.attention: Any = network.blocks[-1].attn
        self.patches: Any = network.patch_embed
        self.prefix = int(getattr(network, "num_prefix_tokens", 0))

    @contextlib.contextmanager
    def watch(self) -> Iterator[dict[str, Any]]:
        """Yields a dict with "qkv", of which all that is needed follows: the block itself may stay fused."""
        seen: dict[str, Any] = {}
        handle = self.attention.qkv.register_forward_hook(lambda m, args, output: seen.update(qkv=output.detach()))
        with handle:
            yield seen

    def __call__(self, seen: dict[str, Any]) -> tuple[Tensor, tuple[int, int]]:
        """As in the base class."""
        attention, qkv = self.attention, seen["qkv"]
        n, tokens, _ = qkv.shape
        query, key, _ = qkv.reshape(n, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        with torch.no_grad():
            query, key = attention.q_norm(query), attention.k_norm(key)
        return attention_saliency(query, key, attention.scale, self.prefix), grid_of(self.patches)


class MagnitudeSaliency(Saliency):
    """The mean over channels of the absolute values in the coarsest map of a student's backbone."""

    def __init__(self, student: nn.Module) -> None:
        """
        Args:
            student: with a backbone that gives maps.
        """
        self.taps = FeatureTaps(student, [list(architecture_of(student).feature_shapes())[-1]])

    def watch(self) -> contextlib.AbstractContextManager[dict[str, Any]]:
        """Returns the context of the tap."""
        return self.taps.recording()

    @torch.no_grad()
    def __call__(self, seen: dict[str, Any]) -> tuple[Tensor, tuple[int, int]]:
        """As in the base class."""
        (maps,) = seen.values()
        return maps.detach().float().abs().mean(1).flatten(1), (maps.shape[-2], maps.shape[-1])


def build_saliency(kind: str, student: nn.Module) -> Saliency:
    """Returns what watches a student.

    Args:
        kind: of `SALIENCIES`; "auto" takes the attention where there is one.
        student: the model.

    Raises:
        ConfigError: it has not what is asked for.
    """
    network = transformer_of(student)
    attends = network is not None and hasattr(getattr(network.blocks[-1], "attn", None), "q_norm")
    if kind == "attention" and not attends:
        raise ConfigError(
            "DISTILL.MASKED_TEACHER.SALIENCY is attention, and the student is no vision transformer of timm "
            "(MODEL.TIMM.NAME) whose last block has queries and keys for all tokens: set it to auto or magnitude."
        )
    if attends and kind != "magnitude":
        return AttentionSaliency(network)
    if not architecture_of(student).feature_shapes():
        raise ConfigError(
            "DISTILL.MASKED_TEACHER.SALIENCY is magnitude, and the student's backbone gives no maps that d2kd knows: "
            "set it to attention."
        )
    return MagnitudeSaliency(student)


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
