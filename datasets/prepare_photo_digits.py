#!/usr/bin/env python
"""Builds PhotoDigits: real handwritten digits pasted onto crops of two real photographs, in COCO format.

Everything comes from scikit-learn; nothing is downloaded. `datasets/README.md` shows the resulting tree.
"""

import argparse
import errno
import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np

logger = logging.getLogger("prepare_photo_digits")

FORMAT_VERSION = 2
SPLITS = ("train", "val", "test")
DIGIT_SIDE = (26, 60)  # pixels, in an image of REFERENCE_SIZE
REFERENCE_SIZE = 128
MAX_DIGITS = 5
MAX_ROTATION = 15.0  # degrees
MAX_BOX_IOU = 0.1
MIN_VISIBLE = 0.6  # share of a digit that later digits must leave uncovered
MIN_CONTRAST = 90.0  # RGB distance that 90 % of the pixels behind a digit keep from its color
NOISE_STD = 5.0  # gray levels
PHOTO_CROP = (96, 160)  # side in pixels of the photograph; the upper end is the width of the held-out strip
HELD_OUT_DIGITS = 0.2
HELD_OUT_STRIP = 160  # right-most columns of each photograph: their upper half is for val, their lower half for test
REPLACING_ATTEMPTS = 20


@dataclass(frozen=True)
class Parameters:
    """What determines every byte of the dataset. Sizes are in pixels."""

    num_train: int = 3000
    num_val: int = 300
    num_test: int = 600
    image_size: int = 128
    crop_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_train": 1, "num_val": 1, "num_test": 1, "image_size": 32, "crop_size": 8, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {getattr(self, name)}, but must be at least {bound}")


@dataclass(frozen=True)
class Source:
    """The raw material of one split: `digits` (N, 8, 8) in 0..1, their `labels` (N,), RGB `photos`."""

    split: str
    digits: np.ndarray
    labels: np.ndarray
    photos: list[np.ndarray]


@dataclass
class Scene:
    """An image under construction: RGB `image` (S, S, 3) float32 in 0..255, and for each digit its visible
    `masks` (S, S), `labels` 0..9, and `areas` in pixels before anything covered it."""

    image: np.ndarray
    masks: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)


def build_dataset(output: Path, parameters: Parameters, workers: int = 1) -> None:
    """Writes the whole dataset into the existing, empty directory `output`.

    The bytes depend on `parameters` only, not on `workers`: each image has a random generator of its own.
    """
    (output / "annotations").mkdir()
    digest = hashlib.sha256()
    for source in load_sources(parameters.seed):
        count = getattr(parameters, f"num_{source.split}")
        _make_directories(output, source.split)
        job = partial(write_example, output, source, parameters)
        examples = list(_map(job, count, workers))
        text = coco_json(source.split, [annotations for annotations, _ in examples], parameters)
        (output / "annotations" / f"instances_{source.split}.json").write_text(text)
        for part in [text, *(checksum for _, checksum in examples)]:
            digest.update(part.encode())
        logger.info("%s: %d images, %d digits", source.split, count, sum(len(a) for a, _ in examples))
    description = {"name": "photo_digits", **_identity(parameters), "checksum": digest.hexdigest()}
    (output / "dataset.json").write_text(json.dumps(description, indent=1, sort_keys=True) + "\n")


