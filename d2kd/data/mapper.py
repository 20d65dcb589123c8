"""From a dataset's record to a model's input; images that cannot be used are named, or another takes their place."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from d2kd.data.classification import ClassificationMapper
from d2kd.data.coco import DatasetError
from d2kd.data.segmentation import build_augmentations
from d2kd.errors import UserError, require_choice
from d2kd.modeling.architectures import architecture_class
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T

from .images import (
    LabelMapError,
    LabelRange,
    frame_image,
    image_problem,
    image_size,
    label_map_problem,
    read_image,
    read_label_map,
)

__all__ = ["ON_BAD_IMAGE", "build_mapper", "handing_over_failures", "raise_failures", "wrap_mapper"]

logger = logging.getLogger(__name__)

ON_BAD_IMAGE = ("error", "skip")

Mapper = Callable[[dict[str, Any]], Any]


class ImageMapper(DatasetMapper):
    """Detectron2's mapper, which reads images whole or not at all, and label maps as classes, not shades."""

    @configurable
    def __init__(self, is_train: bool, *, labels: LabelRange | None = None, **arguments: Any) -> None:
        """
        Args:
            is_train: whether targets are wanted.
            labels: that label maps may have; None admits all.
            arguments: of Detectron2's mapper.
        """
        super().__init__(is_train, **arguments)
        self.labels = labels
        self._checked: set[str] = set()

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Constructor arguments from a configuration."""
        arguments = {**super().from_config(cfg, is_train), "labels": label_range(cfg)}
        kinds = {count.metadata for count, _ in architecture_class(cfg).class_counts(cfg)}
        if kinds == {"stuff_classes"}:  # a segmentor alone
            arguments["augmentations"] = build_augmentations(cfg, is_train)
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """
        Args:
            dataset_dict: one image in Detectron2's standard format, or with `frame`, uint8 (H, W, 3) BGR, in place of
                a file. It is not changed.

        Returns:
            What the model takes; in evaluation without ground truth.
        """
        record = dict(dataset_dict)
        frame = record.pop("frame", None)
        image = read_image(record["file_name"], self.image_format) if frame is None else self._decoded(frame)
        detection_utils.check_image_size(record, image)
        labels, label_file = None, record.pop("sem_seg_file_name", None)
        if self.is_train and label_file is not None:
            # the labels of a file are looked at once by each loading process
            labels = read_label_map(label_file, labels=None if label_file in self._checked else self.labels)
            self._checked.add(label_file)
        inputs = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(inputs)
        pixels = inputs.image if inputs.image.ndim == 3 else inputs.image[:, :, None]
        record["image"] = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if inputs.sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(inputs.sem_seg.astype(np.int64))
        if getattr(self, "proposal_topk", None) is not None:
            shape = inputs.image.shape[:2]
            detection_utils.transform_proposals(record, shape, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            record["annotations"] = [dict(annotation) for annotation in record["annotations"]]
            self._transform_annotations(record, transforms, inputs.image.shape[:2])
        return record

    def _decoded(self, frame: np.ndarray) -> np.ndarray:
        return detection_utils.convert_PIL_to_numpy(frame_image(frame), self.image_format)


def label_range(cfg: CfgNode) -> LabelRange | None:
    """Returns the labels that label maps may have in a training; None, which admits all, for a model without any."""
    counts = {count.metadata: number for count, number in architecture_class(cfg).class_counts(cfg)}
    classes = counts.get("stuff_classes")
    return None if classes is None else LabelRange(classes, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)


def build_mapper(cfg: CfgNode, is_train: bool) -> Mapper:
    """Returns the mapper of a configuration: in training that of the architecture, if it has one of its own."""
    architecture = architecture_class(cfg)
    own = architecture.build_mapper(cfg) if is_train else None
    if own is not None:
        return own
    usual = ClassificationMapper if architecture.CLASSIFIES_IMAGES else ImageMapper
    return usual(cfg, is_train)


def wrap_mapper(mapper: Mapper, on_bad_image: str, *, evaluates: bool = False, advice: str | None = None) -> Mapper:
    """A mapper that explains, or skips, images that cannot be decoded, that have not their listed size, or whose pixels
    are no 8-bit numbers.

    Args:
        mapper: takes a dataset dict.
        on_bad_image: "error" raises `DatasetError`; "skip" logs each file once per loading process and returns None,
            upon which the loader takes another image. Evaluation must use "error": a replaced image would go unnoticed
            in its results.
        evaluates: whether it is for evaluation, for the advice.
        advice: what the message of an error ends with; None tells how to mend the dataset.

    Raises:
        ConfigError: if `on_bad_image` is something else.
    """
    require_choice("DATASETS.ON_BAD_IMAGE", on_bad_image, ON_BAD_IMAGE)
    other = "" if evaluates else ", or set DATASETS.ON_BAD_IMAGE to skip to train without it"
    if advice is None:
        advice = f"Repair it or remove it from the dataset{other}."
    return _GuardedMapper(mapper, on_bad_image == "skip", advice)


class _GuardedMapper:
    """Looks at files before a mapper reads them for the first time, and for the cause when it fails."""

    def __init__(self, mapper: Mapper, skip: bool, advice: str) -> None:
        self.mapper = mapper
        self.skip = skip
        self.advice = advice
        self.reads_whole = getattr(mapper, "READS_WHOLE", False)
        self._sound: set[str] = set()
        self._reported: set[str] = set()

    def __call__(self, dataset_dict: dict[str, Any]) -> Any | None:
        name = str(dataset_dict.get("file_name"))
        cause: Exception | None = None
        problem = None if self.reads_whole or name in self._sound else _file_problem(dataset_dict)
        if problem is None:
            if not self.reads_whole:
                self._sound.add(name)
            try:
                return self.mapper(dataset_dict)
            except LabelMapError as error:
                problem, cause = str(error), error
            except (MemoryError, UserError):
                raise
            except Exception as error:
                problem, cause = _file_problem(dataset_dict, decode=True), error
                if problem is None:
                    raise
        if not self.skip:
            raise DatasetError(f"{problem} {self.advice}".strip()) from cause
        if problem not in self._reported:
            self._reported.add(problem)
            logger.warning("%s It is skipped (DATASETS.ON_BAD_IMAGE).", problem)
        return None


def _file_problem(record: dict[str, Any], decode: bool = False) -> str | None:
    """What is wrong with the image or the label map of a record; None if both can be read."""
    image, labels = record.get("file_name"), record.get("sem_seg_file_name")
    size = (record["width"], record["height"]) if "width" in record and "height" in record else None
    problem = None if image is None else image_problem(image, size, decode=decode)
    if problem is None and labels is not None:
        size = image_size(image) if size is None and image is not None else size
        problem = label_map_problem(labels, size, decode=decode)
    return problem


class LoadingFailure:
    """What a loading process hands over for an image that it cannot load: raised there, an error would lose its
    one line among those of the processes."""

    def __init__(self, message: str) -> None:
        """
        Args:
            message: of the error.
        """
        self.message = message


def handing_over_failures(mapper: Mapper) -> Mapper:
    """Returns a mapper that returns a `LoadingFailure` where the given one raises a `UserError`."""
    return _HandingOver(mapper)


class _HandingOver:
    def __init__(self, mapper: Mapper) -> None:
        self.mapper = mapper

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        try:
            return self.mapper(dataset_dict)
        except UserError as error:
            return LoadingFailure(str(error))


def raise_failures(batch: list[Any]) -> list[Any]:
    """Returns a batch as it is.

    Raises:
        DatasetError: one of its images could not be loaded.
    """
    for item in batch:
        if isinstance(item, LoadingFailure):
            raise DatasetError(item.message)
    return batch
