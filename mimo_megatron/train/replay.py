"""Take a kept step again: its weights and packs, forward and backward once, in any layout that divides them."""

import json
from pathlib import Path

import torch.distributed as dist

from mimo_megatron import log, platform
from mimo_megatron.config.check import check
from mimo_megatron.config.run import RunConfig
from mimo_megatron.mcore import checkpoint
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.optimizer import wrap
from mimo_megatron.train.faults import WEIGHTS, cause, read_packs
from mimo_megatron.train.inspection import inspect_step
from mimo_megatron.train.step import build_model


def replay(address: RankAddress, config: RunConfig, fault: Path, out: Path) -> None:
    """Write what the step showed to ``out``, as ``{"shows_again": bool, "lines": [...]}``."""
    log.set_up(address.rank)
    check(config, address.world_size)
    with megatron(config.parallel, address, config.seed, config.train.collective_timeout_seconds) as mesh:
        device = platform.current().device(address.local_rank)
        bare = build_model(config, mesh, device)
        checkpoint.load(fault / WEIGHTS, config.model, bare)
        batches = read_packs(fault)[mesh.dp.rank :: mesh.dp.size]
        inspection = inspect_step(config, mesh, device, wrap(bare, config.train.precision == "bf16"), batches)
        if dist.get_rank() == 0:
            shows_again = inspection.first_bad is not None
            verdict = cause(inspection) if shows_again else "Everything is finite."
            lines = [*map(str, inspection.microbatches), f"{mesh.layout}: {verdict}"]
            out.write_text(json.dumps({"shows_again": shows_again, "lines": lines}))
