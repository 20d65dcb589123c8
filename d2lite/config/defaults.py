"""The default config: every key with its default, which also fixes its type. No other key can be set."""

from d2lite.config.config import CfgNode
from d2lite.config.versions import LATEST_VERSION

_GLOBAL = {
    # Version of the key names.
    "VERSION": LATEST_VERSION,
    # Checkpoints, logs and results go here.
    "OUTPUT_DIR": "./output",
    # Seed of every random generator; negative: a different one in each run.
    "SEED": -1,
    # Let cuDNN time its convolution algorithms. Pays off where input sizes hardly vary.
    "CUDNN_BENCHMARK": False,
    # Internal precision of float32 matrix products: highest | high | medium; empty: PyTorch's default.
    "FLOAT32_PRECISION": "",
    # Iterations between visualizations of training examples and predictions; 0: none.
    "VIS_PERIOD": 0,
    # For quick experiments, where adding a key is not worth it.
    "GLOBAL": {"HACK": 1.0},
}

_INPUT = {
    # Channel order in which the model gets images: BGR, RGB, or another format that Pillow converts to.
    "FORMAT": "BGR",
    # Shorter side in training, pixels: values to choose from, or (min, max), see MIN_SIZE_TRAIN_SAMPLING.
    "MIN_SIZE_TRAIN": (800,),
    # choice | range
    "MIN_SIZE_TRAIN_SAMPLING": "choice",
    # Largest longer side in training, pixels.
    "MAX_SIZE_TRAIN": 1333,
    # Shorter side in testing, pixels; 0 keeps images as they are.
    "MIN_SIZE_TEST": 800,
    "MAX_SIZE_TEST": 1333,
    # Flip in training: horizontal | vertical | none.
    "RANDOM_FLIP": "horizontal",
    # Random crop in training. TYPE: relative | relative_range | absolute | absolute_range.
    # SIZE is (height, width): a share of the image for the relative types, else pixels.
    "CROP": {"ENABLED": False, "TYPE": "relative_range", "SIZE": [0.9, 0.9]},
    # Form of instance masks in training: polygon | bitmask.
    "MASK_FORMAT": "polygon",
}

_DATASETS = {
    # Names of registered datasets; several are concatenated for training and tested one by one.
    "TRAIN": (),
    "TEST": (),
    # Pre-computed proposals, one file per dataset, read when MODEL.LOAD_PROPOSALS is on.
    "PROPOSAL_FILES_TRAIN": (),
    "PROPOSAL_FILES_TEST": (),
    # How many of them are kept per image, best first.
    "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
    "PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000,
}

_DATALOADER = {
    # Worker processes per training process; 0 loads in the process itself.
    "NUM_WORKERS": 4,
    # Batches hold either wide or tall images, which saves padding.
    "ASPECT_RATIO_GROUPING": True,
    # TrainingSampler | RepeatFactorTrainingSampler | RandomSubsetTrainingSampler
    "SAMPLER_TRAIN": "TrainingSampler",
    # RepeatFactorTrainingSampler: classes in a smaller share of the images than this are repeated ...
    "REPEAT_THRESHOLD": 0.0,
    # ... by the square root of threshold / share, or by the ratio itself.
    "REPEAT_SQRT": True,
    # Leave out training images without a usable annotation.
    "FILTER_EMPTY_ANNOTATIONS": True,
}

