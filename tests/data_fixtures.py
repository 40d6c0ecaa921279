"""Small real things for tests of the data path: a byte-level tokenizer, generated pictures and clips, tars, recipes."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers, trainers

from mimo_megatron.config.model import TOKEN_NAMES, ModelConfig, SpecialTokens
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import DataConfig
from mimo_megatron.data.index import IndexReport, build_index
from mimo_megatron.data.shards import ShardSample, write_shards
from mimo_megatron.data.tokenizer import load_tokenizer

TINY = preset("tiny-vl")

# How Qwen's vocabularies cut text before merging: newlines stick to white space before them, digits stand alone.
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEXT = [
    "system\nuser\nassistant\n\n\nhello\n\nhello",
    "What is in the image? A red square above a blue one.\n\n",
    "一个红色的方块。",
]


def write_tokenizer(folder: Path, model: ModelConfig = TINY) -> Path:
    """The folder, now with the ``tokenizer.json`` of a byte-level BPE that fits the tiny presets."""
    ids = SpecialTokens.model_validate(model.tokens).model_dump()
    special = [TOKEN_NAMES[field] for field in sorted(ids, key=lambda field: ids[field])]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(tokenizers.Regex(_CUT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def picture(height: int, width: int, seed: int = 0, format: str = "PNG") -> bytes:
    """A file of smooth noise in colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()


def clip(num_frames: int, height: int = 64, width: int = 64, fps: int = 8) -> bytes:
    """An mp4 whose brightness rises frame by frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(num_frames):
            pixels = np.full((height, width, 3), number * 255 // num_frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def user_and_assistant(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def text_sample(number: int, num_words: int = 3) -> ShardSample:
    """A text-only sample whose length grows with ``num_words``."""
    record = {"id": f"text-{number}", "messages": user_and_assistant(f"Say {number}.", "word " * num_words)}
    return ShardSample(f"{number:06d}", record)


def image_sample(number: int, sides: Sequence[tuple[int, int]] = ((56, 56),)) -> ShardSample:
    """A sample with one generated image per (height, width)."""
    parts = [{"type": "image", "image": f"image{place}.png"} for place in range(len(sides))]
    record = {
        "id": f"image-{number}",
        "messages": user_and_assistant([*parts, {"type": "text", "text": "What is this?"}], f"Noise {number}."),
    }
    members = {f"image{place}.png": picture(*side, seed=number + place) for place, side in enumerate(sides)}
    return ShardSample(f"{number:06d}", record, members)


def video_sample(number: int, num_frames: int = 16) -> ShardSample:
    record = {
        "id": f"video-{number}",
        "messages": user_and_assistant(
            [{"type": "video", "video": "video0.mp4"}, {"type": "text", "text": "What happens?"}], "It gets brighter."
        ),
    }
    return ShardSample(f"{number:06d}", record, {"video0.mp4": clip(num_frames)})


def mixed_samples(count: int) -> list[ShardSample]:
    """Text, image and two-image samples of several lengths, one after another."""
    makers = (
        lambda number: text_sample(number, 1 + number % 7),
        lambda number: image_sample(number, [(56, 84 + 28 * (number % 3))]),
        lambda number: image_sample(number, [(56, 56), (84, 56)]),
    )
    return [makers[number % 3](number) for number in range(count)]


def recipe(sources: Sequence[Path] | Path, tokenizer: Path, **changes: Any) -> DataConfig:
    """A data section over these indexed folders, small packs by default."""
    folders = [sources] if isinstance(sources, Path) else sources
    settings = {
        "sources": [{"path": folder} for folder in folders],
        "tokenizer": tokenizer,
        "pack_tokens": 256,
        "pack_patches": 256,
        "window_samples": 16,
        "read": {"backoff_seconds": 0.001},
        **changes,
    }
    return DataConfig.model_validate(settings)


def write_source(
    folder: Path, samples: Sequence[ShardSample], data: DataConfig, *, samples_per_shard: int = 10, **options: Any
) -> IndexReport:
    """Tars and index of these samples in ``folder``."""
    write_shards(samples, folder, samples_per_shard)
    tokenizer = load_tokenizer(data.tokenizer, TINY.tokens, TINY.text.vocab_size)
    return build_index(folder, tokenizer, TINY, data, **options)
