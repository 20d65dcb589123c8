"""Evaluators: perfect, empty and wrong predictions, files, errors; the loop that feeds them."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from d2lite.config import CfgNode, get_cfg
from d2lite.data import DatasetCatalog, MetadataCatalog
from d2lite.data.datasets import register_coco_instances
from d2lite.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    flatten_results_dict,
    inference_context,
    inference_on_dataset,
    instances_to_coco_json,
    print_csv_format,
    verify_results,
)
from d2lite.evaluation.fast_eval_api import COCOeval_opt
from d2lite.evaluation.pascal_voc_evaluation import average_precision, class_average_precisions
from d2lite.structures import Boxes, Instances

NAME = "test_evaluation"
SIZE = 64


@pytest.fixture
def catalogs():
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(NAME, None)


def ground_truth() -> dict:
    """Two images; categories 3 (ids are not contiguous) and 7; one crowd; one annotation without area and iscrowd."""

    def box(number, image, category, x, y, w, h, **extra):
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        base = {"id": number, "image_id": image, "category_id": category, "bbox": [x, y, w, h]}
        return {**base, "segmentation": [polygon], "area": w * h, "iscrowd": 0, **extra}

    bare = box(4, 20, 7, 30, 30, 20, 12)
    del bare["area"], bare["iscrowd"]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in (10, 20)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            box(1, 10, 3, 4, 6, 20, 10),
            box(2, 10, 7, 30, 30, 16, 16),
            box(3, 20, 3, 0, 0, 60, 50),
            bare,
        ],
    }


def register(tmp_path, content) -> None:
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(content))
    register_coco_instances(NAME, {}, str(path), "images")
    DatasetCatalog.get(NAME)


def detections(boxes=(), scores=(), classes=(), masks=None) -> Instances:
    result = Instances((SIZE, SIZE))
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.scores = torch.tensor(scores, dtype=torch.float32)
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    if masks is not None:
        result.pred_masks = torch.as_tensor(masks)
    return result


def perfect(image_id: int) -> Instances:
    annotations = [a for a in ground_truth()["annotations"] if a["image_id"] == image_id]
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
    masks = np.zeros((len(boxes), SIZE, SIZE), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = True
    classes = [{3: 0, 7: 1}[a["category_id"]] for a in annotations]
    return detections(boxes, [0.9] * len(boxes), classes, masks)


def evaluate(evaluator: COCOEvaluator, outputs: dict, **arguments) -> dict:
    evaluator.reset()
    for image_id, instances in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate(**arguments)


def random_outputs(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    outputs = {}
    for image_id in (10, 20):
        found = perfect(image_id)
        boxes = np.concatenate([found.pred_boxes.tensor.numpy()] * 8) + rng.normal(0, 3, (8 * len(found), 4))
        boxes = np.clip(np.concatenate([boxes[:, :2], np.maximum(boxes[:, 2:], boxes[:, :2] + 1)], 1), 0, SIZE)
        masks = np.zeros((len(boxes), SIZE, SIZE), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int)):
            mask[y0:y1, x0:x1] = True
        scores = rng.integers(1, 10, len(boxes)) / 10  # with ties
        outputs[image_id] = detections(boxes.tolist(), scores, rng.integers(0, 2, len(boxes)), masks)
    return outputs


def test_perfect_detections_score_100(tmp_path, catalogs):
    register(tmp_path, ground_truth())
    evaluator = COCOEvaluator(NAME, output_dir=str(tmp_path / "out"))
    results = evaluate(evaluator, {10: perfect(10), 20: perfect(20)})
    for task in ("bbox", "segm"):
        values = [results[task][k] for k in ("AP", "AP50", "AP75", "APs", "APm", "AP-cat", "AP-dog")]
        assert values == pytest.approx([100] * 7)
        assert np.isnan(results[task]["APl"])
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {r["category_id"] for r in written} == {3, 7}
    assert written[0]["bbox"] == [4, 6, 20, 10] and written[0]["score"] == pytest.approx(0.9)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "coco_instances_results.json",
        "instances_predictions.pth",
    ]


def test_images_that_were_not_processed_count_as_missed_unless_img_ids_are_given(tmp_path, catalogs):
    register(tmp_path, ground_truth())
    evaluator = COCOEvaluator(NAME, tasks=("bbox",))
    results = evaluate(evaluator, {10: perfect(10)})
    assert set(results) == {"bbox"} and 45 < results["bbox"]["AP"] < 55
    assert evaluate(evaluator, {10: perfect(10)}, img_ids=[10])["bbox"]["AP"] == pytest.approx(100)


def evaluate_in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    register_coco_instances(NAME, {}, f"{folder}/gt.json", "images")
    DatasetCatalog.get(NAME)
    image_id = (10, 20)[rank]
    results = evaluate(COCOEvaluator(NAME, output_dir=folder), {image_id: perfect(image_id)})
    with open(f"{folder}/results{rank}.json", "w") as file:
        json.dump(results, file)
    torch.distributed.destroy_process_group()


def test_processes_gather_their_predictions_on_the_first(tmp_path, catalogs):
    (tmp_path / "gt.json").write_text(json.dumps(ground_truth()))
    torch.multiprocessing.spawn(evaluate_in_process, (str(tmp_path),), nprocs=2)
    assert json.loads((tmp_path / "results0.json").read_text())["segm"]["AP"] == pytest.approx(100)
    assert json.loads((tmp_path / "results1.json").read_text()) == {}
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == 4


def test_max_dets_limits_what_counts(tmp_path, catalogs):
    register(tmp_path, ground_truth())
    found = perfect(10)
    noise = detections([[50, 0, 60, 4]] * 12, [0.95] * 12, [0] * 12)
    found.remove("pred_masks")
    crowd = Instances.cat([noise, found])
    ap = [evaluate(COCOEvaluator(NAME, max_dets_per_image=n), {10: crowd})["bbox"]["AP-cat"] for n in (11, 100)]
    assert ap[0] == 0 and ap[1] > 0
    with pytest.raises(AssertionError, match="at least 3"):
        COCOEvaluator(NAME, max_dets_per_image=[100])


def test_no_detections_and_no_predictions(tmp_path, catalogs):
    register(tmp_path, ground_truth())
    evaluator = COCOEvaluator(NAME, tasks=("bbox", "segm"))
    results = evaluate(evaluator, {10: detections(), 20: detections()})
    assert set(results) == {"bbox", "segm"}
    assert all(np.isnan(v) for metrics in results.values() for v in metrics.values())
    assert evaluate(evaluator, {}) == {}


def test_class_outside_the_dataset_is_an_error(tmp_path, catalogs):
    register(tmp_path, ground_truth())
    with pytest.raises(AssertionError, match="class=2.*only has 2 classes"):
        evaluate(COCOEvaluator(NAME), {10: detections([[0, 0, 5, 5]], [0.5], [2])})


def test_dataset_without_annotations_gets_a_file_and_no_metrics(tmp_path, catalogs):
    content = ground_truth()
    register(tmp_path, content)
    del content["annotations"]
    (tmp_path / "gt.json").write_text(json.dumps(content))
    evaluator = COCOEvaluator(NAME, output_dir=str(tmp_path))
    assert evaluate(evaluator, {10: perfect(10)}) == {}
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == 2


def test_what_cannot_be_evaluated_is_named(tmp_path, catalogs):
    register(tmp_path, ground_truth())
    with pytest.raises(NotImplementedError, match="keypoints"):
        COCOEvaluator(NAME, tasks=("bbox", "keypoints"))
    with pytest.raises(ValueError, match="boxes"):
        COCOEvaluator(NAME, tasks=("boxes",))
    with pytest.raises(ValueError, match="no pred_masks"):
        evaluate(COCOEvaluator(NAME, tasks=("segm",)), {10: detections([[0, 0, 5, 5]], [0.5], [1])})


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_both_implementations_agree(tmp_path, catalogs, task):
    if COCOeval_opt is COCOeval:
        pytest.skip("faster-coco-eval is not installed")
    content = ground_truth()
    content["annotations"][1]["iscrowd"] = 1
    register(tmp_path, content)
    for seed in range(5):
        outputs = random_outputs(seed)
        slow, fast = (
            evaluate(COCOEvaluator(NAME, tasks=(task,), use_fast_impl=fast), outputs)[task] for fast in (False, True)
        )
        assert slow == pytest.approx(fast, abs=1e-9, rel=0, nan_ok=True)
        assert 0 < slow["AP50"] < 100


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_evaluation_leaves_the_datasets_alone(tmp_path, task):
    (tmp_path / "gt.json").write_text(json.dumps(ground_truth() | {"annotations": ground_truth()["annotations"][:3]}))
    truth = COCO(str(tmp_path / "gt.json"))
    results = [r for i in (10, 20) for r in instances_to_coco_json(perfect(i), i)]
    to_dataset = {0: 3, 1: 7}
    kept = ("image_id", "score", "bbox" if task == "bbox" else "segmentation")
    found = truth.loadRes([{k: r[k] for k in kept} | {"category_id": to_dataset[r["category_id"]]} for r in results])
    before = str(truth.dataset), str(found.dataset)
    evaluation = COCOeval_opt(truth, found, task)
    evaluation.evaluate()
    evaluation.accumulate()
    assert (str(truth.dataset), str(found.dataset)) == before


def test_instances_to_coco_json_keeps_order_and_input():
    found = detections([[1, 2, 4, 8], [0, 0, 1, 1]], [0.25, 0.5], [1, 0], torch.ones(2, SIZE, SIZE, dtype=bool))
    results = instances_to_coco_json(found, 5)
    assert [r["bbox"] for r in results] == [[1, 2, 3, 6], [0, 0, 1, 1]]
    assert [(r["image_id"], r["category_id"], r["score"]) for r in results] == [(5, 1, 0.25), (5, 0, 0.5)]
    assert isinstance(results[0]["segmentation"]["counts"], str)
    assert found.pred_boxes.tensor.tolist()[0] == [1, 2, 4, 8]
    assert instances_to_coco_json(detections(), 5) == []
    json.dumps(results)


def test_proposals_report_recall(tmp_path, catalogs):
    register(tmp_path, ground_truth())
    evaluator = COCOEvaluator(NAME, output_dir=str(tmp_path))
    for image_id in (10, 20):
        found = perfect(image_id)
        proposals = Instances((SIZE, SIZE))
        junk = torch.tensor([[60.0, 60.0, 63.0, 63.0]]).repeat(100, 1)
        exact = found.pred_boxes.tensor if image_id == 10 else found.pred_boxes.tensor[:1]
        proposals.proposal_boxes = Boxes(torch.cat([exact[:1], junk, exact[1:]]))
        proposals.objectness_logits = torch.arange(len(proposals.proposal_boxes), 0, -1).float()
        evaluator.process([{"image_id": image_id}], [{"proposals": proposals}])
    results = evaluator.evaluate()["box_proposals"]
    assert results["AR@100"] == pytest.approx(50)  # the first proposal of each image
    assert results["AR@1000"] == pytest.approx(75)
    assert results["ARm@100"] == pytest.approx(100) and np.isnan(results["ARl@100"])
    with open(tmp_path / "box_proposals.pkl", "rb") as file:
        assert pickle.load(file)["ids"] == [10, 20]


@pytest.fixture
def label_maps(tmp_path, catalogs):
    from PIL import Image

    gt = np.zeros((20, 30), np.uint8)
    gt[5:15, 5:12], gt[5:15, 18:25], gt[:2] = 1, 2, 255
    Image.fromarray(gt).save(tmp_path / "gt.png")
    record = {"file_name": "a.png", "sem_seg_file_name": str(tmp_path / "gt.png")}
    DatasetCatalog.register(NAME, lambda: [record])
    MetadataCatalog.get(NAME).set(stuff_classes=["sky", "car", "bus", "moon"], ignore_label=255)
    return gt


def scores(labels: np.ndarray) -> dict:
    return {"sem_seg": torch.from_numpy(np.eye(4, dtype=np.float32)[labels]).permute(2, 0, 1)}


def test_semantic_segmentation_ignores_ignored_pixels_and_absent_classes(label_maps):
    evaluator = SemSegEvaluator(NAME)
    guess = np.where(label_maps == 255, 3, label_maps)
    evaluator.process([{"file_name": "a.png"}], [scores(guess)])
    results = evaluator.evaluate()["sem_seg"]
    for name in ("mIoU", "fwIoU", "mACC", "pACC", "IoU-car", "ACC-bus"):
        assert results[name] == pytest.approx(100)
    assert np.isnan(results["IoU-moon"]) and np.isnan(results["ACC-moon"])
    evaluator.reset()
    guess[label_maps == 2] = 1
    evaluator.process([{"file_name": "a.png"}], [scores(guess)])
    results = evaluator.evaluate()["sem_seg"]
    assert results["IoU-car"] == pytest.approx(50) and results["IoU-bus"] == 0
    assert results["mIoU"] == pytest.approx((100 + 50 + 0) / 3)


def test_semantic_segmentation_names_bad_label_maps(label_maps):
    MetadataCatalog.get(NAME).ignore_label = 255
    evaluator = SemSegEvaluator(NAME, ignore_label=254)
    with pytest.raises(ValueError, match="labels go from 0 to 255"):
        evaluator.process([{"file_name": "a.png"}], [scores(np.zeros((20, 30), int))])
    with pytest.raises(ValueError, match=r"a.png: prediction is \(10, 30\)"):
        evaluator.process([{"file_name": "a.png"}], [scores(np.zeros((10, 30), int))])


def voc_dataset(tmp_path, year: int) -> None:
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("a\nb\n")
    item = (
        "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
        "<ymax>{}</ymax></bndbox></object>"
    )
    objects = {
        "a": [("cat", 0, 11, 11, 30, 30), ("cat", 1, 41, 41, 60, 60)],
        "b": [("dog", 0, 1, 1, 20, 40), ("cat", 0, 31, 1, 50, 20)],
    }
    for name, found in objects.items():
        text = "<annotation>" + "".join(item.format(*values) for values in found) + "</annotation>"
        (tmp_path / "Annotations" / f"{name}.xml").write_text(text)
    MetadataCatalog.get(NAME).set(dirname=str(tmp_path), split="test", year=year, thing_classes=["cat", "dog"])


@pytest.mark.parametrize("year", [2007, 2012])
def test_pascal_voc(tmp_path, catalogs, year):
    voc_dataset(tmp_path, year)
    evaluator = PascalVOCDetectionEvaluator(NAME)
    found = {
        # one hit, one on a difficult object (counts neither way), a second hit of the same object (wrong)
        "a": detections([[10, 10, 30, 30], [40, 40, 60, 60], [10, 10, 30, 30]], [0.9, 0.8, 0.7], [0, 0, 0]),
        "b": detections([[0, 0, 20, 40], [30, 0, 50, 20]], [0.9, 0.6], [1, 0]),
    }
    for name, instances in found.items():
        evaluator.process([{"image_id": name}], [{"instances": instances}])
    results = evaluator.evaluate()["bbox"]
    # cat: precision 1 up to recall 1/2, then 2/3
    cat = (6 * 1 + 5 * 2 / 3) / 11 if year == 2007 else 0.5 * 1 + 0.5 * 2 / 3
    assert results == pytest.approx(dict.fromkeys(("AP", "AP50", "AP75"), 100 * (cat + 1) / 2))


def test_pascal_voc_edges():
    assert np.isnan(class_average_precisions([], {"a": []}, True)).all()
    assert (class_average_precisions([], {"a": [([0, 0, 5, 5], False)]}, False) == 0).all()
    assert average_precision(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 0.75]), False) == pytest.approx(0.875)


class Recorder(DatasetEvaluator):
    def __init__(self, task="x"):
        self.task = task

    def reset(self):
        self.seen = []

    def process(self, inputs, outputs):
        self.seen += [(int(i), float(o)) for i, o in zip(inputs, outputs)]

    def evaluate(self):
        return {self.task: {"sum": sum(o for _, o in self.seen)}}


class Doubler(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        return x * self.weight


@pytest.mark.parametrize("training", [True, False])
def test_inference_runs_without_gradient_and_restores_the_mode(training):
    model = Doubler().train(training)
    calls = []
    names = ("on_start", "before_inference", "after_inference", "on_end")
    callbacks = {name: (lambda n=name: calls.append(n)) for name in names}
    loader = [torch.arange(3), torch.arange(3, 5)]
    results = inference_on_dataset(model, loader, [Recorder("a"), Recorder("b")], callbacks)
    assert results == {"a": {"sum": 20.0}, "b": {"sum": 20.0}}
    assert model.training == training
    assert calls == ["on_start", *["before_inference", "after_inference"] * 2, "on_end"]


def test_inference_without_evaluator_or_data():
    assert inference_on_dataset(lambda x: x, [torch.arange(3)], None) == {}
    assert inference_on_dataset(lambda x: x, [], Recorder()) == {"x": {"sum": 0}}
    with pytest.raises(TypeError):
        inference_on_dataset(lambda x: x, iter([]), Recorder())


def test_inference_context_restores_after_an_error():
    model = Doubler()
    with pytest.raises(RuntimeError, match="stop"), inference_context(model):
        assert not model.training
        raise RuntimeError("stop")
    assert model.training


def test_evaluators_must_not_share_a_task():
    evaluators = DatasetEvaluators([Recorder("x"), Recorder("x")])
    evaluators.reset()
    with pytest.raises(AssertionError, match="'x'"):
        evaluators.evaluate()


def expecting(*expected) -> CfgNode:
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [list(e) for e in expected]
    return cfg


def test_verify_results():
    results = {"bbox": {"AP": 30.0, "APl": float("nan")}}
    assert verify_results(expecting(), results)
    assert verify_results(expecting(("bbox", "AP", 29.9, 0.2)), results)
    for wrong in (("bbox", "AP", 29.5, 0.2), ("bbox", "APl", 1.0, 5.0), ("segm", "AP", 30.0, 1.0)):
        with pytest.raises(SystemExit):
            verify_results(expecting(wrong), results)


def test_print_csv_format_leaves_classes_out(caplog):
    with caplog.at_level(logging.INFO, logger="d2lite"):
        print_csv_format({"bbox": {"AP": 12.34567, "AP-cat": 1.0}, "note": 3})
    assert [r.getMessage() for r in caplog.records] == [
        "copypaste: Task: bbox",
        "copypaste: AP",
        "copypaste: 12.3457",
        "copypaste: note=3",
    ]


def test_flatten_results_dict():
    assert flatten_results_dict({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}
