"""``data lint``: every sample of a folder of tars looked at, row by row, before anything is trained on it.

Three levels: a *fault* is left out of training, or trains on something wrong; a *doubt* is trained on and probably not
meant; a *note* may well be meant. Without a recipe the tars speak for themselves; with one, its limits count too.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import DataConfig, ReadConfig
from mimo_megatron.data.decode import image_size
from mimo_megatron.data.image import MAX_ASPECT_RATIO
from mimo_megatron.data.index import check_names, read_member, read_record
from mimo_megatron.data.markup import Frame, rescale_messages
from mimo_megatron.data.pairs import KEYS, measure_stored
from mimo_megatron.data.parts import splits_texts
from mimo_megatron.data.records import Record, SampleError
from mimo_megatron.data.shards import Member, scan_samples
from mimo_megatron.data.text_checks import oddities
from mimo_megatron.data.tokenizer import TextTokenizer
from mimo_megatron.errors import DataError
from mimo_megatron.types import MediaKind, MediaRef, RawSample

CHECKS: Mapping[str, tuple[str, str]] = {
    "torn_shard": ("fault", "the tar ends in the middle, or is none; what follows is lost"),
    "json": ("fault", "no JSON, not JSON, or not an object"),
    "duplicate_name": ("fault", "two files of a sample have one name"),
    "duplicate_id": ("fault", "an earlier sample has the same id; the index leaves this one out"),
    "messages": ("fault", "messages that are not what a record may say"),
    "media_missing": ("fault", "the messages name a file that the sample has not"),
    "media_unused": ("fault", "the sample has a file that no message shows"),
    "media": ("fault", "an image or video whose header cannot be read, or that no resize can fit"),
    "decode": ("fault", "an image or video that cannot be decoded to its end (with --decode)"),
    "coordinates": ("fault", "a box or point outside of its image, or without one"),
    "pair": ("fault", "not a preference pair, where the recipe trains a reward model"),
    "no_answer": ("fault", "no turn is trained: the assistant never speaks"),
    "over_capacity": ("fault", "more tokens or patches than a pack of the recipe holds"),
    "empty_answer": ("doubt", "an answer of no text: nothing but the end of the turn is trained"),
    "aspect_ratio": ("doubt", "an image far wider than high, or the other way"),
    "duplicate": ("doubt", "an earlier sample has the same messages and media"),
    "mojibake": ("doubt", "text that was decoded as something it is not"),
    "control_character": ("doubt", "control characters in the text"),
    "invisible_character": ("doubt", "zero-width or direction marks in the text"),
    "special_token": ("doubt", "text that spells a special token; it stays text, and was hardly meant"),
    "media_mark": ("doubt", "<image> or <video> as text: a mark that was never replaced"),
    "repeated_media": ("note", "an image or video that an earlier sample has too"),
}

LEVELS = ("fault", "doubt", "note")


@dataclass(frozen=True)
class Finding:
    """Something about one sample, or about a shard where ``key`` is empty."""

    level: str
    check: str
    shard: str
    key: str
    id: str
    where: str
    detail: str


@dataclass(frozen=True)
class Limits:
    """What a recipe adds: its tokenizer and sizes, so that lengths are exact."""

    tokenizer: TextTokenizer
    model: ModelConfig
    data: DataConfig


class Summary:
    """Counts of the findings by check, and the first few of each."""

    def __init__(self, most_shown: int = 3) -> None:
        self._most_shown = most_shown
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: dict[str, list[Finding]] = {}

    def add(self, finding: Finding) -> None:
        self._counts[finding.level, finding.check] += 1
        first = self._first.setdefault(finding.check, [])
        if len(first) < self._most_shown:
            first.append(finding)

    @property
    def is_bad(self) -> bool:
        """Whether there is more than notes."""
        return any(level != "note" for level, _ in self._counts)

    def text(self, num_samples: int) -> str:
        """The findings for people, the worst first."""
        totals = {level: sum(n for (one, _), n in self._counts.items() if one == level) for level in LEVELS}
        told = ", ".join(f"{n:,} {level}{'s' if n > 1 else ''}" for level, n in totals.items() if n)
        lines = [f"{num_samples:,} samples: {told or 'nothing to find fault with'}"]
        for level, check in sorted(self._counts, key=lambda one: (LEVELS.index(one[0]), -self._counts[one])):
            meaning = CHECKS[check][1] if check in CHECKS else "the index leaves it out"
            lines.append(f"{level} {check}: {self._counts[level, check]:,} ({meaning})")
            for one in self._first[check]:
                place = " ".join(filter(None, (f"{Path(one.shard).name}:{one.key}", repr(one.id), one.where)))
                lines.append(f"    {place}: {one.detail}")
        return "\n".join(lines)


class Linter:
    """The findings of one folder after another; ids and media are remembered through all of them."""

    def __init__(self, limits: Limits | None = None, *, decodes: bool = False, most_aspect: float = 20.0) -> None:
        self._limits, self._decodes, self._most_aspect = limits, decodes, most_aspect
        self._reading = limits.data.read if limits else ReadConfig()
        self._ids: set[bytes] = set()
        self._samples: dict[bytes, str] = {}
        self._media: set[bytes] = set()
        self.num_samples = 0

    def lint(self, folder: Path) -> Iterator[Finding]:
        """The findings of every tar of the folder, in order."""
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            raise DataError(f"{folder} holds no *.tar shard; name a recipe, or a folder of shards")
        self._ids.clear()  # ids are unique within a source
        for shard in shards:
            try:
                for key, members in scan_samples(shard):
                    self.num_samples += 1
                    for sample_id, check, where, detail in self._sample(shard, key, members):
                        level = CHECKS[check][0] if check in CHECKS else "fault"  # a reason of the index's own
                        yield Finding(level, check, str(shard), key, sample_id, where, detail)
            except DataError as error:
                yield Finding("fault", "torn_shard", str(shard), "", "", "", str(error))

    def _sample(self, shard: Path, key: str, members: Sequence[Member]) -> Iterator[tuple[str, str, str, str]]:
        try:
            stored = read_record(shard, key, members, self._reading)
            record, by_name = stored.record, stored.members
            digest = _digest(record.id.encode())
            if digest in self._ids:
                yield record.id, "duplicate_id", "id", "an earlier sample has the same id"
            self._ids.add(digest)
            check_names(record.id, [name for _, name in record.media], by_name)
            contents = [(kind, name, read_member(shard, by_name[name], self._reading)) for kind, name in record.media]
        except SampleError as error:
            yield error.sample_id, error.reason, "", error.detail
            return
        found = [*self._text(record), *self._pictures(record, contents), *self._repeated(record, contents)]
        if not any(check in ("media", "coordinates") for check, _, _ in found):
            found += self._lengths(shard, record, contents)
        yield from ((record.id, *one) for one in found)

    def _text(self, record: Record) -> Iterator[tuple[str, str, str]]:
        answers = 0
        for number, message in enumerate(record.messages):
            content, where = message["content"], f"messages[{number}]"
            texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            for text in texts:
                yield from ((check, where, detail) for check, detail in oddities(text))
            if message["role"] == "assistant":
                answers += 1
                if not "".join(texts).strip():
                    yield "empty_answer", where, "the answer says nothing"
        if not answers and not all(key in record.meta for key in KEYS):
            yield "no_answer", "messages", f"{len(record.messages)} turns, none of them the assistant's"

    def _pictures(
        self, record: Record, contents: Sequence[tuple[MediaKind, str, bytes]]
    ) -> Iterator[tuple[str, str, str]]:
        frames = []
        for kind, name, content in contents:
            try:
                if kind == "image":
                    height, width = image_size(content)
                    frames.append(Frame(height, width, height, width))
                    ratio = max(height, width) / max(1, min(height, width))
                    if ratio > MAX_ASPECT_RATIO:
                        yield "media", name, f"{width} x {height}: sides differ more than {MAX_ASPECT_RATIO} times"
                    elif ratio > self._most_aspect:
                        yield "aspect_ratio", name, f"{width} x {height}: sides differ {ratio:.1f} times"
                else:
                    _open_video(content)
            except DataError as error:
                yield "media", name, str(error)
                return
            if self._decodes and (problem := _decode(kind, content)):
                yield "decode", name, problem
        try:
            rescale_messages(record.messages, frames)
        except DataError as error:
            yield "coordinates", "messages", str(error)

    def _repeated(
        self, record: Record, contents: Sequence[tuple[MediaKind, str, bytes]]
    ) -> Iterator[tuple[str, str, str]]:
        digests = [_digest(content) for _, _, content in contents]
        said = json.dumps([record.messages, {key: record.meta.get(key) for key in KEYS}], sort_keys=True).encode()
        whole = _digest(b"".join(digests) + said)
        if whole in self._samples:
            yield "duplicate", "", f"has the messages and media of {self._samples[whole]!r}"
        self._samples.setdefault(whole, record.id)
        for digest, (_, name, _) in zip(digests, contents, strict=True):
            if digest in self._media:
                yield "repeated_media", name, "an earlier sample has the same bytes"
        self._media.update(digests)

    def _lengths(
        self, shard: Path, record: Record, contents: Sequence[tuple[MediaKind, str, bytes]]
    ) -> Iterator[tuple[str, str, str]]:
        if self._limits is None:
            return
        model, data = self._limits.model, self._limits.data
        media = tuple(MediaRef(kind, str(shard), 0, len(content), "") for kind, _, content in contents)
        raw = RawSample(record.id, "", record.messages, media, record.meta)
        try:
            found = measure_stored(raw, [one for *_, one in contents], self._limits.tokenizer, model, data)
        except SampleError as error:
            yield error.reason, "", error.detail
            return
        is_split = not found.num_patches and any(
            one.path == shard.parent and splits_texts(one, model) for one in data.sources
        )
        if (found.num_tokens > data.pack_tokens and not is_split) or found.num_patches > data.pack_patches:
            limits = f"a pack holds data.pack_tokens {data.pack_tokens:,} and data.pack_patches {data.pack_patches:,}"
            yield "over_capacity", "", f"{found.num_tokens:,} tokens and {found.num_patches:,} patches; {limits}"


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _open_video(content: bytes) -> None:
    try:
        with av.open(io.BytesIO(content)) as container:
            if not container.streams.video:
                raise DataError(f"file of {len(content)} bytes has no video stream")
    except av.FFmpegError as fault:
        raise DataError(f"video of {len(content)} bytes cannot be opened ({fault})") from fault


def _decode(kind: MediaKind, content: bytes) -> str | None:
    """What goes wrong when the whole image or video is decoded; None for nothing."""
    try:
        if kind == "image":
            with Image.open(io.BytesIO(content)) as image:
                image.load()
            return None
        with av.open(io.BytesIO(content)) as container:
            stream = container.streams.video[0]
            num_frames = sum(1 for _ in container.decode(stream))
            return f"{num_frames} of {stream.frames} frames can be decoded" if num_frames < stream.frames else None
    except Exception as fault:  # Pillow and FFmpeg raise many kinds on damaged bytes
        return f"{type(fault).__name__}: {fault}"
