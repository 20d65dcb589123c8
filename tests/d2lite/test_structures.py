"""Boxes, image lists, instances and masks: edge cases, indexing and errors."""

import copy
import pickle

import numpy as np
import pytest
import torch
from instances_testing import assert_instances_allclose, random_boxes

from d2lite.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    ImageList,
    Instances,
    PolygonMasks,
    ROIMasks,
    matched_pairwise_iou,
    pairwise_ioa,
    pairwise_iou,
    polygons_to_bitmask,
)
from d2lite.structures.masks import polygon_area, rasterize_polygons_within_box

SQUARE = [2.0, 1.0, 6.0, 1.0, 6.0, 5.0, 2.0, 5.0]


def test_no_boxes():
    for empty in (Boxes(torch.empty(0)), Boxes([]), Boxes(torch.empty(0, 4)), Boxes.cat([])):
        assert empty.tensor.shape == (0, 4) and len(empty) == 0 and list(empty) == []
        assert empty.area().shape == (0,) and empty.nonempty().shape == (0,)
        empty.clip((3, 4))
        assert pairwise_iou(empty, Boxes([[0, 0, 1, 1]])).shape == (0, 1)


def test_boxes_are_float32_of_shape_n4():
    assert Boxes(torch.zeros(2, 4, dtype=torch.float64)).tensor.dtype == torch.float32
    assert Boxes(torch.zeros(2, 4, dtype=torch.half)).tensor.dtype == torch.float32
    for shape in ((3,), (2, 5), (1, 2, 4)):
        with pytest.raises(AssertionError):
            Boxes(torch.ones(shape))


def test_boxes_indexing():
    boxes = Boxes(random_boxes(6))
    assert boxes[-1].tensor.tolist() == boxes.tensor[-1:].tolist()
    assert boxes[torch.tensor([4, 4, 0])].tensor.tolist() == boxes.tensor[[4, 4, 0]].tolist()
    assert len(boxes[torch.zeros(6, dtype=torch.bool)]) == 0
    with pytest.raises(IndexError):
        boxes[6]
    with pytest.raises(AssertionError):
        boxes[torch.tensor(2), :2]
    assert repr(boxes).startswith("Boxes(tensor(")
    assert boxes.to(torch.device("cpu")).device == boxes.device == torch.device("cpu")


def test_boxes_clone_is_independent():
    boxes = Boxes([[1.0, 2.0, 3.0, 4.0]])
    copied = boxes.clone()
    copied.scale(2, 3)
    assert copied.tensor.tolist() == [[2, 6, 6, 12]] and boxes.tensor.tolist() == [[1, 2, 3, 4]]


def test_overlap_measures():
    a = Boxes([[0, 0, 2, 2], [0, 0, 0, 0], [5, 5, 6, 6]])
    b = Boxes([[1, 0, 3, 2], [0, 0, 0, 0], [5, 5, 6, 6]])
    torch.testing.assert_close(pairwise_iou(a, b)[0], torch.tensor([1 / 3, 0, 0]))
    torch.testing.assert_close(pairwise_ioa(a, b)[:, 0], torch.tensor([0.5, 0, 0]))
    torch.testing.assert_close(matched_pairwise_iou(a, b), pairwise_iou(a, b).diagonal())
    with pytest.raises(AssertionError):
        matched_pairwise_iou(a, b[:2])


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_box_mode_keeps_types(kind):
    box = kind([1, 2, 11, 22])
    there = BoxMode.convert(box, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    assert type(there) is type(box) and [float(x) for x in there] == [1, 2, 10, 20]
    assert [float(x) for x in BoxMode.convert(there, 1, 0)] == [1, 2, 11, 22]
    assert [float(x) for x in box] == [1, 2, 11, 22]
    assert BoxMode.convert(box, BoxMode.XYXY_ABS, BoxMode.XYXY_ABS) is box


def test_box_mode_batches_and_dtypes():
    for dtype in (torch.float64, torch.float32, torch.int64):
        boxes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=dtype)
        converted = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        assert converted.dtype == dtype and converted.tolist() == [[1, 2, 4, 6], [5, 6, 12, 14]]
    assert BoxMode.convert(np.zeros((0, 4)), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS).shape == (0, 4)


