"""The roofline: operations and bytes of operators by hand, the check against the model's formula, and the command."""

import dataclasses
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nanochat_native import ops
from nanochat_native.bench import gpu
from nanochat_native.lab.roofline import (
    UncountedError,
    analyse,
    analysis,
    costs,
    floor_bytes,
    measurement,
    record,
    worker,
)
from nanochat_native.lab.roofline.analysis import ELSE, GROUPS, SUMMED, Machine, check_flops
from nanochat_native.lab.roofline.costs import Call, Launch, launches_of, visible_pairs
from nanochat_native.lab.roofline.options import Options, model_config
from nanochat_native.lab.roofline.recording import Recorder, autocast
from nanochat_native.model.config import ARCHITECTURES, GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.ops import backends
from nanochat_native.ops.attention import attention_mask
from nanochat_native.roofline import main
from nanochat_native.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(bool(backends.load_error), reason="the native operators are not built")
pytestmark = needs_native

TINY = GPTConfig(sequence_len=12, vocab_size=20, n_layer=3, n_head=2, n_kv_head=1, n_embd=16, window_pattern="SL")
MACHINE = Machine(name="a GPU", flops=1e12, bandwidth=1e10, launch=1e-7, peak=2e12)
F32, BF16 = torch.float32, torch.bfloat16


def meta(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(function, *args):
    """The calls that a function makes."""
    with Recorder() as recorder:
        function(*args)
    return recorder.calls


def cost(function, *args):
    """The launches of the only call that a function makes."""
    (call,) = recorded(function, *args)
    return list(call.launches)


def call_of(name, results=(), **arguments):
    """A call of an operator of this package, which need not run on meta tensors."""
    operator = getattr(torch.ops.nanochat_native, name).default
    return Call(operator, arguments, tuple(results))


# --- operations ---


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (torch.mm, [(5, 7), (7, 3)], 2 * 5 * 7 * 3),
        (torch.bmm, [(4, 5, 7), (4, 7, 3)], 2 * 4 * 5 * 7 * 3),
        (torch.addmm, [(5, 3), (5, 7), (7, 3)], 2 * 5 * 7 * 3),
        (torch.Tensor.addmm_, [(5, 3), (5, 7), (7, 3)], 2 * 5 * 7 * 3),
        (torch.baddbmm, [(4, 5, 3), (4, 5, 7), (4, 7, 3)], 2 * 4 * 5 * 7 * 3),
        (torch.add, [(5, 3), (5, 3)], 0),
    ],
)
def test_operations_of_torch_are_those_of_products(function, shapes, flops):
    (launch,) = cost(function, *(meta(*shape) for shape in shapes))
    assert launch.flops == flops


@pytest.mark.parametrize(
    ("Tq", "Tk", "causal", "window", "pairs"),
    [(4, 4, True, -1, 10), (4, 4, True, 1, 7), (3, 5, False, -1, 15), (3, 5, True, -1, 12), (5, 3, True, -1, 6)],
)
def test_visible_pairs_are_those_of_the_mask(Tq, Tk, causal, window, pairs):
    assert visible_pairs(Tq, Tk, causal, window) == pairs
    assert attention_mask(Tq, Tk, causal, None if window < 0 else window).sum() == pairs


def attention_tensors(B=2, T=4, H=6, Hkv=2, D=8):
    q, k, v = meta(B, T, H, D, dtype=BF16), meta(B, T, Hkv, D, dtype=BF16), meta(B, T, Hkv, D, dtype=BF16)
    return q, k, v, meta(B, H, T)


@pytest.mark.parametrize("pattern", ["L", "S", "SL", "SSSL"])
@pytest.mark.parametrize("T", [1, 2, 12, 33])
def test_visible_pairs_in_closed_form_are_those_of_the_mask(T, pattern):
    config = dataclasses.replace(TINY, sequence_len=T, window_pattern=pattern, n_layer=5)
    masks = [attention_mask(T, T, True, window) for window in config.windows]
    assert analysis.visible_in_model(config) == sum(int(mask.sum()) for mask in masks)


def test_attention_forward_has_two_products_on_visible_pairs():
    q, k, v, lse = attention_tensors()
    tensors = {"q": q, "k": k, "v": v}
    call = call_of("attention_forward", (q.clone(), lse), **tensors, causal=True, window=-1, scale=1.0)
    q_bytes, k_bytes, lse_bytes = 2 * 4 * 6 * 8 * 2, 2 * 4 * 2 * 8 * 2, 4 * 2 * 6 * 4
    assert launches_of(call) == [Launch(4 * 2 * 6 * 8 * 10, q_bytes + 2 * k_bytes, q_bytes + lse_bytes)]
    windowed = dataclasses.replace(call, arguments=call.arguments | {"window": 1})
    assert launches_of(windowed)[0].flops == 4 * 2 * 6 * 8 * 7


def test_attention_backward_has_five_products_in_one_of_three_kernels():
    q, k, v, lse = attention_tensors()
    tensors = {"dout": q.clone(), "q": q, "k": k, "v": v, "out": q.clone(), "lse": lse}
    call = call_of(
        "attention_backward", (q.clone(), k.clone(), v.clone()), **tensors, causal=True, window=-1, scale=1.0
    )
    q_bytes, k_bytes, numbers, pairs = 768, 256, 2 * 192, 2 * 6 * 8 * 10
    sums = 2 * q_bytes  # of dq, in float32
    assert launches_of(call) == [
        Launch(0, 2 * q_bytes + 192, numbers),
        Launch(5 * 2 * pairs, 2 * q_bytes + 2 * k_bytes + numbers, 2 * k_bytes + sums),
        Launch(0, sums, q_bytes),
    ]
    assert costs.model_flops(call) == 2 * 4 * pairs, "twice the forward pass"


