"""attention: the native kernels against the reference, gradients against finite differences, and properties."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_native import ops
from nanochat_native.ops import reference

FORWARD = torch.ops.nanochat_native.attention_forward.default
BACKWARD = torch.ops.nanochat_native.attention_backward.default


def inputs(B, Tq, Tk, H, Hkv, D, dtype=torch.float32, requires_grad=False, std=1.0):
    return [
        (std * torch.randn(B, T, heads, D, dtype=torch.float64)).to(dtype).requires_grad_(requires_grad)
        for T, heads in ((Tq, H), (Tk, Hkv), (Tk, Hkv))
    ]


def with_gradients(attention, q, k, v, dout, **options):
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    out = attention(q, k, v, **options)
    return out, *torch.autograd.grad(out, (q, k, v), dout)


def assert_close_to_reference(q, k, v, dout, **options):
    """Assert the bound of the FlashAttention papers: twice the error of plain torch in the same dtype, plus twice the
    rounding of the result, plus a few roundings of sums over T of inputs of order 1, for results near zero, plus the
    effect of reading a rounded output in the backward pass, which plain torch does not do."""
    cancellation = 16 * torch.finfo(reference.compute_dtype(q.dtype)).eps * max(q.size(1), k.size(1)) ** 0.5
    ours = with_gradients(ops.attention, q, k, v, dout, **options)
    expected = with_gradients(reference.attention, q, k, v, dout, **options)
    exact = with_gradients(reference.attention, q.double(), k.double(), v.double(), dout.double(), **options)
    of_rounded_out = effect_of_rounded_out(q, k, v, dout, ours[0], exact[0], **options)
    for name, mine, theirs, ref in zip(("out", "dq", "dk", "dv"), ours, expected, exact, strict=True):
        assert mine.dtype == q.dtype, name
        rounding = ((ref.to(q.dtype) + 0.3 - 0.3).double() - ref).abs().max()
        bound = 2 * (theirs.double() - ref).abs().max() + 2 * rounding + cancellation + of_rounded_out.get(name, 0)
        assert (mine.double() - ref).abs().max() <= bound, name


def effect_of_rounded_out(q, k, v, dout, out, exact_out, **options):
    """Return how far dq and dk move because the backward pass reads the output in bfloat16.

    It subtracts dout * out, summed over D, from each row of the gradient of the probabilities.
    """
    if q.dtype != torch.bfloat16:
        return {}
    q, k, v = q.double(), k.double(), v.double()
    scale = options.get("scale") or q.size(3) ** -0.5
    shift = scale * (dout.double() * (out.double() - exact_out)).sum(-1, keepdim=True)
    return {
        "dq": (shift * reference.attention(q, k, k, **options)).abs().max(),
        "dk": with_gradients(reference.attention, q, k, v, shift * q, **options)[3].abs().max(),
    }


SHAPES = [(1, 1), (239, 1), (799, 3), (113, 203), (1023, 1024), (1024, 1023), (384, 256)]


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("Tq", "Tk"), SHAPES)
def test_matches_the_reference(Tq, Tk, causal, heads):
    q, k, v = inputs(1, Tq, Tk, *heads, 24)
    assert_close_to_reference(q, k, v, torch.randn_like(q), causal=causal)


@pytest.mark.parametrize("D", [1, 16, 33, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_head_sizes_and_dtypes(D, dtype):
    q, k, v = inputs(2, 97, 130, 4, 2, D, dtype)
    assert_close_to_reference(q, k, v, torch.randn_like(q), window=40)


@pytest.mark.slow
def test_long_sequence():
    q, k, v = inputs(1, 4224, 4224, 1, 1, 8)
    assert_close_to_reference(q, k, v, torch.randn_like(q))


@pytest.mark.parametrize("window", [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 300, 10**6])
def test_windows(window):
    q, k, v = inputs(1, 300, 300, 2, 1, 16)
    assert_close_to_reference(q, k, v, torch.randn_like(q), window=window)


# The strips behind the window of a block of keys must write nothing. 230 shows it with vectors of 64 bytes too.
@pytest.mark.parametrize("window", [100, 230, 256])
def test_windows_that_end_inside_a_block_of_queries(window):
    assert_close_to_reference(*inputs(1, 1024, 1024, 8, 8, 8), torch.randn(1, 1024, 8, 8), causal=True, window=window)


@pytest.mark.parametrize("window", [None, 0, 1, 31, 32, 33, 127, 255, 256, 257])
@pytest.mark.parametrize(
    ("Tq", "Tk"), [(5, 5), (16, 100), (17, 64), (63, 300), (65, 65), (129, 530), (300, 300), (40, 20)]
)
def test_sizes_and_windows_in_bfloat16(Tq, Tk, window):
    """The blocks of products of bfloat16 (gemm16.h) have 16, 32, 64, 128 and 256 rows or columns."""
    q, k, v = inputs(1, Tq, Tk, 2, 1, 24, torch.bfloat16)
    assert_close_to_reference(q, k, v, torch.randn_like(q), window=window)


@pytest.mark.parametrize("window", [None, 0, 5])
@pytest.mark.parametrize("Tq", range(1, 9))
def test_decoding_against_a_cache(Tq, window):
    q, k, v = inputs(3, Tq, 131, 4, 2, 32)
    assert_close_to_reference(q, k, v, torch.randn_like(q), window=window)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"causal": False}, {"scale": -0.4}], ids=str)
@pytest.mark.parametrize("Tq", [1, 3, 40])
def test_lengths_of_sequences_in_a_cache(Tq, options, dtype, backend):
    """Keys behind a sequence's length are not read, and the last query is aligned to the last key."""
    ops.use_backend(backend)
    lengths = torch.tensor([0, 1, 2, 57, 70])
    q, k, v = inputs(5, Tq, 70, 4, 2, 16, dtype)
    for b, length in enumerate(lengths):
        k[b, length:] = torch.nan
        v[b, length:] = torch.nan
    out = ops.attention(q, k, v, lengths=lengths, **options)
    for b, length in enumerate(lengths.tolist()):
        own = (q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length])
        assert torch.equal(out[b : b + 1], ops.attention(*own, **options))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        (torch.tensor([3]), ValueError, r"lengths must have shape \(2,\), one per sequence, got \(1,\)"),
        (torch.tensor([3, 4], dtype=torch.int32), TypeError, "lengths must be torch.int64, got torch.int32"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "lengths must be on cpu like q, got meta"),
        (torch.tensor([3, 8]), ValueError, "lengths must be from 0 to 7, got 8"),
        (torch.tensor([-1, 3]), ValueError, "lengths must be from 0 to 7, got -1"),
    ],
)
def test_bad_lengths(lengths, error, words, backend):
    ops.use_backend(backend)
    q, k, v = inputs(2, 3, 7, 2, 1, 8)
    with pytest.raises(error, match=words):
        ops.attention(q, k, v, lengths=lengths)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_lengths_have_no_gradient(backend):
    ops.use_backend(backend)
    q, k, v = inputs(2, 3, 7, 2, 1, 8, requires_grad=True)
    with pytest.raises(ValueError, match="lengths must be None when a tensor requires a gradient, got a tensor"):
        ops.attention(q, k, v, lengths=torch.tensor([3, 7]))
    with torch.no_grad():
        assert ops.attention(q, k, v, lengths=torch.tensor([3, 7])).isfinite().all()


