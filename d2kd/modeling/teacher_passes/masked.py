"""MaskedTeacher: a vision transformer that looks only at what the student attends to ("MaskedKD", arXiv 2302.10494)."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2kd.config import declare_keys
from d2kd.distillers import TapPair
from d2kd.errors import ConfigError
from d2kd.layers import RandomMasks, gather_tokens, own_or_runs_seed, resample_saliency, scatter_tokens
from d2kd.settings import setting
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from detectron2.utils import comm

from ..architectures import architecture_of
from ..padding import Padding
from ..taps import FeatureTaps
from ..teacher import BatchedInputs, Teacher
from .base import TEACHER_PASSES, TeacherFeatures, TeacherPass
from .saliency import SALIENCIES, Saliency, Sizes, build_saliency, grid_of, transformer_of
from .selection import Selection, fewest_patches, patches_of_objects, select, valid_patches
from .sparse_vit import SparseViT, vit_of

SELECTORS = ("student", "random")
UNITS = ("token", "window")

declare_keys(  # TEACHER_PASS "MaskedTeacher" of any method
    "DISTILL.MASKED_TEACHER",
    KEEP_RATIO=setting(0.5, "Share of the teacher's patches that it computes.", above=0, at_most=1),
    KEEP=setting(0, "Number of patches, instead of KEEP_RATIO; 0 = by that.", at_least=0),
    SELECTOR=setting(
        "student",
        "Which patches: student, those that it looks at most | random, as a control.",
        choices=SELECTORS,
    ),
    SALIENCY=setting(
        "auto",
        "What the student looks at: attention, of the class token in its last block (without such a token, what all "
        "patches attend to) | evidence, the best score or objectness of a detector's head, or the entropy of a "
        "segmentor's | magnitude, of a map of stride 16 or the last one | auto: the first of these that it has | both: "
        "the mean of the ranks of evidence and of attention, or of magnitude without that.",
        choices=SALIENCIES,
    ),
    UNIT=setting("token", "token: single patches | window: whole windows of a detector's teacher.", choices=UNITS),
    LATE_BLOCKS=setting(
        0, "Blocks of a detector's teacher that see all patches, before the others are dropped.", at_least=0
    ),
    MUST_KEEP=setting(False, "Keep patches of objects first, up to half of all that are kept, in detectors."),
    EXPLORE=setting(0.0, "Share of the kept patches that are drawn at random.", at_least=0, at_most=1),
    WINDOW_FLOOR=setting(0, "Patches that every window of a detector's teacher keeps at least.", at_least=0),
    SEED=setting(-1, "Seed of what is random; -1 = SEED of the run.", at_least=-1),
    VIS_PERIOD=setting(
        0,
        "Iterations between pictures of the kept patches over some training images, in OUTPUT_DIR/masking; 0: none.",
        at_least=0,
    ),
)


@TEACHER_PASSES.register()
class MaskedTeacher(TeacherPass):
    """Runs a vision transformer, after the student, on the patches that the student looks at most.

    All patches are embedded and get their positions; the others are dropped before the first block. In classifiers of
    timm, tokens before the patches stay: exact for DeiT (whose class token has a position), DeiT III (whose has none)
    and CaiT (whose enters in the last blocks). In detectors with Detectron2's `ViT`, windows, relative positions and
    padding are those of the whole image (see `SparseViT`), and neither neck nor head is run; but in segmentors a head
    that looks at each patch by itself is, see `LinearSemSegHead`.
    """

    needs_student = True

    #: Side of a patch in pixels.
    patch: int

    def __init__(
        self, teacher: Teacher, taps: Iterable[str], saliency: Saliency | None, how: Selection, seed: int = 0
    ) -> None:
        """
        Args:
            teacher: with a vision transformer of timm (a classifier) or of Detectron2.
            taps: "logits" and blocks of a classifier, or the transformer's own output and those of a local head.
            saliency: watches the student; None keeps random patches.
            how: how many patches are kept, and which.
            seed: of what is random.

        Raises:
            ConfigError: the teacher has no such transformer, not so many patches, or the taps are not of it.
        """
        super().__init__(teacher, taps)
        self.saliency = saliency
        self.how = how
        self.masks = RandomMasks(seed, stream=comm.get_rank())

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: nn.Module, teacher: Teacher, pairs: Iterable[TapPair]
    ) -> "MaskedTeacher":
        """As in the base class, with DISTILL.MASKED_TEACHER.

        Raises:
            ConfigError: teacher or student are not made for it.
        """
        node = cfg.DISTILL.MASKED_TEACHER
        how = Selection(node.KEEP_RATIO, node.KEEP, node.EXPLORE, node.MUST_KEEP, node.WINDOW_FLOOR, node.UNIT)
        taps = [pair.teacher.name for pair in pairs]
        kind: type[MaskedTeacher]
        if vit_of(teacher.model) is not None:
            kind = _MaskedDetector
        elif transformer_of(teacher.model) is not None:
            kind = _MaskedClassifier
        else:
            raise ConfigError(
                "TEACHER_PASS MaskedTeacher drops patches of a vision transformer (timm's in an ImageClassifier, or "
                "MODEL.VIT), and the teacher has none: set it to auto."
            )
        saliency = build_saliency(node.SALIENCY, student) if node.SELECTOR == "student" else None
        masked = kind(teacher, taps, saliency, how, own_or_runs_seed(node.SEED, cfg.SEED))
        masked.configure(node)
        return masked

    def configure(self, node: CfgNode) -> None:
        """Takes what only one kind of network has, and refuses what it has not.

        Raises:
            ConfigError: a key of DISTILL.MASKED_TEACHER has no meaning here.
        """

    def watch(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context that watches what the student looks at."""
        return contextlib.nullcontext() if self.saliency is None else self.saliency.watch()

    def choose(self, batched_inputs: BatchedInputs, guidance: Any) -> Tensor:
        """Returns which patches are kept, (N, H, W) bool over the grid of the teacher's patches."""
        raise NotImplementedError

    def scores(self, guidance: Any, images: int, grid: tuple[int, int], patch: float, sizes: Sizes = None) -> Tensor:
        """Returns what patches of so many pixels are chosen by, (N, H, W) on their grid, in images of these sizes."""
        if self.saliency is None:
            return self._random(images, grid)
        saliency, stride = self.saliency(guidance, sizes)
        return resample_saliency(saliency, stride / patch, grid)

    def _random(self, images: int, grid: tuple[int, int]) -> Tensor:
        return self.masks.uniform((images, *grid), next(self.teacher.model.parameters()).device)

    def _explored(self, images: int, grid: tuple[int, int]) -> Tensor | None:
        return self._random(images, grid) if self.how.explore else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the random sequence, where something is random."""
        return self.masks.state() if self.saliency is None or self.how.explore else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues that sequence."""
        self.masks.load_state(dict(state))


