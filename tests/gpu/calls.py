"""Every operator with CUDA kernels as a function from a list of tensors to a list of results, those it writes included.

For what must hold of all of them: the same bits again, in a graph, on another stream, under compute-sanitizer.
"""

from dataclasses import dataclass
from typing import Any

import torch

from nanochat_native import ops
from nanochat_native.bench.attention import instruction_set
from nanochat_native.ops.dtypes import widest_dtype

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


def empty_copies(params):
    return [torch.full_like(param, torch.nan, dtype=BF16) for param in params]


def adamw(device, small=False, dtype=F32, moments=F32, with_copies=False, **options):
    counts = sizes(small)
    params, grads, firsts = (
        [torch.randn(n, device=device).to(kind) for n in counts] for kind in (dtype, dtype, moments)
    )
    seconds = [torch.rand(n, device=device).to(moments) for n in counts]

    def run(tensors):
        lists = [tensors[i * len(counts) : (i + 1) * len(counts)] for i in range(4)]
        copies = tensors[4 * len(counts) :]
        ops.adamw_(*lists, copies=copies, **ADAMW | options)
        return lists[0] + lists[2] + lists[3] + copies

    copies = empty_copies(params) if with_copies else []
    return Call(("adamw_",), params + grads + firsts + seconds + copies, run)


def muon_momentum(device, small=False, dtype=F32):
    count, shape = (5, (19, 23)) if small else (60, (257, 129))
    grads = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    buffers = [torch.randn(shape, device=device) for _ in range(count)]

    def run(tensors):
        update, norms = ops.muon_momentum_(tensors[:count], tensors[count:], momentum=0.9, return_norm=True)
        return [update, norms, *tensors[count:]]

    return Call(("muon_momentum_",), grads + buffers, run)


def muon_update(device, small=False, dtype=F32, cautious=False, with_copies=False):
    count, shape = (5, (19, 23)) if small else (60, (257, 129))
    params = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    update = torch.randn(count, *shape, device=device)

    def run(tensors):
        params, update, copies = tensors[:count], tensors[count], tensors[count + 1 :]
        ops.muon_update_(params, update, lr=0.1, weight_decay=0.1, scale=1.5, cautious=cautious, copies=copies)
        return params + copies

    return Call(("muon_update_",), [*params, update, *(empty_copies(params) if with_copies else [])], run)


