"""report.html: what is in it, what is left out, and that it works in a browser, where one is found."""

import base64
import html
import io
import json
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from browsers import visit
from PIL import Image

import d2kd  # noqa: F401
from d2kd.evaluation import report_html, report_images
from d2kd.evaluation.report import ModelResult, load_result, write_report
from d2kd.evaluation.report_plots import Cost, axis, curves, trade_off
from d2kd.evaluation.results import ResultError
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

DATASET = "test_html_report"
NAMES = ["plain", "</script><b>\"&'", "Größe \u4e2d"]
#: Boxes of every image, XYWH, and their classes.
BOXES = [[8, 8, 40, 60], [70, 30, 40, 40], [20, 90, 60, 30]]
WIDTH, HEIGHT = 160, 128


def digits(record: dict) -> str:
    return re.sub(r"\D", "", Path(record["file_name"]).name)


@pytest.fixture
def register():
    def add(records, **metadata):
        DatasetCatalog.register(DATASET, lambda: records)
        MetadataCatalog.get(DATASET).set(**metadata)

    yield add
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


def images(folder: Path, count: int, annotated: bool = True) -> list[dict]:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    records = []
    for number in range(count):
        name = str(folder / f"{number}<b>&\"'ü.png")
        Image.fromarray(pixels // (1 + number)).save(name)
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, "iscrowd": 0}
            for label, box in enumerate(BOXES)
        ]
        size = {"height": HEIGHT, "width": WIDTH}
        records.append(
            {"file_name": name, "image_id": number, **size, **({"annotations": annotations} if annotated else {})}
        )
    return records


def write_run(folder: Path, metrics: dict, file: str = "", predictions: list = (), **more) -> Path:
    (folder / "inference").mkdir(parents=True)
    content = {"metrics": metrics, "iterations": 100, "images_per_batch": 8, "params": 2_000_000, "seed": 1, **more}
    (folder / "result.json").write_text(json.dumps(content))
    task = next(iter(metrics))
    main = next(iter(metrics[task]))
    lines = [{"iteration": i, "loss_cls": 2 - i / 100} for i in range(0, 100, 20)]
    lines += [{"iteration": i, f"{task}/{main}": metrics[task][main] * i / 99} for i in (49, 99)]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if file:
        (folder / "inference" / file).write_text(json.dumps(predictions))
    return folder


