"""The configuration: d2kd's keys beside Detectron2's, and reading YAML files with them.

Keys that belong to one part stand in that part's file: those of a method in its class (`d2kd.settings`), those of an
architecture or backbone beside it (`config_keys`). Here are the keys of the core.
"""

import ast
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import yaml

from d2kd.errors import ConfigError, did_you_mean
from d2kd.plugins import import_installed, import_plugins
from detectron2.config import CfgNode, get_cfg

CN = CfgNode
logger = logging.getLogger(__name__)

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
    # COCO files as datasets, without code: [{NAME: my_train, JSON: path, IMAGES: directory}, ...].
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


def read_config(path: str, options: Sequence[Any] = (), imports: Sequence[str] = ()) -> CfgNode:
    """Detectron2's defaults and d2kd's, changed by a YAML file and a list of [KEY, value, ...].

    Files named by DISTILL.IMPORTS are imported first, so that the keys of what they register exist.

    Args:
        path: of the YAML file; "" for none.
        options: changes on top of it; values may be strings, as on a command line.
        imports: further files and modules to import.

    Raises:
        ConfigError: the file cannot be read, a key does not exist (the message lists near matches), or a value has
            another type than its default.
    """
    try:
        content = CfgNode.load_yaml_with_base(path) if path else {}
    except (KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"In {path}: {_text(error)}") from error
    given = get_key(content, "DISTILL.IMPORTS", [])
    named = [*_names("DISTILL.IMPORTS", given), *_names("DISTILL.IMPORTS", _option(options, "DISTILL.IMPORTS", []))]
    named = import_plugins(dict.fromkeys([*named, *imports]), [os.path.dirname(file) for file in _files(path)])
    options = ["DISTILL.IMPORTS", named, *_without(options, "DISTILL.IMPORTS")]
    cfg = get_cfg()
    add_distill_config(cfg)
    renamed = _rename_in_file(content)
    options, renamed_options = _rename_in_options(options)
    for where, words in ((path, renamed), ("the command line", renamed_options)):
        if words:
            logger.warning("Old keys in %s, still accepted: %s", where, "; ".join(words))
    if isinstance(given, str):
        content["DISTILL"]["IMPORTS"] = [given]
    if path:
        changed = bool(renamed) or isinstance(given, str)
        _merge(cfg, lambda: _merge_file(cfg, path, content, changed), path)
    _merge(cfg, lambda: cfg.merge_from_list(_whole_numbers_as_floats(cfg, options)), "the command line")
    return cfg