def normuon_update(device, small=False, dtype=F32, shape=(257, 129), with_copies=False):
    count, shape = (5, (19, 23)) if small else (60, shape)
    params = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    lines = (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
    seconds = [torch.rand(lines, device=device) for _ in range(count)]
    update = torch.randn(count, *shape, device=device)

    def run(tensors):
        params, seconds = tensors[:count], tensors[count : 2 * count]
        options = {
            "lr": 0.1,
            "weight_decay": 0.1,
            "scale": 1.5,
            "cautious": True,
            "renormalise": True,
            "norm_eps": 1e-6,
        }
        copies = tensors[2 * count + 1 :]
        ops.normuon_update_(params, tensors[2 * count], seconds, copies=copies, **options)
        return params + seconds + copies

    copies = empty_copies(params) if with_copies else []
    return Call(("normuon_update_",), [*params, *seconds, update, *copies], run)


def newton_schulz(device, small=False, shape=(5, 1100, 270), isa="", **options):
    g = torch.randn((2, 140, 70) if small else shape, device=device)

    def run(tensors):
        with instruction_set(isa):
            return [ops.newton_schulz(tensors[0], **options)]

    return Call(("newton_schulz",), [g], run)


def newton_schulz_update(device, small=False, dtype=F32, shape=(300, 300), isa="", with_copies=False):
    count, shape = (3, (19, 23)) if small else (20, shape)
    params = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    update = torch.randn(count, *shape, device=device)

    def run(tensors):
        params, update, copies = tensors[:count], tensors[count], tensors[count + 1 :]
        with instruction_set(isa):
            norms = torch.linalg.matrix_norm(update.to(widest_dtype(update.device)))
            ops.newton_schulz_update_(params, update, lr=0.1, weight_decay=0.1, scale=1.5, norms=norms, copies=copies)
        return params + copies

    return Call(("newton_schulz_update_",), [*params, update, *(empty_copies(params) if with_copies else [])], run)


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
    if small:
        B, T, H, Hkv = 1, 140, H // 2, Hkv // 2
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


def norm(device, small=False, dtype=F32, C=768, residual=True):
    """The residual sum and its norm, or the norm alone, with gradients."""
    shape = (5, 77) if small else (2, 999, C)
    tensors = [torch.randn(shape, device=device).to(dtype) for _ in range(4 if residual else 2)]

    def run(tensors):
        *inputs, dy = (tensor.detach() for tensor in tensors)
        inputs, dsum = (inputs[:2], inputs[2:]) if residual else (inputs, [])
        inputs = [tensor.requires_grad_() for tensor in inputs]
        results = ops.add_rms_norm(*inputs) if residual else [ops.rms_norm(*inputs)]
        grads = torch.autograd.grad(results, inputs, [*dsum, dy])
        return [*(result.detach() for result in results), *grads]

    return Call(("add_rms_norm" if residual else "rms_norm",), tensors, run)


def mix(device, small=False, dtype=BF16, C=768):
    """The residual sum mixed with another stream, and its norm, with all gradients."""
    shape = (5, 77) if small else (2, 999, C)
    tensors = [torch.randn(shape, device=device).to(dtype) for _ in range(7)]

    def run(tensors):
        *streams, scales = (tensor.detach() for tensor in tensors)
        inputs = [tensor.requires_grad_() for tensor in (*streams[:3], *scales.split(1))]
        results = ops.mix_rms_norm(*inputs)
        grads = torch.autograd.grad(results, inputs, streams[3:])
        return [*(result.detach() for result in results), *grads]

    return Call(("mix_rms_norm",), [*tensors, torch.tensor([1.1, -0.3], device=device)], run)


def embedding(device, small=False, dtype=BF16):
    """The norm of rows of a table; torch's gradient of the table is no kernel of ours."""
    V, C, N = (7, 77, 9) if small else (1000, 768, 1999)
    tokens = torch.randint(0, V, (N,), device=device)
    tensors = [tokens, torch.randn(V, C, device=device)]
    return Call(("embedding_rms_norm",), tensors, lambda tensors: [ops.embedding_rms_norm(*tensors, dtype)])


def value_embedding(device, small=False, dtype=BF16, table_dtype=F32, Hkv=6, D=128):
    """The gradients of the kernels; torch's sum of the rows of the table is no kernel of ours."""
    V, N = (7, 90) if small else (1000, 1999)
    ids = torch.randint(0, V, (N,), device=device)
    v, dout, x = (torch.randn(N, *shape, device=device).to(dtype) for shape in ((Hkv, D), (Hkv, D), (40,)))
    tensors = [v, dout, x, torch.randn(Hkv, 12, device=device), torch.randn(V, Hkv * D, device=device).to(table_dtype)]

    def run(tensors):
        v, dout, x, gate, table, ids = tensors
        inputs = x[:, :12], gate, table, ids
        out = ops.add_value_embedding(v, *inputs)
        return [out, *ops.add_value_embedding_backward(dout, *inputs)[:2]]

    return Call(("add_value_embedding", "add_value_embedding_backward"), [*tensors, ids], run)


def smear(device, small=False, dtype=BF16, C=768):
    shape = (2, 50, 77) if small else (3, 999, C)
    tensors = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]

    def run(tensors):
        dout, *inputs = (tensor.detach() for tensor in tensors)
        inputs = [tensor.requires_grad_() for tensor in inputs]
        out = ops.smear(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]

    gate, smear_lambda = torch.randn(1, 24, device=device), torch.randn(1, device=device)
    return Call(("smear",), [*tensors, gate, smear_lambda], run)


def rotary(device, small=False, dtype=BF16, T=777, H=6, Hkv=6, D=128):
    B, T = (1, 5) if small else (2, T)
    shapes = [(B, T, heads, D) for heads in (H, Hkv, H, Hkv)]
    angles = torch.randn(T, D // 2, device=device)
    tensors = [*(torch.randn(shape, device=device).to(dtype) for shape in shapes), angles.cos(), angles.sin()]

    def run(tensors):
        q, k, dq_out, dk_out, cos, sin = tensors
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k)]
        results = ops.rotary_norm(*inputs, cos, sin, scale=1.2)
        grads = torch.autograd.grad(results, inputs, (dq_out, dk_out))
        return [*(result.detach() for result in results), *grads]

    return Call(("rotary_norm",), tensors, run)


