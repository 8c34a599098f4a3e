"""The engine in a thread of its own, which alone touches it; the event loop sends it jobs and hears of their tokens."""

import asyncio
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from nanochat_native.inference.engine import Engine, Request
from nanochat_native.inference.sampling import Sampling, Scored


class BusyError(RuntimeError):
    """As many requests wait as may."""


class ClosedError(RuntimeError):
    """The engine has failed, or the server is about to end."""


class Event(NamedTuple):
    """What a job of a call has got since its last event. finish_reason: as Request's, None while it goes on."""

    choice: int
    tokens: int
    text: str
    scored: list[Scored]
    finish_reason: str | None
    error: str | None


@dataclass(eq=False)
class Job:
    """A prompt that is continued; its events come into `events` of the loop that submitted it."""

    choice: int
    prompt: list[int]
    sampling: Sampling
    events: "asyncio.Queue[Event]"
    loop: asyncio.AbstractEventLoop
    request: Request | None = field(default=None)


class Worker:
    """Runs jobs on an engine, first come, first served, `slots` at a time; up to max_waiting more wait.

    submit and cancel are the event loop's, and return at once.
    """

    def __init__(self, engine: Engine, slots: int, max_waiting: int) -> None:
        self.slots, self.max_waiting = slots, max_waiting
        self.failed: str | None = None  # why nothing runs any more
        self._engine = engine
        self._open: set[Job] = set()  # the event loop's view: submitted, not ended
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
        """Takes all or none. Raises BusyError, and ClosedError."""
        if self.failed is not None or self._closing:
            raise ClosedError(self.failed or "the server is shutting down")
        if len(self._open) + len(prompts) > self.slots + self.max_waiting:
            raise BusyError(f"{len(self._open)} requests run or wait; it takes {self.slots + self.max_waiting}")
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        jobs = [Job(i, prompt, sampling, events, loop) for i, (prompt, sampling) in enumerate(prompts)]
        self._open.update(jobs)
        self._send(self._start, jobs)
        return jobs

    def cancel(self, jobs: list[Job]) -> None:
        """Frees the slots of those that have not ended."""
        ending = [job for job in jobs if job in self._open]
        self._open.difference_update(ending)
        if ending:
            self._send(self._stop, ending)

    def close(self) -> None:
        """Ends the thread, and with it whatever still runs."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _send(self, command: Callable[[Job], None], jobs: list[Job]) -> None:
        with self._wake:
            self._commands += [(command, job) for job in jobs]
            self._wake.notify()
            if self.failed is not None:  # the thread has ended since the jobs were taken
                self._fail_all()

    # --- in the engine's thread ---

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
                    self._tell(self._jobs[request], request)
        except Exception as error:
            traceback.print_exc()
            with self._wake:
                self.failed = f"the engine has failed: {type(error).__name__}"
                self._fail_all()

    def _fail_all(self) -> None:
        """Tells every job that began or was to begin. With the lock held, and the thread at its end."""
        jobs = [*self._jobs.values(), *(job for command, job in self._commands if command == self._start)]
        self._jobs.clear()
        self._commands.clear()
        for job in jobs:
            self._post(job, Event(job.choice, 0, "", [], "error", self.failed))

    def _tell(self, job: Job, request: Request) -> None:
        tokens, text, scored = request.read()
        if request.finish_reason is not None:
            del self._jobs[request]
        self._post(job, Event(job.choice, len(tokens), text, scored, request.finish_reason, request.error))

    def _post(self, job: Job, event: Event) -> None:
        def arrive() -> None:
            if event.finish_reason is not None:
                self._open.discard(job)
            job.events.put_nowait(event)

        if not job.loop.is_closed():
            job.loop.call_soon_threadsafe(arrive)
