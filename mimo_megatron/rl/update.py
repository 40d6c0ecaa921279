"""The update: rewarded groups packed, dealt over data-parallel ranks, and learnt from in one optimizer step or several.

The forward, the sums and the step are those of pre-training (``train/step.py``), with another loss. Every rank holds
the whole batch's tokens and rewards, which are few, and reads the pictures of its own packs alone.

Dims: R rows of a pack, V vocabulary (of this tp rank), N responses of the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_megatron.config.model import SpecialTokens
from mimo_megatron.config.rl import AlgorithmConfig
from mimo_megatron.config.run import RunConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.data.packing import pack_two_costs
from mimo_megatron.loss.cross_entropy import Logits, token_losses, token_losses_and_entropies
from mimo_megatron.loss.implicit_logits import ImplicitLogits
from mimo_megatron.loss.policy import Clipping, clipped_terms, on_policy_terms
from mimo_megatron.mcore.schedule import LossSums, run_forward
from mimo_megatron.model.local_pack import LocalPack
from mimo_megatron.model.vlm import VisionLanguageModel
from mimo_megatron.parallel import zigzag
from mimo_megatron.parallel.mesh import Axis, Mesh
from mimo_megatron.rl.engine.protocol import ReadPrompt
from mimo_megatron.rl.groups import PolicyRow, RewardedGroup, policy_rows, policy_sample
from mimo_megatron.train.step import StepResult, Trainer, local_packs, train_step
from mimo_megatron.types import EncodedSample, PackedBatch


@dataclass(frozen=True)
class UpdateResult:
    steps: tuple[StepResult, ...]
    rows: tuple[PolicyRow, ...]
    entropies_N: tuple[float, ...]
    """Mean over the tokens of each response, in nats, before it was learnt from."""
    gaps_N: tuple[float, ...]
    """Mean |log p of the trainer - log p of the engine| over the tokens of each response."""
    num_slots: int
    """Capacity of the packs of all ranks."""
    largest_gap: float
    largest_ratio_error: float
    """Largest |ratio - 1| at any token; 0 on policy."""
    clipped_fraction: float
    encoded: tuple[str, ...]
    """Questions whose media were encoded: once for each pack that holds some of their responses."""


class PolicyLoss:
    """The loss of one update of ``num_rows`` responses, and what it saw: ``found`` after the backward pass."""

    def __init__(
        self, tokens: SpecialTokens, mesh: Mesh, num_rows: int, clipping: Clipping | None, device: torch.device
    ):
        self._tokens, self._mesh, self._clipping = tokens, mesh, clipping
        self._sums_N4 = torch.zeros(num_rows, 4, dtype=torch.float64, device=device)
        self._largest_2 = torch.zeros(2, dtype=torch.float64, device=device)

    def __call__(self, logits_RV: Logits, pack: LocalPack) -> LossSums:
        lane, columns = pack.lanes[0], pack.lanes[0].columns
        losses_R, entropies_R = token_losses_and_entropies(
            allowed(logits_RV, self._tokens, self._mesh.tp), lane.labels_R, self._mesh.tp
        )
        if not len(lane.rows_R):
            nothing = losses_R.sum()
            return LossSums(nothing, nothing, lane.weights_R.sum())
        logprobs_R = -losses_R
        if self._clipping is None:
            terms = on_policy_terms(logprobs_R, columns["advantage"], columns["weight"])
        else:
            terms = clipped_terms(
                logprobs_R,
                columns["advantage"],
                columns["weight"],
                columns["old_logprob"],
                self._clipping,
                columns.get("reference_logprob"),
            )
        gaps_R = (logprobs_R.detach() - columns["engine_logprob"]).abs()
        seen_R4 = torch.stack([torch.ones_like(gaps_R), entropies_R, gaps_R, terms.is_clipped_R], dim=1).double()
        self._sums_N4.index_add_(0, columns["row"].long(), seen_R4)
        largest_2 = torch.stack([gaps_R.max(), (terms.ratios_R - 1).abs().max()]).double()
        self._largest_2 = torch.maximum(self._largest_2, largest_2)
        objective = terms.losses_R.sum()
        return LossSums(objective, objective, lane.weights_R.sum())

    def found(self) -> tuple[Tensor, Tensor]:
        """[N, 4] and [2], over all ranks. A collective over all ranks."""
        if not (self._mesh.is_last_stage and self._mesh.tp.rank == 0):
            self._sums_N4.zero_()
        dist.all_reduce(self._sums_N4)
        dist.all_reduce(self._largest_2, op=dist.ReduceOp.MAX)
        return self._sums_N4.cpu(), self._largest_2.cpu()


def allowed(logits_RV: Logits, tokens: SpecialTokens, tp: Axis) -> Logits:
    """The policy is the distribution that engines sample from: tokens that only prompts hold have no part in it.
    In place: a copy would be of the logits' size."""
    if isinstance(logits_RV, ImplicitLogits):
        return logits_RV.without(tokens.never_sampled)
    first = tp.rank * logits_RV.shape[-1]
    local = [token - first for token in tokens.never_sampled if 0 <= token - first < logits_RV.shape[-1]]
    return logits_RV.index_fill_(-1, torch.tensor(local, dtype=torch.int64, device=logits_RV.device), -torch.inf)


