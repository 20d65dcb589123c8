"""R-CNN, proposal, semantic and panoptic models, and test-time augmentation: edges beyond the fixtures."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2lite.config import get_cfg
from d2lite.layers import ShapeSpec
from d2lite.modeling import (
    META_ARCH_REGISTRY,
    DatasetMapperTTA,
    GeneralizedRCNNWithTTA,
    build_model,
    build_sem_seg_head,
)
from d2lite.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from d2lite.modeling.meta_arch.semantic_seg import SemSegFPNHead
from d2lite.structures import BitMasks, Boxes, Instances
from d2lite.utils.events import EventStorage

NUM_CLASSES = 3
NUM_LABELS = 4


def small_cfg(architecture, *options):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = NUM_LABELS
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 8
    cfg.MODEL.SEM_SEG_HEAD.NORM = ""
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    cfg.merge_from_list(list(options))
    return cfg


def make(architecture, *options):
    torch.manual_seed(0)
    return build_model(small_cfg(architecture, *options))


def settle(model):
    """Makes the batch-norm statistics those of random images, so that activations stay in range in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.backbone.train()(torch.randint(-128, 128, (4, 3, 64, 96)).float())
    return model.eval()


def image(h=64, w=96, boxes=(), classes=(), **extra):
    instances = Instances((h, w))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    instances.gt_masks = BitMasks(torch.ones(len(boxes), h, w, dtype=torch.bool))
    labels = torch.randint(0, NUM_LABELS, (h, w))
    pixels = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
    return {"image": pixels, "instances": instances, "sem_seg": labels, **extra}


def losses_of(model, batch, start=0):
    with EventStorage(start) as storage:
        losses = model.train()(batch)
    return losses, storage


def assert_every_parameter_has_a_finite_gradient(model, losses):
    assert all(torch.isfinite(x) for x in losses.values()), losses
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


BATCHES = {
    "all_empty": lambda: [image(), image(48, 64)],
    "one_empty": lambda: [image(boxes=[[5, 5, 40, 40]], classes=[1]), image(48, 64)],
    "one_pixel_boxes": lambda: [image(boxes=[[10, 10, 11, 11]], classes=[0]), image(boxes=[[3, 3, 4, 4]], classes=[1])],
    "one_pixel_images": lambda: [image(1, 100, boxes=[[20, 0, 60, 1]], classes=[2]), image(100, 1)],
}
ARCHITECTURES = {
    "faster": ("GeneralizedRCNN",),
    "mask": ("GeneralizedRCNN", "MODEL.MASK_ON", True),
    "rpn": ("ProposalNetwork",),
    "panoptic": ("PanopticFPN", "MODEL.MASK_ON", True),
    "semantic": ("SemanticSegmentor",),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_gets_a_finite_gradient(architecture, batch):
    model = make(*ARCHITECTURES[architecture])
    losses, _ = losses_of(model, BATCHES[batch]())
    # the extra level p6 of a semantic model feeds nothing and has no parameters
    assert_every_parameter_has_a_finite_gradient(model, losses)


def test_unknown_architecture_names_what_there_is():
    cfg = small_cfg("NoSuchNet")
    with pytest.raises(KeyError, match="NoSuchNet"):
        build_model(cfg)
    assert {"RetinaNet", "GeneralizedRCNN", "ProposalNetwork", "SemanticSegmentor", "PanopticFPN"} <= {
        name for name, _ in META_ARCH_REGISTRY
    }


# ---- R-CNN ---------------------------------------------------------------------------------------------------


def test_rcnn_rejects_classes_outside_the_model():
    with pytest.raises(ValueError, match=r"a\.jpg.*class 3.*MODEL\.ROI_HEADS\.NUM_CLASSES"):
        losses_of(make("GeneralizedRCNN"), [image(boxes=[[5, 5, 40, 40]], classes=[3], file_name="a.jpg")])


def test_proposal_network_does_not_check_classes():
    losses, _ = losses_of(make("ProposalNetwork"), [image(boxes=[[5, 5, 40, 40]], classes=[99])])
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "ProposalNetwork"])
def test_missing_annotations(architecture):
    batch = [image()]
    del batch[0]["instances"]
    with pytest.raises(AssertionError, match="instance annotations are missing"):
        losses_of(make(architecture), batch)


