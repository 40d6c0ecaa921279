"""Long texts in parts: nothing lost but the prediction of each part's first token, and one stream for any ranks."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from mimo_megatron.cli import main
from mimo_megatron.data.collate import collate
from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.loader import PackLoader, open_maker
from mimo_megatron.data.parts import Parts, parts_of, splits_texts
from mimo_megatron.data.source import SampleLengths
from mimo_megatron.data.verify_resume import Request, difference, read_steps
from mimo_megatron.mcore import weights
from mimo_megatron.mcore.boot import RankAddress, megatron
from mimo_megatron.planner.from_index import packs_of_index
from mimo_megatron.train.step import backward, build_trainer
from mimo_megatron.types import EncodedSample
from tests.data_fixtures import TINY, image_sample, recipe, text_sample, write_source, write_tokenizer
from tests.harness import run_ranks
from tests.samples import run_config, tiny_model

CAPACITY = 96
LONG = ("text-1", "text-4")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two of six samples are texts longer than a pack, one has too many patches."""
    home = tmp_path_factory.mktemp("parts")
    words = {0: 3, 1: 120, 2: 9, 4: 60}
    data = recipe(home / "source", write_tokenizer(home / "tokenizer"), pack_tokens=CAPACITY, pack_patches=256)
    samples = [text_sample(number, count) for number, count in words.items()]
    write_source(home / "source", [*samples, image_sample(3), image_sample(5, [(560, 560)])], data)
    return split(data)


def split(data, policy="split"):
    sources = tuple(one.model_copy(update={"long_samples": policy}) for one in data.sources)
    return data.model_copy(update={"sources": sources})


def by_sample(corpus):
    """The encoded parts of each sample by its id, in order."""
    found: dict[str, list[EncodedSample]] = {}
    for number in range(len(corpus.parts[0])):
        (part,) = corpus.encode(number) if corpus.planned_lengths(number)[1] < 1600 else (None,)
        if part:
            found.setdefault(corpus.read(number).id, []).append(part)
    return found


def rejoined(parts):
    return [np.concatenate([getattr(one, name) for one in parts]) for name in ("token_ids_T", "loss_mask_T")]


def test_parts_rejoin_to_the_tokens_and_the_loss_mask_of_the_sample(data):
    roomy = by_sample(Corpus(data.model_copy(update={"pack_tokens": 4096}), TINY))
    parts = by_sample(Corpus(data, TINY))
    assert {name: len(cut) for name, cut in parts.items() if len(cut) > 1} == {"text-1": 7, "text-4": 4}
    for name, (sample,) in roomy.items():
        cut = parts[name]
        assert all(map(np.array_equal, rejoined(cut), (sample.token_ids_T, sample.loss_mask_T)))
        sizes = [one.num_tokens for one in cut]
        assert max(sizes) <= CAPACITY and max(sizes) - min(sizes) <= 1


def test_a_part_that_is_cut_a_token_late_does_not_rejoin(data, monkeypatch):
    cut = Parts.cut

    def late(self, number, sample):
        one = cut(self, number, sample)
        return dataclasses.replace(one, token_ids_T=one.token_ids_T[1:]) if one.id != sample.id else one

    whole = by_sample(Corpus(data, TINY))
    monkeypatch.setattr(Parts, "cut", late)
    parts = by_sample(Corpus(data, TINY))
    for name in LONG:
        assert not np.array_equal(rejoined(parts[name])[0], rejoined(whole[name])[0])


def test_each_cut_costs_the_training_of_one_token_and_no_other(data):
    found = by_sample(Corpus(data, TINY))
    for name, parts in ((name, found[name]) for name in LONG):
        trained = int(rejoined(parts)[1].sum())
        packs = [collate([part], TINY, CAPACITY) for part in parts]
        first = sum(bool(part.loss_mask_T[0]) for part in parts[1:])
        assert sum(pack.num_trained for pack in packs) == trained - first, name
        assert first == len(parts) - 1, "every cut is inside the answer here"
        for pack, part in zip(packs, parts, strict=True):
            assert pack.positions_3S[0, : part.num_tokens].tolist() == list(range(part.num_tokens))


def gradients(address: RankAddress, packs: list) -> tuple[float, dict[str, torch.Tensor]]:
    config = run_config(tiny_model())
    with megatron(config.parallel, address) as mesh:
        trainer = build_trainer(config, mesh)
        sums = backward(trainer, packs)
        return float(sums.loss), {
            name: param.main_grad.clone() for name, param in weights.global_parameters(trainer.bare_chunks)
        }


