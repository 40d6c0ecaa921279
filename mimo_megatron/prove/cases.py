"""The matrix of ``mimo-megatron prove``: layouts, features, which pairs are run, and layouts that must be refused."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimo_megatron.config.check import check
from mimo_megatron.config.fp8 import Fp8Config
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.presets import preset
from mimo_megatron.config.rl import AlgorithmConfig, PromptSourceConfig, RLConfig, RolloutConfig
from mimo_megatron.config.run import (
    DataConfig,
    ModuleTraining,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    VideoConfig,
)
from mimo_megatron.errors import ConfigError

SLOTS = 96
PACKS_PER_STEP = 4
HUGE_EPSILON, CLIP = 1e4, 0.5
SGD_RATES = {"vision": 100.0, "projector": 30.0, "text": 10.0}
"""Of updates about as large as the weights, so that rounding of the weights does not hide a wrong one."""
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Layout:
    name: str
    ranks: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of ``ParallelConfig``."""

    @property
    def is_large(self) -> bool:
        """Eight ranks, or four along one axis."""
        return self.ranks > 4 or 4 in self.fields.values() or (self.ranks == 4 and not self.fields)


@dataclass(frozen=True)
class Feature:
    name: str
    what: str
    packs: str = "mixed"
    """A key of ``material.PACKS``."""
    text: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the decoder's configuration."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Changes to ``TrainConfig``."""
    policy: AlgorithmConfig | None = None
    """Of reinforcement learning: how the pack's rollouts are learnt from."""
    slots: int = SLOTS
    """Of a pack."""

    @property
    def precision(self) -> str:
        return "fp8" if "fp8" in self.train else self.train.get("precision", "fp32")


@dataclass(frozen=True)
class Case:
    layout: Layout
    feature: Feature

    @property
    def name(self) -> str:
        return f"{self.layout.name} · {self.feature.name}"


@dataclass(frozen=True)
class Refusal:
    """A layout that cannot be right, alone or with a feature, and words that its refusal must hold."""

    layout: Layout
    names: str
    feature: str = "mixed"


FROZEN = ModuleTraining()
BALANCED: dict[str, Any] = dict(vision_placement="balanced")
OVERLAPPED: dict[str, Any] = dict(steps=2, overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=20_000)
"""Several buckets; what the second step computes, the first step's update has had gathered."""
IN_CHUNKS: dict[str, Any] = dict(head_loss="chunked", head_logits=1500)
"""Chunks of 150 columns for 10 rows, of 16 for 90."""
ONE = Layout("1 process", 1)