@pytest.mark.parametrize(("for_x", "for_weight", "products"), [(True, True, 3), (True, False, 2), (False, False, 1)])
@pytest.mark.parametrize("chunks", [1, 3])
def test_loss_has_up_to_three_products_in_each_chunk(for_x, for_weight, products, chunks, monkeypatch):
    N, C, V = 384, 16, 24
    monkeypatch.setenv("NANOCHAT_LOGIT_BYTES", str(V * 2 * N // chunks))
    x, weight, targets = meta(N, C, dtype=BF16), meta(V, C, dtype=BF16), meta(N, dtype=torch.int64)
    options = {"softcap": 15.0, "ignore_index": -1, "reduction": "mean"}
    flags = {"needs_grad_x": for_x, "needs_grad_weight": for_weight}
    call = call_of("linear_cross_entropy", (meta(), x, weight), x=x, weight=weight, targets=targets, **options, **flags)
    found = launches_of(call)
    assert sum(launch.flops for launch in found) == products * 2 * N * C * V
    with_products = [launch for launch in found if launch.flops]
    assert len(with_products) == products * chunks
    rows = N // chunks
    assert with_products[0] == Launch(2 * rows * C * V, 2 * (rows * C + V * C), 2 * rows * V)
    between = found[found.index(with_products[0]) + 1]
    assert between == Launch(0, 2 * rows * V + 8 * rows, (2 * rows * V if for_x else 0) + 4 * rows)
    if for_weight:
        size = 4 if chunks > 1 else 2
        assert with_products[2] == Launch(2 * rows * C * V, 2 * rows * (V + C), size * V * C)
        repeated = 2 * rows * (V + C) + (4 * V * C if chunks > 1 else 0)
        assert with_products[-1].read == repeated, "later chunks add to the sum"
        assert (Launch(0, 4 * V * C, 2 * V * C) in found) == (chunks > 1)
    # targets != ignore_index, their number, and the sum, its mean and its type; 1 / number as float32 for gradients
    assert len(found) - (products + 1) * chunks == 5 + 2 * for_x + (for_weight and chunks > 1)


def test_linear_is_one_product_and_its_backward_two():
    x, weight, dy = meta(5, 7), meta(3, 7), meta(5, 3)
    assert launches_of(call_of("linear", (dy,), x=x, weight=weight)) == [Launch(210, 4 * (35 + 21), 4 * 15)]
    both = call_of("linear_backward", (x, weight), dy=dy, x=x, weight=weight, needs_grad_x=True, needs_grad_weight=True)
    assert launches_of(both) == [Launch(210, 4 * (15 + 21), 4 * 35), Launch(210, 4 * (15 + 35), 4 * 21)]


QUINTIC = [3.4445, -4.7750, 2.0315] * 5


def test_newton_schulz_of_a_square_is_three_products_a_step():
    g = meta(3, 128, 128)
    call = call_of("newton_schulz", (g.clone(),), g=g, coefficients=QUINTIC, norm_factor=1.0, norms=meta(3))
    found = launches_of(call)
    product, x = 3 * 2 * 128**3, 3 * 2 * 128**2
    assert len(found) == 16
    assert found[0] == Launch(0, 2 * x + 3 * 8, x)
    assert found[1:4] == [Launch(product, x, x), Launch(product, x, x), Launch(product, 2 * x, x)]
    assert found[-1] == Launch(product, 2 * x, 2 * x), "float32"
    assert sum(launch.flops for launch in found) == 5 * 3 * product
    unknown = dataclasses.replace(call, arguments=call.arguments | {"norms": None})
    assert launches_of(unknown) == [Launch(0, 2 * x, 3 * 8), *found]


def test_newton_schulz_update_of_a_wide_matrix_takes_the_gram_form():
    update, params = meta(2, 256, 1024), [meta(256, 1024) for _ in range(2)]
    options = {"coefficients": QUINTIC, "norm_factor": 1.0, "norms": meta(2, dtype=torch.float64)}
    call = call_of("newton_schulz_update_", params=params, update=update, **options)
    found = launches_of(call)
    assert costs.newton_schulz_phases(256, 1024, [QUINTIC[:3]] * 5) == [3, 2]
    assert len(found) == 19
    half = 3 * 128 * 128  # of 2 x 2 tiles
    one_phase = {n: 1024 + (1 + 4 * (n - 1)) * 256 for n in (3, 2)}  # depth of the symmetric products
    wide = 2 * 2 * 256 * 256 * 1024
    assert sum(launch.flops for launch in found) == 2 * 2 * half * sum(one_phase.values()) + 2 * wide
    x, square = 2 * 2 * 256 * 1024, 2 * 2 * 256 * 256
    assert found[-1] == Launch(wide, square + x + 2 * x, 2 * x)
    assert (
        len(launches_of(dataclasses.replace(call, arguments=call.arguments | {"update": meta(600, 256, 1024)}))) == 38
    )


# --- bytes ---


@pytest.mark.parametrize(
    ("function", "read", "written"),
    [
        (lambda x: x + 1, 48, 48),
        (lambda x: x * x, 48, 48),
        (lambda x: x * x[:, :1], 48 + 16, 48),
        (lambda x: x.add_(meta(4, 3)), 96, 48),
        (lambda x: x.copy_(meta(4, 3, dtype=BF16)), 24, 48),
        (lambda x: x.zero_(), 0, 48),
        (lambda x: x + meta(3).expand(4, 3), 48 + 12, 48),
        (lambda x: x + x.t().contiguous().t(), None, None),
        (lambda x: x.to(BF16), 48, 24),
        (lambda x: x.mean(-1), 48, 16),
        (lambda x: x[:, 1:].mul_(2), 32, 32),
        (lambda x: torch.mul(x, 2, out=meta(4, 3)), 48, 48),
        (lambda x: torch._foreach_mul_([x, meta(5)], 2.0), 48 + 20, 48 + 20),
        (lambda x: torch.nn.functional.embedding(meta(2, dtype=torch.int64), x), 16 + 24, 24),
        (lambda x: torch.nn.functional.embedding(meta(9, dtype=torch.int64), x), 72 + 48, 108),
        (lambda x: torch.mm(x, meta(3, 5)), 48 + 60, 80),
        (lambda x: torch.mm(x.to(BF16), meta(3, 5, dtype=BF16), out_dtype=F32), 24 + 30, 80),
        (lambda x: torch.addmm(x, meta(4, 2), meta(2, 3), out=x), 48 + 32 + 24, 48),
        (lambda x: meta(4, 5).addmm_(x, meta(3, 5)), 80 + 48 + 60, 80),
    ],
)
def test_bytes_of_torchs_operators(function, read, written):
    x = meta(4, 3)
    calls = recorded(function, x)
    if read is None:  # one call makes the copy
        assert [call.cost.bytes for call in calls] == [96, 144]
        return
    call = calls[-1]
    assert (call.cost.read, call.cost.written) == (read, written)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(3, 4),
        lambda x: x.t(),
        lambda x: x[1:, None].expand(3, 5, 3),
        lambda x: x.detach(),
        lambda x: x.unbind(),
        lambda x: x.split(2),
        lambda x: torch.empty_like(x),
        lambda x: torch.zeros(3) + 1,
    ],
)
def test_views_allocations_and_the_hosts_tensors_are_free(function):
    assert recorded(function, meta(4, 3)) == []


