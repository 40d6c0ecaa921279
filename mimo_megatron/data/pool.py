"""Worker processes that make packs: jobs go to idle ones, packs come back in shared memory, the lost are replaced.

One thread of the trainer does all of it. Invariants: every job ends, with its pack or with an error; a worker's death
or silence costs time and nothing else - its pack is made anew by another - unless one sample is the cause again and
again, which is then left out and named; no worker outlives the trainer.
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from mimo_megatron.data.corpus import Corpus
from mimo_megatron.data.making import LOST, SLOW, MadePack
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.shared_pack import read_shared
from mimo_megatron.data.worker import BORN, FAILED, REPLY, Progress, send_job
from mimo_megatron.errors import ConfigError, DataError
from mimo_megatron.log import get_logger

_TRIES = {SLOW: 2, LOST: 3}
"""Of a sample, before it is left out. Whoever kills workers for want of memory may hit one sample twice by chance."""
_START_SECONDS = 300.0
"""For a nursery to import and open the corpus; 3 to 5 s here."""
_MOST_STARTS = 2
"""Of a nursery, one after another, from which no worker came."""
_MOST_VAIN = 5
"""Workers lost one after another, with no pack made in between and no sample to blame, for
each of the recipe's workers, before it is an error."""
_END_SECONDS = 10.0
_TALK_SECONDS = 60.0
"""For a worker to take a job."""


@dataclass(eq=False)
class _Job:
    numbers: Sequence[int]
    future: "Future[MadePack]"
    left_out: dict[int, SampleError]
    tries: Counter[tuple[int, str]] = field(default_factory=Counter)


@dataclass(eq=False)
class _Worker:
    sock: socket.socket
    progress: Progress
    pid: int = 0
    pidfd: int = -1
    """Of a worker that has said that it is there."""
    job: _Job | None = None

    @property
    def is_born(self) -> bool:
        return self.pidfd >= 0

    @property
    def number(self) -> int | None:
        """The sample that it is at."""
        place = self.progress.place
        return self.job.numbers[place] if self.job and place < len(self.job.numbers) else None