def test_box_mode_rotated():
    box = [50.0, 40.0, 20.0, 10.0, 90.0]
    expected = [45.0, 30.0, 55.0, 50.0]
    assert BoxMode.convert(box, BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS) == pytest.approx(expected)
    several = BoxMode.convert(np.array([box, box]), BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
    np.testing.assert_allclose(several, [expected, expected], atol=1e-5)
    assert BoxMode.convert((0, 0, 4, 2), BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS) == (2, 1, 4, 2, 0)


def test_box_mode_errors():
    with pytest.raises(AssertionError, match="relative"):
        BoxMode.convert([0, 0, 1, 1], BoxMode.XYXY_REL, BoxMode.XYXY_ABS)
    with pytest.raises(AssertionError):
        BoxMode.convert([0, 0, 1], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    with pytest.raises(AssertionError):
        BoxMode.convert(np.zeros((2, 4)), BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
    with pytest.raises(NotImplementedError, match="rotated"):
        BoxMode.convert([0, 0, 1, 1, 0], BoxMode.XYWHA_ABS, BoxMode.XYWH_ABS)


def test_image_list_moves_and_casts():
    images = ImageList.from_tensors([torch.ones(3, 4, 5), torch.ones(3, 2, 6)], 4)
    assert images.tensor.shape == (2, 3, 4, 8) and len(images) == 2
    assert images.to(torch.float64).tensor.dtype == torch.float64
    assert images.device == torch.device("cpu")
    assert images[1].shape == (3, 2, 6) and images.tensor.sum() == 3 * (20 + 12)


def test_image_list_errors():
    with pytest.raises(AssertionError):
        ImageList.from_tensors([])
    with pytest.raises(AssertionError):
        ImageList.from_tensors([torch.ones(3, 4, 5), torch.ones(1, 4, 5)])
    with pytest.raises(ValueError, match="square_size=8"):
        ImageList.from_tensors([torch.ones(3, 4, 9)], padding_constraints={"square_size": 8})


def test_image_list_does_not_alias_its_input():
    image = torch.zeros(3, 4, 4)
    for batch in (ImageList.from_tensors([image], 8), ImageList.from_tensors([image, image])):
        batch.tensor.fill_(1)
        assert image.sum() == 0


def make_instances():
    return Instances((10, 20), boxes=Boxes(random_boxes(3)), scores=torch.arange(3.0), names=["a", "b", "c"])


def test_instances_fields():
    x = make_instances()
    assert x.image_size == (10, 20) and len(x[-1]) == 1 and x[-1].names == ["c"]
    assert x[1:].names == ["b", "c"] and len(x[5:]) == 0
    x.get_fields()["extra"] = [1, 2, 3]
    assert x.extra == [1, 2, 3]
    del x.get_fields()["names"], x.get_fields()["extra"]
    assert x[torch.tensor([2, 0])].scores.tolist() == [2, 0]
    with pytest.raises(KeyError):
        x.remove("names")
    assert "num_instances=3" in str(x) and "image_width=20" in repr(x)


def test_instances_without_fields():
    x = Instances((4, 5))
    with pytest.raises(NotImplementedError):
        len(x)
    with pytest.raises(NotImplementedError):
        iter(x)
    assert "num_instances=0" in str(x) and x.to("cpu").image_size == (4, 5)


def test_instances_copy_and_pickle():
    x = make_instances()
    for same in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.to("cpu")):
        assert same.names == x.names
        same.remove("names")
        y = make_instances()
        y.boxes, y.scores = x.boxes, x.scores
        y.remove("names")
        assert_instances_allclose(same, y, rtol=0)


def test_instances_cat_errors():
    x = make_instances()
    with pytest.raises(AssertionError):
        Instances.cat([])
    with pytest.raises(AssertionError):
        Instances.cat([x, Instances((10, 21))])
    y = Instances((10, 20), field=(1, 2))
    with pytest.raises(ValueError, match="field"):
        Instances.cat([y, y])
    assert Instances.cat([x]) is x


def test_polygon_area_of_a_square():
    assert polygon_area(np.array([0, 2, 2, 0]), np.array([0, 0, 3, 3])) == 6
    assert PolygonMasks([[SQUARE], [SQUARE, SQUARE], []]).area().tolist() == [16, 32, 0]


def test_rasterized_square():
    mask = polygons_to_bitmask([np.array(SQUARE)], 8, 9)
    assert mask.dtype == bool and mask.shape == (8, 9) and mask.sum() == 16 and mask[1:5, 2:6].all()
    assert not polygons_to_bitmask([], 3, 4).any()


def test_rasterized_within_box():
    grid = rasterize_polygons_within_box([np.array(SQUARE)], np.array([2.0, 1.0, 10.0, 5.0]), 4)
    assert grid.dtype == torch.bool and grid.tolist() == [[True, True, False, False]] * 4
    assert rasterize_polygons_within_box([np.array(SQUARE)], np.array([3.0, 3.0, 3.0, 3.0]), 4).all()


def test_no_masks():
    polygons, bits = PolygonMasks([]), BitMasks(torch.zeros(0, 5, 6))
    boxes = torch.zeros(0, 4)
    for masks in (polygons, bits, BitMasks.from_polygon_masks([], 5, 6)):
        assert len(masks) == 0 and masks.nonempty().shape == (0,)
        assert masks.get_bounding_boxes().tensor.shape == (0, 4)
        crops = masks.crop_and_resize(boxes, 7)
        assert crops.shape == (0, 7, 7) and crops.dtype == torch.bool


def test_empty_instances_have_zero_boxes():
    assert PolygonMasks([[], [SQUARE]]).get_bounding_boxes().tensor.tolist() == [[0, 0, 0, 0], [2, 1, 6, 5]]
    masks = BitMasks.from_polygon_masks(PolygonMasks([[], [SQUARE]]), 8, 9)
    assert masks.get_bounding_boxes().tensor.tolist() == [[0, 0, 0, 0], [2, 1, 6, 5]]
    assert masks.nonempty().tolist() == [False, True] == PolygonMasks([[], [SQUARE]]).nonempty().tolist()


def test_bounding_box_of_one_pixel_and_of_all():
    masks = torch.zeros(2, 3, 4)
    masks[0, 2, 3] = 1
    masks[1] = 1
    assert BitMasks(masks).get_bounding_boxes().tensor.tolist() == [[3, 2, 4, 3], [0, 0, 4, 3]]


def test_bitmasks_interface():
    masks = BitMasks(np.eye(4)[None].repeat(3, 0))
    assert masks.image_size == (4, 4) and masks.tensor.dtype == torch.bool
    assert len(masks[0]) == 1 and len(masks[1:]) == 2 and len(masks[torch.tensor([True, False, True])]) == 2
    assert [m.shape for m in masks] == [(4, 4)] * 3 and repr(masks) == "BitMasks(num_instances=3)"
    assert len(BitMasks.cat([masks, masks[:1]])) == 4
    with pytest.raises(AssertionError):
        BitMasks(torch.zeros(4, 4))
    with pytest.raises(AssertionError):
        masks[0, 0]
    with pytest.raises(AssertionError):
        masks.crop_and_resize(torch.zeros(2, 4), 3)


def test_polygon_masks_indexing():
    masks = PolygonMasks([[SQUARE], [], [torch.tensor(SQUARE), np.array(SQUARE)]])
    counts = lambda m: [len(p) for p in m]  # noqa: E731
    assert counts(masks) == [1, 0, 2] and masks.polygons[2][0].dtype == np.float64
    assert counts(masks[-1]) == [2] and counts(masks[1:]) == [0, 2] and counts(masks[[2, 0]]) == [2, 1]
    assert counts(masks[torch.tensor([True, False, True])]) == [1, 2]
    assert counts(masks[torch.tensor([2, 2])]) == [2, 2] and counts(masks[torch.empty(0)]) == []
    assert counts(masks[np.int64(2)]) == [2] and counts(PolygonMasks.cat([masks, masks[:1]])) == [1, 0, 2, 1]
    with pytest.raises(IndexError):
        masks[3]
    with pytest.raises(IndexError):
        masks[torch.tensor([True, False])]
    with pytest.raises(ValueError):
        masks[torch.tensor([0.5])]
    assert masks.to("cpu") is masks and masks.device == torch.device("cpu")


@pytest.mark.parametrize("bad", ["text", [SQUARE], [[[1.0, 2.0, 3.0]]], [[[1.0, 2.0, 3.0, 4.0]]], [[SQUARE + [1.0]]]])
def test_polygon_masks_errors(bad):
    with pytest.raises(ValueError):
        PolygonMasks(bad)


def test_polygons_and_bitmaps_agree():
    polygons = PolygonMasks([[[2.0, 1.0, 30.0, 3.0, 26.0, 28.0, 5.0, 20.0]]])
    boxes = polygons.get_bounding_boxes().tensor
    from_polygons = polygons.crop_and_resize(boxes, 28)
    from_bits = BitMasks.from_polygon_masks(polygons, 32, 32).crop_and_resize(boxes, 28)
    assert (from_polygons ^ from_bits).float().mean() < 0.05


def test_roi_masks_fill_their_boxes():
    masks = ROIMasks(torch.ones(2, 7, 7))
    bits = masks.to_bitmasks(torch.tensor([[1.0, 2.0, 5.0, 6.0], [0.0, 0.0, 2.0, 2.0]]), 8, 9)
    assert isinstance(bits, BitMasks) and bits.image_size == (8, 9)
    assert bits.get_bounding_boxes().tensor.tolist() == [[1, 2, 5, 6], [0, 0, 2, 2]]
    assert len(masks[torch.tensor([True, False])]) == 1 and repr(masks) == "ROIMasks(num_instances=2)"
    with pytest.raises(ValueError):
        ROIMasks(torch.ones(7, 7))


@pytest.mark.cuda
def test_devices_follow():
    x = Instances((8, 9), b=Boxes([[1, 1, 4, 4]]), m=BitMasks(torch.ones(1, 8, 9)), p=PolygonMasks([[SQUARE]]))
    y = x.to("cuda")
    assert y.b.device.type == y.m.device.type == "cuda" and y.p.device.type == "cpu"
    assert y.p.crop_and_resize(y.b.tensor, 3).is_cuda and y.m.crop_and_resize(y.b.tensor, 3).is_cuda


def test_torchscript_compiles_boxes():
    def areas(x: torch.Tensor):
        boxes = Boxes(x)
        boxes.clip((5, 5))
        return boxes.area(), boxes[boxes.nonempty()].tensor, boxes.to(torch.device("cpu")).device == x.device

    area, tensor, same_device = torch.jit.script(areas)(torch.tensor([[0.0, 0.0, 9.0, 9.0], [1.0, 1.0, 1.0, 3.0]]))
    assert area.tolist() == [25, 0] and tensor.tolist() == [[0, 0, 5, 5]] and same_device


def test_torchscript_compiles_image_lists():
    def batch(images: list[torch.Tensor]):
        return ImageList.from_tensors(images, 16)

    images = [torch.ones(3, 10, 20), torch.zeros(3, 20, 30)]
    for some in (images, images[:1]):
        ours, scripted = batch(some), torch.jit.script(batch)(some)
        assert torch.equal(ours.tensor, scripted.tensor) and len(ours) == len(scripted) == len(some)
        assert all(torch.equal(ours[i], scripted[i]) for i in range(len(some)))
