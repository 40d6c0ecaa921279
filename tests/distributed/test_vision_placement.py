"""Images shared out over tp x cp give the loss and every gradient of one process, whichever rank encodes what.

A large error on ``vision.*`` or ``projector.*`` alone names the sum that is wrong: a factor of tp is the gather's
backward, a part missing is the sum of the parameters' gradients over tp.
"""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mimo_megatron.config.run import ModuleTraining, ParallelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore import checkpoint, optimizer, weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.schedule import run_microbatches
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model import vision_share, vlm
from mimo_megatron.model.local_pack import local_pack
from mimo_megatron.model.vlm import build_chunks
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.train.step import build_trainer, cross_entropy, train_step
from tests.harness import run_ranks
from tests.samples import mixed_packs, random_media, random_sample, run_config, tiny_model

SLOTS = 96
# Measured over these cases: at most 2e-15; the planted faults below give 0.8 and 1.0.
FP64_TOLERANCE = 1e-12

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, dict(tp=2)),
    "tp2-sequence-parallel": (2, dict(tp=2, sequence_parallel=True)),
    "cp2": (2, dict(cp=2)),
    "tp2-cp2": (4, dict(tp=2, cp=2)),
    "cp2-dp2": (4, dict(cp=2)),
    "tp2-pp2": (4, dict(tp=2, pp=2)),
}
BALANCED = dict(vision_placement="balanced")
TWO_TEXTS = [random_sample(20, 30), random_sample(21, 11)]
LONG_VIDEO = random_media((5, 4, 6), 9, 1.5)

# Packs, frozen parts, recomputation, fields of the text model.
CASES: dict[str, dict[str, Any]] = {
    "mixed": {},
    "some ranks have no image": dict(packs=[[random_sample(10, 20, [random_media((1, 4, 6), 5)])], TWO_TEXTS]),
    "one giant image only": dict(packs=[[random_sample(11, 4, [random_media((1, 18, 18), 6)])]] * 2),
    "video": dict(packs=[[random_sample(12, 20, [LONG_VIDEO, random_media((1, 2, 2), 8)])], TWO_TEXTS]),
    "no image at all": dict(packs=[TWO_TEXTS] * 2),
    "frozen vision": dict(frozen={"vision"}),
    "frozen projector": dict(frozen={"projector"}),
    "both frozen": dict(frozen={"vision", "projector"}),
    "only the projector is trained": dict(frozen={"vision", "text"}),
    "full recompute": dict(recompute="full"),
    "multi-token prediction": dict(text=dict(num_mtp_layers=1)),
}

Outcome = tuple[float, int, dict[str, Tensor]]


def one_case(mesh: Mesh, parallel: ParallelConfig, case: dict[str, Any]) -> Outcome:
    """Loss sum, trained tokens and the whole gradient of every trained parameter on this rank's stage."""
    model = tiny_model(**case.get("text", {}))
    chunks = build_chunks(model, parallel, Numerics(torch.float64, recompute=case.get("recompute", "none")), mesh)
    weights.draw_weights(chunks, 1, mesh.tp)
    for chunk in chunks:
        chunk.freeze(case.get("frozen", set()))
    wrapped = optimizer.wrap(chunks, dtype_is_bf16=False)
    batches = [collate(pack, model, SLOTS) for pack in case.get("packs", mixed_packs())][mesh.dp.rank :: mesh.dp.size]
    packs = [local_pack(batch, mesh.cp, model.text.num_mtp_layers, chunks[0].sharing) for batch in batches]
    loss = cross_entropy(mesh, model.text.mtp_loss_weight)
    sums = run_microbatches(wrapped, packs, packs[0].num_stream_slots, loss, whole_gradients=True)
    trained = [(name, param) for name, param in weights.global_parameters(chunks) if param.requires_grad]
    grads = {name: weights.unshard(name, param.main_grad, param, mesh.tp).clone() for name, param in trained}
    return sums.objective, sums.count, grads


def cases_in(address: RankAddress, layout: dict[str, Any], names: list[str], fault: str = "") -> dict[str, Outcome]:
    """Every named case in one start of the ranks; ``fault`` breaks these processes only."""
    parallel = ParallelConfig(**layout)
    with megatron(parallel, address) as mesh:
        assert mesh.tp_cp.rank == mesh.cp.rank * mesh.tp.size + mesh.tp.rank
        if fault == "the sum over tp dropped":
            optimizer.sum_marked_over_tp = lambda chunks: None
        if fault == "the gather's backward summed over tp too":
            gather = vlm.gather_shared
            vlm.gather_shared = lambda *inputs: _SumGradient.apply(gather(*inputs), mesh)
        if fault.startswith("seed"):
            vision_share.spread = lambda costs, size: random.Random(f"{fault} {costs}").choices(
                range(size), k=len(costs)
            )
        return {name: one_case(mesh, parallel, CASES[name]) for name in names}


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.mesh.tp.group)
        return total, None


def errors(ranks: list[dict[str, Outcome]], want: dict[str, Outcome]) -> dict[str, tuple[float, str]]:
    """The worst relative error of each case, over ranks and tensors, and its name. Tensors must be the same ones."""
    worst = {}
    for case in ranks[0]:
        loss, count, wanted = want[case]
        found = []
        for outcome in ranks:
            assert outcome[case][:2] == (pytest.approx(loss, rel=FP64_TOLERANCE), count), case
            found += [(_error(grad, wanted[name]), name) for name, grad in outcome[case][2].items()]
        assert {name for _, name in found} == wanted.keys(), case
        worst[case] = max(found, default=(0.0, ""))
    return worst


