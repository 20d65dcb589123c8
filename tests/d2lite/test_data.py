"""Data loading: what the recorded fixtures do not cover."""

import itertools
import json
import logging
import pickle

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, SequentialSampler

from d2lite.config import get_cfg
from d2lite.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MapDataset,
    MetadataCatalog,
    ToIterableDataset,
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from d2lite.data import detection_utils as utils
from d2lite.data import transforms as T
from d2lite.data.common import (
    AspectRatioGroupedDataset,
    _PickledList,
    set_default_dataset_from_list_serialize_method,
)
from d2lite.data.datasets import (
    convert_to_coco_dict,
    convert_to_coco_json,
    load_cityscapes_instances,
    load_cityscapes_semantic,
    load_coco_json,
    load_sem_seg,
    load_voc_instances,
)
from d2lite.data.samplers import (
    GroupedBatchSampler,
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from d2lite.structures import BitMasks, BoxMode
from d2lite.utils import comm

TRIANGLE = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]


@pytest.fixture
def name(request):
    """A dataset name that is free, and free again afterward."""
    name = f"test_{request.node.name}"
    yield name
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)


def random_image(h=20, w=30, c=3):
    return np.random.default_rng(0).integers(0, 256, (h, w, c), dtype=np.uint8)


# --- Catalogs ----------------------------------------------------------------------


def test_dataset_catalog(name):
    DatasetCatalog.register(name, lambda: [1])
    assert DatasetCatalog.get(name) == [1] and name in DatasetCatalog.list()
    with pytest.raises(AssertionError, match="already registered"):
        DatasetCatalog.register(name, lambda: [2])
    with pytest.raises(AssertionError, match="function"):
        DatasetCatalog.register(name + "2", [1])
    DatasetCatalog.remove(name)
    with pytest.raises(KeyError, match=name):
        DatasetCatalog.get(name)


def test_metadata(name):
    meta = MetadataCatalog.get(name).set(thing_classes=["a"])
    assert MetadataCatalog.get(name) is meta and meta.name == name and meta.get("nothing", 3) == 3
    meta.thing_classes = ["a"]
    with pytest.raises(AssertionError, match="thing_classes"):
        meta.thing_classes = ["b"]
    with pytest.raises(AttributeError, match="stuff"):
        meta.stuff  # noqa: B018
    assert meta.as_dict() == {"name": name, "thing_classes": ["a"]}


def test_builtin_names():
    meta = MetadataCatalog.get("coco_2017_val")
    assert len(meta.thing_classes) == 80 and meta.thing_classes[79] == "toothbrush"
    assert meta.thing_dataset_id_to_contiguous_id[90] == 79 and 12 not in meta.thing_dataset_id_to_contiguous_id
    assert meta.json_file.endswith("coco/annotations/instances_val2017.json")
    assert len(MetadataCatalog.get("cityscapes_fine_sem_seg_val").stuff_classes) == 19
    assert len(MetadataCatalog.get("voc_2007_trainval").thing_classes) == 20


# --- Dataset wrappers --------------------------------------------------------------


@pytest.mark.parametrize("serialize", [True, False])
def test_dataset_from_list(serialize):
    items = [{"k": [i]} for i in range(4)]
    dataset = DatasetFromList(items, serialize=serialize)
    assert list(dataset) == items and len(dataset) == 4 and dataset[-1] == items[3]
    dataset[0]["k"].append(9)
    assert dataset[0] == {"k": [0]} and items[0] == {"k": [0]}
    with pytest.raises(IndexError):
        dataset[4]
    assert len(DatasetFromList([], serialize=serialize)) == 0


def test_serialize_method_of_datasets_is_a_default_to_set():
    items = [{"a": 1}, {"a": 2}]
    with set_default_dataset_from_list_serialize_method(tuple):
        dataset = DatasetFromList(items)
        assert dataset[0] is items[0] and DatasetFromList(items, serialize=list)[1] is items[1]
        with set_default_dataset_from_list_serialize_method(False):
            plain = DatasetFromList(items)
            assert plain[0] == items[0] and plain[0] is not items[0]
    assert isinstance(dataset._lst, tuple)
    assert type(DatasetFromList(items)._lst) is _PickledList and DatasetFromList(items)[1] == items[1]
    with pytest.raises(ZeroDivisionError), set_default_dataset_from_list_serialize_method(tuple):
        raise ZeroDivisionError
    assert type(DatasetFromList(items)._lst) is _PickledList


def test_map_dataset_replaces_bad_elements():
    dataset = MapDataset(DatasetFromList([1, 2, 3, 4]), lambda x: None if x in (2, 3) else 10 * x)
    assert [dataset[i] for i in range(4)] == [10, 40, 40, 40]
    with pytest.raises(RuntimeError, match="each of the 2 elements"):
        MapDataset(DatasetFromList([1, 2]), lambda x: None)[0]


