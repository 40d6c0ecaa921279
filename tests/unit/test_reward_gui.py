"""The twelve actions: type, target, text, keys and direction must agree with the gold."""

import json
from typing import Any

import pytest

from mimo_megatron.reward.gui import FORMS
from mimo_megatron.reward.wire import Meta
from tests.rule_cases import judge, outcome

BOX, FAR_BOX = [200, 160, 600, 480], [800, 600, 1000, 800]
IN, IN_FAR, OUT = [150, 100], [450, 350], [10, 10]

# By action: a gold that holds every judged argument, and an answer that agrees with it.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "click": ({"start_box": BOX, "text": "OK"}, {"start_point": IN, "text": " ok"}),
    "scroll": ({"direction": "up"}, {"direction": "up", "scroll_distance": 300}),
    "input": ({"text": "hello world", "start_box": BOX}, {"text": "Hello  world", "start_point": IN}),
    "drag": ({"start_box": BOX, "end_box": FAR_BOX}, {"start_point": IN, "end_point": IN_FAR}),
    "open": ({"app": "微信"}, {"app": "微信"}),
    "press": ({"keys": ["ctrl", "c"]}, {"keys": ["Ctrl", "C"]}),
    "finished": ({"status": "success"}, {"status": "Success"}),
    "longpress": ({"start_box": BOX}, {"start_point": IN}),
    "hover": ({}, {}),
    "select": ({"text": "Zürich"}, {"text": "zürich"}),
    "wait": ({}, {}),
    "appswitch": ({"app": "Maps"}, {"app": "maps"}),
}


def pair(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    gold, answer = PAIRS[name]
    return {"action": name, **gold}, {"action": name, **answer}


def act(name: str, **arguments: Any) -> str:
    return json.dumps([{"action": name, **arguments}], ensure_ascii=False)


def test_every_action_of_the_space_has_a_pair() -> None:
    assert set(PAIRS) == set(FORMS) and len(FORMS) == 12


@pytest.mark.parametrize("name", PAIRS)
def test_the_right_action_earns_one_as_object_list_or_block(name: str) -> None:
    gold, answer = pair(name)
    for text in (json.dumps(answer), json.dumps([answer]), f"```json\n{json.dumps([answer])}\n```"):
        assert outcome("gui", text, gold) == 1.0


@pytest.mark.parametrize("name", PAIRS)
def test_any_other_action_earns_nothing(name: str) -> None:
    gold, _ = pair(name)
    for other in PAIRS:
        if other != name:
            verdict = judge("gui", json.dumps(pair(other)[1]), gold)
            assert (verdict.status, verdict.reward, verdict.parts) == ("ok", 0.0, {"type": 0.0})


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("click", {"start_point": OUT}, "start_point"),
        ("click", {"text": "Cancel"}, "text"),
        ("scroll", {"direction": "down"}, "direction"),
        ("input", {"text": "hello"}, "text"),
        ("input", {"text": "hello world, or not"}, "text"),
        ("input", {"start_point": OUT}, "start_point"),
        ("drag", {"start_point": OUT}, "start_point"),
        ("drag", {"end_point": OUT}, "end_point"),
        ("drag", {"start_point": IN_FAR, "end_point": IN}, "start_point"),
        ("open", {"app": "Maps"}, "app"),
        ("press", {"keys": ["c", "ctrl"]}, "keys"),
        ("press", {"keys": ["ctrl"]}, "keys"),
        ("finished", {"status": "failure"}, "status"),
        ("longpress", {"start_point": OUT}, "start_point"),
        ("select", {"text": "Bern"}, "text"),
        ("appswitch", {"app": "Mail"}, "app"),
    ],
)
def test_one_wrong_argument_earns_nothing_and_is_named(name: str, change: dict[str, Any], part: str) -> None:
    gold, answer = pair(name)
    verdict = judge("gui", json.dumps({**answer, **change}), gold)
    assert verdict.reward == 0.0 and verdict.parts[part] == 0.0 and verdict.parts["type"] == 1.0


