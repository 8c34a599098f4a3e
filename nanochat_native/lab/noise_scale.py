"""The gradient noise scale, and what it means for the batch size.

"An Empirical Model of Large-Batch Training" (McCandlish, Kaplan, Amodei, 2018, arXiv:1812.06162), appendix A: the
gradient g of b sequences satisfies E |g|^2 = |G|^2 + S / b, with the true gradient G and the sum S of the variances of
one sequence's gradient. Two batch sizes determine both. The simple noise scale is S / |G|^2 sequences.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat_native.ops.dtypes import widest_dtype
from nanochat_native.optim import clip_reduced_
from nanochat_native.optim.routing import BLOCKS, LM_HEAD, VALUE_EMBEDS, WTE
from nanochat_native.optim.schedule import momentum_at
from nanochat_native.runs import results
from nanochat_native.runs.config import TrainConfig
from nanochat_native.runtime.console import Console, bar
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import is_unset
from nanochat_native.runtime.signals import StopSignals
from nanochat_native.training.report import describe_run
from nanochat_native.training.trainer import Trainer

PARTS = {"matrices": BLOCKS, "wte": WTE, "lm_head": LM_HEAD, "value_embeds": VALUE_EMBEDS}
STEPS_PER_POINT = 10  # of the noise scale over time
TABLE_FACTORS = (1 / 16, 1 / 4, 1, 4, 16)  # batch sizes in the printed table, in units of the noise scale


@dataclass
class Options:
    """Measure the gradient noise scale: the batch size above which more tokens per step bring little.

    The command trains for --steps and compares the gradients of the micro-batches with the gradient of the whole batch.
    The noise scale is the batch size at which the noise is as large as the gradient. All flags of train are accepted
    too: `python -m nanochat_native.train --help` lists them. A micro-batch is one sequence, unless --device-batch-size
    is given.

    The guide explains it: docs/guide/10-rates-schedules-batches.md.
    """

    steps: int = 120
    """Number of training steps."""
    skip: int = 20
    """First steps that are not counted: their gradient is large, and all batches agree."""
    out: Path | None = None
    """Folder for result.json and the picture; default: lab/batch_size, or the next free name."""

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise ConfigError(f"--skip must be at least 0, got {self.skip}")
        if self.steps < self.skip + 8:
            raise ConfigError(f"--steps must be at least --skip + 8, got --steps {self.steps} --skip {self.skip}")


class Noise(NamedTuple):
    """A noise scale with its bounds, in sequences.

    Attributes:
        scale: S / |G|^2, or None if the gradient is not distinguishable from noise.
        low: the lower bound, about two standard errors below.
        high: the upper bound, about two standard errors above, or None if there is none.
    """

    scale: float | None
    low: float | None
    high: float | None


def noise_scale(small: Sequence[float], large: Sequence[float], *, small_batch: int, large_batch: int) -> Noise:
    """Return the simple noise scale of a series of steps. |G|^2 and S are averaged over the steps, then divided.

    Args:
        small: for each step the mean squared gradient norm of its micro-batches.
        large: for each step the squared norm of the mean gradient.
        small_batch: the number of sequences in a micro-batch.
        large_batch: the number of sequences in a step.

    Raises:
        ValueError: the lists differ in length or have fewer than two steps, or not 0 < small_batch < large_batch.
    """
    if len(small) != len(large) or len(small) < 2:
        raise ValueError(f"small and large must have the same length, at least 2, got {len(small)} and {len(large)}")
    if not 0 < small_batch < large_batch:
        raise ValueError(f"batches must be 0 < small_batch < large_batch, got {small_batch} and {large_batch}")
    pairs = list(zip(small, large, strict=True))
    squares = [(large_batch * b - small_batch * a) / (large_batch - small_batch) for a, b in pairs]
    sums = [(a - b) / (1 / small_batch - 1 / large_batch) for a, b in pairs]
    n, square, total = len(pairs), sum(squares), sum(sums)
    if square <= 0:
        return Noise(None, None, None)
    if total <= 0:
        return Noise(0.0, 0.0, None)
    # The delta method gives the error of the inverse, because |G|^2 / S stays finite as |G|^2 approaches 0.
    inverse = square / total
    residuals = [g - inverse * s for g, s in zip(squares, sums, strict=True)]
    error = 2 * math.sqrt(n / (n - 1) * sum(x * x for x in residuals)) / total
    low, high = inverse + error, inverse - error
    return Noise(1 / inverse, 1 / low, 1 / high if high > 0 else None)


def measure_step(trainer: Trainer, batch: tuple[Tensor, Tensor]) -> tuple[float, dict[str, tuple[float, float]]]:
    """Compute the gradients of a step, and leave their mean over the micro-batches in .grad.

    Returns:
        The loss, and for "all" and each of PARTS that the model has two squared norms: the mean over the micro-batches,
        and that of the mean gradient.
    """
    named = list(trainer.model.named_parameters())
    total = [torch.zeros_like(parameter) for _, parameter in named]
    micro_batches = list(trainer.micro_batches(batch))
    squares = torch.zeros(len(named), dtype=widest_dtype(trainer.device), device=trainer.device)
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
        if places:
            norms[part] = (sum(pairs[0][i] for i in places), sum(pairs[1][i] for i in places))
    return loss.item(), norms


def _squares(tensors: list[Any]) -> Tensor:
    """Return squared norms in the widest type, summed by rows: torch's float32 norm of a whole tensor errs by 1e-4 on a
    CPU."""
    wide = widest_dtype(tensors[0].device)
    return torch.stack([torch.linalg.vector_norm(t, dim=-1).to(wide).square().sum() for t in tensors])


def advice(noise: Noise, *, sequence_len: int, total_batch_size: int) -> str:
    """Return what the noise scale of all parameters means for a batch of --total-batch-size tokens."""
    if noise.scale is None:
        return "the gradient is not distinguishable from noise at this batch size: use more steps, or a larger batch"
    if noise.scale == 0:
        return "no noise was measured: a smaller batch is enough"
    tokens = noise.scale * sequence_len
    steps, cost = 1 + tokens / total_batch_size, 1 + total_batch_size / tokens
    figures = (
        f"at --total-batch-size {total_batch_size:,} a run needs {steps:.2g} times the steps of an unlimited batch, "
        f"and {cost:.2g} times the tokens of a tiny batch"
    )
    if total_batch_size < tokens / 2:
        return f"{figures}: up to about {tokens:,.0f} tokens a larger batch saves almost proportionally many steps"
    if total_batch_size > 2 * tokens:
        return f"{figures}: a batch closer to {tokens:,.0f} tokens would reach the same loss with fewer tokens"
    return f"{figures}: the batch is near the noise scale, where both are within a factor of about 2 of the best"


class Outcome(NamedTuple):
    """Whether training diverged, and the signal that stopped the measurement, or 0."""

    diverged: bool
    signal: int


def run(options: Options, config: TrainConfig, console: Console) -> Outcome:
    """Train and measure, print what the noise scale means, and write the result with its picture."""
    if is_unset(config, "device_batch_size"):
        config = dataclasses.replace(config, device_batch_size=1)
    trainer = Trainer(config, console)
    trainer.refuse_loss_scaling()
    config = trainer.config
    if config.total_batch_size < 2 * config.max_seq_len:
        raise ConfigError(
            f"--total-batch-size must be at least two sequences, got one: {config.total_batch_size} tokens"
        )
    if trainer.accumulation_steps < 2:
        raise ConfigError(
            f"--total-batch-size {config.total_batch_size} is one micro-batch; use a --device-batch-size of at most "
            f"{config.total_batch_size // config.max_seq_len // 2}"
        )
    folder = results.open_folder(options.out, "batch_size")
    console.say(f"test     {describe_run(trainer.setup)}, in {trainer.accumulation_steps} micro-batches")
    steps: list[dict[str, Any]] = []
    diverged = False
    with StopSignals("the results so far are kept") as stopping, trainer.loader.iterate(0) as batches:
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
            f"stopped  step {len(steps) + 1} has no finite loss or gradient; use lower rates (--matrix-lr, ...)"
        )

    counted = steps[options.skip :]
    batch_sizes: dict[str, Any] = {
        "small_batch": config.device_batch_size,
        "large_batch": config.total_batch_size // config.max_seq_len,
    }
    noise = noise_by_part(counted, **batch_sizes) if len(counted) >= 2 else {}
    if noise:
        print_report(console, noise, config)
    series: list[dict[str, float | None]] = []
    for first in range(0, len(counted) - STEPS_PER_POINT + 1, STEPS_PER_POINT):
        point = noise_by_part(counted[first : first + STEPS_PER_POINT], **batch_sizes)
        scales = {part: found.scale for part, found in point.items()}
        series.append({"step": options.skip + first + STEPS_PER_POINT / 2, **scales})
    record = results.result(
        "batch_size",
        options,
        config,
        finished=not stopping.signal and not diverged,
        **batch_sizes,
        sequence_len=config.max_seq_len,
        noise={part: found._asdict() for part, found in noise.items()},
        series=series,
        steps=steps,
    )
    results.finish(folder, record, console)
    return Outcome(diverged, stopping.signal)


def noise_by_part(steps: Sequence[dict[str, Any]], *, small_batch: int, large_batch: int) -> dict[str, Noise]:
    """Return the noise scale of each part of the model over the steps."""
    found = {}
    for part in steps[0]["squares"]:
        small, large = zip(*(step["squares"][part] for step in steps), strict=True)
        found[part] = noise_scale(small, large, small_batch=small_batch, large_batch=large_batch)
    return found


def print_report(console: Console, noise_of: dict[str, Noise], config: TrainConfig) -> None:
    """Print the noise scale of each part, and what it means for the batch size."""
    length = config.max_seq_len
    for part, noise in noise_of.items():
        console.say(f"{part:<9} {in_tokens(noise, length)}")
    whole = noise_of["all"]
    if whole.scale:
        console.say("batch, tokens    steps needed    tokens needed    (1: the minimum)")
        for size in (max(1, round(whole.scale * factor)) for factor in TABLE_FACTORS):
            steps, tokens = 1 + whole.scale / size, 1 + size / whole.scale
            console.say(f"{size * length:>13,}{steps:>16.2f}{tokens:>17.2f}")
    console.say(advice(whole, sequence_len=length, total_batch_size=config.total_batch_size))
    console.say(
        "This holds for steps along the gradient. Adam and Muon follow it roughly. The noise scale grows during a run."
    )


def in_tokens(noise: Noise, sequence_len: int) -> str:
    """Return a noise scale with its bounds, in tokens."""
    if noise.scale is None or noise.low is None:
        return "not measurable from these steps"
    high = "no bound" if noise.high is None else f"{noise.high * sequence_len:,.0f}"
    return f"{noise.scale * sequence_len:,.0f} tokens ({noise.low * sequence_len:,.0f} to {high})"
