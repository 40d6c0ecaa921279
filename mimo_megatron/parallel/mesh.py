"""The rank grid: four axes (tp, cp, dp, pp), integers first, process groups attached by whoever starts them.

Order is megatron-core's default: tp varies fastest, then cp, dp, pp. One spelling: ``mesh.tp.rank/.size/.group``.
"""

from dataclasses import dataclass

from torch.distributed import ProcessGroup

from mimo_megatron.errors import ConfigError


@dataclass(frozen=True)
class Axis:
    """One axis of the grid as this rank sees it. ``group`` is None where no process group was started."""

    rank: int
    size: int
    group: ProcessGroup | None = None


ALONE = Axis(0, 1)


@dataclass(frozen=True)
class Mesh:
    tp: Axis
    cp: Axis
    dp: Axis
    pp: Axis
    tp_cp: Axis
    """Those of one stage that work on the same packs; its rank is cp.rank * tp.size + tp.rank."""

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1

    @property
    def layout(self) -> str:
        return f"tp{self.tp.size} pp{self.pp.size} cp{self.cp.size} dp{self.dp.size}"


def single_process_mesh() -> Mesh:
    return Mesh(tp=ALONE, cp=ALONE, dp=ALONE, pp=ALONE, tp_cp=ALONE)


def data_parallel_size(world_size: int, tp: int, pp: int, cp: int) -> int:
    """dp, so that tp * pp * cp * dp == world_size. ``ConfigError`` where no whole dp does it."""
    model_ranks = tp * pp * cp
    if world_size < 1 or world_size % model_ranks:
        raise ConfigError(
            f"parallel: world size {world_size} % (tp {tp} * pp {pp} * cp {cp} = {model_ranks}) != 0; "
            f"start a multiple of {model_ranks} ranks or lower parallel.tp, pp or cp"
        )
    return world_size // model_ranks


def coordinates(rank: int, *, tp: int, cp: int, dp: int, pp: int) -> tuple[int, int, int, int]:
    """(tp, cp, dp, pp) coordinates of a global rank."""
    assert 0 <= rank < tp * cp * dp * pp
    rank, tp_rank = divmod(rank, tp)
    rank, cp_rank = divmod(rank, cp)
    pp_rank, dp_rank = divmod(rank, dp)
    return tp_rank, cp_rank, dp_rank, pp_rank
