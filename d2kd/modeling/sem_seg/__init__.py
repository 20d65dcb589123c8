"""Segmentation heads that Detectron2 lacks; importing registers them."""

from .linear import LinearSemSegHead

__all__ = ["LinearSemSegHead"]