class _MaskedClassifier(MaskedTeacher):
    """On a classifier of timm."""

    def __init__(self, teacher: Teacher, taps: Iterable[str], *arguments: Any) -> None:
        super().__init__(teacher, taps, *arguments)
        self.network = transformer_of(teacher.model)
        network: Any = self.network
        self.prefix = architecture_of(teacher.model).prefix_tokens(network.blocks[0]) or 0
        self.grid = grid_of(network.patch_embed)
        self.patch = int(network.patch_embed.patch_size[0])
        _check_number(self.how, self.grid)
        self._taps = FeatureTaps(teacher.model, self.taps)
        # their maps are made here, of tokens that are no square any more
        self._of_tokens = {tap.name for tap in self._taps.taps if tap.prefix_tokens is not None}
        self._taps.taps = [tap._replace(prefix_tokens=None) for tap in self._taps.taps]

    def configure(self, node: CfgNode) -> None:
        """As in the base class: a classifier's images have no objects, and its transformer no windows."""
        for key, off in (("UNIT", "token"), ("LATE_BLOCKS", 0), ("MUST_KEEP", False), ("WINDOW_FLOOR", 0)):
            if node[key] != off:
                raise ConfigError(
                    f"DISTILL.MASKED_TEACHER.{key} is {node[key]}, which is for teachers of detectors: set it to {off}."
                )

    @property
    def sparse(self) -> bool:
        """Whether a block is tapped, whose map is known at the kept patches only; logits are whole."""
        return bool(self._of_tokens)

    @torch.no_grad()
    def __call__(self, batched_inputs: BatchedInputs, guidance: Any, dense: Mapping[str, Tensor]) -> TeacherFeatures:
        """As in the base class; blocks give maps that are known where patches were kept."""
        kept = self._select(len(batched_inputs), guidance)
        with self._keeping(kept):
            maps = self.teacher.record(batched_inputs, self._taps)
        valid = {}
        for name in self._of_tokens:
            maps[name], valid[name] = scatter_tokens(maps[name], kept, self.grid, self.prefix)
        return TeacherFeatures(maps, valid)

    def choose(self, batched_inputs: BatchedInputs, guidance: Any) -> Tensor:
        """As in the base class."""
        return _map_of(self._select(len(batched_inputs), guidance), self.grid)

    def _select(self, images: int, guidance: Any) -> Tensor:
        scores = self.scores(guidance, images, self.grid, self.patch)
        everywhere = torch.ones_like(scores, dtype=torch.bool)
        explored = self._explored(images, self.grid)
        return select(self.how, scores, everywhere, random=explored, available=self.grid[0] * self.grid[1])

    @contextlib.contextmanager
    def _keeping(self, kept: Tensor) -> Iterator[None]:
        """Lets the blocks of the network get the kept tokens only."""
        network: Any = self.network
        handle = network.blocks.register_forward_pre_hook(
            lambda module, args: (gather_tokens(args[0], kept, self.prefix), *args[1:])
        )
        with handle:
            yield


