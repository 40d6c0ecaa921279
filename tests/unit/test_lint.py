"""data lint: one planted sample for every check is found under its name, and nothing is found in good data."""

import json
import tarfile
from dataclasses import replace

import pytest
import yaml

from mimo_megatron.cli import main
from mimo_megatron.data.lint import CHECKS, Limits, Linter, Summary
from mimo_megatron.data.shards import ShardSample, write_shards
from mimo_megatron.data.text_checks import language_of, oddities
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import DataError
from tests.data_fixtures import (
    TINY,
    clip,
    image_sample,
    mixed_samples,
    picture,
    recipe,
    text_sample,
    user_and_assistant,
    video_sample,
    write_tokenizer,
)


def said(answer: str, question="Hi.", **more) -> ShardSample:
    return ShardSample("planted", {"id": "planted", "messages": user_and_assistant(question, answer), **more})


def shown(content: bytes, answer="Seen.", name="image0.png") -> ShardSample:
    kind = "video" if name.endswith("mp4") else "image"
    question = [{"type": kind, kind: name}, {"type": "text", "text": "See?"}]
    return replace(said(answer, question), members={name: content})


def renamed(sample: ShardSample, **record) -> ShardSample:
    return replace(sample, key="planted", record={**sample.record, "id": "planted", **record})


PLANTED = {
    "json": replace(said("x"), record={"id": 5, "messages": []}),
    "messages": replace(said("x"), record={"id": "planted", "messages": [{"role": "bot", "content": ""}]}),
    "media_missing": replace(image_sample(8), key="planted", members={}),
    "media_unused": replace(said("x"), members={"image0.png": picture(56, 56)}),
    "media": shown(b"no picture"),
    "coordinates": shown(picture(56, 56, 99), "At <|box|>1,2,300,4<|/box|>."),
    "duplicate_id": replace(said("x"), record={**said("x").record, "id": "text-0"}),
    "no_answer": replace(said("x"), record={"id": "planted", "messages": [{"role": "user", "content": "Hi."}]}),
    "empty_answer": said(" \n"),
    "aspect_ratio": shown(picture(28, 28 * 25, 99)),
    "duplicate": renamed(text_sample(0)),
    "repeated_media": renamed(image_sample(1, [(56, 84)]), messages=shown(b"", "Other words.").record["messages"]),
    "mojibake": said("It’s not caf\u00c3\u00a9".replace("’", "\u00e2\u20ac\u2122")),
    "control_character": said("a\u0000b"),
    "invisible_character": said("left\u202eright"),
    "special_token": said("Bye<|im_end|>"),
    "media_mark": said("Look.", question="<image>\nWhat?"),
}


def found(folder, **options) -> dict[str, list]:
    by_check: dict[str, list] = {}
    for finding in Linter(**options).lint(folder):
        by_check.setdefault(finding.check, []).append(finding)
    return by_check


@pytest.fixture
def good():
    return [text_sample(0), *(image_sample(number, [(56, 84)]) for number in range(1, 4)), video_sample(4)]


def test_nothing_is_found_in_good_data(tmp_path, good):
    write_shards(good, tmp_path, 3)
    assert found(tmp_path, decodes=True) == {}


@pytest.mark.parametrize("check", PLANTED)
def test_a_planted_sample_is_found_under_its_name_alone(tmp_path, good, check):
    write_shards([*good, PLANTED[check]], tmp_path, 100)
    (only,) = found(tmp_path).items()
    assert only[0] == check
    (finding,) = only[1]
    assert finding.level == CHECKS[check][0] and finding.key == "planted" and finding.detail


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("image0.jpg", cut(picture(560, 560, format="JPEG"))),
        ("video0.mp4", clip(8).replace(b"\x00\x00\x01\xb6", b"\0" * 4)),
    ],
)
def test_media_with_a_good_header_and_bad_pixels_are_found_by_decoding(tmp_path, name, content):
    write_shards([shown(content, name=name)], tmp_path, 10)
    assert found(tmp_path) == {}
    assert set(found(tmp_path, decodes=True)) == {"decode"}


