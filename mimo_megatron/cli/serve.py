"""Verbs that serve rewards, and what a trainer uses on other machines."""

from pathlib import Path
from typing import TYPE_CHECKING

from mimo_megatron.cli.verb import Arguments, Values, Verb, add_parent, add_recipe, count, mind_parent

if TYPE_CHECKING:
    from mimo_megatron.config.run import RunConfig


def _rewards_arguments(parser: Arguments) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="any other than this machine's own needs --token-file")
    parser.add_argument("--port", type=int, default=8100, help="0 takes a free one (default 8100)")
    parser.add_argument("--token-file", type=Path, help="a file with the bearer token that callers must give")
    parser.add_argument("--workers", type=count, help="processes that judge mathematics (default: one a core)")
    parser.add_argument("--queue", type=count, default=4096, help="unfinished items of one lane (default 4096)")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds, for requests that state none")
    parser.add_argument("--worker-seconds", type=float, default=5.0, help="after which a worker is killed (default 5)")
    parser.add_argument("--worker-memory-mb", type=count, default=1024, help="address space of a worker")
    parser.add_argument("--image-root", type=Path, help="pictures named by their SHA-256, for vLLM reward models")
    parser.add_argument(
        "--reward-model", action="append", default=[], metavar="text|multimodal=URL", help="a replica; repeatable"
    )
    parser.add_argument(
        "--vllm-reward-model", action="append", default=[], metavar="text|multimodal=URL,CALIBRATION.json",
        help="a replica that vLLM serves, and its mu and tau; repeatable",
    )  # fmt: skip
    parser.add_argument("--reward-model-token-file", type=Path, help="a file with the token that replicas ask for")
    add_parent(parser)


def _rewards(values: Values) -> int:
    import os

    from mimo_megatron import log
    from mimo_megatron.reward.service.pool import PoolSettings
    from mimo_megatron.reward.service.serve import serve
    from mimo_megatron.reward.service.settings import ServiceSettings, model_spec, read_token
    from mimo_megatron.reward.service.worker import Limits

    log.set_up()
    mind_parent(values)
    workers = values.workers or len(os.sched_getaffinity(0))
    token = read_token(values.reward_model_token_file) if values.reward_model_token_file else None
    models = [model_spec(text, False, token) for text in values.reward_model]
    models += [model_spec(text, True, token) for text in values.vllm_reward_model]
    settings = ServiceSettings(
        host=values.host,
        port=values.port,
        token=read_token(values.token_file) if values.token_file else None,
        pool=PoolSettings(workers, Limits(values.worker_memory_mb << 20, values.worker_seconds)),
        models=tuple(models),
        image_root=values.image_root,
        queue_items=values.queue,
        deadline_seconds=values.deadline,
    )
    serve(settings)
    return 0


def _for_rl_arguments(parser: Arguments) -> None:
    add_recipe(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address of this machine for the trainer's (default: none)")


def _rl_config(values: Values, key: str) -> "RunConfig":
    """The recipe; ``ConfigError`` where it does not name the folder ``rl.KEY.folder``."""
    from mimo_megatron import log
    from mimo_megatron.config.load import load_recipe
    from mimo_megatron.errors import ConfigError

    config = load_recipe(values.recipe, values.overrides)
    if config.rl is None or getattr(config.rl, key).folder is None:
        raise ConfigError(
            f"{values.recipe} has no rl.{key}.folder, in which this is announced to the trainer: give one that both "
            f"machines share, to both, such as rl.{key}.folder=runs/services"
        )
    log.set_up()
    return config


def _engine(values: Values) -> int:
    config = _rl_config(values, "vllm")

    from mimo_megatron.rl.engine.elsewhere import keep_engine
    from mimo_megatron.train.step import DTYPES

    assert config.rl is not None
    keep_engine(
        config.model, config.data, config.rl.vllm, values.host,
        dtype=DTYPES[config.train.precision], max_sequences=config.rl.rollout.max_sequences,
    )  # fmt: skip
    return 0


def _rl_rewards(values: Values) -> int:
    config = _rl_config(values, "reward")

    from mimo_megatron.rl.reward_processes import keep_rewards
    from mimo_megatron.rl.start import MEDIA

    assert config.rl is not None
    keep_rewards(config.rl.reward, config.dir / "rewards", values.host, image_root=config.dir / MEDIA)
    return 0


VERBS = (
    Verb("serve-rewards", "judge responses over HTTP: rules, and reward models", _rewards_arguments, _rewards),
    Verb("serve-rl-engine", "keep a vLLM alive for a recipe's trainer elsewhere", _for_rl_arguments, _engine),
    Verb("serve-rl-rewards", "keep a recipe's rewards alive for its trainer elsewhere", _for_rl_arguments, _rl_rewards),
)
