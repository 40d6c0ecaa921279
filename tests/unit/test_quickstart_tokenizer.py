"""The demo's tokenizer: any text comes back, a coordinate is one token, transformers agrees with the data path."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from examples.quickstart.build_data import build_demo_tokenizer
from examples.quickstart.tasks import MAX_PIXELS, MIN_PIXELS
from examples.quickstart.tokenizer import LARGEST_NUMBER
from mimo_megatron.config.presets import preset
from mimo_megatron.data.chat import encode_chat
from mimo_megatron.data.image import encode_image
from mimo_megatron.data.tokenizer import TextTokenizer, load_tokenizer

MODEL = preset("tiny-vl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_demo_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return load_tokenizer(folder, MODEL.tokens, MODEL.text.vocab_size)


@given(text=st.text(max_size=60))
def test_any_text_comes_back(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=len(MODEL.tokens.model_dump())) >= len(MODEL.tokens.model_dump())


def test_special_text_stays_text(tokenizer: TextTokenizer) -> None:
    text = "<|im_end|> 1 <|image_pad|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("<|im_end|>")) > 1


def test_a_coordinate_is_one_token(tokenizer: TextTokenizer) -> None:
    for number in range(LARGEST_NUMBER + 1):
        assert len(tokenizer.encode(str(number))) == 1
    assert len(tokenizer.encode("[12, 5, 100, 34]")) == 9
    assert tokenizer.encode("7")[0] == tokenizer.encode("[7]")[1]


def test_every_word_of_the_demo_is_one_token(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode("Subtract the smaller digit from the larger.")) == 8
    assert len(tokenizer.encode("How many digits in both images?")) == 7
    assert len(tokenizer.encode("[00:01, 00:03]")) == 9


def test_auto_tokenizer_and_its_chat_template_give_the_ids_of_the_data_path(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    auto = AutoTokenizer.from_pretrained(folder)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Read the digits."}],
        },
        {"role": "assistant", "content": "3 7; 1"},
        {"role": "user", "content": "Describe the image."},
        {"role": "assistant", "content": [{"type": "text", "text": "3 [1, 20, 30, 140]; 7 [5, 6, 7, 8]"}]},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "When is the 7 visible?"}]},
    ]
    ours, _ = encode_chat(messages, tokenizer, MODEL.tokens, (1, 1, 1), system_prompt=None, add_generation_prompt=True)
    theirs = auto.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert theirs == ours.tolist()
    assert (auto.eos_token_id, auto.pad_token_id) == (MODEL.tokens.turn_end, MODEL.tokens.pad)
    assert auto.decode(ours) == tokenizer.decode(ours.tolist())


def test_auto_image_processor_cuts_a_scene_as_the_data_path_does(folder: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (100, 120), (9, 99, 199)).save(file, "PNG")
    inputs = AutoImageProcessor.from_pretrained(folder)(images=[Image.open(file)], return_tensors="np")
    assert MODEL.vision is not None
    ours = encode_image(file.getvalue(), MODEL.vision, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    assert inputs["image_grid_thw"].tolist() == [list(ours.grid)] == [[1, 8, 8]]
    assert inputs["pixel_values"].shape == ours.patches_PC.shape


def test_auto_processor_expands_an_image_to_one_placeholder_per_merged_token(folder: Path) -> None:
    pytest.importorskip("torchvision", reason="transformers' Qwen2.5-VL processor needs torchvision")
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read the digits."}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.new("RGB", (100, 120))])
    assert np.asarray(inputs["input_ids"]).tolist()[0].count(MODEL.tokens.image_pad) == 16
