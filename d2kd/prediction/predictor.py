"""A model with its own preprocessing: images in, predictions out."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from d2kd.data.coco import DatasetError
from d2kd.data.mapper import build_mapper, wrap_mapper
from d2kd.errors import ConfigError
from d2kd.evaluation.coco import POINTS_FROM
from d2kd.modeling import build_network, load_strictly
from d2kd.modeling.architectures import architecture_of, check_test_augmentation
from detectron2.config import CfgNode
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from .classes import ClassList, known_classes
from .panoptic import PanopticMap, read_panoptic

logger = logging.getLogger(__name__)

#: How many classes of an image are kept, best first.
TOP = 5

_ARRAY = (
    "an array of uint8 (height, width, 3), colors in the order BGR, as cv2.imread gives it: of an RGB image of Pillow "
    "np.asarray(image)[:, :, ::-1]."
)

#: An image as a path, or as uint8 (H, W, 3) BGR.
Image = str | os.PathLike[str] | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image; None where it does not predict such a thing.

    Attributes:
        detections: best first as the model gives them, in COCO's result format: `bbox` [x, y, width, height] in pixels
            of the image, `score`, perhaps `segmentation` (RLE) and `points`; `category_id` is the model's class.
        labels: class of every pixel, int (H, W).
        classes: the best classes of the whole image with their scores, best first.
        panoptic: things and stuff in one map.
    """

    detections: list[dict[str, Any]] | None = None
    labels: np.ndarray | None = None
    classes: list[tuple[int, float]] | None = None
    panoptic: PanopticMap | None = None


class Predictor:
    """Predicts as an evaluation does: in evaluation mode, with the model's own size and order of channels.

    Whatever else turns images into Detectron2's output format can take the place of the model.

    >>> predictor = d2kd.Predictor.from_config(d2kd.load_config("student.yaml"), "model_final.pth")
    >>> predictor("photograph.jpg").detections

    Attributes:
        classes: names and ids by kind, "thing_classes" or "stuff_classes".
    """

    def __init__(self, model: nn.Module, mapper: Any, classes: Mapping[str, ClassList]) -> None:
        """
        Args:
            model: takes what `mapper` gives, in Detectron2's formats; it is put into evaluation mode.
            mapper: from {"file_name"} or {"frame"} to the model's input.
            classes: see above.
        """
        self.model = model.eval()
        self.mapper = mapper
        self.classes = dict(classes)

    @classmethod
    def from_config(cls, cfg: CfgNode, weights: str | os.PathLike[str] = "") -> "Predictor":
        """Builds the model of a configuration and loads its weights, of which every key must fit.

        With `TEST.AUG.ENABLED` it predicts with test-time augmentation, as an evaluation does.

        Args:
            cfg: of the model.
            weights: its checkpoint; by default MODEL.WEIGHTS.

        Raises:
            ConfigError: no weights are given, the model needs more than an image, or TEST.AUG asks for augmentation
                that there is none of for this architecture.
            StrictLoadingError: they do not fit.
        """
        path = os.fspath(weights) or cfg.MODEL.WEIGHTS
        if not path:
            raise ConfigError("There are no weights to predict with: give --weights model_final.pth (MODEL.WEIGHTS).")
        if cfg.MODEL.LOAD_PROPOSALS:
            raise ConfigError("MODEL.LOAD_PROPOSALS is True: this model needs proposals that come with a dataset.")
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            raise ConfigError("MODEL.META_ARCHITECTURE ProposalNetwork predicts regions without classes: train a head.")
        check_test_augmentation(cfg)
        model = build_network(cfg, "--config-file")
        saved = load_strictly(model, path, "student", "--config-file and --weights")
        if cfg.TEST.AUG.ENABLED:
            sizes = ", ".join(map(str, cfg.TEST.AUG.MIN_SIZES))
            flips = ", plain and flipped" if cfg.TEST.AUG.FLIP else ""
            logger.info("Test-time augmentation (TEST.AUG): each image at the sizes %s%s", sizes, flips)
            model = architecture_of(model).with_test_augmentation(cfg, model.eval())
        mapper = wrap_mapper(build_mapper(cfg, is_train=False), "error", evaluates=True, advice="")
        return cls(model, mapper, known_classes(cfg, saved.get("class_names"), path))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], device: str = "cpu", threads: int = 0) -> "Predictor":
        """Opens what `d2kd export` has written: an ONNX or TorchScript file, which needs no configuration.

        Args:
            path: .onnx, .pt or .ts.
            device: "cpu", or "cuda" for ONNX.
            threads: of ONNX Runtime; 0 for as many as there are cores.

        Raises:
            ExportError: it cannot be read, was not written by d2kd, or does not run on the device.
        """
        from .exported_file import ExportedModel, classes_of, mapper_of

        model = ExportedModel(path, device, threads)
        return cls(model, mapper_of(model.about), classes_of(model.about))

    def prepare(self, image: Image) -> dict[str, Any]:
        """Returns the model's input, with `height` and `width` of the image.

        Raises:
            DatasetError: it cannot be read, or is no such array.
        """
        if isinstance(image, np.ndarray):
            _check_array(image)
            record: dict[str, Any] = {"frame": image}
        elif isinstance(image, (str, os.PathLike)):
            record = {"file_name": os.fspath(image)}
        else:
            raise DatasetError(f"The image is of type {type(image).__name__}; it must be a path, or {_ARRAY}")
        return dict(self.mapper({**record, "image_id": 0}))

    def predict(self, inputs: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        """Returns what the model says of a batch of its inputs (see `prepare`)."""
        with torch.no_grad():
            return [read_output(output) for output in self.model(list(inputs))]

    def __call__(self, image: Image) -> Prediction:
        """Returns what the model says of one image, all detections that it gives.

        Raises:
            DatasetError: the image cannot be read, or is no such array.
        """
        return self.predict([self.prepare(image)])[0]


def _check_array(image: np.ndarray) -> None:
    """Other arrays would be read as something that they are not: a fourth channel moves the colors by one."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DatasetError(f"The image is an array of {image.dtype} {image.shape}; it must be {_ARRAY}")


def read_output(output: Mapping[str, Any]) -> Prediction:
    """Turns Detectron2's output for one image into a `Prediction`.

    Raises:
        ConfigError: it is of a kind that is not known here.
    """
    if not {"instances", "sem_seg", "scores"} & output.keys():
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE: the model predicts {', '.join(map(str, output)) or 'nothing'}, of which there "
            "are no pictures: instances, sem_seg and scores are known."
        )
    return Prediction(
        detections=_detections(output["instances"]) if "instances" in output else None,
        labels=output["sem_seg"].argmax(dim=0).cpu().numpy().astype(np.int32) if "sem_seg" in output else None,
        classes=_best_classes(output["scores"]) if "scores" in output else None,
        panoptic=read_panoptic(output),
    )


def _detections(instances: Any) -> list[dict[str, Any]]:
    instances = instances.to("cpu")
    found: list[dict[str, Any]] = instances_to_coco_json(instances, 0)
    if instances.has("pred_points"):
        for detection, points in zip(found, instances.pred_points.double().numpy().round(1).tolist()):
            if detection["score"] >= POINTS_FROM:
                detection["points"] = points
    return found


def _best_classes(scores: torch.Tensor) -> list[tuple[int, float]]:
    best, classes = scores.float().cpu().sort(descending=True, stable=True)
    return list(zip(classes[:TOP].tolist(), best[:TOP].tolist()))
