"""The solver of the first stage, from the settings of `DISTILL.RECEPTIVE_TOKENS.LEARN`."""

from d2kd.config import EPOCHS, check_values
from d2kd.errors import ConfigError
from detectron2.config import CfgNode

#: The learning rate falls to this along a cosine, and to 0 as a polynomial, as in the official code.
_LAST_LR = 1e-6


def check_learning(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: `cfg` is a student's, or has no weights, or a value is wrong.
    """
    check_values(cfg)
    if cfg.DISTILL.TEACHER.CONFIG_FILE:
        raise ConfigError(
            "Tokens are learned on the teacher alone: --config-file must be the teacher's own YAML (now "
            f"DISTILL.TEACHER.CONFIG_FILE is {cfg.DISTILL.TEACHER.CONFIG_FILE!r}), MODEL.WEIGHTS its checkpoint."
        )
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("The teacher has no weights: set MODEL.WEIGHTS to its checkpoint.")


def learning_config(cfg: CfgNode) -> CfgNode:
    """Returns a teacher's configuration with SOLVER overridden by `LEARN`; there is no warm-up."""
    learn, cfg = cfg.DISTILL.RECEPTIVE_TOKENS.LEARN, cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY = learn.OPTIMIZER, learn.BASE_LR, learn.WEIGHT_DECAY
    solver.MAX_ITER, solver.CHECKPOINT_PERIOD, solver.REFERENCE_BATCH = learn.ITERATIONS, learn.PERIOD, 0
    if learn.SCHEDULE == "poly":
        solver.LR_SCHEDULER_NAME, solver.BASE_LR_END = "WarmupPolyLR", 0.0
    else:
        solver.LR_SCHEDULER_NAME, solver.BASE_LR_END = "WarmupCosineLR", min(_LAST_LR, learn.BASE_LR)
    for key in EPOCHS.values():  # the teacher's own lengths in epochs are not those of the tokens
        node, name = key.split(".")
        cfg[node][name] = type(cfg[node][name])()
    solver.WARMUP_ITERS, solver.WEIGHT_DECAY_BIAS, solver.BIAS_LR_FACTOR, solver.LAYER_DECAY = 0, None, 1.0, 1.0
    cfg.freeze()
    return cfg
