"""Reports on classifiers, and on tasks other than boxes: words, columns, tables of classes, and the sheet of images."""

import json
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

import d2kd  # noqa: F401
from d2kd.cli.report import run
from d2kd.evaluation.report import ModelResult, load_result, write_report
from d2kd.evaluation.results import ResultError, choose_task
from d2kd.visualization import classification_sheet, differing, read_classifications, read_training_log
from d2kd.visualization import classifications as sheet
from d2kd.visualization.classifications import GAP, RIGHT, TILE, TITLE, WRONG, Classified, Line, break_line, printable
from detectron2.data import DatasetCatalog, MetadataCatalog

DATASET = "test_report_pictures"
NAMES = ["ant", "bee", "cat", "dog", "emu", "fox"]
#: Best classes of each model about images 0 to 5, whose true classes are their numbers.
SAID = {
    "teacher": [0, 1, 2, 3, 4, 5],
    "baseline": [0, 2, 2, 4, 4, 5],
    "distilled": [0, 1, 2, 3, 5, 5],
}


def metrics_of(classes):
    hits = [100.0 * (said == label) for label, said in enumerate(classes)]
    return {"top1": sum(hits) / 6, "top5": 100.0, **{f"top1-{name}": hit for name, hit in zip(NAMES, hits)}}


def prediction(image, said, scores=(0.5, 0.2, 0.1, 0.08, 0.04)):
    rest = [c for c in range(6) if c != said][:4]
    return {"image_id": image, "file_name": f"{image}.png", "label": image, "classes": [said, *rest], "scores": scores}


def write_run(directory: Path, said, task="classification", **result):
    (directory / "inference").mkdir(parents=True)
    content = {"metrics": {task: metrics_of(said)}, "datasets": [DATASET], "iterations": 10, "images_per_batch": 4}
    (directory / "result.json").write_text(json.dumps({**content, **result}))
    lines = [{"iteration": 0, "loss_cls": 2.0}, {"iteration": 9, f"{task}/top1": 70.0}]
    (directory / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    predictions = [prediction(image, best) for image, best in enumerate(said)]
    (directory / "inference/classification_predictions.json").write_text(json.dumps(predictions))
    return directory


@pytest.fixture
def runs(tmp_path):
    return {name: write_run(tmp_path / name, said) for name, said in SAID.items()}


@pytest.fixture
def dataset(tmp_path):
    records = []
    for number in range(6):
        name = str(tmp_path / f"{number}.png")
        cv2.imwrite(name, np.full((28, 28, 3), 40 * number, np.uint8))
        records.append({"file_name": name, "image_id": number, "label": number})
    DatasetCatalog.register(DATASET, lambda: records)
    MetadataCatalog.get(DATASET).set(thing_classes=NAMES, evaluator_type="classification")
    yield records
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


def report_of(runs, output, *arguments):
    run([*(f"--run={name}={path}" for name, path in runs.items()), "--output", str(output), *arguments])
    return (output / "report.md").read_text(), json.loads((output / "report.json").read_text())


def test_a_report_on_classifiers_finds_its_task_and_speaks_of_accuracy(runs, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["d2kd report"])
    text, content = report_of(runs, tmp_path / "out", "--dataset", DATASET)
    assert content["task"] == "classification" and content["metric"] == "top1"
    assert content["gap_closure"] == pytest.approx(0.5) and content["pictures"] == ["curves.png", "predictions.png"]
    assert content["right_alone"] == {"images": 6, "distilled": 2, "baseline": 1}
    for part in (
        "| model | top-1 (%) | top-5 (%) | parameters |",
        "| baseline student | 66.7 | 100.0 |",
        "distillation raises the student from 66.7 to 83.3 % top-1 accuracy (+16.7).",
        "(teacher - baseline): 50 %.",
        "Of 6 images, the distilled student is right and the baseline wrong on 2, and the other way round on 1.",
        "Every class, top-1 accuracy (%). Difference: distilled student - baseline student.",
        "| class | teacher | baseline student | distilled student | difference |",
        "| emu | 100.0 | 100.0 | 0.0 | -100.0 |",
        "(predictions.png)",
        "evenly spread over the dataset and not selected, then some where the models differ",
    ):
        assert part in text, part
    assert "AP" not in text.split("## Commands")[0] and "detections" not in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *content["pictures"],
        "report.md",
        "report.json",
        "report.html",
    }


