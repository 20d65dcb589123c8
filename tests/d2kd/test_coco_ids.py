"""COCO's metrics under other ids of images, annotations and categories: the same, and what is written has those ids."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2kd.data.coco import load_coco
from d2kd.evaluation.coco import CocoEvaluator
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

SIZE = 48
CLASSES = ["cat", "dog", "owl"]
NUM_IMAGES = 7
NUM_RENUMBERINGS = 20

#: Ways to number `count` things.
NUMBERINGS: dict[str, Callable[[np.random.Generator, int], list[Any]]] = {
    "small": lambda random, count: (random.permutation(count) + 1).tolist(),
    "from 0": lambda random, count: random.permutation(count).tolist(),
    "negative": lambda random, count: (-random.permutation(count)).tolist(),
    "above 2^53": lambda random, count: [2**53 + int(i) for i in random.permutation(count)],
    "above 2^63": lambda random, count: [2**63 + int(i) for i in random.permutation(count)],
    "strings": lambda random, count: [f"{random.integers(2**40):x}-{i}" for i in random.permutation(count)],
    "numbers as strings": lambda random, count: [str(i) for i in random.permutation(count)],
    "mixed": lambda random, count: [str(i) if i % 2 else int(i) // 2 for i in random.permutation(count)],
}


@pytest.fixture(autouse=True)
def catalogs():
    """Forgets what a test registers."""
    yield
    MetadataCatalog.pop("numbered", None)
    DatasetCatalog.pop("numbered", None)


def ground_truth() -> dict[str, Any]:
    """Seven images; the fourth has no object, the others have some of every size up to half the image, and a crowd."""
    random = np.random.default_rng(0)
    annotations = []
    for image in range(NUM_IMAGES):
        for _ in range(0 if image == 3 else 4):
            x, y, w, h = (int(v) for v in (*random.integers(0, 20, 2), *random.integers(6, 24, 2)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 1,
                    "category_id": int(random.integers(3)) + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(len(annotations) % 9 == 8),
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    return {
        "images": [{"id": i + 1, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(NUM_IMAGES)],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }


def renumbered(content: dict[str, Any], random: np.random.Generator, ways: dict[str, str]) -> dict[str, Any]:
    """A copy with other ids, by section numbered as `ways` says."""
    content = copy.deepcopy(content)
    new = {}
    for section, way in ways.items():
        ids = NUMBERINGS[way](random, len(content[section]))
        new[section] = {entry["id"]: other for entry, other in zip(content[section], ids)}
        for entry in content[section]:
            entry["id"] = new[section][entry["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = new["images"][annotation["image_id"]]
        annotation["category_id"] = new["categories"][annotation["category_id"]]
    return content


def detections(image: int, classes: list[str]) -> Instances:
    """Objects that are moved, doubled, and some of another class; with few different scores, so that many are equal."""
    random = np.random.default_rng(100 + image)
    own = [a for a in ground_truth()["annotations"] if a["image_id"] == image + 1] * 3
    boxes = np.array([a["bbox"] for a in own], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = np.clip(boxes + random.normal(0, 1.5, boxes.shape), 0, SIZE)
    boxes = np.concatenate([boxes, [[1, 1, 9, 9]]]).round(1)
    wrong = random.random(len(boxes)) < 0.2
    names = [CLASSES[a["category_id"] - 1] for a in own] + ["owl"]
    names = [CLASSES[int(random.integers(3))] if swap else name for name, swap in zip(names, wrong)]
    masks = np.zeros((len(boxes), SIZE, SIZE), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int)):
        mask[y0:y1, x0:x1] = True
    found = Instances((SIZE, SIZE))
    found.pred_boxes = Boxes(torch.from_numpy(boxes).float())
    found.scores = torch.from_numpy(random.integers(1, 4, len(boxes)) / 4).float()
    found.pred_classes = torch.tensor([classes.index(name) for name in names])
    found.pred_masks = torch.from_numpy(masks)
    return found


def as_proposals(found: Instances) -> Instances:
    return Instances(found.image_size, proposal_boxes=found.pred_boxes, objectness_logits=found.scores)


def evaluate(content: dict[str, Any], folder: Path, fast: bool) -> dict[str, dict[str, float]]:
    """Metrics of those detections, and of their boxes as proposals, on ground truth with some ids."""
    folder.mkdir(exist_ok=True)
    for image in content["images"]:
        (folder / image["file_name"]).touch()
    (folder / "truth.json").write_text(json.dumps(content))
    records = load_coco(str(folder / "truth.json"), str(folder), "numbered")
    meta = MetadataCatalog.get("numbered").set(json_file=str(folder / "truth.json"))
    results: dict[str, dict[str, float]] = {}
    for kind in ("instances", "proposals"):
        evaluator = CocoEvaluator("numbered", output_dir=str(folder), use_fast_impl=fast)
        evaluator.reset()
        for record in records:
            found = detections(int(Path(record["file_name"]).stem), meta.thing_classes)
            evaluator.process([record], [{kind: as_proposals(found) if kind == "proposals" else found}])
        results.update(evaluator.evaluate())
    MetadataCatalog.pop("numbered")
    return results


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Metrics under the ids 1, 2, 3, ..., by pycocotools."""
    return evaluate(ground_truth(), tmp_path_factory.mktemp("expected"), fast=False)


