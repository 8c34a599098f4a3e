"""The cases of the CPU operators, against the torch calls that they replace."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native import ops
from nanochat_native.bench.attention import EXACT, Problem, attention_case
from nanochat_native.bench.measure import Case, UnavailableError, assert_close
from nanochat_native.bench.torch_baseline import Float32Muon, newton_schulz_by_matmul, newton_schulz_by_mm
from nanochat_native.ops import reference
from nanochat_native.optim import Muon


def newton_schulz_case(rows: int, columns: int, min_speedup: float) -> Case:
    g = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))

    def check() -> None:
        exact = reference.newton_schulz(g.double())
        assert_close("newton_schulz", ops.newton_schulz(g), exact, EXACT[torch.float32])

    return Case(
        "newton_schulz, 5 steps",
        f"{rows}x{columns}",
        lambda: ops.newton_schulz(g),
        lambda: newton_schulz_by_mm(g),
        "torch.mm",
        check,
        min_speedup,
        flops=newton_schulz_flops([(1, rows, columns)]),
    )


def bfloat16_newton_schulz_case(rows: int, columns: int, min_speedup: float) -> Case:
    """Return a case of newton_schulz with allow_bfloat16, against the same steps in torch.bmm of bfloat16."""
    g = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))

    def check() -> None:
        exact = reference.newton_schulz(g.double())
        assert_close("newton_schulz", ops.newton_schulz(g, allow_bfloat16=True), exact, 2e-2)

    return Case(
        "newton_schulz, 5 steps",
        f"{rows}x{columns} bfloat16",
        lambda: ops.newton_schulz(g, allow_bfloat16=True),
        lambda: newton_schulz_by_matmul(g[None]),
        "torch.bmm, bfloat16",
        check,
        min_speedup,
        flops=newton_schulz_flops([(1, rows, columns)]),
    )


Shapes = Sequence[tuple[int, int, int]]  # (count, rows, columns)


def newton_schulz_flops(shapes: Shapes) -> float:
    """Return the operations of the plain form, whole products: (20 a + 10) n^3 for a small side n and an aspect a."""
    return sum(count * min(M, K) ** 2 * (20.0 * max(M, K) + 10.0 * min(M, K)) for count, M, K in shapes)


def newton_schulz_set_case(
    shapes: Shapes, min_speedup: float, *, name: str, device: torch.device | str, compiler: str | None = None
) -> Case:
    """Return a case of batches of float32 matrices; the baseline multiplies in bfloat16, eagerly or compiled.

    Raises UnavailableError if torch.compile does not work; the message says why.
    """
    generator = torch.Generator(device).manual_seed(0)
    batches = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    baseline: Callable[[Tensor], Tensor] = newton_schulz_by_matmul

    def ours() -> list[Tensor]:
        return [ops.newton_schulz(g) for g in batches]

    def theirs() -> list[Tensor]:
        return [baseline(g) for g in batches]

    if compiler is not None:
        baseline = compiled(newton_schulz_by_matmul, compiler, run_once=lambda f: [f(g) for g in batches])

    def check() -> None:
        for g, mine in zip(batches, ours(), strict=True):
            exact = newton_schulz_by_matmul(g[-1:].double(), torch.float64)
            assert_close(f"newton_schulz of {tuple(g.shape)}", mine[-1:], exact, 8e-3)

    return Case(
        "newton_schulz",
        name,
        ours,
        theirs,
        "torch.bmm, bfloat16" if compiler is None else "the same, torch.compile",
        check,
        min_speedup,
        flops=newton_schulz_flops(shapes),
        saves_launches=True,
    )


def muon_step_case(
    shapes: Shapes,
    min_speedup: float,
    *,
    baseline: str,
    name: str,
    device: torch.device | str = "cpu",
    ns_bfloat16: bool = False,
) -> Case:
    """Return a case of a step of Muon on float32 matrices.

    baseline: "torch.optim.Muon", which multiplies in bfloat16, or "torch.mm" for Float32Muon.
    """
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(rows, columns) for count, rows, columns in shapes for _ in range(count)]
    grads, initial = ([torch.randn(size, generator=generator, device=device) for size in sizes] for _ in range(2))
    lr, momentum = 0.02, 0.95

    def parameters() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(x.clone()) for x in initial]
        for parameter, grad in zip(made, grads, strict=True):
            parameter.grad = grad.clone()
        return made

    ours_params, theirs_params = parameters(), parameters()
    ours = Muon(ours_params, lr=lr, momentum=momentum, ns_bfloat16=ns_bfloat16)
    theirs: torch.optim.Optimizer
    if baseline == "torch.mm":
        theirs = Float32Muon(theirs_params, lr=lr, momentum=momentum)
    else:
        theirs = torch.optim.Muon(theirs_params, lr=lr, momentum=momentum, weight_decay=0.0)

    def check() -> None:
        ours.step()
        for index in {0, len(sizes) - 1}:
            exact = newton_schulz_by_matmul(grads[index][None].double(), torch.float64)[0]
            change = ours_params[index].detach().double() - initial[index].double()
            rows, columns = sizes[index]
            expected = -lr * max(1.0, rows / columns) ** 0.5 * exact
            assert_close(f"change of matrix {index}", change, expected, 2e-2 if ns_bfloat16 else 8e-3)
        initial.clear()

    return Case(
        "Muon step",
        f"{name}, {baseline}" + (", ours in bfloat16" if ns_bfloat16 else ""),
        ours.step,
        theirs.step,
        baseline,
        check,
        min_speedup,
        flops=newton_schulz_flops(shapes),
        saves_launches=True,
    )


def compiled(
    function: Callable[..., Tensor], compiler: str, *, run_once: Callable[[Callable[..., Tensor]], object]
) -> Callable[..., Tensor]:
    """Return the compiled function, run once. Raises UnavailableError if torch.compile does not work; it says why."""
    made: Callable[..., Tensor] = function
    try:
        made = torch.compile(function, backend=compiler)
        run_once(made)
    except torch.OutOfMemoryError:  # the timing reports it
        pass
    except Exception as error:  # any compiler or tool behind torch.compile may fail
        raise UnavailableError(f"torch.compile: {type(error).__name__}: {error}") from error
    return made


def adamw_case(
    dtype: torch.dtype,
    moments: torch.dtype,
    min_speedup: float,
    *,
    name: str,
    shapes: Sequence[tuple[int, ...]] = ((1000, 1000),) * 50,
    device: torch.device | str = "cpu",
) -> Case:
    """Return a case of AdamW; torch's fused AdamW keeps its moments in the type of the parameters."""
    generator = torch.Generator(device).manual_seed(0)
    initial = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    grads = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
    lr, eps, decay = 1e-3, 1e-8, 0.1
    theirs_params = [x.to(dtype, copy=True).requires_grad_() for x in initial]
    for param, grad in zip(theirs_params, grads, strict=True):
        param.grad = grad
    optimizer = torch.optim.AdamW(theirs_params, lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=decay, fused=True)
    params = [x.to(dtype, copy=True) for x in initial]
    exp_avgs = [torch.zeros_like(x, dtype=moments) for x in params]
    exp_avg_sqs = [torch.zeros_like(x, dtype=moments) for x in params]
    step = 0

    def ours() -> None:
        nonlocal step
        step += 1
        ops.adamw_(
            params, grads, exp_avgs, exp_avg_sqs, step=step, lr=lr, beta1=0.9, beta2=0.95, eps=eps, weight_decay=decay
        )

    def check() -> None:
        ours()
        rounding = max(dtype.itemsize == 2, moments.itemsize == 2) and 4e-3
        for index in {0, len(params) - 1}:
            exact = initial[index].to(dtype).double().requires_grad_()
            exact.grad = grads[index].double()
            oracle = torch.optim.AdamW([exact], lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=decay)
            oracle.step()
            assert_close("exp_avg", exp_avgs[index], oracle.state[exact]["exp_avg"], rounding or 1e-6)
            assert_close("exp_avg_sq", exp_avg_sqs[index], oracle.state[exact]["exp_avg_sq"], rounding or 1e-6)
            assert_close("param", params[index], exact.detach(), rounding or 1e-6)
        initial.clear()

    traffic = sum(x.numel() for x in params) * (3 * dtype.itemsize + 4 * moments.itemsize)
    return Case("adamw_", name, ours, optimizer.step, "AdamW(fused=True)", check, min_speedup, bytes=traffic)


