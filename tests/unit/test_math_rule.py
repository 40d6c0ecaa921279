"""The face of the math rule: golds, statuses, timers that stay untouched, the self-test."""

import signal
import subprocess
import sys
import threading
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mimo_megatron.reward import math_library, math_probes, math_rule
from mimo_megatron.reward.golds import GoldError
from mimo_megatron.reward.math_rule import MathGold, read_gold, score, self_test
from mimo_megatron.reward.verdict import Reason
from mimo_megatron.reward.wire import Meta

META = Meta()
FIVE = MathGold(("5",))


@pytest.mark.parametrize("gold", [5, 5.0, "5", r"\boxed{5}", ["5"], ["6", "5"], ("5", "6")])
def test_a_gold_is_a_string_a_number_or_a_list_of_which_one_must_match(gold: object) -> None:
    assert score(r"\boxed{5}", read_gold(gold, META), META).reward == 1.0


@pytest.mark.parametrize(
    "gold",
    [None, True, {"a": 1}, [], ["5", None], ["5"] * 33, "", " ", r"\frac{1}{0}", r"\frac{1", r"9^{9^9}", "1" * 600,
     float("nan"), r"\operatorname{eye}(9)", r"\sqrt{", r"\frac{2023!}{2}"],
)  # fmt: skip
def test_a_gold_that_cannot_judge_is_refused_with_its_text(gold: object) -> None:
    with pytest.raises(GoldError, match="gold"):
        read_gold(gold, META)


@pytest.mark.parametrize(
    ("response", "reward"),
    [("5", 1.0), (" 5\n", 1.0), ("ah</think>5", 1.0), (r"\boxed{5}", 1.0), ("6", 0.0), ("5 6", 0.0), ("5 or 6", 0.0)],
)
def test_a_bare_answer_is_judged_whole_where_the_question_says_so(response: str, reward: float) -> None:
    assert score(response, FIVE, Meta(bare_answer=True)).reward == reward
    assert ("boxed" in response) == (score(response, FIVE, META).status == "ok")


@pytest.mark.parametrize(
    ("response", "meta", "reason"),
    [
        ("", META, Reason.NO_ANSWER),
        ("The answer is 5.", META, Reason.NO_ANSWER),
        ("<think>so", META, Reason.NO_ANSWER),
        ("<think>so", Meta(finish_reason="length"), Reason.TRUNCATED),
        (r"\boxed{5", Meta(finish_reason="length"), Reason.TRUNCATED),
        (r"\boxed{5}", Meta(thinking="required"), Reason.NO_ANSWER),
        (r"\boxed{5", META, Reason.UNREADABLE),
        (r"\boxed{}", META, Reason.NO_ANSWER),
        (r"$5$ or $6$", META, Reason.SEVERAL),
        (r"\boxed{" + "5" * 41 + "}", META, Reason.TOO_LARGE),
        (r"\boxed{(((9!)!)!)!}", META, Reason.REFUSED),
        (r"\boxed{5 + \foo{7} ]}", META, Reason.UNREADABLE),
        (r"\boxed{5", Meta(bare_answer=True), Reason.UNREADABLE),
        (r"5</think>", Meta(bare_answer=True), Reason.NO_ANSWER),
    ],
)
def test_what_is_not_judged_is_invalid_with_a_reason(response: str, meta: Meta, reason: Reason) -> None:
    verdict = score(response, FIVE, meta)
    assert (verdict.status, verdict.reward, verdict.reason) == ("invalid", 0.0, reason)


@pytest.mark.parametrize(
    "answer", [r"x < \infty + 1", r"(1, 2\infty)", r"x \ne \sqrt{\infty}", r"\frac{1}{\infty}+k, k\in\mathbb{Z}"]
)
@pytest.mark.parametrize("gold", ["5", "x>3", r"(1,2)\cup(3,4)", r"\pi+k\pi, k\in\mathbb{Z}"])
def test_infinity_inside_an_expression_is_judged_and_not_right(answer: str, gold: str) -> None:
    assert score(f"\\boxed{{{answer}}}", read_gold(gold, META), META).reward == 0.0


def test_one_formula_without_a_box_is_an_answer() -> None:
    for response in ("So it is $5$.", r"So it is \(5\).", r"\[5\]", "$$5$$", "$5$, as I said: $5$"):
        assert score(f"<think>$6$</think>{response}", FIVE, META).reward == 1.0


