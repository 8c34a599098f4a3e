"""linear_cross_entropy: against F.cross_entropy on whole logits; gradients, ignored and wrong targets, memory."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nanochat_native import ops
from nanochat_native.ops import reference

OPERATOR = torch.ops.nanochat_native.linear_cross_entropy.default


def inputs(N, C, V, dtype=torch.float32, ignored=0.2, requires_grad=True):
    x = torch.randn(N, C, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
    weight = torch.randn(V, C, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
    targets = torch.randint(0, V, (N,)).masked_fill(torch.rand(N) < ignored, -1)
    return x, weight, targets


def plain(x, weight, targets, softcap=15.0, ignore_index=-1, reduction="mean"):
    """Return the loss by torch's own calls."""
    logits = x.reshape(-1, x.size(-1)) @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets.reshape(-1), ignore_index=ignore_index, reduction=reduction)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("softcap", [15.0, 2.0, 0.0, None])
@pytest.mark.parametrize(("N", "C", "V"), [(1, 1, 1), (3, 5, 2), (70, 33, 101), (300, 64, 1000), (517, 96, 517)])
def test_matches_cross_entropy_on_whole_logits(N, C, V, softcap, reduction, backend):
    ops.use_backend(backend)
    x, weight, targets = inputs(N, C, V)
    targets[0] = 0
    loss = ops.linear_cross_entropy(x, weight, targets, softcap=softcap, reduction=reduction)
    exact = plain(x.double(), weight.double(), targets, softcap, reduction=reduction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(3 * loss, (x, weight)), torch.autograd.grad(3 * exact, (x, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=1e-4)


@given(
    N=st.integers(0, 60),
    C=st.integers(1, 40),
    V=st.integers(1, 90),
    softcap=st.sampled_from([0.0, 15.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    reduction=st.sampled_from(["mean", "sum"]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_shape_matches_the_reference(N, C, V, softcap, dtype, reduction, ignored):
    x, weight, targets = inputs(N, C, V, dtype, ignored)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    options = {"softcap": softcap, "reduction": reduction}
    ours = ops.linear_cross_entropy(x, weight, targets, **options)
    expected = reference.linear_cross_entropy(x, weight, targets, **options)
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance, equal_nan=True)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(expected, (x, weight)), strict=True
    ):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


def test_leading_dimensions_and_strides():
    x, weight, targets = inputs(24, 10, 30)
    expected = ops.linear_cross_entropy(x, weight, targets)
    moved = torch.full((4, 6, 20), torch.nan)
    moved[..., ::2] = x.detach().view(4, 6, 10)
    turned = weight.detach().T.contiguous().T
    assert torch.equal(ops.linear_cross_entropy(moved[..., ::2], turned, targets.view(4, 6)), expected.detach())
    one = ops.linear_cross_entropy(x[0], weight, targets[0].clamp(min=0))
    torch.testing.assert_close(one, plain(x[:1], weight, targets[:1].clamp(min=0)))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(reduction, softcap):
    x, weight, targets = inputs(7, 4, 9, torch.float64)
    targets[0] = 3
    options = {"softcap": softcap, "reduction": reduction}
    assert torch.autograd.gradcheck(lambda *args: ops.linear_cross_entropy(*args, targets, **options), (x, weight))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_losses_of_each_target(backend):
    ops.use_backend(backend)
    x, weight, targets = inputs(60, 16, 50, requires_grad=False)
    losses = ops.linear_cross_entropy(x.view(4, 15, 16), weight, targets.view(4, 15), reduction="none")
    torch.testing.assert_close(losses, plain(x, weight, targets, reduction="none").view(4, 15), atol=1e-5, rtol=1e-5)
    assert (losses.view(-1)[targets == -1] == 0).all()
    with pytest.raises(
        ValueError, match="reduction must be 'mean' or 'sum' when a tensor requires a gradient, got 'none'"
    ):
        ops.linear_cross_entropy(x.requires_grad_(), weight, targets, reduction="none")
    with torch.no_grad():
        ops.linear_cross_entropy(x, weight, targets, reduction="none")


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_all_ignored(backend):
    ops.use_backend(backend)
    x, weight, targets = inputs(5, 4, 9, ignored=1.1)
    loss = ops.linear_cross_entropy(x, weight, targets)
    assert loss.isnan()
    for grad in torch.autograd.grad(loss, (x, weight)):
        assert torch.count_nonzero(grad) == 0
    assert ops.linear_cross_entropy(x, weight, targets, reduction="sum") == 0


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("target", [-2, 9, 10**12, -(10**12)])
def test_targets_out_of_range(target, backend):
    ops.use_backend(backend)
    x, weight, targets = inputs(5, 4, 9)
    targets[3] = target
    with pytest.raises(
        ValueError,
        match=f"targets must be from 0 to 8 or ignore_index -1, got {target}",
    ):
        ops.linear_cross_entropy(x, weight, targets)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_another_ignore_index(backend):
    ops.use_backend(backend)
    x, weight, targets = inputs(20, 4, 9, ignored=0)
    targets[:7] = -100
    torch.testing.assert_close(
        ops.linear_cross_entropy(x, weight, targets, ignore_index=-100), plain(x, weight, targets, ignore_index=-100)
    )
    targets[:7] = 5
    torch.testing.assert_close(
        ops.linear_cross_entropy(x, weight, targets, ignore_index=5), plain(x, weight, targets, ignore_index=5)
    )


def test_only_the_gradients_that_are_needed():
    x, weight, targets = inputs(20, 4, 9)
    both = torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets), (x, weight))
    only_x = torch.autograd.grad(ops.linear_cross_entropy(x, weight.detach(), targets), x)
    only_weight = torch.autograd.grad(ops.linear_cross_entropy(x.detach(), weight, targets), weight)
    assert torch.equal(only_x[0], both[0])
    assert torch.equal(only_weight[0], both[1])
    with torch.no_grad():
        assert not ops.linear_cross_entropy(x, weight, targets).requires_grad
    loss, grad_x, grad_weight = OPERATOR(x.detach(), weight.detach(), targets, 15.0, -1, "mean", False, False)
    assert grad_x.numel() == grad_weight.numel() == 0
    torch.testing.assert_close(loss, plain(x, weight, targets).detach())


def test_nan_in_one_row_reaches_only_its_loss_and_gradient():
    x, weight, targets = inputs(40, 8, 30, ignored=0, requires_grad=False)
    clean = ops.linear_cross_entropy(x, weight, targets, reduction="none")
    x[17, 3] = torch.nan
    losses = ops.linear_cross_entropy(x, weight, targets, reduction="none")
    assert losses[17].isnan()
    losses[17] = clean[17]
    assert torch.equal(losses, clean)
    (grad,) = torch.autograd.grad(ops.linear_cross_entropy(x.requires_grad_(), weight, targets, reduction="sum"), x)
    assert grad[17].isnan().all()
    assert grad[torch.arange(40) != 17].isfinite().all()


@pytest.mark.parametrize("scale", [1e4, 1e25])
@pytest.mark.parametrize("softcap", [15.0, 0.0])
def test_large_logits(scale, softcap):
    x, weight, targets = inputs(20, 8, 30)
    with torch.no_grad():
        x *= scale
    loss = ops.linear_cross_entropy(x, weight, targets, softcap=softcap)
    exact = plain(x.double(), weight.double(), targets, softcap)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(exact, (x, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_same_bits_every_time_and_for_every_number_of_threads():
    x, weight, targets = inputs(700, 48, 1000)

    def results():
        loss = ops.linear_cross_entropy(x, weight, targets)
        return loss, *torch.autograd.grad(loss, (x, weight))

    first = results()
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, results(), first))


def test_opcheck():
    x, weight, targets = inputs(9, 5, 12)
    torch.library.opcheck(OPERATOR, (x, weight, targets, 15.0, -1, "mean", True, True))
    torch.library.opcheck(OPERATOR, (x, weight.detach(), targets, 15.0, -1, "sum", True, False))
    torch.library.opcheck(OPERATOR, (x.detach(), weight.detach(), targets, 0.0, -1, "none", False, False))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_compiles_as_one_graph(backend):
    ops.use_backend(backend)
    x, weight, targets = inputs(20, 8, 30)
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        torch.autograd.grad(2 * compiled(x, weight, targets), (x, weight)),
        torch.autograd.grad(2 * ops.linear_cross_entropy(x, weight, targets), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_second_derivative_is_refused():
    x, weight, targets = inputs(4, 4, 4)
    words = r"linear_cross_entropy: .* no second derivative; use create_graph=False, or .*use_backend\('torch'\)"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets), x, create_graph=True)


def test_logits_of_the_batch_never_exist():
    """The logits would take 512 MB, and their gradient as much; the operator stays under 160 MB."""
    script = """
        import resource, torch
        from nanochat_native import ops
        x = torch.randn(4096, 32, requires_grad=True)
        weight = torch.randn(32768, 32, requires_grad=True)
        targets = torch.randint(0, 32768, (4096,))
        ops.linear_cross_entropy(x[:64], weight, targets[:64]).backward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ops.linear_cross_entropy(x, weight, targets).backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert int(output) < 160 * 1024


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(5, 7)}, ValueError, r"x and weight must have shapes .*, got \(5, 7\) and \(9, 4\)"),
        ({"weight": torch.zeros(4)}, ValueError, r"x and weight must have shapes .*, got \(5, 4\) and \(4,\)"),
        (
            {"weight": torch.zeros(9, 4, dtype=torch.float64)},
            TypeError,
            "weight must be torch.float32 like x, got torch.float64",
        ),
        ({"x": torch.zeros(5, 4, dtype=torch.float16)}, TypeError, "x must be .*, got torch.float16"),
        (
            {"targets": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"targets must have shape \(5,\), that of x without C, got \(4,\)",
        ),
        ({"targets": torch.zeros(5, dtype=torch.int32)}, TypeError, "targets must be torch.int64, got torch.int32"),
        ({"softcap": -1.0}, ValueError, "softcap must be None or >= 0, got -1.0"),
        ({"softcap": float("nan")}, ValueError, "softcap must be None or >= 0, got nan"),
        ({"reduction": "average"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'average'"),
    ],
)
def test_bad_arguments(change, error, words, backend):
    ops.use_backend(backend)
    arguments = {"x": torch.zeros(5, 4), "weight": torch.zeros(9, 4), "targets": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(error, match=words):
        ops.linear_cross_entropy(**(arguments | change))


def test_the_raw_operator_checks_too():
    x, weight, targets = inputs(5, 4, 9, requires_grad=False)
    with pytest.raises(ValueError, match="targets must have shape"):
        OPERATOR(x, weight, targets[:4], 15.0, -1, "mean", False, False)
    with pytest.raises(TypeError, match="weight must have dtype Float, got Double"):
        OPERATOR(x, weight.double(), targets, 15.0, -1, "mean", False, False)
    with pytest.raises(ValueError, match="reduction must be mean, sum or none, got average"):
        OPERATOR(x, weight, targets, 15.0, -1, "average", False, False)
