"""Verbs of Bradley-Terry reward models."""

from pathlib import Path
from tempfile import TemporaryDirectory

from mimo_megatron.cli.verb import Arguments, Values, Verb, add_layout, count


def _evaluate_arguments(parser: Arguments) -> None:
    add_layout(parser)
    pairs = 'JSONL of {"id", "messages", "chosen", "rejected"} that were not trained on'
    parser.add_argument("--pairs", type=Path, required=True, help=pairs)
    parser.add_argument("--out", type=Path, help='JSONL of {"id", "chosen", "rejected"}: both scores of every pair')
    parser.add_argument("--calibrate", action="store_true", help="write mu and tau beside the weights")
    parser.add_argument("--pack-tokens", type=count, default=8192, help="slots of a pack (default 8192)")


def _evaluate(values: Values) -> int:
    import json

    from mimo_megatron.config.load import load_layout
    from mimo_megatron.reward_model.evaluate import EvaluationRequest, evaluate
    from mimo_megatron.train.launch import run_local
    from mimo_megatron.train.start import read_encoding

    layout = load_layout(values.overrides)
    encoding = read_encoding(values.checkpoint, values.tokenizer)
    with TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        request = EvaluationRequest(
            values.checkpoint, values.pairs, layout, encoding, Path(scratch),
            values.out, values.calibrate, values.pack_tokens, report,
        )  # fmt: skip
        run_local(evaluate, values.ranks or layout.model_ranks, request)
        found = json.loads(report.read_text())
    share = f"{found['accuracy']:.1%} of {found['num_pairs']:,} pairs ranked right"
    print(f"{share}; mu {found['mu']:.4f}, tau {found['tau']:.4f}")
    return 0


VERBS = (
    Verb(
        "reward-model evaluate", "accuracy on held-out pairs, and calibration to [0, 1]", _evaluate_arguments, _evaluate
    ),
)
