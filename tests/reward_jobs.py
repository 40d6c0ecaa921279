"""Jobs that misbehave on request, for tests of the worker pool; run inside real workers."""

import ctypes
import os
import signal
import socket
import sys
import time
from typing import Any


def warm() -> list[str]:
    return []


def warm_badly() -> list[str]:
    return ["antlr4-python3-runtime is 4.9.3; install 4.13.2"]


def handle(job: dict[str, Any]) -> dict[str, Any]:
    return _ACTIONS[job["do"]](job)


def _echo(job: dict[str, Any]) -> dict[str, Any]:
    return {"said": job.get("say"), "pid": os.getpid()}


def _sleep(job: dict[str, Any]) -> dict[str, Any]:
    time.sleep(job["seconds"])
    return {"pid": os.getpid()}


def _spin(job: dict[str, Any]) -> dict[str, Any]:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))  # as C code that never returns to Python
    while True:
        pass


def _eat(job: dict[str, Any]) -> dict[str, Any]:
    hoard = []
    while True:
        hoard.append(bytearray(16 << 20))


def _grow(job: dict[str, Any]) -> dict[str, Any]:
    _kept.append(bytearray(os.urandom(1 << 20) * job["mib"]))
    return {"pid": os.getpid()}


def _crash(job: dict[str, Any]) -> dict[str, Any]:
    ctypes.string_at(0)
    raise AssertionError


def _kill_self(job: dict[str, Any]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _fail(job: dict[str, Any]) -> dict[str, Any]:
    raise ValueError("planted")


def _look(job: dict[str, Any]) -> dict[str, Any]:
    """What this worker can reach."""
    tried = {}
    for name, attempt in {
        "network": lambda: socket.create_connection(("127.0.0.1", job["port"]), 1).close(),
        "file": lambda: os.write(os.open(job["file"], os.O_WRONLY), b"x") and None,
        "fork": lambda: os.fork() or os._exit(0),
    }.items():
        try:
            attempt()
            tried[name] = "done"
        except OSError as error:
            tried[name] = type(error).__name__
    heavy = [name for name in ("torch", "fastapi", "uvicorn", "httpx", "numpy") if name in sys.modules]
    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    return {**tried, "heavy": heavy, "rss_kib": int(status["VmRSS"].split()[0]), "secret": os.environ.get("SECRET"),
            "no_new_privs": status["NoNewPrivs"], "ground_types": os.environ.get("SYMPY_GROUND_TYPES")}  # fmt: skip


_kept: list[bytearray] = []
_ACTIONS = {
    "echo": _echo, "sleep": _sleep, "spin": _spin, "eat": _eat, "grow": _grow, "crash": _crash,
    "kill_self": _kill_self, "fail": _fail, "look": _look,
}  # fmt: skip


def handle_item(job: dict[str, Any]) -> dict[str, Any]:
    """A math job whose response is right where it is the gold; a gold ``{"do": ...}`` is done instead."""
    gold = job["gold"]
    if isinstance(gold, dict):
        handle(gold)
        gold = "right"
    is_right = job["response"] == gold
    return {"status": "ok", "reward": float(is_right), "reason": "right" if is_right else "wrong", "parts": {},
            "answer": job["response"]}  # fmt: skip
