"""COCO metrics of boxes, instance masks and proposals."""

import contextlib
import copy
import io
import itertools
import json
import logging
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from d2lite.config import CfgNode
from d2lite.data import MetadataCatalog
from d2lite.evaluation.evaluator import DatasetEvaluator
from d2lite.evaluation.fast_eval_api import COCOeval_opt
from d2lite.evaluation.proposal_evaluation import evaluate_box_proposals
from d2lite.structures import BoxMode, Instances
from d2lite.utils import comm
from d2lite.utils.file_io import PathManager
from d2lite.utils.logger import create_small_table
from d2lite.utils.output import complete_file, write_json

logger = logging.getLogger(__name__)

# (IoU threshold, None for the mean over 0.5:0.05:0.95, index into COCO's areas all, small, medium, large)
METRICS = {
    "AP": (None, 0),
    "AP50": (0.5, 0),
    "AP75": (0.75, 0),
    "APs": (None, 1),
    "APm": (None, 2),
    "APl": (None, 3),
}
DEFAULT_MAX_DETS = (1, 10, 100)


class COCOEvaluator(DatasetEvaluator):
    """Average precision of boxes ("bbox") and masks ("segm"), or average recall of proposals ("box_proposals").

    All numbers are percentages; nan where the dataset has no object that the metric is about.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | Sequence[int] | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        allow_cached_coco: bool = True,
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset. Its metadata names a `json_file` in COCO format, or else
                the dataset is converted to one under `output_dir`.
            tasks: any of "bbox" and "segm". By default what the predictions allow.
            distributed: gather predictions from all processes, and evaluate on the main one. Otherwise
                each process evaluates what it has seen.
            output_dir: where `coco_instances_results.json` (COCO's result format) and
                `instances_predictions.pth` go, or `box_proposals.pkl` for proposals. None writes nothing.
            max_dets_per_image: AP counts this many detections per image, 100 by default; or COCO's three
                limits.
            use_fast_impl: use faster-coco-eval if it is installed. Its numbers are those of pycocotools.
            kpt_oks_sigmas: must be empty; for compatibility.
            allow_cached_coco: reuse a converted file of an earlier run.
        """
        if isinstance(tasks, CfgNode):
            logger.warning("COCOEvaluator takes the names of tasks; the config given instead is ignored")
            tasks = None
        self._tasks = _check_tasks(tasks, kpt_oks_sigmas)
        self._distributed = distributed
        self._output_dir = output_dir
        self._max_dets_per_image = _parse_max_dets(max_dets_per_image)
        self._cocoeval: type[COCOeval] = COCOeval_opt if use_fast_impl else COCOeval
        self._metadata = MetadataCatalog.get(dataset_name)
        self._coco_api = _load_ground_truth(dataset_name, self._metadata, output_dir, allow_cached_coco)
        self._do_evaluation = "annotations" in self._coco_api.dataset  # test sets have none
        self._predictions: list[dict[str, Any]] = []
        self._results: dict[str, dict[str, float]] = OrderedDict()

    def reset(self) -> None:
        self._predictions = []

    def process(self, inputs: Iterable[dict[str, Any]], outputs: Iterable[dict[str, Any]]) -> None:
        """
        Args:
            inputs: dicts with `image_id`.
            outputs: dicts with `instances` (`pred_boxes`, `scores`, `pred_classes`[,
                `pred_masks`]) or `proposals` (`proposal_boxes`, `objectness_logits`), at the size
                of the original image.
        """
        for entry, output in zip(inputs, outputs):
            prediction = {"image_id": entry["image_id"]}
            if "instances" in output:
                instances = output["instances"].to("cpu")
                prediction["instances"] = instances_to_coco_json(instances, entry["image_id"])
            if "proposals" in output:
                prediction["proposals"] = output["proposals"].to("cpu")
            if len(prediction) > 1:
                self._predictions.append(prediction)

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """
        Args:
            img_ids: evaluate on these images only. By default on all images of the dataset.

        Raises:
            AssertionError: if a predicted class is not a class of the dataset.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(predictions, dst=0)
            if not comm.is_main_process():
                return {}
            predictions = list(itertools.chain(*gathered))
        if not predictions:
            logger.warning("COCOEvaluator did not receive valid predictions.")
            return {}
        self._results = OrderedDict()
        if "proposals" in predictions[0]:
            self._eval_box_proposals(predictions)
        if "instances" in predictions[0]:
            self._eval_predictions(predictions, img_ids)
        return copy.deepcopy(self._results)

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Sequence[int] | None = None) -> None:
        if self._output_dir:
            with complete_file(os.path.join(self._output_dir, "instances_predictions.pth")) as path:
                torch.save(predictions, path)
        coco_results = list(itertools.chain(*(p["instances"] for p in predictions)))
        tasks = self._tasks or self._tasks_from_predictions(coco_results)
        if coco_results and "segm" in tasks and "segm" not in self._tasks_from_predictions(coco_results):
            raise ValueError("COCOEvaluator is to evaluate segm, but the predictions have no pred_masks")
        self._to_dataset_category_ids(coco_results)
        if self._output_dir:
            write_json(os.path.join(self._output_dir, "coco_instances_results.json"), coco_results)
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        for task in sorted(tasks):
            coco_eval = self._run_coco_eval(coco_results, task, img_ids) if coco_results else None
            class_names = self._metadata.get("thing_classes")
            self._results[task] = self._derive_coco_results(coco_eval, task, class_names)

    def _tasks_from_predictions(self, predictions: list[dict[str, Any]]) -> set[str]:
        return {"bbox", "segm"} if any("segmentation" in p for p in predictions) else {"bbox"}

    def _to_dataset_category_ids(self, coco_results: list[dict[str, Any]]) -> None:
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_contiguous is None:
            return
        to_dataset = {contiguous: original for original, contiguous in to_contiguous.items()}
        for result in coco_results:
            label = result["category_id"]
            if label not in to_dataset:
                raise AssertionError(
                    f"A prediction has class={label}, but the dataset only has {len(to_dataset)} classes: "
                    "the model's number of classes does not fit the dataset"
                )
            result["category_id"] = to_dataset[label]

    def _run_coco_eval(self, coco_results: list[dict[str, Any]], task: str, img_ids: Sequence[int] | None) -> COCOeval:
        # A result with a box would be counted as small, medium or large by its box and not by its mask
        left_out = {"bbox"} if task == "segm" else {"segmentation"}
        results = [{k: v for k, v in r.items() if k not in left_out} for r in coco_results]
        # faster-coco-eval supports only numeric image ids; those of Cityscapes are file names
        numbered = all(isinstance(image_id, int) for image_id in self._coco_api.imgs)
        with contextlib.redirect_stdout(io.StringIO()):
            implementation = self._cocoeval if numbered else COCOeval
            coco_eval = implementation(self._coco_api, self._coco_api.loadRes(results), task)
            coco_eval.params.maxDets = self._max_dets_per_image
            if img_ids is not None:
                coco_eval.params.imgIds = img_ids
            coco_eval.evaluate()
            coco_eval.accumulate()
        return coco_eval

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Reads the metrics, and the AP of each class if there are several, from `coco_eval`."""
        if coco_eval is None:
            logger.warning("No predictions from the model!")
            return dict.fromkeys(METRICS, float("nan"))
        precision = coco_eval.eval["precision"]  # (IoU thresholds, recall thresholds, classes, areas, limits)
        thresholds = coco_eval.params.iouThrs
        results = {}
        for name, (threshold, area) in METRICS.items():
            rows = slice(None) if threshold is None else np.isclose(thresholds, threshold)
            results[name] = _percentage(precision[rows, :, :, area, -1])
        logger.info("Evaluation results for %s:\n%s", iou_type, create_small_table(results))
        if not all(np.isfinite(value) for value in results.values()):
            logger.info("Some metrics are nan: the dataset has no object that they are about.")
        if class_names is None or len(class_names) <= 1:
            return results
        if len(class_names) != precision.shape[2]:
            raise AssertionError(f"{len(class_names)} class names for {precision.shape[2]} categories")
        per_class = {name: _percentage(precision[:, :, i, 0, -1]) for i, name in enumerate(class_names)}
        logger.info("Per-category %s AP:\n%s", iou_type, _category_table(per_class))
        results.update({f"AP-{name}": value for name, value in per_class.items()})
        return results

    def _eval_box_proposals(self, predictions: list[dict[str, Any]]) -> None:
        if self._output_dir:
            _write_proposals(os.path.join(self._output_dir, "box_proposals.pkl"), predictions)
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        recalls = {}
        for limit in (100, 1000):
            for area, suffix in (("all", ""), ("small", "s"), ("medium", "m"), ("large", "l")):
                stats = evaluate_box_proposals(predictions, self._coco_api, area=area, limit=limit)
                recalls[f"AR{suffix}@{limit}"] = stats["ar"] * 100
        logger.info("Proposal metrics:\n%s", create_small_table(recalls))
        self._results["box_proposals"] = recalls


