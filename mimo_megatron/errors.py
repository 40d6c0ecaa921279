"""Typed errors a user can act on. Each message states what failed, the values, and the remedy.

Programmer mistakes are bare ``assert``s; these classes are for mistakes and faults that come from outside.
"""


class MimoError(Exception):
    """Base of every error that the command line prints without a traceback."""


class ConfigError(MimoError):
    """A recipe, an override or a layout that cannot run."""


class DataError(MimoError):
    """A sample, shard or index that cannot be used."""


class CheckpointError(MimoError):
    """A checkpoint that is missing, torn, or belongs to another model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not those that were written; an earlier one may be good."""


class RewardError(MimoError):
    """A reward that could not be computed."""


class EngineError(MimoError):
    """A generation engine that failed or disagrees with the trainer."""