def update_policy(
    trainer: Trainer,
    groups: Sequence[RewardedGroup],
    read: ReadPrompt,
    step: int,
    rate_factor: float,
    reference: Sequence[VisionLanguageModel] | None = None,
    at_optimizer: Callable[[], None] = lambda: None,
) -> UpdateResult:
    """Learn from the groups. Every rank calls it with the same ones; there is at least one."""
    rl = trainer.config.rl
    assert rl is not None and groups
    algorithm, max_new_tokens = rl.algorithm, rl.rollout.max_new_tokens
    steps, rows, encoded, sums, largest = [], [], [], [], torch.zeros(2, dtype=torch.float64)
    parts = _parts(groups, algorithm.updates_per_batch)
    batches = []
    for part in parts:
        rows_of_part = policy_rows(part, algorithm, max_new_tokens)
        dealt = rollout_packs(rows_of_part, trainer.config, trainer.mesh.dp.size)
        encoded += [name for pack in dealt for name in {rows_of_part[number].question_id for number in pack}]
        packs = own_packs(trainer, rows_of_part, dealt, read)
        if algorithm.name == "grpo":
            packs = _with_logprobs(trainer, trainer.bare_chunks, packs, "old_logprob")
            if reference is not None:
                packs = _with_logprobs(trainer, reference, packs, "reference_logprob")
        batches.append((rows_of_part, packs))
    for rows_of_part, packs in batches:
        clipping, tokens = clipping_of(algorithm), trainer.config.model.tokens
        loss = PolicyLoss(tokens, trainer.mesh, len(rows_of_part), clipping, trainer.device)
        steps.append(train_step(trainer, packs, step, rate_factor, at_optimizer, loss))
        sums_N4, largest_2 = loss.found()
        rows += rows_of_part
        sums.append(sums_N4)
        largest = torch.maximum(largest, largest_2)
    seen_N4 = torch.cat(sums)
    tokens_N, entropies_N, gaps_N, clipped_N = seen_N4.unbind(1)
    return UpdateResult(
        steps=tuple(steps),
        rows=tuple(rows),
        entropies_N=tuple((entropies_N / tokens_N).tolist()),
        gaps_N=tuple((gaps_N / tokens_N).tolist()),
        num_slots=sum(len(packs) for _, packs in batches) * trainer.mesh.dp.size * trainer.config.data.pack_tokens,
        largest_gap=float(largest[0]),
        largest_ratio_error=float(largest[1]),
        clipped_fraction=float(clipped_N.sum() / tokens_N.sum()),
        encoded=tuple(encoded),
    )


