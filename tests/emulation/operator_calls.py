"""The CUDA operators of csrc/cuda without torch's bindings: raw pointers, through tests/emulation/operators/*.cpp.

Each function has the arguments of its reference in nanochat_native.ops.reference, and `schedule`, the emulation's seed.
"""

from dataclasses import dataclass

import torch
from harness import SHARED_LIMIT

from nanochat_native.ops import reference

ADAMW, MUON, LOSS, ATTENTION_FORWARD, ATTENTION_BACKWARD, NEWTON_SCHULZ = (
    f"operators/{name}.cpp"
    for name in ("adamw", "muon", "softcap_cross_entropy", "attention_forward", "attention_backward", "newton_schulz")
)
RMS_NORM, MIX_RMS_NORM, ROTARY_NORM, RELU_SQUARED, NORMUON = (
    f"operators/{name}.cpp" for name in ("rms_norm", "mix_rms_norm", "rotary_norm", "relu_squared", "normuon")
)
VALUE_EMBEDDING, SMEAR = (f"operators/{name}.cpp" for name in ("value_embedding", "smear"))
LIBRARIES = {
    "adamw": ADAMW,
    "muon_momentum": MUON,
    "muon_update": MUON,
    "normuon_update": NORMUON,
    "softcap_cross_entropy": LOSS,
    "attention_forward": ATTENTION_FORWARD,
    "places": ATTENTION_FORWARD,
    "forward_tile": ATTENTION_FORWARD,
    "attention_backward": ATTENTION_BACKWARD,
    "newton_schulz": NEWTON_SCHULZ,
    "newton_schulz_plan": NEWTON_SCHULZ,
    "rms_norm": RMS_NORM,
    "rms_norm_backward": RMS_NORM,
    "embedding_rms_norm": RMS_NORM,
    "add_value_embedding": VALUE_EMBEDDING,
    "add_value_embedding_backward": VALUE_EMBEDDING,
    "smear": SMEAR,
    "smear_backward": SMEAR,
    "mix_rms_norm": MIX_RMS_NORM,
    "mix_rms_norm_backward": MIX_RMS_NORM,
    "rotary_norm": ROTARY_NORM,
    "rotary_norm_backward": ROTARY_NORM,
    "relu_squared": RELU_SQUARED,
    "relu_squared_backward": RELU_SQUARED,
}
LEAST_SHARED_LIMIT = 99 * 1024  # bytes for a block on compute capabilities 8.6, 8.9 and 12.0
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # nanochat::DType


class Operators:
    """Every operator, from the library that holds it."""

    def __init__(self, kernels):
        self.kernels, self.device = kernels, kernels.device

    def call(self, entry, *values, **options):
        self.kernels(LIBRARIES[entry]).call(entry, *values, **options)


def shared_limit(hopper):
    """Return the shared memory of the GPUs that a path must fit into: without Hopper's instructions, the smallest."""
    return SHARED_LIMIT if hopper else LEAST_SHARED_LIMIT


def number_and_address(value, default):
    """Return a number or a tensor in the form of an entry: the number, and the address of the number."""
    return (default, value) if isinstance(value, torch.Tensor) else (type(default)(value), 0)


def adamw_(
    kernels,
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    *,
    step,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    stochastic_rounding=False,
    seed=0,
    cautious=False,
    copies=None,
    multiprocessors=1,
    schedule=0,
):
    step, step_address = number_and_address(step, 1)
    lr, lr_address = number_and_address(lr, 0.0)
    weight_decay, weight_decay_address = number_and_address(weight_decay, 0.0)
    numels = torch.tensor([param.numel() for param in params])
    workspace = torch.full((64,), 255, dtype=torch.uint8, device=params[0].device)
    kernels.call(
        "adamw",
        *(params, grads, exp_avgs, exp_avg_sqs, copies or 0, numels, len(params)),
        *(DTYPES[params[0].dtype], DTYPES[exp_avgs[0].dtype], step, lr, beta1, beta2, eps, weight_decay),
        *(int(stochastic_rounding), seed, int(cautious), step_address, lr_address, weight_decay_address),
        *(workspace, workspace.numel(), multiprocessors),
        seed=schedule,
    )


