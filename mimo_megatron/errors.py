"""Typed errors a user can act on. Each message states what failed, the values, and the remedy.

Programmer mistakes are bare ``assert``s; these classes are for mistakes and faults that come from outside.
"""

HUNG_EXIT_CODE = 76
"""Of a process that ``train/watchdog.py`` ended inside a collective, where no error can be raised."""


class MimoError(Exception):
    """Base of every error that the command line prints without a traceback. docs/faults.md lists the exit codes."""

    exit_code = 2


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


class EngineLostError(EngineError):
    """An engine's process is gone, or says nothing any more; another one can do what it was asked."""

    exit_code = 77


class SyncError(EngineError):
    """Weights that did not reach an engine as they left the trainer."""


class NonFiniteError(MimoError):
    """The loss or the gradient is not finite; the optimizer has not been touched."""

    exit_code = 3


class Interrupted(MimoError):
    """A signal asked the run to stop: it is saved, and starting it again continues it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class HungError(MimoError):
    """The ranks stood still; the watchdog ended them."""

    exit_code = HUNG_EXIT_CODE
