"""What benchmarks/accuracy.py trains: teachers, students and the ways to distil them on PhotoDigits."""

from typing import Any, NamedTuple


class Length(NamedTuple):
    """How long teacher and students are trained, in iterations, the images an iteration of both, and how fast."""

    teacher: int
    student: int
    teacher_images: int
    student_images: int = 8
    #: SOLVER.BASE_LR of all students; None is that of their configuration.
    student_lr: float | None = None

    @property
    def of_teacher(self) -> tuple[int, int]:
        """What makes one teacher: its iterations, and images an iteration."""
        return self.teacher, self.teacher_images


class Entry(NamedTuple):
    """A row of the table: its configuration and options, whether it distils, and how many times the length it takes."""

    config: str
    options: list[Any] = []
    distils: bool = True
    ablation: bool = False
    times: int = 1


#: Parts of the images of three quarters of their sides or more, at 0.75 to 1.33 times their size. The teacher had none.
_CROPS = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative_range", "INPUT.CROP.SIZE", "[0.75,0.75]"]
_CROPS += ["INPUT.MIN_SIZE_TRAIN", "(96,128)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"]

#: Of layers that start as the teacher's, over that of the rest.
_RATE = "DISTILL.INIT_FROM_TEACHER.LR_FACTOR"
_OWN_HEAD = ("FeatureMimic", "MaskedGenerative", "ReceptiveTokens", "ChannelMatching", "FeatureMimic + LogitKD")

_RETINANET: dict[str, Entry] = {
    "baseline": Entry("retinanet_student", distils=False),
    "baseline, twice as long": Entry("retinanet_student", distils=False, ablation=True, times=2),
    "default": Entry("retinanet_student"),
    "inherit only": Entry("retinanet_student", ["DISTILL.METHODS", "[]", _RATE, 0.1]),
    "FeatureMimic": Entry("retinanet_student_FeatureMimic"),
    "MaskedGenerative": Entry("retinanet_student_MaskedGenerative"),
    "ReceptiveTokens": Entry("retinanet_student_ReceptiveTokens"),
    "ChannelMatching": Entry("retinanet_student_ChannelMatching"),
    "LogitKD": Entry("retinanet_student_LogitKD"),
    "HeadRegression": Entry("retinanet_student_HeadRegression"),
    "FeatureMimic + LogitKD": Entry("retinanet_student_FeatureMimic_LogitKD"),
    "CrossKD": Entry("retinanet_student_CrossKD"),
    "FeatureMimic + CrossKD, task 0.25": Entry("retinanet_student_FeatureMimic_CrossKD"),
    "teacher's head, imitation alone": Entry("retinanet_student_frozen_head", ["SOLVER.BASE_LR", 0.004]),
    "inherit only, whole rate": Entry("retinanet_student", ["DISTILL.METHODS", "[]", _RATE, 1.0], ablation=True),
    **{
        f"{name}, whole rate": Entry(f"retinanet_student_{name.replace(' + ', '_')}", [_RATE, 1.0], ablation=True)
        for name in _OWN_HEAD
    },
    "baseline, random crops": Entry("retinanet_student", _CROPS, distils=False, ablation=True),
    "FeatureMimic, random crops": Entry("retinanet_student_FeatureMimic", _CROPS, ablation=True),
    "FeatureMimic + CrossKD, task 0.25, random crops": Entry(
        "retinanet_student_FeatureMimic_CrossKD", _CROPS, ablation=True
    ),
    "MaskedGenerative + CrossKD, limited": Entry("retinanet_student_combined"),
    "FeatureMimic, twice as long": Entry("retinanet_student_FeatureMimic", ablation=True, times=2),
    "FeatureMimic, not inherited": Entry(
        "retinanet_student_FeatureMimic", ["DISTILL.INIT_FROM_TEACHER.ENABLED", False], ablation=True
    ),
    "FeatureMimic, weight halved": Entry(
        "retinanet_student_FeatureMimic", ["DISTILL.FEATURE_MIMIC.WEIGHT", 2.0], ablation=True
    ),
    "FeatureMimic, weight doubled": Entry(
        "retinanet_student_FeatureMimic", ["DISTILL.FEATURE_MIMIC.WEIGHT", 8.0], ablation=True
    ),
    "FeatureMimic, decays": Entry(
        "retinanet_student_FeatureMimic", ["DISTILL.SCHEDULE.SHAPE", "cosine"], ablation=True
    ),
    "FeatureMimic, decays to a tenth": Entry(
        "retinanet_student_FeatureMimic",
        ["DISTILL.SCHEDULE.SHAPE", "cosine", "DISTILL.SCHEDULE.FLOOR", 0.1],
        ablation=True,
    ),
    "FeatureMimic, half of it on objects": Entry(
        "retinanet_student_FeatureMimic", ["DISTILL.FEATURE_MIMIC.FOREGROUND", 0.5], ablation=True
    ),
    "FeatureMimic, balanced at 0.5, decays": Entry(
        "retinanet_student_FeatureMimic",
        ["DISTILL.BALANCE", "gradient", "DISTILL.BALANCE_RATIO", 0.5, "DISTILL.SCHEDULE.SHAPE", "cosine"],
        ablation=True,
    ),
    "MaskedGenerative + CrossKD, limited, guarded": Entry(
        "retinanet_student_combined", ["DISTILL.GUARD.ENABLED", True], ablation=True
    ),
    "FeatureMimic + CrossKD": Entry(
        "retinanet_student_FeatureMimic", ["DISTILL.METHODS", "['FeatureMimic','CrossKD']"], ablation=True
    ),
    "FeatureMimic, all five levels": Entry(
        "retinanet_student_FeatureMimic", ["DISTILL.FEATURE_MIMIC.TAPS", "['p3','p4','p5','p6','p7']"], ablation=True
    ),
    "MaskedGenerative, mask ratio 0": Entry(
        "retinanet_student_MaskedGenerative", ["DISTILL.MASKED_GENERATIVE.MASK_RATIO", 0.0], ablation=True
    ),
    "MaskedGenerative, loss of the paper": Entry(
        "retinanet_student_MaskedGenerative",
        ["DISTILL.MASKED_GENERATIVE.NORMALIZE", "none", "DISTILL.MASKED_GENERATIVE.REDUCTION", "batchmean"]
        + ["DISTILL.MASKED_GENERATIVE.WEIGHT", 2.0e-5],
        ablation=True,
    ),
}

