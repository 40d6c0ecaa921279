"""The section ``rl`` of a recipe: what is asked, how responses are sampled and judged, and how the policy learns."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from mimo_megatron.config.base import Strict

EngineKind = Literal["embedded", "vllm"]
RewardTask = Literal["math", "box", "point", "count", "time", "gui", "rm_text", "rm_multimodal"]
Normaliser = Literal["group-token-mean", "token-mean", "sequence-mean", "constant"]


class PromptSourceConfig(Strict):
    """One task of the mix: a file of questions with what their rewards need."""

    task: str = Field(pattern=r"^[a-z0-9_-]+$", description="What curves and quotas call these questions.")
    path: Path = Field(description="JSONL or parquet of questions: ours, verl's or TRL's columns (docs/morl.md).")
    reward: RewardTask | None = Field(
        None, description="What judges the answers; needed where rows do not say it: verl's and TRL's do not."
    )
    ratio: float = Field(1.0, gt=0, description="Relative share of the groups of a step.")
    held_out: Path | None = Field(None, description="Questions of the same kind that are asked only for evaluation.")


class AlgorithmConfig(Strict):
    name: Literal["on-policy", "grpo"] = Field(
        "on-policy",
        description="on-policy: one update for each batch of rollouts, no clipping, no KL (MiMo-VL); grpo: several "
        "updates with a clipped ratio and, where kl_weight is above 0, a KL term.",
    )
    normaliser: Normaliser = Field(
        "group-token-mean",
        description="What a token's term is divided by: the tokens of its group, then groups are averaged (MiMo-VL); "
        "all tokens; the tokens of its response, then responses are averaged; or the number of responses times "
        "rollout.max_new_tokens.",
    )
    std_floor: float = Field(
        0.02, gt=0, description="Advantages are (reward - mean) / max(std, std_floor), mean and std of the group."
    )
    updates_per_batch: int = Field(1, ge=1, description="Updates for each batch of rollouts; 1 with on-policy.")
    clip_low: float = Field(0.2, gt=0, lt=1, description="Of grpo: the ratio is clipped below 1 - clip_low.")
    clip_high: float = Field(0.2, gt=0, description="Of grpo: the ratio is clipped above 1 + clip_high.")
    kl_weight: float = Field(0.0, ge=0, description="Of grpo: weight of the KL divergence from the start.")


class RolloutConfig(Strict):
    engine: EngineKind = Field(
        "embedded", description="embedded: every training rank samples too; vllm: engines of their own."
    )
    group_size: int = Field(8, ge=2, description="G: responses to each question.")
    groups_per_step: int = Field(gt=0, description="Groups with unequal rewards that a batch is made of.")
    max_new_tokens: int = Field(gt=0, description="Longest response; a longer one is cut and judged as it is.")
    temperature: float = Field(1.0, description="1: the policy that is trained is the one that is sampled.")
    top_p: float = Field(1.0, description="1: anything else would sample another policy than is trained.")
    max_sequences: int = Field(64, gt=0, description="Responses that an engine decodes at once.")
    max_groups_running: int = Field(64, gt=0, description="Groups launched and not settled, over all engines.")
    prior_groups: float = Field(128.0, gt=0, description="Strength of the pass rates' prior, in groups.")
    refill_budget: float = Field(
        5.0, ge=1, description="A task launches at most this times its share of the batch; then the batch is smaller."
    )
    zero_variance_std: float = Field(
        0.02, ge=0, description="A group whose rewards have no larger standard deviation teaches nothing: replaced."
    )
    easy_mean: float = Field(0.9, gt=0, le=1, description="A question whose group reaches this mean is an easy one.")
    easy_share: float = Field(
        0.1, ge=0, lt=1, description="Share of the questions asked that are drawn from easy ones."
    )
    max_attempts: int = Field(3, ge=1, description="Times a question whose group was lost is asked before it is left.")


class VllmConfig(Strict):
    """Where vLLM runs. Its Python is its own: vLLM and the trainer want other versions of the same packages."""

    python: Path | None = Field(None, description="Python of an environment with vLLM; `make vllm-env` makes one.")
    engines: int = Field(1, ge=1, description="Engines, started on this machine where folder is null.")
    folder: Path | None = Field(
        None, description="Where engines on other machines announce themselves: those of `serve-rl-engine`."
    )
    kv_cache_gib: int = Field(1, gt=0, description="Memory of an engine's key-value cache.")
    max_model_len: int = Field(4096, gt=0, description="Longest prompt with its response, in tokens.")


class RewardConfig(Strict):
    """Who judges. Without url and folder a service is started on this machine for as long as the run."""

    url: str | None = Field(None, description="Address of a running `serve-rewards`.")
    token_file: Path | None = Field(None, description="A file with the service's bearer token.")
    folder: Path | None = Field(
        None, description="Where a service on another machine announces itself: that of `serve-rl-rewards`."
    )
    text_model: Path | None = Field(None, description="Checkpoint of the reward model of the task rm_text.")
    multimodal_model: Path | None = Field(None, description="Checkpoint of the reward model of the task rm_multimodal.")
    deadline_seconds: float = Field(300.0, gt=0, description="A response without a verdict by then has no reward.")


class SyncConfig(Strict):
    bucket_mib: int = Field(256, gt=0, description="Size of the pieces in which weights travel to the engines.")
    max_mean_gap: float = Field(
        0.02, gt=0, description="Canary: largest mean |difference| of log-probabilities between engine and trainer."
    )
    max_gap: float = Field(0.4, gt=0, description="Canary: largest |difference| at any token.")


class EvaluationConfig(Strict):
    every_steps: int = Field(0, ge=0, description="Steps between evaluations on held-out questions; 0: never.")
    questions: int = Field(100, gt=0, description="Of each task.")
    temperature: float = Field(1.0, ge=0, description="1: the policy's mean reward; 0: that of its likeliest answers.")


class RLConfig(Strict):
    prompts: tuple[PromptSourceConfig, ...] = Field(min_length=1, description="The mix of tasks.")
    algorithm: AlgorithmConfig = Field(AlgorithmConfig(), description="How rewards become a gradient.")
    rollout: RolloutConfig = Field(description="How responses are sampled.")
    vllm: VllmConfig = Field(VllmConfig(), description="Of the engine vllm.")
    reward: RewardConfig = Field(RewardConfig(), description="Who judges responses.")
    sync: SyncConfig = Field(SyncConfig(), description="How weights reach the engines, and when to stop.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Held-out questions.")