def test_map_dataset_of_iterable_drops_bad_elements():
    class Numbers(IterableDataset):
        def __iter__(self):
            yield from [1, 2, 3]

    dataset = MapDataset(Numbers(), lambda x: None if x == 2 else x)
    assert isinstance(dataset, IterableDataset) and list(dataset) == [1, 3]


def test_map_dataset_pickles_lambdas():
    pytest.importorskip("cloudpickle")
    offset = 5
    dataset = MapDataset(DatasetFromList([1, 2]), lambda x: x + offset)
    again = pickle.loads(pickle.dumps(dataset))
    assert [again[0], again[1]] == [6, 7]


def test_aspect_ratio_grouping_survives_an_early_stop():
    data = [{"width": w, "height": 2} for w in (1, 3, 1, 3)]
    dataset = AspectRatioGroupedDataset(data, 2)
    for _ in range(3):
        next(iter(dataset))
        assert all(len(bucket) < 2 for bucket in dataset._buckets)


@pytest.mark.parametrize("workers", [0, 2])
def test_to_iterable_keeps_the_order_with_workers(workers):
    dataset = ToIterableDataset(DatasetFromList(list(range(40))), TrainingSampler(40, seed=1), shard_chunk_size=4)
    loader = build_batch_data_loader(dataset, None, 4, num_workers=workers)
    got = list(itertools.chain.from_iterable(itertools.islice(loader, 10)))
    assert got == list(itertools.islice(TrainingSampler(40, seed=1), 40))


# --- Samplers ----------------------------------------------------------------------


@pytest.mark.parametrize("size, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_training_sampler_refuses_bad_sizes(size, error):
    with pytest.raises(error, match="size"):
        TrainingSampler(size)


def test_inference_sampler_splits_evenly(monkeypatch):
    def split(size, processes):
        monkeypatch.setattr(comm, "get_world_size", lambda: processes)
        for rank in range(processes):
            monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
            yield InferenceSampler(size)

    parts = list(split(10, 4))
    assert [len(p) for p in parts] == [3, 3, 2, 2]
    assert list(itertools.chain(*parts)) == list(range(10))
    assert [list(part) for part in split(2, 3)] == [[0], [1], []]


def test_subset_sampler_stays_in_its_subset():
    sampler = RandomSubsetTrainingSampler(20, 0.3, seed_shuffle=1, seed_subset=2)
    draws = list(itertools.islice(sampler, 60))
    assert len(set(draws)) == 6 and all(len(set(draws[i : i + 6])) == 6 for i in range(0, 60, 6))
    with pytest.raises(AssertionError, match="leaves none"):
        RandomSubsetTrainingSampler(20, 0.01)


def test_repeat_factors_of_rare_categories():
    dicts = [{"annotations": [{"category_id": c} for c in cs]} for cs in ((0, 1), (0,), ())]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, 0.5)
    torch.testing.assert_close(factors, torch.tensor([1.5**0.5, 1.0, 1.0]))


def test_grouped_batches():
    batches = GroupedBatchSampler(SequentialSampler(range(9)), [i % 2 for i in range(9)], 2)
    assert [b for b in batches] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    with pytest.raises(ValueError, match="Sampler"):
        GroupedBatchSampler([0, 1], [0, 0], 2)


# --- Loaders -----------------------------------------------------------------------


def records(n=8):
    return [{"width": 4 + i % 2, "height": 4, "id": i} for i in range(n)]


@pytest.mark.parametrize("grouping", [False, True])
def test_train_loader_gives_the_same_batches_with_workers(grouping):
    def ids(workers):
        loader = build_detection_train_loader(
            records(), mapper=dict, sampler=TrainingSampler(8, seed=3), total_batch_size=2,
            aspect_ratio_grouping=grouping, num_workers=workers,
        )  # fmt: skip
        return [[d["id"] for d in batch] for batch in itertools.islice(loader, 5)]

    assert ids(0) == ids(2)


@pytest.mark.parametrize("grouping", [False, True])
def test_train_loader_collates(grouping):
    loader = build_detection_train_loader(
        records(), mapper=dict, total_batch_size=2, aspect_ratio_grouping=grouping, collate_fn=len
    )
    assert next(iter(loader)) == 2


def test_test_loader_visits_all_once():
    loader = build_detection_test_loader(list(range(1, 6)), mapper=lambda x: -x, batch_size=2)
    assert list(loader) == [[-1, -2], [-3, -4], [-5]] and len(loader) == 3
    plain = build_detection_test_loader(list(range(3)), mapper=None)
    assert list(plain) == [[0], [1], [2]]


