"""CUDA optimizers, loss, norms and rotation against their references: emulated, under sanitizers, and on a GPU."""

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


def moved_by_one(tensor):
    return moved([tensor])[0]


def only(index, change):
    """A place that changes one of the tensors."""
    return lambda tensors: [change(tensor) if i == index else tensor for i, tensor in enumerate(tensors)]


def assert_same_bits(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(mine, other, strict=True))


def empty_copies(params):
    return [torch.full_like(param, torch.nan, dtype=torch.bfloat16) for param in params]


def assert_are_copies(copies, params):
    assert_same_bits([copies], [[param.bfloat16() for param in params]])


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


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("cautious", [False, True])
def test_adamw_writes_copies(unwatched, cautious, place):
    check_adamw_copies(unwatched, cautious, place)


def check_adamw_copies(library, cautious, place):
    with_copies = random_lists(library.device, torch.float32, torch.float32)
    without, copies = clone(with_copies), place(empty_copies(with_copies[0]))
    operators.adamw_(library, *with_copies, copies=copies, step=3, cautious=cautious, schedule=1, **SETTINGS)
    operators.adamw_(library, *without, step=3, cautious=cautious, schedule=2, **SETTINGS)
    assert_same_bits(with_copies, without)
    assert_are_copies(copies, with_copies[0])


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


@pytest.mark.parametrize("multiprocessors", [2, 132])
def test_optimizers_do_not_depend_on_the_number_of_blocks(unwatched, multiprocessors):
    start = random_lists(unwatched.device, torch.float32, torch.float32)
    grads, buffers = ([torch.randn(129, 97, device=unwatched.device) for _ in range(3)] for _ in range(2))
    results = []
    for blocks in ({}, {"multiprocessors": multiprocessors}):
        lists, momentum_buffers = clone(start), clone([buffers])[0]
        operators.adamw_(unwatched, *lists, step=3, **SETTINGS, **blocks)
        update, norms = operators.muon_momentum_(
            unwatched, grads, momentum_buffers, momentum=0.9, return_norm=True, **blocks
        )
        params = clone([grads])[0]
        operators.muon_update_(unwatched, params, update, lr=0.1, weight_decay=0.2, **blocks)
        results.append([*lists, momentum_buffers, [update], [norms], params])
    assert_same_bits(*results)


def test_adamw_takes_more_tensors_than_a_table_holds(unwatched):
    sizes = [1 + i % 5 for i in range(745)]
    ours = random_lists(unwatched.device, torch.float32, torch.float32, sizes)
    expected, copies = clone(ours), empty_copies(ours[0])
    operators.adamw_(unwatched, *ours, copies=copies, step=1, **SETTINGS)
    assert_are_copies(copies, ours[0])
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


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (65, 129)], ids=str)
def test_muon_update_writes_copies(unwatched, shape, place):
    check_muon_copies(unwatched, shape, place)


def check_muon_copies(library, shape, place):
    params = [torch.randn(shape, device=library.device) for _ in range(3)]
    update = torch.randn(3, *shape, device=library.device)
    others, copies = clone([params])[0], place(empty_copies(params))
    options = {"lr": 0.1, "weight_decay": 0.5, "cautious": True}
    operators.muon_update_(library, params, update, copies=copies, schedule=1, **options)
    operators.muon_update_(library, others, update, schedule=2, **options)
    assert_same_bits([params], [others])
    assert_are_copies(copies, params)


# --- normuon_update_ ---

NORMUON = {"lr": 0.1, "weight_decay": 0.5, "scale": 3.0, "cautious": True, "beta2": 0.9, "norm_eps": 1e-6}


def lines_of(M, K):
    return (M, 1) if M >= K else (1, K)


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (64, 64), (65, 129), (300, 20), (20, 300), (1, 12)], ids=str)
def test_normuon_update(unwatched, shape, dtype, renormalise, place):
    check_normuon_update(unwatched, shape, dtype, renormalise, place)


def check_normuon_update(library, shape, dtype, renormalise, place):
    """Two updates; a zero line, a line below eps, and a zero matrix."""
    params = place([torch.randn(shape, device=library.device).to(dtype) for _ in range(3)])
    seconds = place([torch.zeros(lines_of(*shape), device=library.device) for _ in range(3)])
    copies = place(empty_copies(params)) if dtype == torch.float32 else None
    expected, expected_seconds = clone([params, seconds])
    for schedule in range(2):
        update = torch.randn(3, *shape, device=library.device)
        update[0, 0], update[0, :, -1], update[2] = 0, 1e-3 * update[0, :, -1], 0
        update = place([update])[0]
        options = {**NORMUON, "eps": 1e-4, "renormalise": renormalise}
        operators.normuon_update_(library, params, update, seconds, copies=copies, schedule=schedule, **options)
        reference.normuon_update_(expected, update, expected_seconds, **options)
    for mine, other in zip(params, expected, strict=True):
        assert_near(mine, other)
    for mine, other in zip(seconds, expected_seconds, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-12)
    if copies:
        assert_are_copies(copies, params)