def test_bytes_of_our_one_pass_operators():
    x, r = meta(4, 6, dtype=BF16), meta(4)
    fresh = [meta(4, 6, dtype=BF16) for _ in range(2)]
    names = ("rms_norm", "rms_norm_backward", "relu_squared", "relu_squared_", "relu_squared_backward_")
    assert set(names) < set(costs.RULES)
    with_sum = call_of("rms_norm", (*fresh, r), x=x, residual=x.clone(), eps=1e-7)
    assert launches_of(with_sum) == [Launch(0, 96, 96 + 16)]
    without = call_of("rms_norm", (meta(0), fresh[0], r), x=x, residual=None, eps=1e-7)
    assert launches_of(without) == [Launch(0, 48, 48 + 16)]
    backward = call_of("rms_norm_backward", (fresh[0],), dy=x, dsum=fresh[1], y=x.clone(), r=r)
    assert launches_of(backward) == [Launch(0, 3 * 48 + 16, 48)]
    assert launches_of(call_of("relu_squared", (fresh[0],), x=x)) == [Launch(0, 48, 48)]
    assert launches_of(call_of("relu_squared_", x=x)) == [Launch(0, 48, 48)]
    assert launches_of(call_of("relu_squared_backward_", dy=x, y=fresh[0])) == [Launch(0, 96, 48)]
    tokens, table = meta(2, 5, dtype=torch.int64), meta(100, 6)
    results = (meta(2, 5, 6, dtype=BF16), meta(2, 5))
    embedding = call_of("embedding_rms_norm", results, tokens=tokens, table=table, dtype=BF16, eps=1e-7)
    assert launches_of(embedding) == [Launch(0, 80 + 10 * 24, 120 + 40)]


def test_mix_rms_norm_reads_and_writes_each_stream_once():
    def stream():
        return meta(4, 6, dtype=BF16)

    r, one = meta(4), meta(1)
    inputs = {"x": stream(), "residual": stream(), "x0": stream()}
    scales = {"x_scale": one, "x0_scale": meta()}
    forward = call_of("mix_rms_norm", (stream(), stream(), stream(), r), **inputs, **scales, eps=1e-7)
    assert launches_of(forward) == [Launch(0, 3 * 48 + 8, 3 * 48 + 16)]
    without = inputs | {"residual": None}
    forward = call_of("mix_rms_norm", (meta(0, dtype=BF16), stream(), stream(), r), **without, **scales, eps=1e-7)
    assert launches_of(forward) == [Launch(0, 2 * 48 + 8, 2 * 48 + 16)]
    results = (stream(), stream(), meta(1), meta())
    saved = {"y": stream(), "r": r, "z": stream(), "x0": stream()}
    backward = {"dy": stream(), "dz": None, "dmixed": stream(), "add_to": stream()}
    assert launches_of(call_of("mix_rms_norm_backward", results, **backward, **saved, **scales)) == [
        Launch(0, 6 * 48 + 16 + 8, 2 * 48 + 32),
        Launch(0, 32, 8),
    ]