#: The teacher's features from the disk; in float32 these students are equal to those of the rows without it.
_CACHE = ["DISTILL.CACHE.DIR", "output/accuracy/features", "DISTILL.CACHE.DTYPE"]
_RETINANET |= {
    f"{name}, kept in {dtype}": Entry(f"retinanet_student_{name}", [*_CACHE, dtype], ablation=True)
    for name in ("FeatureMimic", "MaskedGenerative")
    for dtype in ("float16", "int8")
}

_CLASSIFIER: dict[str, Entry] = {
    "baseline": Entry("classifier_student", distils=False),
    "baseline, twice as long": Entry("classifier_student", distils=False, ablation=True, times=2),
    **{n: Entry(f"classifier_student_{n}") for n in ("FeatureMimic", "MaskedGenerative", "ChannelMatching", "LogitKD")},
}

_MOBILENET: dict[str, Entry] = {
    "baseline": Entry("retinanet_mobilenet_student", distils=False),
    "default": Entry("retinanet_mobilenet_student"),
    "inherit only": Entry("retinanet_mobilenet_student", ["DISTILL.METHODS", "[]", _RATE, 0.1]),
    **{n: Entry(f"retinanet_mobilenet_student_{n}") for n in ("FeatureMimic", "MaskedGenerative")},
}

_RANDOM = ["DISTILL.MASKED_TEACHER.SELECTOR", "random", "DISTILL.MASKED_TEACHER.EXPLORE", 0.0]


def _masked(student: str, *methods: str, detector: bool = False) -> dict[str, Entry]:
    """A student alone, and from a teacher that sees all patches, half of them as the student looks, or any half."""
    anywhere = [*_RANDOM, "DISTILL.MASKED_TEACHER.MUST_KEEP", False] if detector else _RANDOM
    recipe = f"{student}_MaskedTeacher"
    entries = {
        "baseline": Entry(student, distils=False),
        "whole teacher": Entry(recipe, [x for m in methods for x in (f"DISTILL.{m}.TEACHER_PASS", "auto")]),
        "half of it, by the student": Entry(recipe),
        "half of it, at random": Entry(recipe, anywhere),
    }
    if detector:
        entries["half of it, objects, the rest at random"] = Entry(recipe, _RANDOM, ablation=True)
    return entries


