"""A vision transformer on kept patches against recorded values, the whole network, and hidden keys."""

from functools import partial

import pytest
import torch
from helpers import assert_recorded
from torch import nn

from d2kd.errors import ConfigError
from d2kd.modeling.teacher_passes.sparse_vit import MAX_GROUPS, SparseViT, _cuts, group_windows
from detectron2.modeling.backbone.vit import ViT


def network(**changes):
    """A small transformer with windows of 3 patches, with relative positions that are not zero."""
    torch.manual_seed(1)
    norm = partial(nn.LayerNorm, eps=1e-6)
    settings = {
        "img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "window_size": 3,
        "window_block_indexes": (0, 2), "use_rel_pos": True, "rel_pos_zero_init": False, "norm_layer": norm,
        "pretrain_img_size": 20,
    }  # fmt: skip
    return ViT(**{**settings, **changes}).eval()


def recorded_network(recorded):
    """The recorded transformer, with its weights."""
    grid, patch = [int(x) for x in recorded["grid"]], int(recorded["patch"])
    made = network(
        img_size=max(grid) * patch,
        patch_size=patch,
        embed_dim=recorded["dense_last_feat"].shape[1],
        num_heads=int(recorded["heads"]),
        window_size=int(recorded["window"]),
        window_block_indexes=tuple(i for i, kind in enumerate(recorded["pattern"]) if kind == "w"),
        pretrain_img_size=int(recorded["pretrain_grid"]) * patch,
    )
    weights = {key.removeprefix("w."): value for key, value in recorded.items() if key.startswith("w.")}
    for name, value in weights.items():  # tables of global blocks are recorded at the grid's own size
        owner, _, own = name.rpartition(".")
        if made.get_parameter(name).shape != value.shape:
            setattr(made.get_submodule(owner), own, nn.Parameter(value))
    made.load_state_dict(weights, strict=True)
    return made


def test_recorded_features_of_kept_patches(golden):
    recorded = golden("maskedkd_vitdet_oracle")
    made, grid = recorded_network(recorded), [int(x) for x in recorded["grid"]]
    with torch.no_grad():
        dense = made(recorded["image"])["last_feat"]
        sparse = SparseViT(made)
        found = sparse(recorded["image"], recorded["kept_sorted"].long())
        everything = torch.arange(grid[0] * grid[1]).expand(len(dense), -1)
        whole = sparse(recorded["image"], everything)
    assert sparse.grid(recorded["image"]) == tuple(grid)
    assert_recorded(dense, recorded["dense_last_feat"])
    assert (found - recorded["kept_features"]).abs().max() < 1e-4
    assert (whole.transpose(1, 2).view_as(dense) - dense).abs().max() < 1e-4


def hidden(made, images, kept):
    """The dense network with all patches but the kept ones hidden as keys in every block, literally."""
    grid = (images.shape[-2] // 4, images.shape[-1] // 4)
    outside = torch.ones(len(images), grid[0] * grid[1], dtype=torch.bool).scatter_(1, kept, False)
    result = []
    for image, hide in zip(images, outside):  # one by one: plain loops over windows and tokens
        result.append(_hidden_one(made, image[None], hide.view(grid)))
    return torch.stack([r.flatten(0, 1)[k] for r, k in zip(result, kept)])


def _hidden_one(made, image, hide):
    from detectron2.modeling.backbone.utils import get_abs_pos

    x = made.patch_embed(image)
    x = (x + get_abs_pos(made.pos_embed, True, x.shape[1:3]))[0]
    height, width, _ = x.shape
    for block in made.blocks:
        normed, size = block.norm1(x), block.window_size or max(height, width)
        out = torch.zeros_like(x)
        for top in range(0, height, size):
            for left in range(0, width, size):
                tall = size if block.window_size else height
                wide = size if block.window_size else width
                tokens, seen = {}, []
                for r in range(tall):
                    for c in range(wide):
                        y, z = top + r, left + c
                        inside = y < height and z < width
                        tokens[r, c] = block.attn.qkv(normed[y, z] if inside else torch.zeros_like(x[0, 0]))
                        if not inside or not hide[y, z]:
                            seen.append((r, c))
                for r in range(tall):
                    for c in range(wide):
                        if top + r < height and left + c < width and seen:
                            out[top + r, left + c] = _one_query(block.attn, tokens, seen, r, c, tall, wide)
        x = x + out
        x = x + block.mlp(block.norm2(x))
    return x


def _one_query(attention, tokens, seen, r, c, tall, wide):
    from detectron2.modeling.backbone.utils import get_rel_pos

    heads = attention.num_heads
    rows, columns = get_rel_pos(tall, tall, attention.rel_pos_h), get_rel_pos(wide, wide, attention.rel_pos_w)
    q = tokens[r, c].view(3, heads, -1)[0]
    k, v = (torch.stack([tokens[s].view(3, heads, -1)[i] for s in seen], dim=1) for i in (1, 2))
    logits = (q[:, None] * k).sum(-1) / q.shape[1] ** 0.5
    for j, (y, z) in enumerate(seen):
        logits[:, j] += q @ rows[r, y] + q @ columns[c, z]
    return attention.proj((logits.softmax(-1)[..., None] * v).sum(1).flatten())


@pytest.mark.parametrize("size", [(28, 32), (24, 24), (20, 44)])
@pytest.mark.parametrize("keep", [1, 5, 17])
@torch.no_grad()
def test_dropped_patches_are_hidden_and_nothing_else_changes(size, keep):
    made = network(depth=2, window_block_indexes=(0,))
    images = torch.randn(2, 3, *size)
    patches = size[0] * size[1] // 16
    kept = torch.stack([torch.randperm(patches)[:keep].sort().values for _ in range(2)])
    assert torch.allclose(SparseViT(made)(images, kept), hidden(made, images, kept), atol=1e-4)


@pytest.mark.parametrize("relative", [True, False])
@torch.no_grad()
def test_all_patches_give_the_whole_network(relative):
    made = network(use_rel_pos=relative)
    images = torch.randn(3, 3, 40, 28)
    dense = made(images)["last_feat"]
    kept = torch.arange(70).expand(3, -1)
    assert torch.allclose(SparseViT(made)(images, kept).transpose(1, 2).view_as(dense), dense, atol=1e-4)


def test_windows_are_grouped_by_occupancy_and_no_patch_is_lost():
    torch.manual_seed(0)
    kept = torch.stack([torch.randperm(20 * 30)[:200].sort().values for _ in range(3)])
    groups = group_windows(torch.stack([kept // 30, kept % 30], dim=-1), (20, 30), 7)
    assert len(groups) <= MAX_GROUPS + 2
    found = torch.cat([group.places[group.filled] for group in groups])
    assert sorted(found.tolist()) == list(range(600))
    places = sum(group.places.numel() for group in groups)
    windows = sum(len(group.places) for group in groups)
    assert places < windows * max(group.places.shape[1] for group in groups)


def test_cuts_waste_the_least():
    assert _cuts([1, 1, 1, 10], 2) == [(0, 3), (3, 4)]
    assert _cuts([1, 2, 3, 4, 5], 9) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert _cuts([3, 3, 3], 4) == [(0, 3)] and _cuts([2], 1) == [(0, 1)]


def test_convolutional_blocks_need_whole_maps():
    with pytest.raises(ConfigError, match=r"RESIDUAL_BLOCK_INDEXES"):
        SparseViT(network(residual_block_indexes=(1,)))