def _names(key: str, value: Any) -> list[str]:
    """A list of names; a single one may stand without brackets."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key} is {value!r}; it must be a list of names.")
    return list(names)


def _files(path: str) -> list[str]:
    """A YAML file and those that it is based on."""
    if not path:
        return []
    with open(path, encoding="utf-8") as file:
        content = yaml.load(file, Loader=yaml.BaseLoader)  # which makes strings of everything, whatever its tag
    bases = _names("_BASE_", content.get("_BASE_", []) if isinstance(content, dict) else [])
    paths = [os.path.join(os.path.dirname(path), os.path.expanduser(base)) for base in bases]
    return [path, *(file for base in paths if os.path.isfile(base) for file in _files(base))]


def _merge_file(cfg: CfgNode, path: str, content: dict[str, Any], changed: bool) -> None:
    if not changed:
        cfg.merge_from_file(path)
        return
    with tempfile.TemporaryDirectory() as directory:  # Detectron2 upgrades old versions of its own keys in files only
        file = os.path.join(directory, os.path.basename(path))
        with open(file, "w", encoding="utf-8") as opened:
            yaml.safe_dump(content, opened)
        cfg.merge_from_file(file)


def _merge(cfg: CfgNode, merge: Callable[[], None], where: str) -> None:
    try:
        merge()
    except (KeyError, ValueError, AssertionError, OSError) as error:
        message = _text(error)
        mismatch = re.search(r"Type mismatch \(<class '(\w+)'>.* vs\. (.*)\) for config key: (\S+)", message, re.DOTALL)
        if mismatch:
            kind, value, key = mismatch.groups()
            raise ConfigError(f"In {where}: {key} is {value!r}; it must be of type {kind}.") from error
        unknown = re.search(r"[Nn]on-existent (?:config )?key:? ?([\w.]+)", message)
        hint = did_you_mean(unknown[1], dict(leaves(cfg)), cutoff=0.6) if unknown and "mean" not in message else ""
        raise ConfigError(f"In {where}: {message.rstrip('.')}{'' if message.endswith('?') else '.'}{hint}") from error


def _text(error: Exception) -> str:
    return str(error.args[0] if error.args else error)


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (whole key, value) of every key that is no node."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def get_key(cfg: Any, key: str, default: Any = None) -> Any:
    """Returns the value of a whole key, e.g. "MODEL.FCOS.NUM_CLASSES", in nested dictionaries; else the default."""
    for part in key.split("."):
        if not isinstance(cfg, dict) or part not in cfg:
            return default
        cfg = cfg[part]
    return cfg


def _option(options: Sequence[Any], key: str, default: Any) -> Any:
    """The value that a list of options gives a key."""
    values = [value for name, value in zip(options[::2], options[1::2]) if name == key]
    return _literal(values[-1]) if values else default


def _without(options: Sequence[Any], key: str) -> list[Any]:
    """Options without those for a key."""
    pairs = [options[i : i + 2] for i in range(0, len(options), 2)]
    return [item for pair in pairs if pair[0] != key for item in pair]


def _literal(value: Any) -> Any:
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def _whole_numbers_as_floats(cfg: CfgNode, options: list[Any]) -> list[Any]:
    """Lets "KEY 8" set a key that holds a float; the configuration system itself wants "8.0"."""
    floats = {key for key, value in leaves(cfg) if isinstance(value, float)}

    def is_whole(i: int) -> bool:
        return i % 2 == 1 and options[i - 1] in floats and re.fullmatch(r"-?\d+", str(options[i])) is not None

    return [f"{option}.0" if is_whole(i) else option for i, option in enumerate(options)]


def _all_renamed() -> list[RenamedKey]:
    return [renamed for listing in _renamed for renamed in listing()]


def _rename_in_file(content: dict[str, Any]) -> list[str]:
    """Renames keys of a nested dictionary in place; returns what was renamed, in words."""
    words = []
    for old, new, convert in _all_renamed():
        parent = get_key(content, old.rpartition(".")[0])
        key = old.rpartition(".")[2]
        if not isinstance(parent, dict) or key not in parent:
            continue
        value = convert(parent[key])
        if old == new and value == parent[key]:
            continue
        words.append(_words(old, new, parent.pop(key), value))
        if new:
            node = content
            for part in new.split(".")[:-1]:
                node = node.setdefault(part, {})
            node[new.rpartition(".")[2]] = value
        if not parent and old != new:
            _drop_empty(content, old)
    return words


def _drop_empty(content: dict[str, Any], key: str) -> None:
    """Removes the nodes that a renamed key leaves empty: their own names may not exist any more."""
    path = key.split(".")[:-1]
    while path and get_key(content, ".".join(path)) == {}:
        parent = get_key(content, ".".join(path[:-1]), None) if path[:-1] else content
        del parent[path.pop()]


def _rename_in_options(options: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Returns options with renamed keys, and what was renamed, in words."""
    renamed, words = [], []
    for key, value in zip(options[::2], options[1::2]):
        for old, new, convert in _all_renamed():
            converted = convert(_literal(value)) if key == old else None
            if key == old and (old != new or converted != _literal(value)):
                words.append(_words(old, new, value, converted))
                key, value = new, converted
        renamed += [key, value] if key else []
    return renamed + list(options[len(options) // 2 * 2 :]), words


def _words(old: str, new: str, old_value: Any, value: Any) -> str:
    if not new:
        return f"{old} has no effect any more"
    changed = "" if value == _literal(old_value) else f" {value!r}, not {old_value!r}"
    return f"{old} is now {new}{changed}" if old != new else f"{old} is now{changed}"
