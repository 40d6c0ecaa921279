"""The preview page shows what is trained: pixels from patches, text from ids, the mask, boxes in the resized frame."""

import base64
import html
import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mimo_megatron.data.image import encode_image
from mimo_megatron.data.patches import patchify
from mimo_megatron.data.preview import frames_of, shorten, token_spans, write_preview
from mimo_megatron.data.shards import ShardSample
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.types import EncodedMedia, EncodedSample
from tests.data_fixtures import (
    TINY,
    picture,
    recipe,
    text_sample,
    user_and_assistant,
    video_sample,
    write_source,
    write_tokenizer,
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")), TINY.tokens, TINY.text.vocab_size)


@pytest.fixture
def data(tmp_path):
    return recipe(tmp_path / "source", write_tokenizer(tmp_path / "tokenizer"), pack_tokens=1024, pack_patches=512)


def page_of(tmp_path, data, samples, num_packs=1) -> str:
    write_source(tmp_path / "source", samples, data)
    return write_preview(data, TINY, tmp_path / "pages" / "preview.html", num_packs).read_text(encoding="utf-8")


def image_question(record, height=60, width=100) -> ShardSample:
    return ShardSample("000000", {"id": "asked", **record}, {"image0.png": picture(height, width)})


SHOWN = [{"type": "image", "image": "image0.png"}, {"type": "text", "text": "Where?"}]


def test_frames_are_the_inverse_of_patchify():
    frames = np.random.default_rng(0).integers(0, 256, (6, 56, 84, 3), dtype=np.uint8)
    media = EncodedMedia("video", patchify(frames, TINY.vision), (3, 4, 6), 1.0)
    assert np.array_equal(frames_of(media, TINY.vision), frames)


def test_the_page_shows_the_resized_image_and_the_box_in_its_frame(tmp_path, data):
    answer = "At <|box|>10,6,50,30<|/box|>, centre <|point|>100,60<|/point|>."
    page = page_of(tmp_path, data, [image_question({"messages": user_and_assistant(SHOWN, answer)})])
    assert '<rect x="11" y="6" width="45" height="22"/>' in page, "112 x 56 pixels are shown of 100 x 60"
    assert '<circle cx="112" cy="56"' in page and 'viewBox="0 0 112 56"' in page
    (source,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))), np.int64)
    encoded = encode_image(picture(60, 100), TINY.vision, min_pixels=data.min_pixels, max_pixels=data.max_pixels)
    assert np.abs(shown - frames_of(encoded, TINY.vision)[0]).mean() < 4, "JPEG is close to what is trained"


def test_plain_boxes_of_an_answer_and_boxes_of_the_meta_are_drawn(tmp_path, data):
    record = {"messages": user_and_assistant(SHOWN, "[1, 2, 30, 40]"), "boxes": [[50, 30, 100, 60]]}
    page = page_of(tmp_path, data, [image_question(record)])
    drawn = re.findall(r'<g class="(\w+)"><title>[^<]*</title>\s*<rect x="(\d+)" y="(\d+)"', page)
    assert drawn == [("text", "1", "2"), ("meta", "56", "28")]


def test_a_page_needs_no_other_file_and_text_cannot_become_markup(tmp_path, data):
    attack = "<script>alert(1)</script> <img src=x>"
    page = page_of(tmp_path, data, [ShardSample("0", {"id": attack, "messages": user_and_assistant(attack, attack)})])
    assert "<script" not in page and "<img" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)


def test_a_video_is_a_strip_with_the_time_of_each_step(tmp_path, data):
    page = page_of(tmp_path, data, [video_sample(0, num_frames=16)])
    assert re.findall(r"<time>([^<]+)</time>", page) == ["00:00.0", "00:01.0"]


def test_the_pack_map_gives_each_sample_its_share(tmp_path, data):
    samples = [text_sample(0, 40), text_sample(1, 20)]
    page = page_of(tmp_path, data, samples)
    widths = {
        name: float(width) for name, width in re.findall(r'title="(text-\d): \d+ tokens" style="width: ([\d.]+)%', page)
    }
    tokens = {name: int(count) for name, count in re.findall(r'title="(text-\d): (\d+) tokens"', page)}
    assert set(tokens) == {"text-0", "text-1"}
    assert all(width == pytest.approx(100 * tokens[name] / 1024) for name, width in widths.items())


