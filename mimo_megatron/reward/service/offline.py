"""Mathematics without the HTTP service, in the same workers: for checks when data is built, and for the console."""

from typing import Any

from mimo_megatron.reward import rules
from mimo_megatron.reward.service.lanes import score_job, verdict_of
from mimo_megatron.reward.service.pool import MathPool
from mimo_megatron.reward.verdict import Reason, Verdict, unknown
from mimo_megatron.reward.wire import Meta


class Offline:
    """The verdict of every task that needs no reward model. The workers are started at the first need of them."""

    def __init__(self) -> None:
        self._pool: MathPool | None = None

    def __enter__(self) -> "Offline":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.__exit__(*error)

    def score(self, task: str, response: str, gold: Any, meta: Meta) -> Verdict:
        if task in rules.RULES:
            return rules.score(task, response, gold, meta)
        if task != "math":
            return unknown(Reason.MODEL_UNAVAILABLE)
        try:
            return verdict_of(self._workers().call(score_job(response, gold, meta)))
        except ValueError:  # NaN or Infinity in the gold: JSON cannot carry it
            return unknown(Reason.BAD_GOLD)

    def math_problem(self, gold: Any, meta: Meta) -> str:
        """What is wrong with a gold of the task math; empty for a good one."""
        try:
            outcome = self._workers().call({"op": "check_gold", "gold": gold, "meta": meta.model_dump(mode="json")})
        except ValueError:
            return f"the gold {gold!r} is not a finite number"
        if outcome.value is None:
            return f"reading it takes too much time or memory ({outcome.reason})"
        return str(outcome.value["problem"])

    def _workers(self) -> MathPool:
        if self._pool is None:
            self._pool = MathPool().__enter__()
        return self._pool
