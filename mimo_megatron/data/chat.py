"""Chat messages to token ids and a loss mask, in the ChatML form of the Qwen models.

A turn is ``<|im_start|>role\\ntext<|im_end|>\\n``; an image is ``<|vision_start|>``, one ``<|image_pad|>`` per merged
vision token, ``<|vision_end|>``; a video likewise with ``<|video_pad|>``. Invariants:

* Trained are the text of assistant turns and the token that closes them; nothing else.
* Ids equal those of the Hugging Face chat template, except where an assistant's text begins with white space: its
  header is tokenized alone, because a generator continues after exactly these header tokens.
* Text that spells a special token stays text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_megatron.config.model import SpecialTokens
from mimo_megatron.data.tokenizer import TextTokenizer
from mimo_megatron.errors import DataError


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: TextTokenizer,
    tokens: SpecialTokens,
    media_lengths: Sequence[int],
    *,
    system_prompt: str | None,
    add_generation_prompt: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids [T] and the loss mask [T] of a conversation.

    ``media_lengths[i]`` is the number of merged vision tokens of the i-th image or video part. ``system_prompt`` opens
    a conversation that does not begin with a system message; ``add_generation_prompt`` ends it with an open assistant
    turn.
    """
    num_parts = sum(
        part["type"] != "text"
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )
    if num_parts != len(media_lengths):
        raise DataError(f"the messages show {num_parts} images and videos, but {len(media_lengths)} are given")
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system_prompt}, *messages)
    writer = _Writer(tokenizer)
    lengths = iter(media_lengths)
    for message in messages:
        is_trained = message["role"] == "assistant"
        writer.special(tokens.turn_start)
        writer.text(message["role"] + "\n", is_trained=False)
        content = message["content"]
        for part in ({"type": "text", "text": content},) if isinstance(content, str) else content:
            if part["type"] == "text":
                writer.text(part["text"], is_trained)
            else:
                writer.special(tokens.vision_start)
                writer.special(tokens.image_pad if part["type"] == "image" else tokens.video_pad, count=next(lengths))
                writer.special(tokens.vision_end)
        writer.special(tokens.turn_end, is_trained)
        writer.text("\n", is_trained=False)
    if add_generation_prompt:
        writer.special(tokens.turn_start)
        writer.text("assistant\n", is_trained=False)
    return writer.finish()


class _Writer:
    """Collects tokens; neighbouring text of one kind is tokenized as one run, as a tokenizer merges across parts."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._mask: list[bool] = []
        self._run: list[str] = []
        self._run_is_trained = False

    def text(self, text: str, is_trained: bool) -> None:
        if is_trained != self._run_is_trained:
            self._end_run()
            self._run_is_trained = is_trained
        self._run.append(text)

    def special(self, token: int, is_trained: bool = False, count: int = 1) -> None:
        self._end_run()
        self._append([token] * count, is_trained)

    def finish(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        self._end_run()
        return np.array(self._ids, np.int64), np.array(self._mask, np.bool_)

    def _end_run(self) -> None:
        if self._run:
            self._append(self._tokenizer.encode("".join(self._run)), self._run_is_trained)
            self._run.clear()

    def _append(self, token_ids: list[int], is_trained: bool) -> None:
        self._ids += token_ids
        self._mask += [is_trained] * len(token_ids)
