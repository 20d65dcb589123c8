"""Recorded models: builds each through the name `detectron2`, loads the recorded weights strictly, runs it and compares.

Tolerance: |got - want| <= atol + rtol*|want|, atol = rtol = 1e-4, except
  loss*      rtol 1e-4, atol 1e-7        grad_norm  rtol 1e-3, atol 1e-6
  bool masks at most 0.2 % of the pixels of a mask may differ (threshold ties)
Detections are matched by class + box + score, so an order change between two equal scores is no failure; the scores must be
in descending order all the same.
"""

import importlib
import json
import os
import traceback
import warnings

import numpy as np

warnings.filterwarnings("ignore")
RTOL = ATOL = 1e-4


# --------------------------------------------------------------------------- #
# small helpers
# --------------------------------------------------------------------------- #
def locate(path):
    """'pkg.mod.Class.attr' -> object."""
    parts = path.split(".")
    for n in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:n])
        try:
            obj = importlib.import_module(name)
        except ModuleNotFoundError as e:
            if e.name and (name == e.name or name.startswith(e.name + ".")):
                continue
            raise
        for p in parts[n:]:
            obj = getattr(obj, p)
        return obj
    raise ImportError(path)


def build_from_spec(spec):
    """Build an object from a JSON spec.

    {"_target_": "a.b.C", "_args_": [...], key: value}   -> C(*args, key=value)
    {"_partial_": "a.b.C", key: value}                   -> functools.partial(C, key=value)
    {"_ref_": "a.b.C"}                                   -> the object itself
    {"_tuple_": [...]}                                   -> tuple
    {"_call_": "a.b.C.method", "_star_": true, ...}      -> result of the call
    """
    import functools

    if isinstance(spec, list):
        return [build_from_spec(x) for x in spec]
    if isinstance(spec, dict):
        if "_tuple_" in spec:
            return tuple(build_from_spec(x) for x in spec["_tuple_"])
        if "_ref_" in spec:
            return locate(spec["_ref_"])
        kw = {k: build_from_spec(v) for k, v in spec.items() if k not in ("_target_", "_args_", "_partial_")}
        if "_partial_" in spec:
            return functools.partial(locate(spec["_partial_"]), **kw)
        if "_target_" in spec:
            return locate(spec["_target_"])(*build_from_spec(spec.get("_args_", [])), **kw)
        return kw
    return spec


def load_npz(path):
    with np.load(path, allow_pickle=False) as z:
        return {k: z[k] for k in z.files}


def read_json(path):
    with open(path) as f:
        return json.load(f)


# --------------------------------------------------------------------------- #
# comparing
# --------------------------------------------------------------------------- #
class Report:
    """Collects per-key comparisons of one fixture."""

    def __init__(self):
        self.checked = 0
        self.bad = []  # (key, message)
        self.worst = 0.0  # worst |diff| / tolerance
        self.worst_key = "-"
        self.worst_abs = 0.0
        self.stages = []  # names of stages that raised
        self.slack = 1.0  # multiplies every tolerance (the generator uses it)

    def fail(self, key, msg):
        self.bad.append((key, msg))

    def stage_error(self, name, exc):
        self.stages.append(name)
        last = traceback.extract_tb(exc.__traceback__)[-1]
        self.bad.append(
            (
                name,
                "%s: %s (at %s:%d)"
                % (
                    type(exc).__name__,
                    str(exc).split("\n")[0][:160],
                    os.path.basename(last.filename),
                    last.lineno,
                ),
            )
        )

    def close(self, key, got, want, rtol=RTOL, atol=ATOL):
        self.checked += 1
        got = np.asarray(got)
        want = np.asarray(want)
        if got.shape != want.shape:
            return self.fail(key, "shape %s, expected %s" % (got.shape, want.shape))
        if want.size == 0:
            return
        if want.dtype == np.bool_:
            if got.dtype != np.bool_:
                return self.fail(key, "dtype %s, expected bool" % got.dtype)
            frac = float((got != want).mean())
            self._note(key, frac / 2e-3, frac)
            if frac > 2e-3 * self.slack:
                self.fail(key, "%.3f%% of the pixels differ" % (100 * frac))
            return
        if want.dtype.kind in "iu":
            if not np.array_equal(got, want):
                n = int((got != want).sum())
                self._note(key, 1e9, float(n))
                self.fail(key, "%d of %d integers differ" % (n, want.size))
            return
        if want.dtype.kind in "US":
            if not np.array_equal(got.astype(str), want.astype(str)):
                self.fail(key, "strings differ")
            return
        got = got.astype(np.float64)
        want = want.astype(np.float64)
        same_nan = np.isnan(got) == np.isnan(want)
        same_inf = np.isinf(got) == np.isinf(want)
        if not (same_nan.all() and same_inf.all()):
            return self.fail(key, "NaN/Inf in different places")
        fin = np.isfinite(want)
        if not np.array_equal(got[np.isinf(want)], want[np.isinf(want)]):
            return self.fail(key, "Inf of another sign")
        if not fin.any():
            return
        d = np.abs(got[fin] - want[fin])
        ratio = float((d / (atol + rtol * np.abs(want[fin]))).max())
        self._note(key, ratio, float(d.max()))
        if ratio > self.slack:
            self.fail(key, "max abs error %.3g (%.1f x tolerance)" % (d.max(), ratio))

    def _note(self, key, ratio, absolute):
        if ratio > self.worst:
            self.worst, self.worst_key, self.worst_abs = ratio, key, absolute

    def same(self, key, got, want):
        self.checked += 1
        if got != want:
            self.fail(key, "%.120r, expected %.120r" % (got, want))


