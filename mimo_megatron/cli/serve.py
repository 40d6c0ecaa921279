"""The verb that serves rewards."""

from pathlib import Path

from mimo_megatron.cli.verb import Arguments, Values, Verb, count


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


def _rewards(values: Values) -> int:
    import os

    from mimo_megatron import log
    from mimo_megatron.reward.service.pool import PoolSettings
    from mimo_megatron.reward.service.serve import serve
    from mimo_megatron.reward.service.settings import ServiceSettings, model_spec, read_token
    from mimo_megatron.reward.service.worker import Limits

    log.set_up()
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


VERBS = (Verb("serve-rewards", "judge responses over HTTP: rules, and reward models", _rewards_arguments, _rewards),)
