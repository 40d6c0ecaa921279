"""A checkpoint opened for use: its model laid out over the ranks, its tokenizer, how it reads its input."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mimo_megatron import log, platform
from mimo_megatron.config.check import check_layout
from mimo_megatron.config.model import Head
from mimo_megatron.config.run import EncodingConfig, ParallelConfig, Precision
from mimo_megatron.data.encode import encode_sample
from mimo_megatron.data.tokenizer import TextTokenizer, load_tokenizer
from mimo_megatron.errors import ConfigError
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.vlm import VisionLanguageModel
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.train.start import load_weights, model_in
from mimo_megatron.train.step import DTYPES
from mimo_megatron.types import EncodedSample, RawSample


@dataclass(frozen=True)
class OpenModel:
    model: VisionLanguageModel
    mesh: Mesh
    device: torch.device
    tokenizer: TextTokenizer
    encoding: EncodingConfig

    def encode(self, raw: RawSample, *, add_generation_prompt: bool = False) -> EncodedSample:
        """The sample as the model reads it."""
        return encode_sample(
            raw,
            self.tokenizer,
            self.model.model_config,
            self.encoding,
            add_generation_prompt=add_generation_prompt,
        )


@contextlib.contextmanager
def opened(
    source: Path,
    parallel: ParallelConfig,
    encoding: EncodingConfig,
    address: RankAddress,
    scratch: Path,
    *,
    head: Head = "vocabulary",
    precision: Precision = "fp32",
) -> Iterator[OpenModel]:
    """The model of ``source`` (a checkpoint of ours or a Hugging Face folder) while the block lasts.

    ``ConfigError`` where its head is another one: a reward model writes no answers, a language model gives no rewards.
    """
    log.set_up(address.rank)
    model_config = model_in(source)
    if model_config.text.head != head:
        others = {"vocabulary": "`reward-model evaluate` and `serve-reward-model`", "reward": "`score` and `generate`"}
        raise ConfigError(
            f"{source} holds a model with the head {model_config.text.head!r}, {head!r} is needed here; "
            f"{others[head]} take this one"
        )
    check_layout(model_config, parallel, address.world_size)
    if parallel.vpp > 1:
        raise ConfigError(
            f"parallel.vpp is {parallel.vpp}: scoring and generation send one pack at a time through the pipeline, so "
            "an interleaved schedule has nothing to interleave; set vpp=1"
        )
    tokenizer = load_tokenizer(encoding.tokenizer, model_config.tokens, model_config.text.vocab_size)
    with megatron(parallel, address) as mesh:
        device = platform.current().device(address.local_rank)
        model = VisionLanguageModel(model_config, parallel, Numerics(DTYPES[precision]), mesh).to(device).eval()
        load_weights(source, model_config, [model], scratch)
        yield OpenModel(model, mesh, device, tokenizer, encoding)
