"""Calls of every operator on the pretend device, each compared with the same call on the CPU.

A case runs in a process with two devices. `compare` runs it where a binding is most easily wrong: on a side stream of a
device that is not the current one, while whatever waits is an error.
"""

import contextlib

import pretend_device
import torch

from nanochat_native import ops
from nanochat_native.ops import reference

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
RATES = {"lr": 0.1, "weight_decay": 0.1}
ADAMW = {"step": 3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10} | RATES


@contextlib.contextmanager
def elsewhere():
    """Yield a device that is not the current one, with a side stream; what waits is an error."""
    torch.cuda.set_stream(torch.cuda.Stream("cuda:1"))
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.current_device() == 0
    pretend_device.check_memory()


def compare(run, *tensors, launches=None, tolerance=(1e-5, 1e-5), exact=None):
    """Compare the results of run(*tensors) on the device with those on the CPU.

    Args:
        launches: how many of our kernels there must be; at least one otherwise.
        tolerance: relative, absolute.
        exact: the type in which the CPU computes, if it is not the same.
    """
    with ops.use_backend("torch"):
        expected = run(*(t.to(exact) if exact and t.is_floating_point() else t.clone() for t in tensors))
    ours = [tensor.to("cuda:1") for tensor in tensors]
    before = pretend_device.launches()
    with elsewhere():
        results = run(*ours)
    count = pretend_device.launches() - before
    assert count == launches if launches is not None else count > 0, f"{count} launches"
    for index, (mine, other) in enumerate(zip(results, expected, strict=True)):
        assert mine.device == torch.device("cuda", 1)
        mine = mine.cpu().to(other.dtype)
        torch.testing.assert_close(
            mine, other, rtol=tolerance[0], atol=tolerance[1], msg=lambda text, index=index: f"result {index}: {text}"
        )


def randn(*shape, dtype=F32):
    return torch.randn(*shape).to(dtype)


# --- attention ---


def attention_of_awkward_strides(T=150, D=64, dtype=BF16):
    """q is a part of a larger tensor, k repeats one batch, v is not aligned, dout is transposed."""
    B, H, Hkv = 2, 4, 2
    wide, one, flat = randn(B, T, H + 3, D), randn(1, T, Hkv, D), randn(B * T * Hkv * D + 1)

    def run(wide, one, flat, dout):
        inputs = wide[:, :, 2 : 2 + H], one.expand(B, T, Hkv, D), flat[1:].view(B, T, Hkv, D)
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        out = ops.attention(*inputs, window=50, scale=0.2)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout.transpose(1, 2))]

    tensors = [tensor.to(dtype) for tensor in (wide, one, flat, randn(B, H, T, D))]
    compare(run, *tensors, exact=F32, tolerance=(2e-2, 3e-2))


def attention_of_float16():
    attention_of_awkward_strides(T=70, D=40, dtype=torch.float16)


def attention_backward_of_strided_results():
    """The results of the forward pass come back with other strides."""
    q, k, v, dout = (randn(1, 70, heads, 64, dtype=BF16) for heads in (3, 1, 1, 3))

    def run(q, k, v, dout):
        forward, backward = (getattr(torch.ops.nanochat_native, f"attention_{way}ward") for way in ("for", "back"))
        out, lse = forward(q, k, v, True, -1, 0.125)
        strided = out.transpose(1, 2).contiguous().transpose(1, 2), lse.transpose(1, 2).contiguous().transpose(1, 2)
        return [out, lse, *backward(dout, q, k, v, *strided, True, -1, 0.125)]

    compare(run, q, k, v, dout, tolerance=(2e-2, 3e-2))


def attention_without_keys():
    def run(q, k):
        out, lse = torch.ops.nanochat_native.attention_forward(q, k, k, True, -1, 0.1)
        return [out, lse, *torch.ops.nanochat_native.attention_backward(q, q, k, k, out, lse, True, -1, 0.1)]

    compare(run, randn(2, 3, 2, 64, dtype=BF16), randn(2, 0, 2, 64, dtype=BF16), launches=0)


