"""The rows of Qwen's qwen-vl-finetune: ``image``, ``images`` or ``video``, and ``conversations`` as in LLaVA.

The file is a JSON array or JSON lines; a row may be a list of rows, which that trainer packs together: we part them.
Its grounding answers hold ``bbox_2d`` in pixels of the image as that trainer resized it (see ``boxes``).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from mimo_megatron.data.formats import llava
from mimo_megatron.data.formats.base import Format, Row, annotation_files
from mimo_megatron.types import MediaKind

COLUMNS: Mapping[str, MediaKind] = {"image": "image", "images": "image", "video": "video", "videos": "video"}


def rows(file: Path) -> Iterator[Row]:
    """The rows, packed ones one by one under the number of their list."""
    for row in llava.rows(file):
        for tree in row.tree if isinstance(row.tree, list) else [row.tree]:
            yield replace(row, tree=tree)


QWEN_VL = Format("qwen-vl", annotation_files, rows, lambda tree: llava.read_conversations(tree, COLUMNS))
