#!/usr/bin/env python
"""Time and multiply-adds of a masked teacher over those of the whole one.

    python benchmarks/masked_teacher.py
    python benchmarks/masked_teacher.py --classifiers deit_base_patch16_224 --sides 1024 --repeats 3

Classifiers are timm's, on 32 images of 224 pixels; the detector's transformer is ViT-B of ViTDet, on one image, with
patches that are chosen in clusters, as saliency is. Both take turns; time is that of the processor, as medians.
Multiply-adds are those of linear layers, convolutions and attention, counted while the pass runs. A second table has
the time that it takes to choose the patches (saliency and selection) over that of a step: the student's forward and
backward pass, and the teacher's on half of its patches.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.layers import gather_tokens
from d2kd.modeling.teacher_passes.saliency import build_saliency
from d2kd.modeling.teacher_passes.selection import Selection, select
from d2kd.modeling.teacher_passes.sparse_vit import SparseViT
from detectron2.modeling.backbone.vit import ViT

RATIOS = (1.0, 0.75, 0.5, 0.35, 0.25)
VITB = {"embed_dim": 768, "depth": 12, "num_heads": 12, "window_size": 14, "use_rel_pos": True}


class MultiplyAdds:
    """Counts multiply-adds while it is entered."""

    def __init__(self) -> None:
        self.total = 0

    def __enter__(self) -> "MultiplyAdds":
        attention = F.scaled_dot_product_attention
        linear, convolution, einsum = nn.Linear.forward, nn.Conv2d.forward, torch.einsum

        def count_attention(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
            self.total += 2 * q.numel() * k.shape[-2]
            return attention(q, k, v, **options)

        def count_linear(layer: nn.Linear, x: Tensor) -> Tensor:
            self.total += x.numel() * layer.out_features
            return linear(layer, x)

        def count_convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
            out = convolution(layer, x)
            self.total += out.numel() * layer.weight[0].numel()
            return out

        def count_einsum(equation: str, *operands: Tensor) -> Tensor:
            out = einsum(equation, *operands)
            self.total += out.numel() * operands[0].shape[-1]
            return out

        self.patches = [
            mock.patch.object(F, "scaled_dot_product_attention", count_attention),
            mock.patch.object(nn.Linear, "forward", count_linear),
            mock.patch.object(nn.Conv2d, "forward", count_convolution),
            mock.patch.object(torch, "einsum", count_einsum),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        for patch in self.patches:
            patch.stop()


def classifier_calls(name: str, count: int) -> list[Callable[[], object]]:
    """The whole classifier, and masked ones by `RATIOS`."""
    model = timm.create_model(name).eval()
    images = torch.randn(count, 3, 224, 224)
    patches, prefix = model.patch_embed.num_patches, getattr(model, "num_prefix_tokens", 0)

    def masked(ratio: float) -> Callable[[], object]:
        kept = torch.stack([torch.randperm(patches)[: round(ratio * patches)].sort().values for _ in range(count)])

        def call() -> object:
            hook = model.blocks.register_forward_pre_hook(lambda m, args: (gather_tokens(args[0], kept, prefix),))
            with hook:
                return model(images)

        return call

    return [lambda: model(images), *(masked(ratio) for ratio in RATIOS)]


def detector_calls(side: int) -> list[Callable[[], object]]:
    """The whole ViT-B, and sparse ones by `RATIOS`."""
    windows = [i for i in range(12) if i not in (2, 5, 8, 11)]
    vit = ViT(img_size=side, window_block_indexes=windows, **VITB).eval()
    sparse, images, grid = SparseViT(vit), torch.randn(1, 3, side, side), side // 16
    # smooth noise: saliency lies in clusters
    scores = F.interpolate(torch.rand(1, 1, 9, 9), size=(grid, grid), mode="bicubic")[0]
    valid = torch.ones_like(scores, dtype=torch.bool)
    kept = {ratio: select(Selection(keep_ratio=ratio, window_floor=8), scores, valid, window=14) for ratio in RATIOS}
    return [lambda: vit(images), *(lambda k=k: sparse(images, k) for k in kept.values())]  # type: ignore[misc]


@torch.no_grad()
def rows(name: str, calls: list[Callable[[], object]], repeats: int) -> None:
    """Prints a line for each ratio."""
    counts = []
    for call in calls:
        with MultiplyAdds() as counter:
            call()
        counts.append(counter.total)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, spent in zip(calls, times):
            start = time.process_time()
            call()
            spent.append(time.process_time() - start)
    whole = times[0]
    for ratio, count, spent in zip(RATIOS, counts[1:], times[1:]):
        share = statistics.median(a / b for a, b in zip(spent, whole))
        print(f"| {name} | {ratio:g} | {count / 1e9:.2f} | {count / counts[0]:.3f} | {share:.3f} |", flush=True)


def choosing(pair: str, student: nn.Module, images: Tensor, teacher: Callable[[Tensor], object], repeats: int) -> None:
    """Prints what choosing half of the patches costs, over a step of `student`; `teacher` takes those."""
    saliency = build_saliency("attention", student)
    shares = []
    for _ in range(repeats):
        start = time.process_time()
        with saliency.watch() as seen:
            out = student(images)
        forward = time.process_time()
        scores, _ = saliency(seen)
        kept = select(Selection(), scores, torch.ones_like(scores, dtype=torch.bool))
        chosen = time.process_time()
        teacher(kept)
        (out if isinstance(out, Tensor) else out["last_feat"]).square().mean().backward()
        end = time.process_time()
        shares.append((chosen - forward) / (end - start))
    print(f"| {pair} | {100 * statistics.median(shares):.2f} % |", flush=True)


def choices(images: int, side: int, repeats: int) -> None:
    """Prints what choosing costs, for a classifier and a detector."""
    small, base = timm.create_model("deit_small_patch16_224"), timm.create_model("deit_base_patch16_224").eval()
    batch = torch.randn(images, 3, 224, 224)

    @torch.no_grad()
    def classify(kept: Tensor) -> None:
        with base.blocks.register_forward_pre_hook(lambda m, args: (gather_tokens(args[0], kept, 1),)):
            base(batch)

    choosing(f"DeiT-S from DeiT-B, {images} images", small, batch, classify, repeats)
    windows = [i for i in range(12) if i not in (2, 5, 8, 11)]
    student = ViT(img_size=side, window_block_indexes=windows, **{**VITB, "embed_dim": 384, "num_heads": 6})
    sparse, image = (
        SparseViT(ViT(img_size=side, window_block_indexes=windows, **VITB).eval()),
        torch.randn(1, 3, side, side),
    )
    detect = torch.no_grad()(lambda kept: sparse(image, kept))
    choosing(f"ViT-S from ViT-B, {side} px", student, image, detect, repeats)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifiers", nargs="*", default=["deit_small_patch16_224", "deit_base_patch16_224"])
    parser.add_argument("--sides", type=int, nargs="*", default=[512, 1024], help="images of ViT-B, in pixels")
    parser.add_argument("--images", type=int, default=32, help="a batch of classifiers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| teacher | share of patches | GMAC | of the whole | CPU time of the whole |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in args.classifiers:
        rows(name, classifier_calls(name, args.images), args.repeats)
    for side in args.sides:
        rows(f"ViT-B, {side} px", detector_calls(side), args.repeats)
    print("\n| pair | choosing the patches, over a step |\n| --- | ---: |")
    choices(args.images, min(args.sides, default=512), args.repeats)


if __name__ == "__main__":
    main()
