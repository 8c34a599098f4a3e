"""normuon_update_, the norms of rows of muon_momentum_, and rows equilibrated by newton_schulz."""

import math

import pytest
import torch
from backends import BACKENDS
from tensor_lists import assert_lists_equal, clone, number, unaligned

from nanochat_native import ops
from nanochat_native.ops import reference

RATES = {"lr": 0.1, "weight_decay": 0.5, "scale": 1.5}
SHAPES = [(24, 7), (7, 24), (70, 133), (133, 70), (40, 40), (1, 24), (24, 1), (2, 12), (1, 1)]


def lines_of(shape):
    """The shape of the second momentum."""
    *stack, M, K = shape
    return (*stack, M, 1) if M >= K else (*stack, 1, K)


def by_the_formulas(o, second, beta2, eps, renormalise, norm_eps):
    """w and the second momentum of one matrix, line by line, in float64."""
    o = o.double()
    if renormalise:
        o = o * (math.sqrt(min(o.shape)) / max(o.norm().item(), norm_eps))
    lines = o if o.size(0) >= o.size(1) else o.T
    second = [
        beta2 * s + (1 - beta2) * (line**2).mean() for s, line in zip(second.flatten().double(), lines, strict=True)
    ]
    w = torch.stack([line / math.sqrt(max(s, eps)) for s, line in zip(second, lines, strict=True)])
    w = w * (o.norm() / w.norm()) if w.norm() else w
    return w if o.size(0) >= o.size(1) else w.T, torch.stack(second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_updates_by_the_formulas(shape, dtype, cautious, renormalise, backend):
    """Some lines are below eps, some are zero; the matrices have their own scales."""
    ops.use_backend(backend)
    params = [torch.randn(shape).to(dtype) for _ in range(3)]
    seconds = [torch.zeros(lines_of(shape)) for _ in range(3)]
    settings = {"beta2": 0.9, "eps": 1e-4, "renormalise": renormalise, "norm_eps": 1e-6}
    for _ in range(2):
        update = torch.randn(3, *shape) / math.sqrt(max(shape))
        update[1] *= 1e-2
        if min(shape) > 1:
            update[0, 0], update[0, :, -1] = 0, 1e-3 * update[0, :, -1]
        kept, expected = update.clone(), []
        for param, change, second in zip(params, update, seconds, strict=True):
            w, new = by_the_formulas(change, second, **settings)
            p = param.double()
            decayed = torch.where((w * p >= 0) | (not cautious), 0.95 * p, p)
            expected.append(((decayed - 0.15 * w).to(dtype), new))
        ops.normuon_update_(params, update, seconds, cautious=cautious, **RATES, **settings)
        assert torch.equal(update, kept)
        for param, second, (p, s) in zip(params, seconds, expected, strict=True):
            tolerance = 2e-6 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(param, p, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(second.flatten().double(), s, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 9, 33), (2, 2, 33, 9)], ids=str)
def test_a_parameter_of_several_matrices(shape, backend):
    ops.use_backend(backend)
    params, seconds, update = [torch.randn(shape)], [torch.rand(lines_of(shape))], torch.randn(1, *shape)
    apart, apart_seconds = ([matrix.clone() for matrix in tensors[0].flatten(0, -3)] for tensors in (params, seconds))
    ops.normuon_update_(params, update, seconds, renormalise=True, **RATES)
    ops.normuon_update_(apart, update.flatten(0, -3), apart_seconds, renormalise=True, **RATES)
    torch.testing.assert_close(params[0].flatten(0, -3), torch.stack(apart))
    torch.testing.assert_close(seconds[0].flatten(0, -3), torch.stack(apart_seconds))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_eps", [0.0, 1e-6])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9)], ids=str)
def test_a_zero_matrix_decays_and_a_nan_stays_in_its_matrix(shape, norm_eps, backend):
    ops.use_backend(backend)
    params, seconds = [torch.ones(shape) for _ in range(3)], [torch.ones(lines_of(shape)) for _ in range(3)]
    update = torch.randn(3, *shape)
    update[0] = 0
    update[1, 3, 2] = torch.nan
    ops.normuon_update_(
        params, update, seconds, beta2=0.75, renormalise=True, norm_eps=norm_eps, cautious=True, **RATES
    )
    assert torch.equal(params[0], torch.full(shape, 0.95))
    assert torch.equal(seconds[0], torch.full(lines_of(shape), 0.75))
    assert params[1].isnan().all()
    assert not params[2].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_in_tensors_and_copies(backend):
    ops.use_backend(backend)
    update = torch.randn(2, 8, 13)
    results = []
    for kind, with_copies in ((float, False), (number, True)):
        torch.manual_seed(0)
        params, seconds = [torch.randn(8, 13) for _ in range(2)], [torch.zeros(1, 13) for _ in range(2)]
        copies = [torch.zeros(8, 13).bfloat16() for _ in range(2)] if with_copies else None
        versions = [tensor._version for tensor in (*params, *seconds)]
        rates = {"lr": kind(0.1), "weight_decay": kind(0.5)}
        ops.normuon_update_(params, update, seconds, scale=1.5, copies=copies, **rates)
        assert all(t._version > before for t, before in zip((*params, *seconds), versions, strict=True))
        if copies:
            assert_lists_equal([copies], [[param.bfloat16() for param in params]])
        results.append([params, seconds])
    assert_lists_equal(*results)