def match_detections(rep, prefix, got, want):
    """got/want: dicts with boxes, scores, classes and maybe masks / mask_probs."""
    n = len(want["scores"])
    if len(got["scores"]) != n:
        return rep.fail(prefix, "%d detections, expected %d" % (len(got["scores"]), n))
    rep.checked += 1
    if n == 0:
        return
    if (np.diff(got["scores"]) > 1e-6 * rep.slack).any():
        rep.fail(prefix + "/scores", "not in descending order")
    free = list(range(n))
    order = []
    for i in range(n):
        best, best_d = None, None
        for j in free:
            if got["classes"][j] != want["classes"][i]:
                continue
            d = abs(float(got["scores"][j]) - float(want["scores"][i])) + 1e-3 * float(
                np.abs(got["boxes"][j] - want["boxes"][i]).max()
            )
            if best is None or d < best_d:
                best, best_d = j, d
        if best is None:
            return rep.fail(prefix, "no detection of class %d left to match" % want["classes"][i])
        free.remove(best)
        order.append(best)
    order = np.asarray(order)
    # boxes are in pixels, O(100): the usual tolerance with atol in pixels
    rep.close(prefix + "/boxes", got["boxes"][order], want["boxes"], atol=1e-3)
    rep.close(prefix + "/scores", got["scores"][order], want["scores"])
    for f in ("masks", "mask_probs"):
        if f in want:
            if f not in got:
                rep.fail(prefix + "/" + f, "missing")
                continue
            if want[f].dtype == np.bool_:
                for i in range(n):
                    rep.close("%s/%s[%d]" % (prefix, f, i), got[f][order[i]], want[f][i])
            else:
                rep.close(prefix + "/" + f, got[f][order], want[f])


# --------------------------------------------------------------------------- #
# building
# --------------------------------------------------------------------------- #
def load_cfg(folder):
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(os.path.join(folder, "config.yaml"))
    return cfg


def build_fixture_model(folder, meta):
    kind = meta["build"]
    if kind == "cfg_model":
        from detectron2.modeling import build_model

        return build_model(load_cfg(folder))
    if kind == "cfg_backbone":
        from detectron2.modeling import build_backbone

        return build_backbone(load_cfg(folder))
    if kind == "spec":
        return build_from_spec(read_json(os.path.join(folder, "model.json")))
    raise ValueError(kind)


def param_table(model):
    """name -> [shape, 'train' | 'frozen' | 'buffer'] for everything in state_dict()."""
    params = dict(model.named_parameters())
    out = {}
    for k, v in model.state_dict().items():
        kind = "buffer"
        if k in params:
            kind = "train" if params[k].requires_grad else "frozen"
        out[k] = [list(v.shape), kind]
    return out


