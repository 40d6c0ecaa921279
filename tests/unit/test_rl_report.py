"""The report of a run of reinforcement learning: what it says is what the files hold, it is written whatever they hold,
nothing in them becomes markup, and its size is bounded."""

import base64
import io
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mimo_megatron.report.charts import Series, line_chart
from mimo_megatron.report.rl_samples import MOST_PICTURE_CHARACTERS, shapes_of
from mimo_megatron.report.run_report import write_journey, write_report
from mimo_megatron.report.stills import LONGEST_SIDE
from tests.report_fixtures import JSON, Page, make_run

TASKS = ("math", "box")


def make_rl_run(run_dir: Path, steps: int = 4, **files) -> Path:
    """A run folder of two tasks; ``files`` replaces the rows of metrics, events, evaluations or rollouts."""
    rows = {
        "metrics": [metrics_row(step) for step in range(1, steps + 1)],
        "evaluations": [
            dict(step=step, rewards=dict(math=0.1 + step / 10, box=0.9 - step / 100)) for step in range(0, steps + 1, 2)
        ],
        "rollouts": [rollout(step, task) for step in range(1, steps + 1) for task in TASKS],
    } | files
    make_run(run_dir, name="mixed", **{name: rows[name] for name in ("metrics", "events", "skipped") if name in rows})
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["rl"] = dict(
        prompts=[dict(task=task, path="x", ratio=1.0) for task in TASKS],
        algorithm=dict(name="on-policy", normaliser="group-token-mean"),
        rollout=dict(engine="embedded", group_size=8, groups_per_step=20),
        evaluation=dict(every_steps=2, questions=100, temperature=1.0),
    )
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for name in ("evaluations", "rollouts"):
        (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return run_dir


def metrics_row(step: int, **numbers: float) -> dict:
    of_tasks = {
        f"{name}/{task}": 0.1 * (place + 1) + step / 100
        for name in ("reward", "length", "cut", "pass_rate", "zero_variance", "entropy", "gap")
        for place, task in enumerate(TASKS)
    }
    others = {"reward/mean": 0.5, "policy/largest_gap": 1e-5 * step, "seconds/rollout": 3.0, "seconds/update": 1.0}
    return dict(step=step, loss=0.001, grad_norm=1.0, lrs=dict(text=1e-4), num_samples=16, num_trained_tokens=100,
                num_tokens=500, num_slots=500, seconds=4.0, numbers=of_tasks | others | numbers)  # fmt: skip


def rollout(step: int, task: str, media: list | None = None, **fields) -> dict:
    response = dict(text=f"answer {task} {step}", reward=0.25, reason="partial", tokens=3, finish="stop")
    content = [dict(type="image"), dict(type="text", text=f"ask {task}")]
    return dict(
        step=step, task=task, question=f"{task}-{step}", messages=[dict(role="user", content=content)],
        media=media or [], gold="7", mean=0.25, responses=[response],
    ) | fields  # fmt: skip


def picture(path: Path, size: tuple[int, int] = (640, 480), mode: str = "RGB") -> list:
    Image.new(mode, size).save(path)
    return ["image", str(path), 0, path.stat().st_size]


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir))


def words(page: Page) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page.html).split())


