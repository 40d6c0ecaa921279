"""Preference pairs: two responses to one chat, of which one was chosen. Both are kept in one pack, side by side.

A pair is a record whose ``messages`` end with the user's turn, with two further keys, ``chosen`` and ``rejected``: a
string, or as TRL has it a list with one assistant message. Reasoning up to ``</think>`` is cut off: a reward model
judges answers. Invariant: ``measure_stored`` and ``encode_stored`` give the same lengths, of both members together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.data.encode import (
    Measure,
    encode_media,
    encode_sample,
    encode_text,
    measure_all_media,
    measure_of,
    measure_sample,
)
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.tokenizer import TextTokenizer
from mimo_megatron.types import EncodedSample, RawSample

KEYS = ("chosen", "rejected")
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"


def measure_stored(
    raw: RawSample, contents: Sequence[bytes], tokenizer: TextTokenizer, model: ModelConfig, data: EncodingConfig
) -> Measure:
    """What a stored sample takes in a pack: for a reward model, both members of the pair."""
    if model.text.head != "reward":
        return measure_sample(raw, contents, tokenizer, model, data)
    members = pair_of(raw)
    shapes = measure_all_media(raw, contents, model, data)
    return measure_of([len(encode_text(one, shapes, tokenizer, model, data)[0]) for one in members], shapes)


def encode_stored(
    raw: RawSample, tokenizer: TextTokenizer, model: ModelConfig, data: EncodingConfig, *, decodes: bool = True
) -> tuple[EncodedSample, ...]:
    """What a stored sample puts into a pack: itself, or for a reward model the chosen response, then the rejected.

    ``decodes`` as for ``encode_sample``.
    """
    if model.text.head != "reward":
        return (encode_sample(raw, tokenizer, model, data, decodes=decodes),)
    members = pair_of(raw)
    media, shapes = encode_media(raw, model, data, decodes=decodes)
    return tuple(
        EncodedSample(one.id, *encode_text(one, shapes, tokenizer, model, data), media, reads_reward=True)
        for one in members
    )


def encode_response(
    raw: RawSample, tokenizer: TextTokenizer, model: ModelConfig, data: EncodingConfig
) -> EncodedSample:
    """One chat with its response, to be scored: encoded as a member of a pair is."""
    return replace(encode_sample(raw, tokenizer, model, data), reads_reward=True)


def pair_of(raw: RawSample) -> tuple[RawSample, RawSample]:
    """The two chats of a stored pair. ``SampleError`` (reason ``pair``) where it is none."""
    chosen, rejected = (_response(raw, key) for key in KEYS)
    if raw.messages[-1]["role"] != "user":
        raise SampleError(raw.id, "pair", f"its messages end with the role {raw.messages[-1]['role']!r}, not user")
    if chosen == rejected:
        raise SampleError(raw.id, "pair", "chosen and rejected say the same")
    return with_response(raw, chosen, "/chosen"), with_response(raw, rejected, "/rejected")


def with_response(raw: RawSample, response: str, id_suffix: str = "") -> RawSample:
    """The chat of ``raw`` with this response as its last turn, less its reasoning."""
    turn: Mapping[str, Any] = {"role": "assistant", "content": answer_of(response)}
    return replace(raw, id=raw.id + id_suffix, messages=(*raw.messages, turn), meta={})


def answer_of(response: str) -> str:
    """What a reward model sees of a response: nothing of reasoning, nor of reasoning that never ends."""
    answer = response.rpartition(_THINK_CLOSE)[2]
    return "" if _THINK_OPEN in answer else answer.strip()


def _response(raw: RawSample, key: str) -> str:
    match raw.meta.get(key):
        case str(text) | [{"role": "assistant", "content": str(text)}]:
            answer = answer_of(text)
        case other:
            raise SampleError(
                raw.id,
                "pair",
                f"{key!r} is {str(other)[:80]!r}; give a string or one assistant message",
            )
    if not answer:
        raise SampleError(raw.id, "pair", f"{key!r} holds no answer")
    return answer
