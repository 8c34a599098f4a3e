"""Every operator with CUDA kernels as a function from a list of tensors to a list of results, those it writes included.

For what must hold of all of them: the same bits again, in a graph, on another stream, under compute-sanitizer.
"""

from dataclasses import dataclass
from typing import Any

import torch

from nanochat_native import ops
from nanochat_native.bench.attention import instruction_set

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
ADAMW = {"step": 3, "lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}


@dataclass
class Call:
    operators: tuple[str, ...]
    tensors: list
    run: Any  # tensors -> results
    same_bits: bool = True  # in a CUDA graph too, where the library may choose other products

    def __call__(self):
        """The results for fresh copies of the tensors."""
        return self.run([tensor.clone() for tensor in self.tensors])


def sizes(small):
    odd = [1, 7, 0, 33, 1001, 4096, 4099]
    return odd if small else [*odd * 20, 300_001, 2_000_003]


def adamw(device, small=False, dtype=F32, moments=F32, **options):
    counts = sizes(small)
    params, grads, firsts = (
        [torch.randn(n, device=device).to(kind) for n in counts] for kind in (dtype, dtype, moments)
    )
    seconds = [torch.rand(n, device=device).to(moments) for n in counts]

    def run(tensors):
        lists = [tensors[i * len(counts) : (i + 1) * len(counts)] for i in range(4)]
        ops.adamw_(*lists, **ADAMW | options)
        return lists[0] + lists[2] + lists[3]

    return Call(("adamw_",), params + grads + firsts + seconds, run)


def muon_momentum(device, small=False, dtype=F32):
    count, shape = (5, (19, 23)) if small else (60, (257, 129))
    grads = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    buffers = [torch.randn(shape, device=device) for _ in range(count)]

    def run(tensors):
        update, norms = ops.muon_momentum_(tensors[:count], tensors[count:], momentum=0.9, return_norm=True)
        return [update, norms, *tensors[count:]]

    return Call(("muon_momentum_",), grads + buffers, run)


def muon_update(device, small=False, dtype=F32, cautious=False):
    count, shape = (5, (19, 23)) if small else (60, (257, 129))
    params = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    update = torch.randn(count, *shape, device=device)

    def run(tensors):
        ops.muon_update_(tensors[:-1], tensors[-1], lr=0.1, weight_decay=0.1, scale=1.5, cautious=cautious)
        return tensors[:-1]

    return Call(("muon_update_",), [*params, update], run)


def newton_schulz(device, small=False, shape=(5, 1100, 270), isa="", **options):
    g = torch.randn((2, 140, 70) if small else shape, device=device)

    def run(tensors):
        with instruction_set(isa):
            return [ops.newton_schulz(tensors[0], **options)]

    return Call(("newton_schulz",), [g], run)


def newton_schulz_update(device, small=False, dtype=F32, shape=(300, 300), isa=""):
    count, shape = (3, (19, 23)) if small else (20, shape)
    params = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    update = torch.randn(count, *shape, device=device)

    def run(tensors):
        *params, update = tensors
        with instruction_set(isa):
            norms = torch.linalg.matrix_norm(update.double())
            ops.newton_schulz_update_(params, update, lr=0.1, weight_decay=0.1, scale=1.5, norms=norms)
        return params

    return Call(("newton_schulz_update_",), [*params, update], run)


def loss(device, small=False, dtype=F32, V=50257):
    N, C, V = (37, 24, 101) if small else (1500, 64, V)
    x, weight = torch.randn(N, C, device=device).to(dtype), (torch.randn(V, C, device=device) * 0.3).to(dtype)
    targets = torch.randint(0, V, (N,), device=device)
    targets[::5] = -1

    def run(tensors):
        x, weight, targets = tensors
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        value = ops.linear_cross_entropy(x, weight, targets)
        return [value.detach(), *torch.autograd.grad(value, (x, weight))]

    return Call(("linear_cross_entropy",), [x, weight, targets], run, same_bits=False)


def attention(device, small=False, B=2, T=777, H=4, Hkv=4, D=64, isa="", **options):
    T = 150 if small else T
    shapes = [(B, T, H, D), (B, T, Hkv, D), (B, T, Hkv, D), (B, T, H, D)]

    def run(tensors):
        *qkv, dout = tensors
        qkv = [tensor.detach().requires_grad_() for tensor in qkv]
        with instruction_set(isa):
            out = ops.attention(*qkv, **options)
            return [out.detach(), *torch.autograd.grad(out, qkv, dout)]

    return Call(("attention",), [torch.randn(shape, device=device).to(BF16) for shape in shapes], run)


def decoding(device, small=False):
    B, Tk, H, Hkv, D = 4, 300 if small else 5000, 8, 2, 128
    q, k, v = (torch.randn(B, T, heads, D, device=device).to(BF16) for T, heads in ((2, H), (Tk, Hkv), (Tk, Hkv)))
    lengths = torch.tensor([Tk, 1, Tk // 3, 0], device=device)

    def run(tensors):
        q, k, v, lengths = tensors
        return [ops.attention(q, k, v, lengths=lengths)]

    return Call(("attention",), [q, k, v, lengths], run)


CALLS = {
    "attention causal": attention,
    "attention window, grouped heads": lambda device, small=False: attention(
        device, small, H=8, Hkv=2, D=128, window=100
    ),
    "attention full, group of 3": lambda device, small=False: attention(device, small, H=6, Hkv=2, D=96, causal=False),
    # A Hopper GPU would not come to these kernels by itself.
    "attention causal, sm_80": lambda device, small=False: attention(device, small, isa="sm_80"),
    "attention window, grouped heads, sm_80": lambda device, small=False: attention(
        device, small, H=8, Hkv=2, D=128, window=100, isa="sm_80"
    ),
    "attention decoding": decoding,
    "adamw_ float32": adamw,
    "adamw_ bfloat16": lambda device, small=False: adamw(device, small, BF16, cautious=True),
    "adamw_ bfloat16 rounded": lambda device, small=False: adamw(device, small, BF16, BF16, stochastic_rounding=True),
    "muon_momentum_ float32": muon_momentum,
    "muon_momentum_ bfloat16": lambda device, small=False: muon_momentum(device, small, BF16),
    "muon_update_ float32": muon_update,
    "muon_update_ bfloat16": lambda device, small=False: muon_update(device, small, BF16, cautious=True),
    "newton_schulz tall": newton_schulz,
    "newton_schulz square": lambda device, small=False: newton_schulz(device, small, (4, 513, 520)),
    "newton_schulz wide": lambda device, small=False: newton_schulz(
        device, small, (3, 200, 999), coefficients="polar_express"
    ),
    "newton_schulz tall, sm_80": lambda device, small=False: newton_schulz(device, small, isa="sm_80"),
    "newton_schulz square, sm_80": lambda device, small=False: newton_schulz(device, small, (4, 513, 520), isa="sm_80"),
    "newton_schulz_update_ float32": newton_schulz_update,
    "newton_schulz_update_ bfloat16": lambda device, small=False: newton_schulz_update(device, small, BF16, (512, 129)),
    "newton_schulz_update_ float32, sm_80": lambda device, small=False: newton_schulz_update(
        device, small, isa="sm_80"
    ),
    "linear_cross_entropy float32": loss,
    "linear_cross_entropy bfloat16": lambda device, small=False: loss(device, small, BF16, V=8192),
}