class WorkerPool:
    """A ``PackMaker`` with ``corpus.data.workers`` processes."""

    def __init__(self, corpus: Corpus) -> None:
        if not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
            raise ConfigError("data.workers needs Linux (memfd, pidfd); set data.workers=0")
        self.corpus = corpus
        self.num_workers = corpus.data.workers
        self.num_lost = 0
        """Workers that ended, or were ended, and were replaced."""
        self._jobs: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._vain = self._starts = 0
        self._is_closing = False
        self._failure: Exception | None = None
        """Why the thread has ended."""
        self._selector = selectors.DefaultSelector()
        self._wake_sender, self._wake = socket.socketpair()
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="pack-workers", daemon=True)
        self._thread.start()

    def start(self, numbers: Sequence[int], left_out: Mapping[int, SampleError]) -> "Future[MadePack]":
        future: Future[MadePack] = Future()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._jobs.append(_Job(numbers, future, dict(left_out)))
        self._wake_up()
        return future

    def check(self) -> None:
        """Nothing: what holds a pack up is ended."""

    def close(self) -> None:
        """End all workers and wait for the nursery, which ends at once."""
        self._is_closing = True
        self._wake_up()
        self._thread.join()
        self._wake_sender.close()

    def _wake_up(self) -> None:
        with suppress(OSError):  # the thread has ended
            self._wake_sender.send(b".")

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._staff()
                self._hand_out()
                for key, _ in self._selector.select(self._seconds_to_next_deadline()):
                    if key.fileobj is self._wake:
                        self._wake.recv(4096)
                    elif key.data in self._workers:
                        self._hear(key.data)
                self._end_the_slow()
            self._fail_all(DataError("the data workers were ended"))
        except Exception as error:  # whoever waits for a pack is told
            self._fail_all(error)
        finally:
            self._stop_nursery()
            self._selector.close()
            self._wake.close()

    def _staff(self) -> None:
        """Ask for the workers that are missing."""
        while len(self._workers) < self.num_workers:
            if self._control is None:
                self._start_nursery()
            assert self._control is not None
            ours, theirs = socket.socketpair()
            ours.settimeout(_TALK_SECONDS)
            page = os.memfd_create("mimo-progress", os.MFD_CLOEXEC)
            os.ftruncate(page, Progress.PAGE_BYTES)
            worker = _Worker(ours, Progress(page))
            worker.progress.begin(0)
            self._workers.append(worker)
            self._selector.register(ours, selectors.EVENT_READ, worker)
            with theirs, suppress(OSError):  # where the nursery has ended, ours hears that theirs closed
                socket.send_fds(self._control, [b"fork"], [theirs.fileno(), page])
            os.close(page)

    def _start_nursery(self) -> None:
        self._starts += 1
        if self._starts > _MOST_STARTS:
            raise DataError(
                f"the data workers did not start, {_MOST_STARTS} times: look at the error above; or set data.workers=0"
            )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-P", "-m", "mimo_megatron.data.worker", str(theirs.fileno()), str(os.getpid())]
        places = os.pathsep.join(os.path.abspath(place) for place in sys.path)
        one_thread = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with theirs:
            self._nursery = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **one_thread, "PYTHONPATH": places},
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        corpus, stdin = self.corpus, self._nursery.stdin
        assert stdin is not None
        settings = {
            "data": corpus.data.model_dump(mode="json"),
            "model": corpus.model.model_dump(mode="json"),
            "part": [corpus.part.rank, corpus.part.size],
        }
        with suppress(BrokenPipeError), stdin:
            stdin.write(json.dumps(settings).encode())
        self._control = ours

    def _hand_out(self) -> None:
        """Give jobs, oldest first, to workers that have none."""
        for worker in [one for one in self._workers if one.is_born and one.job is None]:
            job = self._next_job()
            if job is None:
                return
            worker.job = job
            worker.progress.begin(len(job.numbers))
            with suppress(OSError):  # it has ended, which its socket says, or takes nothing, and its time runs
                send_job(worker.sock, job.numbers, job.left_out)

    def _next_job(self) -> _Job | None:
        with self._lock:
            while self._jobs:
                job = self._jobs.popleft()
                if job.future.running() or job.future.set_running_or_notify_cancel():
                    return job
        return None

    def _hear(self, worker: _Worker) -> None:
        try:
            message, handles, _, _ = socket.recv_fds(worker.sock, REPLY.size, 1)
        except OSError:
            message, handles = b"", []
        if len(message) < REPLY.size:
            self._lose(worker, "ended")
            return
        kind, value = REPLY.unpack(message)
        if kind == BORN:
            worker.pid, worker.pidfd, self._starts = value, handles[0], 0
        else:
            self._take(worker, kind, handles[0], value)

    def _take(self, worker: _Worker, kind: int, file: int, num_bytes: int) -> None:
        job, worker.job, self._vain = worker.job, None, 0
        assert job is not None
        try:
            if kind == FAILED:
                raise DataError(f"data worker: {os.pread(file, num_bytes, 0).decode()}")
            job.future.set_result(read_shared(file, num_bytes))
        except Exception as error:  # the worker's, or no memory to map the pack
            job.future.set_exception(error)
        finally:
            os.close(file)

    def _seconds_to_next_deadline(self) -> float | None:
        """None where no worker owes anything."""
        deadlines = [self._deadline(one) for one in self._workers if one.job or not one.is_born]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _deadline(self, worker: _Worker) -> float:
        return worker.progress.since + (self.corpus.data.sample_seconds if worker.is_born else _START_SECONDS)

    def _end_the_slow(self) -> None:
        for worker in list(self._workers):
            if (worker.job or not worker.is_born) and time.monotonic() > self._deadline(worker):
                self._lose(worker, "was slow", is_slow=True)

    # ---- losses ----------------------------------------------------------------------------------------------------

    def _lose(self, worker: _Worker, how: str, *, is_slow: bool = False) -> None:
        """Forget a worker, ending it where it is still there, and put its job back."""
        is_orphan = not is_slow and self._nursery_has_ended(0.0 if worker.is_born else 1.0)
        number, name = worker.number, f"{worker.pid}" if worker.is_born else "being started"
        if number is not None and not is_orphan:
            assert worker.job is not None
            self._blame(worker.job, number, SLOW if is_slow else LOST)
        else:
            self._vain += 1
        at = f" at sample {self.corpus.sample_id(number)!r}" if number is not None else ""
        self._drop(worker)
        get_logger().warning(
            "data worker %s %s%s; another takes its place (%d lost so far)", name, how, at, self.num_lost
        )
        if is_orphan or (not worker.is_born and is_slow):
            self._stop_nursery()
            for other in list(self._workers):
                self._drop(other)
        if self._vain >= _MOST_VAIN * self.num_workers:
            raise DataError(
                f"{self._vain} data workers were lost with no pack made in between: look at their errors above, and at "
                "the memory that is free; or set data.workers=0"
            )

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.sock)
        worker.sock.close()
        if worker.is_born:
            self.num_lost += 1
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
            os.close(worker.pidfd)
        if worker.job is not None:
            with self._lock:
                self._jobs.appendleft(worker.job)

    def _nursery_has_ended(self, seconds: float) -> bool:
        """Now, or within so many seconds."""
        if self._nursery is None:
            return True
        with suppress(subprocess.TimeoutExpired):
            self._nursery.wait(seconds)
        return self._nursery.returncode is not None

    def _blame(self, job: _Job, number: int, reason: str) -> None:
        """Count a loss at a sample, which is left out when it has had its tries."""
        job.tries[number, reason] += 1
        if (times := job.tries[number, reason]) < _TRIES[reason]:
            return
        what = {
            SLOW: f"took longer than data.sample_seconds {self.corpus.data.sample_seconds:g} to read and decode",
            LOST: "ended the worker that read and decoded it: it crashes its decoder, or needs too much memory",
        }
        detail = f"{what[reason]}; tried {times} times"
        job.left_out[number] = SampleError(self.corpus.sample_id(number), reason, detail)

    def _stop_nursery(self) -> None:
        """End the nursery, and by that all its workers."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._nursery is not None:
            self._nursery.kill()
            with suppress(subprocess.TimeoutExpired):  # it may stand in a read that no signal interrupts
                self._nursery.wait(_END_SECONDS)
            self._nursery = None

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            self._failure = error
            left, self._jobs = list(self._jobs), deque()
        left += [worker.job for worker in self._workers if worker.job is not None]
        for worker in self._workers:
            worker.sock.close()
            if worker.is_born:
                os.close(worker.pidfd)
        self._workers = []
        for job in left:
            if not job.future.done():
                job.future.set_exception(error)
