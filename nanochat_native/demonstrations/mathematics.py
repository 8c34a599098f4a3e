"""Demonstrations of chapters 1 and 2: bits, softmax, derivatives, products, norms, singular values, floats; and, with a
trained run, how surprised the model is by a text, and how surprised tables of frequencies are."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nanochat_native import ops
from nanochat_native.data import iterate_val, prepare
from nanochat_native.runs.config import STDLIB
from nanochat_native.runs.run_folder import load_config
from nanochat_native.runs.saved_model import load_model

MATRIX = ((1.2, 1.1), (0.4, 1.2))  # singular values 2 and 0.5; all parts of its decomposition are short decimals
D4_WIDTH, D4_HIDDEN = 256, 1024  # the first matrix of a d4's MLP
PAIR_PRIOR = 100.0  # the frequencies of single tokens count as this many observations of each pair
TEXT = """class Counter:
    def __init__(self, name):
        self.name = name
        self.values = []

    def add(self, value):
        if value is None:
            raise ValueError("no value")
        self.values.append(value)
"""


def surprise(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Measure the bits that a trained model needs for each token of a short Python class.

    A token to which the model gave the probability p costs -log2 p bits. Bits per byte is the sum of these, divided by
    the number of bytes.
    """
    model, tokenizer, _ = load_model(checkpoint, warn=_ignore)
    ids = tokenizer.encode(TEXT)
    row = torch.tensor([[tokenizer.bos_id, *ids]])
    with torch.inference_mode():
        nats = model(row[:, :-1].contiguous(), row[:, 1:].contiguous(), reduction="none").flatten().double()
    bits = (nats / math.log(2)).tolist()
    size = len(TEXT.encode())
    return {
        "tokens": [tokenizer.decode([token]) for token in ids],
        "bits": bits,
        "total_bits": sum(bits),
        "bytes": size,
        "bits_per_byte": sum(bits) / size,
        "median_bits": sorted(bits)[len(bits) // 2],
        "share_of_the_worst_tenth": sum(sorted(bits)[-len(bits) // 10 :]) / sum(bits),
    }


def frequency_baselines(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Measure models that are tables of frequencies, on the validation text of a run.

    uniform: every token has the probability 1 / V. frequencies: its frequency in the training text. pairs: its
    frequency after the token before it, mixed with the frequencies of single tokens (a Dirichlet prior: MacKay and
    Peto, A hierarchical Dirichlet language model, 1995). The tables see the whole training text.
    """
    config = load_config(checkpoint)
    assert config.cache_dir is not None
    corpus = prepare(
        None if config.data == STDLIB else config.data,
        vocab_size=config.vocab_size,
        cache_dir=config.cache_dir,
        text_column=config.text_column,
        log=_ignore,
    )
    assert corpus.tokenizer is not None
    size = corpus.vocab_size
    tokens = np.asarray(corpus.train.read(0, len(corpus.train)), dtype=np.int64)
    batches = list(iterate_val(corpus.val, batch_rows=8, sequence_len=256, max_tokens=config.eval_tokens))
    inputs, targets = (np.concatenate([pair[i].numpy().ravel() for pair in batches]) for i in (0, 1))
    inputs, targets = inputs[targets >= 0], targets[targets >= 0]
    lengths = np.asarray(corpus.tokenizer.token_bytes)[targets]

    counts = np.bincount(tokens, minlength=size)
    single = (counts + 1.0) / (counts.sum() + size)
    pairs, pair_counts = np.unique(tokens[:-1] * size + tokens[1:], return_counts=True)
    wanted = inputs * size + targets
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0)
    before = np.bincount(tokens[:-1], minlength=size)[inputs]
    models = {
        "uniform": np.full(len(targets), 1 / size),
        "frequencies": single[targets],
        "pairs": (seen + PAIR_PRIOR * single[targets]) / (before + PAIR_PRIOR),
    }

    def measure(probability: Any) -> dict[str, float]:
        nats = -np.log(probability)
        bits = float(nats[lengths > 0].sum()) / math.log(2)
        return {"loss": float(nats.mean()), "bits_per_byte": bits / int(lengths.sum())}

    return {
        "training_tokens": len(tokens),
        "validation_tokens": len(targets),
        "validation_bytes": int(lengths.sum()),
        **{name: measure(probability) for name, probability in models.items()},
    }


def bits_and_nats() -> dict[str, Any]:
    """Compute entropy, cross-entropy and perplexity of a distribution over four tokens.

    Source: Shannon, A Mathematical Theory of Communication, 1948. The cross-entropy of p with a model q is
    -sum p log q, and exp of it in nats, or 2 to the power of it in bits, is the perplexity.
    """
    p = (0.5, 0.25, 0.125, 0.125)
    models = {"p_itself": p, "uniform": (0.25,) * 4, "reversed": p[::-1]}
    cross = {name: -sum(a * math.log2(b) for a, b in zip(p, q, strict=True)) for name, q in models.items()}
    entropy_bits = cross["p_itself"]
    entropy_nats = entropy_bits * math.log(2)
    return {
        "p": list(p),
        "cross_entropy_bits": cross,
        "extra_bits": {name: value - entropy_bits for name, value in cross.items()},
        "entropy_nats": entropy_nats,
        "perplexity": {
            "two_to_the_bits": 2**entropy_bits,
            "e_to_the_nats": math.exp(entropy_nats),
            "e_to_the_bits": math.exp(entropy_bits),
        },
    }


def softmax_overflow() -> dict[str, Any]:
    """Compute a softmax with and without the maximum subtracted, for logits that are shifted by a constant.

    exp(x) is finite up to the logarithm of the largest number of the type. softmax(x + c) = softmax(x) for every c, so
    c = -max(x) is a free choice which keeps every exponent at or below 0.
    """
    logits = torch.tensor([2.0, 1.0, 0.0])
    shifts = list(range(-120, 121, 3))

    def plain(x: Tensor) -> Tensor:
        powers = torch.exp(x)
        return powers / powers.sum()

    def safe(x: Tensor) -> Tensor:
        return plain(x - x.max())

    def curve(softmax: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[float | None]:
        return [_finite(softmax((logits + shift).to(dtype))[0].item()) for shift in shifts]

    far = torch.tensor([200.0, 0.0])
    return {
        "largest_exponent": {str(t)[6:]: math.log(torch.finfo(t).max) for t in (torch.float32, torch.float16)},
        "right": plain(logits.double())[0].item(),
        "shifts": shifts,
        "plain": {"float32": curve(plain, torch.float32), "float16": curve(plain, torch.float16)},
        "safe": {"float32": curve(safe, torch.float32), "float16": curve(safe, torch.float16)},
        "loss_of_the_unlikely_token": {
            "log_of_softmax_is_finite": math.isfinite(torch.log(safe(far))[1].item()),
            "log_softmax": -torch.log_softmax(far, 0)[1].item(),
        },
    }


def chain_rule(seed: int = 0) -> dict[str, Any]:
    """Differentiate one neuron by hand, by autograd and by differences, then an attention by the last two.

    The neuron is a = max(0, w x + b)^2 with the loss L = (a - y)^2. The central difference is (L(w + h) - L(w - h)) /
    2 h. Its error has a part that grows with h^2, and one from rounding that grows as h falls. The errors are the
    largest of 21 weights between 0.4 and 0.6.
    """
    x, w, b, y = 2.0, 0.5, 1.0, 1.0
    z = w * x + b
    a = max(0.0, z) ** 2
    factors = {"loss_by_a": 2 * (a - y), "a_by_z": 2 * max(0.0, z), "z_by_w": x}
    by_hand = math.prod(factors.values())

    def loss(weight: Tensor) -> Tensor:
        result: Tensor = (torch.relu(weight * x + b) ** 2 - y) ** 2
        return result

    def worst(h: float, dtype: torch.dtype) -> float:
        weights = torch.linspace(0.4, 0.6, 21, dtype=torch.float64)
        z = weights * x + b
        exact = 2 * (z.square() - y) * 2 * z * x
        high, low = (loss((weights + sign * h).to(dtype)).double() for sign in (1, -1))
        return ((high - low) / (2 * h) / exact - 1).abs().max().item()

    weight = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    (by_autograd,) = torch.autograd.grad(loss(weight), weight)
    exponents = [-k / 2 for k in range(2, 25)]
    errors = {str(dtype)[6:]: [worst(10**k, dtype) for k in exponents] for dtype in (torch.float64, torch.float32)}
    return {
        "forward": {"z": z, "a": a, "loss": (a - y) ** 2},
        "factors": factors,
        "by_hand": by_hand,
        "by_autograd": by_autograd.item(),
        "log10_h": exponents,
        "relative_error": errors,
        "best": {
            name: {"error": min(values), "log10_h": exponents[values.index(min(values))]}
            for name, values in errors.items()
        },
        "attention_relative_error": _directional_error(seed),
    }


def _directional_error(seed: int) -> float:
    """Return how far the derivative of an attention in a random direction is from a central difference, relatively."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 16, 2, 8)  # (B, T, H, D)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    directions = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)

    def scalar(inputs: Sequence[Tensor]) -> Tensor:
        q, k, v = inputs
        return (ops.attention(q, k, v) * weights).sum()

    leaves = [value.clone().requires_grad_() for value in values]
    gradients = torch.autograd.grad(scalar(leaves), leaves)
    derivative = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    h = 1e-6
    high, low = ([v + s * h * d for v, d in zip(values, directions, strict=True)] for s in (1, -1))
    return abs((scalar(high) - scalar(low)).item() / (2 * h) / derivative - 1)


def product_cost() -> dict[str, Any]:
    """Count the operations and bytes of a product (m, k) x (k, n), here a d4's c_fc for m tokens.

    The count of operations is that of torch's FlopCounterMode. The bytes are those of reading both factors once and
    writing the result once in float32.
    """
    k, n = D4_WIDTH, D4_HIDDEN
    rows = {}
    for m in (1, 8, 64, 512, 2048):
        with FlopCounterMode(display=False) as counter:
            torch.mm(torch.empty(m, k, device="meta"), torch.empty(k, n, device="meta"))
        flops, size = counter.get_total_flops(), 4 * (m * k + k * n + m * n)
        rows[f"m{m}"] = {
            "flops": flops,
            "formula": 2 * m * k * n,
            "bytes": size,
            "flops_per_byte": flops / size,
        }
    return {"k": k, "n": n, "products": rows}


def norms(seed: int = 0) -> dict[str, Any]:
    """Compare the Frobenius and the spectral norm of random n x n matrices and of their orthogonal factors U V^T.

    The gain is rms(A x) / rms(x), for a random x and for the x that is lengthened most.
    """
    found = {}
    for n in (64, 256, 512):
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
        x = torch.randn(n, generator=generator, dtype=torch.float64)
        u, s, vt = torch.linalg.svd(matrix)
        orthogonal = u @ vt
        found[f"n{n}"] = {
            "frobenius": torch.linalg.matrix_norm(matrix).item(),
            "spectral": s[0].item(),
            "frobenius_by_n": torch.linalg.matrix_norm(matrix).item() / n,
            "spectral_by_root_n": s[0].item() / math.sqrt(n),
            "gain_of_a_random_vector": (_rms(matrix @ x) / _rms(x)),
            "gain_of_the_best_vector": (_rms(matrix @ vt[0]) / _rms(vt[0])),
            "orthogonal_frobenius": torch.linalg.matrix_norm(orthogonal).item(),
            "orthogonal_spectral": torch.linalg.matrix_norm(orthogonal, 2).item(),
            "orthogonal_entry_rms": _rms(orthogonal),
            "orthogonal_gain": _rms(orthogonal @ x) / _rms(x),
        }
    return found


def singular_values() -> dict[str, Any]:
    """Decompose a 2 x 2 matrix into a rotation, a stretch and a rotation, and leave the stretch out.

    A = U diag(s) V^T. Among all orthogonal matrices, U V^T is the nearest to A in the Frobenius norm (Fan and Hoffman,
    1955): the search tries rotations and reflections by the tenth of a degree. newton_schulz approximates U V^T.
    """
    a = torch.tensor(MATRIX, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(a)
    signs = u.diagonal().sign()  # a column of U and the row of V^T that belongs to it may change their signs together
    u, vt = u * signs, vt * signs[:, None]
    orthogonal = u @ vt
    angles = torch.arange(0, 3600, dtype=torch.float64) * (math.pi / 1800)
    c, sine = torch.cos(angles), torch.sin(angles)
    rotations = torch.stack([torch.stack([c, -sine], -1), torch.stack([sine, c], -1)], -2)
    reflections = rotations @ torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    distances = {
        name: torch.linalg.matrix_norm(candidates - a)
        for name, candidates in (("rotations", rotations), ("reflections", reflections))
    }
    iterated = {
        name: ops.newton_schulz(a, steps=steps, coefficients=name)
        for name, steps in (("quintic", 5), ("polar_express", 5), ("cubic", 5))
    }
    return {
        "a": a.tolist(),
        "u": u.tolist(),
        "s": s.tolist(),
        "vt": vt.tolist(),
        "orthogonal": orthogonal.tolist(),
        "angle_degrees": math.degrees(math.atan2(orthogonal[1, 0].item(), orthogonal[0, 0].item())),
        "rebuilt": (u @ torch.diag(s) @ vt).tolist(),
        "distance": {
            "orthogonal": torch.linalg.matrix_norm(orthogonal - a).item(),
            "formula": math.sqrt(sum((value - 1) ** 2 for value in s.tolist())),
            "best_rotation": distances["rotations"].min().item(),
            "best_rotation_degrees": math.degrees(angles[distances["rotations"].argmin()].item()) - 360,
            "best_reflection": distances["reflections"].min().item(),
        },
        "newton_schulz": {
            name: {
                "singular_values": torch.linalg.svdvals(x).tolist(),
                "error": (torch.linalg.matrix_norm(x - orthogonal) / torch.linalg.matrix_norm(orthogonal)).item(),
            }
            for name, x in iterated.items()
        },
    }


def floats() -> dict[str, Any]:
    """Compare float32, bfloat16 and float16: bits, range, precision, and what each loses.

    Sources: IEEE 754 for float32 and float16; bfloat16 is the upper half of float32.
    """
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        fraction = round(-math.log2(info.eps))
        one = torch.tensor(1.0, dtype=dtype)
        found[str(dtype)[6:]] = {
            "bits": info.bits,
            "exponent_bits": info.bits - 1 - fraction,
            "fraction_bits": fraction,
            "largest": info.max,
            "smallest_normal": info.tiny,
            "gap_above_one": info.eps,
            "one_plus_a_thousandth": (one + 1e-3).item(),
            "seventy_thousand": _finite(torch.tensor(70000.0).to(dtype).item()),
            "ten_to_minus_eight": torch.tensor(1e-8).to(dtype).item(),
            "counts_to": _largest_count(dtype),
        }
    return {**found, "sum_of_4096_ones": {str(t)[6:]: _sum_of_ones(4096, t) for t in (torch.float32, torch.bfloat16)}}


def _largest_count(dtype: torch.dtype) -> int:
    """Return the first power of two to which adding 1 changes nothing."""
    count = torch.tensor(1.0, dtype=dtype)
    while (count + 1).item() != count.item():
        count = count * 2
    return int(count.item())


def _sum_of_ones(number: int, dtype: torch.dtype) -> float:
    """Return the sum of ones, added one after the other in a type."""
    total, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    for _ in range(number):
        total = total + one
    return total.item()


def _ignore(message: str) -> None:
    """Drop a warning or a note."""


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


DEMONSTRATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "surprise": surprise,
    "frequency-baselines": frequency_baselines,
    "bits-and-nats": bits_and_nats,
    "softmax-overflow": softmax_overflow,
    "chain-rule": chain_rule,
    "product-cost": product_cost,
    "norms": norms,
    "singular-values": singular_values,
    "floats": floats,
}
