"""The repository reads as a public one: no machine's paths, no registry's address; it holds what it declares."""

import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.repository import ROOT, files

# Written in pieces, so that this file does not hold what it forbids.
_REGISTRIES = (
    "pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "anaconda" + ".org", "npmjs" + ".org",
    "nvcr" + ".io", "docker" + ".io", "ghcr" + ".io", "quay" + ".io",
)  # fmt: skip
_MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home)/")


def forbidden(text: str) -> list[str]:
    """The words of ``text`` that name a registry or a path of one machine."""
    return [name for name in _REGISTRIES if name in text] + _MACHINE_PATH.findall(text)


def test_no_file_names_a_machine_path_or_a_registry() -> None:
    found = {}
    for path in files():
        try:
            words = forbidden(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if words:
            found[str(path.relative_to(ROOT))] = words
    assert not found


@pytest.mark.parametrize(
    "text", ["pip install -i https://" + _REGISTRIES[0] + "/simple", "cd /" + "work/x", "=/" + "root/a"]
)
def test_a_planted_path_or_address_is_found(text: str) -> None:
    assert forbidden(text)


def test_an_innocent_path_is_not_taken_for_a_machine_path() -> None:
    assert not forbidden("docs/work/x and runs/root/y and network/home/z")


def test_pyproject_lists_every_package_folder() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent for path in files(ROOT / "mimo_megatron") if path.name == "__init__.py"}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"mimo_triton_kernels"}
    assert set(project["tool"]["setuptools"]["packages"]) == expected


def test_every_file_that_the_package_needs_at_run_time_is_installed() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {
        path
        for name, globs in patterns.items()
        for glob in globs
        for path in (ROOT / name.replace(".", "/")).glob(glob)
    }
    needed = {path for path in files(ROOT / "mimo_megatron") if path.suffix not in {".py", ".so"}}
    assert needed <= installed, needed - installed


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in files(ROOT / "mimo_megatron") if path.suffix == ".py"}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_licence_is_the_whole_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("name", ["bench_images", "bench_memory_model", "soak_kill", "soak_rl"])
def test_a_benchmark_that_uses_examples_or_tests_runs_as_it_is_written(name: str) -> None:
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, f"benchmarks/{name}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
