"""Small COCO datasets, sound but for one fault that real exports have: `CASES`.

Each has 6 images for training and 2 for validation, of 64 x 64 pixels with two bright shapes each, whose polygons are
known. `write_case` writes one; test_cases.py says how a run on it must end.
"""

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw

SIZE = 64
CLASSES = ("square", "disc")
EXIF_ORIENTATION = 0x0112

#: Images of the splits, and the seed of the first one.
SPLITS = {"train": (6, 0), "val": (2, 100)}


@dataclass
class Split:
    """A dataset before it is written: content of the annotation file, and the image files by name."""

    name: str
    content: dict[str, Any]
    files: dict[str, bytes]

    @property
    def images(self) -> list[dict[str, Any]]:
        return self.content["images"]

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return self.content["annotations"]

    def write(self, folder: Path) -> None:
        """Writes NAME.json and the folder NAME with the images."""
        (folder / self.name).mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(json.dumps(self.content))
        for name, data in self.files.items():
            path = folder / self.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def sound_split(name: str, first_image: int = 1, first_annotation: int = 1, first_category: int = 1) -> Split:
    """A dataset without fault; its ids count up from the given ones."""
    count, seed = SPLITS[name]
    split = Split(name, {"images": [], "annotations": [], "categories": []}, {})
    for i in range(count):
        file_name, shapes = f"{seed + i:04d}.png", draw_shapes(seed + i)
        split.files[file_name] = encode(picture(seed + i, shapes))
        split.images.append({"id": first_image + i, "file_name": file_name, "width": SIZE, "height": SIZE})
        for label, box in shapes:
            split.annotations.append(
                {
                    "id": first_annotation + len(split.annotations),
                    "image_id": first_image + i,
                    "category_id": first_category + label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": [outline(label, *box)],
                }
            )
    split.content["categories"] = [{"id": first_category + i, "name": c} for i, c in enumerate(CLASSES)]
    return split


def draw_shapes(seed: int) -> list[tuple[int, list[int]]]:
    """Draws a shape for each half of an image: [(class, [x, y, width, height]), ...]."""
    random = np.random.default_rng(seed)
    shapes = []
    for left in (0, SIZE // 2):
        side = int(random.integers(14, 26))
        x, y = left + int(random.integers(1, SIZE // 2 - side)), int(random.integers(4, SIZE - side - 1))
        shapes.append((int(random.integers(len(CLASSES))), [x, y, side, side]))
    return shapes


def outline(label: int, x: float, y: float, width: float, height: float) -> list[float]:
    """The polygon of a shape."""
    if CLASSES[label] == "square":
        return [x, y, x + width, y, x + width, y + height, x, y + height]
    angles = [k * math.pi / 6 for k in range(12)]
    corners = [(0.5 + 0.5 * math.cos(angle), 0.5 + 0.5 * math.sin(angle)) for angle in angles]
    return [round(v, 2) for u, w in corners for v in (x + u * width, y + w * height)]


def picture(seed: int, shapes: list[tuple[int, list[int]]]) -> Image.Image:
    """An RGB image of shapes on dark noise."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    for label, box in shapes:
        draw.polygon(outline(label, *box), fill=((230, 60, 60), (60, 230, 90))[label])
    return image


def encode(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    """The content of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """The image of a file's content."""
    return Image.open(io.BytesIO(data))


def runs_of(annotation: dict[str, Any]) -> dict[str, Any]:
    """The mask of an annotation as compressed RLE, as it stands in JSON."""
    rle = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], SIZE, SIZE))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


# --- The cases ---------------------------------------------------------------------

#: Faults by name: functions that change a split.
CASES: dict[str, Callable[[Split], None]] = {}


def case(change: Callable[[Split], None]) -> Callable[[Split], None]:
    CASES[change.__name__] = change
    return change


def write_case(name: str, folder: Path) -> None:
    """Writes train.json, val.json and the folders train and val."""
    for split in map(sound_split, SPLITS):
        CASES[name](split)
        split.write(folder)


