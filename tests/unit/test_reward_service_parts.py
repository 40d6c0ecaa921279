"""The service's parts without a network: settings, ledger, queues, window, and what must never stand in its sources."""

import asyncio
import re
from pathlib import Path

import pytest

from mimo_megatron.config.calibration import Calibration
from mimo_megatron.errors import CheckpointError, ConfigError
from mimo_megatron.reward.client import Window
from mimo_megatron.reward.service import gate
from mimo_megatron.reward.service.lanes import Overloaded, Queue
from mimo_megatron.reward.service.ledger import Key, Ledger
from mimo_megatron.reward.service.settings import ModelSpec, ServiceSettings, model_spec, read_token
from mimo_megatron.reward.verdict import Reason, Verdict, judged, unknown
from tests.repository import ROOT, python_sources

KEY: Key = ("i", b"digest", "v1")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_a_public_address_without_a_token_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="--token-file"):
        ServiceSettings(host=host).check()
    ServiceSettings(host=host, token="x" * 16).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machines_own_addresses_need_no_token(host: str) -> None:
    ServiceSettings(host=host).check()


def test_a_token_file_holds_one_long_word(tmp_path: Path) -> None:
    file = tmp_path / "token"
    for text in ("", "short", "two words of a token", "é" * 20):
        file.write_text(text)
        with pytest.raises(ConfigError, match="--token-file"):
            read_token(file)
    file.write_text("0123456789abcdef\n")
    assert read_token(file) == "0123456789abcdef"
    with pytest.raises(ConfigError):
        read_token(tmp_path / "nowhere")


def test_model_arguments_are_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text('{"mu": 1, "tau": 2, "accuracy": 0.9}')
    assert model_spec("text=http://h:1/", False) == ModelSpec("rm_text", "http://h:1")
    assert model_spec(f"multimodal=http://h:1,{file}", True).calibration == Calibration(1, 2, 0.9)
    for text, is_vllm in [("text=h:1", False), ("video=http://h", False), ("text=http://h", True), ("http://h", False)]:
        with pytest.raises(ConfigError):
            model_spec(text, is_vllm)
    for bad in ('{"mu": 1, "tau": 0}', '{"mu": NaN, "tau": 1}', '{"mu": 1}', "[]", "{"):
        file.write_text(bad)
        with pytest.raises(CheckpointError, match="mu"):
            model_spec(f"text=http://h:1,{file}", True)


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = gate.hmac.compare_digest
    monkeypatch.setattr(gate.hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    assert gate.matches(b"Bearer secret", "secret")
    assert not gate.matches(b"Bearer secreT", "secret") and not gate.matches(b"", "secret")
    assert len(compared) == 3


def test_a_verdict_is_worked_out_once_for_all_who_ask() -> None:
    async def run() -> None:
        ledger, starts, gate_ = Ledger(10), 0, asyncio.Event()

        async def work() -> Verdict:
            nonlocal starts
            starts += 1
            await gate_.wait()
            return judged(1.0)

        first, second = ledger.ask(KEY, "a", work), ledger.ask(KEY, "b", work)
        await asyncio.sleep(0)
        gate_.set()
        assert await first.verdict == await second.verdict == judged(1.0)
        assert await ledger.ask(KEY, "c", work).verdict == judged(1.0)
        assert (starts, ledger.num_hits) == (1, 2)
        for other in (("j", *KEY[1:]), ("i", b"other", "v1"), ("i", b"digest", "v2")):
            await ledger.ask(other, "d", work).verdict
        assert starts == 4

    asyncio.run(run())


def test_unknown_is_not_remembered_and_memory_is_bounded() -> None:
    async def run() -> None:
        ledger, starts = Ledger(2), 0

        async def work() -> Verdict:
            nonlocal starts
            starts += 1
            return unknown(Reason.WORKER_LOST) if starts == 1 else judged(0.0)

        assert (await ledger.ask(KEY, "a", work).verdict).status == "unknown"
        assert (await ledger.ask(KEY, "a", work).verdict).status == "ok"
        for number in range(5):
            await ledger.ask((f"{number}", b"", ""), "a", work).verdict
        assert not ledger.knows(KEY) and ledger.knows(("4", b"", "")) and not ledger.knows(("2", b"", ""))

    asyncio.run(run())


def test_work_is_cancelled_when_the_last_asker_leaves() -> None:
    async def run() -> None:
        ledger, ended = Ledger(10), []

        async def work() -> Verdict:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                ended.append(True)
                raise
            return judged(1.0)

        first, second = ledger.ask(KEY, "a", work), ledger.ask(KEY, "b", work)
        other = ledger.ask(("j", b"", ""), "c", work)
        await asyncio.sleep(0)
        assert ledger.cancel("a", []) == 1
        await asyncio.sleep(0)
        assert first.verdict.result() == unknown(Reason.CANCELLED) and not second.verdict.done() and not ended
        assert ledger.cancel(None, ["i", "nobody"]) == 1
        await asyncio.sleep(0)
        assert second.verdict.result() == unknown(Reason.CANCELLED) and ended and not other.verdict.done()
        assert ledger.cancel("c", []) == 1

    asyncio.run(run())


def test_a_full_queue_says_when_to_come_back_and_an_empty_one_takes_anything() -> None:
    queue = Queue("math", max_items=10, max_bytes=100)
    queue.check_room(50, 5000)
    with queue.holds(60, 4):
        queue.check_room(6, 40)
        queue.check_room(0, 0)
        for items, size in ((7, 40), (6, 41)):
            with pytest.raises(Overloaded) as full:
                queue.check_room(items, size)
            assert full.value.retry_after >= 1
    assert (queue.num_items, queue.num_bytes, queue.oldest_seconds) == (0, 0, 0)


def test_the_window_halves_once_a_second_and_grows_by_answers() -> None:
    window = Window(start=256, most=300)
    window.halve()
    window.halve()
    assert window.limit == 128
    for _ in range(1000):
        window.grow(64)
    assert window.limit == 300
    window.take(299)
    assert window.room == 1


FORBIDDEN = re.compile(r"pickle|\bmarshal\b|\bshelve\b|\.send\(|multiprocessing|\beval\(|\bexec\(|sympify|yaml\.load")


def reward_sources() -> dict[str, str]:
    return {path: text for path, text in python_sources("mimo_megatron").items() if "/reward/" in path}


def without_docstrings(text: str) -> str:
    return re.sub(r'"""[\s\S]*?"""|#.*', "", text)


def test_nothing_in_reward_unpickles_or_evaluates() -> None:
    found = {path: FORBIDDEN.findall(without_docstrings(text)) for path, text in reward_sources().items()}
    assert len(found) > 20 and not {path: words for path, words in found.items() if words}


@pytest.mark.parametrize("line", ["import pickle", "conn.send(item)", "from multiprocessing import Pipe", "eval(text)"])
def test_a_planted_danger_is_found(line: str) -> None:
    assert FORBIDDEN.search(without_docstrings(f'"""Nothing is pickled."""\n{line}'))


def test_the_zygote_imports_nothing_heavy() -> None:
    text = (ROOT / "mimo_megatron/reward/service/zygote.py").read_text()
    assert set(re.findall(r"^(?:from|import) ([\w.]+)", text, re.MULTILINE)) == {
        "gc", "importlib", "json", "os", "select", "socket", "sys", "threading", "typing",
        "mimo_megatron.reward.service",
    }  # fmt: skip
