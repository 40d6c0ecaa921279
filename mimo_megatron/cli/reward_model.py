"""Verbs of Bradley-Terry reward models."""

from pathlib import Path
from tempfile import TemporaryDirectory

from mimo_megatron.cli.verb import Arguments, Values, Verb, add_layout, add_parent, count, mind_parent


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


def _serve_arguments(parser: Arguments) -> None:
    parser.add_argument("checkpoint", type=Path, help="a calibrated reward model, ours or Hugging Face's")
    parser.add_argument("--host", default="127.0.0.1", help="any other than this machine's own needs --token-file")
    parser.add_argument("--port", type=int, default=8101, help="0 takes a free one (default 8101)")
    parser.add_argument("--token-file", type=Path, help="a file with the bearer token that callers must give")
    parser.add_argument("--image-root", type=Path, help="pictures, named by their SHA-256")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer (default: the checkpoint's own)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--pack-tokens", type=count, default=8192, help="slots of a pack (default 8192)")
    add_parent(parser)


def _serve(values: Values) -> int:
    mind_parent(values)

    from mimo_megatron.reward.service.settings import read_token
    from mimo_megatron.reward_model.server import serve_reward_model
    from mimo_megatron.train.start import read_encoding

    with TemporaryDirectory() as scratch:
        serve_reward_model(
            values.checkpoint,
            read_encoding(values.checkpoint, values.tokenizer),
            Path(scratch),
            host=values.host,
            port=values.port,
            token=read_token(values.token_file) if values.token_file else None,
            image_root=values.image_root,
            precision=values.precision,
            pack_tokens=values.pack_tokens,
        )
    return 0


VERBS = (
    Verb("serve-reward-model", "one reward model over HTTP, for serve-rewards", _serve_arguments, _serve),
    Verb(
        "reward-model evaluate", "accuracy on held-out pairs, and calibration to [0, 1]", _evaluate_arguments, _evaluate
    ),
)
