"""MaskedGenerative: the student's masked map must generate the teacher's whole map ("MGD", 2022, arXiv 2205.01529)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from d2kd.layers import MASK_KINDS, RandomMasks, normalize, own_or_runs_seed, squared_error
from d2kd.settings import setting
from detectron2.config import CfgNode
from detectron2.utils import comm

from .base import DISTILLERS, FeatureDistiller
from .taps import TapPair


@DISTILLERS.register()
class MaskedGenerative(FeatureDistiller):
    """The teacher's maps, generated from the student's own, of which a random part is masked ("MGD", arXiv 2205.01529).

    || G(align(S) * M) - T ||^2 with a random mask M and a generation block G of two 3x3 convolutions (eq. 1 to 4).
    The mask is drawn anew for every level and iteration, and comes after the aligner. All positions count, masked or
    not. WEIGHT is the paper's alpha, MASK_RATIO its lambda; NORMALIZE applies to the teacher's map only, as the
    generated map is free to match it.

    Example:
        >>> mgd = MaskedGenerative(pairs=pairs, mask_ratio=0.65, weight=2e-5, normalize="none", reduction="batchmean")
        >>> losses = mgd({"p3": student_map}, {"p3": teacher_map})
    """

    mask_ratio: float = setting(
        0.65, "Share of the positions (or channels) of the student's map that is dropped.", at_least=0, below=1
    )
    mask: str = setting(
        "spatial", "spatial: drop positions of all channels | channel: drop whole channels.", choices=MASK_KINDS
    )
    seed: int = setting(-1, "Seed of the random masks; -1 = SEED of the run.", at_least=-1)

    def __init__(self, *, pairs: Sequence[TapPair], **settings: Any) -> None:
        super().__init__(pairs=pairs, **settings)
        self.masks = RandomMasks(self.seed, stream=comm.get_rank())
        self.align = self.build_aligners()
        self.generation = nn.ModuleList([generation_block(pair.teacher.channels) for pair in self.pairs])

    @classmethod
    def from_config(cls, cfg: CfgNode, pairs: Sequence[TapPair]) -> dict[str, Any]:
        """As in the base class."""
        arguments = super().from_config(cfg, pairs)
        return {**arguments, "seed": own_or_runs_seed(arguments["seed"], cfg.SEED)}

    def level_loss(
        self,
        level: int,
        student: Tensor,
        teacher: Tensor,
        valid: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """As in the base class; `keep` replaces the random mask: (N, 1, H, W) or (N, C, 1, 1), 1 = kept."""
        student = self.align[level](student)
        if keep is None:
            keep = self.masks(student, self.mask_ratio, self.mask)
        generated = self.generation[level](student * keep.to(student.dtype))
        return squared_error(generated, normalize(teacher, self.normalize, valid), self.reduction, valid)

    def in_teacher_channels(self, level: int, student: Tensor) -> Tensor | None:
        """Returns None: the teacher's map is generated from the student's, whose channels are its own."""
        return None

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the position in the sequence of masks, for `state_dict`."""
        return self.masks.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continues the sequence of masks of a checkpoint."""
        self.masks.load_state(state)


def generation_block(channels: int) -> nn.Sequential:
    """Returns two 3x3 convolutions with a ReLU between them, no norm, as in the paper's section 3.2."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )
