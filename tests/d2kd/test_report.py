"""The comparison report: numbers, missing numbers, files, pictures."""

import itertools
import json
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from runs import tool as run_as_process

import d2kd  # noqa: F401
from d2kd.cli.report import run
from d2kd.evaluation.report import ModelResult, compare, load_result, write_report
from d2kd.evaluation.results import ResultError
from d2kd.evaluation.seeds import merge_seeds
from d2kd.visualization import detection_grid, read_predictions, read_training_log
from d2kd.visualization.curves import smooth
from d2kd.visualization.detections import (
    GAP,
    HEADER,
    LEGEND,
    MASK_OPACITY,
    RIGHT,
    TILE,
    TRUTH,
    WRONG,
    draw_boxes,
    is_right,
)
from d2kd.visualization.matching import judge

DATASET = "test_report_digits"
SIDE = 128


def model(name: str, ap: float, **fields) -> ModelResult:
    metrics = {"AP": ap, "AP50": ap * 1.5, "AP75": ap, "APl": math.nan}
    defaults = {"iterations": 100, "images_per_batch": 16, "params": 2_500_000, "wall_time_s": 75.0, "seed": 0}
    return ModelResult(name, metrics, **{**defaults, **fields})


def models(**ap: float) -> dict:
    return {name: model(name, value) for name, value in ap.items()}


@pytest.fixture
def dataset(tmp_path):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.structures import BoxMode

    folder = tmp_path / "images"
    folder.mkdir()
    records = []
    for number in range(4):
        name = str(folder / f"{number}.png")
        cv2.imwrite(name, np.full((SIDE, SIDE, 3), 40 * number, np.uint8))
        boxes = [[10, 10, 40, 60], [70, 30, 40, 40]]
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label} for label, box in enumerate(boxes)
        ]
        size = {"height": SIDE, "width": SIDE}
        records.append({"file_name": name, "image_id": number, "annotations": annotations, **size})
    DatasetCatalog.register(DATASET, lambda: records)
    MetadataCatalog.get(DATASET).set(thing_classes=["one", "two"], thing_dataset_id_to_contiguous_id={5: 0, 9: 1})
    yield records
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


def write_run(directory: Path, ap: float | None, iterations: int = 100) -> Path:
    (directory / "inference").mkdir(parents=True)
    content = {
        "metrics": {"bbox": {"AP": ap, "AP50": ap, "AP75": ap, "APl": None}},
        "wall_time_s": 3725.0,
        "iterations": iterations,
        "images_per_batch": 8,
        "params": 123,
        "seed": 4,
    }
    (directory / "result.json").write_text(json.dumps(content))
    lines = [{"iteration": i, "total_loss": 9.0, "loss_cls": 2 - i / 100, "loss_box": 1.0} for i in range(0, 100, 20)]
    lines.append({"iteration": 99, "bbox/AP": ap})
    (directory / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [
        {"image_id": 0, "category_id": 5, "bbox": [11, 11, 40, 60], "score": 0.9},
        {"image_id": 0, "category_id": 5, "bbox": [70, 30, 40, 40], "score": 0.8},
        {"image_id": 0, "category_id": 9, "bbox": [0, 0, 9, 9], "score": 0.1},
    ]
    (directory / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
    return directory


def test_gap_closure():
    result = compare(models(teacher=30.0, baseline=10.0, inherit=12.0, distilled=25.0))
    assert result["gap_closure"] == pytest.approx(0.75)
    assert result["gain"] == pytest.approx(15) and result["inherit_gain"] == pytest.approx(2)
    assert result["equal_iterations"] is True and result["gap_closure_note"] == ""


@pytest.mark.parametrize(
    "values,note",
    [
        ({"teacher": 10.0, "baseline": 10.0, "distilled": 12.0}, "not better than the baseline"),
        ({"teacher": 9.0, "baseline": 10.0, "distilled": 12.0}, "not better than the baseline"),
        ({"teacher": math.nan, "baseline": 10.0, "distilled": 12.0}, "no AP of the teacher"),
        ({"baseline": 10.0}, "no AP of the teacher, distilled"),
    ],
)
def test_gap_closure_is_left_open_where_it_means_nothing(tmp_path, values, note):
    report = write_report(str(tmp_path), models(**values))
    assert report["gap_closure"] is None and note in report["gap_closure_note"]
    assert note in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["gap_closure"] is None


def test_unequal_training_is_said(tmp_path):
    pair = {"baseline": model("baseline", 5.0), "distilled": model("distilled", 4.0, iterations=200)}
    report = write_report(str(tmp_path), pair)
    assert report["equal_iterations"] is False
    text = (tmp_path / "report.md").read_text()
    assert "At different numbers of images seen, distillation lowers the student from 5.0 to 4.0 AP (-1.0)." in text


def test_no_gain_is_no_rise(tmp_path):
    write_report(str(tmp_path), models(baseline=5.0, distilled=5.0))
    assert "At equal iterations, distillation leaves the student at 5.0 AP." in (tmp_path / "report.md").read_text()


def test_report_from_run_directories(tmp_path, dataset):
    runs = {"teacher": 30.0, "baseline": 4.0, "inherit": 9.0, "distilled": 17.0}
    loaded = {
        name: load_result(name, str(write_run(tmp_path / name, ap)), dataset_name=DATASET) for name, ap in runs.items()
    }
    output = tmp_path / "report"
    write_report(
        str(output),
        loaded,
        dataset_name=DATASET,
        title="Digits",
        statement="It shows faster learning.",
        commands=["bash tools/quickstart.sh"],
        environment={"device": "CPU"},
        num_images=3,
    )
    assert sorted(p.name for p in output.iterdir()) == [
        "curves.png",
        "detections.png",
        "report.html",
        "report.json",
        "report.md",
    ]
    content = json.loads((output / "report.json").read_text())
    assert {name: m["AP"] for name, m in content["models"].items()} == runs
    assert content["models"]["teacher"]["APl"] is None and content["models"]["teacher"]["images_seen"] == 800
    assert content["gap_closure"] == pytest.approx(0.5) and content["gain"] == pytest.approx(13)
    text = (output / "report.md").read_text()
    for part in (
        "# Digits",
        "| distilled student | 17.0 | 17.0 | 17.0 | 0.00 M | 100 | 800 | 1 h 2 min | 4 |",
        "At equal iterations, distillation raises the student from 4.0 to 17.0 AP (+13.0).",
        "gives 9.0 AP (+5.0)",
        ": 50 %.",
        "It shows faster learning.",
        "(curves.png)",
        "(detections.png)",
        "bash tools/quickstart.sh",
        "- device: CPU",
    ):
        assert part in text
    grid = cv2.imread(str(output / "detections.png"))
    assert grid.shape == (HEADER + 3 * (TILE + GAP) + LEGEND, 5 * (TILE + GAP), 3)


def test_report_without_optional_material_drops_old_pictures(tmp_path):
    (tmp_path / "curves.png").write_bytes(b"old")
    report = write_report(str(tmp_path), {"x": ModelResult("x", {"AP": 1.0}, label="only one")})
    assert report["pictures"] == [] and not (tmp_path / "curves.png").exists()
    assert "| only one | 1.0 | - | - | - | - | - |" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="no model"):
        write_report(str(tmp_path), {})


def test_unfinished_and_broken_runs_are_named(tmp_path):
    with pytest.raises(ResultError, match="'baseline'.*result.json"):
        load_result("baseline", str(tmp_path))
    (tmp_path / "result.json").write_text('{"metrics": {"segm": {}}}')
    with pytest.raises(ResultError, match="no metrics of the task 'bbox'"):
        load_result("baseline", str(tmp_path))


def test_run_evaluated_on_several_datasets(tmp_path):
    write_run(tmp_path / "run", 5.0)
    content = {"metrics": {"a": {"bbox": {"AP": 1.0}}, "b": {"bbox": {"AP": 2.0}}}}
    (tmp_path / "run" / "result.json").write_text(json.dumps(content))
    assert load_result("x", str(tmp_path / "run"), dataset_name="b").metrics == {"AP": 2.0}


def test_runs_that_were_evaluated_on_other_images_are_refused(tmp_path):
    path = write_run(tmp_path / "run", 3.0) / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "datasets": ["digits_val"]}))
    assert load_result("baseline", str(tmp_path / "run"), dataset_name="digits_val").metrics["AP"] == 3.0
    with pytest.raises(ResultError, match=r"evaluation on digits_val, not on coco_2017_val\. Evaluate it there"):
        load_result("baseline", str(tmp_path / "run"), dataset_name="coco_2017_val")


def test_runs_that_were_evaluated_on_different_images_are_not_compared(tmp_path):
    for name, dataset in (("baseline", "va"), ("inherit", None), ("distilled", "vb")):
        path = write_run(tmp_path / name, 3.0) / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **({"datasets": [dataset]} if dataset else {})}))
    loaded = {name: load_result(name, str(tmp_path / name)) for name in ("baseline", "inherit", "distilled")}
    message = r"Run 'baseline' was evaluated on va, and 'distilled' on vb: .*\(--dataset\)"
    for distilled in (loaded["distilled"], merge_seeds([model("distilled", 3.0), loaded["distilled"]])):
        with pytest.raises(ResultError, match=message):
            write_report(str(tmp_path / "out"), {**loaded, "distilled": distilled})
    assert not (tmp_path / "out").exists()
    del loaded["distilled"]
    write_report(str(tmp_path / "out"), loaded)  # an older result does not tell its dataset


def test_training_log_survives_interruption_and_resume(tmp_path):
    path = tmp_path / "metrics.json"
    records = [
        {"iteration": 0, "loss_a": 5.0, "loss_b": 1.0, "distill/x": 7.0, "total_loss": 13.0},
        {"iteration": 20, "loss_a": 4.0, "loss_b": 1.0},
        {"iteration": 20, "loss_a": 3.0, "loss_b": 1.0},
        {"iteration": 20, "bbox/AP": 8.0},
    ]
    path.write_text("\n".join(json.dumps(r) for r in records) + '\n{"iteration": 40, "lo')
    log = read_training_log(str(path))
    assert log.loss.tolist() == [[0, 6], [20, 4]] and log.metric.tolist() == [[20, 8]]
    path.write_text('{"iteration": 3, "total_loss": 2.5}\n')
    assert read_training_log(str(path)).loss.tolist() == [[3, 2.5]]
    path.write_text("")
    assert read_training_log(str(path)).loss.shape == (0, 2)


def test_smoothing_keeps_the_mean():
    curve = np.stack([np.arange(1000.0), np.random.default_rng(0).random(1000)], 1)
    assert smooth(curve).shape == (50, 2)
    assert smooth(curve).mean(0) == pytest.approx(curve.mean(0))
    assert smooth(curve[:7]) is not None and len(smooth(curve[:7])) == 7


def test_each_object_is_found_once_by_the_best_detection():
    truth, labels = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]]), np.array([0, 1])
    boxes = np.array([[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [21, 20, 31, 30]])
    assert is_right(boxes, np.array([0, 0, 0, 1]), truth, labels).tolist() == [True, False, False, True]
    none = np.zeros((0, 4)), np.zeros(0, int)
    assert is_right(boxes, np.zeros(4, int), *none).tolist() == [False] * 4
    assert is_right(*none, truth, labels).shape == (0,)


def test_detections_within_a_crowd_of_their_class_do_not_count():
    from detectron2.structures import BoxMode

    box = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"annotations": [{**box, "bbox": [0, 0, 10, 10]}, {**box, "bbox": [0, 0, 50, 50], "iscrowd": 1}]}
    boxes = [([0, 0, 10, 9], 0, 0.2), ([20, 20, 40, 40], 0, 0.9), ([20, 20, 40, 40], 1, 0.8), ([45, 0, 90, 9], 0, 0.7)]
    found, finds = judge([{"box": b, "label": label, "score": score} for b, label, score in boxes], record, 0.1)
    assert [p["score"] for p in found] == [0.8, 0.7, 0.2] and finds.tolist() == [-1, -1, 0]


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"category_id": 6}, "entry 1 is of category 6, which the dataset does not have"),
        ({"image_id": 17}, "there is an image 17, which test_report_digits does not have"),
        ({"bbox": [1, 2, 3]}, "entry 1 has 'bbox' [1, 2, 3]"),
        ({"score": "high"}, "entry 1 has 'score' 'high'"),
        ({"segmentation": {"size": [3]}}, "entry 1 has 'segmentation'"),
        ({"points": [[1, 2], [3]]}, "entry 1 has 'points'"),
        ("score", "entry 1 has no 'score'"),
        ("[{", "Expecting property name"),
        ("{}", "it holds no list"),
        ("[3]", "entry 0 is 3, not a prediction"),
    ],
)
def test_detections_that_are_damaged_or_of_another_dataset_are_an_error(tmp_path, dataset, changes, what):
    path = write_run(tmp_path / "run", 3.0) / "inference/coco_instances_results.json"
    first, second, *_ = json.loads(path.read_text())
    if isinstance(changes, dict):
        path.write_text(json.dumps([first, {**second, **changes}]))
    elif changes in second:
        path.write_text(json.dumps([first, {key: value for key, value in second.items() if key != changes}]))
    else:
        path.write_text(changes)
    models = {"x": load_result("x", str(tmp_path / "run"))}
    with pytest.raises(ResultError, match=re.escape(f"Run 'x': {path} is damaged, or of another dataset ({what}")):
        write_report(str(tmp_path / "out"), models, dataset_name=DATASET)


def test_detections_of_a_diverged_model_can_be_drawn(tmp_path, dataset):
    path = write_run(tmp_path / "run", 3.0) / "inference/coco_instances_results.json"
    found = {"image_id": 0, "category_id": 5, "bbox": [math.nan] * 4, "score": math.nan, "segmentation": None}
    path.write_text(json.dumps([found]))
    write_report(str(tmp_path / "out"), {"x": load_result("x", str(tmp_path / "run"))}, dataset_name=DATASET)


def test_grid_colors_right_and_wrong_and_hides_low_scores(tmp_path, dataset):
    from detectron2.data import MetadataCatalog

    metadata = MetadataCatalog.get(DATASET)
    path = write_run(tmp_path / "run", 1.0) / "inference" / "coco_instances_results.json"
    found = read_predictions(str(path), metadata)
    assert [p["label"] for p in found[0]] == [0, 0, 1] and found[0][0]["box"] == [11, 11, 51, 71]
    grid = detection_grid(dataset[:1], metadata.thing_classes, {"m": found}, score_threshold=0.3)
    column = grid[HEADER:, TILE + GAP :]

    def shows(color, region):
        return (region == np.array(color, np.uint8)).all(2).any()

    left, right = column[:, : 65 * 3], column[:, 65 * 3 :]
    assert shows(RIGHT, left) and not shows(WRONG, left)
    assert shows(WRONG, right) and not shows(RIGHT, right)
    everything = detection_grid(dataset[:1], metadata.thing_classes, {"m": found}, score_threshold=0.0)
    assert shows(WRONG, everything[HEADER:, TILE + GAP :][:, : 65 * 3])


