"""Demonstrations of chapter 9: Newton-Schulz, Muon and its forms, AdamW."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_native import ops
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.ops.newton_schulz import COEFFICIENTS, newton_schulz_schedule
from nanochat_native.optim import AdamW, setup_optimizers
from nanochat_native.optim.original_guide import orthogonalise
from nanochat_native.runs import checkpoint

Values = dict[str, Any]
NAMES = ("cubic", "quintic", "polar_express")


# --- Newton-Schulz ---


def newton_schulz(seed: int = 0) -> Values:
    """Follow the singular values of a random square matrix through Newton-Schulz, and measure its distance to U V^T.

    The iteration changes the singular values alone, each by the polynomial a s + b s^3 + c s^5. "error" is
    |X - U V^T| / |U V^T|, Frobenius. https://kellerjordan.github.io/posts/muon/ has the quintic, arXiv:2505.16932 the
    Polar Express.
    """
    size, shown = 768, 10
    g = random_matrix(seed, size, size)
    u, start, vt = torch.linalg.svd(g.double())
    start = start / start.square().sum().sqrt()  # after the division by the Frobenius norm
    found: Values = {"size": size, "root": size**-0.5, "start": spread(start)}
    for name in NAMES:
        x = ops.newton_schulz(g, steps=5, coefficients=name).double()
        after = [singular_values_after(start, steps, name) for steps in range(shown + 1)]
        found[name] = {
            "slope": COEFFICIENTS[name][0][0],
            "gain": math.prod(a for a, _, _ in newton_schulz_schedule(5, name)[0]),
            "five_steps": {**spread(after[5]), "error": float((x - u @ vt).norm()) / size**0.5},
            "by_step": {key: [spread(s)[key] for s in after] for key in spread(start)},
            "error_by_step": [error_of(s) for s in after],
        }
    steps = 5
    while (s := singular_values_after(start, steps, "cubic")).min() < 0.75:
        steps += 1
    found["cubic_again"] = {
        "twenty_steps_error": error_of(singular_values_after(start, 20, "cubic")),
        "steps_until_all_above_three_quarters": steps,
        "smallest_then": float(s.min()),
    }
    tall = torch.linalg.svdvals(ops.newton_schulz(random_matrix(seed, 1024, 256)).double())
    found["tall"] = {"rows": 1024, "columns": 256, **spread(tall)}
    return found


def singular_values_after(start: Tensor, steps: int, coefficients: str) -> Tensor:
    """Return what becomes of singular values, those of a matrix with Frobenius norm 1, after some steps."""
    if steps == 0:
        return start
    triples, norm_factor = newton_schulz_schedule(steps, coefficients)
    s = start / norm_factor
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return s.abs()


def error_of(singular_values: Tensor) -> float:
    """Return |X - U V^T| / |U V^T| of a matrix with these singular values."""
    return float((singular_values - 1).square().mean().sqrt())


def spread(singular_values: Tensor) -> dict[str, float]:
    """Return the smallest, the quartiles and the largest of singular values."""
    parts = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=singular_values.dtype)
    names = ("smallest", "quarter", "median", "three_quarters", "largest")
    return dict(zip(names, singular_values.quantile(parts).tolist(), strict=True))


def polar(g: Tensor) -> Tensor:
    """Return U V^T of the singular value decomposition U S V^T of g."""
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    return u @ vt


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine between two tensors, seen as vectors."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def random_matrix(seed: int, *shape: int) -> Tensor:
    """Return a matrix of normal random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steepest_direction(seed: int = 0) -> Values:
    """Compare how far steps of spectral norm 1 go down a slope G, to first order: <G, step>.

    U V^T reaches the nuclear norm, the sum of the singular values. See https://jeremybernste.in/writing/deriving-muon.
    """
    g = random_matrix(seed, 96, 64).double()
    right = polar(g)
    others = [polar(random_matrix(seed + 1 + i, 96, 64).double()) for i in range(200)]
    tilted = [right + 0.3 * other for other in others]
    return {
        "nuclear_norm": float(torch.linalg.svdvals(g).sum()),
        "orthogonalized": float((g * right).sum()),
        "gradient": float((g * g / torch.linalg.matrix_norm(g, 2)).sum()),
        "newton_schulz": float((g * (x := ops.newton_schulz(g)) / torch.linalg.matrix_norm(x, 2)).sum()),
        "best_of_200_random": max(float((g * other).sum()) for other in others),
        "best_of_200_near": max(float((g * t / torch.linalg.matrix_norm(t, 2)).sum()) for t in tilted),
    }


