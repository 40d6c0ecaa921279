"""Data-parallel communication beside computation: when it starts, in which order, and that nobody uses what has not
arrived. That it changes no number in any layout is a feature of ``test_prove.py``."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from mimo_megatron.config.rl import SyncConfig
from mimo_megatron.config.run import ModuleTraining, ParallelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.loss.cross_entropy import Logits, token_losses
from mimo_megatron.mcore import text
from mimo_megatron.mcore.boot import RankAddress, current_mesh, megatron
from mimo_megatron.mcore.overlap import GradReduction, finish_param_gather
from mimo_megatron.mcore.schedule import run_forward
from mimo_megatron.model.local_pack import LocalPack
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.prove.material import PACKS
from mimo_megatron.rl import publish as publish_module
from mimo_megatron.rl.publish import publish
from mimo_megatron.rl.sync.buckets import Manifest
from mimo_megatron.rl.sync.publisher import Publisher
from mimo_megatron.train.inspection import inspect_step
from mimo_megatron.train.step import Trainer, build_trainer, local_packs, train_step
from mimo_megatron.types import PackedBatch
from tests.harness import run_ranks
from tests.samples import run_config, tiny_model

SLOTS = 96
OVERLAP: dict[str, Any] = dict(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=50_000)
CHUNKED: dict[str, Any] = dict(head_loss="chunked", head_logits=1500)
ONLY_PROJECTOR: dict[str, Any] = dict(vision=ModuleTraining(), text=ModuleTraining())
TIED_MTP: dict[str, Any] = dict(num_mtp_layers=1, tie_embeddings=True)


@dataclass(frozen=True)
class Case:
    layout: dict[str, Any]
    world_size: int
    train: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    packs: str = "zero_image_ranks"


CASES = {
    "dp2": Case({}, 2),
    "dp2, head in chunks": Case({}, 2, CHUNKED),
    "dp2, tied, mtp, full recompute, head in chunks": Case({}, 2, CHUNKED | dict(recompute="full"), TIED_MTP),
    "dp2, bf16": Case({}, 2, dict(precision="bf16")),
    "dp2, only projector": Case({}, 2, ONLY_PROJECTOR, packs="giant_image"),
    "dp2, text only": Case({}, 2, packs="text_only"),
    "cp2, reward model": Case(dict(cp=2), 2, text=dict(head="reward"), packs="pairs"),
    "pp2 dp2, tied, mtp": Case(dict(pp=2), 4, text=TIED_MTP),
    "pp2 vpp2 dp2, head in chunks": Case(dict(pp=2, vpp=2), 4, CHUNKED),
    "tp2 dp2 balanced": Case(dict(tp=2, vision_placement="balanced"), 4),
}


def trainer_and_batches(case: Case, mesh: Mesh, overlap: dict[str, Any]) -> tuple[Trainer, list[PackedBatch]]:
    config = run_config(tiny_model(**case.text), parallel=ParallelConfig(**case.layout), **(case.train | overlap))
    return build_trainer(config, mesh), batches_of(case, mesh, 0)


def batches_of(case: Case, mesh: Mesh, step: int) -> list[PackedBatch]:
    """The packs go round: the data-parallel rank that had pictures in one step has none in the next one."""
    packs = PACKS[case.packs][(mesh.dp.rank + step) % mesh.dp.size :: mesh.dp.size]
    return [collate(pack, tiny_model(**case.text), SLOTS) for pack in packs]


# ---- when, and in which order ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Of one reduction."""

    place: int
    """In the order of the backward pass."""
    is_in_backward: bool
    parts: frozenset[str]
    """Of the model, that have parameters in it."""


