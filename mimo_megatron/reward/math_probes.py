r"""What must hold before the math rule may judge: library versions, plain-integer arithmetic, pairs of known verdict.

antlr 4.9 reads no percent answer and so turns verdicts round; with gmpy2, ``1000000000!`` runs in C code that nothing
interrupts.
"""

from collections.abc import Iterator
from importlib import metadata

import mpmath
from sympy.external import gmpy

from mimo_megatron.reward.math_library import library_equal

VERSIONS = {
    "math-verify": "0.9.0",
    "latex2sympy2_extended": "1.11.0",
    "antlr4-python3-runtime": "4.13.",
    "sympy": "1.14.0",
}
"""By package; one that ends in a dot is a prefix."""

PROBES: list[tuple[str, str, bool]] = [
    ("42", r"\boxed{42}", True),
    ("42", r"\boxed{43}", False),
    ("1000000", r"\boxed{1\,000\,000}", True),
    ("0.5", r"\boxed{\frac{1}{2}}", True),
    ("6.626e-34", r"\boxed{9.9e-34}", False),
    (r"\frac{1}{2^{99}}", r"\boxed{\frac{1}{2^{98}}}", False),
    (r"50\%", r"\boxed{0.5}", True),
    (r"50\%", r"\boxed{50}", False),
    ("5", r"\boxed{5\%}", False),
    (r"5 \text{ km}", r"\boxed{5000 \text{ m}}", True),
    (r"5 \text{ m}", r"\boxed{5 \text{ cm}}", False),
    ("1011_2", r"\boxed{1011_3}", False),
    (r"30^\circ", r"\boxed{\frac{\pi}{6}}", True),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    ("abc", r"\boxed{cba}", False),
    (r"\{1,2\}", r"\boxed{(1,2)}", False),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", True),
    ("(3,\\infty)", r"\boxed{x>3}", True),
    ("5", r"\boxed{x+y=5}", False),
    ("5", r"\boxed{5 \text{ or } 6}", False),
    ("5", r"<think>\boxed{5}</think> done", False),
    (r"\emptyset", r"\boxed{\text{no solution}}", True),
    ("B", r"\boxed{(B) 12}", True),
]
LIBRARY_PROBES: list[tuple[str, str, bool]] = [
    (r"50\%", "0.5", True),
    (r"50\%", r"\frac{1}{2}", True),
    (r"50\%", "0.4", False),
    (r"\frac{x^2-1}{x-1}", "x+1", True),
    (r"\int_0^1 x \, dx", r"\int_0^1 x \, dx", True),
    (r"\lfloor 2.5 \rfloor", "3", False),
]


def library_problems() -> Iterator[str]:
    """What is wrong with the libraries; nothing where all is well."""
    for package, wanted in VERSIONS.items():
        found = _version(package)
        if not (found.startswith(wanted) if wanted.endswith(".") else found == wanted):
            yield f"{package} is {found}, verdicts are known for {wanted}: install mimo-megatron[reward] by itself"
    if gmpy.GROUND_TYPES != "python" or mpmath.libmp.BACKEND != "python":
        yield "gmpy2 or flint is in use, which cannot be interrupted: uninstall gmpy2 and python-flint"
    for gold, answer, is_right in LIBRARY_PROBES:
        if _library_verdict(gold, answer) is not is_right:
            yield f"the library judges {answer!r} for {gold!r} otherwise than {is_right}"


def _library_verdict(gold: str, answer: str) -> bool | None:
    try:
        return library_equal(gold, answer)
    except ValueError:
        return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
