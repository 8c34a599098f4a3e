"""Learning rates, schedules, clipping and batches (chapter 10)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat_native.demonstrations.loop import LENGTH, chain_corpus, small_config
from nanochat_native.lab.range_test import Options, range_test, suggest
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import AdamW, Muon, clip_grad_norm_, setup_optimizers
from nanochat_native.optim.schedule import SHAPES, lr_multiplier, muon_momentum
from nanochat_native.runs.config import TrainConfig
from nanochat_native.training import resolve

Batches = Sequence[tuple[Tensor, Tensor]]

MUON_RATE, EMBEDDING_RATE = 0.02, 0.2  # the defaults of nanochat and of train
CURVATURES = 32  # of the quadratic
SWEEPS = (30, 100, 300, 1000)
NOISE_STEPS = 400
SLOPES = (0.01, 1.0)  # curvatures of the noisy quadratic: a slow and a fast direction
STEPS = 20


def range_test_rates() -> dict[str, Any]:
    """Compute where the range test of the original guide ends, 1e-8 times 1.01 for 1,000 steps, and where lr_find ends.

    Then run the range test on a quadratic at four speeds: 30 to 1,000 rates between the same ends.
    """
    floor, factor, steps = 1e-8, 1.01, 1000
    end = floor * factor**steps
    ours = Options()
    rates, _, _ = range_test(lambda rate: 1.0, floor=ours.floor, ceiling=ours.ceiling, steps=ours.steps)
    sweeps: list[dict[str, Any]] = []
    for count in SWEEPS:
        rates_tried, losses, diverged = range_test(_quadratic(), floor=1e-3, ceiling=1e3, steps=count)
        found = suggest(rates_tried, losses, steps=count, diverged=diverged)
        sweeps.append({"steps": count, "steepest": found.steepest, "lowest": found.lowest, "suggested": found.rate})
    steepest = [sweep["steepest"] for sweep in sweeps]
    return {
        "original": {
            "end": end,
            "below_muon": MUON_RATE / end,
            "below_embedding": EMBEDDING_RATE / end,
            "steps_to_muon": math.ceil(math.log(MUON_RATE / floor) / math.log(factor)),
            "steps_to_embedding": math.ceil(math.log(EMBEDDING_RATE / floor) / math.log(factor)),
        },
        "lr_find": {"steps": len(rates), "first": rates[0], "last": rates[-1], "factor": rates[1] / rates[0]},
        "quadratic": {
            "largest_stable_rate": 2.0,
            "sweeps": sweeps,
            "steepest_moves_by": max(steepest) / min(steepest),
        },
    }


def _quadratic() -> Callable[[float], float]:
    """Return a function that makes a step of gradient descent on a quadratic with curvatures from 1e-3 to 1."""
    curvature = torch.logspace(-3, 0, CURVATURES, dtype=torch.float64)
    x = torch.ones(CURVATURES, dtype=torch.float64)

    def try_rate(rate: float) -> float:
        x.mul_(1 - rate * curvature)
        return 0.01 + (curvature * x.square()).mean().item()

    return try_rate


def first_step() -> dict[str, Any]:
    """Measure the first update of AdamW, Muon and SGD, in units of the rate, for gradients of very different sizes.

    Then count the parameters of a new model that have a gradient at all.
    """
    gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rate = 0.01
    rows = []
    for size in (1e-6, 1e-3, 1.0, 1e3):
        row: dict[str, Any] = {"gradient": size}
        for name, build in (
            ("adamw", lambda p: AdamW([p], lr=rate)),
            ("muon", lambda p: Muon([p], lr=rate)),
            ("sgd", lambda p: torch.optim.SGD([p], lr=rate)),
        ):
            parameter = torch.zeros(64, 64, requires_grad=True)
            parameter.grad = size * gradient
            build(parameter).step()
            moved = parameter.detach() / rate
            row[name] = moved.square().mean().sqrt().item()
        rows.append(row)
    model, batches = _model(), _batches(1)
    model(*batches[0]).backward()
    norms: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        part = "lm_head" if "lm_head" in name else "wte" if "wte" in name else "blocks"
        assert parameter.grad is not None
        norms[part] = math.hypot(norms.get(part, 0.0), parameter.grad.norm().item())
    return {
        "update_rms_over_rate": rows,
        "spread_of": {name: rows[-1][name] / rows[0][name] for name in ("adamw", "muon", "sgd")},
        "gradient_norms_of_a_new_model": norms,
        "rms_of_muons_update": 1 / math.sqrt(64),
    }


def _model(config: TrainConfig | None = None) -> GPT:
    model = GPT(resolve.model_config(small_config() if config is None else config))
    model.init_weights(0)
    return model


def _batches(count: int, rows: int = 8) -> Batches:
    stream = chain_corpus().train
    pairs = []
    for step in range(count):
        windows = [stream.pair((step * rows + row) * LENGTH, LENGTH) for row in range(rows)]
        inputs, targets = zip(*windows, strict=True)
        pairs.append((torch.tensor([x.tolist() for x in inputs]), torch.tensor([y.tolist() for y in targets])))
    return pairs


def _train(batches: Batches, optimizer: str, *, scale: float = 1.0, max_norm: float = math.inf) -> list[float]:
    """Return the losses of a small model. scale: factor of the loss before the backward pass."""
    model = _model()
    optimizers = setup_optimizers(model, optimizer=optimizer)
    losses = []
    for x, y in batches:
        loss = model(x, y)
        (loss * scale).backward()
        losses.append(loss.item())
        if max_norm < math.inf:
            clip_grad_norm_(model.parameters(), max_norm)
        for each in optimizers:
            each.step()
            each.zero_grad()
    return losses


def gradient_scale() -> dict[str, Any]:
    """Train 20 steps with the loss scaled, and with the gradient clipped to small norms, by Muon with AdamW and by SGD.

    Both multiply the gradient by a factor. Clipping multiplies by a different one at each step.
    """
    batches = _batches(STEPS)
    found: dict[str, Any] = {"steps": STEPS}
    for optimizer in ("hybrid", "sgd"):
        plain = _train(batches, optimizer)
        rows: dict[str, Any] = {"plain": {"last_loss": plain[-1], "first_loss": plain[0]}}
        for name, options in (
            ("scaled_1024", {"scale": 1024.0}),
            ("scaled_1_1024", {"scale": 1 / 1024}),
            ("clip_1", {"max_norm": 1.0}),
            ("clip_0_1", {"max_norm": 0.1}),
            ("clip_0_01", {"max_norm": 0.01}),
        ):
            losses = _train(batches, optimizer, **options)
            rows[name] = {
                "last_loss": losses[-1] if math.isfinite(losses[-1]) else "not finite",
                "largest_difference": max(abs(a - b) for a, b in zip(losses, plain, strict=True)),
                "share_of_progress": (losses[0] - losses[-1]) / (plain[0] - plain[-1]),
            }
        found[optimizer] = rows
    return found


def clip_ranks() -> dict[str, Any]:
    """Clip the gradients of two ranks before and after their average.

    The ranks have different data: one the text of the model, the other a batch whose targets are one token.
    """
    model = _model()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lm_head" in name or "c_proj" in name:
                parameter.normal_(0, 0.05, generator=generator)
    ((x, y),) = _batches(1)
    first, second = _gradient(model, x, y), _gradient(model, torch.full_like(x, 7), torch.full_like(y, 200))
    mean = (first + second) / 2
    right, wrong = _clipped(mean), (_clipped(first) + _clipped(second)) / 2
    return {
        "norms_of_the_ranks": [first.norm().item(), second.norm().item()],
        "norm_of_the_mean": mean.norm().item(),
        "clipped_after": right.norm().item(),
        "clipped_on_each_rank": wrong.norm().item(),
        "cosine": _cosine(right, wrong),
        "cosine_of_the_ranks": _cosine(first, second),
        "share_of_first": {"after": _share(first, second), "on_each_rank": 0.5},
    }


def _gradient(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    model(x, y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def _clipped(gradient: Tensor) -> Tensor:
    holder = torch.zeros_like(gradient, requires_grad=True)
    holder.grad = gradient.clone()
    clip_grad_norm_([holder], 1.0)
    return holder.grad


def _cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def _share(first: Tensor, second: Tensor) -> float:
    """Return the weight of the first of two gradients in their average, by norm."""
    return (first.norm() / (first.norm() + second.norm())).item()


def noise_floor() -> dict[str, Any]:
    """Compute the expected loss of gradient descent on a noisy quadratic, exactly, for several schedules.

    For a loss h x^2 / 2, a rate r and a gradient h x + noise of variance 1, the second moment v of x follows
    v' = (1 - r h)^2 v + r^2. Its limit is r / (h (2 - r h)): the floor of the loss is about r / 4 for each direction.
    """
    rates = (0.4, 0.2, 0.1)
    floors = {f"rate_{str(rate).replace('.', '_')}": _expected([rate] * 8000)[-1] for rate in rates}
    curves = {
        "constant 0.4": _expected([0.4] * NOISE_STEPS),
        "constant 0.1": _expected([0.1] * NOISE_STEPS),
        "20%": _expected([0.4 * lr_multiplier(s, NOISE_STEPS, warmdown_ratio=0.2) for s in range(NOISE_STEPS)]),
        "65%": _expected([0.4 * lr_multiplier(s, NOISE_STEPS, warmdown_ratio=0.65) for s in range(NOISE_STEPS)]),
    }
    return {
        "floors": floors,
        "formula": {
            name: sum(rate / (2 * (2 - rate * h)) for h in SLOPES) for name, rate in zip(floors, rates, strict=True)
        },
        "steps": NOISE_STEPS,
        "last": {name.replace(" ", "_").replace(".", "_").replace("%", ""): c[-1] for name, c in curves.items()},
        "curves": {name: [float(f"{value:.4g}") for value in curve[::4]] for name, curve in curves.items()},
    }


def _expected(rates: Sequence[float]) -> list[float]:
    """Return the expected loss before each step and after the last, summed over SLOPES, from x = 8."""
    losses = []
    moments = [64.0, 64.0]
    for rate in rates:
        losses.append(sum(h * v / 2 for h, v in zip(SLOPES, moments, strict=True)))
        moments = [(1 - rate * h) ** 2 * v + rate**2 for h, v in zip(SLOPES, moments, strict=True)]
    return [*losses, sum(h * v / 2 for h, v in zip(SLOPES, moments, strict=True))]


def schedule_shapes() -> dict[str, Any]:
    """Compute the multiplier of each --schedule over 100 steps, with a warmup of 10% and a warmdown of 40%."""
    total = 100
    found: dict[str, Any] = {}
    for shape in SHAPES:
        final = 0.1 if shape in ("exponential", "step") else 0.0
        values = [
            lr_multiplier(step, total, warmup_ratio=0.1, warmdown_ratio=0.4, final_lr_frac=final, shape=shape)
            for step in range(total)
        ]
        found[shape] = {"values": [float(f"{value:.5g}") for value in values], "mean": sum(values) / total}
    return {
        "steps": total,
        "shapes": found,
        "momentum": {f"step_{step}": muon_momentum(step) for step in (0, 150, 300)},
        "horizon": {f"step_{step}": 1 / (1 - muon_momentum(step)) for step in (0, 150, 300)},
    }


DEMONSTRATIONS = {
    "clip-ranks": clip_ranks,
    "first-step": first_step,
    "gradient-scale": gradient_scale,
    "noise-floor": noise_floor,
    "range-test": range_test_rates,
    "schedule-shapes": schedule_shapes,
}