def starts_of_two_steps(address: RankAddress, case: Case) -> list[Start]:
    with megatron(ParallelConfig(**case.layout), address) as mesh:
        trainer, batches = trainer_and_batches(case, mesh, OVERLAP)
        groups = [group for chunk in reversed(trainer.chunks) for group in chunk.bucket_groups]
        part_of = {
            param: name.split(".")[0] for chunk in trainer.chunks for name, param in chunk.module.named_parameters()
        }
        seen, is_in_backward = [], [True]
        start, rest = _ParamAndGradBucketGroup.start_grad_sync, GradReduction.start_rest

        def noted(group: Any, *args: Any, **options: Any) -> None:
            if group.grad_reduce_handle is None:
                parts = frozenset(part_of[param] for param in group.params)
                seen.append(Start(groups.index(group), is_in_backward[0], parts))
            start(group, *args, **options)

        def at_the_end(reduction: GradReduction) -> None:
            is_in_backward[0] = False
            rest(reduction)
            is_in_backward[0] = True

        _ParamAndGradBucketGroup.start_grad_sync, GradReduction.start_rest = noted, at_the_end
        for step in range(2):
            train_step(trainer, batches, step, 1.0)
        return seen


def test_reductions_start_in_the_backward_pass_but_for_parts_that_get_no_gradient() -> None:
    """Also in the first step, which megatron's own wrapper leaves out. The second rank has no picture."""
    with_pictures, without = run_ranks(starts_of_two_steps, 2, CASES["dp2"])
    assert all(one.is_in_backward for one in with_pictures)
    assert [one.is_in_backward for one in without] == [one.parts == {"text"} for one in without]
    assert len({one.parts for one in without}) > 1


