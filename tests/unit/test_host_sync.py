"""Between a pack's arrival on the device and the end of its step the host reads nothing back, forward or backward.

A GPU works through a queue that the host fills; an operation whose result decides a shape or a Python number makes the
host wait until the queue is empty. Which operations those are does not depend on the device, so a CPU can count them.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.data.collate import collate
from mimo_megatron.mcore import schedule
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.model.projector import Projector
from mimo_megatron.train import step
from mimo_megatron.types import VisionLayout
from tests.harness import run_ranks
from tests.samples import mixed_packs, run_config, tiny_model

SLOTS = 96
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::equal", "aten::is_nonzero",
}  # fmt: skip


class HostReads(TorchDispatchMode):
    """Counts, by the line of the project or of megatron that asked, operations that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.name().split(".")[0]
        if name in WAITING or _has_mask_index(name, args) or _has_open_length(name, args, kwargs or {}):
            frames = [one for one in traceback.extract_stack() if "/torch/" not in one.filename][:-1]
            self.found[f"{name} {frames[-1].filename}:{frames[-1].lineno}"] += 1
        return func(*args, **(kwargs or {}))


def _has_mask_index(name: str, args: tuple) -> bool:
    """``x[mask]``: as long as the mask has true elements. ``x[mask] = number`` is a fill, which does not wait."""
    if name not in ("aten::index", "aten::index_put_", "aten::index_put"):
        return False
    is_fill = name != "aten::index" and args[2].numel() == 1
    return not is_fill and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])


def _has_open_length(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Without ``output_size`` the host must know the sum of the repeats."""
    return name == "aten::repeat_interleave" and kwargs.get("output_size") is None


def host_reads(
    address: RankAddress, parallel: ParallelConfig, train: dict[str, Any], plant: Callable[[], None] = lambda: None
) -> Counter[str]:
    """Of the second step's microbatches, forward and backward. What is worked out once, at the first, is left out."""
    config = run_config(tiny_model(), parallel=parallel, **train)
    with megatron(config.parallel, address) as mesh:
        trainer = step.build_trainer(config, mesh)
        batches = [collate(pack, config.model, SLOTS) for pack in mixed_packs()]
        step.train_step(trainer, batches, 1, 1.0)
        plant()
        reads, rows = HostReads(), schedule._rows

        def watched(*args: Any) -> list[Tensor]:
            with reads:
                return rows(*args)

        schedule._rows = watched  # the rank is a process of its own
        assert step.backward(trainer, batches).count > 0
        return reads.found


def by_file(reads: Counter[str]) -> dict[str, int]:
    """Names of files without their folders, and how many reads stand there."""
    files: Counter[str] = Counter()
    for line, count in reads.items():
        files[line.rpartition("/")[2].rpartition(":")[0]] += count
    return dict(files)


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process": (1, {}, {}),
    "one process, recomputed": (1, {}, dict(recompute="full")),
    "sequence parallel, images shared out": (2, dict(tp=2, sequence_parallel=True, vision_placement="balanced"), {}),
    "context parallel": (2, dict(cp=2), {}),
    "interleaved pipeline": (2, dict(pp=2, vpp=2), {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_in_four_microbatches_the_host_reads_the_count_of_tokens_once_for_each_part_of_the_model(name: str) -> None:
    world_size, layout, train = LAYOUTS[name]
    for reads in run_ranks(host_reads, world_size, ParallelConfig(**layout), train):
        assert by_file(reads) == {"finalize_model_grads.py": layout.get("vpp", 1)}, reads


def norms_taken(address: RankAddress) -> tuple[int, bool]:
    """How often a step takes the norm of all gradients, and whether clipping by it changed the weights' way."""
    config = run_config(tiny_model())
    with megatron(config.parallel, address) as mesh:
        trainer = step.build_trainer(config, mesh)
        batches = [collate(pack, config.model, SLOTS) for pack in mixed_packs()]
        (own,) = trainer.optimizer.chained_optimizers
        take = own.get_grad_norm
        num_taken = 0

        def counted() -> Any:
            nonlocal num_taken
            num_taken += 1
            return take()

        own.get_grad_norm = counted
        norm = step.train_step(trainer, batches, 1, 1.0).grad_norm
        largest = config.train.optimizer.clip_grad
        clipped = take()  # of the gradients as the update left them
        return num_taken, abs(clipped - min(norm, largest)) < 1e-5 * largest and norm > largest


def test_the_norm_of_all_gradients_is_taken_once_a_step_and_clips_them() -> None:
    assert run_ranks(norms_taken, 1) == [(1, True)]


def read_a_sum() -> None:
    forward = Projector.forward

    def reading(self: Projector, x: Tensor, layout: VisionLayout) -> Tensor:
        assert float(x.detach().sum()) < 1e30
        return forward(self, x, layout)

    Projector.forward = reading


def choose_by_mask() -> None:
    forward = Projector.forward

    def choosing(self: Projector, x: Tensor, layout: VisionLayout) -> Tensor:
        out = forward(self, x, layout)
        return out[torch.ones(len(out), dtype=torch.bool)]

    Projector.forward = choosing


# Three of the four packs have images. What a backward reads stands where megatron starts it.
PLANTED: list[tuple[Callable[[], None], dict[str, int]]] = [
    (read_a_sum, {"test_host_sync.py": 3}),
    (choose_by_mask, {"test_host_sync.py": 3, "schedules.py": 3}),
]


@pytest.mark.parametrize(("plant", "expected"), PLANTED)
def test_a_planted_read_is_found_with_its_file(plant: Callable[[], None], expected: dict[str, int]) -> None:
    (reads,) = run_ranks(host_reads, 1, ParallelConfig(), {}, plant)
    assert by_file(reads) == {"finalize_model_grads.py": 1, **expected}
