"""Verbs that look: at this machine, at recipes, at runs."""

from pathlib import Path

from mimo_megatron.cli.verb import Arguments, Values, Verb, add_recipe, count


def _doctor_arguments(parser: Arguments) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _doctor(values: Values) -> int:
    from itertools import groupby

    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mimo_megatron.doctor import TOPICS, as_json, examine, has_fault

    findings = examine()
    if values.json:
        print(as_json(findings))
        return int(has_fault(findings))
    table = Table(
        "", "name", "found", "why, and -> remedy", box=SIMPLE, title="mimo-megatron doctor", title_justify="left"
    )
    colours = {"ok": "green", "note": "yellow", "fault": "bold red"}
    for topic, group in groupby(sorted(findings, key=lambda one: TOPICS.index(one.topic)), key=lambda one: one.topic):
        table.add_section()
        table.add_row("", Text(topic, "bold"))
        for one in group:
            remark = one.why + (f"\n-> {one.remedy}" if one.remedy else "")
            table.add_row(Text(one.status, colours[one.status]), Text(one.name), Text(one.found), Text(remark))
    Console().print(table)
    return int(has_fault(findings))


def _config_show_arguments(parser: Arguments) -> None:
    add_recipe(parser)
    parser.add_argument("--ranks", type=count, help="check also that the run fits this many ranks")


def _config_show(values: Values) -> int:
    from mimo_megatron.config.check import check
    from mimo_megatron.config.load import load_recipe, resolved_text

    config = load_recipe(values.recipe, values.overrides)
    if values.ranks:
        check(config, values.ranks)
    print(resolved_text(config), end="")
    return 0


def _config_explain_arguments(parser: Arguments) -> None:
    parser.add_argument("key", nargs="?", help="a dotted path such as train.schedule; all keys if left out")
    parser.add_argument("--markdown", action="store_true", help="as the table of docs/recipes.md")


def _config_explain(values: Values) -> int:
    from mimo_megatron.config.keys import explain, markdown_table

    found = explain(values.key)
    print(markdown_table(found) if values.markdown else "\n".join(map(str, found)))
    return 0


def _config_model_arguments(parser: Arguments) -> None:
    parser.add_argument("folder", type=Path, help="a Hugging Face folder, or a checkpoint of ours")


def _config_model(values: Values) -> int:
    from mimo_megatron.config.presets import PRESETS, preset
    from mimo_megatron.config.yaml_text import to_yaml
    from mimo_megatron.train.start import model_in

    model = model_in(values.folder)
    named = [name for name in PRESETS if preset(name) == model.model_copy(update={"name": name})]
    print(to_yaml({"model": {"preset": named[0]} if named else model.model_dump(mode="json")}), end="")
    return 0


def _report_arguments(parser: Arguments) -> None:
    parser.add_argument("run_dir", type=Path, nargs="+", help="one run, or the stages of a journey in their order")
    parser.add_argument("--out", type=Path, help="the page of several runs (default journey.html beside the last)")


def _report(values: Values) -> int:
    from mimo_megatron.report.run_report import write_journey, write_report

    for run_dir in values.run_dir:
        print(write_report(run_dir))
    if len(values.run_dir) > 1:
        print(write_journey(values.run_dir, values.out or values.run_dir[-1].parent / "journey.html"))
    return 0


VERBS = (
    Verb("doctor", "what this machine offers, which backends follow, what to mend", _doctor_arguments, _doctor),
    Verb("config show", "every key of a recipe with the value it resolves to", _config_show_arguments, _config_show),
    Verb("config explain", "what a key of a recipe means", _config_explain_arguments, _config_explain),
    Verb("config model", "the section `model` of a recipe for given weights", _config_model_arguments, _config_model),
    Verb("report", "one HTML page of a run, or of several in their order", _report_arguments, _report),
)