LAYOUTS: tuple[Layout, ...] = (
    Layout("tp2", 2, dict(tp=2)),
    Layout("tp2 sp", 2, dict(tp=2, sequence_parallel=True)),
    Layout("tp4 sp", 4, dict(tp=4, sequence_parallel=True)),
    Layout("tp4", 4, dict(tp=4)),
    Layout("pp2", 2, dict(pp=2)),
    Layout("pp4", 4, dict(pp=4)),
    Layout("pp2 uneven", 2, dict(pp=2, stage_layers=(1, 3))),
    Layout("pp2 vision alone", 2, dict(pp=2, stage_layers=(0, 4))),
    Layout("pp2 vpp2", 2, dict(pp=2, vpp=2)),
    Layout("pp2 vpp2 uneven", 2, dict(pp=2, vpp=2, stage_layers=(0, 1, 2, 1))),
    Layout("cp2", 2, dict(cp=2)),
    Layout("cp4", 4, dict(cp=4)),
    Layout("dp2", 2),
    Layout("dp4", 4),
    Layout("tp2 pp2", 4, dict(tp=2, pp=2)),
    Layout("tp2 sp pp2", 4, dict(tp=2, pp=2, sequence_parallel=True)),
    Layout("tp2 sp pp2 vpp2", 4, dict(tp=2, pp=2, vpp=2, sequence_parallel=True)),
    Layout("tp2 pp2 uneven", 4, dict(tp=2, pp=2, stage_layers=(1, 3))),
    Layout("tp2 cp2", 4, dict(tp=2, cp=2)),
    Layout("tp2 sp cp2", 4, dict(tp=2, cp=2, sequence_parallel=True)),
    Layout("tp2 dp2", 4, dict(tp=2)),
    Layout("pp2 cp2", 4, dict(pp=2, cp=2)),
    Layout("pp2 vpp2 cp2", 4, dict(pp=2, vpp=2, cp=2)),
    Layout("pp2 dp2", 4, dict(pp=2)),
    Layout("pp2 vpp2 dp2", 4, dict(pp=2, vpp=2)),
    Layout("cp2 dp2", 4, dict(cp=2)),
    Layout("tp2 sp pp2 cp2", 8, dict(tp=2, pp=2, cp=2, sequence_parallel=True)),
    Layout("tp2 sp pp2 vpp2 dp2", 8, dict(tp=2, pp=2, vpp=2, sequence_parallel=True)),
    Layout("tp2 sp cp2 dp2", 8, dict(tp=2, cp=2, sequence_parallel=True)),
    Layout("pp2 cp2 dp2", 8, dict(pp=2, cp=2)),
    Layout("tp4 sp pp2", 8, dict(tp=4, pp=2, sequence_parallel=True)),
    Layout("tp2 pp4", 8, dict(tp=2, pp=4)),
    Layout("tp2 balanced", 2, dict(tp=2) | BALANCED),
    Layout("tp2 sp balanced", 2, dict(tp=2, sequence_parallel=True) | BALANCED),
    Layout("cp2 balanced", 2, dict(cp=2) | BALANCED),
    Layout("cp4 balanced", 4, dict(cp=4) | BALANCED),
    Layout("tp2 sp cp2 balanced", 4, dict(tp=2, cp=2, sequence_parallel=True) | BALANCED),
    Layout("tp2 cp2 balanced", 4, dict(tp=2, cp=2) | BALANCED),
    Layout("tp2 pp2 balanced", 4, dict(tp=2, pp=2) | BALANCED),
    Layout("tp2 dp2 balanced", 4, dict(tp=2) | BALANCED),
    Layout("cp2 dp2 balanced", 4, dict(cp=2) | BALANCED),
    Layout("pp2 cp2 balanced", 4, dict(pp=2, cp=2) | BALANCED),
    Layout("tp4 sp balanced", 4, dict(tp=4, sequence_parallel=True) | BALANCED),
    Layout("tp2 sp pp2 vpp2 balanced", 4, dict(tp=2, pp=2, vpp=2, sequence_parallel=True) | BALANCED),
    Layout("tp2 sp pp2 cp2 balanced", 8, dict(tp=2, pp=2, cp=2, sequence_parallel=True) | BALANCED),
)
CORE = frozenset({
    "mixed", "zero-image ranks", "odd segments", "only projector", "mtp, tied, full recompute", "reward model",
    "policy gradient", "head in chunks", "overlap", "bf16", "fp8 current",
})  # fmt: skip
"""Features that the largest layouts are run with; the others with all."""

