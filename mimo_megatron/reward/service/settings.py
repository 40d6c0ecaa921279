"""What an operator chooses, checked before anything starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mimo_megatron.config.calibration import Calibration, read_calibration
from mimo_megatron.errors import ConfigError
from mimo_megatron.reward.service.http_server import check_address
from mimo_megatron.reward.service.pool import PoolSettings

ModelTask = Literal["rm_text", "rm_multimodal"]
MIN_TOKEN_CHARS = 16


@dataclass(frozen=True)
class ModelSpec:
    """One replica of a reward model. ``calibration`` is given for vLLM, which answers raw scores."""

    task: ModelTask
    url: str
    calibration: Calibration | None = None
    token: str | None = None
    """That the replica asks for."""


@dataclass(frozen=True)
class ServiceSettings:
    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one, which the ready line announces."""
    token: str | None = None
    pool: PoolSettings = field(default_factory=PoolSettings)
    models: tuple[ModelSpec, ...] = ()
    image_root: Path | None = None
    """Holds pictures as files named by their SHA-256; only vLLM replicas are sent them."""
    queue_items: int = 4096
    """Of each lane. A batch that does not fit is answered 429, but one that finds a lane empty is always taken."""
    queue_bytes: int = 64 << 20
    held_bytes: int = 128 << 20
    """Of request bodies, from their first byte to the answer."""
    deadline_seconds: float = 300.0
    """For requests that state none."""
    body_seconds: float = 30.0
    """Within which a request's body must have arrived."""
    cached_verdicts: int = 65_536

    def check(self) -> None:
        """``ConfigError`` for what would be unsafe or could not work."""
        check_address(self.host, self.port, self.token)
        if self.image_root is not None and not self.image_root.is_dir():
            raise ConfigError(f"--image-root {self.image_root} is not a folder")


def read_token(path: Path) -> str:
    """The first line of the file. ``ConfigError`` where it is missing or short."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path} cannot be read: {error}") from error
    if len(token) < MIN_TOKEN_CHARS or any(sign.isspace() for sign in token):
        raise ConfigError(
            f"--token-file {path} must hold one token of at least {MIN_TOKEN_CHARS} characters without spaces; "
            "`python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes one"
        )
    return token


def model_spec(text: str, with_calibration: bool, token: str | None = None) -> ModelSpec:
    """``text=URL`` or ``multimodal=URL``, with ``,CALIBRATION.json`` behind it for vLLM. ``ConfigError`` otherwise."""
    kind, _, rest = text.partition("=")
    url, _, file = rest.partition(",")
    tasks: dict[str, ModelTask] = {"text": "rm_text", "multimodal": "rm_multimodal"}
    if kind not in tasks or not url.startswith(("http://", "https://")) or bool(file) != with_calibration:
        wanted = "text=URL,CALIBRATION.json" if with_calibration else "text=URL"
        raise ConfigError(f"{text!r} is not of the form {wanted} (or multimodal=...)")
    return ModelSpec(tasks[kind], url.rstrip("/"), read_calibration(Path(file)) if file else None, token)
