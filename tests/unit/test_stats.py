"""data stats: the numbers are those of the stored samples, and the page shows them without any other file."""

import re

import numpy as np
import pytest
import yaml

from mimo_megatron.cli import main
from mimo_megatron.data.bars import Limit, histogram
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.plan import Position
from mimo_megatron.data.shards import ShardSample
from mimo_megatron.data.stats import collect, summary, write_page
from tests.data_fixtures import (
    TINY,
    image_sample,
    recipe,
    text_sample,
    user_and_assistant,
    video_sample,
    write_source,
    write_tokenizer,
)


@pytest.fixture
def data(tmp_path):
    """Two sources, the second of half the weight."""
    folders = [tmp_path / "pictures", tmp_path / "words"]
    data = recipe(folders, write_tokenizer(tmp_path / "tokenizer"), min_pixels=784)
    data = data.model_copy(update={"sources": (data.sources[0].model_copy(update={"weight": 2.0}), data.sources[1])})
    pictures = [image_sample(0, [(28, 112)]), image_sample(1, [(56, 56), (112, 56)]), video_sample(2)]
    zh = ShardSample("zh", {"id": "zh", "messages": user_and_assistant("图中有什么？", "一个红色的方块。")})
    write_source(folders[0], pictures, data)
    write_source(folders[1], [text_sample(0), text_sample(1, 12), text_sample(2, 300), zh], data)
    return data


def test_the_numbers_are_those_of_the_samples(data):
    stats = collect(data, TINY, seed=1, num_samples=100, num_packs=3)
    pictures, words = stats.sources
    assert (pictures.draw_fraction, words.draw_fraction) == pytest.approx((2 / 3, 1 / 3))
    assert sorted(pictures.looked.aspect_ratios) == [0.5, 1, 4]
    assert sorted(pictures.looked.megapixels) == pytest.approx([28 * 112 / 1e6, 56 * 56 / 1e6, 112 * 56 / 1e6])
    assert pictures.looked.media == {"1 image": 1, "2 images": 1, "video": 1}
    assert words.looked.languages == {"Latin script": 3, "Chinese": 1}
    assert stats.packs.num_over_capacity == 1, "text-2"

    corpus = Corpus(data, TINY)
    masks = [corpus.encode(number)[0].loss_mask_T for number in range(7)]
    assert words.looked.num_trained == sum(int(mask.sum()) for mask in masks[3:])
    assert words.looked.trained_fractions == pytest.approx([mask.mean() for mask in masks[3:]])
    shares = [np.concatenate(part).mean() for part in (masks[:3], masks[3:])]
    weights = [2 * np.mean([len(mask) for mask in part]) for part in (masks[:3], masks[3:])]
    weights[1] /= 2
    assert stats.trained_fraction == pytest.approx(np.dot(shares, weights) / sum(weights))


def test_the_packs_are_those_of_the_run(data):
    stats = collect(data, TINY, seed=5, num_samples=1, num_packs=4)
    corpus = Corpus(data, TINY)
    packs, _ = corpus.plan(5).take(Position(0, 0), 4)
    tokens = [sum(corpus.planned_lengths(number)[0] for number in pack.tolist()) for pack in packs]
    assert stats.packs.token_fill_K.tolist() == [count / data.pack_tokens for count in tokens]
    assert stats.packs.num_samples_K.tolist() == [len(pack) for pack in packs]


def test_of_a_large_source_a_number_of_samples_is_read_evenly(data):
    stats = collect(data, TINY, seed=1, num_samples=2, num_packs=1)
    assert [one.looked.num_samples for one in stats.sources] == [2, 2]
    assert stats.sources[0].looked.media == {"1 image": 1, "video": 1}, "the first and the last"


def test_a_damaged_sample_is_counted_by_its_reason(data):
    tar = data.sources[1].path / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"id": "text-1"', b'"id": "text-9"'))
    stats = collect(data, TINY, seed=1, num_samples=9, num_packs=1)
    assert stats.counted("unreadable") == {"changed": 1} and "unreadable: 1 changed" in summary(stats, data, 1)


def test_an_epochs_steps_are_those_that_take_every_sample_once(data):
    plan = Corpus(data, TINY).plan(1)
    samples, packs, _ = plan.samples_per_epoch, *plan.take(Position(0, 0), 500)
    seen = np.cumsum([len(pack) for pack in packs])
    assert seen[-1] > 3 * samples, "many epochs"
    stats = collect(data, TINY, seed=1, num_samples=1, num_packs=500)
    assert stats.packs.packs_per_epoch == pytest.approx(500 * samples / seen[-1])
    steps = f"about {stats.packs.packs_per_epoch:,.0f} packs and {stats.packs.packs_per_epoch / 2:.1f} steps of 2"
    assert f"an epoch: {samples} samples, {steps}" in summary(stats, data, 2)


def test_the_page_needs_no_other_file_and_shows_every_value(data, tmp_path):
    stats = collect(data, TINY, seed=1, num_samples=100, num_packs=3)
    page = write_page(stats, data, TINY, tmp_path / "pages" / "stats.html").read_text(encoding="utf-8")
    assert "<script" not in page and "http" not in page and "url(" not in page
    tokens = page.partition(">Tokens<")[2].partition("</svg>")[0]
    counts = [int(one) for one in re.findall(r": (\d+) of (?:pictures|words)</title>", tokens)]
    assert sum(counts) == 7, "every sample is in a bar"
    assert "Chinese" in page and "2 images" in page


def test_the_verb_prints_numbers_and_writes_the_page(data, tmp_path, capsys):
    tree = {
        "name": "x",
        "dir": "run",
        "model": {"preset": "tiny-vl"},
        "data": data.model_dump(mode="json"),
        "train": {"steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    out = tmp_path / "stats.html"
    assert main(["data", "stats", str(tmp_path / "recipe.yaml"), "--out", str(out), "--packs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "pictures: 3 samples" in printed and "2 packs:" in printed and out.is_file()


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [1.0, 1e7], [0.001, 0.002], list(range(1, 200))])
def test_every_value_is_in_one_bar_of_a_histogram(values, is_log):
    chart = histogram({"a": np.array(values)}, label="x", is_log=is_log, limits=[Limit(6.0, "six")])
    counts = [int(one.replace(",", "")) for one in re.findall(r": ([\d,]+)</title>", chart)]
    assert sum(counts) == len(values)
    assert all(float(one) >= 0 for one in re.findall(r'(?:width|height|x|y)="(-?[\d.]+)"', chart))


def test_a_histogram_without_values_says_so():
    assert "none" in histogram({"a": np.zeros(0)}, label="x", is_log=True)
