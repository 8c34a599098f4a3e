"""The Newton-Schulz iteration: matrices with singular values near 1."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.dtypes import ALL_DTYPES, compute_dtype, widest_dtype

Triple = tuple[float, float, float]

# Keller Jordan's quintic (https://kellerjordan.github.io/posts/muon/); the five steps of the Polar Express,
# arXiv:2505.16932; the textbook cubic. The Polar Express needs its input strictly inside the unit ball, so it divides
# by a little more than the norm.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    "cubic": ((1.5, -0.5, 0.0),),
}
NORM_FACTOR = {"polar_express": 1.01}


def newton_schulz(
    g: Tensor,
    *,
    steps: int = 5,
    coefficients: str | Sequence[Triple] = "quintic",
    norms: Tensor | None = None,
    row_norms: Tensor | None = None,
    equilibrate_rows: bool = False,
    norm_eps: float = 0.0,
    allow_bfloat16: bool = False,
) -> Tensor:
    """Orthogonalize matrices: replace the singular values of g by values near 1. Differentiable in plain torch.

    X0 = g / (f |g|_F + norm_eps). Each step has a triple (a, b, c): A = X X^T, X = a X + (b A + c A A) X.

    Args:
        g: (..., M, K), floating point. Each matrix is treated by itself and may have any scale.
        steps: The number of steps. The first `steps` triples are used; if there are fewer, the last one is repeated.
        coefficients: "quintic", Keller Jordan's (3.4445, -4.7750, 2.0315), or "cubic", (1.5, -0.5, 0), both with f = 1;
            "polar_express", the five triples of arXiv:2505.16932, with f = 1.01; or a list of triples, with f = 1.
        norms: (...) float64 (float32 on MPS), the Frobenius norms |g|_F if they are known (see muon_momentum_). They
            save a pass over g, and are not verified: wrong ones give a wrong result, and too small ones let it grow
            without bound. Excludes derivatives and torch.func transforms.
        row_norms: (..., M) of the same type, the norms of the rows if they are known, instead of norms and with the
            same limits.
        equilibrate_rows: First scale each row to the norm |g|_F / sqrt(M), as in MuonEq's R (arXiv:2603.28254), in the
            pass that divides by the norm. Rows whose norm is below norm_eps grow by the factor of a row of that norm.
        norm_eps: Added to the norm that g is divided by, at least 0.
        allow_bfloat16: Allow the CPU kernel to multiply matrices that are rounded to bfloat16, with float32 sums, on
            processors that multiply bfloat16. float64 is not rounded.

    Returns:
        (..., M, K) in g's dtype, contiguous. A zero matrix gives zero; a NaN makes its matrix NaN.

    Raises:
        ValueError, TypeError: An argument is wrong, or norms is combined with a derivative.

    The CPU kernel computes in float32, or in float64 for float64. With allow_bfloat16, and AMX, AVX512-BF16 or BFMMLA,
    it rounds X, A and b A + c A A to bfloat16 in each step, as torch.optim.Muon does, and has the same error: five
    steps are within 3% of the exact result for random matrices, and within 30% if the singular values decay by six
    decades. On other processors allow_bfloat16 changes nothing. The CUDA kernels multiply in float16 (bfloat16 where
    the triples let numbers grow too large) with float32 sums, whatever g's type; on compute capability 9.0 they use
    tensor copies and wgmma. Where it is less work, steps run on the smaller Gram matrix, three and then two at a time.
    Errors on CUDA are at most half of those of the same steps in bfloat16.

    The kernels have no derivative. If g requires a gradient while grad mode is on, and under forward-mode AD and
    torch.func transforms, plain torch runs with a warning, differentiable and not in bfloat16. Optimizers call this
    under torch.no_grad().
    """
    op = "newton_schulz"
    triples, norm_factor = check_newton_schulz(op, "g", g, steps, coefficients, norms)
    if not 0 <= norm_eps < math.inf:
        raise ValueError(f"{op}: norm_eps must be a finite number >= 0, got {norm_eps}")
    if row_norms is not None:
        if norms is not None:
            raise ValueError(f"{op}: norms and row_norms exclude each other, got both")
        checks.check_dtype(op, "row_norms", row_norms, (widest_dtype(g.device),))
        checks.check_device(op, "row_norms", row_norms, g.device, "g")
        if row_norms.shape != g.shape[:-1]:
            raise ValueError(
                f"{op}: row_norms must have shape {tuple(g.shape[:-1])}, that of g without K, "
                f"got {tuple(row_norms.shape)}"
            )
    for name, known in (("norms", norms), ("row_norms", row_norms)):
        if known is not None:
            modes.refuse_with(op, name, g, known)
    if not backends.runs_native(op, g, modes.unsupported(modes.derivative(g))):
        return reference_newton_schulz(
            g,
            steps=steps,
            coefficients=coefficients,
            norms=norms,
            row_norms=row_norms,
            equilibrate_rows=equilibrate_rows,
            norm_eps=norm_eps,
        )
    if row_norms is None and not equilibrate_rows and not norm_eps:
        return native_newton_schulz(g, triples, norm_factor, norms, allow_bfloat16=allow_bfloat16)
    scales = row_scales(g, norm_factor, norms, row_norms, equilibrate_rows, norm_eps)
    return native_newton_schulz(g, triples, norm_factor, None, scales, allow_bfloat16=allow_bfloat16)


def check_newton_schulz(
    op: str, name: str, g: Tensor, steps: int, coefficients: str | Sequence[Triple], norms: Tensor | None
) -> tuple[list[Triple], float]:
    """Check the arguments of operator `op`, whose matrices are its argument `name`, and return the schedule."""
    if g.dim() < 2:
        raise ValueError(f"{op}: {name} must have shape (..., M, K), got {tuple(g.shape)}")
    checks.check_dtype(op, name, g, ALL_DTYPES)
    if steps < 1:
        raise ValueError(f"{op}: steps must be >= 1, got {steps}")
    if norms is not None:
        checks.check_dtype(op, "norms", norms, (widest_dtype(g.device),))
        if norms.shape != g.shape[:-2]:
            raise ValueError(
                f"{op}: norms must have shape {tuple(g.shape[:-2])}, that of {name} without M and K, "
                f"got {tuple(norms.shape)}"
            )
        checks.check_device(op, "norms", norms, g.device, name)
    return newton_schulz_schedule(steps, coefficients)


def newton_schulz_schedule(steps: int, coefficients: str | Sequence[Sequence[float]]) -> tuple[list[Triple], float]:
    """Return the triple (a, b, c) of each step, and the factor on the Frobenius norm that the input is divided by.

    The first `steps` triples are used; if there are fewer, the last one is repeated.
    """
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"newton_schulz: coefficients must be {', '.join(map(repr, COEFFICIENTS))} or a list of triples, "
                f"got {coefficients!r}"
            )
        triples, norm_factor = list(COEFFICIENTS[coefficients]), NORM_FACTOR.get(coefficients, 1.0)
    else:
        if not coefficients or any(len(triple) != 3 for triple in coefficients):
            raise ValueError(
                f"newton_schulz: coefficients must be a name or a list of triples (a, b, c), got {coefficients!r}"
            )
        triples, norm_factor = [(float(a), float(b), float(c)) for a, b, c in coefficients], 1.0
    return triples[:steps] + [triples[-1]] * (steps - len(triples)), norm_factor


def fits_float16(triples: Sequence[Triple], norm_factor: float) -> bool:
    """Return whether float16 holds all numbers of these steps, with a margin of 8, by bounds on singular values."""
    top = 1 / norm_factor  # no singular value of X is larger
    for a, b, c in triples:
        squares = [(top * i / 256) ** 2 for i in range(257)]
        symmetric = max(abs(b * square + c * square * square) for square in squares)  # of b A + c A A
        following = max(abs(a + b * square + c * square * square) * square**0.5 for square in squares)
        # False for NaN.
        if not max(top * top, abs(b) * top * top, abs(c) * top * top, symmetric, abs(a) * top, following) <= 8192:
            return False
        top = following
    return True


# --- reference ---


def reference_newton_schulz(
    g: Tensor,
    *,
    steps: int = 5,
    coefficients: str | Sequence[Sequence[float]] = "quintic",
    norms: Tensor | None = None,
    row_norms: Tensor | None = None,
    equilibrate_rows: bool = False,
    norm_eps: float = 0.0,
) -> Tensor:
    """Return what `newton_schulz` returns; on CUDA in 16 bits, unless a derivative is asked for.

    These are bfloat16, and on a GPU without it float16, or float32 where float16 could overflow.
    """
    triples, norm_factor = newton_schulz_schedule(steps, coefficients)
    x = divide_by_norm(g, norm_factor, norms, row_norms, equilibrate_rows, norm_eps)
    x = x.to(_product_dtype(g, triples, norm_factor))
    tall = g.size(-2) > g.size(-1)
    if tall:
        x = x.mT
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    if tall:
        x = x.mT
    return x.to(g.dtype).contiguous()


def divide_by_norm(
    g: Tensor,
    norm_factor: float,
    norms: Tensor | None,
    row_norms: Tensor | None,
    equilibrate_rows: bool,
    norm_eps: float,
) -> Tensor:
    """Return X0 of `newton_schulz`, in the widest type of the device."""
    if row_norms is not None or equilibrate_rows or norm_eps:
        return g * row_scales(g, norm_factor, norms, row_norms, equilibrate_rows, norm_eps)[..., None]
    if norms is None:
        norms = torch.linalg.vector_norm(g, dim=(-2, -1), dtype=widest_dtype(g.device))
    norm = norms[..., None, None]
    return g / torch.where(norm == 0, 1.0, norm_factor * norm)


def row_scales(
    g: Tensor,
    norm_factor: float,
    norms: Tensor | None,
    row_norms: Tensor | None,
    equilibrate_rows: bool,
    norm_eps: float,
) -> Tensor:
    """Return the number (..., M), of the widest type, that multiplies each row of g to make X0, 0 in a zero matrix."""
    if norms is not None and not equilibrate_rows:
        norms = norms[..., None]
        divisors = torch.where(norms == 0, 1.0, norm_factor * norms + norm_eps)
        return torch.where(norms == 0, 0.0, 1 / divisors).expand(g.shape[:-1])
    if row_norms is None:
        row_norms = torch.linalg.vector_norm(g, dim=-1, dtype=widest_dtype(g.device))
    norms = torch.linalg.vector_norm(row_norms, dim=-1, keepdim=True)
    scales = torch.ones_like(row_norms)
    if equilibrate_rows:
        floors = row_norms.clamp_min(norm_eps)
        scales = norms / g.size(-2) ** 0.5 / torch.where(floors == 0, 1.0, floors)
        norms = torch.linalg.vector_norm(scales * row_norms, dim=-1, keepdim=True)
    divisors = torch.where(norms == 0, 1.0, norm_factor * norms + norm_eps)
    return torch.where(norms == 0, 0.0, scales / divisors)


def _product_dtype(g: Tensor, triples: Sequence[Triple], norm_factor: float) -> torch.dtype:
    if g.device.type != "cuda" or modes.derivative(g):
        return compute_dtype(g.dtype)
    if not backends.gpu_problem(g.device.index):
        return torch.bfloat16
    return torch.float16 if fits_float16(triples, norm_factor) else torch.float32


# --- native ---


def native_newton_schulz(
    g: Tensor,
    triples: Sequence[Triple],
    norm_factor: float,
    norms: Tensor | None,
    scales: Tensor | None = None,
    *,
    allow_bfloat16: bool = False,
) -> Tensor:
    """Run the kernel; with scales (..., M), X0 is g with its rows multiplied by them."""
    kernel_dtype = torch.float32 if g.device.type == "cuda" else compute_dtype(g.dtype)
    with torch.no_grad():
        x = torch.ops.nanochat_native.newton_schulz(
            g.to(kernel_dtype), flattened(triples), norm_factor, norms, scales, allow_bfloat16
        )
        return x.to(g.dtype)


def flattened(triples: Sequence[Triple]) -> list[float]:
    """Return a, b, c of each step in turn."""
    return [number for triple in triples for number in triple]


def _fake(
    g: Tensor,
    coefficients: Sequence[float],
    norm_factor: float,
    norms: Tensor | None,
    scales: Tensor | None = None,
    allow_bfloat16: bool = False,
) -> Tensor:
    return g.new_empty(g.shape)


schema.register("newton_schulz", _fake)