def instances_to_coco_json(instances: Instances, img_id: int) -> list[dict[str, Any]]:
    """Turns the detections of one image into COCO's result format.

    Args:
        instances: on the CPU, with `pred_boxes` (N, 4) XYXY, `scores` (N,), `pred_classes` (N,) and
            perhaps `pred_masks` (N, H, W).
        img_id: the image's id in the dataset.

    Returns:
        N dicts with `image_id`, `category_id` (still the model's), `bbox` (XYWH), `score` and,
        where there are masks, `segmentation` as compressed RLE.
    """
    if len(instances) == 0:
        return []
    boxes = instances.pred_boxes.tensor.detach().numpy().copy()
    boxes[:, 2:] -= boxes[:, :2]
    results = [
        {"image_id": img_id, "category_id": label, "bbox": box, "score": score}
        for label, box, score in zip(instances.pred_classes.tolist(), boxes.tolist(), instances.scores.tolist())
    ]
    if instances.has("pred_masks"):
        masks = np.asarray(instances.pred_masks, dtype=np.uint8)
        for result, rle in zip(results, mask_util.encode(np.asfortranarray(masks.transpose(1, 2, 0)))):
            result["segmentation"] = {**rle, "counts": rle["counts"].decode("ascii")}
    return results


def _check_tasks(tasks: Sequence[str] | None, kpt_oks_sigmas: Sequence[float]) -> set[str] | None:
    if len(kpt_oks_sigmas) or "keypoints" in (tasks or ()):
        raise NotImplementedError("COCOEvaluator: d2lite does not evaluate keypoints; Detectron2 does.")
    if tasks is None:
        return None
    if isinstance(tasks, str) or not set(tasks) <= {"bbox", "segm"}:
        raise ValueError(f'COCOEvaluator: tasks is {tasks!r}, but must be a list of "bbox" and "segm"')
    return set(tasks)


