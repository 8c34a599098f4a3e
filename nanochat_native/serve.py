"""python -m nanochat_native.serve: serve a trained model with OpenAI's API and a chat page."""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_native.data.conversations import has_code_tokens, is_chat_trained
from nanochat_native.inference.engine import Engine
from nanochat_native.model.quantization import Quantization, check_quantization
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.command import run_command
from nanochat_native.runtime.hardware import autocast, pick_device

EXTRA = "serve requires starlette and uvicorn: pip install 'nanochat-native[serve]'"
BACKLOG = 1024  # connections that wait to be accepted
GRACE_SECONDS = 5  # for running requests when the server shuts down
MAX_SLOTS = 4096
MAX_SECONDS = 1e6  # largest timeout; asyncio's clock overflows after a few hundred years


@dataclass
class Options:
    """Serve a trained model: OpenAI's /v1/completions and /v1/chat/completions, and a chat page at /.

    The guide explains it: docs/guide/13-using-it.md.
    """

    checkpoint: Path
    """Run folder of `python -m nanochat_native.train` or finetune."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    model_name: str | None = None
    """Name of the model in requests; default: the name of the run folder."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable only from this machine."""
    port: int = 8000
    """Port to listen on; 0 means any free port."""
    api_key: str | None = None
    """Key that requests must send. The environment variable NANOCHAT_API_KEY sets it too, and does not appear in
    process lists."""
    slots: int = 8
    """Number of requests that run at once."""
    max_waiting: int = 64
    """Number of requests that can wait for a slot; further requests are answered with status 429."""
    max_tokens: int = 4096
    """Largest number of tokens that a request can ask for."""
    capacity: int | None = None
    """Largest number of tokens of a prompt and its continuation; default: the model's positions, at most 4096."""
    max_body_bytes: int = 1 << 20
    """Largest size of a request in bytes; a larger request is answered with status 413."""
    timeout: float = 300.0
    """Time limit for a request in seconds; a request that exceeds it is answered with status 408 or 504."""
    connection_timeout: int = 30
    """Seconds to wait for a client to send the headers of a request, or to read an answer, before the connection is
    closed."""
    calculator: bool = True
    """Compute the calculations that the model writes as code in a chat, and give it the results."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Device to run on; default: a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights and the cache; default: float32, on a CUDA GPU 16 bits."""
    quantize: Quantization | None = None
    """int8: generate with the matrices in int8, on a CPU. `evaluate --quantize int8` measures the cost."""

    def check(self) -> None:
        """Raise ValueError for a value out of range."""
        for name, least in (("slots", 1), ("max_waiting", 0), ("max_tokens", 1), ("max_body_bytes", 1), ("port", 0)):
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be a whole number >= {least}, got {getattr(self, name)}")
        for name in ("timeout", "connection_timeout"):
            if not 0 < getattr(self, name) <= MAX_SECONDS:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be > 0 and <= {MAX_SECONDS:g} seconds, got {getattr(self, name):g}")
        if self.slots > MAX_SLOTS:
            raise ValueError(f"--slots must be <= {MAX_SLOTS}, got {self.slots}")
        for name in ("host", "model_name"):
            if getattr(self, name) == "":
                raise ValueError(f"--{name.replace('_', '-')} is empty; omit it or set a value")
        if self.port > 65535:
            raise ValueError(f"--port must be <= 65535, got {self.port}")
        if self.key == "":
            raise ValueError("the API key is empty; omit it or set a value")
        if self.key is not None and not all("!" <= letter <= "~" for letter in self.key):
            raise ValueError("the API key must consist of visible ASCII characters")

    @property
    def key(self) -> str | None:
        """The API key, from --api-key or the environment; None for no key."""
        return self.api_key if self.api_key is not None else os.environ.get("NANOCHAT_API_KEY")


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on host and port. Raises an OSError that names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)  # before the address is printed
    except OSError as error:
        listener.close()
        raise OSError(f"{host} port {port}: {error.strerror or error}; choose another --port or --host") from None
    return listener


def run(options: Options) -> int:
    """Serve until SIGINT or SIGTERM. Return the exit code.

    Raises ImportError without the extra, ValueError for flags out of range, OSError for an address that is not
    available, and the errors of load_model.
    """
    options.check()
    try:
        from nanochat_native.inference.server.app import Limits, Server
        from nanochat_native.inference.server.connection import InterruptibleServer, configured
        from nanochat_native.inference.server.protocol import MAX_CHOICES, Served
        from nanochat_native.inference.server.worker import Worker
    except ImportError as error:
        raise ImportError(f"{EXTRA} ({error})") from None

    device = pick_device(options.device)
    check_quantization(options.quantize, device)
    precision = autocast(device, options.dtype)
    model, tokenizer, meta = load_model(
        options.checkpoint, options.step, device, warn=lambda message: print(message, file=sys.stderr)
    )
    listener = bind(options.host, options.port)
    capacity = min(model.max_positions, 4096) if options.capacity is None else options.capacity
    if not 2 <= capacity <= model.max_positions:
        raise ValueError(f"--capacity must be from 2 to {model.max_positions}, got {capacity}")
    try:
        with precision:
            engine = Engine(model, tokenizer, slots=options.slots, capacity=capacity, quantize=options.quantize)
    except RuntimeError as error:
        given = f"{options.slots} slots of {capacity} tokens do not fit into memory"
        raise ValueError(f"{given}; reduce --slots or --capacity") from error
    name = options.model_name or options.checkpoint.absolute().name
    manifest = options.checkpoint / "config.json"
    served = Served(
        name,
        tokenizer,
        chat_trained=is_chat_trained(meta),
        calculator=options.calculator and is_chat_trained(meta) and has_code_tokens(tokenizer),
        capacity=capacity,
        trained_positions=engine.trained_positions,
        choices=min(MAX_CHOICES, options.slots + options.max_waiting),
        max_tokens=min(options.max_tokens, capacity - 1),
        created=int(manifest.stat().st_mtime) if manifest.exists() else 0,
    )
    worker = Worker(engine, options.slots, options.max_waiting)
    loopback = options.host in ("localhost", "::1") or options.host.startswith("127.")
    limits = Limits(options.max_body_bytes, options.timeout)
    server = Server(served, worker, limits, api_key=options.key, loopback=loopback)

    port = listener.getsockname()[1]
    shown = f"[{options.host}]" if ":" in options.host else options.host
    precision_flags = "".join(f", {value} weights" for value in (options.dtype, options.quantize) if value is not None)
    print(
        f"model    {name} step {meta['step']}, {model.num_params() / 1e6:.1f}M parameters on {device}{precision_flags}",
        flush=True,
    )
    if not served.chat_trained:
        print("note     a base model: it was not trained to chat and only continues text", flush=True)
    if not loopback:
        guard = "with an API key" if options.key else "WITHOUT AN API KEY: anyone who can reach it can use it"
        print(f"note     reachable from other machines, {guard}", flush=True)
    trained = served.trained_positions
    beyond = f" (trained on {trained}; quality drops beyond that)" if capacity > trained else ""
    slots = f"{options.slots} slots of {capacity} tokens{beyond}"
    print(f"serve    http://{shown}:{port}/ | API at /v1, {slots}", flush=True)
    config = configured(server.app, timeout=options.connection_timeout, grace=GRACE_SECONDS)
    try:
        InterruptibleServer(config).run(sockets=[listener])
    finally:
        worker.close()
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return run_command(Options, "serve", args, run)


if __name__ == "__main__":
    sys.exit(main())
