"""Files of results: looked at before the work whose results they take, and whole under their name or absent."""

from collections.abc import Iterable
from pathlib import Path

from mimo_megatron.errors import ConfigError


def check_out(out: Path) -> None:
    """Nothing where a file can be written as ``out``, else ``ConfigError``: to be called before hours of work."""
    try:
        if out.exists() and not out.is_file():  # a folder, or a device, which a renamed file would take the place of
            raise OSError("it is there and no file")
        _partial(out).open("w").close()
        _partial(out).unlink()
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error}): make its folder, or name another file") from error


def write_lines(out: Path, lines: Iterable[str]) -> None:
    """The file appears under its name when it is complete."""
    with _partial(out).open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    _partial(out).rename(out)


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")
