"""Engines on other machines: `mimo-megatron serve-rl-engine` keeps one alive and announced, a trainer takes those free.

An engine serves one trainer at a time. When its trainer goes, its gate closes and it waits for the next one; when it
dies, its keeper starts another, announced anew, which the trainer takes before its next weights.
"""

import socket
import time
from pathlib import Path

import torch

from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.rl import VllmConfig
from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.errors import EngineError, EngineLostError, Interrupted
from mimo_megatron.log import get_logger
from mimo_megatron.rl.announcements import announced, read_announcement
from mimo_megatron.rl.engine.vllm import START_SECONDS, VllmEngine
from mimo_megatron.rl.engine.vllm_start import EngineProcess, start_process
from mimo_megatron.train.signals import StopWish

KEYS = ("address", "token")
_LOOK_SECONDS = 0.5
_MOST_FAILURES = 5
"""Of an engine's start, one after another, before its keeper gives up."""


def keep_engine(
    model: ModelConfig,
    encoding: EncodingConfig,
    config: VllmConfig,
    host: str,
    *,
    dtype: torch.dtype,
    max_sequences: int,
) -> None:
    """A vLLM that listens at ``host``, announced in the recipe's folder and started again where it ends. Until SIGTERM;
    ``EngineError`` where it cannot be started."""
    assert config.folder is not None
    failures = 0
    with StopWish() as wish:
        while not wish.name:
            process = start_process(
                model, encoding, config, dtype=dtype, max_sequences=max_sequences, listen=f"tcp:{host}:0"
            )
            try:
                process.wait_until_ready(START_SECONDS, lambda: bool(wish.name))
                failures = 0
                _announce_while_alive(process, config.folder, wish)
            except EngineError as fault:
                failures += 1
                if failures == _MOST_FAILURES:
                    raise
                get_logger().error("%s", fault)
            except Interrupted:
                pass
            finally:
                process.popen.terminate()
                process.end()


def _announce_while_alive(process: EngineProcess, folder: Path, wish: StopWish) -> None:
    content = read_announcement(process.address_file, KEYS)
    assert content is not None
    name = f"engine-{socket.gethostname()}-{process.popen.pid}.json"
    with announced(folder, name, content):
        get_logger().info("engine at %s, announced in %s", content["address"], folder)
        while process.popen.poll() is None and not wish.name:
            time.sleep(_LOOK_SECONDS)
    if not wish.name:
        code = process.popen.returncode
        get_logger().warning("the engine ended with code %d and is started again:\n%s", code, process.last_words())


class AnnouncedEngines:
    """The engines announced in a folder, as far as this trainer has not taken them."""

    def __init__(self, model: ModelConfig, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._taken: dict[str, VllmEngine] = {}
        """By token, which each start of an engine has its own of."""

    def take(self, seconds: float) -> VllmEngine:
        """One that answers, waited for as long. ``EngineLostError`` where there is none."""
        deadline = time.monotonic() + seconds
        while True:
            self._taken = {token: one for token, one in self._taken.items() if not one.is_closed}
            for path in sorted(self._folder.glob("engine-*.json")):
                if (engine := self._connected(path)) is not None:
                    return engine
            if time.monotonic() >= deadline:
                raise EngineLostError(
                    f"no free engine is announced in {self._folder} ({len(self._taken)} are in use): start one with "
                    "`mimo-megatron serve-rl-engine`, or look at its log"
                )
            time.sleep(_LOOK_SECONDS)

    def _connected(self, path: Path) -> VllmEngine | None:
        content = read_announcement(path, KEYS)
        if content is None or content["token"] in self._taken:
            return None
        try:
            engine = VllmEngine.connect(self._model, path)
        except EngineLostError as fault:
            get_logger().debug("%s is passed over: %s", path, fault)
            return None
        self._taken[content["token"]] = engine
        get_logger().info("engine at %s", content["address"])
        return engine
