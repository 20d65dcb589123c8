"""Small synthetic photographs of colored things, and the same annotations as COCO, YOLO and Pascal VOC files."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import cv2
import numpy as np

CLASSES = ["cup", "leaf", "stone"]
#: BGR
COLORS = [(60, 60, 200), (60, 180, 60), (190, 120, 60)]
#: width and height; none of them is a power of two, by which shares would be exact
SIZES = [(97, 61), (75, 111), (113, 83)]


def write_photographs(folder: Path, split: str, count: int, seed: int, polygons: bool = False) -> dict[str, Any]:
    """Writes JPEGImages and a COCO file of them; returns its content.

    Boxes are on whole pixels or, every other one, on hundredths, as in COCO's own files. The last image has no objects.
    """
    random = np.random.default_rng(seed)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": n} for i, n in enumerate(CLASSES, 1)],
    }
    for number in range(1, count + 1):
        width, height = SIZES[number % len(SIZES)]
        image = random.integers(90, 130, (height, width, 3), dtype=np.uint8)
        name = f"{split}_{number:02}.jpg"
        content["images"].append({"id": number, "file_name": name, "width": width, "height": height})
        for index in range(0 if number == count else 3):
            category = int(random.integers(len(CLASSES)))
            w, h = (float(v) for v in random.integers(14, 34, 2))
            x, y = float(random.integers(0, int(width - w))), float(random.integers(0, int(height - h)))
            if index % 2:
                x, y, w, h = round(x + 0.37, 2), round(y + 0.21, 2), round(w - 0.55, 2), round(h - 0.43, 2)
            corner = (int(x), int(y)), (int(x + w), int(y + h))
            cv2.rectangle(image, *corner, COLORS[category], -1)
            polygon = [x, y, round(x + w, 2), y, round(x + w, 2), round(y + h, 2), x, round(y + h, 2)]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": category + 1,
                    "bbox": [x, y, w, h],
                    "iscrowd": 0,
                    **({"segmentation": [polygon]} if polygons else {}),
                }
            )
        path = folder / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)
    (folder / f"{split}.json").write_text(json.dumps(content))
    return content


def write_yolo(folder: Path, split: str, content: dict[str, Any], decimals: int = 6) -> None:
    """Writes labels/SPLIT, a file for each image with objects; polygons where there are some."""
    labels = folder / "labels" / split
    labels.mkdir(parents=True)
    for image in content["images"]:
        lines = []
        for annotation in content["annotations"]:
            if annotation["image_id"] == image["id"]:
                x, y, w, h = annotation["bbox"]
                sides = image["width"], image["height"]
                values = annotation.get("segmentation", [[x + w / 2, y + h / 2, w, h]])[0]
                shares = [f"{v / sides[i % 2]:.{decimals}f}" for i, v in enumerate(values)]
                lines.append(" ".join([str(annotation["category_id"] - 1), *shares]))
        if lines:
            (labels / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    names = "\n".join(f"  {i}: {name}" for i, name in enumerate(CLASSES))
    (folder / "data.yaml").write_text(f"path: .\ntrain: images/train\nnames:\n{names}\n")


def write_voc(folder: Path, split: str, content: dict[str, Any]) -> None:
    """Writes Annotations, JPEGImages and ImageSets/Main/SPLIT.txt below voc/; crowds are difficult objects."""
    root = folder / "voc"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    stems = []
    for image in content["images"]:
        stems.append(Path(image["file_name"]).stem)
        target = root / "JPEGImages" / image["file_name"]
        target.write_bytes((folder / split / image["file_name"]).read_bytes())
        annotation = ET.Element("annotation")
        ET.SubElement(annotation, "filename").text = image["file_name"]
        size = ET.SubElement(annotation, "size")
        for key in ("width", "height"):
            ET.SubElement(size, key).text = str(image[key])
        for item in content["annotations"]:
            if item["image_id"] == image["id"]:
                element = ET.SubElement(annotation, "object")
                ET.SubElement(element, "name").text = CLASSES[item["category_id"] - 1]
                ET.SubElement(element, "difficult").text = str(item["iscrowd"])
                box = ET.SubElement(element, "bndbox")
                x, y, w, h = item["bbox"]
                for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h)):
                    ET.SubElement(box, key).text = f"{value:g}"
        ET.ElementTree(annotation).write(root / "Annotations" / f"{stems[-1]}.xml")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")


def entry(folder: Path, kind: str, split: str, name: str, **changes: Any) -> dict[str, Any]:
    """Of `DATASETS.REGISTER`, for a format of those that are written here."""
    images = {"IMAGES": str(folder / split)}
    keys = {
        "coco": {"JSON": str(folder / f"{split}.json"), **images},
        "yolo": {"LABELS": str(folder / "labels" / split), "CLASSES": str(folder / "data.yaml"), **images},
        "voc": {"ROOT": str(folder / "voc"), "SPLIT": split},
    }[kind]
    return {k: v for k, v in {"NAME": name, "FORMAT": kind, **keys, **changes}.items() if v is not None}
