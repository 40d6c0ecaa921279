"""Useful training tokens per CPU-second: our packed step against transformers' ways to train on the same samples.

    python benchmarks/bench_train_step.py               # five rounds; twenty minutes on an idle machine
    python benchmarks/bench_train_step.py --rounds 1

Two head shapes, since the ratios depend on them; both are the preset ``tiny-vl`` with a decoder twice as wide and a
vocabulary of 8,192.

One process, one thread, fp32, the same weights, 16 mixed samples of 103 to 1,339 tokens: 7,622 in all, which a padded
batch makes 21,424. A step is forward and backward of the mean token loss; no optimizer, on neither side. Time is
``time.process_time``, the median over rounds in which every way takes its turn. transformers runs its default attention
(sdpa) and gets its inputs ready-made (normalised pixels, padded rows); ours collates its packs and normalises pixels
inside the measured time.

Two label sets: every text token, and the answers (the last 40 % of each sample's text). transformers' head runs on
every position either way; ours on those that are trained.

transformers packs correctly only with ``use_cache=False``: with its defaults the samples attend to each other. The
losses show it; all others must agree.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np
import torch
from provenance import write_rows
from torch import Tensor
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from mimo_megatron.config.model import ModelConfig, SpecialTokens
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import DataConfig, ModuleTraining, ParallelConfig, RunConfig, SourceConfig, TrainConfig
from mimo_megatron.convert.families import rules_for
from mimo_megatron.convert.hf_config import hf_config
from mimo_megatron.data.collate import collate
from mimo_megatron.data.packing import pack
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.weights import global_parameters
from mimo_megatron.model.patch_embed import PIXEL_MEAN, PIXEL_STD
from mimo_megatron.train.step import Trainer, backward, build_trainer
from mimo_megatron.types import EncodedMedia, EncodedSample

OURS = "mimo-megatron packed"
PADDED, ONE_BY_ONE = "transformers padded batch", "transformers one by one"
PACKED, PACKED_WRONG = "transformers packed, use_cache=False", "transformers packed, defaults (wrong)"
PACK_TOKENS = 3_840
ANSWER_SHARE = 0.4
LOSS_TOLERANCE = 1e-5
IGNORED = -100

# Text tokens and images (in 28-pixel units, height x width) of each sample.
SAMPLES: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = (
    (1339, ()), (380, ((20, 15),)), (103, ()), (95, ((14, 12),)), (412, ()), (260, ((10, 10), (8, 6))), (866, ()),
    (520, ((16, 12),)), (217, ()), (130, ((11, 9),)), (154, ()), (410, ((12, 18),)), (640, ()), (75, ((5, 16),)),
    (205, ((9, 10),)), (405, ((7, 14),)),
)  # fmt: skip

Step = Callable[[], float]


HEADS: dict[str, dict[str, Any]] = {
    "8 heads of 32": dict(num_heads=8, num_kv_heads=4, ffn_width=768),
    "4 heads of 64": dict(num_heads=4, num_kv_heads=2, ffn_width=704, head_width=64, mrope_section=(8, 12, 12)),
}


def model_config(heads: str) -> ModelConfig:
    model = preset("tiny-vl")
    wider = dict(width=256, vocab_size=8192) | HEADS[heads]
    return model.model_copy(update={"text": model.text.model_copy(update=wider)})


def encoded_samples(tokens: SpecialTokens, answer_share: float) -> list[EncodedSample]:
    """Images first, each between its marks, then text, whose last ``answer_share`` is trained."""
    draw = np.random.default_rng(1)
    samples = []
    for number, (num_text, sides) in enumerate(SAMPLES):
        ids: list[int] = []
        media = []
        for height, width in sides:
            ids += [tokens.vision_start, *[tokens.image_pad] * (height * width), tokens.vision_end]
            pixels = draw.integers(0, 256, (4 * height * width, 588), dtype=np.uint8)
            media.append(EncodedMedia("image", pixels, (1, 2 * height, 2 * width), frame_repeats=2))
        ids += draw.integers(16, 8192, num_text).tolist()
        is_trained = np.arange(len(ids)) >= len(ids) - round(num_text * answer_share)
        is_trained[0] = False  # nothing stands before it
        samples.append(EncodedSample(f"sample-{number}", np.array(ids), is_trained, tuple(media)))
    return samples


# ---- transformers ----------------------------------------------------------------------------------------------------


class Peer:
    """transformers' model and its ways to take a step; the loss is the step's mean, as its own trainer has it."""

    def __init__(self, config: ModelConfig):
        torch.manual_seed(1)
        self.config = config
        self.model = Qwen2_5_VLForConditionalGeneration(AutoConfig.for_model(**hf_config(config, torch.float32)))
        self.model.float().train()

    def weights(self) -> dict[str, Tensor]:
        """Under our names."""
        named = {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): param.detach()
            for name, param in self.model.named_parameters()
        }
        return {rule.ours.name: rule.to_ours([named[spec.name] for spec in rule.hf]) for rule in rules_for(self.config)}

    def padded(self, samples: Sequence[EncodedSample]) -> Step:
        return self._step([self._rows(samples)], _num_trained(samples))

    def one_by_one(self, samples: Sequence[EncodedSample]) -> Step:
        return self._step([self._rows([sample]) for sample in samples], _num_trained(samples))

    def packed(self, samples: Sequence[EncodedSample], **options: Any) -> Step:
        """One row, told apart by positions: transformers takes those of the text first, then the three rotary axes."""
        singles = [self._rows([sample]) for sample in samples]
        row: dict[str, Any] = {
            name: torch.cat([one[name] for one in singles], dim=1) for name in ("input_ids", "labels")
        }
        batch = collate(samples, self.config, sum(sample.num_tokens for sample in samples))
        places_S = torch.cat([torch.arange(sample.num_tokens) for sample in samples])
        row["position_ids"] = torch.cat([places_S[None], batch.positions_3S])[:, None]
        return self._step([row | self._images(samples) | options], _num_trained(samples))

    def _rows(self, samples: Sequence[EncodedSample]) -> dict[str, Any]:
        tokens = self.config.tokens
        ids = _pad([sample.token_ids_T for sample in samples], tokens.pad)
        labels = [np.where(sample.loss_mask_T, sample.token_ids_T, IGNORED) for sample in samples]
        return {
            "input_ids": ids,
            "attention_mask": _pad([np.ones(sample.num_tokens, np.int64) for sample in samples], 0),
            "labels": _pad(labels, IGNORED),
            "mm_token_type_ids": (ids == tokens.image_pad).int(),
        } | self._images(samples)

    def _images(self, samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
        media = [one for sample in samples for one in sample.media]
        if not media:
            return {}
        pixels = torch.cat([torch.from_numpy(one.patches_PC) for one in media]).float().div_(255).unflatten(1, (3, -1))
        mean, std = (torch.tensor(channels)[:, None] for channels in (PIXEL_MEAN, PIXEL_STD))
        return {
            "pixel_values": ((pixels - mean) / std).flatten(1),
            "image_grid_thw": torch.tensor([one.grid for one in media]),
        }

    def _step(self, batches: Sequence[dict[str, Any]], num_trained: int) -> Step:
        def step() -> float:
            self.model.zero_grad()
            total = 0.0
            for batch in batches:
                loss = self.model(**batch, num_items_in_batch=num_trained).loss
                loss.backward()
                total += loss.item()
            return total

        return step


def _pad(rows: Sequence[np.ndarray], value: int) -> Tensor:
    tensors = [torch.from_numpy(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _num_trained(samples: Sequence[EncodedSample]) -> int:
    return sum(int(sample.loss_mask_T.sum()) for sample in samples)


# ---- ours ------------------------------------------------------------------------------------------------------------


def recipe(model: ModelConfig, packs_per_step: int) -> RunConfig:
    """Everything trained, in fp32; its data is never opened."""
    nowhere, trained = Path("/nonexistent"), ModuleTraining(lr=1e-4)
    data = DataConfig(
        sources=(SourceConfig(path=nowhere),), tokenizer=nowhere, pack_tokens=PACK_TOKENS, pack_patches=16_384,
        max_pixels=1_000_000,
    )  # fmt: skip
    train = TrainConfig(
        steps=1, packs_per_step=packs_per_step, precision="fp32", vision=trained, projector=trained, text=trained
    )
    return RunConfig(name="bench", dir=nowhere, model=model, data=data, train=train)


def our_trainer(peer: Peer, mesh: Any, packs_per_step: int) -> Trainer:
    """A trainer with the peer's weights."""
    trainer = build_trainer(recipe(peer.config, packs_per_step), mesh)
    weights = peer.weights()
    with torch.no_grad():
        for name, param in global_parameters(trainer.bare_chunks):
            param.copy_(weights[name])
    return trainer