def decoding():
    """Keys are split among blocks, which meet in the workspace. Lengths are strided."""
    q, k, v = (randn(3, T, heads, 128, dtype=BF16) for T, heads in ((2, 8), (300, 2), (300, 2)))
    lengths = torch.tensor([300, -1, 2, -1, 17, -1])

    def run(q, k, v, lengths):
        return [ops.attention(q, k, v, lengths=lengths[::2])]

    def on_cpu(q, k, v, lengths):
        return [reference.attention(q, k, v, lengths=lengths[::2])]

    compare(
        lambda q, *rest: (run if q.is_cuda else on_cpu)(q, *rest), q, k, v, lengths, exact=F32, tolerance=(2e-2, 2e-2)
    )


# --- the norms, the rotation and relu_squared ---


def norms(dtype=F32, tolerance=(1e-5, 1e-5)):
    """Every argument is strided, but for a residual that is not aligned."""
    rows, C = (5, 9), 67
    count = rows[0] * rows[1] * C

    def run(x, residual, dy, dsum):
        x, residual = (t.detach().requires_grad_() for t in (x.transpose(0, 1), residual[1:].view(*rows, C)))
        dy, dsum = dy[..., 1:], dsum.transpose(0, 1)
        alone = ops.rms_norm(x)
        results = ops.add_rms_norm(x, residual)
        gradients = [
            *torch.autograd.grad(alone, x, dy),
            *torch.autograd.grad(results, (x, residual), (dsum, dy), retain_graph=True),
            *torch.autograd.grad(results[1], x, dy),
        ]
        return [alone.detach(), *(result.detach() for result in results), *gradients]

    tensors = randn(*rows[::-1], C), randn(count + 1), randn(*rows, C + 1), randn(*rows[::-1], C)
    compare(run, *(tensor.to(dtype) for tensor in tensors), launches=5, tolerance=tolerance)


def norms_of_bfloat16():
    norms(BF16, (2e-2, 3e-2))


def rms_norm_of_strided_results():
    """Each row has a norm of its own size, and the results come back with other strides."""

    def run(x, dy):
        _, y, r = torch.ops.nanochat_native.rms_norm(x, None, 1e-6)
        strided = y.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([r, r + 1], -1)[..., 0]
        return [y, r, torch.ops.nanochat_native.rms_norm_backward(dy, None, *strided)]

    compare(run, randn(5, 9, 64) * torch.rand(5, 9, 1), randn(5, 9, 64), launches=2)


def embedding_norm(dtype=F32, table_dtype=F32, tolerance=(1e-5, 1e-5)):
    """Tokens and table are strided, and tokens occur several times."""
    V, C = 23, 40

    def run(tokens, table, dy):
        table = table[:, :C].detach().requires_grad_()
        y = ops.embedding_rms_norm(tokens.t(), table, dtype)
        return [y.detach(), *torch.autograd.grad(y, table, dy[..., 1:])]

    tensors = torch.randint(0, V, (9, 5)), randn(V, C + 1, dtype=table_dtype), randn(5, 9, C + 1, dtype=dtype)
    compare(run, *tensors, launches=2, tolerance=tolerance)


def embedding_norm_in_bfloat16():
    embedding_norm(BF16, tolerance=(2e-2, 3e-2))


def value_embedding(dtype=F32, table_dtype=F32, tolerance=(1e-5, 1e-5)):
    """Every argument is strided; h is a part of wider rows; ids occur several times; more rows than a block sums up."""
    rows, Hkv, D, I, V = (5, 20), 2, 8, 12, 7  # noqa: E741
    wide = F32 if dtype == BF16 else dtype

    def run(v, x, gate, table, ids, dout):
        inputs = v.transpose(0, 1), x[..., 1 : I + 1], gate[:, 1:], table[:, 1:]
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        ids = ids.t()
        out = ops.add_value_embedding(*inputs, ids)
        strided = dout.transpose(0, 1)
        grads = torch.autograd.grad(out, inputs, strided)
        alone = ops.add_value_embedding_backward(strided, *(tensor.detach() for tensor in inputs[1:]), ids)
        return [out.detach(), *grads, *alone]

    compare(
        run,
        *(randn(*rows[::-1], Hkv, D, dtype=dtype), randn(*rows, I + 3, dtype=dtype), randn(Hkv, I + 1, dtype=wide)),
        *(randn(V, Hkv * D + 1, dtype=table_dtype), torch.randint(0, V, rows[::-1])),
        randn(*rows[::-1], Hkv, D, dtype=dtype),
        launches=7,
        tolerance=tolerance,
    )


