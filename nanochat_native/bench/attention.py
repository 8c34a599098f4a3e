"""Attention against torch's SDPA, on a GPU with each of its backends, and against FlexAttention."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat_native import ops
from nanochat_native.bench.measure import Case, UnavailableError, assert_close
from nanochat_native.ops import reference

EXACT = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
ISA = "NANOCHAT_CUDA_ISA"
BASELINES = ("SDPA", "SDPA, masked", "FLASH", "cuDNN", "FlexAttention")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """The sizes of self-attention; with Tq, those of a generation step on a cache of T keys."""

    B: int
    T: int
    H: int
    D: int
    Hkv: int = 0  # 0: the same as H
    Tq: int = 0  # 0: the same as T
    causal: bool = True
    window: int | None = None

    @property
    def queries(self) -> int:
        return self.Tq or self.T

    @property
    def kv_heads(self) -> int:
        return self.Hkv or self.H

    @property
    def pairs(self) -> int:
        """The number of pairs of a query and a key that it attends to, in one head."""
        span = self.T if self.window is None else min(self.T, self.window + 1)
        if not self.causal:
            return self.queries * self.T
        whole = self.T - self.queries  # keys before that of the first query
        return sum(min(span, whole + i + 1) for i in range(self.queries))

    def flops(self, direction: str) -> float:
        """Return the operations by the published count: two products forward, five backward."""
        products = {"forward": 2, "backward": 5, "fwd+bwd": 7}[direction]
        return 2.0 * products * self.B * self.H * self.D * self.pairs

    def tensors(self, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
        """Return q, k, v and dout, each (B, T, heads, D)."""
        generator = torch.Generator(device).manual_seed(self.T)
        sizes = ((self.queries, self.H), (self.T, self.kv_heads), (self.T, self.kv_heads), (self.queries, self.H))
        return [
            torch.randn(self.B, T, heads, self.D, generator=generator, device=device).to(dtype) for T, heads in sizes
        ]

    def __str__(self) -> str:
        heads = f"H {self.H}" if self.kv_heads == self.H else f"H {self.H}/{self.kv_heads}"
        kind = "full" if not self.causal else "causal" if self.window is None else f"window {self.window}"
        return f"B {self.B} T {self.T} {heads} D {self.D} {kind}" + (f" Tq {self.Tq}" if self.Tq else "")


# --- baselines, on (B, heads, T, D), the layout of SDPA ---


def masked_sdpa(problem: Problem, device: torch.device | str) -> Attention:
    """Return SDPA with its own choice of backend; a window becomes a mask."""
    mask = None
    if problem.window is not None:
        mask = reference.attention_mask(problem.queries, problem.T, True, problem.window, torch.device(device))
    causal = problem.causal and mask is None and not problem.Tq
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=problem.kv_heads != problem.H
    )


def sdpa_by(backend: SDPBackend, problem: Problem) -> Attention:
    """Return one backend of SDPA. It has no windows: it attends to all previous tokens."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            causal = problem.causal and not problem.Tq
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=problem.kv_heads != problem.H)

    return attend


def flex(problem: Problem, device: torch.device | str) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i if problem.causal else j >= 0
        return seen if problem.window is None else seen & (i - j <= problem.window)

    mask = create_block_mask(sees, None, None, problem.queries, problem.T, device=str(device))
    # One kernel for each size: with dynamic shapes torch.compile makes a slower kernel that takes any size.
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=problem.kv_heads != problem.H)


def baseline_of(name: str, problem: Problem, device: torch.device | str) -> tuple[Attention, str]:
    """Return a baseline by its name, and a note for the reader of its figures."""
    whole_past = "" if problem.window is None else "the baseline has no windows and attends to all previous tokens"
    if name == "FLASH":
        return sdpa_by(SDPBackend.FLASH_ATTENTION, problem), whole_past
    if name == "cuDNN":
        return sdpa_by(SDPBackend.CUDNN_ATTENTION, problem), whole_past
    if name == "FlexAttention":
        return flex(problem, device), ""
    return masked_sdpa(problem, device), ""