def test_loaders_from_cfg(name, tmp_path):
    dicts = []
    for i in range(4):
        Image.fromarray(random_image(20, 24 + i)).save(tmp_path / f"{i}.png")
        anno = {"bbox": [1, 2, 9, 12], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": int(i == 3)}
        dicts.append({"file_name": str(tmp_path / f"{i}.png"), "image_id": i, "height": 20, "width": 24 + i,
                      "annotations": [anno]})  # fmt: skip
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).thing_classes = ["x"]
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 2, "INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.MIN_SIZE_TEST", 16])
    batch = next(iter(build_detection_train_loader(cfg)))
    assert len(batch) == 2 and all(d["image"].shape[1] == 32 and len(d["instances"]) == 1 for d in batch)
    assert {d["image_id"] for b in itertools.islice(build_detection_train_loader(cfg), 6) for d in b} == {0, 1, 2}
    test = [d for b in build_detection_test_loader(cfg, name) for d in b]
    assert [d["image_id"] for d in test] == [0, 1, 2, 3] and test[0]["image"].shape[1] == 16
    assert "instances" not in test[0] and "annotations" not in test[0]
    cfg.DATALOADER.SAMPLER_TRAIN = "Nonsense"
    with pytest.raises(ValueError, match="Nonsense"):
        build_detection_train_loader(cfg)
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(NotImplementedError, match="KEYPOINT_ON"):
        build_detection_test_loader(cfg, name)


def test_dataset_dicts_check_classes(name):
    DatasetCatalog.register(name, lambda: [{"annotations": [{"category_id": 2}]}])
    MetadataCatalog.get(name).thing_classes = ["a", "b"]
    with pytest.raises(AssertionError, match="category_id 2 is out of range for 2 classes"):
        get_detection_dataset_dicts(name)
    with pytest.raises(KeyError):
        get_detection_dataset_dicts("no_such_dataset")
    with pytest.raises(NotImplementedError, match="keypoints"):
        get_detection_dataset_dicts(name, min_keypoints=1)


def test_total_batch_size_must_be_positive():
    with pytest.raises(AssertionError, match="total batch size"):
        build_batch_data_loader(DatasetFromList([1]), TrainingSampler(1), 0)


# --- Transforms --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(10, 12), (10, 12, 1), (10, 12, 3), (10, 12, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_resize_keeps_channels_and_type(shape, dtype):
    image = (np.random.default_rng(0).random(shape) * 255).astype(dtype)
    out = T.ResizeTransform(10, 12, 20, 6).apply_image(image)
    assert out.shape == (20, 6, *shape[2:]) and out.dtype == dtype
    if len(shape) == 3 and dtype == np.uint8:
        one_by_one = [T.ResizeTransform(10, 12, 20, 6).apply_image(image[:, :, c].copy()) for c in range(shape[2])]
        np.testing.assert_array_equal(out, np.stack(one_by_one, 2))


def test_resize_of_a_bgr_view_equals_resize_of_its_copy():
    rgb = random_image()
    resize = T.ResizeTransform(20, 30, 33, 17)
    np.testing.assert_array_equal(resize.apply_image(rgb[:, :, ::-1]), resize.apply_image(rgb[:, :, ::-1].copy()))


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint16])
def test_label_maps_of_any_type_resize(dtype):
    labels = np.array([[0, 1], [1, 0]], dtype=dtype)
    out = T.ResizeTransform(2, 2, 4, 4).apply_segmentation(labels)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, np.kron(labels, np.ones((2, 2))).astype(dtype))


def test_resize_refuses_other_sizes():
    with pytest.raises(AssertionError, match="10 x 12"):
        T.ResizeTransform(10, 12, 5, 6).apply_image(random_image())


def test_resize_one_pixel():
    image = T.ResizeTransform(1, 1, 3, 2).apply_image(np.full((1, 1, 3), 7, np.uint8))
    np.testing.assert_array_equal(image, np.full((3, 2, 3), 7))
    assert T.ResizeShortestEdge.get_output_shape(1, 50, 10, 100) == (2, 100)


def test_rotation_by_right_angles_is_exact():
    image = np.random.default_rng(0).random((5, 8))
    turn = T.RotationTransform(5, 8, 90)
    np.testing.assert_allclose(turn.apply_image(image), image.T[::-1], atol=1e-9)
    np.testing.assert_allclose(turn.apply_coords(np.array([[0.0, 0.0], [8, 5]])), [[0, 8], [5, 0]], atol=1e-9)
    half = T.RotationTransform(5, 8, 180, expand=False)
    np.testing.assert_allclose(half.apply_image(image), image[::-1, ::-1], atol=1e-9)
    labels = np.arange(40, dtype=np.uint8).reshape(5, 8)
    np.testing.assert_array_equal(turn.apply_segmentation(labels), labels.T[::-1])


