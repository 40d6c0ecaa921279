"""The C++ extension; everything else about the package is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "mimo_megatron._packing",
            [f"csrc/{name}.cpp" for name in ("binding", "pack_one", "pack_two", "balance", "deal", "spread", "resize")],
            depends=[f"csrc/{name}.hpp" for name in ("packing", "open_packs", "radix", "balance", "spread", "resize")],
            cxx_std=17,
            # Sums as in Python, and the weights of the resize Pillow's to the bit: no multiply is fused with an add.
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
        )
    ]
)
