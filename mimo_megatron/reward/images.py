"""Pictures by content hash: ``<sha256>`` or ``<sha256>.<ext>`` in one folder, or in its folder named by the first two
digits. Nothing a caller says becomes a path but 64 hexadecimal digits.
"""

import base64
import hashlib
import re
from pathlib import Path

MAX_IMAGE_BYTES = 20 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


class MediaMissing(Exception):
    """No picture of that name, or a file that is not what its name says; the message is for people."""


def image_path(root: Path | None, sha256: str) -> Path:
    """Where the picture of this name lies. ``MediaMissing``."""
    if root is None or not _SHA256.fullmatch(sha256):
        raise MediaMissing("no folder of pictures given" if root is None else "this is no SHA-256")
    for folder in (root, root / sha256[:2]):
        for path in (folder / sha256, *sorted(folder.glob(f"{sha256}.*"))):
            if path.is_file() and not path.is_symlink():
                return path
    raise MediaMissing(f"no file {sha256[:12]}… under {root}")


def read_image(path: Path, sha256: str) -> bytes:
    """The file's bytes. ``MediaMissing`` where they are not those that the name says, or too many."""
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise MediaMissing(f"{path.name} has more than {MAX_IMAGE_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise MediaMissing(f"{path.name} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise MediaMissing(f"{path.name} does not have the content that its name says")
    return data


def data_url(data: bytes) -> str:
    kind = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
