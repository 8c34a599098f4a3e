"""Memory of a step, and what several ranks send and hold."""

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from nanochat_native.lab.memory.measurement import Step
from nanochat_native.lab.memory.options import Options, sized
from nanochat_native.lab.memory.prediction import (
    activation_bytes,
    peak,
    predict,
    snapshots,
    static_bytes,
    without_memory,
)
from nanochat_native.model.config import GPTConfig
from nanochat_native.optim.buckets import assign, split, split_rows

MIB = 2**20
# The run of chapter 1, and a model for GPUs.
RUN = Options(depth=4, device_batch_size=8, max_seq_len=256, vocab_size=8192, dtype="float32", device="cpu")
PLAN = Options(depth=20, device_batch_size=16, max_seq_len=2048, vocab_size=65536, dtype="bfloat16", device="cpu")
MODELS = {"d4": RUN, "d20": PLAN}
RANKS = (1, 2, 4, 8)


def memory_moments() -> dict[str, Any]:
    """Predict the memory at each moment of a step that may be its peak, by part, for the run of chapter 1 and a d20.

    The bytes are those of live tensors, from the shapes alone.
    """
    found: dict[str, Any] = {}
    for name, options in MODELS.items():
        moments = snapshots(options)
        parts = predict(options)
        found[name] = {
            "peak": peak(options) / MIB,
            "phase": max(moments, key=lambda moment: moment.bytes).phase,
            "at_peak": {part.replace(" ", "_").replace("'", ""): size / MIB for part, size in parts.items()},
            "share_of_activations": parts["activations"] / peak(options),
            "moments": [
                {"phase": moment.phase} | {part: round(size / MIB, 2) for part, size in moment.parts.items()}
                for moment in moments
            ],
        }
    return found


def memory_claim() -> dict[str, Any]:
    """Compare "weights in two bytes and two moments" with all that a step of a d20 holds, in bytes.

    The first is the estimate of the original guide for a model that it takes to have 270M parameters.
    """
    claimed = 270e6
    model = without_memory(GPTConfig.from_depth(20, vocab_size=65536, sequence_len=2048))
    weights, state = static_bytes(model, 1)
    return {
        "claimed_parameters": claimed,
        "claimed_bytes": claimed * 2 + claimed * 8,
        "parameters": model.num_params(),
        "weights": weights,
        "state_hybrid": state,
        "state_adamw": static_bytes(model, 1, "adamw")[1],
        "peak": peak(PLAN),
        "factor": peak(PLAN) / (claimed * 10),
    }