def muon_case(
    count: int, rows: int, columns: int, min_speedup: float, *, name: str, device: torch.device | str = "cpu"
) -> Case:
    """Return a case of Muon's operators around newton_schulz, in float32, against torch's calls on lists of tensors."""
    generator = torch.Generator(device).manual_seed(rows)

    def matrices() -> list[Tensor]:
        return [torch.randn(rows, columns, generator=generator, device=device) for _ in range(count)]

    grads, initial = matrices(), matrices()
    params, buffers = [x.clone() for x in initial], [torch.zeros_like(x) for x in initial]
    theirs_params, theirs_buffers = [x.clone() for x in initial], [torch.zeros_like(x) for x in initial]
    momentum, lr, decay, scale = 0.95, 0.02, 0.1, max(1.0, rows / columns) ** 0.5

    def ours() -> tuple[Tensor, Tensor]:
        update, norms = ops.muon_momentum_(grads, buffers, momentum=momentum, return_norm=True)
        ops.muon_update_(params, update, lr=lr, weight_decay=decay, scale=scale)
        return update, norms

    def theirs() -> None:
        torch._foreach_lerp_(theirs_buffers, grads, 1 - momentum)
        update = torch.stack(torch._foreach_lerp(grads, theirs_buffers, momentum))
        torch.linalg.vector_norm(update, dim=(-2, -1))
        torch._foreach_mul_(theirs_params, 1 - lr * decay)
        torch._foreach_add_(theirs_params, update.unbind(), alpha=-lr * scale)

    def check() -> None:
        update, norms = ours()
        for index in {0, count - 1}:
            exact_buffer = (1 - momentum) * grads[index].double()
            exact_update = momentum * exact_buffer + (1 - momentum) * grads[index].double()
            exact = (1 - lr * decay) * initial[index].double() - lr * scale * exact_update
            assert_close("momentum_buffer", buffers[index], exact_buffer, 1e-6)
            assert_close("update", update[index], exact_update, 1e-6)
            assert_close("norm", norms[index], exact_update.norm(), 1e-6)
            assert_close("param", params[index], exact, 1e-6)
        initial.clear()

    traffic = 4.0 * 7 * count * rows * columns
    return Case("muon halves", name, ours, theirs, "torch._foreach, stack", check, min_speedup, bytes=traffic)


