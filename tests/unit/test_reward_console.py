"""The console: what is drawn where, what is summed up, and that a hostile response stays text."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from mimo_megatron.cli import main
from mimo_megatron.errors import DataError
from mimo_megatron.reward.console.page import visible, write_page
from mimo_megatron.reward.console.pictures import line_of, picture_of
from mimo_megatron.reward.console.rows import Scored, only, read_scored, summarise
from mimo_megatron.reward.console.table import print_rows, print_summary, printable
from mimo_megatron.reward.images import MediaMissing, image_path
from mimo_megatron.reward.service.offline import Offline
from mimo_megatron.reward.shapes import Shape
from mimo_megatron.reward.verdict import Verdict, judged
from mimo_megatron.reward.wire import ScoreItem

GOLD_BOX = [200, 160, 600, 480]
SIZES = {"size": [1000, 800], "shown": [500, 400]}
HOSTILE = "</pre></article><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}\u202e[bold]x[/bold]\x1b[31m"


def item(task: str = "box", response: str = "[100, 80, 200, 240]", gold: Any = None, **meta: Any) -> dict[str, Any]:
    gold = [GOLD_BOX] if gold is None else gold
    return {"id": f"{task}-1", "task": task, "response": response, "gold": gold, "meta": {"image": SIZES, **meta}}


def write_rows(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def page_of(tmp_path: Path, *rows: dict[str, Any], images: Path | None = None) -> str:
    scored = read_scored(write_rows(tmp_path, *rows), Offline().score)
    return write_page(scored, summarise(scored), tmp_path / "page.html", title="t", images=images).read_text("utf-8")


def save_picture(root: Path, *, folder: str = "", ending: str = ".png", size: tuple[int, int] = (1000, 800)) -> str:
    """A picture with a red box from (200, 160) to (600, 480), under its hash."""
    picture = Image.new("RGB", size, (255, 255, 255))
    picture.paste((255, 0, 0), tuple(GOLD_BOX))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    (root / folder.format(sha256[:2])).mkdir(parents=True, exist_ok=True)
    (root / folder.format(sha256[:2]) / f"{sha256}{ending}").write_bytes(buffer.getvalue())
    return sha256


def rectangles(page: str) -> list[tuple[str, ...]]:
    pattern = r'<rect class="shape (\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"/>'
    return re.findall(pattern, page)


def test_the_rollouts_of_a_run_are_told_from_scored_items(tmp_path: Path) -> None:
    group = {"step": 1, "task": "box", "question": "box/1", "gold": [], "responses": [{"text": "x", "reward": 0.0}]}
    with pytest.raises(DataError, match=r"line 1 .* a run's rollouts, which `mimo-megatron report "):
        read_scored(write_rows(tmp_path, group), Offline().score)


def test_gold_and_said_box_are_drawn_in_pixels_of_the_stored_picture(tmp_path: Path) -> None:
    page = page_of(tmp_path, item())
    assert '<svg viewBox="0 0 1000 800">' in page
    assert [(kind, *map(float, sides)) for kind, *sides in rectangles(page)] == [
        ("gold", 200, 160, 400, 320),
        ("said", 200, 160, 200, 320),
    ]


def test_the_drawn_gold_frames_what_stands_in_the_picture(tmp_path: Path) -> None:
    sha256 = save_picture(tmp_path / "images")
    page = page_of(tmp_path, item(image={**SIZES, "sha256": sha256}), images=tmp_path / "images")
    found = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert found is not None
    shown = Image.open(io.BytesIO(base64.b64decode(found[1])))
    _, x, y, width, height = rectangles(page)[0]
    zoom = shown.width / 1000
    inside = shown.getpixel((round((float(x) + 8) * zoom), round((float(y) + float(height) - 8) * zoom)))
    outside = shown.getpixel((round((float(x) + float(width) + 8) * zoom), round((float(y) + 8) * zoom)))
    assert isinstance(inside, tuple) and isinstance(outside, tuple)
    assert inside[1] < 60 and outside[1] > 200  # red within, white beside; JPEG blurs a few pixels


def test_points_of_point_and_gui_answers_are_drawn(tmp_path: Path) -> None:
    drag = '{"action": "drag", "start_point": [150, 100], "end_point": [10, 20]}'
    gold = {"action": "drag", "start_box": GOLD_BOX, "end_box": [0, 0, 50, 50]}
    page = page_of(tmp_path, item("point", "[150, 100]", GOLD_BOX), item("gui", drag, gold))
    places = [
        (float(x), float(y)) for x, y in re.findall(r'<circle class="shape said" cx="([\d.]+)" cy="([\d.]+)"', page)
    ]
    assert places == [(300, 200), (300, 200), (20, 40)]
    assert [kind for kind, *_ in rectangles(page)] == ["gold", "gold", "gold"]


def test_an_unreadable_answer_draws_only_the_gold_and_a_bad_gold_only_the_answer(tmp_path: Path) -> None:
    assert [kind for kind, *_ in rectangles(page_of(tmp_path, item(response="[300, 240, 100, 80]")))] == ["gold"]
    assert [kind for kind, *_ in rectangles(page_of(tmp_path, item(gold=[[5, 5, 1, 1]])))] == ["said"]


def test_intervals_are_drawn_as_shares_of_the_video(tmp_path: Path) -> None:
    row = item("time", "[01:00, 01:30]", [50, 75], duration_seconds=200, image=None)
    page = page_of(tmp_path, row)
    spans = re.findall(r'<span class="(\w+)" style="left: ([\d.]+)%; width: ([\d.]+)%">', page)
    assert [(kind, float(left), float(width)) for kind, left, width in spans] == [("gold", 25, 12.5), ("said", 30, 15)]
    assert line_of(ScoreItem.model_validate(item("time", "no", "no"))) is None


class Tags(HTMLParser):
    """Every start tag with its attributes, and the text of ``pre`` elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pre: list[str] = []
        self.open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag
        if tag == "pre":
            self.pre.append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open == "pre":
            self.pre[-1] += data


