"""The operators of the optimizers on the GPU against references and torch: odd sizes and addresses, rounding."""

import pytest
import torch
from sizes import pick

from nanochat_native import ops
from nanochat_native.ops import reference

pytestmark = pytest.mark.gpu

F32, BF16 = torch.float32, torch.bfloat16
SETTINGS = {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}
SHAPES = [(1,), (7,), (3, 5), (16, 16), (1001,), (2, 3, 4), (0,), *pick([(70_001,), (1_000_003,)], [(9001,)])]
LISTS = [
    (1, (1, 1)),
    (3, (7,)),
    *pick([(300, (37, 53)), (4, (512, 1536))], [(300, (3, 5)), (2, (70, 150))]),
    (2, (0, 4)),
]
KINDS = [(F32, F32), (BF16, F32), (BF16, BF16)]


@pytest.fixture(autouse=True)
def kernels(require_native):
    require_native("adamw_", "muon_momentum_", "muon_update_", "normuon_update_")


def state(device, shapes=SHAPES, dtype=F32, moments=F32):
    """params, grads, exp_avgs, exp_avg_sqs."""
    params, grads, firsts = (
        [torch.randn(shape, device=device).to(kind) for shape in shapes] for kind in (dtype, dtype, moments)
    )
    return [params, grads, firsts, [torch.rand(shape, device=device).to(moments) for shape in shapes]]


def clone(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


class Guarded:
    """The same values in one buffer, `offset` elements behind an aligned address, each between elements of NaN."""

    GAP = 8

    def __init__(self, tensors, offset=1):
        room = sum(tensor.numel() + 2 * self.GAP for tensor in tensors) + self.GAP
        self.buffer = torch.full((room,), torch.nan, dtype=tensors[0].dtype, device=tensors[0].device)
        self.guard = torch.ones(room, dtype=torch.bool, device=tensors[0].device)
        self.views, at = [], self.GAP + offset
        for tensor in tensors:
            end = at + tensor.numel()
            self.buffer[at:end] = tensor.flatten()
            self.guard[at:end] = False
            self.views.append(self.buffer[at:end].view(tensor.shape))
            at = end + self.GAP

    def assert_whole(self):
        assert self.buffer[self.guard].isnan().all()


def assert_equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, mine, other))


def assert_close(ours, theirs):
    """In bfloat16 a difference of the last bit of float32 may round to the neighbour."""
    for mine, other in zip(ours, theirs, strict=True):
        relative = 2e-5 if mine.dtype == F32 else 2**-7
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=relative)


# --- adamw_ ---


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(("dtype", "moments"), KINDS)
def test_adamw_matches_the_reference(device, dtype, moments, cautious):
    ours = state(device, dtype=dtype, moments=moments)
    expected = clone(ours)
    ops.adamw_(*ours, step=3, cautious=cautious, **SETTINGS)
    reference.adamw_(*expected, step=3, cautious=cautious, **SETTINGS)
    assert all(map(torch.equal, ours[1], expected[1]))
    if cautious:  # a first moment that cancels to nothing has the sign of its rounding
        for mine, other, first in zip(ours[0], expected[0], expected[2], strict=True):
            mine[first.abs() < 1e-6] = other[first.abs() < 1e-6] = 0
    for mine, other in zip(ours, expected, strict=True):
        assert_close(mine, other)


