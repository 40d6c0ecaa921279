"""The ``generate`` verb: prompts read, a model loaded in some layout, answers printed or written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mimo_megatron.config.run import EncodingConfig, ParallelConfig
from mimo_megatron.data.jsonl import read_jsonl
from mimo_megatron.errors import ConfigError, DataError
from mimo_megatron.evaluation.generate import Sampling, generate
from mimo_megatron.evaluation.opened import opened
from mimo_megatron.evaluation.output import check_out, write_lines
from mimo_megatron.mcore.boot import RankAddress
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
    scratch: Path
    """A folder that all ranks see, for the conversion of a Hugging Face folder; nothing is left in it."""
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
    if address.rank == 0 and request.out is not None:
        check_out(request.out)
    rows = []
    with opened(request.source, request.parallel, request.encoding, address, request.scratch) as open_model:
        for start in range(0, len(request.prompts), request.prompts_at_once):
            some = request.prompts[start : start + request.prompts_at_once]
            encoded = [open_model.encode(raw, add_generation_prompt=True) for raw in some]
            answers = generate(open_model.model, encoded, request.sampling, open_model.mesh)
            for raw, token_ids in zip(some, answers, strict=True):
                rows.append({"id": raw.id, "answer": open_model.tokenizer.decode(token_ids)})
    if address.rank == 0:
        _tell(rows, request.out)


def _tell(rows: Sequence[dict[str, str]], out: Path | None) -> None:
    if out is not None:
        write_lines(out, (json.dumps(row, ensure_ascii=False) for row in rows))
    elif len(rows) == 1:
        print(rows[0]["answer"])
    else:
        print("\n".join(f"{row['id']}: {row['answer']}" for row in rows))
