"""newton_schulz and newton_schulz_update_ on the GPU: errors against float64 on both instruction sets, hard spectra,
matrices of nanochat's sizes, and what stays in its matrix."""

import pytest
import torch
import torch_reference
from sizes import pick

from nanochat_native import ops
from nanochat_native.bench.attention import instruction_set
from nanochat_native.bench.torch_baseline import newton_schulz_by_matmul
from nanochat_native.ops import reference

pytestmark = pytest.mark.gpu

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
NAMES = ["quintic", "polar_express", "cubic"]
SHAPES = pick(
    [(1, 1), (1, 9), (3, 100, 37), (2, 129, 257), (300, 290), (2, 768, 768), (513, 2050), (2050, 513), (64, 4000)],
    [(1, 1), (3, 100, 37), (40, 130)],
)


@pytest.fixture(autouse=True)
def kernels(require_native):
    require_native("newton_schulz", "newton_schulz_update_")


@pytest.fixture(params=["", "sm_80"])
def isa(request, device):
    if request.param and device.type != "cuda":
        pytest.skip("the CPU has no such choice")
    with instruction_set(request.param):
        yield request.param


def exact_of(g, coefficients="quintic"):
    """In float64, whatever the device."""
    return torch_reference.newton_schulz_in(F64, g, *reference.newton_schulz_schedule(5, coefficients))


def relative_error(mine, exact):
    return ((mine.double() - exact).norm() / exact.norm()).item()


def decaying(M, K, decades, device):
    r = min(M, K)
    u, _ = torch.linalg.qr(torch.randn(M, r, dtype=F64, device=device))
    v, _ = torch.linalg.qr(torch.randn(K, r, dtype=F64, device=device))
    return (u * torch.logspace(0, -decades, r, dtype=F64, device=device) @ v.T).float()


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error(device, isa, shape, coefficients):
    g = torch.randn(shape, device=device)
    out = ops.newton_schulz(g, coefficients=coefficients)
    assert relative_error(out, exact_of(g, coefficients=coefficients)) <= (8e-3 if min(shape[-2:]) >= 64 else 3e-2)


@pytest.mark.parametrize("shape", pick([(768, 768), (256, 1024), (1024, 256)], [(96, 96), (64, 160)]), ids=str)
@pytest.mark.parametrize("decades", pick([0, 1, 3, 6], [1, 6]))
def test_error_is_below_that_of_bfloat16_on_decaying_spectra(device, isa, decades, shape):
    g = decaying(*shape, decades, device)
    exact = exact_of(g)
    assert relative_error(ops.newton_schulz(g), exact) <= 0.6 * relative_error(
        newton_schulz_by_matmul(g[None])[0], exact
    )


def test_instruction_sets_agree(cuda):
    if ops.cuda_instruction_set() != "sm_90a":
        pytest.skip("needs compute capability 9.0")
    for shape in pick(((3, 640, 640), (2, 1500, 333)), ((1, 130, 130), (1, 200, 70))):
        g = torch.randn(shape, device=cuda)
        first = ops.newton_schulz(g)
        with instruction_set("sm_80"):
            second = ops.newton_schulz(g)
        assert relative_error(first, second.double()) < 4e-3


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, F64])
def test_types_and_strides(device, dtype):
    g = torch.randn(2, 90, 200, device=device).to(dtype).mT
    out = ops.newton_schulz(g)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert relative_error(out, exact_of(g)) <= 1e-2


def test_zero_and_nan_stay_in_their_matrix(device, isa):
    for shape in pick(((300, 70), (150, 150)), ((100, 70), (70, 70))):
        g = torch.randn(4, *shape, device=device)
        g[1] = 0
        clean = ops.newton_schulz(g)
        g[2, 3, 1], g[3, 0, 0] = torch.nan, torch.inf
        out = ops.newton_schulz(g)
        assert torch.equal(out[0], clean[0])
        assert torch.count_nonzero(out[1]) == 0
        assert out[2].isnan().all()
        assert not out[3].isfinite().any()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(
    ("count", "shape"),
    pick(
        [(1, (1, 1)), (3, (37, 53)), (600, (20, 24)), (4, (512, 1536)), (2, (3, 64, 40))],
        [(1, (1, 1)), (2, (2, 64, 40))],
    ),
)
def test_update_is_newton_schulz_and_muon_update(device, isa, dtype, cautious, count, shape):
    params = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    expected, update = [param.clone() for param in params], torch.randn(count, *shape, device=device)
    rates = {"lr": 0.1, "weight_decay": 0.2, "scale": 1.5, "cautious": cautious}
    ops.newton_schulz_update_(params, update, **rates)
    ops.muon_update_(expected, ops.newton_schulz(update), **rates)
    for mine, other in zip(params, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=2e-5 if dtype == F32 else 2**-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    pick([(80, 1280, 1280), (20, 5120, 1280), (20, 1280, 5120), (8, 2048, 2048)], [(2, 64, 256)]),
    ids=str,
)
def test_nanochats_sizes(cuda, isa, shape):
    g = torch.randn(shape, device=cuda)
    out = ops.newton_schulz(g)
    for index in (0, -1):
        assert relative_error(out[index], exact_of(g[index])) <= 5e-3