def test_rotary_norm_reads_the_tables_once():
    q, k, cos = meta(2, 3, 4, 8, dtype=BF16), meta(2, 3, 1, 8, dtype=BF16), meta(30, 4)
    results = (q.clone(), k.clone(), meta(2, 3, 4), meta(2, 3, 1))
    angles = {"cos": cos[:3], "sin": meta(30, 4)[:3]}
    call = call_of("rotary_norm", results, q=q, k=k, **angles, eps=1e-7, scale=1.2)
    assert launches_of(call) == [Launch(0, 384 + 96 + 2 * 48, 384 + 96 + 96 + 24)]


def test_value_embeddings_read_the_rows_of_the_table_and_sum_up_gates_in_two_more_launches():
    N, Hkv, D, V = 70, 2, 8, 100
    v, x, gate = meta(N, Hkv, D, dtype=BF16), meta(N, 30, dtype=BF16), meta(Hkv, 12)
    table, ids = meta(V, Hkv * D), meta(N, dtype=torch.int64)
    h, rows = x[:, :12], N * Hkv * D
    arguments = {"h": h, "gate": gate, "table": table, "ids": ids}
    small = 24 * N + 96 + 8 * N  # h, gate, ids
    call = call_of("add_value_embedding", (v.clone(),), v=v, **arguments)
    assert launches_of(call) == [Launch(0, 2 * rows + 4 * rows + small, 2 * rows)]
    results = (meta(N, 12, dtype=BF16), meta(Hkv, 12), meta(N, Hkv * D))
    call = call_of("add_value_embedding_backward", results, dout=v, **arguments)
    partials = 2 * 25 * 4  # two blocks of rows
    assert launches_of(call) == [
        Launch(0, 2 * rows + 4 * rows + small, 4 * rows + 8 * N),
        Launch(0, 24 * N + 8 * N + 96, partials + 24 * N),
        Launch(0, partials, 96),
    ]


def test_smear_reads_a_token_once_and_sums_up_its_gate_in_two_more_launches():
    B, T, C = 2, 50, 30
    x, gate, smear_lambda = meta(B, T, C, dtype=BF16), meta(1, 24), meta(1)
    arguments = {"x": x, "gate": gate, "smear_lambda": smear_lambda}
    assert launches_of(call_of("smear", (x.clone(),), **arguments)) == [Launch(0, 2 * B * T * C + 100, 2 * B * T * C)]
    results = (x.clone(), gate.clone(), smear_lambda.clone())
    partials = 2 * 25 * 4
    assert launches_of(call_of("smear_backward", results, dout=x.clone(), **arguments)) == [
        Launch(0, 4 * B * T * C + 100, 2 * B * T * C + 800),
        Launch(0, 48 * 100 + 800, partials),
        Launch(0, partials, 100),
    ]


def test_bytes_of_the_optimizers_and_their_launches():
    def tensors(count):
        return [meta(6, 5) for _ in range(count)]

    lists = {name: tensors(2) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    assert launches_of(call_of("adamw_", **lists)) == [Launch(0, 8 * 120, 6 * 120)]
    copies = {"copies": [meta(6, 5, dtype=BF16) for _ in range(2)]}
    assert launches_of(call_of("adamw_", **lists, **copies)) == [Launch(0, 8 * 120, 6 * 120 + 2 * 60)]
    derived = launches_of(call_of("adamw_", **lists, lr_tensor=meta(dtype=torch.float64)))
    assert [launch.bytes > 100 for launch in derived] == [False, True]
    many = {name: tensors(621) for name in lists}
    assert [launch.read for launch in launches_of(call_of("adamw_", **many))] == [620 * 480, 480]

    update, norms = meta(3, 6, 5), meta(3, dtype=torch.float64)
    momentum = {"grads": tensors(3), "momentum_buffers": tensors(3), "with_norms": True}
    assert launches_of(call_of("muon_momentum_", (update, norms), **momentum)) == [
        Launch(0, 720, 720),
        Launch(0, 24, 24),
    ]
    assert launches_of(call_of("muon_update_", params=tensors(3), update=update)) == [Launch(0, 720, 360)]

    of_rows = {**momentum, "with_norms": False, "with_row_norms": True}
    row_norms = meta(3, 6, dtype=torch.float64)
    assert launches_of(call_of("muon_momentum_", (update, row_norms), **of_rows))[1:] == [
        Launch(0, 360, 72),
        Launch(0, 72, 144),
    ]
    seconds = [meta(6, 1) for _ in range(3)]
    arguments = {"params": tensors(3), "update": update, "second_momentums": seconds}
    expected = [Launch(0, 360, 0), Launch(0, 72, 72), Launch(0, 720, 360)]
    assert launches_of(call_of("normuon_update_", **arguments)) == expected
    many = {"params": tensors(1301), "update": meta(1301, 6, 5), "second_momentums": [meta(6, 1)] * 1301}
    assert [launch.read for launch in launches_of(call_of("normuon_update_", **many))[3:]] == [120, 24, 240]


def test_every_operator_with_a_cuda_implementation_has_a_rule():
    declared = set(re.findall(r'"(\w+)\(', (ROOT / "python/schema.cpp").read_text()))
    implemented = set(re.findall(r'm\.impl\("(\w+)"', (ROOT / "python/ops_cuda.cpp").read_text()))
    assert len(implemented) >= 8
    assert implemented <= set(costs.RULES) <= declared


def test_an_operator_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule for the operator nanochat_native::cached_forward_"):
        launches_of(call_of("cached_forward_", (meta(2),)))


@pytest.mark.parametrize(
    ("product", "name"),
    [
        (lambda x: torch.mv(x, x[0]), "mv"),
        (lambda x: torch.addmv(x[0], x, x[0]), "addmv"),
        (lambda x: torch.dot(x[0], x[0]), "dot"),
        (lambda x: torch.addbmm(x, x[None], x[None]), "addbmm"),
        (lambda x: torch.nn.functional.conv1d(x[None], x[None]), "convolution"),
        (lambda x: torch._int_mm(meta(32, 32, dtype=torch.int8), meta(32, 32, dtype=torch.int8)), "_int_mm"),
    ],
)
def test_a_product_of_torch_without_a_rule_is_an_error(product, name):
    with pytest.raises(ValueError, match=f"no rule for the product aten::{name}; "):
        recorded(product, meta(4, 4))


def test_the_products_that_torch_counts_have_a_rule_or_are_refused():
    counted = {str(op).replace("aten.", "aten::") for op in flop_registry}
    assert {"aten::mm", "aten::convolution"} < counted
    assert {name for name in counted if "::" in name} <= {*costs.PRODUCTS, *costs.UNCOUNTED_PRODUCTS}
    known = set(torch._C._dispatch_get_all_op_names())
    known = {name.partition(".")[0] for name in known}
    unknown = {name for name in costs.UNCOUNTED_PRODUCTS if name not in known}
    assert all(name.endswith("_v2") for name in unknown), "newer releases of torch have these"


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("python/ops_cuda.cpp", r"kRowTile = (\d+);", "ROW_TILE"),
        ("csrc/cuda/newton_schulz.cuh", r"kTile = (\d+),", "TILE"),
        ("csrc/kernels.h", r"kMostMatrices = (\d+);", "MOST_MATRICES"),
        ("csrc/cuda/newton_schulz_plan.cuh", r"kLeastGram = (\d+);", "LEAST_GRAM"),
        ("csrc/cuda/newton_schulz_plan.cuh", r"kMostGrowth = (\d+);", "MOST_GROWTH"),
        ("csrc/cuda/muon.cu", r"kFewMatrices = (\d+),", "FEW_MATRICES"),
        ("csrc/cuda/muon.cu", r"kManyMatrices = (\d+);", "MANY_MATRICES"),
        ("csrc/cuda/normuon.cu", r"kManyMatrices = (\d+);", "MANY_NORMUON_MATRICES"),
        ("csrc/cuda/adamw.cu", r"kFewTensors = (\d+),", "FEW_TENSORS"),
        ("csrc/cuda/adamw.cu", r"kManyTensors = (\d+);", "MANY_TENSORS"),
    ],
)
def test_constants_are_those_of_the_cuda_implementation(file, text, name):
    (value,) = re.findall(text, (ROOT / file).read_text())
    assert getattr(costs, name) == int(value)