def value_embedding_of_bfloat16():
    value_embedding(BF16, BF16, (2e-2, 5e-2))


def value_embedding_of_a_float32_table():
    value_embedding(BF16, F32, (2e-2, 5e-2))


def smear(dtype=F32, tolerance=(1e-5, 1e-5)):
    """Every argument is strided; more rows than a block sums up."""
    B, T, C = 5, 20, 30

    def run(x, gate, smear_lambda, dout):
        inputs = [tensor.detach().requires_grad_() for tensor in (x.transpose(0, 1), gate[:, ::2], smear_lambda[1:])]
        out, dout = ops.smear(*inputs), dout.transpose(0, 1)
        alone = torch.ops.nanochat_native.smear_backward(dout, *(tensor.detach() for tensor in inputs))
        return [out.detach(), *torch.autograd.grad(out, inputs, dout), *alone]

    tensors = randn(T, B, C, dtype=dtype), randn(1, 48), torch.tensor([9, 0.7]), randn(T, B, C, dtype=dtype)
    compare(run, *tensors, launches=7, tolerance=tolerance)


def smear_of_bfloat16():
    smear(BF16, (2e-2, 5e-2))


def mix(dtype=F32, tolerance=(1e-5, 1e-5), residual=True):
    """Streams and gradients are strided, but for an x with a residual, which is not aligned.

    The factors lie in one tensor.
    """
    rows, C = (5, 9), 67
    count = rows[0] * rows[1] * C

    def run(x, *others):
        *streams, scales = others
        added, x0, dz, dmixed, dy, dx0 = (t.transpose(0, 1) for t in streams)
        needed = [*([x[1:].view(*rows, C)] if residual else []), added, x0, scales[3:4], scales[5]]
        needed = [tensor.detach().requires_grad_() for tensor in needed]
        results = ops.mix_rms_norm(*(needed if residual else [needed[0], None, *needed[1:]]))
        gradients = [
            *torch.autograd.grad(results, needed, (dz, dmixed, dy, dx0), retain_graph=True),
            *torch.autograd.grad(results[2], needed, dy),
        ]
        return [*(result.detach() for result in results), *gradients]

    streams = randn(count + 1), *(randn(*rows[::-1], C) for _ in range(6))
    compare(run, *(t.to(dtype) for t in streams), randn(7), launches=5, tolerance=tolerance)


def mix_of_bfloat16():
    mix(BF16, (2e-2, 5e-2))


def mix_without_a_residual():
    mix(residual=False)


def mix_backward_of_strided_results():
    """The results come back with other strides, and each row has a norm of its own size."""

    def run(x, dy, scales):
        z, _, y, r = torch.ops.nanochat_native.mix_rms_norm(x, x, dy, *scales, 1e-6)
        strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (y, z)]
        r_strided = torch.stack([r, r + 1], -1)[..., 0]
        backward = torch.ops.nanochat_native.mix_rms_norm_backward
        return [y, r, *backward(dy, None, None, None, strided[0], r_strided, strided[1], x, *scales)]

    tensors = randn(5, 9, 64) * torch.rand(5, 9, 1), randn(5, 9, 64), torch.tensor([[1.1], [-0.3]])
    compare(run, *tensors, launches=3, tolerance=(1e-4, 1e-4))


def mix_of_nothing():
    def run(x, scales):
        _, mixed, y, r = torch.ops.nanochat_native.mix_rms_norm(x, None, x, *scales, 1e-6)
        return [mixed, y, r, *torch.ops.nanochat_native.mix_rms_norm_backward(y, None, None, y, y, r, x, x, *scales)]

    compare(run, randn(0, 64), torch.tensor([[1.1], [-0.3]]), launches=1)