# --------------------------------------------------------------------------- #
# inputs
# --------------------------------------------------------------------------- #
def make_batch(inp, meta, train):
    """inputs.npz -> list[dict] in the standard Detectron2 model input format."""
    import torch

    from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

    batch = []
    for i in range(int(inp["num_images"])):
        img = inp["image%d" % i]
        d = {
            "image": torch.as_tensor(np.ascontiguousarray(img.transpose(2, 0, 1))),
            "height": int(inp["out_size%d" % i][0]),
            "width": int(inp["out_size%d" % i][1]),
            "file_name": "image%d.png" % i,
            "image_id": i,
        }
        if train and "gt_boxes%d" % i in inp:
            inst = Instances(tuple(int(x) for x in img.shape[:2]))
            inst.gt_boxes = Boxes(torch.as_tensor(inp["gt_boxes%d" % i]))
            inst.gt_classes = torch.as_tensor(inp["gt_classes%d" % i])
            if meta.get("masks") == "polygon":
                polys = []
                for j in range(len(inst)):
                    polys.append([])
                    k = 0
                    while "gt_poly%d_%d_%d" % (i, j, k) in inp:
                        polys[-1].append(inp["gt_poly%d_%d_%d" % (i, j, k)])
                        k += 1
                inst.gt_masks = PolygonMasks(polys)
            elif meta.get("masks") == "bitmask":
                inst.gt_masks = BitMasks(torch.as_tensor(inp["gt_masks%d" % i]))
            d["instances"] = inst
        if train and "sem_seg%d" % i in inp:
            d["sem_seg"] = torch.as_tensor(inp["sem_seg%d" % i].astype("int64"))
        batch.append(d)
    return batch


def get_features(model, x):
    return {k: v for k, v in model(x).items()}


def subsample(name, arr, meta):
    step = int(meta.get("feature_channel_step", 1))
    return arr[:, ::step]


# --------------------------------------------------------------------------- #
# stages: each returns a flat dict of arrays (these define expected.npz)
# --------------------------------------------------------------------------- #
def stage_train(model, inp, meta):
    import torch

    from detectron2.utils.events import EventStorage

    out = {}
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    with EventStorage(0) as storage:
        losses = model(make_batch(inp, meta, True))
    stage_train.events = {k: float(v[0]) for k, v in storage.latest().items()}
    for k, v in losses.items():
        out["loss/" + k] = v.detach().numpy().astype("float64")
    sum(losses.values()).backward()
    names, norms = [], []
    for n, p in model.named_parameters():
        if p.requires_grad:
            names.append(n)
            norms.append(-1.0 if p.grad is None else float(p.grad.double().norm()))
    out["grad_names"] = np.array(names)
    out["grad_norms"] = np.array(norms)
    model.zero_grad()
    # a second iteration with the same weights: shows what is kept between iterations
    torch.manual_seed(0)
    with torch.no_grad(), EventStorage(1):
        losses = model(make_batch(inp, meta, True))
    for k, v in losses.items():
        out["loss_second_iter/" + k] = v.detach().numpy().astype("float64")
    return out


def preprocess(model, batch):
    if hasattr(model, "preprocess_image"):
        return model.preprocess_image(batch)
    # SemanticSegmentor has no such method in Detectron2
    from detectron2.structures import ImageList

    return ImageList.from_tensors(
        [(x["image"] - model.pixel_mean) / model.pixel_std for x in batch],
        model.backbone.size_divisibility,
        padding_constraints=model.backbone.padding_constraints,
    )


def stage_features(model, inp, meta):
    import torch

    out = {}
    model.eval()
    with torch.no_grad():
        images = preprocess(model, make_batch(inp, meta, False))
        out["preprocessed/shape"] = np.array(images.tensor.shape)
        out["preprocessed/image_sizes"] = np.array([list(map(int, s)) for s in images.image_sizes])
        out["preprocessed/every_8th_pixel"] = images.tensor[:, :, ::8, ::8].numpy()
        feats = model.backbone(images.tensor)
        for k, v in feats.items():
            out["feat/" + k] = subsample(k, v.numpy(), meta)
        if hasattr(model.backbone, "bottom_up"):
            for k, v in model.backbone.bottom_up(images.tensor).items():
                if k in meta.get("bottom_up", ()):
                    out["bottom_up/" + k] = subsample(k, v.numpy(), meta)
    return out


