"""Runs the engine in its own thread: the event loop submits jobs and receives their tokens as events."""

import asyncio
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from nanochat_native.inference.engine import Engine, Request
from nanochat_native.inference.sampling import Sampling, Scored


class BusyError(RuntimeError):
    """The queue is full."""


class ClosedError(RuntimeError):
    """The engine has failed, or the server is shutting down."""


class Event(NamedTuple):
    """The new output of a job since its last event.

    finish_reason and code are those of Request; finish_reason is None while the job runs.
    """

    choice: int
    tokens: int
    text: str
    scored: list[Scored]
    finish_reason: str | None
    error: str | None
    code: str | None = None


@dataclass(eq=False)
class Job:
    """A prompt to continue. Its events arrive in `events`, in the loop that submitted it."""

    choice: int
    prompt: list[int]
    sampling: Sampling
    events: "asyncio.Queue[Event]"
    loop: asyncio.AbstractEventLoop
    request: Request | None = field(default=None)


class Worker:
    """Runs jobs on an engine in the order of their arrival, `slots` at a time; up to max_waiting more wait.

    The event loop calls submit and cancel, which return at once.

    Attributes:
        failed: Why the engine no longer runs; None while it does.
    """

    def __init__(self, engine: Engine, slots: int, max_waiting: int) -> None:
        self.slots, self.max_waiting = slots, max_waiting
        self.failed: str | None = None
        self._engine = engine
        self._open: set[Job] = set()  # in the view of the event loop: submitted and not ended
        self._commands: list[tuple[Callable[[Job], None], Job]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._jobs: dict[Request, Job] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return min(len(self._open), self.slots)

    @property
    def waiting(self) -> int:
        return len(self._open) - self.running

    def submit(self, prompts: list[tuple[list[int], Sampling]]) -> list[Job]:
        """Submit all prompts or none. Raises BusyError and ClosedError."""
        if self.failed is not None or self._closing:
            raise ClosedError(self.failed or "the server is shutting down")
        if len(self._open) + len(prompts) > self.slots + self.max_waiting:
            raise BusyError(
                f"the queue is full: {len(self._open)} of {self.slots + self.max_waiting} requests run or wait"
            )
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        jobs = [Job(i, prompt, sampling, events, loop) for i, (prompt, sampling) in enumerate(prompts)]
        self._open.update(jobs)
        self._send(self._start, jobs)
        return jobs

    def cancel(self, jobs: list[Job]) -> None:
        """Cancel the jobs that have not ended, and free their slots."""
        ending = [job for job in jobs if job in self._open]
        self._open.difference_update(ending)
        if ending:
            self._send(self._stop, ending)

    def close(self) -> None:
        """End the thread and all running jobs."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _send(self, command: Callable[[Job], None], jobs: list[Job]) -> None:
        with self._wake:
            self._commands += [(command, job) for job in jobs]
            self._wake.notify()
            if self.failed is not None:  # the thread has ended since the jobs were submitted
                self._fail_all()

    # --- in the thread of the engine ---

    def _start(self, job: Job) -> None:
        job.request = self._engine.submit(job.prompt, job.sampling)
        self._jobs[job.request] = job

    def _stop(self, job: Job) -> None:
        if job.request is not None and self._jobs.pop(job.request, None) is not None:
            self._engine.cancel(job.request)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._commands and self._engine.idle and not self._closing:
                        self._wake.wait()
                    commands, self._commands = self._commands, []
                    if self._closing:
                        return
                for command, job in commands:
                    command(job)
                for request in self._engine.step():
                    self._report(self._jobs[request], request)
        except Exception as error:
            traceback.print_exc()
            with self._wake:
                self.failed = f"the engine has failed: {type(error).__name__}"
                self._fail_all()

    def _fail_all(self) -> None:
        """Send an error to every job that has started or waits. The lock must be held, and the thread ending."""
        jobs = [*self._jobs.values(), *(job for command, job in self._commands if command == self._start)]
        self._jobs.clear()
        self._commands.clear()
        for job in jobs:
            self._post(job, Event(job.choice, 0, "", [], "error", self.failed))

    def _report(self, job: Job, request: Request) -> None:
        tokens, text, scored = request.read()
        if request.finish_reason is not None:
            del self._jobs[request]
        ended = (request.finish_reason, request.error, request.code)
        self._post(job, Event(job.choice, len(tokens), text, scored, *ended))

    def _post(self, job: Job, event: Event) -> None:
        def arrive() -> None:
            if event.finish_reason is not None:
                self._open.discard(job)
            job.events.put_nowait(event)

        if not job.loop.is_closed():
            job.loop.call_soon_threadsafe(arrive)
