"""Each primitive of ptx/primitives.cuh against its definition: emulated, under sanitizers, and on a GPU."""

import itertools

import pytest
import torch

from nanochat_native.ops import reference

PRIMITIVES, BLOCKS = "kernels/primitives.cu", "kernels/blocks.cu"
FLOAT32, BFLOAT16, FLOAT16 = 0, 2, 3  # nanochat::DType
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes: nanochat::device::Swizzle
SEEDS = range(4)


def lanes(x):
    return x.view(-1, 32)


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles_and_votes(kernels, seed):
    blocks, n = 3, 192
    x = torch.randn(n, device=kernels.device)
    out, votes = (
        torch.zeros(6, n, device=kernels.device),
        torch.zeros(n // 32, dtype=torch.int32, device=kernels.device),
    )
    kernels(PRIMITIVES).call("warp_exchange", x, out, votes, blocks, seed=seed)
    lane = torch.arange(32)
    sources = [
        (lane + 5) % 32,
        lane ^ 9,
        torch.where(lane % 16 + 3 < 16, lane + 3, lane),
        torch.where(lane % 8 >= 2, lane - 2, lane),
    ]
    for row, source in zip(out, sources, strict=False):
        assert torch.equal(lanes(row), lanes(x)[:, source])
    assert torch.equal(lanes(out[4])[:, :20], lanes(x)[:, :20].flip(1))
    positive = (lanes(x.cpu()) > 0).long() @ (1 << torch.arange(32))
    positive ^= (lanes(x.cpu()) > 2).any(1) * (1 << 31)
    positive ^= (lanes(x.cpu()) > -2).all(1) * (1 << 30)
    assert torch.equal(votes.cpu().long() & 0xFFFFFFFF, positive)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_block_sees_the_others_sums(kernels, seed):
    n, blocks = 1000, 11
    x = torch.randint(-50, 50, (n,), device=kernels.device).float()
    sums = torch.full((blocks,), torch.nan, device=kernels.device)
    finished = torch.zeros(1, dtype=torch.int32, device=kernels.device)
    total = torch.zeros(1, device=kernels.device)
    kernels(PRIMITIVES).call("grid_sum", x, sums, finished, total, n, blocks, seed=seed)
    assert total.item() == x.sum().item()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_take_turns(kernels, seed, backwards):
    """The sums have the bits of additions in order, whichever block runs first."""
    blocks = 7
    x = torch.randn(blocks, 256, device=kernels.device)
    sums, rows = torch.zeros(256, device=kernels.device), torch.full((blocks, 256), torch.nan, device=kernels.device)
    counter = torch.zeros(1, dtype=torch.int32, device=kernels.device)
    kernels(BLOCKS).call("take_turns", x, sums, rows, counter, blocks, int(backwards), seed=seed)
    row, expected = torch.zeros(256, device=kernels.device), torch.zeros(256, device=kernels.device)
    for turn in range(blocks):
        row = x[-1 - turn if backwards else turn] + 0.5 * row
        expected = expected + row
        assert torch.equal(rows[turn], row)
    assert torch.equal(sums, expected)
    assert counter.item() == blocks


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_cluster_share_loads(kernels, seed, size):
    clusters, steps = 3, 5
    x = torch.randn(clusters, steps, size * 8, 32, device=kernels.device)
    out = torch.zeros(clusters, size, size * 8, 32, device=kernels.device)
    kernels(BLOCKS).call("share_loads", x, out, clusters, steps, size, seed=seed, misalignment=16 + 48 * seed)
    weights = 1.0 + torch.arange(size)[:, None] + torch.arange(steps)
    torch.testing.assert_close(out, torch.einsum("rs,csij->crij", weights.to(x.device), x), rtol=1e-5, atol=1e-5)


def test_a_grid_waits_for_the_one_that_it_overlaps(kernels):
    out = torch.zeros(4, 32, device=kernels.device)
    kernels(BLOCKS).call("overlap", out)
    assert torch.equal(out, 2 * torch.arange(32.0, device=kernels.device).expand(4, 32))


def test_atomics(kernels):
    x = torch.randint(-1000, 1000, (150,), dtype=torch.int32, device=kernels.device)
    out = torch.tensor([0, -5000, 5000, 0, 0], dtype=torch.int32, device=kernels.device)
    kernels(PRIMITIVES).call("atomics", x, out, x.numel())
    assert out.tolist() == [x.sum().item(), x.max().item(), x.min().item(), 7, 5]


@pytest.mark.parametrize("in_pairs", [False, True])
def test_streamed_loads_and_stores(kernels, in_pairs):
    x = torch.arange(1000, dtype=torch.int32, device=kernels.device)
    out = torch.zeros_like(x)
    kernels(PRIMITIVES).call("reverse_streamed", x, out, x.numel(), int(in_pairs))
    assert torch.equal(out, x.flip(0))


def test_stores_of_16_bytes(kernels):
    x = torch.randint(-(2**31), 2**31, (364,), dtype=torch.int32, device=kernels.device)
    out = torch.zeros_like(x)
    kernels(PRIMITIVES).call("reverse", x, out, x.numel())
    assert torch.equal(out, x.flip(0))


def test_loads_of_pairs_from_shared_memory(kernels):
    x = torch.randn(32, 2, device=kernels.device)
    out = torch.zeros_like(x)
    kernels(PRIMITIVES).call("reverse_pairs", x, out)
    assert torch.equal(out, x.flip(0))


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers_hand_over(kernels, seed):
    rounds = 5
    x = torch.randn(rounds, 32, device=kernels.device)
    out = torch.zeros_like(x)
    kernels(PRIMITIVES).call("hand_over", x, out, rounds, seed=seed)
    assert torch.equal(out, x.flip(1))


def test_numbers(kernels):
    special = torch.tensor([0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e5, 6e-8, 2.9e-8, 1e-5, torch.inf, -torch.inf])
    x = torch.cat([special, torch.randn(400) * 3, torch.randn(100) * 1e-5]).to(kernels.device)
    n = x.numel()
    out, packed = torch.zeros(6, n, device=kernels.device), torch.zeros(2, n, dtype=torch.int32, device=kernels.device)
    kernels(PRIMITIVES).call("numbers", x, out, packed, n)
    halves = packed.view(torch.int16).view(2, n, 2)
    for row, dtype in enumerate((torch.bfloat16, torch.float16)):
        assert torch.equal(halves[row, :, 0].view(dtype), x.to(dtype))
        assert torch.equal(halves[row, :, 1].view(dtype), x.flip(0).to(dtype))
        assert torch.equal(out[row], x.to(dtype).float())
    finite = x.isfinite() & (x.abs() > 1e-30) & (x.abs() < 100)
    for row, exact, bound in ((2, torch.exp2(x), 1e-6), (3, 1 / x, 1e-6), (4, torch.tanh(x), 2**-10)):
        torch.testing.assert_close(out[row][finite], exact[finite], rtol=bound, atol=0)
    torch.testing.assert_close(out[5], x.sqrt(), rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("absent", [0, 4, 16, 28])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cp_async_ldmatrix_and_mma(kernels, dtype, absent):
    a, b = (torch.randn(16, 16, device=kernels.device).to(dtype) for _ in range(2))
    d = torch.full((16, 16), torch.nan, device=kernels.device)
    kernels(PRIMITIVES).call("mma_tile", a, b, d, int(dtype == torch.float16), absent)
    present = torch.arange(16, device=kernels.device) < 16 - absent // 2
    torch.testing.assert_close(d, (a * present).float() @ (b * present).float(), rtol=1e-5, atol=1e-5)


def test_ldmatrix_maps(kernels):
    tile = torch.arange(4 * 64, dtype=torch.int16, device=kernels.device).view(4, 8, 8)
    out = torch.zeros(12, 32, dtype=torch.int32, device=kernels.device)
    kernels(PRIMITIVES).call("ldmatrix_maps", tile, out)
    lane = torch.arange(32)
    rows, columns = lane // 4, 2 * (lane % 4)
    got = out.cpu().view(torch.int16).view(12, 32, 2)
    tile = tile.cpu()
    for register, matrix, transposed in (
        *((i, i, False) for i in range(4)),
        *((4 + i, i, True) for i in range(4)),
        *((8 + i, i, False) for i in range(2)),
        *((10 + i, i, True) for i in range(2)),
    ):
        source = tile[matrix].T if transposed else tile[matrix]
        expected = torch.stack([source[rows, columns], source[rows, columns + 1]], dim=1)
        assert torch.equal(got[register], expected), (register, transposed)


def test_stmatrix_undoes_ldmatrix(kernels):
    registers = torch.randint(-(2**31), 2**31, (4, 32), dtype=torch.int32, device=kernels.device)
    out = torch.zeros(2, 4, 32, dtype=torch.int32, device=kernels.device)
    kernels(PRIMITIVES).call("stmatrix_maps", registers, out)
    # Lane 4 r + c holds elements 2 c and 2 c + 1 of row r: the registers, in order, are the matrix by rows.
    matrices = registers.view(torch.int16).view(4, 8, 8)
    got = out.view(torch.int16).view(2, 4, 8, 8)
    assert torch.equal(got[0], matrices)
    assert torch.equal(got[1], matrices.mT)


def swizzled(image, swizzle):
    """Bytes of a tile as the copy engine lays them out: 16-byte chunks permuted within 8 rows of the swizzle."""
    if not swizzle:
        return image
    address = torch.arange(image.numel())
    return image[address ^ ((address >> 7 & (swizzle // 16 - 1)) << 4)]


COPIES = [
    # sizes, box, coordinates: innermost first
    (2, (64, 24), (64, 16), (0, 8)),
    (2, (72, 20), (32, 8), (48, -3)),
    (2, (40, 9), (16, 4), (-8, 7)),
    (3, (32, 6, 5), (32, 4, 2), (0, 3, 4)),
    (4, (16, 3, 4, 3), (16, 2, 3, 2), (0, 2, -1, 1)),
]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize(("rank", "sizes", "box", "at"), COPIES)
def test_tensor_copies(unwatched_kernels, rank, sizes, box, at, swizzle, dtype, add):
    check_copy(unwatched_kernels, rank, sizes, box, at, swizzle, dtype, add)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("rank", "sizes", "box", "at"), COPIES)
def test_tensor_copies_under_sanitizers(kernels, rank, sizes, box, at, add):
    check_copy(kernels, rank, sizes, box, at, 64, torch.bfloat16, add)


def check_copy(kernels, rank, sizes, box, at, swizzle, dtype, add):
    element = dtype.itemsize
    if swizzle and box[0] * element > swizzle:
        box = (swizzle // element, *box[1:])
    sizes, box, at = (torch.tensor([*x, 1, 1][:4] if x is not at else [*x, 0, 0][:4]) for x in (sizes, box, at))
    source = torch.randn(*sizes.flip(0).tolist(), device=kernels.device).to(dtype)
    target = torch.randn(*sizes.flip(0).tolist(), device=kernels.device).to(dtype)
    before = target.clone()
    image = torch.zeros(int(box.prod()) * element, dtype=torch.uint8, device=kernels.device)
    code = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}[dtype]
    kernels(PRIMITIVES).call(
        "copy_box", source, target, image, code, SWIZZLES[swizzle], rank, sizes, box, at, int(add), seed=int(add)
    )
    padded = torch.zeros(*(box + 0).flip(0).tolist(), dtype=dtype)
    inside = tuple(slice(max(a, 0), min(a + b, s)) for a, b, s in zip(at, box, sizes, strict=True))[::-1]
    place = tuple(
        slice(max(-int(a), 0), max(-int(a), 0) + s.stop - s.start) for a, s in zip(at.flip(0), inside, strict=True)
    )
    padded[place] = source.cpu()[inside]
    bytes_of_rows = padded.reshape(-1).view(torch.uint8)
    expected = swizzled(bytes_of_rows, swizzle)
    assert torch.equal(image.cpu(), expected)
    before[inside] = before[inside] + source[inside] if add else source[inside]
    assert torch.equal(target, before)


def product(kernels, N, dtype, mn_a, mn_b, swizzle, library, entry, *form, seed=0):
    a, b = (torch.randn(shape, device=kernels.device).to(dtype) for shape in ((64, 64), (64, N)))
    stored_a, stored_b = (a.T.contiguous() if mn_a else a), (b if mn_b else b.T.contiguous())
    d = torch.full((64, N), torch.nan, device=kernels.device)
    kernels(library).call(entry, stored_a, stored_b, d, SWIZZLES[swizzle], N, *map(int, form), seed=seed)
    torch.testing.assert_close(d, a.float() @ b.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("registers", [False, True])
def test_wgmma_of_every_width(unwatched_kernels, registers):
    for N in range(8, 257, 8):
        swizzle = next(width for width in (128, 64, 32, 0) if not registers or 2 * N % max(width, 16) == 0)
        library = "kernels/wgmma_widths.cu"
        product(unwatched_kernels, N, torch.bfloat16, False, registers, swizzle, library, "wgmma_width", registers)


FORMS = ["", "a", "b", "ab", "r", "rb"]


def check_form(kernels, form, swizzle, N, dtype, seed):
    registers, mn_a, mn_b = ("r" in form, "a" in form, "b" in form)
    flags = (dtype == torch.float16, registers, mn_a, mn_b)
    product(kernels, N, dtype, mn_a, mn_b, swizzle, "kernels/wgmma_forms.cu", "wgmma_form", *flags, seed=seed)


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("form", FORMS)
def test_wgmma_of_every_form(unwatched_kernels, form, swizzle):
    for seed, (N, dtype) in enumerate(itertools.product((64, 256), (torch.bfloat16, torch.float16))):
        check_form(unwatched_kernels, form, swizzle, N, dtype, seed)


@pytest.mark.parametrize("form", FORMS)
def test_wgmma_under_sanitizers(kernels, form):
    check_form(kernels, form, 128, 64, torch.bfloat16, 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_pipelined_gemm(kernels, seed):
    """Ring of mbarriers, tensor copies, wgmma, stmatrix and tensor stores together, with ragged edges."""
    M, N, K = 200, 136, 328
    a, b = (torch.randn(shape, device=kernels.device).bfloat16() for shape in ((M, K), (N, K)))
    c = torch.full((M, N), torch.nan, dtype=torch.bfloat16, device=kernels.device)
    kernels("kernels/gemm_hopper.cu").call(
        "gemm_hopper", a, b, c, M, N, K, seed=seed, misalignment=16 * (1 + 9 * seed % 63)
    )
    torch.testing.assert_close(c.float(), a.float() @ b.float().T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_through_two_stages(kernels, seed):
    """cp.async, ldmatrix, mma.sync and shuffles together, with ragged edges and grouped heads."""
    B, T, H, Hkv = 1, 150, 2, 1
    q, k, v = (torch.randn(B, T, heads, 64, device=kernels.device).bfloat16() for heads in (H, Hkv, Hkv))
    out = torch.full_like(q, torch.nan)
    lse = torch.full((B, H, T), torch.nan, device=kernels.device)
    kernels("kernels/attention_ampere.cu").call("attention_ampere", q, k, v, out, lse, B, T, H, Hkv, 0.125, seed=seed)
    exact, exact_lse = reference.attention_forward(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)
