"""Defects that are put into kernels, one at a time, and what finds each.

`found_by`: the build whose run must fail: plain (a wrong result, or the emulation's own checks), address, thread, or ptx:
nvcc's, executed. PTX_TEXT lists what only the last can find.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import operator_calls as operators
import torch

from nanochat_native.ops import reference

GEMM = "tests/emulation/kernels/gemm_hopper.cu"
ATTENTION = "tests/emulation/kernels/attention_ampere.cu"
PRIMITIVES = "tests/emulation/kernels/primitives.cu"
BLOCKS = "tests/emulation/kernels/blocks.cu"
WGMMA, WGMMA_FORMS = "tests/emulation/kernels/wgmma.cuh", "tests/emulation/kernels/wgmma_forms.cu"


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # that is changed
    old: str  # occurs in it once
    new: str
    case: Callable[[Any, int], None]  # runs the kernels with a seed; raises where something is wrong
    library: str  # that the case calls
    found_by: str = "plain"


def gemm(kernels, seed):
    M, N, K = 200, 136, 328
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((M, K), (N, K)))
    c = torch.full((M, N), torch.nan, dtype=torch.bfloat16)
    kernels.call("gemm_hopper", a, b, c, M, N, K, seed=seed)
    torch.testing.assert_close(c.float(), a.float() @ b.float().T, rtol=1e-2, atol=1e-2)


def attention(kernels, seed):
    B, T, H, Hkv = 1, 150, 2, 1
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, heads, 64, generator=generator).bfloat16() for heads in (H, Hkv, Hkv))
    out, lse = torch.full_like(q, torch.nan), torch.full((B, H, T), torch.nan)
    kernels.call("attention_ampere", q, k, v, out, lse, B, T, H, Hkv, 0.125, seed=seed)
    exact, exact_lse = reference.attention_forward(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


def grid_sum(kernels, seed):
    x, sums = torch.arange(1000.0), torch.full((11,), torch.nan)
    finished, total = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    kernels.call("grid_sum", x, sums, finished, total, 1000, 11, seed=seed)
    assert total.item() == x.sum().item()


def take_turns(kernels, seed):
    blocks = 5
    x = torch.randn(blocks, 256, generator=torch.Generator().manual_seed(seed))
    sums, rows, counter = torch.zeros(256), torch.full((blocks, 256), torch.nan), torch.zeros(1, dtype=torch.int32)
    kernels.call("take_turns", x, sums, rows, counter, blocks, seed // 4 % 2, seed=seed)
    row, expected = torch.zeros(256), torch.zeros(256)
    for own in x.flip(0) if seed // 4 % 2 else x:
        row = own + 0.5 * row
        expected = expected + row
    assert torch.equal(sums, expected)
    assert torch.equal(rows[-1], row)


def share_loads(kernels, seed):
    clusters, steps, size = 2, 4, 2
    x = torch.randn(clusters, steps, size * 8, 32, generator=torch.Generator().manual_seed(seed))
    out = torch.zeros(clusters, size, size * 8, 32)
    kernels.call("share_loads", x, out, clusters, steps, size, seed=seed)
    weights = 1.0 + torch.arange(size)[:, None] + torch.arange(steps)
    torch.testing.assert_close(out, torch.einsum("rs,csij->crij", weights, x), rtol=1e-5, atol=1e-5)


def overlap(kernels, seed):
    out = torch.zeros(4, 32)
    kernels.call("overlap", out, seed=seed)
    assert torch.equal(out, 2 * torch.arange(32.0).expand(4, 32))


def hand_over(kernels, seed):
    x = torch.arange(160.0).view(5, 32)
    out = torch.zeros_like(x)
    kernels.call("hand_over", x, out, 5, seed=seed)
    assert torch.equal(out, x.flip(1))


def mma_tile(kernels, seed):
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (seed, seed + 1))
    d = torch.full((16, 16), torch.nan)
    kernels.call("mma_tile", a, b, d, 0, 8, seed=seed)
    present = torch.arange(16) < 12
    torch.testing.assert_close(d, (a * present).float() @ (b * present).float(), rtol=1e-5, atol=1e-5)


def copy_box(kernels, seed):
    sizes, box, at = (torch.tensor([*x]) for x in ((64, 24, 1, 1), (64, 16, 1, 1), (0, 4, 0, 0)))
    source = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    target = torch.zeros_like(source)
    image = torch.zeros(64 * 16 * 2, dtype=torch.uint8)
    kernels.call("copy_box", source, target, image, 2, 1, 2, sizes, box, at, 0, seed=seed)
    assert torch.equal(target[4:20], source[4:20])
    assert not target[:4].any()
    assert image.any()


def copy_box_of_rank_4(kernels, seed):
    sizes, box, at = (torch.tensor([*x]) for x in ((16, 3, 4, 3), (16, 2, 3, 2), (0, 1, 1, 0)))
    source = torch.randn(3, 4, 3, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    target = torch.zeros_like(source)
    image = torch.zeros(16 * 2 * 3 * 2 * 2, dtype=torch.uint8)
    kernels.call("copy_box", source, target, image, 2, 0, 4, sizes, box, at, 0, seed=seed)
    assert torch.equal(target[:2, 1:4, 1:3], source[:2, 1:4, 1:3])
    assert torch.equal(image.view(torch.bfloat16), source[:2, 1:4, 1:3].flatten())


def reverse(kernels, seed):
    x, out = torch.arange(364, dtype=torch.int32), torch.zeros(364, dtype=torch.int32)
    kernels.call("reverse", x, out, 364, seed=seed)
    assert torch.equal(out, x.flip(0))


def reverse_streamed(kernels, seed):
    x, out = torch.arange(364, dtype=torch.int32), torch.zeros(2, 364, dtype=torch.int32)
    for in_pairs in (0, 1):
        kernels.call("reverse_streamed", x, out[in_pairs], 364, in_pairs, seed=seed)
    assert torch.equal(out, x.flip(0).expand(2, -1))


def reverse_pairs(kernels, seed):
    x, out = torch.arange(64.0).view(32, 2), torch.zeros(32, 2)
    kernels.call("reverse_pairs", x, out, seed=seed)
    assert torch.equal(out, x.flip(0))


def numbers(kernels, seed):
    x = torch.randn(96, generator=torch.Generator().manual_seed(seed)).abs() + 0.1
    out, packed = torch.zeros(6, 96), torch.zeros(2, 96, dtype=torch.int32)
    kernels.call("numbers", x, out, packed, 96)
    exact = torch.stack([x.bfloat16().float(), x.half().float(), x.exp2(), 1 / x, x.tanh(), x.sqrt()])
    torch.testing.assert_close(out, exact, rtol=2**-10, atol=0)
    halves = torch.stack([x.half(), x.half().flip(0)], 1)
    assert torch.equal(packed[1].view(torch.float16).view(96, 2), halves)


def wgmma_form(kernels, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((64, 64), (64, 256)))
    for registers, mn_a, mn_b in ((0, 0, 0), (1, 0, 1), (0, 1, 1)):
        d = torch.full((64, 256), torch.nan)
        stored = (a.T.contiguous() if mn_a else a), (b if mn_b else b.T.contiguous())
        kernels.call("wgmma_form", *stored, d, 1, 256, 0, registers, mn_a, mn_b, seed=seed)
        torch.testing.assert_close(d, a.float() @ b.float(), rtol=1e-4, atol=1e-4)


def attention_inputs(seed, B, Tq, Tk, H, Hkv):
    """q, k, v, dout, head size 64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((Tq, H), (Tk, Hkv), (Tk, Hkv), (Tq, H))
    return [torch.randn(B, T, heads, 64, generator=generator).bfloat16() for T, heads in shapes]


# 30 rows see no key; the scale is negative; groups of 3 are packed on one path and not on the other, where the blocks of
# keys are large: more keys, that a stage is filled again.
AMPERE = {"Tq": 200, "Tk": 170, "window": 90}, {}
HOPPER = {"Tq": 440, "Tk": 410, "window": 380}, {"hopper": True, "multiprocessors": 1}


def forward(kernels, seed, sizes, path):
    q, k, v, _ = attention_inputs(seed, 1, sizes["Tq"], sizes["Tk"], 3, 1)
    options = {"window": sizes["window"], "scale": -0.15}
    out, lse = operators.attention_forward(kernels, q, k, v, schedule=seed, **options, **path)
    exact, exact_lse = reference.attention_forward(q.double(), k.double(), v.double(), **options)
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


def forward_ampere(kernels, seed):
    forward(kernels, seed, *AMPERE)


def forward_hopper(kernels, seed):
    forward(kernels, seed, *HOPPER)


def forward_hopper_windowed(kernels, seed):
    """Blocks are large. Of those of a tile, each consumer sees others."""
    forward(kernels, seed, {"Tq": 440, "Tk": 600, "window": 300}, HOPPER[1])


def forward_hopper_packed(kernels, seed):
    """A query fills the rows of two warps."""
    q, k, v, _ = attention_inputs(seed, 2, 9, 70, 32, 1)
    out, _ = operators.attention_forward(kernels, q, k, v, schedule=seed, hopper=True, multiprocessors=1)
    torch.testing.assert_close(out, reference.attention(q, k, v), rtol=2e-2, atol=2e-2)


def decode(kernels, seed):
    q, k, v, _ = attention_inputs(seed, 3, 2, 400, 4, 2)
    lengths = torch.tensor([400, 37, 200])
    out, _ = operators.attention_forward(kernels, q, k, v, lengths=lengths, multiprocessors=10, schedule=seed)
    torch.testing.assert_close(out, reference.attention(q, k, v, lengths=lengths), rtol=2e-2, atol=2e-2)


def backward(kernels, seed, sizes, path):
    q, k, v, dout = attention_inputs(seed, 1, sizes["Tq"], sizes["Tk"], 3, 1)
    options = {"window": sizes["window"], "scale": -0.15}
    exact_inputs = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    out, lse = reference.attention_forward(*exact_inputs, **options)
    exact = torch.autograd.grad(out, exact_inputs, dout.double())
    tensors = (dout, q, k, v, out.detach().bfloat16(), lse.float())
    grads = operators.attention_backward(kernels, *tensors, schedule=seed, **options, **path)
    for mine, other in zip(grads, exact, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=4e-2, atol=8e-2)


def backward_ampere(kernels, seed):
    backward(kernels, seed, *AMPERE)


def backward_hopper(kernels, seed):
    backward(kernels, seed, *HOPPER)


def backward_hopper_blocks(kernels, seed):
    """Three tiles of keys that add to the same rows side by side; a tile of rows that sees nothing."""
    backward(kernels, seed, {"Tq": 330, "Tk": 260, "window": 100}, {"hopper": True, "multiprocessors": 3})


SETTINGS = {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}


def randn(generator, *shape, dtype=torch.float32, offset=0):
    """Normal numbers, `offset` elements behind an aligned address."""
    numel = torch.Size(shape).numel()
    room = torch.empty(numel + offset, dtype=dtype)
    room[offset:] = torch.randn(numel, generator=generator)
    return room[offset:].view(shape)


def empty_copies(params, offset=0):
    """`offset` elements behind an aligned address."""
    rooms = [torch.full((param.numel() + offset,), torch.nan, dtype=torch.bfloat16) for param in params]
    return [room[offset:].view(param.shape) for room, param in zip(rooms, params, strict=True)]


def check_copies(copies, params):
    for copy, param in zip(copies, params, strict=True):
        assert torch.equal(copy, param.bfloat16()), "the copy is not the rounded parameter"


def adamw(kernels, schedule, dtype=torch.float32, moments=torch.float32, with_copies=False, **options):
    generator = torch.Generator().manual_seed(schedule)
    sizes = [(3, 0), (2048, 0), (0, 0), (3501, 0), (4096, 0), (301, 1)]  # numbers of elements, offsets
    params, grads = ([randn(generator, n, dtype=dtype, offset=at) for n, at in sizes] for _ in range(2))
    exp_avgs, squares = ([randn(generator, n, dtype=moments, offset=at) for n, at in sizes] for _ in range(2))
    exp_avg_sqs = [square.abs_() for square in squares]
    ours = (params, grads, exp_avgs, exp_avg_sqs)
    expected = [[tensor.clone() for tensor in tensors] for tensors in ours]
    options = SETTINGS | {"step": 3} | options
    copies = empty_copies(params, schedule % 2) if with_copies else []
    operators.adamw_(kernels, *ours, copies=copies, schedule=schedule, **options)
    check_copies(copies, params if copies else [])
    if options.get("stochastic_rounding"):
        return check_rounding(ours, expected, options)
    reference.adamw_(*expected, **options)
    for mine, other in zip(ours, expected, strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=2e-5 if a.dtype == torch.float32 else 2**-7)
    return None


def check_rounding(ours, start, options):
    """Each parameter is a neighbour of the exact result, above it as often as its distance asks, and independently."""
    exact = [[tensor.float() for tensor in tensors] for tensors in start]
    reference.adamw_(*exact, **options | {"stochastic_rounding": False})
    mine, true = (torch.cat(tensors[0]).double().abs() for tensors in (ours, exact))
    spacing = 2.0 ** (true.log2().floor() - 7)
    assert ((mine - true).abs() < spacing * 1.001).all()
    surprise = (mine > true).double() - (true / spacing) % 1
    assert abs(surprise.mean()) < 5 * 0.5 / true.numel() ** 0.5
    for distance in range(1, 9):
        assert abs((surprise[distance:] * surprise[:-distance]).mean()) < 5 * 0.25 / true.numel() ** 0.5


def adamw_copies(kernels, seed):
    adamw(kernels, seed, with_copies=True)


def adamw_bfloat16(kernels, seed):
    adamw(kernels, seed, torch.bfloat16, torch.float32, cautious=True)


def adamw_stochastic(kernels, seed):
    adamw(kernels, seed, torch.bfloat16, torch.float32, stochastic_rounding=True, seed=seed)
    adamw(kernels, seed, torch.bfloat16, torch.bfloat16, stochastic_rounding=True, seed=seed)