def test_adamw_matches_torch_in_float64_over_many_steps(device):
    params, _, exp_avgs, exp_avg_sqs = state(device)
    for tensor in (*exp_avgs, *exp_avg_sqs):
        tensor.zero_()
    exact = [param.double().requires_grad_() for param in params]
    optimizer = torch.optim.AdamW(exact, lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for step in range(1, 11):
        grads = [torch.randn_like(param) for param in params]
        ops.adamw_(params, grads, exp_avgs, exp_avg_sqs, step=step, **SETTINGS)
        for param, grad in zip(exact, grads, strict=True):
            param.grad = grad.double()
        optimizer.step()
    for mine, other in zip(params, exact, strict=True):
        torch.testing.assert_close(mine.double(), other.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [1, 2, 1000, 1_000_000])
def test_adamw_corrects_the_bias_of_early_and_late_steps(device, step):
    ours = state(device, [(5000,)])
    expected = clone(ours)
    ops.adamw_(*ours, step=step, **SETTINGS)
    reference.adamw_(*expected, step=step, **SETTINGS)
    assert_close(ours[0], expected[0])


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("offsets", [(1, 1, 1, 1), (0, 1, 2, 3), (4, 0, 0, 0), (0, 0, 0, 5)])
@pytest.mark.parametrize(("dtype", "moments"), KINDS)
def test_adamw_of_unaligned_views_gives_the_same_bits_and_writes_nothing_else(
    device, dtype, moments, offsets, rounding
):
    aligned = state(device, dtype=dtype, moments=moments)
    guarded = [Guarded(tensors, offset) for tensors, offset in zip(aligned, offsets, strict=True)]
    for lists in (aligned, [each.views for each in guarded]):
        ops.adamw_(*lists, step=2, stochastic_rounding=rounding, seed=3, **SETTINGS)
    assert_equal([each.views for each in guarded], aligned)
    for each in guarded:
        each.assert_whole()


@pytest.mark.parametrize(("dtype", "moments"), KINDS)
def test_adamw_of_hundreds_of_tensors_of_odd_sizes(device, dtype, moments):
    shapes = [(n,) for n in torch.randint(0, pick(3000, 30), (700,)).tolist()]
    ours = state(device, shapes, dtype, moments)
    expected = clone(ours)
    ops.adamw_(*ours, step=5, **SETTINGS)
    reference.adamw_(*expected, step=5, **SETTINGS)
    for mine, other in zip(ours, expected, strict=True):
        assert_close([torch.cat(mine)], [torch.cat(other)])


def test_adamw_of_nothing(device):
    ops.adamw_([], [], [], [], step=1, **SETTINGS)
    ops.adamw_(*state(device, [(0,)]), step=1, **SETTINGS)
    ops.adamw_(*state(device, [(0, 3)] * 100), step=1, **SETTINGS)


def test_adamw_keeps_a_nan_to_its_element(device):
    ours = state(device, [(10_000,)])
    ours[1][0][5000] = torch.nan
    clean = clone(ours)
    clean[1][0][5000] = 0.0
    for lists in (ours, clean):
        ops.adamw_(*lists, step=1, **SETTINGS)
    assert ours[0][0].isnan().nonzero().tolist() == [[5000]]
    clean[0][0][5000] = torch.nan
    assert torch.equal(ours[0][0].nan_to_num(), clean[0][0].nan_to_num())


def rounded_updates(device, value, change, count, *, step=1, **options):
    """`count` bfloat16 parameters of `value` in two tensors, moved by about -change in one step."""
    shapes = [(count,), (count,)]
    params = [torch.full(shape, value, dtype=BF16, device=device) for shape in shapes]
    grads = [torch.full(shape, 1.0 if change > 0 else -1.0, dtype=BF16, device=device) for shape in shapes]
    # The moments after step - 1 steps of these gradients: the corrected ones are 1 at every step.
    firsts = [(1 - 0.8 ** (step - 1)) * grad.float() for grad in grads]
    seconds = [torch.full(shape, 1 - 0.95 ** (step - 1), device=device) for shape in shapes]
    settings = SETTINGS | {"lr": abs(change), "weight_decay": 0.0}
    ops.adamw_(params, grads, firsts, seconds, step=step, stochastic_rounding=True, **settings, **options)
    return params


@pytest.mark.parametrize("value", [1.0, -1.0, 3.0])
@pytest.mark.parametrize("change", [1e-3, -1e-3, 2.5e-4])
def test_stochastic_rounding_is_unbiased(device, value, change):
    """The step of 1/300 to 1/4 of the last bit is lost by rounding to nearest; on average it must not be."""
    count = pick(400_000, 20_000)
    for after in rounded_updates(device, value, change, count, seed=5):
        assert after.unique().numel() == 2  # the two neighbours of the exact value
        spacing = (after.max() - after.min()).double()
        standard_error = spacing * 0.5 / count**0.5
        assert abs(after.double().mean() - (value - change)) < 5 * standard_error


def test_stochastic_rounding_is_a_function_of_seed_step_tensor_and_element(device):
    first, second = rounded_updates(device, 1.0, 1e-3, 5000, seed=1)
    again, _ = rounded_updates(device, 1.0, 1e-3, 5000, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, rounded_updates(device, 1.0, 1e-3, 5000, seed=2)[0])
    assert not torch.equal(first, rounded_updates(device, 1.0, 1e-3, 5000, seed=1, step=2)[0])
    longer, _ = rounded_updates(device, 1.0, 1e-3, 6000, seed=1)
    assert torch.equal(longer[:5000], first)
    # No element repeats the choice of its neighbours, of whatever distance that is a power of two.
    chosen = (first == first.max()).float() - (first == first.max()).float().mean()
    for distance in (1, 2, 4, 8, 32, 256, 1024):
        correlation = (chosen[distance:] * chosen[:-distance]).mean() / chosen.square().mean()
        assert abs(correlation) < 5 / (5000 - distance) ** 0.5


@pytest.mark.slow
def test_adamw_of_more_than_two_billion_elements(cuda):
    count = (1 << 31) + 12_345
    if torch.cuda.mem_get_info()[0] < 4 * 2 * count + (4 << 30):
        pytest.skip("takes 22 GB of GPU memory")
    big = [[torch.ones(count, dtype=BF16, device=cuda)] for _ in range(4)]
    tail = state(cuda, [(20_000,)], BF16, BF16)
    for tensors, values in zip(big, tail, strict=True):
        tensors[0][-20_000:] = values[0]
    ops.adamw_(*big, step=3, **SETTINGS)
    reference.adamw_(*tail, step=3, **SETTINGS)
    for mine, other in zip(big, tail, strict=True):
        assert_close([mine[0][-20_000:]], other)
    assert torch.unique(big[0][0][:-20_000]).numel() == 1


# --- Muon's halves ---


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("count", "shape"), LISTS)
def test_muon_momentum_matches_the_reference(device, dtype, nesterov, count, shape):
    grads = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    buffers = [torch.randn(shape, device=device) for _ in range(count)]
    expected_buffers, plain, kept = clone([buffers, buffers, grads])
    update, norms = ops.muon_momentum_(grads, buffers, momentum=0.9, nesterov=nesterov, return_norm=True)
    expected, _ = reference.muon_momentum_(grads, expected_buffers, momentum=0.9, nesterov=nesterov, return_norm=True)
    assert all(map(torch.equal, grads, kept))
    torch.testing.assert_close(update, expected, atol=1e-6, rtol=2e-6)
    assert_close(buffers, expected_buffers)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, update.double().flatten(1).norm(dim=1), rtol=1e-9, atol=0)
    assert torch.equal(ops.muon_momentum_(grads, plain, momentum=0.9, nesterov=nesterov), update)
    assert_equal([plain], [buffers])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_muon_momentum_of_unaligned_views_gives_the_same_bits(device, dtype, offset):
    grads = [torch.randn(61, 41, device=device).to(dtype) for _ in range(20)]
    buffers = [torch.randn(61, 41, device=device) for _ in range(20)]
    moved_grads, moved = Guarded(grads, offset), Guarded(buffers, offset)
    expected = ops.muon_momentum_(grads, buffers, momentum=0.9, return_norm=True)
    results = ops.muon_momentum_(moved_grads.views, moved.views, momentum=0.9, return_norm=True)
    torch.testing.assert_close(results[1], expected[1], rtol=1e-9, atol=0)
    assert torch.equal(results[0], expected[0])
    assert_equal([moved.views], [buffers])
    moved.assert_whole()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(("count", "shape"), LISTS)