@pytest.mark.parametrize(
    ("M", "K", "phases"), [(768, 768, [1] * 5), (3072, 768, [3, 2]), (768, 3072, [3, 2]), (32, 320, [1] * 5)]
)
def test_the_form_of_newton_schulz(M, K, phases):
    """HACKING.md: the Gram form pays from an aspect ratio of about 1.1, for at least 64 singular values."""
    assert costs.newton_schulz_phases(M, K, [QUINTIC[:3]] * 5) == phases


# --- the floor ---


def test_floor_is_one_pass_between_products():
    a, b, c = meta(4, 4), meta(4, 4), meta(4, 4)
    kept = meta(4, 4)

    def body():
        x = torch.mm(a, b)
        y = x + 1
        z = (y * 2).mul_(y[:, :2].repeat(1, 2))  # y is used in its own pass only
        w = torch.mm(z, c)
        kept.add_(w)

    calls = recorded(body)
    read_by_hand = 64 + (64 + 64)  # x; w and kept
    written_by_hand = 64 + 64  # z; kept
    storage = kept.untyped_storage()._cdata
    step = SimpleNamespace(micro_step=tuple(calls), kept=frozenset({storage}))
    assert floor_bytes(step) == read_by_hand + written_by_hand
    without = SimpleNamespace(micro_step=tuple(calls), kept=frozenset())
    assert floor_bytes(without) == read_by_hand + 64


def test_floor_counts_what_a_later_pass_reads_and_a_part_of_a_tensor_once():
    a, b = meta(4, 4), meta(4, 4)

    def body():
        x = torch.mm(a, b)
        y = x + x[:, :2].repeat(1, 2)  # x and a part of it
        z = torch.mm(y, b)
        z * y

    calls = recorded(body)
    step = SimpleNamespace(micro_step=tuple(calls), kept=frozenset())
    assert floor_bytes(step) == (64 + 64) + (64 + 64)  # x, y; z, y


# --- the step ---


def tiny_step(config=TINY, dtype=BF16, optimizer="hybrid", accumulate=False):
    return record(config, 2, dtype, optimizer, accumulate)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, n_kv_head=2, window_pattern="L"),
        dataclasses.replace(TINY, n_embd=32, **ARCHITECTURES["today"]),
    ],
)
@pytest.mark.parametrize(("dtype", "optimizer", "accumulate"), [(BF16, "hybrid", False), (F32, "adamw", True)])
def test_operations_of_the_model_add_up_to_its_formula(config, dtype, optimizer, accumulate):
    step = tiny_step(config, dtype, optimizer, accumulate)
    check_flops(step)
    tokens = 2 * 12
    products = [call for call in step.micro_step if call.group in ("products", "loss")]
    matrices = sum(p.numel() for block in step.model.blocks for p in block.parameters() if p.size(1) > 12)
    parameters = matrices + config.vocab_size * config.n_embd
    assert sum(call.cost.flops for call in products) == 6 * parameters * tokens


