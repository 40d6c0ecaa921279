"""Text that runs where text is evaluated: payloads of Python and sympy, and forms of an answer around them."""

from pathlib import Path

WRAPPERS = (
    "{}", r"\boxed{{{}}}",
    r"\boxed{{\text{{{}}}}}", r"\boxed{{\mathrm{{{}}}}}", r"\boxed{{{} + 1}}", r"\boxed{{1/({})}}",
    r"\boxed{{\frac{{1}}{{{}}}}}", r"\boxed{{\operatorname{{{}}}(1)}}", r"\boxed{{x_{{{}}}}}", r"\boxed{{({}, 2)}}",
    r"\boxed{{x = {}}}", "</think>${}$", r"\boxed{{\sum_{{k=1}}^{{2}} {}}}",
)  # fmt: skip


def payloads(marker: Path) -> list[str]:
    """Python that creates ``marker`` where it is evaluated."""
    touch = f"open('{marker}','w').close()"
    system = f"__import__('os').system('touch {marker}')"
    return [
        touch,
        system,
        f"__import__('pathlib').Path('{marker}').touch()",
        f"exec(\"{touch}\")",
        f"eval(\"{touch}\")",
        f"(lambda: {touch})()",
        f"[{touch} for _ in (1,)][0]",
        f"().__class__.__base__.__subclasses__()[0].__init__ and {touch}",
        "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'catch_warnings'][0]()._module"
        f".__builtins__['open']('{marker}','w')",
        f"lambdify((), \"{touch}\")()",
        f"lambdify([], '{system}', modules='sympy')()",
        f"Matrix([\"{touch}\"])",
        f"Integer({touch} or 1)",
        f"Symbol(str({touch}))",
        f"S(\"{touch}\")",
        f"Function({touch})",
        f"1\n{touch}",
        f"1\u2028{touch}",
        f"1;{touch}",
        f"f\"{{{touch}}}\"",
        f"1 if {touch} else 2",
        f"getattr(__builtins__, 'open')('{marker}', 'w')",
        f"globals()['__builtins__']['open']('{marker}','w')",
        f"preview('x', output='png', filename='{marker}', viewer='file')",
    ]  # fmt: skip
