"""The C++ extension; everything else about the package is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "mimo_megatron._packing",
            sorted(glob("csrc/*.cpp")),
            depends=glob("csrc/*.hpp"),
            cxx_std=17,
            # Sums as in Python, and the weights of the resize Pillow's to the bit: no multiply is fused with an add.
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
        )
    ]
)
