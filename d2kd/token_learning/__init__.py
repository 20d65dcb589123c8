"""Learning receptive tokens on a teacher's own task: the first stage of ReceptiveTokens, beside distillation."""

from .config import learning_config
from .learner import LevelMasks, TokenLearner
from .trainer import TokenTrainer

__all__ = ["LevelMasks", "TokenLearner", "TokenTrainer", "learning_config"]
