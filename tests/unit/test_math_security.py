"""Nothing that a model writes is ever executed: payload families through every entry of the math rule."""

import ast
import itertools
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mimo_megatron.reward.answer import Unscorable
from mimo_megatron.reward.golds import GoldError
from mimo_megatron.reward.math_library import LibraryError, library_equal
from mimo_megatron.reward.math_rule import read_gold, score
from mimo_megatron.reward.wire import Meta
from tests.payloads import WRAPPERS, payloads
from tests.repository import python_sources

META = Meta()


def test_no_payload_is_executed_as_answer_or_gold(tmp_path: Path) -> None:
    marker = tmp_path / "m"
    gold, sum_gold = read_gold("5", META), read_gold(r"\sum_{k=1}^{n} k", META)
    for payload, wrapper in itertools.product(payloads(marker), WRAPPERS):
        text = wrapper.format(payload)
        for true in (gold, sum_gold):
            assert score(text, true, META).reward in (0.0, None)
        with suppress(GoldError):
            read_gold(text, META)
        with suppress(ValueError, Unscorable, LibraryError):
            library_equal("5", payload)
        assert not marker.exists(), text


def test_raw_sympify_executes_a_payload(tmp_path: Path) -> None:
    """The control: the payloads work where text does reach ``eval``."""
    marker = tmp_path / "m"
    worked = []
    for payload in payloads(marker)[:4]:
        code = f"import sympy\ntry:\n    sympy.sympify({payload!r})\nexcept Exception:\n    pass\n"
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60)
        worked.append(marker.exists())
        marker.unlink(missing_ok=True)
    assert any(worked)


FORBIDDEN = {"sympify", "parse_expr", "eval", "exec", "lambdify", "simplify", "compile", "S", "N"}


def text_evaluators(source: str) -> list[str]:
    """Calls and imports of what turns text into code; ``re.compile`` is none."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            is_pattern = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "re"
            if name in FORBIDDEN and not is_pattern:
                found.append(f"{node.lineno}: {name}()")
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found += [f"{node.lineno}: import {one.name}" for one in node.names if one.name in FORBIDDEN]
    return found


def test_no_reward_code_evaluates_text() -> None:
    paths = python_sources("mimo_megatron").items()
    sources = {path: text for path, text in paths if path.startswith("mimo_megatron/reward/")}
    assert len(sources) > 10
    assert {path: found for path, text in sources.items() if (found := text_evaluators(text))} == {}


@pytest.mark.parametrize("line", ["sympify(x)", "sympy.parse_expr(x)", "eval(x)", "from sympy import sympify"])
def test_a_planted_evaluation_is_found(line: str) -> None:
    assert text_evaluators(line)
