"""The keys of d2kd's core, each with its default, range and meaning; docs/keys.md is made from them.

A configured teacher (DISTILL.TEACHER.CONFIG_FILE) makes a training run a distillation run. `DISTILL.METHODS` stands
beside the registry of methods, in `d2kd.distillers.base`.
"""

from collections.abc import Mapping

from d2kd.settings import ASCENDING, NOT_EMPTY, Rule, Setting, setting

#: Keys in epochs, by the keys in iterations that they set.
EPOCHS: Mapping[str, str] = {
    "SOLVER.MAX_ITER": "SOLVER.MAX_EPOCHS",
    "SOLVER.WARMUP_ITERS": "SOLVER.WARMUP_EPOCHS",
    "SOLVER.CHECKPOINT_PERIOD": "SOLVER.CHECKPOINT_EPOCHS",
    "TEST.EVAL_PERIOD": "TEST.EVAL_EPOCHS",
    "SOLVER.STEPS": "SOLVER.STEP_EPOCHS",
}

CORE_KEYS: dict[str, Setting] = {
    "DISTILL.IMPORTS": setting(
        [],
        "Python files (looked for beside the YAML too) or modules that register methods, architectures, ... of your "
        "own.",
    ),
    "DISTILL.TEACHER.CONFIG_FILE": setting(
        "",
        'YAML of the teacher; "" trains the student alone. Relative to the working directory, else to the file that '
        "names it.",
        path=True,
    ),
    "DISTILL.TEACHER.WEIGHTS": setting(
        "", 'Checkpoint of the teacher; "" takes MODEL.WEIGHTS of its YAML. Every key must fit.', path=True
    ),
    "DISTILL.TEACHER.OPTS": setting(
        [],
        'Changes to the teacher\'s YAML: ["KEY", value, ...].',
        items=object,
        rule=Rule(
            "must be pairs, KEY and value",
            lambda values: len(values) % 2 == 0 and all(isinstance(key, str) for key in values[::2]),
        ),
    ),
    "DISTILL.TEACHER.EVAL_FIRST": setting(True, "Evaluate the teacher on DATASETS.TEST before training starts."),
    "DISTILL.TEACHER.PRECISION": setting(
        "float32",
        "Arithmetic of the teacher's forward pass (autocast).",
        choices=("float32", "bfloat16", "float16"),
    ),
    "DISTILL.TEACHER.EVERY": setting(
        1,
        "The teacher, and the methods, take part in every n-th iteration alone, with losses n times as large; in "
        "between the student learns from its task.",
        at_least=1,
    ),
    "DISTILL.TEACHER.FOLD_NORMS": setting(
        False, "Multiply the teacher's frozen batch norms into the convolutions before them: faster, equal to rounding."
    ),
    "DISTILL.TEACHER.CHANNELS_LAST": setting(
        False, "Keep the channels of the teacher's maps next to each other in memory: faster, equal to rounding."
    ),
    "DISTILL.TEACHER.COMPILE": setting(
        "off",
        "torch.compile of the teacher | cudagraphs: recorded as CUDA graphs too, for images of few sizes. Each new "
        "size takes a while.",
        choices=("off", "default", "cudagraphs"),
    ),
    "DISTILL.TEACHER.STREAM": setting(
        False, "Run the teacher beside the student's forward pass, on a CUDA stream of its own; takes memory of both."
    ),
    "DISTILL.TASK_WEIGHT": setting(
        1.0, "Factor on the student's own losses, e.g. 1 - alpha where a paper weighs task and teacher so.", at_least=0
    ),
    "DISTILL.BALANCE": setting(
        "fixed",
        "fixed: each method has the weight of its node | gradient: its gradient on the shared taps is kept at "
        "BALANCE_RATIO times the task's | limit: the weight of its node, lowered where its gradient would be more than "
        "that.",
        choices=("fixed", "gradient", "limit"),
    ),
    "DISTILL.BALANCE_RATIO": setting(
        0.5,
        "Norm of each method's gradient over the task's, for BALANCE gradient; for limit, at most. Both norms are "
        "smoothed over about ten measurements, but for a limit a method that rises counts at once. A method of weight "
        "0 stays at 0; DISTILL.SCHEDULE is a factor on it.",
        above=0,
        at_most=1000,
    ),
    "DISTILL.BALANCE_PERIOD": setting(
        10, "Iterations between two measurements of the gradients, for BALANCE and GUARD.", at_least=1
    ),
    "DISTILL.LOG_GRADIENT_SHARE": setting(
        0,
        "Iterations between two logs of the share of task and methods in the gradient on the shared taps; 0 = never.",
        at_least=0,
    ),
    "DISTILL.INIT_FROM_TEACHER.ENABLED": setting(
        True, "Initialize the student's neck and heads from the teacher's, wherever names and shapes fit."
    ),
    "DISTILL.INIT_FROM_TEACHER.EXCLUDE": setting(
        [],
        'Further modules that keep the student\'s own initialization, e.g. ["head.cls_score"]; the bottom-up network '
        "always does.",
        rule=Rule("must not hold an empty name", all),
    ),
    "DISTILL.INIT_FROM_TEACHER.FREEZE": setting(
        [],
        'Modules that stay as the teacher has them: initialized as a whole and not trained, e.g. ["head"].',
        rule=Rule("must not hold an empty name", all),
    ),
    "DISTILL.INIT_FROM_TEACHER.LR_FACTOR": setting(
        1.0,
        "Learning rate of what is initialized from the teacher over that of the rest; FREEZE is for none at all.",
        above=0,
        at_most=1,
    ),
    "DATASETS.REGISTER": setting(
        [],
        "Datasets without code: COCO files, [{NAME: my_train, JSON: path, IMAGES: directory}, ...], or another FORMAT "
        "with keys of its own: yolo (IMAGES, LABELS, CLASSES), voc (ROOT, SPLIT), labelmaps (IMAGES, LABELS, CLASSES), "
        "folders (IMAGES, one folder a class), cub (ROOT, SPLIT), or one that `register_dataset_format` adds.",
        items=dict,
    ),
    "DATASETS.ON_BAD_IMAGE": setting(
        "error",
        "What to do with an image that cannot be read while training: error | skip (logged once, another image takes "
        "its place).",
        choices=("error", "skip"),
    ),
    "DATALOADER.REPEATS": setting(
        3,
        "SAMPLER_TRAIN RepeatAugSampler: how many times an image comes, each time augmented anew, before the next one.",
        at_least=1,
    ),
    "DATALOADER.DRAWS": setting(
        0,
        "Ways in which each image is augmented in training, the same ones in every run, so that DISTILL.CACHE can keep "
        "what the teacher gives for all of them; 0 = anew every time.",
        at_least=0,
    ),
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": setting(
        1.0,
        "In segmentors, the share of a crop that one class may fill; up to ten crops are tried. Segmentors cut them "
        "out of the resized image; in detectors they are cut before it is resized.",
        above=0,
        at_most=1,
    ),
    "INPUT.COLOR_AUG_SSD": setting(
        False, "In segmentors, distort brightness, contrast, saturation and hue in training, as SSD does."
    ),
    "SOLVER.MAX_EPOCHS": setting(
        0.0,
        "Length of the training in epochs, e.g. 90 or 0.5; it sets MAX_ITER. 0 = MAX_ITER counts. An epoch is as many "
        "iterations as show all images of DATASETS.TRAIN once, rounded up.",
        at_least=0,
    ),
    "SOLVER.STEP_EPOCHS": setting([], "STEPS in epochs; [] = STEPS counts.", items=float, above=0, rule=ASCENDING),
    "SOLVER.WARMUP_EPOCHS": setting(0.0, "WARMUP_ITERS in epochs; 0 = WARMUP_ITERS counts.", at_least=0),
    "SOLVER.CHECKPOINT_EPOCHS": setting(0.0, "CHECKPOINT_PERIOD in epochs; 0 = CHECKPOINT_PERIOD counts.", at_least=0),
    "SOLVER.POLY_LR_POWER": setting(
        0.9,
        "Of LR_SCHEDULER_NAME WarmupPolyLR: (BASE_LR - BASE_LR_END) (1 - t / MAX_ITER)^POLY_LR_POWER + BASE_LR_END at "
        "iteration t.",
        above=0,
        at_most=100,
    ),
    "SOLVER.OPTIMIZER": setting(
        "SGD",
        "SGD (Detectron2's) | AdamW | Adam (BASE_LR, WEIGHT_DECAY and the per-parameter rules apply as to SGD).",
        choices=("SGD", "AdamW", "Adam"),
    ),
    "SOLVER.AMP.PRECISION": setting(
        "float16",
        "Arithmetic under SOLVER.AMP.ENABLED: float16 (with loss scaling, CUDA only) | bfloat16.",
        choices=("float16", "bfloat16"),
    ),
    "SOLVER.ACCUMULATE": setting(
        1, "Batches of IMS_PER_BATCH images whose gradients are averaged into one step.", at_least=1
    ),
    "SOLVER.REFERENCE_BATCH": setting(
        0,
        "Images of an iteration that the settings were made for; 0 = as many as it has. Where IMS_PER_BATCH x "
        "ACCUMULATE is another number, BASE_LR and BASE_LR_END become as many times larger, and everything counted in "
        "iterations as many times shorter (the linear rule); lengths in epochs stay.",
        at_least=0,
    ),
    "SOLVER.LAYER_DECAY": setting(
        1.0,
        "Learning rate of a vision transformer's block over that of the block after it (AdamW only); 1.0 is off.",
        above=0,
        at_most=1,
    ),
    "SOLVER.EMA.ENABLED": setting(
        False,
        "A second student: the exponential moving average of the weights, evaluated too, kept as model_final_ema.pth.",
    ),
    "SOLVER.EMA.DECAY": setting(0.9998, "Share of the average that stays at each step.", at_least=0, below=1),
    "SOLVER.EMA.WARMUP": setting(
        10.0,
        "At step t the share is at most (1 + t) / (WARMUP + t), so that the start is soon forgotten; 0 has no warm-up.",
        at_least=0,
    ),
    "TEST.EVAL_EPOCHS": setting(
        0.0, "EVAL_PERIOD, between two evaluations, in epochs; 0 = EVAL_PERIOD counts.", at_least=0
    ),
    "TEST.IMS_PER_BATCH": setting(1, "Images of a batch in evaluation, on each process.", at_least=1),
    "TEST.BEST_CHECKPOINT.METRIC": setting(
        "",
        "Keep the weights of the best evaluation so far (TEST.EVAL_PERIOD) as model_best.pth, by this metric; larger "
        'is better, e.g. "bbox/AP" or "classification/top1"; "bbox_EMA/AP" keeps the averaged weights. "" is off.',
    ),
    "TEST.EARLY_STOP.PATIENCE": setting(
        0,
        "End the training when BEST_CHECKPOINT.METRIC stops rising: evaluations without a rise to wait for; 0 is off.",
        at_least=0,
    ),
    "TEST.EARLY_STOP.MIN_DELTA": setting(0.0, "Minimum improvement that counts.", at_least=0, at_most=100),
    "WANDB.ENABLED": setting(False, "Log to Weights & Biases as well; needs its package, wandb."),
    "WANDB.PROJECT": setting("d2kd", "Name of the project there.", rule=NOT_EMPTY),
    "WANDB.NAME": setting("", 'Name of the run; "" takes the last part of OUTPUT_DIR.'),
}
