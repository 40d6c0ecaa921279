"""Every mistake of a configuration in one error that fits a screen."""

from collections.abc import Sequence

from mimo_megatron.errors import ConfigError

_MOST_SHOWN = 12


def refuse(where: str, problems: Sequence[str]) -> None:
    """Nothing where ``problems`` is empty, else a ``ConfigError`` that lists them."""
    if not problems:
        return
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems[:_MOST_SHOWN], start=1)]
    if len(problems) > _MOST_SHOWN:
        lines.append(f"  ... and {len(problems) - _MOST_SHOWN} more")
    raise ConfigError("\n".join([f"{where}: {count}", *lines]))
