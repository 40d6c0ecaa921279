"""The repository's own files, as the guard tests see them: without environments, builds, runs and caches."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
_SKIPPED = {"build", "dist", "runs", "demo", "__pycache__"}
_KEPT_HIDDEN = {".ci", ".gitignore", ".github"}


def files(folder: Path = ROOT) -> Iterator[Path]:
    """Every file of the project, in a fixed order."""
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") and path.name not in _KEPT_HIDDEN
        if hidden or path.name.endswith(".egg-info") or (path.parent == ROOT and path.name in _SKIPPED):
            continue
        if path.is_dir() and path.name != "__pycache__":
            yield from files(path)
        elif path.is_file():
            yield path


def python_sources(*folders: str) -> dict[str, str]:
    """Path from the root -> text, of the Python files under ``folders`` (everywhere if none is named)."""
    names = {str(path.relative_to(ROOT)): path for path in files() if path.suffix == ".py"}
    chosen = (name for name in names if not folders or name.split("/")[0] in folders)
    return {name: names[name].read_text(encoding="utf-8") for name in chosen}
