"""What reading, converting and looking at data costs: CPU time of one thread, beside peers on the same files.

    python benchmarks/bench_data_formats.py                 # 4,000 samples of one JPEG each; about two minutes
    python benchmarks/bench_data_formats.py --samples 20000

``read``: a sample and the bytes of its image, by its number in random order through either back end; megatron-energon's
own loader reads the same tars from front to back. ``convert``: LLaVA JSON with files beside it into tars; the peer
loads the JSON whole and writes with webdataset's ShardWriter, and checks nothing. ``lint`` and ``stats`` have no peer.
"""

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported

import numpy as np
import webdataset
from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless
from megatron.energon.tools.prepare import command as prepare
from PIL import Image
from provenance import ROOT, write_rows

from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import DataConfig, ReadConfig, SourceConfig
from mimo_megatron.data.energon import open_source
from mimo_megatron.data.formats.convert import convert
from mimo_megatron.data.formats.llava import LLAVA
from mimo_megatron.data.formats.sample import Reading
from mimo_megatron.data.index import build_index
from mimo_megatron.data.lint import Linter
from mimo_megatron.data.reading import read_media
from mimo_megatron.data.stats import collect
from mimo_megatron.data.tokenizer import load_tokenizer

NUM_PICTURES = 100
MODEL, TOKENIZER = preset("tiny-vl"), ROOT / "examples/quickstart/base/text"
PEER = "energon's own loader, front to back"


def measured(work: Callable[[], int]) -> dict[str, Any]:
    """CPU time of a sample, in a child of its own so that one work does not warm another's."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        began = time.process_time()
        num_samples = work()
        seconds = time.process_time() - began
        os.write(writing, json.dumps([num_samples, seconds]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        num_samples, seconds = json.loads(pipe.read())
    assert os.waitpid(child, 0)[1] == 0
    return dict(samples=num_samples, cpu_us_per_sample=round(1e6 * seconds / num_samples, 1))


def picture(seed: int) -> bytes:
    """A JPEG of 640 x 480, smooth noise in colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def write_llava(folder: Path, num_samples: int) -> Path:
    """LLaVA's JSON over a hundred JPEGs of 640 x 480."""
    for number in range(NUM_PICTURES):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    answer = "A red square stands above a blue one. " * 8
    rows = [
        {
            "id": f"sample-{number}",
            "image": f"{number % NUM_PICTURES}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is in the image?"},
                {"from": "gpt", "value": f"{answer}{number}"},
            ],
        }
        for number in range(num_samples)
    ]
    path = folder / "llava.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def plain_convert(source: Path, out: Path) -> int:
    out.mkdir()
    rows = json.loads(source.read_bytes())
    with webdataset.ShardWriter(str(out / "shard-%06d.tar"), maxcount=2000, verbose=0) as writer:
        for number, row in enumerate(rows):
            image = (source.parent / row["image"]).read_bytes()
            writer.write({"__key__": f"{number:09d}", "image0.jpg": image, "json": row})
    return len(rows)


def by_number(folder: Path, backend: str) -> int:
    source = open_source(SourceConfig.model_validate({"path": folder, "backend": backend}), "train")
    numbers = np.random.default_rng(0).permutation(len(source.lengths.num_tokens_N)).tolist()
    for number in numbers:
        for ref in source.read(number).media:
            read_media(ref, ReadConfig())
    return len(numbers)


@stateless
def cook(raw: dict[str, Any]) -> dict[str, Any]:
    return {"record": json.loads(raw["json"]), "image": raw["image0.jpg"]}


class Raw(DefaultTaskEncoder):
    """Samples as they lie in the tars."""

    decoder = None
    cookers = (Cooker(cook),)

    def __init__(self) -> None:
        super().__init__(raw_batch_type=dict)

    def encode_sample(self, sample: Any) -> Any:
        return sample

    def batch(self, samples: Any) -> Any:
        return samples

    def encode_batch(self, batch: Any) -> Any:
        return batch


def by_energons_loader(folder: Path) -> int:
    dataset = get_train_dataset(
        str(folder),
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        parallel_shard_iters=1,
        repeat=False,
        shuffle_over_epochs_multiplier=None,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=Raw(),
    )
    return sum(1 for _ in get_loader(dataset))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root, rows = Path(name), []
        (root / "llava").mkdir()
        source, tars = write_llava(root / "llava", options.samples), root / "tars"

        def converting() -> int:
            return convert(source, tars, LLAVA, Reading(), samples_per_shard=2000).num_samples

        rows.append(dict(work="convert", by="data convert", **measured(converting)))
        peer = measured(lambda: plain_convert(source, root / "plain"))
        rows.append(dict(work="convert", by="json.load and webdataset, unchecked", **peer))
        data = DataConfig(
            sources=(SourceConfig(path=tars),), tokenizer=TOKENIZER, pack_tokens=8192, pack_patches=16_384
        )
        build_index(tars, load_tokenizer(TOKENIZER, MODEL.tokens, MODEL.text.vocab_size), MODEL, data)
        prepared = "--non-interactive --sample-type CrudeWebdataset --split-ratio 1,0,0 --num-workers 1 --no-progress"
        prepare.main([str(tars), *prepared.split()], standalone_mode=False)
        for backend in ("indexed", "energon"):
            rows.append(
                dict(work="read", by=f"backend {backend}, by number", **measured(lambda b=backend: by_number(tars, b)))
            )
        rows.append(dict(work="read", by=PEER, **measured(lambda: by_energons_loader(tars))))
        for decodes in (False, True):

            def linting(decodes: bool = decodes) -> int:
                linter = Linter(decodes=decodes)
                assert not [one for one in linter.lint(tars) if one.level != "note"]
                return linter.num_samples

            rows.append(dict(work="lint", by="data lint --decode" if decodes else "data lint", **measured(linting)))

        def counting() -> int:
            stats = collect(data, MODEL, seed=1, num_samples=options.samples, num_packs=64)
            return stats.sources[0].looked.num_samples

        rows.append(dict(work="stats", by="data stats, all samples read", **measured(counting)))
    for row in rows:
        print(row)
    print(
        write_rows(
            "data-formats", rows, ["mimo_megatron/data"], ["megatron-energon", "webdataset", "pillow"], options.out
        )
    )


if __name__ == "__main__":
    main()