_BACKBONE = {
    "BACKBONE": {
        # A registered builder.
        "NAME": "build_resnet_backbone",
        # Freeze the first stages: 0 none, 1 the stem, 2 the stem and res2, ...
        "FREEZE_AT": 2,
    },
    "RESNETS": {
        # 18 | 34 | 50 | 101 | 152
        "DEPTH": 50,
        "OUT_FEATURES": ["res4"],
        # Groups of the 3x3 convolution and width per group; (32, 8) with depth 101 is ResNeXt-101-32x8d.
        "NUM_GROUPS": 1,
        "WIDTH_PER_GROUP": 64,
        "NORM": "FrozenBN",
        # Where a bottleneck halves the resolution: its first 1x1 convolution (the original, MSRA) or its 3x3.
        "STRIDE_IN_1X1": True,
        # Dilation of res5; 2 keeps the resolution of res4.
        "RES5_DILATION": 1,
        "RES2_OUT_CHANNELS": 256,
        "STEM_OUT_CHANNELS": 64,
        # Deformable convolution in res2 ... res5; modulated is version 2.
        "DEFORM_ON_PER_STAGE": [False, False, False, False],
        "DEFORM_MODULATED": False,
        "DEFORM_NUM_GROUPS": 1,
    },
    "FPN": {
        # Bottom-up stages, fine to coarse.
        "IN_FEATURES": [],
        "OUT_CHANNELS": 256,
        "NORM": "",
        # How lateral and top-down maps join: sum | avg.
        "FUSE_TYPE": "sum",
    },
}

_PROPOSALS = {
    "PROPOSAL_GENERATOR": {
        # RPN | PrecomputedProposals
        "NAME": "RPN",
        # Proposals with a shorter side are dropped, pixels of the network's input.
        "MIN_SIZE": 0,
    },
    "ANCHOR_GENERATOR": {
        "NAME": "DefaultAnchorGenerator",
        # Square roots of the anchor areas, pixels: one list per feature map, or a single one for all.
        "SIZES": [[32, 64, 128, 256, 512]],
        # Height / width, likewise.
        "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        # Of rotated anchors, degrees.
        "ANGLES": [[-90, 0, 90]],
        # Center of the first anchor, in strides; 0.5 centers anchors in their cells.
        "OFFSET": 0.0,
    },
    "RPN": {
        "HEAD_NAME": "StandardRPNHead",
        "IN_FEATURES": ["res4"],
        # Channels of the hidden convolutions; -1: as many as come in.
        "CONV_DIMS": [-1],
        # Anchors further out of the image than this are not trained, pixels; -1: all are.
        "BOUNDARY_THRESH": -1,
        # IoU below the first threshold: background (0); above the last: object (1); between: ignored (-1).
        "IOU_THRESHOLDS": [0.3, 0.7],
        "IOU_LABELS": [0, -1, 1],
        # Anchors sampled per image for the loss, and the largest share of objects among them.
        "BATCH_SIZE_PER_IMAGE": 256,
        "POSITIVE_FRACTION": 0.5,
        # smooth_l1 | giou | diou | ciou
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        # Scale of the regression targets (dx, dy, dw, dh).
        "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        # Where smooth L1 turns from quadratic to linear; 0 is L1.
        "SMOOTH_L1_BETA": 0.0,
        # Of both losses.
        "LOSS_WEIGHT": 1.0,
        # Best proposals kept per feature map before NMS, and per image after it.
        "PRE_NMS_TOPK_TRAIN": 12000,
        "PRE_NMS_TOPK_TEST": 6000,
        "POST_NMS_TOPK_TRAIN": 2000,
        "POST_NMS_TOPK_TEST": 1000,
        "NMS_THRESH": 0.7,
    },
}

