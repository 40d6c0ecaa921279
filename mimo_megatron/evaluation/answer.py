"""The ``generate`` verb: prompts read, a model loaded in some layout, answers printed or written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mimo_megatron import log, platform
from mimo_megatron.config.check import check_layout
from mimo_megatron.config.run import EncodingConfig, ParallelConfig
from mimo_megatron.data.encode import encode_sample
from mimo_megatron.data.jsonl import read_jsonl
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import ConfigError, DataError
from mimo_megatron.evaluation.generate import Sampling, generate
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.vlm import VisionLanguageModel
from mimo_megatron.train.start import load_weights, model_in
from mimo_megatron.types import MediaRef, RawSample


@dataclass(frozen=True)
class AnswerRequest:
    """What to answer, and where to; without ``out`` the answers are printed."""

    source: Path
    prompts: tuple[RawSample, ...]
    out: Path | None
    parallel: ParallelConfig
    encoding: EncodingConfig
    sampling: Sampling
    prompts_at_once: int = 64


def read_prompts(prompt: str | None, images: Sequence[Path], prompts: Path | None) -> tuple[RawSample, ...]:
    """The questions: one of text and images, or those of a JSONL file."""
    if (prompt is None) == (prompts is None):
        raise ConfigError("generate: give --prompt TEXT (with --image FILE), or --prompts FILE.jsonl")
    if prompts is not None:
        return tuple(read_jsonl(prompts))
    missing = [str(path) for path in images if not path.is_file()]
    if missing:
        raise DataError(f"generate: no such image: {', '.join(missing)}")
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    media = tuple(MediaRef("image", str(path), 0, path.stat().st_size, "") for path in images)
    return (RawSample("prompt", "command line", ({"role": "user", "content": content},), media),)


def answer(address: RankAddress, request: AnswerRequest) -> None:
    """Answer every prompt in order; rank 0 prints or writes ``{"id", "answer"}``."""
    log.set_up(address.rank)
    model_config = model_in(request.source)
    check_layout(model_config, request.parallel, address.world_size)
    with megatron(request.parallel, address) as mesh:
        device = platform.current().device(address.local_rank)
        model = VisionLanguageModel(model_config, request.parallel, Numerics(), mesh).to(device).eval()
        load_weights(request.source, model_config, model, Path(f"{request.source}.converted"))
        tokenizer = load_tokenizer(request.encoding.tokenizer, model_config.tokens, model_config.text.vocab_size)
        rows = []
        for start in range(0, len(request.prompts), request.prompts_at_once):
            some = request.prompts[start : start + request.prompts_at_once]
            encoded = [
                encode_sample(raw, tokenizer, model_config, request.encoding, add_generation_prompt=True)
                for raw in some
            ]
            for raw, token_ids in zip(some, generate(model, encoded, request.sampling, mesh), strict=True):
                rows.append({"id": raw.id, "answer": tokenizer.decode(token_ids)})
        if address.rank == 0:
            _tell(rows, request.out)


def _tell(rows: Sequence[dict[str, str]], out: Path | None) -> None:
    if out is not None:
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif len(rows) == 1:
        print(rows[0]["answer"])
    else:
        print("\n".join(f"{row['id']}: {row['answer']}" for row in rows))
