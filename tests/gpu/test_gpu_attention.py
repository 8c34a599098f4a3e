"""Attention on the GPU against its reference, on each instruction set: errors, masks, decoding, memory."""

import warnings

import pytest
import torch
from sizes import pick

from nanochat_native import ops
from nanochat_native.ops import backends, reference

pytestmark = pytest.mark.gpu

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["sm_80", "sm_90a"])
def path(request, device, require_native, monkeypatch):
    """Each test runs on this instruction set; on the CPU, which has its own, once."""
    require_native("attention")
    if device.type == "cpu":
        if request.param != "sm_80":
            pytest.skip("needs CUDA")
        return device
    if request.param == "sm_90a" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setenv("NANOCHAT_CUDA_ISA", request.param)
    assert ops.cuda_instruction_set() == request.param
    return device


@pytest.fixture(params=[BF16, F16], ids=str)
def dtype(request, device):
    if device.type == "cpu" and request.param == F16:
        pytest.skip("float16 has no CPU kernel")
    return request.param


def inputs(device, B, Tq, Tk, H, Hkv, D, dtype=BF16):
    """q, k, v, dout."""
    shapes = ((Tq, H), (Tk, Hkv), (Tk, Hkv), (Tq, H))
    return [torch.randn(B, T, heads, D, device=device).to(dtype) for T, heads in shapes]