def test_rcnn_inference_sizes_and_given_boxes():
    model = settle(make("GeneralizedRCNN", "MODEL.MASK_ON", True))
    batch = [image(64, 96, height=32, width=24), image(48, 64)]
    with torch.no_grad():
        results = [x["instances"] for x in model(batch)]
        raw = model.inference(batch, do_postprocess=False)
        given = [Instances(x.image_size, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes) for x in raw]
        again = model.inference(batch, given, do_postprocess=False)
    assert [x.image_size for x in results] == [(32, 24), (48, 64)]
    assert results[0].pred_masks.shape == (len(results[0]), 32, 24)
    for x, y in zip(raw, again):
        assert len(x) == 5 and torch.allclose(x.pred_masks, y.pred_masks, atol=1e-5)
    with pytest.raises(AssertionError, match="model.eval"):
        model.train().inference(batch)


def test_rcnn_with_proposals_from_the_input():
    model = make("GeneralizedRCNN", "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    assert settle(model).proposal_generator is None
    proposals = Instances((64, 96), proposal_boxes=Boxes(torch.tensor([[5.0, 5, 40, 40]])))
    proposals.objectness_logits = torch.ones(1)
    with torch.no_grad():
        (result,) = model([image(proposals=proposals)])
        assert len(result["instances"]) == NUM_CLASSES
        with pytest.raises(AssertionError, match="no 'proposals'.*MODEL.PROPOSAL_GENERATOR.NAME"):
            model([image()])


def test_training_pictures():
    model = make("GeneralizedRCNN", "VIS_PERIOD", 2)
    batch = [image(boxes=[[5, 5, 40, 40]], classes=[1])]
    for iteration, expected in ((1, 0), (2, 1)):
        _, storage = losses_of(model, batch, start=iteration)
        assert len(storage._vis_data) == expected
    _, picture, _ = storage._vis_data[0]
    assert picture.shape == (3, 64, 2 * 96)


# ---- semantic segmentation -----------------------------------------------------------------------------------


def test_semantic_loss_is_the_mean_over_labeled_pixels():
    model = make("SemanticSegmentor", "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 0.5).train()
    x = image(64, 64)
    x["sem_seg"][:40] = 255
    losses, _ = losses_of(model, [x])
    features = model.backbone(model.preprocess_image([x]).tensor)
    logits = F.interpolate(model.sem_seg_head.layers(features), (64, 64), mode="bilinear", align_corners=False)
    expected = 0.5 * F.cross_entropy(logits, x["sem_seg"][None], ignore_index=255)
    assert torch.allclose(losses["loss_sem_seg"], expected, rtol=1e-5)


def test_semantic_loss_of_ignored_pixels_is_a_connected_zero():
    model = make("SemanticSegmentor")
    x = image()
    x["sem_seg"][:] = 255
    losses, _ = losses_of(model, [x])
    assert losses["loss_sem_seg"] == 0
    assert_every_parameter_has_a_finite_gradient(model, losses)


@pytest.mark.parametrize("label", [NUM_LABELS, -1, 254])
def test_semantic_label_outside_the_model(label):
    x = image(file_name="c.png")
    x["sem_seg"][3, 4] = label
    with pytest.raises(ValueError, match=rf"c\.png.*label {label}.*0 to 3.*ignores 255.*SEM_SEG_HEAD"):
        losses_of(make("SemanticSegmentor"), [x])


def test_semantic_training_needs_labels():
    x = image()
    del x["sem_seg"]
    with pytest.raises(AssertionError, match="per-pixel labels are missing"):
        losses_of(make("SemanticSegmentor"), [x])


def test_semantic_inference_needs_no_labels():
    model = make("SemanticSegmentor").eval()
    x = image(50, 70, height=25, width=100)
    del x["sem_seg"]
    with torch.no_grad():
        (result,) = model([x])
    assert result["sem_seg"].shape == (NUM_LABELS, 25, 100)


def test_semantic_head_needs_features():
    cfg = small_cfg("SemanticSegmentor", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p9"])
    with pytest.raises(ValueError, match="MODEL.SEM_SEG_HEAD.IN_FEATURES"):
        build_sem_seg_head(cfg, {"p2": ShapeSpec(channels=8, stride=4)})
    head = SemSegFPNHead(
        {"p3": ShapeSpec(channels=8, stride=8), "p2": ShapeSpec(channels=8, stride=4)},
        num_classes=2,
        conv_dims=4,
        common_stride=4,
    ).eval()
    assert head.in_features == ["p2", "p3"]
    scores, losses = head({"p2": torch.zeros(1, 8, 8, 8), "p3": torch.zeros(1, 8, 4, 4)})
    assert scores.shape == (1, 2, 32, 32) and losses == {}


# ---- panoptic segmentation -----------------------------------------------------------------------------------


def panoptic_inputs():
    masks = torch.zeros(4, 10, 10, dtype=torch.bool)
    masks[0, :4, :4] = True
    masks[1, :4, :6] = True  # two thirds of it are taken by mask 0, which scores higher
    masks[2, 5:8, 5:8] = True
    masks[3, 9, 9] = True
    instances = Instances((10, 10), pred_masks=masks)
    instances.scores = torch.tensor([0.9, 0.8, 0.7, 0.2])
    instances.pred_classes = torch.tensor([5, 6, 7, 8])
    semantic = torch.zeros(10, 10, dtype=torch.int64)
    semantic[:5] = 1
    semantic[9] = 2
    return instances, semantic


def test_panoptic_merging():
    instances, semantic = panoptic_inputs()
    seg, info = combine_semantic_and_instance_outputs(instances, semantic, 0.5, 20, 0.5)
    things = [(x["id"], x["category_id"], x["instance_id"]) for x in info if x["isthing"]]
    stuff = [(x["id"], x["category_id"], x["area"]) for x in info if not x["isthing"]]
    assert things == [(1, 5, 0), (2, 7, 2)]
    assert stuff == [(3, 1, 34)]  # label 2 covers only 10 pixels
    assert seg.dtype == torch.int32
    assert [int((seg == i).sum()) for i in range(4)] == [100 - 16 - 9 - 34, 16, 9, 34]


def test_panoptic_merging_keeps_the_visible_part():
    instances, semantic = panoptic_inputs()
    seg, info = combine_semantic_and_instance_outputs(instances, semantic, 0.7, 1000, 0.1)
    assert [x["category_id"] for x in info] == [5, 6, 7, 8]
    assert (seg[:4, 4:6] == 2).all() and (seg[:4, :4] == 1).all()


def test_panoptic_merging_of_nothing():
    instances, semantic = panoptic_inputs()
    seg, info = combine_semantic_and_instance_outputs(instances[:0], torch.zeros_like(semantic), 0.5, 0, 0.5)
    assert info == [] and not seg.any()


def test_panoptic_model():
    model = make("PanopticFPN", "MODEL.MASK_ON", True, "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", 1)
    losses, _ = losses_of(model, [image(boxes=[[5, 5, 40, 40]], classes=[1])])
    assert {"loss_sem_seg", "loss_mask", "loss_cls", "loss_rpn_cls"} <= set(losses)
    with torch.no_grad():
        (result,) = model.eval()([image(height=32, width=48)])
        instances, logits = model.inference([image()], do_postprocess=False)
    assert result["panoptic_seg"][0].shape == (32, 48) and result["sem_seg"].shape == (NUM_LABELS, 32, 48)
    assert len(instances) == 1 and logits.shape == (1, NUM_LABELS, 64, 96)


def test_panoptic_instance_loss_weight():
    batch = [image(boxes=[[5, 5, 40, 40]], classes=[1])]
    base = make("PanopticFPN", "MODEL.MASK_ON", True)
    scaled = make("PanopticFPN", "MODEL.MASK_ON", True, "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", 0.25)
    torch.manual_seed(1)
    expected, _ = losses_of(base, batch)
    torch.manual_seed(1)
    losses, _ = losses_of(scaled, batch)
    for name, value in losses.items():
        factor = 0.25 if name in ("loss_cls", "loss_box_reg", "loss_mask") else 1.0
        assert torch.allclose(value, factor * expected[name], rtol=1e-5), name


# ---- test-time augmentation ----------------------------------------------------------------------------------


def test_tta_mapper_makes_every_scale_plain_and_flipped():
    mapper = DatasetMapperTTA([32, 64], 80, True)
    x = {"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8), "height": 128, "width": 192, "image_id": 7}
    versions = mapper(x)
    assert [tuple(v["image"].shape[1:]) for v in versions] == [(32, 48)] * 2 + [(53, 80)] * 2
    assert all(v["image_id"] == 7 and v["image"].dtype == torch.uint8 for v in versions)
    assert torch.equal(versions[0]["image"], versions[1]["image"].flip(2))
    box = torch.tensor([[20.0, 40.0, 100.0, 120.0]]).numpy()
    assert versions[0]["transforms"].apply_box(box).tolist() == [[5, 10, 25, 30]]
    assert versions[1]["transforms"].apply_box(box).tolist() == [[48 - 25, 10, 48 - 5, 30]]
    assert len(DatasetMapperTTA([32, 64], 80, False)(x)) == 2


def test_tta_at_the_original_scale_is_plain_inference():
    cfg = small_cfg("GeneralizedRCNN", "MODEL.MASK_ON", True, "TEST.AUG.MIN_SIZES", [64], "TEST.AUG.FLIP", False)
    torch.manual_seed(0)
    model = settle(build_model(cfg))
    x = {"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8), "height": 32, "width": 48}
    with torch.no_grad():
        (plain,) = model([dict(x)])
    (augmented,) = GeneralizedRCNNWithTTA(cfg, model)([dict(x)])
    plain, augmented = plain["instances"], augmented["instances"]
    assert augmented.image_size == (32, 48)
    assert torch.allclose(plain.pred_boxes.tensor, augmented.pred_boxes.tensor, atol=1e-3)
    assert torch.allclose(plain.scores, augmented.scores, atol=1e-6)
    assert (plain.pred_masks == augmented.pred_masks).float().mean() > 0.99
    assert model.roi_heads.mask_on


def test_tta_treats_an_image_and_its_mirror_alike():
    cfg = small_cfg("GeneralizedRCNN", "MODEL.MASK_ON", True, "TEST.AUG.MIN_SIZES", [64, 80])
    torch.manual_seed(0)
    model = GeneralizedRCNNWithTTA(cfg, settle(build_model(cfg)))
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    (one,), (two,) = model([{"image": pixels}]), model([{"image": pixels.flip(2)}])
    one, two = one["instances"], two["instances"]
    mirrored = two.pred_boxes.tensor[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1]) + torch.tensor([64.0, 0, 64, 0])
    assert len(one) == 5 and torch.allclose(one.pred_boxes.tensor, mirrored, atol=1e-2)
    assert (one.pred_masks == two.pred_masks.flip(2)).float().mean() > 0.99


def test_tta_needs_an_rcnn():
    model = make("SemanticSegmentor")
    with pytest.raises(AssertionError, match="TEST.AUG.ENABLED.*SemanticSegmentor"):
        GeneralizedRCNNWithTTA(small_cfg("SemanticSegmentor"), model)


def test_bad_pixels_are_not_hidden():
    batch = [image(boxes=[[5, 5, 40, 40]], classes=[1])]
    batch[0]["image"] = batch[0]["image"].float()
    batch[0]["image"][0, 10, 10] = math.nan
    losses, _ = losses_of(make("SemanticSegmentor"), batch)
    assert losses["loss_sem_seg"].isnan()
