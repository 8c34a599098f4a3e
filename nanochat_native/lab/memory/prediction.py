"""Predict the memory of a step by part, from the tensors that are alive at each point that may be its peak."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_native.lab.memory.options import Options, model_config, sized
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.ops import backends
from nanochat_native.optim.buckets import Layout, assign, split, split_rows

# float32 numbers that an optimizer keeps for each element of the matrices of the blocks, last, and of all others.
STATE = {"hybrid": (2, 1), "muon_sgd": (0, 1), "adamw": (2, 2), "adam": (2, 2), "sgd_momentum": (1, 1), "sgd": (0, 0)}
LIBRARY_BYTES = 32 << 20  # torch's workspace for cuBLAS on Hopper; 8 MiB on older GPUs
THREAD_SCRATCH_BYTES = 1 << 20  # limit of the blocks of a product that a thread of torch's library copies


@functools.cache
def without_memory(config: GPTConfig) -> GPT:
    """Return a model on the meta device."""
    with torch.device("meta"):
        return GPT(config)


class Snapshot(NamedTuple):
    """The live bytes by part at a point of a step that may be the peak of its phase."""

    phase: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def predict(options: Options) -> dict[str, int]:
    """Return the bytes by part at the peak of the step, on the rank that holds most. Their sum is the peak.

    The bytes are those of the tensors, which are the same on every processor. On a CPU `library_scratch` bounds the
    additional memory that torch's library takes from the same allocator; `kernel_scratch` estimates the memory that the
    kernels take elsewhere.
    """
    return max(snapshots(options), key=lambda snapshot: snapshot.bytes).parts


def peak(options: Options) -> int:
    """Return the bytes at the peak of the step."""
    return sum(predict(options).values())


def snapshots(options: Options) -> list[Snapshot]:
    """Return the snapshots of a step on the native kernels that may be its peak, in order.

    Within a block the backward pass of the MLP needs more than the rest of it: attention, rotations and norms.
    """
    options = sized(options)
    config = model_config(options)
    model = without_memory(config)
    C, K, L = config.n_embd, config.n_kv_head * config.head_dim, config.n_layer  # channels of the stream, of keys
    tokens, again, gpu = options.tokens, options.grad_checkpoint, options.device == "cuda"
    e = 2 if options.dtype == "bfloat16" else 4  # bytes of an activation
    stream = tokens * e * C
    attention, mlp, head = 2 * C * (C + K), 8 * C * C, model.lm_head.weight.numel()  # elements
    block = attention + mlp
    tables = [config.padded_vocab_size * K if config.has_value_embedding(layer) else 0 for layer in range(L)]
    later = [sum(tables[layer + 1 :]) for layer in range(L)]  # elements
    used = C * config.vocab_size  # elements of lm_head without the rows that pad it
    weights, state = static_bytes(model, options.nproc, options.optimizer)
    held = weights if options.nproc > 1 or options.micro_batches > 1 else 0  # gradients that are allocated throughout
    kept = [kept_of_block(config, layer, e, tokens) for layer in range(L)]
    if again:  # the stream before a block is its input, which is saved
        kept = kept[:1] * L
    first = (1 + config.smear) * stream + 4 * tokens
    at_input = [first + (layer * stream if again else sum(kept[:layer])) for layer in range(L)]  # of each block
    at_loss = activation_bytes(options)

    # On a GPU: the logits; if they come in several chunks, also the gradient of lm_head, summed in float32.
    rows = min(tokens, max(1, backends.logit_bytes() // (e * config.vocab_size)))
    logits = (rows * config.vocab_size * e + (4 * head if rows < tokens else 0)) if gpu else 0
    # The end of the last block: the stream before and after attention and after the MLP, the last norm, and the output
    # of the MLP. With checkpointing the MLP: the norms before attention and before the MLP, the stream between these,
    # the hidden tensor and the output.
    last = 8 * stream if again else (4 + (L > 1 and not config.residual_scalars)) * stream + 4 * tokens
    last += config.backout * stream
    # (phase, bytes of gradients, bytes of activations, bytes of temporary tensors)
    found: list[tuple[str, int, int, int]] = [
        ("forward", held, at_input[-1] + (0 if again else kept[-1]), last),
        # The loss computes its gradients in the forward pass.
        ("forward", held + e * used, at_loss, stream + 4 * tokens + logits),
        # The gradients are scaled. That of lm_head gets its rows of zeros, and is then converted to float32, next to
        # the original.
        ("backward", held + e * (used + head), at_loss, 2 * stream),
        *([("backward", held + 6 * head, at_loss, stream)] if e == 2 else []),
    ]
    for layer in reversed(range(L)):
        # The MLP: the gradients of its output, of the hidden tensor and of its input; those of both weights, the last
        # of which a CPU converts to float32 next to the original.
        work = 6 * stream + 32 * C * C + (8 * C * C if e == 2 and not gpu else 0)
        gradients = held or 4 * (head + (L - 1 - layer) * block + later[layer])
        # Those of x0, and of the stream after the middle block.
        streams = (config.residual_scalars and layer < L - 1) + (config.backout and layer > L // 2)
        found.append(("backward", gradients, at_input[layer] + kept[layer], work + streams * stream))
        if tables[layer]:
            # The projections: the gradients of q, k, v, of their input and of the stream.
            work = tokens * e * (4 * C + 2 * K) + 4 * tables[layer] * bool(held)
            gradients = held or gradients + 4 * (block + tables[layer])
            found.append(("backward", gradients, at_input[layer] + (1 + config.residual_scalars) * stream, work))
    # The embedding, after all other gradients: those of its norm and of its rows, which are then converted to float32.
    # If gradients are held, that of the table is added to them.
    work = 2 * stream + (4 * tokens * C if e == 2 else 0) + (4 * head if held else 0)
    found.append(("backward", weights, stream + 4 * tokens, work))
    found.append(("optimizer step", weights, 0, optimizer_work(model, options)))

    always = {
        "weights": weights,
        "rotary tables": model.cos.nbytes + model.sin.nbytes,
        "tokens": 16 * tokens * options.micro_batches,
        "optimizer state": state,
        "library's workspace": LIBRARY_BYTES if gpu else 0,
    }
    copies = 2 * (L * block + head) if e == 2 else 0  # of the weights in products, from their first use on
    names = ("gradients", "weights in bfloat16", "activations", "temporary tensors")
    return [
        Snapshot(phase, always | dict(zip(names, (gradients, copies, *rest), strict=True)))
        for phase, gradients, *rest in found
    ]


def kept_of_block(config: GPTConfig, layer: int, element: int, tokens: int) -> int:
    """Return the bytes that a block keeps for its backward pass.

    With residual scalars, that includes the stream before the block. The first block has it from the embedding.
    """
    stream = element * config.n_embd if config.residual_scalars and layer else 0
    return tokens * (block_activations(config, element) + stream)


def block_activations(config: GPTConfig, element: int) -> int:
    """Return the bytes per token that a block keeps for its backward pass. Sums of norms and attention are float32."""
    C, K = config.n_embd, config.n_kv_head * config.head_dim
    return element * (8 * C + 2 * K) + 4 * (2 + 2 * config.n_head + config.n_kv_head)


def activation_bytes(options: Options) -> int:
    """Return the bytes kept for the backward pass: of each block, and of the norms before and after all blocks.

    Smear keeps the embedding before it, and backout the last stream.
    """
    options = sized(options)
    config, element = model_config(options), 2 if options.dtype == "bfloat16" else 4
    width, L = element * config.n_embd, config.n_layer
    blocks = options.tokens * (L - 1) * width
    if not options.grad_checkpoint:
        blocks = sum(kept_of_block(config, layer, element, options.tokens) for layer in range(L))
    return options.tokens * (2 * (width + 4) + (config.smear + config.backout) * width) + blocks


def static_bytes(model: GPT, ranks: int, optimizer: str = "hybrid") -> tuple[int, int]:
    """Return the bytes of (weights, optimizers' state) on the rank that has most of both."""
    per_end, per_matrix = STATE[optimizer]
    others = [p for name, p in model.named_parameters() if not name.startswith("transformer.h.")]
    by_rows = model.parameters() if optimizer == "adamw" else others
    rows = sum(split_rows(parameter, ranks).shard for parameter in by_rows)
    weights, state = 4 * ranks * rows, 4 * per_end * rows
    held = [0] * ranks
    for run, layout in _runs(model, ranks) if optimizer != "adamw" else ():
        weights += 4 * ranks * layout.shard
        for parameter, owner in zip(run, layout.owners, strict=True):
            held[owner] += 4 * per_matrix * parameter.numel()
    return weights, state + max(held)


def _runs(model: GPT, ranks: int) -> Iterator[tuple[list[Tensor], Layout]]:
    """Yield the matrices of each bucket of Muon, and their layout."""
    matrices = [(name, p) for name, p in model.named_parameters() if name.startswith("transformer.h.")]
    runs = [[parameter for _, parameter in run] for run in split(matrices, ranks)]
    return zip(runs, assign(runs, ranks), strict=True)


def optimizer_work(model: GPT, options: Options) -> int:
    """Return the larger of the temporary bytes of clipping and those of the optimizers."""
    gpu, parameters = options.device == "cuda", list(model.parameters())
    clipping = 0 if gpu else 12 * sum(p.size(0) for p in parameters)  # the norm of each row, in float32 and in float64
    work = 0
    if options.optimizer in ("hybrid", "muon_sgd"):
        # Matrices of one shape are a batch: the update, and on a CPU its orthogonalised copy, on a GPU 16-bit matrices
        # and, with today's recipe, the copy too.
        copy = 4 if gpu and options.architecture == "today" else 0
        batches: Counter[tuple[int, ...]] = Counter()
        for bucket, (run, layout) in enumerate(_runs(model, options.nproc)):
            own = bucket if options.nproc > 1 else 0
            batches.update((own, owner, *p.shape) for p, owner in zip(run, layout.owners, strict=True))
        for (*_, M, N), count in batches.items():
            work = max(work, count * ((8 + copy) * M * N + (10 * min(M, N) ** 2 if gpu else 0)))
    elif options.optimizer == "adam":
        # The root of exp_avg_sq: on a GPU for all parameters with one rate; on a CPU for one tensor, with its quotient,
        # while the root of the previous tensor still exists. The two largest tensors of a block follow each other, and
        # so do value embeddings.
        head, largest = model.lm_head.weight.numel(), max(p.numel() for p in model.blocks[0].parameters())
        tables = [p.numel() for name, p in model.named_parameters() if name.startswith("value_embeds.")]
        rates = (head, sum(tables), model.num_params() - 2 * head - sum(tables))
        work = 4 * max(rates) if gpu else max(8 * head, 12 * largest, *(12 * table for table in tables[1:]))
    return max(clipping, work)


def library_scratch(options: Options) -> int:
    """Return a bound on the bytes that oneDNN takes from torch's allocator for bfloat16 products on a CPU.

    The amount depends on the instruction set: nothing with AVX2; the result in float32 with AVX-512 alone; blocks of
    the operands with AVX512-BF16 or AMX. The bound is therefore copies of both operands, the result in float32, and
    THREAD_SCRATCH_BYTES for each of torch's threads. The gradient of a weight is a sum over the tokens, of which each
    thread may hold its own part. The products of the MLP are the largest of a model.
    """
    options = sized(options)
    if options.device != "cpu" or options.dtype != "bfloat16":
        return 0
    tokens, C, threads = options.tokens, model_config(options).n_embd, torch.get_num_threads()
    weight = 4 * C * C
    result = (
        2 * tokens * C + 2 * weight + 4 * tokens * 4 * C
    )  # of the layer that widens, or the gradient of the other layer
    gradient = 2 * tokens * 5 * C + 4 * weight * threads
    return max(result, gradient) + THREAD_SCRATCH_BYTES * threads


def kernel_scratch(options: Options) -> int:
    """Estimate the bytes of the one workspace that the CPU kernels share, outside torch's allocator."""
    options = sized(options)
    config, tokens = model_config(options), options.tokens
    C, V = config.n_embd, config.vocab_size
    rows = min(tokens, 512, max(64, (24 << 20) // (4 * V)))  # in a chunk of logits
    # With bfloat16: float32 or packed copies of the weight, its gradient, and the packed gradient of the logits.
    in_16_bits = 8 * (V + rows) * C + 2 * rows * V if options.dtype == "bfloat16" else 0
    needs = [4 * rows * (V + C) + in_16_bits]
    heads = options.device_batch_size * config.n_kv_head
    needs.append(8 * tokens * config.n_kv_head * config.head_dim)  # keys and values
    ranges = min(-(-16 // heads), -(-options.max_seq_len // 256))  # ranges of keys, each with its part of dq
    needs.append(4 * ranges * tokens * C if ranges > 1 else 0)
    if options.optimizer in ("hybrid", "muon_sgd"):
        shapes = Counter(tuple(p.shape) for p in without_memory(config).transformer["h"].parameters())
        for (M, N), count in shapes.items():
            small = 32 if max(M, N) >= 4 * min(M, N) else 8  # bytes per element of the Gram matrices
            needs.append(count * (4 * M * N * (2 if M < N else 1) + small * min(M, N) ** 2))
            if options.dtype == "bfloat16":  # four packed copies of a matrix, and three of a Gram matrix
                needs.append(count * (8 * M * N + 6 * min(M, N) ** 2))
    return max(needs)


def largest_batch(options: Options, available: int) -> int:
    """Return the largest device_batch_size whose predicted peak is at most `available` bytes, or 0."""

    def fits(size: int) -> bool:
        return peak(dataclasses.replace(options, device_batch_size=size)) <= available

    size, step = 0, 1
    while fits(size + step):
        size, step = size + step, 2 * step
    while step > 1:
        step //= 2
        size += step if fits(size + step) else 0
    return size