@given(Tq=st.integers(1, 40), Tk=st.integers(1, 40), causal=st.booleans(), window=st.none() | st.integers(0, 50))
def test_mask_by_brute_force(Tq, Tk, causal, window):
    """Compare the softmax weights, which are the output if v is the identity: only visible keys have weight."""
    q, k, _ = inputs(1, Tq, Tk, 1, 1, Tk)
    out = ops.attention(q, k, torch.eye(Tk)[None, :, None], causal=causal, window=window)[0, :, 0]
    for i in range(Tq):
        position = i + Tk - Tq
        visible = [
            (j <= position or not (causal or window is not None)) and (window is None or j >= position - window)
            for j in range(Tk)
        ]
        expected = torch.zeros(Tk)
        scores = (k[0, :, 0] @ q[0, i, 0] / math.sqrt(Tk))[visible]
        expected[visible] = scores.softmax(0)
        torch.testing.assert_close(out[i], expected)


def laid_out(tensor, layout):
    """Return the same values in another memory layout."""
    B, T, H, D = tensor.shape
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "heads first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "interleaved":
        room = torch.full((B, T + 1, H, 3 * D), torch.nan, dtype=tensor.dtype)
        room[:, :T, :, D : 2 * D] = tensor
        return room[:, :T, :, D : 2 * D]
    if layout == "odd offset":
        room = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype)
        room[1:] = tensor.reshape(-1)
        return room[1:].view(B, T, H, D)
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = ["contiguous", "heads first", "interleaved", "odd offset", "D not unit"]


