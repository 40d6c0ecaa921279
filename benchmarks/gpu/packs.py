"""Real packs for the suite: JPEGs in tar shards, indexed, planned, decoded and collated by the project's own data path.

Mock data is refused: before a pack is used, the pixels of its first image are made again from the JPEG by Pillow and
numpy, and must be those of the pack, bit for bit. Random pixels would change no time of a step; but random sizes, and
packs that no plan made, would.
"""

import io
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from benchmarks.gpu.pictures import REHEARSAL, Scale, corpus_text, samples
from benchmarks.gpu.setting import TEXT, Bench, Setting
from benchmarks.gpu.writing import Save
from benchmarks.provenance import ROOT
from mimo_megatron.config.check import check
from mimo_megatron.config.load import load_recipe
from mimo_megatron.config.model import TOKEN_NAMES, ModelConfig
from mimo_megatron.config.run import RunConfig
from mimo_megatron.data.image import smart_resize
from mimo_megatron.data.index import build_index
from mimo_megatron.data.loader import PackLoader
from mimo_megatron.data.patches import patchify
from mimo_megatron.data.shards import ShardSample, write_shards
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import DataError
from mimo_megatron.train.flops import step_flops
from mimo_megatron.types import PackedBatch

LARGEST_VOCABULARY = 16_384
KEPT = "packs.pickle"
TEXT_SOURCE = "source-text"
TRAINED = ("vision", "projector", "text")


@dataclass(frozen=True)
class PackClass:
    """The packs of one recipe."""

    name: str
    config: RunConfig
    batches: tuple[PackedBatch, ...]


def section(bench: Bench, save: Save, folder: Path) -> None:
    """Leaves ``bench.kept["packs"]``, a class for each recipe, and ``["text packs"]``, and says what is in them."""
    setting = bench.setting
    scale = REHEARSAL if setting.is_rehearsal else Scale()
    began = time.perf_counter()
    stored = {one.key: one for one in samples(setting.sizes.num_samples, setting.seed, scale)}
    write_shards(stored.values(), folder / "source", 64)
    save(made={"samples": len(stored), "jpegs": _num_images(stored), "seconds": round(time.perf_counter() - began, 2)})
    found: dict[str, Any] = {"packs": []}
    for name in setting.sizes.recipes:
        found["packs"].append(made := pack_class(name, setting, stored, folder))
        save(packs=[_row(name, batch, made.config.model) for batch in made.batches])
    texts = {one.key: one for one in samples(setting.sizes.num_samples, setting.seed, scale, text_alone=True)}
    write_shards(texts.values(), folder / TEXT_SOURCE, 64)
    found["text packs"] = made = pack_class(TEXT, setting, texts, folder, TEXT_SOURCE)
    save(packs=[_row(TEXT, batch, made.config.model) for batch in made.batches])
    (folder / KEPT).write_bytes(pickle.dumps(found))
    bench.kept |= found


def made_before(folder: Path) -> dict[str, Any]:
    """What ``section`` left in ``folder``, in another process."""
    return pickle.loads((folder / KEPT).read_bytes())


def pack_class(
    name: str, setting: Setting, stored: Mapping[str, ShardSample], folder: Path, source: str = "source"
) -> PackClass:
    config = recipe(name, setting, folder)
    if not (config.data.tokenizer / "tokenizer.json").exists():
        save_tokenizer(config.data.tokenizer, config.model)
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.tokens, config.model.text.vocab_size)
    build_index(folder / source, tokenizer, config.model, config.data, out=config.data.sources[0].path)
    loader = PackLoader(config.data, config.model, packs_per_step=1, seed=setting.seed)
    loader.steps_to_come = setting.sizes.num_packs[name]
    batches = tuple(loader.next_step()[0] for _ in range(setting.sizes.num_packs[name]))
    loader.close()
    for batch in batches:
        require_real(batch, stored, config)
    return PackClass(name, config, batches)


