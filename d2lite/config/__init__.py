"""Configuration: the default tree, YAML files with `_BASE_`, and constructors that accept a config."""

from d2lite.config.config import CfgNode, configurable, get_cfg, global_cfg, set_global_cfg
from d2lite.config.versions import downgrade_config, upgrade_config

__all__ = [
    "CfgNode",
    "configurable",
    "downgrade_config",
    "get_cfg",
    "global_cfg",
    "set_global_cfg",
    "upgrade_config",
]