@given(
    B=st.integers(1, 3),
    Tq=st.integers(1, 70),
    Tk=st.integers(1, 70),
    Hkv=st.integers(1, 3),
    group=st.integers(1, 3),
    D=st.integers(1, 40),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 80),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_shape_and_strides(B, Tq, Tk, Hkv, group, D, causal, window, layouts, dtype):
    q, k, v = inputs(B, Tq, Tk, Hkv * group, Hkv, D, dtype)
    dout = torch.randn_like(q)
    options = {"causal": causal, "window": window}
    expected = with_gradients(ops.attention, q, k, v, dout, **options)
    assert_close_to_reference(q, k, v, dout, **options)
    moved = [laid_out(tensor, layout) for tensor, layout in zip((q, k, v, dout), layouts, strict=True)]
    for mine, theirs in zip(with_gradients(ops.attention, *moved, **options), expected, strict=True):
        assert mine.is_contiguous()
        assert torch.equal(mine, theirs)


def test_expanded_and_zero_gradients():
    q, k, v = inputs(2, 50, 50, 2, 2, 16)
    ones = torch.ones(()).expand(q.shape)
    for mine, theirs in zip(
        with_gradients(ops.attention, q, k, v, ones),
        with_gradients(ops.attention, q, k, v, ones.contiguous()),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    for grad in with_gradients(ops.attention, q, k, v, torch.zeros(()).expand(q.shape))[1:]:
        assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("Tq", "Tk"), [(1, 1), (5, 9), (9, 5)])
