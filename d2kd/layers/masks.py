"""Random masks, reproducible without keeping a generator's state."""

from typing import Any

import torch
from torch import Tensor

from d2kd.rng import derive_seed

#: What a mask drops: positions of all channels, or whole channels.
MASK_KINDS = ("spatial", "channel")


def own_or_runs_seed(own: int, runs: int) -> int:
    """Returns the seed of a part of a run: its own one, or where that is negative the run's.

    A run whose seed is negative too has one by chance, PyTorch's.
    """
    return own if own >= 0 else runs if runs >= 0 else torch.initial_seed()


class RandomMasks:
    """Draws keep-masks on the features' device; all of its state is one counter.

    Every draw reseeds a generator with a mixture of (seed, stream, number of the draw). So a run that is resumed draws
    what it would have drawn, on every process, and the global random state is left alone. Processes differ by `stream`.
    """

    def __init__(self, seed: int = 0, stream: int = 0) -> None:
        self.seed = seed
        self.stream = stream
        self.draws = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, like: Tensor, drop: float, kind: str) -> Tensor:
        """Draws one mask for a feature map.

        Args:
            like: (N, C, H, W); gives shape, device and type.
            drop: share of the elements that is set to zero, 0 to 1.
            kind: "spatial" draws (N, 1, H, W), shared by all channels; "channel" draws (N, C, 1, 1).

        Returns:
            The mask in the type of `like`: 1 = kept, 0 = dropped. Nothing is rescaled.
        """
        n, c, h, w = like.shape
        shape = (n, 1, h, w) if kind == "spatial" else (n, c, 1, 1)
        return keep_mask(self.uniform(shape, like.device), drop, kind).to(like.dtype)

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Draws numbers in [0, 1) of a shape."""
        return torch.rand(shape, generator=self._next_generator(device), device=device)

    def _next_generator(self, device: torch.device) -> torch.Generator:
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        # neighboring seeds would give correlated streams on some devices, hence a digest of the three numbers
        seed = derive_seed(self.seed, self.stream, self.draws, num_bytes=7)
        self.draws += 1
        return generator.manual_seed(seed)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint needs to continue the sequence: plain integers."""
        return {"seed": self.seed, "draws": self.draws}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues a saved sequence; the stream stays this process's own."""
        self.seed, self.draws = int(state["seed"]), int(state["draws"])


def keep_mask(uniform: Tensor, drop: float, kind: str) -> Tensor:
    """Returns the boolean keep-mask of uniform draws in [0, 1), with the thresholds of the method's official code.

    Spatial masks keep R <= 1 - drop, channel masks keep R >= drop; a value on the threshold is kept in both.
    """
    return uniform <= 1.0 - drop if kind == "spatial" else uniform >= drop
