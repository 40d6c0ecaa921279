"""A reward service and its reward models on this machine, for as long as the run: started, watched, replaced."""

import json
import secrets
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from mimo_megatron.errors import RewardError
from mimo_megatron.log import get_logger

_START_SECONDS = 180.0
_FRAME = str.maketrans(dict.fromkeys("│╭╮╰╯─", " "))
"""Of the box that the command line puts around an error."""
_WATCH_SECONDS = 0.5
_STOP_SECONDS = 15.0


@dataclass
class _Server:
    """One process that says its address in a line of JSON, and is started again at that address where it dies."""

    name: str
    arguments: list[str]
    log: Path
    port: int = 0
    url: str = ""
    num_starts: int = 0
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def start(self) -> None:
        command = [sys.executable, "-m", "mimo_megatron.cli", *self.arguments, "--port", str(self.port)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.num_starts += 1
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], _START_SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if not line.startswith("{"):
            self.process.kill()
            words = self.log.read_text(errors="replace").translate(_FRAME).split()
            raise RewardError(f"{self.name} did not start; {self.log} ends with: {' '.join(words[-60:])}")
        self.url = json.loads(line)["url"]
        self.port = int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class RewardProcesses:
    """``url`` and ``token`` of a service that lives while the block lasts. What dies is started again at its address,
    so that those who wait for an answer get it."""

    def __init__(
        self, models: Mapping[str, Path], folder: Path, *, image_root: Path | None = None, tokenizer: Path | None = None
    ) -> None:
        self._folder, self._image_root, self._tokenizer = folder, image_root, tokenizer
        self._models = models
        self._is_over = threading.Event()
        self._servers: list[_Server] = []
        self.token = secrets.token_hex(16)

    @property
    def url(self) -> str:
        return self._servers[-1].url

    @property
    def pids(self) -> list[int]:
        """Of the reward models, then of the service."""
        return [one.process.pid for one in self._servers if one.process is not None]

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        token_file = self._folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(self.token)
        try:
            for kind, checkpoint in self._models.items():
                images = ["--image-root", str(self._image_root)] if self._image_root is not None else []
                words = ["serve-reward-model", str(checkpoint), *images, "--token-file", str(token_file)]
                self._begin(f"reward-model-{kind}", words)
            replicas = [
                word
                for kind, server in zip(self._models, self._servers, strict=True)
                for word in ("--reward-model", f"{kind}={server.url}")
            ]
            credentials = ["--token-file", str(token_file), "--reward-model-token-file", str(token_file)]
            self._begin("reward-service", ["serve-rewards", *replicas, *credentials])
        except BaseException:
            self._stop()
            raise
        self._watching = threading.Thread(target=self._watch, name="reward-processes", daemon=True)
        self._watching.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_over.set()
        self._watching.join()
        self._stop()

    def _begin(self, name: str, words: Sequence[str]) -> None:
        server = _Server(name, list(words), self._folder / f"{name}.log")
        self._servers.append(server)
        server.start()

    def _watch(self) -> None:
        while not self._is_over.wait(_WATCH_SECONDS):
            for server in self._servers:
                if server.process is not None and server.process.poll() is not None:
                    get_logger().warning("%s ended with code %d; started again", server.name, server.process.returncode)
                    try:
                        server.start()
                    except RewardError as error:
                        get_logger().error("%s", error)  # tried again; until then rewards are awaited

    def _stop(self) -> None:
        for server in reversed(self._servers):
            server.stop()
