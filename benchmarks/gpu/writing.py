"""The result file while it grows: written whole after every row, so that nothing measured is lost with the process."""

import json
import os
import time
from pathlib import Path
from typing import Any, Protocol


class Save(Protocol):
    """``save(rows=[...], note="...")``: lists of the section grow, other values are set; then the file is written."""

    def __call__(self, **found: Any) -> None: ...


class Results:
    """The tree of a result file at ``path``. One process writes at a time."""

    def __init__(self, path: Path, tree: dict[str, Any]) -> None:
        self.path, self.tree = path, tree

    @classmethod
    def read(cls, path: Path) -> "Results":
        return cls(path, json.loads(path.read_text(encoding="utf-8")))

    def section(self, name: str) -> dict[str, Any]:
        return self.tree["sections"][name]

    def set(self, name: str, **values: Any) -> None:
        self.section(name).update(values)
        self.write()

    def saver(self, name: str) -> Save:
        def save(**found: Any) -> None:
            data = self.section(name).setdefault("data", {})
            for key, value in found.items():
                if isinstance(value, list):
                    data.setdefault(key, []).extend(value)
                else:
                    data[key] = value
            self.write()

        return save

    def write(self) -> None:
        self.tree["written"] = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        # A value that is no number (an error of NaN) is written as null: standard JSON has no name for it.
        part.write_text(json.dumps(_finite(self.tree), indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and tree - tree != 0 else tree
