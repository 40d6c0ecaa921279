"""What the policy is asked: questions with all that their rewards need, read from files of ours, verl's and TRL's.

Invariants: a file is read whole or refused, with all its bad rows (``DataError``); a question can be judged (its task
is known, its gold is one that the rule reads, its chat is one that the reward model takes); a gold in pixels is in the
frame of the stored picture, whose sizes are taken from the picture itself.
"""

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.run import DataConfig, EncodingConfig
from mimo_megatron.data.encode import encode_sample, measure_media
from mimo_megatron.data.reading import read_media
from mimo_megatron.data.records import SampleError, record_of, strict_json
from mimo_megatron.data.tokenizer import TextTokenizer
from mimo_megatron.errors import DataError
from mimo_megatron.reward.gold_check import GoldRow, MathProblem, problems_of, row_findings
from mimo_megatron.reward.wire import ImageMeta, Message, Meta, Task, chat_problem
from mimo_megatron.rl.columns import REWARD_MODEL_TASKS, as_ours
from mimo_megatron.types import EncodedSample, MediaKind, MediaRef, RawSample

MOST_SHOWN = 20
MOST_ID_CHARS = 150
"""Of a question's id, so that what is added for one of its responses still fits the wire."""
PICTURE_TASKS = ("box", "point", "gui")


@dataclass(frozen=True)
class Question:
    id: str
    """``TASK/ID``, with the id that its row has; unique in a mix."""
    task: str
    """What the recipe calls its source."""
    raw: RawSample
    """Its messages, the last one the user's, and its media."""
    reward_task: Task
    gold: Any
    meta: Meta
    """With the picture that is asked about, or the chat for a reward model, filled in."""


@dataclass(frozen=True)
class QuestionReader:
    """What reading depends on besides the file."""

    model: ModelConfig
    encoding: EncodingConfig
    media_folder: Path
    """Where pictures are kept by content, as the reward service looks for them (``reward/images.py``): all that come
    inside parquet, and all that reward models judge."""
    math_problem: MathProblem | None = None
    """Reads golds of mathematics as the rule will (``reward/service/offline.py``). Without it their kind alone is
    checked: the rule is not run in this process, where it could hang."""

    def read(self, path: Path, task: str, reward: Task | None = None) -> list[Question]:
        """The questions of a file (.jsonl or .parquet), in its order. ``reward`` judges rows that do not say what does.

        ``DataError`` lists the rows that cannot be asked or judged.
        """
        questions: list[Question] = []
        problems: list[str] = []
        first_place: dict[str, str] = {}
        for place, row in _rows(path):
            try:
                question = self._question(row, path, task, reward, place)
                if (first := first_place.setdefault(question.id, place)) != place:
                    raise DataError(f"{first} has the same id {question.id!r}")
                questions.append(question)
            except DataError as fault:
                problems.append(f"{place}: {fault.detail if isinstance(fault, SampleError) else fault}")
        if not (questions or problems):
            problems.append(f"{path.name}: it holds no question")
        _refuse(path, problems)
        return questions

    def _question(
        self, row: Mapping[str, Any] | DataError, path: Path, task: str, reward: Task | None, place: str
    ) -> Question:
        if isinstance(row, DataError):
            raise row
        tree = as_ours(row, reward, place, lambda content: str(keep(self.media_folder, content).absolute()))
        record = record_of(tree, place)
        media = tuple(_media_ref(path, kind, name) for kind, name in record.media)
        raw = RawSample(f"{task}/{record.id}", task, record.messages, media)
        _check_turns(raw)
        if "id" not in tree:
            raise DataError("it has no id; give every row one that no other has")
        judged = _judged({**record.meta, "id": raw.id})
        if judged.task in PICTURE_TASKS:
            judged = judged.model_copy(update={"meta": self._with_image(judged.meta, media)})
        elif judged.task in REWARD_MODEL_TASKS:
            raw = replace(raw, media=tuple(map(self._kept, media)))
            judged = judged.model_copy(update={"meta": _with_chat(judged, raw)})
        findings = row_findings(0, judged, self.math_problem or _math_kind_problem)
        bad = [finding.problem for finding in findings if finding.kind == "bad"]
        if bad:
            raise DataError(f"task {judged.task}: {'; '.join(bad)}")
        return Question(raw.id, task, raw, judged.task, judged.gold, judged.meta)

    def _with_image(self, meta: Meta, media: Sequence[MediaRef]) -> Meta:
        """``meta.image`` of the picture itself: its size, and the size in which this recipe shows it."""
        shown = {self._image_meta(ref) for ref in media if ref.kind == "image"}
        if not shown:
            raise DataError("its gold is in pixels, but it has no image")
        given = meta.image
        asked = [one for one in shown if given is None or _is_same(given, one)]
        if len(asked) != 1:
            sizes = ", ".join(f"{one.size[0]} x {one.size[1]}" for one in shown)
            said = "no meta.image" if given is None else f"meta.image of size {given.size[0]} x {given.size[1]}"
            raise DataError(
                f"{said} names {len(asked)} of its pictures ({sizes}); give the stored size and the SHA-256 of the one "
                "that is asked about"
            )
        return meta.model_copy(update={"image": asked[0]})

    def _image_meta(self, ref: MediaRef) -> ImageMeta:
        content = read_media(ref, self.encoding.read)
        frame = measure_media(content, "image", self.model, self.encoding).frame
        assert frame is not None
        return ImageMeta(
            sha256=hashlib.sha256(content).hexdigest(),
            size=(frame.stored_width, frame.stored_height),
            shown=(frame.width, frame.height),
        )

    def _kept(self, ref: MediaRef) -> MediaRef:
        path = keep(self.media_folder, read_media(ref, self.encoding.read))
        return replace(ref, path=str(path), sha256=path.name)


