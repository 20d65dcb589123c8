"""Accuracy of image classifiers: top-1, top-5, and top-1 of each class."""

import json
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from d2kd.data.classes import class_names_of
from d2kd.files import replacing
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

logger = logging.getLogger(__name__)

#: Classes of an image that are kept, and among which its own counts as found.
TOP = 5


class ClassificationEvaluator(DatasetEvaluator):
    """Compares scores of classes with labels; the result does not depend on batches or the number of processes.

    Of classes with equal scores the first ones come first. An image with scores that are not finite is a mistake.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: a registered dataset, whose classes the results name.
            output_dir: for `classification_predictions.json`; None writes nothing.
        """
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._predictions: list[dict[str, Any]] = []
        self._num_classes = 0

    def reset(self) -> None:
        """Forgets all predictions."""
        self._predictions = []

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """
        Args:
            inputs: with `label`, `image_id`, `file_name`.
            outputs: with `scores`, (K,).
        """
        if not outputs:
            return
        scores = torch.stack([output["scores"].detach() for output in outputs]).float()
        self._num_classes = scores.shape[1]
        finite = scores.isfinite().all(dim=1).tolist()
        best, classes = (x[:, :TOP].tolist() for x in scores.sort(dim=1, descending=True, stable=True))
        for x, is_finite, *found in zip(inputs, finite, classes, best):
            found_classes, found_scores = found if is_finite else ([], [])
            self._predictions.append(
                {
                    "image_id": x["image_id"],
                    "file_name": x["file_name"],
                    "label": int(x["label"]),
                    "classes": found_classes,
                    "scores": found_scores,
                }
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gathers the predictions of all processes; all of them must call it.

        Returns:
            {"classification": {"top1", "top5", "top1-<class>", ...}} in percent, in the main process, {} in others.
            There is no top5 for `TOP` classes or fewer; that of a class without images is nan.
        """
        gathered = comm.gather((self._num_classes, self._predictions), dst=0)
        if not comm.is_main_process():
            return {}
        predictions = [prediction for _, part in gathered for prediction in part]
        if not predictions:
            logger.warning("There are no predictions on %s to evaluate.", self._dataset_name)
            return {}
        predictions.sort(key=lambda prediction: prediction["image_id"])
        if self._output_dir is not None:
            with replacing(os.path.join(self._output_dir, "classification_predictions.json")) as temporary:
                temporary.write_text(json.dumps(predictions), encoding="utf-8")
        lost = sum(not prediction["classes"] for prediction in predictions)
        if lost:
            logger.warning(
                "The scores of %d of %d images of %s are not finite: these count as mistakes.",
                lost,
                len(predictions),
                self._dataset_name,
            )
        results = self._accuracies(predictions, max(number for number, _ in gathered))
        logger.info(
            "Evaluation results for classification on %d images: %s",
            len(predictions),
            ", ".join(f"{name} {results[name]:.3f}" for name in ("top1", "top5") if name in results),
        )
        return {"classification": results}

    def _accuracies(self, predictions: Sequence[dict[str, Any]], num_classes: int) -> dict[str, float]:
        names = class_names_of(self._dataset_name) or list(map(str, range(num_classes)))
        hits = [prediction["classes"][:1] == [prediction["label"]] for prediction in predictions]
        results = {"top1": _percent(hits)}
        if len(names) > TOP:
            results["top5"] = _percent([prediction["label"] in prediction["classes"] for prediction in predictions])
        of_class: list[list[bool]] = [[] for _ in names]
        for prediction, hit in zip(predictions, hits):
            of_class[prediction["label"]].append(hit)
        results.update({f"top1-{name}": _percent(own) for name, own in zip(names, of_class)})
        return results


def _percent(hits: Sequence[bool]) -> float:
    return 100 * sum(hits) / len(hits) if hits else math.nan
