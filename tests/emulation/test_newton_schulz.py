"""The CUDA kernels of Newton-Schulz against float64: emulated, under sanitizers, on a GPU; both paths, both forms."""

import operator_calls as operators
import pytest
import torch
import torch_reference

from nanochat_native.ops import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PATHS, FORMS = ["sm_80", "sm_90a"], ["plain", "gram"]
NAMES = ["quintic", "polar_express", "cubic"]

# Of the error that bfloat16 has in the plain form; and the least bound, for matrices of few numbers.
SHARE, LEAST = {"plain": 0.3, "gram": 0.6}, {"plain": 4e-3, "gram": 3e-2}


class NewtonSchulz:
    """The operator on one path."""

    def __init__(self, kernels, path):
        self.library, self.device, self.hopper = operators.Operators(kernels), kernels.device, path == "sm_90a"
        if self.device == "cuda" and self.hopper and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")

    def __call__(self, g, **options):
        return operators.newton_schulz(self.library, g, hopper=self.hopper, **options)


@pytest.fixture(params=PATHS)
def newton_schulz(kernels, request):
    return NewtonSchulz(kernels, request.param)


@pytest.fixture(params=PATHS)
def unwatched(unwatched_kernels, request):
    return NewtonSchulz(unwatched_kernels, request.param)


@pytest.fixture
def plan(unwatched_kernels):
    library = operators.Operators(unwatched_kernels)

    def ask(M, K, **options):
        return operators.newton_schulz_plan(library, torch.zeros(M, K, device=library.device), **options)

    return ask


def relative_error(mine, exact):
    return ((mine.double() - exact).norm() / exact.norm()).item()


def check(newton_schulz, g, form, *, steps=5, coefficients="quintic", share=None, least=None, **options):
    """Not beyond a share of the error of the same steps in bfloat16."""
    out = newton_schulz(g, form=form, steps=steps, coefficients=coefficients, **options)
    exact = reference.newton_schulz(g.double().cpu(), steps=steps, coefficients=coefficients)
    triples, norm_factor = reference.newton_schulz_schedule(steps, coefficients)
    in_bfloat16 = relative_error(torch_reference.newton_schulz_in(BF16, g.cpu(), triples, norm_factor), exact)
    least = LEAST[form] if least is None else least
    assert relative_error(out.cpu(), exact) <= max((share or SHARE[form]) * in_bfloat16, least)
    return out


# --- results ---

SHAPES = [
    (1, 1),
    (1, 9),
    (9, 1),
    (2, 3, 5),
    (64, 64),
    (3, 37, 100),
    (3, 100, 37),
    (127, 129),
    (130, 200),
    (200, 130),
    (128, 256),
    (2, 264, 70),
    (300, 290),
    (17, 300),
    (300, 17),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(unwatched, shape, form):
    check(unwatched, torch.randn(shape, device=unwatched.device), form)


def decaying(M, K, decades):
    """A matrix whose singular values decay geometrically over that many decades."""
    r = min(M, K)
    u, _ = torch.linalg.qr(torch.randn(M, r, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(K, r, dtype=torch.float64))
    return (u * torch.logspace(0, -decades, r, dtype=torch.float64) @ v.T).float()


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (64, 250), (250, 64)], ids=str)
@pytest.mark.parametrize("decades", [0, 1, 3, 6])
def test_error_on_flat_and_decaying_spectra(unwatched, decades, shape, form, coefficients):
    """From 64 singular values on, where the Gram form may be chosen, there is no excuse for few numbers."""
    check(unwatched, decaying(*shape, decades).to(unwatched.device), form, coefficients=coefficients, least=0.0)


