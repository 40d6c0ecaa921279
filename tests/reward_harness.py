"""A reward service in a process of its own, with the jobs of ``tests/reward_jobs.py`` where a test asks for them.

python -m tests.reward_harness '{"token": ..., "pool": {...}, "limits": {...}}'
"""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from mimo_megatron.config.calibration import Calibration
from mimo_megatron.reward.service.gate import App
from mimo_megatron.reward.service.http_server import bound, serve_on
from mimo_megatron.reward.service.pool import PoolSettings
from mimo_megatron.reward.service.serve import serve
from mimo_megatron.reward.service.settings import ModelSpec, ServiceSettings
from mimo_megatron.reward.service.worker import Limits
from tests.repository import ROOT

SCRIPTED = {"target": "tests.reward_jobs:handle_item", "warm": "tests.reward_jobs:warm"}


class Service:
    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self.url = ""

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.reward_harness", json.dumps(self._settings)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        ready = json.loads(self.process.stdout.readline())
        self.url = ready["url"]
        self._settings["port"] = int(self.url.rpartition(":")[2])  # a restarted service is found where it was
        wait_until(lambda: httpx.get(self.url + "/readyz").status_code == 200)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        (zygote,) = psutil.Process(self.process.pid).children()
        return zygote.children()

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        code = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def metric(self, name: str, **labels: str) -> float:
        wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        for line in httpx.get(self.url + "/metrics", headers=self.headers).text.splitlines():
            if line.startswith((f"{name} ", f"{name}{{{wanted}}} ")):
                return float(line.rpartition(" ")[2])
        return 0.0

    @property
    def headers(self) -> dict[str, str]:
        token = self._settings.get("token")
        return {"authorization": f"Bearer {token}"} if token else {}


@contextmanager
def running(**settings: Any) -> Iterator[Service]:
    service = Service(**settings)
    service.start()
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.stop()


def wait_until(holds: Any, seconds: float = 20.0) -> float:
    """Seconds until ``holds()``; fails after ``seconds``. A connection that is refused is a no."""
    began = time.monotonic()
    while True:
        with suppress(httpx.HTTPError):
            if holds():
                return time.monotonic() - began
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.02)


@asynccontextmanager
async def served(app: App) -> AsyncIterator[str]:
    """The address of an application that this process serves meanwhile."""
    with bound("127.0.0.1", 0) as sock:
        serving = asyncio.create_task(serve_on(sock, app))
        await asyncio.sleep(0.1)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            signal.raise_signal(signal.SIGTERM)
            await serving


def settings_from(tree: dict[str, Any]) -> ServiceSettings:
    pool = PoolSettings(limits=Limits(**tree.pop("limits", {})), **tree.pop("pool", {}))
    models = tuple(
        ModelSpec(task, url, Calibration(*calibration) if calibration else None)
        for task, url, calibration in tree.pop("models", ())
    )
    image_root = tree.pop("image_root", None)
    return ServiceSettings(pool=pool, models=models, image_root=Path(image_root) if image_root else None, **tree)


if __name__ == "__main__":
    serve(settings_from(json.loads(sys.argv[1])))
