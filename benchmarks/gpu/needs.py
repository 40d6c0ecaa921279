"""What the suite cannot do without, asked before anything of it is imported: python -m benchmarks.gpu.needs

Run in the environment of the process that will measure, with what ``--wheels`` brings.
"""

import importlib.util

NEEDED = ("torch", "triton", "transformers", "megatron.core", "pydantic", "xxhash", "simplejpeg", "av", "skimage")


def missing_parts() -> list[str]:
    """What the suite cannot do without and this interpreter has not, each with the remedy."""
    absent = [name for name in NEEDED if not _is_there(name)]
    found = [f"not importable: {', '.join(absent)}; carry their wheels (--wheels DIR)"] if absent else []
    if not _is_there("mimo_megatron._packing"):
        found.append("the C++ extension is not built: python setup.py build_ext --inplace")
    return found


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    print("\n".join(missing_parts()))
