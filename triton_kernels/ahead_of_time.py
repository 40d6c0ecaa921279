"""What compilers make of a launch for a GPU that is not here: registers, spills, shared memory, matrix instructions.

Triton's wheel holds everything down to ptxas, so that this needs no device and no driver, only that triton was imported
without its interpreter. Of what a kernel does at run time it says nothing.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mimo_triton_kernels.launching import Call

_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
}  # fmt: skip
_MATRIX = re.compile(r"(wgmma\.mma_async|mma\.sync)\S*?\.m(\d+)n(\d+)k(\d+)")
_TENSOR_MEMORY = re.compile(r"tcgen05\.mma\.cta_group::1\.kind::f16 \[[^]]*\], [^,]*, [^,]*, (%r\d+),")
_PRODUCTS = re.compile(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one compute capability."""

    registers: int
    """Of a thread; 255 at most."""
    stack_bytes: int
    """Of a thread: what did not fit into registers. 0: nothing was spilled."""
    shared_bytes: int
    """Of a program."""
    matrix_instructions: Mapping[str, int]
    """How often each stands in the code of one warp (``mma.sync``), warp group (``wgmma``) or program (``tcgen05``)."""
    issued_flops: int
    """What these do, all warps of a program together, each instruction once."""
    num_products: int
    """Matrix products in the compiler's code, which may hold those of a loop twice, to overlap its turns."""
    ptx: str
    """What ptxas makes machine code of."""


def compile_call(call: Call, capability: int) -> Compiled:
    """The kernel of ``call`` for GPUs of this compute capability (80, 90, 100), with the call's types and constants."""
    assert not triton.knobs.runtime.interpret, "triton was imported with its interpreter, which compiles nothing"
    signature, attributes = _signature(call)
    source = ASTSource(call.kernel, signature, call.constants, attributes)
    options = {"num_warps": call.blocks.num_warps, "num_stages": call.blocks.num_stages}
    binary = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    ptx = binary.asm["ptx"]
    instructions = matrix_instructions(ptx)
    registers, stack_bytes = resources(_resource_report(binary.asm["cubin"]))
    flops = sum(count * flops_of(name, call.blocks.num_warps) for name, count in instructions.items())
    num_products = len(_PRODUCTS.findall(binary.asm["ttgir"]))
    return Compiled(registers, stack_bytes, binary.metadata.shared, instructions, flops, num_products, ptx)


def _signature(call: Call) -> tuple[dict[str, str], dict[tuple[int, ...], list[list[Any]]]]:
    """Types of all arguments, and which are multiples of 16, as Triton finds them at a launch."""
    signature, attributes = {}, {}
    for place, name in enumerate(call.kernel.arg_names):
        if name in call.constants:
            signature[name] = "constexpr"
            continue
        value = call.args[place]
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        signature[name] = _POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, attributes


def matrix_instructions(ptx: str) -> dict[str, int]:
    """``{"wgmma m64n64k16": 9, ...}``: how often each stands in the text."""
    names = [f"{kind.partition('.')[0]} m{m}n{n}k{k}" for kind, m, n, k in _MATRIX.findall(ptx)]
    for register in _TENSOR_MEMORY.findall(ptx):
        # The shape is in the instruction descriptor, a constant: N / 8 in bits 17 to 22, M / 16 in bits 24 to 28.
        (descriptor,) = set(re.findall(rf"mov\.b32\s+{register}, (\d+);", ptx))
        m, n = (int(descriptor) >> 24 & 31) * 16, (int(descriptor) >> 17 & 63) * 8
        names.append(f"tcgen05 m{m}n{n}k16")
    return dict(sorted(Counter(names).items()))


def flops_of(instruction: str, num_warps: int) -> int:
    """FLOPs of one matrix instruction, over all the warps of a program that execute it."""
    kind, shape = instruction.split()
    m, n, k = (int(number) for number in re.findall(r"\d+", shape))
    return 2 * m * n * k * {"mma": num_warps, "wgmma": num_warps // 4, "tcgen05": 1}[kind]


def resources(report: str) -> tuple[int, int]:
    """(registers, stack bytes) of a thread, from what cuobjdump prints about one kernel."""
    ((registers, stack_bytes),) = _RESOURCES.findall(report)
    return int(registers), int(stack_bytes)


def _resource_report(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
