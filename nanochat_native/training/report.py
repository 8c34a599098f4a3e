"""The messages of a run: what it will do, its progress, how it ended and how to continue."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from nanochat_native import ops
from nanochat_native.data import Corpus, Loader
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import buckets_of, describe_routing
from nanochat_native.runs.config import STDLIB, FinetuneConfig, ReinforceConfig, TrainConfig, command_of
from nanochat_native.runs.pictures import MISSING, plot_diagnosis, plot_loss
from nanochat_native.runtime import hardware
from nanochat_native.runtime.console import Console, compact, duration
from nanochat_native.training import scaling_laws, sizing

EXPECTED_MFU = {"cpu": 0.9, "cuda": 0.4}  # for the time that is announced before the first step


@dataclass(frozen=True)
class Setup:
    """The plan of a run, for its announcement."""

    config: TrainConfig
    world_size: int
    device: torch.device
    peak: hardware.Peak
    corpus: Corpus
    loader: Loader
    model: GPT
    optimizers: Sequence[torch.optim.Optimizer]
    row_bytes: int
    accumulation_steps: int


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call of train().

    Attributes:
        step: the optimizer steps of the run.
        steps, seconds, tokens: the steps of this call, the time that they took, and the tokens trained on.
        saved_step: the step of the newest checkpoint; -1 if there is none.
        diagnosed, diagnosis_seconds: the steps whose layers were measured, and the time that it took.
    """

    config: TrainConfig
    step: int
    steps: int
    seconds: float
    tokens: int
    diverged: bool
    saved_step: int
    skipped: int
    skipped_in_a_row: int
    validation_bpb: float | None
    diagnosed: int
    diagnosis_seconds: float
    has_tokenizer: bool


def announce(setup: Setup, notes: Sequence[str], console: Console) -> None:
    """Print what a run is going to do: machine, data, model, work, time, memory. notes: flags that a resumed run
    changes."""
    config, device, peak, say = setup.config, setup.device, setup.peak, console.say
    served = {op: ops.serves(op, device)[0] for op in ops.OPERATORS}
    kernels = [f"{' '.join(op for op in served if served[op] == by)}: {by}" for by in sorted(set(served.values()))]
    if device.type == "cpu" and "native" in served.values():
        kernels.append(ops.instruction_set())
    say(f"device   {hardware.describe(device)} | torch {torch.__version__} | {config.dtype}")
    say(f"kernels  {' | '.join(kernels)}")
    say(f"peak     {'unknown' if peak.flops is None else f'{compact(peak.flops)}FLOP/s'} ({peak.source})")
    say(f"data     {setup.corpus.description}")
    order = setup.loader.describe()
    if order:
        say(f"packing  {order}")

    model, num_params, flops_per_token = setup.model.config, setup.model.num_params(), setup.model.estimate_flops()
    memory = sizing.memory_bytes(config, num_params=num_params, row_bytes=setup.row_bytes)
    say(
        f"model    d{model.n_layer}, {describe_size(setup)}, width {model.n_embd}, {model.n_head} heads | "
        f"{compact(flops_per_token)}FLOP a token | "
        f"memory about {memory / 1e9:.1f} of {hardware.memory(device)[1] / 1e9:.0f} GB"
    )
    say(f"optimizer {describe_routing(setup.optimizers)}")
    if setup.world_size > 1:
        buckets = buckets_of(setup.optimizers)
        sent = sum(bucket.traffic_bytes() for bucket in buckets)
        own = sum(bucket.shard * bucket.flat_values.itemsize for bucket in buckets)
        say(
            f"ranks    {setup.world_size} over {'NCCL' if device.type == 'cuda' else 'gloo'} | each owns "
            f"{own / 1e6:.1f} of {own * setup.world_size / 1e6:.1f} MB of weights, and sends {sent / 1e6:.1f} MB a step"
        )

    tokens = config.num_iterations * config.total_batch_size
    flops = tokens * flops_per_token
    epochs = setup.loader.epochs_of(tokens)
    passes = "" if epochs is None else f" ({epochs:.2g} epochs)"
    time = ""
    if peak.flops is not None and not isinstance(config, ReinforceConfig):  # whose time is that of the answers, too
        time = f", about {duration(flops / (peak.flops * setup.world_size * EXPECTED_MFU[device.type]))}"
    say(
        f"batch    {config.device_batch_size} x {config.max_seq_len} x {setup.accumulation_steps} = "
        f"{config.total_batch_size:,} tokens | {config.num_iterations} steps, {tokens:,} tokens{passes}, "
        f"{compact(flops)}FLOP{time}"
    )
    extras = [("tensorboard", "tensorboard/"), ("matplotlib", "loss.png")]
    missing = [f"no {what}: {module} is not installed" for module, what in extras if not find_spec(module)]
    say(" | ".join([f"run      {config.run_dir}", f"a checkpoint every {config.save_every} steps", *missing]))
    for note in notes:
        say(f"note     {note}: the run resumes, but its losses may differ in the last bits")


