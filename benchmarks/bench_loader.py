"""The training loader: what it costs the trainer, what a hash costs a read, how long steps wait, and its memory.

    python benchmarks/bench_loader.py                      # about ten minutes on one idle core
    python benchmarks/bench_loader.py --only cost hash     # or parts, stall, memory

All on the data of the README's first run (``examples/recipes/tiny/first.yaml``), built in a temporary folder; the hash
on a JPEG of two megapixels.

* ``cost``: CPU seconds of the trainer's process for each pack, made by its thread or by workers.
* ``hash``: CPU seconds of reading, decoding and cutting a picture into patches, with its SHA-256 compared or not.
* ``parts``: pictures decoded and CPU seconds of making packs on each rank of one pack, where all decode all, and where
  each decodes what it encodes. 24 such JPEGs, eight in a pack; medians of three rounds.
* ``stall``: a training run of one rank; the share of its steps' time that it waited for packs, first step apart.
* ``memory``: 100,000 samples by eight workers. Memory of all processes together, ten times on the way (PSS: each shared
  page is counted once).
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np
import torch
from PIL import Image
from provenance import ROOT, write_rows

from examples.quickstart.build_data import build
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import DataConfig, ReadConfig, RunConfig, SourceConfig, VideoConfig
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.encode import encode_media
from mimo_megatron.data.index import build_index
from mimo_megatron.data.loader import PackLoader
from mimo_megatron.data.making import make_pack
from mimo_megatron.data.media_part import ALL_MEDIA, NO_MEDIA, MediaPart
from mimo_megatron.data.plan import Position
from mimo_megatron.data.pool import WorkerPool
from mimo_megatron.data.shards import ShardSample, write_shards
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.mcore.boot import RankAddress
from mimo_megatron.train.loop import pretrain
from mimo_megatron.types import MediaRef, RawSample

RECIPE = ROOT / "examples" / "recipes" / "tiny" / "first.yaml"
MEMORY_SAMPLES, MEMORY_WORKERS = 100_000, 8
STALL_STEPS = 60
Row = dict[str, Any]


def recipe(folder: Path, **data: Any) -> RunConfig:
    """The first recipe on one rank, with its data in ``folder``."""
    config = load_recipe(RECIPE, ["parallel={}", f"dir={folder}/run", f"train.steps={STALL_STEPS}"])
    sources = tuple(one.model_copy(update={"path": folder / one.path}) for one in config.data.sources)
    changed = config.data.model_copy(update={"sources": sources, "tokenizer": folder / config.data.tokenizer, **data})
    parallel = config.parallel.model_copy(update={"tp": 1, "pp": 1, "sequence_parallel": False})
    return config.model_copy(update={"data": changed, "parallel": parallel})


def build_data(folder: Path) -> None:
    build(folder / "demo" / "first", seed=1, scale=0.02, sources=["caption_tile", "text"])
    config = recipe(folder)
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.tokens, config.model.text.vocab_size)
    for source in config.data.sources:
        build_index(source.path, tokenizer, config.model, config.data)


def cost(folder: Path) -> Iterator[Row]:
    for workers in (0, 1, 2):
        config = recipe(folder, workers=workers)
        loader = PackLoader(config.data, config.model, packs_per_step=4, seed=1)
        loader.steps_to_come = 100
        for _ in range(10):
            loader.next_step()
        began, wall = time.process_time(), time.perf_counter()
        num_samples = sum(len(pack.sample_ids) for _ in range(90) for pack in loader.next_step())
        seconds, passed = time.process_time() - began, time.perf_counter() - wall
        loader.close()
        yield row("cost", workers, "trainer's CPU ms a pack", 1e3 * seconds / 360)
        yield row("cost", workers, "samples a second (wall)", num_samples / passed)


def photo(seed: int) -> bytes:
    """A photograph is imitated by smooth noise with grain: a JPEG of it has about the bytes of one."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((1600, 1200))
    pixels = np.clip(np.asarray(coarse) + draw.normal(0, 6, (1200, 1600, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def hash_of_reads(folder: Path) -> Iterator[Row]:
    content = photo(1)
    path = folder / "photo.jpg"
    path.write_bytes(content)
    ref = MediaRef("image", str(path), 0, len(content), hashlib.sha256(content).hexdigest())
    raw, model = RawSample("photo", "", (), (ref,)), preset("mimo-vl-7b")
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(7):
        for verify, times in found.items():
            data = DataConfig(
                tokenizer=folder,
                pack_tokens=32_768,
                pack_patches=131_072,
                read=ReadConfig(verify=verify),
                video=VideoConfig(),
            )
            began = time.process_time()
            encode_media(raw, model, data)
            times.append(time.process_time() - began)
    with_hash, without = (statistics.median(found[verify]) for verify in (True, False))
    yield row("hash", 0, f"CPU ms of a picture of {len(content):,} bytes, unverified", 1e3 * without)
    yield row("hash", 0, "the same, verified", 1e3 * with_hash)
    began = time.process_time()
    for _ in range(200):
        hashlib.sha256(content).hexdigest()
    yield row("hash", 0, "of it SHA-256", 1e3 * (time.process_time() - began) / 200)


def parts(folder: Path) -> Iterator[Row]:
    def sample(number: int) -> ShardSample:
        question = {"role": "user", "content": [{"type": "image", "image": "photo.jpg"}]}
        record = {"messages": [question, {"role": "assistant", "content": "a photo"}]}
        return ShardSample(f"{number}", record, {"photo.jpg": photo(number)})

    source = SourceConfig(path=folder / "photos")
    limits = {"max_pixels": 1_003_520, "pack_tokens": 10_496, "pack_patches": 41_000}
    config = recipe(folder)
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": (source,), **limits})})
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.tokens, config.model.text.vocab_size)
    write_shards(map(sample, range(24)), source.path, 24)
    build_index(source.path, tokenizer, config.model, config.data)
    ranks_of = {
        "all decode all": [ALL_MEDIA],
        "an inner stage": [NO_MEDIA],
        "balanced over 2": [MediaPart(rank, 2) for rank in range(2)],
        "balanced over 8": [MediaPart(rank, 8) for rank in range(8)],
    }
    packs, _ = Corpus(config.data, config.model).plan(1).take(Position(0, 0), 3)
    assert sum(map(len, packs)) == 24
    corpora = {part: Corpus(config.data, config.model, part) for ranks in ranks_of.values() for part in ranks}
    num_decoded: dict[MediaPart, int] = {}
    seconds: dict[MediaPart, list[float]] = {part: [] for part in corpora}
    for _ in range(3):
        for part, corpus in corpora.items():
            began = time.process_time()
            batches = [make_pack(corpus, pack.tolist(), {}, lambda place: None).batch for pack in packs]
            seconds[part].append(time.process_time() - began)
            held = [range(8) if batch.pieces_held is None else batch.pieces_held for batch in batches]
            num_decoded[part] = sum(map(len, held))
    for name, ranks in ranks_of.items():
        times = [1e3 * statistics.median(seconds[part]) / len(packs) for part in ranks]
        yield row(
            "parts", 0, f"{name}: pictures of 24 decoded, heaviest rank", max(num_decoded[part] for part in ranks)
        )
        yield row("parts", 0, f"{name}: CPU ms a pack, mean of ranks", statistics.mean(times))
        yield row("parts", 0, f"{name}: CPU ms a pack, heaviest rank", max(times))


def stall(folder: Path) -> Iterator[Row]:
    for workers in (0, 1, 2):
        config = recipe(folder, workers=workers)
        config = config.model_copy(update={"dir": folder / f"run{workers}"})
        pretrain(RankAddress(0, 1, 0, ""), config)
        steps = [json.loads(line) for line in (config.dir / "metrics.jsonl").read_text().splitlines()]
        waited, seconds = (sum(one[key] for one in steps[1:]) for key in ("data_seconds", "seconds"))
        yield row("stall", workers, "share of step time waiting for packs", waited / seconds)
        yield row("stall", workers, "seconds of the first step's wait", steps[0]["data_seconds"])


def memory(folder: Path) -> Iterator[Row]:
    config = recipe(folder, workers=MEMORY_WORKERS)
    loader = PackLoader(config.data, config.model, packs_per_step=16, seed=1)
    pool = loader.maker
    assert isinstance(pool, WorkerPool)
    num_samples, marks = 0, itertools.count(MEMORY_SAMPLES // 10, MEMORY_SAMPLES // 10)
    mark = next(marks)
    while num_samples < MEMORY_SAMPLES:
        num_samples += sum(len(pack.sample_ids) for pack in loader.next_step())
        if num_samples >= mark:
            assert pool._nursery is not None
            pids = [os.getpid(), pool._nursery.pid, *(worker.pid for worker in pool._workers)]
            yield row("memory", MEMORY_WORKERS, f"MiB of all processes after {mark:,} samples", sum(map(pss, pids)))
            yield row("memory", MEMORY_WORKERS, f"MiB of the trainer after {mark:,} samples", pss(pids[0]))
            mark = next(marks)
    yield row("memory", MEMORY_WORKERS, "workers lost", pool.num_lost)
    loader.close()


def pss(pid: int) -> float:
    """MiB of a process, of pages that others have too its share."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1]) / 1024


def row(part: str, workers: int, what: str, value: float) -> Row:
    print(f"{part:>7}  workers {workers}  {what}: {value:.4g}", flush=True)
    return {"part": part, "workers": workers, "what": what, "value": f"{value:.4g}"}


PARTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "cost": cost,
    "hash": hash_of_reads,
    "parts": parts,
    "stall": stall,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        build_data(Path(name))
        rows = [one for part in given.only for one in PARTS[part](Path(name))]
    measured = ["mimo_megatron/data", "mimo_megatron/train", "benchmarks/bench_loader.py"]
    print(write_rows("loader", rows, measured, ["torch", "numpy", "pillow"], given.out))


if __name__ == "__main__":
    main()
