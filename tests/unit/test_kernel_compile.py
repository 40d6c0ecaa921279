"""What compilers say about kernels, for GPUs that are not here: parsed right, and good for a kernel of each op."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from mimo_triton_kernels.ahead_of_time import flops_of, matrix_instructions, resources
from tests.repository import ROOT

# As printed for kernels that spill; 68158608 says m64n64.
REPORT = "Function _short_backward:\n  REG:255 STACK:224 SHARED:0 LOCAL:0 CONSTANT[0]:488 TEXTURE:0 SURFACE:0"
PTX = """
wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, %p1, 1, 1, 0, 1;
wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd3, %rd4, %p1, 1, 1, 0, 1;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };
mov.b32 	%r591, 68158608;
@%p126 tcgen05.mma.cta_group::1.kind::f16 [ %r889 + 0 ], [ %r816 + 8 ], %rd107, %r591, %p125;
"""


def test_spilled_bytes_are_read_from_the_report() -> None:
    assert resources(REPORT) == (255, 224)


def test_matrix_instructions_and_their_flops_are_counted() -> None:
    assert matrix_instructions(PTX) == {"mma m16n8k16": 1, "tcgen05 m64n64k16": 1, "wgmma m64n64k16": 2}
    assert flops_of("wgmma m64n64k16", num_warps=8) == 2 * flops_of("wgmma m64n64k16", num_warps=4)
    assert flops_of("mma m16n8k16", num_warps=4) == 4 * 2 * 16 * 8 * 16
    assert flops_of("tcgen05 m64n64k16", num_warps=8) == 2 * 64 * 64 * 16


def test_a_head_padded_to_128_would_be_seen() -> None:
    useful, issued = 2 * 64 * 64 * 80, 8 * flops_of("wgmma m64n64k16", num_warps=4)  # 128 / 16 steps over the head
    assert useful / issued == 0.625


CONVERSIONS = """
import re, torch
from mimo_triton_kernels import fp8_rounding
from mimo_triton_kernels.ahead_of_time import compile_call
from mimo_triton_kernels.launching import recorded_calls
for dtype in fp8_rounding.DTYPES:
    with recorded_calls(90) as calls:
        fp8_rounding.round_two_ways(torch.empty(70, 3420, dtype=torch.bfloat16), torch.empty(()), dtype)
    (call,) = calls
    found = re.findall(r"cvt[.]\\S*e[45]m[23]\\S*", compile_call(call, 90).ptx)
    print(len(found) * 2 * 32 * call.blocks.num_warps / (call.blocks.rows * call.blocks.step), *sorted(set(found)))
"""


def compiled(tmp_path: Path, kernels: str, dtype: str = "bfloat16") -> list[dict[str, str]]:
    """For sm_90. A few kernels, for the time it takes; the command alone compiles all."""
    out = tmp_path / "rows.csv"
    options = ["--kernels", kernels, "--capabilities", "90", "--dtype", dtype, "--out", str(out)]
    command = [sys.executable, "benchmarks/bench_kernel_compile.py", *options]
    output_without_interpreter(command, tmp_path)
    return list(csv.DictReader(out.read_text().splitlines()))


def output_without_interpreter(command: list[str], tmp_path: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("kernel", ["short_forward", "causal_forward"])
def test_a_kernel_for_hopper_spills_nothing_pads_nothing_and_uses_wgmma(kernel: str, tmp_path: Path) -> None:
    (row,) = compiled(tmp_path, kernel)
    assert row["kernel"] == kernel and row["target"] == "sm_90"
    assert row["stack_bytes"] == "0" and float(row["useful_of_issued"]) >= 0.99, row
    assert "wgmma" in row["matrix_instructions"] and "mma m16" not in row["matrix_instructions"], row


def test_the_kernels_between_the_heads_products_spill_nothing(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "absorb|to_gradient")
    assert [(row["kernel"], row["stack_bytes"]) for row in rows] == [("absorb", "0"), ("to_gradient", "0")]


def test_the_kernels_that_round_to_fp8_spill_nothing(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "largest_magnitude|round")
    assert [(row["kernel"], row["stack_bytes"]) for row in rows] == [("largest_magnitude", "0"), ("round", "0")]


def test_on_a_gpu_each_number_is_converted_once_by_the_instruction_that_rounds_to_nearest_even(tmp_path: Path) -> None:
    """Two numbers an instruction. NaN is the format's, and what is too large its largest number (PTX ISA, cvt)."""
    lines = output_without_interpreter([sys.executable, "-c", CONVERSIONS], tmp_path).splitlines()
    assert lines == ["1.0 cvt.rn.satfinite.e4m3x2.f32", "1.0 cvt.rn.satfinite.e5m2x2.f32"]


def test_the_decoders_kernels_spill_nothing_in_float32_with_heads_of_128(tmp_path: Path) -> None:
    """Exact products keep their operands in registers: with the tiles of half precision thousands of bytes spill."""
    rows = compiled(tmp_path, "causal", "float32")
    assert [row["kernel"] for row in rows] == ["causal_forward", "causal_backward_q", "causal_backward_kv"]
    assert {(row["dtype"], row["stack_bytes"]) for row in rows} == {("float32", "0")}, rows
    assert all(int(row["shared_bytes"]) < 100_000 and not row["matrix_instructions"] for row in rows), rows
