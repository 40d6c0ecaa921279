"""One reward model that judges chats as they come over the wire: encoded as in training, scored in packs, calibrated.

Invariant: what is wrong with one item is said of that item; the others are scored as if it had not been there.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from xxhash import xxh3_128

from mimo_megatron.config.calibration import Calibration
from mimo_megatron.config.manifest import MANIFEST_FILE, measure
from mimo_megatron.config.run import ParallelConfig
from mimo_megatron.data.encode import encode_sample
from mimo_megatron.data.pairs import answer_of, encode_response, with_response
from mimo_megatron.errors import DataError
from mimo_megatron.evaluation.opened import OpenModel
from mimo_megatron.reward.images import MediaMissing, image_path, read_image
from mimo_megatron.reward.verdict import Reason
from mimo_megatron.reward.wire import Message, ModelItem, ModelResult, chat_problem, image_names
from mimo_megatron.reward_model.scoring import scores_of
from mimo_megatron.types import EncodedSample, MediaRef, RawSample


class Judge:
    """``results`` runs in one thread at a time; the model belongs to a process of one rank."""

    def __init__(
        self, open_model: OpenModel, calibration: Calibration, image_root: Path | None, version: str, pack_tokens: int
    ) -> None:
        self._open_model, self._calibration = open_model, calibration
        self._image_root, self._pack_tokens = image_root, pack_tokens
        self.version = version

    @property
    def kind(self) -> str:
        return "text" if self._open_model.model.model_config.vision is None else "multimodal"

    def results(self, items: Sequence[ModelItem]) -> list[ModelResult]:
        """One for every item, in order."""
        encoded = [self._encode(item) for item in items]
        good = [one for one in encoded if isinstance(one, EncodedSample)]
        scores = iter(scores_of(self._open_model, ParallelConfig(), good, self._pack_tokens))
        found = []
        for item, one in zip(items, encoded, strict=True):
            if isinstance(one, Reason):
                found.append(ModelResult(id=item.id, score=None, reward=None, reason=one))
            else:
                found.append(self._result(item, next(scores)))
        return found

    def _result(self, item: ModelItem, score: float) -> ModelResult:
        if not math.isfinite(score):  # bf16 overflow, say: no reward, and no harm to the rest of the batch
            return ModelResult(id=item.id, score=None, reward=None, reason=Reason.INTERNAL)
        reward = self._calibration.reward(score)
        return ModelResult(id=item.id, score=score, reward=reward, reason=Reason.PARTIAL)

    def _encode(self, item: ModelItem) -> EncodedSample | Reason:
        """What to score, or why not. Only what the response itself did may be called its fault."""
        if not answer_of(item.response):
            return Reason.NO_ANSWER
        if chat_problem(item.messages):
            return Reason.BAD_PROMPT
        try:
            raw = self._raw(item)
        except MediaMissing:
            return Reason.MEDIA_MISSING
        tokenizer, data = self._open_model.tokenizer, self._open_model.encoding
        model = self._open_model.model.model_config
        try:
            sample = encode_response(with_response(raw, item.response), tokenizer, model, data)
            if sample.num_tokens <= model.text.max_positions:
                return sample
            fault = Reason.TOO_LARGE
        except DataError:
            fault = Reason.UNREADABLE
        try:
            prompt = encode_sample(raw, tokenizer, model, data)
        except DataError:
            return Reason.BAD_PROMPT
        return fault if prompt.num_tokens <= model.text.max_positions else Reason.BAD_PROMPT

    def _raw(self, item: ModelItem) -> RawSample:
        media = tuple(map(self._media, image_names(item.messages)))
        return RawSample(item.id, "wire", tuple(map(_as_stored, item.messages)), media)

    def _media(self, name: str) -> MediaRef:
        path = image_path(self._image_root, name)
        return MediaRef("image", str(path), 0, len(read_image(path, name)), name)


def version_of(folder: Path) -> str:
    """Changes with any byte of the model's folder; a sealed one's manifest says as much and is read at once."""
    if (folder / MANIFEST_FILE).is_file():
        return measure(folder / MANIFEST_FILE).xxh128
    digest = xxh3_128()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {measure(path)}\n".encode())
    return digest.hexdigest()


def _as_stored(message: Message) -> dict[str, object]:
    content = message.content
    if not isinstance(content, str):
        content = [{"type": "image"} if part["type"] == "image" else part for part in content]
    return {"role": message.role, "content": content}