def square(device, small=False, dtype=BF16):
    numel = 33 if small else 1_000_003

    def run(tensors):
        x, dy = tensors
        y = ops.relu_squared(x)
        ops.relu_squared_(x)
        ops.relu_squared_backward_(dy, y)
        return [y, x, dy]

    tensors = [torch.randn(numel, device=device).to(dtype) for _ in range(2)]
    return Call(("relu_squared", "relu_squared_", "relu_squared_backward_"), tensors, run)


CALLS = {
    "rms_norm float32": lambda device, small=False: norm(device, small, residual=False),
    "add_rms_norm bfloat16": lambda device, small=False: norm(device, small, BF16),
    "add_rms_norm float32, wide": lambda device, small=False: norm(device, small, F32, 5001),
    "mix_rms_norm bfloat16": mix,
    "mix_rms_norm float32, wide": lambda device, small=False: mix(device, small, F32, 5001),
    "embedding_rms_norm bfloat16": embedding,
    "add_value_embedding bfloat16": value_embedding,
    "add_value_embedding float32, one head": lambda device, small=False: value_embedding(
        device, small, F32, F32, Hkv=1, D=90
    ),
    "smear bfloat16": smear,
    "smear float32, wide": lambda device, small=False: smear(device, small, F32, 5001),
    "rotary_norm bfloat16": rotary,
    "rotary_norm float32, grouped heads": lambda device, small=False: rotary(device, small, F32, H=5, Hkv=1, D=90),
    "relu_squared bfloat16": square,
    "relu_squared float32": lambda device, small=False: square(device, small, F32),
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
    "adamw_ copies": lambda device, small=False: adamw(device, small, with_copies=True),
    "adamw_ bfloat16": lambda device, small=False: adamw(device, small, BF16, cautious=True),
    "adamw_ bfloat16 rounded": lambda device, small=False: adamw(device, small, BF16, BF16, stochastic_rounding=True),
    "muon_momentum_ float32": muon_momentum,
    "muon_momentum_ bfloat16": lambda device, small=False: muon_momentum(device, small, BF16),
    "muon_update_ float32": muon_update,
    "muon_update_ copies": lambda device, small=False: muon_update(device, small, with_copies=True),
    "muon_update_ bfloat16": lambda device, small=False: muon_update(device, small, BF16, cautious=True),
    "normuon_update_ tall": lambda device, small=False: normuon_update(device, small, with_copies=True),
    "normuon_update_ wide": lambda device, small=False: normuon_update(device, small, shape=(129, 257)),
    "normuon_update_ bfloat16": lambda device, small=False: normuon_update(device, small, BF16),
    "newton_schulz tall": newton_schulz,
    "newton_schulz square": lambda device, small=False: newton_schulz(device, small, (4, 513, 520)),
    "newton_schulz wide": lambda device, small=False: newton_schulz(
        device, small, (3, 200, 999), coefficients="polar_express"
    ),
    "newton_schulz tall, sm_80": lambda device, small=False: newton_schulz(device, small, isa="sm_80"),
    "newton_schulz square, sm_80": lambda device, small=False: newton_schulz(device, small, (4, 513, 520), isa="sm_80"),
    "newton_schulz_update_ float32": newton_schulz_update,
    "newton_schulz_update_ copies": lambda device, small=False: newton_schulz_update(device, small, with_copies=True),
    "newton_schulz_update_ bfloat16": lambda device, small=False: newton_schulz_update(device, small, BF16, (512, 129)),
    "newton_schulz_update_ float32, sm_80": lambda device, small=False: newton_schulz_update(
        device, small, isa="sm_80"
    ),
    "linear_cross_entropy float32": loss,
    "linear_cross_entropy bfloat16": lambda device, small=False: loss(device, small, BF16, V=8192),
}