def test_gradcheck(Tq, Tk, causal, heads, window):
    q, k, v = inputs(1, Tq, Tk, *heads, 3, torch.float64, requires_grad=True)
    options = {"causal": causal, "window": window, "scale": 0.7}
    assert torch.autograd.gradcheck(lambda *args: ops.attention(*args, **options), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fully_masked_rows_give_zero(dtype):
    q, k, v = inputs(1, 90, 20, 2, 1, 16, dtype)
    out, dq, dk, dv = with_gradients(ops.attention, q, k, v, torch.randn_like(q))
    assert torch.count_nonzero(out[:, :70]) == 0
    assert torch.count_nonzero(dq[:, :70]) == 0
    alone = with_gradients(reference.attention, q[:, 70:], k, v, torch.ones_like(q[:, 70:]))
    assert out[:, 70:].isfinite().all()
    assert dk.isfinite().all()
    assert dv.shape == alone[3].shape
    _, lse = FORWARD(q, k, v, True, -1, 0.25)
    assert (lse[:, :, :70] == -torch.inf).all()
    assert lse[:, :, 70:].isfinite().all()


def test_no_keys_and_no_queries():
    q, k, v = inputs(2, 3, 0, 2, 1, 8)
    for result in with_gradients(ops.attention, q, k, v, torch.ones_like(q)):
        assert torch.count_nonzero(result) == 0
    q, k, v = inputs(2, 0, 3, 2, 1, 8)
    out, dq, dk, dv = with_gradients(ops.attention, q, k, v, torch.ones_like(q))
    assert out.shape == dq.shape == (2, 0, 2, 8)
    assert torch.count_nonzero(dk) == torch.count_nonzero(dv) == 0


def test_logsumexp():
    q, k, v = inputs(2, 60, 75, 4, 2, 16)
    _, lse = FORWARD(q, k, v, True, 20, 0.3)
    _, expected = reference.attention_forward(q, k, v, window=20, scale=0.3)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits(size):
    q, k, v = inputs(1, 80, 80, 2, 2, 16)
    q[..., 0], k[..., 0] = size, 4.0
    results = with_gradients(ops.attention, q, k, v, torch.randn_like(q))
    for result in results:
        assert result.isfinite().all()
    torch.testing.assert_close(results[0], reference.attention(q, k, v), atol=0.02, rtol=0.02)


def test_nan_stays_in_its_row():
    q, k, v = inputs(1, 70, 70, 2, 2, 16)
    clean = ops.attention(q, k, v)
    q[0, 33, 1] = torch.nan
    out = ops.attention(q, k, v)
    assert out[0, 33, 1].isnan().all()
    out[0, 33, 1] = clean[0, 33, 1]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 31, 64, 77, 130])
