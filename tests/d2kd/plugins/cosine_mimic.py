"""A method of a stranger, with a setting of its own."""

import torch
from torch import Tensor, nn

from d2kd.distillers import DISTILLERS, Distiller, TapPair
from d2kd.distillers.taps import build_aligner
from d2kd.settings import setting


@DISTILLERS.register()
class CosineMimic(Distiller):
    """1 minus the cosine of the two vectors at each position."""

    power: float = setting(1.0, "Exponent of the distance.", above=0, at_most=4)

    def __init__(self, *, pairs: list[TapPair], **settings: object) -> None:
        super().__init__(pairs=pairs, **settings)
        self.align = nn.ModuleList([build_aligner(pair) for pair in self.pairs])

    def level_loss(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        distance = 1 - torch.cosine_similarity(self.align[level](student), teacher)
        return distance.clamp(min=0).pow(self.power).mean()