def test_a_hostile_response_prompt_id_and_gold_stay_text(tmp_path: Path) -> None:
    row = item(response=f"<think>{HOSTILE}</think>{HOSTILE}", gold=HOSTILE, prompt=HOSTILE)
    found = Tags(page_of(tmp_path, {**row, "id": HOSTILE[:100]}))
    names = [name for name, _ in found.tags]
    assert "script" not in names and "img" not in names and names.count("article") == 1
    assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]
    assert len(found.pre) == 3 and all(
        "<script>alert(1)</script>" in text and "{{ 7 * 7 }}" in text for text in found.pre
    )
    policy = [attributes["content"] for name, attributes in found.tags if name == "meta" and "http-equiv" in attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_signs_that_are_not_seen_are_written_as_codes() -> None:
    assert visible("a\u202eb\u200b\x1b\n\tc\ud800") == "a⟨U+202E⟩b⟨U+200B⟩⟨U+001B⟩\n\tc⟨U+D800⟩"


def test_the_thought_is_folded_away_from_the_answer() -> None:
    def scored(response: str) -> Scored:
        return Scored(1, ScoreItem(id="a", task="count", response=response), judged(0.0), False)

    assert (scored("<think>a</think> b").thought, scored("<think>a</think> b").answer) == ("<think>a</think>", "b")
    assert (scored("<think>a").thought, scored("<think>a").answer) == ("<think>a", "")
    assert (scored("a").thought, scored("a").answer) == ("", "a")


@pytest.mark.parametrize(("folder", "ending"), [("", ""), ("", ".jpg"), ("{}", ""), ("{}", ".png")])
def test_pictures_are_found_by_hash_in_the_root_or_a_two_letter_folder(
    tmp_path: Path, folder: str, ending: str
) -> None:
    sha256 = save_picture(tmp_path, folder=folder, ending=ending)
    assert image_path(tmp_path, sha256) == tmp_path / folder.format(sha256[:2]) / f"{sha256}{ending}"
    with pytest.raises(MediaMissing):
        image_path(tmp_path, "0" * 64)


def test_a_picture_that_cannot_be_shown_says_why_and_keeps_its_boxes(tmp_path: Path) -> None:
    other_size = save_picture(tmp_path, size=(900, 800))
    (tmp_path / ("a" * 64)).write_bytes(b"not what its name says")
    damaged = b"\x89PNG\r\n\x1a\n damaged"
    damaged_name = hashlib.sha256(damaged).hexdigest()
    (tmp_path / damaged_name).write_bytes(damaged)
    for sha256, fault in [
        (None, "does not name"),
        ("0" * 64, "no file"),
        ("a" * 64, "does not have the content"),
        (other_size, "900 x 800"),
        (damaged_name, "cannot be read"),
    ]:
        picture = picture_of(ScoreItem.model_validate(item(image={**SIZES, "sha256": sha256})), tmp_path)
        assert picture is not None and picture.src == "" and fault in picture.fault
        assert picture.shapes[0] == Shape("gold", 200, 160, 400, 320, "gold  [200.0, 160.0, 600.0, 480.0]")
    assert picture_of(ScoreItem.model_validate(item("count", image=None)), tmp_path) is None


def test_a_stored_result_is_shown_and_not_judged_again(tmp_path: Path) -> None:
    result = {"id": "box-1", "status": "ok", "reward": 0.125, "reason": "partial", "parts": {"iou": 0.5}, "ms": 1.0}
    (row,) = read_scored(write_rows(tmp_path, {**item(response="nothing"), "result": result}), Offline().score)
    assert row.is_stored and row.verdict == Verdict("ok", 0.125, row.verdict.reason, {"iou": 0.5})


@pytest.mark.parametrize(
    "line",
    [
        "{",
        json.dumps({**item(), "extra": 1}),
        json.dumps({**item(), "result": {"id": "a", "status": "ok", "reward": None, "reason": "right", "ms": 1}}),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(item()) + "\n\n" + line)
    with pytest.raises(DataError, match=r"rows\.jsonl line 3"):
        read_scored(tmp_path / "rows.jsonl", Offline().score)


def test_the_summary_leaves_unknown_out_of_the_mean(tmp_path: Path) -> None:
    rows = [item("count", r"\boxed{5}", gold) for gold in (5, 6, "bad")] + [
        item("count", "", 5),
        item("rm_text", "a", ""),
    ]
    count, model = summarise(read_scored(write_rows(tmp_path, *rows), Offline().score))
    assert (count.count, count.mean_reward, count.invalid_fraction, count.unknown_fraction) == (4, 1 / 3, 0.25, 0.25)
    assert dict(count.reasons) == {"right": 1, "wrong": 1, "bad_gold": 1, "no_answer": 1}
    assert (model.mean_reward, model.reasons) == (None, [("model_unavailable", 1)])


def test_rows_are_chosen_by_task_status_or_reason(tmp_path: Path) -> None:
    scored = read_scored(
        write_rows(tmp_path, item(), item(response=""), item("count", r"\boxed{1}", 1)), Offline().score
    )
    assert [[row.line for row in only(scored, word)] for word in (None, "box", "invalid", "right")] == [
        [1, 2, 3], [1, 2], [2], [3],
    ]  # fmt: skip


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal_gets_neither_markup_nor_control_signs(tmp_path: Path, width: int) -> None:
    scored = read_scored(write_rows(tmp_path, item(response=HOSTILE), item()), Offline().score)
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=False)
    print_rows(scored, console)
    print_summary(summarise(scored), console)
    assert "\x1b" not in file.getvalue() and "\u202e" not in file.getvalue()
    assert str(printable("[bold]x[/bold]\x1b[31m", 40)) == "[bold]x[/bold]·[31m"
    assert ("giou=0.5" in file.getvalue()) == (width == 160)


def test_the_command_writes_the_page_beside_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path, item(), item(response=""), item("count", r"\boxed{1}", 1))
    assert main(["rewards", "inspect", str(file), "--only", "box", "--limit", "1"]) == 0
    page = (tmp_path / "rows.html").read_text(encoding="utf-8")
    assert page.count("<article") == 1 and "2 responses, 1 of them shown" in page
    assert "rows.html" in capsys.readouterr().out
