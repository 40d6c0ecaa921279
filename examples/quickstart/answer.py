"""Answers to the held-out questions by an ordinary client: plain ``transformers``, and nothing of mimo_megatron.

    python -m examples.quickstart.answer QUESTIONS.jsonl HF_FOLDER [HF_FOLDER ...]

Answers go into ``answers.jsonl`` of the model's folder. Images go through that folder's own image processor. Clips
would need transformers' video processor, and that needs torchvision; ``video_patches`` makes them from the image
processor's patches of their frames.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging

FRAMES_PER_SECOND = 2  # at which the model was shown clips
QUESTIONS_AT_ONCE = 64
_PLACEHOLDER = re.compile(r"<\|(image|video)_pad\|>")


@dataclass
class _Media:
    """Images or videos of a batch, as the model takes them."""

    patches: list[Tensor] = field(default_factory=list)
    grids: list[Tensor] = field(default_factory=list)


class Client:
    """A model with its tokenizer and image processor, all from one folder."""

    def __init__(self, folder: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.image_processor = AutoImageProcessor.from_pretrained(folder)

    def answers(self, questions: Sequence[dict[str, Any]], media_folder: Path, max_new_tokens: int) -> list[str]:
        """Greedy answers, a batch at a time."""
        found = []
        for start in range(0, len(questions), QUESTIONS_AT_ONCE):
            inputs = self._inputs(questions[start : start + QUESTIONS_AT_ONCE], media_folder)
            said = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new_tokens = said[:, inputs["input_ids"].shape[1] :]
            found += self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        return found

    def _inputs(self, questions: Sequence[dict[str, Any]], media_folder: Path) -> dict[str, Any]:
        shown = {"image": _Media(), "video": _Media()}
        prompts = [self._prompt(question["messages"], media_folder, shown) for question in questions]
        inputs = dict(self.tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt"))
        config, token_ids = self.model.config, inputs["input_ids"]
        inputs["mm_token_type_ids"] = 1 * (token_ids == config.image_token_id) + 2 * (
            token_ids == config.video_token_id
        )
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if shown[kind].patches:
                inputs[name] = torch.cat(shown[kind].patches)
                inputs[f"{kind}_grid_thw"] = torch.stack(shown[kind].grids)
        if shown["video"].grids:
            seconds = self.image_processor.temporal_patch_size / FRAMES_PER_SECOND
            inputs["second_per_grid_ts"] = torch.full((len(shown["video"].grids),), seconds)
        return {name: value.to(self.model.device) for name, value in inputs.items() if name != "token_type_ids"}

    def _prompt(self, messages: list[dict[str, Any]], media_folder: Path, shown: dict[str, _Media]) -> str:
        """The chat template's text with one placeholder for each vision token; the media join ``shown``."""
        counts = []
        for part in (part for message in messages for part in message["content"] if part["type"] != "text"):
            path = media_folder / part[part["type"]]
            inputs = image_inputs if part["type"] == "image" else video_inputs
            patches, grid = inputs(self.image_processor, path)
            shown[part["type"]].patches.append(patches)
            shown[part["type"]].grids.append(grid)
            counts.append(int(grid.prod()) // self.image_processor.merge_size**2)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        count = iter(counts)
        return _PLACEHOLDER.sub(lambda match: match[0] * next(count), text)


def image_inputs(processor: Any, path: Path) -> tuple[Tensor, Tensor]:
    """[P, C] patches and the grid (1, rows, columns) of an image file."""
    with Image.open(path) as image:
        processed = processor(images=[image], return_tensors="pt")
    return processed["pixel_values"], processed["image_grid_thw"][0]


def video_inputs(processor: Any, path: Path) -> tuple[Tensor, Tensor]:
    """[P, C] patches and the grid (frame pairs, rows, columns) of a clip with a constant frame rate."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        every = round(float(stream.average_rate) / FRAMES_PER_SECOND)
        frames = [frame.to_image() for frame in container.decode(stream)][::every]
    processed = processor(images=frames, return_tensors="pt")
    _, rows, columns = processed["image_grid_thw"][0].tolist()
    patches = video_patches(processed["pixel_values"].unflatten(0, (len(frames), rows * columns)))
    return patches.flatten(0, 1), torch.tensor([len(patches), rows, columns])


def video_patches(stills_FPC: Tensor) -> Tensor:
    """[F / 2, P, C]: patches that span two frames, from those of F still images.

    A patch of C values is (colour, time, y, x) with two times. A still image fills both with the same pixels; here
    the second comes from the next frame.
    """
    stills = stills_FPC.unflatten(2, (3, 2, -1))
    return torch.stack((stills[0::2, :, :, 0], stills[1::2, :, :, 0]), dim=3).flatten(2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer questions with plain transformers.")
    parser.add_argument("questions", type=Path)
    parser.add_argument("folders", type=Path, nargs="+", metavar="HF_FOLDER")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    questions = [json.loads(line) for line in given.questions.read_text().splitlines()]
    for folder in given.folders:
        answers = Client(folder).answers(questions, given.questions.parent, given.max_new_tokens)
        rows = ({"id": one["id"], "answer": answer} for one, answer in zip(questions, answers, strict=True))
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / 'answers.jsonl'}: {len(answers)} answers", flush=True)


if __name__ == "__main__":
    main()