def normuon_case(
    count: int, rows: int, columns: int, min_speedup: float, *, device: torch.device | str = "cpu"
) -> Case:
    """Return a case of the rest of a step of NorMuon after Newton-Schulz, in float32, against torch's calls."""
    generator = torch.Generator(device).manual_seed(rows)
    update, initial = (torch.randn(count, rows, columns, generator=generator, device=device) for _ in range(2))
    update *= max(rows, columns) ** -0.5
    tall, lr, decay, beta2, eps, norm_eps = rows >= columns, 0.02, 0.1, 0.9, 1e-10, 1e-6
    params, theirs_params = list(initial.clone()), initial.clone()
    second = torch.zeros(count, *((rows, 1) if tall else (1, columns)), device=device)
    seconds, theirs_second = list(second.clone()), second

    def ours() -> None:
        ops.normuon_update_(
            params,
            update,
            seconds,
            lr=lr,
            weight_decay=decay,
            cautious=True,
            beta2=beta2,
            eps=eps,
            renormalise=True,
            norm_eps=norm_eps,
        )

    def by_torch(update: Tensor, params: Tensor, second: Tensor) -> None:
        x = update * (min(rows, columns) ** 0.5 / torch.linalg.matrix_norm(update, keepdim=True).clamp_min(norm_eps))
        second.lerp_(x.square().mean(dim=-1 if tall else -2, keepdim=True), 1 - beta2)
        w = x * second.clamp_min(eps).rsqrt()
        w = w * (torch.linalg.matrix_norm(x, keepdim=True) / torch.linalg.matrix_norm(w, keepdim=True))
        params.sub_(lr * w + lr * decay * params * (w * params >= 0))

    def theirs() -> None:
        by_torch(update, theirs_params, theirs_second)

    def check() -> None:
        ours()
        for index in {0, count - 1}:
            exact_param, exact_second = initial[index].double(), torch.zeros_like(seconds[index], dtype=torch.float64)
            by_torch(update[index].double(), exact_param, exact_second)
            assert_close("second_momentum", seconds[index], exact_second, 1e-6)
            assert_close("param", params[index], exact_param, 1e-6)

    name, traffic = f"{count} x {rows} x {columns}", 4.0 * 4 * count * rows * columns
    return Case("normuon_update_", name, ours, theirs, "torch's calls", check, min_speedup, bytes=traffic)


