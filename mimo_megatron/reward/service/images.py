"""Pictures by content hash, as the console finds them: ``<sha256>`` or ``<sha256>.<ext>`` in one folder, or in
its folder named by the first two digits. Nothing a caller says becomes a path but 64 hexadecimal digits.
"""

import base64
import hashlib
import re
from pathlib import Path

MAX_IMAGE_BYTES = 20 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


class MediaMissing(Exception):
    """No picture of that name, or a file that is not what its name says."""


def read_image(root: Path | None, sha256: str) -> bytes:
    if root is None or not _SHA256.fullmatch(sha256):
        raise MediaMissing(sha256)
    folders = (root, root / sha256[:2])
    found = [path for folder in folders for path in (folder / sha256, *folder.glob(f"{sha256}.*")) if path.exists()]
    if not found:
        raise MediaMissing(sha256)
    path = found[0]
    try:
        if path.is_symlink() or path.stat().st_size > MAX_IMAGE_BYTES:
            raise MediaMissing(sha256)
        data = path.read_bytes()
    except OSError as error:
        raise MediaMissing(sha256) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise MediaMissing(sha256)
    return data


def data_url(data: bytes) -> str:
    kind = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
