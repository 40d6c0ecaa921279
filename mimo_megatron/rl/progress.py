"""How far the sampling of a step's batch, or of an evaluation, has come: for who watches a terminal."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    num_settled: int
    """Groups that the batch has; of an evaluation, judged questions."""
    num_wanted: int
    num_running: int
    """Responses that were asked for and have not come."""
    num_judging: int
    """Responses that have come and wait for their rewards."""
    num_responses: int
    """All that have come, and in all of them:"""
    num_tokens: int
    num_replaced: int = 0
    """Groups of equal rewards, or without one: in the place of each another is asked."""

    def words(self, unit: str) -> str:
        """In one line; ``unit``: what is settled, in the plural."""
        parts = [f"{self.num_settled:,} of {self.num_wanted:,} {unit}"]
        for count, what in (
            (self.num_replaced, "replaced"),
            (self.num_running, "responses running"),
            (self.num_judging, "being judged"),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        return " · ".join([*parts, f"{self.num_responses:,} responses, {self.num_tokens:,} tokens so far"])


Tell = Callable[[Progress], None]


def tell_nobody(progress: Progress) -> None:
    pass