def _parse_max_dets(max_dets_per_image: int | Sequence[int] | None) -> list[int]:
    if max_dets_per_image is None:
        return list(DEFAULT_MAX_DETS)
    if isinstance(max_dets_per_image, int):
        return [*DEFAULT_MAX_DETS[:2], max_dets_per_image]
    if len(max_dets_per_image) < 3:
        raise AssertionError(f"max_dets_per_image is {max_dets_per_image}, but must have at least 3 entries")
    return list(max_dets_per_image)


def _load_ground_truth(dataset_name: str, metadata: Any, output_dir: str | None, allow_cached: bool) -> COCO:
    if not hasattr(metadata, "json_file"):
        from d2lite.data.datasets.coco import convert_to_coco_json

        if output_dir is None:
            raise ValueError(
                f"Dataset {dataset_name!r} is not in COCO format: give COCOEvaluator an output_dir for a converted copy"
            )
        metadata.json_file = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
        convert_to_coco_json(dataset_name, metadata.json_file, allow_cached=allow_cached)
    coco_api = COCO()
    with PathManager.open(metadata.json_file, "rb") as file:  # bytes, of which JSON tells the encoding
        coco_api.dataset = json.load(file)
    with contextlib.redirect_stdout(io.StringIO()):
        coco_api.createIndex()
    for annotation in coco_api.dataset.get("annotations", ()):
        annotation.setdefault("iscrowd", 0)
        width, height = annotation["bbox"][2:]
        annotation.setdefault("area", max(width, 0) * max(height, 0))
    return coco_api


def _write_proposals(path: str, predictions: list[dict[str, Any]]) -> None:
    """Writes proposals in the format that a dataset's precomputed proposals are read from."""
    content = {
        "boxes": [p["proposals"].proposal_boxes.tensor.numpy() for p in predictions],
        "objectness_logits": [p["proposals"].objectness_logits.numpy() for p in predictions],
        "ids": [p["image_id"] for p in predictions],
        "bbox_mode": BoxMode.XYXY_ABS.value,
    }
    with complete_file(path) as temporary, open(temporary, "wb") as file:
        pickle.dump(content, file)


def _percentage(precision: np.ndarray) -> float:
    """Mean of the entries that exist (COCO marks the others with -1), in percent; nan if there are none."""
    valid = precision[precision > -1]
    return float(valid.mean() * 100) if valid.size else float("nan")


def _category_table(per_class: dict[str, float]) -> str:
    columns = min(6, 2 * len(per_class))
    cells = list(itertools.chain(*per_class.items()))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    headers = ["category", "AP"] * (columns // 2)
    return tabulate(rows, tablefmt="pipe", floatfmt=".3f", headers=headers, numalign="left")
