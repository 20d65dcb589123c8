"""Every configuration key that d2kd adds to Detectron2's."""

from detectron2.config import CfgNode as CN


class ConfigError(ValueError):
    """A configuration file or option that cannot be used."""


def add_distill_config(cfg: CN) -> None:
    """Adds d2kd's keys, with their defaults, to a Detectron2 configuration."""
    _add_distill(cfg)
    _add_feature_mimic(cfg)
    _add_masked_generative(cfg)
    _add_receptive_tokens(cfg)
    _add_channel_matching(cfg)
    _add_logit_kd(cfg)
    _add_head_regression(cfg)
    _add_data_and_solver(cfg)
    _add_test_and_logging(cfg)
    _add_fcos(cfg)
    _add_vit(cfg)


def _add_distill(cfg: CN) -> None:
    cfg.DISTILL = CN()

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

    # Methods to train with, by name; several are added up. [] inherits only.
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

    # Start the student's neck and heads from the teacher's, wherever names and shapes fit.
    cfg.DISTILL.INHERIT = CN()
    cfg.DISTILL.INHERIT.ENABLED = True
    # Further modules that keep the student's own start, e.g. ["head.cls_score"]; the body (bottom-up network) always
    # does.
    cfg.DISTILL.INHERIT.EXCLUDE = []


def _add_feature_method(cfg: CN, name: str, weight: float, normalize: str, reduction: str) -> CN:
    node = cfg.DISTILL[name] = CN()
    # Factor on the loss of every level. With 0 the student trains exactly as without distillation.
    node.WEIGHT = weight
    # Student taps to distil, e.g. ["p3", "res4", "res4.pre_relu", "head.bbox_pred@0"]; [] takes the pyramid levels both
    # networks have.
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


def _add_receptive_tokens(cfg: CN) -> None:
    # REDUCTION: paper divides by the sum of each mask | mean also scales the weights of an image's positions to the sum
    # 1.
    node = _add_feature_method(cfg, "RECEPTIVE_TOKENS", weight=4.0, normalize="standardize", reduction="mean")
    # The tokens of the teacher, as tools/learn_tokens.py writes them.
    node.FILE = ""
    # Whose tokens serve each pair of taps; [] takes those of the teacher's tap.
    node.TOKEN_TAPS = []
    # Factor for each tap on top of WEIGHT; [] is 1 everywhere.
    node.LEVEL_WEIGHTS = []
    # Customisation: from iteration WARMUP_ITERS on, a mask is the product of the teacher's and the student's.
    node.CUSTOMIZE = True
    node.WARMUP_ITERS = 1000
    # auto: a learned 1x1 convolution where channels differ | conv: everywhere, as in the official code.
    node.ALIGN = "auto"
    # Added to the sums that the loss divides by.
    node.EPS = 1e-12

    # The first stage, tools/learn_tokens.py. It reads TAPS (or TEACHER_TAPS) above, of the teacher; [] takes all
    # outputs of its backbone. From SOLVER it takes the batch size, the momentum of SGD, clipping and AMP; the schedule
    # is a cosine.
    node.LEARN = CN()
    # Tokens of each tap.
    node.LEARN.NUM_TOKENS = 6
    # Learn a weight for each token and image; False adds the masks up.
    node.LEARN.WEIGHTING = True
    node.LEARN.ITERATIONS = 2000
    # Adam | AdamW | SGD
    node.LEARN.OPTIMIZER = "Adam"
    # The published rate; too high where features are large (masks that are 0 or 1 all over, see OUTPUT_DIR/masks).
    node.LEARN.BASE_LR = 0.01
    node.LEARN.WEIGHT_DECAY = 0.001
    # Iterations between checkpoints, and between pictures of the masks over the first PICTURES images.
    node.LEARN.PERIOD = 500
    node.LEARN.PICTURES = 4


