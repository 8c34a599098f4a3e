"""linear_cross_entropy on the GPU against its reference in float64: loss, gradients, ignored and impossible targets."""

import math

import pytest
import torch
from sizes import pick
from torch.profiler import ProfilerActivity, profile

from nanochat_native import ops
from nanochat_native.ops import reference

pytestmark = pytest.mark.gpu

F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {F32: 2e-5, BF16: 2e-2}


@pytest.fixture(autouse=True)
def kernels(require_native):
    require_native("linear_cross_entropy")


def problem(device, N, V, dtype, C=48):
    x = torch.randn(N, C, device=device).to(dtype)
    weight = (torch.randn(V, C, device=device) * 0.3).to(dtype)
    targets = torch.randint(0, V, (N,), device=device)
    return x, weight, targets


def results(function, x, weight, targets, **options):
    """Loss and both gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    value = function(x, weight, targets, **options)
    return value.detach(), *torch.autograd.grad(value, (x, weight))


def assert_near(ours, exact, tolerance):
    """Relative Frobenius error of each; a NaN fails."""
    for index, (mine, other) in enumerate(zip(ours, exact, strict=True)):
        error = (mine.double() - other).norm() / other.norm().clamp_min(1e-30)
        assert error <= tolerance, f"result {index} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("N", "V"),
    pick(
        [(70, 32768), (70, 50257), (300, 17), (1, 1), (33, 2), (3000, 1000)],
        [(3, 50257), (20, 1001), (70, 17), (1, 1)],
    ),
)
@pytest.mark.parametrize("softcap", pick([15.0, 0.5, None], [15.0, None]))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients(device, N, V, dtype, softcap, reduction):
    x, weight, targets = problem(device, N, V, dtype)
    if N > 1:
        targets[::3] = -1
    options = {"softcap": softcap, "reduction": reduction}
    ours = results(ops.linear_cross_entropy, x, weight, targets, **options)
    exact = results(reference.linear_cross_entropy, x.double(), weight.double(), targets, **options)
    assert ours[0].dtype == F32
    assert ours[1].dtype == ours[2].dtype == dtype
    # Where V is 1 every loss is 0, and with few words the whole loss is as small as the rounding of one logit.
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if V > 1:
        assert_near(ours[1:], exact[1:], TOLERANCE[dtype])
    else:
        assert not ours[1].any()
        assert not ours[2].any()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("V", [17, pick(50257, 5003)])
def test_losses_of_each_row(device, V, dtype):
    x, weight, targets = problem(device, 40, V, dtype)
    targets[7] = -1
    shaped = x.view(5, 8, -1), weight, targets.view(5, 8)
    ours = ops.linear_cross_entropy(*shaped, reduction="none")
    exact = reference.linear_cross_entropy(x.double(), weight.double(), targets, reduction="none")
    assert ours.shape == (5, 8)
    assert ours[0, 7] == 0
    torch.testing.assert_close(ours.flatten().double(), exact, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


def test_gradients_of_one_side_only(device):
    x, weight, targets = problem(device, 65, 301, F32)
    full = results(ops.linear_cross_entropy, x, weight, targets)
    for index, leaf in enumerate((x, weight)):
        leaf.requires_grad_()
        (gradient,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets), leaf)
        leaf.requires_grad_(False)
        torch.testing.assert_close(gradient, full[index + 1])


def test_the_gradient_of_the_loss_scales_the_gradients(device):
    x, weight, targets = problem(device, 65, 301, F32)
    _, dx, dweight = results(ops.linear_cross_entropy, x, weight, targets)
    x.requires_grad_()
    weight.requires_grad_()
    (ops.linear_cross_entropy(x, weight, targets) * 3).backward()
    torch.testing.assert_close(x.grad, 3 * dx)
    torch.testing.assert_close(weight.grad, 3 * dweight)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_all_ignored(device, dtype):
    x, weight, targets = problem(device, 40, 1001, dtype)
    targets.fill_(-1)
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
        value, dx, dweight = results(ops.linear_cross_entropy, x, weight, targets, reduction=reduction)
        assert torch.equal(value.isnan(), torch.tensor(expected != expected, device=device))
        assert value.nan_to_num() == 0
        assert not dx.any()
        assert not dweight.any()


def count_products(function):
    """How many matrix products one call asks torch for, which the host counts."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return sum(event.name == "aten::mm" for event in profiler.events())


@pytest.mark.parametrize("rows", [1, 5, 15, 16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_chunks_of_rows(cuda, monkeypatch, dtype, rows):
    """16 rows in chunks of `rows`: bfloat16 gradients of the weight are summed in float32, by a product that adds."""
    x, weight, targets = problem(cuda, 16, 301, dtype)
    targets[::3] = -1
    exact = results(reference.linear_cross_entropy, x.double(), weight.double(), targets)

    def losses():
        return ops.linear_cross_entropy(x, weight, targets, reduction="none")

    monkeypatch.delenv("NANOCHAT_LOGIT_BYTES", raising=False)
    whole, products = losses(), count_products(losses)
    assert products > 0
    monkeypatch.setenv("NANOCHAT_LOGIT_BYTES", str(rows * 301 * x.element_size()))
    assert_near(results(ops.linear_cross_entropy, x, weight, targets), exact, TOLERANCE[dtype])
    torch.testing.assert_close(losses(), whole)
    assert count_products(losses) == math.ceil(16 / rows) * products


@pytest.mark.parametrize("number", ["0", "-1", "1e6", "many", "7 ", "99999999999999999999"])
def test_a_wrong_number_of_logit_bytes_is_refused(cuda, monkeypatch, number):
    monkeypatch.setenv("NANOCHAT_LOGIT_BYTES", number)
    with pytest.raises(ValueError, match=f"NANOCHAT_LOGIT_BYTES must be a number of bytes > 0, got {number}"):
        ops.linear_cross_entropy(*problem(cuda, 2, 3, F32))


def test_another_ignore_index(device):
    x, weight, targets = problem(device, 40, 301, F32)
    targets[::2] = 5
    ours = results(ops.linear_cross_entropy, x, weight, targets, ignore_index=5)
    exact = results(reference.linear_cross_entropy, x.double(), weight.double(), targets, ignore_index=5)
    assert_near(ours, exact, TOLERANCE[F32])


@pytest.mark.parametrize("large", [1e4, 1e10])
def test_large_logits_do_not_overflow(device, large):
    x, weight, targets = problem(device, 20, 1001, F32)
    for softcap in (15.0, None):
        for number in results(ops.linear_cross_entropy, x * large, weight, targets, softcap=softcap):
            assert number.isfinite().all()


@pytest.mark.parametrize("target", [1001, -2, 1 << 40])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_target_out_of_range_makes_its_own_row_nan(cuda, dtype, target):
    """On the GPU nobody waits to say more; the other rows keep their bits."""
    x, weight, targets = problem(cuda, 40, 1001, dtype)
    wrong = targets.clone()
    wrong[13] = target
    others = torch.arange(40, device=cuda) != 13
    losses = [ops.linear_cross_entropy(x, weight, t, reduction="none") for t in (targets, wrong)]
    assert losses[1][13].isnan()
    assert torch.equal(losses[0][others], losses[1][others])
    (_, dx, _), (total, wrong_dx, _) = (
        results(ops.linear_cross_entropy, x, weight, t, reduction="sum") for t in (targets, wrong)
    )
    assert total.isnan()
    assert torch.equal(dx[others], wrong_dx[others])
