"""d2lite: the part of Detectron2's public API that d2kd needs, in pure Python on PyTorch and torchvision."""

import warnings

from d2lite.alias import explain_left_out

__version__ = "0.1.0"

explain_left_out()
# fvcore scripts its losses when it is imported, which recent versions of torch comment on at every start of a program
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=Warning)