_SEGMENTATION: dict[str, Entry] = {
    "baseline": Entry("pspnet_student", distils=False),
    **{name: Entry(f"pspnet_student_{name}") for name in ("FeatureMimic", "MaskedGenerative", "LogitKD")},
}

_REPPOINTS: dict[str, Entry] = {
    "baseline": Entry("reppoints_student", distils=False),
    "default": Entry("reppoints_student"),
    "inherit only": Entry("reppoints_student", ["DISTILL.METHODS", "[]"]),
    **{n: Entry(f"reppoints_student_{n}") for n in ("FeatureMimic", "MaskedGenerative")},
}

_FASTER_RCNN: dict[str, Entry] = {
    "baseline": Entry("faster_rcnn_student", distils=False),
    "default": Entry("faster_rcnn_student"),
    "inherit only": Entry("faster_rcnn_student", ["DISTILL.METHODS", "[]"]),
    "FeatureMimic": Entry("faster_rcnn_student", ["DISTILL.METHODS", "['FeatureMimic']"]),
}

_GFL: dict[str, Entry] = {
    "baseline": Entry("gfl_student", distils=False),
    "default": Entry("gfl_student"),
    "inherit only": Entry("gfl_student", ["DISTILL.METHODS", "[]"]),
    "FeatureMimic": Entry("gfl_student", ["DISTILL.METHODS", "['FeatureMimic']"]),
    **{n: Entry(f"gfl_student_{n}") for n in ("LD", "CrossKD")},
    "FeatureMimic + LD": Entry("gfl_student_LD", ["DISTILL.METHODS", "['FeatureMimic','LD']"]),
}

_SOLO: dict[str, Entry] = {
    "baseline": Entry("solo_student", distils=False),
    "default": Entry("solo_student"),
    "inherit only": Entry("solo_student", ["DISTILL.METHODS", "[]"]),
    **{n: Entry(f"solo_student_{n}") for n in ("FeatureMimic", "MaskedGenerative")},
}

#: Of 0.001, 0.002 and 0.004 the best for 4,000 iterations of the baseline, which diverges at the last one.
_LONG_LR = 0.002
_DETECTION_LENGTHS = {
    "short": Length(1000, 700, 16),
    "medium": Length(16000, 8000, 8, student_lr=_LONG_LR),
    "long": Length(16000, 16000, 8, student_lr=_LONG_LR),
}


class Suite(NamedTuple):
    """A teacher, a student, and the rows of their table."""

    folder: str  # of its runs, below that of all suites
    teacher: str  # its configuration
    metric: str  # "task/name"
    called: str  # what the table calls the metric
    lengths: dict[str, Length]
    entries: dict[str, Entry]
    teacher_folder: str  # a suite may share that of another
    grand_teacher: str = ""  # the configuration of the teacher that its teacher learns from
    dataset: str = "photo_digits"  # its names end in "_val" and "_test"
    sets_images: bool = True  # whether a student's command has its images an iteration, or its configuration alone

    @property
    def marker(self) -> str:
        """What the comments of docs/accuracy.md that enclose its tables begin with."""
        return f"accuracy {self.folder}".strip()