def encode_question(
    question: Question, tokenizer: TextTokenizer, model: ModelConfig, data: DataConfig, max_new_tokens: int
) -> EncodedSample:
    """The prompt, ending in an open assistant turn.

    ``SampleError`` (reason ``over_capacity``) where it would not fit a pack with its response: no prompt is cut.
    """
    prompt = encode_sample(question.raw, tokenizer, model, data, add_generation_prompt=True)
    if prompt.num_tokens + max_new_tokens > data.pack_tokens or prompt.num_patches > data.pack_patches:
        raise SampleError(
            question.id,
            "over_capacity",
            f"{prompt.num_tokens} tokens + {max_new_tokens} of a response and {prompt.num_patches} patches; a pack "
            f"holds data.pack_tokens {data.pack_tokens} and data.pack_patches {data.pack_patches}",
        )
    return prompt


def fingerprint(questions: Iterable[Question]) -> str:
    """Hex digest of what is asked and how it is judged; the same wherever the files lie."""
    digest = hashlib.sha256()
    for one in questions:
        media = [(ref.kind, ref.num_bytes) for ref in one.raw.media]
        digest.update(json.dumps([one.id, one.reward_task, one.raw.messages, media, one.gold]).encode() + b"\n")
    return digest.hexdigest()


def keep(folder: Path, content: bytes) -> Path:
    """The file with this content, named by its SHA-256 in a folder of ``folder`` named by the first two digits.

    Written aside and renamed, so that ranks may do so at once.
    """
    name = hashlib.sha256(content).hexdigest()
    path = folder / name[:2] / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".aside-")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(aside, path)
    return path


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    """(``NAME:ROW``, row), rows counted from 1; an error in place of a line that is no JSON object."""
    try:
        if path.suffix == ".jsonl":
            yield from _lines(path)
        elif path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                if "messages" in file.schema_arrow.names:
                    raise DataError(f"{path}: rows with messages are read from JSONL")
                batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=256))
                for number, row in enumerate(itertools.chain.from_iterable(batches), start=1):
                    yield f"{path.name}:{number}", row
        else:
            raise DataError(f"{path}: questions are read from .jsonl and .parquet")
    except (OSError, pa.ArrowInvalid) as fault:
        raise DataError(f"{path} cannot be read: {fault}") from fault


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                yield f"{path.name}:{number}", strict_json(line)
            except DataError as fault:
                yield f"{path.name}:{number}", fault


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if not problems:
        return
    more = [f"... and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
    lines = [*problems[:MOST_SHOWN], *more]
    count = "1 row" if len(problems) == 1 else f"{len(problems)} rows"
    raise DataError("\n  ".join([f"{path}: {count} cannot be asked; correct or drop them", *lines]))


def _media_ref(path: Path, kind: MediaKind, name: str) -> MediaRef:
    file = path.parent / name
    if not file.is_file():
        raise DataError(f"it names {name!r}, but {file} does not exist")
    return MediaRef(kind, str(file), 0, file.stat().st_size, "")


def _check_turns(raw: RawSample) -> None:
    last = raw.messages[-1]
    if last["role"] != "user":
        raise DataError(f"its messages end with the role {last['role']!r}, not user; cut the answer off")
    parts = ({"type": "text", "text": last["content"]},) if isinstance(last["content"], str) else last["content"]
    if not any(part["type"] != "text" or part["text"].strip() for part in parts):
        raise DataError("its last turn says nothing")


def _judged(tree: Mapping[str, Any]) -> GoldRow:
    try:
        row = GoldRow.model_validate(tree)
    except ValidationError as error:
        raise DataError(problems_of(error)) from error
    if len(row.id) > MOST_ID_CHARS:
        raise DataError(
            f"its id {row.id[:40]!r}... has {len(row.id)} characters with its task, at most {MOST_ID_CHARS}"
        )
    return row


def _is_same(given: ImageMeta, found: ImageMeta) -> bool:
    return given.size == found.size and given.sha256 in (None, found.sha256)


def _with_chat(row: GoldRow, raw: RawSample) -> Meta:
    """``meta.messages``: the chat as a reward model gets it, pictures named by their SHA-256."""
    if row.task == "rm_text" and raw.media:
        raise DataError("rm_text reads text only, but it has images or videos; rm_multimodal reads images")
    names = iter(ref.sha256 for ref in raw.media)
    messages = [Message(role=one["role"], content=_named(one["content"], names)) for one in raw.messages]
    if problem := chat_problem(messages):
        raise DataError(f"no reward model can judge it: {problem}")
    return row.meta.model_copy(update={"messages": messages})


def _named(content: Any, names: Iterator[str]) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    return [part if part["type"] == "text" else {**part, part["type"]: next(names)} for part in content]


def _math_kind_problem(gold: Any, meta: Meta) -> str:
    golds = gold if isinstance(gold, list) and gold else [gold]
    is_read = all(
        isinstance(one, str | int | float) and not isinstance(one, bool) and str(one).strip() for one in golds
    )
    return "" if is_read else f"the gold is {str(gold)[:80]!r}; give a string, a number, or a list of strings"
