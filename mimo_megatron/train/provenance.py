"""What produced a run: the versions of the packages that compute, and the commit of this source tree if it has one.

Written once at each start and resume, so that a run continued in another environment shows it.
"""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("mimo-megatron", "torch", "megatron-core", "transformers", "transformer-engine", "flash-attn", "triton")


def provenance() -> dict[str, Any]:
    """``{"commit": str | None, "versions": {package: version}}`` of this process."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # an optional package that is not here has no version to state
            continue
    return {"commit": source_commit(Path(__file__)), "versions": versions}


def source_commit(file: Path) -> str | None:
    """The short commit of the git tree that tracks ``file``, "-dirty" if changed; None for an installed copy."""

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(file.parent), *args], capture_output=True, text=True, check=False)

    try:
        if git("ls-files", "--error-unmatch", file.name).returncode:
            return None
        described = git("describe", "--always", "--dirty", "--exclude=*")
    except FileNotFoundError:  # no git on this machine
        return None
    return described.stdout.strip() or None