_ROI_HEADS = {
    "ROI_HEADS": {
        "NAME": "Res5ROIHeads",
        # Foreground classes; background is the next index.
        "NUM_CLASSES": 80,
        "IN_FEATURES": ["res4"],
        "IOU_THRESHOLDS": [0.5],
        "IOU_LABELS": [0, 1],
        # Proposals sampled per image for the loss, and the largest share of objects among them.
        "BATCH_SIZE_PER_IMAGE": 512,
        "POSITIVE_FRACTION": 0.25,
        # Ground-truth boxes join the proposals in training.
        "PROPOSAL_APPEND_GT": True,
        "SCORE_THRESH_TEST": 0.05,
        "NMS_THRESH_TEST": 0.5,
    },
    "ROI_BOX_HEAD": {
        # FastRCNNConvFCHead, or another registered head; empty for Res5ROIHeads.
        "NAME": "",
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
        "SMOOTH_L1_BETA": 0.0,
        "POOLER_RESOLUTION": 14,
        # Samples per bin and side; 0: as many as the bin is pixels wide.
        "POOLER_SAMPLING_RATIO": 0,
        # ROIAlignV2 (half a pixel shifted) | ROIAlign | ROIPool
        "POOLER_TYPE": "ROIAlignV2",
        "NUM_CONV": 0,
        "CONV_DIM": 256,
        "NUM_FC": 0,
        "FC_DIM": 1024,
        "NORM": "",
        # One box per proposal instead of one per class.
        "CLS_AGNOSTIC_BBOX_REG": False,
        # Train later heads on the boxes that this head predicts.
        "TRAIN_ON_PRED_BOXES": False,
        # Binary cross-entropy per class instead of softmax.
        "USE_SIGMOID_CE": False,
        # Federated loss (LVIS): only that many sampled classes count, drawn by frequency to that power.
        "USE_FED_LOSS": False,
        "FED_LOSS_NUM_CLASSES": 50,
        "FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
    },
    "ROI_BOX_CASCADE_HEAD": {
        # One entry per stage of CascadeROIHeads.
        "BBOX_REG_WEIGHTS": ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
        "IOUS": (0.5, 0.6, 0.7),
    },
    "ROI_MASK_HEAD": {
        "NAME": "MaskRCNNConvUpsampleHead",
        "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0,
        "POOLER_TYPE": "ROIAlignV2",
        "NUM_CONV": 0,
        "CONV_DIM": 256,
        "NORM": "",
        # One mask per box instead of one per class.
        "CLS_AGNOSTIC_MASK": False,
    },
    "ROI_KEYPOINT_HEAD": {
        "NAME": "KRCNNConvDeconvUpsampleHead",
        "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0,
        "POOLER_TYPE": "ROIAlignV2",
        "CONV_DIMS": (512,) * 8,
        "NUM_KEYPOINTS": 17,
        # Training images with fewer visible keypoints are left out.
        "MIN_KEYPOINTS_PER_IMAGE": 1,
        # Divide the loss by the visible keypoints, not by the largest possible number.
        "NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": True,
        "LOSS_WEIGHT": 1.0,
    },
}

_DENSE_HEADS = {
    "RETINANET": {
        "NUM_CLASSES": 80,
        "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        # Hidden convolutions of each of the two subnets.
        "NUM_CONVS": 4,
        "NORM": "",
        "IOU_THRESHOLDS": [0.4, 0.5],
        "IOU_LABELS": [0, -1, 1],
        # Foreground probability that the classifier starts with.
        "PRIOR_PROB": 0.01,
        "FOCAL_LOSS_ALPHA": 0.25,
        "FOCAL_LOSS_GAMMA": 2.0,
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        "SMOOTH_L1_LOSS_BETA": 0.1,
        "SCORE_THRESH_TEST": 0.05,
        # Best candidates kept per feature map before NMS.
        "TOPK_CANDIDATES_TEST": 1000,
        "NMS_THRESH_TEST": 0.5,
    },
    "SEM_SEG_HEAD": {
        "NAME": "SemSegFPNHead",
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "NUM_CLASSES": 54,
        # Label of pixels that do not count.
        "IGNORE_VALUE": 255,
        "CONVS_DIM": 128,
        # Stride at which the levels are added up.
        "COMMON_STRIDE": 4,
        "NORM": "GN",
        "LOSS_WEIGHT": 1.0,
    },
    "PANOPTIC_FPN": {
        "INSTANCE_LOSS_WEIGHT": 1.0,
        # Merging instances and stuff: overlap above which an instance is dropped, smallest stuff area in
        # pixels, lowest score of an instance.
        "COMBINE": {
            "ENABLED": True,
            "OVERLAP_THRESH": 0.5,
            "STUFF_AREA_LIMIT": 4096,
            "INSTANCES_CONFIDENCE_THRESH": 0.5,
        },
    },
}

