"""The planner's parameters are those of the model that is built: tensor by tensor, on every rank of several layouts."""

import pytest
import torch

from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.mcore.text import Numerics
from mimo_megatron.model.vlm import build_chunks
from mimo_megatron.planner.parameters import stage_parameters
from tests.harness import run_ranks

LAYOUTS = {
    "one process": dict(),
    "tp2, sequence parallel": dict(tp=2, sequence_parallel=True),
    "pp2": dict(pp=2),
    "tp2, pp2": dict(tp=2, pp=2),
    "pp2, uneven": "uneven",
    "pp2, vpp2": dict(pp=2, vpp=2),
    "cp2": dict(cp=2),
}


def layout_of(name: str, num_layers: int) -> ParallelConfig:
    fields = LAYOUTS[name]
    return ParallelConfig(**(dict(pp=2, stage_layers=(1, num_layers - 1)) if fields == "uneven" else fields))


def built(address: RankAddress, name: str, layout: ParallelConfig, tied: bool) -> list[dict[str, list[int]]]:
    """Sorted sizes of this rank's tensors, by stage and part."""
    with megatron(layout, address) as mesh, torch.device("meta"):
        chunks = build_chunks(model_of(name, tied), layout, Numerics(torch.bfloat16), mesh)
        return [
            {
                part: sorted(param.numel() for key, param in chunk.named_parameters() if key.startswith(f"{part}."))
                for part in ("vision", "projector", "text")
            }
            for chunk in chunks
        ]


def model_of(name: str, tied: bool):
    model = preset(name)
    return model.model_copy(update={"text": model.text.model_copy(update={"tie_embeddings": tied})})


CASES = [
    *(("tiny-vl", False, layout) for layout in LAYOUTS),
    ("tiny-vl", True, "one process"),
    ("tiny-vl", True, "pp2, vpp2"),
    ("tiny-base", False, "tp2, pp2"),
    ("mimo-vl-7b", False, "tp2, sequence parallel"),
    ("mimo-vl-7b", False, "pp2, uneven"),
    ("mimo-7b-base", False, "one process"),
]


@pytest.mark.parametrize("name, tied, layout", CASES)
def test_every_rank_has_the_tensors_that_the_planner_counts(name, tied, layout):
    model = model_of(name, tied)
    parallel = layout_of(layout, model.text.num_layers)
    stages = stage_parameters(model, parallel)
    ranks = run_ranks(built, parallel.model_ranks, name, parallel, tied)
    for rank, chunks in enumerate(ranks):
        pp_rank = rank // (parallel.tp * parallel.cp)
        for chunk, parts in enumerate(chunks):
            planned = stages[chunk * parallel.pp + pp_rank]
            assert {part: sorted(planned.sizes(part)) for part in parts} == parts, (rank, chunk)


def test_mimo_vl_7b_has_8306_million_parameters():
    (stage,) = stage_parameters(preset("mimo-vl-7b"), ParallelConfig())
    assert round(stage.total / 1e6, 1) == 8306.2