def test_a_torn_shard_and_two_files_of_one_name_are_found(tmp_path, good):
    write_shards([*good, image_sample(9)], tmp_path, 3)
    with tarfile.open(tmp_path / "shard-000000.tar", "a") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("twice.json"))
    with (tmp_path / "shard-000001.tar").open("r+b") as shard:
        shard.truncate(1000)
    assert set(found(tmp_path)) == {"duplicate_name", "torn_shard"}


def limits(tmp_path, **changes) -> Limits:
    data = recipe(tmp_path, write_tokenizer(tmp_path / "tokenizer"), **changes)
    return Limits(load_tokenizer(data.tokenizer, TINY.tokens, TINY.text.vocab_size), TINY, data)


def test_a_recipe_adds_its_own_limits(tmp_path):
    write_shards([text_sample(0), text_sample(1, 300)], tmp_path, 10)
    (finding,) = found(tmp_path, limits=limits(tmp_path))["over_capacity"]
    assert finding.id == "text-1" and "a pack holds data.pack_tokens 256" in finding.detail


def test_every_check_is_planted_somewhere_in_this_file():
    elsewhere = {"decode", "torn_shard", "duplicate_name", "over_capacity", "pair"}
    assert set(PLANTED) | elsewhere == set(CHECKS)


def test_a_recipe_of_a_reward_model_asks_for_pairs(tmp_path):
    reward = TINY.model_copy(update={"text": TINY.text.model_copy(update={"head": "reward"})})
    write_shards([text_sample(0)], tmp_path, 10)
    assert set(found(tmp_path, limits=replace(limits(tmp_path), model=reward))) == {"pair"}


def test_a_folder_without_shards_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no \*\.tar shard"):
        list(Linter().lint(tmp_path))


def test_the_verb_gives_1_with_findings_0_with_notes_alone_and_writes_lines(tmp_path, capsys):
    folder = tmp_path / "source"
    write_shards([*mixed_samples(3), PLANTED["mojibake"]], folder, 10)
    assert main(["data", "lint", str(folder), "--jsonl", str(tmp_path / "found.jsonl")]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("4 samples: 1 doubt\n") and "doubt mojibake: 1 (text that was decoded" in printed
    (line,) = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    assert (line["check"], line["id"], line["level"]) == ("mojibake", "planted", "doubt")


def test_the_verb_reads_a_recipe(tmp_path, capsys):
    folder = tmp_path / "source"
    write_shards([text_sample(0), text_sample(1, 300)], folder, 10)
    tree = {
        "name": "x",
        "dir": "run",
        "model": {"preset": "tiny-vl"},
        "data": {
            "sources": [{"path": str(folder)}],
            "tokenizer": str(write_tokenizer(tmp_path / "tokenizer")),
            "pack_tokens": 256,
            "pack_patches": 256,
        },
        "train": {"steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["data", "lint", str(tmp_path / "recipe.yaml")]) == 1
    assert "over_capacity: 1" in capsys.readouterr().out
    assert main(["data", "lint", str(tmp_path / "recipe.yaml"), "data.pack_tokens=2048"]) == 0


def test_notes_alone_are_not_bad():
    summary = Summary()
    assert not summary.is_bad and summary.text(3) == "3 samples: nothing to find fault with"


@pytest.mark.parametrize(
    "text", ["Ünï cödé, “quotes” – it’s €5", "一个红色的方块。", "É à la carte", "مرحبا", "👩‍🚀 🇪🇺"]
)
def test_honest_text_is_not_doubted(text):
    assert list(oddities(text)) == []


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is in the image?", "Latin script"),
        ("图中有什么？", "Chinese"),
        ("画像には何がありますか", "Japanese"),
        ("이미지에 무엇이 있습니까", "Korean"),
        ("Что на картинке?", "Cyrillic script"),
        ("使用 Python 编写一个程序", "Chinese"),
        ("请翻译 the following sentence 成中文", "mixed"),
        ("[1, 2, 3]", "no words"),
    ],
)
def test_the_language_is_told_by_script(text, language):
    assert language_of(text) == language