def adamw_captured(kernels, seed):
    kinds = {"step": torch.int64, "lr": torch.float64, "weight_decay": torch.float64}
    values = {"step": 7, "lr": 0.03, "weight_decay": 0.5}
    adamw(kernels, seed, **{name: torch.tensor(value, dtype=kinds[name]) for name, value in values.items()})


def muon(kernels, seed):
    generator = torch.Generator().manual_seed(seed)
    for shape, offset in (((64, 64), 0), ((65, 67), 0), ((16, 20), 1)):
        grads, buffers, params = ([randn(generator, *shape, offset=offset) for _ in range(3)] for _ in range(3))
        expected_buffers, expected_params = ([tensor.clone() for tensor in tensors] for tensors in (buffers, params))
        update, norms = operators.muon_momentum_(kernels, grads, buffers, momentum=0.9, return_norm=True, schedule=seed)
        copies = empty_copies(params, seed % 2)
        rates = {"lr": 0.1, "weight_decay": 0.5, "scale": 2.0, "cautious": True}
        operators.muon_update_(kernels, params, update, copies=copies, schedule=seed, **rates)
        check_copies(copies, params)
        expected_update, expected_norms = reference.muon_momentum_(
            grads, expected_buffers, momentum=0.9, return_norm=True
        )
        reference.muon_update_(expected_params, expected_update, **rates)
        torch.testing.assert_close(update, expected_update)
        torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
        for mine, other in zip((*buffers, *params), (*expected_buffers, *expected_params), strict=True):
            torch.testing.assert_close(mine, other)


