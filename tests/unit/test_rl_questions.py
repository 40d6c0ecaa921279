"""Questions from files of ours, verl's and TRL's: the same question from each, and every bad row named."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mimo_megatron.cli import main
from mimo_megatron.config.rl import RewardTask
from mimo_megatron.config.run import DataConfig, EncodingConfig, ReadConfig
from mimo_megatron.data.reading import read_media
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import DataError
from mimo_megatron.reward.images import image_path
from mimo_megatron.reward.service.offline import Offline
from mimo_megatron.reward.wire import ImageMeta, Message, Task
from mimo_megatron.rl.questions import Question, QuestionReader, encode_question, fingerprint
from tests.data_fixtures import TINY, clip, picture, write_tokenizer
from tests.repository import ROOT

PICTURE = picture(100, 56)  # shown as 112 x 56
SHA256 = hashlib.sha256(PICTURE).hexdigest()
BOX = [10, 5, 30, 45]
ASKED: list[dict[str, Any]] = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Where is it?"}]
ENCODING = EncodingConfig(tokenizer=Path("nowhere"), max_pixels=200_704)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "b.png").write_bytes(picture(100, 56, seed=1))
    (tmp_path / "wide.png").write_bytes(picture(56, 140))
    (tmp_path / "a.mp4").write_bytes(clip(16))
    return tmp_path


def reader(folder: Path) -> QuestionReader:
    return QuestionReader(TINY, ENCODING, folder / "media")


def read(folder: Path, rows: Sequence[Any], reward: Task | None = None, kind: str = "jsonl") -> list[Question]:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return reader(folder).read(path, "t", reward)


def ours(task: str, gold: Any = None, content: Any = "How many?", **more: Any) -> dict[str, Any]:
    return {"id": "q", "task": task, "gold": gold, "messages": [{"role": "user", "content": content}], **more}


def verl(gold: Any, content: str = "How many?", **more: Any) -> dict[str, Any]:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    judged = {"style": "rule", "ground_truth": gold}
    extra = {"index": 3, "split": "train"}
    return {"data_source": "x", "prompt": turns, "ability": "math", "reward_model": judged, "extra_info": extra, **more}


def complaint(folder: Path, rows: Sequence[Any], reward: Task | None = None, kind: str = "jsonl") -> str:
    with pytest.raises(DataError) as caught:
        read(folder, rows, reward, kind)
    return str(caught.value)


# --- the formats -----------------------------------------------------------------------------------------------------


def test_our_row_is_what_rewards_check_reads(folder: Path) -> None:
    image = {"size": [56, 100], "shown": [56, 112]}
    rows = [ours("box", [BOX], ASKED, meta={"image": image}), {**ours("count", 3), "id": "r", "level": "few"}]
    box, count = read(folder, rows)
    assert (box.id, box.task, box.reward_task, box.gold) == ("t/q", "t", "box", [BOX])
    assert box.meta.image == ImageMeta(sha256=SHA256, size=(56, 100), shown=(56, 112))
    assert read_media(box.raw.media[0], ReadConfig()) == PICTURE
    assert (count.id, count.gold, count.meta.image) == ("t/r", 3, None)
    assert main(["rewards", "check", str(folder / "rows.jsonl")]) == 0


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_verls_and_trls_rows_give_the_question_that_ours_gives(folder: Path, kind: str) -> None:
    (box,) = read(folder, [ours("box", [BOX], ASKED)])
    image: Any = {"bytes": PICTURE, "path": "lost.png"} if kind == "parquet" else {"path": "a.png"}
    text = json.dumps([BOX])
    user = {"role": "user", "content": "<image>Where is it?"}
    parts = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Where is it?"}]}
    from_verl: dict[str, Any] = {**verl(text), "prompt": [user], "images": [image], "id": "q"}
    rows = [
        from_verl,
        {**from_verl, "ability": "vision"},
        {"id": "q", "prompt": [parts], "image": image, "answer": text},
        {"id": "q", "prompt": "Where is it?", "images": [image], "solution": text, "ground_truth": text},
    ]
    for row in rows:
        (found,) = read(folder, [row], "box", kind)
        assert (found.id, found.gold, found.meta) == (box.id, box.gold, box.meta)
        assert found.raw.messages == box.raw.messages and read_media(found.raw.media[0], ReadConfig()) == PICTURE


def test_the_rows_that_the_docs_show_are_read(folder: Path) -> None:
    blocks = (ROOT / "docs/morl.md").read_text().split("```json\n")[1:]
    rows = [json.loads(block.partition("```")[0]) for block in blocks]
    (folder / "train").mkdir()
    for name in ("p-17.jpg", "3.png", "4.png"):
        (folder / "train" / name).write_bytes(picture(104, 112))
    found = [read(folder, [row], reward)[0] for row, reward in zip(rows, (None, None, "count"), strict=True)]
    assert [(one.reward_task, one.gold) for one in found] == [("box", [[24, 14, 47, 47]]), ("math", "7"), ("count", 5)]
    assert [len(one.raw.media) for one in found] == [1, 1, 1]


def test_pictures_inside_parquet_are_written_once_by_content(folder: Path) -> None:
    rows = [verl("[[10, 5, 30, 45]]", "<image>Where?", images=[{"bytes": PICTURE, "path": None}]) for _ in range(3)]
    found = read(folder, rows, "box", "parquet")
    assert [one.id for one in found] == [f"t/rows.parquet:{number}" for number in (1, 2, 3)]
    files = [path for path in (folder / "media").rglob("*") if path.is_file()]
    assert files == [image_path(folder / "media", SHA256)] and files[0].read_bytes() == PICTURE
    assert {one.raw.media[0].path for one in found} == {str(files[0])}


def test_verls_marks_are_places_among_several_turns_and_pictures(folder: Path) -> None:
    turns = [
        {"role": "user", "content": "<image>\nand <video>"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And <image>?"},
    ]
    rows = [verl("5", prompt=turns, images=["a.png", "wide.png"], videos=["file://" + str(folder / "a.mp4")])]
    (found,) = read(folder, rows)
    assert [one["content"] for one in found.raw.messages] == [
        ({"type": "image"}, {"type": "text", "text": "\nand "}, {"type": "video"}),
        ({"type": "text", "text": "Yes."},),
        ({"type": "text", "text": "And "}, {"type": "image"}, {"type": "text", "text": "?"}),
    ]
    assert [Path(ref.path).name for ref in found.raw.media] == ["a.png", "a.mp4", "wide.png"]


def test_verls_ability_names_the_task_unless_the_recipe_does(folder: Path) -> None:
    assert [(one.reward_task, one.gold) for one in read(folder, [verl("5")])] == [("math", "5")]
    assert [(one.reward_task, one.gold) for one in read(folder, [verl("5")], "count")] == [("count", 5)]
    model = verl("5") | {"reward_model": {"style": "model", "ground_truth": ""}}
    assert "nothing says what judges it" in complaint(folder, [model])
    assert read(folder, [model], "rm_text")[0].gold is None


def test_the_meta_of_a_foreign_row_reaches_its_rule(folder: Path) -> None:
    row = {
        "prompt": "When?",
        "video": "a.mp4",
        "answer": "[00:00, 00:02]",
        "meta": {"duration_seconds": 2.0, "image": None},
    }
    assert read(folder, [row], "time")[0].meta.duration_seconds == 2.0
    late = {**row, "answer": "[00:00, 00:09]"}
    assert "ends after the video of 2 s" in complaint(folder, [late], "time")


def test_a_reward_models_question_holds_its_chat_and_its_pictures_lie_where_the_service_looks(folder: Path) -> None:
    (found,) = read(folder, [ours("rm_multimodal", content=ASKED)])
    named = [{"type": "image", "image": SHA256}, {"type": "text", "text": "Where is it?"}]
    assert found.meta.messages == [Message(role="user", content=named)]
    assert image_path(folder / "media", SHA256).read_bytes() == PICTURE
    assert found.raw.media[0].sha256 == SHA256 and read_media(found.raw.media[0], ReadConfig()) == PICTURE
    (text,) = read(folder, [ours("rm_text")])
    assert text.meta.messages == [Message(role="user", content="How many?")]


def test_the_recipe_and_the_wire_name_the_same_tasks() -> None:
    assert get_args(RewardTask) == get_args(Task)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reward", "words"),
    [
        (ours("sudoku", 1), None, "task: Input should be 'math'"),
        (ours("count", 3), "math", "its task is 'count', but the recipe's reward is 'math'"),
        (ours("count"), None, "None is not a count"),
        (ours("math"), None, "the gold is 'None'; give a string"),
        (ours("math", [[1]]), None, "give a string"),
        (ours("rm_text", "yes"), None, "leave the gold out"),
        (ours("time", "soon"), None, "'soon' is not an interval"),
        (ours("box", [[30, 5, 10, 45]], ASKED), None, "x1 < x2"),
        (ours("box", [[0, 0, 57, 9]], ASKED), None, "leaves the stored image of 56 x 100"),
        (ours("box", [BOX]), None, "its gold is in pixels, but it has no image"),
        (ours("point", BOX, [*ASKED, *ASKED], meta={"unit": "cm"}), None, "meta.unit: Extra inputs"),
        (ours("point", BOX, [*ASKED, {"type": "image", "image": "b.png"}]), None, "names 2 of its pictures"),
        (ours("box", [BOX], ASKED, meta={"image": {"size": [100, 56], "shown": [112, 56]}}), None, "names 0 of its"),
        (ours("count", 3, []), None, "its last turn says nothing"),
        (ours("count", 3, " \n"), None, "its last turn says nothing"),
        (ours("count", 3, [{"type": "image", "image": "gone.png"}]), None, "does not exist"),
        (ours("count", 3, messages=[]), None, '"messages" must be a non-empty list'),
        (ours("count", 3, messages=[{"role": "assistant", "content": "3"}]), None, "end with the role 'assistant'"),
        (ours("count", 3, id="x" * 200), None, "200 characters"),
        ({"task": "count", "gold": 3, "messages": [{"role": "user", "content": "?"}]}, None, "it has no id"),
        (ours("rm_text", content=ASKED), None, "rm_text reads text only"),
        (ours("rm_multimodal", content=[{"type": "video", "video": "a.mp4"}]), None, "no reward model can judge it"),
        ({"question": "How many?"}, None, "neither messages (our rows) nor prompt"),
        ({"prompt": "How many?", "answer": "3"}, None, "set `reward` of its prompts to one of math, box"),
        ({"prompt": "How many?"}, "math", "give one of the columns solution, answer, ground_truth"),
        ({"prompt": "How many?", "answer": "3", "solution": "4"}, "math", "the columns solution, answer disagree"),
        ({"prompt": 5, "answer": "3"}, "math", "prompt is '5'"),
        ({"prompt": [{"role": "tool", "content": "?"}], "answer": "3"}, "math", "role 'tool'"),
        ({"prompt": "?", "answer": "3", "image": "a.png", "images": ["a.png"]}, "math", "both image and images"),
        ({"prompt": "?", "answer": "3", "images": "a.png"}, "math", "images is of type str"),
        ({"prompt": "?", "answer": "3", "images": [{"path": None}]}, "math", "give bytes or the path"),
        (verl("5", "<image><image>?", images=["a.png"]), None, "2 places for its 1 images"),
        (verl("5", "<image>?"), None, "1 places for its 0 images"),
        (verl(None), None, "the gold is 'None'"),
        (verl("many"), "count", "'many' is not a count"),
        ("{", None, "unreadable JSON"),
        ('{"id": NaN}', None, "NaN is not JSON"),
    ],
)
def test_a_row_that_cannot_be_asked_or_judged_is_refused_by_place_and_reason(
    folder: Path, row: Any, reward: Task | None, words: str
) -> None:
    text = complaint(folder, [row], reward)
    assert "rows.jsonl: 1 row cannot be asked" in text and "rows.jsonl:1: " in text and words in text


def test_all_bad_rows_are_listed_at_once_up_to_twenty(folder: Path) -> None:
    text = complaint(folder, [{**ours("count", -1), "id": str(number)} for number in range(30)])
    assert "30 rows cannot be asked" in text and "rows.jsonl:20: " in text and "... and 10 more" in text
    assert len(text.splitlines()) == 22


def test_two_rows_with_one_id_are_named(folder: Path) -> None:
    text = complaint(folder, [ours("count", 3), "", ours("count", 4)])
    assert "rows.jsonl:3: rows.jsonl:1 has the same id 't/q'" in text


def test_files_that_hold_no_questions_are_refused(folder: Path) -> None:
    assert "holds no question" in complaint(folder, [])
    assert "rows with messages are read from JSONL" in complaint(folder, [ours("count", 3)], kind="parquet")
    for name in ("gone.jsonl", "gone.parquet"):
        with pytest.raises(DataError, match="cannot be read"):
            reader(folder).read(folder / name, "t")
    (folder / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read"):
        reader(folder).read(folder / "torn.parquet", "t")
    with pytest.raises(DataError, match=r"read from \.jsonl and \.parquet"):
        reader(folder).read(folder / "a.png", "t")


def test_golds_of_mathematics_are_read_as_the_rule_will_where_workers_are_given(folder: Path) -> None:
    rows = [ours("math", r"\frac{1}{2}"), {**ours("math", r"\frac{1}{0}"), "id": "r"}]
    assert len(read(folder, rows)) == 2
    with Offline() as offline, pytest.raises(DataError, match=r"rows\.jsonl:2: task math: the gold"):
        QuestionReader(TINY, ENCODING, folder / "media", offline.math_problem).read(folder / "rows.jsonl", "t")


# --- prompts ---------------------------------------------------------------------------------------------------------


def data(folder: Path, **values: Any) -> DataConfig:
    settings = {**ENCODING.model_dump(), "tokenizer": folder, "pack_tokens": 64, "pack_patches": 32, **values}
    return DataConfig.model_validate(settings)


def test_a_prompt_ends_in_an_open_turn_and_shows_its_picture(folder: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(folder), TINY.tokens, TINY.text.vocab_size)
    (box,) = read(folder, [ours("box", [BOX], ASKED)])
    prompt = encode_question(box, tokenizer, TINY, data(folder), 8)
    open_turn = [TINY.tokens.turn_start, *tokenizer.encode("assistant\n")]
    assert prompt.token_ids_T[-len(open_turn) :].tolist() == open_turn
    assert not prompt.loss_mask_T.any() and prompt.media[0].grid == (1, 8, 4)
    assert box.meta.image is not None and box.meta.image.shown == (4 * 14, 8 * 14)


def test_a_prompt_that_does_not_fit_a_pack_with_its_response_is_refused_never_cut(folder: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(folder), TINY.tokens, TINY.text.vocab_size)
    (box,) = read(folder, [ours("box", [BOX], ASKED)])
    length = encode_question(box, tokenizer, TINY, data(folder), 1).num_tokens
    assert encode_question(box, tokenizer, TINY, data(folder), 64 - length).num_tokens == length
    for settings, most in ((data(folder), 65 - length), (data(folder, pack_patches=31), 1)):
        with pytest.raises(SampleError, match=r"t/q.*a pack holds") as caught:
            encode_question(box, tokenizer, TINY, settings, most)
        assert caught.value.reason == "over_capacity"


def test_a_fingerprint_knows_golds_and_texts_and_not_where_files_lie(folder: Path, tmp_path: Path) -> None:
    def of(row: Mapping[str, Any], where: Path = folder) -> str:
        return fingerprint(read(where, [row]))

    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.png").write_bytes(PICTURE)
    row = ours("box", [BOX], ASKED)
    assert of(row) == of(row, tmp_path / "other")
    others = [ours("box", [[10, 5, 30, 46]], ASKED), ours("point", BOX, ASKED), {**row, "id": "r"}]
    assert len({of(one) for one in (row, *others)}) == 4
