"""How a batch is cut into what fits the device, and what memory a run takes."""

import dataclasses

from nanochat_native.runs.config import TrainConfig
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import UNSET

CPU_ROWS = 8  # the caches of a CPU hold little more; larger micro-batches are not faster there
GPU_SHARE = 0.7  # of the free memory, for activations: the rest is for weights, optimizer state and workspaces
PROCESS_BYTES = 300 << 20  # Python and torch themselves; on a GPU, about what a CUDA context takes
LOSS_CHUNK_BYTES = 64 << 20  # logits that linear_cross_entropy holds at a time, about


def size_batch(config: TrainConfig, *, row_bytes: int, free_bytes: int | None, world_size: int) -> TrainConfig:
    """Fill in device_batch_size: the largest divisor of a rank's rows that fits, then check the division.

    row_bytes: activations of one sequence. free_bytes: memory of the GPU; None on a CPU.
    Raises ConfigError, with sizes that work, when the total batch cannot be cut into such micro-batches.
    """
    tokens_a_row = config.max_seq_len * world_size
    rows, rest = divmod(config.total_batch_size, tokens_a_row)
    if config.device_batch_size == UNSET and not rest:
        limit = CPU_ROWS if free_bytes is None else max(1, int(GPU_SHARE * free_bytes / row_bytes))
        config = dataclasses.replace(config, device_batch_size=largest_divisor(rows, limit))
    accumulation_steps(config, world_size)
    return config


def accumulation_steps(config: TrainConfig, world_size: int = 1) -> int:
    """Micro-batches of one optimizer step on each rank.

    Raises ConfigError, with sizes that work, when total_batch_size is not a multiple of theirs.
    """
    total, length = config.total_batch_size, config.max_seq_len
    rows = max(1, config.device_batch_size)
    micro = rows * length * world_size
    if total % micro == 0:
        return total // micro
    below = total // micro * micro
    proposals = " or ".join(str(size) for size in (below, below + micro) if size)
    ranks = f" x {world_size} ranks" if world_size > 1 else ""
    message = (
        f"--total-batch-size {total} is no multiple of --device-batch-size {rows} x --max-seq-len {length}{ranks} "
        f"= {micro} tokens: take --total-batch-size {proposals}"
    )
    if total % (length * world_size) == 0:
        message += f", or --device-batch-size {largest_divisor(total // (length * world_size), rows)}"
    raise ConfigError(message)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`."""
    return next(n for n in range(min(number, limit), 0, -1) if number % n == 0)


def row_bytes(config: TrainConfig, *, n_embd: int, kv_channels: int, element_bytes: int) -> int:
    """Activations that one sequence keeps for the backward pass, bytes.

    A layer keeps two normalised inputs, q, k, v, the attention's output and the MLP's hidden tensor of 4 n_embd; with
    gradient checkpointing only its input, and one layer at a time the rest.
    """
    layer = 8 * n_embd + 2 * kv_channels
    kept = config.depth * n_embd + layer if config.grad_checkpoint else config.depth * layer
    ends = 3 * n_embd  # embedding, last norm, and the loss's gradient
    working = 12 * n_embd  # of the layer that is computed: hidden tensors and their gradients
    return config.max_seq_len * (kept + ends + working) * element_bytes


def memory_bytes(config: TrainConfig, *, num_params: int, row_bytes: int) -> int:
    """What a run holds on its device, bytes: float32 weights, gradients and two moments, activations, logits of a
    chunk."""
    return 16 * num_params + config.device_batch_size * row_bytes + LOSS_CHUNK_BYTES + PROCESS_BYTES
