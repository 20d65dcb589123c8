#!/usr/bin/env python
"""What `d2kd train --check` prints for three pairs, as docs/check.md shows it.

    python benchmarks/check_pairs.py                # about two minutes on 2 cores
    python benchmarks/check_pairs.py --only tokens

The recipes and networks are real; weights are random (the last norm of each block at 0.2) and images noise (eight of
256 x 192 pixels, under COCO's name). So shapes, aligners and what is inherited are those of a training; losses, shares,
memory and time are not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.engine import load_config
from d2kd.modeling import build_network
from detectron2.data import MetadataCatalog

#: Classes of the student with 3; COCO has the first two.
OWN = ["person", "bicycle", "forklift"]
SMALL = ["INPUT.MIN_SIZE_TRAIN", "(192,)", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
SMALL += ["SEED", "1", "OUTPUT_DIR", "output/distilled"]
PAIRS: dict[str, tuple[str, str, list[str]]] = {
    "retinanet": ("configs/COCO/retinanet_R50_R101_FeatureMimic_1x.yaml", "configs/COCO/retinanet_R101.yaml", []),
    "classes": (
        "configs/COCO/faster_rcnn_R50_1x.yaml",
        "configs/COCO/mask_rcnn_R101.yaml",
        ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "()"]
        + ["DATASETS.REGISTER", "[{'NAME': 'own_train', 'JSON': 'own.json', 'IMAGES': 'coco/train2017'}]"],
    ),
    "tokens": (
        "configs/COCO/faster_rcnn_R50_R101_ReceptiveTokens_2x.yaml",
        "configs/COCO/faster_rcnn_R101.yaml",
        ["DISTILL.RECEPTIVE_TOKENS.FILE", "tokens/tokens.pth"],
    ),
}


def make_data(folder: Path) -> None:
    """Writes noise under COCO's name, and its annotations: COCO's classes, and those of `OWN`."""
    generator = np.random.default_rng(0)
    meta = MetadataCatalog.get("coco_2017_train")
    ids = {contiguous: i for i, contiguous in meta.thing_dataset_id_to_contiguous_id.items()}
    coco = [{"id": ids[n], "name": name} for n, name in enumerate(meta.thing_classes)]
    own = [{"id": n, "name": name} for n, name in enumerate(OWN, 1)]
    for split in ("train2017", "val2017"):
        (folder / "coco" / split).mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(0, 256, (192, 256, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "coco" / split / f"{number}.jpg")
        write_annotations(folder / "coco" / "annotations" / f"instances_{split}.json", coco)
    write_annotations(folder / "own.json", own)


def write_annotations(path: Path, categories: list[dict[str, Any]]) -> None:
    """Writes two boxes an image, of the first two classes."""
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 192, "width": 256} for n in range(8)]
    annotations = [
        {"id": 2 * n + k + 1, "image_id": n, "category_id": categories[k]["id"], "bbox": [20 + 90 * k, 40, 80, 100]}
        for n in range(8)
        for k in range(2)
    ]
    annotations = [{**a, "area": 8000, "iscrowd": 0} for a in annotations]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def save_weights(config: str, path: Path, options: list[str], part: str = "") -> None:
    """Writes random weights of a model, or a part of it, with which its features stay small."""
    torch.manual_seed(0)
    cfg = load_config(config, ["MODEL.DEVICE", "cpu", *options])
    weights = {k: v for k, v in build_network(cfg, config).state_dict().items() if k.startswith(part)}
    for name in weights:
        if name.endswith("conv3.norm.weight"):
            weights[name].fill_(0.2)
    torch.save({"model": weights}, path)


def run(folder: Path, *arguments: str) -> str:
    """Runs a command of d2kd in a folder; returns what it prints."""
    variables = {**os.environ, "DETECTRON2_DATASETS": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "-m", "d2kd.cli", *arguments], cwd=folder, env=variables, capture_output=True, text=True
    )
    if process.returncode:
        raise SystemExit(process.stdout + process.stderr)
    return process.stdout


def check(folder: Path, name: str) -> str:
    """Returns the command of a pair and what it prints, without the log."""
    config, teacher, options = PAIRS[name]
    save_weights(teacher, folder / "teacher.pth", [])
    save_weights(config, folder / "backbone.pth", [], "backbone.bottom_up.")
    if name == "tokens":
        few = [*SMALL, "DISTILL.RECEPTIVE_TOKENS.LEARN.ITERATIONS", "1", "OUTPUT_DIR", "tokens"]
        taps = ["DISTILL.RECEPTIVE_TOKENS.TAPS", "['p2','p3','p4','p5','p6']"]
        run(folder, "learn-tokens", "--config-file", teacher, *few, *taps, "MODEL.WEIGHTS", "teacher.pth")
    shown = ["train", "--check", "--config-file", config, "--teacher-config", teacher]
    shown += ["--teacher-weights", "teacher.pth"]
    text = run(folder, *shown, *SMALL, "MODEL.WEIGHTS", "backbone.pth", *options)
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("method "))
    command = " ".join(shown).replace(" --teacher-config", " \\\n    --teacher-config")
    return "\n".join([f"$ d2kd {command} ...", "", *lines[start:]])


def main() -> None:
    """Prints all pairs, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PAIRS, help="one of the pairs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        print("\n\n".join(check(folder, pair) for pair in ([args.only] if args.only else PAIRS)))


if __name__ == "__main__":
    main()
