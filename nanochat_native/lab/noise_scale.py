"""python -m nanochat_native.batch_size: the gradient noise scale, and what it says of the batch.

"An Empirical Model of Large-Batch Training" (McCandlish, Kaplan, Amodei, 2018, arXiv:1812.06162), appendix A: of the
gradient g of b sequences, E |g|^2 = |G|^2 + S / b, with the true gradient G and the sum S of the variances of one
sequence's gradient. Two batch sizes give both, and the simple noise scale is S / |G|^2 sequences.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat_native.lab import command_flags
from nanochat_native.optim import clip_reduced_
from nanochat_native.optim.routing import BLOCKS, LM_HEAD, WTE
from nanochat_native.optim.schedule import momentum_at
from nanochat_native.runs import results
from nanochat_native.runs.config import TrainConfig
from nanochat_native.runtime.console import Console, bar
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import UNSET
from nanochat_native.runtime.isolation import ReportFailures
from nanochat_native.runtime.signals import StopSignals
from nanochat_native.training.report import describe_run
from nanochat_native.training.trainer import Trainer

PARTS = {"matrices": BLOCKS, "wte": WTE, "lm_head": LM_HEAD}
BLOCK = 10  # steps, for the course of the noise scale
SIZES = (1 / 16, 1 / 4, 1, 4, 16)  # of the noise scale, for the table


@dataclass
class Options:
    """Measure how noisy the gradient is, and so from which batch size on more tokens a step are wasted.

    Trains for --steps, and compares the gradients of its micro-batches with that of the whole batch: the noise scale is
    the batch at which their noise and the gradient itself are of one size. All flags of train are taken too:
    `python -m nanochat_native.train --help`. Micro-batches are of one sequence, unless --device-batch-size is given.
    """

    steps: int = 120
    """Training steps to measure over."""
    skip: int = 20
    """Steps at the beginning that are left out: there the gradient is large and all batches agree."""
    out: Path | None = None
    """Folder for result.json and the picture; default: lab/batch_size, or the next that is free."""

    def __post_init__(self) -> None:
        if self.skip < 0 or self.steps < self.skip + 8:
            raise ConfigError(f"--steps is {self.steps}, --skip {self.skip}; takes at least 8 steps beyond the skipped")


class Noise(NamedTuple):
    """scale: S / |G|^2, in sequences; None where the gradient is not to be told from noise. low, high: about two
    standard errors around it; None for no bound."""

    scale: float | None
    low: float | None
    high: float | None


def noise_scale(small: Sequence[float], large: Sequence[float], *, small_batch: int, large_batch: int) -> Noise:
    """The simple noise scale of steps' squared gradient norms.

    small: means over a step's micro-batches of `small_batch` sequences; large: of their mean gradient, over
    `large_batch`. |G|^2 and S are averaged over the steps, and then divided.

    Raises ValueError for lists of different lengths, fewer than two steps, or sizes that do not rise.
    """
    if len(small) != len(large) or len(small) < 2:
        raise ValueError(f"{len(small)} and {len(large)} steps; takes the same number, at least 2")
    if not 0 < small_batch < large_batch:
        raise ValueError(f"small_batch is {small_batch}, large_batch {large_batch}; takes 0 < small < large")
    pairs = list(zip(small, large, strict=True))
    squares = [(large_batch * b - small_batch * a) / (large_batch - small_batch) for a, b in pairs]
    sums = [(a - b) / (1 / small_batch - 1 / large_batch) for a, b in pairs]
    n, square, total = len(pairs), sum(squares), sum(sums)
    if square <= 0:
        return Noise(None, None, None)
    if total <= 0:
        return Noise(0.0, 0.0, None)
    # The error of the inverse, by the delta method: |G|^2 / S stays finite where |G|^2 comes near 0.
    inverse = square / total
    residuals = [g - inverse * s for g, s in zip(squares, sums, strict=True)]
    error = 2 * math.sqrt(n / (n - 1) * sum(x * x for x in residuals)) / total
    low, high = inverse + error, inverse - error
    return Noise(1 / inverse, 1 / low, 1 / high if high > 0 else None)


def measure_step(trainer: Trainer, batch: tuple[Tensor, Tensor]) -> tuple[float, dict[str, tuple[float, float]]]:
    """A step's gradients, left in .grad as their mean over the micro-batches; (loss, for each of PARTS and "all":
    squared norms, the mean of the micro-batches' and that of their mean)."""
    named = list(trainer.model.named_parameters())
    total = [torch.zeros_like(parameter) for _, parameter in named]
    micro_batches = list(trainer.micro_batches(batch))
    squares = torch.zeros(len(named), dtype=torch.float64, device=trainer.device)
    loss = torch.zeros((), device=trainer.device)
    for x, y in micro_batches:
        with trainer.autocast():
            micro_loss = trainer.model(x, y)
        micro_loss.backward()
        gradients = [parameter.grad for _, parameter in named if parameter.grad is not None]
        squares += _squares(gradients) / len(micro_batches)
        torch._foreach_add_(total, gradients, alpha=1 / len(micro_batches))
        loss += micro_loss.detach() / len(micro_batches)
        trainer.zero_grad()
    for (_, parameter), mean in zip(named, total, strict=True):
        parameter.grad = mean
    pairs = torch.stack([squares, _squares(total)]).tolist()
    norms = {"all": (sum(pairs[0]), sum(pairs[1]))}
    for part, beginning in PARTS.items():
        places = [i for i, (name, _) in enumerate(named) if name.startswith(beginning)]
        norms[part] = (sum(pairs[0][i] for i in places), sum(pairs[1][i] for i in places))
    return loss.item(), norms


