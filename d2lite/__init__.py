"""d2lite: the part of Detectron2's public API that d2kd needs, in pure Python on PyTorch and torchvision."""

__version__ = "0.1.0"