def live_line(record: dict[str, Any], *, num_iterations: int, seconds_per_step: float, available_bytes: int) -> str:
    """Return a train record in one line. available_bytes: all memory of the device."""
    parts = [
        f"step {record['step']}/{num_iterations} {100 * record['step'] // num_iterations}%",
        *(
            [f"reward {number(record['reward'])}", f"{record['answer_tokens']:.1f} tokens an answer"]
            if "reward" in record
            else [f"loss {number(record['loss'])}", f"bpb {number(record['bpb'])}"]
        ),
        f"gnorm {number(record['grad_norm'])}",
        f"lr x{record['lr_multiplier']:.2f}",
        f"mom {record['momentum']:.3f}",
        f"{1000 * record['seconds']:.0f} ms",
        f"{compact(record['tokens_per_second'])} tok/s",
        "mfu ?" if record["mfu"] is None else f"mfu {record['mfu']:.0%}",
        f"mem {record['memory_bytes'] / 1e9:.1f}/{available_bytes / 1e9:.0f} GB",
        f"data {record['data_seconds'] / record['seconds']:.0%}",
        f"eta {duration((num_iterations - record['step']) * seconds_per_step)}",
    ]
    return " | ".join(parts)


def number(value: float | None) -> str:
    """Return a number with three decimals, or "?" for one that is unknown or not finite."""
    return "?" if value is None else f"{value:.3f}"


def summarize(outcome: Outcome, console: Console) -> dict[str, Any]:
    """Draw the plots, print how a call of train() ended and the commands to continue, and return the figures."""
    config, saved_step, say = outcome.config, outcome.saved_step, console.say
    rate = outcome.tokens / outcome.seconds
    if outcome.diverged:
        kept = f"the checkpoint of step {saved_step} is kept" if saved_step >= 0 else "there is no checkpoint yet"
        say(
            f"stopped  {outcome.skipped_in_a_row} steps in a row had no finite gradient; {kept}. "
            "A new run with lower rates (--matrix-lr, --embedding-lr) may get further."
        )
    parts = [
        f"step {outcome.step} of {config.num_iterations}",
        duration(outcome.seconds),
        f"{compact(rate)} tok/s",
    ]
    if outcome.validation_bpb is not None:
        parts.append(f"validation {outcome.validation_bpb:.4f} bits per byte")
    if outcome.skipped:
        parts.append(f"{outcome.skipped} steps skipped")
    say(f"done     {' | '.join(parts)}")
    with console.isolated("plot"):
        say(f"plot     {plot_loss(config.run_dir) or MISSING}")
    if outcome.diagnosed:
        share = outcome.diagnosis_seconds / outcome.seconds
        cost = f"{1e3 * outcome.diagnosis_seconds / outcome.diagnosed:.0f} ms each, {share:.1%} of the time"
        with console.isolated("plot of the layers"):
            say(f"layers   {plot_diagnosis(config.run_dir) or MISSING} | measured {outcome.diagnosed} times, {cost}")

    if saved_step < outcome.step and not outcome.diverged:
        kept = f"the last checkpoint is of step {saved_step}" if saved_step >= 0 else "there is no checkpoint"
        say(f"unsaved  step {outcome.step} could not be saved: {kept}")
    if saved_step >= 0:
        for line in next_commands(outcome):
            say(line)
    return {
        "kind": "summary",
        "step": outcome.step,
        "num_iterations": config.num_iterations,
        "seconds": outcome.seconds,
        "tokens_per_second": rate,
        "validation_bpb": outcome.validation_bpb,
        "skipped": outcome.skipped,
        "checkpoint_step": saved_step,
        "run_dir": str(config.run_dir),
    }


def next_commands(outcome: Outcome) -> list[str]:
    """Return the commands that continue from the newest checkpoint, a line each."""
    config = outcome.config
    folder = shlex.quote(str(config.run_dir))
    train = f"python -m nanochat_native.{command_of(config)} --resume {folder}"
    if outcome.saved_step < config.num_iterations:
        lines = [f"resume   {train}"]
    else:
        lines = [f"extend   {train} --num-iterations {2 * config.num_iterations}"]
    if isinstance(config, FinetuneConfig | ReinforceConfig):
        lines.append(f"talk     python -m nanochat_native.chat --checkpoint {folder}")
    elif outcome.has_tokenizer:
        prompt = " --prompt 'import os'" if config.data == STDLIB else ""
        lines.append(f"sample   python -m nanochat_native.generate --checkpoint {folder}{prompt}")
        lines.append(f"measure  python -m nanochat_native.evaluate --checkpoint {folder}")
    return lines


def describe_size(setup: Setup) -> str:
    """Return the number of parameters, and of those that the scaling laws count if the recipe uses them."""
    size = f"{setup.model.num_params() / 1e6:.1f}M parameters"
    if setup.config.recipe != "today":
        return size
    return f"{size}, {scaling_laws.scaling_params(setup.model.config) / 1e6:.1f}M of them in matrices and lm_head"


def describe_run(setup: Setup) -> str:
    """Return what is trained, and how, in one line."""
    config, model = setup.config, setup.model
    size = f"d{model.config.n_layer}, {model.num_params() / 1e6:.1f}M parameters, {describe_routing(setup.optimizers)}"
    return f"{size}, {config.total_batch_size:,} tokens a step, {config.dtype} on {config.device}, seed {config.seed}"