FEATURES: tuple[Feature, ...] = (
    Feature("mixed", "images of odd shapes, video and text, packed together"),
    Feature("several images", "two and three images in a sample", "several_images"),
    Feature("video", "clips with absolute time, one beside an image", "video"),
    Feature("text only", "no pack has an image", "text_only"),
    Feature("zero-image ranks", "every other pack has no image", "zero_image_ranks"),
    Feature("giant image", "one image fills its pack, the other packs have none", "giant_image"),
    Feature("odd segments", "segments of 1, 3 and odd lengths, cut anywhere", "odd_segments"),
    Feature("frozen ViT", "projector and decoder are trained", train=dict(vision=FROZEN)),
    Feature("only projector", "as in stage 1", train=dict(vision=FROZEN, text=FROZEN)),
    Feature("frozen decoder", "as in stage 2", train=dict(text=FROZEN)),
    Feature("tied", "the head is the embedding", text=dict(tie_embeddings=True)),
    Feature("mtp", "one multi-token-prediction layer", text=dict(num_mtp_layers=1)),
    Feature("selective recompute", "attention and MLPs computed again", train=dict(recompute="selective")),
    Feature("full recompute", "all layers computed again", "several_images", train=dict(recompute="full")),
    Feature("recompute of the ViT alone", "the decoder keeps what it computes", "several_images",
            train=dict(vision_recompute=True)),
    Feature("mtp, tied, full recompute", "together", text=dict(num_mtp_layers=1, tie_embeddings=True),
            train=dict(recompute="full")),
    Feature("reward model", "pairs of responses, one number at the last token of each", "pairs",
            text=dict(head="reward")),
    Feature("policy gradient", "rollouts with advantages, on policy", "rollouts", policy=AlgorithmConfig()),
    Feature("clipped policy gradient", "GRPO's ratio, clipped, with a KL term", "rollouts",
            policy=AlgorithmConfig(name="grpo", kl_weight=0.1)),
    Feature("head in chunks", "no table of logits: mtp, tied", text=dict(num_mtp_layers=1, tie_embeddings=True),
            train=IN_CHUNKS),
    Feature("policy gradient, head in chunks", "clipped, with a KL term, no table of logits", "rollouts",
            policy=AlgorithmConfig(name="grpo", kl_weight=0.1), train=IN_CHUNKS),
    Feature("offload", "the encoder's activations and the decoder's inputs of layers on the host; mtp, tied",
            "several_images", text=dict(num_mtp_layers=1, tie_embeddings=True),
            train=dict(offload_activations="all", recompute="full", vision_recompute=False)),
    Feature("overlap", "of data-parallel communication; every other pack has no image", "zero_image_ranks",
            train=OVERLAPPED),
    Feature("overlap, only projector", "whole stages without a gradient", "giant_image",
            train=OVERLAPPED | dict(vision=FROZEN, text=FROZEN)),
    Feature("overlap, mtp, tied, full recompute, head in chunks", "together",
            text=dict(num_mtp_layers=1, tie_embeddings=True), train=OVERLAPPED | IN_CHUNKS | dict(recompute="full")),
    Feature("bf16", "bf16 weights, fp32 masters and gradients", train=dict(precision="bf16")),
    Feature("fp8 current", "FP8 products, scaled by the tensors themselves", text=dict(ffn_width=128),
            train=dict(fp8=Fp8Config(scaling="current")), slots=128),
    Feature("fp8 delayed, full recompute", "scaled by the step before; all layers computed again", "several_images",
            text=dict(ffn_width=128),
            train=dict(fp8=Fp8Config(scaling="delayed", history=2, margin=1), recompute="full"), slots=128),
    Feature("fp8 blockwise", "scaled by tiles of 128",
            text=dict(num_heads=4, head_width=64, mrope_section=(8, 12, 12), ffn_width=256),
            train=dict(fp8=Fp8Config(scaling="blockwise")), slots=512),
    Feature("fp8 of all parts", "of encoder and projector too", text=dict(ffn_width=128),
            train=dict(fp8=Fp8Config(parts=("vision", "projector", "text"))), slots=128),
    Feature("fp8 of the encoder, delayed", "its layers computed again; ranks without an image", "zero_image_ranks",
            train=dict(fp8=Fp8Config(parts=("vision", "projector"), scaling="delayed", history=2, margin=1),
                       vision_recompute=True)),
)  # fmt: skip

QUICK = frozenset({
    "tp2 sp", "pp2 vpp2", "cp2", "dp2", "tp2 sp pp2 vpp2", "tp2 sp cp2 balanced",
})  # fmt: skip
"""Layouts of ``--quick``, each with the features below."""
QUICK_FEATURES = frozenset({
    "mixed", "zero-image ranks", "only projector", "mtp, tied, full recompute", "reward model",
    "policy gradient", "fp8 current",
})  # fmt: skip