@pytest.mark.parametrize("angle, expand, center", [(65, True, None), (-30, False, (2, 3)), (0, True, None)])
def test_rotation_and_back(angle, expand, center):
    points = np.random.default_rng(0).random((7, 2)) * 30
    turn = T.RotationTransform(20, 33, angle, expand=expand, center=center)
    back = turn.inverse()
    np.testing.assert_allclose(back.apply_coords(turn.apply_coords(points)), points, atol=1e-9)
    assert back.apply_image(turn.apply_image(random_image(20, 33))).shape == (20, 33, 3)


def test_rotation_moves_pixels_with_their_coordinates():
    image = np.zeros((31, 41), np.float64)
    image[8, 30] = 1
    turn = T.RotationTransform(31, 41, 37)
    y, x = np.unravel_index(turn.apply_image(image).argmax(), (turn.bound_h, turn.bound_w))
    np.testing.assert_allclose(turn.apply_coords(np.array([[30.5, 8.5]]))[0], [x + 0.5, y + 0.5], atol=0.75)


def test_extent_fills_what_is_outside():
    out = T.ExtentTransform((-10, 0, 10, 10), (10, 20), fill=9).apply_image(np.full((10, 10, 3), 200, np.uint8))
    np.testing.assert_array_equal(out[:, :9], np.full((10, 9, 3), 9))
    np.testing.assert_array_equal(out[:, 11:], np.full((10, 9, 3), 200))


def test_color_transforms():
    image = random_image()
    np.testing.assert_array_equal(T.ColorTransform(lambda x: 255 - x).apply_image(image), 255 - image)
    flipped = T.PILColorTransform(lambda x: x.point(lambda v: 255 - v)).apply_image(image)
    np.testing.assert_array_equal(flipped, 255 - image)
    with pytest.raises(ValueError, match="callable"):
        T.ColorTransform(3)


# --- Augmentations -----------------------------------------------------------------


def test_repr_shows_what_was_given():
    assert str(T.RandomCrop("relative", (100, 100))) == "RandomCrop(crop_type='relative', crop_size=(100, 100))"
    assert str(T.RandomFlip(prob=0.5)) == "RandomFlip(prob=0.5)" and str(T.RandomFlip()) == "RandomFlip()"
    assert str(T.AugmentationList([T.RandomFlip(), T.Resize(3)])).startswith("AugmentationList[RandomFlip(), Resize")


def test_augmentation_inputs_by_name():
    class Both(T.Augmentation):
        def get_transform(self, image, sem_seg):
            assert image.shape[:2] == sem_seg.shape
            return T.HFlipTransform(image.shape[1])

    class Unknown(T.Augmentation):
        def get_transform(self, image, depth):
            raise AssertionError("unreachable")

    class Anything(T.Augmentation):
        def get_transform(self, image, *rest):
            raise AssertionError("unreachable")

    inputs = T.AugInput(random_image(), boxes=np.array([[1.0, 2, 5, 6]]), sem_seg=np.eye(20, 30, dtype=np.uint8))
    transforms = inputs.apply_augmentations([Both(), T.Resize((10, 15))])
    assert isinstance(transforms, T.TransformList) and inputs.sem_seg.shape == (10, 15)
    np.testing.assert_allclose(inputs.boxes, [[12.5, 1, 14.5, 3]])
    with pytest.raises(AttributeError, match="depth"):
        inputs.apply_augmentations([Unknown()])
    with pytest.raises(TypeError, match="input_args"):
        inputs.apply_augmentations([Anything()])
    with pytest.raises(AssertionError, match="uint8 or floating"):
        T.AugInput(np.zeros((3, 3), dtype=int))


def test_apply_augmentations_to_an_array():
    image, transforms = T.apply_augmentations([T.VFlipTransform(20), T.Resize((5, 6))], random_image())
    assert image.shape == (5, 6, 3) and len(transforms) == 2
    back = transforms.inverse()
    assert [type(t) for t in back.transforms] == [T.ResizeTransform, T.VFlipTransform]


@pytest.mark.parametrize(
    "aug",
    [
        T.RandomCrop("absolute", (8, 50)),
        T.RandomCrop("relative_range", (0.3, 0.3)),
        T.RandomCrop_CategoryAreaConstraint("relative", (0.5, 0.5), 0.8, ignored_category=255),
        T.RandomExtent((0.5, 1.5), (0.3, 0.3)),
        T.RandomRotation([-30, 30]),
        T.RandomRotation([0, 90], center=[(0.4, 0.4)], expand=False, sample_style="choice"),
        T.RandomBrightness(0.5, 1.5),
        T.RandomContrast(0.5, 1.5),
        T.RandomSaturation(0.5, 1.5),
        T.RandomLighting(10.0),
        T.RandomApply(T.RandomFlip(prob=1.0), prob=0.5),
        T.RandomApply(T.ResizeTransform(20, 30, 10, 15), prob=0.5),
        T.RandomResize([(10, 12), (30, 20)]),
        T.FixedSizeCrop((16, 40)),
        T.FixedSizeCrop((16, 40), pad=False),
    ],
    ids=lambda aug: type(aug).__name__,
)
def test_augmentations_change_all_inputs_alike(aug):
    rng = np.random.default_rng(1)
    for seed in range(6):
        image, labels = random_image(), rng.integers(0, 4, (20, 30)).astype(np.uint8)
        runs = []
        for _ in range(2):
            np.random.seed(seed)
            inputs = T.AugInput(image.copy(), sem_seg=labels.copy(), boxes=np.array([[2.0, 3, 8, 9]]))
            inputs.apply_augmentations([aug])
            runs.append(inputs)
        first, second = runs
        assert first.image.dtype == np.uint8 and first.image.shape[:2] == first.sem_seg.shape
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.boxes, second.boxes)