# --- the forms of Muon ---


def cropped_update(seed: int = 0) -> Values:
    """Orthogonalize a tall matrix whole, and by cropping it to a square, as the original guide did."""
    rows, columns = 1024, 256
    g = random_matrix(seed, rows, columns)
    right = polar(g.double())
    found: Values = {"rows": rows, "columns": columns}
    for name, cropped, coefficients in (
        ("whole", False, "quintic"),
        ("cropped", True, "quintic"),
        ("original", True, "cubic"),
    ):
        x = orthogonalise(g, cropped, steps=5, coefficients=coefficients).double()
        found[name] = {
            "zero_rows": float((x == 0).all(1).double().mean()),
            "cosine_to_polar": cosine(x, right),
            "error": float((x - right).norm() / right.norm()),
        }
    return found


def frozen_rows(seed: int = 0) -> Values:
    """Train a small model for some steps and count the rows of c_fc that no step has changed by a bit."""
    steps = 12
    found: Values = {}
    forms: dict[str, Values] = {
        "muon": {},
        "original_guide": {"muon_form": "original_guide", "coefficients": "cubic", "matrix_lr": 0.002},
    }
    for name, options in forms.items():
        model = small_model(seed)
        weights = {key: value for key, value in model.named_parameters() if key.startswith("transformer.h.")}
        before = {key: weight.detach().clone() for key, weight in weights.items()}
        still = {key: torch.ones_like(weight, dtype=torch.bool) for key, weight in weights.items()}

        def compare(*_: Any, weights: Any = weights, before: Any = before, still: Any = still) -> None:
            for key, weight in weights.items():  # after each step: a number may return to its first value by chance
                still[key] &= weight == before[key]

        optimizers = setup_optimizers(model, **options)
        for optimizer in optimizers:
            optimizer.register_step_post_hook(compare)
        losses, _ = train(model, optimizers, chain_batches(seed, steps))
        found[name] = {
            "rows_of_c_fc": float(torch.cat([still[key].all(1) for key in weights if "c_fc" in key]).float().mean()),
            "columns_of_c_proj": float(
                torch.cat([still[key].all(0) for key in weights if "mlp.c_proj" in key]).float().mean()
            ),
            "entries_of_the_blocks": float(torch.cat([still[key].flatten() for key in weights]).float().mean()),
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }
    return {"steps": steps, **found}


def momentum_order(seed: int = 0) -> Values:
    """Compare the steps of Muon with those of a momentum that sums orthogonalized gradients, after 200 gradients.

    The gradients are one matrix again and again; fresh noise; or the matrix with ten times its size of noise. The steps
    use the exact U V^T, so that the order is their only difference.
    """
    momentum, count, size = 0.95, 200, 64
    found: Values = {"momentum": momentum, "horizon": 1 / (1 - momentum), "gradients": count}
    for name, signal, noise in (("same_gradient", 1.0, 0.0), ("noise", 0.0, 1.0), ("signal_in_noise", 1.0, 10.0)):
        generator = torch.Generator().manual_seed(seed)
        fixed = torch.randn(size, size, generator=generator)
        before, after = torch.zeros(size, size), torch.zeros(size, size)
        for _ in range(count):
            g = signal * fixed + noise * torch.randn(size, size, generator=generator)
            before.lerp_(g, 1 - momentum)
            after.mul_(momentum).add_(polar(g))
        steps = {"before": polar(momentum * before + (1 - momentum) * g), "after": after}
        found[name] = {}
        for order, step in steps.items():
            values = torch.linalg.svdvals(step)
            found[name][order] = {
                "smallest": float(values.min()),
                "largest": float(values.max()),
                "cosine_to_signal": cosine(step, polar(fixed)) if signal else 0.0,
            }
    return found