@pytest.mark.parametrize("shape", [(100, 37), (37, 100)], ids=str)
def test_normuon_has_the_same_bits_for_every_schedule_and_reads_its_numbers_where_they_stand(unwatched, shape):
    start = [torch.randn(shape, device=unwatched.device) for _ in range(2)]
    seconds, update = [torch.rand(lines_of(*shape), device=unwatched.device) for _ in range(2)], torch.stack(start)
    numbers = {
        name: torch.tensor(NORMUON[name], dtype=torch.float64, device=unwatched.device)
        for name in ("lr", "weight_decay")
    }
    results = []
    for schedule, options in enumerate([{}, {}, {}, numbers]):
        ours = clone([start, seconds])
        operators.normuon_update_(
            unwatched, ours[0], update, ours[1], schedule=schedule, renormalise=True, **{**NORMUON, **options}
        )
        results.append(ours)
        for mine, other in zip(results[-1], results[0], strict=True):
            assert_same_bits([mine], [other])


def test_normuon_takes_more_matrices_than_a_table_holds(unwatched):
    params = [torch.randn(2, 3, device=unwatched.device) for _ in range(1303)]
    seconds = [torch.rand(1, 3, device=unwatched.device) for _ in params]
    update = torch.randn(len(params), 2, 3, device=unwatched.device)
    expected, expected_seconds = clone([params, seconds])
    copies = empty_copies(params)
    operators.normuon_update_(unwatched, params, update, seconds, copies=copies, **NORMUON)
    assert_are_copies(copies, params)
    reference.normuon_update_(expected, update, expected_seconds, **NORMUON)
    torch.testing.assert_close(torch.stack(params), torch.stack(expected))
    torch.testing.assert_close(torch.stack(seconds), torch.stack(expected_seconds))


def test_copies_are_rounded_to_the_nearest_and_ties_to_even(unwatched):
    bits = torch.arange(1 << 16, dtype=torch.int32, device=unwatched.device)
    for high in (0x3F80, 0x3F81, -0x3D01, 0x7F7F, 0):
        params = [(bits + (high << 16)).view(torch.float32)]
        before, copies = params[0].clone(), empty_copies(params)
        operators.muon_update_(unwatched, params, torch.zeros_like(params[0])[None], copies=copies, lr=0.0)
        assert torch.equal(params[0], before)
        assert_are_copies(copies, params)


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
    copies = empty_copies(params)
    update, norms = operators.muon_momentum_(unwatched, grads, buffers, momentum=0.9, return_norm=True)
    operators.muon_update_(unwatched, params, update, copies=copies, lr=0.1)
    assert_are_copies(copies, params)
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


# --- rms_norm, embedding_rms_norm ---

# A warp has one row; several, the last with a part; more than a block holds. With tails; a multiple of 4 but not of 8.
CHANNELS = (1, 7, 260, 768, 1280, 1281, 9001, 10_000)
ROWS = 5  # one more than a block has


def random_rows(library, C, dtype, *, rows=ROWS, place=list):
    return place([torch.randn(rows, C, device=library.device).to(dtype)])[0]


def assert_rounded(mine, exact):
    """One rounding of what float32 gives; `exact` is float64."""
    rtol = 2**-8 + 1e-5 if mine.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(mine.double(), exact, rtol=rtol, atol=2e-6)