@pytest.mark.parametrize("form", ["polygons", "counts", "compressed"])
def test_grid_shows_masks_where_a_model_predicts_some(dataset, form):
    inside = np.zeros((SIDE, SIDE), np.uint8, order="F")
    inside[70:100, 20:40] = 1
    rle = mask_util.encode(inside)
    runs = [len(list(run)) for _, run in itertools.groupby(inside.ravel(order="F"))]
    mask = {
        "polygons": [[20, 70, 40, 70, 40, 100, 20, 100]],
        "counts": {"size": [SIDE, SIDE], "counts": runs},
        "compressed": {**rle, "counts": rle["counts"].decode()},
    }[form]
    record = {**dataset[0], "annotations": [{**dataset[0]["annotations"][0], "segmentation": mask}]}
    found = {"box": [20, 70, 40, 100], "label": 1, "score": 0.9}
    for predicted in (None, rle):
        grid = detection_grid([record], ["one", "two"], {"m": {0: [{**found, "mask": predicted}]}})
        for column, color in enumerate((TRUTH, WRONG)):
            pixel = grid[HEADER + 85 * TILE // SIDE, column * (TILE + GAP) + 25 * TILE // SIDE]
            assert pixel.tolist() == ([0, 0, 0] if predicted is None else [int(MASK_OPACITY * c) for c in color])


def test_grid_dashes_what_is_missed_and_keeps_the_proportion_of_images(tmp_path, dataset):
    from detectron2.data import MetadataCatalog

    names = MetadataCatalog.get(DATASET).thing_classes
    found = {"m": {0: [{"box": [10, 10, 50, 70], "label": 0, "score": 0.9}]}}
    tile = detection_grid(dataset[:1], names, found)[HEADER : HEADER + TILE, TILE + GAP : 2 * TILE + GAP]
    left, right = tile[:, : 60 * 3], tile[:, 65 * 3 :]
    line = right[30 * 3, 6 * 3 : 44 * 3 : 4]  # the upper side of the object that is missed
    white = (line == 255).all(1)
    assert white.any() and not white.all() and not (left == 255).all(2).any()
    for width, height in ((128, 64), (64, 128)):
        name = str(tmp_path / "other.png")
        cv2.imwrite(name, np.full((height, width, 3), 9, np.uint8))
        grid = detection_grid([{"file_name": name, "image_id": 7}], names, {"m": {}})
        rows = min(TILE * height // width, TILE * 3 // 2)
        assert grid.shape == (HEADER + rows + GAP + LEGEND, 2 * (TILE + GAP), 3)


def test_labels_cover_no_better_ones_and_are_left_out_without_room():
    image = np.zeros((60, 120, 3), np.uint8)
    colors = [(0, 0, 250), (0, 250, 0), (250, 0, 0), (250, 0, 250)]
    boxes = np.array([[10, 25, 110, 30]] * 4, float)
    drawn = draw_boxes(image, boxes, ["a long one"] * 4, colors)

    def area(color):
        return int((drawn == np.array(color, np.uint8)).all(2).sum())

    assert area(colors[0]) > 900 and area(colors[1]) > 900  # above and within its box
    assert area(colors[3]) == 0  # neither line nor label of the worst one is to be seen


@pytest.mark.parametrize(
    "name, arguments", [("report", ["--run", "a=nothing", "--output", "x"]), ("export_student", ["no.pth", "x.pth"])]
)
def test_first_line_of_a_log_tells_what_the_tool_runs_on(name, arguments):
    run = run_as_process(name, *arguments, check=False)
    first, *_, last = run.stdout.splitlines()
    assert run.returncode == 2 and "Runtime" in first and "torch" in first and "device cpu" in first
    assert "no.pth" in last or "nothing" in last


def test_command_line(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr("sys.argv", ["d2kd report"])

    def exit_status(arguments):
        with pytest.raises(SystemExit) as stop:
            run(arguments)
        return stop.value.code

    for name, ap in (("teacher", 30.0), ("baseline", 4.0), ("distilled", 17.0)):
        write_run(tmp_path / name, ap)
    runs = [f"--run={name}={tmp_path / name}" for name in ("teacher", "baseline", "distilled")]
    run([*runs, "--output", str(tmp_path / "out"), "--dataset", DATASET, "--label", "teacher=The teacher"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| The teacher | 30.0 |" in text and "\n```\nd2kd report --run=teacher=" in text
    assert exit_status([f"--run=teacher={tmp_path / 'nothing'}", "--output", str(tmp_path / "none")]) == 2
    assert exit_status([*runs, "--output", str(tmp_path / "none"), "--dataset", "no_such_dataset"]) == 2
    assert not (tmp_path / "none").exists()
    assert exit_status(["--run", "teacher", "--output", str(tmp_path / "none")]) == 2