def test_muon_update_matches_the_reference(device, dtype, cautious, count, shape):
    params = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    update = torch.randn(count, *shape, device=device)
    expected, kept = clone([params])[0], update.clone()
    settings = {"lr": 0.1, "weight_decay": 0.2, "scale": 1.5, "cautious": cautious}
    ops.muon_update_(params, update, **settings)
    reference.muon_update_(expected, update, **settings)
    assert_close(params, expected)
    assert torch.equal(update, kept)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_muon_update_of_unaligned_views_gives_the_same_bits(device, dtype, offset):
    params = [torch.randn(61, 41, device=device).to(dtype) for _ in range(20)]
    moved, update = Guarded(params, offset), torch.randn(20, 61, 41, device=device)
    for tensors in (params, moved.views):
        ops.muon_update_(tensors, update, lr=0.1, weight_decay=0.2, scale=1.5)
    assert_equal([moved.views], [params])
    moved.assert_whole()


@pytest.mark.slow
def test_muon_of_more_than_two_billion_elements(cuda):
    count, shape = 33, (8192, 8192)
    if torch.cuda.mem_get_info()[0] < 3 * 4 * count * 8192 * 8192 + (4 << 30):
        pytest.skip("takes 31 GB of GPU memory")
    grad = torch.randn(shape, device=cuda)
    buffers = [torch.zeros(shape, device=cuda) for _ in range(count)]
    update, norms = ops.muon_momentum_([grad] * count, buffers, momentum=0.5, return_norm=True)
    torch.testing.assert_close(update[-1], 0.75 * grad)
    torch.testing.assert_close(norms, norms[:1].expand(count), rtol=0, atol=0)
    params = buffers
    ops.muon_update_(params, update, lr=1.0)
    torch.testing.assert_close(params[-1], -0.25 * grad)
    assert torch.equal(params[0], params[-1])


