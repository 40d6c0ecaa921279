"""The names that a recipe may hold, read from the schema itself: for explaining a key and for mending a misspelt one.

Invariant: ``all_keys`` has exactly the dotted paths that ``RunConfig`` accepts; ``*`` stands for a place in a list.
"""

import difflib
import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mimo_megatron.config.base import Strict
from mimo_megatron.config.presets import PRESETS
from mimo_megatron.config.run import RunConfig
from mimo_megatron.config.yaml_text import to_yaml
from mimo_megatron.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """One dotted path of a recipe; ``default`` is None where the key must be given."""

    path: str
    kind: str
    default: str | None
    description: str

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}{self._default}. {self.description}"

    @property
    def _default(self) -> str:
        return ", must be given" if self.default is None else f" = {self.default}" if self.default else ""


_LOADER_KEYS = (
    Key("base", "path", "", "Another recipe, beside this one, whose keys this one inherits and may replace."),
    Key("model.preset", " | ".join(PRESETS), "", "A model by name; other keys under `model` replace its values."),
)


@functools.cache
def all_keys() -> dict[str, Key]:
    """Every path of a recipe, sections before their keys."""
    return {key.path: key for key in (*_walk(RunConfig, ""), *_LOADER_KEYS)}


def find(path: str) -> Key | None:
    """The key at ``path``, where numbers may stand for places in a list."""
    return all_keys().get(_with_stars(path))


def below(path: str) -> list[Key]:
    """The keys under the section ``path``, at any depth."""
    return [key for name, key in all_keys().items() if name.startswith(_with_stars(path) + ".")]


def explain(path: str | None) -> list[Key]:
    """The key at ``path`` and those under it, all keys where it is None; ``ConfigError`` offers the nearest names."""
    if path is None:
        return list(all_keys().values())
    key = find(path)
    if key is None:
        names = nearest(path)
        raise ConfigError(f"{path}: no such key" + (f"; did you mean {' or '.join(names)}?" if names else ""))
    return [key, *below(path)]


def markdown_table(keys: Sequence[Key]) -> str:
    """The reference table of docs/recipes.md."""
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = "**must be given**" if key.default is None else f"`{key.default}`" if key.default else ""
        rows.append(f"| `{key.path}` | {key.kind.replace('|', 'or')} | {default} | {key.description} |")
    return "\n".join(rows)


def nearest(path: str, most: int = 3) -> list[str]:
    """Existing paths that ``path`` may have meant: like names in its section, else the same name in another section."""
    section, _, leaf = path.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in all_keys() if key.rpartition(".")[0] == _with_stars(section)]
    close = difflib.get_close_matches(leaf, siblings, most)
    if close:
        return [f"{section}.{name}" if section else name for name in close]
    leaves = {key.rpartition(".")[2] for key in all_keys()}
    names = difflib.get_close_matches(leaf, leaves, 1)
    return [key for key in all_keys() if key.rpartition(".")[2] in names][:most]


def _with_stars(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _walk(model: type[Strict], prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        path = prefix + name
        yield Key(path, _kind(field.annotation), _default(field), field.description or "")
        inner, is_list = _section(field.annotation)
        if inner is not None:
            yield from _walk(inner, f"{path}.*." if is_list else f"{path}.")


def _section(annotation: Any) -> tuple[type[Strict] | None, bool]:
    """The config class inside ``annotation``, and whether it is an element of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation, False
    for inner in get_args(annotation):
        found, _ = _section(inner)
        if found is not None:
            return found, get_origin(annotation) is tuple
    return None, False


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " | ".join("null" if one is type(None) else _kind(one) for one in inner)
    if origin is tuple:
        return f"[{', '.join('...' if one is Ellipsis else _kind(one) for one in inner)}]"
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return "section"
    return {"str": "text", "Path": "path"}.get(annotation.__name__, annotation.__name__)


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    if isinstance(field.default, Strict):
        return ""
    if isinstance(field.default, tuple):
        return str(list(field.default))
    return to_yaml(field.default).removesuffix("\n...\n").strip()