@case
def control(split: Split) -> None:
    pass


@case
def image_ids_above_2_to_53(split: Split) -> None:
    for image in split.images:
        image["id"] += 2**53
    for annotation in split.annotations:
        annotation["image_id"] += 2**53


@case
def annotation_ids_from_0(split: Split) -> None:
    for annotation in split.annotations:
        annotation["id"] -= 1


@case
def annotation_ids_negative(split: Split) -> None:
    for annotation in split.annotations:
        annotation["id"] *= -1


@case
def polygon_with_nan(split: Split) -> None:
    for annotation in split.annotations:
        annotation["segmentation"][0][0] = float("nan")


@case
def truncated_validation_image(split: Split) -> None:
    if split.name == "val":
        name = split.images[1]["file_name"]
        split.files[name] = split.files[name][: len(split.files[name]) // 2]


@case
def exif_rotated_with_stored_sizes(split: Split) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    for image in split.images:
        stored = decode(split.files.pop(image["file_name"])).resize((80, SIZE))
        image.update(file_name=f"{image['id']}.jpg", width=80, height=SIZE)
        split.files[image["file_name"]] = encode(stored, "jpeg", exif=exif.tobytes())


@case
def grey_16_bit(split: Split) -> None:
    for name, data in split.files.items():
        grey = np.asarray(decode(data).convert("L")).astype(np.uint16)
        split.files[name] = encode(Image.fromarray(grey * 16))


@case
def val_numbers_classes_otherwise(split: Split) -> None:
    if split.name == "val":
        swap_classes(split)


def swap_classes(split: Split) -> None:
    """Gives the classes each other's id; what an annotation means stays."""
    split.content["categories"] = [{"id": i, "name": name} for i, name in enumerate(reversed(CLASSES), 1)]
    for annotation in split.annotations:
        annotation["category_id"] = 3 - annotation["category_id"]


@case
def no_masks_at_all(split: Split) -> None:
    for annotation in split.annotations:
        annotation["segmentation"] = []


@case
def flat_polygon_list(split: Split) -> None:
    for annotation in split.annotations:
        annotation["segmentation"] = annotation["segmentation"][0]


@case
def compressed_rle(split: Split) -> None:
    for annotation in split.annotations:
        annotation["segmentation"] = runs_of(annotation)


@case
def all_crowd(split: Split) -> None:
    for annotation in split.annotations:
        annotation["iscrowd"] = 1


@case
def sizes_as_floats(split: Split) -> None:
    for image in split.images:
        image.update(width=float(SIZE), height=float(SIZE))


@case
def boxes_from_0_to_1(split: Split) -> None:
    for annotation in split.annotations:
        annotation["bbox"] = [value / SIZE for value in annotation["bbox"]]


@case
def one_box_3_px_outside(split: Split) -> None:
    split.annotations[1]["bbox"][1] = -3


@case
def double_slash_in_file_name(split: Split) -> None:
    for image in split.images:
        split.files[f"sub/{image['file_name']}"] = split.files.pop(image["file_name"])
        image["file_name"] = f"sub//{image['file_name']}"


def write_palette_label_maps(folder: Path) -> None:
    """Images in train and val, and their label maps, of the classes 0, 1 and 2, with a palette in train_gt, val_gt."""
    for name, (count, seed) in SPLITS.items():
        for path in (folder / name, folder / f"{name}_gt"):
            path.mkdir(parents=True)
        for i in range(count):
            shapes = draw_shapes(seed + i)
            picture(seed + i, shapes).save(folder / name / f"{i}.jpg")
            labels = Image.new("P", (SIZE, SIZE))
            labels.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            for label, box in shapes:
                ImageDraw.Draw(labels).polygon(outline(label, *box), fill=label + 1)
            labels.save(folder / f"{name}_gt" / f"{i}.png")