def test_memory_behind_the_last_row_is_not_read(T, causal):
    tensors = inputs(2, T, T, 2, 2, 20)
    dout = torch.randn(2, T, 2, 20)
    poisoned = []
    for tensor in (*tensors, dout):
        room = torch.full((2, T + 64, 2, 20), torch.nan)
        room[:, :T] = tensor
        poisoned.append(room[:, :T])
    for mine, theirs in zip(
        with_gradients(ops.attention, *poisoned, causal=causal),
        with_gradients(ops.attention, *tensors, dout, causal=causal),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("window", [199, 200, 5000])
def test_a_large_window_is_full_causal_attention(window):
    q, k, v = inputs(1, 200, 200, 2, 2, 16)
    dout = torch.randn_like(q)
    for mine, theirs in zip(
        with_gradients(ops.attention, q, k, v, dout, window=window),
        with_gradients(ops.attention, q, k, v, dout),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time_and_for_every_number_of_threads(dtype):
    q, k, v = inputs(2, 257, 257, 4, 2, 32, dtype)
    dout = torch.randn_like(q)
    first = with_gradients(ops.attention, q, k, v, dout)
    for threads in (1, 2, 3, 2, 5, 2):
        torch.set_num_threads(threads)
        for mine, theirs in zip(with_gradients(ops.attention, q, k, v, dout), first, strict=True):
            assert torch.equal(mine, theirs)


def test_opcheck():
    q, k, v = inputs(2, 9, 12, 4, 2, 8, requires_grad=True)
    torch.library.opcheck(FORWARD, (q, k, v, True, -1, 0.3))
    strided = [laid_out(tensor.detach(), "heads first") for tensor in (q, k, v)]
    torch.library.opcheck(FORWARD, (*strided, True, 3, 0.3))
    torch.library.opcheck(FORWARD, (*strided, True, 3, 0.3, torch.tensor([5, 12])))
    q, k, v = (tensor.detach() for tensor in (q, k, v))
    out, lse = FORWARD(q, k, v, True, -1, 0.3)
    torch.library.opcheck(BACKWARD, (torch.randn_like(q), q, k, v, out, lse, True, -1, 0.3))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_compiles_as_one_graph(backend):
    ops.use_backend(backend)
    q, k, v = inputs(1, 30, 30, 2, 2, 16)
    dout = torch.randn_like(q)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        with_gradients(compiled, q, k, v, dout, window=7),
        with_gradients(ops.attention, q, k, v, dout, window=7),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
def test_no_keys_have_no_derivatives():
    q, k, v = inputs(2, 3, 0, 2, 1, 8, torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(ops.attention(q, k, v).sum(), q, create_graph=True)
    assert torch.count_nonzero(first) == 0
    _, tangent = torch.func.jvp(lambda q: ops.attention(q, k, v), (q,), (q,))
    assert torch.equal(tangent, torch.zeros_like(q))


@pytest.mark.parametrize(("Tq", "Tk"), [(4, 4), (5, 2)])
@pytest.mark.parametrize("options", [{}, {"window": 1}, {"causal": False, "scale": 0.7}], ids=str)
def test_second_derivatives_and_forward_mode(Tq, Tk, options):
    q, k, v = inputs(2, Tq, Tk, 2, 1, 3, torch.float64, requires_grad=True)

    def function(*args):
        return ops.attention(*args, **options)

    checks = {"check_forward_ad": True, "check_batched_forward_grad": True, "check_batched_grad": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(function, (q, k, v), **checks)
        assert torch.autograd.gradgradcheck(function, (q, k, v), check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ValueError, r"q, k, v must have shapes .* got \(2, 3, 4\)"),
        ({"q": torch.zeros(2, 3, 3, 8)}, ValueError, "H must be a multiple of Hkv, .* got H = 3, Hkv = 2"),
        ({"q": torch.zeros(2, 3, 4, 9)}, ValueError, "k and v must have the same shape, with the B and D of q"),
        ({"k": torch.zeros(1, 3, 2, 8)}, ValueError, "k and v must have the same shape, with the B and D of q"),
        ({"v": torch.zeros(2, 4, 2, 8)}, ValueError, "k and v must have the same shape, with the B and D of q"),
        (
            {"v": torch.zeros(2, 3, 2, 8, dtype=torch.float64)},
            TypeError,
            "v must be torch.float32 like q, got torch.float64",
        ),
        (
            {"q": torch.zeros(2, 3, 4, 8, dtype=torch.int64)},
            TypeError,
            "attention: k must be torch.int64 like q, got torch.float32",
        ),
        ({"k": torch.zeros(2, 3, 2, 8, device="meta")}, ValueError, "k must be on cpu like q, got meta"),
        ({"window": -1}, ValueError, "window must be None or a number of earlier keys >= 0, got -1"),
    ],
)
def test_bad_arguments(change, error, words, backend):
    ops.use_backend(backend)
    arguments = {"q": torch.zeros(2, 3, 4, 8), "k": torch.zeros(2, 3, 2, 8), "v": torch.zeros(2, 3, 2, 8)} | change
    with pytest.raises(error, match=words):
        ops.attention(**arguments)


def test_float16_is_refused_on_the_cpu():
    q = torch.zeros(1, 2, 1, 4, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"q must be torch.float32 or torch.float64 or torch.bfloat16, got torch.flo"):
        ops.attention(q, q, q)


def test_the_raw_operator_checks_too():
    q, k, v = inputs(1, 4, 4, 2, 2, 4)
    with pytest.raises(ValueError, match="H must be a multiple of Hkv, got 2 and 3"):
        FORWARD(q, torch.zeros(1, 4, 3, 4), torch.zeros(1, 4, 3, 4), True, -1, 1.0)
    with pytest.raises(TypeError, match="v must have dtype Float, got Double"):
        FORWARD(q, k, v.double(), True, -1, 1.0)
    with pytest.raises(ValueError, match="lse must have shape"):
        BACKWARD(q, q, k, v, q, torch.zeros(1, 2, 5), True, -1, 1.0)


def test_meta_tensors_have_the_right_shapes():
    q, k, v = (tensor.to("meta") for tensor in inputs(2, 5, 7, 4, 2, 8))
    assert ops.attention(q, k, v).shape == (2, 5, 4, 8)
