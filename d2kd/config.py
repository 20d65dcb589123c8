"""Every configuration key of d2kd's core, and how others add theirs.

Keys that belong to one part stand in that part's file: those of a method in its class (`d2kd.settings`), those of an
architecture or backbone beside it (`config_keys`). Reading configurations: `d2kd.config_reader`.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from d2kd.plugins import import_installed
from detectron2.config import CfgNode

CN = CfgNode

_key_adders: list[Callable[[CfgNode], None]] = []


def config_keys(add: Callable[[CfgNode], None]) -> Callable[[CfgNode], None]:
    """Registers a function that adds keys to a configuration; a decorator for whoever brings keys of their own."""
    _key_adders.append(add)
    return add


def add_distill_config(cfg: CfgNode) -> None:
    """Adds d2kd's keys, with their defaults, to a Detectron2 configuration: the core's and all registered ones."""
    import_installed()
    for add in (_add_distill, _add_data_and_solver, _add_test_and_logging, *_key_adders):
        add(cfg)


def _add_distill(cfg: CfgNode) -> None:
    cfg.DISTILL = CN()

    # Python files (looked for beside the YAML too) or modules that register methods, architectures, ... of your own.
    cfg.DISTILL.IMPORTS = []

    # A configured teacher (CONFIG_FILE) makes a training run a distillation run.
    cfg.DISTILL.TEACHER = CN()
    # YAML of the teacher; "" trains the student alone. Relative to the working directory, else to the file that names
    # it.
    cfg.DISTILL.TEACHER.CONFIG_FILE = ""
    # Checkpoint of the teacher; "" takes MODEL.WEIGHTS of its YAML. Every key must fit.
    cfg.DISTILL.TEACHER.WEIGHTS = ""
    # Changes to the teacher's YAML: ["KEY", value, ...].
    cfg.DISTILL.TEACHER.OPTS = []
    # Evaluate the teacher on DATASETS.TEST before training starts.
    cfg.DISTILL.TEACHER.EVAL_FIRST = True
    # Arithmetic of the teacher's forward pass: float32, bfloat16 or float16 (autocast).
    cfg.DISTILL.TEACHER.PRECISION = "float32"

    # Methods to train with, by name; several are added up. [] initializes from the teacher only.
    cfg.DISTILL.METHODS = ["FeatureMimic"]

    # fixed: each method has the weight of its node | gradient: its gradient on the shared taps is kept at BALANCE_RATIO
    # times the task's.
    cfg.DISTILL.BALANCE = "fixed"
    # Norm of each method's gradient over that of the task's, for BALANCE gradient. A method of weight 0 stays at 0.
    cfg.DISTILL.BALANCE_RATIO = 0.5
    # Iterations between two measurements of the gradients, for BALANCE gradient.
    cfg.DISTILL.BALANCE_PERIOD = 10
    # Iterations between two logs of the share of task and methods in the gradient on the shared taps; 0 = never.
    cfg.DISTILL.LOG_GRADIENT_SHARE = 0

    # Initialize the student's neck and heads from the teacher's, wherever names and shapes fit.
    cfg.DISTILL.INIT_FROM_TEACHER = CN()
    cfg.DISTILL.INIT_FROM_TEACHER.ENABLED = True
    # Further modules that keep the student's own initialization, e.g. ["head.cls_score"]; the bottom-up network always
    # does.
    cfg.DISTILL.INIT_FROM_TEACHER.EXCLUDE = []


def _add_data_and_solver(cfg: CfgNode) -> None:
    # COCO files as datasets, without code: [{NAME: my_train, JSON: path, IMAGES: directory}, ...]. Another FORMAT has
    # keys of its own, see `register_dataset_format`.
    cfg.DATASETS.REGISTER = []
    # What to do with an image that cannot be read while training: error | skip (logged once, another image takes its
    # place).
    cfg.DATASETS.ON_BAD_IMAGE = "error"

    # SGD (Detectron2's) | AdamW | Adam (BASE_LR, WEIGHT_DECAY and the per-parameter rules apply as they do to SGD).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Arithmetic under SOLVER.AMP.ENABLED: float16 (with loss scaling, CUDA only) | bfloat16.
    cfg.SOLVER.AMP.PRECISION = "float16"
    # Batches of IMS_PER_BATCH images whose gradients are averaged into one step.
    cfg.SOLVER.ACCUMULATE = 1
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE may also be "full_model": norm over all trained parameters, distillers included.

    # Learning rate of a vision transformer's block relative to the block after it, e.g. 0.7 (AdamW only); 1.0 is off.
    cfg.SOLVER.LAYER_DECAY = 1.0

    # A second student: the exponential moving average of the weights, evaluated too, kept as model_final_ema.pth.
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.ENABLED = False
    # Share of the average that stays at each step.
    cfg.SOLVER.EMA.DECAY = 0.9998
    # At step t the share is at most (1 + t) / (WARMUP + t), so that the start is soon forgotten; 0 has no warm-up.
    cfg.SOLVER.EMA.WARMUP = 10.0


def _add_test_and_logging(cfg: CfgNode) -> None:
    # Keep the weights of the best evaluation so far (TEST.EVAL_PERIOD) as model_best.pth.
    cfg.TEST.BEST_CHECKPOINT = CN()
    # The metric to go by, larger is better, e.g. "bbox/AP"; "bbox_EMA/AP" keeps the averaged weights. "" is off.
    cfg.TEST.BEST_CHECKPOINT.METRIC = ""

    # End the training when that metric stops rising.
    cfg.TEST.EARLY_STOP = CN()
    # Evaluations without a rise to wait for; 0 is off.
    cfg.TEST.EARLY_STOP.PATIENCE = 0
    # Minimum improvement that counts.
    cfg.TEST.EARLY_STOP.MIN_DELTA = 0.0

    # Log to Weights & Biases as well; needs its package, wandb.
    cfg.WANDB = CN()
    cfg.WANDB.ENABLED = False
    cfg.WANDB.PROJECT = "d2kd"
    # Name of the run; "" takes the last part of OUTPUT_DIR.
    cfg.WANDB.NAME = ""


class RenamedKey(NamedTuple):
    """What became of a key, or (where `old` is `new`) of its values, in a later version."""

    old: str
    #: "" where the key has no effect any more.
    new: str
    #: From old to new value; raises ConfigError where there is none.
    convert: Callable[[Any], Any] = lambda value: value


_renamed: list[Callable[[], Iterable[RenamedKey]]] = [
    lambda: [RenamedKey(f"DISTILL.INHERIT.{key}", f"DISTILL.INIT_FROM_TEACHER.{key}") for key in ("ENABLED", "EXCLUDE")]
]


def renamed_keys(listing: Callable[[], Iterable[RenamedKey]]) -> Callable[[], Iterable[RenamedKey]]:
    """Registers a function that lists renamed keys; a decorator for whoever has some."""
    _renamed.append(listing)
    return listing


def list_renamed_keys() -> list[RenamedKey]:
    """Returns all renamed keys, of the core and of what is registered."""
    return [renamed for listing in _renamed for renamed in listing()]


_paths: list[Callable[[], Iterable[str]]] = [
    lambda: ["MODEL.WEIGHTS", "DISTILL.TEACHER.CONFIG_FILE", "DISTILL.TEACHER.WEIGHTS"]
]


def path_keys(listing: Callable[[], Iterable[str]]) -> Callable[[], Iterable[str]]:
    """Registers a function that lists keys with paths of files; a decorator for whoever has some."""
    _paths.append(listing)
    return listing


def list_path_keys() -> list[str]:
    """Returns all keys with paths of files, which are looked for beside the YAML that names them, too."""
    return [key for listing in _paths for key in listing()]


def get_key(cfg: Any, key: str, default: Any = None) -> Any:
    """Returns the value of a whole key, e.g. "MODEL.FCOS.NUM_CLASSES", in nested dictionaries; else the default."""
    for part in key.split("."):
        if not isinstance(cfg, dict) or part not in cfg:
            return default
        cfg = cfg[part]
    return cfg