def muon_momentum_(
    kernels,
    grads,
    momentum_buffers,
    *,
    momentum,
    nesterov=True,
    return_norm=False,
    update=None,
    multiprocessors=1,
    schedule=0,
):
    count, numel = len(grads), grads[0].numel()
    momentum, momentum_address = number_and_address(momentum, 0.0)
    if update is None:
        update = torch.full((count, *grads[0].shape), torch.nan, device=grads[0].device)
    norms = torch.full((count,), torch.nan, dtype=torch.float64, device=grads[0].device)
    workspace = torch.full((count * (numel // 1024 + 1),), torch.nan, dtype=torch.float64, device=grads[0].device)
    kernels.call(
        "muon_momentum",
        *(grads, momentum_buffers, update, norms if return_norm else 0, count, numel, DTYPES[grads[0].dtype]),
        *(momentum, int(nesterov), momentum_address, workspace, workspace.nbytes, multiprocessors),
        seed=schedule,
    )
    return (update, norms) if return_norm else update


def muon_update_(
    kernels,
    params,
    update,
    *,
    lr,
    weight_decay=0.0,
    scale=1.0,
    cautious=False,
    copies=None,
    multiprocessors=1,
    schedule=0,
):
    lr, lr_address = number_and_address(lr, 0.0)
    weight_decay, weight_decay_address = number_and_address(weight_decay, 0.0)
    kernels.call(
        "muon_update",
        *(params, copies or 0, update, len(params), params[0].numel(), DTYPES[params[0].dtype]),
        *(lr, weight_decay, scale, int(cautious), lr_address, weight_decay_address, multiprocessors),
        seed=schedule,
    )


def normuon_update_(
    kernels,
    params,
    update,
    second_momentums,
    *,
    lr,
    weight_decay=0.0,
    scale=1.0,
    cautious=False,
    beta2=0.95,
    eps=1e-10,
    renormalise=False,
    norm_eps=0.0,
    copies=None,
    schedule=0,
):
    lr, lr_address = number_and_address(lr, 0.0)
    weight_decay, weight_decay_address = number_and_address(weight_decay, 0.0)
    count, M, K = update.shape
    parts = 1 if M >= K else -(-M // 64)
    workspace = torch.full((count * max(M, K) * (8 * parts + 4),), 255, dtype=torch.uint8, device=update.device)
    kernels.call(
        "normuon_update",
        *(params, copies or 0, second_momentums, update, count, M, K, DTYPES[params[0].dtype]),
        *(lr, weight_decay, scale, int(cautious), lr_address, weight_decay_address),
        *(beta2, eps, int(renormalise), norm_eps, workspace, workspace.nbytes),
        seed=schedule,
    )


def softcap_cross_entropy(
    kernels, logits, targets, *, grad_scale=None, softcap=15.0, ignore_index=-1, schedule=0, misalignment=16
):
    """Losses (rows,); logits become the gradient where grad_scale, one float32, is given."""
    loss = torch.full(targets.shape, torch.nan, device=logits.device)
    kernels.call(
        "softcap_cross_entropy",
        *(logits, targets, loss, 0 if grad_scale is None else grad_scale, *logits.shape),
        *(DTYPES[logits.dtype], ignore_index, softcap),
        seed=schedule,
        misalignment=misalignment,
    )
    return loss


def poisoned_like(tensor):
    return torch.full_like(tensor, torch.nan, memory_format=torch.contiguous_format)


def poisoned(shape, like):
    """NaN in float32, on the device of another tensor."""
    return torch.full(shape, torch.nan, device=like.device)


EPS = torch.finfo(torch.float32).eps


def rms_norm(kernels, x, residual=None, *, with_sum=True, eps=EPS, schedule=0):
    """(sum or None, y, r) of x (N, C)."""
    total = poisoned_like(x) if with_sum else None
    y, r = poisoned_like(x), poisoned(x.shape[:1], x)
    kernels.call(
        "rms_norm",
        *(x, 0 if residual is None else residual, total if with_sum else 0, y, r, *x.shape, DTYPES[x.dtype], eps),
        seed=schedule,
    )
    return total, y, r


def rms_norm_backward(kernels, dy, y, r, dsum=None, *, schedule=0):
    dx = poisoned_like(dy)
    kernels.call(
        "rms_norm_backward",
        *(dy, y, r, 0 if dsum is None else dsum, dx, *dy.shape, DTYPES[dy.dtype]),
        seed=schedule,
    )
    return dx


def embedding_rms_norm(kernels, tokens, table, dtype, *, eps=EPS, schedule=0):
    """(y, r) of tokens (N,)."""
    N, (V, C) = tokens.numel(), table.shape
    y, r = poisoned((N, C), table).to(dtype), poisoned((N,), table)
    kernels.call(
        "embedding_rms_norm",
        *(table, tokens, y, r, N, C, V, DTYPES[table.dtype], DTYPES[dtype], eps),
        seed=schedule,
    )
    return y, r


def value_embedding_problem(v, h, gate, table, ids):
    """h, its stride, gate, table, ids, N, Hkv, D, I, V and the types of v (N, Hkv, D) and table."""
    sizes = (*v.shape, h.size(1), table.size(0))
    return (h, h.stride(0), gate, table, ids, *sizes, DTYPES[v.dtype], DTYPES[table.dtype])


def add_value_embedding(kernels, v, h, gate, table, ids, *, schedule=0):
    out = poisoned_like(v)
    kernels.call("add_value_embedding", v, *value_embedding_problem(v, h, gate, table, ids), out, seed=schedule)
    return out


def add_value_embedding_backward(kernels, dout, h, gate, table, ids, *, schedule=0):
    """(dh, dgate, the gradient of table[ids] (N, Hkv D))."""
    (N, Hkv, D), I = dout.shape, h.size(1)  # noqa: E741
    results = poisoned((N, I), h).to(h.dtype), poisoned_like(gate), poisoned((N, Hkv * D), h).to(table.dtype)
    workspace = poisoned((N * Hkv + (N + 63) // 64 * (Hkv * I + 1),), h)
    kernels.call(
        "add_value_embedding_backward",
        *(dout, *value_embedding_problem(dout, h, gate, table, ids), *results, workspace, workspace.nbytes),
        seed=schedule,
    )
    return results


def smear_problem(x, gate, smear_lambda):
    return (x, gate, smear_lambda, *x.shape, gate.size(1), DTYPES[x.dtype])


def smear(kernels, x, gate, smear_lambda, *, schedule=0):
    out = poisoned_like(x)
    kernels.call("smear", *smear_problem(x, gate, smear_lambda), out, seed=schedule)
    return out


def smear_backward(kernels, dout, x, gate, smear_lambda, *, schedule=0):
    """(dx, dgate, dlambda)."""
    results = poisoned_like(x), poisoned_like(gate), poisoned_like(smear_lambda)
    rows = x.size(0) * x.size(1)
    workspace = poisoned((2 * rows + (rows + 63) // 64 * (gate.size(1) + 1),), x)
    kernels.call(
        "smear_backward",
        *(dout, *smear_problem(x, gate, smear_lambda), *results, workspace, workspace.nbytes),
        seed=schedule,
    )
    return results


def address_or_0(tensor):
    return 0 if tensor is None else tensor


def mix_rms_norm(kernels, x, residual, x0, x_scale, x0_scale, *, eps=EPS, schedule=0):
    """(z or None, mixed, y, r) of x (N, C)."""
    z = None if residual is None else poisoned_like(x)
    mixed, y, r = poisoned_like(x), poisoned_like(x), poisoned(x.shape[:1], x)
    kernels.call(
        "mix_rms_norm",
        *(x, address_or_0(residual), x0, x_scale, x0_scale, address_or_0(z), mixed, y, r),
        *(*x.shape, DTYPES[x.dtype], eps),
        seed=schedule,
    )
    return z, mixed, y, r


def mix_rms_norm_backward(
    kernels, dy, y, r, z, x0, x_scale, x0_scale, *, dz=None, dmixed=None, add_to=None, schedule=0
):
    """(dx, dx0, dx_scale, dx0_scale)."""
    results = [poisoned_like(dy), poisoned_like(dy), poisoned((1,), dy), poisoned((1,), dy)]
    workspace = poisoned((2, dy.size(0)), dy)
    kernels.call(
        "mix_rms_norm_backward",
        *(dy, *map(address_or_0, (dz, dmixed, add_to)), y, r, z, x0, x_scale, x0_scale, *results),
        *(*dy.shape, DTYPES[dy.dtype], workspace, workspace.nbytes),
        seed=schedule,
    )
    return results


def rotary_problem(q, k, cos, sin):
    return (*q.shape[:3], *k.shape[2:], DTYPES[q.dtype], cos, sin, cos.stride(0), sin.stride(0))


def rotary_norm(kernels, q, k, cos, sin, *, scale=1.0, eps=EPS, schedule=0):
    """(q_out, k_out, q_r, k_r)."""
    results = [*map(poisoned_like, (q, k)), *(poisoned(tensor.shape[:3], q) for tensor in (q, k))]
    kernels.call(
        "rotary_norm",
        *(*rotary_problem(q, k, cos, sin), q, k, *strides_of(q, k), *results, eps, scale),
        seed=schedule,
    )
    return results


def rotary_norm_backward(kernels, dq_out, dk_out, q_out, k_out, q_r, k_r, cos, sin, *, scale=1.0, schedule=0):
    """(dq, dk)."""
    grads = [*map(poisoned_like, (dq_out, dk_out))]
    kernels.call(
        "rotary_norm_backward",
        *(*rotary_problem(dq_out, dk_out, cos, sin), dq_out, dk_out, *strides_of(dq_out, dk_out)),
        *(q_out, k_out, q_r, k_r, *grads, scale),
        seed=schedule,
    )
    return grads


def relu_squared(kernels, x, y, *, schedule=0):
    """y, which may be x, is written."""
    kernels.call("relu_squared", x, y, x.numel(), DTYPES[x.dtype], seed=schedule)


def relu_squared_backward(kernels, dy, y, dx, *, schedule=0):
    """dx, which may be dy, is written."""
    kernels.call("relu_squared_backward", dy, y, dx, dy.numel(), DTYPES[dy.dtype], seed=schedule)


def attention_sizes(q, k, causal, window, scale):
    """B, Tq, Tk, H, Hkv, D, causal, window, scale, DType."""
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    limit = -1 if window is None else window
    scale = D**-0.5 if scale is None else float(scale)
    return (B, Tq, Tk, H, Hkv, D, int(causal or window is not None), limit, scale, DTYPES[q.dtype])


def strides_of(*tensors):
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def attention_forward(
    kernels,
    q,
    k,
    v,
    *,
    causal=True,
    window=None,
    scale=None,
    lengths=None,
    hopper=False,
    multiprocessors=2,
    schedule=0,
    misalignment=16,
):
    """(out, lse); on a GPU, `hopper` and `multiprocessors` are taken as given too."""
    B, Tq, H, D = q.shape
    out = poisoned_like(q)
    lse = torch.full((B, H, Tq), torch.nan, device=q.device)
    workspace = torch.full((64 * (B * H * Tq * (D + 34) + 1),), torch.nan, device=q.device)
    kernels.call(
        "attention_forward",
        *(q, k, v, out, lse, *strides_of(q, k, v, out), 0 if lengths is None else lengths),
        *attention_sizes(q, k, causal, window, scale),
        *(multiprocessors, int(hopper), workspace, workspace.nbytes),
        seed=schedule,
        misalignment=misalignment,
        shared_limit=shared_limit(hopper),
    )
    return out, lse


def forward_tile(kernels, q, k, *, causal=True, window=None, multiprocessors=2):
    """(consumers, keys) of the tile of attention_forward on Hopper."""
    tile = torch.zeros(2, dtype=torch.int32)
    kernels.call("forward_tile", *attention_sizes(q, k, causal, window, None), multiprocessors, 1, tile)
    return tuple(tile.tolist())


def attention_backward(
    kernels,
    dout,
    q,
    k,
    v,
    out,
    lse,
    *,
    causal=True,
    window=None,
    scale=None,
    hopper=False,
    multiprocessors=2,
    schedule=0,
    misalignment=16,
):
    """(dq, dk, dv)."""
    B, Tq, H = q.shape[:3]
    grads = [poisoned_like(tensor) for tensor in (q, k, v)]
    padded = (Tq * (H // k.size(2)) + 127) // 128 * 128
    count = 2 * B * H * padded
    if hopper:  # the sums of dQ, their counters, and that of the work
        group = H // k.size(2) if 64 % (H // k.size(2)) == 0 else 1
        rows = B * H // group * ((Tq * group + 127) // 128 * 128)
        count = 2 * rows + rows * (64 if q.size(3) <= 64 else 128) + rows // 64 + 1
    workspace = torch.full((count,), torch.nan, device=q.device)
    kernels.call(
        "attention_backward",
        *(q, k, v, out, dout, lse, *grads, *strides_of(q, k, v, out, dout, *grads)),
        *attention_sizes(q, k, causal, window, scale),
        *(multiprocessors, int(hopper), workspace, workspace.nbytes),
        seed=schedule,
        misalignment=misalignment,
        shared_limit=shared_limit(hopper),
    )
    return grads


FORMS = {"plain": 0, "gram": 1}


@dataclass(frozen=True)
class Plan:
    """The plan of newton_schulz. For each form: bytes of workspace, steps on one Gram matrix in turn, float16?"""

    form: str
    bytes: dict[str, int]
    phases: dict[str, list[int]]
    float16: dict[str, bool]


def problem(g, steps, coefficients, norms, scales=None):
    triples, norm_factor = reference.newton_schulz_schedule(steps, coefficients)
    M, K = g.shape[-2:]
    numbers = torch.tensor(triples, dtype=torch.float64)
    known = [0 if tensor is None else tensor for tensor in (norms, scales)]
    return (g, *known, numbers, steps, g[..., 0, 0].numel(), M, K, norm_factor)


def newton_schulz_plan(kernels, g, *, steps=5, coefficients="quintic", norms=None, scales=None):
    form, sizes, float16 = (torch.zeros(n, dtype=torch.int64) for n in (1, 2, 2))
    phases = torch.zeros(2, steps, dtype=torch.int64)
    kernels.call("newton_schulz_plan", *problem(g, steps, coefficients, norms, scales), form, sizes, phases, float16)
    return Plan(
        list(FORMS)[form.item()],
        dict(zip(FORMS, sizes.tolist(), strict=True)),
        {name: [n for n in row if n] for name, row in zip(FORMS, phases.tolist(), strict=True)},
        {name: bool(x) for name, x in zip(FORMS, float16.tolist(), strict=True)},
    )


def newton_schulz(
    kernels,
    g,
    *,
    steps=5,
    coefficients="quintic",
    norms=None,
    scales=None,
    form=None,
    params=(),
    lr=0.1,
    weight_decay=0.0,
    scale=1.0,
    cautious=False,
    copies=None,
    hopper=False,
    multiprocessors=2,
    schedule=0,
    misalignment=16,
):
    """newton_schulz(g), or, where there are params, what newton_schulz_update_ makes of them, in place."""
    plan = newton_schulz_plan(kernels, g, steps=steps, coefficients=coefficients, norms=norms, scales=scales)
    form = form or plan.form
    out = 0 if params else torch.full(g.shape, torch.nan, device=g.device)
    workspace = torch.full((plan.bytes[form],), 255, dtype=torch.uint8, device=g.device)
    lr, lr_address = number_and_address(lr, 0.0)
    weight_decay, weight_decay_address = number_and_address(weight_decay, 0.0)
    kernels.call(
        "newton_schulz",
        *(*problem(g, steps, coefficients, norms, scales), FORMS[form], out, list(params), copies or 0),
        *(DTYPES[params[0].dtype] if params else 0, lr, weight_decay, scale, int(cautious)),
        *(lr_address, weight_decay_address, multiprocessors, int(hopper), workspace, workspace.nbytes),
        seed=schedule,
        misalignment=misalignment,
        shared_limit=shared_limit(hopper),
    )
    return out
