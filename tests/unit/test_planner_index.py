"""Packs from a real index: the packs that training will form, not assumed ones."""

from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.planner.from_index import packs_of_index
from tests.data_fixtures import TINY, mixed_samples, write_source, write_tokenizer
from tests.data_fixtures import recipe as data_section
from tests.samples import run_config


def test_packs_of_an_index_are_those_of_the_first_window(tmp_path):
    data = data_section(tmp_path / "source", write_tokenizer(tmp_path / "tokenizer"))
    report = write_source(tmp_path / "source", mixed_samples(40), data)
    config = run_config(TINY, parallel=ParallelConfig()).model_copy(
        update={"data": data.model_copy(update={"window_samples": 1000})}
    )
    found = packs_of_index(config)
    for pack in (found.typical, *found.worst):
        assert pack.num_tokens <= data.pack_tokens == sum(pack.runs)
        assert pack.num_rows == pack.num_tokens - pack.num_patches // 4
    most = max(pack.num_patches for pack in found.worst)
    assert found.typical.num_patches <= most <= data.pack_patches
    assert f"most {most:,}" in found.notes[0] and "from the index" in found.notes[0]
    assert 0 < most <= report.num_patches