REFUSALS: tuple[Refusal, ...] = (
    Refusal(Layout("tp8", 8, dict(tp=8)), "model.text.num_kv_heads"),
    Refusal(Layout("pp3", 3, dict(pp=3)), "parallel.stage_layers"),
    Refusal(Layout("cp5", 5, dict(cp=5)), "data.pack_tokens"),
    Refusal(Layout("dp3", 3), "train.packs_per_step"),
    Refusal(Layout("sp without tp", 2, dict(sequence_parallel=True)), "parallel.sequence_parallel"),
    Refusal(Layout("balanced vision with nothing to share", 2, dict(pp=2) | BALANCED), "parallel.vision_placement"),
    Refusal(Layout("vpp without pp", 2, dict(vpp=2)), "parallel.vpp"),
    Refusal(Layout("pp2 vpp2 dp4: packs not a multiple of pp", 8, dict(pp=2, vpp=2)), "train.packs_per_step"),
    Refusal(Layout("pp2, layers missing", 2, dict(pp=2, stage_layers=(1, 2))), "parallel.stage_layers"),
    Refusal(Layout("tp2 pp2 on 6 ranks", 6, dict(tp=2, pp=2)), "ranks (6)"),
    Refusal(Layout("cp2", 2, dict(cp=2)), "parallel.vision_placement", "fp8 of all parts"),
)

NOT_YET: tuple[tuple[str, str], ...] = (
    ("fully sharded data parallelism", "megatron's distributed optimizer shards optimizer state and gradients"),
    ("vision encoder on all pipeline stages", "lives on the first stage"),
)


def proof_model(text: Mapping[str, Any] = _NOTHING) -> ModelConfig:
    """``tiny-vl``, narrower, with eight heads on four key-value heads, so that tp 4 divides it."""
    model = preset("tiny-vl")
    assert model.vision is not None
    small = dict(width=64, num_heads=8, num_kv_heads=4, head_width=16, mrope_section=(2, 3, 3), ffn_width=96)
    vision = model.vision.model_copy(update=dict(width=64, num_heads=4, ffn_width=96))
    return model.model_copy(
        update=dict(name="proof", vision=vision, text=model.text.model_copy(update=small | dict(text)))
    )


def run_config(layout: Layout, feature: Feature) -> RunConfig:
    """A recipe whose data is never opened: one SGD step, clipped.

    Megatron's distributed optimizer has AdamW only. With an epsilon far above every gradient its first step is that of
    SGD with the learning rate lr / epsilon, and it is the path that training takes.
    """
    nowhere = Path("/nonexistent")
    train: dict[str, Any] = dict(
        steps=1,
        packs_per_step=PACKS_PER_STEP,
        precision="fp32",
        **{part: ModuleTraining(lr=rate * HUGE_EPSILON) for part, rate in SGD_RATES.items()},
        optimizer=OptimizerConfig(eps=HUGE_EPSILON, clip_grad=CLIP, weight_decay=0.0),
    )
    return RunConfig(
        name=f"{layout.name} · {feature.name}",
        dir=nowhere,
        model=proof_model(feature.text),
        parallel=ParallelConfig(**layout.fields),
        data=DataConfig(
            sources=() if feature.policy else (SourceConfig(path=nowhere),), tokenizer=nowhere,
            pack_tokens=feature.slots, pack_patches=1024, max_pixels=70_000,
            video=VideoConfig(max_total_tokens=90, max_pixels_per_frame=60_000),
        ),
        train=TrainConfig(**(train | dict(feature.train))),
        rl=_rl(feature.policy) if feature.policy else None,
        # A divergence is from the start; here the reference policy is given, and nothing is read.
        start_from=nowhere if feature.policy and feature.policy.kl_weight else None,
    )  # fmt: skip


def _rl(algorithm: AlgorithmConfig) -> RLConfig:
    return RLConfig(
        prompts=(PromptSourceConfig(task="proof", path=Path("/nonexistent")),),
        rollout=RolloutConfig(groups_per_step=1, max_new_tokens=SLOTS // 2),
        algorithm=algorithm,
    )


def cases(*, quick: bool) -> Iterator[Case]:
    """What is run: every layout with every feature that is not refused with it, or a few of both."""
    for layout in LAYOUTS:
        for feature in FEATURES:
            if quick:
                is_chosen = layout.name in QUICK and feature.name in QUICK_FEATURES
            else:
                is_chosen = not layout.is_large or feature.name in CORE
            if is_chosen and not refusal(layout, feature):
                yield Case(layout, feature)


def refusal(layout: Layout, feature: Feature) -> str:
    """What the rules of recipes say against the two together; nothing where they compose."""
    try:
        check(run_config(layout, feature), layout.ranks)
    except ConfigError as error:
        return str(error)
    return ""