@pytest.mark.parametrize("form", FORMS)
def test_sixteen_bits_round_as_the_formula_says(unwatched, form):
    """Against the same products rounded to float16, in the plain form: nothing else is lost."""
    g = torch.randn(2, 140, 90, device=unwatched.device)
    triples, _ = reference.newton_schulz_schedule(5, "quintic")
    rounded = torch_reference.newton_schulz_in(F16, g.cpu(), triples)
    exact = reference.newton_schulz(g.double().cpu())
    mine = relative_error(unwatched(g, form=form).cpu(), exact)
    assert mine <= {"plain": 1.15, "gram": 4.0}[form] * relative_error(rounded, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_steps(unwatched, steps, form):
    check(unwatched, torch.randn(40, 90, device=unwatched.device), form, steps=steps)


def test_given_triples(unwatched):
    g = torch.randn(50, 70, device=unwatched.device)
    triples = [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (1.0, 0.0, 0.0)]
    for form in FORMS:
        check(unwatched, g, form, steps=3, coefficients=triples, least=1e-3)


GROWING = [(20.0, -25.0, 6.0), (8.0, -10.0, 3.0), (4.0, -5.0, 2.0)]


def test_more_steps_on_a_later_gram_matrix_than_on_the_first(unwatched):
    check(unwatched, torch.randn(2, 140, 64, device=unwatched.device), "gram", steps=3, coefficients=GROWING)


def test_coefficients_beyond_float16(unwatched, plan):
    """Numbers up to 1e8: products of bfloat16, with its error."""
    g, triples = torch.randn(40, 70, device=unwatched.device), [(1e4, 0.0, 0.0), (1e4, 1.0, 0.0)]
    assert set(plan(40, 70, steps=2, coefficients=triples).float16.values()) == {False}
    check(unwatched, g, "plain", steps=2, coefficients=triples, share=1.5)


@pytest.mark.parametrize("form", FORMS)
def test_zero_nan_and_infinity_stay_in_their_matrix(unwatched, form):
    g = torch.randn(5, 70, 40, device=unwatched.device)
    g[1] = 0
    clean = unwatched(g, form=form)
    g[2, 3, 1], g[3, 0, 0] = torch.nan, torch.inf
    out = unwatched(g, form=form)
    assert torch.equal(out[[0, 4]], clean[[0, 4]])
    assert torch.count_nonzero(out[1]) == 0
    assert out[2].isnan().all()
    assert not out[3].isfinite().any()


@pytest.mark.parametrize("exponent", [-60, -1, 60])
def test_result_does_not_depend_on_the_scale(unwatched, exponent):
    g = torch.randn(2, 24, 40, device=unwatched.device)
    assert torch.equal(unwatched(g * 2.0**exponent), unwatched(g))


def test_known_norms(unwatched):
    g = (
        torch.randn(3, 24, 41, device=unwatched.device)
        * torch.tensor([1e-9, 1.0, 1e9], device=unwatched.device)[:, None, None]
    )
    norms = torch.linalg.matrix_norm(g.double())
    torch.testing.assert_close(unwatched(g, norms=norms), unwatched(g), rtol=1e-2, atol=1e-3)
    one_step = {"steps": 1, "coefficients": [(1.0, 0.0, 0.0)]}
    halved = unwatched(g, norms=2 * norms, **one_step)
    torch.testing.assert_close(2 * halved, unwatched(g, **one_step), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 24, 41), (2, 70, 33)], ids=str)
def test_scales_of_rows(unwatched, shape):
    g = torch.randn(shape, device=unwatched.device)
    scales = torch.rand(shape[:-1], dtype=torch.float64, device=unwatched.device) / g[0].numel() ** 0.5
    scales[0, 3] = 0
    one_step = {"steps": 1, "coefficients": [(1.0, 0.0, 0.0)]}
    scaled = g * scales[..., None].float()
    torch.testing.assert_close(unwatched(g, scales=scales, **one_step), scaled, rtol=1e-3, atol=1e-6)
    norms = torch.ones(shape[0], dtype=torch.float64, device=unwatched.device)
    torch.testing.assert_close(unwatched(g, scales=scales), unwatched(scaled, norms=norms), rtol=1e-2, atol=1e-3)


def test_norms_of_large_matrices(unwatched):
    """Summed by many blocks of threads."""
    g = torch.randn(2, 3, 7_001, device=unwatched.device)
    out = unwatched(g, steps=1, coefficients=[(1.0, 0.0, 0.0)])
    torch.testing.assert_close(torch.linalg.matrix_norm(out), torch.ones(2, device=unwatched.device), rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_for_every_schedule_address_and_number_of_multiprocessors(unwatched, form):
    start = torch.randn(2, 150, 131)
    room = torch.empty(start.numel() + 1, device=unwatched.device)
    first = None
    for schedule, (multiprocessors, offset) in enumerate([(2, 0), (1, 1), (7, 0)]):
        g = room[offset : offset + start.numel()].view(start.shape)
        g.copy_(start)
        out = unwatched(g, form=form, multiprocessors=multiprocessors, schedule=schedule)
        first = out if first is None else first
        assert torch.equal(out, first)


@pytest.mark.slow
def test_many_tiles(unwatched):
    """Results of three rows of tiles of Hopper's kernels, and more tiles than blocks of threads."""
    g = torch.randn(2, 540, 530, device=unwatched.device)
    out = check(unwatched, g, "plain", steps=1, multiprocessors=2)
    assert torch.equal(unwatched(g, form="plain", steps=1, multiprocessors=10), out)


# --- into parameters ---


def check_update(newton_schulz, shape, dtype, cautious, form=None, count=3, steps=5):
    update = torch.randn(count, *shape, device=newton_schulz.device)
    params = [torch.randn(shape, device=update.device).to(dtype) for _ in range(count)]
    expected = [param.clone() for param in params]
    rates = {"lr": 0.1, "weight_decay": 0.5, "scale": 3.0, "cautious": cautious}
    reference.muon_update_(expected, newton_schulz(update, form=form, steps=steps), **rates)
    newton_schulz(update, form=form, steps=steps, params=params, **rates)
    for mine, other in zip(params, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=2e-5 if dtype == F32 else 2**-7)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(5, 7), (40, 64), (140, 33), (70, 128)], ids=str)
def test_update_of_parameters(unwatched, shape, dtype, cautious):
    check_update(unwatched, shape, dtype, cautious)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(5, 7), (40, 64), (140, 34), (70, 128)], ids=str)