def test_a_pair_that_the_library_gives_up_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> bool:
        raise RecursionError

    monkeypatch.setattr(math_library, "verify", fail)
    gold = read_gold(r"\int_0^1 f(x) \, dx", META)
    verdict = score(r"\boxed{\int_0^1 f(y) \, dy}", gold, META)
    assert (verdict.status, verdict.reason) == ("unknown", Reason.NO_VERDICT)


def test_a_mistake_of_ours_is_unknown_and_never_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise KeyError("planted")

    monkeypatch.setattr(math_rule, "texts_match", fail)
    verdict = score(r"\boxed{5}", FIVE, META)
    assert (verdict.status, verdict.reason) == ("unknown", Reason.INTERNAL)


@pytest.mark.parametrize(
    "answer", ["ix^2+x-6", "ik", r"10^{400}k", r"k\sqrt{-1}", r"\begin{pmatrix}1\\2\end{pmatrix}5"]
)
def test_an_odd_answer_to_a_family_of_values_is_wrong(answer: str) -> None:
    gold = read_gold(r"\frac{\pi}{4}+k\pi, k\in\mathbb{Z}", META)
    assert score(f"\\boxed{{{answer}}}", gold, META).reward == 0.0


def test_no_alarm_is_set_or_lost() -> None:
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        before = signal.getsignal(signal.SIGALRM)
        gold = read_gold(r"\int_0^1 f(x) \, dx", META)
        assert score(r"\boxed{\int_0^1 f(x)\,dx + 0}", gold, META).status == "ok"
        assert signal.getsignal(signal.SIGALRM) is before
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 400
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_the_library_works_off_the_main_thread() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(math_library.library_equal("x+1", "1+x")))
    thread.start()
    thread.join()
    assert found == [True]


def test_other_symbols_are_wrong_without_simplifying(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> bool:
        raise AssertionError("simplified, which takes minutes here")

    monkeypatch.setattr(math_library, "verify", fail)
    gold = read_gold(r"3 \times 10^8", META)
    assert score(r"\boxed{y0.75 \text{ ho\intrs}3:\ln 44}", gold, META).reward == 0.0


def test_the_self_test_passes_here() -> None:
    assert len(math_probes.PROBES) >= 20
    assert self_test() == []


def test_the_self_test_reports_wrong_versions_and_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(math_probes.VERSIONS, "antlr4-python3-runtime", "4.9.")
    monkeypatch.setattr(math_probes.gmpy, "GROUND_TYPES", "gmpy")
    monkeypatch.setattr(math_rule, "PROBES", [("5", r"\boxed{5}", False)])
    problems = "\n".join(self_test())
    assert all(word in problems for word in ("antlr4-python3-runtime", "gmpy2", "is judged right"))


def test_the_rule_never_imports_torch() -> None:
    code = "import sys, mimo_megatron.reward.math_rule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
@example("\x00")
@example("\ud800 + x_{\ud800}")
@example("\u202e5\u202c")
@example("−٣²")
def test_any_text_gets_a_verdict(text: str) -> None:
    for response in (text, f"\\boxed{{{text}}}", f"</think>${text}$"):
        verdict = score(response, FIVE, META)
        assert verdict.reason != Reason.INTERNAL
        assert verdict.reward is None or 0.0 <= verdict.reward <= 1.0


@settings(max_examples=200, deadline=None)
@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6), st.integers(2, 9))
def test_fractions_are_compared_exactly(one: Fraction, other: Fraction, factor: int) -> None:
    gold = read_gold(f"\\frac{{{one.numerator}}}{{{one.denominator}}}", META)
    same = f"\\boxed{{{one.numerator * factor}/{one.denominator * factor}}}"
    assert score(same, gold, META).reward == 1.0
    different = f"\\boxed{{\\frac{{{other.numerator}}}{{{other.denominator}}}}}"
    assert (score(different, gold, META).reward == 1.0) is (one == other)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=6), st.randoms())
def test_sets_ignore_order_and_tuples_keep_it(numbers: list[int], random: object) -> None:
    shuffled = sorted(numbers)
    inside, other = ", ".join(map(str, numbers)), ", ".join(map(str, shuffled))
    assert score(f"\\boxed{{\\{{{other}\\}}}}", read_gold(f"\\{{{inside}\\}}", META), META).reward == 1.0
    is_same = numbers == shuffled
    assert (score(f"\\boxed{{({other})}}", read_gold(f"({inside})", META), META).reward == 1.0) is is_same
