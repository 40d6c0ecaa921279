"""What the service's workers do: score a math answer, or read a gold. Loaded by the zygote, never by the service."""

from typing import Any

from mimo_megatron.reward import math_rule
from mimo_megatron.reward.golds import GoldError
from mimo_megatron.reward.verdict import Reason, Verdict, unknown
from mimo_megatron.reward.wire import Meta


def warm() -> list[str]:
    """What is wrong with the packages here. Running the self-test fills the parser's tables, which workers inherit."""
    return math_rule.self_test()


def handle(job: dict[str, Any]) -> dict[str, Any]:
    """``{"op": "score", "response", "gold", "meta"}`` gives a verdict; ``{"op": "check_gold", "gold", "meta"}`` gives
    ``{"problem"}``, empty for a good one."""
    meta = Meta.model_validate(job["meta"])
    try:
        gold = math_rule.read_gold(job["gold"], meta)
    except GoldError as error:
        return {"problem": str(error)} if job["op"] == "check_gold" else _as_json(unknown(Reason.BAD_GOLD))
    if job["op"] == "check_gold":
        return {"problem": ""}
    return _as_json(math_rule.score(job["response"], gold, meta))


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "status": verdict.status, "reward": verdict.reward, "reason": verdict.reason.value,
        "parts": dict(verdict.parts), "answer": verdict.answer,
    }  # fmt: skip