def test_a_training_step_on_parts_is_that_on_the_same_tokens_given_as_samples(data):
    corpus = Corpus(data, TINY)
    whole = by_sample(Corpus(data.model_copy(update={"pack_tokens": 4096}), TINY))["text-4"][0]
    numbers = [n for n in range(len(corpus.parts[0])) if corpus.sample_id(n).startswith("text-4/")]
    parts = [part for number in numbers for part in corpus.encode(number)]
    ends = np.cumsum([0, *(part.num_tokens for part in parts)])
    given = [
        EncodedSample(f"given-{place}", whole.token_ids_T[start:end], whole.loss_mask_T[start:end])
        for place, (start, end) in enumerate(itertools.pairwise(ends))
    ]
    found, expected = (
        run_ranks(gradients, 1, [collate([one], TINY, CAPACITY) for one in samples])[0] for samples in (parts, given)
    )
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_what_is_planned_of_parts_is_their_own_length():
    lengths = SampleLengths(*(np.array(one) for one in ([250, 90, 500], [0, 0, 8], [250**2, 8000, 9], [0, 0, 7])))
    parts = parts_of(lengths, 100, splits=True)
    assert parts.sample_N.tolist() == [0, 0, 0, 1, 2]
    assert parts.lengths.num_tokens_N.tolist() == [83, 83, 84, 90, 500], "with patches it stays whole"
    assert parts.lengths.segment_squares_N.tolist() == [83**2, 83**2, 84**2, 8000, 9]
    assert [parts.name(number, "x") for number in (1, 3)] == ["x/part-2-of-3", "x"]
    assert parts.num_cut == (1, 3)
    assert parts_of(lengths, 100, splits=False).lengths.num_tokens_N.tolist() == [250, 90, 500]


def test_the_loader_trains_on_every_part_once_an_epoch_and_still_refuses_media_over_capacity(data):
    found: dict[str, dict[str, int]] = {}
    for policy in ("split", "refuse"):
        loader = PackLoader(split(data, policy), TINY, packs_per_step=1, seed=5)
        names = []
        while loader.state()["epoch"] < 1:
            names += [name for pack in loader.next_step() for name in pack.sample_ids]
        found[policy] = dict(loader.skipped)
        long = [name for name in names if "/" in name]
        assert len(set(long)) == (11 if policy == "split" else 0)
        assert all(share >= 1 for share in loader.epochs_of_sources().values())
        loader.close()
    assert found == {"split": {"over_capacity": 1}, "refuse": {"over_capacity": 3}}


def test_pairs_are_never_cut(data):
    rewarding = TINY.model_copy(update={"text": TINY.text.model_copy(update={"head": "reward"})})
    assert [splits_texts(data.sources[0], model) for model in (TINY, rewarding)] == [True, False]


def test_a_stream_of_parts_goes_on_alike_on_other_numbers_of_ranks(data):
    maker = open_maker(data, TINY)
    request = Request(data, TINY, 3, 6, 4, 2, (3, 2, 1), (0,))
    whole, _ = read_steps(maker, request, 1, 4)
    before, state = read_steps(maker, request, 3, 2)
    after, _ = read_steps(maker, request, 2, 2, json.loads(json.dumps(state)))
    maker.close()
    assert any("/part-" in name for step in whole for pack in step for name in pack.sample_ids)
    assert difference(before + after, whole, 0) == ""


def test_index_lint_and_stats_say_how_many_texts_are_cut(data, tmp_path, capsys):
    config = run_config(TINY).model_copy(update={"data": data})
    path = tmp_path / "recipe.yaml"
    path.write_text(config.model_dump_json())
    assert main(["data", "index", str(path)]) == 0
    assert "texts among them: 2, cut into 11 parts" in capsys.readouterr().out
    main(["data", "lint", str(path)])
    assert "over_capacity: 1" in capsys.readouterr().out
    assert main(["data", "stats", str(path), "--out", str(tmp_path / "stats.html")]) == 0
    assert "texts longer than a pack: 2, cut into 11 parts" in capsys.readouterr().out


def test_the_planner_of_layouts_counts_parts(data):
    config = run_config(TINY).model_copy(update={"data": data})
    found = packs_of_index(config)
    assert max(max(pack.segments) for pack in (found.typical, *found.worst)) <= CAPACITY
