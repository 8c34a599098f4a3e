"""CUDA attention against its reference in float64: emulated, under sanitizers, and on a GPU. Both paths."""

import budget
import operator_calls as operators
import pytest
import torch

from nanochat_native.ops import reference

BF16, F16 = torch.bfloat16, torch.float16
PATHS = ["sm_80", "sm_90a"]


class Attention:
    """Both directions on one path."""

    def __init__(self, kernels, path):
        self.library, self.device, self.hopper = operators.Operators(kernels), kernels.device, path == "sm_90a"
        if self.device == "cuda" and self.hopper and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")

    def forward(self, q, k, v, **options):
        return operators.attention_forward(self.library, q, k, v, hopper=self.hopper, **options)

    def backward(self, dout, q, k, v, out, lse, **options):
        return operators.attention_backward(self.library, dout, q, k, v, out, lse, hopper=self.hopper, **options)

    def both(self, q, k, v, dout, **options):
        out, lse = self.forward(q, k, v, **options)
        return out, *self.backward(dout, q, k, v, out, lse, **options)


@pytest.fixture(params=PATHS)
def attention(kernels, request):
    return Attention(kernels, request.param)


@pytest.fixture(params=PATHS)
def unwatched(unwatched_kernels, request):
    return Attention(unwatched_kernels, request.param)


@pytest.fixture
def ampere(unwatched_kernels):
    """For few rows, which have one path."""
    return Attention(unwatched_kernels, "sm_80")


def inputs(device, B, Tq, Tk, H, Hkv, D, dtype=BF16):
    """q, k, v, dout."""
    shapes = ((Tq, H), (Tk, Hkv), (Tk, Hkv), (Tq, H))
    return [torch.randn(B, T, heads, D, device=device).to(dtype) for T, heads in shapes]


def run_reference(dtype, q, k, v, dout, **options):
    """out, dq, dk, dv, computed from and in `dtype`."""
    q, k, v = (tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v))
    out = reference.attention(q, k, v, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype))


def check(attention, q, k, v, dout, *, schedule=0, multiprocessors=2, **options):
    """The bound of the FlashAttention papers, as in tests/ops/test_ops_attention.py; and the log-sum-exp."""
    out, lse = attention.forward(q, k, v, schedule=schedule, multiprocessors=multiprocessors, **options)
    places = {"schedule": schedule, "multiprocessors": multiprocessors}
    grads = attention.backward(dout, q, k, v, out, lse, **places, **options)
    exact = run_reference(torch.float64, q, k, v, dout, **options)
    expected = run_reference(q.dtype, q, k, v, dout, **options)
    cancellation = 16 * torch.finfo(torch.float32).eps * max(q.size(1), k.size(1)) ** 0.5
    for name, mine, theirs, ref in zip(("out", "dq", "dk", "dv"), (out, *grads), expected, exact, strict=True):
        rounding = ((ref.to(q.dtype) + 0.3 - 0.3).double() - ref).abs().max()
        bound = 2 * (theirs.double() - ref).abs().max() + 2 * rounding + cancellation
        assert (mine.double() - ref).abs().max() <= bound, name
    _, exact_lse = reference.attention_forward(q.double(), k.double(), v.double(), **options)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)


HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (4, 1), "group of 3": (3, 1)}
SHAPES = [(1, 1), (239, 1), (200, 3), (113, 203), (257, 256), (256, 257)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("Tq", "Tk"), SHAPES)
def test_shapes(unwatched, Tq, Tk, heads):
    check(unwatched, *inputs(unwatched.device, 1, Tq, Tk, *HEADS[heads], 64))


@pytest.mark.parametrize(("Tq", "Tk"), SHAPES)
def test_shapes_without_a_mask(unwatched, Tq, Tk):
    check(unwatched, *inputs(unwatched.device, 1, Tq, Tk, 4, 2, 64), causal=False)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("D", [8, 64, 72, 96, 104, 128])