def test_fixed_size_crop_pads_labels_with_their_own_value():
    inputs = T.AugInput(random_image(), sem_seg=np.zeros((20, 30), np.uint8))
    inputs.apply_augmentations([T.FixedSizeCrop((25, 30), pad_value=128.0, seg_pad_value=255)])
    assert (inputs.image[20:] == 128).all() and (inputs.sem_seg[20:] == 255).all()


def test_area_constraint_avoids_uniform_crops():
    labels = np.zeros((40, 40), np.uint8)
    labels[:, 30:] = 1
    aug = T.RandomCrop_CategoryAreaConstraint("absolute", (10, 10), single_category_max_area=0.9)
    np.random.seed(0)
    hits = sum(len(np.unique(aug.get_transform(labels[..., None], labels).apply_image(labels))) == 2 for _ in range(50))
    assert hits > 40  # a free crop sees both labels in 9 of 31 places


def test_random_apply_follows_its_draw(monkeypatch):
    apply = T.RandomApply(T.HFlipTransform(30), prob=0.25)
    monkeypatch.setattr(apply, "_rand_range", lambda: 0.2)
    assert isinstance(apply.get_transform(random_image()), T.HFlipTransform)
    monkeypatch.setattr(apply, "_rand_range", lambda: 0.3)
    assert isinstance(apply.get_transform(random_image()), T.NoOpTransform)
    for prob in (-0.01, 1.01):
        with pytest.raises(AssertionError, match="prob"):
            T.RandomApply(T.NoOpTransform(), prob=prob)


def test_bad_augmentation_arguments():
    for ways in ({"horizontal": True, "vertical": True}, {"horizontal": False, "vertical": False}):
        with pytest.raises(ValueError, match="one way"):
            T.RandomFlip(**ways)
    with pytest.raises(AssertionError, match="crop_type"):
        T.RandomCrop("square", (1, 1))
    with pytest.raises(AssertionError, match="sample_style"):
        T.ResizeShortestEdge(3, sample_style="all")


# --- Images and annotations --------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_turns_upright(tmp_path, orientation, kind):
    upright = random_image(8, 6)
    method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # the stored image, as PIL's methods
    stored = Image.fromarray(upright) if method is None else Image.fromarray(upright).transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{kind}", exif=exif)
    np.testing.assert_array_equal(utils.read_image(str(tmp_path / f"a.{kind}"), "RGB"), upright)


def test_read_image_formats(tmp_path):
    rgb = random_image()
    path = str(tmp_path / "a.png")
    Image.fromarray(rgb).save(path)
    np.testing.assert_array_equal(utils.read_image(path, "BGR"), rgb[:, :, ::-1])
    assert utils.read_image(path, "L").shape == (20, 30, 1)
    for fmt in ("BGR", "RGB", "YUV-BT.601"):
        error = utils.convert_image_to_rgb(utils.read_image(path, fmt), fmt).astype(int) - rgb
        assert np.abs(error).max() <= 1
    Image.fromarray(rgb[:, :, 0]).save(path)
    assert utils.read_image(path, "BGR").shape == (20, 30, 3)


def test_check_image_size():
    record = {"file_name": "a.jpg", "width": 31, "height": 20}
    with pytest.raises(utils.SizeMismatchError, match="a.jpg is 30 x 20"):
        utils.check_image_size(record, random_image())
    record = {}
    utils.check_image_size(record, random_image())
    assert record == {"width": 30, "height": 20}


def test_transform_rle_and_flip():
    mask = np.zeros((30, 40), np.uint8)
    mask[:, :20] = 1
    for rle in (mask_util.encode(np.asfortranarray(mask)), {"size": [30, 40], "counts": [0, 600, 600]}):
        anno = {"bbox": np.array([1, 1, 20, 30]), "bbox_mode": BoxMode.XYXY_ABS, "segmentation": rle, "category_id": 3}
        out = utils.transform_instance_annotations(anno, T.TransformList([T.HFlipTransform(40)]), (30, 40))
        np.testing.assert_array_equal(out["segmentation"], mask[:, ::-1])
        instances = utils.annotations_to_instances([out, out], (30, 40), mask_format="bitmask")
        assert isinstance(instances.gt_masks, BitMasks) and instances.gt_masks.tensor.shape == (2, 30, 40)
        with pytest.raises(ValueError):
            utils.annotations_to_instances([out], (30, 40), mask_format="polygon")


