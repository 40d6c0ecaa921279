"""A reward service and its reward models on this machine: started, watched, replaced. For a run of this machine, or,
announced in a folder that machines share, for one of another (`mimo-megatron serve-rl-rewards`)."""

import json
import os
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from mimo_megatron.config.rl import RewardConfig
from mimo_megatron.errors import RewardError
from mimo_megatron.log import get_logger
from mimo_megatron.rl.announcements import announced, read_announcement
from mimo_megatron.train.signals import StopWish

ANNOUNCEMENT = "rewards.json"
KEYS = ("url", "token")
_START_SECONDS = 180.0
_PATIENCE_SECONDS = 600.0
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
        command += ["--parent", str(os.getpid())]
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
        self, reward: RewardConfig, folder: Path, *, image_root: Path | None = None, host: str = "127.0.0.1",
        port: int = 0, token: str | None = None,
    ) -> None:  # fmt: skip
        """The service is at ``host`` and ``port`` (0: any that is free); its models are for this machine alone."""
        models = {"text": reward.text_model, "multimodal": reward.multimodal_model}
        self._models = {kind: checkpoint for kind, checkpoint in models.items() if checkpoint is not None}
        self._folder, self._image_root = folder, image_root
        self._host, self._port = host, port
        self._is_over = threading.Event()
        self._servers: list[_Server] = []
        self.token = token or secrets.token_hex(16)

    @property
    def url(self) -> str:
        return self._servers[-1].url

    def __enter__(self) -> Self:
        for folder in (self._folder, self._image_root):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
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
            words = ["serve-rewards", *replicas, *credentials, "--host", self._host]
            self._begin("reward-service", words, self._port)
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

    def _begin(self, name: str, words: Sequence[str], port: int = 0) -> None:
        server = _Server(name, list(words), self._folder / f"{name}.log", port)
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


def keep_rewards(reward: RewardConfig, folder: Path, host: str, *, image_root: Path) -> None:
    """Serve the recipe's rewards at ``host``, announced in ``reward.folder``, until SIGTERM. A keeper that was killed
    goes on at the address and with the token of the announcement that it left, so that a trainer finds it again."""
    assert reward.folder is not None
    before = read_announcement(reward.folder / ANNOUNCEMENT, KEYS)
    port, token = 0, None
    if before is not None and before["url"].startswith(f"http://{host}:"):
        port, token = int(before["url"].rpartition(":")[2]), before["token"]
    with (
        StopWish() as wish,
        RewardProcesses(reward, folder, image_root=image_root, host=host, port=port, token=token) as processes,
    ):
        content = {"url": processes.url, "token": processes.token}
        with announced(reward.folder, ANNOUNCEMENT, content):
            get_logger().info("rewards at %s, announced in %s", processes.url, reward.folder)
            while not wish.name:
                time.sleep(_WATCH_SECONDS)


def announced_service(folder: Path) -> tuple[str, str]:
    """Address and token of the service that is announced there, waited for. ``RewardError`` where there is none."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (found := read_announcement(folder / ANNOUNCEMENT, KEYS)) is None:
        if time.monotonic() > deadline:
            raise RewardError(
                f"no service is announced in {folder}: start one with `mimo-megatron serve-rl-rewards`, or look at its "
                "log"
            )
        time.sleep(_WATCH_SECONDS)
    return found["url"], found["token"]