@pytest.mark.parametrize("shape", [(133, 70), (70, 133), (300, 5), (5, 300)], ids=str)
def test_the_bits_depend_neither_on_threads_nor_on_alignment_nor_on_the_other_matrices(shape):
    """Ranks hold different numbers of matrices."""
    grads, buffers, params = ([torch.randn(shape) for _ in range(5)] for _ in range(3))
    seconds = [torch.rand(lines_of(shape)) for _ in range(5)]

    def run(grads, buffers, params, seconds):
        update, norms = ops.muon_momentum_(grads, buffers, momentum=0.9, return_norm="rows")
        update = ops.newton_schulz(update, row_norms=norms, equilibrate_rows=True, norm_eps=1e-6)
        ops.normuon_update_(params, update, seconds, renormalise=True, norm_eps=1e-6, **RATES)
        return [buffers, params, seconds]

    expected = run(*clone([grads, buffers, params, seconds]))
    for move, threads in ((list, 1), (list, 3), (unaligned, 2)):
        torch.set_num_threads(threads)
        moved = [move(tensors) for tensors in clone([grads, buffers, params, seconds])]
        assert_lists_equal(run(*moved), expected)
    alone = [run(*([tensors[i].clone()] for tensors in (grads, buffers, params, seconds))) for i in range(5)]
    assert_lists_equal([[each[k][0] for each in alone] for k in range(3)], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (5, 7), (64, 33), (2, 30, 40), (0, 4), (4, 0)], ids=str)
def test_momentum_with_the_norms_of_rows(shape, dtype, backend):
    ops.use_backend(backend)
    grads = [torch.randn(shape).to(dtype) * 10.0**exponent for exponent in (0, 3, -25)]
    buffers, others = ([torch.zeros(shape) for _ in range(3)] for _ in range(2))
    alone = ops.muon_momentum_(grads, others, momentum=0.9)
    update, norms = ops.muon_momentum_(grads, buffers, momentum=0.9, return_norm="rows")
    torch.testing.assert_close(update, alone, rtol=1e-6, atol=0)
    for buffer, other in zip(buffers, others, strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-6, atol=0)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, torch.linalg.vector_norm(update.double(), dim=-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 24, 7), (3, 7, 24), (2, 2, 70, 133), (3, 1, 12)], ids=str)
def test_equilibrated_rows_by_the_formulas(shape, dtype, known, backend):
    """Rows, and one matrix, near norm_eps and below it."""
    ops.use_backend(backend)
    g = torch.randn(shape, dtype=dtype)
    g[0] *= 1e-5
    g[..., 0, :] *= 1e-4
    row_norms = torch.linalg.vector_norm(g.double(), dim=-1, keepdim=True)
    x = g.double() * torch.linalg.matrix_norm(g.double(), keepdim=True) / math.sqrt(shape[-2])
    x = x / row_norms.clamp_min(1e-6)
    x = x / (1.01 * torch.linalg.matrix_norm(x, keepdim=True) + 1e-6)
    found = ops.newton_schulz(
        g,
        coefficients="polar_express",
        row_norms=row_norms[..., 0] if known else None,
        equilibrate_rows=True,
        norm_eps=1e-6,
    )
    ones = torch.ones(shape[:-2], dtype=torch.float64)
    expected = reference.newton_schulz(x, coefficients=reference.COEFFICIENTS["polar_express"], norms=ones)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_norm_eps_without_equilibration():
    g = torch.randn(2, 6, 9)
    one_step = {"steps": 1, "coefficients": [(1.0, 0.0, 0.0)]}
    norms = torch.linalg.matrix_norm(g.double())
    expected = g / (norms + 0.5)[:, None, None].float()
    for options in ({}, {"norms": norms}, {"row_norms": torch.linalg.vector_norm(g.double(), dim=-1)}):
        for backend in BACKENDS:
            ops.use_backend(backend)
            torch.testing.assert_close(ops.newton_schulz(g, norm_eps=0.5, **options, **one_step), expected)


