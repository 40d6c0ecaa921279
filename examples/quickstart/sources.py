"""The data that recipes name, built and indexed in several processes: as many sources at once as there are cores.

A recipe names a source by its folder, ``.../sources/caption_few``; ``build_data.SOURCES`` says what that is. A source
whose index is there is whole (the index is written last) and is left alone.
"""

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from examples.quickstart.build_data import SOURCES, build_demo_tokenizer, build_source
from mimo_megatron.config.run import RunConfig
from mimo_megatron.data.index import IndexReport, build_index
from mimo_megatron.data.source import SIDECAR_FILE
from mimo_megatron.data.tokenizer import load_tokenizer

_COST = {"clip": 5.0, "pair": 2.0, "text": 0.1}
"""Time a sample takes, against one picture."""


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_sources(
    configs: Sequence[RunConfig], num_samples: Mapping[str, int] | None = None, *, seed: int = 1
) -> dict[str, IndexReport]:
    """What was built: tokenizer, tars and index of every source of the recipes that is not there yet.

    ``num_samples`` says how many of each; without it as many as ``SOURCES`` has.
    """
    tokenizer = configs[0].data.tokenizer
    if not (tokenizer / "tokenizer.json").is_file():
        build_demo_tokenizer(tokenizer, seed=seed)
    users = {source.path: config for config in configs for source in config.data.sources}
    wanted = {path: config for path, config in users.items() if not (path / SIDECAR_FILE).is_file()}
    sizes = num_samples or {path.name: SOURCES[path.name].num_samples for path in wanted}
    tasks = [(path, sizes[path.name], config, seed) for path, config in wanted.items()]
    tasks.sort(key=lambda task: -task[1] * _COST.get(SOURCES[task[0].name].family, 1.0))
    with multiprocessing.get_context("fork").Pool(min(num_cores(), len(tasks) or 1)) as pool:
        reports = pool.starmap(_build, tasks, chunksize=1)
    return {task[0].name: report for task, report in zip(tasks, reports, strict=True)}


def _build(folder: Path, num_samples: int, config: RunConfig, seed: int) -> IndexReport:
    build_source(folder, replace(SOURCES[folder.name], num_samples=num_samples), seed=seed)
    tokens, text = config.model.tokens, config.model.text
    return build_index(
        folder, load_tokenizer(config.data.tokenizer, tokens, text.vocab_size), config.model, config.data
    )
