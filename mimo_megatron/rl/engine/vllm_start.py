"""A vLLM process of one's own: its folder, its environment, its start and its end. Nothing of vLLM is imported here."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import mimo_megatron
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.rl import VllmConfig
from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.convert.families import rules_for
from mimo_megatron.convert.hf_config import write_hf_companions
from mimo_megatron.convert.hf_io import DTYPE_NAMES
from mimo_megatron.errors import ConfigError, EngineError, Interrupted
from mimo_megatron.rl.engine.vllm_wire import EngineSettings
from mimo_megatron.rl.sync.buckets import Manifest, TensorEntry

_ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",  # vLLM looks for an import name triton_kernels; the working folder may have one
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process and one thread: an abort is done when it returns
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_LOG_LINES = 15


@dataclass(frozen=True)
class EngineProcess:
    """A process that was started, and its folder, which goes when the process does."""

    popen: subprocess.Popen[bytes]
    folder: Path

    @property
    def address_file(self) -> Path:
        return self.folder / "address.json"

    def last_words(self) -> str:
        lines = (self.folder / "log.txt").read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def wait_until_ready(self, seconds: float, should_stop: Callable[[], bool] = lambda: False) -> None:
        """``EngineError`` where it ends or is not ready in time, ``Interrupted`` where it was asked to stop waiting."""
        deadline = time.monotonic() + seconds
        while not self.address_file.exists():
            if (code := self.popen.poll()) is not None:
                raise EngineError(
                    f"vLLM ended with code {code} before it was ready; its last lines:\n{self.last_words()}"
                )
            if should_stop():
                raise Interrupted("stopped before vLLM was ready")
            if time.monotonic() > deadline:
                raise EngineError(f"vLLM was not ready within {seconds:.0f} s; its last lines:\n{self.last_words()}")
            time.sleep(0.1)

    def end(self, seconds: float = 10.0) -> None:
        """The process and its folder are gone on return."""
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def served_model(model: ModelConfig) -> ModelConfig:
    """The model without what an engine does not run: layers that predict further tokens."""
    return model.model_copy(update={"text": model.text.model_copy(update={"num_mtp_layers": 0})})


def engine_tensors(model: ModelConfig, dtype: torch.dtype) -> tuple[TensorEntry, ...]:
    """What an update of an engine must bring, in the converter's order."""
    specs = [spec for rule in rules_for(served_model(model)) for spec in rule.hf]
    return tuple(TensorEntry(spec.name, DTYPE_NAMES[dtype], tuple(spec.shape)) for spec in specs)


def write_engine_folder(
    folder: Path,
    model: ModelConfig,
    encoding: EncodingConfig,
    config: VllmConfig,
    *,
    dtype: torch.dtype,
    max_sequences: int,
    listen: str,
    is_owned: bool,
) -> Path:
    """Everything a vLLM process needs but vLLM, in ``folder``; the settings file to start it with."""
    (folder / "model").mkdir()
    write_hf_companions(folder / "model", served_model(model), dtype, encoding)
    (folder / "tensors.json").write_bytes(Manifest(0, engine_tensors(model, dtype)).to_json())
    (folder / "package").mkdir()
    # A link, since the folder around the package may hold other packages: those of the trainer's environment.
    (folder / "package" / "mimo_megatron").symlink_to(Path(mimo_megatron.__file__).parent)
    settings = EngineSettings(
        model=str(folder / "model"),
        trained_model=model.model_dump(mode="json"),
        tensors=str(folder / "tensors.json"),
        listen=listen,
        address_file=str(folder / "address.json"),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=config.max_model_len,
        max_sequences=max_sequences,
        kv_cache_bytes=config.kv_cache_gib << 30,
        banned=list(model.tokens.never_sampled),
        ends=list(model.tokens.ends),
        is_owned=is_owned,
        parent=os.getpid(),
    )
    path = folder / "settings.json"
    path.write_text(json.dumps(asdict(settings), indent=1) + "\n")
    return path


def start_process(
    model: ModelConfig,
    encoding: EncodingConfig,
    config: VllmConfig,
    *,
    dtype: torch.dtype,
    max_sequences: int,
    listen: str | None = None,
) -> EngineProcess:
    """A vLLM process of this machine, not ready yet. It lives as long as its one connection, a Unix socket; with
    ``listen`` (``tcp:HOST:PORT``) as long as this process, for one trainer after another."""
    if config.python is None or not config.python.is_file():
        raise ConfigError(
            f"rl.vllm.python is {config.python}: it names the Python of an environment with vLLM, such as "
            ".vllm-env/bin/python, which `make vllm-env` makes"
        )
    folder = Path(tempfile.mkdtemp(prefix="mimo-vllm-"))
    settings = write_engine_folder(
        folder,
        model,
        encoding,
        config,
        dtype=dtype,
        max_sequences=max_sequences,
        listen=listen or f"unix:{folder / 'socket'}",
        is_owned=listen is None,
    )
    inherited = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    with (folder / "log.txt").open("wb") as log:
        popen = subprocess.Popen(
            [config.python, "-m", "mimo_megatron.rl.engine.vllm_process", settings],
            env={**inherited, **_ENVIRONMENT, "PYTHONPATH": str(folder / "package")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    return EngineProcess(popen, folder)