_MODEL = {
    "META_ARCHITECTURE": "GeneralizedRCNN",
    "DEVICE": "cuda",
    # Checkpoint to start from: a path, or detectron2://... for a published one.
    "WEIGHTS": "",
    # Per channel, in the order of INPUT.FORMAT. The deviation of 1 is that of the MSRA weights.
    "PIXEL_MEAN": [103.530, 116.280, 123.675],
    "PIXEL_STD": [1.0, 1.0, 1.0],
    # Which heads an R-CNN has beside the box head.
    "MASK_ON": False,
    "KEYPOINT_ON": False,
    # Use the proposals of DATASETS.PROPOSAL_FILES_*.
    "LOAD_PROPOSALS": False,
    **_BACKBONE,
    **_PROPOSALS,
    **_ROI_HEADS,
    **_DENSE_HEADS,
}

_SOLVER = {
    # Over all processes.
    "IMS_PER_BATCH": 16,
    "MAX_ITER": 40000,
    "BASE_LR": 0.001,
    "MOMENTUM": 0.9,
    "NESTEROV": False,
    "WEIGHT_DECAY": 0.0001,
    # Of normalization layers; of biases (None: as all others).
    "WEIGHT_DECAY_NORM": 0.0,
    "WEIGHT_DECAY_BIAS": None,
    "BIAS_LR_FACTOR": 1.0,
    # WarmupMultiStepLR | WarmupCosineLR | WarmupStepWithFixedGammaLR
    "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    # Iterations at which the rate is multiplied by GAMMA.
    "STEPS": (30000,),
    "GAMMA": 0.1,
    # WarmupStepWithFixedGammaLR: number of equally spaced decays.
    "NUM_DECAYS": 3,
    # Rate at the end of the cosine.
    "BASE_LR_END": 0.0,
    # From BASE_LR * WARMUP_FACTOR to the schedule; linear | constant.
    "WARMUP_FACTOR": 0.001,
    "WARMUP_ITERS": 1000,
    "WARMUP_METHOD": "linear",
    # Stretch the warmup too when the schedule is scaled to another number of processes.
    "RESCALE_INTERVAL": False,
    # Iterations between checkpoints.
    "CHECKPOINT_PERIOD": 5000,
    # Number of processes that batch size, rate and iterations are meant for, and from which they are scaled
    # to the actual number; 0: no scaling.
    "REFERENCE_WORLD_SIZE": 0,
    # CLIP_TYPE: value | norm (per parameter) | full_model (norm of all). NORM_TYPE: inf is the maximum norm.
    "CLIP_GRADIENTS": {"ENABLED": False, "CLIP_TYPE": "value", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0},
    # Automatic mixed precision.
    "AMP": {"ENABLED": False},
}

_TEST = {
    # Iterations between evaluations; 0: only after training.
    "EVAL_PERIOD": 0,
    "DETECTIONS_PER_IMAGE": 100,
    # Checked by verify_results: [[task, metric, value, tolerance], ...].
    "EXPECTED_RESULTS": [],
    # Of COCO's object keypoint similarity; empty: COCO's own.
    "KEYPOINT_OKS_SIGMAS": [],
    # Test-time augmentation: shorter sides and largest longer side in pixels, and whether to flip as well.
    "AUG": {
        "ENABLED": False,
        "MIN_SIZES": (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
        "MAX_SIZE": 4000,
        "FLIP": True,
    },
    # Recompute batch-norm statistics over NUM_ITER batches before an evaluation.
    "PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200},
}

_C = CfgNode(
    {
        **_GLOBAL,
        "MODEL": _MODEL,
        "INPUT": _INPUT,
        "DATASETS": _DATASETS,
        "DATALOADER": _DATALOADER,
        "SOLVER": _SOLVER,
        "TEST": _TEST,
    }
)