def detections(found: dict[int, list[tuple[int, float]]], masks: bool = False) -> list[dict]:
    """The boxes of true objects by image, as (object, score), or as (object, score, class) where it is another."""
    results = []
    for image, entries in found.items():
        for place, score, *said in entries:
            item = {"image_id": image, "category_id": said[0] if said else place, "bbox": BOXES[place], "score": score}
            if masks:
                x, y, width, height = BOXES[place]
                bitmap = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
                bitmap[y : y + height, x : x + width] = 1
                bitmap[y + 10 : y + 20, x + 10 : x + 20] = 0
                rle = mask_util.encode(bitmap)
                item["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
            results.append(item)
    return results


FILE = "coco_instances_results.json"
SAID = {
    "teacher": {n: [(0, 0.9), (1, 0.8), (2, 0.7)] for n in range(4)},
    "baseline": {
        0: [(0, 0.5, 2), (1, 0.35)],
        1: [(0, 0.6)],
        2: [(0, 0.6), (1, 0.6)],
        3: [(0, 0.9), (1, 0.9), (2, 0.9)],
    },
    "distilled": {n: [(0, 0.9), (1, 0.6), (2, 0.2)] for n in range(4)},
}


def detection_report(tmp_path: Path, said: dict = SAID, masks: bool = False, task: str = "bbox", **options) -> str:
    scores = {"teacher": 40.0, "baseline": 10.0, "distilled": 30.0}
    models = {}
    for name, found in said.items():
        value = scores[name]
        classes = {f"AP-{label}": value + 5 * place for place, label in enumerate(NAMES)}
        run = write_run(
            tmp_path / name, {task: {"AP": value, "AP50": value, **classes}}, FILE, detections(found, masks)
        )
        models[name] = load_result(name, str(run), dataset_name=DATASET, task=task)
    options = {"dataset_name": DATASET, "environment": {"device": "CPU"}, "task": task, **options}
    write_report(str(tmp_path / "out"), models, **options)
    return (tmp_path / "out/report.html").read_text(encoding="utf-8")


def content_of(text: str) -> dict | None:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def notes_of(text: str) -> str:
    return html.unescape(" ".join(re.findall(r'<ul class="notes">(.*?)</ul>', text, re.DOTALL)))


# --- what is in the page --------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_escapes_all_names(tmp_path, register):
    register(images(tmp_path / "images", 4), thing_classes=NAMES)
    text = detection_report(tmp_path, title='<i>&"title', statement="<u>claim", commands=["d2kd report </pre>&"])
    assert not re.search(r'(src|href|action)\s*=\s*["\']?(?!data:)[\w/.]', text)
    assert not re.search(
        r"url\((?!data:)|@import|//[a-z]+\.[a-z]|import\(|fetch\(|XMLHttp",
        text.replace("http://www.w3.org/2000/svg", ""),
    )
    assert "default-src 'none'" in text and len(text) < 200_000
    assert text.count("<script") == text.count("</script>") == 2  # so that no name ends one
    for raw in ("<i>", "<u>claim", "<b>", "</pre>&\n"):
        assert raw not in text
    for escaped in (
        "&lt;i&gt;&amp;&quot;title",
        "&lt;u&gt;claim",
        "&lt;/script&gt;&lt;b&gt;&quot;&amp;&#x27;",
        "Größe 中",
    ):
        assert escaped in text
    content = content_of(text)
    assert "<" not in re.search(r'id="data">(.*)', text)[1].partition("</script>")[0]
    assert content["classes"] == NAMES and content["images"][0]["name"].startswith("images/0<b>&\"'ü")


def test_images_where_the_students_differ_most_come_first(tmp_path, register):
    register(images(tmp_path / "images", 4), thing_classes=NAMES)
    text = detection_report(tmp_path)
    content = content_of(text)
    # at 0.3 the distilled one finds objects 0 and 1 of all images; the baseline 1 and one wrong, 0, 0 and 1, all
    assert [(image["name"][7], image["difference"]) for image in content["images"]] == [
        ("0", 1.5),
        ("1", 1.0),
        ("3", 1.0),
        ("2", 0.0),
    ]
    first = content["images"][0]["found"]["baseline"]
    assert [(d["score"], d["finds"]) for d in first] == [(0.5, -1), (0.35, 1)]
    assert content["images"][0]["truth"][1] == {"box": [70, 30, 40, 40], "label": 1}
    assert "4 of 4 images of test_html_report are in this page: those where distilled student and baseline" in notes_of(
        text
    )
    picture = base64.b64decode(content["images"][0]["source"].partition(",")[2])
    assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape == (HEIGHT, WIDTH, 3)


def test_number_and_size_of_images_are_bounded_and_said(tmp_path, register, monkeypatch):
    register(images(tmp_path / "images", 4), thing_classes=NAMES)
    monkeypatch.setattr(report_images, "MAX_IMAGES", 3)
    monkeypatch.setattr(report_images, "MAX_SIDES", {"detections": 80})
    text = detection_report(tmp_path)
    content = content_of(text)
    assert len(content["images"]) == 3 and "3 of 4 images" in notes_of(text) and "at most 80 pixels" in notes_of(text)
    assert all((image["width"], image["height"]) == (80, 64) for image in content["images"])
    assert content["images"][0]["truth"][1]["box"] == [35, 15, 20, 20]
    monkeypatch.setattr(report_images, "MAX_BYTES", len(json.dumps(content["images"][0])) + 100)
    monkeypatch.setattr(report_images, "MAX_DETECTIONS", 1)
    (tmp_path / "again").mkdir()
    text = detection_report(tmp_path / "again")
    assert len(content_of(text)["images"]) == 1 and len(content_of(text)["images"][0]["found"]["teacher"]) == 1


def test_images_that_cannot_be_read_are_named_and_left_out(tmp_path, register, caplog):
    records = images(tmp_path / "images", 4)
    register(records, thing_classes=NAMES)
    Path(records[0]["file_name"]).unlink()
    Path(records[1]["file_name"]).write_bytes(b"no image")
    text = detection_report(tmp_path)
    assert [image["name"][7] for image in content_of(text)["images"]] == ["3", "2"]
    assert f"Left out, as they cannot be read: Image {records[0]['file_name']} cannot be read (there" in notes_of(text)
    assert (tmp_path / "out/detections.png").is_file() and "Left out of the pictures: Image" in caplog.text
    for record in records[2:]:
        Path(record["file_name"]).unlink()
    (tmp_path / "again").mkdir()
    text = detection_report(tmp_path / "again")
    assert (
        content_of(text)["images"] == []
        and 'id="browser"' not in text
        and not (tmp_path / "again/out/detections.png").exists()
    )


def test_runs_without_predictions_or_ground_truth(tmp_path, register):
    register(images(tmp_path / "images", 4, annotated=False), thing_classes=NAMES)
    text = detection_report(tmp_path)
    assert content_of(text)["has_truth"] is False and "There is no ground truth" in notes_of(text)
    assert content_of(text)["images"][0]["truth"] == []
    (tmp_path / "baseline/inference" / FILE).unlink()
    models = {n: load_result(n, str(tmp_path / n), dataset_name=DATASET) for n in ("baseline", "distilled")}
    write_report(str(tmp_path / "out"), models, dataset_name=DATASET)
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert content_of(text)["models"] == ["distilled"] and "No predictions were kept of: baseline student." in notes_of(
        text
    )
    write_report(str(tmp_path / "out"), {"baseline": models["baseline"]}, dataset_name=DATASET)
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert content_of(text) is None and "No run has predictions in its inference folder" in text
    write_report(str(tmp_path / "out"), models)
    assert "without a dataset" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_masks_are_compared_and_drawn_as_outlines(tmp_path, register):
    records = images(tmp_path / "images", 1)
    for a in records[0]["annotations"]:
        x, y, width, height = a["bbox"]
        a["segmentation"] = [[x, y, x + 9, y, x + 9, y + height, x, y + height]]  # a narrow part of the box
    register(records, thing_classes=NAMES)
    text = detection_report(tmp_path, {"teacher": {0: [(0, 0.9)]}}, masks=True, task="segm")
    (found,) = content_of(text)["images"][0]["found"]["teacher"]
    assert found["finds"] == -1 and "IoU of masks" in notes_of(text)
    mask = np.zeros((64, 64), np.uint8)
    mask[10:40, 20:50] = 1
    mask[20:30, 30:40] = 0
    outer, hole = re.findall(r"M([^MZ]+)Z", report_images.outline(mask, (64, 64), 0.5))
    corners = np.array([point.split() for point in outer.split("L")], float)
    assert corners.min(0) == pytest.approx([10, 5], abs=0.1) and corners.max(0) == pytest.approx([25, 20], abs=0.1)
    corners = np.array([point.split() for point in hole.split("L")], float)
    assert corners.min(0) == pytest.approx([15, 10], abs=0.1) and corners.max(0) == pytest.approx([20, 15], abs=0.1)


@pytest.mark.parametrize("width, height", [(1280, 853), (3000, 2000)])  # 853 / 1280 of 640 is no whole number
def test_masks_of_photographs_that_are_shown_smaller_are_compared(tmp_path, register, width, height):
    records = images(tmp_path / "images", 1)
    Image.new("RGB", (width, height)).save(records[0]["file_name"])
    x, y, across, down = box = [100, 100, 400, 300]
    polygon = [x, y, x + across, y, x + across, y + down, x, y + down]
    annotation = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": [polygon]}
    records[0] |= {"width": width, "height": height, "annotations": [annotation]}
    register(records, thing_classes=NAMES)
    (rle,) = mask_util.frPyObjects([polygon], height, width)
    mask = {"size": rle["size"], "counts": rle["counts"].decode()}
    found = [{"image_id": 0, "category_id": 0, "bbox": box, "score": 0.9, "segmentation": mask}]
    run = write_run(tmp_path / "run", {"segm": {"AP": 100.0}}, FILE, found)
    models = {"x": load_result("x", str(run), dataset_name=DATASET, task="segm")}
    write_report(str(tmp_path / "out"), models, dataset_name=DATASET, environment={}, task="segm")
    (image,) = content_of((tmp_path / "out/report.html").read_text(encoding="utf-8"))["images"]
    assert max(image["width"], image["height"]) == 640 and [d["finds"] for d in image["found"]["x"]] == [0]


def test_costs_of_a_benchmark_are_in_table_and_plots(tmp_path, caplog):
    for name, latency in (("teacher", 41.5), ("distilled", 9.25)):
        run = write_run(tmp_path / name, {"bbox": {"AP": 30.0}})
        cost = {"latency_ms": {"median": latency}, "images_per_second": 200.0, "multiply_adds": 2_500_000_000}
        exported = {"student.onnx": {"latency_ms": {"median": 4.0}}}
        (run / "benchmark.json").write_text(json.dumps({**cost, "memory_bytes": 2**21, "exported": exported}))
    (write_run(tmp_path / "broken", {"bbox": {"AP": 20.0}}) / "benchmark.json").write_text('{"latency_ms": 3}')
    models = {name: load_result(name, str(tmp_path / name)) for name in ("teacher", "distilled", "broken")}
    assert models["broken"].benchmark is None and "broken/benchmark.json tells no median latency" in caplog.text
    content = write_report(str(tmp_path / "out"), models)
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "AP against latency" in page and "41.5 milliseconds an image" in page and "Not known of: broken." in page
    assert "<title>teacher: student.onnx: 30.0 AP, 4 milliseconds an image</title>" in page
    assert '<td data-value="9.25">9.2</td>' in page and '<td data-value="2500000000">2.50 G</td>' in page
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| distilled student"))
    assert "| 9.2 | 200.0 | 2 MiB | 2.50 G |" in row and "](trade_off.png)" in text
    assert content["models"]["distilled"]["benchmark"]["exported"] == {"student.onnx": 4.0}
    assert (tmp_path / "out/trade_off.png").stat().st_size > 1000
    write_report(str(tmp_path / "out"), {"broken": models["broken"]})
    assert (
        "multiply-adds" not in (tmp_path / "out/report.md").read_text()
        and not (tmp_path / "out/trade_off.png").exists()
    )


def test_the_statement_keeps_its_emphasis_and_nothing_else(tmp_path):
    models = {"one": ModelResult("one", {"AP": 5.0})}
    write_report(str(tmp_path), models, statement="It is **much\nfaster** (`KEY <1>`).\n\nAnd <b>** more.")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (
        "<p>It is <strong>much\nfaster</strong> (<code>KEY &lt;1&gt;</code>).</p><p>And &lt;b&gt;** more.</p>" in page
    )


def test_feature_pictures_are_in_the_page(tmp_path):
    run = write_run(tmp_path / "distilled", {"bbox": {"AP": 30.0}})
    (run / "model_final.pth").write_bytes(b"")
    (run / "features").mkdir()
    (run / "features/a.png").write_bytes(b"picture")
    (run / "features/features.json").write_text(json.dumps({"images": [{"picture": "a.png"}]}))
    write_report(str(tmp_path / "out"), {"distilled": load_result("distilled", str(run))})
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert f'src="data:image/png;base64,{base64.b64encode(b"picture").decode()}"' in page and "Features" in page


def test_models_of_one_label_are_told_apart(tmp_path):
    models = {name: ModelResult(name, {"AP": 5.0}, label="mine", params=3) for name in ("one", "other")}
    write_report(str(tmp_path), models, task="bbox_EMA")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "mine (one) 5.0" in text and "mine (other) 5.0" in text and "Object detection (EMA)" in text
    assert "| mine | 5.0 |" in (tmp_path / "report.md").read_text()


def test_numbers_of_a_diverged_model_break_nothing(tmp_path, register):
    register(images(tmp_path / "images", 1), thing_classes=NAMES)
    said = {"teacher": {0: [(0, math.nan), (1, 0.9)]}, "baseline": {0: [(2, 0.9)]}}
    run = write_run(tmp_path / "x", {"bbox": {"AP": 1.0}})
    broken = [{"image_id": 0, "category_id": 1, "bbox": [math.nan, 0, math.inf, 9], "score": 0.8}]
    text = detection_report(tmp_path, said)
    assert len(content_of(text)["images"][0]["found"]["teacher"]) == 1
    (run / "inference" / FILE).write_text(json.dumps(broken))
    write_report(str(tmp_path / "out"), {"x": load_result("x", str(run))}, dataset_name=DATASET)
    (image,) = content_of((tmp_path / "out/report.html").read_text(encoding="utf-8"))["images"]
    assert image["found"] == {"x": []}


def test_plots_show_what_is_known():
    points = [Cost("a<b", 30.0, 40.0, "ms"), Cost("none", float("nan"), 3.0, "ms"), Cost("c", 20.0, 2.0, "ms")]
    drawn = trade_off(points, "AP", ("c", "a<b"))
    assert (
        "a&lt;b" in drawn and ">none" not in drawn and 'class="arrow"' in drawn and drawn.count('class="marker"') == 2
    )
    assert 'class="m2"' in drawn  # the color of the third model stays its own
    assert trade_off([Cost("x", 1.0, 0.0, "ms")]) == "" == curves({"x": np.zeros((0, 2))}, "loss")
    assert trade_off([Cost("x", 0.0, 1.0, "ms")]) and curves({"x": np.array([[0.0, 0.0]])}, "loss", logarithmic=True)
    for low, high in ((0.0, 100.0), (31.7, 38.4), (5.0, 5.0), (0.0, 0.0), (-3.0, 1.0), (0.001, 0.002)):
        scale = axis([low, high])
        assert scale.low <= low and high <= scale.high and 2 <= len({f"{t:.3g}" for t in scale.ticks()}) <= 12
    assert axis([2.0, 40.0], logarithmic=True).ticks() == [2, 5, 10, 20, 50]


def test_files_of_the_page_are_in_the_package():
    folder = Path(report_html.__file__).parent / "report_page"
    assert {file.name for file in folder.iterdir()} == {"page.html", "page.css", "page.js"}


# --- the page in a browser ------------------------------------------------------------------------------------


def test_a_browser_shows_switches_and_sorts(tmp_path, register):
    register(images(tmp_path / "images", 4), thing_classes=NAMES)
    detection_report(tmp_path, masks=True)
    seen = visit(
        tmp_path / "out/report.html",
        """
        const boxes = () => all("#panels .overlay .object.found .line, #panels .overlay .object.wrong .line").length;
        const slide = (value) => {
          const slider = document.getElementById("threshold");
          slider.value = value;
          slider.dispatchEvent(new Event("input"));
        };
        const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        const caption = () => document.getElementById("caption").textContent;
        const touch = (type, x) => {
          const target = document.getElementById("panels");
          const touches = [new Touch({ identifier: 1, target, clientX: x, clientY: 5 })];
          const event = { touches: type === "touchstart" ? touches : [], changedTouches: touches, bubbles: true };
          target.dispatchEvent(new TouchEvent(type, event));
        };
        const column = () => all("#classes-table tbody th").map((cell) => cell.textContent);
        const head = (place) => all("#classes-table thead button")[place];
        const sorted = () => all("#classes-table thead th").map((cell) => cell.getAttribute("aria-sort"));

        seen.panels = all("#panels .panel figcaption").map((caption) => caption.textContent);
        seen.boxes = [boxes()];
        slide(0.1); seen.boxes.push(boxes());
        slide(0.95); seen.boxes.push(boxes());
        seen.missed = all("#panels .object.missed .line").length;
        slide(0.3);
        const corners = (rect) => ["x", "y", "width", "height"].map((name) => Number(rect.getAttribute(name)));
        const cover = ([x, y, w, h], [u, v, m, n]) => x < u + m && u < x + w && y < v + n && v < y + h;
        const labels = all("#panels .stage").map((stage) => [...stage.querySelectorAll(".label rect")].map(corners));
        seen.labels = labels.flat().length;
        seen.overlapping = labels.flatMap((of) => of.filter((a) => of.some((b) => a !== b && cover(a, b)))).length;
        seen.masks = [all("path.mask").length];
        document.querySelector("input[name=masks]").click(); seen.masks.push(all("path.mask").length);
        document.querySelector("input[value=teacher]").click(); seen.shown = [all("#panels .panel").length];
        press("2"); press("1"); seen.shown.push(all("#panels .panel").length);
        press("1");
        seen.captions = [caption()];
        document.getElementById("next").click(); seen.captions.push(caption());
        press("ArrowRight"); seen.captions.push(caption());
        document.getElementById("previous").click(); press("ArrowLeft"); press("ArrowLeft");
        seen.captions.push(caption());
        touch("touchstart", 200); touch("touchend", 90); seen.captions.push(caption());
        document.getElementById("order").value = "baseline";
        document.getElementById("order").dispatchEvent(new Event("change")); seen.ahead = caption();
        seen.strip = all("#strip button").map((button) => button.textContent);
        document.querySelector(".stage").click(); seen.large = all(".panel.large").length;
        all(".stage")[1].focus(); press("ArrowRight"); seen.focused = all(".stage").indexOf(document.activeElement);
        head(3).click(); seen.down = [column(), sorted()];
        head(3).focus(); head(3).click(); seen.up = [column(), sorted()];
        head(0).click(); seen.byName = sorted();
        seen.titles = all("#panels title").map((title) => title.textContent);
        """,
    )
    assert seen["problems"] == []
    assert seen["panels"] == [
        "ground truth3 objects",
        "teacher3 found, 0 missed, 0 wrong",
        "baseline student1 found, 2 missed, 1 wrong",
        "distilled student2 found, 1 missed, 0 wrong",
    ]
    assert seen["boxes"] == [7, 8, 0] and seen["missed"] == 9
    assert seen["labels"] > 6 and seen["overlapping"] == 0
    assert seen["masks"][0] > 0 and seen["masks"][1] == 0
    assert seen["shown"] == [3, 3] and seen["large"] == 1 and seen["focused"] == 1
    assert [caption[:6] for caption in seen["captions"]] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4", "1 of 4"]
    assert seen["ahead"].startswith("1 of 4 images/3<b>&\"'ü") and seen["strip"] == ["−1", "0", "+1", "+1"]
    assert seen["down"] == [NAMES[::-1], ["none", "none", "none", "descending", "none"]]
    assert seen["up"] == [NAMES, ["none", "none", "none", "ascending", "none"]]
    assert seen["byName"][0] == "ascending" and seen["byName"][3] == "none"
    assert f"{NAMES[1]}, score 0.80, found" in seen["titles"]
    wide = "seen.across = document.documentElement.scrollWidth"
    phone = visit(tmp_path / "out/report.html", wide, (375, 800))
    assert phone["problems"] == [] and phone["across"] <= phone["width"] == 375


@pytest.mark.parametrize(
    "changes, what",
    [
        ({}, "has a label map of 16x8 for"),
        ({"category_id": 7}, "(entry 1 is of category 7, which the dataset does not have)"),
        ({"segmentation": {"size": [2, 2], "counts": "04"}}, "(entry 1 has a mask of another size than others of"),
        ({"segmentation": None}, "(entry 1 has 'segmentation' None)"),
    ],
)
def test_label_maps_that_are_damaged_or_of_another_dataset_are_an_error(tmp_path, register, caplog, changes, what):
    (record,) = images(tmp_path / "images", 1, annotated=False)
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(record["sem_seg_file_name"])
    register([record], stuff_classes=NAMES)
    rle = mask_util.encode(np.ones((8, 16), np.uint8, order="F"))
    mask = {"size": rle["size"], "counts": rle["counts"].decode()}
    said = {"file_name": record["file_name"], "category_id": 0, "segmentation": mask}
    moved = {**said, "file_name": "elsewhere.png"}  # is no error: where images lie may change
    run = write_run(
        tmp_path / "run", {"sem_seg": {"mIoU": 5.0}}, "sem_seg_predictions.json", [said, {**said, **changes}, moved]
    )
    models = {"x": load_result("x", str(run), dataset_name=DATASET, task="sem_seg")}
    with pytest.raises(ResultError, match=f"Run 'x': .*{re.escape(what)}"):
        write_report(str(tmp_path / "out"), models, dataset_name=DATASET, task="sem_seg")
    assert changes or f"not shown: {DATASET} has no image elsewhere.png" in caplog.text


def test_a_browser_shows_label_maps(tmp_path, register):
    records = images(tmp_path / "images", 3, annotated=False)
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    truth[:, 80:] = 1
    truth[:10] = 255
    for record in records:
        record["sem_seg_file_name"] = str(tmp_path / f"labels{record['image_id']}.png")
        Image.fromarray(truth).save(record["sem_seg_file_name"])
    colors = [[10, 20, 30], [200, 100, 50], [0, 0, 255]]
    register(records, stuff_classes=NAMES, stuff_colors=colors, ignore_label=255)
    models = {}
    for name, wide in (("baseline", 40), ("distilled", 0)):
        said = []
        for record in records[: 2 if wide else 3]:
            labels = truth % 255
            labels[:, 80 : 80 + wide * record["image_id"]] = 2
            for label in np.unique(labels).tolist():
                rle = mask_util.encode(np.asfortranarray((labels == label).astype(np.uint8)))
                mask = {"size": rle["size"], "counts": rle["counts"].decode()}
                said.append({"file_name": record["file_name"], "category_id": label, "segmentation": mask})
        run = write_run(tmp_path / name, {"sem_seg": {"mIoU": 5.0, "IoU-plain": 3.0}}, "sem_seg_predictions.json", said)
        models[name] = load_result(name, str(run), dataset_name=DATASET, task="sem_seg")
    write_report(str(tmp_path / "out"), models, dataset_name=DATASET, task="sem_seg")
    page = tmp_path / "out/report.html"
    content = content_of(page.read_text(encoding="utf-8"))
    assert [image["name"][7] for image in content["images"]] == ["1", "0", "2"]
    first = content["images"][0]
    assert first["found"]["distilled"]["right"] == 1 and first["found"]["baseline"]["right"] == 0.75
    assert first["difference"] == 0.25 and first["present"] == [0, 1, 2] and content["colors"][1] == "#c86432"
    errors = Image.open(io.BytesIO(base64.b64decode(first["found"]["baseline"]["errors"].partition(",")[2])))
    pixels = np.array(errors.convert("RGBA"))
    assert pixels[60, 20, 3] == 0 and tuple(pixels[60, 100]) == (213, 94, 0, 255) and pixels[2, 2, 3] == 255
    seen = visit(
        page,
        """
        const overlays = () => all("#panels .stage").map((stage) => stage.querySelectorAll("img.overlay").length);
        const notes = () => all("#panels figcaption span").map((span) => span.textContent);
        const set = (id, value, event) => {
          document.getElementById(id).value = value;
          document.getElementById(id).dispatchEvent(new Event(event));
        };
        const opacity = () => Number(getComputedStyle(document.querySelector("img.overlay")).opacity);
        const key = () => all("#key li").map((entry) => entry.textContent);
        seen.start = [overlays(), notes(), opacity(), key()];
        set("opacity", 0.25, "input"); seen.opacity = opacity();
        set("overlay", "errors", "change"); seen.errors = [overlays(), key()];
        document.getElementById("next").click(); document.getElementById("next").click(); seen.last = notes();
        await rest();
        seen.loaded = all("#panels img").every((image) => image.complete && image.naturalWidth > 0);
        """,
    )
    assert seen["problems"] == [] and seen["loaded"]
    assert seen["start"] == [[1, 1, 1], ["", "75.0 % right", "100.0 % right"], 0.6, NAMES]
    assert seen["opacity"] == 0.25 and seen["errors"] == [[0, 1, 1], ["wrong pixels", "pixels that do not count"]]
    assert seen["last"] == ["", "no label map", "100.0 % right"]


def test_a_browser_shows_what_classifiers_say_on_a_phone(tmp_path, register):
    records = images(tmp_path / "images", 3, annotated=False)
    for record in records:
        record["label"] = record["image_id"]
    register(records, thing_classes=NAMES)
    models = {}
    for name, said in (("teacher", [0, 1, 2]), ("baseline", [0, 0, 2]), ("distilled", [0, 1, 1])):
        file = [
            {"image_id": n, "label": n, "classes": [c, (c + 1) % 3], "scores": [0.7, 0.2 + n / 100]}
            for n, c in enumerate(said)
        ]
        metrics = {"top1": 60.0, "top1-plain": 1.0}
        run = write_run(tmp_path / name, {"classification": metrics}, "classification_predictions.json", file)
        models[name] = load_result(name, str(run), dataset_name=DATASET, task="classification")
    write_report(str(tmp_path / "out"), models, dataset_name=DATASET, task="classification")
    seen = visit(
        tmp_path / "out/report.html",
        """
        const answers = () => all("#panels .panel").map((panel) => panel.textContent.replace(/\\s+/g, " "));
        seen.strip = all("#strip button").map((button) => button.textContent);
        seen.true = document.querySelector(".picture figcaption").textContent;
        seen.answers = answers();
        document.querySelector("input[value=teacher]").click(); seen.fewer = answers().length;
        seen.across = document.documentElement.scrollWidth;
        """,
        (375, 800),
    )
    assert seen["problems"] == [] and seen["across"] <= seen["width"] == 375
    assert seen["strip"] == ["+0.49", "−0.48", "0.00"]
    assert seen["true"] == f"true: {NAMES[1]}" and seen["fewer"] == 2
    assert seen["answers"][1].startswith("baseline student✕ wrongplain0.70")
    assert seen["answers"][2].startswith(f"distilled student✓ right{NAMES[1]}0.70")
