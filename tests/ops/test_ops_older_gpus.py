"""What a GPU runs that the CUDA kernels do not take: against the references, on a CPU, and without large tensors."""

import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_native import ops
from nanochat_native.ops import backends, block_attention, reference
from nanochat_native.ops.linear_cross_entropy import chunked_linear_cross_entropy
from nanochat_native.ops.newton_schulz import COEFFICIENTS, fits_float16

MODULE = sys.modules["nanochat_native.ops.newton_schulz"]  # the package has the function under this name


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def with_gradients(function, tensors, dout, **options):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*tensors, **options)
    return out, *torch.autograd.grad(out, tensors, dout)


def qkv(B, Tq, Tk, H, Hkv, D, dtype=torch.float64):
    shapes = ((B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, D))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


# --- attention ---


@given(
    Tq=st.integers(1, 40),
    Tk=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    mask=st.sampled_from([{}, {"causal": False}, {"window": 0}, {"window": 5}, {"window": 100}, {"scale": 0.3}]),
    rows=st.sampled_from([1, 7, 64]),
    scores=st.sampled_from([1, 500, 1 << 20]),
)
def test_blocks_of_queries_match_the_reference(Tq, Tk, heads, mask, rows, scores):
    q, k, v = qkv(2, Tq, Tk, *heads, 6)
    dout = torch.randn_like(q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "BLOCK_ROWS", rows)
        patch.setattr(block_attention, "BLOCK_SCORES", scores)
        ours = with_gradients(block_attention.block_attention, (q, k, v), dout, **mask)
    expected = with_gradients(reference.attention, (q, k, v), dout, **mask)
    assert ours[0].is_contiguous()
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("window", [None, 0, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_match_the_reference(window, causal):
    """Caches of several lengths, of no key at all too. What lies beyond a length is not read."""
    q, k, v = qkv(4, 3, 20, 4, 2, 8)
    lengths = torch.tensor([20, 7, 2, 0])
    options = {"window": window, "causal": causal}
    expected = reference.attention(q, k, v, lengths=lengths, **options)
    for row, length in enumerate(lengths.tolist()):
        k[row, length:], v[row, length:] = 1e3, 1e3
    ours = block_attention.block_attention(q, k, v, lengths=lengths, **options)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)
    longer = block_attention.block_attention(q, k, v, lengths=lengths + 100 * (lengths == 20), **options)
    assert torch.equal(longer, ours)


@pytest.mark.parametrize("mask", [{}, {"causal": False}, {"window": 29}, {"window": 100}], ids=str)
def test_the_whole_sequence_runs_at_once_where_torch_keeps_no_scores(monkeypatch, mask):
    """With a window too, if it hides no key."""
    monkeypatch.setattr(block_attention, "saves_no_scores", lambda *_: True)
    monkeypatch.setattr(block_attention, "_block", None)
    q, k, v = qkv(2, 30, 30, 4, 2, 8)
    dout = torch.randn_like(q)
    ours = with_gradients(block_attention.block_attention, (q, k, v), dout, **mask)
    expected = with_gradients(reference.attention, (q, k, v), dout, **mask)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


def test_a_window_that_hides_one_key_is_applied(monkeypatch):
    monkeypatch.setattr(block_attention, "saves_no_scores", lambda *_: True)
    q, k, v = qkv(2, 30, 30, 4, 2, 8)
    ours = block_attention.block_attention(q, k, v, window=28)
    torch.testing.assert_close(ours, reference.attention(q, k, v, window=28), atol=1e-10, rtol=1e-10)
    assert not torch.allclose(ours, reference.attention(q, k, v))


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
@pytest.mark.parametrize(
    ("mask", "masks"),
    [({}, 1), ({"window": 90}, 1), ({"lengths": [250, 70, 0]}, 3), ({"lengths": [250, 70, 0], "window": 90}, 3)],
    ids=str,
)
def test_a_mask_is_kept_once_for_all_heads(monkeypatch, mask, masks, heads):
    """And once for all sequences without lengths, where torch keeps the mask and no scores."""
    monkeypatch.setattr(block_attention, "saves_no_scores", lambda *_: True)
    (B, Tq, Tk), (H, _) = (3, 240, 250), heads
    mask = mask | ({"lengths": torch.tensor(mask["lengths"])} if "lengths" in mask else {})
    q, k, v = qkv(B, Tq, Tk, *heads, 4)
    dout, kept = torch.randn_like(q), {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.detach()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ours = with_gradients(block_attention.block_attention, (q, k, v), dout, **mask)
    expected = with_gradients(reference.attention, (q, k, v), dout, **mask)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    kept_bytes = sum(x.untyped_storage().nbytes() for x in kept.values())
    mask_bytes = Tq * Tk * q.element_size()  # torch keeps a mask in the type of the scores
    assert kept_bytes <= 8 * q.untyped_storage().nbytes() + 1.2 * masks * mask_bytes < B * H * mask_bytes / 3


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_attention_of_nothing(shape):
    q, k, v = qkv(*shape, 2, 2, 4)
    expected = with_gradients(reference.attention, (q, k, v), torch.randn_like(q))
    for mine, theirs in zip(with_gradients(block_attention.block_attention, (q, k, v), q), expected, strict=True):
        assert torch.equal(mine, torch.zeros_like(theirs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 40])
def test_no_tensor_of_attention_has_the_size_of_the_scores(monkeypatch, window, dtype):
    """Neither at once nor in what the backward pass keeps."""
    T = 512
    monkeypatch.setattr(block_attention, "BLOCK_ROWS", 16)
    q, k, v = qkv(1, T, T, 2, 1, 4, dtype)
    kept = []
    # As on a GPU for which torch has no kernel: it keeps the scores of a block.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
            out = block_attention.block_attention(*tensors, window=window)
        torch.autograd.grad(out, tensors, torch.randn_like(out))
    keys = T if window is None else window + 16
    assert largest.elements <= max(2 * 16 * keys, q.numel())
    # For each block of 16 rows: its queries, the keys that it sees, their values and the mask.
    assert sum(kept) <= 4 * T // 16 * max(2 * 16 * keys, 2 * 4 * keys)


def test_attention_computes_in_the_type_of_its_inputs_under_autocast():
    q, k, v = qkv(1, 9, 9, 2, 2, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = block_attention.block_attention(q, k, v)
    torch.testing.assert_close(ours, reference.attention(q, k, v))


# --- the loss ---


@given(
    N=st.integers(1, 60),
    V=st.integers(1, 90),
    softcap=st.sampled_from([0.0, 15.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    bytes=st.sampled_from([1, 4000, 1 << 20]),
)
def test_the_chunked_loss_matches_the_reference(N, V, softcap, reduction, ignored, bytes):
    x, weight = torch.randn(N, 12, dtype=torch.float64), torch.randn(V, 12, dtype=torch.float64)
    targets = torch.randint(0, V, (N,)).masked_fill(torch.rand(N) < ignored, -1)
    three = torch.tensor(3.0, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_LOGIT_BYTES", str(bytes))
        ours = with_gradients(
            chunked_linear_cross_entropy, (x, weight), three, **loss_options(targets, softcap, reduction)
        )
    expected = with_gradients(
        reference.linear_cross_entropy, (x, weight), three, **loss_options(targets, softcap, reduction)
    )
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10, equal_nan=True)


def loss_options(targets, softcap=15.0, reduction="mean"):
    return {"targets": targets, "softcap": softcap, "ignore_index": -1, "reduction": reduction}


def test_the_chunked_loss_of_each_target_and_of_a_target_out_of_range():
    x, weight = torch.randn(2, 5, 8), torch.randn(30, 8)
    targets = torch.randint(0, 30, (2, 5))
    losses = chunked_linear_cross_entropy(x, weight, **loss_options(targets, reduction="none"))
    torch.testing.assert_close(losses, reference.linear_cross_entropy(x, weight, targets, reduction="none"))
    targets[1, 2] = 30
    losses = chunked_linear_cross_entropy(x, weight, **loss_options(targets, reduction="none"))
    assert losses.isnan().nonzero().tolist() == [[1, 2]]
    _, dx, dweight = with_gradients(
        chunked_linear_cross_entropy, (x, weight), torch.tensor(1.0), **loss_options(targets, reduction="sum")
    )
    assert dx.isnan().any(-1).nonzero().tolist() == [[1, 2]]
    assert dweight.isnan().any()


def test_float16_gradients_of_the_loss_are_near_those_in_float64():
    N, C, V = 64, 32, 5000
    x, weight = torch.randn(N, C).half(), torch.randn(V, C).half()
    options = loss_options(torch.randint(0, V, (N,)))
    scale = torch.tensor(65536.0, dtype=torch.float64)
    exact = with_gradients(reference.linear_cross_entropy, (x.double(), weight.double()), scale, **options)
    ours = with_gradients(chunked_linear_cross_entropy, (x, weight), scale.float(), **options)
    assert [tensor.dtype for tensor in ours] == [torch.float32, torch.float16, torch.float16]
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine.double() - theirs).norm() <= 1e-3 * theirs.norm()


def test_float16_keeps_probabilities_that_are_smaller_than_its_numbers():
    """Each of the wrong tokens has the probability e^-17 = 4.1e-8; float16's smallest number is 6.0e-8."""
    x, weight = torch.ones(8, 1).half(), torch.zeros(100, 1).half()
    weight[0] = 17
    scale = torch.tensor(65536.0)
    options = loss_options(torch.zeros(8, dtype=torch.int64), softcap=0.0)
    _, _, dweight = with_gradients(chunked_linear_cross_entropy, (x, weight), scale, **options)
    expected = torch.full((99, 1), 65536 * torch.tensor(-17.0).exp().item()).half()
    torch.testing.assert_close(dweight[1:], expected, rtol=2e-3, atol=0)


def test_the_chunked_loss_holds_one_chunk_of_logits_and_is_differentiable_once(monkeypatch):
    monkeypatch.setenv("NANOCHAT_LOGIT_BYTES", str(4 * 1000 * 8))
    x, weight = torch.randn(256, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with LargestTensor() as largest:
        loss = chunked_linear_cross_entropy(x, weight, **loss_options(torch.randint(0, 1000, (256,))))
        torch.autograd.grad(loss, (x, weight), retain_graph=True)
    assert largest.elements == 8 * 1000
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, (x, weight), create_graph=True)


def test_the_chunked_loss_computes_no_gradient_in_no_grad_mode(monkeypatch):
    """One product for each chunk, and nothing that is kept for a gradient; with gradients, two products more."""
    monkeypatch.setenv("NANOCHAT_LOGIT_BYTES", str(4 * 1000 * 8))
    x, weight = torch.randn(256, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    options = loss_options(torch.randint(0, 1000, (256,)))
    with Products() as products:
        expected = chunked_linear_cross_entropy(x, weight, **options)
    assert products.count == 3 * 256 // 8
    with torch.no_grad(), Products() as products:
        loss = chunked_linear_cross_entropy(x, weight, **options)
    assert products.count == 256 // 8
    assert torch.equal(loss, expected)
    assert not loss.requires_grad


# --- Newton-Schulz ---


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (200, 48)])
@pytest.mark.parametrize("spectrum", ["random", "flat", "steep"])
def test_float16_errs_less_than_half_of_bfloat16(monkeypatch, shape, coefficients, spectrum):
    """Against float64, as the maximum over all elements, for matrices of any scale."""
    g = torch.randn(3, *shape, dtype=torch.float64)
    if spectrum != "random":
        u, s, v = torch.linalg.svd(g, full_matrices=False)
        s = torch.ones_like(s) if spectrum == "flat" else torch.logspace(0, -4, s.size(-1), dtype=torch.float64)
        g = u @ (s[..., None] * v)
    g *= torch.tensor([1e-12, 1.0, 1e12], dtype=torch.float64)[:, None, None]
    exact = reference.newton_schulz(g, coefficients=coefficients)
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        monkeypatch.setattr(MODULE, "_product_dtype", lambda *_, dtype=dtype: dtype)
        errors[dtype] = (reference.newton_schulz(g, coefficients=coefficients) - exact).abs().amax((-2, -1))
    assert (errors[torch.float16] <= errors[torch.bfloat16] / 2).all()


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_the_coefficients_fit_float16(coefficients):
    triples, factor = reference.newton_schulz_schedule(12, coefficients)
    assert fits_float16(triples, factor)


@pytest.mark.parametrize("triples", [[(200.0, 0.0, 0.0)], [(3.0, 0.0, 2.0)] * 9, [(float("nan"), 0.0, 0.0)]])
def test_coefficients_that_let_numbers_grow_do_not_fit_float16(triples):
    assert not fits_float16(triples * 4, 1.0)


# --- the choice ---


def test_a_gpu_below_8_0_runs_no_kernel(monkeypatch):
    with torch._subclasses.FakeTensorMode():  # before is_available is changed: a torch for CUDA would ask the driver
        one, other = (torch.empty(2, device=f"cuda:{index}") for index in (0, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 0), (7, 5)][index])
    monkeypatch.setattr(backends, "_gpu_problems", {})
    monkeypatch.setattr(backends, "warned", set())
    monkeypatch.setattr(backends, "DEVICES", dict.fromkeys(ops.OPERATORS, ("cpu", "cuda")))
    problem = "the CUDA kernels need compute capability 8.0 or newer, and this GPU has 7.5"
    assert ops.serves("attention", "cuda:0") == ("native", "kernel built")
    assert ops.serves("attention", "cuda:1") == ops.serves("attention", "cuda") == ("torch", problem)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert backends.runs_native("adamw_", one)
        assert not backends.runs_native("adamw_", other)
        assert not backends.runs_native("attention", other)
    messages = [str(warning.message) for warning in caught if "nanochat_native" in str(warning.message)]
    assert messages == [f"nanochat_native: every operator on cuda is served by plain torch: {problem}"]