def _squares(tensors: list[Any]) -> Tensor:
    """Squared norms, float64. By rows, because torch's float32 norm of a whole tensor errs by 1e-4 on a CPU."""
    return torch.stack([torch.linalg.vector_norm(t, dim=-1).double().square().sum() for t in tensors])


def advice(noise: Noise, *, sequence_len: int, total_batch_size: int) -> str:
    """What the noise scale of all parameters says of --total-batch-size, tokens."""
    if noise.scale is None:
        return "the gradient is not to be told from its noise at this batch: measure over more steps, or a larger batch"
    if noise.scale == 0:
        return "no noise is to be seen: a smaller batch would do"
    tokens = noise.scale * sequence_len
    steps, cost = 1 + tokens / total_batch_size, 1 + total_batch_size / tokens
    told = (
        f"at --total-batch-size {total_batch_size:,} a run needs {steps:.2g} times the steps of a boundless batch, and "
        f"{cost:.2g} times the tokens of a tiny one"
    )
    if total_batch_size < tokens / 2:
        return f"{told}: up to about {tokens:,.0f} tokens a larger batch saves nearly as many steps as it grows"
    if total_batch_size > 2 * tokens:
        return f"{told}: a batch nearer {tokens:,.0f} tokens would learn as much from fewer tokens"
    return f"{told}: it is near the noise scale, where both are within a factor of about 2 of the best"


def run(args: Sequence[str], failures: ReportFailures) -> int:
    options, config, _ = command_flags.configure(Options, "batch_size", args)
    if config.device_batch_size == UNSET:
        config = dataclasses.replace(config, device_batch_size=1)
    console = Console(failures=failures)
    trainer = Trainer(config, console)
    config = trainer.config
    if config.total_batch_size < 2 * config.max_seq_len:
        raise ConfigError(f"--total-batch-size {config.total_batch_size} is one sequence; takes at least two")
    if trainer.accumulation_steps < 2:
        raise ConfigError(
            f"--total-batch-size {config.total_batch_size} is one micro-batch; takes a --device-batch-size of at most "
            f"{config.total_batch_size // config.max_seq_len // 2}"
        )
    folder = results.open_folder(options.out, "batch_size")
    console.say(f"test     {describe_run(trainer.setup)}, in {trainer.accumulation_steps} micro-batches")
    steps: list[dict[str, Any]] = []
    diverged = False
    with StopSignals("what there is so far is kept") as stopping, trainer.loader.iterate(0) as batches:
        while len(steps) < options.steps and not stopping.signal:
            loss, norms = measure_step(trainer, next(batches))
            if not math.isfinite(loss + norms["all"][0]):
                diverged = True
                break
            clip_reduced_(trainer.optimizers, config.grad_clip or math.inf)
            trainer.set_rates(1.0, momentum_at(len(steps), config))
            trainer.update()
            trainer.zero_grad()
            steps.append({"loss": loss, "squares": norms})
            console.live(f"{bar(len(steps), options.steps)} | loss {loss:.3f}")
    console.end_line()
    if diverged:
        console.say(
            f"stopped  step {len(steps) + 1} has no finite loss or gradient; take lower rates (--matrix-lr, ...)"
        )

    counted = steps[options.skip :]
    rows = config.total_batch_size // config.max_seq_len
    data: dict[str, Any] = {"small_batch": config.device_batch_size, "large_batch": rows}

    def of_parts(some: list[dict[str, Any]]) -> dict[str, Noise]:
        found = {}
        for part in some[0]["squares"]:
            small, large = zip(*(step["squares"][part] for step in some), strict=True)
            found[part] = noise_scale(small, large, **data)
        return found

    found = of_parts(counted) if len(counted) >= 2 else {}
    if found:
        report(console, found, config)
    blocks = [counted[i : i + BLOCK] for i in range(0, len(counted) - BLOCK + 1, BLOCK)]
    series: list[dict[str, float | None]] = []
    for i, block in enumerate(blocks):
        course = {part: noise.scale for part, noise in of_parts(block).items()}
        series.append({"step": options.skip + (i + 0.5) * BLOCK, **course})
    record = results.result(
        "batch_size",
        options,
        config,
        finished=not stopping.signal and not diverged,
        **data,
        sequence_len=config.max_seq_len,
        noise={part: noise._asdict() for part, noise in found.items()},
        series=series,
        steps=steps,
    )
    results.finish(folder, record, console)
    return 128 + stopping.signal if stopping.signal else int(diverged)


def report(console: Console, found: dict[str, Noise], config: TrainConfig) -> None:
    """The noise scale of each part, and what it means for the batch."""
    length = config.max_seq_len
    for part, noise in found.items():
        console.say(f"{part:<9} {in_tokens(noise, length)}")
    whole = found["all"]
    if whole.scale:
        console.say("batch, tokens    steps needed    tokens needed    (1: at best)")
        for size in (max(1, round(whole.scale * factor)) for factor in SIZES):
            steps, tokens = 1 + whole.scale / size, 1 + size / whole.scale
            console.say(f"{size * length:>13,}{steps:>16.2f}{tokens:>17.2f}")
    console.say(advice(whole, sequence_len=length, total_batch_size=config.total_batch_size))
    console.say(
        "It holds for steps along the gradient. Adam's and Muon's follow it roughly, and it grows as a run goes on."
    )


def in_tokens(noise: Noise, sequence_len: int) -> str:
    """The noise scale with its bounds, in tokens."""
    if noise.scale is None or noise.low is None:
        return "not to be told from this"
    high = "no bound" if noise.high is None else f"{noise.high * sequence_len:,.0f}"
    return f"{noise.scale * sequence_len:,.0f} tokens ({noise.low * sequence_len:,.0f} to {high})"