def exact_norm(x):
    """(y, r) in float64."""
    x = x.double()
    r = (x.square().mean(-1) + operators.EPS).rsqrt()
    return x * r[..., None], r


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("kind", ["norm", "copy", "sum", "unwritten sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", CHANNELS)
def test_rms_norm(unwatched, C, dtype, kind, place):
    check_rms_norm(unwatched, C, dtype, kind, place)


def check_rms_norm(library, C, dtype, kind, place):
    x, residual = place([random_rows(library, C, dtype) * 3 for _ in range(2)])
    residual = residual if "sum" in kind else None
    total, y, r = operators.rms_norm(library, x, residual, with_sum=kind in ("copy", "sum"), schedule=C % 4)
    expected = x if residual is None else x + residual
    if total is not None:
        assert torch.equal(total, expected)
    exact, exact_r = exact_norm(expected)
    assert_rounded(y, exact)
    torch.testing.assert_close(r.double(), exact_r, rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("with_sum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", CHANNELS)
def test_rms_norm_backward(unwatched, C, dtype, with_sum, place):
    check_rms_norm_backward(unwatched, C, dtype, with_sum, place)


def check_rms_norm_backward(library, C, dtype, with_sum, place):
    dy, dsum, x = (random_rows(library, C, dtype) for _ in range(3))
    y, r = exact_norm(x * 3)
    y, r = y.to(dtype), r.float()
    dy, dsum, y = place([dy, dsum, y])
    dx = operators.rms_norm_backward(library, dy, y, r, dsum if with_sum else None, schedule=C % 4)
    dy, dsum, y = dy.double(), dsum.double(), y.double()
    exact = (dsum if with_sum else 0) + r.double()[:, None] * (dy - y * (dy * y).mean(1, keepdim=True))
    assert_rounded(dx, exact)


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", CHANNELS)
def test_embedding_rms_norm(unwatched, C, table_dtype, dtype, place):
    check_embedding(unwatched, C, table_dtype, dtype, place)


def check_embedding(library, C, table_dtype, dtype, place):
    """A token out of range makes its own row NaN."""
    V = 6
    table = random_rows(library, C, table_dtype, rows=V, place=place)
    tokens = torch.tensor([V - 1, -1, 0, V, 3, 3, 1 << 60], device=library.device)
    y, r = operators.embedding_rms_norm(library, tokens, table, dtype, schedule=C % 4)
    known = (tokens >= 0) & (tokens < V)
    exact, exact_r = exact_norm(table[tokens[known]].to(dtype))
    assert_rounded(y[known], exact)
    torch.testing.assert_close(r[known].double(), exact_r, rtol=1e-6, atol=0)
    assert y[~known].isnan().all()
    assert r[~known].isnan().all()


def test_norms_have_the_same_bits_for_every_schedule(unwatched):
    for dtype, C in ((torch.bfloat16, 1280), (torch.float32, 5000), (torch.float32, 260)):
        x, residual, dy = (random_rows(unwatched, C, dtype) for _ in range(3))
        results = []
        for schedule in range(4):
            total, y, r = operators.rms_norm(unwatched, x, residual, schedule=schedule)
            dx = operators.rms_norm_backward(unwatched, dy, y, r, residual, schedule=schedule)
            results.append([[total, y, r, dx]])
            assert_same_bits(results[-1], results[0])


def test_rows_of_zeros_infinities_and_nan(library):
    """They are what float64 makes of them, and touch no other row."""
    for dtype in (torch.float32, torch.bfloat16):
        x = random_rows(library, 300, dtype)
        x[1] = 0
        x[2, 7] = torch.inf
        x[3, 299] = torch.nan
        _, y, r = operators.rms_norm(library, x)
        exact, exact_r = exact_norm(x)
        rtol = 2**-8 + 1e-5 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=0, equal_nan=True)
        torch.testing.assert_close(r.double(), exact_r, rtol=1e-6, atol=0, equal_nan=True)


# --- add_value_embedding ---

# N, Hkv, D, I: a pack for every lane, fewer, more than a warp has lanes; tails; groups of heads that are not full; more
# rows than a block of the sums has.
VALUES = (
    (5, 3, 64, 12),
    (3, 6, 128, 12),
    (70, 5, 16, 7),
    (2, 1, 256, 64),
    (4, 9, 26, 5),
    (3, 2, 1, 1),
    (2, 2, 1100, 33),
)
VALUE_TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


def assert_near_sum(mine, exact, terms):
    """One rounding of a sum in float32; `terms` is the sum of the terms' magnitudes."""
    rtol = 2**-8 + 1e-5 if mine.dtype == torch.bfloat16 else 2e-6
    bound = rtol * exact.abs() + 2e-6 * terms + 1e-6
    assert ((mine.double() - exact).abs() <= bound).all(), (mine.double() - exact).abs().max()


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize(("dtype", "table_dtype"), VALUE_TYPES)
@pytest.mark.parametrize("sizes", VALUES, ids=str)
def test_value_embedding_and_its_gradient(unwatched, sizes, dtype, table_dtype, place):
    check_value_embedding(unwatched, sizes, dtype, table_dtype, place)


def check_value_embedding(library, sizes, dtype, table_dtype, place):
    """Ids out of range make their own rows NaN, and have no gradient."""
    (N, Hkv, D, I), V = sizes, 6  # noqa: E741
    like = {"device": library.device}
    v, dout, h = (torch.randn(shape, **like).to(dtype) for shape in ((N, Hkv, D), (N, Hkv, D), (N, I + 3)))
    gate, table = torch.randn(Hkv, I, **like) * I**-0.5, torch.randn(V, Hkv * D, **like).to(table_dtype)
    v, dout, h, gate, table = place([v, dout, h, gate, table])
    h = h[:, 1 : 1 + I]
    ids = torch.randint(0, V, (N,), **like)
    ids[0] = V - 1
    if N > 2:
        ids[1], ids[2] = -1, V + (1 << 60) * (N % 2)
    known = (ids >= 0) & (ids < V)
    schedule = D % 4
    out = operators.add_value_embedding(library, v, h, gate, table, ids, schedule=schedule)
    dh, dgate, drows = operators.add_value_embedding_backward(library, dout, h, gate, table, ids, schedule=schedule)
    wide, rows = h.double(), table.double()[ids.masked_fill(~known, 0)].view(N, Hkv, D)
    s = (wide @ gate.double().mT).sigmoid()[..., None]
    assert_rounded(out[known], (v.double() + 3 * s * rows)[known])
    assert out[~known].isnan().all()
    assert_rounded(drows[known], (3 * s * dout.double()).flatten(1)[known])
    terms = 3 * s * (1 - s) * dout.double() * rows * known[:, None, None]
    dz, sizes_of_dz = terms.sum(-1), terms.abs().sum(-1)
    assert_near_sum(dh, dz @ gate.double(), sizes_of_dz @ gate.double().abs())
    assert_near_sum(dgate, dz.mT @ wide, sizes_of_dz.mT @ wide.abs())


def test_value_embedding_of_no_rows_has_a_gradient_of_zero(unwatched):
    like = {"device": unwatched.device}
    none, ids = torch.empty(0, 2, 8, **like), torch.empty(0, dtype=torch.int64, **like)
    gate, table = torch.randn(2, 5, **like), torch.randn(3, 16, **like)
    arguments = torch.empty(0, 5, **like), gate, table, ids
    assert operators.add_value_embedding(unwatched, none, *arguments).shape == (0, 2, 8)
    _, dgate, _ = operators.add_value_embedding_backward(unwatched, none, *arguments)
    assert torch.equal(dgate, torch.zeros_like(gate))


def test_value_embedding_has_the_same_bits_for_every_schedule(unwatched):
    for dtype, table_dtype in VALUE_TYPES:
        N, Hkv, D, I = 150, 5, 32, 12  # noqa: E741
        like = {"device": unwatched.device}
        dout, h = (torch.randn(shape, **like).to(dtype) for shape in ((N, Hkv, D), (N, I)))
        gate, table = torch.randn(Hkv, I, **like), torch.randn(4, Hkv * D, **like).to(table_dtype)
        ids = torch.randint(0, 4, (N,), **like)
        results = []
        for schedule in range(4):
            out = operators.add_value_embedding(unwatched, dout, h, gate, table, ids, schedule=schedule)
            grads = operators.add_value_embedding_backward(unwatched, dout, h, gate, table, ids, schedule=schedule)
            results.append([[out, *grads]])
            assert_same_bits(results[-1], results[0])


# --- smear ---

# B, T, C, I: rows of a warp, of a block, longer ones, tails; one token; more rows than a block of the sums has.
SMEARED = (
    (2, 3, 64, 24),
    (1, 5, 1280, 24),
    (2, 2, 9001, 64),
    (3, 1, 30, 24),
    (2, 40, 70, 5),
    (1, 3, 1, 1),
    (1, 4, 260, 33),
)


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SMEARED, ids=str)
def test_smear_and_its_gradient(unwatched, sizes, dtype, place):
    check_smear(unwatched, sizes, dtype, place)