def test_head_sizes(unwatched, D, dtype):
    check(unwatched, *inputs(unwatched.device, 2, 150, 170, 2, 1, D, dtype), window=70, schedule=D // 8 % 4)


@pytest.mark.parametrize("options", [{"causal": False}, {"window": 300}], ids=str)
@pytest.mark.parametrize("D", [64, 96, 128])
def test_blocks_of_many_keys(unwatched, D, options):
    tensors = inputs(unwatched.device, 2, 150, 450, 2, 1, D)
    if unwatched.hopper:
        assert operators.forward_tile(unwatched.library, *tensors[:2], **options) == (2, 128)
    check(unwatched, *tensors, **options)


def test_tiles_of_three_consumers(unwatched):
    q, k, v, _ = inputs(unwatched.device, 1, 200, 2048, 8, 2, 64)
    places = {"causal": False, "multiprocessors": 1}
    if unwatched.hopper:
        assert operators.forward_tile(unwatched.library, q, k, **places) == (3, 128)
    out, lse = unwatched.forward(q, k, v, **places)
    exact, exact_lse = reference.attention_forward(q.double(), k.double(), v.double(), causal=False)
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)
    fewer, _ = unwatched.forward(q, k, v, causal=False, multiprocessors=8)
    assert torch.equal(out, fewer)


@pytest.mark.parametrize("D", [64, 96, 128])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 128}, {"window": 1000}], ids=str)
def test_the_budget_knows_the_tile_of_each_shape(unwatched, D, options):
    for B, T in ((1, 256), (1, 2048), (8, 4096), (8, 16384)):
        q = torch.empty(B, T, 16, D, dtype=BF16, device="meta")
        shape = budget.Attention(B, 16, 16, T, D, **options)
        found = operators.forward_tile(unwatched.library, q, q, multiprocessors=132, **options)
        assert found == budget.forward_tile(shape), (B, T)


@pytest.mark.parametrize("window", [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300])
def test_windows(unwatched, window):
    check(unwatched, *inputs(unwatched.device, 1, 260, 260, 2, 1, 64), window=window)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scales(unwatched, scale):
    check(unwatched, *inputs(unwatched.device, 1, 140, 140, 1, 1, 64), scale=scale, window=90)


@pytest.mark.parametrize("group", [8, 16, 32, 64])
def test_groups_of_many_heads(unwatched, group):
    check(unwatched, *inputs(unwatched.device, 2, 7, 50, group, 1, 64), multiprocessors=1)


@pytest.mark.parametrize("heads", ["MHA", "MQA", "group of 3"])
@pytest.mark.parametrize(("Tq", "Tk", "window"), [(400, 400, 0), (330, 450, 40), (450, 330, 100), (70, 500, 5)])
def test_rows_of_a_tile_that_see_different_keys(unwatched, Tq, Tk, window, heads):
    """One block of threads takes all tiles."""
    check(unwatched, *inputs(unwatched.device, 1, Tq, Tk, *HEADS[heads], 64), window=window, multiprocessors=1)


def test_many_heads_and_batches(unwatched):
    """More work than multiprocessors: each takes several items."""
    check(unwatched, *inputs(unwatched.device, 3, 130, 130, 6, 2, 64), multiprocessors=5)


# --- memory ---


def interleaved(tensor):
    """The same values amid NaN."""
    B, T, H, D = tensor.shape
    room = torch.full((B, T + 1, H, 3 * D), torch.nan, dtype=tensor.dtype, device=tensor.device)
    room[:, :T, :, D : 2 * D] = tensor
    return room[:, :T, :, D : 2 * D]


