"""Models and their parts: backbones, proposal generators, heads and whole detectors and segmentors."""

from d2lite.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, build_anchor_generator
from d2lite.modeling.postprocessing import detector_postprocess

__all__ = ["ANCHOR_GENERATOR_REGISTRY", "build_anchor_generator", "detector_postprocess"]
