"""The C++ extension; everything else about the package is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "mimo_megatron._packing",
            ["csrc/binding.cpp", "csrc/pack_one.cpp", "csrc/pack_two.cpp", "csrc/spread.cpp"],
            depends=["csrc/packing.hpp", "csrc/spread.hpp"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ]
)
