"""Held-out pairs through a reward model: how many it ranks right, and the calibration of its scores to [0, 1]."""

import hashlib
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from mimo_megatron.config.calibration import Calibration, write_calibration
from mimo_megatron.config.run import EncodingConfig, ParallelConfig
from mimo_megatron.data.jsonl import read_jsonl
from mimo_megatron.data.pairs import encode_stored
from mimo_megatron.errors import DataError
from mimo_megatron.evaluation.opened import opened
from mimo_megatron.evaluation.output import check_out, write_lines
from mimo_megatron.mcore.boot import RankAddress
from mimo_megatron.reward_model.scoring import scores_of


@dataclass(frozen=True)
class EvaluationRequest:
    source: Path
    """A reward model: a checkpoint of ours or a Hugging Face folder."""
    pairs: Path
    """JSONL of ``{"id", "messages", "chosen", "rejected"}``; image paths are relative to it."""
    parallel: ParallelConfig
    encoding: EncodingConfig
    scratch: Path
    out: Path | None = None
    """JSONL of ``{"id", "chosen", "rejected"}``: the two scores of every pair."""
    calibrates: bool = False
    """Write mu and tau into the model's folder."""
    pack_tokens: int = 8192
    report: Path | None = None
    """Where rank 0 writes the ``Calibration`` as JSON, for the caller."""


def evaluate(address: RankAddress, request: EvaluationRequest) -> None:
    """Score every pair of the file; the results are files. Every rank of the layout runs it."""
    if address.rank == 0 and request.out is not None:
        check_out(request.out)
    asked = (request.source, request.parallel, request.encoding, address, request.scratch)
    with opened(*asked, head="reward") as open_model:
        model = open_model.model.model_config
        raws = list(read_jsonl(request.pairs))
        if len(raws) < 2:
            raise DataError(f"{request.pairs} holds {len(raws)} pairs; accuracy and calibration need at least 2")
        samples = [one for raw in raws for one in encode_stored(raw, open_model.tokenizer, model, open_model.encoding)]
        scores = scores_of(open_model, request.parallel, samples, request.pack_tokens)
    if address.rank:
        return
    chosen, rejected = scores[0::2], scores[1::2]
    if wrong := sum(not math.isfinite(score) for score in scores):
        raise DataError(f"{request.source} gives {wrong} of {len(scores)} responses a score that is not finite")
    tau = statistics.pstdev(scores)
    if not tau > 0:
        raise DataError(f"{request.source} gives all responses of {request.pairs} the same score; train it first")
    found = Calibration(
        mu=statistics.fmean(scores),
        tau=tau,
        accuracy=statistics.fmean(one > other for one, other in zip(chosen, rejected, strict=True)),
        num_pairs=len(raws),
        pairs_sha256=hashlib.sha256(request.pairs.read_bytes()).hexdigest(),
    )
    if request.out is not None:
        rows = zip(raws, chosen, rejected, strict=True)
        write_lines(request.out, (json.dumps({"id": raw.id, "chosen": a, "rejected": b}) for raw, a, b in rows))
    if request.calibrates:
        write_calibration(request.source, found)
    if request.report is not None:
        request.report.write_text(json.dumps(vars(found)))
