"""No module over 400 lines, no function over 80, counted by AST; tests and benchmarks too."""

import ast
from collections.abc import Mapping

from tests.repository import python_sources

MOST_MODULE_LINES = 400
MOST_FUNCTION_LINES = 80


def too_long(sources: Mapping[str, str]) -> list[str]:
    found = []
    for path, text in sources.items():
        lines = text.count("\n")
        if lines > MOST_MODULE_LINES:
            found.append(f"{path}: {lines} lines, at most {MOST_MODULE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_FUNCTION_LINES:
                    found.append(f"{path}:{node.lineno} {node.name}: {lines} lines, at most {MOST_FUNCTION_LINES}")
    return found


def test_modules_and_functions_are_short() -> None:
    found = too_long(python_sources())
    assert not found, "\n".join(found)


def test_a_planted_long_function_or_module_is_found() -> None:
    def function(num_lines: int) -> str:
        return "def f():\n" + "    x = 1\n" * (num_lines - 1)

    assert too_long({"a.py": function(MOST_FUNCTION_LINES)}) == []
    assert len(too_long({"a.py": function(MOST_FUNCTION_LINES + 1)})) == 1
    assert too_long({"a.py": "x = 1\n" * MOST_MODULE_LINES}) == []
    assert len(too_long({"a.py": "x = 1\n" * (MOST_MODULE_LINES + 1)})) == 1