# --- cases ---


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Restrict our CUDA kernels to an instruction set within the block; an empty name changes nothing."""
    before = os.environ.get(ISA)
    if name:
        os.environ[ISA] = name
    try:
        yield
    finally:
        if name and before is None:
            del os.environ[ISA]
        elif name and before is not None:
            os.environ[ISA] = before


def attention_case(
    problem: Problem,
    direction: str,
    *,
    baseline: str,
    dtype: torch.dtype,
    min_speedup: float,
    name: str,
    device: torch.device | str = "cpu",
    isa: str = "",
) -> Case:
    """Return a case of attention against a baseline.

    Args:
        direction: "forward", "backward" or "fwd+bwd".
        isa: the NANOCHAT_CUDA_ISA of our kernels.

    Raises:
        ValueError: the baseline is unknown.
        UnavailableError: the baseline does not work here; the message says why.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {', '.join(map(repr, BASELINES))}, got {baseline!r}")
    q, k, v, g = problem.tensors(dtype, device)
    inputs = [x.clone().requires_grad_(direction != "forward") for x in (q, k, v)]
    their_inputs = [x.transpose(1, 2).contiguous().requires_grad_(direction != "forward") for x in (q, k, v)]
    their_g = g.transpose(1, 2).contiguous()
    try:
        theirs_attend, note = baseline_of(baseline, problem, device)
        call = calls(theirs_attend, their_inputs, their_g, direction)
        call()
    except torch.OutOfMemoryError as error:
        raise UnavailableError(f"{baseline}: out of memory") from error
    except Exception as error:  # any compiler or library behind the baseline may fail
        raise UnavailableError(f"{baseline}: {type(error).__name__}: {error}") from error

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, causal=problem.causal, window=problem.window)

    with instruction_set(isa):
        ours_call = calls(attend, inputs, g, direction)

    def ours() -> tuple[Tensor, ...]:
        with instruction_set(isa):
            return ours_call()

    def check() -> None:
        """Compare one key/value head of the first sequence with the reference, in float32 or float64."""
        group = problem.H // problem.kv_heads
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        heads = (group, 1, 1)
        own = [x[:1, :, :count].to(wide).requires_grad_() for x, count in zip((q, k, v), heads, strict=True)]
        exact = reference.attention(*own, causal=problem.causal, window=problem.window)
        expected: dict[str, Tensor] = {"out": exact}
        if direction != "forward":
            grads = torch.autograd.grad(exact, own, g[:1, :, :group].to(wide))
            expected |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        results = dict(
            zip(("out", "dq", "dk", "dv") if direction != "backward" else ("dq", "dk", "dv"), ours(), strict=False)
        )
        for part, mine in results.items():
            count = group if part in ("out", "dq") else 1
            assert_close(f"attention {part}", mine[:1, :, :count], expected[part], EXACT[dtype])

    moved = sum(x.nbytes for x in (q, k, v)) + q.nbytes if problem.Tq else 0.0
    flops = 0.0 if problem.Tq else problem.flops(direction)
    return Case(
        f"attention {direction}",
        name,
        ours,
        call,
        baseline,
        check,
        min_speedup,
        flops=flops,
        bytes=moved,
        note="; ".join(filter(None, (note, f"ours restricted to {isa}" if isa else ""))),
    )


def calls(attend: Attention, inputs: list[Tensor], g: Tensor, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """Return the call to time: the forward pass, the backward pass of an output, or both."""
    if direction == "forward":
        return lambda: (attend(*inputs),)
    if direction == "backward":
        out = attend(*inputs)
        return lambda: torch.autograd.grad(out, inputs, g, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        out = attend(*inputs)
        return out, *torch.autograd.grad(out, inputs, g)

    return both