def test_an_optional_argument_is_judged_only_where_the_gold_holds_it() -> None:
    without = act("click", start_point=IN)
    assert outcome("gui", without, {"action": "click", "start_box": BOX}) == 1.0
    assert outcome("gui", act("click", start_point=IN, text="any"), {"action": "click", "start_box": BOX}) == 1.0
    assert outcome("gui", without, {"action": "click", "start_box": BOX, "text": "OK"}) == 0.0
    assert outcome("gui", act("input", text="a"), {"action": "input", "text": "a", "start_box": BOX}) == 0.0
    assert outcome("gui", act("appswitch"), {"action": "appswitch"}) == 1.0


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        pytest.param("", "no_answer", id="empty"),
        pytest.param("click(150, 100)", "no_answer", id="call syntax"),
        pytest.param("[]", "no_answer", id="no action"),
        pytest.param('[{"action": "{action_name}"}, ...]', "unreadable", id="copied template"),
        pytest.param(act("tap", start_point=IN), "unreadable", id="unknown action"),
        pytest.param(act("Click", start_point=IN), "unreadable", id="another case"),
        pytest.param(act("click", start_point=IN, reason="x"), "unreadable", id="unknown argument"),
        pytest.param(act("click"), "unreadable", id="missing argument"),
        pytest.param(act("click", start_point=[150, 100, 160, 110]), "unreadable", id="a box as point"),
        pytest.param(act("click", start_point="150,100"), "unreadable", id="a point in quotes"),
        pytest.param(act("click", start_point=[True, True]), "unreadable", id="bools"),
        pytest.param(act("click", start_point=[501, 100]), "out_of_range", id="outside"),
        pytest.param(act("click", start_point=[float("nan"), 1]), "unreadable", id="NaN"),
        pytest.param(act("click", start_point=IN, text=5), "unreadable", id="text that is a number"),
        pytest.param(act("scroll", direction="north"), "unreadable", id="unknown direction"),
        pytest.param(act("scroll", direction=["up"]), "unreadable", id="a list of directions"),
        pytest.param(act("scroll", direction="up", scroll_distance="far"), "unreadable", id="distance in words"),
        pytest.param(act("press", keys="ctrl"), "unreadable", id="keys as text"),
        pytest.param(act("press", keys=[]), "unreadable", id="no keys"),
        pytest.param(act("press", keys=["a"] * 9), "unreadable", id="nine keys"),
        pytest.param(act("press", keys=[1]), "unreadable", id="a key that is a number"),
        pytest.param(act("hover", start_point=IN), "unreadable", id="an argument of another action"),
        pytest.param('{"action": ["click"]}', "unreadable", id="a list of actions by name"),
        pytest.param('{"action": "wait", "action": "hover"}', "unreadable", id="a key twice"),
        pytest.param('[{"action": "wait"}, {"action": "hover"}]', "several", id="two actions"),
        pytest.param('{"action": "wait"} or {"action": "hover"}', "several", id="one or the other"),
        pytest.param('<think>{"action": "wait"}</think>', "no_answer", id="only in think"),
        pytest.param("[[1, 2]]", "unreadable", id="a list of lists"),
    ],
)
def test_refused_actions_say_why(response: str, reason: str) -> None:
    assert outcome("gui", response, {"action": "click", "start_box": BOX}) == reason


def test_an_action_without_a_place_needs_no_image() -> None:
    assert outcome("gui", act("wait"), {"action": "wait"}, Meta()) == 1.0
    assert (
        judge("gui", act("click", start_point=IN), {"action": "click", "start_box": BOX}, Meta()).reason == "bad_gold"
    )


def test_a_point_is_not_read_where_no_image_is_known() -> None:
    verdict = judge("gui", act("click", start_point=IN), {"action": "wait"}, Meta())
    assert (verdict.status, verdict.reward) == ("ok", 0.0)
