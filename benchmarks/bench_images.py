"""JPEG bytes to patches: ours beside transformers' two Qwen2-VL image processors, on the same files in the same run.

    python benchmarks/bench_images.py
    python benchmarks/bench_images.py --memory 20000     # only the resident memory, over so many images

The files are mosaics of the demo's photographs, 0.5 to 8 megapixels, of quality 90 with halved colour, as cameras write
them. A row is one way of reading them at one limit of pixels: transformers' default, and the 4,096 tokens of MiMo-VL's
evaluation. Times are CPU seconds of one thread; the ways take turns file by file, and each file counts with its
fastest round. Torchvision, which transformers' fast processor needs, and DALI, an extra, are not dependencies: without
them their rows are left out, aloud. DALI runs on the CPU with one thread, one image at a time, as all others do.
"""

import argparse
import importlib
import importlib.util
import io
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image
from provenance import write_rows

from examples.quickstart.assets import load_assets
from mimo_megatron.config.presets import preset
from mimo_megatron.config.run import DecoderName
from mimo_megatron.data.decode import decode_rgb
from mimo_megatron.data.image import encode_image, smart_resize
from mimo_megatron.data.patches import patchify
from mimo_megatron.model.patch_embed import PIXEL_MEAN, PIXEL_STD

VISION = preset("mimo-vl-7b").vision
assert VISION is not None
MEGAPIXELS = (0.5, 1, 2, 4, 8)
SHAPES = (4 / 3, 9 / 16, 1.0)
BUDGETS = {"1.0 megapixels": 1280 * 28 * 28, "3.2 megapixels": 4096 * 28 * 28}
MIN_PIXELS = 3136
SCALES = (0.7, 1.4)  # of a photograph in the mosaic: neither all noise nor all blur
Read = Callable[[bytes, int], Any]


