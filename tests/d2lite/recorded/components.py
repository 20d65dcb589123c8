"""Recorded components: each has a function that calls the public API of the module named `detectron2` with the
recorded inputs and returns what is compared with the recorded outputs.

Stored form: <name>.npz (arrays, keys "<case>/in/<key>" and "<case>/out/<key>") and <name>.json
(everything that is no array, {case: {"in": {...}, "out": {...}}}).
"""

import contextlib
import io
import itertools
import json
import math
import os
import pickle
import shutil
import tempfile

import numpy as np

COMPONENTS = {}


class Component:
    def __init__(self, name, run, rtol, atol, optional):
        self.name, self.run = name, run
        self.rtol, self.atol, self.optional = rtol, atol, optional


def component(name, rtol=1e-5, atol=1e-5, optional=lambda case, key: False):
    def deco(fn):
        COMPONENTS[name] = Component(name, fn, rtol, atol, optional)
        return fn

    return deco


def jsonable(x):
    if isinstance(x, dict):
        return {str(k): jsonable(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [jsonable(v) for v in x]
    if isinstance(x, bytes):
        return x.decode("utf-8")
    if isinstance(x, (np.bool_, bool)):
        return bool(x)
    if isinstance(x, np.integer):
        return int(x)
    if isinstance(x, (np.floating, float)):
        x = float(x)
        return "NaN" if math.isnan(x) else "Inf" if x == math.inf else "-Inf" if x == -math.inf else x
    if isinstance(x, np.ndarray):
        return jsonable(x.tolist())
    return x


def load_component(folder, name):
    with open(os.path.join(folder, name + ".json")) as f:
        data = json.load(f)
    with np.load(os.path.join(folder, name + ".npz"), allow_pickle=False) as z:
        for key in z.files:
            case, part, k = key.split("/", 2)
            data[case][part][k] = z[key]
    return data


def same_json(got, want, rtol=1e-5, atol=1e-6, path=""):
    """None when equal, else where they differ."""
    if isinstance(want, dict):
        if not isinstance(got, dict):
            return "%s: not a dict" % path
        if set(got) != set(want):
            return "%s: keys differ, missing %s, unexpected %s" % (
                path,
                sorted(set(want) - set(got))[:5],
                sorted(set(got) - set(want))[:5],
            )
        for k in want:
            r = same_json(got[k], want[k], rtol, atol, path + "/" + str(k))
            if r:
                return r
        return None
    if isinstance(want, list):
        if not isinstance(got, list) or len(got) != len(want):
            return "%s: length %s, expected %d" % (
                path,
                len(got) if isinstance(got, list) else "-",
                len(want),
            )
        for i, (g, w) in enumerate(zip(got, want)):
            r = same_json(g, w, rtol, atol, "%s[%d]" % (path, i))
            if r:
                return r
        return None
    if isinstance(want, bool) or isinstance(got, bool):
        return None if got is want else "%s: %r, expected %r" % (path, got, want)
    if isinstance(want, (int, float)) and isinstance(got, (int, float)):
        ok = abs(got - want) <= atol + rtol * abs(want)
        return None if ok else "%s: %r, expected %r" % (path, got, want)
    return None if got == want else "%s: %.80r, expected %.80r" % (path, got, want)


def run_component(path, rep):
    folder, name = os.path.dirname(path), os.path.basename(path)
    comp = COMPONENTS[name]
    data = load_component(folder, name)
    for case, d in data.items():
        tmp = tempfile.mkdtemp()
        try:
            got = comp.run(dict(d["in"]), tmp, folder)
        except Exception as e:  # noqa
            rep.stage_error(case, e)
            continue
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        for k, want in d["out"].items():
            key = case + "/" + k
            if k not in got:
                if not comp.optional(case, k):
                    rep.fail(key, "missing")
                continue
            if isinstance(want, np.ndarray):
                rep.close(key, got[k], want, rtol=comp.rtol, atol=comp.atol)
            else:
                rep.checked += 1
                g = jsonable(got[k])
                if isinstance(want, dict) and isinstance(g, dict):
                    want = {a: b for a, b in want.items() if a in g or not comp.optional(case, a)}
                r = same_json(g, want)
                if r:
                    rep.fail(key, r)


_uid = itertools.count()


def unique(name):
    return "%s_%d_%d" % (name, os.getpid(), next(_uid))


def T(x):
    import torch

    return torch.as_tensor(np.ascontiguousarray(x))


def N(x):
    return x.detach().cpu().numpy()


@component("anchor_generator")
def anchor_generator(i, tmp, folder):
    """DefaultAnchorGenerator(sizes=, aspect_ratios=, strides=, offset=) called on a list of feature
    maps of the given grid sizes (H, W).  in: sizes, ratios, strides, offset, grids.  out:
    anchors<l> (H*W*A, 4) XYXY for level l; cell<l> the anchors at the origin; num_anchors."""
    import torch

    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

    g = DefaultAnchorGenerator(sizes=i["sizes"], aspect_ratios=i["ratios"], strides=i["strides"], offset=i["offset"])
    out = g([torch.zeros(1, 2, *s) for s in i["grids"]])
    r = {"anchors%d" % l: N(b.tensor) for l, b in enumerate(out)}
    r.update({"cell%d" % l: N(b) for l, b in enumerate(g.cell_anchors)})
    r["num_anchors"] = list(g.num_anchors)
    r["box_dim"] = g.box_dim
    return r


@component("box2box_transform", rtol=1e-05, atol=0.0001)
def box2box_transform(i, tmp, folder):
    """detectron2.modeling.box_regression.Box2BoxTransform(weights=...) and
    Box2BoxTransformLinear(normalize_by_size=...).  in: src, target (N,4), deltas (N,4k).
    out: get_deltas(src, target); apply_deltas(deltas, src) - k boxes per source box, dw and dh are
    clamped from above."""
    from detectron2.modeling import box_regression as B

    t = (
        B.Box2BoxTransform(weights=tuple(i["weights"]))
        if i["kind"] == "Box2BoxTransform"
        else B.Box2BoxTransformLinear(normalize_by_size=i["normalize"])
    )
    return {
        "get_deltas": N(t.get_deltas(T(i["src"]), T(i["target"]))),
        "apply_deltas": N(t.apply_deltas(T(i["deltas"]), T(i["src"]))),
    }


@component("matcher")
def matcher(i, tmp, folder):
    """detectron2.modeling.matcher.Matcher(thresholds, labels, allow_low_quality_matches)(quality),
    quality (M gt, N predictions).  out: matches (N,) and match_labels (N,)."""
    from detectron2.modeling.matcher import Matcher

    m, l = Matcher(list(i["thresholds"]), list(i["labels"]), allow_low_quality_matches=i["low"])(T(i["quality"]))
    return {"matches": N(m).astype("int64"), "match_labels": N(l).astype("int64")}


@component("boxes")
def boxes(i, tmp, folder):
    """detectron2.structures: Boxes (area, clip, nonempty, inside_box, get_centers, scale,
    Boxes.cat, indexing), pairwise_iou, pairwise_ioa, pairwise_intersection,
    pairwise_point_box_distance and BoxMode.convert.  scale is (x, y), size is (h, w)."""
    from detectron2.structures import Boxes, BoxMode, pairwise_ioa, pairwise_iou
    from detectron2.structures.boxes import pairwise_intersection, pairwise_point_box_distance

    a, b = Boxes(T(i["a"])), Boxes(T(i["b"]))
    r = {
        "area": N(a.area()),
        "iou": N(pairwise_iou(a, b)),
        "ioa": N(pairwise_ioa(a, b)),
        "intersection": N(pairwise_intersection(a, b)),
        "point_distance": N(pairwise_point_box_distance(T(i["points"]), b)),
        "nonempty": N(a.nonempty()),
        "nonempty_8": N(a.nonempty(threshold=8.0)),
        "inside": N(a.inside_box(tuple(i["size"]))),
        "inside_thresh": N(a.inside_box(tuple(i["size"]), 4)),
        "centers": N(a.get_centers()),
        "cat": N(Boxes.cat([a, b]).tensor),
    }
    c = a.clone()
    c.clip(tuple(i["size"]))
    r["clip"] = N(c.tensor)
    c = a.clone()
    c.scale(*i["scale"])
    r["scaled"] = N(c.tensor)
    arr = np.asarray(i["a"], "float64")
    xywh = BoxMode.convert(arr, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    r["xywh"] = np.asarray(xywh)
    r["back"] = np.asarray(BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    one = BoxMode.convert([1.5, 2.0, 10.0, 20.0], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    r["list"] = list(one)
    r["list_type"] = type(one).__name__
    r["tuple_type"] = type(BoxMode.convert((1.0, 2.0, 3.0, 4.0), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)).__name__
    r["index_shapes"] = [list(a[2].tensor.shape), list(a[1:4].tensor.shape), list(a[a.nonempty()].tensor.shape)]
    r["modes"] = {m: int(getattr(BoxMode, m)) for m in ("XYXY_ABS", "XYWH_ABS", "XYXY_REL", "XYWH_REL", "XYWHA_ABS")}
    return r


@component("roi_align", rtol=0.0001, atol=1e-05)
def roi_align(i, tmp, folder):
    """detectron2.layers.ROIAlign(output_size, spatial_scale, sampling_ratio, aligned)(feat, boxes);
    boxes (N,5) = batch index, XYXY.  Includes boxes partly or fully outside, a zero-size box and a
    tiny one.  out: pooled, and grad = d(sum(pooled * weight))/d(feat), weight[k] = sin(k) over the
    flattened output."""
    import torch

    from detectron2.layers import ROIAlign

    f = T(i["feat"]).requires_grad_(True)
    y = ROIAlign(tuple(i["size"]), i["scale"], i["sampling_ratio"], aligned=i["aligned"])(f, T(i["boxes"]))
    w = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).float().view_as(y)
    (y * w).sum().backward()
    return {"pooled": N(y), "grad": N(f.grad)}


@component("roi_pooler", rtol=0.0001, atol=1e-05)
def roi_pooler(i, tmp, folder):
    """detectron2.modeling.poolers.ROIPooler(output_size, scales, sampling_ratio, pooler_type,
    canonical_box_size, canonical_level)([feat0, ...], [Boxes(boxes0), Boxes(boxes1)]) and
    detectron2.modeling.poolers.assign_boxes_to_levels([Boxes(levels_boxes)], min_level, max_level,
    canonical_box_size, canonical_level), min/max level = log2 of the first/last stride."""
    from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
    from detectron2.structures import Boxes

    p = ROIPooler(
        i["size"],
        i["scales"],
        i["sampling_ratio"],
        i["type"],
        canonical_box_size=i["canonical_box_size"],
        canonical_level=i["canonical_level"],
    )
    feats = [T(i["feat%d" % k]) for k in range(len(i["scales"]))]
    y = p(feats, [Boxes(T(i["boxes0"])), Boxes(T(i["boxes1"]))])
    lo, hi = int(-math.log2(i["scales"][0])), int(-math.log2(i["scales"][-1]))
    lv = assign_boxes_to_levels([Boxes(T(i["levels_boxes"]))], lo, hi, i["canonical_box_size"], i["canonical_level"])
    return {"pooled": N(y), "levels": N(lv).astype("int64"), "output_size": list(p.output_size)}


@component("nms")
def nms(i, tmp, folder):
    """detectron2.layers.batched_nms(boxes, scores, idxs, iou_threshold) and, with all boxes in one
    class, detectron2.layers.nms(boxes, scores, iou_threshold).  out: the kept indices in the order
    returned.  (Detectron2 has no ml_nms; batched_nms is its multi-class NMS.)"""
    from detectron2.layers import batched_nms
    from detectron2.layers.nms import nms as plain

    b, s = T(i["boxes"]), T(i["scores"])
    return {"batched": N(batched_nms(b, s, T(i["idxs"]), i["iou"])), "plain": N(plain(b, s, i["iou"]))}


@component("box_losses", rtol=0.0001, atol=1e-05)
def box_losses(i, tmp, folder):
    """detectron2.layers.diou_loss / ciou_loss(pred, target, reduction): values for the three
    reductions, and the gradient of the sum with respect to pred."""

    from detectron2.layers import ciou_loss, diou_loss

    r = {}
    for n, f in (("diou", diou_loss), ("ciou", ciou_loss)):
        for red in ("none", "sum", "mean"):
            r["%s_%s" % (n, red)] = N(f(T(i["pred"]), T(i["target"]), reduction=red))
        p = T(i["pred"]).clone().requires_grad_(True)
        f(p, T(i["target"]), reduction="sum").backward()
        r[n + "_grad"] = N(p.grad)
    return r


@component("image_list")
def image_list(i, tmp, folder):
    """detectron2.structures.ImageList.from_tensors(tensors, size_divisibility=div, pad_value=pad,
    padding_constraints=constraints).  out: tensor, image_sizes, and item0 = image_list[0]."""
    from detectron2.structures import ImageList

    x = ImageList.from_tensors(
        [T(i["image%d" % k]) for k in range(i["n"])],
        size_divisibility=i["div"],
        pad_value=i.get("pad", 0.0),
        padding_constraints=i.get("constraints"),
    )
    return {
        "tensor": N(x.tensor),
        "image_sizes": [[int(v) for v in s] for s in x.image_sizes],
        "item0": N(x[0]),
        "len": len(x),
    }


@component("detector_postprocess", rtol=1e-05, atol=0.0001)
def detector_postprocess(i, tmp, folder):
    """detectron2.modeling.detector_postprocess(Instances(image_size, pred_boxes, scores,
    pred_classes[, pred_masks of (N,1,M,M) probabilities]), out_h, out_w, mask_threshold=...)."""
    from detectron2.modeling import detector_postprocess as f
    from detectron2.structures import Boxes, Instances

    x = Instances(tuple(i["image_size"]))
    x.pred_boxes, x.scores, x.pred_classes = Boxes(T(i["boxes"]).clone()), T(i["scores"]), T(i["classes"])
    if "masks" in i:
        x.pred_masks = T(i["masks"])
    y = f(x, i["out"][0], i["out"][1], mask_threshold=i["threshold"])
    r = {
        "boxes": N(y.pred_boxes.tensor),
        "scores": N(y.scores),
        "classes": N(y.pred_classes),
        "image_size": [int(v) for v in y.image_size],
    }
    if "masks" in i:
        r["masks"] = N(y.pred_masks)
    return r


@component("paste_masks_in_image")
def paste_masks_in_image(i, tmp, folder):
    """detectron2.layers.paste_masks_in_image(masks (N,M,M), boxes (N,4), (H, W), threshold): a bool
    tensor for threshold >= 0, uint8 (0..255, soft) for a negative threshold."""
    from detectron2.layers import paste_masks_in_image as f

    y = N(f(T(i["masks"]), T(i["boxes"]), tuple(i["size"]), threshold=i["threshold"]))
    return {"dtype": str(y.dtype), "out": y.astype("float32") / 255.0 if y.dtype == np.uint8 else y}


COMPONENTS["paste_masks_in_image"].atol = 1.01 / 255


@component("sem_seg_postprocess")
def sem_seg_postprocess(i, tmp, folder):
    """detectron2.modeling.postprocessing.sem_seg_postprocess(logits (C,H,W), image_size, out_h, out_w)."""
    from detectron2.modeling.postprocessing import sem_seg_postprocess as f

    return {"out": N(f(T(i["logits"]), tuple(i["image_size"]), i["out"][0], i["out"][1]))}


@component("find_top_rpn_proposals")
def find_top_rpn_proposals(i, tmp, folder):
    """detectron2.modeling.proposal_generator.proposal_utils.find_top_rpn_proposals([boxes<l>],
    [logits<l>], image_sizes, nms, pre, post, min_size, training)."""
    from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals as f

    L = range(i["levels"])
    res = f(
        [T(i["boxes%d" % l]).clone() for l in L],
        [T(i["logits%d" % l]).clone() for l in L],
        [tuple(s) for s in i["image_sizes"]],
        i["nms"],
        i["pre"],
        i["post"],
        i["min_size"],
        i["training"],
    )
    r = {}
    for k, x in enumerate(res):
        r["proposals%d" % k] = N(x.proposal_boxes.tensor)
        r["logits%d" % k] = N(x.objectness_logits)
    return r


@component("fast_rcnn_inference")
def fast_rcnn_inference(i, tmp, folder):
    """detectron2.modeling.roi_heads.fast_rcnn.fast_rcnn_inference([boxes (R, K*4 or 4)],
    [probs (R, K+1), background last], [(h, w)], score, nms, topk)."""
    from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference as f

    inst, idx = f([T(i["boxes"])], [T(i["probs"])], [tuple(i["size"])], i["score"], i["nms"], i["topk"])
    x = inst[0]
    return {"boxes": N(x.pred_boxes.tensor), "scores": N(x.scores), "classes": N(x.pred_classes), "kept": N(idx[0])}


@component("masks", atol=0.0001)
def masks(i, tmp, folder):
    """detectron2.structures PolygonMasks (area, get_bounding_boxes, nonempty, crop_and_resize) and
    BitMasks (from_polygon_masks, get_bounding_boxes, nonempty, crop_and_resize), and
    detectron2.structures.masks.polygons_to_bitmask.  poly<j>_<k>: polygon k of instance j."""
    from detectron2.structures import BitMasks, PolygonMasks
    from detectron2.structures.masks import polygons_to_bitmask

    polys = [[i["poly%d_%d" % (j, k)] for k in range(n)] for j, n in enumerate(i["counts"])]
    p, b = PolygonMasks(polys), BitMasks(T(i["bitmasks"]))
    fp = BitMasks.from_polygon_masks(polys, i["h"], i["w"])
    bx = T(i["boxes"])
    return {
        "poly_area": N(p.area()).astype("float64"),
        "poly_boxes": N(p.get_bounding_boxes().tensor),
        "poly_nonempty": N(p.nonempty()),
        "poly_crop": N(p.crop_and_resize(bx, i["mask_size"])),
        "poly_index": N(p[[2, 0]].get_bounding_boxes().tensor),
        "bit_boxes": N(b.get_bounding_boxes().tensor),
        "bit_nonempty": N(b.nonempty()),
        "bit_crop": N(b.crop_and_resize(bx, i["mask_size"])),
        "from_poly": N(fp.tensor),
        "from_poly_crop": N(fp.crop_and_resize(bx, i["mask_size"])),
        "rasterised": np.stack([polygons_to_bitmask(q, i["h"], i["w"]) for q in polys]).astype(bool),
    }


def build_tf(spec):
    from detectron2.data import transforms as TR

    return TR.TransformList([getattr(TR, t[0])(*t[1:]) for t in spec])


def dump_instances(x, prefix=""):
    r = {
        prefix + "len": len(x),
        prefix + "image_size": [int(v) for v in x.image_size],
        prefix + "fields": sorted(x.get_fields()),
    }
    r[prefix + "gt_boxes"] = N(x.gt_boxes.tensor)
    r[prefix + "boxes_dtype"] = str(x.gt_boxes.tensor.dtype)
    r[prefix + "gt_classes"] = N(x.gt_classes)
    if x.has("gt_masks"):
        m = x.gt_masks
        if hasattr(m, "polygons"):
            r[prefix + "polygons"] = [[np.asarray(q, "float64").round(6).tolist() for q in p] for p in m.polygons]
        else:
            r[prefix + "bitmasks"] = N(m.tensor).astype(bool)
    return r


@component("annotations_to_instances", atol=0.001)
def annotations_to_instances(i, tmp, folder):
    """For each annotation transform_instance_annotations(anno, TransformList(tf), out size), then
    annotations_to_instances(annos, out size, mask_format=fmt), then (recompute) gt_boxes from
    gt_masks.get_bounding_boxes(), then filter_empty_instances - all of
    detectron2.data.detection_utils.  bbox_mode 0 = XYXY_ABS, 1 = XYWH_ABS.
    out: the fields before ("raw_...") and after the filter."""
    import copy

    from detectron2.data import detection_utils as U
    from detectron2.structures import BoxMode

    tf, size = build_tf(i["tf"]), tuple(i["out"])
    annos = []
    for a in copy.deepcopy(i["annos"]):
        a["bbox_mode"] = BoxMode(a["bbox_mode"])
        if isinstance(a.get("segmentation"), dict):
            a["segmentation"]["counts"] = a["segmentation"]["counts"].encode()
        annos.append(U.transform_instance_annotations(a, tf, size))
    x = U.annotations_to_instances(annos, size, mask_format=i["fmt"])
    r = dump_instances(x, "raw_")
    if i.get("recompute"):
        x.gt_boxes = x.gt_masks.get_bounding_boxes()
    r.update(dump_instances(U.filter_empty_instances(x)))
    return r


@component("transforms", atol=0.001)
def transforms(i, tmp, folder):
    """detectron2.data.transforms.TransformList([...]) with explicit transforms, given as
    [class name, *constructor arguments] (interpolation: PIL numbers 0 nearest, 2 bilinear, 3 bicubic).
    out: apply_image(image uint8 HWC), gray = apply_image(image[:, :, :1]), float = apply_image of
    image/255 as float32 (single ResizeTransform only), apply_segmentation(seg),
    apply_coords(points), apply_box(boxes XYXY)."""
    t = build_tf(i["tf"])
    r = {
        "image": np.asarray(t.apply_image(i["image"])),
        "gray": np.asarray(t.apply_image(i["image"][:, :, :1])),
        "seg": np.asarray(t.apply_segmentation(i["seg"])),
        "points": np.asarray(t.apply_coords(i["points"].copy())).astype("float64"),
        "boxes": np.asarray(t.apply_box(i["boxes"].copy())).astype("float64"),
    }
    if len(i["tf"]) == 1 and i["tf"][0][0] == "ResizeTransform":
        r["float"] = np.asarray(t.apply_image((i["image"] / 255.0).astype("float32")))
    return r


@component("augmentations_seeded")
def augmentations_seeded(i, tmp, folder):
    """numpy.random.seed(seed); detectron2.data.transforms.<aug>(**kwargs)(AugInput(image)).
    out: the transform(s) chosen, as class name and numbers, and the image where one was stored
    (otherwise an all-zero height x width x 3 image is used and only the choice is recorded)."""
    from detectron2.data import transforms as TR

    img = i.get("image")
    if img is None:
        img = np.zeros((i["height"], i["width"], 3), "uint8")
    kw = {k: (tuple(v) if isinstance(v, list) and k in ("crop_size", "shape") else v) for k, v in i["kwargs"].items()}
    np.random.seed(i["seed"])
    a = TR.AugInput(img)
    t = getattr(TR, i["aug"])(**kw)(a)
    ts = t.transforms if hasattr(t, "transforms") else [t]
    desc = []
    for x in ts:
        n = type(x).__name__
        keys = {
            "ResizeTransform": ("h", "w", "new_h", "new_w"),
            "HFlipTransform": ("width",),
            "VFlipTransform": ("height",),
            "CropTransform": ("x0", "y0", "w", "h"),
            "PadTransform": ("x0", "y0", "x1", "y1"),
        }.get(n, ())
        desc.append([n] + [int(getattr(x, k)) for k in keys])
    r = {"chosen": desc, "shape": list(a.image.shape)}
    if "image" in i:
        r["image"] = np.asarray(a.image)
    return r


@component("resize_shape")
def resize_shape(i, tmp, folder):
    """detectron2.data.transforms.ResizeShortestEdge.get_output_shape(old_h, old_w, short_edge,
    max_size) for each row; out: [new_h, new_w] per row."""
    from detectron2.data import transforms as TR

    return {"shapes": [list(map(int, TR.ResizeShortestEdge.get_output_shape(*r))) for r in i["rows"]]}


@component("dataset_mapper", atol=0.001)
def dataset_mapper(i, tmp, folder):
    """detectron2.data.DatasetMapper on a PNG written from `image` (RGB order), with dataset dict
    {file_name, height, width, image_id, annotations, sem_seg_file_name}.  Either explicit keyword
    arguments and augmentations ([class, kwargs], or [transform class, [args]]), or DatasetMapper(cfg,
    is_train) with the listed cfg overrides after numpy.random.seed(seed)."""
    from PIL import Image

    from detectron2.config import get_cfg
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as TR
    from detectron2.structures import BoxMode

    Image.fromarray(i["image"]).save(os.path.join(tmp, "a.png"))
    Image.fromarray(i["sem_seg"]).save(os.path.join(tmp, "s.png"))
    h, w = i["image"].shape[:2]
    d = dict(
        file_name=os.path.join(tmp, "a.png"),
        sem_seg_file_name=os.path.join(tmp, "s.png"),
        height=h,
        width=w,
        image_id=7,
        annotations=[dict(a, bbox_mode=BoxMode(a["bbox_mode"])) for a in i["annos"]],
    )
    if "cfg" in i:
        cfg = get_cfg()
        cfg.merge_from_list(i["cfg"])
        m = DatasetMapper(cfg, i["is_train"])
        np.random.seed(i["seed"])
    else:
        augs = [getattr(TR, a)(**k) if isinstance(k, dict) else getattr(TR, a)(*k) for a, k in i["augs"]]
        m = DatasetMapper(augmentations=augs, **i["kw"])
    y = m(d)
    r = {
        "keys": sorted(y),
        "image": N(y["image"]),
        "image_dtype": str(y["image"].dtype),
        "height": y["height"],
        "width": y["width"],
    }
    if "sem_seg" in y:
        r["sem_seg"] = N(y["sem_seg"]).astype("int64")
    if "instances" in y:
        r.update(dump_instances(y["instances"]))
    return r


@component("lr_schedule", rtol=1e-06, atol=1e-10)
def lr_schedule(i, tmp, folder):
    """detectron2.solver.build_lr_scheduler(cfg, SGD(lr=BASE_LR)) with the listed cfg overrides.
    out: lr[k] = the learning rate used at iteration k (read before the k-th optimizer.step(), then
    scheduler.step()), for MAX_ITER iterations; resumed[k]: the same from a scheduler that was
    state_dict()-saved after iteration 7 and loaded into a fresh one."""
    import torch

    from detectron2.config import get_cfg
    from detectron2.solver import build_lr_scheduler

    cfg = get_cfg()
    cfg.merge_from_list(i["cfg"])

    def fresh():
        o = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
        return o, build_lr_scheduler(cfg, o)

    o, s = fresh()
    lr, state = [], None
    for k in range(cfg.SOLVER.MAX_ITER):
        lr.append(o.param_groups[0]["lr"])
        o.step()
        if k < cfg.SOLVER.MAX_ITER - 1:
            s.step()
        if k == 6:
            state = (s.state_dict(), o.state_dict())
            state = pickle.loads(pickle.dumps(state))
    o, s = fresh()
    s.load_state_dict(state[0])
    o.load_state_dict(state[1])
    res = []
    for k in range(7, cfg.SOLVER.MAX_ITER):
        res.append(o.param_groups[0]["lr"])
        o.step()
        if k < cfg.SOLVER.MAX_ITER - 1:
            s.step()
    return {"lr": np.array(lr, "float64"), "resumed": np.array(res, "float64")}


def tiny_net():
    """conv (3->4, bias), bn (BatchNorm2d 4), gn (GroupNorm 2 groups), ln (LayerNorm 4), head = a
    Sequential(Linear(4, 3), Linear(3, 2, bias=False)), and conv0, a frozen Conv2d(3, 3, 1)."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv0 = nn.Conv2d(3, 3, 1)
            self.conv = nn.Conv2d(3, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.gn = nn.GroupNorm(2, 4)
            self.ln = nn.LayerNorm(4)
            self.head = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
            self.shared = self.head[0]  # the same module twice
            for p in self.conv0.parameters():
                p.requires_grad = False

    net = Net()
    k = 0
    with torch.no_grad():
        for n, p in net.named_parameters():
            p.copy_(torch.cos(torch.arange(p.numel(), dtype=torch.float64) * 0.7 + k).float().view_as(p))
            k += 1
    return net


def set_grads(net, step):
    import torch

    k = 0
    for n, p in net.named_parameters():
        if p.requires_grad:
            p.grad = (3.0 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 0.3 + k + step)).float().view_as(p)
        k += 1


@component("optimizer")
def optimizer(i, tmp, folder):
    """detectron2.solver.build_optimizer(cfg, net).  net: see tiny_net in the README.  Gradients of
    step t for parameter number k (in named_parameters() order, frozen ones counted too):
    3*sin(0.3*j + k + t), j = flat index.  out: per parameter the group's hyper-parameters; the
    number of groups; the class name; parameters after three steps."""
    from detectron2.config import get_cfg
    from detectron2.solver import build_optimizer

    cfg = get_cfg()
    cfg.merge_from_list(i["cfg"])
    net = tiny_net()
    o = build_optimizer(cfg, net)
    names = {id(p): n for n, p in net.named_parameters()}
    table, groups = {}, 0
    for g in o.param_groups:
        groups += 1
        for p in g["params"]:
            assert names[id(p)] not in table
            table[names[id(p)]] = [float(g["lr"]), float(g["weight_decay"]), float(g["momentum"]), bool(g["nesterov"])]
    for t in range(3):
        set_grads(net, t)
        o.step()
    r = {"hyper": table, "num_groups": groups, "class": type(o).__name__}
    for n, p in net.named_parameters():
        r["after/" + n] = N(p)
    return r


@component("default_optimizer_params")
def default_optimizer_params(i, tmp, folder):
    """detectron2.solver.get_default_optimizer_params(net, **kw[, lr_factor_func]): per parameter the
    hyper-parameters given.  `factor`: lr_factor_func(name) = factor[first component of the name], or 1.
    vit: detectron2.modeling.get_vit_lr_decay_rate(name, decay, layers) for the listed names."""
    if i.get("vit"):
        from detectron2.modeling import get_vit_lr_decay_rate as f

        names = [
            "backbone.net.pos_embed",
            "backbone.net.patch_embed.proj.weight",
            "backbone.net.blocks.0.norm1.weight",
            "backbone.net.blocks.3.mlp.fc1.bias",
            "backbone.simfp_2.0.weight",
            "backbone.net.blocks.2.residual.conv1.weight",
            "roi_heads.box_head.fc1.weight",
        ]
        return {"rates": {n: f(n, lr_decay_rate=i["decay"], num_layers=i["layers"]) for n in names}}
    from detectron2.solver import get_default_optimizer_params as f

    net = tiny_net()
    kw = dict(i["kw"])
    if "factor" in i:
        kw["lr_factor_func"] = lambda name: i["factor"].get(name.split(".")[0], 1.0)
    names = {id(p): n for n, p in net.named_parameters()}
    groups = f(net, **kw)
    t = {}
    for g in groups:
        for p in g["params"]:
            t[names[id(p)]] = {k: v for k, v in g.items() if k != "params"}
    return {"hyper": t, "num_groups": len(groups)}


CKPT_OVERRIDES = [
    "MODEL.DEVICE",
    "cpu",
    "MODEL.WEIGHTS",
    "",
    "MODEL.MASK_ON",
    True,
    "MODEL.BACKBONE.NAME",
    "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES",
    ["res2", "res3", "res4", "res5"],
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    8,
    "MODEL.RESNETS.WIDTH_PER_GROUP",
    2,
    "MODEL.RESNETS.STEM_OUT_CHANNELS",
    4,
    "MODEL.FPN.IN_FEATURES",
    ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS",
    8,
    "MODEL.ANCHOR_GENERATOR.SIZES",
    [[32], [64], [128], [256], [512]],
    "MODEL.RPN.IN_FEATURES",
    ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME",
    "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES",
    ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.NUM_CLASSES",
    3,
    "MODEL.ROI_BOX_HEAD.NAME",
    "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC",
    2,
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    10,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
    3,
    "MODEL.ROI_MASK_HEAD.NUM_CONV",
    2,
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    8,
]


def ckpt_model():
    import torch

    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_list(CKPT_OVERRIDES)
    m = build_model(cfg)
    with torch.no_grad():
        for v in m.state_dict().values():
            v.fill_(7.0)
    return m


@component("checkpointer", atol=0.0001)
def checkpointer(i, tmp, folder):
    """detectron2.checkpoint.DetectionCheckpointer(model).load(file + suffix) on a small Mask R-CNN
    (checkpoints/config.yaml) whose state_dict was filled with 7.0.  out: loaded = {name: [sum of the
    loaded tensor, first element]} for every state_dict entry that is no longer all 7.0;
    returned = keys of the dict that load() gives back.
    save_and_resume: save("model_0000003", iteration=3) with an SGD optimizer as checkpointable, then
    resume_or_load into a fresh model."""
    import torch

    from detectron2.checkpoint import DetectionCheckpointer

    m = ckpt_model()
    if i["file"] is None:
        with torch.no_grad():
            for k, p in enumerate(m.parameters()):
                p.fill_(float(k))
        o = torch.optim.SGD(m.parameters(), lr=0.1)
        ck = DetectionCheckpointer(m, tmp, optimizer=o)
        before = ck.has_checkpoint()
        ck.save("model_0000003", iteration=3)
        raw = torch.load(os.path.join(tmp, "model_0000003.pth"), weights_only=True)
        m2 = ckpt_model()
        o2 = torch.optim.SGD(m2.parameters(), lr=0.5)
        ck2 = DetectionCheckpointer(m2, tmp, optimizer=o2)
        ret = ck2.resume_or_load("", resume=True)
        return {
            "before": before,
            "after": ck2.has_checkpoint(),
            "files": sorted(os.listdir(tmp)),
            "last_checkpoint": open(os.path.join(tmp, "last_checkpoint")).read().strip(),
            "keys": sorted(raw),
            "n_model": len(raw["model"]),
            "iteration": int(ret["iteration"]),
            "returned": sorted(ret),
            "lr": o2.param_groups[0]["lr"],
            "same": all(torch.equal(a, b) for a, b in zip(m.parameters(), m2.parameters())),
            "get_checkpoint_file": os.path.basename(ck2.get_checkpoint_file()),
            "all_files": [os.path.basename(x) for x in ck2.get_all_checkpoint_files()],
        }
    path = os.path.join(tmp, i["file"])
    shutil.copy(os.path.join(folder, "checkpoints", i["file"]), path)
    ret = DetectionCheckpointer(m).load(path + i["suffix"])
    loaded = {}
    for k, v in m.state_dict().items():
        if not bool((v == 7.0).all()):
            loaded[k] = [float(v.double().sum()), float(v.reshape(-1)[0])]
    return {"loaded": loaded, "returned": sorted(ret)}


def plain_dicts(ds):
    out = []
    for d in ds:
        d = dict(d)
        d["annotations"] = [
            {k: (int(v) if k == "bbox_mode" else v) for k, v in a.items()} for a in d.get("annotations", [])
        ]
        out.append(d)
    return jsonable(out)


@component("load_coco_json")
def load_coco_json(i, tmp, folder):
    """detectron2.data.datasets.load_coco_json(json_file, "imgs", dataset_name or None,
    extra_annotation_keys=extra).  out: the list of dataset dicts (bbox_mode as int, RLE counts as
    str), and the metadata it set."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import load_coco_json as f

    p = os.path.join(tmp, "a.json")
    with open(p, "w") as fh:
        json.dump(i["json"], fh)
    name = unique("parity_coco") if i["named"] else None
    ds = f(p, "imgs", name, extra_annotation_keys=i["extra"])
    r = {"dicts": plain_dicts(ds)}
    if name:
        m = MetadataCatalog.get(name)
        r["thing_classes"] = list(m.thing_classes)
        r["id_map"] = {str(k): int(v) for k, v in m.thing_dataset_id_to_contiguous_id.items()}
        from detectron2.data.build import filter_images_with_only_crowd_annotations, get_detection_dataset_dicts

        name2 = unique("parity_reg")
        DatasetCatalog.register(name2, lambda: f(p, "imgs", name2))
        r["filtered_ids"] = [d["image_id"] for d in filter_images_with_only_crowd_annotations(ds)]
        with contextlib.redirect_stdout(io.StringIO()):
            r["get_detection_dataset_dicts"] = [
                d["image_id"] for d in get_detection_dataset_dicts(name2, filter_empty=True)
            ]
            r["get_detection_dataset_dicts_all"] = [
                d["image_id"] for d in get_detection_dataset_dicts([name2], filter_empty=False)
            ]
    return r


@component("coco_evaluator", atol=0.001)
def coco_evaluator(i, tmp, folder):
    """detectron2.evaluation.COCOEvaluator(name[, max_dets_per_image]) on a dataset registered with
    register_coco_instances; process() is given, per image of the json in sorted id order, the stored
    boxes / scores / classes (contiguous ids) [/ masks].  out: evaluate()'s dict, and (full mode) the
    list written to coco_instances_results.json."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    p = os.path.join(tmp, "a.json")
    with open(p, "w") as fh:
        json.dump(i["json"], fh)
    name = unique("parity_eval")
    register_coco_instances(name, {}, p, "imgs")
    DatasetCatalog.get(name)
    kw = {"max_dets_per_image": i["max_dets"]} if "max_dets" in i else {}
    ev = COCOEvaluator(name, output_dir=os.path.join(tmp, "out"), distributed=False, **kw)
    ev.reset()
    for im in sorted(i["json"]["images"], key=lambda x: x["id"]):
        k = str(im["id"])
        x = Instances((im["height"], im["width"]))
        n = 0 if i["mode"] == "empty" else len(i["scores" + k])
        x.pred_boxes = Boxes(T(i["boxes" + k]) if n else T(np.zeros((0, 4), "float32")))
        x.scores = T(i["scores" + k]) if n else T(np.zeros(0, "float32"))
        x.pred_classes = T(i["classes" + k]) if n else T(np.zeros(0, "int64"))
        if i["mode"] == "full":
            x.pred_masks = T(i["masks" + k])
        ev.process(
            [{"image_id": im["id"], "file_name": im["file_name"], "height": im["height"], "width": im["width"]}],
            [{"instances": x}],
        )
    with contextlib.redirect_stdout(io.StringIO()):
        res = ev.evaluate()
    r = {"results": {t: {k: float(v) for k, v in d.items()} for t, d in res.items()}}
    if i["mode"] == "full":
        with open(os.path.join(tmp, "out", "coco_instances_results.json")) as fh:
            r["written"] = json.load(fh)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.pop(name, None)
    return r


@component("sem_seg_evaluator", atol=0.001, optional=lambda case, key: "Boundary" in key or "min(" in key)
def sem_seg_evaluator(i, tmp, folder):
    """detectron2.evaluation.SemSegEvaluator(name): gt<k> is written as a PNG (sem_seg_file_name),
    the output is {"sem_seg": logits<k>}.  Metadata: stuff_classes = classes, ignore_label = ignore.
    out: evaluate()["sem_seg"].  The BoundaryIoU / min(IoU, B-Iou) entries only exist where OpenCV is
    installed; the other entries always do."""
    from PIL import Image

    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import SemSegEvaluator

    recs = []
    for k in range(i["n"]):
        Image.fromarray(i["gt%d" % k]).save(os.path.join(tmp, "gt%d.png" % k))
        recs.append(
            dict(
                file_name="im%d.jpg" % k,
                sem_seg_file_name=os.path.join(tmp, "gt%d.png" % k),
                height=i["gt%d" % k].shape[0],
                width=30,
                image_id=k,
            )
        )
    name = unique("parity_sem")
    DatasetCatalog.register(name, lambda: recs)
    MetadataCatalog.get(name).set(stuff_classes=list(i["classes"]), ignore_label=i["ignore"])
    ev = SemSegEvaluator(name, distributed=False, output_dir=os.path.join(tmp, "out"))
    ev.reset()
    for k in range(i["n"]):
        ev.process([recs[k]], [{"sem_seg": T(i["logits%d" % k])}])
    res = ev.evaluate()
    with open(os.path.join(tmp, "out", "sem_seg_predictions.json")) as fh:
        w = json.load(fh)
    return {
        "results": {k: float(v) for k, v in res["sem_seg"].items()},
        "written": [[a["file_name"], a["category_id"], a["segmentation"]["counts"]] for a in w],
    }


@contextlib.contextmanager
def fake_world(size, rank):
    """torch.distributed looks initialised with this world size and rank."""
    import torch.distributed as dist

    if size == 1:
        yield
        return
    saved = {k: getattr(dist, k) for k in ("is_available", "is_initialized", "get_rank", "get_world_size")}
    try:
        dist.is_available = lambda: True
        dist.is_initialized = lambda: True
        dist.get_rank = lambda *a, **k: rank
        dist.get_world_size = lambda *a, **k: size
        yield
    finally:
        for k, v in saved.items():
            setattr(dist, k, v)


@component("samplers")
def samplers(i, tmp, folder):
    """detectron2.data.samplers.<kind>; out: the first 50 indices (all of them for InferenceSampler,
    and its len).  kind "factors": RepeatFactorTrainingSampler.repeat_factors_from_category_frequency.
    World size > 1: torch.distributed reports that size and rank."""
    import torch

    from detectron2.data import samplers as S

    k = i["kind"]
    if k == "factors":
        f = S.RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
        kw = {"sqrt": i["sqrt"]} if "sqrt" in i else {}
        return {"factors": N(f(i["dicts"], i["thresh"], **kw))}
    with fake_world(i["world"], i["rank"]):
        kw = {"shuffle": i["shuffle"]} if "shuffle" in i else {}
        if k == "TrainingSampler":
            s = S.TrainingSampler(i["size"], seed=i["seed"], **kw)
        elif k == "RandomSubsetTrainingSampler":
            s = S.RandomSubsetTrainingSampler(
                i["size"], i["ratio"], seed_shuffle=i["seed"], seed_subset=i["subset_seed"]
            )
        elif k == "RepeatFactorTrainingSampler":
            s = S.RepeatFactorTrainingSampler(torch.tensor(i["factors"]), seed=i["seed"], **kw)
        else:
            s = S.InferenceSampler(i["size"])
            return {"indices": [int(x) for x in s], "len": len(s)}
        return {"indices": [int(x) for x in itertools.islice(iter(s), 50)]}


@component("aspect_ratio_grouping")
def aspect_ratio_grouping(i, tmp, folder):
    """list(detectron2.data.common.AspectRatioGroupedDataset(iterable of {width, height, id},
    batch_size)); wh is [width, height] per item.  out: the ids of each batch, in order; the images
    left over in incomplete groups are not returned."""
    from detectron2.data.common import AspectRatioGroupedDataset

    ds = [dict(width=w, height=h, id=k) for k, (w, h) in enumerate(i["wh"])]
    return {"batches": [[d["id"] for d in b] for b in AspectRatioGroupedDataset(ds, i["batch"])]}


@component("data_loaders")
def data_loaders(i, tmp, folder):
    """detectron2.data.build_detection_train_loader(dataset, mapper=, sampler=TrainingSampler(n,
    seed=seed), total_batch_size=, aspect_ratio_grouping=, num_workers=0) and
    build_detection_test_loader(dataset, mapper=, batch_size=, num_workers=0): the ids per batch.
    Item k of the dataset has width 10 + 7k mod 5, height 12."""
    from detectron2.data import build_detection_test_loader, build_detection_train_loader
    from detectron2.data.samplers import TrainingSampler

    ds = [dict(width=10 + (7 * k) % 5, height=12, id=k) for k in range(i["n"])]
    mp = lambda d: dict(d)
    if i.get("test"):
        dl = build_detection_test_loader(ds, mapper=mp, batch_size=i["batch"], num_workers=0)
        return {"batches": [[d["id"] for d in b] for b in dl], "len": len(dl)}
    dl = build_detection_train_loader(
        ds,
        mapper=mp,
        sampler=TrainingSampler(i["n"], seed=i["seed"]),
        total_batch_size=i["batch"],
        aspect_ratio_grouping=i["grouping"],
        num_workers=0,
    )
    return {"batches": [[d["id"] for d in b] for b in itertools.islice(iter(dl), i["count"])]}


def leaf_types(c, prefix=""):
    out = {}
    for k, v in c.items():
        if hasattr(v, "items"):
            out.update(leaf_types(v, prefix + k + "."))
        else:
            out[prefix + k] = type(v).__name__
    return out


@component("default_config")
def default_config(i, tmp, folder):
    """detectron2.config.get_cfg(): dump() parsed as yaml, and the Python type of every leaf.  The
    same dump is in default_config.yaml."""
    import yaml

    from detectron2.config import get_cfg

    c = get_cfg()
    return {"values": yaml.safe_load(c.dump()), "types": leaf_types(c)}


@component("config_merge")
def config_merge(i, tmp, folder):
    """cfg = get_cfg(); cfg.merge_from_file(load); cfg.merge_from_list(opts), with the files written
    side by side.  out: what differs from the defaults {dotted key: [value, type]}, or the class name
    of the exception.  Then: freeze() and an assignment raises; clone() is independent."""
    from detectron2.config import get_cfg

    for n, s in i["files"].items():
        with open(os.path.join(tmp, n), "w") as f:
            f.write(s)
    c, d = get_cfg(), get_cfg()
    try:
        c.merge_from_file(os.path.join(tmp, i["load"]))
        c.merge_from_list(list(i["opts"]))
    except (KeyError, AssertionError, ValueError) as e:
        return {"error": type(e).__name__}

    def flat(n, p=""):
        o = {}
        for k, v in n.items():
            o.update(flat(v, p + k + ".")) if hasattr(v, "items") else o.__setitem__(p + k, v)
        return o

    a, b = flat(c), flat(d)
    r = {"changed": {k: [v, type(v).__name__] for k, v in a.items() if k not in b or b[k] != v}}
    k = c.clone()
    k.SOLVER.MAX_ITER = 5
    r["clone_independent"] = c.SOLVER.MAX_ITER != 5
    c.freeze()
    try:
        c.SOLVER.MAX_ITER = 6
        r["frozen"] = False
    except AttributeError:
        r["frozen"] = True
    return r


@component("frozen_batchnorm")
def frozen_batchnorm(i, tmp, folder):
    """detectron2.layers.FrozenBatchNorm2d(4): rows of w are weight, bias, running_mean, and
    |row 3| + 0.1 is running_var.  out: the output with and without requires_grad on the input, names
    in state_dict, default running_var, eps; convert_frozen_batchnorm of a BatchNorm2d; and the
    result types of detectron2.layers.get_norm."""
    import torch

    from detectron2.layers import FrozenBatchNorm2d, get_norm

    m = FrozenBatchNorm2d(4)
    r = {
        "default_var": N(m.running_var).copy(),
        "eps": m.eps,
        "state": sorted(m.state_dict()),
        "n_params": len(list(m.parameters())),
    }
    sd = {
        "weight": T(i["w"][0]),
        "bias": T(i["w"][1]),
        "running_mean": T(i["w"][2]),
        "running_var": T(np.abs(i["w"][3]) + 0.1),
    }
    m.load_state_dict(sd)
    x = T(i["x"])
    r["out"] = N(m(x))
    r["out_grad"] = N(m(x.clone().requires_grad_(True)))
    bn = torch.nn.BatchNorm2d(4)
    bn.load_state_dict(dict(sd, num_batches_tracked=torch.tensor(3)))
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), bn)
    f = FrozenBatchNorm2d.convert_frozen_batchnorm(net)
    r["converted_type"] = type(f[1]).__name__
    r["converted_out"] = N(f[1](x))
    r["norms"] = {k: type(get_norm(k, 32)).__name__ for k in ("BN", "FrozenBN", "GN", "SyncBN", "")}
    r["gn_groups"] = get_norm("GN", 64).num_groups
    # an old checkpoint without statistics loads as identity statistics
    m2 = FrozenBatchNorm2d(4)
    m2.load_state_dict({"weight": sd["weight"], "bias": sd["bias"]}, strict=False)
    r["old_ckpt_out"] = N(m2(x))
    return r


@component("instances")
def instances(i, tmp, folder):
    """detectron2.structures.Instances: fields, has/get/set/remove, indexing with bool mask, slice and
    int, cat, len; and the errors: setting a field of another length, reading a missing field,
    indexing out of range, get() of a missing field."""
    import torch

    from detectron2.structures import Boxes, Instances

    x = Instances((40, 50))
    x.b = Boxes(T(i["boxes"]))
    x.s = torch.arange(5).float()
    r = {
        "len": len(x),
        "fields": sorted(x.get_fields()),
        "has": [x.has("s"), x.has("zz")],
        "image_size": list(x.image_size),
    }
    y = x[torch.tensor([True, False, True, False, False])]
    r["mask"] = y.s.tolist()
    r["slice"] = x[1:3].s.tolist()
    r["int"] = [len(x[-1]), x[-1].s.tolist(), list(x[2].b.tensor.shape)]
    z = Instances.cat([x, y])
    r["cat"] = [len(z), z.s.tolist(), list(z.b.tensor.shape), list(z.image_size)]
    x.names = ["a", "b", "c", "d", "e"]
    r["cat_lists"] = Instances.cat([x, x]).names
    x.remove("names")
    r["after_remove"] = sorted(x.get_fields())
    errs = []
    for f in (lambda: x.set("t", torch.zeros(3)), lambda: x.nothing, lambda: x[5], lambda: Instances((1, 1)).get("q")):
        try:
            f()
            errs.append(None)
        except Exception as e:  # noqa
            errs.append(type(e).__name__)
    r["errors"] = errs
    return r
