"""The registry of proposal generators, and building one from a config."""

from torch import nn

from d2lite.config import CfgNode
from d2lite.layers import ShapeSpec
from d2lite.utils.registry import Registry

PROPOSAL_GENERATOR_REGISTRY = Registry("PROPOSAL_GENERATOR")
"""Modules that turn images and features into region proposals.

Called as `cls(cfg, input_shape)` with `input_shape` a dict of feature name to `ShapeSpec`.
"""


def build_proposal_generator(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module | None:
    """Builds the generator named by `cfg.MODEL.PROPOSAL_GENERATOR.NAME` for features of `input_shape`.

    Returns None for "PrecomputedProposals": proposals then come with the input.
    """
    wanted = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if wanted == "RRPN":
        message = "d2lite leaves out rotated boxes; install Detectron2 to use them."
        raise NotImplementedError(f"MODEL.PROPOSAL_GENERATOR.NAME is RRPN: {message}")
    if wanted == "PrecomputedProposals":
        return None
    return PROPOSAL_GENERATOR_REGISTRY.build(wanted, cfg, input_shape)