def linear_case(N: int, I: int, O: int, min_speedup: float) -> Case:  # noqa: E741
    """Return a case of a linear layer, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=generator) for shape in ((N, I), (O, I), (N, O)))
    x.requires_grad_()
    weight.requires_grad_()

    def products(linear: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        y = linear(x, weight)
        return y, *torch.autograd.grad(y, (x, weight), dy)

    def check() -> None:
        exact = F.linear(x.double(), weight.double())
        exact_all = (exact, *torch.autograd.grad(exact, (x, weight), dy.double()))
        for name, ours, expected in zip(("y", "dx", "dweight"), products(ops.linear), exact_all, strict=True):
            assert_close(f"linear {name}", ours, expected, 1e-6)

    return Case(
        "linear fwd+bwd",
        f"{N} x {I} -> {O} float32",
        lambda: products(ops.linear),
        lambda: products(F.linear),
        "F.linear",
        check,
        min_speedup,
        flops=6.0 * N * I * O,
    )


def add_rms_norm_case(
    dtype: torch.dtype, min_speedup: float, N: int = 4096, C: int = 768, *, device: torch.device | str = "cpu"
) -> Case:
    """Return a case of a residual sum and its norm, forward and backward; both results have a gradient."""
    generator = torch.Generator(device).manual_seed(0)
    x, residual, dsum, dy = (torch.randn(N, C, generator=generator, device=device).to(dtype) for _ in range(4))
    x.requires_grad_()
    residual.requires_grad_()

    def plain(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x = x + residual
        return x, F.rms_norm(x, (C,), eps=2**-23)

    def passes(norm: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        results = norm(x, residual)
        return *results, *torch.autograd.grad(results, (x, residual), (dsum, dy))

    def check() -> None:
        inputs = [tensor.detach().double().requires_grad_() for tensor in (x, residual)]
        exact = plain(*inputs)
        grads = torch.autograd.grad(exact, inputs, (dsum.double(), dy.double()))
        tolerance = 1e-6 if dtype == torch.float32 else EXACT[dtype]
        for name, mine, expected in zip(
            ("sum", "y", "dx", "dresidual"), passes(ops.add_rms_norm), (*exact, *grads), strict=True
        ):
            assert_close(f"add_rms_norm {name}", mine, expected.detach(), tolerance)

    return Case(
        "add_rms_norm fwd+bwd",
        f"{N} x {C} {str(dtype).removeprefix('torch.')}",
        lambda: passes(ops.add_rms_norm),
        lambda: passes(plain),
        "F.rms_norm",
        check,
        min_speedup,
        bytes=8.0 * N * C * dtype.itemsize,  # x, residual, sum, y; dsum, dy, y, dx
    )


def mix_rms_norm_case(
    dtype: torch.dtype, min_speedup: float, N: int = 4096, C: int = 768, *, device: torch.device | str = "cpu"
) -> Case:
    """Return a case of mix_rms_norm, forward and backward; the mix, its norm and x0 have a gradient, as in a block."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(N, C, generator=generator, device=device).to(dtype) for _ in range(6)]
    inputs, douts = tensors[:3], tensors[3:]
    inputs += [torch.tensor(scale, device=device) for scale in (1.1, 0.2)]
    for tensor in inputs:
        tensor.requires_grad_()

    def plain(x: Tensor, residual: Tensor, x0: Tensor, x_scale: Tensor, x0_scale: Tensor) -> tuple[Tensor, ...]:
        z = x + residual
        mixed = x_scale * z + x0_scale * x0
        return z, mixed, F.rms_norm(mixed, (C,), eps=2**-23), x0.view_as(x0)

    def passes(mix: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        results = mix(*inputs)
        return *results, *torch.autograd.grad(results[1:], inputs, douts)

    def check() -> None:
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        exact = plain(*wide)
        grads = torch.autograd.grad(exact[1:], wide, [dout.double() for dout in douts])
        names = ("z", "mixed", "y", "x0", "dx", "dresidual", "dx0", "dx_scale", "dx0_scale")
        for name, mine, expected in zip(names, passes(ops.mix_rms_norm), (*exact, *grads), strict=True):
            tolerance = 1e-6 if mine.dtype == torch.float32 and dtype == torch.float32 else EXACT[dtype]
            assert_close(f"mix_rms_norm {name}", mine, expected.detach(), tolerance)

    return Case(
        "mix_rms_norm fwd+bwd",
        f"{N} x {C} {str(dtype).removeprefix('torch.')}",
        lambda: passes(ops.mix_rms_norm),
        lambda: passes(plain),
        "F.rms_norm",
        check,
        min_speedup,
        # x, residual, x0, z, mixed, y; those of the mix, its norm and x0, y, z, x0, dx, dx0
        bytes=14.0 * N * C * dtype.itemsize,
    )


def value_embedding_case(
    N: int,
    heads: int,
    head: int,
    vocabulary: int,
    dtype: torch.dtype,
    min_speedup: float,
    *,
    device: torch.device | str = "cpu",
) -> Case:
    """Return a case of the gated value embeddings of a layer, forward and backward; the table is in float32."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    width = heads * head
    v, h, dout = (random(N, *shape).to(dtype) for shape in ((heads, head), (12,), (heads, head)))
    inputs = [x.requires_grad_() for x in (v, h, random(heads, 12), random(vocabulary, width))]
    ids = torch.randint(0, vocabulary, (N,), generator=generator, device=device)

    def composed(*tensors: Tensor) -> Tensor:
        v, h, gate, table, ids = tensors
        gates = 3 * F.linear(h, gate.to(h.dtype)).sigmoid()
        return v + gates.unsqueeze(-1) * F.embedding(ids, table).unflatten(-1, (heads, head)).to(v.dtype)

    def passes(add: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = add(*inputs, ids)
        return out, *torch.autograd.grad(out, inputs, dout)

    def check() -> None:
        wide = [x.detach().double().requires_grad_() for x in inputs]
        v64, h64, gate64, table64 = wide
        exact = composed(v64, h64, gate64, table64, ids)
        grads = torch.autograd.grad(exact, wide, dout.double())
        for name, ours, expected in zip(
            ("result", "dv", "dh", "dgate", "dtable"), passes(ops.add_value_embedding), (exact, *grads), strict=True
        ):
            assert_close(f"add_value_embedding {name}", ours, expected.detach(), EXACT[dtype])

    # v, the rows of the table, the result; dout, the rows, their gradients, which are read again; the table's gradient.
    moved = N * width * (3 * dtype.itemsize + 4 * 4) + vocabulary * width * 4
    return Case(
        "add_value_embedding fwd+bwd",
        f"{N} x {heads} x {head} V {vocabulary} {str(dtype).removeprefix('torch.')}",
        lambda: passes(ops.add_value_embedding),
        lambda: passes(composed),
        "F.embedding, sigmoid",
        check,
        min_speedup,
        bytes=float(moved),
        saves_memory=True,
    )


def smear_case(
    B: int, T: int, C: int, dtype: torch.dtype, min_speedup: float, *, device: torch.device | str = "cpu"
) -> Case:
    """Return a case of smear, forward and backward; the baseline is nanochat's composition."""
    generator = torch.Generator(device).manual_seed(0)
    x, dout = (torch.randn(B, T, C, generator=generator, device=device).to(dtype) for _ in range(2))
    gate = torch.randn(1, min(C, 24), generator=generator, device=device)
    inputs = [tensor.requires_grad_() for tensor in (x, gate, torch.full((1,), 0.5, device=device))]

    def composed(x: Tensor, gate: Tensor, smear_lambda: Tensor) -> Tensor:
        gates = smear_lambda.to(x.dtype) * F.linear(x[:, 1:, : gate.size(1)], gate.to(x.dtype)).sigmoid()
        return torch.cat((x[:, :1], x[:, 1:] + gates * x[:, :-1]), dim=1)

    def passes(smear: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = smear(*inputs)
        return out, *torch.autograd.grad(out, inputs, dout)

    def check() -> None:
        wide = [x.detach().double().requires_grad_() for x in inputs]
        exact = composed(*wide)
        grads = torch.autograd.grad(exact, wide, dout.double())
        for name, ours, expected in zip(
            ("result", "dx", "dgate", "dlambda"), passes(ops.smear), (exact, *grads), strict=True
        ):
            assert_close(f"smear {name}", ours, expected.detach(), EXACT[dtype])

    return Case(
        "smear fwd+bwd",
        f"{B} x {T} x {C} {str(dtype).removeprefix('torch.')}",
        lambda: passes(ops.smear),
        lambda: passes(composed),
        "torch.cat, sigmoid",
        check,
        min_speedup,
        bytes=5.0 * x.numel() * dtype.itemsize,  # x and the result; dout, x and dx
        saves_memory=True,
    )


def rotary_norm_case(
    B: int, T: int, H: int, D: int, dtype: torch.dtype, min_speedup: float, *, device: torch.device | str = "cpu"
) -> Case:
    """Return a case of rotary_norm, forward and backward; the baseline is nanochat's rotation and torch's rms_norm."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, dq, dk = (torch.randn(B, T, H, D, generator=generator, device=device).to(dtype) for _ in range(4))
    q.requires_grad_()
    k.requires_grad_()
    angles = torch.rand(T, D // 2, generator=generator, device=device)
    cos, sin = angles.cos(), angles.sin()

    def rotate_and_normalize(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        out = []
        for x in (q, k):
            x1, x2 = x.chunk(2, dim=-1)
            z = torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)
            out.append(F.rms_norm(z, (D,)))
        return tuple(out)

    def with_gradients(operator: Callable[..., tuple[Tensor, ...]], *tables: Tensor) -> tuple[Tensor, ...]:
        out = operator(q, k, *tables)
        return *out, *torch.autograd.grad(out, (q, k), (dq, dk))

    def check() -> None:
        wide = q.detach().double().requires_grad_(), k.detach().double().requires_grad_()
        exact = rotate_and_normalize(*wide, cos.double()[:, None], sin.double()[:, None])
        exact_all = (*exact, *torch.autograd.grad(exact, wide, (dq.double(), dk.double())))
        for name, ours, expected in zip(
            ("q", "k", "dq", "dk"), with_gradients(ops.rotary_norm, cos, sin), exact_all, strict=True
        ):
            assert_close(f"rotary_norm {name}", ours, expected, EXACT[dtype])

    tables = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    return Case(
        "rotary_norm fwd+bwd",
        f"{B}x{T}x{H}x{D} {str(dtype).removeprefix('torch.')}",
        lambda: with_gradients(ops.rotary_norm, cos, sin),
        lambda: with_gradients(rotate_and_normalize, *tables),
        "torch.cat, F.rms_norm",
        check,
        min_speedup,
        bytes=2.0 * 5 * q.numel() * dtype.itemsize,
        saves_memory=True,
    )


def relu_squared_case(
    rows: int, columns: int, dtype: torch.dtype, min_speedup: float, *, device: torch.device | str = "cpu"
) -> Case:
    """Return a case of relu_squared, forward and backward."""
    generator = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(rows, columns, generator=generator, device=device).to(dtype) for _ in range(2))
    x.requires_grad_()

    def with_gradient(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        y = function(x)
        return y, *torch.autograd.grad(y, x, dy)

    def check() -> None:
        positive = x.detach().double().clamp(min=0)
        for name, ours, expected in zip(
            ("y", "dx"), with_gradient(ops.relu_squared), (positive.square(), 2 * positive * dy.double()), strict=True
        ):
            assert_close(f"relu_squared {name}", ours, expected, EXACT[dtype])

    return Case(
        "relu_squared fwd+bwd",
        f"{rows}x{columns} {str(dtype).removeprefix('torch.')}",
        lambda: with_gradient(ops.relu_squared),
        lambda: with_gradient(lambda x: F.relu(x).square()),
        "relu, square",
        check,
        min_speedup,
        bytes=5.0 * x.numel() * dtype.itemsize,
        saves_memory=True,
    )


def linear_relu_squared_case(N: int, C: int, min_speedup: float) -> Case:
    """Return a case of the products of an MLP of width 4 C, forward and to the hidden layer's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, C), (4 * C, C), (C, 4 * C), (N, C))
    x, fc, proj, dy = (torch.randn(shape, generator=generator) * 0.1 for shape in shapes)

    def ours() -> tuple[Tensor, ...]:
        y = ops.linear_relu_squared(x, fc)
        return y, *ops.linear_backward_relu_squared(dy, y, proj)

    def theirs() -> tuple[Tensor, ...]:
        h = F.linear(x, fc).relu_()
        y = h.square()
        return y, (dy @ proj).mul_(h).mul_(2), dy.T @ y

    def check() -> None:
        h = F.linear(x.double(), fc.double()).clamp_(min=0)
        y = h.square()
        exact = y, 2 * h * (dy.double() @ proj.double()), dy.double().T @ y
        for name, mine, expected in zip(("y", "dh", "dproj"), ours(), exact, strict=True):
            assert_close(f"linear_relu_squared {name}", mine, expected, 1e-5)

    return Case(
        "linear_relu_squared fwd+bwd",
        f"{N} x {C} -> {4 * C} float32",
        ours,
        theirs,
        "torch.mm, relu, square",
        check,
        min_speedup,
        flops=3 * 2.0 * N * C * 4 * C,
    )


SOFTCAP = 15.0


def loss_of_all_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss as nanochat computes it: the softcap in the type of the product, the loss in float32."""
    logits = SOFTCAP * torch.tanh(F.linear(x, weight) / SOFTCAP)
    return F.cross_entropy(logits.float(), targets)


def exact_loss(x: Tensor, weight: Tensor, targets: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss and both gradients in float32, computed for `rows` tokens at a time to save memory."""
    weight = weight.detach().float().requires_grad_()
    total, dx, dweight = torch.zeros((), dtype=torch.float64, device=x.device), [], torch.zeros_like(weight)
    for x_chunk, target_chunk in zip(x.detach().split(rows), targets.split(rows), strict=True):
        x_chunk = x_chunk.float().requires_grad_()
        loss = loss_of_all_logits(x_chunk, weight, target_chunk) * (len(target_chunk) / len(targets))
        dx_chunk, dweight_chunk = torch.autograd.grad(loss, (x_chunk, weight))
        total += loss.detach()
        dx.append(dx_chunk)
        dweight += dweight_chunk
    return total, torch.cat(dx), dweight


def linear_cross_entropy_case(
    N: int,
    C: int,
    vocabulary: int,
    min_speedup: float,
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    compiler: str | None = None,
) -> Case:
    """Return a case of the loss and both gradients; the baseline forms all logits, eagerly or by torch.compile.

    Raises UnavailableError if torch.compile does not work; the message says why.
    """
    generator = torch.Generator(device).manual_seed(vocabulary)
    x = torch.randn(N, C, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, C, generator=generator, device=device) * 0.05).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (N,), generator=generator, device=device)
    baseline: Callable[[Tensor, Tensor, Tensor], Tensor] = loss_of_all_logits

    def ours() -> tuple[Tensor, ...]:
        loss = ops.linear_cross_entropy(x, weight, targets, softcap=SOFTCAP)
        return loss, *torch.autograd.grad(loss, (x, weight))

    def theirs() -> tuple[Tensor, ...]:
        loss = baseline(x, weight, targets)
        return loss, *torch.autograd.grad(loss, (x, weight))

    if compiler is not None:
        baseline = compiled(
            loss_of_all_logits, compiler, run_once=lambda f: torch.autograd.grad(f(x, weight, targets), (x, weight))
        )

    def check() -> None:
        tolerance = 1e-4 if dtype == torch.float32 else EXACT[dtype]
        for part, a, b in zip(("loss", "dx", "dweight"), ours(), exact_loss(x, weight, targets), strict=True):
            assert_close(f"linear_cross_entropy {part}", a, b, tolerance / 10 if part == "loss" else tolerance)

    return Case(
        "linear_cross_entropy",
        name,
        ours,
        theirs,
        "cross_entropy on logits" if compiler is None else "the same, torch.compile",
        check,
        min_speedup,
        flops=6.0 * N * C * vocabulary,
        saves_memory=True,
    )


