"""What a terminal shows while a step goes: its phases in order with their seconds, and how far each is."""

import re
import time
from contextlib import closing

import pytest
from rich.console import Console

from mimo_megatron.rl.progress import Progress
from mimo_megatron.train.live_bar import LiveBar
from mimo_megatron.train.metrics import MetricsWriter
from tests.unit.test_metrics import RECORD, make_config

SAMPLING = Progress(
    num_settled=3, num_wanted=20, num_running=48, num_judging=2, num_responses=1100, num_tokens=33_000, num_replaced=1
)


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch, log_lines) -> Clock:
    monkeypatch.setenv("COLUMNS", "160")
    return Clock()


def opened(clock: Clock) -> closing[LiveBar]:
    return closing(LiveBar("tiny", 3, 10, clock))


def foot(bar: LiveBar) -> list[str]:
    """The lines as a terminal has them, without styles."""
    console = Console(width=160)
    with console.capture() as shown:
        console.print(bar.foot())
    return [line.rstrip() for line in shown.get().splitlines()]


def test_without_phases_the_foot_is_the_bar_and_the_figures(clock):
    with opened(clock) as bar:
        assert len(foot(bar)) == 1 and foot(bar)[0].endswith("30% step 3/10")
        bar.update(4, "loss 2.5")
        assert foot(bar)[1:] == ["loss 2.5"] and foot(bar)[0].endswith("40% step 4/10")


def test_a_steps_phases_stand_in_order_with_their_seconds_and_the_last_steps_figures_below(clock):
    with opened(clock) as bar:
        bar.update(3, "reward 0.5")
        for phase, seconds in (("rollout", 70.0), ("update", 12.4), ("sync", 1.0)):
            bar.at(4, phase)
            clock.seconds += seconds
        assert foot(bar)[1:] == ["step 4: rollout 70 s › update 12 s › sync 1 s", "reward 0.5"]
        bar.at(5, "rollout")
        assert foot(bar)[1:] == ["step 5: rollout 0 s", "reward 0.5"]


def test_a_phase_that_is_entered_again_counts_on_in_its_place(clock):
    with opened(clock) as bar:
        for phase, seconds in (("rollout", 5.0), ("rewards", 3.0), ("rollout", 4.0), ("rewards", 2.0), ("update", 1.0)):
            bar.at(1, phase)
            clock.seconds += seconds
        assert foot(bar)[1:] == ["step 1: rollout 9 s › rewards 5 s › update 1 s"]


def test_seconds_go_on_while_nothing_is_told_and_a_detail_is_the_phases_own(clock):
    with opened(clock) as bar:
        bar.at(1, "rollout", SAMPLING.words("groups"))
        clock.seconds = 30.0
        assert foot(bar)[1:] == [
            "step 1: rollout 30 s · 3 of 20 groups · 1 replaced · 48 responses running · 2 being judged · "
            "1,100 responses, 33,000 tokens so far"
        ]
        bar.at(1, "update")
        assert foot(bar)[1:] == ["step 1: rollout 30 s › update 0 s"]


def test_a_terminal_is_drawn_again_at_every_phase_and_while_one_goes(tmp_path, capsys, monkeypatch, log_lines):
    monkeypatch.setenv("COLUMNS", "240")
    phases = ["rollout", "rewards", "update", "sync", "evaluation", "save"]
    with MetricsWriter(tmp_path, make_config(tmp_path), 10, True).open_for(0) as metrics:
        metrics.at(1, "rollout", "3 of 20 groups")
        time.sleep(0.6)
        for phase in phases[1:]:
            metrics.at(1, phase)
        metrics.write(RECORD)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    places = [re.search(rf"{phase} [01] s(?! ›)", shown) for phase in phases]  # drawn while it was the last one
    assert all(places) and [one.start() for one in places] == sorted(one.start() for one in places)
    assert "3 of 20 groups" in shown


def test_off_a_terminal_a_phase_leaves_no_trace(tmp_path, capsys, log_lines):
    with MetricsWriter(tmp_path, make_config(tmp_path), 10, False).open_for(0) as metrics:
        metrics.at(1, "rollout", "3 of 20 groups")
    assert capsys.readouterr() == ("", "") and log_lines == []
    assert not any("rollout" in path.read_text() for path in tmp_path.glob("*.jsonl"))
