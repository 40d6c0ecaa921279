"""CPU seconds of a training step with images shared out over tp x cp (balanced) against every rank encoding all.

    python benchmarks/bench_vision_placement.py               # five rounds; some minutes
    python benchmarks/bench_vision_placement.py --rounds 1

Four ranks, tp 2 x cp 2, one thread each, fp32, everything trained, the optimizer's step included; both placements in
one start of the ranks, taking turns. The model has the proportions of MiMo-VL-7B: the linear layers of encoder and
projector are 0.43 of the decoder's for each vision token (there 0.41). Two mixes: packs full of images of lognormal
size, the largest a quarter of a pack; and packs of text with one small image.

What the figures mean: the ranks share this machine's cores, so wall time says nothing. Time is ``time.process_time`` of
each rank, the median over rounds. Summed over ranks it is the work done; the heaviest rank's is what a step would take
at least were each rank alone on its device (waiting and transfer not counted). A GPU's numbers will differ: there the
collectives and the sum over tp weigh otherwise.
The vision phase is the encoder and projector forward and backward on the rank's own images, timed by itself. Imbalance
is its heaviest rank over the mean, both summed over the packs, since ranks wait for each other in every pack; predicted
is the same of the planner's FLOPs.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np
import torch
import torch.distributed as dist
from provenance import write_rows

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import DataConfig, ModuleTraining, ParallelConfig, RunConfig, SourceConfig, TrainConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore.boot import RankAddress, megatron, world
from mimo_megatron.model.local_pack import local_pack
from mimo_megatron.parallel.collectives import gather_objects
from mimo_megatron.train.launch import run_local
from mimo_megatron.train.step import Trainer, build_trainer, train_step
from mimo_megatron.types import EncodedMedia, EncodedSample, PackedBatch

LAYOUT: dict[str, Any] = dict(tp=2, cp=2)
NUM_RANKS = 4
PACK_TOKENS, NUM_PACKS = 1_024, 3
PLACEMENTS = ("replicated", "balanced")
LOSS_TOLERANCE = 1e-5


def model_config() -> ModelConfig:
    """``tiny-vl`` with a decoder of 12 layers of width 256."""
    model = preset("tiny-vl")
    wider = dict(num_layers=12, width=256, num_heads=8, num_kv_heads=4, ffn_width=768)
    return model.model_copy(update={"text": model.text.model_copy(update=wider)})


def recipe(model: ModelConfig, placement: Any) -> RunConfig:
    """Everything trained, in fp32; its data is never opened."""
    nowhere, trained = Path("/nonexistent"), ModuleTraining(lr=1e-4)
    data = DataConfig(
        sources=(SourceConfig(path=nowhere),), tokenizer=nowhere, pack_tokens=PACK_TOKENS, pack_patches=16_384
    )
    train = TrainConfig(
        steps=1, packs_per_step=NUM_PACKS, precision="fp32", vision=trained, projector=trained, text=trained
    )
    parallel = ParallelConfig(**LAYOUT, vision_placement=placement)
    return RunConfig(name="bench", dir=nowhere, model=model, parallel=parallel, data=data, train=train)


def sample(number: int, sides: Sequence[int], num_text: int, draw: np.random.Generator) -> EncodedSample:
    """At most one image, between its marks, then text that is trained."""
    tokens = preset("tiny-vl").tokens
    ids, media = [], []
    if sides:
        height, width = sides
        pixels = draw.integers(0, 256, (4 * height * width, 588), dtype=np.uint8)
        media.append(EncodedMedia("image", pixels, (1, 2 * height, 2 * width), frame_repeats=2))
        ids = [tokens.vision_start, *[tokens.image_pad] * (height * width), tokens.vision_end]
    num_context = len(ids)
    ids += draw.integers(16, 512, num_text).tolist()
    return EncodedSample(f"sample-{number}", np.array(ids), np.arange(len(ids)) > num_context, tuple(media))


def packs_of(mix: str) -> list[list[EncodedSample]]:
    """The packs of a step: full of images (in 28-pixel units), or of text with one image of 6 x 6."""
    draw = np.random.default_rng(3)
    if mix == "one small image a pack":
        return [[sample(pack, (6, 6), PACK_TOKENS - 38, draw)] for pack in range(NUM_PACKS)]
    packs = []
    for _ in range(NUM_PACKS):
        space, some = PACK_TOKENS, []
        while space > 40:
            side = np.sqrt(np.clip(draw.lognormal(np.log(75), 0.8), 4, 256)) * draw.uniform(0.8, 1.25, 2)
            height, width = (max(2, round(one)) for one in side)
            if height * width + 20 <= space:
                some.append(sample(len(some), (height, width), 18, draw))
            space -= height * width + 20
        packs.append(some)
    return packs


def vision_seconds(trainer: Trainer, batch: PackedBatch) -> float:
    """CPU seconds of encoder and projector, forward and backward, on this rank's images of the pack."""
    (chunk,) = trainer.bare_chunks
    local = local_pack(batch, trainer.mesh.cp, sharing=chunk.sharing)
    start = time.process_time()
    if local.vision is not None and local.vision.num_patches:
        features_XD = chunk.encode_own(local.pixels_Y, local.vision)
        features_XD.backward(torch.ones_like(features_XD))
    return time.process_time() - start