def test_update_writes_copies(unwatched, shape, offset):
    check_copies(unwatched, shape, offset)


def check_copies(newton_schulz, shape, offset, steps=5):
    """Copies `offset` elements behind an aligned address."""
    update = torch.randn(3, *shape, device=newton_schulz.device)
    params = [torch.randn(shape, device=update.device) for _ in range(3)]
    others = [param.clone() for param in params]
    rooms = [torch.full((param.numel() + offset,), torch.nan, dtype=BF16, device=update.device) for param in params]
    copies = [room[offset:].view(shape) for room in rooms]
    rates = {"lr": 0.1, "weight_decay": 0.5, "scale": 3.0, "cautious": True, "steps": steps}
    newton_schulz(update, params=params, copies=copies, **rates)
    newton_schulz(update, params=others, **rates)
    for param, other, kept in zip(params, others, copies, strict=True):
        assert torch.equal(param, other)
        assert torch.equal(kept, param.to(BF16))


def test_update_in_the_gram_form(unwatched):
    check_update(unwatched, (64, 140), F32, False, "gram")


def test_update_reads_its_numbers_where_they_stand(unwatched):
    update = torch.randn(1, 20, 30, device=unwatched.device)
    results = []
    for number in (float, lambda x: torch.tensor(x, dtype=torch.float64, device=unwatched.device)):
        param = torch.ones(20, 30, device=unwatched.device)
        unwatched(update, params=[param], lr=number(0.1), weight_decay=number(0.3))
        results.append(param)
    assert torch.equal(*results)


@pytest.mark.slow
def test_more_matrices_than_a_launch_takes(unwatched_kernels):
    newton_schulz = NewtonSchulz(unwatched_kernels, "sm_80")
    g = torch.randn(515, 3, 5, device=newton_schulz.device)
    norms, params = torch.linalg.matrix_norm(g.double()), [torch.zeros_like(matrix) for matrix in g]
    copies = [torch.zeros_like(matrix, dtype=BF16) for matrix in g]
    newton_schulz(g, norms=norms, params=params, copies=copies, lr=1.0, steps=1, coefficients=[(-1.0, 0.0, 0.0)])
    assert all(torch.equal(kept, param.to(BF16)) for kept, param in zip(copies, params, strict=True))
    torch.testing.assert_close(torch.stack(params).double(), g.double() / norms[:, None, None], rtol=1e-3, atol=1e-4)


# --- the plan ---


def test_form_is_chosen_by_work(plan):
    plain_shapes = [(1280, 1280), (768, 768), (2048, 2048), (32, 320), (63, 999), (1, 1)]
    gram_shapes = [(5120, 1280), (1280, 5120), (3072, 768), (2560, 1280), (128, 1280), (64, 1024)]
    assert {plan(*shape).form for shape in plain_shapes} == {"plain"}
    assert {plan(*shape).form for shape in gram_shapes} == {"gram"}
    assert plan(5120, 1280, steps=1).form == "plain"


def test_steps_on_one_gram_matrix(plan):
    for name in NAMES:
        assert plan(640, 128, coefficients=name).phases == {"plain": [1] * 5, "gram": [3, 2]}
        assert set(plan(640, 128, coefficients=name).float16.values()) == {True}
    assert plan(640, 128, steps=8).phases["gram"] == [3, 2, 2, 1]
    assert plan(640, 128, steps=4, coefficients=[(20.0, 0.0, 0.0)]).phases["gram"] == [1, 1, 1, 1]
    assert plan(640, 128, steps=4, coefficients=[(12.0, 0.0, 0.0)]).phases["gram"] == [2, 2]
    assert plan(640, 128, steps=3, coefficients=GROWING).phases["gram"] == [1, 2]


def test_workspace(plan):
    """Of d20's 5120 x 1280: X twice, and five of 1280 x 1280."""
    matrices = 2 * (2 * 5120 * 1280 + 5 * 1280 * 1280)
    assert 0 <= plan(5120, 1280, norms=torch.ones(())).bytes["gram"] - matrices < 4096


# --- under sanitizers ---

WATCHED = {
    "plain, tall": lambda ns: check(ns, torch.randn(2, 150, 131), "plain", steps=1),
    "plain, wide": lambda ns: check(ns, torch.randn(131, 150), "plain", steps=2),
    "gram": lambda ns: check(ns, torch.randn(40, 70), "gram", steps=3),
    "update": lambda ns: check_update(ns, (33, 21), F32, True, count=2, steps=1),
    "update with copies": lambda ns: check_copies(ns, (33, 21), 1, steps=1),
    "update of whole strips": lambda ns: check_copies(ns, (66, 128), 0, steps=1),
    "update bfloat16": lambda ns: check_update(ns, (20, 24), BF16, False, count=2, steps=1),
}


@pytest.mark.parametrize("case", WATCHED)
def test_under_sanitizers(kernels, newton_schulz, case):
    if kernels.target in ("plain", "cuda"):
        pytest.skip("for the builds with a sanitizer")
    WATCHED[case](newton_schulz)