def require_back_end(fast: bool) -> None:
    if fast:
        pytest.importorskip("faster_coco_eval")


@pytest.mark.parametrize("fast", [True, False], ids=["faster-coco-eval", "pycocotools"])
def test_metrics_are_equal_under_random_renumberings(fast, expected, tmp_path):
    require_back_end(fast)
    assert all(10 < expected[task]["AP"] < 90 for task in ("bbox", "segm"))
    assert 10 < expected["box_proposals"]["AR@100"] < 95
    random = np.random.default_rng(1)
    ways = list(NUMBERINGS)
    for i in range(NUM_RENUMBERINGS):
        chosen = {section: ways[(i + int(random.integers(len(ways)))) % len(ways)] for section in ground_truth()}
        got = evaluate(renumbered(ground_truth(), random, chosen), tmp_path, fast)
        assert got.keys() == expected.keys()
        for task, metrics in expected.items():
            assert got[task] == pytest.approx(metrics, nan_ok=True), (task, chosen)


@pytest.mark.parametrize("fast", [True, False], ids=["faster-coco-eval", "pycocotools"])
@pytest.mark.parametrize("ids", [(1, 2, 3), (0, 7, 2**64), (-3, "b", "c"), (3, 2, 1), ("c", "b", 90)])
def test_metrics_of_classes_follow_their_names(fast, ids, expected, tmp_path):
    require_back_end(fast)
    content = ground_truth()
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"] - 1]
    for category, other in zip(content["categories"], ids):
        category["id"] = other
    got = evaluate(content, tmp_path, fast)
    assert len({expected["bbox"][f"AP-{name}"] for name in CLASSES}) == 3
    for task in ("bbox", "segm"):
        assert got[task] == pytest.approx(expected[task], nan_ok=True)


@pytest.mark.parametrize("way", NUMBERINGS)
def test_what_is_written_has_the_ids_of_the_dataset(way, tmp_path):
    random = np.random.default_rng(2)
    content = renumbered(ground_truth(), random, dict.fromkeys(ground_truth(), way))
    evaluate(content, tmp_path, fast=True)
    images, categories = ({entry["id"] for entry in content[key]} for key in ("images", "categories"))
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {r["image_id"] for r in results} == images
    assert {r["category_id"] for r in results} == categories
    assert {p["image_id"] for p in torch.load(tmp_path / "instances_predictions.pth", weights_only=False)} == images
    assert set(pickle.loads((tmp_path / "box_proposals.pkl").read_bytes())["ids"]) == images


@pytest.mark.parametrize("fast", [True, False], ids=["faster-coco-eval", "pycocotools"])
def test_some_images_only(fast, tmp_path):
    require_back_end(fast)
    found = []
    for shift in (0, 2**53):
        content = ground_truth()
        for entry in content["images"]:
            entry["id"] += shift
        for entry in content["annotations"]:
            entry["image_id"] += shift
        for image in content["images"]:
            (tmp_path / image["file_name"]).touch()
        (tmp_path / "truth.json").write_text(json.dumps(content))
        load_coco(str(tmp_path / "truth.json"), str(tmp_path), "numbered")
        MetadataCatalog.get("numbered").json_file = str(tmp_path / "truth.json")
        evaluator = CocoEvaluator("numbered", use_fast_impl=fast)
        evaluator.reset()
        for i in (1, 2, 4):
            evaluator.process([{"image_id": i + 1 + shift}], [{"instances": detections(i, CLASSES)}])
        found.append(evaluator.evaluate([shift + 2, shift + 5])["bbox"])
        MetadataCatalog.pop("numbered")
    assert found[0] == pytest.approx(found[1], nan_ok=True) and 10 < found[0]["AP"] < 90