def load_sources(seed: int) -> tuple[Source, Source, Source]:
    """Splits scikit-learn's 1,797 digits and two photographs into disjoint material for train, val and test.

    Train's is what it was before there was a test split, so that models trained on it stay comparable.
    """
    from sklearn.datasets import load_digits, load_sample_images

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.images))
    held_out, train = np.split(order, [int(len(order) * HELD_OUT_DIGITS)])
    photos = load_sample_images().images
    strips = [photo[:, -HELD_OUT_STRIP:] for photo in photos]
    halves = [(strip[: len(strip) // 2], strip[len(strip) // 2 :]) for strip in strips]
    regions = ([photo[:, :-HELD_OUT_STRIP] for photo in photos], *(list(parts) for parts in zip(*halves)))
    indices = (train, *halve_classes(held_out, data.target))
    return tuple(
        Source(split, (data.images[index] / 16).astype(np.float32), data.target[index], region)
        for split, index, region in zip(SPLITS, indices, regions)
    )


def halve_classes(indices: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deals `indices` into `labels` to two sides in turn, class by class: each side has half of every class."""
    ranks = np.zeros(len(indices), int)
    for label in np.unique(labels):
        (places,) = np.nonzero(labels[indices] == label)
        ranks[places] = np.arange(len(places)) + label  # the odd ones of a class go to either side in turn
    return indices[ranks % 2 == 0], indices[ranks % 2 == 1]


def write_example(output: Path, source: Source, parameters: Parameters, index: int) -> tuple[list[dict], str]:
    """Renders and writes image `index` (from 1) with its label map and crops.

    Returns its COCO annotations (still without ids) and a checksum of the files written.
    """
    rng = np.random.default_rng([parameters.seed, SPLITS.index(source.split), index])
    scene = render_scene(source, parameters.image_size, rng)
    noisy = scene.image + NOISE_STD * rng.standard_normal(scene.image.shape, dtype=np.float32)
    image = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)[..., ::-1]
    labels = np.zeros(image.shape[:2], np.uint8)
    for mask, label in zip(scene.masks, scene.labels):
        labels[mask] = label + 1
    name = f"{index:06d}"
    annotations = [annotation(mask, label, index) for mask, label in zip(scene.masks, scene.labels)]
    files = {f"{source.split}/{name}.png": image, f"semseg_{source.split}/{name}.png": labels}
    for number, (mask, item) in enumerate(zip(scene.masks, annotations)):
        if mask.sum() == scene.areas[number]:
            folder = f"classification/{source.split}/{scene.labels[number]}"
            files[f"{folder}/{name}_{number}.png"] = square_crop(image, item["bbox"], parameters.crop_size)
    digest = hashlib.sha256()
    for path, pixels in files.items():
        encoded = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
        (output / path).write_bytes(encoded)
        digest.update(encoded)
    return annotations, digest.hexdigest()


def render_scene(source: Source, size: int, rng: np.random.Generator) -> Scene:
    """Pastes 1 to 5 digits, as far as they find room, onto a photo crop of `size` x `size` pixels."""
    scene = Scene(random_background(source.photos, size, rng))
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        which = rng.integers(len(source.digits))
        for _ in range(20):
            alpha = random_digit(source.digits[which], size, rng)
            if fits(scene, alpha > 0.5):
                paste(scene, alpha, int(source.labels[which]), rng)
                break
    return scene


def random_background(photos: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """A square crop of a photo, scaled to `size`, perhaps mirrored, of varied brightness and contrast."""
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(PHOTO_CROP[0], PHOTO_CROP[1] + 1))
    top, left = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
    crop = cv2.resize(photo[top : top + side, left : left + side], (size, size))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = crop.astype(np.float32)
    gain, shift = rng.uniform(0.7, 1.2), rng.uniform(-25, 25)
    return np.clip((crop - 128) * gain + 128 + shift, 0, 255)


def random_digit(digit: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Opacity (size, size) in 0..1 of one 8 x 8 digit, enlarged smoothly, rotated, at a random place."""
    side = rng.uniform(*DIGIT_SIDE) * size / REFERENCE_SIZE
    x, y = rng.uniform(side / 2, size - side / 2, size=2)
    angle = np.deg2rad(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    cosine, sine = np.cos(angle) * side / 8, np.sin(angle) * side / 8
    rotation = np.array([[cosine, -sine], [sine, cosine]])
    offset = np.array([x, y]) - rotation @ [3.5, 3.5]
    ink = cv2.warpAffine(digit, np.column_stack([rotation, offset]), (size, size), flags=cv2.INTER_CUBIC)
    return np.clip((ink - 0.25) / 0.3, 0, 1)


def fits(scene: Scene, mask: np.ndarray) -> bool:
    """Whether a digit with this mask leaves the others visible and hardly overlaps their boxes."""
    box = tight_box(mask)
    for other, area in zip(scene.masks, scene.areas):
        if box_iou(box, tight_box(other)) > MAX_BOX_IOU or (other & ~mask).sum() < MIN_VISIBLE * area:
            return False
    return True


def paste(scene: Scene, alpha: np.ndarray, label: int, rng: np.random.Generator) -> None:
    """Paints one digit over the scene, in a color that stands out, and cuts it from the masks below."""
    mask = alpha > 0.5
    color = contrasting_color(scene.image[mask], rng)
    scene.image += alpha[..., None] * (color - scene.image)
    scene.masks = [other & ~mask for other in scene.masks] + [mask]
    scene.labels.append(label)
    scene.areas.append(int(mask.sum()))


def contrasting_color(behind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The first of 32 random RGB colors with MIN_CONTRAST to the pixels `behind` (N, 3), else the best."""
    colors = rng.uniform(0, 255, size=(32, 3)).astype(np.float32)
    distances = np.linalg.norm(colors[:, None] - behind[None, ::4], axis=2)
    contrast = np.percentile(distances, 10, axis=1)
    enough = np.flatnonzero(contrast >= MIN_CONTRAST)
    return colors[enough[0] if len(enough) else contrast.argmax()]


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) around the pixels of a mask that is not empty; x1 and y1 are exclusive."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def box_iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def square_crop(image: np.ndarray, box: list[int], size: int) -> np.ndarray:
    """A square around `box` (x, y, width, height) and a margin, inside the image, scaled to `size`."""
    x, y, width, height = box
    side = min(int(1.2 * max(width, height)) + 1, *image.shape[:2])
    left = int(np.clip(x + (width - side) // 2, 0, image.shape[1] - side))
    top = int(np.clip(y + (height - side) // 2, 0, image.shape[0] - side))
    return cv2.resize(image[top : top + side, left : left + side], (size, size))


def annotation(mask: np.ndarray, label: int, image_id: int) -> dict:
    """The COCO annotation of one digit: box (x, y, width, height), polygons and pixel count of its mask."""
    x0, y0, x1, y1 = tight_box(mask)
    return {
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(mask.sum()),
        "segmentation": polygons(mask),
        "iscrowd": 0,
    }


def polygons(mask: np.ndarray) -> list[list[float]]:
    """COCO polygons [[x, y, x, y, ...], ...] that cover the same pixels as `mask`, holes included.

    OpenCV's contours run through pixel centers. Those of the doubled mask lie a quarter of a pixel inside the
    border, so rasterising them gives back the mask exactly, even without the points that change the outline
    by less than another quarter of a pixel. COCO polygons have no holes: each is joined to its outline by a
    cut of no width.
    """
    doubled = np.repeat(np.repeat(mask.astype(np.uint8), 2, 0), 2, 1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outlines = {}
    parents = hierarchy[0, :, 3]
    for number in sorted(range(len(contours)), key=lambda i: parents[i] >= 0):
        points, parent = cv2.approxPolyDP(contours[number], 0.5, closed=True)[:, 0], parents[number]
        if parent < 0:
            outlines[number] = points
        else:
            outlines[parent] = join_hole(outlines[parent], points)
    return [((points + 0.5) / 2).reshape(-1).tolist() for points in outlines.values()]


def join_hole(outline: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Joins two closed contours (N, 2) and (M, 2) into one around both, through their closest points."""
    distances = np.abs(outline[:, None] - hole[None]).sum(2)
    i, j = np.unravel_index(distances.argmin(), distances.shape)
    return np.concatenate([outline[: i + 1], hole[j:], hole[: j + 1], outline[i:]])


def coco_json(split: str, annotations: list[list[dict]], parameters: Parameters) -> str:
    """The COCO annotation file of a split for images 1, 2, ... whose annotations are given in that order."""
    size = parameters.image_size
    images = [
        {"id": i, "file_name": f"{i:06d}.png", "width": size, "height": size} for i in range(1, len(annotations) + 1)
    ]
    flat = [item for group in annotations for item in group]
    content = {
        "info": {"description": "PhotoDigits: handwritten digits on photographs", **_origin(split, parameters)},
        "licenses": [],
        "categories": [{"id": d + 1, "name": str(d), "supercategory": "digit"} for d in range(10)],
        "images": images,
        "annotations": [{"id": i, **item} for i, item in enumerate(flat, 1)],
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def is_up_to_date(output: Path, parameters: Parameters) -> bool:
    """Whether `output` holds a finished dataset with these parameters, of the version that this program makes.

    Raises:
        FileExistsError: `output` holds something that is not PhotoDigits, which is never overwritten.
    """
    found = _description(output)
    return found is not None and _holds(found, _identity(parameters))


def is_outdated(output: Path, parameters: Parameters) -> bool:
    """Whether `output` holds what version 1 made of these parameters: the same train, val of twice the material.

    Raises:
        FileExistsError: as `is_up_to_date`.
    """
    found = _description(output)
    return found is not None and _holds(found, _first_version(_identity(parameters)))


def _description(output: Path) -> dict | None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        found = json.loads((output / "dataset.json").read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("name") != "photo_digits":
        raise FileExistsError(f"{output} exists and is not a PhotoDigits dataset; choose another --output")
    return found


def _holds(found: dict, identity: dict) -> bool:
    return all(found.get(key) == value for key, value in identity.items())


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Gives an empty directory beside `output` that takes its place at the end, or vanishes on an error.

    Of several processes that do so at once, the last one stays. `output` is gone for no longer than two renames take.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_name(f".{output.name}.new-{os.getpid()}")
    stale = output.with_name(f".{output.name}.old-{os.getpid()}")
    fresh.mkdir()
    try:
        yield fresh
        for attempt in range(REPLACING_ATTEMPTS):
            try:
                _swap(output, fresh, stale)
                break
            except OSError as error:
                by_others = error.errno in (errno.ENOTEMPTY, errno.EEXIST)  # between our two renames
                if not by_others or attempt + 1 == REPLACING_ATTEMPTS:
                    raise
            finally:
                shutil.rmtree(stale, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(output: Path, fresh: Path, stale: Path) -> None:
    """Moves `output`, if it is there, to `stale`, and `fresh` to `output`; after an error `output` is as it was."""
    try:
        with suppress(FileNotFoundError):
            output.rename(stale)
        fresh.rename(output)
    except BaseException:
        with suppress(OSError):  # there was none, or there is that of another process by now, which no rename replaces
            stale.rename(output)
        raise


def main(arguments: list[str] | None = None) -> None:
    """The command-line program."""
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets"))
    defaults = Parameters()
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--output", type=Path, default=root / "photo_digits", help="directory to create")
    parser.add_argument("--num-train", type=int, default=defaults.num_train, help="training images")
    parser.add_argument("--num-val", type=int, default=defaults.num_val, help="validation images")
    parser.add_argument("--num-test", type=int, default=defaults.num_test, help="test images")
    parser.add_argument("--image-size", type=int, default=defaults.image_size, help="side in pixels")
    parser.add_argument("--crop-size", type=int, default=defaults.crop_size, help="side of the crops")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of everything random")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes to use")
    parser.add_argument("--force", action="store_true", help="build again, replacing an existing PhotoDigits")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    try:
        parameters = Parameters(**{key: getattr(args, key) for key in asdict(defaults)})
        current, outdated = is_up_to_date(args.output, parameters), is_outdated(args.output, parameters)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    if current and not args.force:
        logger.info("%s is up to date", args.output)
        return
    if outdated:
        logger.info("%s is of version 1, without a test split: it is made again, with the same train", args.output)
    elif not args.force and (args.output / "dataset.json").exists():
        parser.error(f"{args.output} has other parameters; choose another --output, or use --force")
    if importlib.util.find_spec("sklearn") is None:
        parser.exit(1, "PhotoDigits needs scikit-learn, d2kd's extra 'digits': pip install scikit-learn\n")
    try:
        with replacing(args.output) as directory:
            build_dataset(directory, parameters, args.workers)
    except OSError as error:
        parser.exit(2, f"--output {args.output} cannot be written: {error.strerror or error}\n")
    logger.info("wrote %s", args.output)


def _identity(parameters: Parameters) -> dict:
    return {"version": FORMAT_VERSION, "parameters": asdict(parameters)}


def _origin(split: str, parameters: Parameters) -> dict:
    """What a split is made of; train's is that of version 1, whose bytes it has kept."""
    identity = _identity(parameters)
    return _first_version(identity) if split == "train" else identity


def _first_version(identity: dict) -> dict:
    return {"version": 1, "parameters": {k: v for k, v in identity["parameters"].items() if k != "num_test"}}


def _make_directories(output: Path, split: str) -> None:
    classes = [f"classification/{split}/{digit}" for digit in range(10)]
    for name in (split, f"semseg_{split}", *classes):
        (output / name).mkdir(parents=True)


def _map(job: partial, count: int, workers: int) -> Iterator[tuple[list[dict], str]]:
    if workers <= 1:
        yield from map(job, range(1, count + 1))
        return
    with ProcessPoolExecutor(min(workers, count), initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        yield from pool.map(job, range(1, count + 1), chunksize=max(1, min(100, count // workers)))


if __name__ == "__main__":
    main()
