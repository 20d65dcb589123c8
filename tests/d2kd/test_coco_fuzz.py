"""Random changes to a sound COCO file: it is accepted, loaded, mapped and evaluated, or refused in one line."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SIZE, runs_of, sound_split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2kd.config import add_distill_config
from d2kd.data.coco import load_coco, validate_coco_json
from d2kd.data.mapper import ImageMapper
from d2kd.errors import UserError
from d2kd.evaluation.coco import CocoEvaluator
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

NAME = "fuzzed"

NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.integers(),
    st.sampled_from([2**31, 2**53 + 1, 2**63, 2**64, 10**30, 10**400, -(2**63) - 1]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e9, 1e-320, 1e300, 0.5]),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", "0", "1", "\n", "a\nb", "a\0b", "\ud800", "x" * 3000, "../0000.png", "0000.png", "PPYo0", "%"]
    ),
    st.text(max_size=8),
)
KEYS = st.one_of(
    st.sampled_from(["id", "size", "counts", "iscrowd", "ignore", "area", "keypoints", "segmentation"]), TEXTS
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=7), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=12,
)


def content(with_runs: bool) -> dict[str, Any]:
    """Two images, with polygons, uncompressed and maybe compressed runs, a crowd and key points."""
    split = sound_split("val")
    _, other, crowd, points = split.annotations
    if with_runs:
        other["segmentation"] = runs_of(other)
    crowd.update(iscrowd=1, segmentation={"size": [SIZE, SIZE], "counts": [100, 50, SIZE * SIZE - 150]})
    points.update(keypoints=[5, 5, 2] * 3, num_keypoints=3)
    return split.content


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values are: the keys and indices that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """The content with one to three values at any depth deleted, replaced, doubled, wrapped, or put elsewhere."""
    root = [content(draw(st.booleans()))]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        *way, last = draw(st.sampled_from(places(root)[1:]))
        parent: Any = root
        for key in way:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "replace", "delete", "double", "wrap", "move", "number", "add", "all"]))
        if kind == "delete" and parent is not root:
            del parent[last]
        elif kind == "double" and isinstance(parent, list) and parent is not root:
            parent.insert(last, copy.deepcopy(parent[last]))
        elif kind == "wrap":
            parent[last] = [parent[last]]
        elif kind == "move":
            other: Any = root
            for key in draw(st.sampled_from(places(root)[1:])):
                other = other[key]
            parent[last] = copy.deepcopy(other)
        elif kind == "number":
            parent[last] = draw(NUMBERS)
        elif kind == "add" and isinstance(parent[last], dict):
            parent[last][draw(KEYS)] = draw(VALUES)
        elif kind == "all" and isinstance(last, str) and way and isinstance(way[-1], int):
            value = draw(SCALARS)
            siblings: Any = root
            for key in way[:-1]:
                siblings = siblings[key]
            for sibling in siblings if isinstance(siblings, list) else ():
                if isinstance(sibling, dict):
                    sibling[last] = value
        else:
            parent[last] = draw(VALUES)
    return root[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    sound_split("val").write(path)
    return path


def mapping_config(mask_format: str) -> CfgNode:
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = bool(mask_format), mask_format or "polygon"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (SIZE,), 2 * SIZE
    return cfg


MAPPERS = {masks: ImageMapper(mapping_config(masks), is_train=True) for masks in ("", "polygon", "bitmask")}


def refused(call: Any, *arguments: Any, **options: Any) -> bool:
    """Whether a call ends in a `UserError`, which must be one line."""
    try:
        call(*arguments, **options)
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 1000, message
        return True
    return False


def check_training(path: str, images: str, masks: str) -> None:
    if refused(validate_coco_json, path, images, masks=masks):
        return
    for record in load_coco(path, images, NAME):
        instances = MAPPERS[masks](record)["instances"]
        boxes = instances.gt_boxes.tensor
        assert torch.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= 2 * SIZE).all()
        if masks and len(instances):
            assert len(instances.gt_masks) == len(boxes)


def check_evaluation(path: str, images: str, masks: str) -> None:
    if refused(validate_coco_json, path, images, need_annotations=False, masks=masks and "any", evaluated=True):
        return
    records = load_coco(path, images, NAME)
    MetadataCatalog.get(NAME).json_file = path
    evaluator = CocoEvaluator(NAME)
    evaluator.reset()
    for record in records:
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        found = Instances((record["height"], record["width"]))
        boxes = torch.tensor([a["bbox"] for a in objects]).float().reshape(-1, 4)
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        found.scores = torch.ones(len(objects))
        found.pred_classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
        if masks:
            found.pred_masks = torch.ones(len(objects), *found.image_size, dtype=torch.bool)
        evaluator.process([record], [{"instances": found}])
    evaluator.evaluate()


def check(value: Any, folder: Path) -> None:
    """Fails unless each use of the file is right or refused."""
    (folder / "fuzzed.json").write_text(json.dumps(value))
    for masks in MAPPERS:
        MetadataCatalog.pop(NAME, None)
        check_training(str(folder / "fuzzed.json"), str(folder / "val"), masks)
    for masks in ("", "any"):
        MetadataCatalog.pop(NAME, None)
        check_evaluation(str(folder / "fuzzed.json"), str(folder / "val"), masks)
    MetadataCatalog.pop(NAME, None)


def test_the_sound_content_is_accepted(folder):
    path, images = str(folder / "fuzzed.json"), str(folder / "val")
    for with_runs in (True, False):
        check(content(with_runs), folder)
        found = [refused(validate_coco_json, path, images, masks=masks) for masks in MAPPERS]
        assert found == [False, with_runs, False]


@settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=mutated())
def test_random_changes_are_accepted_or_refused_in_one_line(value, folder):
    check(value, folder)