def check_smear(library, sizes, dtype, place):
    (B, T, C, I), like = sizes, {"device": library.device}  # noqa: E741
    x, dout = (torch.randn(B, T, C, **like).to(dtype) for _ in range(2))
    gate, smear_lambda = torch.randn(1, I, **like) * I**-0.5, torch.tensor([0.7], **like)
    x, dout, gate, smear_lambda = place([x, dout, gate, smear_lambda])
    arguments = x, gate, smear_lambda
    out = operators.smear(library, *arguments, schedule=C % 4)
    dx, dgate, dlambda = operators.smear_backward(library, dout, *arguments, schedule=C % 4)
    wide, ddout, w, factor = x.double(), dout.double(), gate.double(), smear_lambda.double()
    s = (wide[:, 1:, :I] @ w.mT).sigmoid()
    assert_rounded(out, torch.cat((wide[:, :1], wide[:, 1:] + factor * s * wide[:, :-1]), 1))
    assert torch.equal(out[:, 0], x[:, 0])
    products = ddout[:, 1:] * wide[:, :-1]
    dz, sizes_of_dz = (factor * s * (1 - s) * terms.sum(-1, keepdim=True) for terms in (products, products.abs()))
    exact, terms = ddout.clone(), ddout.abs()
    exact[:, :-1] += factor * s * ddout[:, 1:]
    exact[:, 1:, :I] += dz * w
    terms[:, 1:, :I] += sizes_of_dz * w.abs()
    assert_near_sum(dx, exact, terms)
    assert_near_sum(dgate, (dz * wide[:, 1:, :I]).sum((0, 1))[None], (sizes_of_dz * wide[:, 1:, :I].abs()).sum((0, 1)))
    assert_near_sum(dlambda, (s * products).sum()[None], (s * products.abs()).sum())