def recipe(name: str, setting: Setting, folder: Path) -> RunConfig:
    """The recipe of this pack class, at reduced depth, on one rank, over the suite's own data. Packs of text alone are
    those of the 8K class's recipe."""
    sizes, stem = setting.sizes, "8K" if name == TEXT else name
    index = folder / f"index-{name.replace(' ', '-')}"
    own = [
        f"dir={folder / 'run'}",
        f"data.tokenizer={folder / 'tokenizer'}",
        f"data.sources=[{{path: {index}}}]",
        f"train.precision={'bf16' if setting.on_gpu else 'fp32'}",
    ]
    config = load_recipe(ROOT / "examples" / "recipes" / sizes.recipes[stem], [*sizes.overrides, *own])
    check(config, 1)
    return config


def save_tokenizer(folder: Path, model: ModelConfig) -> None:
    """A byte-level BPE over the project's pages, with the special tokens at the model's ids."""
    ids: dict[str, int] = model.tokens.model_dump()
    names = [TOKEN_NAMES[field] for field in sorted(ids, key=lambda field: ids[field])]
    assert sorted(ids.values()) == list(range(len(ids))), "the suite's special tokens are the first ids"
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=min(LARGEST_VOCABULARY, model.text.vocab_size),
        special_tokens=names,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus_text()], trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def require_real(batch: PackedBatch, stored: Mapping[str, ShardSample], config: RunConfig) -> None:
    """``DataError`` unless the samples were stored and the first image's pixels are those of its JPEG."""
    strangers = [one for one in batch.sample_ids if one.rpartition("/")[2] not in stored]
    if strangers:
        raise DataError(f"a pack with samples that are in no shard: {strangers[0]!r}; the suite refuses mock data")
    images = [data for one in batch.sample_ids for data in stored[one.rpartition("/")[2]].members.values()]
    if (batch.vision is None) != (not images):
        raise DataError("a pack whose images are not those of its samples; the suite refuses mock data")
    if not images:
        return
    expected = patches_by_pillow(images[0], config).ravel()
    found = batch.pixels_Y[: len(expected)].numpy()
    if not np.array_equal(found, expected):
        raise DataError("a pack whose pixels are not those of its JPEGs; the suite refuses mock data")


def patches_by_pillow(data: bytes, config: RunConfig) -> np.ndarray:
    """[P, 588] without the C++ resize and without libjpeg-turbo's own interface."""
    vision = config.model.vision
    assert vision is not None
    with Image.open(io.BytesIO(data)) as image:
        height, width = smart_resize(
            image.height, image.width, multiple=vision.pixel_multiple,
            min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels,
        )  # fmt: skip
        pixels_HW3 = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    return patchify(pixels_HW3[None], vision, is_still=True)


def grids_of(batch: PackedBatch) -> tuple[tuple[int, int, int], ...]:
    return batch.vision.grids_I3 if batch.vision else ()


def flops_of(batch: PackedBatch, model: ModelConfig) -> dict[str, float]:
    """Model FLOPs of a step on this pack by ``train/flops.py``, everything trained, the encoder's and the decoder's
    apart."""
    count = step_flops(model, batch.segment_lengths, grids_of(batch), TRAINED, num_head_rows=batch.num_trained)
    vision = count.vision_linear + count.vision_attention + count.projector
    return {"total": count.total, "vision": vision, "text": count.total - vision, **vars(count)}


def _num_images(stored: Mapping[str, ShardSample]) -> int:
    return sum(len(one.members) for one in stored.values())


def _row(name: str, batch: PackedBatch, model: ModelConfig) -> dict[str, Any]:
    lengths: Sequence[int] = batch.segment_lengths
    return {
        "class": name, "slots": batch.num_slots, "tokens": batch.num_tokens, "trained": batch.num_trained,
        "samples": len(lengths), "longest": max(lengths), "images": len(grids_of(batch)), "patches": batch.num_patches,
        "grids": [list(grid) for grid in grids_of(batch)], "segments": list(lengths), "flops": flops_of(batch, model),
    }  # fmt: skip
