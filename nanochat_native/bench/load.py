"""python -m nanochat_native.bench.load: start a server and load it with many clients, some of which hang up.

An answer is lost if its status is not 200, if it is incomplete, or if its text differs from an earlier answer to the
same prompt and seed.
"""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_native.runtime.command import run_command
from nanochat_native.runtime.hardware import resident_bytes

PROMPTS = (
    "def __init__(self",
    "import os\n",
    "class Tensor:\n",
    "for i in range(",
    "# The first\n",
    "try:\n    return",
)
SEEDS = 8  # few, so that requests repeat
HANG_UP = 0.1  # share of the requests at which the client disconnects early
WARM_SHARE = 0.2  # share of the time before the first measurement of memory


@dataclass
class Options:
    """Load-test a server with a closed loop: each client sends its next request when the last one is answered."""

    checkpoint: Path
    """Run folder to serve."""
    clients: int = 64
    """Number of clients at the same time."""
    seconds: float = 60.0
    """Duration of the test, seconds."""
    max_tokens: int = 32
    """Base length of an answer; requests ask for a half of it, for it, or for twice as many tokens."""
    slots: int = 8
    """Slots of the server."""


@dataclass
class Tally:
    answers: Counter[str] = field(default_factory=Counter)  # whole, streamed, hung up
    lost: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    texts: dict[tuple[Any, ...], str] = field(default_factory=dict)


async def ask(port: int, body: dict[str, Any], hang_up_after: int | None = None) -> tuple[int, bytes, float]:
    """Return (status, body, seconds to the first byte) of a POST to /v1/completions.

    With hang_up_after the client disconnects after that many bytes of the body.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began, first = time.monotonic(), 0.0
    try:
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(content)}"
        )
        writer.write(f"{head}\r\n\r\n".encode() + content)
        received = await reader.readuntil(b"\r\n\r\n")
        status, chunked, parts = int(received.split()[1]), b"chunked" in received.lower(), bytearray()
        while part := await reader.read(1 << 16):
            first = first or time.monotonic() - began
            parts += part
            if hang_up_after is not None and len(parts) >= hang_up_after:
                break
    finally:
        writer.close()
    if not chunked:
        return status, bytes(parts), first
    whole, rest = bytearray(), bytes(parts)
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        whole += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return status, bytes(whole), first


async def client(number: int, port: int, model: str, options: Options, until: float, found: Tally) -> None:
    rng = random.Random(number)
    while time.monotonic() < until:
        tokens = options.max_tokens * rng.choice((1, 2, 4)) // 2
        key = (rng.choice(PROMPTS), rng.randrange(SEEDS), tokens)
        stream = rng.random() < 0.5
        body = {"model": model, "prompt": key[0], "seed": key[1], "max_tokens": tokens, "stream": stream}
        began = time.monotonic()
        try:
            if stream and rng.random() < HANG_UP / 0.5:
                status, _, _ = await ask(port, body | {"max_tokens": 4 * options.max_tokens}, rng.randrange(1, 600))
                found.answers["hung up"] += 1
                if status != 200:
                    found.lost.append(f"status {status}")
                continue
            status, content, first = await ask(port, body)
            text, count = read(content, stream) if status == 200 else ("", 0)
        except (OSError, ValueError, KeyError, IndexError, asyncio.IncompleteReadError) as error:
            found.lost.append(repr(error))
            continue
        found.seconds.append(time.monotonic() - began)
        found.tokens += count
        if stream:
            found.first_seconds.append(first)
        found.answers["streamed" if stream else "whole"] += 1
        if status != 200:
            found.lost.append(f"status {status}: {content[:200]!r}")
        elif found.texts.setdefault(key, text) != text:
            found.lost.append(f"{key}: the text differs from an earlier answer")


def read(content: bytes, stream: bool) -> tuple[str, int]:
    """Return (text, number of tokens) of an answer. Raises ValueError for an incomplete answer."""
    if not stream:
        answer = json.loads(content)
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
    events = [event.removeprefix("data: ") for event in content.decode().split("\n\n") if event]
    if events[-1] != "[DONE]":
        raise ValueError(f"the stream ends with {events[-1][:200]!r}")
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    if choices[-1]["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"the stream ends with {choices[-1]}")
    return "".join(choice["text"] for choice in choices), len(choices) - 1


async def load(options: Options, port: int, pid: int, model: str) -> dict[str, Any]:
    """Run the clients. Returns their results and the server's memory from a fifth of the time on."""
    found, began = Tally(), time.monotonic()
    until = began + options.seconds
    memory: list[int] = []

    async def watch() -> None:
        await asyncio.sleep(WARM_SHARE * options.seconds)
        while time.monotonic() < until:
            memory.append(resident_bytes(pid))
            await asyncio.sleep(options.seconds / 20)

    clients = [client(number, port, model, options, until, found) for number in range(options.clients)]
    await asyncio.gather(watch(), *clients)
    took = time.monotonic() - began

    def quantiles(seconds: list[float]) -> dict[str, float]:
        cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [*seconds] * 99
        return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}

    return {
        "clients": options.clients,
        "seconds": took,
        "answers": dict(found.answers),
        "lost": found.lost,
        "tokens_per_second": found.tokens / took,
        "latency": quantiles(found.seconds),
        "first_byte": quantiles(found.first_seconds),
        "memory_bytes": memory,
    }


def run(options: Options) -> dict[str, Any]:
    """Start a server, load it, and stop it. Raises ChildProcessError if it does not start or does not stop cleanly."""
    command = [sys.executable, "-m", "nanochat_native.serve", "--checkpoint", str(options.checkpoint), "--port", "0"]
    command += ["--slots", str(options.slots), "--max-waiting", str(options.clients), "--model-name", "model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            line = next((line for line in server.stdout if line.startswith("serve ")), "")
            if not line:
                raise ChildProcessError(f"the server did not start: {server.stderr.read()[-500:]}")
            port = int(line.split("//")[1].split("/")[0].rsplit(":", 1)[1])
            result = asyncio.run(load(options, port, server.pid, "model"))
        finally:
            server.terminate()
        errors = server.stderr.read()
        code = server.wait(30)
    if code not in (0, -15, 143) or errors:
        raise ChildProcessError(f"the server ended with {code}: {errors[-500:]}")
    return result


def main(args: Sequence[str] | None = None) -> int:
    """Run the load test that `args`, or sys.argv, describes. Returns the exit code."""
    return run_command(Options, "bench.load", args, show)


def show(options: Options) -> int:
    """Run the load test and print its results. Returns 1 if an answer was lost, else 0."""
    result = run(options)
    lost, memory = result["lost"], [size / 1e6 for size in result["memory_bytes"]]
    print(
        f"{options.clients} clients, {result['seconds']:.1f} s | "
        + ", ".join(f"{n:,} {k}" for k, n in result["answers"].items())
    )
    print(f"lost     {len(lost)}" + "".join(f"\n         {what}" for what in lost[:10]))
    print(f"tokens   {result['tokens_per_second']:,.0f} per second in complete answers")
    for name, label in (("latency", "latency"), ("first_byte", "first")):
        print(f"{label:<8} " + ", ".join(f"{cut} {1e3 * value:,.0f} ms" for cut, value in result[name].items()))
    print(f"memory   {memory[0]:.1f} MB after warm-up, {memory[-1]:.1f} MB at the end, {max(memory):.1f} MB at most")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
