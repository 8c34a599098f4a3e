"""The Newton-Schulz iteration: matrices with singular values near 1."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.dtypes import ALL_DTYPES, compute_dtype

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
) -> Tensor:
    """Orthogonalize matrices: replace the singular values of g by values near 1. Differentiable in plain torch.

    X0 = g / (f |g|_F). Each step has a triple (a, b, c): A = X X^T, X = a X + (b A + c A A) X.

    Args:
        g: (..., M, K), floating point. Each matrix is treated by itself and may have any scale.
        steps: The number of steps. The first `steps` triples are used; if there are fewer, the last one is repeated.
        coefficients: "quintic", Keller Jordan's (3.4445, -4.7750, 2.0315), or "cubic", (1.5, -0.5, 0), both with f = 1;
            "polar_express", the five triples of arXiv:2505.16932, with f = 1.01; or a list of triples, with f = 1.
        norms: (...) float64, the Frobenius norms |g|_F if they are known (see muon_momentum_). They save a pass over g,
            and are not verified: wrong ones give a wrong result, and too small ones let it grow without bound. Excludes
            derivatives and torch.func transforms.

    Returns:
        (..., M, K) in g's dtype, contiguous. A zero matrix gives zero; a NaN makes its matrix NaN.

    Raises:
        ValueError, TypeError: An argument is wrong, or norms is combined with a derivative.

    The CPU kernel computes in float32, or in float64 for float64. The CUDA kernels multiply in float16 (bfloat16 where
    the triples let numbers grow too large) with float32 sums, whatever g's type; on compute capability 9.0 they use
    tensor copies and wgmma. Where it is less work, steps run on the smaller Gram matrix, three and then two at a time.
    Errors on CUDA are at most half of those of the same steps in bfloat16.

    The kernels have no derivative. If g requires a gradient while grad mode is on, and under forward-mode AD and
    torch.func transforms, plain torch runs with a warning, differentiable and not in bfloat16. Optimizers call this
    under torch.no_grad().
    """
    triples, norm_factor = check_newton_schulz("newton_schulz", "g", g, steps, coefficients, norms)
    if norms is not None:
        modes.refuse_with("newton_schulz", "norms", g, norms)
    if backends.runs_native("newton_schulz", g, modes.unsupported(modes.derivative(g))):
        return native_newton_schulz(g, triples, norm_factor, norms)
    return reference_newton_schulz(g, steps=steps, coefficients=coefficients, norms=norms)


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
        checks.check_dtype(op, "norms", norms, (torch.float64,))
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


# --- reference ---


def reference_newton_schulz(
    g: Tensor,
    *,
    steps: int = 5,
    coefficients: str | Sequence[Sequence[float]] = "quintic",
    norms: Tensor | None = None,
) -> Tensor:
    """Return what `newton_schulz` returns; on CUDA in bfloat16, unless a derivative is asked for."""
    triples, norm_factor = newton_schulz_schedule(steps, coefficients)
    in_bfloat16 = g.device.type == "cuda" and not modes.derivative(g)
    dtype = torch.bfloat16 if in_bfloat16 else compute_dtype(g.dtype)
    if norms is None:
        norms = torch.linalg.vector_norm(g, dim=(-2, -1), dtype=torch.float64)
    norm = norms[..., None, None]
    x = (g / torch.where(norm == 0, 1.0, norm_factor * norm)).to(dtype)
    tall = g.size(-2) > g.size(-1)
    if tall:
        x = x.mT
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    if tall:
        x = x.mT
    return x.to(g.dtype).contiguous()


# --- native ---


def native_newton_schulz(g: Tensor, triples: Sequence[Triple], norm_factor: float, norms: Tensor | None) -> Tensor:
    """Run the kernel."""
    kernel_dtype = torch.float32 if g.device.type == "cuda" else compute_dtype(g.dtype)
    with torch.no_grad():
        x = torch.ops.nanochat_native.newton_schulz(g.to(kernel_dtype), flattened(triples), norm_factor, norms)
        return x.to(g.dtype)


def flattened(triples: Sequence[Triple]) -> list[float]:
    """Return a, b, c of each step in turn."""
    return [number for triple in triples for number in triple]


def _fake(g: Tensor, coefficients: Sequence[float], norm_factor: float, norms: Tensor | None) -> Tensor:
    return g.new_empty(g.shape)


schema.register("newton_schulz", _fake)