def test_smear_of_no_sequences_has_a_gradient_of_zero(unwatched):
    like = {"device": unwatched.device}
    arguments = torch.empty(0, 3, 30, **like), torch.randn(1, 24, **like), torch.ones(1, **like)
    assert operators.smear(unwatched, *arguments).shape == (0, 3, 30)
    _, dgate, dlambda = operators.smear_backward(unwatched, arguments[0], *arguments)
    assert not dgate.any()
    assert not dlambda.any()


def test_smear_has_the_same_bits_for_every_schedule(unwatched):
    for dtype, C in ((torch.bfloat16, 1280), (torch.float32, 70)):
        x, dout = (torch.randn(3, 50 if C == 70 else 4, C, device=unwatched.device).to(dtype) for _ in range(2))
        gate, smear_lambda = (torch.randn(shape, device=unwatched.device) for shape in ((1, 24), (1,)))
        results = []
        for schedule in range(4):
            out = operators.smear(unwatched, x, gate, smear_lambda, schedule=schedule)
            grads = operators.smear_backward(unwatched, dout, x, gate, smear_lambda, schedule=schedule)
            results.append([[out, *grads]])
            assert_same_bits(results[-1], results[0])


# --- mix_rms_norm ---


def factors(library):
    """x_scale and x0_scale."""
    return [torch.tensor([number], device=library.device) for number in (1.1, -0.3)]


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", CHANNELS)
def test_mix_rms_norm(unwatched, C, dtype, with_residual, place):
    check_mix_rms_norm(unwatched, C, dtype, with_residual, place)


def check_mix_rms_norm(library, C, dtype, with_residual, place, rows=ROWS):
    x, residual, x0 = place([random_rows(library, C, dtype, rows=rows) * 3 for _ in range(3)])
    residual = residual if with_residual else None
    scales = factors(library)
    z, mixed, y, r = operators.mix_rms_norm(library, x, residual, x0, *scales, schedule=C % 4)
    assert (z is None) == (residual is None)
    expected = x if residual is None else x + residual
    if z is not None:
        assert torch.equal(z, expected)
    x_scale, x0_scale = (scale.double() for scale in scales)
    assert_rounded(mixed, x_scale * expected.double() + x0_scale * x0.double())
    exact, exact_r = exact_norm(mixed)
    assert_rounded(y, exact)
    torch.testing.assert_close(r.double(), exact_r, rtol=1e-6, atol=0)


