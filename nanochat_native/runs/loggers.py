"""The loggers of a run: TensorBoard, and with --wandb and --trackio Weights & Biases and Trackio.

Rank 0 alone has loggers. wandb and trackio may talk to a server, so each runs in a thread of its own: a call that hangs
does not hold up training. A logger that raises, or does not answer in time, is a failed report of the run.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from nanochat_native.runs.config import LOGGER_FLAGS, TrainConfig, to_json
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.files import write_atomically
from nanochat_native.runtime.flags import flag

IDENTITIES = "loggers.json"  # in the folder of a run: for each logger the project and the id of the run in it

# Time limits of a logger in a thread, in seconds: for its start, for a call, and for its end.
START_SECONDS = 120.0  # wandb itself gives up after 90
CALL_SECONDS = 60.0
END_SECONDS = 120.0


class Logger(Protocol):
    """A program that shows the records of a run. A method may raise anything; the logger is then not used again."""

    def log(self, kind: str, step: int, values: dict[str, float | str]) -> None:
        """Take a record: its kind, the number of optimizer steps done, and its numbers and texts by name."""

    def flush(self) -> None:
        """Write to the disk what is for the disk."""

    def end(self, summary: dict[str, float | str], exit_code: int) -> None:
        """Take the figures of the whole run and its exit code, and close. Nothing follows."""


Open = Callable[[], Logger | None]  # None: its package is not installed


class TensorBoard:
    """Event files for TensorBoard (a Logger). Records after `last_step` of an earlier call are hidden."""

    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def log(self, kind: str, step: int, values: dict[str, float | str]) -> None:
        for name, value in values.items():
            add = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
            add(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        self._writer.flush()

    def end(self, summary: dict[str, float | str], exit_code: int) -> None:
        self._writer.close()


@dataclass(frozen=True)
class Identity:
    """A run as a service knows it.

    Attributes:
        id: unique in the project; a resumed run keeps it.
        config: what the service shows as the config.
        tokens_per_step: tokens of an optimizer step, padding included; of reinforce the most that a step may have.
    """

    project: str
    id: str
    name: str
    run_dir: Path
    config: dict[str, Any]
    tokens_per_step: int


class Wandb:
    """A run of Weights & Biases (a Logger).

    `step` and `tokens` are metrics, and `step` is the axis of the others. wandb's own step only grows, so a resumed run
    could not log again the steps between its checkpoint and its end.
    """

    def __init__(self, identity: Identity) -> None:
        import wandb

        self._tokens_per_step = identity.tokens_per_step
        self._run = wandb.init(
            project=identity.project,
            id=identity.id,
            name=identity.name,
            resume="allow",
            config=identity.config,
            allow_val_change=True,  # a resumed run may have a longer horizon
            dir=os.environ.get("WANDB_DIR", str(identity.run_dir)),
            settings={"console": "off"},  # it would replace sys.stdout and sys.stderr
        )
        for axis in ("step", "tokens"):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, values: dict[str, float | str]) -> None:
        axes = {"step": step, "tokens": step * self._tokens_per_step}
        self._run.log({f"{kind}/{name}": value for name, value in values.items()} | axes)

    def flush(self) -> None:
        pass

    def end(self, summary: dict[str, float | str], exit_code: int) -> None:
        self._run.summary.update(summary)
        self._run.finish(exit_code=exit_code)


class Trackio:
    """A run of Trackio (a Logger). Trackio finds a run to resume by its name, which therefore contains the id."""

    def __init__(self, identity: Identity) -> None:
        import trackio

        self._tokens_per_step = identity.tokens_per_step
        self._step = 0
        self._run = trackio.init(
            project=identity.project,
            name=f"{identity.name}-{identity.id}",
            resume="allow",
            config=identity.config,
            embed=False,
        )

    def log(self, kind: str, step: int, values: dict[str, float | str]) -> None:
        self._step = step
        metrics = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log(metrics | {"tokens": step * self._tokens_per_step}, step=step)

    def flush(self) -> None:
        pass

    def end(self, summary: dict[str, float | str], exit_code: int) -> None:
        if summary:
            self._run.log({f"summary/{name}": value for name, value in summary.items()}, step=self._step)
        self._run.finish()


class InThread:
    """A logger that runs in a thread of its own (a Logger). log() only queues the record.

    A method raises the error of an earlier call, and TimeoutError if the logger does not answer in time.

    Args:
        start: returns the logger; called in the thread.
    """

    threads: list[threading.Thread] = []  # noqa: RUF012  of all loggers of this process

    def __init__(self, start: Callable[[], Logger]) -> None:
        self._calls: SimpleQueue[Callable[[Logger], None] | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._busy_since: float | None = None  # when the present call began
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start,), daemon=True)
        self.threads.append(self._thread)
        self._thread.start()
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be for JSON lines
            answered = self._started.wait(START_SECONDS)
        self._raise_error()
        if not answered:
            self._end_later()
            raise TimeoutError(f"it did not start within {START_SECONDS:g} s")

    def _work(self, start: Callable[[], Logger]) -> None:
        try:
            logger = start()
            self._started.set()
            while (call := self._calls.get()) is not None:
                self._busy_since = time.monotonic()
                call(logger)
                self._busy_since = None
        except BaseException as error:  # also SystemExit of a package
            self._error = error
        finally:
            self._started.set()

    def _raise_error(self) -> None:
        if isinstance(self._error, Exception):
            raise self._error
        if self._error is not None:
            raise RuntimeError(repr(self._error))

    def log(self, kind: str, step: int, values: dict[str, float | str]) -> None:
        self._raise_error()
        since = self._busy_since
        if since is not None and time.monotonic() - since > CALL_SECONDS:
            self._end_later()
            raise TimeoutError(f"it did not take a record within {CALL_SECONDS:g} s")
        self._calls.put(lambda logger: logger.log(kind, step, values))

    def _end_later(self) -> None:
        """End the logger as failed if it answers after all; nothing waits for it."""
        self._calls.put(lambda logger: logger.end({}, 1))
        self._calls.put(None)

    def flush(self) -> None:
        self._raise_error()

    def end(self, summary: dict[str, float | str], exit_code: int) -> None:
        self._raise_error()
        self._calls.put(lambda logger: logger.end(summary, exit_code))
        self._calls.put(None)
        with contextlib.redirect_stdout(sys.stderr):
            self._thread.join(END_SECONDS)
        self._raise_error()
        if self._thread.is_alive():
            raise TimeoutError(f"it did not send everything within {END_SECONDS:g} s")


def leave(exit_code: int) -> int:
    """Return the exit code of the process; if a logger still hangs in a call, end the process at once instead.

    The functions that a package registers for the exit would wait for the same thing.
    """
    if any(thread.is_alive() for thread in InThread.threads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


SERVICES: dict[str, Callable[[Identity], Logger]] = {"wandb": Wandb, "trackio": Trackio}  # by flag and package


def require_packages(config: TrainConfig) -> None:
    """Raise ConfigError for a flag of a logger whose package is not installed."""
    for name in LOGGER_FLAGS:
        if getattr(config, name) is not None and importlib.util.find_spec(name) is None:
            raise ConfigError(f"{flag(name)} requires {name}: pip install 'nanochat-native[{name}]'")


def openers(config: TrainConfig, facts: dict[str, Any], last_step: int) -> dict[str, Open]:
    """Return for each logger of a run, by name, the function that opens it.

    Args:
        facts: what a service shows besides the flags.
        last_step: the step from which the run is resumed.
    """

    def tensorboard() -> Logger | None:
        if importlib.util.find_spec("tensorboard") is None:
            return None
        return TensorBoard(config.run_dir / "tensorboard", last_step)

    def service(name: str) -> Open:
        return lambda: InThread(lambda: SERVICES[name](identity(config, name, facts)))

    found: dict[str, Open] = {"TensorBoard": tensorboard}
    return found | {name: service(name) for name in LOGGER_FLAGS if getattr(config, name) is not None}


def identity(config: TrainConfig, name: str, facts: dict[str, Any]) -> Identity:
    """Return the identity of a run for the logger `name`.

    The id is that of the run's folder, or a new one if there is none for the project.
    """
    project, path = getattr(config, name), config.run_dir / IDENTITIES
    kept = _read(path)
    entry = kept.get(name)
    if not isinstance(entry, dict) or entry.get("project") != project or not isinstance(entry.get("id"), str):
        entry = {"project": project, "id": secrets.token_hex(4)}
        write_atomically(path, json.dumps(kept | {name: entry}, indent=1) + "\n")
    return Identity(
        project=project,
        id=entry["id"],
        name=str(config.run),
        run_dir=config.run_dir,
        config=to_json(config) | facts,
        tokens_per_step=config.total_batch_size,
    )


def _read(path: Path) -> dict[str, Any]:
    """Return the content of loggers.json; nothing if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
