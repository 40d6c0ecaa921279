"""Packing: exact small cases, its errors, the GIL, fill on a realistic mix, and the report."""

import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mimo_megatron import _packing
from mimo_megatron.cli import main
from mimo_megatron.config.pack_cost import PackCost, cost_by_flops
from mimo_megatron.config.presets import preset
from mimo_megatron.data.balance_report import Step, balance
from mimo_megatron.data.packing import Packs, pack, pack_two_costs
from mimo_megatron.data.packing_reference import check_packs, pack_reference
from mimo_megatron.data.packing_report import pack_command, plot, read_lengths, report
from mimo_megatron.data.source import INDEX_FILE, SampleLengths
from mimo_megatron.errors import DataError
from tests.samples import run_config


def as_lists(packs: Packs) -> list[list[int]]:
    return [one.tolist() for one in packs]


def vision_mix(num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and patches: 60 % with images of native size, 40 % text."""
    random = np.random.default_rng(7)
    merged = np.clip(random.lognormal(np.log(1200), 0.8, num_samples), 4, 4096).astype(np.int64)
    merged[random.random(num_samples) < 0.4] = 0
    text = random.lognormal(np.log(400), 1.0, num_samples).astype(np.int64)
    return np.clip(merged + text, 1, 16_384), merged * 4


def test_best_fit_fills_the_tightest_pack_that_holds_an_item() -> None:
    # 7 and 5 open two packs with 3 and 5 left; 3 fits both and goes to the tighter one, 4 to the other.
    assert as_lists(pack([5, 3, 7, 4], 10)) == [[2, 1], [0, 3]]


def test_of_equally_good_packs_the_one_filled_last_is_taken() -> None:
    assert as_lists(pack([6, 6, 6, 2], 10)) == [[0], [1], [2, 3]]


def test_equal_items_go_by_number_and_in_runs() -> None:
    assert as_lists(pack([3] * 7, 10)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_items_of_zero_length_go_where_least_space_is_left() -> None:
    assert as_lists(pack([0, 4, 0, 10], 10)) == [[3, 0, 2], [1]]
    assert as_lists(pack([0, 0, 0], 10)) == [[0, 1, 2]]


def test_with_two_costs_least_token_space_decides_then_most_patch_space() -> None:
    # Items 0, 1 and 2 open a pack each, with (tokens, patches) left: (4, 0), (4, 3), (5, 9).
    tokens, patches = [6, 6, 5, 4, 4, 4], [9, 6, 0, 0, 2, 0]
    packs = pack_two_costs(tokens, patches, 10, 9)
    # Item 4 needs 2 patches: of the two tightest packs only that of item 1 holds it. Then item 3 joins item 0, which is
    # tighter than item 2, and item 5 is left with item 2.
    assert as_lists(packs) == [[0, 3], [1, 4], [2, 5]]
    # Without item 4, item 3 prefers the pack of item 1: equal tokens left, more patches left.
    assert as_lists(pack_two_costs(tokens[:4], patches[:4], 10, 9)) == [[0], [1, 3], [2]]


def test_images_go_before_texts_of_as_many_tokens() -> None:
    # Text fills what they leave; of the two equal packs the one filled last comes first.
    assert as_lists(pack_two_costs([5, 5, 5, 5], [0, 0, 10, 10], 10, 10)) == [[2, 1], [3, 0]]


def test_nothing_packs_into_nothing() -> None:
    for packs in (pack([], 10), pack_two_costs([], [], 10, 10)):
        assert len(packs) == 0 and packs.offsets.tolist() == [0] and list(packs) == []


def test_packs_are_indexed_like_a_sequence() -> None:
    packs = pack([6, 6, 6], 10)
    assert len(packs) == 3 and packs[1].tolist() == [1] and packs.totals(np.array([6, 6, 6])).tolist() == [6, 6, 6]
    with pytest.raises(IndexError):
        packs[3]


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_any_integer_type_and_stride_gives_the_same_packs(dtype: type) -> None:
    lengths = np.arange(1, 200)
    expected = pack_reference(lengths[::3].tolist(), 256)
    packs = pack(lengths.astype(dtype)[::3], 256)
    assert packs.items.dtype == packs.offsets.dtype == np.int64
    assert as_lists(packs) == as_lists(expected)


def test_large_capacity_and_long_runs_match_the_definition() -> None:
    random = np.random.default_rng(3)
    lengths = (random.integers(1, 200, 400) ** 3).tolist()
    assert as_lists(pack(lengths, 9_000_000)) == as_lists(pack_reference(lengths, 9_000_000))
    assert as_lists(pack([1] * 1000, _packing.MAX_CAPACITY)) == [list(range(1000))]


def test_item_over_a_capacity_is_named_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"item 2 has 11 tokens but a pack holds 10; raise the capacity or drop"):
        pack([1, 10, 11, 12], 10)
    with pytest.raises(DataError, match=r"item 1 has 99 patches but a pack holds 64"):
        pack_two_costs([1, 1], [64, 99], 10, 64)


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([1, -2], 10, "item 1 has -2 tokens"),
        ([1.5], 10, "1-D integer array, not 1-D float64"),
        ([[1, 2]], 10, "not 2-D"),
        ([1], 0, "a pack of 0 tokens cannot be filled"),
        ([1], 2**26 + 1, "a pack of 67108865 tokens"),
        (np.array([2**63 + 1], np.uint64), 10, "item 0 has 9223372036854775809 tokens"),
    ],
)
def test_bad_costs_are_data_errors(lengths: object, capacity: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack(lengths, capacity)  # type: ignore[arg-type]


def test_two_costs_of_different_number_are_a_data_error() -> None:
    with pytest.raises(DataError, match="2 token counts but 1 patch counts"):
        pack_two_costs([1, 2], [3], 10, 10)


def test_extension_checks_its_arguments_itself() -> None:
    ones = np.ones(3, np.int64)
    with pytest.raises(ValueError, match=r"item 1 has 11 tokens, outside 0 \.\. 10"):
        _packing.pack_one(np.array([1, 11]), 10)
    with pytest.raises(ValueError, match=r"item 0 has -1 patches, outside 0 \.\. 10"):
        _packing.pack_two(ones, -ones, 10, 10)
    with pytest.raises(ValueError, match="3 token counts but 2 patch counts"):
        _packing.pack_two(ones, ones[:2], 10, 10)
    with pytest.raises(ValueError, match="capacity of 0 tokens is not in"):
        _packing.pack_one(ones, 0)
    with pytest.raises(ValueError, match="2 dims"):
        _packing.pack_one(np.ones((2, 2), np.int64), 10)
    with pytest.raises(TypeError):
        _packing.pack_one(np.ones(3), 10)  # type: ignore[arg-type]


def test_fill_of_a_vision_mix_is_at_the_lower_bound() -> None:
    tokens, patches = vision_mix(20_000)
    for patch_capacity in (32_768, 65_536, 131_072):
        packs = pack_two_costs(tokens, patches, 32_768, patch_capacity)
        check_packs(packs, (tokens, 32_768), (patches, patch_capacity))
        bound = max(-(-tokens.sum() // 32_768), -(-patches.sum() // patch_capacity))
        assert bound <= len(packs) <= bound * 1.01
    assert len(pack(tokens, 32_768)) == -(-tokens.sum() // 32_768)


def test_other_threads_run_while_packing() -> None:
    tokens, patches = vision_mix(1_000_000)
    span: list[float] = []

    def work() -> None:
        span.append(time.monotonic())
        _packing.pack_two(tokens, patches, 16_384, 65_536)
        span.append(time.monotonic())

    worker = threading.Thread(target=work)
    ticks = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.monotonic())
        time.sleep(0.001)
    start, end = span
    # Were the GIL held, the main thread could only run just before and just after.
    assert any(0.25 < (tick - start) / (end - start) < 0.75 for tick in ticks)


def test_report_counts_packs_waste_and_what_was_left_out() -> None:
    figures = report(np.array([6, 6, 3, 99]), 10)
    assert (figures.num_packs, figures.lower_bound, figures.num_over_capacity) == (2, 2, 1)
    assert figures.tokens.totals.tolist() == [6, 9]
    assert figures.waste_tokens == 5 and figures.tokens.fill_fraction == 0.75 and figures.mean_segments == 1.5

    both = report(np.array([6, 6, 3]), 10, np.array([0, 8, 8]), 8)
    assert both.patches is not None and both.patches.totals.tolist() == [8, 8]
    assert both.tokens.totals.sum() == 15 and both.lower_bound == 2


def test_patch_capacity_without_patches_is_a_data_error() -> None:
    with pytest.raises(DataError, match="needs the patches"):
        report(np.array([1]), 10, patch_capacity=10)


def test_lengths_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    lengths = np.array([5, 1, 9])
    np.save(tmp_path / "lengths.npy", lengths)
    (tmp_path / "lengths.txt").write_text("5\n1\n9\n")
    pq.write_table(pa.table({"num_patches": [4, 0, 8], "num_tokens": lengths}), tmp_path / INDEX_FILE)
    for name in ("lengths.npy", "lengths.txt", INDEX_FILE, "."):
        tokens, patches = read_lengths(tmp_path / name)
        assert tokens.tolist() == [5, 1, 9]
        assert (patches is None) == (name.startswith("lengths")) and (patches is None or patches.tolist() == [4, 0, 8])


def test_file_without_lengths_is_a_data_error(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.ones(3))
    (tmp_path / "words.txt").write_text("5\nfive\n")
    (tmp_path / "minus.txt").write_text("5\n-1\n")
    pq.write_table(pa.table({"length": [1]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"num_tokens": pa.array([1, None])}), tmp_path / "null.parquet")
    for name in ("float.npy", "words.txt", "minus.txt", "other.parquet", "null.parquet"):
        with pytest.raises(DataError, match=name):
            read_lengths(tmp_path / name)
    with pytest.raises(DataError, match="is not a file"):
        read_lengths(tmp_path / "absent.npy")


def test_pack_command_prints_the_figures_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens, patches = vision_mix(500)
    pq.write_table(pa.table({"num_tokens": tokens, "num_patches": patches}), tmp_path / INDEX_FILE)
    model, step = preset("mimo-vl-7b"), Step(2, 2)
    pack_command(tmp_path, 32_768, 65_536, model, step, tmp_path / "packs.png", tmp_path / "what_if.png")
    figures = report(tokens, 32_768, patches, 65_536)
    printed = capsys.readouterr().out
    assert f"{figures.num_packs:,}" in printed and f"{figures.tokens.fill_fraction:.3%}" in printed
    samples = SampleLengths(tokens, patches)
    found = balance(samples, cost_by_flops(model), 32_768, 65_536, step, 500)
    assert found.token_fill > 0.9 and f"{found.token_fill:.3%}" in printed
    assert found.step_efficiency and f"{found.step_efficiency:.2%}" in printed
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("packs.png", "what_if.png"))


def test_pack_takes_capacities_and_costs_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens, patches = vision_mix(500)
    pq.write_table(pa.table({"num_tokens": tokens, "num_patches": patches}), tmp_path / INDEX_FILE)
    config, cost = run_config(preset("mimo-vl-7b")), PackCost(per_token=1, per_patch=3)
    data = config.data.model_copy(update={"pack_tokens": 32_768, "pack_patches": 65_536, "cost": cost})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.model_copy(update={"data": data}).model_dump_json())
    assert main(["pack", str(tmp_path), "--recipe", str(recipe), "--ranks", "2", "--packs-per-rank", "2"]) == 0
    printed = capsys.readouterr().out
    samples, step = SampleLengths(tokens, patches), Step(2, 2)
    by_recipe, by_flops = (
        f"{balance(samples, one, 32_768, 65_536, step, 500).step_efficiency:.2%}"
        for one in (cost, cost_by_flops(config.model))
    )
    assert "balanced by data.cost" in printed and by_recipe in printed and by_recipe != by_flops
    words = tmp_path / "lengths.txt"
    words.write_text("30000\n2000\n700\n")
    assert main(["pack", str(words), "--recipe", str(recipe)]) == 0  # which count no patches
    assert "fill of 32,768 tokens" in capsys.readouterr().out
    for arguments, told in (((), "give --capacity, or --recipe"), (("--recipe", str(recipe), "--model", "tiny-vl"),
                                                                  "give --model, or --recipe")):  # fmt: skip
        with pytest.raises(SystemExit):
            main(["pack", str(tmp_path), *arguments])
        assert told in capsys.readouterr().err


def test_plot_of_no_samples_and_of_one_length_is_drawn(tmp_path: Path) -> None:
    for lengths in ([], [0, 0], [7, 7]):
        plot(report(np.array(lengths, np.int64), 8), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()
