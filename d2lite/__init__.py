"""d2lite: the part of Detectron2's public API that d2kd needs, in pure Python on PyTorch and torchvision."""

from d2lite.alias import explain_left_out

__version__ = "0.1.0"

explain_left_out()
