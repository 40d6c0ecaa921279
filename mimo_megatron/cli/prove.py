"""The verb that shows that every layout equals one process."""

from pathlib import Path
from tempfile import TemporaryDirectory

from mimo_megatron.cli.verb import Arguments, Values, Verb


def _prove_arguments(parser: Arguments) -> None:
    parser.add_argument("--quick", action="store_true", help="a few layouts and features, for every commit")
    parser.add_argument(
        "--only", default="", help="the case of this name, or all whose name holds it: 'tp2 sp · video', 'cp2', 'mtp'"
    )
    parser.add_argument("--fault", default="", help="plant a mistake and see it caught (a wrong name lists them)")
    parser.add_argument("--json", type=Path, help="write every measurement into this file")
    parser.add_argument("--matrix", type=Path, help="write the support matrix (Markdown) into this file")


def _prove(values: Values) -> int:
    import json
    import time

    from rich.console import Console

    from mimo_megatron.errors import ConfigError
    from mimo_megatron.prove import report
    from mimo_megatron.prove.cases import REFUSALS, cases
    from mimo_megatron.prove.faults import fault_named
    from mimo_megatron.prove.run import prove, refused

    if values.fault:
        fault_named(values.fault)
    everything = list(cases(quick=values.quick))
    chosen = [case for case in everything if case.name == values.only]
    chosen = chosen or [case for case in everything if values.only in case.name]
    if not chosen:
        raise ConfigError(f"--only {values.only!r} is in no case's name; see docs/support-matrix.md for the names")
    console = Console()
    began = time.perf_counter()
    with TemporaryDirectory() as scratch:
        verdicts = report.follow(prove(chosen, Path(scratch), values.fault), len(chosen), console)
    refusals = list(refused(REFUSALS))
    seconds = time.perf_counter() - began
    console.print(report.summary(verdicts, refusals, seconds))
    text = report.as_json(verdicts, refusals, seconds)
    if values.json:
        report.write(values.json, text)
    if values.matrix:
        report.write(values.matrix, report.support_matrix(json.loads(text)))
    return int(any(one.problem for one in verdicts) or not all(said for _, said in refusals))


VERBS = (Verb("prove", "every layout equals one process: loss, gradients, one step", _prove_arguments, _prove),)