def rotation(dtype=F32, D=32, tolerance=(1e-5, 1e-5)):
    """q, k and their gradients lie in fused buffers, and heads share keys."""
    B, T, H, Hkv = 2, 7, 4, 2

    def heads(fused):
        q, k, _ = fused.view(B, T, H + 2 * Hkv, D).split([H, Hkv, Hkv], dim=2)
        return q, k

    def run(fused, gradients, tables):
        q, k = (tensor.detach().requires_grad_() for tensor in heads(fused))
        results = ops.rotary_norm(q, k, tables[:, : D // 2], tables[:, D // 2 : D], scale=1.2)
        return [*(result.detach() for result in results), *torch.autograd.grad(results, (q, k), heads(gradients))]

    angles = torch.rand(T, D // 2) * 6
    fused = (randn(B, T, (H + 2 * Hkv) * D, dtype=dtype) for _ in range(2))
    compare(run, *fused, torch.cat([angles.cos(), angles.sin(), angles], 1), launches=2, tolerance=tolerance)


def rotation_of_bfloat16():
    rotation(BF16, 64, (2e-2, 3e-2))


def rotation_of_strided_results():
    """The results of the forward pass come back with other strides, and the stride in D is not 1."""
    B, T, H, Hkv, D = 2, 7, 3, 1, 10

    def run(q, k, cos, sin, dq, dk):
        q, k, cos, sin, dq, dk = (tensor.transpose(-1, -2) for tensor in (q, k, cos, sin, dq, dk))
        results = torch.ops.nanochat_native.rotary_norm(q, k, cos, sin, 1e-6, 1.0)
        strided = [result.transpose(0, 1).contiguous().transpose(0, 1) for result in results]
        return [*results, *torch.ops.nanochat_native.rotary_norm_backward(dq, dk, *strided, cos, sin, 1.0)]

    shapes = (B, T, D, H), (B, T, D, Hkv), (D // 2, T), (D // 2, T), (B, T, D, H), (B, T, D, Hkv)
    compare(run, *(randn(*shape) for shape in shapes), launches=2)


def squared_relu(dtype=F32, tolerance=(1e-5, 1e-5)):
    def run(x, dy, taken):
        strided = x.t().detach().requires_grad_()
        y = ops.relu_squared(strided)
        (dx,) = torch.autograd.grad(y, strided, dy[:, 1:])
        # These are not aligned.
        x, dy = x.view(-1)[1:], taken[1:]
        check_versions([x], lambda: ops.relu_squared_(x))
        check_versions([dy], lambda: ops.relu_squared_backward_(dy, x))
        return [y.detach(), dx, x, dy, torch.ops.nanochat_native.relu_squared_backward(taken[1:], x)]

    tensors = randn(37, 29), randn(29, 38), randn(37 * 29)
    compare(run, *(tensor.to(dtype) for tensor in tensors), launches=5, tolerance=tolerance)


def squared_relu_of_bfloat16():
    squared_relu(BF16, (2e-2, 2e-2))


# --- optimizers ---

COUNTS = [1, 7, 0, 33, 1001, 4099] + [5] * 250  # more than one launch takes


def check_versions(tensors, change):
    before = [tensor._version for tensor in tensors]
    change()
    assert all(tensor._version > version for tensor, version in zip(tensors, before, strict=True)), "version not raised"


def new_copies(params):
    """Return tensors for the bfloat16 copies of float32 parameters; others have none."""
    return [torch.zeros_like(param, dtype=BF16) for param in params if param.dtype == F32]


def errors_of(copies, params):
    """Return the differences between copies and what they should be: all are zero."""
    return [copy - param.to(BF16) for copy, param in zip(copies, params, strict=bool(copies))]


def adamw(dtype=F32, numbers=(), **options):
    lists = [[randn(n, dtype=kind) for n in COUNTS] for kind in (dtype, dtype, F32)]
    lists.append([torch.rand(n) for n in COUNTS])

    def run(*tensors):
        flat, given = tensors[: 4 * len(COUNTS)], tensors[4 * len(COUNTS) :]
        params, grads, firsts, seconds = (list(flat[i::4]) for i in range(4))
        rates = ADAMW | options | dict(zip(("step", "lr", "weight_decay"), given, strict=False))
        copies = new_copies(params)
        check_versions(
            [*params, *firsts, *seconds, *copies],
            lambda: ops.adamw_(params, grads, firsts, seconds, copies=copies, **rates),
        )
        return [*params, *firsts, *seconds, *errors_of(copies, params)]

    tensors = [tensor for four in zip(*lists, strict=True) for tensor in four]
    compare(run, *tensors, *numbers, tolerance=(2e-5 if dtype == F32 else 2**-7, 1e-6))


def adamw_of_bfloat16():
    adamw(BF16, cautious=True)


def adamw_with_numbers_on_the_device():
    adamw(numbers=[torch.tensor(7), torch.tensor(0.3, dtype=F64), torch.tensor(0.2, dtype=F64)])


def matrices(count, *shape, dtype=F32):
    return [randn(*shape, dtype=dtype) for _ in range(count)]


def muon_momentum(count=5, shape=(67, 99), dtype=F32, momentum=0.9):
    def run(*tensors):
        grads, buffers = list(tensors[:count]), list(tensors[count : 2 * count])
        results = []
        given = tensors[-1] if len(tensors) > 2 * count else momentum
        check_versions(
            buffers,
            lambda: results.extend(ops.muon_momentum_(grads, buffers, momentum=given, return_norm=True)),
        )
        return [*results, *buffers, ops.muon_momentum_(grads, buffers, momentum=0.5, nesterov=False)]

    compare(run, *matrices(count, *shape, dtype=dtype), *matrices(count, *shape))


def muon_momentum_of_a_long_list():
    muon_momentum(count=130, shape=(2, 3), dtype=BF16)


def muon_update(count=5, shape=(19, 23), dtype=F32):
    def run(*tensors):
        *params, update, lr = tensors
        copies = new_copies(params)
        rates = {"lr": lr, "weight_decay": 0.1}
        check_versions([*params, *copies], lambda: ops.muon_update_(params, update, scale=1.5, copies=copies, **rates))
        errors = errors_of(copies, params)
        ops.muon_update_(params, update, lr=0.2, weight_decay=0.3, cautious=True)
        return [*params, *errors]

    tolerance = (1e-5 if dtype == F32 else 2**-7, 1e-5)
    numbers = randn(count, *shape), torch.tensor(0.1, dtype=F64)
    compare(run, *matrices(count, *shape, dtype=dtype), *numbers, tolerance=tolerance)


def muon_update_of_a_long_list():
    muon_update(count=130, shape=(2, 3), dtype=BF16)


def normuon_update(count=3, shape=(2, 19, 23), dtype=F32):
    """A parameter holds several matrices."""
    lines = (*shape[:-2], shape[-2], 1) if shape[-2] >= shape[-1] else (*shape[:-2], 1, shape[-1])

    def run(*tensors):
        params, seconds, (update, lr) = list(tensors[:count]), list(tensors[count : 2 * count]), tensors[2 * count :]
        copies = new_copies(params)
        rates = {"lr": lr, "weight_decay": 0.1, "scale": 1.5, "renormalise": True, "norm_eps": 1e-6}
        check_versions(
            [*params, *seconds, *copies],
            lambda: ops.normuon_update_(params, update, seconds, copies=copies, **rates),
        )
        errors = errors_of(copies, params)
        ops.normuon_update_(params, update, seconds, lr=0.2, weight_decay=0.3, cautious=True, beta2=0.5, eps=1.0)
        return [*params, *seconds, *errors]

    tolerance = (1e-5 if dtype == F32 else 2**-7, 1e-5)
    numbers = randn(count, *shape), torch.tensor(0.1, dtype=F64)
    compare(run, *matrices(count, *shape, dtype=dtype), *matrices(count, *lines), *numbers, tolerance=tolerance)


def normuon_update_of_bfloat16():
    normuon_update(shape=(23, 19), dtype=BF16)


def norms_of_rows():
    def run(*tensors):
        grads, buffers = list(tensors[:2]), list(tensors[2:])
        return ops.muon_momentum_(grads, buffers, momentum=0.9, return_norm="rows")

    compare(run, *matrices(4, 2, 7, 11))


# --- newton_schulz ---


def newton_schulz_of_scaled_rows():
    def run(g):
        return [ops.newton_schulz(g, equilibrate_rows=True, norm_eps=1e-6, coefficients="polar_express")]

    rows = torch.logspace(-3, 3, 70)[:, None]
    compare(run, randn(2, 70, 140) * rows, tolerance=(2e-2, 1e-2))


def newton_schulz_of_strided_matrices():
    def run(g, norms):
        transposed = g.transpose(-2, -1)
        known = torch.linalg.matrix_norm(g.double())
        spread = torch.stack([known, known + 100], dim=-1)[..., 0]
        return [
            ops.newton_schulz(transposed),
            ops.newton_schulz(transposed, norms=spread, coefficients="polar_express"),
        ]

    compare(run, randn(2, 1, 70, 140), torch.zeros(2, 1), tolerance=(2e-2, 5e-3))


def newton_schulz_of_nothing():
    compare(lambda g: [ops.newton_schulz(g)], torch.zeros(0, 5, 3), launches=0)


def newton_schulz_update(dtype=F32, shape=(2, 66, 20), count=3):
    """A parameter holds several matrices."""

    def run(*tensors):
        *params, update = tensors
        copies = new_copies(params)
        check_versions(
            [*params, *copies], lambda: ops.newton_schulz_update_(params, update, scale=1.5, copies=copies, **RATES)
        )
        errors = errors_of(copies, params)
        norms = torch.linalg.matrix_norm(update.double())
        ops.newton_schulz_update_(params, update, scale=0.5, norms=norms, cautious=True, **RATES)
        return [*params, *errors]

    tensors = *matrices(count, *shape, dtype=dtype), randn(count, *shape)
    compare(run, *tensors, tolerance=(1e-2, 2e-3 if dtype == F32 else 2e-2))


def newton_schulz_update_of_bfloat16():
    newton_schulz_update(BF16, (19, 23), 2)


# --- linear_cross_entropy ---


def loss(dtype=F32, N=100, launches=3, **options):
    """Several chunks, and every argument is strided."""
    V, C = 101, 24

    def run(x, weight, targets):
        x, weight = (tensor.detach().requires_grad_() for tensor in (x.t(), weight[:, :C]))
        value = ops.linear_cross_entropy(x, weight, targets[::2], softcap=15.0, **options)
        scale = torch.ones_like(value) / max(value.numel(), 1)
        return [value.detach(), *torch.autograd.grad(value, (x, weight), scale)]

    targets = torch.randint(0, V, (2 * N,))
    targets[::10] = -1
    tensors = randn(C, N, dtype=dtype), randn(V, C + 8, dtype=dtype) * 0.3, targets
    compare(run, *tensors, launches=launches, tolerance=(1e-4, 1e-5) if dtype == F32 else (2e-2, 2e-3))


def loss_of_bfloat16():
    loss(BF16, launches=2)


def loss_of_one_chunk():
    loss(N=30, launches=1, reduction="sum")


def loss_of_each_row():
    def run(x, weight, targets):
        return [ops.linear_cross_entropy(x, weight, targets, reduction="none")]

    compare(run, randn(100, 24), randn(101, 24), torch.randint(0, 101, (100,)), launches=3)


def loss_with_one_gradient():
    tensors = randn(100, 24), randn(101, 24) * 0.3, torch.randint(0, 101, (100,))

    def run(x, weight, targets):
        results = []
        for needed in (x, weight):
            needed.requires_grad_()
            value = ops.linear_cross_entropy(x, weight, targets)
            results += [value.detach(), *torch.autograd.grad(value, needed)]
            needed.requires_grad_(False)
        return results

    compare(run, *tensors, launches=6, tolerance=(1e-4, 1e-5))


def loss_of_nothing():
    loss(N=0, launches=0, reduction="sum")


CASES = {
    case.__name__: case
    for case in (
        attention_of_awkward_strides,
        attention_of_float16,
        attention_backward_of_strided_results,
        attention_without_keys,
        decoding,
        norms,
        norms_of_bfloat16,
        rms_norm_of_strided_results,
        embedding_norm,
        embedding_norm_in_bfloat16,
        value_embedding,
        value_embedding_of_bfloat16,
        value_embedding_of_a_float32_table,
        smear,
        smear_of_bfloat16,
        mix,
        mix_of_bfloat16,
        mix_without_a_residual,
        mix_backward_of_strided_results,
        mix_of_nothing,
        rotation,
        rotation_of_bfloat16,
        rotation_of_strided_results,
        squared_relu,
        squared_relu_of_bfloat16,
        adamw,
        adamw_of_bfloat16,
        adamw_with_numbers_on_the_device,
        muon_momentum,
        muon_momentum_of_a_long_list,
        muon_update,
        muon_update_of_a_long_list,
        normuon_update,
        normuon_update_of_bfloat16,
        norms_of_rows,
        newton_schulz_of_scaled_rows,
        newton_schulz_of_strided_matrices,
        newton_schulz_of_nothing,
        newton_schulz_update,
        newton_schulz_update_of_bfloat16,
        loss,
        loss_of_bfloat16,
        loss_of_one_chunk,
        loss_of_each_row,
        loss_with_one_gradient,
        loss_of_nothing,
    )
}
