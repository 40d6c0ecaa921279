"""Rules between the keys of a run of reinforcement learning; ``check.py`` reports them with the others.

Each rule is a small function of (the section ``rl``, the run) that yields messages.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from mimo_megatron.config.rl import RLConfig
from mimo_megatron.config.run import RunConfig

RLRule = Callable[[RLConfig, RunConfig], Iterator[str]]


def rl_problems(config: RunConfig) -> list[str]:
    """What is wrong with the section ``rl``, and between it and the others; nothing where there is none."""
    return [] if config.rl is None else [message for rule in RL_RULES for message in rule(config.rl, config)]


def the_policy_is_what_is_sampled(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    for name in ("temperature", "top_p"):
        value = getattr(rl.rollout, name)
        if value != 1.0:
            yield (
                f"rl.rollout.{name} ({value:g}) must be 1: other values sample another policy than the one whose "
                f"log-probabilities are trained, and the gradient is biased; set rl.rollout.{name}=1"
            )


def on_policy_is_one_update_without_kl(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    algorithm = rl.algorithm
    if algorithm.name != "on-policy":
        return
    if algorithm.updates_per_batch != 1:
        yield (
            f"rl.algorithm.updates_per_batch ({algorithm.updates_per_batch}) must be 1 with on-policy, since after one "
            "update the batch is of an older policy: set it to 1, or name=grpo"
        )
    if algorithm.kl_weight:
        yield f"rl.algorithm.kl_weight ({algorithm.kl_weight:g}) must be 0 with on-policy: set it to 0, or name=grpo"


def evaluation_is_sampled_or_greedy(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    temperature = rl.evaluation.temperature
    if temperature not in (0.0, 1.0):
        yield (
            f"rl.evaluation.temperature ({temperature:g}) must be 1 (the policy's mean reward) or 0 (its likeliest "
            "answers): engines report log-probabilities of these alone"
        )


def the_divergence_is_from_a_start(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    if rl.algorithm.kl_weight and config.start_from is None:
        yield (
            f"rl.algorithm.kl_weight ({rl.algorithm.kl_weight:g}) measures from the weights of start_from, which is "
            "null: set start_from, or kl_weight=0"
        )


def a_group_fits_an_engine(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    if rl.rollout.group_size > rl.rollout.max_sequences:
        yield (
            f"rl.rollout.group_size ({rl.rollout.group_size}) > max_sequences ({rl.rollout.max_sequences}): an engine "
            "begins a group as a whole; raise max_sequences"
        )


def tasks_have_a_name_each(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    for task, count in Counter(one.task for one in rl.prompts).items():
        if count > 1:
            yield f"rl.prompts names the task {task!r} {count} times: give each its own name, for quotas and curves"


def each_task_has_a_group_in_every_step(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    total, groups = sum(one.ratio for one in rl.prompts), rl.rollout.groups_per_step
    for one in rl.prompts:
        share = groups * one.ratio / total
        if share < 1 - 1e-9:
            yield (
                f"rl.rollout.groups_per_step ({groups}) * ratio of {one.task} ({one.ratio:g}) / all ratios "
                f"({total:g}) = {share:.2g}, must be 1 at least: raise groups_per_step, or its ratio"
            )


def responses_fit(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    longest = rl.rollout.max_new_tokens
    limits = {"data.pack_tokens": config.data.pack_tokens}
    if rl.rollout.engine == "vllm":
        limits["rl.vllm.max_model_len"] = rl.vllm.max_model_len
    for name, limit in limits.items():
        if longest >= limit:
            yield (
                f"rl.rollout.max_new_tokens ({longest}) >= {name} ({limit}) leaves no room for a prompt: "
                f"shorten the responses, or raise {name}"
            )


def vllm_is_found(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    if rl.rollout.engine == "vllm" and rl.vllm.python is None and rl.vllm.folder is None:
        yield (
            "rl.rollout.engine is vllm, but rl.vllm.python is not given: `make vllm-env` makes an environment; set "
            "rl.vllm.python=.vllm-env/bin/python, or rl.vllm.folder to use engines that run elsewhere"
        )


def one_service_judges(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    if rl.reward.url is not None and rl.reward.folder is not None:
        yield "rl.reward has both url and folder: give the one that names the service"


def reward_models_are_found(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    """As far as the recipe says who judges; rows may say it too."""
    models = {
        "rm_text": ("text_model", rl.reward.text_model),
        "rm_multimodal": ("multimodal_model", rl.reward.multimodal_model),
    }
    for task, (name, model) in models.items():
        asked = [one.task for one in rl.prompts if one.reward == task]
        if asked and model is None and rl.reward.url is None:
            yield (
                f"{task} judges {', '.join(asked)}, but neither rl.reward.{name} nor rl.reward.url is given: name the "
                "model's checkpoint, or a running service"
            )


def the_policy_writes_text(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    if config.model.text.head == "reward":
        yield "model.text.head is reward, which writes nothing: set model.text.head=vocabulary, or rl=null"


def no_prediction_layers(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    layers = config.model.text.num_mtp_layers
    if layers:
        yield (
            f"model.text.num_mtp_layers ({layers}) must be 0 with rl: rewards train the next token only, and "
            "prediction layers would fall behind the policy; set model.text.num_mtp_layers=0"
        )


def evaluation_has_questions(rl: RLConfig, config: RunConfig) -> Iterator[str]:
    if rl.evaluation.every_steps and all(one.held_out is None for one in rl.prompts):
        yield (
            f"rl.evaluation.every_steps is {rl.evaluation.every_steps}, but no rl.prompts has held_out questions: "
            "give some, or set every_steps=0"
        )


RL_RULES: tuple[RLRule, ...] = (
    the_policy_is_what_is_sampled,
    on_policy_is_one_update_without_kl,
    evaluation_is_sampled_or_greedy,
    the_divergence_is_from_a_start,
    a_group_fits_an_engine,
    tasks_have_a_name_each,
    each_task_has_a_group_in_every_step,
    responses_fit,
    vllm_is_found,
    one_service_judges,
    reward_models_are_found,
    the_policy_writes_text,
    no_prediction_layers,
    evaluation_has_questions,
)
