"""Architectures that Detectron2 lacks, or has no YAML for; importing registers them."""

from .fcos import FCOS

__all__ = ["FCOS"]
