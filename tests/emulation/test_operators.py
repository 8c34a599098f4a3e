"""CUDA optimizers and loss against their references: emulated, under sanitizers, and on a GPU."""

import operator_calls as operators
import pytest
import torch

from nanochat_native.ops import reference

SETTINGS = {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}
SIZES = (1, 7, 2048, 4096, 4099, 0, 260)
TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.fixture(scope="session")
def library(kernels):
    return operators.Operators(kernels)


@pytest.fixture(scope="session")
def unwatched(unwatched_kernels):
    return operators.Operators(unwatched_kernels)


def random_lists(device, dtype, moments, sizes=SIZES):
    """params, grads, exp_avgs, exp_avg_sqs."""
    params, grads, firsts = (
        [torch.randn(n, device=device).to(kind) for n in sizes] for kind in (dtype, dtype, moments)
    )
    return params, grads, firsts, [torch.rand(n, device=device).to(moments) for n in sizes]


def clone(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def moved(tensors):
    """The same values one element behind an aligned address."""
    rooms = [torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]
    for room, tensor in zip(rooms, tensors, strict=True):
        room[1:] = tensor.reshape(-1)
    return [room[1:].view(tensor.shape) for room, tensor in zip(rooms, tensors, strict=True)]


def assert_same_bits(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(mine, other, strict=True))


def assert_near(mine, other):
    # A bfloat16 may round to the neighbour where float32 differs in its last bit.
    torch.testing.assert_close(mine, other, atol=1e-6, rtol=2e-5 if mine.dtype == torch.float32 else 2**-7)


# --- adamw_ ---


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(("dtype", "moments"), TYPES)
def test_adamw_matches_the_reference(unwatched, dtype, moments, cautious):
    check_adamw(unwatched, dtype, moments, cautious)


def check_adamw(library, dtype, moments, cautious):
    ours = random_lists(library.device, dtype, moments)
    expected, grads = clone(ours), clone(ours)[1]
    operators.adamw_(library, *ours, step=3, cautious=cautious, schedule=2, **SETTINGS)
    reference.adamw_(*expected, step=3, cautious=cautious, **SETTINGS)
    assert_same_bits([ours[1]], [grads])
    for index in (2, 3):
        for mine, other in zip(ours[index], expected[index], strict=True):
            assert_near(mine, other)
    for mine, other, m in zip(ours[0], expected[0], expected[2], strict=True):
        sure = m.float().abs() > 1e-3  # where m all but vanishes, rounding decides its sign
        assert_near(mine[sure], other[sure])


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize(("dtype", "moments"), TYPES)
def test_adamw_does_not_depend_on_alignment_or_schedule(unwatched, dtype, moments, rounding):
    check_adamw_alignment(unwatched, dtype, moments, rounding)


def check_adamw_alignment(library, dtype, moments, rounding):
    start = random_lists(library.device, dtype, moments)
    results = []
    for schedule, place in enumerate((list, moved, list)):
        results.append([place(tensors) for tensors in clone(start)])
        operators.adamw_(
            library, *results[-1], step=2, stochastic_rounding=rounding, seed=7, schedule=schedule, **SETTINGS
        )
        assert_same_bits(results[-1], results[0])


def test_adamw_takes_more_tensors_than_a_table_holds(unwatched):
    sizes = [1 + i % 5 for i in range(745)]
    ours = random_lists(unwatched.device, torch.float32, torch.float32, sizes)
    expected = clone(ours)
    operators.adamw_(unwatched, *ours, step=1, **SETTINGS)
    reference.adamw_(*expected, step=1, **SETTINGS)
    for mine, other in zip(ours[0], expected[0], strict=True):
        assert_near(mine, other)


def test_adamw_reads_its_numbers_where_they_stand(library):
    by_number = random_lists(library.device, torch.bfloat16, torch.float32)
    by_address = clone(by_number)
    numbers = {"step": 5, "lr": 0.03, "weight_decay": 0.2}
    kinds = {"step": torch.int64, "lr": torch.float64, "weight_decay": torch.float64}
    tensors = {name: torch.tensor(value, dtype=kinds[name], device=library.device) for name, value in numbers.items()}
    rest = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "stochastic_rounding": True, "seed": 3}
    operators.adamw_(library, *by_number, **numbers, **rest)
    operators.adamw_(library, *by_address, **tensors, **rest)
    assert_same_bits(by_address, by_number)


