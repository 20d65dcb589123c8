"""MaskedTeacher: a vision transformer that looks only at what the student attends to ("MaskedKD", arXiv 2302.10494)."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.config import declare_keys
from d2kd.distillers import TapPair
from d2kd.errors import ConfigError
from d2kd.layers import RandomMasks, gather_tokens, keep_most_salient, resample_saliency, scatter_tokens
from d2kd.settings import setting
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..architectures import architecture_of
from ..taps import FeatureTaps
from ..teacher import BatchedInputs, Teacher
from .base import TEACHER_PASSES, TeacherFeatures, TeacherPass
from .saliency import SALIENCIES, Saliency, build_saliency, grid_of, transformer_of

SELECTORS = ("student", "random")

declare_keys(  # TEACHER_PASS "MaskedTeacher" of any method
    "DISTILL.MASKED_TEACHER",
    KEEP_RATIO=setting(0.5, "Share of the teacher's patches that it computes.", above=0, at_most=1),
    KEEP=setting(0, "Number of patches, instead of KEEP_RATIO; 0 = by that.", at_least=0),
    SELECTOR=setting(
        "student",
        "Which patches: student, those that it looks at most | random, as a control.",
        choices=SELECTORS,
    ),
    SALIENCY=setting(
        "auto",
        "What the student looks at: attention, of the class token in its last block (of all patches, without such a "
        "token) | magnitude, of its last map | auto: the first where it has one.",
        choices=SALIENCIES,
    ),
    SEED=setting(0, "Seed of the random selection."),
)


@TEACHER_PASSES.register()
class MaskedTeacher(TeacherPass):
    """Runs a vision transformer of timm, after the student, on the patches that the student looks at most.

    All patches are embedded and get their positions; the others are dropped before the first block. Tokens before the
    patches stay. So it is exact for DeiT (whose class token has a position), DeiT III (whose has none) and CaiT (whose
    enters in the last blocks).
    """

    needs_student = True

    def __init__(
        self,
        teacher: Teacher,
        taps: Iterable[str],
        saliency: Saliency | None,
        *,
        keep_ratio: float = 0.5,
        keep: int = 0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            teacher: an ImageClassifier on a vision transformer of timm.
            taps: "logits" and blocks of it.
            saliency: watches the student; None keeps random patches.
            keep_ratio: share of the patches that are kept, in (0, 1]; at least one is.
            keep: their number, instead of the share; 0 takes that.
            seed: of random patches.

        Raises:
            ConfigError: the teacher is no such network, or has not so many patches.
        """
        super().__init__(teacher, taps)
        network = transformer_of(teacher.model)
        if network is None:
            raise ConfigError(
                "TEACHER_PASS MaskedTeacher drops patches of a vision transformer of timm (DeiT, DeiT III, CaiT, ViT), "
                "and the teacher has none: set it to auto."
            )
        self.network = network
        self.prefix = architecture_of(teacher.model).prefix_tokens(network.blocks[0]) or 0
        self.grid = grid_of(network.patch_embed)
        patches = self.grid[0] * self.grid[1]
        self.keep = keep or max(1, round(keep_ratio * patches))
        if self.keep > patches:
            raise ConfigError(
                f"DISTILL.MASKED_TEACHER.KEEP is {keep}, and the teacher has {patches} patches, "
                f"{self.grid[0]} x {self.grid[1]}."
            )
        self.saliency = saliency
        self.masks = RandomMasks(seed, stream=comm.get_rank())
        self._taps = FeatureTaps(teacher.model, self.taps)
        # the maps are made here, of tokens that are no square any more
        self._of_tokens = {tap.name for tap in self._taps.taps if tap.prefix_tokens is not None}
        self._taps.taps = [tap._replace(prefix_tokens=None) for tap in self._taps.taps]

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: nn.Module, teacher: Teacher, pairs: Iterable[TapPair]
    ) -> "MaskedTeacher":
        """As in the base class, with DISTILL.MASKED_TEACHER.

        Raises:
            ConfigError: teacher or student are not made for it.
        """
        node = cfg.DISTILL.MASKED_TEACHER
        saliency = build_saliency(node.SALIENCY, student) if node.SELECTOR == "student" else None
        taps = [pair.teacher.name for pair in pairs]
        return cls(teacher, taps, saliency, keep_ratio=node.KEEP_RATIO, keep=node.KEEP, seed=node.SEED)

    @property
    def sparse(self) -> bool:
        """Whether a block is tapped, whose map is known at the kept patches only; logits are whole."""
        return bool(self._of_tokens)

    def watch(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context that watches what the student looks at."""
        return contextlib.nullcontext() if self.saliency is None else self.saliency.watch()

    @torch.no_grad()
    def __call__(self, batched_inputs: BatchedInputs, guidance: Any, dense: Mapping[str, Tensor]) -> TeacherFeatures:
        """As in the base class; blocks give maps that are known where patches were kept."""
        kept = self.select(guidance, len(batched_inputs))
        with self._keeping(kept):
            maps = self.teacher.record(batched_inputs, self._taps)
        valid = {}
        for name in self._of_tokens:
            maps[name], valid[name] = scatter_tokens(maps[name], kept, self.grid, self.prefix)
        return TeacherFeatures(maps, valid)

    def select(self, guidance: Any, images: int) -> Tensor:
        """Returns the patches that are kept of each image, (N, K), ascending."""
        if self.saliency is None:
            device = next(self.network.parameters()).device
            scores = self.masks.uniform((images, self.grid[0] * self.grid[1]), device)
        else:
            found, grid = self.saliency(guidance)
            scores = resample_saliency(found, grid, self.grid)
        return keep_most_salient(scores, self.keep)

    @contextlib.contextmanager
    def _keeping(self, kept: Tensor) -> Iterator[None]:
        """Lets the blocks of the network get the kept tokens only."""
        handle = self.network.blocks.register_forward_pre_hook(
            lambda module, args: (gather_tokens(args[0], kept, self.prefix), *args[1:])
        )
        with handle:
            yield

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the sequence of random patches."""
        return {} if self.saliency is not None else self.masks.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues that sequence."""
        self.masks.load_state(dict(state))
