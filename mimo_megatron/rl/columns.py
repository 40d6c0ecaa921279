"""Questions as others store them, turned into rows of ours: verl's columns and TRL's.

A row of ours is a record (``data/records.py``) with ``id, task, gold, meta``. Media stand in a column of their own in
the others' files, and their places in the text as ``<image>`` and ``<video>`` marks (verl), as parts without a name
(TRL), or nowhere: then they stand before the first user turn (TRL). What would have to be guessed is a ``DataError``.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from mimo_megatron.errors import DataError
from mimo_megatron.reward.wire import Task
from mimo_megatron.types import MediaKind

TASKS: tuple[str, ...] = get_args(Task)
REWARD_MODEL_TASKS = ("rm_text", "rm_multimodal")
GOLD_COLUMNS = ("solution", "answer", "ground_truth")
MEDIA_COLUMNS: Mapping[MediaKind, tuple[str, str]] = {"image": ("image", "images"), "video": ("video", "videos")}

Keep = Callable[[bytes], str]
"""Stores a picture or clip and gives the name of its file."""

_MARK = re.compile(r"<(image|video)>")
_GOLDS_OF_JSON = ("box", "point", "count", "gui")


def as_ours(row: Mapping[str, Any], reward: str | None, place: str, keep: Keep) -> dict[str, Any]:
    """The row as ours. ``reward`` is what the recipe says judges it, if it says so; ``place`` names a row without id.

    A row of ours says its task itself. verl's ``ability`` counts where it is the name of a task and the recipe says
    nothing; TRL has no such column.
    """
    if "messages" in row:
        if reward is not None and row.get("task") != reward:
            raise DataError(f"its task is {row.get('task')!r}, but the recipe's reward is {reward!r}; drop one of them")
        return dict(row)
    if "prompt" not in row:
        raise DataError(f"it has {sorted(row)}, neither messages (our rows) nor prompt (verl's and TRL's)")
    task = reward or _task_of_verl(row)
    if task is None:
        raise DataError(f"nothing says what judges it; set `reward` of its prompts to one of {', '.join(TASKS)}")
    names = {kind: [_media_name(one, keep) for one in _listed(row, columns)] for kind, columns in MEDIA_COLUMNS.items()}
    given_id = row.get("id")
    return {
        "id": str(given_id) if isinstance(given_id, int | str) else place,
        "task": task,
        "messages": _messages(row["prompt"], names),
        "gold": None if task in REWARD_MODEL_TASKS else _read_gold(task, _gold(row)),
        "meta": {key: value for key, value in (row.get("meta") or {}).items() if value is not None},
    }


def _task_of_verl(row: Mapping[str, Any]) -> str | None:
    judged = row.get("reward_model")
    is_by_rule = isinstance(judged, Mapping) and judged.get("style") == "rule"
    return row["ability"] if is_by_rule and row.get("ability") in TASKS else None


def _gold(row: Mapping[str, Any]) -> Any:
    if isinstance(row.get("reward_model"), Mapping):
        return row["reward_model"].get("ground_truth")
    golds = {column: row[column] for column in GOLD_COLUMNS if row.get(column) is not None}
    if not golds:
        raise DataError(f"it has no gold; give one of the columns {', '.join(GOLD_COLUMNS)}")
    first, *others = golds.values()
    if any(other != first for other in others):
        raise DataError(f"the columns {', '.join(golds)} disagree; keep the one that is the gold")
    return first


def _read_gold(task: str, gold: Any) -> Any:
    """Columns hold text where the rules of some tasks read numbers and lists; bad text is left for the rule to name."""
    if isinstance(gold, str) and task in _GOLDS_OF_JSON:
        try:
            return json.loads(gold)
        except ValueError:
            return gold
    return gold


def _listed(row: Mapping[str, Any], columns: tuple[str, str]) -> list[Any]:
    one, several = (row.get(column) for column in columns)
    if one is not None and several is not None:
        raise DataError(f"it has both {' and '.join(columns)}; keep one of them")
    if several is not None and not isinstance(several, list):
        raise DataError(f"{columns[1]} is of type {type(several).__name__}, not a list")
    return [one] if one is not None else several or []


def _media_name(one: Any, keep: Keep) -> str:
    """verl and Hugging Face: ``{"bytes": ..., "path": ...}``; or bytes, or a path alone."""
    if isinstance(one, Mapping):
        one = next((one[key] for key in ("bytes", "path", "image", "video") if one.get(key)), None)
    if isinstance(one, bytes) and one:
        return keep(one)
    if isinstance(one, str) and one:
        return one.removeprefix("file://")
    raise DataError(f"an image or video is {str(one)[:80]!r}; give bytes or the path of a file")


def _messages(prompt: Any, names: Mapping[MediaKind, Sequence[str]]) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        raise DataError(f"prompt is {str(prompt)[:80]!r}; give text or a list of turns with role and content")
    turns = [{**turn, "content": _parts(turn.get("content"))} for turn in prompt]
    places = [part for turn in turns for part in turn["content"] if _is_place(part)]
    first_user = next((turn for turn in turns if turn.get("role") == "user"), None)
    if not places and first_user is not None:
        places = [{"type": kind} for kind, of_kind in names.items() for _ in of_kind]
        first_user["content"] = places + first_user["content"]
    for kind, of_kind in names.items():
        of_places = [part for part in places if part["type"] == kind]
        if len(of_places) != len(of_kind):
            raise DataError(f"its text has {len(of_places)} places for its {len(of_kind)} {kind}s")
        for part, name in zip(of_places, of_kind, strict=True):
            part.update({kind: name})  # a part as our rows have it
    return turns


def _is_place(part: Mapping[str, Any]) -> bool:
    """An image or video whose name stands in the column."""
    return part.get("type") in MEDIA_COLUMNS and part["type"] not in part


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return list(_marked(content))
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError(f"content is {str(content)[:80]!r}; give text or a list of parts")
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def _marked(text: str) -> Iterator[dict[str, Any]]:
    """Text and places by turns. Nothing is stripped: verl's tokens are those of the pieces as they stand."""
    for number, piece in enumerate(_MARK.split(text)):
        if number % 2:
            yield {"type": piece}
        elif piece:
            yield {"type": "text", "text": piece}