def cases() -> Iterator[Callable[[], Case]]:
    """Yield a function for each case, so that the tensors of only one case exist at a time."""
    f32, bf16 = torch.float32, torch.bfloat16
    for T, window, dtype, min_speedup in (
        (512, None, f32, 1.7),
        (1024, None, f32, 1.4),
        (2048, None, f32, 1.25),
        (1024, 256, f32, 3.0),
        (2048, 512, f32, 3.0),
        (1024, None, bf16, 1.3 if ops.instruction_set() == "amx" else 3.0),  # with AMX, SDPA uses it too
    ):
        label = f"T {T}" + ("" if window is None else f" window {window}") + f" {str(dtype).removeprefix('torch.')}"
        problem = Problem(B=4, T=T, H=6, D=64, window=window)
        baseline = "SDPA" if window is None else "SDPA, masked"
        yield partial(
            attention_case, problem, "fwd+bwd", baseline=baseline, dtype=dtype, min_speedup=min_speedup, name=label
        )
    yield partial(add_rms_norm_case, f32, min_speedup=2.0)
    yield partial(add_rms_norm_case, bf16, min_speedup=3.0)
    yield partial(mix_rms_norm_case, f32, min_speedup=1.5)
    yield partial(mix_rms_norm_case, bf16, min_speedup=2.0)
    yield partial(newton_schulz_case, 768, 768, min_speedup=1.25)
    yield partial(newton_schulz_case, 3072, 768, min_speedup=1.8)
    yield partial(bfloat16_newton_schulz_case, 768, 768, min_speedup=0.0)
    layer, layers = [(16, 256, 256), (4, 1024, 256), (4, 256, 1024)], "d4's 24 matrices"
    yield partial(muon_step_case, layer, baseline="torch.optim.Muon", min_speedup=0.0, name=layers)
    in_bfloat16 = partial(muon_step_case, baseline="torch.optim.Muon", min_speedup=0.0, ns_bfloat16=True)
    yield partial(in_bfloat16, layer, name=layers)
    yield partial(muon_step_case, layer, baseline="torch.mm", min_speedup=1.0, name=layers)
    large = [(4, 768, 768), (1, 3072, 768), (1, 768, 3072)]
    yield partial(muon_step_case, large, baseline="torch.optim.Muon", min_speedup=0.0, name="a layer of d12")
    yield partial(in_bfloat16, large, name="a layer of d12")
    yield partial(muon_step_case, large, baseline="torch.mm", min_speedup=1.0, name="a layer of d12")
    for rows, columns in ((768, 768), (3072, 768), (768, 3072)):
        yield partial(normuon_case, 4, rows, columns, min_speedup=2.0)
    yield partial(adamw_case, f32, f32, min_speedup=0.95, name="50M float32, moments float32")
    yield partial(adamw_case, bf16, bf16, min_speedup=1.7, name="50M bfloat16, moments bfloat16")
    yield partial(adamw_case, bf16, f32, min_speedup=1.7, name="50M bfloat16, moments float32")
    yield partial(linear_case, 4096, 256, 1024, min_speedup=1.0)
    for dtype in (f32, bf16):
        yield partial(rotary_norm_case, 8, 512, 4, 64, dtype, min_speedup=1.0)
        yield partial(value_embedding_case, 4096, 4, 64, 8192, dtype, min_speedup=1.0)
        yield partial(smear_case, 8, 512, 256, dtype, min_speedup=1.0)
        yield partial(relu_squared_case, 4096, 1024, dtype, min_speedup=1.0)
    yield partial(linear_relu_squared_case, 4096, 256, min_speedup=1.0)
    for vocabulary in (8192, 32768):
        name = f"N 4096 C 256 V {vocabulary}"
        yield partial(linear_cross_entropy_case, 4096, 256, vocabulary, min_speedup=1.5, name=name)
