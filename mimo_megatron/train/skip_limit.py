"""When so many samples are left out that the run no longer trains on the data that its recipe names."""

from collections import Counter

OVER_CAPACITY = "over_capacity"
"""Left out by the plan, before the run began and the same on every start: no fault."""
_ALWAYS_ALLOWED = 10


class SkipLimit:
    """Counts since the run was started. All ranks that are told the same come to the same end after the same step."""

    def __init__(self, max_fraction: float) -> None:
        self._max_fraction = max_fraction
        self._num_drawn = 0
        self._skipped: Counter[str] = Counter()

    def exceeded_by(self, num_drawn: int, skipped: Counter[str]) -> str:
        """Why the run must stop after a step for which so many samples were drawn, these left out among them; else
        empty."""
        self._skipped += Counter({reason: count for reason, count in skipped.items() if reason != OVER_CAPACITY})
        num_skipped = self._skipped.total()
        self._num_drawn += num_drawn
        if num_skipped <= max(_ALWAYS_ALLOWED, self._max_fraction * self._num_drawn):
            return ""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self._skipped.most_common())
        return (
            f"{num_skipped:,} of {self._num_drawn:,} samples since the run was started were left out ({reasons}), more "
            f"than data.max_skipped_fraction {self._max_fraction:g}; skipped.jsonl lists them. Mend the data or its "
            "storage, or raise the limit, and start the run again"
        )
