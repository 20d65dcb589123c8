"""ReceptiveTokens ("MasKD", 2023), the second stage: the method, its tokens, and the first stage's file."""

from .distiller import ReceptiveTokens
from .learn_settings import LearnSettings
from .token_file import LearnedLevel, TokenFile, TokenFileError

__all__ = ["LearnSettings", "LearnedLevel", "ReceptiveTokens", "TokenFile", "TokenFileError"]
