"""The format of a path is told from its content and streamed; what may be two formats is refused with both names."""

import json
import tracemalloc
from pathlib import Path

import pytest

from mimo_megatron.data.formats.chat import RowError
from mimo_megatron.data.formats.detect import detect
from mimo_megatron.data.formats.json_rows import json_rows
from mimo_megatron.errors import DataError

TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


def write_rows(path: Path, rows, *, as_array=True) -> Path:
    path.write_text(json.dumps(rows) if as_array else "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SHOWN = {
    "llava": ("a.json", [{"id": "1", "image": "x.jpg", "conversations": TALK}]),
    "qwen-vl": ("a.json", [{"image": "x.jpg", "conversations": TALK}]),
    "sharegpt": ("a.jsonl", [{"messages": [{"role": "user", "content": "Hi"}], "images": []}]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_format_is_told_from_its_rows(tmp_path, name):
    file, rows = SHOWN[name]
    form, reason = detect(write_rows(tmp_path / file, rows, as_array=file.endswith("json")))
    assert form.name == name and reason.startswith("row 1 of a.json")


def test_text_alone_and_other_roles_are_sharegpt(tmp_path):
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert detect(write_rows(tmp_path / "a.json", [{"id": "1", "conversations": talk}]))[0].name == "sharegpt"
    talk[1]["from"] = "assistant"
    row = {"image": "x.jpg", "conversations": talk}
    assert detect(write_rows(tmp_path / "b.json", [row]))[0].name == "sharegpt"


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"id": "1", "image": "x.jpg", "conversations": TALK}, "--format llava or --format qwen-vl"),  # JSON lines
        ({"images": ["x.jpg"], "conversations": TALK}, "--format sharegpt or --format qwen-vl"),
        ({"id": "1", "video": "x.mp4", "conversations": TALK}, "--format llava or --format qwen-vl"),
    ],
)
def test_rows_that_two_formats_have_are_refused_with_both_names(tmp_path, row, names):
    with pytest.raises(DataError, match=names):
        detect(write_rows(tmp_path / "a.jsonl", [row], as_array=False))


def test_a_folder_that_holds_two_formats_is_refused(tmp_path):
    for name in ("0.txt", "0.jpg"):
        (tmp_path / name).touch()
    write_rows(tmp_path / "all.json", SHOWN["llava"][1])
    with pytest.raises(DataError, match=r"llava: row 1 of all.json.*; folder: 0.txt lies beside 0.jpg.*--format"):
        detect(tmp_path)


def test_what_shows_no_format_is_refused_with_all_names(tmp_path):
    with pytest.raises(DataError, match="none of the formats llava, sharegpt, qwen-vl, hf-parquet, folder"):
        detect(write_rows(tmp_path / "a.json", [{"question": "?"}]))
    with pytest.raises(DataError, match="does not exist"):
        detect(tmp_path / "nothing")


def test_an_array_is_read_in_memory_of_a_few_rows(tmp_path):
    row = json.dumps({"text": "x" * 1000, "nested": [[1, "]"], {"a": '\\"'}]})
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("[" + (row + ",\n ") * 19_999 + row + "]\n")
    tracemalloc.start()
    assert sum(1 for _ in json_rows(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6 < path.stat().st_size / 10


@pytest.mark.parametrize("text", ["[]", "[1, 23, 456]", ' [ {"a": [1, {"b": "]"}]} , "x" ]', "[-1.5e3, null, true]"])
def test_an_array_streams_as_json_reads_it_at_every_chunk_size(tmp_path, monkeypatch, text):
    (tmp_path / "a.json").write_text(text)
    for chunk in (1, 2, 3, 7, 100):
        monkeypatch.setattr("mimo_megatron.data.formats.json_rows._CHUNK", chunk)
        assert list(json_rows(tmp_path / "a.json")) == json.loads(text)


@pytest.mark.parametrize("text", ["[1, 2", "[1 2]", "[1,]", "[1] 2", '[{"a": 1, {"b": 2}]', "[NaN]"])
def test_a_broken_array_is_an_error_that_names_the_last_good_row(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json: broken JSON after row \d"):
        list(json_rows(tmp_path / "a.json"))


def test_a_bad_line_is_one_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": \n\n{"a": NaN}\n{"a": 2}\n')
    rows = list(json_rows(tmp_path / "a.jsonl"))
    assert [type(row) for row in rows] == [dict, RowError, RowError, dict]