def _add_channel_matching(cfg: CN) -> None:
    # NORMALIZE: none | standardize divides the teacher's reduced map by its standard deviation, and leaves zero where
    # the ReLU cuts.
    node = _add_feature_method(cfg, "CHANNEL_MATCHING", weight=1.0, normalize="standardize", reduction="mean")
    # Maps before the last ReLU of each stage; those of the teacher must not have fewer channels.
    node.TAPS = ["res2.pre_relu", "res3.pre_relu", "res4.pre_relu", "res5.pre_relu"]
    # "" | the settings of a published row: coco_retinanet_r50_r18, coco_retinanet_r50_r18_without_res2,
    # imagenet_r50_mobilenet_v1, cub200_r50_mobilenet_v2 or cub200_r50_shufflenet_v2. They take the place of NORMALIZE,
    # REDUCTION, ADAPTER, FACTORS, TRACKING, TRACK_IMAGES and the REFRESH keys, and are meant for WEIGHT 1. Those of
    # CUB-200 and without_res2 have three factors: TAPS must be those of res3 to res5.
    node.PRESET = ""
    # What becomes of a student channel's teacher channels: amp (the value of largest magnitude) | amp_signed (the
    # largest value, as in the first public code, which the published numbers may be from) | sp (the largest value and
    # margin) | rd (a random one) | sm (each student channel has one teacher channel only).
    node.REDUCER = "amp"
    # Norm between the student's map and the loss: bn | syncbn | gn (32 groups) | none.
    node.ADAPTER = "bn"
    # The loss of each tap is divided by its factor; [] is 1 everywhere.
    node.FACTORS = []
    # Where the student's channels do not divide the teacher's: shave leaves the last ones out | best those that are
    # best left out.
    node.REMAINDER = "shave"
    # Channels are assigned anew at these iterations; [] follows the rule: every REFRESH_PERIODS[0] iterations, after
    # REFRESH_STEPS[0] iterations every REFRESH_PERIODS[1], and so on.
    node.REFRESH_ITERS = []
    node.REFRESH_PERIODS = [5000, 31000]
    node.REFRESH_STEPS = [20000]
    # online: an assignment rests on the training batches before it (the first one on those after it, and on the first
    # batch until then) | pass: on a pass of its own over training images, both networks in evaluation mode, as in the
    # paper.
    node.TRACKING = "online"
    # Images, of all processes, that an assignment rests on.
    node.TRACK_IMAGES = 2000
    # ortools | scipy, to the same cost.
    node.SOLVER = "ortools"
    # Seed of the reducer rd.
    node.SEED = 0


def _add_prediction_method(cfg: CN, name: str) -> CN:
    node = cfg.DISTILL[name] = CN()
    # Factor on the loss of every tap. With 0 the student trains exactly as without distillation.
    node.WEIGHT = 1.0
    # Student taps to compare; [] finds the predictions that both networks make (dense heads, box predictor,
    # segmentation head).
    node.TAPS = []
    # Teacher taps, one for each student tap; [] takes the same names. Those of its box predictor are computed on the
    # student's regions.
    node.TEACHER_TAPS = []
    return node


def _add_logit_kd(cfg: CN) -> None:
    node = _add_prediction_method(cfg, "LOGIT_KD")
    # Divides the logits; the loss is multiplied by its square.
    node.TEMPERATURE = 1.0
    # softmax: over the classes | sigmoid: independent classes | spatial: over the positions, for each class | auto: as
    # the head has it.
    node.FORM = "auto"


def _add_head_regression(cfg: CN) -> None:
    node = _add_prediction_method(cfg, "HEAD_REGRESSION")
    # Where smooth L1 turns from quadratic to linear; 0 is plain L1.
    node.BETA = 1.0
    # Further factors, one for each tap; [] is 1 for each.
    node.TAP_WEIGHTS = []


def _add_data_and_solver(cfg: CN) -> None:
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
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE may also be "full_model": the norm over all trained parameters, distillers
    # included. Learning rate of a vision transformer's block relative to the block after it, e.g. 0.7 (AdamW only); 1.0
    # is off.
    cfg.SOLVER.LAYER_DECAY = 1.0

    # A second student: the exponential moving average of the weights, evaluated too, kept as model_final_ema.pth.
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.ENABLED = False
    # Share of the average that stays at each step.
    cfg.SOLVER.EMA.DECAY = 0.9998
    # At step t the share is at most (1 + t) / (WARMUP + t), so that the start is soon forgotten; 0 has no warm-up.
    cfg.SOLVER.EMA.WARMUP = 10.0