def both(attention, q, k, v, dout, **options):
    """out, dq, dk, dv."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    out = attention(q, k, v, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def exact_and_bounds(q, k, v, dout, **options):
    """Results in float64, and for each the bound of the FlashAttention papers, as in test_ops_attention.py."""
    expected = both(reference.attention, q, k, v, dout, **options)
    exact = both(reference.attention, q.double(), k.double(), v.double(), dout.double(), **options)
    cancellation = 16 * torch.finfo(torch.float32).eps * max(q.size(1), k.size(1)) ** 0.5
    bounds = []
    for theirs, ref in zip(expected, exact, strict=True):
        rounding = ((ref.to(q.dtype) + 0.3 - 0.3).double() - ref).abs().max()
        bounds.append(2 * (theirs.double() - ref).abs().max() + 2 * rounding + cancellation)
    return exact, bounds


def assert_within(bounds, ours, others):
    for name, bound, mine, other in zip(("out", "dq", "dk", "dv"), bounds, ours, others, strict=True):
        error = (mine.double() - other.double()).abs().max()
        assert error <= bound, f"{name} is off by {error:.1e}, at most {bound:.1e} is taken"


def check(q, k, v, dout, **options):
    exact, bounds = exact_and_bounds(q, k, v, dout, **options)
    assert_within(bounds, both(ops.attention, q, k, v, dout, **options), exact)


HEADS = {"MHA": (2, 2), "GQA": (8, 2), "MQA": (4, 1), "group of 3": (6, 2)}
SHAPES = pick(
    [(1, 1), (239, 1), (799, 3), (113, 203), (1023, 1024), (1024, 1023), (384, 256)],
    [(1, 1), (70, 3), (33, 97)],
)


@pytest.mark.parametrize("heads", pick([*HEADS], ["GQA"]))
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("Tq", "Tk"), SHAPES)
def test_shapes(path, Tq, Tk, causal, heads):
    check(*inputs(path, 1, Tq, Tk, *HEADS[heads], pick(128, 64)), causal=causal)


@pytest.mark.slow
def test_a_long_sequence(path):
    check(*inputs(path, 1, *pick((4224, 4224), (300, 300)), 2, 1, 128))


MASKS = [{}, {"causal": False}, {"window": 150}]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("D", pick([8, 64, 80, 96, 112, 128], [8, 96]))
def test_head_sizes(path, dtype, D, mask):
    check(*inputs(path, *pick((2, 300, 333, 4, 2), (1, 60, 71, 2, 1)), D, dtype), **mask)


@pytest.mark.parametrize("D", pick([64, 128], [64]))
@pytest.mark.parametrize(
    "window", pick([0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 512, 1000, 10**6], [0, 65, 10**6])
)
def test_windows(path, window, D):
    check(*inputs(path, 1, *pick((700, 700, 4), (140, 140, 2)), 2, D), window=window)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1.5])
def test_scales(path, scale):
    check(*inputs(path, 1, *pick((260, 260), (50, 50)), 2, 2, 64), scale=scale)


def test_more_work_than_multiprocessors(path):
    check(*inputs(path, *pick((4, 513, 513, 12, 12), (4, 65, 65, 2, 2)), 64))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("D", pick([64, 128], [64]))
def test_the_instruction_sets_agree(cuda, require_native, monkeypatch, D, mask):
    require_native("attention")
    if torch.cuda.get_device_capability(cuda) != (9, 0):
        pytest.skip("needs compute capability 9.0")
    tensors = inputs(cuda, *pick((2, 600, 600, 6, 2), (1, 140, 140, 2, 1)), D)
    results = []
    for isa in ("sm_80", "sm_90a"):
        monkeypatch.setenv("NANOCHAT_CUDA_ISA", isa)
        results.append(both(ops.attention, *tensors, **mask))
    assert_within(exact_and_bounds(*tensors, **mask)[1], *results)


def test_fully_masked_rows_give_zero(path):
    hidden = pick(260, 70)
    tensors = inputs(path, 1, hidden + 40, 40, 2, 2, 64)
    out, dq, dk, dv = both(ops.attention, *tensors)
    assert not out[:, :hidden].any()
    assert not dq[:, :hidden].any()
    for result in (out, dq, dk, dv):
        assert result.isfinite().all()
    _, lse = torch.ops.nanochat_native.attention_forward(*tensors[:3], True, -1, 0.1)
    assert (lse[:, :, :hidden] == -torch.inf).all()
    assert lse[:, :, hidden:].isfinite().all()


def test_nan_stays_in_its_row(path):
    T, row = pick((400, 233), (150, 99))
    q, k, v, _ = inputs(path, 1, T, T, 2, 1, 128)
    clean = ops.attention(q, k, v)
    q[0, row, 1] = torch.nan
    out = ops.attention(q, k, v)
    assert out[0, row, 1].isnan().all()
    out[0, row, 1] = clean[0, row, 1]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits(path, size):
    q, k, v, dout = inputs(path, 1, *pick((300, 300), (60, 60)), 2, 2, 128)
    q[..., 0], k[..., 0] = size, 8.0
    for result in both(ops.attention, q, k, v, dout):
        assert result.isfinite().all()


# --- memory ---


def interleaved(tensor):
    B, T, H, D = tensor.shape
    room = torch.full((B, T + 1, H, 3 * D), torch.nan, dtype=tensor.dtype, device=tensor.device)
    room[:, :T, :, D : 2 * D] = tensor
    return room[:, :T, :, D : 2 * D]


def heads_first(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def off_by_an_element(tensor):
    room = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    room[1:] = tensor.reshape(-1)
    return room[1:].view(tensor.shape)


def rows_of_odd_length(tensor):
    B, T, H, D = tensor.shape
    room = torch.full((B, T, H, D + 1), torch.nan, dtype=tensor.dtype, device=tensor.device)
    room[..., :D] = tensor
    return room[..., :D]


def head_size_outside(tensor):
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


PLACES = [interleaved, heads_first, off_by_an_element, rows_of_odd_length, head_size_outside]


@pytest.mark.parametrize("place", PLACES)
def test_other_places_in_memory(path, place):
    tensors = inputs(path, *pick((2, 300, 350, 4, 2), (2, 50, 70, 2, 1)), 128)
    expected = both(ops.attention, *tensors)
    for mine, other in zip(both(ops.attention, *map(place, tensors)), expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("T", pick([1, 64, 77, 300], [1, 77]))
def test_memory_behind_the_last_row_is_not_read(path, T):
    tensors = inputs(path, 2, T, T, 2, 2, 64)
    rooms = [torch.full((2, T + 300, 2, 64), torch.nan, dtype=BF16, device=path) for _ in tensors]
    for room, tensor in zip(rooms, tensors, strict=True):
        room[:, :T] = tensor
    expected = both(ops.attention, *tensors, causal=False)
    for mine, other in zip(both(ops.attention, *(room[:, :T] for room in rooms), causal=False), expected, strict=True):
        assert torch.equal(mine, other)


def test_expanded_tensors(path):
    q, k, v, _ = inputs(path, 2, *pick((200, 200), (50, 50)), 2, 2, 64)
    one = torch.ones((), dtype=BF16, device=path)
    expected = both(ops.attention, q, k, v, one.expand(q.shape).contiguous())
    for mine, other in zip(both(ops.attention, q, k, v, one.expand(q.shape)), expected, strict=True):
        assert torch.equal(mine, other)
    for grad in both(ops.attention, q, k, v, (0 * one).expand(q.shape))[1:]:
        assert not grad.any()
    shared = k[:1].expand(2, -1, -1, -1)
    assert torch.equal(ops.attention(q, shared, v), ops.attention(q, shared.contiguous(), v))


def test_no_keys_and_no_queries(path):
    q, k, v, dout = inputs(path, 2, 5, 0, 2, 1, 64)
    for result in both(ops.attention, q, k, v, dout):
        assert not result.any()
    q, k, v, dout = inputs(path, 2, 0, 5, 2, 1, 64)
    for result in both(ops.attention, q, k, v, dout):
        assert not result.any()


# --- decoding ---


@pytest.mark.parametrize("window", [None, 0, 300])
@pytest.mark.parametrize("Tq", pick([1, 2, 5, 8, 16], [1, 5]))
def test_decoding_against_a_cache(path, Tq, window):
    check(*inputs(path, *pick((3, Tq, 3001), (2, Tq, 400)), 8, 2, 128), window=window)


@pytest.mark.parametrize("D", pick([64, 96, 128], [64]))
@pytest.mark.parametrize("Tq", pick([1, 3, 200], [1, 40]))
@pytest.mark.parametrize("window", [None, 100])
def test_lengths(path, Tq, D, window):
    most = pick(2000, 200)
    lengths = torch.tensor([0, 1, 130, most - 1, most], device=path)
    q, k, v, _ = inputs(path, len(lengths), Tq, most, 8, 1, D)
    for b, length in enumerate(lengths.tolist()):
        k[b, length:] = torch.nan
        v[b, length:] = torch.nan
    out = ops.attention(q, k, v, lengths=lengths, window=window)
    expected = reference.attention(q, k, v, lengths=lengths, window=window)
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=2e-2)


# --- determinism, and what is served by the reference ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", pick([(2, 2048, 2048, 8, 2, 128), (2, 1000, 1000, 6, 6, 64)], [(1, 70, 70, 2, 2, 64)]), ids=str
)
def test_the_same_bits_250_times(path, sizes):
    if path.type == "cpu":
        pytest.skip("needs CUDA")
    tensors = inputs(path, *sizes)
    first = both(ops.attention, *tensors, window=700)
    for _ in range(pick(250, 2)):
        for mine, other in zip(both(ops.attention, *tensors, window=700), first, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("dtype", "D", "words"),
    [
        (torch.float32, 64, "bfloat16 and float16, not float32"),
        (BF16, 20, "a multiple of 8 up to 128, not 20"),
        (BF16, 256, "a multiple of 8 up to 128, not 256"),
    ],
)
def test_what_the_kernels_do_not_take_is_served_by_torch(cuda, require_native, monkeypatch, dtype, D, words):
    require_native("attention")
    monkeypatch.setattr(backends, "warned", set())
    q, k, v, dout = inputs(cuda, 1, 70, 70, 2, 1, D, dtype)
    with pytest.warns(UserWarning, match=words) as caught:
        check(q, k, v, dout)
    assert sum("served by plain torch" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(q, k, v, dout, window=9)


def test_instruction_sets_that_are_refused(cuda, require_native, monkeypatch):
    require_native("attention")
    q, k, v, _ = inputs(cuda, 1, 70, 70, 2, 1, 64)
    monkeypatch.setenv("NANOCHAT_CUDA_ISA", "sm_70")
    with pytest.raises(ValueError, match="NANOCHAT_CUDA_ISA must be sm_80 or sm_90a, got sm_70"):
        ops.attention(q, k, v)
