"""One step of a graphical interface: the twelve actions of one space for phones, desktops and the web.

The gold is the right action with a box in place of each point (``start_box``, ``end_box``, in pixels of the stored
image). The reward is 1 where the type and everything that the gold holds agree, else 0; ``parts`` tell which did.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_megatron.reward.answer import Unscorable, finite_number, one_json, plain, readable_answer
from mimo_megatron.reward.geometry import Box, Point, contains, read_point
from mimo_megatron.reward.golds import GoldError, gold_box, image_of, known_keys
from mimo_megatron.reward.rule import scoring
from mimo_megatron.reward.verdict import Reason, Verdict, judged
from mimo_megatron.reward.wire import Meta

DIRECTIONS = ("up", "down", "left", "right")
"""As the finger moves: ``up`` shows more of what is below."""
MOST_KEYS = 8


@dataclass(frozen=True)
class Form:
    """The arguments of one action."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


FORMS: Mapping[str, Form] = {
    "click": Form(("start_point",), ("text",)),
    "scroll": Form(("direction",), ("scroll_distance",)),
    "input": Form(("text",), ("start_point",)),
    "drag": Form(("start_point", "end_point")),
    "open": Form(("app",)),
    "press": Form(("keys",)),
    "finished": Form(("status",)),
    "longpress": Form(("start_point",)),
    "hover": Form(),
    "select": Form(("text",)),
    "wait": Form(),
    "appswitch": Form((), ("app",)),
}
_BOX_OF = {"start_point": "start_box", "end_point": "end_box"}
_TEXTS = ("text", "app", "status")


@dataclass(frozen=True)
class Action:
    """An action that keeps to its form. Of a gold the points are boxes; all in pixels of the stored image."""

    name: str
    points: Mapping[str, Point]
    boxes: Mapping[str, Box]
    """By the name of the point that must fall into it."""
    words: Mapping[str, tuple[str, ...]]
    """Texts, keys and direction, normalised."""


def read_gold(gold: Any, meta: Meta) -> Action:
    """``{"action": ..., ...}``: the required arguments of its form, and those optional ones that shall be judged."""
    if not isinstance(gold, dict) or not isinstance(gold.get("action"), str) or gold["action"] not in FORMS:
        raise GoldError(f"{gold!r} is not an action: give an object whose action is one of {', '.join(FORMS)}")
    form = FORMS[gold["action"]]
    names = {_BOX_OF.get(name, name): name for name in (*form.required, *form.optional)}
    known_keys(gold, {"action", *names})
    if missing := [_BOX_OF.get(name, name) for name in form.required if _BOX_OF.get(name, name) not in gold]:
        raise GoldError(f"the gold of {gold['action']} lacks {', '.join(missing)}")
    try:
        words = _words(gold)
    except Unscorable as fault:
        raise GoldError(f"{gold!r}: {fault.answer}") from fault
    if "" in (text for texts in words.values() for text in texts):
        raise GoldError(f"{gold!r} holds an empty text; leave out what shall not be judged")
    boxes = {name: gold_box(gold[key], image_of(meta)) for key, name in names.items() if key in gold and key != name}
    return Action(gold["action"], {}, boxes, words)


def read_action(answer: str, meta: Meta) -> Action:
    """The one action of a ``readable_answer``, as an object or a list of one.

    Unknown actions, unknown arguments and missing ones are unreadable.
    """
    value = one_json(answer)
    if isinstance(value, list):
        if len(value) > 1:
            raise Unscorable(Reason.SEVERAL, answer)
        if not value:
            raise Unscorable(Reason.NO_ANSWER, answer)
        value = value[0]
    name = value.get("action") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in FORMS:
        raise Unscorable(Reason.UNREADABLE, answer)
    form, given = FORMS[name], set(value) - {"action"}
    if not set(form.required) <= given <= {*form.required, *form.optional}:
        raise Unscorable(Reason.UNREADABLE, answer)
    points = {key: read_point(value[key], meta.image) for key in _BOX_OF if key in value}
    return Action(name, points, {}, _words(value))


@scoring
def score(response: str, gold: Action, meta: Meta) -> Verdict:
    answer = readable_answer(response, meta)
    said = read_action(answer, meta)
    parts = {"type": said.name == gold.name}
    if said.name == gold.name:
        for name, box in gold.boxes.items():
            parts[name] = name in said.points and contains(box, said.points[name])
        parts |= {name: said.words.get(name) == texts for name, texts in gold.words.items()}
    return judged(float(all(parts.values())), answer, **{name: float(part) for name, part in parts.items()})


def _words(action: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """``Unscorable`` where a text is none, a direction is unknown, or a distance is no number."""
    words: dict[str, tuple[str, ...]] = {}
    for name in _TEXTS:
        if name in action:
            words[name] = (_folded(action[name]),)
    if "direction" in action:
        if action["direction"] not in DIRECTIONS:
            raise Unscorable(Reason.UNREADABLE, f"the direction is none of {', '.join(DIRECTIONS)}")
        words["direction"] = (action["direction"],)
    if "keys" in action:
        keys = action["keys"]
        if not isinstance(keys, list) or not 1 <= len(keys) <= MOST_KEYS:
            raise Unscorable(Reason.UNREADABLE, f"keys is not a list of 1 to {MOST_KEYS} names")
        words["keys"] = tuple(_folded(key) for key in keys)
    # How far to scroll is not judged: no gold says how near is near enough.
    if "scroll_distance" in action and not finite_number(action["scroll_distance"]):
        raise Unscorable(Reason.UNREADABLE, "scroll_distance is not a number")
    return words


def _folded(value: object) -> str:
    """Text as it is compared: NFKC, without case, single spaces."""
    if not isinstance(value, str):
        raise Unscorable(Reason.UNREADABLE, "a text is not a string")
    return " ".join(plain(value).casefold().split())