def loss(kernels, seed):
    generator = torch.Generator().manual_seed(seed)
    for V, softcap, dtype in ((2051, 15.0, torch.bfloat16), (520, 0.0, torch.float32), (9000, 100.0, torch.float32)):
        logits = (torch.randn(3, V, generator=generator) * 8).to(dtype)
        targets = torch.tensor([V - 1, -1, V // 2])
        x = logits.double().requires_grad_()
        z = softcap * torch.tanh(x / softcap) if softcap else x
        exact = (z.logsumexp(1) - z.gather(1, targets.clamp(min=0)[:, None])[:, 0]).masked_fill(targets < 0, 0)
        (gradient,) = torch.autograd.grad(exact.sum() * 0.25, x)
        scale = torch.tensor([0.25])
        ours = operators.softcap_cross_entropy(
            kernels, logits, targets, grad_scale=scale, softcap=softcap, schedule=seed
        )
        torch.testing.assert_close(ours.double(), exact.detach(), rtol=1e-5, atol=2e-5)
        rtol = 2e-5 if dtype == torch.float32 else 5e-3  # 2^-8, and a quarter for the weights held in 16 bits
        torch.testing.assert_close(logits.double(), gradient, rtol=rtol, atol=1e-7)


def normuon(kernels, seed):
    """Tall and wide matrices, with tails and several parts of rows; lines and a matrix below the smallest values."""
    generator = torch.Generator().manual_seed(seed)
    for shape, offset in (((70, 33), 0), ((70, 131), 1), ((12, 16), 0), ((3, 5), 0)):
        M, K = shape
        params = [randn(generator, *shape, offset=offset) for _ in range(3)]
        seconds = [torch.zeros((M, 1) if M >= K else (1, K)) for _ in range(3)]
        expected, expected_seconds = ([tensor.clone() for tensor in tensors] for tensors in (params, seconds))
        copies = empty_copies(params, seed % 2)
        options = {"lr": 0.1, "weight_decay": 0.5, "scale": 2.0, "cautious": True, "renormalise": True}
        options |= {"beta2": 0.9, "eps": 1e-4, "norm_eps": 1e-3}
        for _ in range(2):
            update = randn(generator, 3, *shape, offset=offset)
            update[0, -1] *= 1e-3
            update[0, :, 0] *= 1e-3
            update[1] *= 1e-6
            operators.normuon_update_(kernels, params, update, seconds, copies=copies, schedule=seed, **options)
            reference.normuon_update_(expected, update, expected_seconds, **options)
        check_copies(copies, params)
        for mine, other in zip((*params, *seconds), (*expected, *expected_seconds), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def orthogonal(kernels, seed, form, steps, *shape, tolerance=3e-3, **path):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    mine = operators.newton_schulz(kernels, g, form=form, steps=steps, schedule=seed, **path)
    exact = reference.newton_schulz(g.double(), steps=steps)
    assert (mine.double() - exact).norm() <= tolerance * exact.norm()


def into_params(kernels, seed, dtype, *shape, **path):
    generator = torch.Generator().manual_seed(seed)
    update = torch.randn(3, *shape, generator=generator)
    norms = torch.linalg.matrix_norm(update.double())
    params = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    expected = [param.clone() for param in params]
    options = {"lr": 0.1, "weight_decay": 0.5, "scale": 3.0, "cautious": True, "steps": 1, "norms": norms}
    copies = empty_copies(params, seed % 2) if dtype == torch.float32 else []
    operators.newton_schulz(kernels, update, params=params, copies=copies, schedule=seed, **options, **path)
    check_copies(copies, params if copies else [])
    reference.newton_schulz_update_(expected, update, **options)
    for mine, other in zip(params, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-3, rtol=2**-7)


def scaled_rows(kernels, seed, *shape, **path):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(shape, generator=generator)
    scales = torch.rand(shape[:-1], generator=generator, dtype=torch.float64) / g[0].numel() ** 0.5
    one_step = {"steps": 1, "coefficients": [(1.0, 0.0, 0.0)]}
    mine = operators.newton_schulz(kernels, g, scales=scales, schedule=seed, **one_step, **path)
    torch.testing.assert_close(mine, g * scales[..., None].float(), rtol=1e-3, atol=1e-6)


def newton_schulz_of_a_tile(kernels, seed, **path):
    """Results of one tile, in all forms of the result."""
    into_params(kernels, seed, torch.float32, 33, 21, **path)
    into_params(kernels, seed, torch.float32, 5, 6, **path)
    into_params(kernels, seed, torch.float32, 70, 128, **path)
    into_params(kernels, seed, torch.bfloat16, 20, 24, **path)
    scaled_rows(kernels, seed, 3, 33, 21, **path)


def newton_schulz_of_tiles(kernels, seed, **path):
    """Symmetric results of one tile and of several, on and off the diagonal, with tails; matrices tall and wide."""
    orthogonal(kernels, seed, "plain", 1, 2, 150, 141, **path)
    orthogonal(kernels, seed, "gram", 5, 2, 70, 84, tolerance=5e-3, **path)
    orthogonal(kernels, seed, "plain", 2, 2, 140, 150, **path)


def newton_schulz_ampere(kernels, seed):
    """The cases that take the least time come first, because most defects show in them."""
    newton_schulz_of_a_tile(kernels, seed)
    newton_schulz_of_tiles(kernels, seed)


def newton_schulz_hopper(kernels, seed):
    """Also with several squares of 256 x 256, on and off the diagonal."""
    path = {"hopper": True, "multiprocessors": 4}
    newton_schulz_of_a_tile(kernels, seed, **path)
    orthogonal(kernels, seed, "plain", 1, 1, 280, 330, **path)
    newton_schulz_of_tiles(kernels, seed, **path)


def assert_rounded(mine, exact):
    """One rounding of what float32 gives."""
    rtol = 2**-8 + 1e-5 if mine.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(mine.double(), exact, rtol=rtol, atol=2e-6, equal_nan=True)


def normalised(x):
    """The norm in float64, and r."""
    r = (x.double().square().mean(-1, keepdim=True) + operators.EPS).rsqrt()
    return x.double() * r, r[..., 0]


def moved(tensor):
    """The same values one element behind an aligned address."""
    room = tensor.new_empty(tensor.numel() + 1)
    room[1:] = tensor.reshape(-1)
    return room[1:].view(tensor.shape)


def rms_norm(kernels, seed):
    """Rows of a warp, of a block, longer ones, and rows with a tail; five: one more than a block of warps has.

    Where a row has 64 elements, all tensors but one are aligned.
    """
    generator = torch.Generator().manual_seed(seed)
    F32, BF16 = torch.float32, torch.bfloat16
    for C, dtype, unaligned in (
        *((260, F32, ""), (1280, BF16, ""), (9000, F32, ""), (77, BF16, "")),
        *((64, F32, "residual"), (64, BF16, "y")),
    ):
        x, residual, dy = (randn(generator, 5, C, dtype=dtype) for _ in range(3))
        residual = moved(residual) if unaligned == "residual" else residual
        total, y, r = operators.rms_norm(kernels, x, residual, schedule=seed)
        assert torch.equal(total, x + residual)
        exact, exact_r = normalised(total)
        assert_rounded(y, exact)
        torch.testing.assert_close(r.double(), exact_r, rtol=1e-6, atol=0)
        y = moved(y) if unaligned == "y" else y
        dx = operators.rms_norm_backward(kernels, dy, y, r, residual, schedule=seed)
        product = (dy.double() * y.double()).mean(1, keepdim=True)
        assert_rounded(dx, residual.double() + r.double()[:, None] * (dy.double() - y.double() * product))


def mix_rms_norm(kernels, seed):
    """The rows of rms_norm; where a row has 64 elements, all tensors but one are aligned."""
    generator = torch.Generator().manual_seed(seed)
    F32, BF16 = torch.float32, torch.bfloat16
    scales = torch.tensor([[1.1], [-0.3]])
    x_scale, x0_scale = scales.double()
    names = ("dy", "dz", "dmixed", "add_to", "z", "x0")
    for C, dtype, unaligned in (
        *((260, F32, ""), (1280, BF16, ""), (9000, F32, ""), (77, BF16, "")),
        *((64, F32, name) for name in (*names, "x", "residual", "y")),
    ):
        inputs = {name: randn(generator, 5, C, dtype=dtype) for name in (*names, "x", "residual", "y")}
        if unaligned:
            inputs[unaligned] = moved(inputs[unaligned])
        z, mixed, y, r = operators.mix_rms_norm(
            kernels, inputs["x"], inputs["residual"], inputs["x0"], *scales, schedule=seed
        )
        assert torch.equal(z, inputs["x"] + inputs["residual"])
        assert_rounded(mixed, x_scale * z.double() + x0_scale * inputs["x0"].double())
        exact, exact_r = normalised(mixed)
        assert_rounded(y, exact)
        torch.testing.assert_close(r.double(), exact_r, rtol=1e-6, atol=0)
        dy, dz, dmixed, add_to, z, x0 = (inputs[name] for name in names)
        y = moved(y) if unaligned == "y" else y
        dx, dx0, *of_factors = operators.mix_rms_norm_backward(
            kernels, dy, y, r, z, x0, *scales, dz=dz, dmixed=dmixed, add_to=add_to, schedule=seed
        )
        product = (dy.double() * y.double()).mean(1, keepdim=True)
        ds = dmixed.double() + r.double()[:, None] * (dy.double() - y.double() * product)
        assert_rounded(dx, x_scale * ds + dz.double())
        assert_rounded(dx0, x0_scale * ds + add_to.double())
        for mine, stream in zip(of_factors, (z, x0), strict=True):
            assert abs(mine.double() - (ds * stream.double()).sum()) <= 1e-6 * (ds * stream.double()).abs().sum()


def factor_gradients(kernels, seed):
    """More rows than the kernel has threads, of which the first is large."""
    N = 2100
    zero, dmixed = torch.zeros(N, 2), torch.ones(N, 2)
    dmixed[0] = 2.0**24
    z, x0, scale = torch.ones(N, 2), torch.full((N, 2), 2.0), torch.ones(1)
    *_, dx_scale, dx0_scale = operators.mix_rms_norm_backward(
        kernels, zero, zero, torch.ones(N), z, x0, scale, scale, dmixed=dmixed, schedule=seed
    )
    exact = torch.tensor([2 * (2.0**24 + N - 1)])
    assert torch.equal(dx_scale, exact)
    assert torch.equal(dx0_scale, 2 * exact)


def embedding_rms_norm(kernels, seed):
    generator = torch.Generator().manual_seed(seed)
    table = randn(generator, 4, 136)
    tokens = torch.tensor([3, -1, 0, 4, 2])
    y, r = operators.embedding_rms_norm(kernels, tokens, table, torch.bfloat16, schedule=seed)
    exact, exact_r = normalised(table[tokens.clamp(0, 3)].bfloat16())
    known = (tokens >= 0) & (tokens < 4)
    assert_rounded(y, exact.masked_fill(~known[:, None], torch.nan))
    torch.testing.assert_close(r.double(), exact_r.masked_fill(~known, torch.nan), rtol=1e-6, atol=0, equal_nan=True)


def assert_near_sum(mine, exact, terms):
    """One rounding of a sum in float32; `terms` is the sum of the terms' magnitudes."""
    rtol = 2**-8 + 1e-5 if mine.dtype == torch.bfloat16 else 2e-6
    assert ((mine.double() - exact).abs() <= rtol * exact.abs() + 2e-6 * terms + 1e-6).all()


def value_embedding(kernels, seed):
    """Whole heads, heads with a tail, and heads longer than a warp; groups that are not full; several blocks of rows.

    An id is out of range. Where a head has 64 elements, all tensors but one are aligned.
    """
    F32, BF16 = torch.float32, torch.bfloat16
    for N, Hkv, D, I, dtype, table_dtype, unaligned in (  # noqa: E741
        *((67, 6, 16, 12, BF16, F32, ""), (3, 3, 10, 5, F32, F32, ""), (2, 1, 320, 33, BF16, BF16, "")),
        *((3, 2, 64, 12, F32, F32, "in"), (3, 2, 64, 12, BF16, BF16, "table")),
    ):
        generator = torch.Generator().manual_seed(seed)
        v, dout = (randn(generator, N, Hkv, D, dtype=dtype) for _ in range(2))
        h, gate = randn(generator, N, I + 2, dtype=dtype)[:, 1:-1], randn(generator, Hkv, I) * I**-0.5
        table, ids = randn(generator, 4, Hkv * D, dtype=table_dtype), torch.arange(N) % 4
        v, dout = (moved(tensor) if unaligned == "in" else tensor for tensor in (v, dout))
        table = moved(table) if unaligned == "table" else table
        ids[1] = 4
        known = ids < 4
        arguments = h, gate, table, ids
        out = operators.add_value_embedding(kernels, v, *arguments, schedule=seed)
        dh, dgate, drows = operators.add_value_embedding_backward(kernels, dout, *arguments, schedule=seed)
        rows, wide = table.double()[ids % 4].view(N, Hkv, D), h.double()
        s = (wide @ gate.double().mT).sigmoid()[..., None]
        assert_rounded(out, (v.double() + 3 * s * rows).masked_fill(~known[:, None, None], torch.nan))
        assert_rounded(drows[known], (3 * s * dout.double()).flatten(1)[known])
        terms = 3 * s * (1 - s) * dout.double() * rows * known[:, None, None]
        dz, size = terms.sum(-1), terms.abs().sum(-1)
        assert_near_sum(dh, dz @ gate.double(), size @ gate.double().abs())
        assert_near_sum(dgate, dz.mT @ wide, size.mT @ wide.abs())


def smear(kernels, seed):
    """Rows of a warp and of a block, with tails, and several blocks of rows.

    Where a row has 64 elements, all tensors but one are aligned.
    """
    F32, BF16 = torch.float32, torch.bfloat16
    for B, T, C, I, dtype, unaligned in (  # noqa: E741
        *((2, 35, 70, 24, F32, ""), (1, 3, 1280, 24, F32, ""), (3, 1, 30, 5, BF16, "")),
        *((1, 2, 64, 24, F32, "x"), (1, 2, 64, 24, BF16, "dout")),
    ):
        generator = torch.Generator().manual_seed(seed)
        x, dout = (randn(generator, B, T, C, dtype=dtype) for _ in range(2))
        gate, smear_lambda = randn(generator, 1, I) * I**-0.5, torch.tensor([0.7])
        x, dout = (moved(t) if unaligned == name else t for t, name in ((x, "x"), (dout, "dout")))
        out = operators.smear(kernels, x, gate, smear_lambda, schedule=seed)
        dx, dgate, dlambda = operators.smear_backward(kernels, dout, x, gate, smear_lambda, schedule=seed)
        wide, ddout, w = x.double(), dout.double(), gate.double()
        s = (wide[:, 1:, :I] @ w.mT).sigmoid()
        assert_rounded(out, torch.cat((wide[:, :1], wide[:, 1:] + 0.7 * s * wide[:, :-1]), 1))
        products = ddout[:, 1:] * wide[:, :-1]
        dz, size = (0.7 * s * (1 - s) * terms.sum(-1, keepdim=True) for terms in (products, products.abs()))
        exact, terms = ddout.clone(), ddout.abs()
        exact[:, :-1] += 0.7 * s * ddout[:, 1:]
        exact[:, 1:, :I] += dz * w
        terms[:, 1:, :I] += size * w.abs()
        assert_near_sum(dx, exact, terms)
        assert_near_sum(dgate, (dz * wide[:, 1:, :I]).sum((0, 1))[None], (size * wide[:, 1:, :I].abs()).sum((0, 1)))
        assert_near_sum(dlambda, (s * products).sum()[None], (s * products.abs()).sum())


def with_longer_rows(tensor):
    """One element between the tokens of (B, T, H, D), or the rows of (T, D / 2): only the first is aligned."""
    rows = tensor.flatten(2) if tensor.dim() == 4 else tensor
    room = rows.new_empty(*rows.shape[:-1], rows.size(-1) + 1)
    room[..., :-1] = rows
    return room[..., :-1].view(tensor.shape)


def rotary_norm(kernels, seed):
    """q and k are parts of one tensor; heads with whole packs and with tails; groups of heads that are not full."""
    check_rotary_norm(kernels, seed, 64, torch.bfloat16)
    check_rotary_norm(kernels, seed, 20, torch.float32)


def rotary_norm_unaligned(kernels, seed):
    """All tensors but one, and with it its gradient, are aligned."""
    for change in ({"k": moved}, *({name: with_longer_rows} for name in ("q", "k", "cos", "sin"))):
        check_rotary_norm(kernels, seed, 64, torch.bfloat16, **change)


def check_rotary_norm(kernels, seed, D, dtype, **changes):
    """Each of `changes` makes another place for a tensor; that of q and k holds for their gradients too."""
    generator = torch.Generator().manual_seed(seed)
    B, T, H, Hkv, scale = 2, 3, 3, 2, 1.5
    q, k, dq_out, dk_out = (
        heads for _ in range(2) for heads in randn(generator, B, T, H + Hkv, D, dtype=dtype).split((H, Hkv), dim=2)
    )
    cos, sin = (randn(generator, T, D)[:, : D // 2] for _ in range(2))
    q, k, dq_out, dk_out, cos, sin = (
        changes[name](tensor) if name in changes else tensor
        for name, tensor in zip(("q", "k", "q", "k", "cos", "sin"), (q, k, dq_out, dk_out, cos, sin), strict=True)
    )
    results = operators.rotary_norm(kernels, q, k, cos, sin, scale=scale, schedule=seed)
    grads = operators.rotary_norm_backward(kernels, dq_out, dk_out, *results, cos, sin, scale=scale, schedule=seed)
    c, s = cos.double()[:, None], sin.double()[:, None]
    for x, dout, out, r, dx in zip((q, k), (dq_out, dk_out), results, results[2:], grads, strict=False):
        x1, x2 = x.double().chunk(2, -1)
        exact, exact_r = normalised(torch.cat((x1 * c + x2 * s, x2 * c - x1 * s), -1))
        assert_rounded(out, scale * exact)
        torch.testing.assert_close(r.double(), exact_r, rtol=1e-6, atol=0)
        n, dout = out.double() / scale, dout.double()
        dz = scale * r.double()[..., None] * (dout - n * (dout * n).mean(-1, keepdim=True))
        z1, z2 = dz.chunk(2, -1)
        assert_rounded(dx, torch.cat((z1 * c - z2 * s, z1 * s + z2 * c), -1))


def relu_squared(kernels, seed):
    generator = torch.Generator().manual_seed(seed)
    for dtype, numel, offset in (
        (torch.float32, 4096 + 37, 0),
        (torch.bfloat16, 8192 + 3, 0),
        (torch.float32, 4096, 1),
    ):
        x, dy = (randn(generator, numel, dtype=dtype, offset=offset) for _ in range(2))
        x[5] = torch.nan
        y, start = torch.full_like(x, torch.nan), dy.clone()
        operators.relu_squared(kernels, x, y, schedule=seed)
        assert_rounded(y, x.double().relu().square())
        operators.relu_squared_backward(kernels, dy, y, dy, schedule=seed)
        assert_rounded(dy, 2 * y.double().sqrt() * start.double())
    x, dy, y = randn(generator, 4096), randn(generator, 4096), moved(torch.full((4096,), torch.nan))
    dx = torch.full_like(dy, torch.nan)
    operators.relu_squared(kernels, x, y, schedule=seed)
    operators.relu_squared_backward(kernels, dy, y, dx, schedule=seed)
    assert_rounded(dx, 2 * x.double().relu() * dy.double())


def of(file, case, *rows, library=None, found_by="plain"):
    """Mutations of one file: (name, old, new) or (name, old, new, found_by)."""
    return [Mutation(row[0], file, *row[1:3], case, library or file, *(row[3:] or [found_by])) for row in rows]


# fmt: off
PIPELINE = of(
    GEMM,
    gemm,
    ("consumers do not wait for the tile", "        mbarrier_wait(full + 8 * stage, round & 1);\n", ""),
    ("producer does not wait for an empty stage", "            mbarrier_wait(empty + 8 * stage, (round & 1) ^ 1);\n", ""),
    ("producer waits for the other parity", "(round & 1) ^ 1", "round & 1"),
    ("consumers wait for the other parity", "mbarrier_wait(full + 8 * stage, round & 1)", "mbarrier_wait(full + 8 * stage, (round & 1) ^ 1)"),
    ("fewer bytes announced than loaded", "expect_tx(barrier, kStageBytes)", "expect_tx(barrier, kABytes)"),
    ("more bytes announced than loaded", "expect_tx(barrier, kStageBytes)", "expect_tx(barrier, kStageBytes + 128)"),
    ("empty counts one consumer of two", "mbarrier_init(empty + 8 * i, kConsumers)", "mbarrier_init(empty + 8 * i, 1)"),
    ("only the first consumer gives stages back", "if (thread == 0) mbarrier_arrive", "if (threadIdx.x == 128) mbarrier_arrive"),
    ("barriers are used before they are known", "        fence_mbarrier_init();\n    }\n    __syncthreads();\n", "        fence_mbarrier_init();\n    }\n"),
    ("no wgmma.fence", "        wgmma_fence();\n", ""),
    ("no wait for the products", "        wgmma_wait<0>();\n", ""),
    ("one group of products left in flight", "wgmma_wait<0>()", "wgmma_wait<1>()"),
    ("stage given back before its products are done", "        wgmma_wait<0>();\n        bar_sync(1 + consumer, 128);   // all four warps have read the stage before one thread gives it back\n        if (thread == 0) mbarrier_arrive(empty + 8 * stage);\n", "        if (thread == 0) mbarrier_arrive(empty + 8 * stage);\n        wgmma_wait<0>();\n"),
    ("stage given back for warps that still read", "        bar_sync(1 + consumer, 128);   // all four warps have read the stage before one thread gives it back\n", "", "thread"),
    ("no products committed", "        wgmma_commit();\n", ""),
    ("base not aligned to the swizzle", "(shared_address(shared) + 1023) & ~1023u", "shared_address(shared)"),
    ("too little shared memory for the alignment", "kSharedBytes = 1024 + kStages", "kSharedBytes = kStages"),
    ("K advances by half a step", "wgmma_descriptor(b + 32 * k, 16", "wgmma_descriptor(b + 16 * k, 16"),
    ("descriptor without the swizzle", "wgmma_descriptor(a + 32 * k, 16, kRowGroup, Swizzle::bytes128)", "wgmma_descriptor(a + 32 * k, 16, kRowGroup, Swizzle::none)"),
    ("descriptor with the wrong stride", "kRowGroup = 8 * 128", "kRowGroup = 4 * 128"),
    ("both consumers multiply the same rows", " + consumer * 64 * 128, b =", ", b ="),
    ("columns of the wrong operand", "barrier, i * kK, n0)", "barrier, i * kK, m0)"),
    ("sums start undefined", "    for (int i = 0; i < kN / 2; ++i) sums[i] = 0;\n", "    for (int i = 0; i < 0; ++i) sums[i] = 0;\n"),
    ("no proxy fence before the store", "    fence_proxy_async();\n    bar_sync(1 + consumer, 128);\n", "    bar_sync(1 + consumer, 128);\n", "thread"),
    ("store before all warps have written", "    fence_proxy_async();\n    bar_sync(1 + consumer, 128);\n", "    fence_proxy_async();\n"),
    ("leaves before the store has read", "        tma_wait_read<0>();\n", ""),
    ("store is not committed", "        tma_commit();\n", ""),
    ("output tile not swizzled", "swizzled(own + column / 64 * kBoxBytes + row * 128 + place, Swizzle::bytes128)", "own + column / 64 * kBoxBytes + row * 128 + place"),
    ("more registers than there are", "setmaxnreg_increase<232>", "setmaxnreg_increase<256>"),
    ("one warp leaves the products out", "        wgmma_commit();\n        pin", "        if (warp == 3 && i == 1) continue;\n        wgmma_commit();\n        pin"),
)

ONLINE_SOFTMAX = of(
    ATTENTION,
    attention,
    ("no wait for the stage", "            cp_async_wait<1>();\n", ""),
    ("last stage is not waited for", "cp_async_wait<0>()", "cp_async_wait<1>()"),
    ("reads what other threads copy", "        __syncthreads();   // everybody's copies of this stage have landed\n", ""),
    ("stage filled while others read it", "        __syncthreads();   // the stage may be filled again\n", ""),
    ("keys read without the permutation", "ldmatrix_x4(b, place(keys, n * 8 + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2))", "ldmatrix_x4(b, keys + (n * 8 + lane % 8 + lane / 16 * 8) * 128 + ((2 * d + lane / 8 % 2) << 4))"),
    ("values read without transposing", "ldmatrix_x4_trans(b,", "ldmatrix_x4(b,"),
    ("causal mask off by one", "column <= row", "column <= row + 1"),
    ("maximum over too few lanes", "            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));\n", ""),
    ("maximum over the wrong lanes", "fmaxf(highest, __shfl_xor_sync(~0u, highest, 2))", "fmaxf(highest, __shfl_xor_sync(~0u, highest, 4))"),
    ("sum is not shrunk", "total[h] * shrink + sum", "total[h] + sum"),
    ("weights are not rescaled", "                sums[i / 2][2 * h + i % 2] *= shrink;\n", ""),
    ("sums start undefined", "float sums[8][4] = {}, top[2]", "float sums[8][4], top[2]"),
    ("copies out of bounds", "const bool inside = t < T;", "const bool inside = true;", "address"),
    ("stores out of bounds", "        if (row >= T) continue;\n", "", "address"),
    ("shared memory too small", "kSharedBytes = 5 * kTileBytes", "kSharedBytes = 5 * kTileBytes - 512"),
    ("warp leaves before the others", "    const int tiles =", "    if (warp == 3 && q0 + 48 >= T) return;\n    const int tiles ="),
    ("one warp skips a barrier", "        __syncthreads();   // the stage may be filled again\n", "        if (warp != 2) __syncthreads();\n"),
    ("heads of the wrong group", "kv_head = head / (H / Hkv)", "kv_head = head % Hkv + Hkv"),
    ("leaves with copies in flight", "        __syncthreads();   // the stage may be filled again\n", "        __syncthreads();\n        if (j + 1 == tiles) cp_async_16(tile_k, k);\n"),
)

SMALL = [
    *of(
        PRIMITIVES,
        grid_sum,
        ("sums counted without an order", "atomic_add_ordered(finished, 1)", "atomicAdd(finished, 1u)", "thread"),
        ("parts read before they are written", "parts[threadIdx.x / 32] = sum;\n    __syncthreads();\n", "parts[threadIdx.x / 32] = sum;\n"),
        ("last read by threads that race it", "        last = atomic_add_ordered(finished, 1) == gridDim.x - 1;\n    }\n    __syncthreads();\n", "        last = atomic_add_ordered(finished, 1) == gridDim.x - 1;\n    }\n", "thread"),
        ("shuffle of half a warp by all", "if (threadIdx.x % 32 == 0) parts", "if (threadIdx.x % 32 < 16) sum += __shfl_down_sync(~0u, sum, 0);\n    if (threadIdx.x % 32 == 0) parts"),
        ("every thread adds", "    if (threadIdx.x == 0) {\n        for (int w", "    {\n        for (int w"),
    ),
    *of(
        PRIMITIVES,
        hand_over,
        ("box overwritten before it is read", "            if (r > 0) bar_sync(2, 64);\n", ""),
        ("box read before it is filled", "            bar_sync(1, 64);\n", ""),
        ("barrier for too many threads", "bar_arrive(1, 64)", "bar_arrive(1, 96)"),
    ),
    *of(
        PRIMITIVES,
        mma_tile,
        ("no __syncwarp after the copies", "    cp_async_wait<0>();\n    __syncwarp();\n    uint32_t fragment", "    cp_async_wait<0>();\n    uint32_t fragment", "thread"),
        ("copy of a misaligned row", "cp_async_16(tile + lane * 16,", "cp_async_16(tile + lane * 16 + 8,"),
        ("lower half of the columns twice", "right[2] = {columns[2], columns[3]}", "right[2] = {columns[0], columns[1]}"),
        ("too many bytes of the source", "left < 16 ? left : 16", "left < 16 ? left : 32"),
    ),
    *of(
        PRIMITIVES,
        copy_box,
        ("image read before the box has landed", "    while (!mbarrier_try_wait(barrier, 0)) {\n    }\n", ""),
        ("barrier is not initialised", "        mbarrier_init(barrier, 1);\n", ""),
        ("result is not waited for", "        tma_wait<0>();\n", ""),
    ),
    *of(
        WGMMA,
        wgmma_form,
        ("no proxy fence after ordinary stores", "    fence_proxy_async();\n    __syncthreads();\n\n    const int thread", "    __syncthreads();\n\n    const int thread", "thread"),
        ("no barrier after ordinary stores", "    fence_proxy_async();\n    __syncthreads();\n\n    const int thread", "    fence_proxy_async();\n\n    const int thread"),
        ("rows and columns of B exchanged", "major_b == Major::k ? N : 64;", "major_b == Major::k ? 64 : N;"),
        ("distances exchanged", ": wgmma_descriptor(start, atom, across * atom, swizzle);", ": wgmma_descriptor(start, across * atom, atom, swizzle);"),
        ("lanes with different descriptors", "const uint64_t right = tile_at(tile_b, major_b, columns_b, 16 * k);", "const uint64_t right = tile_at(tile_b, major_b, columns_b, 16 * k) + (lane == 7);"),
        library=WGMMA_FORMS,
    ),
]

TOGETHER = [
    *of(
        BLOCKS,
        take_turns,
        ("turn is not waited for", "    if (thread == 0) wait_for_count(counter, turn);\n", ""),
        ("a turn too early", "wait_for_count(counter, turn)", "wait_for_count(counter, turn ? turn - 1 : 0)"),
        ("wait of one thread for itself alone", "wait_for_count(counter, turn);\n    __syncthreads();\n", "wait_for_count(counter, turn);\n"),
        ("turn ends before the copies", "        tma_wait<0>();\n        add_release(counter, 1);\n", "        add_release(counter, 1);\n        tma_wait<0>();\n"),
        ("copies have only read", "tma_wait<0>();", "tma_wait_read<0>();"),
        ("turn ends without an order", "add_release(counter, 1)", "atomicAdd(counter, 1u)", "thread"),
        ("copies not ordered after another block's", "        fence_proxy_async_global();", "        ", "thread"),
        ("tile not ordered before the copies", "    fence_proxy_async();\n", "", "thread"),
        ("bytes past the end", "bulk_store(rows + turn * kTile, source, kTile * 4)", "bulk_store(rows + turn * kTile, source, kTile * 4 + 16)"),
        ("row of the turn after this one", "bulk_store(rows + turn * kTile", "bulk_store(rows + (turn + 1) * kTile", "address"),
    ),
    *of(
        BLOCKS,
        share_loads,
        ("mbarriers of the others not waited for", "    cluster_arrive();\n    cluster_wait();\n    for", "    __syncthreads();\n    for"),
        ("stage of the others not waited for", "            mbarrier_wait(empty + 8 * stage, parity ^ 1);\n", ""),
        ("stage given back to one block", "mbarrier_arrive_cluster(empty + 8 * stage, i)", "mbarrier_arrive(empty + 8 * stage)"),
        ("stage given back by one block", "mbarrier_init(empty + 8 * i, size)", "mbarrier_init(empty + 8 * i, 1)"),
        ("stage given back before it is read", "            bar_sync(1, 64);\n", "", "thread"),
        ("loads for one block alone", "(1 << size) - 1", "1 << rank"),
        ("bytes of one part", "mbarrier_arrive_expect_tx(full + 8 * stage, size * kPartBytes)", "mbarrier_arrive_expect_tx(full + 8 * stage, kPartBytes)"),
        ("leaves before the others", "    cluster_arrive();   // no block leaves while another one can arrive at its mbarriers\n    cluster_wait();\n", ""),
        ("arrives and does not wait", "mbarriers\n    cluster_wait();\n", "mbarriers\n"),
    ),
    *of(
        BLOCKS,
        overlap,
        ("previous grid not waited for", "    wait_for_previous_grid();\n", ""),
    ),
]

ADAMW, MUON, LOSS = (f"csrc/cuda/{name}.cu" for name in ("adamw", "muon", "softcap_cross_entropy"))
NORMUON = "csrc/cuda/normuon.cu"
PACKS = "csrc/cuda/packs.cuh"
ADAMW_LIBRARY, MUON_LIBRARY, LOSS_LIBRARY = (f"tests/emulation/{name}" for name in (operators.ADAMW, operators.MUON, operators.LOSS))
NORMUON_LIBRARY = f"tests/emulation/{operators.NORMUON}"

OPERATORS = [
    *of(
        ADAMW,
        adamw,
        ("second moment without its square", "c.one_minus_beta2 * g * g", "c.one_minus_beta2 * g"),
        ("decay forgotten", "p[j] = decay * old", "p[j] = old"),
        ("table searched one too far", "table.first_chunk[middle] <= chunk", "table.first_chunk[middle] < chunk"),
        ("pack beyond the end taken for whole", "if (aligned && (chunk + 1) * kChunk <= end) {", "if (aligned && chunk * kChunk <= end) {", "address"),
        ("alignment not looked at", "is_aligned<N>(param) && is_aligned<N>(grad) && is_aligned<N>(exp_avg) &&\n                         is_aligned<N>(exp_avg_sq) && is_aligned<N>(copy)", "true", "address"),
        ("two threads update one pack", "(chunk * packs * kThreads + threadIdx.x) * N", "(chunk * packs * kThreads + threadIdx.x % 255) * N", "thread"),
        ("second pack of a thread forgotten", "const int64_t first = start + i * kThreads * N;\n            update<", "const int64_t first = start;\n            update<"),
        ("tail of a tensor forgotten", "first += kThreads * N) {", "first += 2 * kThreads * N) {"),
        ("tensor of the chunk before", "if (chunk < table.first_chunk[index + 1])", "if (chunk <= table.first_chunk[index + 1])"),
        ("chunks of other blocks", "chunk < chunks; chunk += gridDim.x", "chunk < chunks; ++chunk", "thread"),
        ("one chunk of each block alone", "chunk < chunks; chunk += gridDim.x", "chunk < chunks; chunk = chunks"),
        library=ADAMW_LIBRARY,
    ),
    *of(
        ADAMW,
        adamw_copies,
        ("copy not written", "            store_copy(copy, first, p[i], N, true);\n", ""),
        ("copy of the last block not written", "        store_copy(copy, first, p, end - first, aligned);\n", ""),
        ("copy behind the end written", "store_copy(copy, first, p, end - first, aligned);", "store_copy(copy, first, p, N, aligned);", "address"),
        ("alignment of the copy not looked at", " && is_aligned<N>(copy);", ";", "address"),
        ("copy written before the update", "            update<stochastic>(p[i], g[i], m[i], v[i], first, number, options, c);\n", "            store_copy(copy, first, p[i], N, true);\n            copy = nullptr;\n            update<stochastic>(p[i], g[i], m[i], v[i], first, number, options, c);\n"),
        library=ADAMW_LIBRARY,
    ),
    *of(
        ADAMW,
        adamw_bfloat16,
        ("cautious decay of the old moment's sign", "m[j] * old >= 0", "m[j] * old < 0"),
        library=ADAMW_LIBRARY,
    ),
    *of(
        ADAMW,
        adamw_stochastic,
        ("both halves of a word with the same noise", "round_randomly(high, noise >> 16)", "round_randomly(high, noise & 0xFFFF)"),
        ("noise in the kept bits", "quiet : bits + noise) >> 16", "quiet : bits + 2 * noise) >> 16"),
        ("half a counter for every pack", "first % kPhiloxElements != 0", "false"),
        library=ADAMW_LIBRARY,
    ),
    *of(
        ADAMW,
        adamw_captured,
        ("numbers of the host instead of the device's", "    Constants* derived = nullptr;\n    if (adamw_workspace_bytes(a) > 0) {", "    Constants* derived = nullptr;\n    if (false) {"),
        ("rate not read from the device", "    if (lr) numbers.lr = *lr;\n", ""),
        library=ADAMW_LIBRARY,
    ),
    *of(
        MUON,
        muon,
        ("momentum without Nesterov's second step", "nesterov ? keep * b[j] + rest * g : b[j]", "b[j]"),
        ("norm of the first warp alone", "sum = block_sum(sum, warps);\n            if (threadIdx.x == 0) o.partials", "sum = warp_sum(sum);\n            if (threadIdx.x == 0) o.partials"),
        ("partial sums of all matrices in one row", "o.partials[int64_t{matrix} * o.per_matrix + chunk_start / kChunk]", "o.partials[chunk_start / kChunk]"),
        ("square root forgotten", "norms[blockIdx.x] = sqrt(sum)", "norms[blockIdx.x] = sum"),
        ("copy not written", "                store_copy(copy, start + i * kStride, p[i], N, true);\n", ""),
        ("copy of the tail not written", "            store_copy(copy, first, p, o.numel - first, aligned);\n", ""),
        ("first matrix's copy for all", "table.copies[matrix]", "table.copies[0]"),
        ("alignment of the copy not looked at", " && is_aligned<N>(copy);", ";", "address"),
        ("first matrix's update for all", "const float* update = o.update + matrix * o.numel;", "const float* update = o.update;"),
        ("chunks of other blocks", "chunk < chunks; chunk += gridDim.x", "chunk < chunks; ++chunk", "thread"),
        ("one chunk of each block alone", "chunk < chunks; chunk += gridDim.x", "chunk < chunks; chunk = chunks"),
        ("sums of warps overwritten before they are read", "            __syncthreads();   // all threads have read the sums of the warps\n", "", "thread"),
        library=MUON_LIBRARY,
    ),
    *of(
        NORMUON,
        normuon,
        ("rows of all matrices summed in one place", "o.sums[blockIdx.y * o.M + row] = sum;", "o.sums[row] = sum;"),
        ("columns of all parts summed in one place", "blockIdx.z * int64_t{o.parts} + blockIdx.y) * o.K", "blockIdx.z * int64_t{o.parts}) * o.K"),
        ("columns of one warp alone", "i < kWarps; ++i) sum += shared_sums", "i < 1; ++i) sum += shared_sums"),
        ("sums of columns read before they are written", "    __syncthreads();\n    const int column", "    const int column"),
        ("rows of the next part added too", "begin + kPartRows < o.M ? begin + kPartRows : o.M;", "o.M;"),
        ("sum of a row of one lane alone", "sum = warp_sum(sum);", ""),
        ("one part of the columns alone", "part < o.parts; ++part) sum +=", "part < 0; ++part) sum +="),
        ("no renormalisation", "if (o.renormalise) {", "if (false) {"),
        ("norms without their smallest value", "norm < o.norm_eps ? o.norm_eps : norm", "norm"),
        ("second momentum without its smallest value", "sqrt(s < o.eps ? o.eps : s)", "sqrt(s)"),
        ("second momentum not kept", "        second[line] = s;\n", ""),
        ("second momentum of the first matrix for all", "table.second_momentums[blockIdx.x]", "table.second_momentums[0]"),
        ("mean over the longer side", "length = o.M < o.K ? o.M : o.K;", "length = o.M < o.K ? o.K : o.M;"),
        ("factors of the first matrix for all", "*factors = o.factors + blockIdx.y * o.lines();", "*factors = o.factors;"),
        ("the factor of the first row for all", "tall ? factors[row] : 0;", "tall ? factors[0] : 0;"),
        ("first matrix's copy for all", "table.copies[blockIdx.y]", "table.copies[0]"),
        ("copy of each row in the first", "if (copy) copy += row * o.K;", ""),
        ("alignment of the copy not looked at", " && is_aligned<N>(copy);", ";", "address"),
        ("alignment of the factors not looked at", "load<N>(factors + column, left, factors_aligned);", "load<N>(factors + column, left, true);", "address"),
        library=NORMUON_LIBRARY,
    ),
    *of(
        "csrc/cuda/muon.cuh",
        muon,
        ("cautious everywhere", "!rates.cautious || update * param >= 0", "!rates.cautious || update * param >= -1e30f"),
        library=MUON_LIBRARY,
    ),
    *of(
        PACKS,
        muon,
        ("warps' sums read before they are written", "warps[threadIdx.x / 32] = x;\n    __syncthreads();\n", "warps[threadIdx.x / 32] = x;\n"),
        ("sum over half a warp", "int distance = 16; distance > 0", "int distance = 8; distance > 0"),
        ("copy truncated", "set_pair(rounded, i, element(params, i), element(params, i + 1));", "rounded.words[i / 2] = params.words[i] >> 16 | (params.words[i + 1] & 0xFFFF0000);"),
        ("copy of one element twice", "element(params, i), element(params, i + 1)", "element(params, i), element(params, i)"),
        ("element behind the end written", "if (i < count) from_bits(to[i]", "if (i <= count) from_bits(to[i]", "address"),
        ("element behind the end read", "if (i < count) pack.words", "if (i <= count) pack.words", "address"),
        library=MUON_LIBRARY,
    ),
    *of(
        LOSS,
        loss,
        ("totals merged without rescaling", "return {top, a.sum * exp2_approx(a.top - top)", "return {top, a.sum"),
        ("target's own term forgotten", "exp2_approx(target_point.exponent - total.top) - total.sum", "exp2_approx(target_point.exponent - total.top)"),
        ("target written by another thread than its pack's", "return pack < packs ? pack % static_cast<int>(blockDim.x) : i - packs * N;", "return 0;", "thread"),
        ("warps' totals read before they are written", "warps[thread / 32] = total;\n    __syncthreads();\n", "warps[thread / 32] = total;\n"),
        ("ignored rows keep their logits", "if (a.grad_scale) fill(row, value);", "if (a.grad_scale && !ignored) fill(row, value);"),
        ("elements before the first pack forgotten", "head = beyond == 0 ? 0 : min(N - beyond, V);", "head = 0;", "address"),
        ("held weights shifted by one bit", "__float_as_uint(element(pack, i)) >> 2", "__float_as_uint(element(pack, i)) >> 1"),
        ("rest of a long row read again", "int first = held_packs * threads + thread; first < row.packs; first += kPassingPacks * threads) {\n        Pack<T, N> passing", "int first = thread; first < row.packs; first += kPassingPacks * threads) {\n        Pack<T, N> passing"),
        library=LOSS_LIBRARY,
    ),
]

ROWS = "csrc/cuda/rows.cuh"
RMS_NORM, MIX_RMS_NORM, ROTARY_NORM, RELU_SQUARED = (f"csrc/cuda/{name}.cu" for name in ("rms_norm", "mix_rms_norm", "rotary_norm", "relu_squared"))
VALUE_EMBEDDING, SMEAR, GATE = (f"csrc/cuda/{name}" for name in ("value_embedding.cu", "smear.cu", "gate.cuh"))
RMS_NORM_LIBRARY, MIX_RMS_NORM_LIBRARY, ROTARY_NORM_LIBRARY, RELU_SQUARED_LIBRARY = (f"tests/emulation/{name}" for name in (operators.RMS_NORM, operators.MIX_RMS_NORM, operators.ROTARY_NORM, operators.RELU_SQUARED))
VALUE_EMBEDDING_LIBRARY, SMEAR_LIBRARY = (f"tests/emulation/{name}" for name in (operators.VALUE_EMBEDDING, operators.SMEAR))

NORMS = [
    *of(
        ROWS,
        rms_norm,
        ("first row of a block for all", "int64_t{blockIdx.x} * blockDim.y + threadIdx.y", "int64_t{blockIdx.x} * blockDim.y"),
        ("sum over one warp of several", "blockDim.x == 32 ? warp_sum(x) : block_sum(x, warps)", "warp_sum(x)"),
        ("tail taken for whole packs", "return C % pack == 0 && (", "return (", "address"),
        library=RMS_NORM_LIBRARY,
    ),
    *of(
        MIX_RMS_NORM,
        mix_rms_norm,
        ("residual forgotten", "            sum = sum_of(sum, own_residual);\n", ""),
        ("residual forgotten in the rest of a long row", "if (add) own_residual = load_pack<N, whole>(residual, p, a.C);", ""),
        ("factors exchanged", "mix_of(sum, x_scale, own_x0, x0_scale)", "mix_of(sum, x0_scale, own_x0, x_scale)"),
        ("one element of two for both", "set_pair(mixed, i, pair[0], pair[1]);", "set_pair(mixed, i, pair[0], pair[0]);"),
        ("row behind the last written", "    if (row >= a.N) return;\n    const int64_t start = row * a.C;\n    const T *x", "    const int64_t start = row * a.C;\n    const T *x", "address"),
        ("alignment of x alone looked at", "a.x, a.residual, a.x0, a.z, a.mixed, a.y);", "a.x);", "address"),
        ("alignment of x0 not looked at", "a.x, a.residual, a.x0, a.z, a.mixed, a.y);", "a.x, a.residual, a.z, a.mixed, a.y);", "address"),
        ("rest of a long row not summed", "add_squares(squares, write_mix(p, own_x, own_residual, own_x0));", "write_mix(p, own_x, own_residual, own_x0);"),
        ("rest of a long row not written", "store_pack<whole>(y, p, a.C, times(load_pack<N, whole>(mixed, p, a.C), r));", ""),
        ("all threads write r", "if (thread == 0) a.r[row] = r;", "a.r[row] = r;", "thread"),
        ("gradient of z dropped", "        if (a.dz) own.dz = load_from(a.dz, p);\n", ""),
        ("gradient of the mix dropped", "        if (a.dmixed) own.dmixed = load_from(a.dmixed, p);\n", ""),
        ("later gradient of x0 dropped", "        if (a.add_to) own.add_to = load_from(a.add_to, p);\n", ""),
        ("row behind the last differentiated", "    if (row >= a.N) return;\n    const int64_t start = row * a.C;\n    const int thread", "    const int64_t start = row * a.C;\n    const int thread", "address"),
        ("alignment of dy alone looked at", "a.dy, a.dz, a.dmixed, a.add_to, a.y, a.z, a.x0, a.dx, a.dx0);", "a.dy);", "address"),
        ("alignment of z not looked at", "a.add_to, a.y, a.z, a.x0, a.dx, a.dx0);", "a.add_to, a.y, a.x0, a.dx, a.dx0);", "address"),
        ("alignment of add_to not looked at", "a.dmixed, a.add_to, a.y, a.z,", "a.dmixed, a.y, a.z,", "address"),
        ("sum instead of the mean", "row_sum<0>(products) * a.inverse_C", "row_sum<0>(products)"),
        ("products of the rest of a long row forgotten", "        add_products(products, load_from(a.dy, p), load_from(a.y, p));\n", ""),
        ("two sums in one place", "row_sum<2>(with_x0)", "row_sum<1>(with_x0)", "thread"),
        ("terms of one thread", "    with_z = row_sum<1>(with_z);\n", ""),
        ("term with z for x0", "with_x0 += ds * element(own.x0, k);", "with_x0 += ds * element(own.z, k);"),
        ("dx scaled for dx0", "element(own.add_to, k) + x0_scale * ds", "element(own.add_to, k) + x_scale * ds"),
        ("rest of a long row not differentiated", "p < packs; p += threads) write_gradients(p, load_packs(p));", "p < packs; p += threads) {}"),
        ("all threads write the terms", "    if (thread == 0) {\n        a.terms[row] = with_z;", "    {\n        a.terms[row] = with_z;", "thread"),
        ("terms of x0 in the place of another row", "a.terms[a.N + row] = with_x0;", "a.terms[a.N + row + 1] = with_x0;", "address"),
        library=MIX_RMS_NORM_LIBRARY,
    ),
    *of(
        MIX_RMS_NORM,
        factor_gradients,
        ("as many terms as threads", "for (int64_t n = threadIdx.x; n < N; n += kSumThreads) sum", "for (int64_t n = threadIdx.x; n < kSumThreads; n += kSumThreads) sum"),
        ("terms added in float32", "sum += static_cast<double>(own[n]);", "sum = static_cast<float>(sum + static_cast<double>(own[n]));"),
        ("terms of x_scale for both", "terms + blockIdx.x * N;", "terms;"),
        ("gradients of the factors exchanged", "blockIdx.x == 0 ? dx_scale : dx0_scale", "blockIdx.x == 0 ? dx0_scale : dx_scale"),
        library=MIX_RMS_NORM_LIBRARY,
    ),
    *of(
        RMS_NORM,
        rms_norm,
        ("residual forgotten", "        if (add) held[i] = sum_of(held[i], other[i]);\n", ""),
        ("residual forgotten in the rest of a long row", "return add ? sum_of(pack, load_pack<N, whole>(residual, p, a.C)) : pack;", "return pack;"),
        ("gradient of the sum dropped", "            if (add) held_dsum[i] = load_pack<N, whole>(dsum, p, a.C);\n", ""),
        ("row behind the last written", "    if (row >= a.N) return;\n    const int64_t start = row * a.C;\n    const T *x", "    const int64_t start = row * a.C;\n    const T *x", "address"),
        ("sum instead of the mean", "row_sum(products) * a.inverse_C", "row_sum(products)"),
        ("alignment of x alone looked at", "a.x, a.residual, a.sum, a.y);", "a.x);", "address"),
        ("alignment of dy alone looked at", "a.dy, a.y, a.dsum, a.dx);", "a.dy);", "address"),
        ("alignment of y not looked at", "a.dy, a.y, a.dsum, a.dx);", "a.dy, a.dsum, a.dx);", "address"),
        ("rest of a long row not summed", "        add_squares(squares, pack);\n", ""),
        ("rest of a long row not written", "store_pack<whole>(to.y, p, to.C, times(load_again(p), r));", ""),
        ("all threads write r", "if (thread == 0) *to.r = r;", "*to.r = r;", "thread"),
        library=RMS_NORM_LIBRARY,
    ),
    *of(
        RMS_NORM,
        embedding_rms_norm,
        ("unknown token normalised", "known ? a.eps : NAN", "a.eps"),
        ("row of an unknown token read", "known ? token * a.C : 0", "token * a.C", "address"),
        ("row scaled", "held[i] = rounded<T>(loaded[i]);", "held[i] = rounded<T>(times(loaded[i], 1.01f));"),
        library=RMS_NORM_LIBRARY,
    ),
    *of(
        VALUE_EMBEDDING,
        value_embedding,
        ("gate not scaled", "known ? kGateScale * sigmoid : NAN", "known ? sigmoid : NAN"),
        ("row of an unknown id read", "(known ? id : 0) * a.Hkv", "id * a.Hkv", "address"),
        ("unknown id added to the gradient of the gate", "known ? factor * (1 - sigmoid) * product : 0", "factor * (1 - sigmoid) * product"),
        ("derivative of the sigmoid forgotten", "known ? factor * (1 - sigmoid) * product : 0", "known ? factor * product : 0"),
        ("channels of another token's row", "a.h) + (first < a.Hkv ? token * a.h_stride : 0)", "a.h) + (first < a.Hkv ? token * a.I : 0)"),
        ("head behind the last", "const bool exists = g < a.Hkv;", "const bool exists = g <= a.Hkv;", "address"),
        ("gate of the first head for all", "part_of_dot(a.gate + g * a.I, h,", "part_of_dot(a.gate, h,"),
        ("tail taken for whole packs", "bool whole = a.D % N == 0 && ", "bool whole = ", "address"),
        ("heads longer than a warp taken for whole", " && a.D <= 32 * N;", ";"),
        ("alignment of v and dout not looked at", "{a.in, a.table,", "{a.table, a.table,", "address"),
        ("alignment of the table not looked at", "{a.in, a.table,", "{a.in, a.in,", "address"),
        ("product of one lane of a head", "        product = gate_kernels::sum_of_lanes(product, lanes);\n", ""),
        ("last pack of a long head alone", "if (backward) product += product_of(pack, row);", "if (backward) product = product_of(pack, row);"),
        ("all lanes write dz", "if (exists && lane == 0) {", "if (exists) {", "thread"),
        ("partial sums in the place of dz", ".partials = dz + a.N * a.Hkv,", ".partials = dz,"),
        library=VALUE_EMBEDDING_LIBRARY,
    ),
    *of(
        GATE,
        value_embedding,
        ("half of the lanes summed", "distance = lanes / 2; distance > 0", "distance = lanes / 2; distance > 1"),
        ("channels beyond the lanes forgotten", "for (int i = lane; i < inputs; i += lanes) sum +=", "if (const int i = lane; i < inputs) sum +="),
        ("rows behind the last", "min(int64_t{kBlockRows}, a.N - first)", "kBlockRows", "address"),
        ("first block of rows for all", "const float* dz = a.dz + first * a.G;", "const float* dz = a.dz;"),
        ("gate of the first head in dx", "a.weights[g * a.I + i]", "a.weights[i]"),
        ("first block alone in the total", "block < blocks; block += 32", "block < 1; block += 32"),
        ("partial sums of all blocks in one place", "a.partials + int64_t{blockIdx.x} * (outputs + 1)", "a.partials + 0 * (outputs + 1)", "thread"),
        ("total of one lane", "    sum = warp_sum(sum);\n", ""),
        ("sums of a gate's channels exchanged", "const int g = o / a.I, i = o % a.I;", "const int g = o % a.G, i = o / a.G;"),
        library=VALUE_EMBEDDING_LIBRARY,
    ),
    *of(
        SMEAR,
        smear,
        ("first token smeared with another sequence's last", "const bool is_first = row % a.T == 0;", "const bool is_first = row == 0;"),
        ("last token's gradient from another sequence", "is_last = t == a.T - 1;", "is_last = row == a.N - 1;"),
        ("token behind the last read", "is_last = t == a.T - 1;", "is_last = false;", "address"),
        ("token before the first read", "const bool is_first = row % a.T == 0;", "const bool is_first = false;", "address"),
        ("gate of this token for the next", "lambda * gate_of(a, x + a.C)", "lambda * gate_of(a, x)"),
        ("row behind the last written", "    if (row >= a.N) return;\n    const bool is_first", "    const bool is_first", "address"),
        ("product of one warp of several", "product = row_sum(product);", "product = warp_sum(product);"),
        ("gate's own gradient dropped", "+ dz * weight;", ";"),
        ("weight behind the last", "first + i + j < a.I ? a.gate[first + i + j] : 0", "a.gate[first + i + j]", "address"),
        ("lambda's gradient with lambda", "a.terms[row] = gate * product;", "a.terms[row] = lambda * gate * product;"),
        ("dz and its terms in one place", "arguments.terms = dz + N;", "arguments.terms = dz;"),
        ("partial sums in the place of the terms", ".partials = dz + 2 * N,", ".partials = dz + N,"),
        ("alignment of dx and dout not looked at", "is_whole(a.C, kPack<T>, a.x, a.dout, a.dx)", "is_whole(a.C, kPack<T>, a.x)", "address"),
        ("alignment of x not looked at", "is_whole(a.C, kPack<T>, a.x, a.dout, a.dx)", "is_whole(a.C, kPack<T>, a.dout, a.dx)", "address"),
        ("alignment of x not looked at in the forward pass", "is_whole(a.C, kPack<T>, a.x, a.out)", "is_whole(a.C, kPack<T>, a.out)", "address"),
        ("all threads write dz", "    if (thread == 0) {\n        a.dz[row]", "    {\n        a.dz[row]", "thread"),
        library=SMEAR_LIBRARY,
    ),
    *of(
        GATE,
        smear,
        ("sum of the terms forgotten", "        } else if (a.extra) {\n", "        } else if (false) {\n"),
        ("first block's terms for all", "sum += a.extra[first + n];", "sum += a.extra[n];"),
        ("rows of x without their stride", "to_float(x[n * a.x_stride + i])", "to_float(x[n * a.I + i])"),
        library=SMEAR_LIBRARY,
    ),
    *of(
        ROTARY_NORM,
        rotary_norm,
        ("half of the lanes summed", "distance = lanes / 2; distance > 0", "distance = lanes / 2; distance > 1"),
        ("rotated the wrong way", "x.second * angle.first - x.first * angle.second", "x.second * angle.first + x.first * angle.second"),
        ("gradient not rotated back", "return rotated_back(dz,", "return rotated(dz,"),
        ("r of q for k", "(head.is_q ? q_r : k_r)[head.index]};", "q_r[head.index]};"),
        ("strides of q for k", "strided<T>(k, k_strides, head)", "strided<T>(k, {k_strides.b, q_strides.h, k_strides.h}, head)"),
        ("one position for all tokens", "t = token % shape.T;", "t = 0;"),
        ("rows of cos without their stride", "t * shape.cos_stride", "t * (shape.D / 2)"),
        ("heads of k counted on from q's", "is_q ? number : number - shape.H", "number", "address"),
        ("head behind the last", "number < shape.H + shape.Hkv,", "number <= shape.H + shape.Hkv,", "address"),
        ("tail of a half taken for a whole pack", "return shape.D / 2 % kPack<T> == 0 && ", "return ", "address"),
        ("scale once in the mean", "1 / (a.D * a.scale * a.scale)", "1 / (a.D * a.scale)"),
        ("all lanes write r", "pass.factor(head, sum[i], group.lane == 0)", "pass.factor(head, sum[i], true)", "thread"),
        library=ROTARY_NORM_LIBRARY,
    ),
    *of(
        ROTARY_NORM,
        rotary_norm_unaligned,
        ("alignment of q alone looked at", "{a.q, a.k, a.q_out, a.k_out}", "{a.q}", "address"),
        ("alignment of dq_out alone looked at", "{a.dq_out, a.dk_out, a.q_out, a.k_out, a.dq, a.dk}", "{a.dq_out}", "address"),
        ("strides of q not looked at", " && are_multiples(kPack<T>, q) &&", " &&", "address"),
        ("strides of k not looked at", "are_multiples(kPack<T>, k) && ", "", "address"),
        ("stride of cos not looked at", "shape.cos_stride % kPack<float> == 0 && ", "", "address"),
        ("stride of sin not looked at", "shape.sin_stride % kPack<float> == 0 &&\n", "", "address"),
        library=ROTARY_NORM_LIBRARY,
    ),
    *of(
        RELU_SQUARED,
        relu_squared,
        ("NaN becomes zero", "element(x, i + j) <= 0 ? 0 : element(x, i + j)", "element(x, i + j) > 0 ? element(x, i + j) : 0"),
        ("square not differentiated", "2 * device::sqrt_approx(element(y, i + j))", "device::sqrt_approx(element(y, i + j))"),
        ("block beyond the end taken for whole", "block + kBlockElements<T> <= numel", "block < numel", "address"),
        ("alignment not looked at", "is_aligned<N>(dy) && is_aligned<N>(y) && is_aligned<N>(dx)", "true", "address"),
        ("alignment of x alone looked at", "is_aligned<N>(x) && is_aligned<N>(y);", "is_aligned<N>(x);", "address"),
        ("alignment of dy alone looked at", "is_aligned<N>(dy) && is_aligned<N>(y) && is_aligned<N>(dx)", "is_aligned<N>(dy)", "address"),
        ("two threads write one pack", "start(block + threadIdx.x * N)", "start(block + threadIdx.x % 255 * N)", "thread"),
        ("tail of a tensor forgotten", "first < span.end; first += span.stride) {\n        const Pack<T, N> own", "first < span.end - N; first += span.stride) {\n        const Pack<T, N> own"),
        library=RELU_SQUARED_LIBRARY,
    ),
]

TILES, TILES_HOPPER = "csrc/cuda/tiles.cuh", "csrc/cuda/hopper.cuh"
ATTENTION_MASK, ATTENTION_SOFTMAX, ATTENTION_PACKING = (f"csrc/cuda/attention_{name}.cuh" for name in ("mask", "softmax", "packing"))
FORWARD, FORWARD_HOPPER = "csrc/cuda/attention_forward.cu", "csrc/cuda/attention_forward_hopper.cu"
ATTENTION_HOPPER = "csrc/cuda/attention_hopper.cuh"
BACKWARD, BACKWARD_HOPPER = "csrc/cuda/attention_backward.cu", "csrc/cuda/attention_backward_hopper.cu"
FORWARD_LIBRARY, BACKWARD_LIBRARY = (f"tests/emulation/{name}" for name in (operators.ATTENTION_FORWARD, operators.ATTENTION_BACKWARD))

ATTENTION_OPERATOR = [
    *of(
        ATTENTION_MASK,
        forward_ampere,
        ("window too narrow by a key", "diagonal(first) - window : 0", "diagonal(first) - window + 1 : 0"),
        ("own key hidden", "diagonal(last) + 1 < Tk ? diagonal(last) + 1 : Tk", "diagonal(last) < Tk ? diagonal(last) : Tk"),
        ("border blocks taken for full", "visible_keys(first).end / size};", "divide_up(visible_keys(first).end, size)};"),
        library=FORWARD_LIBRARY,
    ),
    *of(
        ATTENTION_SOFTMAX,
        forward_ampere,
        ("sum of weights not rescaled", "row_sum[h] = row_sum[h] * rescale[h] + sum;", "row_sum[h] = row_sum[h] + sum;"),
        ("highest score of two lanes alone", "            highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFF, highest, 2));\n", ""),
        ("rows that see nothing divided by zero", "row_sum[h] == 0 ? 0 : 1 / row_sum[h]", "1 / row_sum[h]"),
        library=FORWARD_LIBRARY,
    ),
    *of(
        ATTENTION_PACKING,
        forward_ampere,
        ("first head of the group for all", "(row - query * heads_per_tile) * h;", "0 * h;"),
        library=FORWARD_LIBRARY,
    ),
    *of(
        TILES,
        forward_ampere,
        ("rows behind the last copied", "exists ? 16 : 0);", "16);", "address"),
        ("rows overwritten while lanes read them", "    __syncwarp();   // other lanes may still read these rows\n", "", "thread"),
        ("rows stored before they are complete", "        }\n    }\n    __syncwarp();\n}\n", "        }\n    }\n}\n", "thread"),
        library=FORWARD_LIBRARY,
    ),
    *of(
        FORWARD,
        forward_ampere,
        ("block read before it has landed", "        device::cp_async_wait<0>();\n", ""),
        ("stage overwritten while it is read", "        __syncthreads();   // this block has landed, and no thread reads the previous one\n", "", "thread"),
        ("one stage for all blocks", "block % 2 * Tile::stage_bytes", "0 * Tile::stage_bytes"),
        ("sums not rescaled", "            scale_rows(sums[f], rescale);\n", ""),
        ("sign of the scale forgotten", "if (a.scale.negated) {", "if (false) {"),
        library=FORWARD_LIBRARY,
    ),
    *of(
        FORWARD,
        decode,
        ("splits overlap by a block", "min(blocks.end, begin + share)", "min(blocks.end, begin + share + 1)"),
        ("parts weighed by their own highest", "exp2_approx(a.part_lses[s * all + place] - lse)", "exp2_approx(a.part_lses[s * all + place] - reference)"),
        ("lengths not looked at", "if (a.lengths) mask.Tk", "if (false) mask.Tk"),
        ("parts of all head groups in one place", "a.scheduler.head_groups + tile.head_group_index;", "a.scheduler.head_groups + 0;"),
        library=FORWARD_LIBRARY,
    ),
    *of(
        FORWARD_HOPPER,
        forward_hopper,
        ("values given back before the sums are done", "wait_for_products<0>(sums);\n                v_ring.consumer_release(n);", "v_ring.consumer_release(n);\n                wait_for_products<0>(sums);", "thread"),
        ("keys not waited for", "                if (block > seen.begin) k_ring.consumer_wait(n + 2);\n", ""),
        ("values not waited for", "                v_ring.consumer_wait(n);\n                start_sums", "                start_sums"),
        ("sums rescaled while they are computed", "wait_for_products<0>(sums);\n                v_ring.consumer_release(n);\n                scale_rows(sums, rescale);", "scale_rows(sums, rescale);\n                wait_for_products<0>(sums);\n                v_ring.consumer_release(n);"),
        ("turn not passed on", "                ping_pong.arrive_next();\n                wait_for_products<1>(scores);", "                wait_for_products<1>(scores);"),
        ("queries given back with the last scores to come", "        if (blocks.begin < blocks.end) q_ring.consumer_wait(turn);\n", "        if (blocks.begin < blocks.end) q_ring.consumer_wait(turn);\n        if (threadIdx.x % 32 == 0) device::mbarrier_arrive(q_ring.empty(turn));\n"),
        library=FORWARD_LIBRARY,
    ),
    *of(
        FORWARD_HOPPER,
        forward_hopper,
        ("block leaves before its rows are read", "    if (lane == 0) device::tma_wait_read<0>();   // until then the block needs its shared memory\n", ""),
        ("first scores not waited for", "            wait_for_products<0>(scores);\n            k_ring.consumer_release(n);\n        } else", "            k_ring.consumer_release(n);\n        } else"),
        ("rows of the next item for those of this one", "            if (!first) write_out();\n            wait", "            own = part.rows;\n            if (!first) write_out();\n            wait"),
        ("sums of the item before kept", "        for (int i = 0; i < D / 2; ++i) sums[i] = 0;\n", "        for (int i = 0; i < D / 2 && first; ++i) sums[i] = 0;\n"),
        ("softmax of the item before kept", "        softmax = {};\n", ""),
        ("queries of every item in one tile", "own_q = q_tile(turn, consumer)", "own_q = q_tile(0, consumer)"),
        ("last item not written out", "        } else if (!first) {", "        } else if (!first && more) {"),
        ("rows of the first consumer for all", "tile.part(consumer * kGroupRows, kGroupRows)", "tile.part(0, kGroupRows)"),
        library=FORWARD_LIBRARY,
    ),
    *of(
        FORWARD_HOPPER,
        forward_hopper_windowed,
        ("turn of a skipped block not passed on", "            ping_pong.wait();\n            ping_pong.arrive_next();\n            k_ring", "            ping_pong.wait();\n            k_ring"),
        ("turn of a skipped block not waited for", "            ping_pong.wait();\n            ping_pong.arrive_next();\n            k_ring", "            ping_pong.arrive_next();\n            k_ring"),
        ("values of a skipped block not given back", "            v_ring.consumer_wait(n);\n            v_ring.consumer_release(n);\n        }", "            v_ring.consumer_wait(n);\n        }"),
        ("blocks behind the seen ones not skipped", "        skip_blocks(seen.begin - blocks.begin);\n", ""),
        ("blocks before the seen ones not skipped", "        skip_blocks(blocks.end - seen.end);\n", ""),
        library=FORWARD_LIBRARY,
    ),
    *of(
        FORWARD_HOPPER,
        forward_hopper_packed,
        ("first head for all rows of a query", "own.head_group.head + head, query", "own.head_group.head, query"),
        ("all heads in one box", "std::min(heads, kRowsPerWarp)", "heads"),
        library=FORWARD_LIBRARY,
    ),
    *of(
        ATTENTION_HOPPER,
        forward_hopper,
        ("rows overwritten before they are stored", "    if (lane == 0) device::tma_wait_read<0>();\n    __syncwarp();\n", ""),
        ("rows overwritten while the first lane waits", "    if (lane == 0) device::tma_wait_read<0>();\n    __syncwarp();\n", "    if (lane == 0) device::tma_wait_read<0>();\n", "thread"),
        ("rows stored before the proxy sees them", "    device::fence_proxy_async();\n", "", "thread"),
        ("rows stored before all lanes have written", "    device::fence_proxy_async();\n    __syncwarp();\n", "    device::fence_proxy_async();\n", "thread"),
        ("rows of the first warp for all", "tile + (panel * kGroupRows + first) * P::width", "tile + panel * kGroupRows * P::width"),
        ("stores not committed", "    device::tma_commit();\n", ""),
        library=FORWARD_LIBRARY,
    ),
    *of(
        TILES_HOPPER,
        forward_hopper,
        ("one warp's arrival for all", "device::mbarrier_init(empty(i), 4 * consumers + other_readers);", "device::mbarrier_init(empty(i), consumers + other_readers);"),
        ("half of the bytes announced", "mbarrier_arrive_expect_tx(full(n), bytes_expected)", "mbarrier_arrive_expect_tx(full(n), bytes_expected / 2)"),
        ("loader ahead by a round", "parity(n) ^ 1", "parity(n)"),
        ("descriptor's distances exchanged", "rows * P::width, 8 * P::width, P::swizzle", "8 * P::width, rows * P::width, P::swizzle"),
        library=FORWARD_LIBRARY,
    ),
    *of(
        BACKWARD,
        backward_ampere,
        ("delta forgotten", "ds[f][i] = p[f][i] * (ds[f][i] - delta);", "ds[f][i] = p[f][i] * ds[f][i];"),
        ("last rows forgotten", "divide_up(queries.end * a.heads_per_tile, rows)}", "queries.end * a.heads_per_tile / rows}"),
        ("dK not scaled", "        scale_rows(dk[f], scale);\n", ""),
        ("numbers of the other stage", "+ tile % 2 * Tile::row_numbers;", "+ (tile + 1) % 2 * Tile::row_numbers;"),
        ("rows overwritten while they are read", "        __syncthreads();   // this tile has landed, and no thread reads the previous one\n", "", "thread"),
        library=BACKWARD_LIBRARY,
    ),
    *of(
        ATTENTION_MASK,
        backward_ampere,
        ("lower keys hidden by the upper", "const int own = key + 8 * h;", "const int own = key;"),
        library=BACKWARD_LIBRARY,
    ),
    *of(
        BACKWARD_HOPPER,
        backward_hopper,
        ("rows given back before dK is done", "                wait_for_products<1>(dk);\n                device::pin_registers(dv);\n                dout_ring.consumer_release(n);\n                q_ring.consumer_release(n);\n", "                q_ring.consumer_release(n);\n                wait_for_products<1>(dk);\n                device::pin_registers(dv);\n                dout_ring.consumer_release(n);\n", "thread"),
        ("head groups that share a head forgotten", "(item.rows_end - item.rows_begin) * a.sharing - 1;", "(item.rows_end - item.rows_begin) - 1;"),
        ("scores read before they are done", "                wait_for_products<1>(ds);\n", ""),
        ("next scores read before they are done", "                wait_for_products<0>(p);\n                if (--tile", "                if (--tile"),
        ("dQ read before it is done", "                wait_for_products<1>(dq);\n", ""),
        ("first head group's numbers for all", "maps.deltas, dout_ring.full(n),\n                                         tile * rows, head_group);", "maps.deltas, dout_ring.full(n),\n                                         tile * rows, item.head_group * a.sharing);"),
        ("keys given back before dQ is done", "            start_turn();\n            wait_for_products<0>(dq);\n", "            start_turn();\n            key_ring.consumer_release(turn);\n            wait_for_products<0>(dq);\n"),
        ("dQ started before the other half of dS is there", "                device::bar_sync(1, Tile::consumers * kGroupThreads);\n", "", "thread"),
        ("no proxy fence for dS", "                device::fence_proxy_async();\n                start_sums", "                start_sums", "thread"),
        ("one buffer of dS", "n % 2 * Tile::ds_bytes", "0 * Tile::ds_bytes", "thread"),
        ("first half of the columns of K for both", "tile_k + consumer * (D == 64", "tile_k + 0 * (D == 64"),
        ("dS of both consumers in one place", "tile_ds, consumer * kGroupRows + warp_key, lane", "tile_ds, warp_key, lane"),
        ("dQ of both consumers in one place", "tile_dq + consumer * (Tile::dq_bytes / 2)", "tile_dq + 0 * (Tile::dq_bytes / 2)"),
        ("dQ written over one that is not yet added", "                handover.wait_until_empty(n);\n", "", "thread"),
        ("no proxy fence for dQ", "                device::fence_proxy_async();\n                __syncwarp();\n", "                __syncwarp();\n", "thread"),
        ("dQ passed on before all lanes have written", "                device::fence_proxy_async();\n                __syncwarp();\n", "                device::fence_proxy_async();\n", "thread"),
        ("dQ added once one warp of a consumer has written", "mbarrier_init(full, 4 * consumers);", "mbarrier_init(full, consumers);"),
        ("buffer of dQ given back before it is read", "                        device::tma_wait_read<0>();\n", "", "thread"),
        ("item read before it is written", "                item_ring.consumer_wait(turn);\n", "", "thread"),
        ("item overwritten while it is read", "                item_ring.producer_wait(turn);\n", "", "thread"),
        library=BACKWARD_LIBRARY,
    ),
    *of(
        BACKWARD_HOPPER,
        backward_hopper_blocks,
        ("earlier keys not waited for", "                            device::wait_for_count(a.dq_counts + row_tile, earlier);\n", ""),
        ("a tile of keys too early", "wait_for_count(a.dq_counts + row_tile, earlier)", "wait_for_count(a.dq_counts + row_tile, earlier - 1)"),
        ("keys that do not see the rows waited for", "item.tile - a.mask.visible_keys(tile * a.tile_queries).begin / keys;", "item.tile;"),
        ("first part added to what was there", "if (earlier == 0) {", "if (false) {"),
        ("every part stored", "if (earlier == 0) {", "if (true) {"),
        ("count of other rows", "add_release(a.dq_counts + row_tile, 1)", "add_release(a.dq_counts + tile, 1)"),
        ("counted before the sum is there", "                        device::tma_wait<0>();\n", ""),
        library=BACKWARD_LIBRARY,
    ),
    *of(
        BACKWARD,
        backward_hopper_blocks,
        ("counts of the last call", "        if (a.dq_counts && place % hopper::kDqRows == 0) a.dq_counts[place / hopper::kDqRows] = 0;\n", ""),
        ("work of the last call", "        if (a.next_item && place == 0) *a.next_item = 0;\n", ""),
        ("sums of rows that see nothing read", "    if (blocks.begin < blocks.end) {\n        const int64_t row", "    if (true) {\n        const int64_t row"),
        ("dQ not scaled on Hopper", "    const float scale[2] = {a.scale, a.scale};\n    scale_rows(dq, scale);\n    const auto dq_rows", "    const auto dq_rows"),
        library=BACKWARD_LIBRARY,
    ),
    *of(
        TILES_HOPPER,
        backward_hopper,
        ("stage given back before all lanes have read", "        __syncwarp();   // all lanes have read\n", "", "thread"),
        library=BACKWARD_LIBRARY,
    ),
]

PRODUCTS, SCHULZ_PLAN = "csrc/cuda/newton_schulz.cuh", "csrc/cuda/newton_schulz_plan.cuh"
SCHULZ, SCHULZ_HOPPER = "csrc/cuda/newton_schulz.cu", "csrc/cuda/newton_schulz_hopper.cu"
SCHULZ_LIBRARY = f"tests/emulation/{operators.NEWTON_SCHULZ}"

NEWTON_SCHULZ = [
    *of(
        PRODUCTS,
        newton_schulz_ampere,
        ("results behind the last row", "exists ? p.n - strip.column - 4 * chunk : 0", "p.n - strip.column - 4 * chunk", "address"),
        ("first matrix's parameters for all", "= output.params[matrix];", "= output.params[0];"),
        ("first matrix's copy for all", "(output.copies[matrix]);", "(output.copies[0]);"),
        ("copy not written", "        store_copy(copy, place, pack, count, aligned);\n", ""),
        ("copy written before the update", "        store(params + place, pack, count, aligned);\n        store_copy(copy, place, pack,", "        const auto before = load(place, count);\n        store(params + place, pack, count, aligned);\n        store_copy(copy, place, before,"),
        ("alignment of the copy not looked at", " && is_aligned<4>(copy);", ";", "address"),
        ("rows of parameters taken for whole chunks", "whole && is_aligned<4>(params)", "is_aligned<4>(params)", "address"),
        ("rows taken for whole chunks", "const bool whole = p.n % 4 == 0;", "const bool whole = true;", "address"),
        ("strips at the last row taken for whole", "last.row + 16 <= p.m && ", "", "address"),
        ("parameters of the strip before", "target.load(place(following, turn), 4)", "target.load(place(strip, turn), 4)"),
        ("chunks not permuted where they are read", "strip.floats + float_chunk_place(r + kRows * turn, chunk);", "strip.floats + (r + kRows * turn) * kFloatRowBytes + 16 * chunk;"),
        ("bfloat16 parameters taken for float32", "output.param_dtype == DType::bfloat16", "false", "address"),
        library=SCHULZ_LIBRARY,
    ),
    *of(
        SCHULZ,
        newton_schulz_ampere,
        ("mirror forgotten", "|| column + c >= row + 8 * h) continue;", "|| true) continue;"),
        ("mirror of the wrong row", "const SwizzledRow<kStripColumns, 16> smem_row(0, 8 * h + j);", "const SwizzledRow<kStripColumns, 16> smem_row(0, 8 * h + (j ^ 1));"),
        ("diagonal not symmetric to the last bit", "        mirror_diagonal(sums, row, column);\n", ""),
        ("half of the diagonal from the wrong lane", "const int source = (t + j) * 4 + g / 2;", "const int source = t * 4 + g / 2;"),
        ("chunks above the diagonal stored", "column + 8 * chunk <= row + r;", "true;"),
        ("rows behind the last stored", "const bool stored = row + r < p.m && ", "const bool stored = ", "address"),
        ("strip stored before it is complete", "        stage_rows<T, kStripColumns, 16>(strip, sums, 0);\n        store_mirrored", "        store_mirrored"),
        ("first strip for all", "own + i * strip_bytes, sums[i],", "own + i * strip_bytes, sums[0],"),
        ("source read beyond the last row", "source && r < p.m && c < p.d.pitch", "source && c < p.d.pitch", "address"),
        ("halves of a pair exchanged", "p.beta * low<T>(s[i])", "p.beta * high<T>(s[i])"),
        ("second source forgotten", "load_source<T>(t, p, p.t,", "load_source<T>(t, p, p.s,"),
        ("factor of the product forgotten", "sums[2 * i] = p.alpha * sums[2 * i]", "sums[2 * i] = sums[2 * i]"),
        ("first matrix's source for all", "static_cast<const T*>(source) + matrix * p.d.size()", "static_cast<const T*>(source) + 0 * p.d.size()"),
        ("square root of the norm forgotten", "norm = sqrt(block_sum(", "norm = (block_sum("),
        ("partial sums of all matrices in one place", "a.partials[blockIdx.y * gridDim.x + blockIdx.x] = sum;", "a.partials[blockIdx.x] = sum;"),
        ("known norms of the first matrix", "norm = a.norms[blockIdx.y];", "norm = a.norms[0];"),
        ("scales of the first matrix", "a.scales + int64_t{blockIdx.y} * a.x.rows", "a.scales + 0 * a.x.rows"),
        ("the scale of the first row for all", "scales ? scales[row] : inverse", "scales ? scales[0] : inverse"),
        ("tile of the upper half for one of the lower", "for (; tile > row; ++row) tile -= row + 1;", "for (; tile > row + 1; ++row) tile -= row + 1;"),
        ("last row of tiles forgotten", "columns * (columns + 1) / 2", "columns * columns / 2"),
        ("zeros behind a row not written", "load<4>(from + 4 * i, a.x.columns - column - 4 * i,", "load<4>(from + 4 * i, 4,"),
        ("step read before it has landed", "        device::cp_async_wait<0>();\n", ""),
        ("stage overwritten while it is read", "        __syncthreads();   // this step has landed, and no thread reads the previous one\n", "", "thread"),
        ("one stage for all steps", "stages + step % 2 * Tile::stage_bytes;\n        load_block", "stages + 0 * Tile::stage_bytes;\n        load_block"),
        ("strips written while stages are read", "    __syncthreads();   // the strips overwrite the stages\n", "", "thread"),
        ("strips of all warps in one place", "+ warp * (to_output", "+ 0 * (to_output", "thread"),
        ("output read before all lanes have written", "        __syncwarp();   // all lanes have written\n", "", "thread"),
        ("rows behind the last copied", "x.rows - k,\n", "2 * x.rows,\n"),
        ("transposed operand read as it lies", "device::ldmatrix_x4_trans(r, smem_row(", "device::ldmatrix_x4(r, smem_row("),
        ("operands' lanes exchanged", "left == (major == Major::k)", "left"),
        ("lower half of the columns twice", "fragment(sums[f], n + 1), left[f], {right[2], right[3]}", "fragment(sums[f], n + 1), left[f], {right[0], right[1]}"),
        library=SCHULZ_LIBRARY,
    ),
    *of(
        SCHULZ,
        newton_schulz_ampere,
        ("copies not handed to the kernel", "if (a.update->copies) std", "if (!a.update->copies) std"),
        library=SCHULZ_LIBRARY,
    ),
    *of(
        SCHULZ_PLAN,
        newton_schulz_ampere,
        ("Gram matrix multiplied once", "symmetric_product(G, *newest, Y, 1, 0, triple[0]);", "symmetric_product(G, *newest, G, 1, 0, triple[0]);"),
        ("scale of the Gram form not gathered", "                scale *= triple[0];\n", ""),
        ("step's own factor forgotten", "symmetric_product(spare, P, Z, 1, triple[0], scale);", "symmetric_product(spare, P, Z, 1, 0, scale);"),
        library=SCHULZ_LIBRARY,
    ),
    *of(
        SCHULZ_HOPPER,
        newton_schulz_hopper,
        ("idle group gives no stage back", "                    ring.consumer_wait(n);\n                    release(ring, n);\n                }\n            } else if", "                    ring.consumer_wait(n);\n                }\n            } else if"),
        ("sums not started from zero", "    start_step(false);", "    start_step(true);", "address"),
        ("squares on the diagonal forgotten", "return {rows * (rows - 1) / 2, rows};", "return {rows * (rows - 1) / 2, rows - 1};"),
        ("half a stage announced", "ring.producer_acquire(n, bytes);", "ring.producer_acquire(n, bytes / 2);"),
        ("step not waited for", "        ring.consumer_wait(n);\n        device::wgmma_fence();", "        device::wgmma_fence();"),
        ("last stage given back before the products are done", "    wait_for_products<0>(sums);\n    release(ring, n - 1);", "    release(ring, n - 1);\n    wait_for_products<0>(sums);", "thread"),
        ("stage given back before the products are done", "        device::wgmma_wait<1>();   // of the step before\n", "", "thread"),
        ("stage given back to one block", "    if (lane < kCluster) device::mbarrier_arrive_cluster(ring.empty(n), lane);", "    if (lane < kCluster) device::mbarrier_arrive(ring.empty(n));"),
        ("columns for one block", "constexpr uint16_t all = (1 << kCluster) - 1;", "constexpr uint16_t all = 1;"),
        ("first block's columns from both", "const int box = own_block() * own_boxes + i;", "const int box = i;"),
        ("first consumer's rows for both", "row_of(square, c), step * kDepth,", "row_of(square, 0), step * kDepth,"),
        ("rows of one operand taken for the other's", "square.diagonal && p.a.data == p.b.data", "square.diagonal"),
        ("first rows of the shared operand for all", "Tile::b_offset + band * kBoxBytes :", "Tile::b_offset :"),
        ("columns of the first half for all", "square.diagonal && band < Tile::boxes / 2", "square.diagonal"),
        ("source not waited for", "                ring.consumer_wait(n + box);\n                if (is_written", "                if (is_written"),
        ("second source over the first", "device::tma_load(boxes.t, t_map,", "device::tma_load(boxes.s, t_map,"),
        ("source's row and column exchanged", "device::tma_load(boxes.s, s_map, ring.full(n), column, row,", "device::tma_load(boxes.s, s_map, ring.full(n), row, column,"),
        ("second source forgotten", "if (p.gamma != 0) {", "if (p.gamma == 1) {"),
        ("halves of a pair exchanged", "two[0] += factor * low<T>(pairs[i]);", "two[0] += factor * high<T>(pairs[i]);"),
        ("factor of the product forgotten", "if (p.alpha != 1) {", "if (false) {"),
        ("mirror not transposed", "if constexpr (symmetric) device::stmatrix_x4_trans(", "if constexpr (symmetric) device::stmatrix_x4("),
        ("mirror where D is", "tma_store(d_map, boxes.mirror, row, column,", "tma_store(d_map, boxes.mirror, column, row,"),
        ("box above the diagonal written", "!(symmetric && row < square.column + box * kBox)", "true"),
        ("diagonal written twice", "if (!symmetric || row != column) {", "if (true) {"),
        ("diagonal not symmetric to the last bit", "const uint32_t first = t > g ? across[h] : own[h], second = t + 1 > g ? across[h] : own[h];", "const uint32_t first = own[h], second = own[h];"),
        ("upper half of the diagonal from its own sums", "below > 0 ? columns(2 * warp, 16 * k) : own, words);", "own, words);"),
        ("diagonal written where others read", "below >= 0 ? own + (boxes.mirror - boxes.s) : own, words);\n        device::stmatrix_x4_trans(below > 0 ? columns(2 * warp, 16 * k) : own,", "own, words);\n        device::stmatrix_x4_trans(below > 0 ? columns(2 * warp, 16 * k) - (boxes.mirror - boxes.s) : own,", "thread"),
        ("diagonal read before all lanes have written", "    __syncwarp();   // all lanes have written\n    device::ldmatrix_x2(", "    device::ldmatrix_x2(", "thread"),
        ("no proxy fence before the store", "                    device::fence_proxy_async();\n", "", "thread"),
        ("store before all lanes have written", "                __syncwarp();   // all lanes have written\n", "", "thread"),
        ("store before a box is complete", "device::mbarrier_wait(complete + 8 * ring.stage(stored), ring.parity(stored));", ""),
        ("stage given back before the store has read it", "                        device::tma_wait_read<0>();\n", ""),
        ("store not committed", "                        device::tma_commit();\n", ""),
        ("boxes of both consumers in one place", "s(stage + 3 * consumer * kBoxBytes)", "s(stage)", "thread"),
        ("output of all warps in one place", "(own.mirror - start) + warp * kFloatStripBytes", "(own.mirror - start)", "thread"),
        ("output over the source", "(own.mirror - start) + warp", "(own.s - start) + warp", "thread"),
        ("rows behind the last give no box back", "for (int box = 0; box < boxes; ++box) give_back(box);", ""),
        ("first box given back for all", "release(ring, n + box); };", "release(ring, n); };"),
        ("block leaves before the other is done", "    device::cluster_wait();   // the other block arrives", "    // the other block arrives"),
        ("barriers of the other block not waited for", "    device::cluster_wait();   // the other block's", "    // the other block's"),
        ("previous grid not waited for", "    device::wait_for_previous_grid();\n", ""),
        ("pitch taken for the columns of all matrices", "{row, row * x.rows}", "{row, row}"),
        library=SCHULZ_LIBRARY,
    ),
]
PRIMITIVE = "csrc/cuda/ptx/primitives.cuh"

PTX_TEXT = [
    *of(
        PRIMITIVE,
        gemm,
        ("two registers of the sums exchanged", '", %4, %5, %6, %7"', '", %5, %4, %6, %7"'),
        ("sums added where they should not be", 'setp.ne.b32 p, " p2', 'setp.eq.b32 p, " p2'),
        ("no wgmma.fence", 'asm volatile("wgmma.fence.sync.aligned;" :: : "memory")', 'asm volatile("" :: : "memory")'),
        ("no wgmma.commit_group", 'asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory")', 'asm volatile("" :: : "memory")'),
        ("one group of products not waited for", 'wgmma.wait_group.sync.aligned %0;" ::"n"(newest)', 'wgmma.wait_group.sync.aligned %0;" ::"n"(newest + 1)'),
        ("always the same parity", "p, [%1], %2;\\n", "p, [%1], 0;\\n"),
        ("no bytes announced", '"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)', '"mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier), "r"(bytes)'),
        ("one arrival more expected", 'mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count)', 'mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count + 1)'),
        ("no fence for the barriers", 'asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory")', 'asm volatile("" :: : "memory")'),
        ("no proxy fence", 'asm volatile("fence.proxy.async.shared::cta;" :: : "memory")', 'asm volatile("" :: : "memory")'),
        ("more registers than there are", 'setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)', 'setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers + 8)'),
        ("number and threads of a barrier exchanged", "bar.sync %0, %1;", "bar.sync %1, %0;"),
        ("two registers of stmatrix exchanged", 'stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};', 'stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %3, %2, %4};'),
        ("coordinates of a load exchanged", '"[%0], [%1, {%3, %4}], [%2];"', '"[%0], [%1, {%4, %3}], [%2];"'),
        ("coordinates of a store exchanged", "bulk_group [%0, {%2, %3}], [%1];", "bulk_group [%0, {%3, %2}], [%1];"),
        ("no group of stores", 'asm volatile("cp.async.bulk.commit_group;" :: : "memory")', 'asm volatile("" :: : "memory")'),
        library=GEMM,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        attention,
        ("halves of a packed number exchanged", 'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low))', 'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(low), "f"(high))'),
        ("sums not read", '{%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),\n        "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])));\n    ON_HOST(emulation::mma_m16n8k16(d, a, b, emulation::Half::bfloat16', '{%8, %9}, {%0, %1, %2, %3};" : "=f"(d[0]),\n        "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])));\n    ON_HOST(emulation::mma_m16n8k16(d, a, b, emulation::Half::bfloat16'),
        ("registers of A in another order", '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])));\n    ON_HOST(emulation::mma_m16n8k16(d, a, b, emulation::Half::bfloat16', '"r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3]), "r"(b[0]), "r"(b[1])));\n    ON_HOST(emulation::mma_m16n8k16(d, a, b, emulation::Half::bfloat16'),
        ("one group of copies not waited for", 'cp.async.wait_group %0;" ::"n"(newest)', 'cp.async.wait_group %0;" ::"n"(newest + 1)'),
        ("no group of copies", 'asm volatile("cp.async.commit_group;" :: : "memory")', 'asm volatile("" :: : "memory")'),
        ("powers of another base", "ex2.approx.ftz.f32 %0, %1;", "mul.f32 %0, %1, 0f3FB8AA3B;\\nex2.approx.ftz.f32 %0, %0;"),
        library=ATTENTION,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        mma_tile,
        ("all 16 bytes copied", "[%0], [%1], 16, %2;", "[%0], [%1], 16;"),
        ("transposed matrices read as they lie", "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", "ldmatrix.sync.aligned.m8n8.x2.shared.b16"),
        library=PRIMITIVES,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        hand_over,
        ("threads of an arrival forgotten", 'bar.arrive %0, %1;" ::"r"(id), "r"(threads)', 'bar.arrive %0, %1;" ::"r"(id), "r"(threads + 32)'),
        library=PRIMITIVES,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        grid_sum,
        ("the new value returned", "atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;", "atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;\\nadd.u32 %0, %0, %2;"),
        library=PRIMITIVES,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        take_turns,
        ("counter not added to", "red.release.gpu.global.add.u32 [%0], %1;", "// %0 %1"),
        ("counter added to twice", "red.release.gpu.global.add.u32 [%0], %1;", "red.release.gpu.global.add.u32 [%0], %1;\\nred.release.gpu.global.add.u32 [%0], %1;"),
        ("wait ends one too early", "while (seen < count)", "while (seen + 1 < count)"),
        ("source of a bulk store moved", '[%0], [%1], %2;" ::"l"(to), "r"(source),\n                           "r"(bytes) : "memory"));\n    ON_HOST(emulation::bulk_store(to, source, bytes, false))', '[%0], [%1], %2;" ::"l"(to), "r"(source + 16),\n                           "r"(bytes) : "memory"));\n    ON_HOST(emulation::bulk_store(to, source, bytes, false))'),
        ("bulk addition that stores", "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32", "cp.async.bulk.global.shared::cta.bulk_group"),
        ("copies read and are not done", "cp.async.bulk.wait_group %0;", "cp.async.bulk.wait_group.read %0;"),
        ("no proxy fence for global memory", 'asm volatile("fence.proxy.async.global;" :: : "memory")', 'asm volatile("" :: : "memory")'),
        library=BLOCKS,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        share_loads,
        ("rank of a thread", "%%cluster_ctarank", "%%laneid"),
        ("no arrival at the cluster's barrier", 'asm volatile("barrier.cluster.arrive.aligned;" :: : "memory")', 'asm volatile("" :: : "memory")'),
        ("cluster's barrier not waited for", 'asm volatile("barrier.cluster.wait.aligned;" :: : "memory")', 'asm volatile("" :: : "memory")'),
        ("mbarrier of the block itself", "mapa.shared::cluster.u32 remote, %0, %1;", "mov.u32 remote, %0;"),
        ("load for one block", 'mbarrier::complete_tx::bytes.multicast::cluster "\n                     "[%0], [%1, {%4, %5, %6}], [%2], %3;"', 'mbarrier::complete_tx::bytes "\n                     "[%0], [%1, {%4, %5, %6}], [%2];"'),
        ("coordinates of a load for several blocks exchanged", "[%0], [%1, {%4, %5, %6}], [%2], %3;", "[%0], [%1, {%4, %6, %5}], [%2], %3;"),
        library=BLOCKS,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        overlap,
        ("previous grid not waited for", 'asm volatile("griddepcontrol.wait;" :: : "memory")', 'asm volatile("" :: : "memory")'),
        library=BLOCKS,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        copy_box_of_rank_4,
        ("coordinates of rank 4 exchanged", "[%0], [%1, {%3, %4, %5, %6}], [%2];", "[%0], [%1, {%3, %4, %6, %5}], [%2];"),
        library=PRIMITIVES,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        reverse,
        ("words of a store exchanged", "st.global.v4.b32 [%0], {%1, %2, %3, %4};", "st.global.v4.b32 [%0], {%1, %2, %4, %3};"),
        ("half of the words stored", "st.global.v4.b32 [%0], {%1, %2, %3, %4};", "st.global.v2.b32 [%0], {%1, %2};"),
        library=PRIMITIVES,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        reverse_streamed,
        ("words of a streamed store exchanged", "st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};", "st.global.cs.v4.b32 [%0], {%1, %2, %4, %3};"),
        ("words of a streamed load exchanged", "ld.global.cs.v4.b32 {%0, %1, %2, %3}, [%4];", "ld.global.cs.v4.b32 {%1, %0, %2, %3}, [%4];"),
        ("words of a streamed pair exchanged", "ld.global.cs.v2.b32 {%0, %1}, [%2];", "ld.global.cs.v2.b32 {%1, %0}, [%2];"),
        library=PRIMITIVES,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        reverse_pairs,
        ("numbers of a pair exchanged", "ld.shared.v2.f32 {%0, %1}, [%2];", "ld.shared.v2.f32 {%1, %0}, [%2];"),
        library=PRIMITIVES,
        found_by="ptx",
    ),
    *of(
        PRIMITIVE,
        numbers,
        ("halves of a packed float16 exchanged", 'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low))', 'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(low), "f"(high))'),
        ("the root of the reciprocal", "sqrt.approx.f32 %0, %1;", "rsqrt.approx.f32 %0, %1;"),
        library=PRIMITIVES,
        found_by="ptx",
    ),
]
# fmt: on

MUTATIONS = [*PIPELINE, *ONLINE_SOFTMAX, *SMALL, *TOGETHER, *OPERATORS, *NORMS, *ATTENTION_OPERATOR, *NEWTON_SCHULZ]
