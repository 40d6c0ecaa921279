"""Rows of LLaVA, ShareGPT, Qwen-VL, parquet and folders become samples of ours, or are refused by name."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mimo_megatron.cli import main
from mimo_megatron.config.run import ReadConfig
from mimo_megatron.data.formats.boxes import FRAMES
from mimo_megatron.data.formats.chat import REASONS
from mimo_megatron.data.formats.convert import REPORT_FILE, STATE_FILE, convert
from mimo_megatron.data.formats.detect import FORMATS, detect
from mimo_megatron.data.formats.sample import Reading
from mimo_megatron.data.index import build_index
from mimo_megatron.data.reading import read_media
from mimo_megatron.data.source import IndexedSource
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import DataError
from tests.data_fixtures import TINY, clip, picture, recipe, write_tokenizer

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}


@pytest.fixture
def here(tmp_path):
    """A folder with pictures and a clip under the names that the rows of this file use."""
    (tmp_path / "img").mkdir()
    for number in range(3):
        (tmp_path / f"img/{number}.jpg").write_bytes(picture(60 + number, 100, seed=number, format="JPEG"))
    (tmp_path / "img/clip.mp4").write_bytes(clip(8))
    (tmp_path / "img/broken.jpg").write_bytes(b"\xff\xd8\xff but no picture")
    (tmp_path / "img/broken.mp4").write_bytes(b"no clip")
    return tmp_path


def write_rows(path: Path, rows, *, as_array=True) -> Path:
    text = json.dumps(rows, indent=1) if as_array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def converted(source: Path, form: str, tmp_path: Path, **reading):
    """The samples, read back through an index, and what the conversion says of itself."""
    out = tmp_path / "out"
    done = convert(source, out, FORMATS[form], Reading(**reading))
    data = recipe(out, write_tokenizer(tmp_path / "tokenizer"))
    tokenizer = load_tokenizer(data.tokenizer, TINY.tokens, TINY.text.vocab_size)
    report = build_index(out, tokenizer, TINY, data)
    assert not report.skipped, "what is converted can be indexed"
    found = []
    for split in report.num_samples:
        opened = IndexedSource(out, split)
        found += [opened.read(number) for number in range(report.num_samples[split])]
    return found, done


def parts(sample) -> list:
    """The conversation, media as their bytes."""
    media = (read_media(ref, ReadConfig()) for ref in sample.media)
    said = []
    for message in sample.messages:
        content = message["content"]
        of_turn = [content] if isinstance(content, str) else [part.get("text") or next(media) for part in content]
        said.append((message["role"], of_turn))
    return said


def test_llava_with_one_several_and_no_images(here, tmp_path):
    rows = [
        {"id": "997bb945", "image": "img/0.jpg", "conversations": [HUMAN, GPT], "model": "gpt4v"},
        {
            "id": 17,
            "image": ["img/1.jpg", "img/2.jpg"],
            "conversations": [
                {"from": "human", "value": "<image>\nand <image> differ how?"},
                GPT,
                {"from": "human", "value": "Sure?"},
                GPT,
            ],
        },
        {"id": "text", "conversations": [{"from": "human", "value": " Hi \n"}, GPT]},
    ]
    samples, done = converted(write_rows(here / "llava.json", rows), "llava", tmp_path)
    assert [one.id for one in samples] == ["997bb945", "17", "text"] and done.num_samples == 3
    images = [(here / f"img/{number}.jpg").read_bytes() for number in range(3)]
    assert parts(samples[0]) == [("user", [images[0], "What is it?"]), ("assistant", ["A cat."])]
    assert parts(samples[1])[0] == ("user", [images[1], "and", images[2], "differ how?"])
    assert parts(samples[2])[0] == ("user", [" Hi \n"]), "only white space beside marks is dropped"
    assert samples[0].meta == {"model": "gpt4v"}


def test_sharegpt_in_both_spellings_with_system_and_lists_of_images(here, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>Who?\n"},
                {"role": "assistant", "content": "Kane."},
            ],
            "images": ["img/0.jpg"],
        },
        {
            "conversations": [
                {"from": "human", "value": "<video><image> which?"},
                {"from": "gpt", "value": "The first."},
            ],
            "images": ["img/1.jpg"],
            "videos": ["img/clip.mp4"],
            "system": "Be brief.",
            "tools": "",
        },
    ]
    samples, _ = converted(write_rows(here / "s.json", rows), "sharegpt", tmp_path)
    image, other, video = ((here / "img" / name).read_bytes() for name in ("0.jpg", "1.jpg", "clip.mp4"))
    assert [one.id for one in samples] == ["s.json:1", "s.json:2"]
    assert parts(samples[0]) == [("user", [image, "Who?\n"]), ("assistant", ["Kane."])], "text as it stands"
    assert parts(samples[1])[:2] == [("system", ["Be brief."]), ("user", [video, other, " which?"])]


def test_a_preference_pair_keeps_chosen_and_rejected(here, tmp_path):
    row = {
        "conversations": [{"from": "human", "value": "<image>Which?"}],
        "chosen": {"from": "gpt", "value": "This."},
        "rejected": {"from": "gpt", "value": "None."},
        "images": ["img/0.jpg"],
    }
    (sample,), _ = converted(write_rows(here / "p.json", [row]), "sharegpt", tmp_path)
    assert sample.meta == {"chosen": "This.", "rejected": "None."} and sample.messages[-1]["role"] == "user"


def test_qwen_vl_lines_with_video_and_packed_rows(here, tmp_path):
    rows = [
        {"image": "img/0.jpg", "conversations": [HUMAN, GPT]},
        {"images": ["img/1.jpg", "img/2.jpg"], "conversations": [{**HUMAN, "value": "<image>\n<image>\nBoth?"}, GPT]},
        {"video": "img/clip.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat moves?"}, GPT]},
        [{"image": f"img/{number}.jpg", "conversations": [HUMAN, GPT]} for number in range(2)],
    ]
    samples, done = converted(write_rows(here / "q.jsonl", rows, as_array=False), "qwen-vl", tmp_path)
    assert done.num_samples == 5
    video = (here / "img/clip.mp4").read_bytes()
    assert parts(samples[2])[0] == ("user", [video, "What moves?"])
    assert [one.kind for one in samples[1].media] == ["image", "image"]


def test_parquet_with_structs_of_bytes_and_parts_without_names(here, tmp_path):
    images = [{"bytes": (here / f"img/{number}.jpg").read_bytes(), "path": None} for number in range(3)]
    folder = here / "hf/data"
    folder.mkdir(parents=True)
    messages = [
        [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "Kane."}],
        [{"role": "user", "content": "Unmarked."}, {"role": "assistant", "content": "Yes."}],
    ]
    table = pa.table({"id": [1, 2], "messages": messages, "images": [images[:1], images[1:]], "score": [0.5, None]})
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    content = [
        [
            {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image", "text": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Seen."}]},
        ]
    ]
    pq.write_table(pa.table({"messages": content, "image": images[:1]}), folder / "test-00000-of-00001.parquet")
    samples, _ = converted(here / "hf", "hf-parquet", tmp_path)
    by_id = {one.id: parts(one)[0][1] for one in samples}
    assert by_id["1"] == [images[0]["bytes"], "Who?"]
    assert by_id["2"] == [images[1]["bytes"], images[2]["bytes"], "Unmarked."], "as TRL puts them"
    assert by_id["test-00000-of-00001.parquet:1"] == ["See", images[0]["bytes"]]
    assert IndexedSource(tmp_path / "out", "test").describe()["num_samples"] == 1, "the file's name says the split"
    assert [one.meta for one in samples if one.id == "1"] == [{"score": 0.5}]


def test_a_folder_of_captions_beside_their_pictures(here, tmp_path):
    (here / "img/0.txt").write_text("A cat.\n")
    (here / "img/1.json").write_text(json.dumps({"caption": "A dog.", "license": "CC0"}))
    (here / "img/clip.caption").write_text("It gets brighter.")
    for name in ("2.jpg", "broken.jpg", "broken.mp4"):
        (here / "img" / name).unlink()
    samples, done = converted(here / "img", "folder", tmp_path, prompt="Describe it.")
    assert [one.id for one in samples] == ["0.jpg", "1.jpg", "clip.mp4"] and not done.skipped
    assert parts(samples[0]) == [
        ("user", [(here / "img/0.jpg").read_bytes(), "Describe it."]),
        ("assistant", ["A cat."]),
    ]
    assert samples[1].meta == {"license": "CC0"} and samples[2].media[0].kind == "video"


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_with_a_table_of_captions(here, tmp_path, table):
    rows = [{"file_name": "0.jpg", "text": "A cat."}, {"file_name": "1.jpg", "text": 'A dog, "Rex".'}]
    if table.endswith("csv"):
        (here / "img" / table).write_text('file_name,text\n0.jpg,A cat.\n1.jpg,"A dog, ""Rex""."\n')
    else:
        write_rows(here / "img" / table, rows, as_array=False)
    assert detect(here / "img")[0] is FORMATS["folder"]
    samples, _ = converted(here / "img", "folder", tmp_path)
    assert [parts(one)[1][1] for one in samples] == [["A cat."], ['A dog, "Rex".']]


TALK = [HUMAN, GPT]
GOOD = {"id": "good", "image": "img/0.jpg", "conversations": TALK}


def _turns(*said):
    return [{"from": role, "value": text} for role, text in said]


BAD = {
    "json": "not a row",
    "columns": {"id": "x", "image": "img/0.jpg"},
    "role": {"conversations": _turns(("human", "Hi"), ("function_call", "{}"))},
    "order": {"conversations": _turns(("human", "Hi"), ("gpt", "A"), ("gpt", "B"))},
    "empty": {"conversations": _turns(("human", "Hi"), ("gpt", " \n"))},
    "unanswered": {"conversations": _turns(("human", "Hi"), ("gpt", "A"), ("human", "B"))},
    "mark_count": {"image": ["img/0.jpg", "img/1.jpg"], "conversations": TALK},
    "mark_in_answer": {"image": "img/0.jpg", "conversations": _turns(("human", "Show"), ("gpt", "<image>"))},
    "media_missing": {"image": "img/none.jpg", "conversations": TALK},
    "media_unreadable": {"image": "img/broken.jpg", "conversations": TALK},
    "media_kind": {"image": "https://example.org/0.jpg", "conversations": TALK},
    "box_frame": {"image": "img/0.jpg", "conversations": [HUMAN, {**GPT, "value": '{"bbox_2d": [1, 2, 3, 4]}'}]},
    "text": {"conversations": _turns(("human", "Hi"), ("gpt", "half a pair \ud800"))},
}
PLACES = {"order": ("conversations[2].value", "two answers in a row"), "media_missing": ("image", "none.jpg")}


def test_every_reason_but_coordinates_has_a_bad_row_here():
    assert set(BAD) == set(REASONS) - {"coordinates"}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_left_out_counted_and_reported_by_name(here, tmp_path, reason):
    rows = [GOOD, BAD[reason], {**GOOD, "id": "after"}]
    samples, done = converted(write_rows(here / "rows.json", rows), "llava", tmp_path)
    assert [one.id for one in samples] == ["good", "after"]
    assert done.skipped == {reason: 1} and done.rows_done == 3
    (line,) = [json.loads(line) for line in (tmp_path / "out" / REPORT_FILE).read_text().splitlines()]
    assert (line["file"], line["row"], line["reason"]) == (str(here / "rows.json"), 2, reason)
    field, detail = PLACES.get(reason, (line["field"], ""))
    assert line["field"] == field and detail in line["detail"]


def test_a_column_that_would_replace_the_conversation_that_was_read_is_refused(here, tmp_path):
    other = [{"role": "user", "content": "Another question?"}, {"role": "assistant", "content": "Another answer."}]
    rows = [
        {"image": "img/0.jpg", "conversations": [HUMAN, GPT]},
        {"conversations": [{**HUMAN, "value": "Say A."}, GPT], "messages": other},
    ]
    source, out = write_rows(here / "rows.json", rows), tmp_path / "out"
    done = convert(source, out, FORMATS["llava"], Reading())
    assert done.num_samples == 1 and done.skipped == {"columns": 1}
    assert json.loads((out / REPORT_FILE).read_text())["field"] == "messages"


def test_strict_stops_at_the_first_bad_row_and_leaves_no_folder(here, tmp_path):
    source = write_rows(here / "rows.json", [GOOD, BAD["order"]])
    with pytest.raises(DataError, match=r"rows.json row 2, conversations\[2\].*two answers in a row \(reason order\)"):
        convert(source, tmp_path / "out", FORMATS["llava"], Reading(), is_strict=True)
    assert not (tmp_path / "out").exists()


def test_an_id_that_comes_again_is_numbered(here, tmp_path):
    samples, done = converted(write_rows(here / "rows.json", [GOOD, GOOD, GOOD]), "llava", tmp_path)
    assert [one.id for one in samples] == ["good", "good#2", "good#3"] and done.num_renamed == 2


def grounding(answer: str, question="<image>\nWhere?") -> dict:
    return {"image": "img/0.jpg", "conversations": [{**HUMAN, "value": question}, {"from": "gpt", "value": answer}]}


@pytest.mark.parametrize(
    ("frame", "answer", "expected"),
    [  # the image is 100 wide and 60 high; resized to 112 x 56
        ("stored", '{"bbox_2d": [10, 20, 30, 40]}', '{"bbox_2d": <|box|>10,20,30,40<|/box|>}'),
        ("resized", '{"bbox_2d": [28, 14, 112, 56]}', '{"bbox_2d": <|box|>25,15,100,60<|/box|>}'),
        ("thousandths", '{"point_2d": [500, 250]}', '{"point_2d": <|point|>50,15<|/point|>}'),
        (
            "thousandths",
            "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>",
            "cat<|box|>10,12,30,24<|/box|>",
        ),
        ("square", "[0.10, 0.20, 0.50, 0.80]", "<|box|>10,0,50,60<|/box|>"),
        ("keep", '{"bbox_2d": [999, 2, 3, 4]}', '{"bbox_2d": [999, 2, 3, 4]}'),
    ],
)
def test_boxes_of_every_frame_become_pixels_of_the_stored_image(here, tmp_path, frame, answer, expected):
    source = write_rows(here / "g.json", [grounding(answer)])
    (sample,), _ = converted(source, "qwen-vl", tmp_path, boxes=frame)
    assert parts(sample)[1] == ("assistant", [expected])


def test_every_frame_of_a_box_is_tested():
    assert set(FRAMES) == {"stored", "resized", "thousandths", "square", "keep"}


@pytest.mark.parametrize(
    ("frame", "answer", "reason"),
    [
        ("stored", '"bbox_2d": [10, 20, 130, 40]', "coordinates"),
        ("stored", '"bbox_2d": [30, 20, 10, 40]', "coordinates"),
        ("stored", "[0.1, 0.2, 0.3, 0.4]", "box_frame"),
        ("square", '"bbox_2d": [1, 2, 3, 4]', "box_frame"),
    ],
)
def test_a_box_that_its_frame_cannot_hold_is_refused(here, tmp_path, frame, answer, reason):
    source = write_rows(here / "g.json", [grounding("None."), grounding(answer)])
    _, done = converted(source, "qwen-vl", tmp_path, boxes=frame)
    assert done.skipped == {reason: 1}


def files_of(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


@pytest.mark.parametrize("stop_at", [2, 5, 6, 10])
def test_a_stopped_conversion_goes_on_to_the_bytes_of_an_unbroken_one(here, tmp_path, monkeypatch, stop_at):
    rows = [BAD["order"] if number in (2, 5) else {**GOOD, "id": str(number % 4)} for number in range(10)]
    source = write_rows(here / "rows.json", rows)
    form, options = FORMATS["llava"], {"samples_per_shard": 3}
    convert(source, tmp_path / "whole", form, Reading(), **options)
    whole = files_of(tmp_path / "whole")

    from mimo_megatron.data.formats import convert as module

    calls, real = [], module.sample_of

    def breaking(*arguments):
        calls.append(arguments)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "sample_of", breaking)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", form, Reading(), **options)
    assert not (tmp_path / "out").exists()
    state = tmp_path / "out.part" / STATE_FILE
    rows_done = json.loads(state.read_bytes())["done"]["rows_done"] if state.exists() else 0
    (tmp_path / "out.part" / "shard-000003.tar").touch()  # as if it was renamed and the state not yet written
    convert(source, tmp_path / "out", form, Reading(), **options)
    assert files_of(tmp_path / "out") == whole
    assert len(calls) == stop_at + 10 - rows_done, "rows of whole shards are not made again"


def test_an_unfinished_conversion_of_other_settings_is_refused(here, tmp_path):
    source = write_rows(here / "rows.json", [GOOD, BAD["order"]])
    with pytest.raises(DataError):
        convert(source, tmp_path / "out", FORMATS["llava"], Reading(), is_strict=True, samples_per_shard=1)
    assert (tmp_path / "out.part" / STATE_FILE).exists()
    with pytest.raises(DataError, match="unfinished conversion with another format, reading"):
        convert(source, tmp_path / "out", FORMATS["qwen-vl"], Reading(boxes="keep"), samples_per_shard=1)


def test_a_finished_folder_is_not_overwritten(here, tmp_path):
    source = write_rows(here / "rows.json", [GOOD])
    convert(source, tmp_path / "out", FORMATS["llava"], Reading())
    with pytest.raises(DataError, match="exists already"):
        convert(source, tmp_path / "out", FORMATS["llava"], Reading())


def test_a_set_of_bad_rows_alone_is_an_error_with_the_counts(here, tmp_path):
    source = write_rows(here / "rows.json", [BAD["order"], BAD["empty"]])
    with pytest.raises(DataError, match=r"not one row .*1 order, 1 empty"):
        convert(source, tmp_path / "out", FORMATS["llava"], Reading())


def test_the_verb_says_the_format_and_what_was_left_out(here, tmp_path, capsys):
    source = write_rows(here / "rows.json", [GOOD, BAD["order"], GOOD])
    assert main(["data", "convert", str(source), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "llava, for row 1 of rows.json has id, image and conversations" in said
    assert "2 samples of 3 rows in 1 shards" in said and "rows left out: 1 order" in said
    assert "an earlier row has theirs: 1" in said


def test_the_choices_of_the_verb_are_the_formats_and_frames():
    from mimo_megatron.cli import data

    assert tuple(FORMATS) == data._FORMATS and FRAMES == data._BOX_FRAMES