def mosaic(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    photos = load_assets("train").photos
    canvas = Image.new("RGB", (width, height))
    top = 0
    while top < height:
        left, tall = 0, int(rng.integers(200, 400))
        while left < width:
            photo = Image.fromarray(photos[rng.integers(len(photos))])
            scale = rng.uniform(*SCALES) * max(1.0, tall / photo.height)
            piece = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
            canvas.paste(piece.crop((0, 0, piece.width, tall)), (left, top))
            left += piece.width
        top += tall
    return canvas


def files() -> list[tuple[float, bytes]]:
    """(megapixels, JPEG) of each size in each shape."""
    rng = np.random.default_rng(0)
    made = []
    for size in MEGAPIXELS:
        for shape in SHAPES:
            width = round((size * 1e6 * shape) ** 0.5)
            out = io.BytesIO()
            mosaic(round(width / shape), width, rng).save(out, "JPEG", quality=90, subsampling=2)
            made.append((size, out.getvalue()))
    return made


# ---- the ways to read a file -----------------------------------------------------------------------------------------


def ours(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    return ours_decoded_by("turbo", data, max_pixels)


def ours_decoded_by(decoder: DecoderName, data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    return encode_image(data, VISION, min_pixels=MIN_PIXELS, max_pixels=max_pixels, decoder=decoder).pixels_PZ


def pillow_and_numpy(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """The definition of ours: what the C++ computes, without it."""
    _, rows, columns = patch_grid(data, max_pixels)
    with Image.open(io.BytesIO(data)) as image:
        size = (columns * VISION.patch_size, rows * VISION.patch_size)
        pixels_HW3 = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    return patchify(pixels_HW3[None], VISION, is_still=True)


def patch_grid(data: bytes, max_pixels: int) -> tuple[int, int, int]:
    with Image.open(io.BytesIO(data)) as image:
        height, width = smart_resize(
            image.height, image.width, multiple=28, min_pixels=MIN_PIXELS, max_pixels=max_pixels
        )
    return 1, height // VISION.patch_size, width // VISION.patch_size


def only_decoded(data: bytes, _max_pixels: int) -> NDArray[np.uint8]:
    return decode_rgb(data, "turbo")


def transformers_reader(module: str, name: str) -> Read:
    kind = getattr(importlib.import_module(f"transformers.models.qwen2_vl.{module}"), name)
    made: dict[int, Any] = {}

    def read(data: bytes, max_pixels: int) -> torch.Tensor:
        if max_pixels not in made:
            made[max_pixels] = kind(min_pixels=MIN_PIXELS, max_pixels=max_pixels)
        with Image.open(io.BytesIO(data)) as image:
            return made[max_pixels](image, return_tensors="pt")["pixel_values"]

    return read


def dali_reader(normalise: bool) -> Read:
    """DALI's own decode and bicubic resize to the same size: bytes [height, width, 3], or floats, channel first."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(1, 1, None, exec_pipelined=False, exec_async=False, prefetch_queue_depth=1)
    with pipeline:
        jpeg, size = (fn.external_source(name=name, device="cpu") for name in ("jpeg", "size"))
        pixels = fn.decoders.image(jpeg, device="cpu", output_type=types.RGB, adjust_orientation=False)
        pixels = fn.resize(pixels, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
        if normalise:
            mean, std = ([255 * value for value in values] for values in (PIXEL_MEAN, PIXEL_STD))
            pixels = fn.crop_mirror_normalize(pixels, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std)
        pipeline.set_outputs(pixels)
    pipeline.build()

    def read(data: bytes, max_pixels: int) -> NDArray[Any]:
        _, rows, columns = patch_grid(data, max_pixels)
        pipeline.feed_input("jpeg", [np.frombuffer(data, np.uint8)])
        pipeline.feed_input("size", [np.array([rows, columns], np.float32) * VISION.patch_size])
        return pipeline.run()[0].at(0)

    return read


def torchvision_fault() -> str | None:
    """Why torchvision cannot be used. One built for CUDA can be, beside a CPU torch, once two operators are named."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    importlib.import_module("examples.vllm_env.mimo_torchvision_schemas")
    try:
        importlib.import_module("torchvision")
    except Exception as fault:
        return f"torchvision cannot be imported: {fault}"
    return None


def ways() -> dict[str, Read]:
    fault = torchvision_fault()
    found: dict[str, Read] = {
        "ours": ours,
        "ours, data.decoder=pillow": partial(ours_decoded_by, "pillow"),
        "Pillow and NumPy": pillow_and_numpy,
        "decoding alone": only_decoded,
        "transformers PIL": transformers_reader("image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"),
    }
    if fault:
        print(f"transformers fast: left out, {fault}")
    else:
        found["transformers fast"] = transformers_reader("image_processing_qwen2_vl", "Qwen2VLImageProcessor")
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as fault:
        print(f"DALI: left out, {fault}")
    else:
        found["ours, data.decoder=dali"] = partial(ours_decoded_by, "dali")
        found["DALI: decode, resize"] = dali_reader(normalise=False)
        found["DALI: decode, resize, normalise"] = dali_reader(normalise=True)
    return found


# ---- measurements ----------------------------------------------------------------------------------------------------


def stored_levels(name: str, out: Any) -> NDArray[np.int64] | None:
    """[P, 1176] levels of what a peer gave; None of a way that is ours, or whose pixels another row shows."""
    if name.startswith("transformers"):
        return levels(out)
    if name == "DALI: decode, resize":
        return patchify(out[None], VISION).astype(np.int64)
    return None


def levels(values_PC: torch.Tensor) -> NDArray[np.int64]:
    """[P, 1176] pixel levels from normalised values."""
    mean, std = (torch.tensor(one, dtype=torch.float64).repeat_interleave(392) for one in (PIXEL_MEAN, PIXEL_STD))
    return ((values_PC.double() * std + mean) * 255).round().long().numpy()


def differences(reads: Mapping[str, Read], corpus: list[tuple[float, bytes]]) -> dict[str, str]:
    """How far each of the others' pixels are from ours, over all files at the smaller limit."""
    budget = min(BUDGETS.values())
    found: dict[str, str] = {}
    for name, read in reads.items():
        worst, unequal, count = 0, 0, 0
        for _, data in corpus:
            theirs = stored_levels(name, read(data, budget))
            if theirs is None:
                break
            mine = encode_image(data, VISION, min_pixels=MIN_PIXELS, max_pixels=budget).patches_PC.astype(np.int64)
            distance = np.abs(theirs - mine)
            worst, unequal, count = (
                max(worst, int(distance.max())),
                unequal + int((distance > 0).sum()),
                count + mine.size,
            )
        if count:
            found[name] = f"{worst} levels at most, {unequal / count:.2%} of values differ"
    return found


def cpu_seconds(read: Read, data: bytes, budget: int) -> float:
    start = time.process_time()
    read(data, budget)
    return time.process_time() - start


def measure(reads: Mapping[str, Read], corpus: list[tuple[float, bytes]], rounds: int) -> list[dict[str, Any]]:
    rows = []
    distance = differences(reads, corpus)
    for label, budget in BUDGETS.items():
        best = {name: [float("inf")] * len(corpus) for name in reads}
        for number, (_, data) in enumerate(corpus):
            for _ in range(rounds):
                for name, read in reads.items():
                    best[name][number] = min(best[name][number], cpu_seconds(read, data, budget))
        megabytes = sum(len(data) for _, data in corpus) / 1e6
        megapixels = sum(size for size, _ in corpus)
        for name, times in best.items():
            total = sum(times)
            _, grid_rows, columns = patch_grid(corpus[0][1], budget)
            per_patch = reads[name](corpus[0][1], budget).nbytes // (grid_rows * columns)
            rows.append(
                dict(
                    way=name,
                    limit=label,
                    images=len(corpus),
                    images_per_cpu_second=f"{len(corpus) / total:.1f}",
                    jpeg_megabytes_per_cpu_second=f"{megabytes / total:.1f}",
                    megapixels_per_cpu_second=f"{megapixels / total:.0f}",
                    ours_is_faster_by=f"{total / sum(best['ours']):.2f}",
                    bytes_per_patch=per_patch if name != "decoding alone" else "",
                    from_our_pixels=distance.get(name, ""),
                )
            )
            print(" · ".join(f"{value}" for value in rows[-1].values()))
    return rows


def memory(num_images: int) -> list[dict[str, Any]]:
    """Resident memory while files of many sizes are read and dropped again; the first tenth sets the mark."""
    rng, process = np.random.default_rng(1), psutil.Process()
    corpus = []
    for _ in range(40):
        out = io.BytesIO()
        mosaic(int(rng.integers(100, 700)), int(rng.integers(100, 700)), rng).save(out, "JPEG", quality=90)
        corpus.append(out.getvalue())
    marks = []
    for number in range(num_images):
        ours(corpus[number % len(corpus)], 10**6)
        if (number + 1) % (num_images // 10) == 0:
            marks.append(process.memory_info().rss / 1e6)
            print(f"{number + 1:,} images: {marks[-1]:.1f} MB resident")
    return [
        dict(
            way="ours",
            images=num_images,
            resident_megabytes_after_a_tenth=f"{marks[0]:.1f}",
            at_the_end=f"{marks[-1]:.1f}",
            most=f"{max(marks):.1f}",
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, metavar="IMAGES", help="measure resident memory instead")
    parser.add_argument("--out", type=Path, help="CSV file; benchmarks/results/ by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        rows, thing = memory(args.memory), "images-memory"
    else:
        rows, thing = measure(ways(), files(), args.rounds), "images"
    packages = ("pillow", "simplejpeg", "transformers", "torchvision", "torch", "numpy", "nvidia-dali-cuda120")
    print(write_rows(thing, rows, ("mimo_megatron", "csrc", "benchmarks/bench_images.py"), packages, args.out))


if __name__ == "__main__":
    main()