def test_operations_of_todays_model_add_up_to_its_formula(capsys):
    """The gates' products are part of other operators; the window S, 128 tokens, is longer than the sequence."""
    assert main(["--architecture", "today", "--depth", "2", "--max-seq-len", "64", "--device-batch-size", "2"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("mix_rms_norm", "add_value_embedding", "smear"))


def test_the_windows_of_an_architecture_are_its_own_unless_they_are_given():
    assert model_config(Options(architecture="today")).window_pattern == "SSSL"
    assert model_config(Options()).window_pattern == "L"
    assert model_config(Options(architecture="today", window_pattern="L")).window_pattern == "L"


def test_a_call_that_is_missed_or_counted_twice_is_refused():
    step = tiny_step()
    for group, part in (("products", "products and the loss"), ("loss", "products and the loss"), ("attention",) * 2):
        place = next(i for i, call in enumerate(step.micro_step) if call.group == group)
        for count in (0, 2):
            calls = (
                *step.micro_step[:place],
                *step.micro_step[place : place + 1] * count,
                *step.micro_step[place + 1 :],
            )
            with pytest.raises(UncountedError, match=f"the operations of {part} do not add up"):
                check_flops(dataclasses.replace(step, micro_step=calls))
        call = step.micro_step[place]
        off_by_one = dataclasses.replace(call, model_flops=call.model_flops + 1)
        calls = (*step.micro_step[:place], off_by_one, *step.micro_step[place + 1 :])
        with pytest.raises(UncountedError):
            check_flops(dataclasses.replace(step, micro_step=calls))


@pytest.mark.parametrize(
    "mutated",
    [
        *("formula", "product", "mask", "loss", "attention_backward", "launches of attention_backward"),
        *("launches of the loss", "launches of attention_forward", "newton_schulz_update_", "half of Newton-Schulz"),
    ],
)
def test_command_refuses_in_one_line_when_a_count_is_wrong(mutated, monkeypatch, capsys):
    if mutated == "formula":
        monkeypatch.setattr(GPT, "estimate_flops", lambda self: 6 * self.num_params())
    elif mutated == "product":
        monkeypatch.setattr(costs, "_product", lambda call: [call.one_pass])
    elif mutated == "mask":
        for module in (costs, analysis):
            monkeypatch.setattr(module, "visible_pairs", lambda Tq, Tk, causal, window: Tq * Tk, raising=False)
    elif mutated == "loss":
        monkeypatch.setitem(costs.RULES, "linear_cross_entropy", costs._one_pass)
    elif mutated == "launches of attention_backward":
        monkeypatch.setitem(costs.RULES, "attention_backward", costs._one_pass)
    elif mutated == "newton_schulz_update_":
        monkeypatch.setitem(costs.RULES, mutated, costs._one_pass)
    elif mutated == "half of Newton-Schulz":
        whole = costs._newton_schulz_update
        monkeypatch.setitem(costs.RULES, "newton_schulz_update_", lambda call: whole(call)[::2])
    elif mutated.startswith("launches of"):
        name = {"loss": "linear_cross_entropy"}.get(mutated.split()[-1], mutated.split()[-1])
        true, rule = costs.model_flops, costs.RULES[name]
        flops = {}

        def zero(call):
            flops[id(call)] = sum(launch.flops for launch in rule(call))
            return [call.one_pass]

        monkeypatch.setitem(costs.RULES, name, zero)
        monkeypatch.setattr(
            "nanochat_native.lab.roofline.recording.model_flops", lambda call: flops.get(id(call), 0) or true(call)
        )
    else:
        monkeypatch.setattr(costs, "model_flops", lambda call: 0)
        monkeypatch.setattr("nanochat_native.lab.roofline.recording.model_flops", costs.model_flops)
    assert main(SMALL) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: the operations of ")
    assert err.count("\n") == 1


def test_command_refuses_a_product_that_no_rule_counts(monkeypatch, capsys):
    forward = GPT.forward

    def with_mv(self, *args, **kwargs):
        weight = self.lm_head.weight
        return forward(self, *args, **kwargs) + torch.mv(weight, weight[0]).sum()

    monkeypatch.setattr(GPT, "forward", with_mv)
    assert main(SMALL) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: the roofline has no rule for the product aten::mv; costs.py must have one\n")


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072), (32, 320), (300, 700), (16, 8)])
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_newton_schulz_in_closed_form_is_the_sum_of_its_launches(shape, steps):
    update, numbers = meta(2, *shape), QUINTIC[:3] * steps
    params = [meta(*shape) for _ in range(2)]
    options = {"coefficients": numbers, "norm_factor": 1.0, "norms": None}
    call = call_of("newton_schulz_update_", params=params, update=update, **options)
    assert 2 * analysis.newton_schulz_flops(shape, [tuple(QUINTIC[:3])] * steps) == costs.model_flops(call) > 0


def test_the_recorded_step_is_a_later_one():
    """The state of the optimizers exists, and the gradients as the flag says."""
    once, again = tiny_step(), tiny_step(accumulate=True)
    assert not {"aten::zeros", "aten::zeros_like"} & {call.name for call in once.optimizers}
    added = [sum(call.name == "aten::add_" for call in step.micro_step) for step in (once, again)]
    assert added[1] - added[0] == len(list(once.model.parameters()))
    names = {call.name for call in once.optimizers}
    assert {f"nanochat_native::{name}" for name in ("adamw_", "muon_momentum_", "newton_schulz_update_")} < names
    assert once.waits[0] == 0