def test_curves_are_of_top1(runs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "d2kd.evaluation.report_pictures.training_curves", lambda *given: seen.append(given) or Figure()
    )
    write_report(
        str(tmp_path / "out"),
        {"x": load_result("x", str(runs["teacher"]), task="classification")},
        task="classification",
    )
    ((logs, axis),) = seen
    assert (
        axis == "top-1 accuracy (%)" and logs["x"].metric.tolist() == [[9, 70]] and logs["x"].loss.tolist() == [[0, 2]]
    )


class Figure:
    def savefig(self, buffer, format):
        buffer.write(b"drawn")


def test_words_where_gap_closure_means_nothing(tmp_path):
    models = {name: ModelResult(name, {"top1": 50.0}) for name in ("teacher", "baseline", "inherit", "distilled")}
    report = write_report(str(tmp_path), models, task="classification")
    assert (
        "the teacher (50.0 % top-1 accuracy) is not better than the baseline (50.0 % top-1 acc"
        in (report["gap_closure_note"])
    )
    text = (tmp_path / "report.md").read_text()
    assert "Starting from the teacher's head, without distillation, gives 50.0 % top-1 accuracy (+0.0)." in text
    assert "| model | top-1 (%) | parameters |" in text  # there is no top-5 of five classes
    report = write_report(str(tmp_path), {"baseline": models["baseline"]}, task="classification")
    assert (
        report["gap_closure_note"]
        == "Gap closure is not defined: there is no top-1 accuracy of the teacher, distilled."
    )
    assert report["right_alone"] is None