def _error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item() if want.any() else got.norm().item()


@pytest.fixture(scope="module")
def one_process() -> dict[str, Outcome]:
    return run_ranks(cases_in, 1, {}, list(CASES))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_balanced_placement_gives_the_loss_and_every_gradient_of_one_process(name, one_process):
    world_size, layout = LAYOUTS[name]
    found = errors(run_ranks(cases_in, world_size, layout | BALANCED, list(CASES)), one_process)
    assert {case: one for case, one in found.items() if one[0] >= FP64_TOLERANCE} == {}


@pytest.mark.parametrize("seed", ["seed 1", "seed 2", "seed 3"])
def test_which_rank_encodes_what_changes_nothing(seed, one_process):
    """Pieces thrown over the ranks at random, by a different draw each time."""
    ranks = run_ranks(cases_in, 4, dict(tp=2, cp=2) | BALANCED, ["mixed", "video"], seed)
    assert max(errors(ranks, one_process).values())[0] < FP64_TOLERANCE


@pytest.mark.parametrize("name", ["tp2", "tp2-sequence-parallel", "tp2-cp2"])
@pytest.mark.parametrize("fault", ["the sum over tp dropped", "the gather's backward summed over tp too"])
def test_a_wrong_sum_over_tp_is_caught(fault, name, one_process):
    world_size, layout = LAYOUTS[name]
    worst = errors(run_ranks(cases_in, world_size, layout | BALANCED, ["mixed"], fault), one_process)["mixed"]
    assert worst[0] > 0.1 and worst[1].startswith(("vision.", "projector.")), worst


def refuse_whole_pack(address: RankAddress) -> None:
    parallel = ParallelConfig(tp=2, **BALANCED)
    with megatron(parallel, address) as mesh:
        (model,) = build_chunks(tiny_model(), parallel, Numerics(), mesh)
        with pytest.raises(AssertionError, match="wants the model's sharing"):
            model(local_pack(collate(mixed_packs()[0], tiny_model(), SLOTS), mesh.cp))


def test_a_balanced_model_does_not_train_on_a_pack_that_was_not_shared_out():
    run_ranks(refuse_whole_pack, 2)


# ---- training --------------------------------------------------------------------------------------------------------

ONLY_PROJECTOR = dict(vision=ModuleTraining(), text=ModuleTraining())
RECIPES: dict[str, dict[str, Any]] = {"everything": {}, "projector only": ONLY_PROJECTOR}


def runs_of(address: RankAddress, layout: dict[str, Any]) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Losses and gradient norms of three AdamW steps, and the vision weights then, by recipe."""
    runs = {}
    parallel = ParallelConfig(**layout)
    with megatron(parallel, address) as mesh:
        for name, fields in RECIPES.items():
            trainer = build_trainer(run_config(tiny_model(), parallel=parallel, **fields), mesh)
            packs = mixed_packs()[mesh.dp.rank :: mesh.dp.size]
            batches = [collate(pack, trainer.config.model, SLOTS) for pack in packs]
            results = [train_step(trainer, batches, step, 1.0) for step in range(3)]
            named = weights.global_parameters(trainer.bare_chunks)
            vision = {key: param.detach().clone() for key, param in named if key.startswith(("vision.", "projector."))}
            runs[name] = [x for one in results for x in (one.loss, one.grad_norm)], vision
    return runs


@pytest.fixture(scope="module")
def one_process_runs() -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    return run_ranks(runs_of, 1, {})[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_balanced_placement_trains_like_one_process(name, one_process_runs):
    """Losses and gradient norms, to 7e-7 measured; and all ranks hold the same encoder after it, bit for bit."""
    world_size, layout = LAYOUTS[name]
    ranks = run_ranks(runs_of, world_size, layout | BALANCED)
    for recipe, (want, _) in one_process_runs.items():
        assert want[4] < want[0]
        for runs in ranks:
            got, vision = runs[recipe]
            assert got == pytest.approx(want, rel=3e-6), recipe
            assert all(torch.equal(value, ranks[0][recipe][1][key]) for key, value in vision.items()), recipe


def saved_or_resumed(address: RankAddress, layout: dict[str, Any], folder: Any, is_saving: bool) -> list[float]:
    parallel = ParallelConfig(**layout)
    config = run_config(tiny_model(), parallel=parallel)
    with megatron(parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        batches = [collate(pack, config.model, SLOTS) for pack in mixed_packs()][mesh.dp.rank :: mesh.dp.size]
        if is_saving:
            train_step(trainer, batches, 0, 1.0)
            checkpoint.save(folder, config.model, trainer.bare_chunks, trainer.optimizer, {"step": 1})
        else:
            checkpoint.load(folder, config.model, trainer.bare_chunks, trainer.optimizer)
        return [train_step(trainer, batches, step, 1.0).loss for step in (1, 2)]


@pytest.mark.parametrize("before, after", [(BALANCED, {}), ({}, BALANCED)], ids=["to-replicated", "to-balanced"])
def test_a_checkpoint_of_one_placement_resumes_in_the_other(before, after, tmp_path):
    layout = dict(tp=2)
    whole = run_ranks(saved_or_resumed, 2, layout | before, tmp_path / "saved", True)[0]
    for part in run_ranks(saved_or_resumed, 2, layout | after, tmp_path / "saved", False):
        assert part == pytest.approx(whole, rel=3e-6)
