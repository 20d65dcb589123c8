"""AP over drawings of images: against COCO's own evaluation of a dataset that has the images as often as drawn."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from detections import IMAGES, made
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2kd.data.coco import read_coco
from d2kd.evaluation.coco import NumberedCOCO
from d2kd.evaluation.image_bootstrap import average_precision, bootstrap_difference, coco_matches
from d2kd.evaluation.results import ResultError


@pytest.fixture
def files(tmp_path):
    """The annotations, and the predictions of a better and a worse model."""
    paths = [tmp_path / name for name in ("truth.json", "better.json", "worse.json")]
    truth, better = made(1, 0.9)
    for path, content in zip(paths, (truth, better, made(2, 0.5)[1])):
        path.write_text(json.dumps(content))
    return list(map(str, paths))


def literal(files: list[str], times: np.ndarray) -> float:
    """COCO's AP of a dataset in which each image is written down as often as it counts."""
    truth, found = (json.loads(Path(file).read_text()) for file in files[:2])
    copies = [(n, k) for n, count in enumerate(times) for k in range(count)]
    repeated = {**truth, "images": [], "annotations": []}
    results = []
    for number, (original, _) in enumerate(copies, 1):
        repeated["images"].append({**truth["images"][original], "id": number})
        for item in truth["annotations"]:
            if item["image_id"] == original:
                place = len(repeated["annotations"]) + 1
                repeated["annotations"].append({**item, "image_id": number, "id": place})
        results += [{**entry, "image_id": number} for entry in found if entry["image_id"] == original]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = repeated
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[0]


def test_drawn_images_count_as_if_they_were_in_the_dataset_so_often(files):
    matches = coco_matches(*files[:2])
    rng = np.random.default_rng(3)
    for times in [np.ones(IMAGES, int), *rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=4)]:
        assert average_precision(matches, times) == pytest.approx(literal(files, times), abs=1e-9)


def test_the_interval_is_that_of_the_same_drawings_for_both(files):
    better, worse = (coco_matches(files[0], file) for file in files[1:])
    found = bootstrap_difference(better, worse, drawings=200)
    once = np.ones(IMAGES, int)
    assert found.mean == pytest.approx(average_precision(better, once) - average_precision(worse, once))
    assert found.low < found.mean < found.high and found.over == "images" and found.within_noise is False
    assert bootstrap_difference(better, better).high == 0  # no difference in any drawing
    assert bootstrap_difference(better, worse, 200) == found != bootstrap_difference(better, worse, 200, seed=1)


def test_a_model_without_detections_has_no_ap_to_lose(files, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    matches = coco_matches(files[0], str(tmp_path / "none.json"))
    assert average_precision(matches, np.ones(IMAGES, int)) == 0
    assert np.isnan(average_precision(matches, np.zeros(IMAGES, int)))


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"image_id": 999}, "entry 0 is of image 999, which"),
        ({"category_id": 999}, "entry 0 is of category 999, which"),
        ({"bbox": None}, "entry 0 has 'bbox' None"),
        ({}, "entry 0 has no mask"),
        (None, "Expecting value"),
    ],
)
def test_damaged_predictions_are_named(files, changes, what):
    first, *rest = json.loads(Path(files[1]).read_text())
    Path(files[1]).write_text("[" if changes is None else json.dumps([{**first, **changes}, *rest]))
    with pytest.raises(ResultError, match=re.escape(f"{files[1]} is damaged, or not of {files[0]} ({what}")):
        coco_matches(*files[:2], "bbox" if changes else "segm")


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_as_many_detections_count_as_in_the_evaluation(files, limit):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = NumberedCOCO(read_coco(files[0]))  # COCO takes an annotation with the id 0 for none
        evaluation = COCOeval(truth, truth.loadRes(json.loads(Path(files[1]).read_text())), "bbox")
        evaluation.params.maxDets = [limit]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    found = average_precision(coco_matches(*files[:2], detections=limit), np.ones(IMAGES, int))
    assert found == pytest.approx(100 * precision[precision > -1].mean(), abs=1e-9)
