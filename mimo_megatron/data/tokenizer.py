"""A Hugging Face fast tokenizer read from its folder, checked against the model's special token ids.

Text never becomes a special token: parsing of special tokens inside text is switched off, and the data path writes
their ids itself. So a sample that spells ``<|im_end|>`` in its text cannot end its own turn.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from mimo_megatron.config.model import TOKEN_NAMES, SpecialTokens
from mimo_megatron.errors import ConfigError


class TextTokenizer:
    """Text to token ids and back. ``fingerprint`` is the SHA-256 of the tokenizer file."""

    def __init__(self, inner: tokenizers.Tokenizer, fingerprint: str) -> None:
        inner.encode_special_tokens = True  # the library's name for "special tokens in text are plain text"
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.fingerprint = fingerprint

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, special tokens spelled out."""
        return self._inner.decode(list(token_ids), skip_special_tokens=False)


def load_tokenizer(folder: Path, tokens: SpecialTokens, vocab_size: int) -> TextTokenizer:
    """The tokenizer of ``folder/tokenizer.json``. ``ConfigError`` where its ids are not those of the model."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"data.tokenizer: {path} does not exist; save a fast tokenizer there with transformers' save_pretrained"
        )
    text = path.read_bytes()
    try:
        inner = tokenizers.Tokenizer.from_buffer(text)
    except ValueError as error:
        raise ConfigError(f"data.tokenizer: {path} is not a tokenizer: {error}") from error
    tokenizer = TextTokenizer(inner, hashlib.sha256(text).hexdigest())
    _check_ids(path, inner, tokenizer, tokens, vocab_size)
    return tokenizer


def _check_ids(
    path: Path, inner: tokenizers.Tokenizer, tokenizer: TextTokenizer, tokens: SpecialTokens, vocab_size: int
) -> None:
    faults = []
    for field, expected in tokens.model_dump().items():
        name = TOKEN_NAMES[field]
        found = inner.token_to_id(name)
        if found is not None and found != expected:
            faults.append(f"{name} is {found} in the tokenizer, but model.tokens.{field} is {expected}")
        if expected in tokenizer.encode(name):
            faults.append(f"{name} is not marked special, so text that spells it would become the token {expected}")
    largest = max(inner.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        faults.append(f"its largest id is {largest}, but model.text.vocab_size is {vocab_size}")
    if faults:
        raise ConfigError(f"data.tokenizer: {path} does not fit the model: " + "; ".join(faults))