def test_transform_leaves_the_dataset_alone():
    polygon = np.array([1.0, 1, 9, 1, 9, 9])
    anno = {"bbox": [1, 1, 8, 8], "bbox_mode": BoxMode.XYWH_ABS, "segmentation": [polygon], "category_id": 0}
    out = utils.transform_instance_annotations(dict(anno), [T.HFlipTransform(20)], (20, 20))
    np.testing.assert_array_equal(out["segmentation"][0], [19, 1, 11, 1, 11, 9])
    np.testing.assert_array_equal(polygon, [1, 1, 9, 1, 9, 9])
    np.testing.assert_array_equal(out["bbox"], [11, 1, 19, 9])
    assert anno["bbox"] == [1, 1, 8, 8]


def test_annotations_cropped_away_are_filtered():
    anno = {"bbox": [10, 10, 40, 60], "bbox_mode": BoxMode.XYXY_ABS, "segmentation": [[10, 10, 40, 10, 40, 60]],
            "category_id": 3}  # fmt: skip
    out = utils.transform_instance_annotations(anno, [T.CropTransform(100, 100, 10, 10)], (10, 10))
    assert out["segmentation"] == [] and out["bbox"][2] == out["bbox"][0]
    for fmt in ("polygon", "bitmask"):
        instances = utils.annotations_to_instances([out, out], (10, 10), mask_format=fmt)
        kept, mask = utils.filter_empty_instances(instances, return_mask=True)
        assert len(instances) == 2 and len(kept) == 0 and mask.tolist() == [False, False]


def test_annotations_must_all_have_masks():
    annos = [{"bbox": [0, 0, 5, 5], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for _ in range(2)]
    annos[0]["segmentation"] = TRIANGLE
    with pytest.raises(ValueError, match="1 of the 2 annotations"):
        utils.annotations_to_instances(annos, (10, 10))


def test_annotations_with_mixed_box_modes():
    modes = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    annos = [{"bbox": [1, 2, 5, 6], "bbox_mode": mode, "category_id": 0} for mode in modes]
    boxes = utils.annotations_to_instances(annos, (10, 10)).gt_boxes.tensor
    assert boxes.tolist() == [[1, 2, 5, 6], [1, 2, 6, 8]] and boxes.dtype == torch.float32


def test_key_points_move_with_the_image_and_leave_it():
    def transformed(points, transforms, **flip):
        anno = {"bbox": [0, 0, 5, 5], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "keypoints": points}
        return utils.transform_instance_annotations(anno, transforms, (10, 20), **flip)["keypoints"]

    points = [1.0, 2.0, 2, 15.0, 8.0, 1, 3.0, 3.0, 0]
    scaled = transformed(points, [T.ScaleTransform(10, 10, 10, 20, "bilinear")])
    assert np.allclose(scaled, [[2, 2, 2], [0, 0, 0], [0, 0, 0]])  # outside, and not labeled
    flipped = transformed(points, [T.HFlipTransform(20)], keypoint_hflip_indices=np.array([1, 0, 2]))
    assert np.allclose(flipped, [[5, 8, 1], [19, 2, 2], [0, 0, 0]])
    with pytest.raises(ValueError, match="keypoint_hflip_indices"):
        transformed(points, [T.HFlipTransform(20)])


def test_crop_around_an_instance():
    anno = {"bbox": [4, 5, 8, 9], "bbox_mode": BoxMode.XYXY_ABS}
    for seed in range(20):
        np.random.seed(seed)
        crop = utils.gen_crop_transform_with_instance((6, 7), (12, 20), anno)
        assert crop.x0 <= 6 <= crop.x0 + 7 and crop.y0 <= 7 <= crop.y0 + 6
        assert crop.apply_image(np.zeros((12, 20))).shape == (6, 7)
    with pytest.raises(AssertionError, match="outside"):
        utils.gen_crop_transform_with_instance((4, 4), (12, 20), {**anno, "bbox": [30, 5, 50, 9]})


def test_metadata_consistency(name):
    MetadataCatalog.get(name).thing_classes = ["a"]
    utils.check_metadata_consistency("thing_classes", [name, name])
    with pytest.raises(ValueError, match="coco_2017_val"):
        utils.check_metadata_consistency("thing_classes", [name, "coco_2017_val"])
    with pytest.raises(AttributeError):
        utils.check_metadata_consistency("stuff_classes", [name])


# --- Mapper ------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path):
    Image.fromarray(random_image()).save(tmp_path / "a.png")
    anno = {"bbox": [1.0, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "segmentation": TRIANGLE,
            "keypoints": [1, 1, 2]}  # fmt: skip
    return {"file_name": str(tmp_path / "a.png"), "height": 20, "width": 30, "annotations": [anno]}


def test_mapper_does_not_change_its_input(record):
    before = pickle.dumps(record)
    mapper = DatasetMapper(True, augmentations=[T.HFlipTransform(30)], image_format="BGR", use_instance_mask=True)
    out = mapper(record)
    assert pickle.dumps(record) == before
    assert out["image"].is_contiguous() and out["image"].shape == (3, 20, 30)
    assert out["instances"].gt_boxes.tensor.tolist() == [[21, 1, 29, 9]]


@pytest.mark.parametrize("annotations", [[], "crowd"])
def test_mapper_with_no_usable_annotation(record, annotations):
    record["annotations"] = [{**record["annotations"][0], "iscrowd": 1}] if annotations == "crowd" else []
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR", use_instance_mask=True, recompute_boxes=True)
    instances = mapper(record)["instances"]
    assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64


def test_mapper_refuses_what_is_left_out():
    cfg = get_cfg()
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(NotImplementedError, match="KEYPOINT_ON"):
        DatasetMapper(cfg, True)
    cfg = get_cfg()
    cfg.MODEL.LOAD_PROPOSALS = True
    with pytest.raises(NotImplementedError, match="LOAD_PROPOSALS"):
        DatasetMapper(cfg, True)


# --- COCO files and other datasets -------------------------------------------------


def write_coco(path, **changes):
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 1, 8, 8], "iscrowd": 0}],
        "categories": [{"id": 5, "name": "five"}, {"id": 2, "name": "two"}],
        **changes,
    }
    path.write_text(json.dumps(content))
    return str(path)