def heads_first(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("place", [interleaved, heads_first])
def test_strides_and_what_lies_around(unwatched, place):
    tensors = inputs(unwatched.device, 2, 100, 150, 4, 2, 64)
    expected = unwatched.both(*tensors)
    for mine, other in zip(unwatched.both(*map(place, tensors)), expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("T", [1, 64, 77, 130])
def test_memory_behind_the_last_row_is_not_read(unwatched, T):
    tensors = inputs(unwatched.device, 1, T, T, 2, 2, 96)
    rooms = [torch.full((1, T + 200, 2, 96), torch.nan, dtype=BF16, device=unwatched.device) for _ in tensors]
    for room, tensor in zip(rooms, tensors, strict=True):
        room[:, :T] = tensor
    expected = unwatched.both(*tensors, causal=False)
    for mine, other in zip(unwatched.both(*(room[:, :T] for room in rooms), causal=False), expected, strict=True):
        assert torch.equal(mine, other)


# --- properties ---


def test_same_bits_for_every_schedule_and_number_of_multiprocessors(unwatched):
    tensors = inputs(unwatched.device, 2, 200, 200, 4, 2, 64)
    first = unwatched.both(*tensors)
    for schedule in range(1, 5):
        places = {"schedule": schedule, "misalignment": 16 * (1 + 9 * schedule), "multiprocessors": 2 * schedule}
        for mine, other in zip(unwatched.both(*tensors, **places), first, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 150}], ids=str)
def test_same_bits_however_many_blocks_share_the_rows(unwatched, options):
    """Five tiles of keys, whose parts of dQ are added in one order."""
    q, k, v, dout = inputs(unwatched.device, 1, 520, 520, 2, 1, 64)
    out, lse = unwatched.forward(q, k, v, **options)
    first = unwatched.backward(dout, q, k, v, out, lse, multiprocessors=1, **options)
    for schedule, multiprocessors in enumerate((2, 3, 5), start=1):
        places = {"schedule": schedule, "multiprocessors": multiprocessors}
        for mine, other in zip(unwatched.backward(dout, q, k, v, out, lse, **places, **options), first, strict=True):
            assert torch.equal(mine, other)


def test_fully_masked_rows_give_zero(unwatched):
    q, k, v, dout = inputs(unwatched.device, 1, 190, 20, 2, 2, 64)
    out, lse = unwatched.forward(q, k, v)
    dq, dk, dv = unwatched.backward(dout, q, k, v, out, lse)
    assert not out[:, :170].any()
    assert not dq[:, :170].any()
    assert (lse[:, :, :170] == -torch.inf).all()
    for tensor in (out, lse[:, :, 170:], dq, dk, dv):
        assert tensor.isfinite().all()


def test_keys_that_nobody_sees_get_zero(unwatched):
    q, k, v, dout = inputs(unwatched.device, 1, 20, 300, 2, 2, 64)
    _, _, dk, dv = unwatched.both(q, k, v, dout, window=10)
    assert not dk[:, :270].any()
    assert not dv[:, :270].any()
    assert dv[:, 270:].any()


def test_nan_stays_in_its_row(unwatched):
    q, k, v, dout = inputs(unwatched.device, 1, 140, 140, 2, 1, 64)
    clean_out, clean_lse = unwatched.forward(q, k, v)
    clean_dq = unwatched.backward(dout, q, k, v, clean_out, clean_lse)[0]
    q[0, 33, 1] = torch.nan
    out, lse = unwatched.forward(q, k, v)
    dq = unwatched.backward(dout, q, k, v, out, lse)[0]
    for mine, clean in ((out, clean_out), (dq, clean_dq), (lse.transpose(1, 2), clean_lse.transpose(1, 2))):
        assert mine[0, 33, 1].isnan().all()
        mine[0, 33, 1] = clean[0, 33, 1]
        assert torch.equal(mine, clean)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits(unwatched, size, causal):
    """The weight of a key that does not exist, with a score of zero, would be infinite where all scores are low."""
    q, k, v, dout = inputs(unwatched.device, 1, 140, 140, 1, 1, 64)
    q[..., 0], k[..., 0] = size, 8.0
    results = unwatched.both(q, k, v, dout, causal=causal)
    for result in results:
        assert result.isfinite().all()
    torch.testing.assert_close(results[0], reference.attention(q, k, v, causal=causal), atol=0.03, rtol=0.03)


