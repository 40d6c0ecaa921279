"""The C++ extension; everything else about the package is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "mimo_megatron._packing",
            ["csrc/binding.cpp", "csrc/pack_one.cpp", "csrc/pack_two.cpp", "csrc/spread.cpp", "csrc/resize.cpp"],
            depends=["csrc/packing.hpp", "csrc/spread.hpp", "csrc/resize.hpp"],
            cxx_std=17,
            # The weights of the resize are Pillow's to the bit only where no multiply is fused with an add.
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
        )
    ]
)