def rounded(library, value, change, count, **options):
    """`count` bfloat16 parameters of `value`, moved by about -change."""
    like = {"device": library.device}
    params, grads = (torch.full((count,), x, dtype=torch.bfloat16, **like) for x in (value, 1.0))
    moments = [[torch.zeros(count, **like)], [torch.zeros(count, **like)]]
    settings = SETTINGS | {"lr": change, "weight_decay": 0.0} | {"step": 1} | options
    operators.adamw_(library, [params], [grads], *moments, stochastic_rounding=True, **settings)
    return params.double()


def test_adamw_rounds_without_bias(unwatched):
    count = 40_000
    for value in (1.0, -1.0):
        after = rounded(unwatched, value, 1e-3, count, seed=5)
        spacing = (after.max() - after.min()).item()
        assert after.unique().numel() == 2
        assert abs(after.mean().item() - (value - 1e-3)) < 5 * spacing * 0.5 / count**0.5


def test_adamw_rounding_is_a_function_of_seed_and_step(unwatched):
    first = rounded(unwatched, 1.0, 1e-3, 3000, seed=1)
    assert torch.equal(first, rounded(unwatched, 1.0, 1e-3, 3000, seed=1, schedule=3))
    assert not torch.equal(first, rounded(unwatched, 1.0, 1e-3, 3000, seed=2))
    up = (first == first.max()).double()
    agreement, p = (up[1:] == up[:-1]).double().mean(), up.mean()
    assert abs(agreement - (p**2 + (1 - p) ** 2)) < 0.06