def our_step(trainer: Trainer, packs: Sequence[Sequence[EncodedSample]]) -> Step:
    def step() -> float:
        batches = [collate(samples, trainer.config.model, PACK_TOKENS) for samples in packs]
        sums = backward(trainer, batches)
        return sums.loss / sums.count

    return step


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(steps: dict[str, Step], rounds: int) -> Iterator[tuple[str, float, float]]:
    """(way, median CPU seconds, loss); the ways take turns, after one step of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses = {name: step() for name, step in steps.items()}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return ((name, statistics.median(times[name]), losses[name]) for name in steps)


def rows(heads: str, labels: str, answer_share: float, peer: Peer, mesh: Any, rounds: int) -> list[dict[str, Any]]:
    samples = encoded_samples(peer.config.tokens, answer_share)
    lengths = [sample.num_tokens for sample in samples]
    packs = [[samples[item] for item in items] for items in pack(lengths, PACK_TOKENS)]
    num_tokens, num_trained = sum(lengths), _num_trained(samples)
    print(
        f"{heads}, {labels}: {len(samples)} samples of {min(lengths)} to {max(lengths)} tokens, {num_tokens:,} in all, "
        f"{num_trained:,} trained, {sum(sample.num_patches for sample in samples):,} patches; waste: padded batch "
        f"{1 - num_tokens / (len(samples) * max(lengths)):.1%}, our {len(packs)} packs "
        f"{1 - num_tokens / (len(packs) * PACK_TOKENS):.1%}",
        flush=True,
    )
    steps = {
        OURS: our_step(our_trainer(peer, mesh, len(packs)), packs),
        PADDED: peer.padded(samples),
        ONE_BY_ONE: peer.one_by_one(samples),
        PACKED: peer.packed(samples, use_cache=False),
        PACKED_WRONG: peer.packed(samples),
    }
    measured = {name: (seconds, loss) for name, seconds, loss in measure(steps, rounds)}
    ours, (_, right_loss) = measured[OURS][0], measured[ONE_BY_ONE]
    table = []
    for name, (seconds, loss) in measured.items():
        agrees = abs(loss - right_loss) <= LOSS_TOLERANCE
        print(
            f"  {name:40} {seconds:7.2f} CPU s {num_tokens / seconds:7.0f} tokens/CPU s   loss {loss:.6f}"
            f"{'' if agrees else ' WRONG'}   ours is {seconds / ours:.2f} x"
        )
        assert agrees == (name != PACKED_WRONG), f"{name}: loss {loss}, one sample at a time {right_loss}"
        table.append(dict(
            heads=heads, labels=labels, way=name,
            cpu_seconds=f"{seconds:.3f}", tokens_per_cpu_second=f"{num_tokens / seconds:.0f}",
            loss=f"{loss:.6f}", ours_is_times=f"{seconds / ours:.2f}", tokens=num_tokens, trained_tokens=num_trained,
        ))  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    values = parser.parse_args()

    torch.set_num_threads(1)
    table = []
    with megatron(ParallelConfig(), RankAddress(0, 1, 0, "")) as mesh:
        for heads in HEADS:
            peer = Peer(model_config(heads))
            table += rows(heads, "all text tokens", 1.0, peer, mesh, values.rounds)
            table += rows(heads, "answers", ANSWER_SHARE, peer, mesh, values.rounds)
    path = write_rows(
        "train-step",
        table,
        measured=("mimo_megatron", "benchmarks/bench_train_step.py"),
        packages=("torch", "transformers", "megatron-core"),
        out=values.out,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