def loss_scale(seed: int = 0) -> Values:
    """Multiply the loss by a factor, train, and compare the losses: Muon and AdamW do not see the factor; SGD does."""
    steps = 20
    found: Values = {"steps": steps}
    for name, factors in (("hybrid", (1024.0, 1e-3)), ("sgd", (1024.0,))):
        plain, _ = train(small_model(seed), None, chain_batches(seed, steps), optimizer=name)
        found[name] = {"first_loss": plain[0], "last_loss": plain[-1]}
        for factor in factors:
            scaled, _ = train(small_model(seed), None, chain_batches(seed, steps), optimizer=name, factor=factor)
            kind = "times_1024" if factor > 1 else "times_one_thousandth"
            differences = [abs(a - b) for a, b in zip(plain, scaled, strict=True)]
            found[name][kind] = {"largest_difference": max(differences), "last_loss": scaled[-1]}
    return found


def update_size(seed: int = 0) -> Values:
    """Train a small model at a constant rate, and compare the norm of a gradient with that of Muon's step.

    The step of a matrix, divided by the rate and the factor of its aspect ratio, has a Frobenius norm near
    sqrt(min(rows, columns)), whatever the gradient is.
    """
    steps, name = 40, "transformer.h.1.mlp.c_fc.weight"
    model = small_model(seed)
    _, watched = train(model, setup_optimizers(model), chain_batches(seed, steps), watch=name)
    rows, columns = dict(model.named_parameters())[name].shape
    rate, factor = 0.02, math.sqrt(max(1.0, rows / columns))
    gradients = [gradient for gradient, _ in watched[5:]]  # the first steps wait for c_proj, which starts at zero
    sizes = [step / rate / factor for _, step in watched[5:]]
    return {
        "matrix": name,
        "steps": steps,
        "root_of_the_rank": math.sqrt(min(rows, columns)),
        "gradient_largest": max(gradients),
        "gradient_smallest": min(gradients),
        "gradient_ratio": max(gradients) / min(gradients),
        "step_largest": max(sizes),
        "step_smallest": min(sizes),
        "step_ratio": max(sizes) / min(sizes),
    }


def update_by_width(seed: int = 0) -> Values:
    """Measure what a step of the same rate does to the outputs of a layer of several widths.

    The input x has entries of size 1 (RMS). "orthogonal" is a step with singular values of 1. "signs" is Adam's first
    step, whose entries all have size 1: random signs, and signs that fit the input, the worst case.
    """
    widths = (64, 128, 256, 512, 1024)
    found: Values = {"widths": list(widths)}
    columns: dict[str, list[float]] = {
        key: [] for key in ("orthogonal_entry", "orthogonal_output", "signs_output", "fitting_signs_output")
    }
    for width in widths:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(width, 64, generator=generator)
        orthogonal, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
        signs = torch.randn(width, width, generator=generator).sign()
        columns["orthogonal_entry"].append(rms(orthogonal))
        columns["orthogonal_output"].append(rms(orthogonal @ inputs) / rms(inputs))
        columns["signs_output"].append(rms(signs @ inputs) / rms(inputs))
        one = inputs[:, :1].sign()
        columns["fitting_signs_output"].append(rms((torch.ones(width, 1) @ one.T) @ one))
    return {**found, **columns}


def rms(x: Tensor) -> float:
    """Return the root of the mean square of the entries."""
    return float(x.square().mean().sqrt())


