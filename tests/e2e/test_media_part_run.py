"""Runs whose ranks decode what they encode end with the bits of runs whose ranks decode all; one picture is damaged."""

import json
from pathlib import Path

import pytest

from mimo_megatron.config.run import DataConfig, ParallelConfig, RunConfig
from mimo_megatron.data.media_part import ALL_MEDIA
from mimo_megatron.train import loop
from mimo_megatron.train.agreement import _decoding_differs, _View
from mimo_megatron.train.launch import run_local
from tests.data_fixtures import mixed_samples, recipe, video_sample, write_source, write_tokenizer
from tests.e2e.faults_run import assert_same_run, rows_of, run_of
from tests.unit.test_media_part import damaged_picture

LAYOUTS = {
    "pp2": (2, dict(pp=2)),
    "tp2 balanced": (2, dict(tp=2, vision_placement="balanced")),
    "cp2 balanced": (2, dict(cp=2, vision_placement="balanced")),
    "tp2 pp2 balanced": (4, dict(tp=2, pp=2, vision_placement="balanced")),
}
SLOW = {"cp2 balanced", "tp2 pp2 balanced"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    home = tmp_path_factory.mktemp("data")
    limits = {"max_pixels": 100_000, "video": {"max_total_tokens": 128}}
    settings = recipe(home / "source", write_tokenizer(home / "tokenizer"), pack_patches=1024, **limits)
    samples = [*mixed_samples(12), video_sample(12), damaged_picture(13)]
    write_source(home / "source", samples, settings)
    return settings


def skipped_of(config: RunConfig) -> list[str]:
    path: Path = config.dir / "skipped.jsonl"
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS]
)
def test_a_run_that_decodes_parts_ends_with_the_bits_of_one_that_decodes_all(layout, data, tmp_path, monkeypatch):
    num_ranks, fields = LAYOUTS[layout]
    parts = run_of(data, tmp_path / "parts", steps=2, parallel=ParallelConfig(**fields))
    run_local(loop.pretrain, num_ranks, parts)
    whole = run_of(data, tmp_path / "whole", steps=2, parallel=ParallelConfig(**fields))
    monkeypatch.setattr(loop, "media_part", lambda *_: ALL_MEDIA)  # in the ranks too: they are forked
    run_local(loop.pretrain, num_ranks, whole)
    assert_same_run(parts, whole)
    assert skipped_of(parts) == skipped_of(whole) and set(skipped_of(whole)) == {"damaged-13"}
    for ours, theirs in zip(rows_of(parts), rows_of(whole), strict=True):
        assert ours["skipped"] == theirs["skipped"] and ours["num_images"] == theirs["num_images"]


def view(plan: int, dp_rank: int, *undecoded: int) -> _View:
    shared = {"recipe": 1, "data plan": plan}
    return _View(shared, f"packs of dp rank {dp_rank}", 7, dict.fromkeys(undecoded, ("id", "media", "")))


def test_ranks_look_again_only_where_to_leave_a_sample_out_can_help():
    assert _decoding_differs([view(1, 0, 5), view(1, 0)])
    assert _decoding_differs([view(1, 0), view(1, 1, 5), view(1, 1)])
    assert not _decoding_differs([view(1, 0, 5), view(1, 0, 5), view(1, 1, 6), view(1, 1, 6)])
    assert not _decoding_differs([view(1, 0, 5), view(2, 0)]), "another plan may not hold the sample at all"