class _MaskedDetector(MaskedTeacher):
    """On a detector or segmentor with Detectron2's plain vision transformer."""

    sparse = True

    def __init__(self, teacher: Teacher, taps: Iterable[str], *arguments: Any) -> None:
        super().__init__(teacher, taps, *arguments)
        network: Any = vit_of(teacher.model)
        self.network = SparseViT(network)
        self.patch = int(network.patch_embed.proj.stride[0])
        self.window = max((block.window_size for block in network.blocks), default=0)
        (self.output,) = network.output_shape()
        self._head_taps = FeatureTaps(teacher.model, [tap for tap in self.taps if tap != self.output])
        head: Any = getattr(teacher.model, "sem_seg_head", None)
        # a head that looks at each place by itself gives the kept ones exactly
        local = getattr(head, "token_local", False) and getattr(head, "in_feature", "") == self.output
        wrong = [t.name for t in self._head_taps.taps if not (local and t.name.startswith("sem_seg_head."))]
        if wrong:
            raise ConfigError(
                f"TEACHER_PASS MaskedTeacher gives {self.output}, the transformer's own output, and no {wrong[0]}, "
                f"which needs all patches: name {self.output} in TEACHER_TAPS."
            )

    def configure(self, node: CfgNode) -> None:
        """As in the base class."""
        depth = len(self.network.network.blocks)
        if node.LATE_BLOCKS >= depth:
            raise ConfigError(
                f"DISTILL.MASKED_TEACHER.LATE_BLOCKS is {node.LATE_BLOCKS}, and the teacher has {depth} blocks: "
                "it must be less."
            )
        self.network.dense_blocks = node.LATE_BLOCKS
        if (node.UNIT == "window" or node.WINDOW_FLOOR) and not self.window:
            key = "UNIT is window" if node.UNIT == "window" else f"WINDOW_FLOOR is {node.WINDOW_FLOOR}"
            raise ConfigError(f"DISTILL.MASKED_TEACHER.{key}, and the teacher has no windows.")

    @torch.no_grad()
    def __call__(self, batched_inputs: BatchedInputs, guidance: Any, dense: Mapping[str, Tensor]) -> TeacherFeatures:
        """As in the base class; the map is known where patches were kept."""
        with self.teacher.autocast():
            images = self._images(batched_inputs)
            kept = self._select(batched_inputs, guidance, images)
            grid = self.network.grid(images.tensor)
            tokens = self.network(images.tensor, kept)
            features, valid = scatter_tokens(tokens, kept, grid, 0)
            maps = {self.output: features, **self._of_head(features)}
        return TeacherFeatures(maps, dict.fromkeys(maps, valid))

    def _of_head(self, features: Tensor) -> dict[str, Tensor]:
        """What is tapped in the head; nothing is enlarged."""
        if not self._head_taps.taps:
            return {}
        model: Any = self.teacher.model
        with self._head_taps.recording() as maps:
            model.sem_seg_head.layers({self.output: features})
        return dict(maps)

    def choose(self, batched_inputs: BatchedInputs, guidance: Any) -> Tensor:
        """As in the base class."""
        images = self._images(batched_inputs)
        return _map_of(self._select(batched_inputs, guidance, images), self.network.grid(images.tensor))

    def _images(self, batched_inputs: BatchedInputs) -> Any:
        model: Any = self.teacher.model
        inputs = self.teacher.prepare(batched_inputs)
        Padding.of(model).require_fit(inputs)  # its forward pass, which checks this, does not run
        if hasattr(model, "preprocess_image"):
            return model.preprocess_image(inputs)
        # Detectron2's SemanticSegmentor has this in its forward pass
        images = [(x["image"].to(model.device) - model.pixel_mean) / model.pixel_std for x in inputs]
        backbone = model.backbone
        return ImageList.from_tensors(
            images, backbone.size_divisibility, padding_constraints=backbone.padding_constraints
        )

    def _select(self, batched_inputs: BatchedInputs, guidance: Any, images: Any) -> Tensor:
        sizes, grid = images.image_sizes, self.network.grid(images.tensor)
        _check_number(self.how, grid)
        scores = self.scores(guidance, len(sizes), grid, self.patch, sizes)
        objects = None
        if self.how.must_keep:
            truth = [x["instances"].gt_boxes.tensor for x in batched_inputs if "instances" in x]
            boxes = [x.to(scores.device, non_blocking=True) for x in truth]
            objects = patches_of_objects(boxes, grid, self.patch) if len(boxes) == len(sizes) else None
        return select(
            self.how,
            scores,
            valid_patches(sizes, grid, self.patch, scores.device),
            objects=objects,
            random=self._explored(len(sizes), grid),
            window=self.window,
            available=fewest_patches(sizes, grid, self.patch),
        )


def _map_of(kept: Tensor, grid: tuple[int, int]) -> Tensor:
    chosen = torch.zeros(len(kept), grid[0] * grid[1], dtype=torch.bool, device=kept.device)
    return chosen.scatter_(1, kept, True).unflatten(1, grid)


def _check_number(how: Selection, grid: tuple[int, int]) -> None:
    if how.keep > grid[0] * grid[1]:
        raise ConfigError(
            f"DISTILL.MASKED_TEACHER.KEEP is {how.keep}, and the teacher has {grid[0] * grid[1]} patches, {grid[0]} x "
            f"{grid[1]}."
        )
