"""Verbs that start ranks: train, replay, score, generate."""

from pathlib import Path
from tempfile import TemporaryDirectory

from mimo_megatron.cli.verb import Arguments, Values, Verb, add_layout, add_recipe, count


def _train_arguments(parser: Arguments) -> None:
    add_recipe(parser)
    parser.add_argument("--ranks", type=count, help="processes on this machine (default: tp * pp * cp of the recipe)")


def _train(values: Values) -> int:
    from mimo_megatron.config.check import check
    from mimo_megatron.config.load import load_recipe

    config = load_recipe(values.recipe, values.overrides)
    num_ranks = values.ranks or config.parallel.model_ranks
    check(config, num_ranks)  # before torch and megatron load, which takes seconds

    from mimo_megatron.train.launch import run_local
    from mimo_megatron.train.loop import pretrain

    run_local(pretrain, num_ranks, config)
    return 0


def _reinforce(values: Values) -> int:
    from mimo_megatron.config.check import check
    from mimo_megatron.config.load import load_recipe

    config = load_recipe(values.recipe, values.overrides)
    num_ranks = values.ranks or config.parallel.model_ranks
    check(config, num_ranks)

    from mimo_megatron.rl.start import reinforce
    from mimo_megatron.train.launch import run_local

    run_local(reinforce, num_ranks, config)
    return 0


def _replay_arguments(parser: Arguments) -> None:
    parser.add_argument("fault", type=Path, help="a folder in a run's faults/, such as runs/a/faults/step_000123")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="another layout, say: parallel.tp=2")
    parser.add_argument("--ranks", type=count, help="processes on this machine (default: tp * pp * cp of the run)")


def _replay(values: Values) -> int:
    import json

    from mimo_megatron.config.check import check
    from mimo_megatron.config.load import load_recipe

    config = load_recipe(values.fault / "config.yaml", values.overrides)
    num_ranks = values.ranks or config.parallel.model_ranks
    check(config, num_ranks)

    from mimo_megatron.train.launch import run_local
    from mimo_megatron.train.replay import replay

    with TemporaryDirectory() as scratch:
        out = Path(scratch) / "replay.json"
        run_local(replay, num_ranks, config, values.fault, out)
        seen = json.loads(out.read_text())
    print("\n".join(seen["lines"]))
    return int(seen["shows_again"])


def _score_arguments(parser: Arguments) -> None:
    add_layout(parser)
    parser.add_argument(
        "--samples", type=Path, required=True, help='JSONL of {"id", "messages"}; paths of images count from the file'
    )
    parser.add_argument("--out", type=Path, required=True, help='JSONL of {"id", "token_ids", "logprobs"}')
    parser.add_argument("--pack-tokens", type=count, default=8192, help="slots of a pack (default 8192)")


def _score(values: Values) -> int:
    from mimo_megatron.config.load import load_layout
    from mimo_megatron.evaluation.score import ScoreRequest, score
    from mimo_megatron.train.launch import run_local
    from mimo_megatron.train.start import read_encoding

    layout = load_layout(values.overrides)
    encoding = read_encoding(values.checkpoint, values.tokenizer)
    with TemporaryDirectory() as scratch:
        where = values.checkpoint, values.samples, values.out
        request = ScoreRequest(*where, layout, encoding, Path(scratch), values.pack_tokens)
        run_local(score, values.ranks or layout.model_ranks, request)
    print(values.out)
    return 0


def _generate_arguments(parser: Arguments) -> None:
    add_layout(parser)
    parser.add_argument("--prompt", help="one question")
    parser.add_argument("--image", type=Path, action="append", default=[], help="shown before the question; repeatable")
    parser.add_argument(
        "--prompts", type=Path, help='JSONL of {"id", "messages"} instead of --prompt; paths of images count from it'
    )
    parser.add_argument("--out", type=Path, help='JSONL of {"id", "answer"} (default: printed)')
    parser.add_argument("--max-new-tokens", type=count, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)


def _generate(values: Values) -> int:
    from mimo_megatron.config.load import load_layout
    from mimo_megatron.evaluation.answer import AnswerRequest, answer, read_prompts
    from mimo_megatron.evaluation.generate import Sampling
    from mimo_megatron.train.launch import run_local
    from mimo_megatron.train.start import read_encoding

    layout = load_layout(values.overrides)
    prompts = read_prompts(values.prompt, values.image, values.prompts)
    sampling = Sampling(values.max_new_tokens, values.temperature, values.top_p, values.seed)
    encoding = read_encoding(values.checkpoint, values.tokenizer)
    with TemporaryDirectory() as scratch:
        request = AnswerRequest(values.checkpoint, prompts, values.out, layout, encoding, sampling, Path(scratch))
        run_local(answer, values.ranks or layout.model_ranks, request)
    return 0


VERBS = (
    Verb("train", "run a recipe on this machine", _train_arguments, _train),
    Verb("rl", "reinforcement learning by a recipe, on this machine", _train_arguments, _reinforce),
    Verb("replay", "take a step that was not finite again, pack by pack", _replay_arguments, _replay),
    Verb("score", "log-probabilities of chat samples, token by token", _score_arguments, _score),
    Verb("generate", "answers to prompts with images", _generate_arguments, _generate),
)