def test_the_native_operators_are_recorded_on_every_backend(monkeypatch):
    with ops.use_backend("torch"):
        names = [call.name for call in tiny_step().micro_step]
        assert ops.backend() == "torch"
    assert names == [call.name for call in tiny_step().micro_step]
    monkeypatch.setattr(backends, "load_error", "it is not built")
    with pytest.raises(ConfigError, match="it is not built"):
        tiny_step()


class Names(TorchDispatchMode):
    """A context that notes the operators that run in it, and the types of their tensors."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "prim":  # asked by tensors without memory
            self.found.append((str(func), tuple(a.dtype for a in args if isinstance(a, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def test_products_take_what_autocast_would_give_them():
    """torch has no autocast for meta tensors, but one for tensors of a CPU without memory."""

    def products(device, context):
        with torch.device(device):
            model = GPT(TINY)
            idx = torch.empty(2, 12, dtype=torch.int64)
        with Names() as names:
            with context:
                loss = model(idx, idx)
            loss.backward()
        return [(name.split(".")[1], dtypes) for name, dtypes in names.found if name.split(".")[1] in ("mm", "addmm")]

    ours = products("meta", autocast(BF16))
    with FakeTensorMode():
        torchs = products("cpu", torch.autocast("cpu", BF16))
    assert ours == torchs
    assert len(ours) == 18 * TINY.n_layer
    assert {dtype for _, dtypes in ours for dtype in dtypes} == {BF16}
    assert not torch.is_autocast_enabled("cpu")


def test_seconds_are_the_largest_of_three():
    assert MACHINE.seconds(Launch(10**9, 10, 10)) == 1e-3
    assert MACHINE.seconds(Launch(10, 10**8, 10**8)) == pytest.approx(2e-2)
    assert MACHINE.seconds(Launch(10, 10, 10)) == 1e-7


def test_the_sums_are_those_of_the_rows():
    step = tiny_step()
    result = analyse(step, MACHINE)
    for name, calls in (("micro_step", step.micro_step), ("optimizers", step.optimizers)):
        phase = result[name]
        for column in SUMMED:
            groups = [
                sum(row[column] for row in phase["rows"] if (row["group"] == ELSE) == (g == ELSE)) for g in GROUPS
            ]
            assert [phase[group][column] for group in GROUPS] == pytest.approx(groups)
            assert phase["all"][column] == pytest.approx(sum(groups))
        assert phase["all"]["calls"] == len(calls)
        launches = [launch for call in calls for launch in call.launches]
        assert phase["all"]["launches"] == len(launches)
        assert phase["all"]["ms"] == pytest.approx(1e3 * sum(map(MACHINE.seconds, launches)))
        times = [row["ms"] for row in phase["rows"]]
        assert times == sorted(times, reverse=True)
    seconds = result["micro_step"]["all"]["ms"] / 1e3
    assert result["tokens_per_second"] == pytest.approx(24 / seconds)
    assert result["mfu"] == pytest.approx(step.model.estimate_flops() * 24 / seconds / 2e12)
    assert 0 < result["floor"]["bytes"] < result["micro_step"][ELSE]["read"] + result["micro_step"][ELSE]["written"]


# --- measured ---


def event(name, time, parent=None, device=DeviceType.CPU):
    return SimpleNamespace(name=name, device_time_total=time, cpu_parent=parent, device_type=device)


def test_measured_time_belongs_to_the_outermost_modelled_operator():
    linear = event("aten::linear", 3000)
    mm = event("aten::mm", 3000, linear)
    loss = event("nanochat_native::linear_cross_entropy", 7000)
    inner = event("aten::mm", 5000, event("aten::anything", 5000, loss))
    other = event("aten::fill_", 500)
    kernel = event("gemm", 3000, device=DeviceType.CUDA)
    found = measurement.by_operator([linear, mm, loss, inner, other, kernel], {mm.name, loss.name})
    assert found == {mm.name: 3, loss.name: 7, measurement.OTHER: 0.5}


def test_measured_beside_modelled(monkeypatch, capsys):
    def measured(config, rows, dtype, optimizer, accumulate, names):
        if rows > 4:
            raise torch.OutOfMemoryError
        return {phase: {**dict.fromkeys(names, 2.0), measurement.OTHER: 1.0} for phase in ("micro_step", "optimizers")}

    monkeypatch.setattr(worker, "measure", measured)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert worker.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("depth 12, 4 x 2048 tokens, vocabulary 32768 | bfloat16 | hybrid | NVIDIA H100")
    assert lines[2].split()[-2:] == ["ms", "measured"]
    assert next(line for line in lines if line.split()[:1] == ["mm"]).split()[-1] == "2.000"
    assert next(line for line in lines if line.startswith("other operators")).split()[-1] == "1.000"


def test_a_gpu_that_is_not_in_the_table_does_not_fail_the_stage(monkeypatch, capsys, tmp_path):
    result = tmp_path / "result.json"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(worker, "measure", lambda *_: pytest.fail("nothing to compare with"))
    result.write_text('{"limits": {}}')
    for args in ([], [str(result)]):
        assert worker.main(args) == 0
        assert capsys.readouterr().out == "left out: the rates of Tesla T4 are neither in the table nor measured\n"
    result.write_text('{"limits": {"copy": 250.0, "bfloat16_product": 41000.0}}')
    times = {"micro_step": {measurement.OTHER: 1.0}, "optimizers": {measurement.OTHER: 1.0}}
    monkeypatch.setattr(worker, "measure", lambda *_: times)
    assert worker.main([str(result)]) == 0
    out = capsys.readouterr().out
    assert "| Tesla T4: 41 TFLOP/s, 0.25 TB/s, " in out
    assert "MFU not known" in out


def test_the_stage_is_given_the_result(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(gpu, "run_limited", lambda command, *_: commands.append(command) or 0)
    options = Namespace(quick=True, json=tmp_path / "result.json", only="", skip_tests=True, device="cuda", commit="a")
    gpu.Run(options).roofline()
    (command,) = commands
    assert command[2:] == ["nanochat_native.lab.roofline.worker", str(tmp_path / "result.json")]
    assert json.loads(Path(command[-1]).read_text())["limits"] == {}


def test_the_worker_needs_no_package_beside_torch(tmp_path):
    for package in ("tyro", "matplotlib", "tiktoken", "rustbpe", "safetensors", "tqdm"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not here')")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import nanochat_native.lab.roofline.worker"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


# --- the command ---

SMALL = ["--depth", "2", "--device-batch-size", "2", "--max-seq-len", "64", "--vocab-size", "512"]


def test_the_table_is_printed_and_written(tmp_path, capsys):
    assert main([*SMALL, "--json", str(tmp_path / "roofline.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "roofline.json").read_text())
    assert lines[0].startswith("depth 2, 2 x 64 tokens, vocabulary 512 | bfloat16 | hybrid | H200: 791 TFLOP/s")
    (total,) = (line for line in lines if line.startswith("micro-step: "))
    assert f"{result['micro_step']['all']['calls']:,} operator calls" in total
    assert f"{result['tokens_per_second']:,.0f} tokens/s, MFU {result['mfu']:.3f}" in total
    assert any(f"the floor, one pass between products over {result['floor']['bytes'] / 1e9:.1f} GB" in x for x in lines)
    printed = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("  in all")]
    rows = [row for phase in ("micro_step", "optimizers") for row in result[phase]["rows"]]
    assert sorted(printed) == sorted(row["operator"].partition("::")[2] for row in rows)


def test_json_has_its_keys_and_is_all_that_is_printed(capsys):
    assert main([*SMALL, "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == [
        "format",
        "command",
        "options",
        "machine",
        "tokens",
        "flops_per_token",
        "tokens_per_second",
        "mfu",
        "micro_step",
        "optimizers",
        "floor",
    ]
    assert result["machine"] == {
        "name": "H200",
        "flops": pytest.approx(0.8 * 989e12),
        "bandwidth": pytest.approx(0.9 * 4.8e12),
        "launch": 3e-6,
        "peak": 989e12,
    }
    assert set(result["micro_step"]) == {"rows", *GROUPS, "all", "waits"}
    for row in result["micro_step"]["rows"]:
        assert set(row) == {"operator", "group", *SUMMED}


@pytest.mark.slow
@pytest.mark.parametrize("depth", [12, 20])
def test_the_table_of_the_documentation(depth, capsys):
    flags = "--device-batch-size 16 --vocab-size 32768 --flops 790e12 --bandwidth 4.3e12 --json -"
    assert main(["--depth", str(depth), *flags.split()]) == 0
    result = json.loads(capsys.readouterr().out)
    step = result["micro_step"]
    times = [step["all"]["ms"], *(step[group]["ms"] for group in GROUPS), result["floor"]["ms"]]
    row = [f"`--depth {depth}`", *(f"{ms:.1f} ms" for ms in times), f"{result['mfu']:.2f}"]
    row += [f"{step['all'][column]}" for column in ("calls", "launches")]
    assert f"| {' | '.join(row)} |" in (ROOT / "docs/experiments.md").read_text().splitlines()


def test_picture_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([*SMALL, "--plot", str(tmp_path / "roofline.png")]) == 0
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_rates_may_be_given_as_numbers(capsys):
    flags = ["--gpu", "my own", "--flops", "1e12", "--bandwidth", "1e11", "--launch", "1e-6", "--dtype", "float32"]
    assert main([*SMALL, *flags, "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["machine"]["flops"], result["machine"]["peak"], result["mfu"]) == (1e12, None, None)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--gpu T4", "--flops is needed: T4 is not in the table"),
        ("--gpu T4 --flops 1e12", "--bandwidth is needed: T4 is not in the table"),
        ("--dtype float32", "--flops is needed: the table has no rates of torch.float32, only of bfloat16"),
        ("--flops 0", "--flops must be a finite number > 0, got 0.0"),
        ("--bandwidth inf", "--bandwidth must be a finite number > 0, got inf"),
        ("--launch -1", "--launch must be a finite number > 0, got -1.0"),
        ("--depth 0", "--depth must be a whole number >= 1, got 0"),
        ("--optimizer sgd", "invalid choice 'sgd' for argument '--optimizer'"),
        ("--n-kv-head 4", "n_head must be a multiple of n_kv_head 4, got 6"),
        ("--window-pattern X", "window_pattern must be a word of the letters L and S"),
        ("--json nowhere/x.json --depth 1", "nowhere/x.json: No such file or directory"),
    ],
)
def test_wrong_flags_are_one_line(args, says, capsys):
    assert main(args.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert says in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_measuring_without_a_gpu_is_refused(capsys):
    assert main([*SMALL, "--measure"]) == 2
    assert capsys.readouterr().err == "error: --measure needs a GPU, and torch sees none\n"