def stage_head(model, inp, meta):
    """Raw outputs of the one-stage head, or the proposals of the RPN."""
    import torch

    out = {}
    model.eval()
    with torch.no_grad():
        images = preprocess(model, make_batch(inp, meta, False))
        feats = model.backbone(images.tensor)
        if meta["head"] == "dense":
            preds = model.head([feats[f] for f in model.head_in_features])
            for name, levels in zip(meta["head_outputs"], preds):
                for lvl, v in zip(model.head_in_features, levels):
                    if lvl in meta["head_levels"]:
                        out["head/%s/%s" % (name, lvl)] = v.numpy()
        elif meta["head"] == "rpn":
            props, _ = model.proposal_generator(images, feats, None)
            for i, p in enumerate(props):
                out["proposals%d/boxes" % i] = p.proposal_boxes.tensor.numpy()
                out["proposals%d/logits" % i] = p.objectness_logits.numpy()
    return out


def instances_to_arrays(inst):
    out = {
        "boxes": inst.pred_boxes.tensor.numpy(),
        "scores": inst.scores.numpy(),
        "classes": inst.pred_classes.numpy().astype("int64"),
    }
    if inst.has("pred_masks"):
        m = inst.pred_masks
        out["masks"] = np.asarray(m.tensor if hasattr(m, "tensor") else m)
    return out


def stage_inference(model, inp, meta):
    import torch

    out = {}
    model.eval()
    with torch.no_grad():
        res = model(make_batch(inp, meta, False))
        for i, r in enumerate(res):
            if "instances" in r:
                for k, v in instances_to_arrays(r["instances"]).items():
                    out["inst%d/%s" % (i, k)] = v
                out["inst%d/image_size" % i] = np.array([int(x) for x in r["instances"].image_size])
            if "sem_seg" in r:
                out["sem_seg%d" % i] = r["sem_seg"].numpy()
            if "panoptic_seg" in r:
                seg, info = r["panoptic_seg"]
                out["panoptic%d/seg" % i] = seg.numpy().astype("int64")
                out["panoptic%d/info" % i] = np.array(
                    json.dumps([[int(s["id"]), bool(s["isthing"]), int(s["category_id"])] for s in info])
                )
        if meta.get("masks"):
            # the soft 28x28 masks before pasting, from GeneralizedRCNN.inference(do_postprocess=False)
            raw = model.inference(make_batch(inp, meta, False), do_postprocess=False)
            if isinstance(raw, list) and hasattr(raw[0], "pred_masks"):
                for i, r in enumerate(raw):
                    out["raw%d/boxes" % i] = r.pred_boxes.tensor.numpy()
                    out["raw%d/scores" % i] = r.scores.numpy()
                    out["raw%d/classes" % i] = r.pred_classes.numpy().astype("int64")
                    out["raw%d/mask_probs" % i] = r.pred_masks.numpy()
    return out


def stage_forward(model, inp, meta):
    """Bare backbone: dict of features for each of the input tensors."""
    import torch

    out = {}
    model.eval()
    with torch.no_grad():
        for key in sorted(k for k in inp if k.startswith("input")):
            for k, v in model(torch.as_tensor(inp[key])).items():
                out["feat_%s/%s" % (key, k)] = subsample(k, v.numpy(), meta)
    shapes = model.output_shape()
    out["output_shape"] = np.array(json.dumps({k: [int(s.channels), int(s.stride)] for k, s in sorted(shapes.items())}))
    out["size_divisibility"] = np.array(int(model.size_divisibility))
    return out


STAGES = {
    "train": stage_train,
    "features": stage_features,
    "head": stage_head,
    "inference": stage_inference,
    "forward": stage_forward,
}


def stages_of(meta):
    return list(meta["stages"])