def test_a_damaged_sample_is_named_on_the_page(tmp_path, data):
    samples = [text_sample(1), image_question({"messages": user_and_assistant(SHOWN, "There.")})]
    write_source(tmp_path / "source", samples, data)
    shard = tmp_path / "source" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"XXXX"))
    page = write_preview(data, TINY, tmp_path / "preview.html", 1).read_text(encoding="utf-8")
    assert "left out: sample &#39;asked&#39;" in page and "text-1" in page


_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)


@given(texts=st.lists(st.tuples(_TEXT, st.booleans()), max_size=5), num_images=st.integers(0, 2))
def test_spans_hold_every_token_once_with_its_mask(tokenizer, texts, num_images):
    ids: list[int] = []
    mask: list[bool] = []
    for text, is_trained in texts:
        for part in (tokenizer.encode(text), [TINY.tokens.turn_end], [TINY.tokens.image_pad] * num_images):
            ids += part
            mask += [is_trained] * len(part)
    sample = EncodedSample("a", np.array(ids, np.int64), np.array(mask, np.bool_))
    spans = list(token_spans(sample, tokenizer, TINY))
    counts = [
        int(span.text.rpartition(" ")[2]) if span.kind == "placeholder" else len(span.title.split(": ")[1].split(","))
        for span in spans
    ]
    assert sum(counts) == len(ids)
    assert [span.is_trained for span, count in zip(spans, counts, strict=True) for _ in range(count)] == mask
    if "\N{REPLACEMENT CHARACTER}" not in "".join(text for text, _ in texts):
        shown = "".join(span.text for span in spans if span.kind == "text")
        assert shown == "".join(text for text, _ in texts)


def test_trained_tokens_are_marked_and_only_they(tmp_path, data):
    page = page_of(tmp_path, data, [ShardSample("0", {"messages": user_and_assistant("Secret?", "Open!")})])
    marked = re.findall(r'<span class="(?:text|special) trained" title="token[^>]*>([^<]*)</span>', page)
    assert html.unescape("".join(marked)) == "Open!<|im_end|>"


def test_of_a_long_document_the_page_shows_both_ends_and_counts_the_rest(tmp_path, data):
    data = data.model_copy(update={"pack_tokens": 40_000})
    question = "Begin. " + "word " * 6000 + "End."
    write_source(tmp_path / "source", [ShardSample("0", {"messages": user_and_assistant(question, "Answered.")})], data)
    page = write_preview(data, TINY, tmp_path / "page.html", 1, shown_tokens=400).read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", "", page.partition('class="tokens">')[2]))
    assert "Begin" in text and "End." in text and "Answered." in text
    assert re.search(r"\d\d,\d{3} tokens are not shown here, 0 of them trained", text)
    assert len(page) < 100_000


def test_the_tokens_that_are_shown_and_those_that_are_counted_are_all(tokenizer):
    ids = np.array(tokenizer.encode("one two three " * 100), np.int64)
    spans = list(token_spans(EncodedSample("x", ids, np.arange(len(ids)) % 2 == 0), tokenizer, TINY))
    for most in (1, 4, 7, 50, len(spans), 10_000):
        shown = shorten(spans, most)
        assert sum(span.num_tokens for span in shown) == len(ids)
        assert len(shown) <= most + 1


def test_a_screenshot_is_embedded_readable_and_small(tmp_path, data):
    data = data.model_copy(update={"pack_tokens": 8192, "pack_patches": 20_000, "max_pixels": 4_000_000})
    page = page_of(tmp_path, data, [image_question({"messages": user_and_assistant(SHOWN, "There.")}, 1440, 2560)])
    (source,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(source))).size == (1600, 897)
    assert "--shown: 640px; --full: 2548px" in page and 'viewBox="0 0 2548 1428"' in page, "boxes keep their frame"