def pictures(page: Page) -> list[Image.Image]:
    sources = [attrs["href"] for tag, attrs in page.tags if tag == "image"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


# ---- what it says ----


def test_held_out_rewards_are_told_before_best_and_last_by_task_and_in_the_mean(tmp_path):
    rewards = [(0, 0.1, 0.5), (2, 0.6, 0.48), (4, 0.5, 0.47)]
    evaluations = [dict(step=step, rewards=dict(math=math, box=box)) for step, math, box in rewards]
    page = page_of(make_rl_run(tmp_path, evaluations=evaluations))
    rows = page.rows()
    assert ["math", "0.100 step 0", "0.600 step 2", "0.500 step 4", "+0.400"] in rows
    assert ["box", "0.500 step 0", "0.500 step 0", "0.470 step 4", "-0.030"] in rows
    assert ["mean of tasks", "0.300 step 0", "0.540 step 2", "0.485 step 4", "+0.185"] in rows
    assert "Held-out reward 0.300 → 0.485" in words(page)
    # Of 100 questions the standard error is at most 0.05: a smaller fall is no bad news.
    assert 'class="n good">+0.400' in page.html and 'class="n ">-0.030' in page.html


def test_a_step_that_was_evaluated_again_counts_as_it_was_last(tmp_path):
    evaluations = [dict(step=step, rewards=dict(math=reward)) for step, reward in ((0, 0.1), (2, 0.9), (2, 0.3))]
    rows = page_of(make_rl_run(tmp_path, evaluations=evaluations)).rows()
    assert ["math", "0.100 step 0", "0.300 step 2", "0.300 step 2", "+0.200"] in rows


def test_a_task_that_was_not_always_asked_leaves_the_mean_out(tmp_path):
    evaluations = [dict(step=0, rewards=dict(math=0.1)), dict(step=2, rewards=dict(box=0.3))]
    rows = page_of(make_rl_run(tmp_path, evaluations=evaluations)).rows()
    assert ["math", "0.100 step 0", "0.100 step 0", "0.100 step 0", "+0.000"] in rows
    assert not any(row[:1] == ["mean of tasks"] for row in rows)


def test_the_curves_are_those_of_reinforcement_learning_and_a_task_keeps_its_colour(tmp_path):
    page = page_of(make_rl_run(tmp_path))
    assert {"Held-out reward", "Reward in training", "Response length, tokens", "Entropy, nats a token",
            "Groups of equal rewards, dropped", "Log-prob gap, engine to trainer (log)", "Seconds a step",
            } <= set(page.headings)  # fmt: skip
    assert not {"Loss per trained token", "Fill of the packs"} & set(page.headings)
    colours = set(re.findall(r'swatch (\S+)">(math|box|mean of tasks)<', page.html))
    assert colours == {("c1", "math"), ("c2", "box"), ("c-mean", "mean of tasks")}


def test_each_task_shows_its_first_middle_and_last_rollouts(tmp_path):
    late = [rollout(step, "late") for step in (3, 4)]
    text = words(page_of(make_rl_run(tmp_path, rollouts=[rollout(step, "math") for step in range(1, 8)] + late)))
    assert [step for step in range(1, 8) if f"answer math {step}" in text] == [1, 4, 7]
    assert [step for step in range(1, 8) if f"answer late {step}" in text] == [3, 4]
    assert "0.250 partial 3 tokens" in text and "Gold 7" in text and "[image] ask math" in text


def test_warnings_that_differ_in_numbers_are_one_row_and_not_in_the_log(tmp_path):
    alarms = [dict(event="alarm", step=step, detail=f"task 'math' gave {step} of 5 groups") for step in (1, 2, 4)]
    events = [*alarms, dict(event="nothing_learnt", step=3, detail="no group"), dict(event="checkpoint", step=4)]
    rows = page_of(make_rl_run(tmp_path, events=events)).rows()
    assert ["alarm", "3", "1", "4", "task 'math' gave 4 of 5 groups"] in rows
    assert ["nothing_learnt", "1", "3", "3", "no group"] in rows
    assert [row[1] for row in rows if len(row) == 4 and row[0] == ""] == ["checkpoint"]


def test_stale_groups_and_missing_verdicts_are_counted(tmp_path):
    lost = {"stale/box": 2.0, "unknown/timeout": 3.0}
    page = page_of(make_rl_run(tmp_path, metrics=[metrics_row(1, **lost), metrics_row(2, **lost)]))
    assert ["Groups refused: a token of an older policy", "box", "4"] in page.rows()
    assert ["Responses without a verdict", "timeout", "6"] in page.rows()
    assert "4 stale groups, 6 without verdict" in words(page)
    (tmp_path / "b").mkdir()
    assert "No group was refused as stale" in words(page_of(make_rl_run(tmp_path / "b")))


def test_a_journey_tells_of_training_and_of_reinforcement_learning(tmp_path):
    run_dirs = [make_run(tmp_path / "a", name="warm-up"), make_rl_run(tmp_path / "b")]
    page = Page(write_journey(run_dirs, tmp_path / "journey.html"))
    assert ["box", "0.900", "0.900", "0.860", "-0.040"] in page.rows()
    assert {"warm-up", "mixed", "Reward in training", "Loss over all stages"} <= set(page.headings)
    spans = re.findall(r"step (\d+)\n(?:warm-up|mixed) ", page.html)
    assert spans[-1] == "40"  # the loss of reinforcement learning is not drawn beside the others
    lone = Page(write_journey([run_dirs[1]], tmp_path / "lone.html"))
    assert "Loss over all stages" not in lone.headings


# ---- whatever the folder holds ----


def test_a_run_without_evaluations_has_all_the_rest(tmp_path):
    make_rl_run(tmp_path)
    (tmp_path / "evaluations.jsonl").unlink()
    page = page_of(tmp_path)
    assert "Held-out reward" not in page.headings
    assert {"Curves", "Reward in training", "Warnings and losses", "math", "box"} <= set(page.headings)


def test_torn_last_lines_are_named_and_the_others_kept(tmp_path):
    make_rl_run(tmp_path)
    for name in ("metrics", "evaluations", "rollouts"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(path.read_text() + path.read_text().splitlines()[-1][:-20])
    page = page_of(tmp_path)
    for name, line in (("metrics", 5), ("evaluations", 4), ("rollouts", 9)):
        assert f"{name}.jsonl: 1 unreadable line(s) left out, the first at line {line}" in page.html
    assert ["math", "0.100 step 0", "0.500 step 4", "0.500 step 4", "+0.400"] in page.rows()
    assert "answer math 4" in page.html


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=JSON | st.dictionaries(st.sampled_from(("reward/a", "gap/a", "seconds/x", "stale/a")), JSON, max_size=3),
    rewards=JSON | st.dictionaries(st.text(max_size=3), JSON | st.floats(0, 1), max_size=3),
    fields=st.fixed_dictionaries(
        dict.fromkeys(("question", "messages", "media", "gold", "shapes", "mean", "responses"), JSON)
    ),
    response=st.dictionaries(st.sampled_from(("text", "reward", "reason", "tokens", "finish", "shapes")), JSON),
    medium=st.tuples(st.just("image"), st.text(max_size=5), st.integers(), st.integers()),
    rl=JSON | st.dictionaries(st.sampled_from(("prompts", "evaluation", "algorithm", "rollout")), JSON),
)
def test_a_report_is_written_whatever_the_files_hold(tmp_path, numbers, rewards, fields, response, medium, rl):
    rows = {
        "metrics": [dict(step=1, numbers=numbers), dict(step=2, numbers=numbers)],
        "evaluations": [dict(step=0, rewards=rewards)],
        "rollouts": [
            dict(step=1, task="a", **fields),
            dict(step=2, task="a", **fields | dict(media=[medium], responses=[response])),
        ],
        "events": [dict(event="alarm", detail=rewards, step=rewards)],
    }
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    (tmp_path / "config.yaml").write_text(json.dumps(dict(rl=rl if isinstance(rl, dict) else {})))
    for path in (write_report(tmp_path), write_journey([tmp_path], tmp_path / "journey.html")):
        assert not re.search(r'="[^"]*\b(nan|inf)\b', Page(path).html), "a coordinate is not a number"


def test_nothing_in_a_rollout_becomes_markup_and_nothing_is_requested(tmp_path):
    bad = "<script>alert(1)</script>\"'&\ud800\x00</pre>"
    response = dict(text=bad, reward=0.5, reason=bad, tokens=bad, finish=bad)
    messages = [dict(role=bad, content=[dict(type=bad), dict(type="text", text=bad)])]
    media = [["image", bad, 0, 5], [bad]]
    row = rollout(1, bad, media, question=bad, messages=messages, gold=[bad], responses=[response])
    make_rl_run(
        tmp_path,
        rollouts=[row, rollout(1, "box", [picture(tmp_path / "a.png")])],
        events=[dict(event="alarm", step=bad, detail=bad)],
        metrics=[metrics_row(1, **{f"reward/{bad}": 0.5, f"unknown/{bad}": 1.0})],
        evaluations=[dict(step=0, rewards={bad: 0.5})],
    )
    page = page_of(tmp_path)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert page.html.count("&lt;script&gt;") >= 10
    assert not any(name.startswith("on") or name == "src" for _, attrs in page.tags for name in attrs)
    assert not re.search(r"url\(|@import|https?://", page.html)
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "img-src" not in page_of(make_run(tmp_path / "other")).html


# ---- pictures ----


def test_a_picture_is_shown_small(tmp_path):
    page = page_of(make_rl_run(tmp_path, rollouts=[rollout(1, "box", [picture(tmp_path / "a.png", (1280, 960))])]))
    (image,) = pictures(page)
    assert image.size == (LONGEST_SIDE, LONGEST_SIDE * 3 // 4)
    assert 'viewBox="0 0 1280 960"' in page.html
    assert not drawn(page) and "swatch gold" not in page.html


def drawn(page: Page) -> list[tuple[str, list[float]]]:
    """(class, coordinates) of what is drawn on pictures, in order."""
    names = {"rect": ("x", "y", "width", "height"), "circle": ("cx", "cy")}
    return [
        (attrs["class"].removeprefix("shape "), [float(attrs[name]) for name in names[tag]])
        for tag, attrs in page.tags
        if attrs.get("class", "").startswith("shape ")
    ]


def test_gold_and_responses_are_drawn_in_their_colours_with_a_legend_of_those_that_are_there(tmp_path):
    box, point = [[10, 20, 110, 220]], [[30, 40]]
    responses = [dict(text=f"r{place}", reward=0.0, shapes=shapes) for place, shapes in enumerate((box, [], point))]
    row = rollout(1, "box", [picture(tmp_path / "a.png")], shapes=box, responses=responses)
    page = page_of(make_rl_run(tmp_path, rollouts=[row]))
    assert drawn(page) == [
        ("gold", [10, 20, 100, 200]), ("said1", [10, 20, 100, 200]), ("said3", [30, 40])
    ]  # fmt: skip
    assert [attrs["style"] for tag, attrs in page.tags if tag == "rect" and "style" in attrs] == [
        "--covers: 1",  # the gold is seen behind the response that says the same
        "--covers: 0",
    ]
    assert re.findall(r'swatch (\w+)">(gold|\d)<', page.html) == [
        ("gold", "gold"), ("said1", "1"), ("said3", "3"),  # the legend
        ("said1", "1"), ("said3", "3"),  # the responses
    ]  # fmt: skip


def test_nothing_is_drawn_where_it_is_not_known_which_picture_is_meant(tmp_path):
    one, other = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    box = [[10, 20, 110, 220]]
    rows = [
        rollout(step, "box", media, shapes=box, responses=[dict(text="r", reward=0.0, shapes=box)])
        for step, media in ((1, [one, other]), (2, []), (3, [["video", *one[1:]]]))
    ]
    assert not drawn(page_of(make_rl_run(tmp_path, rollouts=rows)))


def test_a_picture_is_read_from_its_place_in_a_shard(tmp_path):
    reference = picture(tmp_path / "a.png")
    shard = tmp_path / "shard.tar"
    shard.write_bytes(b"x" * 1000 + Path(reference[1]).read_bytes() + b"y" * 500)
    assert (
        len(
            pictures(
                page_of(
                    make_rl_run(tmp_path, rollouts=[rollout(1, "box", [["image", str(shard), 1000, reference[3]]])])
                )
            )
        )
        == 1
    )


@pytest.mark.parametrize(("num_frames", "shown"), [(61, [0, 30, 60]), (1, [0])])
def test_a_video_is_shown_by_its_first_middle_and_last_frame(tmp_path, num_frames, shown):
    path = tmp_path / "v.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 4 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    row = rollout(1, "time", [["video", str(path), 0, path.stat().st_size]])
    brightness = [np.asarray(image).mean() for image in pictures(page_of(make_rl_run(tmp_path, rollouts=[row])))]
    assert brightness == pytest.approx([4 * number for number in shown], abs=6)


def test_what_cannot_be_shown_is_said(tmp_path):
    whole = picture(tmp_path / "whole.png")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(Path(whole[1]).read_bytes()[:60])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    huge = picture(tmp_path / "huge.png", (9000, 9000), "1")
    media = [
        ["image", str(tmp_path / "gone.jpg"), 0, 5],
        ["image", str(damaged), 0, 60],
        ["video", str(broken), 0, 15],
        huge,
    ]
    other = [["image", str(tmp_path / "a\x00b"), 0, 5], ["image", "x", -1, 5], ["sound", "x", 0, 5], "x", whole]
    page = page_of(make_rl_run(tmp_path, rollouts=[rollout(1, "box", media), rollout(1, "math", other)]))
    text = words(page)
    assert "gone.jpg is not there any more (No such file or directory)" in text
    assert "damaged.png cannot be read" in text and "broken.mp4 cannot be read" in text
    assert "9,000 x 9,000 pixels is too large" in text
    assert text.count("a medium whose place is not written as it should be") == 2
    assert "and 1 more" in text and not pictures(page)


def test_a_page_is_bounded_however_much_there_is_to_show(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (320, 320, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    reference = ["image", str(tmp_path / "noise.png"), 0, (tmp_path / "noise.png").stat().st_size]
    long = dict(text="start " + "x" * 300_000 + " end", reward=1.0, reason="right", tokens=9, finish="length")
    tasks = [f"task{i:02}" for i in range(20)]
    rows = [rollout(step, task, [reference] * 5, responses=[long] * 20) for task in tasks for step in (1, 2, 3)]
    page = page_of(make_rl_run(tmp_path, rollouts=rows))
    pixels = sum(len(attrs["href"]) for tag, attrs in page.tags if tag == "image")
    assert 0.9 * MOST_PICTURE_CHARACTERS < pixels <= MOST_PICTURE_CHARACTERS
    assert len(page.html) < MOST_PICTURE_CHARACTERS + 2_000_000
    text = words(page)
    assert "left out: the page holds as much of pictures as it may" in text and "And 4 more tasks in" in text
    assert "298,010 characters" in text and "x end" in text and "9 tokens, cut" in text


@pytest.mark.parametrize(
    ("value", "shapes"),
    [
        ([[1, 2, 4, 8]], ((1, 2, 3, 6),)),
        ([[1, 2, 4, 8], [0, 0.5]], ((1, 2, 3, 6), (0, 0.5, 0, 0))),
        ([1, 2, 4, 8], ()), ("[[1, 2, 4, 8]]", ()), (7, ()), (None, ()), ([], ()), ([[]], ()), ([[4, 2, 1, 8]], ()),
        ([[1, 2, 4]], ()), ([[1, 2, 4, 8], "x"], ()), ([[1, float("inf")]], ()), ([[1, 2]] * 99, ((1, 2, 0, 0),) * 16),
    ],
)  # fmt: skip
def test_only_boxes_and_points_are_drawn(value, shapes):
    assert shapes_of(value) == shapes


def test_a_value_alone_between_gaps_is_drawn():
    ys = np.array([np.nan, 1.0, np.nan, 2.0, 3.0])
    svg = str(line_chart([Series("s", np.arange(5.0), ys, "c1")], label="test"))
    (path,) = re.findall(r'class="line c1" d="([^"]*)"', svg)
    assert [len(re.findall("[MLh]", piece)) for piece in re.split("(?=M)", path) if piece] == [2, 2]
    assert path.count("h0.01") == 1
