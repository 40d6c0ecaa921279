"""Samples to ids and patches: measured lengths are exact, coordinates follow the resize, errors name samples."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_megatron.config.presets import preset
from mimo_megatron.data import encode
from mimo_megatron.data.encode import encode_sample, length_settings, measure_sample
from mimo_megatron.data.jsonl import read_jsonl
from mimo_megatron.data.markup import Frame, rescale_messages
from mimo_megatron.data.records import SampleError, parse_record
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.errors import DataError
from mimo_megatron.types import MediaRef, RawSample
from tests.data_fixtures import TINY, clip, picture, recipe, user_and_assistant, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")), TINY.tokens, TINY.text.vocab_size)


@pytest.fixture
def data(tmp_path):
    return recipe(tmp_path, tmp_path)


def raw_sample(folder, question, answer, files, name="sample-1") -> RawSample:
    """A sample whose media are files of their own: one (kind, bytes) each, shown before the question."""
    media = []
    for number, (kind, content) in enumerate(files):
        path = folder / f"{number}.bin"
        path.write_bytes(content)
        media.append(MediaRef(kind, str(path), 0, len(content), ""))
    parts = tuple({"type": kind} for kind, _ in files)
    return RawSample(
        name, "test", tuple(user_and_assistant((*parts, {"type": "text", "text": question}), answer)), tuple(media)
    )


CASES = {
    "text": [],
    "png": [("image", picture(60, 100))],
    "jpeg": [("image", picture(300, 170, format="JPEG"))],
    "tiny image grown to min_pixels": [("image", picture(9, 14))],
    "two images": [("image", picture(56, 56)), ("image", picture(200, 90))],
    "video": [("video", clip(13, 80, 120))],
    "video and image": [("video", clip(16)), ("image", picture(84, 84))],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_pixels", [12_845_056, 9000])
def test_measured_lengths_equal_encoded_lengths(tmp_path, tokenizer, data, name, max_pixels):
    data = data.model_copy(update={"max_pixels": max_pixels, "system_prompt": "Be brief."})
    raw = raw_sample(
        tmp_path, "Where? <|box image=0|>1,2,8,9<|/box|>" if "image" in name else "Hm?", "Here.", CASES[name]
    )
    sample = encode_sample(raw, tokenizer, TINY, data)
    measured = measure_sample(raw, [content for _, content in CASES[name]], tokenizer, TINY, data)
    assert measured[:2] == (sample.num_tokens, sample.num_patches)
    is_placeholder = np.isin(sample.token_ids_T, [TINY.tokens.image_pad, TINY.tokens.video_pad])
    assert is_placeholder.sum() * 4 == sample.num_patches == sum(len(one.patches_PC) for one in sample.media)


def test_placeholders_that_are_not_merged_tokens_are_refused_with_the_sample_named(
    tmp_path, tokenizer, data, monkeypatch
):
    raw = raw_sample(tmp_path, "What?", "Noise.", [("image", picture(56, 56))])
    ids, mask = encode.encode_chat(raw.messages, tokenizer, TINY.tokens, [3], system_prompt=None)
    monkeypatch.setattr(encode, "encode_chat", lambda *_, **__: (ids, mask))
    with pytest.raises(
        SampleError, match="'sample-1': 3 image placeholders for 4 merged vision tokens of 1 media"
    ) as fault:
        encode_sample(raw, tokenizer, TINY, data)
    assert fault.value.reason == "placeholders"


def test_damaged_media_are_refused_with_the_sample_named(tmp_path, tokenizer, data):
    raw = raw_sample(tmp_path, "What?", "Noise.", [("image", picture(56, 56)[:60])])
    with pytest.raises(SampleError, match="sample 'sample-1'") as fault:
        encode_sample(raw, tokenizer, TINY, data)
    assert fault.value.reason == "media"


def test_a_text_model_refuses_media_but_reads_text(tmp_path, tokenizer, data):
    text_only = preset("tiny-base")
    with pytest.raises(SampleError, match="'tiny-base' reads text only"):
        encode_sample(raw_sample(tmp_path, "?", "!", [("image", picture(56, 56))]), tokenizer, text_only, data)
    assert encode_sample(raw_sample(tmp_path, "?", "!", []), tokenizer, text_only, data).num_patches == 0


def test_a_prompt_can_end_with_an_open_turn(tmp_path, tokenizer, data):
    raw = raw_sample(tmp_path, "What?", "Noise.", [("image", picture(56, 56))])
    prompt = dataclasses.replace(raw, messages=raw.messages[:1])
    ids = encode_sample(prompt, tokenizer, TINY, data, add_generation_prompt=True).token_ids_T
    whole = encode_sample(raw, tokenizer, TINY, data).token_ids_T
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert whole[: len(ids)].tolist() == ids.tolist()


def test_settings_that_change_lengths_change_the_record_of_settings(tokenizer, data):
    before = length_settings(tokenizer, TINY, data)
    for change in ({"system_prompt": "x"}, {"max_pixels": 5000}, {"min_pixels": 4000}):
        assert length_settings(tokenizer, TINY, data.model_copy(update=change)) != before
    assert length_settings(tokenizer, TINY, data.model_copy(update={"pack_tokens": 77})) == before
    assert json.loads(json.dumps(before)) == before


# -- coordinates ----------------------------------------------------------------------------------------------------

FRAMES = (Frame(100, 200, 50, 400), Frame(10, 10, 28, 28))
IMAGE = {"type": "image"}


def text_after(frames, *parts):
    """The texts of one user turn after rescaling, and the regions."""
    content = tuple({"type": "text", "text": part} if isinstance(part, str) else part for part in parts)
    (message,), regions = rescale_messages([{"role": "user", "content": content}], frames)
    return [part["text"] for part in message["content"] if part["type"] == "text"], regions


def test_marks_are_rescaled_into_the_last_image_before_them():
    texts, regions = text_after(FRAMES, IMAGE, "a <|box|>10,20,30,40<|/box|>", IMAGE, "b <|point|>5,2.5<|/point|>")
    assert texts == ["a [20, 10, 60, 20]", "b [14, 7]"]
    assert [(region.image, region.coordinates) for region in regions] == [(0, (20, 10, 60, 20)), (1, (14, 7))]


def test_a_mark_may_name_its_image():
    texts, _ = text_after(
        FRAMES, IMAGE, IMAGE, "<|box image=0|>0, 0, 200, 100<|/box|> <|point image=1|>10,10<|/point|>"
    )
    assert texts == ["[0, 0, 400, 50] [28, 28]"]


def test_marks_reach_back_over_turns_and_into_plain_string_content():
    messages = [
        {"role": "user", "content": (IMAGE,)},
        {"role": "assistant", "content": "at <|point|>200,100<|/point|>"},
    ]
    rescaled, _ = rescale_messages(messages, FRAMES[:1])
    assert rescaled[1]["content"] == "at [400, 50]"


@pytest.mark.parametrize("text", ["no marks", "a < b |> c", "<|box_start|>(1,2)<|box_end|>", "<|im_end|> [1, 2, 3, 4]"])
def test_text_without_marks_is_not_touched(text):
    assert text_after(FRAMES, IMAGE, text) == ([text], ())


@pytest.mark.parametrize(
    ("mark", "complaint"),
    [
        ("<|box|>1,2,3<|/box|>", "must hold 4 numbers"),
        ("<|point|>1,b<|/point|>", "must hold 2 numbers"),
        ("<|box|>-1,2,3,4<|/box|>", "must hold 4 numbers >= 0"),
        ("<|box|>30,2,3,4<|/box|>", "is no region of its image of 200 x 100 pixels"),
        ("<|box|>1,2,201,4<|/box|>", "is no region of its image of 200 x 100 pixels"),
        ("<|point|>1,101<|/point|>", "is no region"),
        ("<|box image=2|>1,2,3,4<|/box|>", "there are 2 images, from 0"),
        ("<|box|>1,2,3,4", "has no partner"),
        ("1,2<|/point|>", "has no partner"),
        ("<|box|>1,2,3,4<|/point|>", "has no partner"),
    ],
)
def test_a_wrong_mark_is_refused_with_the_remedy(mark, complaint):
    with pytest.raises(DataError, match=complaint):
        text_after(FRAMES, IMAGE, mark)


def test_a_mark_before_any_image_is_refused():
    with pytest.raises(DataError, match="no image stands before it"):
        text_after(FRAMES, "<|point|>1,1<|/point|>", IMAGE)


@given(
    stored=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    shown=st.tuples(st.integers(28, 4000), st.integers(28, 4000)),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_rescaled_point_stays_at_its_place_to_half_a_pixel(stored, shown, place):
    frame = Frame(*stored, *shown)
    x, y = round(place[0] * frame.stored_width, 3), round(place[1] * frame.stored_height, 3)
    _, (region,) = text_after([frame], IMAGE, f"<|point|>{x:.3f},{y:.3f}<|/point|>")
    assert abs(region.coordinates[0] - x / frame.stored_width * frame.width) <= 0.5001
    assert abs(region.coordinates[1] - y / frame.stored_height * frame.height) <= 0.5001
    assert 0 <= region.coordinates[0] <= frame.width and 0 <= region.coordinates[1] <= frame.height


def test_coordinates_of_the_whole_path_lie_in_the_frame_of_the_patches(tmp_path, tokenizer, data):
    raw = raw_sample(tmp_path, "Where?", "<|box|>0,0,100,60<|/box|>", [("image", picture(60, 100))])
    sample = encode_sample(raw, tokenizer, TINY, data)
    _, rows, columns = sample.media[0].grid
    assert (rows * 14, columns * 14) == (56, 112)
    assert f"[0, 0, {columns * 14}, {rows * 14}]" in tokenizer.decode(sample.token_ids_T)


# -- records and JSONL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason", "complaint"),
    [
        ("{", "json", "unreadable JSON"),
        ('{"messages": NaN}', "json", "NaN is not JSON"),
        ("[1]", "json", "is a list"),
        ('{"id": 7, "messages": [{"role": "user", "content": "a"}]}', "json", "non-empty string"),
        ('{"split": "", "messages": [{"role": "user", "content": "a"}]}', "json", "non-empty string"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "json", "surrogates not allowed"),
        ("[" * 100_000, "json", "unreadable JSON"),
        ("{}", "messages", "must be a non-empty list"),
        ('{"messages": []}', "messages", "must be a non-empty list"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "messages", "role 'robot'"),
        ('{"messages": [{"role": "user"}]}', "messages", "exactly role and content"),
        ('{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "messages", "exactly role and content"),
        ('{"messages": [{"role": "user", "content": 1}]}', "messages", "content of type int"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
            "messages",
            "a part is",
        ),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": ""}]}]}', "messages", "a part is"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]}',
            "messages",
            "a part is",
        ),
    ],
)
def test_a_wrong_record_is_refused_with_its_reason(text, reason, complaint):
    with pytest.raises(SampleError, match=complaint) as fault:
        parse_record(text.encode(), "line-9")
    assert (fault.value.sample_id, fault.value.reason) == ("line-9", reason)


def test_an_error_names_the_sample_by_its_own_id():
    with pytest.raises(SampleError, match="sample 'own'"):
        parse_record(b'{"id": "own", "messages": []}', "place")


def test_a_pair_of_escaped_surrogates_is_one_character():
    record = parse_record(b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}', "a")
    assert record.messages[0]["content"] == "\N{GRINNING FACE}"


def test_jsonl_samples_carry_their_files_and_other_keys(tmp_path, tokenizer, data):
    (tmp_path / "cat.png").write_bytes(picture(56, 56))
    messages = user_and_assistant([{"type": "image", "image": "cat.png"}, {"type": "text", "text": "?"}], "!")
    lines = [json.dumps({"id": "a", "messages": messages, "task": "count"}), "", json.dumps({"messages": messages[1:]})]
    (tmp_path / "ask.jsonl").write_text("\n".join(lines))
    first, second = read_jsonl(tmp_path / "ask.jsonl")
    assert (first.id, first.meta, second.id) == ("a", {"task": "count"}, "ask.jsonl:3")
    assert encode_sample(first, tokenizer, TINY, data).num_patches == 16


def test_a_jsonl_file_names_the_line_of_a_missing_image(tmp_path):
    messages = [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]
    (tmp_path / "ask.jsonl").write_text(json.dumps({"id": "a", "messages": messages}))
    with pytest.raises(SampleError, match=r"sample 'a': ask\.jsonl:1 names 'gone\.png'"):
        list(read_jsonl(tmp_path / "ask.jsonl"))