SUITES = {
    "detection": Suite(
        folder="",
        teacher="retinanet_teacher",
        metric="bbox/AP",
        called="AP",
        lengths=_DETECTION_LENGTHS,
        entries=_RETINANET,
        teacher_folder="",
        sets_images=False,
    ),
    "classification": Suite(
        folder="classification",
        teacher="classifier_teacher",
        metric="classification/top1",
        called="% top-1",
        lengths={"short": Length(1200, 400, 64, 64)},
        entries=_CLASSIFIER,
        dataset="photo_digits_classification",
        teacher_folder="classification",
    ),
    "mobilenet": Suite(
        folder="mobilenet",
        teacher="retinanet_teacher",
        metric="bbox/AP",
        called="AP",
        lengths=_DETECTION_LENGTHS,
        entries=_MOBILENET,
        teacher_folder="",
        sets_images=False,
    ),
    "masked-classification": Suite(
        folder="masked-classification",
        teacher="classifier_vit_teacher",
        metric="classification/top1",
        called="% top-1",
        lengths={"short": Length(2000, 800, 64, 64)},
        entries=_masked("classifier_vit_student", "FEATURE_MIMIC", "LOGIT_KD"),
        dataset="photo_digits_classification",
        teacher_folder="masked-classification",
        grand_teacher="classifier_resnet_32",
    ),
    "masked-vit": Suite(
        folder="masked-vit",
        teacher="retinanet_vit_teacher",
        metric="bbox/AP",
        called="AP",
        lengths={"short": Length(2000, 1000, 16)},
        entries=_masked("retinanet_vit_student", "FEATURE_MIMIC", detector=True),
        teacher_folder="masked-vit",
        sets_images=False,
    ),
    "masked-resnet": Suite(
        folder="masked-resnet",
        teacher="retinanet_vit_teacher",
        metric="bbox/AP",
        called="AP",
        lengths={"short": Length(2000, 700, 16)},
        entries=_masked("retinanet_student", "FEATURE_MIMIC", detector=True),
        teacher_folder="masked-vit",
        sets_images=False,
    ),
    "segmentation": Suite(
        folder="segmentation",
        teacher="pspnet_teacher",
        metric="sem_seg/mIoU",
        called="mIoU",
        lengths={"short": Length(2500, 1500, 8)},
        entries=_SEGMENTATION,
        dataset="photo_digits_labels",
        teacher_folder="segmentation",
        sets_images=False,
    ),
    "reppoints": Suite(
        folder="reppoints",
        teacher="reppoints_teacher",
        metric="bbox/AP",
        called="AP",
        lengths={"short": Length(1000, 700, 16)},
        entries=_REPPOINTS,
        teacher_folder="reppoints",
        sets_images=False,
    ),
    "faster-rcnn": Suite(
        folder="faster-rcnn",
        teacher="faster_rcnn_teacher",
        metric="bbox/AP",
        called="AP",
        lengths={"short": _DETECTION_LENGTHS["short"]},
        entries=_FASTER_RCNN,
        teacher_folder="faster-rcnn",
        sets_images=False,
    ),
    "gfl": Suite(
        folder="gfl",
        teacher="gfl_teacher",
        metric="bbox/AP",
        called="AP",
        lengths={"short": _DETECTION_LENGTHS["short"]},
        entries=_GFL,
        teacher_folder="gfl",
        sets_images=False,
    ),
    "solo": Suite(
        folder="solo",
        teacher="solo_teacher",
        metric="segm/AP",
        called="mask AP",
        lengths={"short": _DETECTION_LENGTHS["short"]},
        entries=_SOLO,
        teacher_folder="solo",
        sets_images=False,
    ),
}

#: What `--tune` varies for a row, by the factors below from the default.
TUNED = {
    "FeatureMimic": "DISTILL.FEATURE_MIMIC.WEIGHT",
    "MaskedGenerative": "DISTILL.MASKED_GENERATIVE.WEIGHT",
    "ReceptiveTokens": "DISTILL.RECEPTIVE_TOKENS.WEIGHT",
    "ChannelMatching": "DISTILL.CHANNEL_MATCHING.WEIGHT",
    "LogitKD": "DISTILL.LOGIT_KD.WEIGHT",
    "HeadRegression": "DISTILL.HEAD_REGRESSION.WEIGHT",
    "CrossKD": "DISTILL.CROSS_KD.WEIGHT",
    "LD": "DISTILL.LD.WEIGHT",
    "MaskedGenerative + CrossKD, limited": "DISTILL.BALANCE_RATIO",
}
FACTORS = (0.25, 1.0, 4.0, 16.0)
TUNING_SEED = 0


def tuned(suite: Suite) -> dict[str, str]:
    """What `--tune` varies for the rows of a suite."""
    return {name: key for name, key in TUNED.items() if name in suite.entries}
