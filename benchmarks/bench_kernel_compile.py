"""What Triton's compilers make of every kernel for sm_80, sm_90 and sm_100: no GPU is needed, and none is timed.

    python benchmarks/bench_kernel_compile.py                                  # all; two minutes on one core
    python benchmarks/bench_kernel_compile.py --kernels short --capabilities 90
    python benchmarks/bench_kernel_compile.py --docs docs/kernels.md           # also writes the table into the page

Each op is called, forward and backward, on tensors of the model's shapes and types; what it would launch is compiled.
Useful FLOPs are those of the products over or into a head's dims, counted as often as the compiler's code holds them;
issued ones are those of the matrix instructions in the machine's code.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if importlib.util.find_spec("triton") is None:
    print("triton is not installed, so no kernel can be compiled: pip install 'mimo-megatron[kernels]'")
    sys.exit(0)  # `make bench` goes on to the next

import torch
import triton
from provenance import write_rows

from mimo_triton_kernels import causal_attention, chunk_softmax, fp8_rounding, vision_attention
from mimo_triton_kernels.ahead_of_time import Compiled, compile_call
from mimo_triton_kernels.launching import Call, recorded_calls

HEADS = 16
FP8_CAPABILITY = 89  # from here on GPUs convert to e4m3; Triton refuses the type before
COLUMNS = 4096  # of a chunk of logits: what a pack of 32,768 trained rows has by default
# A pack's windows, one of them at an image's border, and a pack of frames; 1,000 rows are no multiple of anything.
BOUNDS = {"windows": (*range(0, 1000, 64), 1000), "frames": (0, 16, 1000)}
TEXT_HEADS, TEXT_KEY_HEADS, TEXT_WIDTH = 32, 8, 128
PIECES = ((0, 16, 0, 16), (16, 1000, 16, 1000))
PRODUCTS = {**vision_attention.PRODUCTS, **causal_attention.PRODUCTS}
MARKS = ("<!-- table: benchmarks/bench_kernel_compile.py -->\n", "<!-- end of table -->\n")


def calls(dtype: torch.dtype, capability: int) -> dict[str, Call]:
    """Every kernel that the ops launch on such a GPU, once, by name."""
    found = {}
    for bounds in BOUNDS.values():
        qkv_T3NH = torch.empty(bounds[-1], 3, HEADS, 80, dtype=dtype, requires_grad=True)
        angles_TE = torch.empty(bounds[-1], 40)
        with recorded_calls(capability) as recorded:
            vision_attention.vision_attention(qkv_T3NH, angles_TE, angles_TE, bounds).sum().backward()
        found |= {call.kernel.__name__.strip("_"): call for call in recorded}
    q_TNH, k_TKH, v_TKH = (
        torch.empty(PIECES[-1][1], heads, TEXT_WIDTH, dtype=dtype, requires_grad=True)
        for heads in (TEXT_HEADS, TEXT_KEY_HEADS, TEXT_KEY_HEADS)
    )
    angles_TE = torch.empty(PIECES[-1][1], TEXT_WIDTH // 2)
    with recorded_calls(capability) as recorded:
        causal_attention.causal_attention(q_TNH, k_TKH, v_TKH, angles_TE, angles_TE, PIECES).sum().backward()
        logits_RC, labels_R = torch.empty(8, COLUMNS, dtype=dtype), torch.zeros(8, dtype=torch.int64)
        chunk_softmax.absorb(logits_RC, labels_R, torch.empty(4, 8), True)
        chunk_softmax.to_gradient(logits_RC, labels_R, torch.empty(8), torch.empty(8))
        fp8_rounding.largest_magnitude(logits_RC)
        if capability >= FP8_CAPABILITY:
            fp8_rounding.round_two_ways(logits_RC, torch.empty(()), torch.float8_e4m3fn)
    return found | {call.kernel.__name__.strip("_"): call for call in recorded}


def useful_of_issued(name: str, call: Call, compiled: Compiled) -> str:
    """Blank for a kernel without products, or without matrix instructions: in fp32."""
    if not PRODUCTS.get(name) or not compiled.issued_flops:
        return ""
    width = call.constants.get("H", vision_attention.HEAD_WIDTH)
    parts = 2 if width == vision_attention.HEAD_WIDTH else 1  # of a product: 80 is one of 64 and one of 16
    copies = compiled.num_products / (parts * PRODUCTS[name])
    rows = call.constants["R"]
    useful = copies * PRODUCTS[name] * 2 * rows * call.constants.get("STEP", rows) * width
    return f"{useful / compiled.issued_flops:.3f}"


def rows(pattern: str, capabilities: list[int], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for capability in capabilities:
        for name, call in calls(dtype, capability).items():
            if not re.search(pattern, name):
                continue
            compiled = compile_call(call, capability)
            yield dict(
                target=f"sm_{capability}",
                kernel=name,
                dtype=str(dtype).removeprefix("torch."),
                rows=call.blocks.rows,
                step=call.constants.get("STEP", ""),
                num_warps=call.blocks.num_warps,
                num_stages=call.blocks.num_stages,
                registers=compiled.registers,
                stack_bytes=compiled.stack_bytes,
                shared_bytes=compiled.shared_bytes,
                matrix_instructions=" + ".join(f"{n} {name}" for name, n in compiled.matrix_instructions.items()),
                useful_of_issued=useful_of_issued(name, call, compiled),
            )


def table(found: list[dict[str, Any]]) -> str:
    """The rows in markdown."""
    columns = {
        "target": "for", "kernel": "kernel", "rows": "rows", "step": "step", "num_warps": "warps",
        "registers": "registers", "stack_bytes": "spilled bytes", "shared_bytes": "shared bytes",
        "matrix_instructions": "matrix instructions in the code", "useful_of_issued": "useful / issued",
    }  # fmt: skip
    lines = [list(columns.values()), ["---"] * len(columns), *([str(row[key]) for key in columns] for row in found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="", help="a regular expression")
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path, help="a page whose table is written anew")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    found = list(rows(args.kernels, args.capabilities, getattr(torch, args.dtype)))
    if not found:
        names = ", ".join(calls(torch.bfloat16, 90))
        sys.exit(f"no kernel is called like {args.kernels!r}; for sm_90 there are {names}")
    print(table(found), end="")
    measured = ("triton_kernels", "benchmarks/bench_kernel_compile.py")
    print(write_rows("kernel-compile", found, measured, ("torch", "triton"), args.out))
    if args.docs is not None:
        before, start, rest = args.docs.read_text(encoding="utf-8").partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        if not start or not end:
            sys.exit(f"{args.docs} has no line {(MARKS[0] if not start else MARKS[1]).strip()}")
        args.docs.write_text(before + start + table(found) + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
