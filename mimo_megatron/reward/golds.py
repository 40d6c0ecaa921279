"""Golds are checked when data is built; a bad one is listed with its reason and never scored."""

from mimo_megatron.errors import DataError


class GoldError(DataError):
    """A gold that cannot be read, or that does not judge itself right."""
