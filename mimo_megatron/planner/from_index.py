"""The packs of a recipe whose sources are indexed: those of its first window, as training will form them."""

import numpy as np

from mimo_megatron.config.pack_cost import cost_by_flops
from mimo_megatron.config.run import RunConfig
from mimo_megatron.data.parts import parts_of, splits_texts
from mimo_megatron.data.plan import Plan
from mimo_megatron.data.source import IndexedSource
from mimo_megatron.planner.packs import Packs, PackShape, image_grid


def packs_of_index(config: RunConfig) -> Packs:
    """The pack with the mean number of patches, and those with the most patches, trained tokens and longest segment.

    The index knows a sample's patches, not its pictures: they are taken for one picture. Nor does it know which tokens
    are trained: all but those of pictures are taken for trained. Both make the need larger, not smaller.
    """
    data, vision = config.data, config.model.vision
    stored = [IndexedSource(one.path, data.split).lengths for one in data.sources]
    lengths = [
        parts_of(one, data.pack_tokens, splits=splits_texts(source, config.model)).lengths
        for one, source in zip(stored, data.sources, strict=True)
    ]
    plan = Plan(
        lengths,
        [one.weight for one in data.sources],
        token_capacity=data.pack_tokens,
        patch_capacity=data.pack_patches,
        window_samples=data.window_samples,
        seed=config.seed,
        cost=data.cost or cost_by_flops(config.model),
    )
    tokens = np.concatenate([one.num_tokens_N for one in lengths])
    patches = np.concatenate([one.num_patches_N for one in lengths])
    merge = vision.spatial_merge_size if vision else 1
    shapes = []
    for number, members in enumerate(plan.window_packs(0, 0)):
        segments = tuple(tokens[members].tolist())
        grids = tuple(image_grid(one, merge) for one in patches[members].tolist() if one)
        merged = int(patches[members].sum()) // (merge * merge) if grids else 0
        shapes.append(PackShape(f"pack {number}", data.pack_tokens, segments, grids, sum(segments) - merged))
    counts = np.array([shape.num_patches for shape in shapes])
    fill = np.mean([shape.num_tokens for shape in shapes]) / data.pack_tokens
    typical = shapes[int(np.abs(counts - counts.mean()).argmin())]
    worst = {
        max(shapes, key=lambda one: one.num_patches),
        max(shapes, key=lambda one: one.num_rows),
        max(shapes, key=lambda one: max(one.segments)),
    }
    return Packs(
        typical,
        tuple(sorted(worst, key=lambda one: one.name)),
        (
            f"from the index: {len(shapes):,} packs of the first window, {fill:.1%} full; patches a pack: mean "
            f"{counts.mean():,.0f}, median {np.median(counts):,.0f}, 95 % below {np.quantile(counts, 0.95):,.0f}, most "
            f"{counts.max():,}",
            "time is that of the pack with the mean number of patches, memory of the worst; each sample's patches are "
            "taken for one picture, all tokens but those of pictures for trained",
        ),
    )