def test_load_coco_json_bad_annotations(tmp_path, name):
    anno = {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 1, 8, 8]}
    for change, error, match in (
        ({"category_id": 9}, KeyError, "category_id 9"),
        ({"bbox": []}, ValueError, "empty bbox"),
        ({"ignore": 1}, AssertionError, "ignore"),
    ):
        path = write_coco(tmp_path / "a.json", annotations=[{**anno, **change}])
        with pytest.raises(error, match=match):
            load_coco_json(path, "", name)
    twice = write_coco(tmp_path / "a.json", annotations=[anno, anno])
    with pytest.raises(AssertionError, match="not unique"):
        load_coco_json(twice, "")
    minival = write_coco(tmp_path / "minival.json", annotations=[anno, anno])
    assert len(load_coco_json(minival, "")[0]["annotations"]) == 2


def test_load_coco_json_in_any_unicode_encoding(tmp_path):
    path = write_coco(tmp_path / "a.json")
    content = (tmp_path / "a.json").read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.json").write_text(content, encoding=encoding)
        assert len(load_coco_json(path, "")) == 1


def test_load_coco_json_says_what_it_drops(tmp_path, caplog):
    anno = {"image_id": 7, "category_id": 5, "bbox": [1, 1, 8, 8]}
    annos = [{**anno, "id": 1, "segmentation": [[1, 2]]}, {**anno, "id": 2, "image_id": 8}, {**anno, "id": 3}]
    with caplog.at_level(logging.WARNING, "d2lite"):
        dicts = load_coco_json(write_coco(tmp_path / "a.json", annotations=annos), "root")
    assert len(dicts[0]["annotations"]) == 1 and dicts[0]["file_name"] == "root/a.png"
    assert "Dropped 1 of 3" in caplog.text and "Ignored 1 of 3" in caplog.text