def test_equilibrated_rows_are_differentiable_in_plain_torch():
    g = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda g: ops.newton_schulz(g, equilibrate_rows=True, norm_eps=1e-6, coefficients="cubic"), (g,)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend):
    ops.use_backend(backend)
    param, update, second = torch.zeros(3, 4), torch.zeros(1, 3, 4), torch.zeros(1, 4)
    for arguments, options, error, words in (
        (
            ([torch.zeros(3)], torch.zeros(1, 3), [second]),
            {},
            ValueError,
            r"params must have shape \(..., M, K\), got \(3,\)",
        ),
        (([param], update, []), {}, ValueError, "second_momentums must have the length of params, 1, got 0"),
        (([param], update, [torch.zeros(3, 1)]), {}, ValueError, r"must have shape \(1, 4\), got \(3, 1\)"),
        (([param], update, [second.double()]), {}, TypeError, r"second_momentums\[0\] must be torch.float32"),
        (([param], update, [second]), {"beta2": 1.0}, ValueError, r"beta2 must be >= 0 and < 1, got 1\.0"),
        (([param], update, [second]), {"eps": -1.0}, ValueError, r"eps must be >= 0, got -1\.0"),
        (([param], update, [second]), {"norm_eps": -1.0}, ValueError, r"norm_eps must be >= 0, got -1\.0"),
    ):
        with pytest.raises(error, match=words):
            ops.normuon_update_(*arguments, lr=0.1, **options)
    g, norms = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.float64)
    for options, error, words in (
        ({"row_norms": norms[0]}, ValueError, r"row_norms must have shape \(2, 3\), that of g without K, got \(3,\)"),
        ({"row_norms": norms.float()}, TypeError, "row_norms must be torch.float64, got torch.float32"),
        ({"row_norms": norms, "norms": norms[:, 0]}, ValueError, "norms and row_norms exclude each other, got both"),
        ({"norm_eps": -1.0}, ValueError, r"norm_eps must be a finite number >= 0, got -1\.0"),
        ({"norm_eps": math.nan}, ValueError, "norm_eps must be a finite number >= 0, got nan"),
    ):
        with pytest.raises(error, match=words):
            ops.newton_schulz(g, **options)
    with pytest.raises(ValueError, match="row_norms"):
        ops.newton_schulz(g.requires_grad_(), row_norms=norms)
    for grads, return_norm, words in (
        ([torch.zeros(())], "rows", "grads must have rows"),
        ([param], "columns", "return_norm must be False, True or 'rows', got 'columns'"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.muon_momentum_(grads, clone([grads])[0], momentum=0.9, return_norm=return_norm)


def test_the_raw_operators_check_too():
    raw = torch.ops.nanochat_native
    param, update, second = torch.zeros(3, 4), torch.zeros(1, 3, 4), torch.zeros(1, 4)
    rest = (0.1, 0.0, 1.0, False, 0.9, 0.0, False, 0.0, None, None)
    for seconds, words in (
        ([torch.zeros(3, 1)], r"second_momentums must have shape \[1, 4\], got \[3, 1\]"),
        ([], "second_momentums must have 1 tensors, as params, got 0"),
        ([torch.zeros(1, 8)[:, ::2]], "second_momentums must be contiguous"),
        ([param[:1]], "share memory"),
    ):
        with pytest.raises(ValueError, match=words):
            raw.normuon_update_([param], update, seconds, [], *rest)
    scales = torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="norms and scales exclude each other"):
        raw.newton_schulz(update, [1.0, 2.0, 3.0], 1.0, scales[:, 0], scales)
    with pytest.raises(ValueError, match="scales must have shape"):
        raw.newton_schulz(update, [1.0, 2.0, 3.0], 1.0, None, torch.zeros(1, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="with_row_norms needs grads with rows"):
        raw.muon_momentum_([torch.zeros(())], [torch.zeros(())], 0.9, True, False, None, True)
    assert second.eq(0).all()


def test_opcheck_and_compile():
    raw = torch.ops.nanochat_native
    for shape in ((9, 5), (5, 9)):
        params, update = [torch.randn(shape) for _ in range(2)], torch.randn(2, *shape)
        seconds = [torch.rand(lines_of(shape)) for _ in range(2)]
        for copies in ([], [torch.zeros(shape).bfloat16() for _ in range(2)]):
            for tail in ((None, None), (number(0.1), number(0.2))):
                torch.library.opcheck(
                    raw.normuon_update_.default,
                    (params, update, seconds, copies, 0.1, 0.1, 1.0, True, 0.9, 1e-10, True, 1e-6, *tail),
                )
        torch.library.opcheck(
            raw.muon_momentum_.default, (params, [torch.zeros(shape) for _ in range(2)], 0.9, True, False, None, True)
        )
        scales = torch.rand(2, shape[0], dtype=torch.float64)
        torch.library.opcheck(raw.newton_schulz.default, (update, [3.0, -4.0, 2.0], 1.0, None, scales))

    def step(grads, buffers, params, seconds):
        update, norms = ops.muon_momentum_(grads, buffers, momentum=0.9, return_norm="rows")
        update = ops.newton_schulz(update, row_norms=norms, equilibrate_rows=True, norm_eps=1e-6)
        ops.normuon_update_(params, update, seconds, renormalise=True, norm_eps=1e-6, **RATES)

    state = [[torch.randn(9, 5) for _ in range(2)] for _ in range(3)] + [[torch.zeros(9, 1) for _ in range(2)]]
    ours, theirs = clone(state), clone(state)
    step(*ours)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*theirs)
    assert_lists_equal(ours, theirs)
