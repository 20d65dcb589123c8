"""Every configuration key that d2kd adds to Detectron2's."""

from detectron2.config import CfgNode as CN


def add_distill_config(cfg: CN) -> None:
    """Adds d2kd's keys, with their defaults, to a Detectron2 configuration."""
    _add_distill(cfg)
    _add_feature_mimic(cfg)
    _add_masked_generative(cfg)
    _add_data_and_solver(cfg)


def _add_distill(cfg: CN) -> None:
    cfg.DISTILL = CN()

    # A configured teacher (CONFIG_FILE) makes a training run a distillation run.
    cfg.DISTILL.TEACHER = CN()
    # YAML of the teacher; "" trains the student alone. Relative to the working directory, else to the file that names it.
    cfg.DISTILL.TEACHER.CONFIG_FILE = ""
    # Checkpoint of the teacher; "" takes MODEL.WEIGHTS of its YAML. Every key must fit.
    cfg.DISTILL.TEACHER.WEIGHTS = ""
    # Changes to the teacher's YAML: ["KEY", value, ...].
    cfg.DISTILL.TEACHER.OPTS = []
    # Evaluate the teacher on DATASETS.TEST before training starts.
    cfg.DISTILL.TEACHER.EVAL_FIRST = True
    # Arithmetic of the teacher's forward pass: float32, bfloat16 or float16 (autocast).
    cfg.DISTILL.TEACHER.PRECISION = "float32"

    # Methods to train with, by name; several are added up. [] inherits only.
    cfg.DISTILL.METHODS = ["FeatureMimic"]

    # Start the student's neck and heads from the teacher's, wherever names and shapes fit.
    cfg.DISTILL.INHERIT = CN()
    cfg.DISTILL.INHERIT.ENABLED = True
    # Further modules that keep the student's own start, e.g. ["head.cls_score"]; the body (bottom-up network) always does.
    cfg.DISTILL.INHERIT.EXCLUDE = []


def _add_feature_method(cfg: CN, name: str, weight: float, normalize: str, reduction: str) -> CN:
    node = cfg.DISTILL[name] = CN()
    # Factor on the loss of every level. With 0 the student trains exactly as without distillation.
    node.WEIGHT = weight
    # Student taps to distil, e.g. ["p3", "res4", "res4.pre_relu", "head.bbox_pred@0"]; [] takes the pyramid levels both networks have.
    node.TAPS = []
    # Teacher taps, one for each student tap; [] takes the same names.
    node.TEACHER_TAPS = []
    # none | standardize: bring each channel of the maps to zero mean and unit variance first.
    node.NORMALIZE = normalize
    # paper: sum over channels and positions, mean over images | mean: over all elements.
    node.REDUCTION = reduction
    return node


def _add_feature_mimic(cfg: CN) -> None:
    _add_feature_method(cfg, "FEATURE_MIMIC", weight=4.0, normalize="standardize", reduction="mean")


def _add_masked_generative(cfg: CN) -> None:
    node = _add_feature_method(cfg, "MASKED_GENERATIVE", weight=1.0, normalize="standardize", reduction="mean")
    # Share of the positions (or channels) of the student's map that is dropped, 0 to 1.
    node.MASK_RATIO = 0.65
    # spatial: drop positions of all channels | channel: drop whole channels.
    node.MASK = "spatial"
    # Seed of the random masks.
    node.SEED = 0


def _add_data_and_solver(cfg: CN) -> None:
    # COCO files as datasets, without code: [{NAME: my_train, JSON: path, IMAGES: directory}, ...].
    cfg.DATASETS.REGISTER = []
    # What to do with an image that cannot be read while training: error | skip (logged once, another image takes its place).
    cfg.DATASETS.ON_BAD_IMAGE = "error"

    # SGD (Detectron2's) | AdamW (BASE_LR, WEIGHT_DECAY and the per-parameter rules apply as they do to SGD).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Arithmetic under SOLVER.AMP.ENABLED: float16 (with loss scaling, CUDA only) | bfloat16.
    cfg.SOLVER.AMP.PRECISION = "float16"
    # Batches of IMS_PER_BATCH images whose gradients are averaged into one step.
    cfg.SOLVER.ACCUMULATE = 1
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE may also be "full_model": the norm over all trained parameters, distillers included.
