"""The operators against the torch calls that they replace."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native import ops
from nanochat_native.bench.attention import EXACT, Problem, attention_case
from nanochat_native.bench.measure import Case, UnavailableError, assert_close
from nanochat_native.bench.plain import PlainMuon, newton_schulz_by_matmul, newton_schulz_by_mm
from nanochat_native.ops import reference
from nanochat_native.optim import Muon


def newton_schulz_case(rows: int, columns: int, floor: float) -> Case:
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
        floor,
        flops=newton_schulz_flops([(1, rows, columns)]),
    )


Shapes = Sequence[tuple[int, int, int]]  # (count, rows, columns)


def newton_schulz_flops(shapes: Shapes) -> float:
    """Of the plain form without halves: 20 a + 10 times the cube of the small side, a the aspect."""
    return sum(count * min(M, K) ** 2 * (20.0 * max(M, K) + 10.0 * min(M, K)) for count, M, K in shapes)


def newton_schulz_set_case(
    shapes: Shapes, floor: float, *, name: str, device: torch.device | str, compiler: str | None = None
) -> Case:
    """Batches of float32 matrices; torch's products are bfloat16's, batched, in eager calls or compiled.

    Raises UnavailableError, with the reason, where torch.compile does not work.
    """
    generator = torch.Generator(device).manual_seed(0)
    batches = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    plain: Callable[[Tensor], Tensor] = newton_schulz_by_matmul

    def ours() -> list[Tensor]:
        return [ops.newton_schulz(g) for g in batches]

    def theirs() -> list[Tensor]:
        return [plain(g) for g in batches]

    if compiler is not None:
        plain = compiled(newton_schulz_by_matmul, compiler, run_once=lambda f: [f(g) for g in batches])

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
        floor,
        flops=newton_schulz_flops(shapes),
        saves_launches=True,
    )


def muon_step_case(
    shapes: Shapes, floor: float, *, opponent: str, name: str, device: torch.device | str = "cpu"
) -> Case:
    """A step of Muon on such float32 matrices. opponent: "torch.optim.Muon", whose products are bfloat16's, or
    "torch.mm", Muon written with it, in float32."""
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
    ours = Muon(ours_params, lr=lr, momentum=momentum)
    theirs: torch.optim.Optimizer
    if opponent == "torch.mm":
        theirs = PlainMuon(theirs_params, lr=lr, momentum=momentum)
    else:
        theirs = torch.optim.Muon(theirs_params, lr=lr, momentum=momentum, weight_decay=0.0)

    def check() -> None:
        ours.step()
        for index in {0, len(sizes) - 1}:
            exact = newton_schulz_by_matmul(grads[index][None].double(), torch.float64)[0]
            change = ours_params[index].detach().double() - initial[index].double()
            rows, columns = sizes[index]
            expected = -lr * max(1.0, rows / columns) ** 0.5 * exact
            assert_close(f"change of matrix {index}", change, expected, 8e-3)
        initial.clear()

    return Case(
        "Muon step",
        f"{name}, {opponent}",
        ours.step,
        theirs.step,
        opponent,
        check,
        floor,
        flops=newton_schulz_flops(shapes),
        saves_launches=True,
    )


def compiled(
    function: Callable[..., Tensor], compiler: str, *, run_once: Callable[[Callable[..., Tensor]], object]
) -> Callable[..., Tensor]:
    """torch.compile's, after one run. Raises UnavailableError, with the reason, where it does not work."""
    made: Callable[..., Tensor] = function
    try:
        made = torch.compile(function, backend=compiler)
        run_once(made)
    except torch.OutOfMemoryError:  # for the timing to find
        pass
    except Exception as error:  # of any of the compilers and tools behind it
        raise UnavailableError(f"torch.compile: {type(error).__name__}: {error}") from error
    return made


def adamw_case(
    dtype: torch.dtype,
    moments: torch.dtype,
    floor: float,
    *,
    name: str,
    shapes: Sequence[tuple[int, ...]] = ((1000, 1000),) * 50,
    device: torch.device | str = "cpu",
) -> Case:
    """torch's fused AdamW keeps moments in the parameters' type."""
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
    return Case("adamw_", name, ours, optimizer.step, "AdamW(fused=True)", check, floor, bytes=traffic)


