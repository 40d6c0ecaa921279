"""Run folders to report on, and pages read back."""

import json
from html.parser import HTMLParser
from pathlib import Path

import yaml
from hypothesis import strategies as st

from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import DataConfig, ModuleTraining, ParallelConfig, RunConfig, SourceConfig, TrainConfig

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """A page's tags, texts and tables; fails on a tag that is not closed where it must be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.headings: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(self.html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data.strip())

    def rows(self) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.cells]


def make_run(run_dir: Path, name: str = "stage 1", steps: int = 40, lrs: dict | None = None, **files) -> Path:
    """A run folder: ``files`` replaces the rows of metrics, events, skipped or the evaluation."""
    lrs = {"projector": 1e-3, "vision": 1e-5} if lrs is None else lrs
    run_dir.mkdir(parents=True, exist_ok=True)
    config = RunConfig(
        name=name,
        dir=run_dir,
        model=preset("tiny-vl"),
        parallel=ParallelConfig(tp=2),
        data=DataConfig(sources=(SourceConfig(path="d"),), tokenizer="t", pack_tokens=1000, pack_patches=900),
        train=TrainConfig(steps=40, packs_per_step=1, **{module: ModuleTraining(lr=lr) for module, lr in lrs.items()}),
    )
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    metrics = [
        dict(step=step, loss=4.0 - step / 10, grad_norm=1.0, lrs=lrs, num_tokens=900, num_trained_tokens=300,
             num_slots=1000, num_patches=500, num_images=2, num_samples=5, seconds=0.5, fill=0.9,
             tokens_per_second=1800.0, patches_per_second=1000.0, mfu=None, skipped={"bad image": 2})
        for step in range(1, steps + 1)
    ]  # fmt: skip
    environment = dict(ranks=4, commit="abc1234", versions=dict(torch="2.0", python="3.11"))
    events = [
        dict(time="2026-03-01T10:00:00+00:00", event="start", step=0, detail=environment),
        dict(time="2026-03-01T10:05:00+00:00", event="checkpoint", step=20, detail="checkpoints/step_000020"),
        dict(time="2026-03-01T10:09:00+00:00", event="resume", step=20, detail={**environment, "commit": "def5678"}),
    ]
    skipped = [dict(id=f"sample-{i}", reason="bad image", detail="truncated") for i in range(2)]
    for stem, rows in (("metrics", metrics), ("events", events), ("skipped", skipped)):
        text = "".join(json.dumps(row) + "\n" for row in files.get(stem, rows))
        (run_dir / f"{stem}.jsonl").write_text(text)
    if evaluation := files.get("evaluation"):
        (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    return run_dir