def measure(address: RankAddress, mix: str, rounds: int, out: Path) -> None:
    """Rank 0 writes a row for each placement."""
    model = model_config()
    batches = [collate(pack, model, PACK_TOKENS) for pack in packs_of(mix)]
    steps: dict[str, list[float]] = {name: [] for name in PLACEMENTS}
    phases: dict[str, list[list[float]]] = {name: [] for name in PLACEMENTS}
    losses: dict[str, float] = {}
    with megatron(ParallelConfig(**LAYOUT), address) as mesh:
        trainers = {name: build_trainer(recipe(model, name), mesh) for name in PLACEMENTS}
        for turn in range(rounds + 1):  # the first warms up
            for name, trainer in trainers.items():
                dist.barrier()
                start = time.process_time()
                result = train_step(trainer, batches, turn, 1.0)
                seconds = time.process_time() - start
                losses.setdefault(name, result.loss)
                phase = [vision_seconds(trainer, batch) for batch in batches]
                if turn:
                    steps[name].append(seconds)
                    phases[name].append(phase)
        own = {name: (statistics.median(steps[name]), np.median(phases[name], axis=0).tolist()) for name in PLACEMENTS}
        ranks = gather_objects(own, world())
        if address.rank == 0:
            assert abs(losses["replicated"] - losses["balanced"]) < LOSS_TOLERANCE, losses
            torch.save([row(mix, name, ranks, trainers[name], batches) for name in PLACEMENTS], out)


def row(
    mix: str, name: str, ranks: Sequence[dict[str, Any]], trainer: Trainer, batches: Sequence[PackedBatch]
) -> dict[str, Any]:
    by_rank = [rank[name][0] for rank in ranks]
    vision_RP = np.array([rank[name][1] for rank in ranks])
    sharing = trainer.bare_chunks[0].sharing
    grids = [batch.vision.grids_I3 for batch in batches if batch.vision]
    loads_PR = np.array([sharing.predicted_loads(one) if sharing else [1.0] * NUM_RANKS for one in grids])
    patches = sum(batch.num_patches for batch in batches)
    return dict(
        mix=mix,
        placement=name,
        layout="tp2 cp2",
        step_cpu_seconds_all_ranks=sum(by_rank),
        step_cpu_seconds_heaviest_rank=max(by_rank),
        vision_cpu_seconds_by_rank=" ".join(f"{one:.3f}" for one in vision_RP.sum(1)),
        predicted_imbalance=loads_PR.max(1).sum() / loads_PR.mean(1).sum(),
        measured_imbalance=vision_RP.max(0).sum() / vision_RP.mean(0).sum(),
        vision_token_share=patches / 4 / (NUM_PACKS * PACK_TOKENS),
    )


def finished(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the ratios of replicated to balanced, and printed."""
    replicated, _ = rows
    for one in rows:
        for figure in ("step_cpu_seconds_all_ranks", "step_cpu_seconds_heaviest_rank"):
            one[f"replicated_is_times_{figure.removeprefix('step_cpu_seconds_')}"] = replicated[figure] / one[figure]
    # Ratios need the full figures; the table has three decimals.
    table = [{key: f"{value:.3f}" if isinstance(value, float) else value for key, value in one.items()} for one in rows]
    for one in table:
        print(f"{one['mix']}, {one['placement']}:")
        print("".join(f"  {key:42} {value}\n" for key, value in list(one.items())[3:]), end="", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    values = parser.parse_args()
    table = []
    for mix in ("full of images", "one small image a pack"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.pt"
            run_local(measure, NUM_RANKS, mix, values.rounds, out)
            rows = torch.load(out, weights_only=False)
            table += finished(rows)
    path = write_rows(
        "vision-placement",
        table,
        measured=("mimo_megatron", "csrc", "benchmarks/bench_vision_placement.py"),
        packages=("torch", "megatron-core"),
        out=values.out,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
