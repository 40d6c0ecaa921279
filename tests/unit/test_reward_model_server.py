"""A reward model's server: whose fault is whose, what a failing model costs, who is still waited for."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from mimo_megatron.config.calibration import Calibration
from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.reward.verdict import Reason
from mimo_megatron.reward.wire import MAX_IMAGES, Message, ModelItem, ModelResult
from mimo_megatron.reward_model import judge as judges
from mimo_megatron.reward_model.judge import Judge
from mimo_megatron.reward_model.server import build_app
from tests.data_fixtures import write_tokenizer
from tests.reward_harness import served
from tests.samples import tiny_model

MODEL = tiny_model(head="reward")
LONG = "word " * (MODEL.text.max_positions + 1)
ASK = [Message(role="user", content="Say it.")]


def item(name: str, messages: Sequence[Message] = ASK, response: str = "it") -> ModelItem:
    return ModelItem(id=name, messages=list(messages), response=response)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Reads chats as the real one does; its scores are planted."""
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = load_tokenizer(folder, MODEL.tokens, MODEL.text.vocab_size)
    model: Any = SimpleNamespace(
        tokenizer=tokenizer, encoding=EncodingConfig(tokenizer=folder), model=SimpleNamespace(model_config=MODEL)
    )
    return Judge(model, Calibration(0.0, 1.0), None, "v", 64)


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    planted: list[float] = []
    monkeypatch.setattr(judges, "scores_of", lambda model, layout, samples, slots: planted[: len(samples)])
    return planted


@pytest.mark.parametrize(
    ("messages", "response", "reason"),
    [
        ([], "it", Reason.BAD_PROMPT),
        ([Message(role="assistant", content="a")], "it", Reason.BAD_PROMPT),
        ([Message(role="user", content=[{"foo": "bar"}])], "it", Reason.BAD_PROMPT),
        ([Message(role="user", content=[{"type": "text"}])], "it", Reason.BAD_PROMPT),
        ([Message(role="user", content=[{"type": "image", "image": "0"}] * (MAX_IMAGES + 1))], "it", Reason.BAD_PROMPT),
        ([Message(role="user", content=[{"type": "image", "image": "../x"}])], "it", Reason.MEDIA_MISSING),
        ([Message(role="user", content=LONG)], "it", Reason.BAD_PROMPT),
        (ASK, LONG, Reason.TOO_LARGE),
        (ASK, "<think>a</think> ", Reason.NO_ANSWER),
    ],
)
def test_only_the_responses_own_fault_is_called_its_fault(
    judge: Judge, scores: list[float], messages: list[Message], response: str, reason: Reason
) -> None:
    scores += [0.0]
    bad, good = judge.results([item("bad", messages, response), item("good")])
    assert (bad.score, bad.reward, bad.reason) == (None, None, reason)
    assert (good.score, good.reward) == (0.0, 0.5)


def test_a_score_that_is_not_finite_is_no_reward_and_harms_no_other(judge: Judge, scores: list[float]) -> None:
    scores += [float("nan"), 0.0, float("inf")]
    results = judge.results([item("a"), item("b"), item("c")])
    assert [one.reward for one in results] == [None, 0.5, None]
    assert [one.reason for one in results] == [Reason.INTERNAL, Reason.PARTIAL, Reason.INTERNAL]


class Scripted:
    """In a judge's place: fails on the response ``poison``; holds each batch until ``go`` is set."""

    version, kind = "v", "text"

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()

    def results(self, items: Sequence[ModelItem]) -> list[ModelResult]:
        self.seen.append([one.id for one in items])
        assert self.go.wait(10)
        if any(one.response == "poison" for one in items):
            raise ValueError("planted")
        return [ModelResult(id=one.id, score=0.0, reward=0.5, reason=Reason.PARTIAL) for one in items]


def with_server(work: Callable[[Scripted, httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        scripted = Scripted()
        app = build_app(scripted)  # type: ignore[arg-type]
        async with served(app) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
            await work(scripted, client)

    asyncio.run(run())


def ask(client: httpx.AsyncClient, name: str, response: str = "it") -> "asyncio.Task[httpx.Response]":
    body = {"items": [item(name, response=response).model_dump()]}
    return asyncio.create_task(client.post("/v1/rewards", json=body))


async def until(holds: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < 5, "waited in vain"
        await asyncio.sleep(0.01)


def test_a_model_that_fails_is_a_typed_500_for_its_own_request_only() -> None:
    async def work(scripted: Scripted, client: httpx.AsyncClient) -> None:
        scripted.go.clear()
        first = ask(client, "first")
        await until(lambda: len(scripted.seen) == 1)
        others = [ask(client, name, "poison" if name == "b" else "it") for name in "abc"]
        await asyncio.sleep(0.2)
        scripted.go.set()
        assert (await first).status_code == 200
        answers = [await one for one in others]
        assert [one.status_code for one in answers] == [200, 500, 200]
        assert answers[1].json()["error"] == {"code": "model_failed", "message": "ValueError: planted"}
        assert scripted.seen == [["first"], ["a", "b", "c"], ["a"], ["b"], ["c"]]

    with_server(work)


def test_a_request_whose_client_has_gone_is_not_scored() -> None:
    async def work(scripted: Scripted, client: httpx.AsyncClient) -> None:
        scripted.go.clear()
        first = ask(client, "first")
        await until(lambda: len(scripted.seen) == 1)
        gone, kept = ask(client, "gone"), ask(client, "kept")
        await asyncio.sleep(0.2)
        gone.cancel()
        await asyncio.sleep(0.2)
        scripted.go.set()
        assert [(await one).status_code for one in (first, kept)] == [200, 200]
        assert scripted.seen == [["first"], ["kept"]]

    with_server(work)