def philox(counter, key):
    """Philox4x32-10 of a counter of four words and a key of two (Salmon et al., SC 2011)."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = right >> 32 ^ b ^ k, right & 0xFFFFFFFF, left >> 32 ^ d ^ m, left & 0xFFFFFFFF
        k, m = k + 0x9E3779B9 & 0xFFFFFFFF, m + 0xBB67AE85 & 0xFFFFFFFF
    return a, b, c, d


def test_philox_gives_its_published_numbers():
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_adamw_rounds_by_philox_of_element_tensor_step_and_seed(unwatched, moments):
    """With zero gradients a parameter becomes (1 - lr weight_decay) p in float32, plus 16 random bits, cut to 16."""
    sizes, seed, step = (21, 9), 0x123456789ABCDEF, 6
    params, grads, exp_avgs, exp_avg_sqs = random_lists(unwatched.device, torch.bfloat16, moments, sizes)
    for tensor in (*grads, *exp_avgs, *exp_avg_sqs):
        tensor.zero_()
    before = [param.float() for param in params]
    operators.adamw_(
        unwatched, params, grads, exp_avgs, exp_avg_sqs, step=step, seed=seed, stochastic_rounding=True, **SETTINGS
    )
    decay = torch.tensor(1 - SETTINGS["lr"] * SETTINGS["weight_decay"], device=unwatched.device)
    for number, (param, old) in enumerate(zip(params, before, strict=True)):
        exact = (old * decay).view(torch.int32).tolist()
        for i, bits in enumerate(exact):
            words = philox((i // 8, 0, number, step), (seed & 0xFFFFFFFF, seed >> 32))
            noise = words[i % 8 // 2] >> 16 * (i % 2) & 0xFFFF
            assert param[i].view(torch.int16).item() & 0xFFFF == (bits & 0xFFFFFFFF) + noise >> 16


# --- muon_momentum_, muon_update_ ---


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (65, 129)], ids=str)
def test_muon_momentum(unwatched, shape, dtype, nesterov, place):
    check_muon_momentum(unwatched, shape, dtype, nesterov, place)


def check_muon_momentum(library, shape, dtype, nesterov, place):
    grads = place([torch.randn(shape, device=library.device).to(dtype) for _ in range(3)])
    buffers = place([torch.randn(shape, device=library.device) for _ in range(3)])
    expected_buffers = clone([buffers])[0]
    options = {"momentum": 0.9, "nesterov": nesterov, "return_norm": True}
    update, norms = operators.muon_momentum_(library, grads, buffers, **options)
    expected_update, expected_norms = reference.muon_momentum_(grads, expected_buffers, **options)
    torch.testing.assert_close(update, expected_update)
    torch.testing.assert_close(norms, update.double().flatten(1).norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
    for mine, other in zip(buffers, expected_buffers, strict=True):
        torch.testing.assert_close(mine, other)


def test_muon_momentum_same_bits_for_every_schedule(unwatched):
    grads, start = ([torch.randn(100, 97, device=unwatched.device) for _ in range(2)] for _ in range(2))
    results = []
    for schedule in range(4):
        buffers = clone([start])[0]
        update, norms = operators.muon_momentum_(
            unwatched, grads, buffers, momentum=0.95, return_norm=True, schedule=schedule
        )
        results.append([buffers, [update], [norms]])
        for mine, other in zip(results[-1], results[0], strict=True):
            assert_same_bits([mine], [other])


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (65, 129)], ids=str)
def test_muon_update(unwatched, shape, dtype, cautious, place):
    check_muon_update(unwatched, shape, dtype, cautious, place)


def check_muon_update(library, shape, dtype, cautious, place):
    params = place([torch.randn(shape, device=library.device).to(dtype) for _ in range(3)])
    expected = clone([params])[0]
    update = place([torch.randn(3, *shape, device=library.device)])[0]
    options = {"lr": 0.1, "weight_decay": 0.5, "scale": 3.0, "cautious": cautious}
    operators.muon_update_(library, params, update, **options)
    reference.muon_update_(expected, update, **options)
    for mine, other in zip(params, expected, strict=True):
        assert_near(mine, other)


def test_muon_reads_its_numbers_where_they_stand(library):
    def number(x):
        return torch.tensor(x, dtype=torch.float64, device=library.device)

    grads, start = ([torch.randn(70, 70, device=library.device)] for _ in range(2))
    buffers, others, params, other_params = (clone([start])[0] for _ in range(4))
    update = operators.muon_momentum_(library, grads, buffers, momentum=0.9)
    other = operators.muon_momentum_(library, grads, others, momentum=number(0.9))
    operators.muon_update_(library, params, update, lr=0.1, weight_decay=0.3)
    operators.muon_update_(library, other_params, update, lr=number(0.1), weight_decay=number(0.3))
    assert_same_bits([buffers, [update], params], [others, [other], other_params])


def test_muon_takes_more_matrices_than_a_table_holds(unwatched):
    count = 2003
    grads, buffers, params = ([torch.randn(3, device=unwatched.device) for _ in range(count)] for _ in range(3))
    expected_buffers, expected_params = clone([buffers, params])
    update, norms = operators.muon_momentum_(unwatched, grads, buffers, momentum=0.9, return_norm=True)
    operators.muon_update_(unwatched, params, update, lr=0.1)
    expected_update, expected_norms = reference.muon_momentum_(grads, expected_buffers, momentum=0.9, return_norm=True)
    reference.muon_update_(expected_params, expected_update, lr=0.1)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.stack(params), torch.stack(expected_params))


# --- softcap_cross_entropy ---


def exact_loss(logits, targets, softcap, ignore_index, scale):
    """Losses and `scale` times the gradient, in float64."""
    x = logits.double().requires_grad_()
    z = softcap * torch.tanh(x / softcap) if softcap else x
    ignored = targets == ignore_index
    chosen = z.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    losses = (z.logsumexp(1) - chosen).masked_fill(ignored, 0)
    return losses.detach(), torch.autograd.grad(losses.sum() * scale, x)[0]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 15.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 5, 64, 1000, 2051, 9000, 17_001])
def test_loss_and_gradient(unwatched, V, dtype, softcap, gradient):
    check_loss(unwatched, V, dtype, softcap, gradient)


def check_loss(library, V, dtype, softcap, gradient):
    rows = 4
    logits = (torch.randn(rows, V, device=library.device) * 8).to(dtype)
    targets = torch.randint(0, V, (rows,), device=library.device)
    targets[1] = -7
    scale = torch.tensor([0.25], device=library.device)
    expected, expected_gradient = exact_loss(logits, targets, softcap, -7, 0.25)
    before = logits.clone()
    loss = operators.softcap_cross_entropy(
        library,
        logits,
        targets,
        grad_scale=scale if gradient else None,
        softcap=softcap,
        ignore_index=-7,
        schedule=V % 4,
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=2e-5)
    if not gradient:
        assert torch.equal(logits, before)
        return
    precision = 2e-5 if dtype == torch.float32 else 5e-3  # 2^-8, and a quarter for the weights held in 16 bits
    torch.testing.assert_close(logits.double(), expected_gradient, rtol=precision, atol=1e-7)
    assert not logits[1].any()


def test_rows_that_are_out_of_the_ordinary(library):
    V = 300
    logits = torch.randn(6, V, device=library.device)
    logits[1, 5] = torch.inf
    logits[2, 7] = torch.nan
    logits[3, ::2] = -torch.inf
    targets = torch.tensor([0, 1, 2, 3, V, -2], device=library.device)
    for softcap in (0.0, 15.0):
        changed = logits.clone()
        scale = torch.ones(1, device=library.device)
        loss = operators.softcap_cross_entropy(library, changed, targets, grad_scale=scale, softcap=softcap)
        rows = [0, 3] + ([1] if softcap else [])
        expected, gradient = exact_loss(logits[rows], targets[rows], softcap, -1, 1.0)
        torch.testing.assert_close(loss[rows].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(changed[rows].double(), gradient, rtol=1e-5, atol=1e-6)
        for row in sorted({1, 2, 4, 5} - set(rows)):  # a target out of range says so, and touches nothing else
            assert loss[row].isnan()
            assert changed[row].isnan().any()


# --- under sanitizers ---

BF16, F32 = torch.bfloat16, torch.float32
WATCHED = {
    "adamw float32": lambda library: check_adamw(library, F32, F32, False),
    "adamw bfloat16": lambda library: check_adamw(library, BF16, BF16, True),
    "adamw unaligned": lambda library: check_adamw_alignment(library, BF16, F32, True),
    "muon_momentum": lambda library: check_muon_momentum(library, (64, 64), F32, True, list),
    "muon_momentum unaligned": lambda library: check_muon_momentum(library, (65, 129), BF16, False, moved),
    "muon_update": lambda library: check_muon_update(library, (64, 64), BF16, True, list),
    "muon_update unaligned": lambda library: check_muon_update(library, (65, 129), F32, False, moved),
    "loss": lambda library: check_loss(library, 2051, BF16, 15.0, True),
    "loss without softcap": lambda library: check_loss(library, 1000, F32, 0.0, True),
    "loss of one word": lambda library: check_loss(library, 1, BF16, 15.0, True),
    "loss of a long row": lambda library: check_loss(library, 70_001, BF16, 100.0, True),
}


@pytest.mark.parametrize("case", WATCHED)
def test_under_sanitizers(library, case):
    WATCHED[case](library)
