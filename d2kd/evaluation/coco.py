"""COCO's metrics, whatever the ids of a dataset: back-ends see images, annotations and categories as 1, 2, 3, ..."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from pycocotools.coco import COCO

from d2kd.data.coco import CocoFile, SegmentationError, area_of, parse_coco, usable_segmentation
from detectron2.evaluation import COCOEvaluator

Entries = list[dict[str, Any]]

#: Detections with a lower score are written without their points, which are for pictures only.
POINTS_FROM = 0.1


class NumberedCOCO(COCO):
    """Ground truth under ids of its own; detections come in with the user's.

    Back-ends keep ids as floats, or take id 0 for "none", so that the metrics would depend on the numbering. Images and
    annotations are numbered in the order of the file, categories in the order of their ids (that of the classes).
    """

    def __init__(self, file: CocoFile) -> None:
        """
        Args:
            file: the ground truth; it is not changed.

        Raises:
            DatasetError: the area of an annotation is no number.
        """
        super().__init__()
        self._images = {image["id"]: n for n, image in enumerate(file.images, 1)}
        self._categories = {category["id"]: n for n, category in enumerate(file.sorted_categories(), 1)}
        self.dataset = {
            "images": [{**image, "id": n} for n, image in enumerate(file.images, 1)],
            "annotations": [self._numbered(file, n, a) for n, a in enumerate(file.annotations, 1)],
            "categories": [{**c, "id": n} for n, c in enumerate(file.sorted_categories(), 1)],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            self.createIndex()

    def _numbered(self, file: CocoFile, number: int, annotation: dict[str, Any]) -> dict[str, Any]:
        image = self._images[annotation["image_id"]]
        numbered = {
            **annotation,
            "id": number,
            "image_id": image,
            "category_id": self._categories[annotation["category_id"]],
            "area": area_of(file, annotation),
        }
        if numbered["area"] is None:
            width, height = annotation["bbox"][2:]
            numbered["area"] = max(width, 0) * max(height, 0)
        try:
            size = file.images[image - 1]["height"], file.images[image - 1]["width"]
            numbered["segmentation"] = usable_segmentation(annotation.get("segmentation"), *size)
        except SegmentationError:  # an error in the check of the dataset, for models with masks
            numbered.pop("segmentation", None)
        return numbered

    def image_number(self, image_id: Any) -> int:
        """Returns the id of an image here."""
        return self._images[image_id]

    def loadRes(self, resFile: Entries) -> COCO:
        """Returns detections, given in COCO's result format with the user's ids, under the ids here."""
        return super().loadRes(
            [
                {
                    **result,
                    "image_id": self._images[result["image_id"]],
                    "category_id": self._categories[result["category_id"]],
                }
                for result in resFile
            ]
        )


class _ByUserIds:
    """Ground truth as the evaluation of proposals asks for it: by the ids in predictions, which are the user's."""

    def __init__(self, coco: NumberedCOCO) -> None:
        self._coco = coco
        self.loadAnns = coco.loadAnns

    @property
    def dataset(self) -> Any:
        return self._coco.dataset

    def getAnnIds(self, imgIds: Any) -> list[int]:
        """Takes one id, as Detectron2 gives it, or a list of them."""
        ids = imgIds if isinstance(imgIds, (list, tuple)) else [imgIds]
        return self._coco.getAnnIds(imgIds=[self._coco.image_number(i) for i in ids])


class CocoEvaluator(COCOEvaluator):
    """Detectron2's evaluator; its numbers do not depend on the ids of the dataset, which stay in what it writes.

    Detections have their points too, `points` as [[x, y], ...] in pixels, where a model gives `pred_points`.

    Attributes:
        without_predictions: the tasks of the last evaluation for which the model has predicted nothing.
    """

    def __init__(self, dataset_name: str, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of `COCOEvaluator`.

        Raises:
            DatasetError: the dataset is no sound COCO file.
        """
        super().__init__(dataset_name, *args, **kwargs)
        self.without_predictions: set[str] = set()
        path = self._metadata.json_file
        content: Any = self._coco_api.dataset
        self._coco_api: Any = NumberedCOCO(parse_coco(path, content, need_annotations=False))

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """As in `COCOEvaluator`."""
        super().process(inputs, outputs)
        written = {entry["image_id"]: entry.get("instances", []) for entry in self._predictions[-len(outputs) :]}
        for entry, output in zip(inputs, outputs):
            if "instances" in output and output["instances"].has("pred_points"):
                every_points = output["instances"].pred_points.double().cpu().numpy().round(1).tolist()
                for result, points in zip(written[entry["image_id"]], every_points):
                    if result["score"] >= POINTS_FROM:
                        result["points"] = points

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> Any:
        """As in `COCOEvaluator`; `img_ids` are the dataset's."""
        return super().evaluate(None if img_ids is None else [self._coco_api.image_number(i) for i in img_ids])

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None) -> Any:
        (self.without_predictions.discard if coco_eval is not None else self.without_predictions.add)(iou_type)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def _eval_box_proposals(self, predictions: Entries) -> None:
        numbered = self._coco_api
        self._coco_api = _ByUserIds(numbered)
        try:
            super()._eval_box_proposals(predictions)
        finally:
            self._coco_api = numbered
