"""YAML as recipes use it: the 1.2 core schema, so ``1e-5`` is a number and ``no`` or ``12:30`` are text.

Invariants: what ``to_yaml`` writes, ``from_yaml`` reads back equal; a key given twice is refused.
"""

import re
from typing import Any

import yaml

from mimo_megatron.errors import ConfigError

# PyYAML follows YAML 1.1, where 1e-5 is text, 12:30 is 750 and `off` is false. These four patterns replace its own.
_PLAIN = (
    ("tag:yaml.org,2002:null", r"null|~|", "n~"),
    ("tag:yaml.org,2002:bool", r"true|false", "tf"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(f"line {line}: {key!r} cannot be a key; keys are names")
            if key in lines:
                raise ConfigError(f"line {line}: key {key!r} was given on line {lines[key]} already; keep one of them")
            lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))  # the inherited one reads 010 as octal


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Unicode's other line breaks are escaped in double quotes alone; elsewhere they would be folded away.
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _PLAIN:
        _kind.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), [*_first, ""])
_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def from_yaml(text: str, where: str) -> Any:
    """The value of one YAML document; ``ConfigError`` names ``where`` and the line of a mistake."""
    try:
        return yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None


def to_yaml(value: Any) -> str:
    """``value`` as a YAML document, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