@pytest.mark.parametrize("offset", [0, 1])
def test_copies_are_the_rounded_parameters(device, offset):
    adamw = state(device)
    plain = clone(adamw)
    matrices, update = [torch.randn(33, 70, device=device) for _ in range(3)], torch.randn(3, 33, 70, device=device)
    moved, projected = clone([matrices, matrices])
    others, plain_projected = clone([matrices, matrices])
    calls = (
        (lambda copies: ops.adamw_(*adamw, step=3, copies=copies, **SETTINGS), adamw[0]),
        (lambda copies: ops.muon_update_(moved, update, lr=0.1, weight_decay=0.5, copies=copies), moved),
        (lambda copies: ops.newton_schulz_update_(projected, update, lr=0.1, copies=copies), projected),
    )
    for call, params in calls:
        guarded = Guarded([torch.zeros_like(param, dtype=BF16) for param in params], offset)
        call(guarded.views)
        guarded.assert_whole()
        assert_equal([guarded.views], [[param.to(BF16) for param in params]])
    ops.adamw_(*plain, step=3, **SETTINGS)
    ops.muon_update_(others, update, lr=0.1, weight_decay=0.5)
    ops.newton_schulz_update_(plain_projected, update, lr=0.1)
    assert_equal([adamw[0], moved, projected], [plain[0], others, plain_projected])


def lines_of(M, K):
    return (M, 1) if M >= K else (1, K)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(
    ("count", "shape"), [(3, (2, 12)), (5, (61, 41)), (4, (129, 257)), (2, pick((1024, 256), (64, 32)))]
)
def test_normuon_update_matches_the_reference(device, dtype, renormalise, count, shape):
    params = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    seconds = [torch.rand(lines_of(*shape), device=device) for _ in range(count)]
    update = torch.randn(count, *shape, device=device)
    update[0, 0] = 0
    (expected, expected_seconds), kept = clone([params, seconds]), update.clone()
    settings = {"lr": 0.1, "weight_decay": 0.2, "scale": 1.5, "cautious": True, "renormalise": renormalise}
    for _ in range(2):
        ops.normuon_update_(params, update, seconds, beta2=0.5, eps=1e-3, norm_eps=1e-6, **settings)
        reference.normuon_update_(expected, update, expected_seconds, beta2=0.5, eps=1e-3, norm_eps=1e-6, **settings)
    assert_close(params, expected)
    assert_close(seconds, expected_seconds)
    assert torch.equal(update, kept)


@pytest.mark.parametrize("shape", [(61, 41), (41, 61)])
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_normuon_update_of_unaligned_views_gives_the_same_bits(device, shape, offset):
    params = [torch.randn(shape, device=device) for _ in range(20)]
    seconds = [torch.rand(lines_of(*shape), device=device) for _ in range(20)]
    update = torch.randn(20, *shape, device=device)
    moved, moved_seconds = Guarded(params, offset), Guarded(seconds, offset)
    for tensors, second in ((params, seconds), (moved.views, moved_seconds.views)):
        ops.normuon_update_(tensors, update, second, lr=0.1, weight_decay=0.2, scale=1.5, renormalise=True)
    assert_equal([moved.views, moved_seconds.views], [params, seconds])
    moved.assert_whole()
    moved_seconds.assert_whole()


@pytest.mark.parametrize("shape", [(5, 61, 41), (3, 41, 61)])
def test_the_norms_of_rows_and_rows_equilibrated(device, shape):
    grads = [torch.randn(shape[1:], device=device) for _ in range(shape[0])]
    buffers = [torch.zeros_like(grad) for grad in grads]
    update, norms = ops.muon_momentum_(grads, buffers, momentum=0.9, return_norm="rows")
    torch.testing.assert_close(norms, torch.linalg.vector_norm(update.double(), dim=-1), rtol=1e-6, atol=0)
    options = {"row_norms": norms, "equilibrate_rows": True, "norm_eps": 1e-6, "coefficients": "polar_express"}
    found = ops.newton_schulz(update, **options)
    expected = reference.newton_schulz(update.double().cpu(), **{**options, "row_norms": norms.cpu()})
    assert (found.cpu().double() - expected).norm() <= 2e-2 * expected.norm()