def muon_case(
    count: int, rows: int, columns: int, floor: float, *, name: str, device: torch.device | str = "cpu"
) -> Case:
    """Both halves of Muon around newton_schulz, float32, against torch's calls on lists of tensors."""
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
    return Case("muon halves", name, ours, theirs, "torch._foreach, stack", check, floor, bytes=traffic)


def linear_case(N: int, I: int, O: int, floor: float) -> Case:  # noqa: E741
    """The products of a linear layer, forward and backward."""
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
        floor,
        flops=6.0 * N * I * O,
    )


SOFTCAP = 15.0


def loss_of_all_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As nanochat writes it: the softcap in the products' type, the loss in float32."""
    logits = SOFTCAP * torch.tanh(F.linear(x, weight) / SOFTCAP)
    return F.cross_entropy(logits.float(), targets)


def exact_loss(x: Tensor, weight: Tensor, targets: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss and both gradients in float32, `rows` at a time, so that they fit where all logits may not."""
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
    floor: float,
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    compiler: str | None = None,
) -> Case:
    """Loss and both gradients; torch forms all logits, in eager calls or compiled by torch.compile's `compiler`.

    Raises UnavailableError, with the reason, where torch.compile does not work.
    """
    generator = torch.Generator(device).manual_seed(vocabulary)
    x = torch.randn(N, C, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, C, generator=generator, device=device) * 0.05).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (N,), generator=generator, device=device)
    plain: Callable[[Tensor, Tensor, Tensor], Tensor] = loss_of_all_logits

    def ours() -> tuple[Tensor, ...]:
        loss = ops.linear_cross_entropy(x, weight, targets, softcap=SOFTCAP)
        return loss, *torch.autograd.grad(loss, (x, weight))

    def theirs() -> tuple[Tensor, ...]:
        loss = plain(x, weight, targets)
        return loss, *torch.autograd.grad(loss, (x, weight))

    if compiler is not None:
        plain = compiled(
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
        floor,
        flops=6.0 * N * C * vocabulary,
        saves_memory=True,
    )


def cases() -> Iterator[Callable[[], Case]]:
    """Each case's maker, so that only one case's tensors exist at a time."""
    f32, bf16 = torch.float32, torch.bfloat16
    for T, window, dtype, floor in (
        (512, None, f32, 1.7),
        (1024, None, f32, 1.4),
        (2048, None, f32, 1.25),
        (1024, 256, f32, 3.0),
        (2048, 512, f32, 3.0),
        (1024, None, bf16, 5.0),
    ):
        label = f"T {T}" + ("" if window is None else f" window {window}") + f" {str(dtype).removeprefix('torch.')}"
        problem = Problem(B=4, T=T, H=6, D=64, window=window)
        opponent = "SDPA" if window is None else "SDPA, masked"
        yield partial(attention_case, problem, "fwd+bwd", opponent=opponent, dtype=dtype, floor=floor, name=label)
    yield partial(newton_schulz_case, 768, 768, floor=1.25)
    yield partial(newton_schulz_case, 3072, 768, floor=1.8)
    layer, layers = [(16, 256, 256), (4, 1024, 256), (4, 256, 1024)], "d4's 24 matrices"
    yield partial(muon_step_case, layer, opponent="torch.optim.Muon", floor=0.0, name=layers)
    yield partial(muon_step_case, layer, opponent="torch.mm", floor=1.0, name=layers)
    large = [(4, 768, 768), (1, 3072, 768), (1, 768, 3072)]
    yield partial(muon_step_case, large, opponent="torch.optim.Muon", floor=0.0, name="a layer of d12")
    yield partial(muon_step_case, large, opponent="torch.mm", floor=1.0, name="a layer of d12")
    yield partial(adamw_case, f32, f32, floor=0.95, name="50M float32, moments float32")
    yield partial(adamw_case, bf16, bf16, floor=1.7, name="50M bfloat16, moments bfloat16")
    yield partial(adamw_case, bf16, f32, floor=1.7, name="50M bfloat16, moments float32")
    yield partial(linear_case, 4096, 256, 1024, floor=1.0)
    for vocabulary in (8192, 32768):
        name = f"N 4096 C 256 V {vocabulary}"
        yield partial(linear_cross_entropy_case, 4096, 256, vocabulary, floor=1.5, name=name)
