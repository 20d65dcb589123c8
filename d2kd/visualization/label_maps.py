"""True label maps and those of several models, side by side over the same images, and where they differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util

from detectron2.data import detection_utils

from .detections import FONT, GAP, header, pad_tile, resize, tile_scale
from .prediction_files import is_name, is_rle, is_whole, read_entries

#: BGR
WRONG, RIGHT, IGNORED = (60, 60, 235), (80, 200, 60), (128, 128, 128)
#: Pixels that no model is asked about.
NO_LABEL = -1
_LEGEND = 24


def label_map_grid(
    records: Sequence[dict[str, Any]],
    truths: Sequence[np.ndarray],
    class_names: Sequence[str],
    predictions: Mapping[str, "Mapping[str, np.ndarray] | LabelPredictions"],
    colors: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """Draws two rows per image: the true label map and each model's over the image; below, where each model is wrong.

    Wrong pixels are red, right ones of a class other than 0 green; gray ones do not count.

    Args:
        records: the images, in Detectron2's format.
        truths: their label maps, int (H, W), with `NO_LABEL` for pixels that do not count.
        class_names: by label.
        predictions: label maps by the path of the image, by the heading of the model's column.
        colors: RGB of each class; by default well apart.

    Returns:
        uint8 (H, W, 3) BGR.
    """
    palette = class_colors(len(class_names)) if colors is None else np.asarray(colors, np.uint8)[:, ::-1]
    rows = [header(["ground truth", *predictions])]
    for record, truth in zip(records, truths):
        image = detection_utils.read_image(record["file_name"], format="BGR")
        found = [by_file.get(record["file_name"]) for by_file in predictions.values()]
        upper = [colored(image, truth, palette), *(colored(image, labels, palette) for labels in found)]
        lower = [image, *(_differences(image, truth, labels) for labels in found)]
        scale = tile_scale(*image.shape[:2])
        for tiles in (upper, lower):
            enlarged = [resize(tile, scale) for tile in tiles]
            rows.append(np.hstack([pad_tile(tile, len(tile)) for tile in enlarged]))
    return np.vstack([*rows, legend(class_names, palette, rows[0].shape[1])])


class LabelPredictions:
    """The label maps of a model by the path of the image, as `SemSegEvaluator` writes them (sem_seg_predictions.json).

    They stay compressed until one is asked for.
    """

    def __init__(self, path: str, metadata: Any) -> None:
        """
        Args:
            path: the file.
            metadata: of the dataset; maps category ids to labels.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, or the dataset has no such category; the message says where.
        """
        to_label = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._maps: dict[str, dict[int, Any]] = {}
        classes = metadata.get("stuff_classes")
        required = {"file_name": is_name, "category_id": is_whole, "segmentation": is_rle}
        for number, result in enumerate(read_entries(path, required)):
            label = to_label.get(result["category_id"], result["category_id"])
            if classes is not None and not 0 <= label < len(classes):
                raise ValueError(
                    f"entry {number} is of category {result['category_id']}, which the dataset does not have"
                )
            masks = self._maps.setdefault(result["file_name"], {})
            if masks and next(iter(masks.values()))["size"] != result["segmentation"]["size"]:
                raise ValueError(f"entry {number} has a mask of another size than others of {result['file_name']}")
            masks[label] = result["segmentation"]

    def __contains__(self, file_name: str) -> bool:
        return file_name in self._maps

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def get(self, file_name: str) -> np.ndarray | None:
        """The label map of an image, int (H, W), `NO_LABEL` where there is none; None for an unknown image."""
        if file_name not in self._maps:
            return None
        masks = self._maps[file_name]
        labels = np.full(next(iter(masks.values()))["size"], NO_LABEL, np.int32)
        for label, mask in masks.items():
            labels[mask_util.decode(mask).astype(bool)] = label
        return labels

    def difference(self, other: "LabelPredictions", file_name: str) -> float:
        """The part of an image's pixels that both do not give the same label; of an unknown image 0."""
        ours, theirs = (maps._maps.get(file_name, {}) for maps in (self, other))
        if not ours or not theirs:
            return 0.0
        height, width = next(iter(ours.values()))["size"]
        same = sum(
            float(mask_util.area(mask_util.merge([ours[label], theirs[label]], intersect=True)))
            for label in ours.keys() & theirs.keys()
        )
        return 1 - same / (height * width)


def read_label_predictions(path: str, metadata: Any) -> dict[str, np.ndarray]:
    """All label maps of `LabelPredictions` at once, int (H, W) by the path of the image."""
    predictions = LabelPredictions(path, metadata)
    return {file_name: labels for file_name in predictions if (labels := predictions.get(file_name)) is not None}


def class_colors(count: int) -> np.ndarray:
    """Returns a color for each class, uint8 (count, 3) BGR: hues by the golden ratio, the first one gray."""
    if not count:
        return np.zeros((0, 3), np.uint8)
    hues = (np.arange(count) * 0.61803398875) % 1.0
    hsv = np.stack([hues * 180, np.full(count, 200), 255 - 60 * (np.arange(count) % 3)], axis=-1)
    colors = cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2BGR)[0]
    colors[:1] = 90
    return colors


def colored(image: np.ndarray, labels: np.ndarray | None, palette: np.ndarray) -> np.ndarray:
    """The image in gray under the colors of its labels; unchanged where there are none."""
    if labels is None:
        return image
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    known = (labels >= 0) & (labels < len(palette))
    colors = palette[np.where(known, labels, 0)]
    blended = cv2.addWeighted(gray, 0.4, np.ascontiguousarray(colors), 0.6, 0)
    return np.where(known[..., None], blended, image)


def _differences(image: np.ndarray, truth: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    if labels is None:
        return image
    faint = image // 2 + 64
    counted, same = truth != NO_LABEL, labels == truth
    for where, color in ((counted & ~same, WRONG), (counted & same & (truth > 0), RIGHT), (~counted, IGNORED)):
        faint = np.where(where[..., None], np.array(color, np.uint8), faint)
    return faint


def legend(names: Sequence[str], palette: np.ndarray, width: int) -> np.ndarray:
    """Lines with each class and its color."""
    lines = [np.full((_LEGEND, width, 3), 255, np.uint8)]
    x = GAP
    for name, color in zip(names, palette):
        length = _LEGEND + cv2.getTextSize(name, FONT, 0.5, 1)[0][0] + 2 * GAP
        if x + length > width and x > GAP:
            lines.append(np.full((_LEGEND, width, 3), 255, np.uint8))
            x = GAP
        cv2.rectangle(lines[-1], (x, 5), (x + 14, 19), tuple(map(int, color)), -1)
        cv2.putText(lines[-1], name, (x + 20, 17), FONT, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        x += length
    return np.vstack(lines)
