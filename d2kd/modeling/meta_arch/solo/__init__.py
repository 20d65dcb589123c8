"""SOLO (arXiv 1912.04488): instances by location, a mask for every cell of a grid."""

from .head import DecoupledSOLOHead, SOLOHead
from .model import SOLO

__all__ = ["SOLO", "DecoupledSOLOHead", "SOLOHead"]
