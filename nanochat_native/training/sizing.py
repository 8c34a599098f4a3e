"""Divides a batch into micro-batches that fit the device, and estimates the memory of a run."""

import dataclasses

from nanochat_native.model.config import GPTConfig
from nanochat_native.runs.config import TrainConfig
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import is_unset

CPU_ROWS = 8  # a CPU's caches hold little more, and larger micro-batches are not faster there
GPU_SHARE = 0.7  # of the free memory, for activations; weights, optimizer state and workspaces take the rest
PROCESS_BYTES = 300 << 20  # Python and torch; on a GPU, about the size of a CUDA context
LOSS_CHUNK_BYTES = 64 << 20  # about the logits that linear_cross_entropy holds at a time


def resolve_batch_size(config: TrainConfig, *, row_bytes: int, free_bytes: int | None, world_size: int) -> TrainConfig:
    """Return the config with its device_batch_size: if it is unset, the largest divisor of a rank's rows that fits.

    Args:
        row_bytes: activations of one sequence.
        free_bytes: free memory of the GPU; None on a CPU.

    Raises:
        ConfigError: with sizes that work, if the total batch is no multiple of such micro-batches.
    """
    tokens_a_row = config.max_seq_len * world_size
    rows, rest = divmod(config.total_batch_size, tokens_a_row)
    if is_unset(config, "device_batch_size") and not rest:
        limit = CPU_ROWS if free_bytes is None else max(1, int(GPU_SHARE * free_bytes / row_bytes))
        config = dataclasses.replace(config, device_batch_size=largest_divisor(rows, limit))
    accumulation_steps(config, world_size)
    return config


def accumulation_steps(config: TrainConfig, world_size: int = 1) -> int:
    """Return the number of micro-batches of one optimizer step on each rank.

    Raises ConfigError, with sizes that work, if total_batch_size is no multiple of micro-batches on all ranks.
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
        f"--total-batch-size must be a multiple of --device-batch-size {rows} x --max-seq-len {length}{ranks} "
        f"= {micro} tokens, got {total}; use --total-batch-size {proposals}"
    )
    if total % (length * world_size) == 0:
        message += f", or --device-batch-size {largest_divisor(total // (length * world_size), rows)}"
    raise ConfigError(message)


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is not above `limit`."""
    return next(n for n in range(min(number, limit), 0, -1) if number % n == 0)


def row_bytes(config: TrainConfig, shape: GPTConfig, *, element_bytes: int) -> int:
    """Return the bytes of activations that one sequence keeps for the backward pass.

    A layer keeps two normalised inputs, q, k, v, the attention's output and the MLP's hidden tensor of 4 n_embd, and
    with residual scalars the residual stream. With gradient checkpointing each layer keeps only its input, and one
    layer at a time the rest. Attention to several conversations in a row keeps q, k, v and its output with up to a
    quarter of padding, and its output in the order of the row too.
    """
    n_embd = shape.n_embd
    layer = (8 + shape.residual_scalars) * n_embd + 2 * shape.n_kv_head * shape.head_dim
    if config.packing == "best-fit":
        layer += n_embd + (2 * n_embd + 2 * shape.n_kv_head * shape.head_dim) // 4
    kept = config.depth * n_embd + layer if config.grad_checkpoint else config.depth * layer
    ends = 3 * n_embd  # the embedding, the last norm and the gradient of the loss
    ends += shape.smear * n_embd  # the embedding before it
    if not config.grad_checkpoint:  # which keeps the first layer's input and the stream in the middle anyway
        ends += (shape.residual_scalars + shape.backout * (1 if shape.residual_scalars else 2)) * n_embd
    working = 6 * n_embd  # gradients of the current MLP: of its output, its hidden tensor and its input
    return config.max_seq_len * (kept + ends + working) * element_bytes


def memory_bytes(config: TrainConfig, *, num_params: int, row_bytes: int) -> int:
    """Return the bytes that a run holds on its device: float32 weights, gradients and two moments, activations, the
    logits of a chunk, and in a bfloat16 run copies of the weights."""
    parameter = 18 if config.dtype == "bfloat16" else 16
    return parameter * num_params + config.device_batch_size * row_bytes + LOSS_CHUNK_BYTES + PROCESS_BYTES