GRADIENTS = ("dz", "dmixed", "add_to")


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("given", [GRADIENTS, *((name,) for name in GRADIENTS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", CHANNELS)
def test_mix_rms_norm_backward(unwatched, C, dtype, given, place):
    check_mix_rms_norm_backward(unwatched, C, dtype, given, place)


def check_mix_rms_norm_backward(library, C, dtype, given, place, rows=ROWS):
    dy, dz, dmixed, add_to, z, x0, mixed = (random_rows(library, C, dtype, rows=rows) for _ in range(7))
    y, r = exact_norm(mixed * 3)
    y, r = y.to(dtype), r.float()
    dy, dz, dmixed, add_to, y, z, x0 = place([dy, dz, dmixed, add_to, y, z, x0])
    scales = factors(library)
    others = {name: tensor for name, tensor in zip(GRADIENTS, (dz, dmixed, add_to), strict=True) if name in given}
    dx, dx0, *of_factors = operators.mix_rms_norm_backward(library, dy, y, r, z, x0, *scales, **others, schedule=C % 4)
    dz, dmixed, add_to = (others[name].double() if name in given else 0 for name in GRADIENTS)
    dy, y, z, x0 = (tensor.double() for tensor in (dy, y, z, x0))
    x_scale, x0_scale = (scale.double() for scale in scales)
    ds = dmixed + r.double()[:, None] * (dy - y * (dy * y).mean(1, keepdim=True))
    assert_rounded(dx, x_scale * ds + dz)
    assert_rounded(dx0, x0_scale * ds + add_to)
    for mine, stream in zip(of_factors, (z, x0), strict=True):
        size = 1 + (ds * stream).abs().sum()  # of the terms, which cancel
        assert (mine.double() - (ds * stream).sum()).abs() <= 1e-6 * size


def test_the_gradients_of_factors_have_many_terms_or_none(library):
    """More rows than the last kernel has threads; and none."""
    check_mix_rms_norm_backward(library, 3, torch.float32, GRADIENTS, list, rows=2100)
    scales = factors(library)
    nothing = torch.empty(0, 3, device=library.device)
    r = torch.empty(0, device=library.device)
    *_, dx_scale, dx0_scale = operators.mix_rms_norm_backward(library, *[nothing] * 2, r, *[nothing] * 2, *scales)
    assert dx_scale.item() == dx0_scale.item() == 0


def test_mix_rms_norm_has_the_same_bits_for_every_schedule(unwatched):
    for dtype, C in ((torch.bfloat16, 1280), (torch.float32, 5000), (torch.float32, 100)):
        x, residual, x0, dy, dz, dmixed, add_to = (random_rows(unwatched, C, dtype) for _ in range(7))
        scales = factors(unwatched)
        results = []
        for schedule in range(4):
            z, mixed, y, r = operators.mix_rms_norm(unwatched, x, residual, x0, *scales, schedule=schedule)
            grads = operators.mix_rms_norm_backward(
                unwatched, dy, y, r, z, x0, *scales, dz=dz, dmixed=dmixed, add_to=add_to, schedule=schedule
            )
            results.append([[z, mixed, y, r, *grads]])
            assert_same_bits(results[-1], results[0])


# --- rotary_norm ---

# B, T, H, Hkv, D: one pack of a half, several, as many as a warp has lanes, more; no power of two; tails.
HEADS = (
    (2, 3, 3, 1, 64),
    (1, 5, 6, 6, 128),
    (1, 2, 5, 2, 256),
    (1, 2, 2, 1, 96),
    (1, 7, 4, 4, 16),
    (2, 3, 2, 2, 2),
    (1, 3, 9, 1, 26),
    (1, 1, 1, 1, 1100),
)


def exact_rotation(x, cos, sin):
    (x1, x2), cos, sin = x.double().chunk(2, -1), cos.double()[:, None], sin.double()[:, None]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1)


def dense(tensor):
    return tensor.contiguous()


def within_a_larger_tensor(tensor):
    """Between other heads, as where q, k and v are one product."""
    around = torch.full((*tensor.shape[:-2], tensor.size(-2) + 3, tensor.size(-1)), torch.nan, device=tensor.device)
    around = around.to(tensor.dtype)
    around[..., 1:-2, :] = tensor
    return around[..., 1:-2, :]


def heads_first(tensor):
    """Of memory (B, H, T, D)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def with_longer_rows(tensor):
    """One element between the tokens of (B, T, H, D), or the rows of (T, D / 2): only the first is aligned."""
    rows = tensor.flatten(2) if tensor.dim() == 4 else tensor
    room = rows.new_full((*rows.shape[:-1], rows.size(-1) + 1), torch.nan)
    room[..., :-1] = rows
    return room[..., :-1].view(tensor.shape)


LAYOUTS = (dense, moved_by_one, within_a_larger_tensor, heads_first)


def heads_and_angles(library, shape, dtype, layout):
    """q, k, dq_out, dk_out in a layout, cos and sin; `dense` has these as parts of wider tables."""
    B, T, H, Hkv, D = shape
    tensors = [layout(torch.randn(B, T, heads, D, device=library.device).to(dtype)) for heads in (H, Hkv, H, Hkv)]
    angles = torch.randn(T, D, device=library.device) * 3
    if layout is dense:
        return [*tensors, angles.cos()[:, : D // 2], angles.sin()[:, D // 2 :]]
    return [*tensors, *moved([angles[:, : D // 2].cos(), angles[:, : D // 2].sin()])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rotary_norm_and_its_gradient(unwatched, shape, dtype, layout):
    check_rotary_norm(unwatched, shape, dtype, layout)


def check_rotary_norm(library, shape, dtype, layout, place=list, scale=1.2):
    q, k, dq_out, dk_out, cos, sin = place(heads_and_angles(library, shape, dtype, layout))
    schedule = shape[-1] % 3
    results = operators.rotary_norm(library, q, k, cos, sin, scale=scale, schedule=schedule)
    grads = operators.rotary_norm_backward(library, dq_out, dk_out, *results, cos, sin, scale=scale, schedule=schedule)
    for x, dout, out, r, dx in zip((q, k), (dq_out, dk_out), results, results[2:], grads, strict=False):
        exact, exact_r = exact_norm(exact_rotation(x, cos, sin))
        assert_rounded(out, scale * exact)
        torch.testing.assert_close(r.double(), exact_r, rtol=1e-6, atol=0)
        n, dout = out.double() / scale, dout.double()
        dz = scale * r.double()[..., None] * (dout - n * (dout * n).mean(-1, keepdim=True))
        assert_rounded(dx, exact_rotation(dz, cos, -sin))


def test_rotary_norm_has_the_same_bits_for_every_schedule(unwatched):
    for dtype, layout in ((torch.bfloat16, dense), (torch.float32, moved_by_one)):
        q, k, dq_out, dk_out, cos, sin = heads_and_angles(unwatched, (1, 3, 5, 2, 128), dtype, layout)
        results = []
        for schedule in range(4):
            out = operators.rotary_norm(unwatched, q, k, cos, sin, schedule=schedule)
            grads = operators.rotary_norm_backward(unwatched, dq_out, dk_out, *out, cos, sin, schedule=schedule)
            results.append([[*out, *grads]])
            assert_same_bits(results[-1], results[0])


def test_heads_of_zeros_infinities_and_nan(library):
    q, k, *_, cos, sin = heads_and_angles(library, (1, 2, 4, 2, 64), torch.float32, dense)
    q[0, 0, 1] = 0
    q[0, 1, 2, 5] = torch.inf
    k[0, 0, 1, 40] = torch.nan
    results = operators.rotary_norm(library, q, k, cos, sin)
    for x, out, r in zip((q, k), results, results[2:], strict=False):
        exact, exact_r = exact_norm(exact_rotation(x, cos, sin))
        torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=2e-6, equal_nan=True)
        torch.testing.assert_close(r.double(), exact_r, rtol=1e-6, atol=0, equal_nan=True)


# --- relu_squared ---


@pytest.mark.parametrize("place", [list, moved])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 7, 4096, 8192, 20_003])
def test_relu_squared(unwatched, numel, dtype, in_place, place):
    check_relu_squared(unwatched, numel, dtype, in_place, place)


def check_relu_squared(library, numel, dtype, in_place, place):
    x, dy = (torch.randn(numel, device=library.device).to(dtype) for _ in range(2))
    start, start_dy = x.clone(), dy.clone()
    x, dy, y, dx = place([x, dy, *(torch.full_like(x, torch.nan) for _ in range(2))])
    y, dx = (x, dy) if in_place else (y, dx)
    operators.relu_squared(library, x, y, schedule=numel % 4)
    assert_rounded(y, start.double().relu().square())
    operators.relu_squared_backward(library, dy, y, dx, schedule=numel % 4)
    assert_rounded(dx, 2 * y.double().sqrt() * start_dy.double())
    if not in_place:
        assert torch.equal(x, start)
        assert torch.equal(dy, start_dy)


def test_relu_squared_of_zeros_infinities_nan_and_tiny_numbers(library):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30, 3e-20], device=library.device)
    y = torch.full_like(x, 7)
    operators.relu_squared(library, x, y)
    expected = x.relu().square()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0, equal_nan=True)
    dx = torch.full_like(x, 7)
    operators.relu_squared_backward(library, torch.ones_like(x), y, dx)
    torch.testing.assert_close(dx, 2 * expected.sqrt(), rtol=1e-6, atol=0, equal_nan=True)


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
    "adamw copies": lambda library: check_adamw_copies(library, False, list),
    "adamw copies unaligned": lambda library: check_adamw_copies(library, True, moved),
    "normuon_update tall": lambda library: check_normuon_update(library, (70, 33), F32, True, list),
    "normuon_update wide": lambda library: check_normuon_update(library, (70, 133), F32, False, moved),
    "normuon_update bfloat16": lambda library: check_normuon_update(library, (20, 36), BF16, True, list),
    "muon_update copies": lambda library: check_muon_copies(library, (64, 64), list),
    "muon_update copies unaligned": lambda library: check_muon_copies(library, (65, 129), moved),
    "loss": lambda library: check_loss(library, 2051, BF16, 15.0, True),
    "loss without softcap": lambda library: check_loss(library, 1000, F32, 0.0, True),
    "loss of one word": lambda library: check_loss(library, 1, BF16, 15.0, True),
    "loss of a long row": lambda library: check_loss(library, 70_001, BF16, 100.0, True),
    "rms_norm of a warp": lambda library: check_rms_norm(library, 260, F32, "sum", list),
    "rms_norm of a block": lambda library: check_rms_norm(library, 1280, BF16, "sum", list),
    "rms_norm unaligned": lambda library: check_rms_norm(library, 1281, BF16, "norm", moved),
    "rms_norm with a moved residual": lambda library: check_rms_norm(library, 64, F32, "sum", only(1, moved_by_one)),
    "rms_norm of a long row": lambda library: check_rms_norm(library, 9001, F32, "unwritten sum", list),
    "rms_norm_backward of a warp": lambda library: check_rms_norm_backward(library, 768, BF16, True, list),
    "rms_norm_backward of a block": lambda library: check_rms_norm_backward(library, 1280, F32, False, list),
    "rms_norm_backward unaligned": lambda library: check_rms_norm_backward(library, 9001, BF16, True, moved),
    "rms_norm_backward with a moved dsum": lambda library: check_rms_norm_backward(
        library, 64, BF16, True, only(1, moved_by_one)
    ),
    "rms_norm_backward with a moved y": lambda library: check_rms_norm_backward(
        library, 64, F32, False, only(2, moved_by_one)
    ),
    "embedding_rms_norm": lambda library: check_embedding(library, 1280, F32, BF16, list),
    "embedding_rms_norm unaligned": lambda library: check_embedding(library, 7, BF16, F32, moved),
    "value_embedding": lambda library: check_value_embedding(library, (3, 6, 128, 12), BF16, BF16, list),
    "value_embedding of a float32 table": lambda library: check_value_embedding(
        library, (70, 5, 16, 7), BF16, F32, list
    ),
    "value_embedding unaligned": lambda library: check_value_embedding(library, (4, 9, 26, 5), F32, F32, moved),
    "value_embedding of long heads": lambda library: check_value_embedding(library, (2, 2, 1100, 33), BF16, F32, list),
    "value_embedding with a moved v": lambda library: check_value_embedding(
        library, (5, 3, 64, 12), F32, F32, only(0, moved_by_one)
    ),
    "value_embedding with a moved dout": lambda library: check_value_embedding(
        library, (5, 3, 64, 12), F32, F32, only(1, moved_by_one)
    ),
    "value_embedding with a moved table": lambda library: check_value_embedding(
        library, (5, 3, 64, 12), F32, F32, only(4, moved_by_one)
    ),
    "smear of a warp": lambda library: check_smear(library, (2, 40, 70, 5), F32, list),
    "smear of a block": lambda library: check_smear(library, (1, 5, 1280, 24), F32, list),
    "smear of a long row": lambda library: check_smear(library, (2, 2, 9001, 64), BF16, list),
    "smear unaligned": lambda library: check_smear(library, (1, 4, 260, 33), BF16, moved),
    "smear with a moved x": lambda library: check_smear(library, (2, 3, 64, 24), F32, only(0, moved_by_one)),
    "smear with a moved dout": lambda library: check_smear(library, (2, 3, 64, 24), F32, only(1, moved_by_one)),
    "mix_rms_norm of a warp": lambda library: check_mix_rms_norm(library, 260, F32, True, list),
    "mix_rms_norm of a block": lambda library: check_mix_rms_norm(library, 1280, BF16, True, list),
    "mix_rms_norm unaligned": lambda library: check_mix_rms_norm(library, 1281, BF16, False, moved),
    "mix_rms_norm of a long row": lambda library: check_mix_rms_norm(library, 9001, F32, True, list),
    **{
        f"mix_rms_norm with a moved {name}": lambda library, index=index: check_mix_rms_norm(
            library, 64, F32, True, only(index, moved_by_one)
        )
        for index, name in enumerate(("x", "residual", "x0"))
    },
    "mix_rms_norm_backward of a warp": lambda library: check_mix_rms_norm_backward(library, 256, F32, GRADIENTS, list),
    "mix_rms_norm_backward of a block": lambda library: check_mix_rms_norm_backward(library, 1280, BF16, (), list),
    "mix_rms_norm_backward of a long row": lambda library: check_mix_rms_norm_backward(
        library, 9001, BF16, GRADIENTS, moved
    ),
    **{
        f"mix_rms_norm_backward with a moved {name}": lambda library, index=index: check_mix_rms_norm_backward(
            library, 64, BF16, GRADIENTS, only(index, moved_by_one)
        )
        for index, name in enumerate(("dy", *GRADIENTS, "y", "z", "x0"))
    },
    "rotary_norm": lambda library: check_rotary_norm(library, (1, 5, 6, 6, 128), BF16, dense),
    "rotary_norm of grouped heads": lambda library: check_rotary_norm(library, (2, 3, 3, 1, 64), F32, heads_first),
    "rotary_norm between others": lambda library: check_rotary_norm(
        library, (1, 2, 2, 1, 96), BF16, within_a_larger_tensor
    ),
    "rotary_norm unaligned": lambda library: check_rotary_norm(library, (1, 3, 9, 1, 26), BF16, moved_by_one),
    **{
        f"rotary_norm, {case}": lambda library, index=index, change=change: check_rotary_norm(
            library, (1, 3, 2, 2, 64), BF16, dense, only(index, change)
        )
        for case, index, change in (
            ("k moved", 1, moved_by_one),
            ("dk_out moved", 3, moved_by_one),
            ("longer rows of q", 0, with_longer_rows),
            ("longer rows of dk_out", 3, with_longer_rows),
            ("longer rows of cos", 4, with_longer_rows),
            ("longer rows of sin", 5, with_longer_rows),
        )
    },
    "relu_squared": lambda library: check_relu_squared(library, 8192, F32, False, list),
    "relu_squared in place": lambda library: check_relu_squared(library, 20_003, BF16, True, list),
    "relu_squared unaligned": lambda library: check_relu_squared(library, 7, BF16, False, moved),
    "relu_squared with a moved y": lambda library: check_relu_squared(library, 4096, F32, False, only(2, moved_by_one)),
    "relu_squared with a moved dx": lambda library: check_relu_squared(
        library, 8192, BF16, False, only(3, moved_by_one)
    ),
}


@pytest.mark.parametrize("case", WATCHED)
def test_under_sanitizers(library, case):
    WATCHED[case](library)