def aspect_factor(seed: int = 0) -> Values:
    """Measure the largest change of a layer's output, RMS to RMS, by a step of rate 1 under three factors.

    The factors are nanochat's sqrt(max(1, rows / columns)), sqrt(rows / columns) of
    https://jeremybernste.in/writing/deriving-muon, and 0.2 sqrt(max(rows, columns)) of arXiv:2502.16982.
    """
    width = 128
    found: Values = {}
    for name, rows, columns in (
        ("square", width, width),
        ("c_fc", 4 * width, width),
        ("c_proj", width, 4 * width),
    ):
        step = polar(random_matrix(seed, rows, columns))
        gain = float(torch.linalg.matrix_norm(step, 2)) * math.sqrt(columns / rows)
        factors = {
            "nanochat": math.sqrt(max(1.0, rows / columns)),
            "bernstein": math.sqrt(rows / columns),
            "moonshot": 0.2 * math.sqrt(max(rows, columns)),
        }
        found[name] = {"rows": rows, "columns": columns}
        for source, factor in factors.items():
            found[name][source] = {"factor": factor, "largest_change": factor * gain, "entry": factor * rms(step)}
    return found


def momentum_horizon() -> Values:
    """Compute the horizon 1 / (1 - mu) of exponential averages, and the weight of the newest of them."""
    found: Values = {}
    for name, mu in (
        ("muon_start", 0.85),
        ("muon_end", 0.95),
        ("adam_beta1", 0.8),
        ("adam_beta2", 0.95),
        ("usual_beta1", 0.9),
        ("usual_beta2", 0.999),
    ):
        found[name] = {"momentum": mu, "horizon": 1 / (1 - mu), "weight_within_the_horizon": 1 - mu ** (1 / (1 - mu))}
    found["ratio_of_beta2"] = found["usual_beta2"]["horizon"] / found["adam_beta2"]["horizon"]
    return found