def _add_test_and_logging(cfg: CN) -> None:
    # Keep the weights of the best evaluation so far (TEST.EVAL_PERIOD) as model_best.pth.
    cfg.TEST.BEST_CHECKPOINT = CN()
    # The metric to go by, larger is better, e.g. "bbox/AP"; "bbox_EMA/AP" keeps the averaged weights. "" is off.
    cfg.TEST.BEST_CHECKPOINT.METRIC = ""

    # End the training when that metric stops rising.
    cfg.TEST.EARLY_STOP = CN()
    # Evaluations without a rise to wait for; 0 is off.
    cfg.TEST.EARLY_STOP.PATIENCE = 0
    # A rise by this or less does not count.
    cfg.TEST.EARLY_STOP.MIN_DELTA = 0.0

    # Log to Weights & Biases as well; needs its package, wandb.
    cfg.WANDB = CN()
    cfg.WANDB.ENABLED = False
    cfg.WANDB.PROJECT = "d2kd"
    # Name of the run; "" takes the last part of OUTPUT_DIR.
    cfg.WANDB.NAME = ""


def _add_fcos(cfg: CN) -> None:
    # META_ARCHITECTURE "FCOS", best with BACKBONE.NAME "build_fcos_resnet_fpn_backbone" (P6 and P7 from P5).
    node = cfg.MODEL.FCOS = CN()
    node.NUM_CLASSES = 80
    # Levels of the pyramid that the head takes, finest first.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each of the two branches of the head.
    node.NUM_CONVS = 4
    # Normalisation in the head.
    node.NORM = "GN"
    # Only cells so near to the centre of an object, in strides, learn it; 0 admits its whole box.
    node.CENTER_SAMPLING_RADIUS = 1.5
    # Score that the untrained head gives to every class.
    node.PRIOR_PROB = 0.01
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # Inference: least score (root of class score times centreness), candidates a level, overlap that suppresses.
    node.SCORE_THRESH_TEST = 0.2
    node.TOPK_CANDIDATES_TEST = 1000
    node.NMS_THRESH_TEST = 0.6


def _add_vit(cfg: CN) -> None:
    # BACKBONE.NAME "build_vit_sfp_backbone": ViTDet's transformer, here ViT-B, and its pyramid (FPN.OUT_CHANNELS,
    # FPN.NORM).
    node = cfg.MODEL.VIT = CN()
    # Side of the nominal image, in pixels: sets the size of the tables of relative positions.
    node.IMG_SIZE = 1024
    node.PATCH_SIZE = 16
    # Channels of the tokens, transformer blocks, heads, and hidden channels of the MLPs / EMBED_DIM.
    node.EMBED_DIM = 768
    node.DEPTH = 12
    node.NUM_HEADS = 12
    node.MLP_RATIO = 4.0
    node.QKV_BIAS = True
    # Stochastic depth of the last block; it grows linearly from 0.
    node.DROP_PATH_RATE = 0.1
    # Absolute positions of the pre-training, and relative ones in every block.
    node.USE_ABS_POS = True
    node.USE_REL_POS = True
    # Side of the attention windows in patches, and the blocks that have them; the others attend globally.
    node.WINDOW_SIZE = 14
    node.WINDOW_BLOCK_INDEXES = [0, 1, 3, 4, 6, 7, 9, 10]
    # Blocks with a convolutional residual block behind them.
    node.RESIDUAL_BLOCK_INDEXES = []
    # Recompute the blocks in the backward pass: slower, less memory.
    node.USE_ACT_CHECKPOINT = False
    # Side of the images of the pre-training, and whether its table of positions has a class token.
    node.PRETRAIN_IMG_SIZE = 224
    node.PRETRAIN_USE_CLS_TOKEN = True
    # Sizes of the pyramid's levels relative to the transformer's map.
    node.SCALE_FACTORS = [4.0, 2.0, 1.0, 0.5]
    # Images are padded to squares of this side; 0 pads to a multiple of the coarsest stride only.
    node.SQUARE_PAD = 1024