def test_coco_round_trip(tmp_path, name):
    mask = np.zeros((20, 30), np.uint8)
    mask[3:9, 4:12] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    box = {"bbox": [np.int64(4), 3, 12, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    annos = [
        {**box, "segmentation": rle},
        {**box, "segmentation": {"size": (20, 30), "counts": [83, 6] + [14, 6] * 7 + [371]}},
        {**box, "segmentation": [np.array([4.0, 3, 12, 3, 12, 9, 4, 9])], "iscrowd": 1},
        box,
    ]
    DatasetCatalog.register(
        name, lambda: [{"file_name": "a", "image_id": 3, "height": 20, "width": 30, "annotations": annos}]
    )
    MetadataCatalog.get(name).set(thing_classes=["x", "y"], thing_dataset_id_to_contiguous_id={4: 0, 9: 1})
    path = str(tmp_path / "sub" / "out.json")
    convert_to_coco_json(name, path)
    with open(path) as f:
        written = json.load(f)
    assert [a["area"] for a in written["annotations"]] == [48, 48, 48, 48]
    assert {a["category_id"] for a in written["annotations"]} == {9}
    assert [c["id"] for c in written["categories"]] == [4, 9]
    loaded = load_coco_json(path, "", name + "_loaded")[0]["annotations"]
    MetadataCatalog.pop(name + "_loaded")
    assert [a["bbox"] for a in loaded] == [[4, 3, 8, 6]] * 4 and [a["iscrowd"] for a in loaded] == [0, 0, 1, 0]
    for anno in loaded[:2]:
        np.testing.assert_array_equal(mask_util.decode(anno["segmentation"]), mask)
    assert convert_to_coco_dict(name)["images"][0]["id"] == 3
    with open(path, "w") as f:
        f.write("old")
    convert_to_coco_json(name, path)
    with open(path) as f:
        assert f.read() == "old"
    convert_to_coco_json(name, path, allow_cached=False)
    with open(path) as f:
        assert json.load(f)["images"] == written["images"]
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["out.json"]


def test_load_sem_seg(tmp_path, caplog):
    for path in ("im/x/b.jpg", "im/x/a.jpg", "im/c.jpg", "gt/x/a.png", "gt/x/b.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    dicts = load_sem_seg(str(tmp_path / "gt"), str(tmp_path / "im"))
    assert [d["sem_seg_file_name"] for d in dicts] == [str(tmp_path / f"gt/x/{k}.png") for k in "ab"]
    assert "3 images" in caplog.text
    with pytest.raises(AssertionError, match="label map"):
        load_sem_seg(str(tmp_path / "nowhere"), str(tmp_path / "im"))


def test_cityscapes(tmp_path):
    images, labels = tmp_path / "leftImg8bit" / "aachen", tmp_path / "gtFine" / "aachen"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    (images / "aachen_0_leftImg8bit.png").touch()
    square = lambda x0, y0, x1, y1: [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]  # noqa: E731
    objects = [
        {"label": "road", "polygon": square(0, 0, 40, 20)},
        {"label": "car", "polygon": square(2, 2, 12, 12)},
        {"label": "persongroup", "polygon": square(20, 2, 30, 12)},
        {"label": "pole", "polygon": square(8, 0, 20, 20)},
        {"label": "bus", "polygon": square(0, 0, 5, 5), "deleted": 1},
        {"label": "car", "polygon": [[1, 1], [2, 2]]},
    ]
    polygons = {"imgHeight": 20, "imgWidth": 40, "objects": objects}
    (labels / "aachen_0_gtFine_polygons.json").write_text(json.dumps(polygons))
    ids = np.zeros((20, 40), np.uint16)
    ids[2:12, 2:8] = 26001
    ids[2:12, 20:30] = 24
    Image.fromarray(ids).save(labels / "aachen_0_gtFine_instanceIds.png")
    folders = (str(images.parent), str(labels.parent))
    from_polygons = load_cityscapes_instances(*folders)[0]
    car, people = from_polygons["annotations"]
    assert (car["category_id"], car["bbox"], car["iscrowd"]) == (2, [2, 2, 8, 12], 0)  # the pole hides a part
    assert (people["category_id"], people["iscrowd"]) == (0, 1)
    for other in (load_cityscapes_instances(*folders, False, False), load_cityscapes_instances(*folders, True, False)):
        masks = {a["category_id"]: mask_util.decode(a["segmentation"]) for a in other[0]["annotations"]}
        np.testing.assert_array_equal(masks[2], ids == 26001)
        np.testing.assert_array_equal(masks[0], ids == 24)
    with pytest.raises(ValueError, match="to_polygons"):
        load_cityscapes_instances(*folders, from_json=False)
    with pytest.raises(FileNotFoundError, match="createTrainIdLabelImgs"):
        load_cityscapes_semantic(*folders)
    Image.fromarray(np.zeros((20, 40), np.uint8)).save(labels / "aachen_0_gtFine_labelTrainIds.png")
    record = load_cityscapes_semantic(*folders)[0]
    assert (record["height"], record["width"]) == (20, 40)


def test_pascal_voc(tmp_path):
    for folder in ("ImageSets/Main", "Annotations"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("000005\n")
    xml = """<annotation><size><width>40</width><height>30</height></size><object><name>{}</name>
    <bndbox><xmin>1</xmin><ymin>5</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object></annotation>"""
    (tmp_path / "Annotations/000005.xml").write_text(xml.format("dog"))
    record = load_voc_instances(str(tmp_path), "train", ("cat", "dog"))[0]
    assert record["annotations"] == [{"category_id": 1, "bbox": [0, 4, 40, 30], "bbox_mode": BoxMode.XYXY_ABS}]
    assert (record["height"], record["width"], record["image_id"]) == (30, 40, "000005")
    (tmp_path / "Annotations/000005.xml").write_text(xml.format("cow"))
    with pytest.raises(ValueError, match="cow"):
        load_voc_instances(str(tmp_path), "train", ("cat", "dog"))
