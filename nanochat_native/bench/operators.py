"""The operators against the torch calls that they replace."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native import ops
from nanochat_native.bench.measure import Case, assert_close
from nanochat_native.bench.plain import newton_schulz_by_mm
from nanochat_native.ops import reference

EXACT = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def attention_case(T: int, *, window: int | None, dtype: torch.dtype, floor: float) -> Case:
    """Causal attention, forward and backward, B 4, H 6, D 64; SDPA gets its own layout (B, H, T, D), contiguous."""
    B, H, D = 4, 6, 64
    generator = torch.Generator().manual_seed(T)
    q, k, v, g = (torch.randn(B, T, H, D, generator=generator, dtype=torch.float32).to(dtype) for _ in range(4))
    ours_inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    sdpa_inputs = [x.transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    sdpa_g = g.transpose(1, 2).contiguous()
    mask = None
    if window is not None:
        distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
        mask = (distance >= 0) & (distance <= window)

    def ours() -> tuple[Tensor, ...]:
        query, key, value = ours_inputs
        out = ops.attention(query, key, value, window=window)
        return out, *torch.autograd.grad(out, ours_inputs, g)

    def theirs() -> tuple[Tensor, ...]:
        query, key, value = sdpa_inputs
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return out, *torch.autograd.grad(out, sdpa_inputs, sdpa_g)

    def check() -> None:
        exact_inputs = [x[:1].double().requires_grad_() for x in (q, k, v)]
        exact = reference.attention(*exact_inputs, window=window)
        exact_all = (exact, *torch.autograd.grad(exact, exact_inputs, g[:1].double()))
        for name, x, expected in zip(("out", "dq", "dk", "dv"), ours(), exact_all, strict=True):
            assert_close(f"attention {name}", x[:1], expected, EXACT[dtype])

    span = T if window is None else window + 1
    pairs = span * (span + 1) // 2 + (T - span) * span
    label = f"T {T}" + ("" if window is None else f" window {window}") + f" {str(dtype).removeprefix('torch.')}"
    return Case(
        "attention fwd+bwd",
        label,
        ours,
        theirs,
        "SDPA" if mask is None else "SDPA, masked",
        check,
        floor,
        flops=14 * B * H * D * pairs,
    )


def newton_schulz_case(rows: int, columns: int, floor: float) -> Case:
    g = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))

    def check() -> None:
        exact = reference.newton_schulz(g.double())
        assert_close("newton_schulz", ops.newton_schulz(g), exact, EXACT[torch.float32])

    small, aspect = min(rows, columns), max(rows, columns) / min(rows, columns)
    return Case(
        "newton_schulz, 5 steps",
        f"{rows}x{columns}",
        lambda: ops.newton_schulz(g),
        lambda: newton_schulz_by_mm(g),
        "torch.mm",
        check,
        floor,
        flops=small**3 * (20 * aspect + 10),
    )


def adamw_case(dtype: torch.dtype, moments: torch.dtype, floor: float) -> Case:
    """50M parameters in 50 tensors. torch's fused AdamW keeps moments in the parameters' type."""
    generator = torch.Generator().manual_seed(0)
    initial = [torch.randn(1000, 1000, generator=generator) for _ in range(50)]
    grads = [torch.randn(1000, 1000, generator=generator).to(dtype) for _ in range(50)]
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
        exact = initial[0].to(dtype).double().requires_grad_()
        exact.grad = grads[0].double()
        oracle = torch.optim.AdamW([exact], lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=decay)
        oracle.step()
        ours()
        rounding = max(dtype.itemsize == 2, moments.itemsize == 2) and 4e-3
        assert_close("exp_avg", exp_avgs[0], oracle.state[exact]["exp_avg"], rounding or 1e-6)
        assert_close("exp_avg_sq", exp_avg_sqs[0], oracle.state[exact]["exp_avg_sq"], rounding or 1e-6)
        assert_close("param", params[0], exact.detach(), rounding or 1e-6)

    traffic = 50_000_000 * (3 * dtype.itemsize + 4 * moments.itemsize)
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    label = f"50M {names[dtype]}, moments {names[moments]}"
    return Case("adamw_", label, ours, optimizer.step, "AdamW(fused=True)", check, floor, bytes=traffic)


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


def linear_cross_entropy_case(vocabulary: int, floor: float) -> Case:
    """4096 tokens, 256 channels: loss and both gradients; torch forms all logits."""
    N, C = 4096, 256
    generator = torch.Generator().manual_seed(vocabulary)
    x = torch.randn(N, C, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, C, generator=generator) * 0.05).requires_grad_()
    targets = torch.randint(0, vocabulary, (N,), generator=generator)

    def grads(loss: Tensor) -> tuple[Tensor, ...]:
        return loss, *torch.autograd.grad(loss, (x, weight))

    def ours() -> tuple[Tensor, ...]:
        return grads(ops.linear_cross_entropy(x, weight, targets))

    def theirs() -> tuple[Tensor, ...]:
        return grads(F.cross_entropy(15 * torch.tanh(F.linear(x, weight) / 15), targets))

    def check() -> None:
        for name, a, b in zip(("loss", "dx", "dweight"), ours(), theirs(), strict=True):
            assert_close(f"linear_cross_entropy {name}", a, b, 1e-4)

    return Case(
        "linear_cross_entropy",
        f"N {N} C {C} V {vocabulary}",
        ours,
        theirs,
        "cross_entropy on logits",
        check,
        floor,
        flops=6.0 * N * C * vocabulary,
    )


def cases() -> Iterator[Callable[[], Case]]:
    """Each case's maker, so that only one case's tensors exist at a time."""
    f32, bf16 = torch.float32, torch.bfloat16
    yield partial(attention_case, 512, window=None, dtype=f32, floor=1.7)
    yield partial(attention_case, 1024, window=None, dtype=f32, floor=1.4)
    yield partial(attention_case, 2048, window=None, dtype=f32, floor=1.25)
    yield partial(attention_case, 1024, window=256, dtype=f32, floor=3.0)
    yield partial(attention_case, 2048, window=512, dtype=f32, floor=3.0)
    yield partial(attention_case, 1024, window=None, dtype=bf16, floor=5.0)
    yield partial(newton_schulz_case, 768, 768, floor=1.25)
    yield partial(newton_schulz_case, 3072, 768, floor=1.8)
    yield partial(adamw_case, f32, f32, floor=0.95)
    yield partial(adamw_case, bf16, bf16, floor=1.7)
    yield partial(adamw_case, bf16, f32, floor=1.7)
    yield partial(linear_case, 4096, 256, 1024, floor=1.0)
    yield partial(linear_cross_entropy_case, 8192, floor=1.5)
    yield partial(linear_cross_entropy_case, 32768, floor=1.5)