def rollout_packs(rows: Sequence[PolicyRow], config: RunConfig, num_dp: int) -> list[list[int]]:
    """Numbers of the rows of each pack, of all data-parallel ranks: as many for each, the last ones perhaps empty."""
    data, parallel = config.data, config.parallel
    bundles = _bundles(rows, data.pack_tokens // 4)
    tokens = [sum(rows[number].num_tokens for number in bundle) for bundle in bundles]
    patches = [rows[bundle[0]].num_patches for bundle in bundles]
    packs = pack_two_costs(tokens, patches, data.pack_tokens, data.pack_patches)
    dealt = [[number for bundle in pack.tolist() for number in bundles[bundle]] for pack in packs]
    unit = num_dp * (parallel.pp if parallel.vpp > 1 else 1)
    return dealt + [[]] * (math.ceil(len(dealt) / unit) * unit - len(dealt))


def _bundles(rows: Sequence[PolicyRow], most_tokens: int) -> list[list[int]]:
    """Numbers of rows that go into one pack: responses to one question with media, which are then encoded once, but no
    more than fill a part of it, so that packs are still full."""
    bundles: list[list[int]] = []
    num_tokens = 0
    for number, row in enumerate(rows):
        joins = bundles and row.num_patches and rows[bundles[-1][0]].question_id == row.question_id
        if joins and num_tokens + row.num_tokens <= most_tokens:
            bundles[-1].append(number)
            num_tokens += row.num_tokens
        else:
            bundles.append([number])
            num_tokens = row.num_tokens
    return bundles


def own_packs(
    trainer: Trainer, rows: Sequence[PolicyRow], dealt: Sequence[Sequence[int]], read: ReadPrompt
) -> list[PackedBatch]:
    """This data-parallel rank's packs of those of ``rollout_packs``, with the pixels of their questions."""
    config, dp = trainer.config, trainer.mesh.dp

    def sample(number: int) -> EncodedSample:
        return policy_sample(read(rows[number].question_id), rows[number], number)

    own = dealt[dp.rank :: dp.size]
    return [collate([sample(number) for number in pack], config.model, config.data.pack_tokens) for pack in own]


def _parts(groups: Sequence[RewardedGroup], num_parts: int) -> list[Sequence[RewardedGroup]]:
    """The groups dealt into as many parts, none of them empty."""
    return [groups[start::num_parts] for start in range(min(num_parts, len(groups)))]


def clipping_of(algorithm: AlgorithmConfig) -> Clipping | None:
    """None where an update is on policy."""
    if algorithm.name == "on-policy":
        return None
    return Clipping(algorithm.clip_low, algorithm.clip_high, algorithm.kl_weight)


def _with_logprobs(
    trainer: Trainer, chunks: Sequence[VisionLanguageModel], batches: Sequence[PackedBatch], name: str
) -> list[PackedBatch]:
    """The batches with one more column: ``chunks``' log-probability of every trained token of this rank."""
    mesh, tokens = trainer.mesh, trainer.config.model.tokens
    packs = [pack.to(trainer.device) for pack in local_packs(trainer.config.model.text, mesh, chunks, batches)]

    def use(logits_RV: Logits, pack: LocalPack) -> Tensor:
        return -token_losses(allowed(logits_RV, tokens, mesh.tp), pack.lanes[0].labels_R, mesh.tp).cpu()

    found = run_forward(chunks, packs, packs[0].num_stream_slots, use)
    if not found:  # an inner stage, which sees no loss
        return list(batches)
    columns = []
    for batch, pack, logprobs_R in zip(batches, packs, found, strict=True):
        column_S = torch.zeros(batch.num_slots)
        slots = zigzag.local_slots(batch.num_slots, mesh.cp.rank, mesh.cp.size)
        column_S[slots[pack.lanes[0].rows_R.cpu()]] = logprobs_R.float()
        columns.append(replace(batch, columns={**batch.columns, name: column_S}))
    return columns