@pytest.mark.parametrize("name", ["dp2", "pp2 vpp2 dp2, head in chunks"])
def test_reductions_start_in_one_order_on_all_ranks(name: str) -> None:
    case = CASES[name]
    for starts in run_ranks(starts_of_two_steps, case.world_size, case):
        assert [one.place for one in starts] == [*range(len(starts) // 2)] * 2
        assert starts[0].is_in_backward


# ---- nobody uses what has not arrived --------------------------------------------------------------------------------


def deliver_late() -> None:
    """In this process: until a collective is waited for, what it fills is not a number."""
    gather, reduce = _ParamAndGradBucketGroup.start_param_sync, _ParamAndGradBucketGroup.start_grad_sync

    def held_back(handle: Any, buffers: list[torch.Tensor]) -> SimpleNamespace:
        handle.wait()
        arrived = [buffer.clone() for buffer in buffers]
        for buffer in buffers:
            buffer.fill_(math.nan)

        def wait() -> None:
            for buffer, values in zip(buffers, arrived, strict=True):
                buffer.copy_(values)

        return SimpleNamespace(wait=wait)

    def late_gather(group: Any, **options: Any) -> None:
        gather(group, **options)
        group.param_gather_handle = held_back(group.param_gather_handle, [one.param_data for one in group.buckets])

    def late_reduction(group: Any, **options: Any) -> None:
        is_new = group.grad_reduce_handle is None
        reduce(group, **options)
        if is_new:
            group.grad_reduce_handle = held_back(group.grad_reduce_handle, [one.grad_data for one in group.buckets])

    _ParamAndGradBucketGroup.start_param_sync = late_gather
    _ParamAndGradBucketGroup.start_grad_sync = late_reduction


def three_steps(address: RankAddress, case: Case, overlap: dict[str, Any], waits_for_head: bool = True) -> list[float]:
    """Losses and gradient norms; with overlap, of late deliveries."""
    with megatron(ParallelConfig(**case.layout), address) as mesh:
        if overlap:
            deliver_late()
        if not waits_for_head:
            text.gathered = lambda param: param
        trainer, _ = trainer_and_batches(case, mesh, overlap)
        found = []
        for step in range(3):
            result = train_step(trainer, batches_of(case, mesh, step), step, 1.0)
            found += [result.loss, result.grad_norm]
            if overlap and step == 1:
                bare = [chunk.module for chunk in trainer.chunks]
                is_trained = [any(param.requires_grad for param in chunk.parameters()) for chunk in bare]
                assert [not are_finite(chunk) for chunk in bare] == is_trained, "the plant must show"
                assert all(are_finite(chunk) for chunk in trainer.bare_chunks)
                finish_param_gather(trainer.chunks)
        return found


def are_finite(module: torch.nn.Module) -> bool:
    return all(bool(param.isfinite().all()) for param in module.parameters())


QUICK = ("dp2, head in chunks", "dp2, tied, mtp, full recompute, head in chunks")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_nothing_is_used_before_it_has_arrived(name: str) -> None:
    """Three steps are those without overlap, though every buffer holds no numbers until its collective is waited for;
    and so it is for who reads parameters between steps."""
    case = CASES[name]
    plain = run_ranks(three_steps, case.world_size, case, {})
    late = run_ranks(three_steps, case.world_size, case, OVERLAP)
    tolerance = 1e-3 if "bf16" in name else 2e-6  # a norm in another order of summation, rounded with the weights
    assert late[0] == pytest.approx(plain[0], rel=tolerance) and plain[0][4] < plain[0][0]
    assert all(ranks == late[0] for ranks in late)


def test_a_head_that_reads_its_weight_too_early_is_caught() -> None:
    """Planted: the head in chunks takes the weight without waiting."""
    case = CASES["dp2, head in chunks"]
    with pytest.raises(Exception, match="NonFiniteError"):
        run_ranks(three_steps, 2, case, OVERLAP, False)


def published_after_a_step(address: RankAddress, waits: bool) -> bool:
    """Whether every number is finite that the publisher reads, of modules that it was given before the step."""
    with megatron(ParallelConfig(), address) as mesh:
        deliver_late()
        if not waits:
            publish_module.finish_param_gather = lambda _chunks: None
        trainer, batches = trainer_and_batches(CASES["dp2"], mesh, OVERLAP)
        publisher = Publisher(trainer.bare_chunks, trainer.config.model, mesh)
        train_step(trainer, batches, 1, 1.0)
        manifest_of, bare, found = publisher.manifest, [chunk.module for chunk in trainer.chunks], []

        def manifest(version: int) -> Manifest:
            found.append(all(are_finite(chunk) for chunk in bare))
            return manifest_of(version)

        publisher.manifest = manifest
        publish(trainer, publisher, None, 1, PACKS["text_only"][0][:1], SyncConfig())
        return all(found)


@pytest.mark.parametrize("waits", [True, False])
def test_weights_are_published_whole(waits: bool) -> None:
    """Planted, where it does not wait: what the publisher reads has not arrived."""
    assert run_ranks(published_after_a_step, 2, waits) == [waits, waits]


# ---- passes that are no step -----------------------------------------------------------------------------------------


def score(logits_RV: Logits, pack: LocalPack) -> float:
    return float(token_losses(logits_RV, pack.lanes[0].labels_R, current_mesh().tp).sum())


def passes_between_steps(address: RankAddress, case: Case, overlap: dict[str, Any]) -> list[Any]:
    """A forward pass after an update, and a step's microbatches one by one, as after a step that is not finite; then
    another step."""
    with megatron(ParallelConfig(**case.layout), address) as mesh:
        if overlap:
            deliver_late()
        trainer, batches = trainer_and_batches(case, mesh, overlap)
        train_step(trainer, batches, 1, 1.0)
        packs = local_packs(trainer.config.model.text, mesh, trainer.bare_chunks, batches)
        scores = run_forward(trainer.bare_chunks, packs, packs[0].num_stream_slots, score)
        views = inspect_step(trainer.config, mesh, trainer.device, trainer.chunks, batches).microbatches
        result = train_step(trainer, batches, 2, 1.0)
        return [*scores, *(one.loss_sum for one in views), *(one.largest[0][1] for one in views), result.loss]


@pytest.mark.parametrize("name", ["dp2", "pp2 vpp2 dp2, head in chunks"])
def test_passes_that_are_no_step_neither_reduce_nor_gather(name: str) -> None:
    case = CASES[name]
    plain = run_ranks(passes_between_steps, case.world_size, case, {})
    late = run_ranks(passes_between_steps, case.world_size, case, OVERLAP)
    for with_overlap, without in zip(late, plain, strict=True):
        assert with_overlap == pytest.approx(without, rel=1e-5)
