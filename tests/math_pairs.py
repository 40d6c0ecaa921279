"""The table of math pairs (math_pairs.tsv): gold, answer, the verdict held true, and why."""

from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_suffix(".tsv")


@dataclass(frozen=True)
class Pair:
    gold: str
    answer: str
    is_right: bool
    why: str

    @property
    def response(self) -> str:
        """The answer in a box, unless it is a whole response."""
        is_whole = "\\boxed" in self.answer or "<think>" in self.answer
        return self.answer if is_whole else f"\\boxed{{{self.answer}}}"


def math_pairs() -> list[Pair]:
    header, *lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert header.split("\t") == ["gold", "answer", "verdict", "why"]
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [Pair(gold, answer, {"right": True, "wrong": False}[verdict], why) for gold, answer, verdict, why in rows]
