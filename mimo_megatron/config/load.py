"""A recipe file and ``a.b=c`` overrides become one ``RunConfig``, or one error that lists every mistake.

Order of precedence: override, recipe, the recipe named by its ``base``, the preset named by ``model.preset``, default.
Invariants: unknown and duplicate keys are refused; ``load_recipe(dump_resolved(config))`` equals ``config``.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mimo_megatron.config import keys
from mimo_megatron.config.presets import PRESETS
from mimo_megatron.config.problems import refuse
from mimo_megatron.config.run import ParallelConfig, RunConfig
from mimo_megatron.config.yaml_text import from_yaml, to_yaml
from mimo_megatron.errors import ConfigError

Tree = dict[str, Any]


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the recipe describes. Relative paths count from the working directory, ``base`` from its file."""
    tree = _read(Path(path), ())
    problems = [problem for text in overrides if (problem := _override(tree, text))]
    problems += _put_preset_under(tree)
    try:
        # JSON because pydantic's strict mode then still reads a list as a tuple and text as a path, but no "20" or
        # `true` as a number.
        config = RunConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems += [_say(detail) for detail in _causes(error)]
    refuse(str(path), problems)
    return config


def load_layout(overrides: Sequence[str]) -> ParallelConfig:
    """The layout that ``parallel.tp=2`` and the like describe; one rank where there are none."""
    tree: Tree = {}
    problems = [problem for text in overrides if (problem := _override(tree, text))]
    strangers = sorted(set(tree) - {"parallel"})
    problems += [f"{key}: only parallel.* can be set here" for key in strangers]
    try:
        layout = ParallelConfig.model_validate(tree.get("parallel", {}), strict=True)
    except ValidationError as error:
        layout = ParallelConfig()
        problems += [f"parallel.{_say(detail)}" for detail in _causes(error)]
    refuse("layout", problems)
    return layout


def resolved_text(config: RunConfig) -> str:
    """Every key of ``config`` with its value, as the text of a recipe."""
    return "# The resolved configuration of a run: every key with the value it had.\n" + to_yaml(
        config.model_dump(mode="json")
    )


def dump_resolved(config: RunConfig, path: Path) -> None:
    """Write ``config`` as a recipe; ``load_recipe`` reads it back equal."""
    path.write_text(resolved_text(config), encoding="utf-8")


def _read(path: Path, chain: tuple[Path, ...]) -> Tree:
    """The tree of a recipe over that of its ``base``."""
    if path.resolve() in chain:
        raise ConfigError(f"{path}: `base` leads back to this recipe; end the chain")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        named_by = f" (the `base` of {chain[-1].name})" if chain else ""
        raise ConfigError(f"cannot read the recipe {path}{named_by}: {error}") from error
    tree = from_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is `key: value` lines, this is {type(tree).__name__}")
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: {base!r} is not the name of a recipe")
    return _merge(_read(path.parent / base, (*chain, path.resolve())), tree)


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """``under`` with every key of ``over``; sections are merged key by key, everything else is replaced whole."""
    merged = dict(copy.deepcopy(dict(under)))
    for key, value in over.items():
        both_sections = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(merged[key], value) if both_sections else copy.deepcopy(value)
    return merged


def _override(tree: Tree, text: str) -> str | None:
    """Puts one ``a.b=value`` into ``tree``; what is wrong with it, if something is."""
    path, equals, raw = text.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        return f"override {text!r} is not of the form section.key=value"
    try:
        value = from_yaml(raw, f"override {text!r}")
    except ConfigError as error:
        return str(error)
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return f"override {text!r}: {'.'.join(parts[:depth])} has no {part!r}"
    if isinstance(node, dict):
        node.update(_merge(node, {parts[-1]: value}))
    elif isinstance(node, list) and parts[-1].isdigit() and int(parts[-1]) < len(node):
        node[int(parts[-1])] = value
    else:
        return f"override {text!r}: {'.'.join(parts[:-1])} is {node!r}, which has no {parts[-1]!r}"
    return None


def _put_preset_under(tree: Tree) -> list[str]:
    """Replaces ``model.preset`` by the named model's values, below those that the tree gives; what is wrong with it."""
    model = tree.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return []
    name = model.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        tree["model"] = _merge({"name": "unknown", **next(iter(PRESETS.values()))}, model)  # to find the other mistakes
        return [f"model.preset: no preset {name!r}; there are {', '.join(PRESETS)}"]
    tree["model"] = _merge({"name": name, **PRESETS[name]}, model)
    return []


def _causes(error: ValidationError) -> list[Any]:
    """The error's parts, without a list's "too short" where that only says that its elements were wrong."""
    details = error.errors()
    deepest = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    return [detail for detail in details if not (detail["type"] == "too_short" and detail["loc"] in deepest)]


def _say(detail: Any) -> str:
    """One line for one of pydantic's errors, with the dotted path and the remedy."""
    path = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        names = keys.nearest(path)
        return f"{path}: no such key; " + (
            f"did you mean {' or '.join(names)}?" if names else "`mimo-megatron config explain` lists them all"
        )
    if detail["type"] == "missing":
        key = keys.find(path)
        return f"{path}: must be given" + (f" ({key.kind}). {key.description}" if key else "")
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":  # our own validators say path and values themselves
        return message
    shown = repr(detail["input"])
    return f"{path} = {shown if len(shown) <= 60 else shown[:57] + '...'}: {message[0].lower()}{message[1:]}"