def momentum_spectrum(checkpoint: Path = Path("runs/d4")) -> Values:
    """Take Muon's momentum of a trained model from its checkpoint, and show its singular values before and after."""
    tensors, meta = load_checkpoint(checkpoint)
    buffers = {
        name.removesuffix(".momentum_buffer"): value
        for name, value in tensors["optimizer"].items()
        if name.endswith(".momentum_buffer")
    }
    layer = max(int(name.split(".")[2]) for name in buffers) // 2
    found: Values = {"step": meta["step"], "layer": layer}
    spectra: Values = {}
    for part in ("attn.c_q", "mlp.c_fc"):
        buffer = buffers[f"transformer.h.{layer}.{part}.weight"]
        before = torch.linalg.svdvals(buffer.double())
        unit = before / before.square().sum().sqrt()
        key = part.replace(".", "_")
        after = {name: orthogonalized(buffer, name) for name in NAMES}
        found[key] = {
            "shape": list(buffer.shape),
            "stable_rank": float(before.square().sum() / before[0].square()),
            "share_of_the_first_eighth": float((unit[: len(unit) // 8] ** 2).sum()),
            "condition": float(before[0] / before[-1]),
            **{name: described(after[name]) for name in NAMES},
        }
        spectra[key] = {"before": thinned(unit), **{name: thinned(values) for name, values in after.items()}}
    return {**found, "spectra": spectra}


def orthogonalized(matrix: Tensor, coefficients: str) -> Tensor:
    """Return the singular values of a matrix after five steps of Newton-Schulz."""
    return torch.linalg.svdvals(ops.newton_schulz(matrix, steps=5, coefficients=coefficients).double())


def described(singular_values: Tensor) -> Values:
    """Return the spread of singular values, and how far they are from 1."""
    below_half = float((singular_values < 0.5).double().mean())
    return {**spread(singular_values), "error": error_of(singular_values), "below_half": below_half}


def thinned(values: Tensor, count: int = 64) -> list[float]:
    """Return at most `count` of sorted values, evenly spread."""
    places = torch.linspace(0, len(values) - 1, min(count, len(values))).round().long()
    return [float(f"{value:.5g}") for value in values[places].tolist()]


def load_checkpoint(run: Path) -> tuple[dict[str, dict[str, Tensor]], Values]:
    """Return the tensors and the meta of a run's newest checkpoint."""
    return checkpoint.load(run / "checkpoints", warn=print)


# --- AdamW ---


def adamw_forms(seed: int = 0) -> Values:
    """Compare AdamW with forms of it that are met in texts: other decays, other places for the decay and for eps.

    arXiv:1711.05101 has the decay. In torch's AdamW eps is added after the bias correction.
    """
    rate, decay, steps, beta2, eps = 0.004, 0.1, 100, 0.95, 1e-3
    with_rate, without_rate = nn.Parameter(torch.ones(1)), torch.ones(1)
    optimizer = AdamW([with_rate], lr=rate, weight_decay=decay)
    for _ in range(steps):
        with_rate.grad = torch.zeros(1)
        optimizer.step()
        without_rate.mul_(1 - decay)

    p, g = random_matrix(seed, 1000).double(), random_matrix(seed + 1, 1000).double()
    large, step = 0.2, g.sign()
    first = (1 - large * decay) * p - large * step
    last = (1 - large * decay) * (p - large * step)

    small = 1e-3 * g.abs() + 1e-4
    v = (1 - beta2) * small.square()
    correction = math.sqrt(1 - beta2)
    after = small / (v.sqrt() / correction + eps)
    before = small / ((v.sqrt() + eps) / correction)
    plain = small / (v.sqrt() / correction)
    return {
        "decay": {
            "rate": rate,
            "weight_decay": decay,
            "steps": steps,
            "lambda_times_rate": float(with_rate.detach()),
            "lambda_alone": float(without_rate),
        },
        "decay_after_the_update": {
            "largest_difference": float((first - last).abs().max()),
            "rate_squared_times_decay": large * large * decay,
        },
        "eps_at_the_first_step": {
            "beta2": beta2,
            "eps": eps,
            "weight_before_the_correction": 1 / correction,
            "mean_step_without_eps": float(plain.mean()),
            "mean_step_eps_after": float(after.mean()),
            "mean_step_eps_before": float(before.mean()),
        },
        "first_step_is_a_sign": {f"gradient_{size:g}": first_adam_step(size) for size in (1e-4, 1.0, 1e4)},
    }


def first_adam_step(gradient: float) -> float:
    """Return by how much AdamW of rate 1 moves a parameter in its first step."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), gradient)
    AdamW([parameter], lr=1.0, betas=(0.8, 0.95), eps=1e-10).step()
    return float(-parameter.detach())


def embedding_rows(seed: int = 0) -> Values:
    """Count the rows of wte and lm_head that have a gradient, and those that AdamW moves.

    The tokens of the batches follow Zipf's law: the frequency of the token of rank r is proportional to 1 / r.
    """
    vocabulary, tokens, steps = 8192, 2048, 5
    model = small_model(seed, vocab_size=vocabulary, sequence_len=128)
    optimizers = setup_optimizers(model)
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1.0, vocabulary + 1)
    seen = torch.zeros(vocabulary, dtype=torch.bool)
    columns: dict[str, list[int]] = {
        key: []
        for key in ("wte_rows_with_gradient", "wte_rows_moved", "rows_seen_so_far", "lm_head_rows_with_gradient")
    }
    for _ in range(steps + 1):
        ids = torch.multinomial(frequencies, tokens + 16, replacement=True, generator=generator).view(16, 129)
        model(ids[:, :-1], ids[:, 1:]).backward()
        wte, head = model.wte.weight, model.lm_head.weight
        assert wte.grad is not None
        assert head.grad is not None
        has_gradient = (wte.grad != 0).any(1)
        seen |= has_gradient
        before = wte.detach().clone()
        columns["lm_head_rows_with_gradient"].append(int((head.grad != 0).any(1).sum()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        columns["wte_rows_with_gradient"].append(int(has_gradient.sum()))
        columns["wte_rows_moved"].append(int((wte.detach() != before).any(1).sum()))
        columns["rows_seen_so_far"].append(int(seen.sum()))
    last = {f"last_{key}": values[-1] for key, values in columns.items()}
    return {"vocabulary": vocabulary, "tokens": tokens, "batches": steps + 1, **columns, **last}


def gradient_by_width(seed: int = 0) -> Values:
    """Measure the gradient of lm_head at the start of training, for several widths."""
    widths = (64, 128, 256, 512)
    norms, entries = [], []
    for width in widths:
        model = small_model(seed, vocab_size=2048, width=width)
        ids = chain_batches(seed, 1, vocabulary=2048)[0]
        model(ids[:, :-1], ids[:, 1:]).backward()
        gradient = model.lm_head.weight.grad
        assert gradient is not None
        norms.append(float(gradient.norm()))
        entries.append(rms(gradient))
    return {"widths": list(widths), "entry": entries, "norm": norms, "largest_ratio": max(entries) / min(entries)}


# --- a small model on a seeded chain of tokens ---


def small_model(seed: int, vocab_size: int = 512, sequence_len: int = 64, width: int = 128) -> GPT:
    """Return a model of two layers with new weights."""
    heads = max(1, width // 128)
    model = GPT(
        GPTConfig(
            sequence_len=sequence_len, vocab_size=vocab_size, n_layer=2, n_head=heads, n_kv_head=heads, n_embd=width
        )
    )
    model.init_weights(seed)
    return model


def chain_batches(seed: int, count: int, vocabulary: int = 512) -> list[Tensor]:
    """Return batches of 8 rows of 65 tokens in which three of four tokens follow from the one before."""
    generator = torch.Generator().manual_seed(seed)
    follower = torch.randperm(vocabulary, generator=generator)
    frequencies = 1 / torch.arange(1.0, vocabulary + 1)
    batches = []
    for _ in range(count):
        fresh = torch.multinomial(frequencies, 8 * 65, replacement=True, generator=generator).view(8, 65)
        follows = torch.rand(8, 65, generator=generator) < 0.75
        for place in range(1, 65):
            fresh[:, place] = torch.where(follows[:, place], follower[fresh[:, place - 1]], fresh[:, place])
        batches.append(fresh)
    return batches


def train(
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer] | None,
    batches: Sequence[Tensor],
    *,
    optimizer: str = "hybrid",
    factor: float = 1.0,
    watch: str | None = None,
) -> tuple[list[float], list[tuple[float, float]]]:
    """Take one step for each batch, with the loss times `factor`.

    Returns the losses, and the norms of the gradient and of the step of the parameter `watch`.
    """
    if optimizers is None:
        optimizers = setup_optimizers(model, optimizer=optimizer)
    losses, norms = [], []
    watched = dict(model.named_parameters())[watch] if watch else None
    for ids in batches:
        loss = model(ids[:, :-1], ids[:, 1:])
        (loss * factor).backward()
        losses.append(loss.item())
        gradient = float(watched.grad.norm()) if watched is not None and watched.grad is not None else 0.0
        before = watched.detach().clone() if watched is not None else None
        for each in optimizers:
            each.step()
            each.zero_grad()
        if watched is not None and before is not None:
            norms.append((gradient, float((watched.detach() - before).norm())))
    return losses, norms


DEMONSTRATIONS = {
    "newton-schulz": newton_schulz,
    "steepest-direction": steepest_direction,
    "cropped-update": cropped_update,
    "frozen-rows": frozen_rows,
    "momentum-order": momentum_order,
    "momentum-horizon": momentum_horizon,
    "momentum-spectrum": momentum_spectrum,
    "loss-scale": loss_scale,
    "update-size": update_size,
    "update-by-width": update_by_width,
    "aspect-factor": aspect_factor,
    "adamw-forms": adamw_forms,
    "embedding-rows": embedding_rows,
    "gradient-by-width": gradient_by_width,
}
