"""The words of a run: what it will do, where it is, how it ended and how to go on."""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from nanochat_native import ops
from nanochat_native.optim import describe_routing
from nanochat_native.runs.config import STDLIB, FinetuneConfig, command_of
from nanochat_native.runs.pictures import MISSING, plot_diagnosis, plot_loss
from nanochat_native.runtime import hardware
from nanochat_native.runtime.console import compact, duration
from nanochat_native.training import sizing

if TYPE_CHECKING:
    from nanochat_native.training.trainer import Trainer
from typing import TYPE_CHECKING

EXPECTED_MFU = {"cpu": 0.9, "cuda": 0.4}  # for the time that is announced before the first step


def announce(run: Trainer, notes: list[str]) -> None:
    """Print what will be done: machine, data, model, work, time, memory. notes: flags changed in a resumed run."""
    config, model, say = run.config, run.model.config, run.console.say
    served = {op: ops.serves(op, run.device)[0] for op in ops.OPERATORS}
    kernels = [f"{' '.join(op for op in served if served[op] == by)}: {by}" for by in sorted(set(served.values()))]
    if run.device.type == "cpu" and "native" in served.values():
        kernels.append(ops.instruction_set())
    say(f"device   {hardware.describe(run.device)} | torch {torch.__version__} | {config.dtype}")
    say(f"kernels  {' | '.join(kernels)}")
    peak = "unknown" if run.peak.flops is None else f"{compact(run.peak.flops)}FLOP/s"
    say(f"peak     {peak} ({run.peak.source})")
    say(f"data     {run.corpus.description}")

    num_params = run.model.num_params()
    memory = sizing.memory_bytes(config, num_params=num_params, row_bytes=run.row_bytes)
    say(
        f"model    d{model.n_layer}, {num_params / 1e6:.1f}M parameters, width {model.n_embd}, {model.n_head} heads | "
        f"{compact(run.flops_per_token)}FLOP a token | "
        f"memory about {memory / 1e9:.1f} of {hardware.memory(run.device)[1] / 1e9:.0f} GB"
    )
    say(f"optimizer {describe_routing(run.optimizers)}")
    if run.world.size > 1:
        sent = sum(bucket.traffic_bytes() for bucket in run.buckets)
        own, all_ = (sum(b.shard * b.flat_values.itemsize * n for b in run.buckets) for n in (1, run.world.size))
        say(
            f"ranks    {run.world.size} over {'NCCL' if run.device.type == 'cuda' else 'gloo'} | each owns "
            f"{own / 1e6:.1f} of {all_ / 1e6:.1f} MB of weights, and sends {sent / 1e6:.1f} MB a step"
        )

    tokens = config.num_iterations * config.total_batch_size
    flops = tokens * run.flops_per_token
    time = ""
    if run.peak.flops is not None:
        rate = run.peak.flops * run.world.size * EXPECTED_MFU[run.device.type]
        time = f", about {duration(flops / rate)}"
    say(
        f"batch    {config.device_batch_size} x {config.max_seq_len} x {run.accumulation_steps} = "
        f"{config.total_batch_size:,} tokens | {config.num_iterations} steps, {tokens:,} tokens "
        f"({tokens / len(run.corpus.train):.2g} epochs), {compact(flops)}FLOP{time}"
    )
    extras = [("tensorboard", "tensorboard/"), ("matplotlib", "loss.png")]
    missing = [f"no {what}: {module} is not installed" for module, what in extras if not find_spec(module)]
    say(" | ".join([f"run      {config.run_dir}", f"a checkpoint every {config.save_every} steps", *missing]))
    for note in notes:
        say(f"note     {note}: the run goes on, but no longer bit for bit as it would have")


