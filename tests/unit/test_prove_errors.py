"""Errors of several ranks made one: what is not a number on any of them must not be lost."""

import io
import math

import pytest
import torch
from rich.console import Console

from mimo_megatron.prove.measure import Errors, Outcome, _apart, merged, relative
from mimo_megatron.prove.report import follow
from mimo_megatron.prove.run import TOLERANCES, difference

GRADIENTS = {"a": torch.ones(2), "b": torch.ones(2)}
FINE = Errors(count=0, loss=0.0, gradients={"a": 0.0, "b": 0.0}, grad_norm=0.0, step={"a": 0.0, "b": 0.0})


@pytest.fixture
def reference(tmp_path):
    torch.save(Outcome(1.0, 1, GRADIENTS, GRADIENTS, GRADIENTS, 1.0), tmp_path / "reference.pt")
    return tmp_path / "reference.pt"


def test_what_is_not_a_number_is_an_infinite_error():
    assert relative(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert relative(torch.tensor([math.inf]), torch.ones(1), rounding=1.0) == math.inf
    assert relative(torch.zeros(1), torch.zeros(1)) == 0.0


def test_norms_of_gradients_that_are_all_0_are_equal_and_one_of_them_is_not():
    assert _apart(0.0, 0.0) == 0.0
    assert _apart(1e-30, 0.0) == _apart(math.inf, math.inf) == math.inf
    assert _apart(3.0, 2.0) == 0.5


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_one_ranks_infinite_error_fails_the_case(bad_rank, reference):
    bad = Errors(0, 0.0, {"a": 0.0, "b": math.inf}, 0.0, {"a": 0.0, "b": 0.0})
    ranks = [FINE, FINE]
    ranks[bad_rank] = bad
    assert "1 gradients differ" in difference(merged(ranks, reference), TOLERANCES["fp32"])
    assert difference(merged([FINE, FINE], reference), TOLERANCES["fp32"]) == ""


def test_a_parameter_that_no_rank_holds_fails_the_case(reference):
    part = Errors(0, 0.0, {"a": 0.0}, 0.0, {"a": 0.0})
    assert "no rank holds b" in difference(merged([part, part], reference), TOLERANCES["fp32"])


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_file_gets_no_bar(is_terminal):
    written = io.StringIO()
    follow([], 3, Console(file=written, force_terminal=is_terminal))
    assert ("cases" in written.getvalue()) == is_terminal