@pytest.mark.parametrize(
    "metrics, columns, classes",
    [
        (
            {"sem_seg": {"mIoU": 5.0, "fwIoU": 4.0, "IoU-sky": 3.0, "ACC-sky": 2.0, "pACC": 1.0}},
            "mIoU | pACC | fwIoU",
            "3.0",
        ),
        ({"segm": {"AP": 5.0, "AP50": 4.0, "AP75": 3.0, "AP-sky": 2.0}}, "AP | AP50 | AP75", "2.0"),
        ({"bbox_EMA": {"AP": 5.0, "AP-sky": 6.0}}, "AP", "6.0"),
        ({"depth": {"delta1": 5.0, "delta1-sky": 6.0, "rmse": 7.0}}, "delta1 | rmse", "6.0"),
        ({"segm": {"AP": 1.0}, "bbox": {"AP": 5.0, "AP-sky": 6.0}}, "AP", "6.0"),
    ],
)
def test_columns_follow_the_task(tmp_path, metrics, columns, classes, monkeypatch):
    monkeypatch.setattr("sys.argv", ["d2kd report"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text(json.dumps({"metrics": metrics}))
    text, content = report_of({"a": tmp_path / "run"}, tmp_path / "out")
    assert f"| model | {columns} | parameters |" in text and "| a | 5.0 |" in text
    assert f"| sky | {classes} |" in text


def test_of_many_classes_those_that_differ_most_are_listed(tmp_path):
    def model(name, step):
        return ModelResult(
            name, {"top1": 50.0, **{f"top1-c{k}": 50.0 + step * k for k in range(31)}, "top1-none": math.nan}
        )

    pair = {"baseline": model("baseline", -0.5), "distilled": model("distilled", 0.5)}
    write_report(str(tmp_path), pair, task="classification")
    text = (tmp_path / "report.md").read_text()
    assert "The 20 of 32 classes where distilled student and baseline student differ most (report.json has all)" in text
    listed = [line for line in text.splitlines() if line.startswith("| c")][1:]
    assert listed[0] == "| c30 | 35.0 | 65.0 | +30.0 |" and len(listed) == 20 and listed[-1].startswith("| c11 |")
    write_report(str(tmp_path), {"teacher": model("teacher", 0.5)}, task="classification")
    listed = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| c")][1:]
    assert listed[0] == "| c0 | 50.0 |" and len(listed) == 20


def test_names_do_not_break_the_tables(tmp_path):
    write_report(str(tmp_path), {"x": ModelResult("x", {"top1": 1.0, "top1-a|b-c": 2.0})}, task="classification")
    assert "| a\\|b-c | 2.0 |" in (tmp_path / "report.md").read_text()


# --- which results and files ---------------------------------------------------------------------------------


def test_results_on_one_of_several_datasets(tmp_path):
    folder = write_run(tmp_path / "run", SAID["teacher"], datasets=["one", "two"])
    metrics = {
        name: {"classification": {"top1": top1}} for name, top1 in (("one", 1.0), ("two", 2.0), ("two_EMA", 3.0))
    }
    (folder / "result.json").write_text(json.dumps({"metrics": metrics, "datasets": ["one", "two"]}))
    for place in ("inference/two", "inference_EMA/two"):
        (folder / place).mkdir(parents=True)
        (folder / place / "classification_predictions.json").write_text("[]")
    (folder / "metrics.json").write_text(
        '{"iteration": 5, "two/classification/top1": 2.0, "one/classification/top1": 1}'
    )
    with pytest.raises(ResultError, match=r"evaluation on one, two: say on which of them .*\(--dataset\)"):
        choose_task("x", str(folder))
    assert choose_task("x", str(folder), "two") == "classification"
    found = load_result("x", str(folder), dataset_name="two", task="classification")
    assert found.metrics == {"top1": 2.0} and Path(found.predictions_file).parent == folder / "inference/two"
    log = read_training_log(found.metrics_file, f"{found.metrics_scope}/top1")
    assert log.metric.tolist() == [[5, 2.0]]
    average = load_result("x", str(folder), dataset_name="two", task="classification_EMA")
    assert average.metrics == {"top1": 3.0} and average.metrics_scope == "two_EMA/classification"
    assert Path(average.predictions_file).parent == folder / "inference_EMA/two"


def test_runs_of_another_task_are_named_with_what_they_have(runs, tmp_path):
    with pytest.raises(ResultError, match=r"'baseline'.*of the task 'bbox', but of classification\. .*--task"):
        load_result("baseline", str(runs["baseline"]))
    (tmp_path / "result.json").write_text('{"metrics": {}}')
    with pytest.raises(ResultError, match="'x'.* holds no metrics. Was the run evaluated"):
        choose_task("x", str(tmp_path))
    for content in ("[", "[]", '{"metrics": 3}'):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(ResultError, match=r"'x': .*result\.json (is no JSON|holds no metrics)"):
            choose_task("x", str(tmp_path))


# --- the sheet ------------------------------------------------------------------------------------------------


def test_images_where_models_differ_are_sorted_by_the_scores_of_the_true_class():
    records = [{"image_id": number, "label": 0} for number in range(5)]
    same = Classified(0, [0, 1], [0.9, 0.1])
    baseline = dict.fromkeys(range(5), same)
    distilled = {
        0: same,
        1: Classified(0, [1, 0], [0.6, 0.4]),  # 0.5 less
        2: Classified(0, [1, 2], [0.6, 0.4]),  # not among the best: 0.9 less
        3: Classified(0, [0, 1], [0.1, 0.0]),  # of the same class
    }
    found = differing(records, [baseline, distilled], (distilled, baseline))
    assert [record["image_id"] for record in found] == [2, 1]
    teacher = {**baseline, 0: Classified(0, [3], [1.0])}
    found = differing(records, [teacher, baseline, distilled], (distilled, baseline))
    assert [record["image_id"] for record in found] == [2, 1, 0]
    assert [r["image_id"] for r in differing(records, [teacher, baseline, distilled])] == [0, 2, 1]


def test_first_come_images_that_are_not_selected_then_those_that_differ(runs, dataset, tmp_path, monkeypatch):
    seen = []
    draw = lambda *given: seen.append(given) or np.zeros((4, 4, 3), np.uint8)  # noqa: E731
    monkeypatch.setattr("d2kd.evaluation.report_pictures.classification_sheet", draw)
    loaded = {name: load_result(name, str(path), task="classification") for name, path in runs.items()}
    write_report(str(tmp_path / "out"), loaded, dataset_name=DATASET, task="classification", num_images=3)
    ((sections, names, models, heading),) = seen
    (first, spread), (second, rest) = sections.items()
    assert first == "3 of 6 images, evenly spread over the dataset and not selected"
    assert [r["image_id"] for r in spread] == [0, 2, 4]
    assert second.startswith("2 more of the 3 images where the models differ")
    assert [r["image_id"] for r in rest] == [3, 1]  # 4 differs too, and is there already
    assert list(models) == ["teacher", "baseline student", "distilled student"] and names == NAMES
    assert "baseline student: 66.7 % top-1 accuracy" in heading


def test_classes_without_names_are_numbered(runs, dataset, tmp_path, monkeypatch):
    seen = []
    draw = lambda *given: seen.append(given[1]) or np.zeros((4, 4, 3), np.uint8)  # noqa: E731
    monkeypatch.setattr("d2kd.evaluation.report_pictures.classification_sheet", draw)
    MetadataCatalog.pop(DATASET)
    loaded = {"teacher": load_result("teacher", str(runs["teacher"]), task="classification")}
    write_report(str(tmp_path / "out"), loaded, dataset_name=DATASET, task="classification")
    MetadataCatalog.get(DATASET).set(evaluator_type="classification")
    assert seen == [[f"class {number}" for number in range(6)]]


def test_names_are_those_of_class_folders(runs, tmp_path, monkeypatch, forget_datasets):
    for name in NAMES:
        (tmp_path / "images" / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "images" / name / "0.png"), np.zeros((28, 28, 3), np.uint8))
    config = {
        "DATASETS": {"REGISTER": [{"NAME": "folders_val", "FORMAT": "folders", "IMAGES": str(tmp_path / "images")}]}
    }
    (runs["teacher"] / "config.yaml").write_text(json.dumps(config))
    content = json.loads((runs["teacher"] / "result.json").read_text())
    (runs["teacher"] / "result.json").write_text(json.dumps({**content, "datasets": ["folders_val"]}))
    said = [{**prediction(label, label), "image_id": label + 1} for label in range(len(NAMES))]
    (runs["teacher"] / "inference/classification_predictions.json").write_text(json.dumps(said))
    monkeypatch.setattr("sys.argv", ["d2kd report"])
    text, content = report_of({"teacher": runs["teacher"]}, tmp_path / "out", "--dataset", "folders_val")
    assert "predictions.png" in content["pictures"]


def lines_of(runs, record, models=("teacher", "baseline")):
    answers = {m: read_classifications(str(runs[m] / "inference/classification_predictions.json")) for m in models}
    return sheet._lines(record, NAMES, answers)


def test_what_stands_beside_an_image(runs, dataset):
    assert lines_of(runs, dataset[1]) == [
        Line("true: bee"),
        Line("teacher: bee (0.50)", RIGHT, True),
        Line("baseline: cat (0.50), not bee (0.10)", WRONG, False),
    ]
    # dog is the fifth class of the list, so not among those of which the score is known
    predictions = {3: Classified(3, [4, 0, 1, 2, 5], [0.5, 0.2, 0.1, 0.08, 0.041])}
    (_, line) = sheet._lines(dataset[3], NAMES, {"m": predictions})
    assert line.text == "m: emu (0.50), not dog (at most 0.05)"
    assert sheet._lines(dataset[3], NAMES, {"m": {}})[1].text == "m: no prediction"


def drawn(dataset, side, names=NAMES, said=1):
    cv2.imwrite(dataset[1]["file_name"], np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    models = {"model": {1: Classified(1, [said], [0.5])}}
    return classification_sheet({"heading": dataset[1:2]}, names, models), cv2.imread(dataset[1]["file_name"])


@pytest.mark.parametrize("side, factor", [(28, 6), (32, 5), (100, 1), (TILE, 1)])
def test_small_images_are_enlarged_without_blur(dataset, side, factor):
    grid, image = drawn(dataset, side)
    large = np.repeat(np.repeat(image, factor, 0), factor, 1)
    left = GAP + (TILE - len(large)) // 2
    assert np.array_equal(grid[TITLE : TITLE + len(large), left : left + len(large)], large)


def test_large_images_are_made_smaller(dataset):
    grid, image = drawn(dataset, 224)
    assert len(grid) == TITLE + TILE + GAP
    part = grid[TITLE : TITLE + TILE, GAP : GAP + TILE]
    assert abs(part.astype(float).mean() - image.mean()) < 2


@pytest.mark.parametrize("said, color, other", [(1, RIGHT, WRONG), (2, WRONG, RIGHT)])
def test_right_is_green_and_wrong_is_red(dataset, said, color, other):
    grid, _ = drawn(dataset, 28, said=said)
    text = grid[TITLE:, GAP + TILE :]
    assert (text == np.array(color, np.uint8)).all(2).any() and not (text == np.array(other, np.uint8)).all(2).any()


def test_long_names_are_broken_and_never_cut(dataset):
    names = ["x", "black-and-gold garden spider in its web " * 3 + "w" * 120, "y", "z", "u", "v"]
    grid, _ = drawn(dataset, 28, names)
    assert (grid[:, -GAP // 2 :] == 255).all() and (grid[-2:] == 255).all() and len(grid) > TITLE + TILE + GAP
    line = Line(f"model: {names[1]} (0.50)", RIGHT, True)
    parts = break_line(line, 340)
    assert "".join(p.text for p in parts).replace(" ", "") == line.text.replace(" ", "") and len(parts) > 3
    assert all(sheet._width(part) <= 340 for part in parts) and [p.right for p in parts[:2]] == [True, None]
    assert break_line(Line("short"), 340) == [Line("short")]


def test_names_in_letters_that_opencv_lacks():
    assert printable("Zürich, crème") == "Zurich, creme"
    assert printable("猫", "class 4") == "class 4" and printable("a\nb", "class 5") == "class 5"


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"image_id": 7}, "there is an image 7, which test_report_pictures does not have"),
        ({"label": 4}, "the image 3 is of class 3 now, and was of class 4"),
        ({"classes": [6, 1]}, "the image 3 has classes [6, 1], and there are 6"),
        ({"scores": None}, "entry 3 has 'scores' None"),
        ({"classes": ["ant"]}, "entry 3 has 'classes' ['ant']"),
        (None, "Expecting value"),
    ],
)
def test_predictions_that_are_damaged_or_of_another_dataset_are_an_error(runs, dataset, tmp_path, changes, what):
    path = runs["baseline"] / "inference/classification_predictions.json"
    said = json.loads(path.read_text())
    path.write_text("[" if changes is None else json.dumps([*said[:3], {**said[3], **changes}, *said[4:]]))
    loaded = {name: load_result(name, str(folder), task="classification") for name, folder in runs.items()}
    with pytest.raises(
        ResultError, match=re.escape(f"Run 'baseline': {path} is damaged, or of another dataset ({what}")
    ):
        write_report(str(tmp_path / "out"), loaded, dataset_name=DATASET, task="classification")
    if changes is None:  # also without pictures
        with pytest.raises(ResultError, match="is damaged"):
            write_report(str(tmp_path / "out"), loaded, task="classification")
