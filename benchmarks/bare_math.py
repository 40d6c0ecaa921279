"""Math-Verify without any guard or time limit of its own, as a job for the reward service's workers."""

from typing import Any

from math_verify import parse, verify


def warm() -> list[str]:
    return [] if judge("0.5", r"\frac{1}{2}") else ["Math-Verify does not know that 1/2 is 0.5"]


def handle(job: dict[str, Any]) -> dict[str, Any]:
    return {"right": judge(job["response"], job["gold"])}


def judge(response: str, gold: str) -> bool:
    """The limits are the worker's: it is killed."""
    true, said = (parse(text, parsing_timeout=None) for text in (f"${gold}$", response))
    return verify(true, said, timeout_seconds=None)
