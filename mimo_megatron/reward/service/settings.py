"""What an operator chooses, checked before anything starts."""

import ipaddress
import json
import math
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mimo_megatron.errors import ConfigError
from mimo_megatron.reward.service.pool import PoolSettings

ModelTask = Literal["rm_text", "rm_multimodal"]
MIN_TOKEN_CHARS = 16


@dataclass(frozen=True)
class Calibration:
    """reward = sigmoid((score - mu) / tau), fixed from held-out pairs before a run and never during one."""

    mu: float
    tau: float

    def reward(self, score: float) -> float:
        scaled = (score - self.mu) / self.tau
        return 1 / (1 + math.exp(-scaled)) if scaled >= 0 else math.exp(scaled) / (1 + math.exp(scaled))


@dataclass(frozen=True)
class ModelSpec:
    """One replica of a reward model. ``calibration`` is given for vLLM, which answers raw scores."""

    task: ModelTask
    url: str
    calibration: Calibration | None = None


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
        if self.token is None and not _is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines, and there is no token. "
                "Give --token-file FILE, or bind 127.0.0.1 and use a tunnel"
            )
        if self.image_root is not None and not self.image_root.is_dir():
            raise ConfigError(f"--image-root {self.image_root} is not a folder")
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port {self.port} is outside 0..65535")


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


def model_spec(text: str, with_calibration: bool) -> ModelSpec:
    """``text=URL`` or ``multimodal=URL``, with ``,CALIBRATION.json`` behind it for vLLM. ``ConfigError`` otherwise."""
    kind, _, rest = text.partition("=")
    url, _, file = rest.partition(",")
    tasks: dict[str, ModelTask] = {"text": "rm_text", "multimodal": "rm_multimodal"}
    if kind not in tasks or not url.startswith(("http://", "https://")) or bool(file) != with_calibration:
        wanted = "text=URL,CALIBRATION.json" if with_calibration else "text=URL"
        raise ConfigError(f"{text!r} is not of the form {wanted} (or multimodal=...)")
    return ModelSpec(tasks[kind], url.rstrip("/"), read_calibration(Path(file)) if file else None)


def read_calibration(path: Path) -> Calibration:
    """mu and tau of ``{"mu": ..., "tau": ...}``; other keys may stand beside them."""
    try:
        tree = json.loads(path.read_text())
        calibration = Calibration(float(tree["mu"]), float(tree["tau"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} must hold JSON with numbers mu and tau: {error!r}") from error
    if not (math.isfinite(calibration.mu) and math.isfinite(calibration.tau) and calibration.tau > 0):
        raise ConfigError(f"{path}: mu {calibration.mu} and tau {calibration.tau} must be finite, and tau above 0")
    return calibration


def _is_loopback(host: str) -> bool:
    """Every address that the name stands for is this machine's own; an empty host is every interface."""
    if not host:
        return False
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ConfigError(f"--host {host} is not a name or address of this machine: {error}") from error
    return all(ipaddress.ip_address(address).is_loopback for address in found)
