r"""A seeded mix of math answers with known verdicts, for benchmarks and soaks of the math rule and its service.

19 kinds in equal shares, half of them right; a reasoning part with numbers and LaTeX of its own, so that a reader that
looks outside the final answer pays for it; lengths are log-normal, mean near 1,880 characters, at most 10,000. Truth
comes from how an item is built, never from a checker.
"""

import random
from collections.abc import Callable
from fractions import Fraction

Pair = tuple[str, list[str], list[str]]
"""Gold, answers that equal it, answers that do not."""


def math_items(count: int, seed: int, group: int = 1) -> list[tuple[str, str, bool]]:
    """``count`` items (response, gold, is right); ``group`` neighbours answer the same question."""
    rng = random.Random(seed)
    items: list[tuple[str, str, bool]] = []
    while len(items) < count:
        gold, right, wrong = KINDS[len(items) // group % len(KINDS)](rng)
        for _ in range(min(group, count - len(items))):
            is_right = rng.random() < 0.5
            answer = rng.choice(right if is_right else wrong)
            items.append((_response(rng, answer), gold, is_right))
    rng.shuffle(items)
    return items


def _response(rng: random.Random, answer: str) -> str:
    length = min(9_700, rng.lognormvariate(7.18, 0.85))
    sentences, chars = [], 0
    while chars < length:
        a, b, c = (rng.randint(2, 999) for _ in range(3))
        sentence = rng.choice(_SENTENCES).format(a=a, b=b, c=c)
        sentences.append(sentence)
        chars += len(sentence) + 1
    ending = rng.choice(_ENDINGS).replace("ANSWER", answer)
    return f"<think>\n{' '.join(sentences)}\n</think>\n\n{ending}"


_SENTENCES = [
    "First we compute {a} + {b}, then we divide by {c} to see how the ratio behaves.",
    "Wait, let me check: $\\frac{{{a}}}{{{b}}} > {c}$ does not hold in general.",
    "Substituting $x = {a}$ gives ${b}x + {c}$, which we keep for later.",
    "The triangle has sides {a}, {b} and {c}, so the law of cosines applies.",
    "Hmm, the answer could be \\boxed{{{a}}}, but that ignores the second case.",
    "By symmetry the sum \\[ S = {a} + {b}y - {c}z \\] only depends on $y$ and $z$.",
    "So far so good; next we look at the picture again and count the rows from left to right.",
    "If $n \\equiv {a} \\pmod{{{b}}}$ then the remainder after {c} steps repeats.",
    "Therefore the number of ways is at most {a}, and at least {b}.",
]
_ENDINGS = [
    "The answer is $\\boxed{ANSWER}$.",
    "\\boxed{ANSWER}",
    "Putting both parts together:\n\n\\[ \\boxed{ANSWER} \\]",
    "**Final answer:** $\\boxed{ANSWER}$",
    "We found the value above.\n\n$$\\boxed{ANSWER}$$\n",
]


def _frac(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _proper(rng: random.Random) -> Fraction:
    """A positive fraction that is no whole number."""
    denominator = rng.choice([2, 3, 4, 5, 6, 7, 8, 9, 11, 12])
    return rng.randint(0, 8) + Fraction(rng.randint(1, denominator - 1), denominator)


def _integer(rng: random.Random) -> Pair:
    n = rng.randint(0, 9_999)
    return f"{n}", [f"{n}", f"{n}.", f" {n} ", f"x = {n}"], [f"{n + 1}", f"-{n + 1}", f"{n}.5", f"{n}7"]


def _negative(rng: random.Random) -> Pair:
    n = rng.randint(1, 999)
    return f"-{n}", [f"-{n}", f"- {n}", f"-{n}.0"], [f"{n}", f"-{n + 3}", f"-\\frac{{{n}}}{{2}}"]


def _thousands(rng: random.Random) -> Pair:
    n = rng.randint(1_000, 9_999_999)
    return f"{n}", [f"{n:,}", f"{n:,}".replace(",", "{,}"), f"{n}"], [f"{n + 1:,}", f"{n // 10}", f"{n - 10:,}"]


def _decimal(rng: random.Random) -> Pair:
    n = rng.randint(101, 99_999) * 10 + rng.randint(1, 9)
    return f"{n / 1000}", [f"{n / 1000:.3f}", f"{n / 1000}"], [f"{n / 1000 + 0.5:.3f}", f"{n / 100}", f"{n}"]


def _scientific(rng: random.Random) -> Pair:
    a, e = rng.randint(11, 99), rng.randint(3, 7)
    gold = f"{a // 10}.{a % 10} \\times 10^{{{e}}}"
    return gold, [gold, f"{a * 10 ** (e - 1)}"], [gold.replace(f"{{{e}}}", f"{{{e + 1}}}"), f"{a * 10**e}"]


def _fraction(rng: random.Random) -> Pair:
    q = _proper(rng)
    double = f"\\frac{{{2 * q.numerator}}}{{{2 * q.denominator}}}"
    right = [_frac(q), f"{q.numerator}/{q.denominator}", double, _frac(q).replace("frac", "dfrac")]
    return _frac(q), right, [_frac(q + 1), _frac(1 / q), f"{q.numerator}", f"-{_frac(q)}"]


def _percent(rng: random.Random) -> Pair:
    n = rng.randint(1, 99)
    return f"{n}\\%", [f"{n}\\%", f"{n}%", f"\\frac{{{n}}}{{100}}"], [f"{n + 1}\\%", f"{n / 10}\\%"]


def _root(rng: random.Random) -> Pair:
    a, b = rng.randint(2, 12), rng.choice([2, 3, 5, 6, 7, 10, 11, 13])
    gold = f"{a}\\sqrt{{{b}}}"
    return gold, [gold, f"\\sqrt{{{a * a * b}}}"], [f"{a + 1}\\sqrt{{{b}}}", f"\\sqrt{{{a * b}}}", f"{a * b}"]


def _pi(rng: random.Random) -> Pair:
    q = _proper(rng)
    n, d = q.numerator, q.denominator
    gold = f"\\frac{{{n}\\pi}}{{{d}}}"
    return gold, [gold, f"{_frac(q)}\\pi"], [f"\\frac{{{n + d}\\pi}}{{{d}}}", f"{n}\\pi", _frac(q)]


def _power(rng: random.Random) -> Pair:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return f"{a}^{{{b}}}", [f"{a}^{{{b}}}", f"{a**b}"], [f"{a}^{{{b + 1}}}", f"{a**b + 1}", f"{a * b + 1}^2"]


def _text(rng: random.Random) -> Pair:
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    day, other = rng.sample(days, 2)
    return f"\\text{{{day}}}", [f"\\text{{{day}}}", day], [f"\\text{{{other}}}", other]


def _choice(rng: random.Random) -> Pair:
    letter, other = rng.sample("ABCDE", 2)
    return letter, [letter, f"\\text{{{letter}}}", f"\\textbf{{({letter})}}"], [other, f"\\text{{{other}}}"]


def _polynomial(rng: random.Random) -> Pair:
    a, b, c = rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 9)
    gold = f"{a}x^2 + {b}x - {c}"
    return gold, [gold, f"-{c} + {b}x + {a}x^{{2}}", f"x({a}x + {b}) - {c}"], [f"{a}x^2 - {b}x - {c}", f"{a}x^2 + {b}x"]


def _tuple(rng: random.Random) -> Pair:
    a, b = rng.randint(-9, 9), rng.randint(10, 30)
    return f"({a}, {b})", [f"({a}, {b})", f"\\left({a},{b}\\right)"], [f"({b}, {a})", f"({a}, {b + 1})"]


def _set(rng: random.Random) -> Pair:
    a, b, c = sorted(rng.sample(range(1, 40), 3))
    return f"\\{{{a}, {b}, {c}\\}}", [f"\\{{{c}, {a}, {b}\\}}"], [f"\\{{{a}, {b}\\}}", f"\\{{{a}, {b}, {c + 1}\\}}"]


def _interval(rng: random.Random) -> Pair:
    a, b = rng.randint(-9, 9), rng.randint(10, 30)
    return f"[{a}, {b})", [f"[{a}, {b})", f"\\left[{a}, {b}\\right)"], [f"[{a}, {b}]", f"({a}, {b})", f"[{a}, {b + 1})"]


def _union(rng: random.Random) -> Pair:
    a, b = rng.randint(-9, -1), rng.randint(1, 9)
    gold = f"(-\\infty, {a}) \\cup ({b}, \\infty)"
    right = [gold, f"({b}, \\infty) \\cup (-\\infty, {a})"]
    return gold, right, [gold.replace(f"({b},", f"[{b},"), f"({a}, {b})", gold.replace(f"{a})", f"{a - 1})")]


def _equation(rng: random.Random) -> Pair:
    a, b = rng.randint(2, 9), rng.randint(1, 9)
    return f"y = {a}x + {b}", [f"y = {a}x + {b}", f"y = {b} + {a}x"], [f"y = {a}x - {b}", f"y = {a + 1}x + {b}"]


def _matrix(rng: random.Random) -> Pair:
    rows = [[rng.randint(-9, 9) for _ in range(2)] for _ in range(2)]

    def write(entries: list[list[int]]) -> str:
        lines = " \\\\ ".join(f"{a} & {b}" for a, b in entries)
        return f"\\begin{{pmatrix}} {lines} \\end{{pmatrix}}"

    other = [rows[0], [rows[1][0], rows[1][1] + 1]]
    return write(rows), [write(rows), write(rows).replace(" & ", "&")], [write(other)]


KINDS: list[Callable[[random.Random], Pair]] = [
    _integer, _negative, _thousands, _decimal, _scientific, _fraction, _percent, _root, _pi, _power,
    _text, _choice, _polynomial, _tuple, _set, _interval, _union, _equation, _matrix,
]  # fmt: skip