def checkpointing() -> dict[str, Any]:
    """Predict activations and peak of a step with and without gradient checkpointing, in MiB.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    found: dict[str, Any] = {}
    for name, options in MODELS.items():
        model = without_memory(GPTConfig.from_depth(options.depth, vocab_size=options.vocab_size, sequence_len=256))
        head = model.lm_head.weight.numel()
        blocks = model.num_params() - 2 * head
        # Products with weights, in numbers of weights: one forward, two backward, and one more for the blocks.
        row: dict[str, float] = {"extra_products": blocks / (3 * (blocks + head))}
        for word, again in (("kept", False), ("recomputed", True)):
            own = dataclasses.replace(options, grad_checkpoint=again)
            row |= {f"activations_{word}": activation_bytes(own) / MIB, f"peak_{word}": peak(own) / MIB}
        row["activations_ratio"] = row["activations_kept"] / row["activations_recomputed"]
        row["peak_ratio"] = row["peak_kept"] / row["peak_recomputed"]
        found[name] = row
    return found


def checkpointing_time(*, steps: int = 5) -> dict[str, Any]:
    """Time steps of a d4 with and without checkpointing in turn, as processor time of one thread, the best of each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        words = {"kept": False, "recomputed": True}
        variants = {word: Step(dataclasses.replace(RUN, grad_checkpoint=again)) for word, again in words.items()}
        best = dict.fromkeys(variants, float("inf"))
        for _ in range(steps):
            for word, step in variants.items():
                start = time.process_time()
                step()
                best[word] = min(best[word], time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    ratio = best["recomputed"] / best["kept"]
    return {f"ms_{word}": 1e3 * seconds for word, seconds in best.items()} | {"ratio": ratio}


def activations() -> dict[str, Any]:
    """Predict how the activations of a d4 in float32 grow with the length of a sequence, in MiB.

    A table of scores would take 4 B H T^2 bytes in each block, and is what `dense_scores` adds up.
    """
    rows = []
    for length in (256, 512, 1024, 2048):
        options = sized(dataclasses.replace(RUN, max_seq_len=length))
        heads = GPTConfig.from_depth(4, vocab_size=8192, sequence_len=length).n_head
        scores = 4 * options.depth * options.device_batch_size * heads * length**2
        rows.append({"T": length, "kept": activation_bytes(options) / MIB, "dense_scores": scores / MIB})
    config = GPTConfig.from_depth(4, vocab_size=8192, sequence_len=256)
    return {
        "rows": rows,
        "growth": rows[-1]["kept"] / rows[0]["kept"],
        "growth_of_scores": rows[-1]["dense_scores"] / rows[0]["dense_scores"],
        "numbers_of_a_block_per_token": 8 * config.n_embd + 2 * config.n_kv_head * config.head_dim,
        "width": config.n_embd,
    }


def gradients_between_steps() -> dict[str, Any]:
    """Predict the gradients that a d20 holds at the peak of each phase, with one micro-batch and with two, in MiB."""
    found: dict[str, Any] = {}
    for name, count in (("one", 1), ("two", 2)):
        moments = snapshots(dataclasses.replace(PLAN, micro_batches=count))
        row = {}
        for phase in ("forward", "backward", "optimizer step"):
            highest = max((moment for moment in moments if moment.phase == phase), key=lambda moment: moment.bytes)
            row[phase.split()[0]] = highest.parts["gradients"] / MIB
        found[name] = row
    return found


def memory_ranks() -> dict[str, Any]:
    """Predict what a rank holds of a d20, in MiB, on 1 to 8 ranks, and what it sends in a step.

    Rajbhandari et al. 2020, "ZeRO": the optimizer state exists once, weights and gradients on every rank.
    """
    model = without_memory(GPTConfig.from_depth(20, vocab_size=65536, sequence_len=2048))
    parameter_bytes = 4 * model.num_params()
    found: dict[str, Any] = {
        "parameters": parameter_bytes / MIB,
        "peaks": {
            name: _peaks(dataclasses.replace(PLAN, depth=depth, grad_checkpoint=again))
            for name, depth, again in (("d20", 20, False), ("d20_recomputed", 20, True), ("d32_recomputed", 32, True))
        },
    }
    for optimizer in ("hybrid", "adamw"):
        rows = []
        for ranks in RANKS:
            weights, state = static_bytes(model, ranks, optimizer)
            rows.append(
                {
                    "ranks": ranks,
                    "weights": weights / MIB,
                    "gradients": weights / MIB,
                    "state": state / MIB,
                    "sent": 2 * (ranks - 1) * (weights // ranks) / MIB,
                    "sent_at_least": 2 * (ranks - 1) / ranks * parameter_bytes / MIB,
                }
            )
        found[optimizer] = rows
    return found


def _peaks(options: Options) -> dict[str, float]:
    """Return the peak on one rank and on each of eight, in MiB."""
    one, eight = (peak(dataclasses.replace(options, nproc=ranks)) / MIB for ranks in (1, 8))
    return {"one": one, "eight": eight, "ratio": one / eight}


def owners() -> dict[str, Any]:
    """Assign the matrices of a d4 to four ranks, as Muon does, and count the multiplications of each rank."""
    ranks = 4
    model = without_memory(GPTConfig.from_depth(4, vocab_size=8192, sequence_len=256))
    matrices = [(name, p) for name, p in model.named_parameters() if name.startswith("transformer.h.")]
    runs = split(matrices, ranks)
    layouts = assign([[matrix for _, matrix in run] for run in runs], ranks)
    rows: list[dict[str, Any]] = []
    for run, layout in zip(runs, layouts, strict=True):
        for (name, matrix), owner in zip(run, layout.owners, strict=True):
            short, side = name.removeprefix("transformer.h.").removesuffix(".weight"), min(matrix.shape)
            work = side**2 * max(matrix.shape)
            rows.append({"matrix": short, "shape": list(matrix.shape), "owner": owner, "work": work})
    loads: list[int] = [sum(row["work"] for row in rows if row["owner"] == rank) for rank in range(ranks)]
    return {
        "ranks": ranks,
        "matrices": rows,
        "count": [sum(row["owner"] == rank for row in rows) for rank in range(ranks)],
        "work": loads,
        "most_over_mean": max(loads) * ranks / sum(loads),
    }


def rows_of_ranks() -> dict[str, Any]:
    """Split the rows of an embedding over ranks that do not divide them: padded, and with the remainder forgotten."""
    rows = []
    for vocabulary, ranks in ((50257, 8), (8192, 3), (65536, 8)):
        shard = split_rows(torch.empty(vocabulary, 4, device="meta"), ranks).shard // 4
        floored = vocabulary // ranks
        rows.append(
            {
                "vocabulary": vocabulary,
                "ranks": ranks,
                "rows_of_a_shard": shard,
                "padding": shard * ranks - vocabulary,
                "forgotten_if_floored": vocabulary - floored * ranks,
            }
        )
    return {"rows": rows}


def ring(values: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Add up the rows of `values` (n, n * k) by a ring: each rank sends one chunk to the next, 2 (n - 1) times.

    Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".

    Returns:
        What each rank holds at the end, (n, n * k), and the steps: in each, rank r sends chunk `chunk[r]`, and the
        receiver adds it (phase "reduce") or stores it (phase "gather"). `done` lists how many ranks each rank's chunks
        have been summed over.
    """
    n = values.size(0)
    held = values.clone().view(n, n, -1)  # rank, chunk, element
    terms = torch.ones(n, n, dtype=torch.int64)
    steps: list[dict[str, Any]] = []
    for step in range(2 * (n - 1)):
        phase, first = ("reduce", 0) if step < n - 1 else ("gather", 1)
        chunk = [(rank + first - step % (n - 1) if phase == "gather" else rank - step) % n for rank in range(n)]
        sent = torch.stack([held[rank, chunk[rank]] for rank in range(n)])
        counts = [int(terms[rank, chunk[rank]]) for rank in range(n)]
        for rank in range(n):
            to, what = (rank + 1) % n, chunk[rank]
            if phase == "reduce":
                held[to, what] += sent[rank]
                terms[to, what] += counts[rank]
            else:
                held[to, what] = sent[rank]
                terms[to, what] = counts[rank]
        steps.append({"phase": phase, "chunk": chunk, "done": terms.tolist()})
    return held.view(n, -1), steps


def ring_all_reduce(*, seed: int = 0) -> dict[str, Any]:
    """Run a ring on four ranks, count what each sends, and compare with one rank that collects all."""
    n, chunk = 4, 1000
    values = torch.randn(n, n * chunk, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    held, steps = ring(values)
    exact = values.sum(0)
    sent = len(steps) * chunk
    return {
        "ranks": n,
        "steps": steps,
        "numbers": n * chunk,
        "error": (held - exact).abs().max().item(),
        "sent_by_a_rank": sent,
        "sent_over_all": sent / (n * chunk),
        "received_by_a_collecting_rank": (n - 1) * n * chunk,
        "collecting_over_ring": (n - 1) * n * chunk / sent,
    }


def equal_gradients(*, seed: int = 0) -> dict[str, Any]:
    """Average equal float32 gradients over 2 to 8 ranks in three ways, and count the bits that change.

    If every rank has the same gradient, its mean is that gradient, and one rank would use it unchanged.
    """
    gradient = torch.randn(100_000, generator=torch.Generator().manual_seed(seed))
    rows = []
    for ranks in (2, 3, 4, 5, 6, 7, 8):
        each = gradient.expand(ranks, -1)
        total = each[0].clone()
        for other in each[1:]:
            total += other
        divided_first = (each[0] / ranks).clone()
        for other in each[1:]:
            divided_first += other / ranks
        ways = {
            "sum_then_divide": total / ranks,
            "divide_then_sum": divided_first,
            "float64": each.double().mean(0).float(),
        }
        rows.append({"ranks": ranks} | {name: _changed(mean, gradient) for name, mean in ways.items()})
    return {"rows": rows, "float64": max(row["float64"] for row in rows), "three": rows[1], "eight": rows[6]}


def _changed(mean: Tensor, gradient: Tensor) -> float:
    return (mean != gradient).double().mean().item()


def order_of_ranks(*, seed: int = 0) -> dict[str, Any]:
    """Average different float32 gradients of four ranks in all orders, in float32 and in float64, and compare bits."""
    values = torch.randn(4, 100_000, generator=torch.Generator().manual_seed(seed))
    orders = [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2], [3, 2, 1, 0]]
    found = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        means = []
        for order in orders:
            total = torch.zeros(values.size(1), dtype=dtype)
            for rank in order:
                total += values[rank].to(dtype)
            means.append((total / 4).float())
        different = torch.stack([mean != means[0] for mean in means[1:]]).any(0)
        found[name] = different.double().mean().item()
    return found


DEMONSTRATIONS = {
    "activations": activations,
    "checkpointing": checkpointing,
    "checkpointing-time": checkpointing_time,
    "equal-gradients": equal_gradients,
    "gradients-between-steps": gradients_between_steps,
    "memory-claim": memory_claim,
    "memory-moments": memory_moments,
    "memory-ranks": memory_ranks,
    "order-of-ranks": order_of_ranks,
    "owners": owners,
    "ring-all-reduce": ring_all_reduce,
    "rows-of-ranks": rows_of_ranks,
}