def test_zero_gradients(unwatched):
    q, k, v, dout = inputs(unwatched.device, 1, 70, 70, 2, 1, 64)
    for grad in unwatched.both(q, k, v, torch.zeros_like(dout))[1:]:
        assert not grad.any()


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize(("tiles", "units", "section"), [(1, 1, 1), (5, 7, 3), (4, 6, 6), (3, 10, 1), (7, 9, 4)])
def test_the_order_has_every_tile_once_and_the_longest_first(unwatched, tiles, units, section, last_first):
    places = torch.full((tiles * units, 2), -1, dtype=torch.int32)
    unwatched.library.call("places", tiles, units, section, int(last_first), places)
    found = [tuple(place) for place in places.tolist()]
    assert sorted(found) == [(tile, unit) for tile in range(tiles) for unit in range(units)]
    for first in range(0, units, section):
        within = [tile for tile, unit in found if first <= unit < first + section]
        assert within == sorted(within, reverse=last_first)


# --- decoding ---


@pytest.mark.parametrize("multiprocessors", [1, 20, 132])
@pytest.mark.parametrize("window", [None, 0, 100])
@pytest.mark.parametrize("Tq", [1, 2, 5, 16])
def test_decoding_against_a_cache(ampere, Tq, window, multiprocessors):
    check(ampere, *inputs(ampere.device, 2, Tq, 700, 4, 1, 64), window=window, multiprocessors=multiprocessors)


@pytest.mark.parametrize("D", [64, 96, 128])
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"causal": False}], ids=str)
def test_lengths(ampere, options, D):
    """What lies behind a length is not read; one beyond the cache is taken for all of it."""
    lengths = torch.tensor([0, 1, 70, 300, 10**12, -3], device=ampere.device)
    q, k, v, _ = inputs(ampere.device, len(lengths), 3, 300, 4, 2, D)
    for b, length in enumerate(lengths.tolist()):
        k[b, max(length, 0) :] = torch.nan
        v[b, max(length, 0) :] = torch.nan
    out, lse = ampere.forward(q, k, v, lengths=lengths, multiprocessors=40, **options)
    expected = reference.attention(q, k, v, lengths=lengths.clamp(0, 300), **options)
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)
    assert (lse[0] == -torch.inf).all()
    assert lse[2:5].isfinite().all()


def test_many_queries_with_lengths(unwatched):
    lengths = torch.tensor([90, 200], device=unwatched.device)
    q, k, v, _ = inputs(unwatched.device, 2, 150, 200, 2, 1, 64)
    out, _ = unwatched.forward(q, k, v, lengths=lengths)
    torch.testing.assert_close(out, reference.attention(q, k, v, lengths=lengths), atol=1e-2, rtol=1e-2)


# --- refusals ---


@pytest.mark.parametrize("D", [0, 4, 20, 136])
def test_head_sizes_that_are_refused(unwatched, D):
    q = torch.zeros(1, 3, 1, D, dtype=BF16, device=unwatched.device)
    with pytest.raises(Exception, match=f"attention_forward: D must be a multiple of 8 up to 128, got {D}"):
        unwatched.forward(q, q, q, scale=1.0)


# --- under sanitizers ---

WATCHED = {
    "causal, GQA": lambda attention: check(attention, *inputs("cpu", 1, 150, 150, 2, 1, 64)),
    "window, D 96": lambda attention: check(attention, *inputs("cpu", 1, 150, 100, 2, 2, 96, F16), window=30),
    "full, D 128": lambda attention: check(attention, *inputs("cpu", 1, 140, 260, 1, 1, 128), causal=False),
    "split keys": lambda attention: check(attention, *inputs("cpu", 1, 3, 301, 4, 1, 72), multiprocessors=20),
}


@pytest.mark.parametrize("case", WATCHED)
def test_under_sanitizers(kernels, attention, case):
    if kernels.target in ("plain", "cuda"):
        pytest.skip("for the builds with a sanitizer")
    WATCHED[case](attention)