# --------------------------------------------------------------------------- #
# comparing a stage
# --------------------------------------------------------------------------- #
def compare(rep, got, want):
    """got, want: flat dicts.  Only keys of `want` are looked at."""
    groups = {}
    for k in want:
        head = k.split("/")[0]
        if head.startswith("inst") or head.startswith("raw") or head.startswith("proposals"):
            groups.setdefault(head, []).append(k)
            continue
        if k not in got:
            rep.fail(k, "missing")
            continue
        if k == "grad_names":
            rep.same(k, sorted(map(str, got[k])), sorted(map(str, want[k])))
        elif k == "grad_norms":
            g = dict(zip(map(str, got["grad_names"]), got[k]))
            for n, v in zip(map(str, want["grad_names"]), want[k]):
                if n in g:
                    rep.close("grad_norm/" + n, g[n], v, rtol=1e-3, atol=1e-6)
        elif k.startswith("loss"):
            rep.close(k, got[k], want[k], rtol=1e-4, atol=1e-7)
        elif k.startswith("panoptic") and k.endswith("/seg"):
            same = got[k].shape == want[k].shape
            frac = float((got[k] != want[k]).mean()) if same else 1.0
            rep.checked += 1
            if frac > 5e-3:
                rep.fail(k, "%.2f%% of the pixels differ" % (100 * frac))
        else:
            rep.close(k, got[k], want[k])
    for head, keys in groups.items():
        w = {k.split("/", 1)[1]: want[k] for k in keys}
        g = {k.split("/", 1)[1]: got[k] for k in got if k.split("/")[0] == head}
        miss = [k for k in w if k not in g]
        if miss:
            rep.fail(head, "missing " + ",".join(miss))
            continue
        if head.startswith("proposals"):
            w = {"boxes": w["boxes"], "scores": w["logits"], "classes": np.zeros(len(w["logits"]), int)}
            g = {"boxes": g["boxes"], "scores": g["logits"], "classes": np.zeros(len(g["logits"]), int)}
        if "image_size" in w:
            rep.close(head + "/image_size", g.pop("image_size"), w.pop("image_size"))
        match_detections(rep, head, g, w)


def run_fixture(folder, rep):
    import torch

    meta = read_json(os.path.join(folder, "fixture.json"))
    torch.manual_seed(0)
    try:
        model = build_fixture_model(folder, meta)
    except Exception as e:  # noqa
        return rep.stage_error("build", e)
    try:
        want_params = read_json(os.path.join(folder, "params.json"))
        got_params = param_table(model)
        rep.checked += len(want_params)
        for k in sorted(set(want_params) - set(got_params)):
            rep.fail("params", "missing " + k)
        for k in sorted(set(got_params) - set(want_params)):
            rep.fail("params", "unexpected " + k)
        for k in sorted(set(got_params) & set(want_params)):
            if got_params[k] != want_params[k]:
                rep.fail("params", "%s is %s, expected %s" % (k, got_params[k], want_params[k]))
    except Exception as e:  # noqa
        rep.stage_error("params", e)
    try:
        sd = torch.load(os.path.join(folder, "weights.pth"), map_location="cpu", weights_only=True)
        model.load_state_dict(sd, strict=True)
    except Exception as e:  # noqa
        return rep.stage_error("load", e)
    inp = load_npz(os.path.join(folder, "inputs.npz"))
    exp = load_npz(os.path.join(folder, "expected.npz"))
    for stage in stages_of(meta):
        want = {k: v for k, v in exp.items() if stage_of_key(k) == stage}
        try:
            got = STAGES[stage](model, inp, meta)
        except Exception as e:  # noqa
            rep.stage_error(stage, e)
            continue
        try:
            compare(rep, got, want)
        except Exception as e:  # noqa
            rep.stage_error(stage + "(compare)", e)


def stage_of_key(k):
    head = k.split("/")[0]
    if head in ("loss", "loss_second_iter", "grad_names", "grad_norms"):
        return "train"
    if head in ("preprocessed", "feat", "bottom_up"):
        return "features"
    if head == "head" or head.startswith("proposals"):
        return "head"
    if head.startswith("feat_input") or head in ("output_shape", "size_divisibility"):
        return "forward"
    return "inference"
