"""A training step on several ranks of this machine: tokens per second, and bytes that each rank sends.

`python -m nanochat_native.bench` starts this module, with torchrun for several ranks.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import buckets_of, clip_reduced_, overlap_backward, setup_optimizers
from nanochat_native.runtime import distributed
from nanochat_native.runtime.distributed import World

DEPTH, T, B, VOCABULARY = 4, 256, 8, 8192  # B x T tokens in total, for any number of ranks


def measure(world: World, repeats: int) -> dict[str, Any]:
    """Time steps on every rank. Returns the median, without the first two steps."""
    model = GPT(GPTConfig.from_depth(DEPTH, vocab_size=VOCABULARY, sequence_len=T))
    model.init_weights(seed=0)
    optimizers = setup_optimizers(model, process_group=world.group)
    buckets = buckets_of(optimizers)
    tokens = torch.randint(0, VOCABULARY, (B, T + 1), generator=torch.Generator().manual_seed(0))
    own = tokens[world.rank * B // world.size : (world.rank + 1) * B // world.size]
    inputs, targets = own[:, :-1].contiguous(), own[:, 1:].contiguous()
    times = []
    overlap = overlap_backward(buckets, model.parameters())
    for _ in range(repeats + 2):
        start = time.perf_counter()
        with overlap:
            model(inputs, targets).backward()
        clip_reduced_(optimizers, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        world.barrier()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    return {
        "ranks": world.size,
        "ms": seconds * 1e3,
        "tokens_per_second": B * T / seconds,
        "sent_bytes": sum(bucket.traffic_bytes() for bucket in buckets),
        "parameter_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }


def run(size: int, *, repeats: int) -> dict[str, Any]:
    """Return the row of `size` ranks with one thread each. Raises RuntimeError, with their output, if they fail."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)] if size > 1 else []
    command = [sys.executable, *launch, "-m", "nanochat_native.bench.ranks", str(repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"{size} ranks: {result.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return row


def describe(row: dict[str, Any], alone: dict[str, Any]) -> str:
    """Return a line of the table. alone: the row of one rank."""
    size, sent = row["ranks"], row["sent_bytes"]
    exact = 2 * (size - 1) * alone["parameter_bytes"] / size
    share = f", {100 * (sent / exact - 1):.1f}% above 2 (n - 1) / n of the parameters" if exact else ""
    return (
        f"training step on ranks  {size} x 1 thread, d{DEPTH} T {T} B {B} {row['ms']:9.1f} ms"
        f"  {row['tokens_per_second']:,.0f} tokens/s ({row['tokens_per_second'] / alone['tokens_per_second']:.2f}x one)"
        f"  {sent / 1e6:.1f} MB sent by a rank{share}"
    )


def main() -> None:
    torch.set_num_threads(1)
    with distributed.init_process_group() as world:
        row = measure(world, int(sys.argv[1]))
    if world.is_rank0:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
