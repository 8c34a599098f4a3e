"""python -m nanochat_native.serve: OpenAI's API and a page for a trained model. --help lists the flags."""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_native.data.conversations import is_chat_trained
from nanochat_native.inference.engine import Engine
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.command import run_command
from nanochat_native.runtime.hardware import autocast, pick_device

EXTRA = "serve needs starlette and uvicorn: pip install 'nanochat-native[serve]'"
BACKLOG = 1024  # connections that wait to be accepted
GRACE_SECONDS = 5  # for requests that run when the server is to end
MOST_SLOTS = 4096
MOST_SECONDS = 1e6  # of a timeout; asyncio's clock takes no more than some hundred years


@dataclass
class Options:
    """Serve a trained model: OpenAI's /v1/completions and /v1/chat/completions, and a page to talk to it at /."""

    checkpoint: Path
    """Run folder, as `python -m nanochat_native.train` or finetune leaves it."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    model_name: str | None = None
    """Name that requests give; default: the run folder's."""
    host: str = "127.0.0.1"
    """Address to listen at; the default is reached from this machine alone."""
    port: int = 8000
    """Port to listen at; 0: any free one."""
    api_key: str | None = None
    """Key that requests must send. The environment variable NANOCHAT_API_KEY sets it too, and does not show in lists of
    processes."""
    slots: int = 8
    """Requests that are generated at once."""
    max_waiting: int = 64
    """Requests that may wait for a slot; more are answered by 429."""
    max_tokens: int = 4096
    """Tokens that a request may ask for, at most."""
    capacity: int | None = None
    """Tokens of prompt and continuation, at most; default: the model's positions, at most 4096."""
    max_body_bytes: int = 1 << 20
    """Size of a request; a larger one is answered by 413."""
    timeout: float = 300.0
    """Seconds for a request; then it is answered by 408 or 504."""
    connection_timeout: int = 30
    """Seconds that a connection waits for its client: for the headers of a request, the first or the next, or that what
    was sent is read; then it is closed."""
    device: Literal["cpu", "cuda"] | None = None
    """Default: the GPU where there is one."""

    def check(self) -> None:
        """Raises ValueError for a value out of range."""
        for name, least in (("slots", 1), ("max_waiting", 0), ("max_tokens", 1), ("max_body_bytes", 1), ("port", 0)):
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {getattr(self, name)}; it takes a number from {least}")
        for name in ("timeout", "connection_timeout"):
            if not 0 < getattr(self, name) <= MOST_SECONDS:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {getattr(self, name)}; it takes seconds above 0, up to {MOST_SECONDS:g}")
        if self.slots > MOST_SLOTS:
            raise ValueError(f"--slots is {self.slots}; it takes a number up to {MOST_SLOTS}")
        for name in ("host", "model_name"):
            if getattr(self, name) == "":
                raise ValueError(f"--{name.replace('_', '-')} is empty; leave it away, or give one")
        if self.port > 65535:
            raise ValueError(f"--port is {self.port}; it takes a number up to 65535")
        if self.key == "":
            raise ValueError("the API key is empty; leave it away, or give one")
        if self.key is not None and not all("!" <= letter <= "~" for letter in self.key):
            raise ValueError("the API key takes visible ASCII characters, which a header can hold")

    @property
    def key(self) -> str | None:
        return self.api_key if self.api_key is not None else os.environ.get("NANOCHAT_API_KEY")


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises OSError, naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)  # from the moment that the address is printed
    except OSError as error:
        listener.close()
        raise OSError(f"{host} port {port}: {error.strerror or error}; give another --port or --host") from None
    return listener


def run(options: Options) -> int:
    """Serves until SIGINT or SIGTERM. Raises ImportError without the extra, ValueError and OSError for what does not
    fit or cannot be bound, and what load_model does."""
    options.check()
    try:
        import uvicorn

        from nanochat_native.inference.server.app import Limits, Server
        from nanochat_native.inference.server.connection import configured
        from nanochat_native.inference.server.protocol import MOST_CHOICES, Served
        from nanochat_native.inference.server.worker import Worker
    except ImportError as error:
        raise ImportError(f"{EXTRA} ({error})") from None

    device = pick_device(options.device)
    model, tokenizer, meta = load_model(
        options.checkpoint, options.step, device, warn=lambda message: print(message, file=sys.stderr)
    )
    listener = bind(options.host, options.port)
    capacity = min(model.max_positions, 4096) if options.capacity is None else options.capacity
    if not 2 <= capacity <= model.max_positions:
        raise ValueError(f"--capacity is {capacity}; it takes a number from 2 to {model.max_positions}")
    try:
        with autocast(device):
            engine = Engine(model, tokenizer, slots=options.slots, capacity=capacity)
    except RuntimeError as error:
        given = f"{options.slots} slots of {capacity} tokens do not fit into memory"
        raise ValueError(f"{given}; give fewer --slots, or a smaller --capacity") from error
    name = options.model_name or options.checkpoint.absolute().name
    manifest = options.checkpoint / "config.json"
    served = Served(
        name,
        tokenizer,
        chat_trained=is_chat_trained(meta),
        capacity=capacity,
        trained_positions=engine.trained_positions,
        choices=min(MOST_CHOICES, options.slots + options.max_waiting),
        max_tokens=min(options.max_tokens, capacity - 1),
        created=int(manifest.stat().st_mtime) if manifest.exists() else 0,
    )
    worker = Worker(engine, options.slots, options.max_waiting)
    loopback = options.host in ("localhost", "::1") or options.host.startswith("127.")
    limits = Limits(options.max_body_bytes, options.timeout)
    server = Server(served, worker, limits, api_key=options.key, loopback=loopback)

    port = listener.getsockname()[1]
    shown = f"[{options.host}]" if ":" in options.host else options.host
    print(f"model    {name} step {meta['step']}, {model.num_params() / 1e6:.1f}M parameters on {device}", flush=True)
    if not served.chat_trained:
        print("note     a base model: it was not trained to chat, and only continues text", flush=True)
    if not loopback:
        guard = "with a key" if options.key else "WITHOUT A KEY: whoever reaches it may use it"
        print(f"note     listening beyond this machine, {guard}", flush=True)
    trained = served.trained_positions
    beyond = f" (trained on {trained}; beyond them text gets worse)" if capacity > trained else ""
    slots = f"{options.slots} slots of {capacity} tokens{beyond}"
    print(f"serve    http://{shown}:{port}/ | API at /v1, {slots}", flush=True)
    config = configured(server.app, timeout=options.connection_timeout, grace=GRACE_SECONDS)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        worker.close()
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Serves as `args` say, sys.argv's by default. Returns the exit code."""
    return run_command(Options, "serve", args, run)


if __name__ == "__main__":
    sys.exit(main())