def live_line(record: dict[str, Any], run: Trainer) -> str:
    """A train record in one line."""
    total, there = run.config.num_iterations, hardware.memory(run.device)[1]
    parts = [
        f"step {record['step']}/{total} {100 * record['step'] // total}%",
        f"loss {number(record['loss'])}",
        f"bpb {number(record['bpb'])}",
        f"gnorm {number(record['grad_norm'])}",
        f"lr x{record['lr_multiplier']:.2f}",
        f"mom {record['momentum']:.3f}",
        f"{1000 * record['seconds']:.0f} ms",
        f"{compact(record['tokens_per_second'])} tok/s",
        "mfu ?" if record["mfu"] is None else f"mfu {record['mfu']:.0%}",
        f"mem {record['memory_bytes'] / 1e9:.1f}/{there / 1e9:.0f} GB",
        f"data {record['data_seconds'] / record['seconds']:.0%}",
        f"eta {duration((total - record['step']) * run.seconds_per_step)}",
    ]
    return " | ".join(parts)


def number(value: float | None) -> str:
    """Three decimals; "?" for what is not known or not finite."""
    return "?" if value is None else f"{value:.3f}"


def summarize(run: Trainer, seconds: float, steps: int) -> dict[str, Any]:
    """Draw the plot, print how this call ended and the commands that go on, and return the figures.

    seconds, steps: of this call.
    """
    config, say = run.config, run.console.say
    rate = steps * config.total_batch_size / seconds
    if run.diverged:
        kept = (
            f"the checkpoint of step {run.saved_step} is kept" if run.saved_step >= 0 else "there is no checkpoint yet"
        )
        say(
            f"stopped  {run.skipped_in_a_row} steps in a row had no finite gradient; {kept}. "
            "Another run with lower rates (--matrix-lr, --embedding-lr) may get further."
        )
    parts = [f"step {run.step} of {config.num_iterations}", duration(seconds), f"{compact(rate)} tok/s"]
    if run.last_bpb is not None:
        parts.append(f"validation {run.last_bpb:.4f} bits per byte")
    if run.skipped:
        parts.append(f"{run.skipped} steps skipped")
    say(f"done     {' | '.join(parts)}")
    with run.console.isolated("plot"):
        say(f"plot     {plot_loss(config.run_dir) or MISSING}")
    looked = run.diagnosis
    if looked is not None and looked.count:
        cost = f"{1e3 * looked.seconds / looked.count:.0f} ms each, {looked.seconds / seconds:.1%} of the time"
        with run.console.isolated("plot of the layers"):
            say(f"layers   {plot_diagnosis(config.run_dir) or MISSING} | looked {looked.count} times, {cost}")

    if run.saved_step < run.step and not run.diverged:
        kept = f"the last checkpoint is of step {run.saved_step}" if run.saved_step >= 0 else "there is no checkpoint"
        say(f"unsaved  step {run.step} could not be saved: {kept}")
    if run.saved_step >= 0:
        for line in next_commands(run):
            say(line)
    return {
        "kind": "summary",
        "step": run.step,
        "num_iterations": config.num_iterations,
        "seconds": seconds,
        "tokens_per_second": rate,
        "validation_bpb": run.last_bpb,
        "skipped": run.skipped,
        "checkpoint_step": run.saved_step,
        "run_dir": str(config.run_dir),
    }


def next_commands(run: Trainer) -> list[str]:
    """Commands that go on from the newest checkpoint, a line each."""
    config = run.config
    folder = shlex.quote(str(config.run_dir))
    train = f"python -m nanochat_native.{command_of(config)} --resume {folder}"
    if run.saved_step < config.num_iterations:
        lines = [f"resume   {train}"]
    else:
        lines = [f"go on    {train} --num-iterations {2 * config.num_iterations}"]
    if isinstance(config, FinetuneConfig):
        lines.append(f"talk     python -m nanochat_native.chat --checkpoint {folder}")
    elif run.corpus.tokenizer is not None:
        prompt = " --prompt 'import os'" if config.data == STDLIB else ""
        lines.append(f"sample   python -m nanochat_native.generate --checkpoint {folder}{prompt}")
        lines.append(f"measure  python -m nanochat_native.evaluate --checkpoint {folder}")
    return lines


def describe_run(trainer: Trainer) -> str:
    """What is trained, and how, in one line."""
    config, model = trainer.config, trainer.model
    size = (
        f"d{model.config.n_layer}, {model.num_params() / 1e6:.1f}M parameters, {describe_routing(trainer.optimizers)}"
    )
    return f"{size}, {config.total_batch_size:,} tokens a step, {config.dtype} on {config.device}, seed {config.seed}"
