"""bfloat16 copies of weights: when they are made and made again, and the operators that write them."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from backends import BACKENDS, INSTRUCTION_SETS, usable_instruction_sets
from tensor_lists import assert_lists_equal, clone, number, state, unaligned
from torch import nn

from nanochat_native import ops
from nanochat_native.ops import weight_copies
from nanochat_native.ops.weight_copies import copy_for_update, keep, mark_fresh, refresh

BF16 = torch.bfloat16
RATES = {"lr": 0.1, "weight_decay": 0.5, "scale": 1.5}
ADAMW = {"step": 3, "lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}


def low_precision(weight, dtype):
    """Call the function of the package for a weight whose copy is kept."""
    if not torch.compiler.is_compiling():
        keep([weight])
    return weight_copies.low_precision(weight, dtype)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def assert_is_copy(weight):
    """The copy has the weight's values, and is kept."""
    kept = low_precision(weight, BF16)
    assert kept.dtype == BF16
    assert kept.device == weight.device
    assert not kept.requires_grad
    assert torch.equal(kept, weight.detach().to(BF16))
    assert low_precision(weight, BF16) is kept
    return kept


# --- low_precision ---


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_weights_of_other_optimizers_are_cast_at_each_use(optimizer):
    """The fused optimizers of torch do not raise the version of a weight."""
    weight = parameter(3, 5)
    stale = optimizer([weight], lr=0.1, fused=True)
    for _ in range(2):
        first = weight_copies.low_precision(weight, BF16)
        weight.grad = torch.ones_like(weight)
        stale.step()
        again = weight_copies.low_precision(weight, BF16)
        assert not torch.equal(again, first)
        assert torch.equal(again, weight.detach().to(BF16))
    assert not weight_copies.is_stale(weight)


def test_a_copy_is_freed_when_its_weight_takes_another_dtype():
    module = nn.Linear(4, 4)
    kept = weakref.ref(low_precision(module.weight, BF16))
    module.bfloat16()
    low_precision(module.weight, BF16)
    gc.collect()
    assert kept() is None


def test_copy_is_made_once():
    assert_is_copy(parameter(3, 5))
    assert_is_copy(torch.randn(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16, torch.float16])
def test_weight_of_the_type_shares_its_memory(dtype):
    weight = nn.Parameter(torch.randn(3).to(dtype))
    same = low_precision(weight, dtype)
    assert same.data_ptr() == weight.data_ptr()
    assert not same.requires_grad


@pytest.mark.parametrize(
    ("kind", "dtype"), [(torch.float32, torch.float16), (torch.float64, BF16), (BF16, torch.float32)]
)
def test_other_types_are_cast_at_each_use(kind, dtype):
    weight = nn.Parameter(torch.randn(3).to(kind))
    first = low_precision(weight, dtype)
    assert torch.equal(first, weight.detach().to(dtype))
    assert low_precision(weight, dtype) is not first
    assert copy_for_update(weight) is None


def edit(weight):
    with torch.no_grad():
        weight.mul_(3)


def edit_a_view(weight):
    with torch.no_grad():
        weight[0].add_(1)


def load(weight):
    module = nn.Module()
    module.weight = weight
    module.load_state_dict({"weight": torch.randn_like(weight)})


def load_by_assignment(weight):
    weight.data = torch.randn_like(weight)


def assign_twice(weight):
    """The allocator gives the memory of the first tensor to the third one."""
    for _ in range(2):
        weight.data = torch.randn_like(weight)
        gc.collect()


def assign_a_transpose(weight):
    weight.data = weight.data.t()


def assign_another_row_of_one_storage(weight):
    weight.data = torch.cat([torch.randn_like(weight), weight.data])[weight.size(0) :]
    low_precision(weight, BF16)
    weight.data = weight.data.as_strided(weight.shape, weight.stride(), 0)


def announce(weight):
    weight.data.add_(1)
    torch.autograd.graph.increment_version(weight)


def update(weight):
    ops.adamw_([weight.detach()], *([torch.rand_like(weight)] for _ in range(3)), **ADAMW)


def update_in_plain_torch(weight):
    weight.grad = torch.randn_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


CHANGES = [
    edit,
    edit_a_view,
    load,
    load_by_assignment,
    assign_twice,
    assign_a_transpose,
    assign_another_row_of_one_storage,
    announce,
    update,
    update_in_plain_torch,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_copy_is_made_again_when_the_weight_changes(change):
    weight = parameter(4, 4)
    for _ in range(3):
        assert_is_copy(weight)
        before = weight.detach().clone()
        change(weight)
        assert not torch.equal(weight, before)
        assert_is_copy(weight)


def test_copy_keeps_its_address_while_shape_and_device_stay():
    weight = parameter(4, 4)
    first = low_precision(weight, BF16)
    for change in (edit, load, load_by_assignment):
        change(weight)
        assert low_precision(weight, BF16) is first
    weight.data = torch.randn(2, 3)
    assert assert_is_copy(weight) is not first


def test_copy_of_a_module_that_moves():
    module = nn.Linear(3, 4)
    assert_is_copy(module.weight)
    module.to("meta")
    assert low_precision(module.weight, BF16).is_meta
    module.to_empty(device="cpu")
    nn.init.normal_(module.weight)
    assert_is_copy(module.weight)
    module.to(BF16)
    assert low_precision(module.weight, BF16).data_ptr() == module.weight.data_ptr()
    module.to(torch.float32)
    assert_is_copy(module.weight)


def test_functional_call_uses_the_copies_of_its_tensors():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = parameter(3, 3)

        def forward(self):
            return low_precision(self.weight, BF16)

    module, other = Product(), torch.randn(3, 3)
    own = module()
    assert torch.equal(torch.func.functional_call(module, {"weight": other}, ()), other.to(BF16))
    assert module() is own


def test_strides_are_kept_and_other_strides_are_not_updated():
    weight = nn.Parameter(torch.randn(4, 6).t())
    kept = assert_is_copy(weight)
    assert kept.stride() == weight.stride()
    assert copy_for_update(weight) is None
    edit(weight)
    assert assert_is_copy(weight) is kept


def test_copy_dies_with_its_weight():
    weight = parameter(4, 4)
    low_precision(weight, BF16)
    gc.collect()
    count = len(weight_copies._copies)
    del weight
    gc.collect()
    assert len(weight_copies._copies) == count - 1


def test_a_weight_that_changed_its_memory_frees_the_old_one():
    weight = parameter(4, 4)
    low_precision(weight, BF16)
    old = weight_copies.StorageWeakRef(weight.untyped_storage())
    weight.data = torch.randn(4, 4)
    assert old.expired()


def test_copies_are_neither_saved_nor_pickled_nor_copied():
    module = nn.Linear(64, 64)

    def size():
        buffer = io.BytesIO()
        torch.save(module, buffer)
        return len(buffer.getvalue()), len(pickle.dumps(module)), list(module.state_dict()), dir(module.weight)

    before = size()
    assert_is_copy(module.weight)
    assert size() == before
    twin = copy.deepcopy(module)
    assert copy_for_update(twin.weight) is None
    assert_is_copy(twin.weight)


def test_copy_made_in_inference_mode_serves_training():
    weight = parameter(3, 3)
    with torch.inference_mode():
        kept = low_precision(weight, BF16)
        assert not kept.is_inference()
    edit(weight)
    with torch.inference_mode():
        assert low_precision(weight, BF16) is kept
        inference = torch.randn(3)
        assert torch.equal(low_precision(inference, BF16), inference.to(BF16))
    assert_is_copy(weight)
    x = torch.randn(2, 3, dtype=BF16, requires_grad=True)
    (x @ low_precision(weight, BF16)).sum().backward()
    assert x.grad is not None


def test_a_copy_that_changes_before_the_backward_pass_is_refused():
    weight, x = parameter(3, 3), torch.randn(2, 3, dtype=BF16, requires_grad=True)
    loss = (x @ low_precision(weight, BF16)).sum()
    edit(weight)
    refresh([weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_code_and_transforms_cast_the_weight():
    weight, x = parameter(3, 3), torch.randn(2, 3)

    def product(weight, x):
        return (x.to(BF16) @ low_precision(weight, BF16)).float().square().sum()

    def plain(weight, x):
        return (x.to(BF16) @ weight.to(BF16)).float().square().sum()

    low_precision(weight, BF16)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(weight, x), weight)
    (expected,) = torch.autograd.grad(plain(weight, x), weight)
    assert torch.equal(gradient, expected)
    edit(weight)
    assert torch.equal(compiled(weight, x), plain(weight, x))
    assert torch.equal(torch.func.grad(product)(weight.detach(), x), torch.func.grad(plain)(weight.detach(), x))
    tangents = (torch.ones(3, 3), torch.zeros(2, 3))
    ours, theirs = (torch.func.jvp(f, (weight.detach(), x), tangents)[1] for f in (product, plain))
    assert torch.equal(ours, theirs)
    stack = torch.randn(4, 3, 3)
    assert torch.equal(*(torch.func.vmap(f, in_dims=(0, None))(stack, x) for f in (product, plain)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight.detach(), torch.ones(3, 3))
        assert torch.autograd.forward_ad.unpack_dual(low_precision(dual, BF16)).tangent is not None


def test_tensors_without_data_have_no_copy():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.randn(3, 3)
        assert low_precision(weight, BF16).dtype == BF16
        assert copy_for_update(weight) is None


def test_nothing_is_cast_while_a_graph_is_captured(monkeypatch):
    fresh, unused, edited = (parameter(3, 3) for _ in range(3))
    kept = [low_precision(weight, BF16) for weight in (fresh, edited)]
    edit(edited)
    monkeypatch.setattr(weight_copies, "_is_capturing", lambda weight: True)
    assert low_precision(fresh, BF16) is kept[0]
    for weight in (unused, edited):
        with pytest.raises(RuntimeError, match=r"shape \(3, 3\), must be written before a CUDA graph is captured"):
            low_precision(weight, BF16)
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
        refresh([edited])
    refresh([fresh, unused])
    monkeypatch.undo()
    assert_is_copy(edited)


# --- refresh, copy_for_update ---


def test_refresh_writes_what_has_changed_and_makes_no_copies():
    weights = [parameter(4, 4) for _ in range(5)]
    fresh, edited, moved, unused, reshaped = weights
    copies = {weight: low_precision(weight, BF16) for weight in weights if weight is not unused}
    edit(edited)
    load_by_assignment(moved)
    reshaped.data = torch.randn(2, 3)
    versions = {weight: kept._version for weight, kept in copies.items()}
    refresh(iter(weights))
    assert copies[fresh]._version == versions[fresh]
    for weight in (edited, moved):
        assert torch.equal(copies[weight], weight.detach().to(BF16))
        assert low_precision(weight, BF16) is copies[weight]
    assert_is_copy(reshaped)
    assert copy_for_update(unused) is None


def test_refresh_takes_values_that_are_at_hand():
    weight, value = parameter(4, 4), torch.randn(4, 4, dtype=BF16)
    kept = low_precision(weight, BF16)
    with torch.no_grad():
        weight.copy_(value)
    refresh([weight], [value])
    assert torch.equal(kept, value)
    assert low_precision(weight, BF16) is kept


def test_updated_copy_is_not_cast_again():
    weight = parameter(4, 4)
    kept = low_precision(weight, BF16)
    assert copy_for_update(weight) is kept
    with torch.no_grad():
        weight.add_(1)
        kept.copy_(weight)
        mark_fresh(weight)
        version = kept._version
        assert low_precision(weight, BF16) is kept
        assert kept._version == version
    mark_fresh(parameter(2, 2))


# --- operators ---


def run_adamw(lists, copies, **options):
    ops.adamw_(*lists, copies=copies, **ADAMW | options)


def empty_copies(params, place=list):
    return place([torch.full(param.shape, torch.nan, dtype=BF16) for param in params])


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("place", [list, unaligned])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adamw_writes_copies(backend, place, cautious):
    ops.use_backend(backend)
    lists = state()
    expected, copies = clone(lists), empty_copies(lists[0], place)
    versions = [kept._version for kept in copies]
    run_adamw(lists, copies, cautious=cautious)
    run_adamw(expected, None, cautious=cautious)
    assert_lists_equal(lists, expected)
    assert_lists_equal([copies], [[param.to(BF16) for param in lists[0]]])
    assert all(kept._version > version for kept, version in zip(copies, versions, strict=True))


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("place", [list, unaligned])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 65), (3, 20, 30)], ids=str)
@pytest.mark.parametrize("operator", [ops.muon_update_, ops.newton_schulz_update_])
@pytest.mark.parametrize("backend", BACKENDS)
def test_muon_writes_copies(backend, operator, shape, place, cautious):
    ops.use_backend(backend)
    params, change = [torch.randn(shape) for _ in range(3)], torch.randn(3, *shape)
    others, copies = [param.clone() for param in params], empty_copies(params, place)
    versions = [kept._version for kept in copies]
    operator(params, change, copies=copies, cautious=cautious, **RATES)
    operator(others, change, cautious=cautious, **RATES)
    assert_lists_equal([params, copies], [others, [param.to(BF16) for param in params]])
    assert all(kept._version > version for kept, version in zip(copies, versions, strict=True))


def test_copies_are_rounded_to_the_nearest_and_ties_to_even():
    """Without an update the params stay: every pattern of the 16 bits that are dropped, and special numbers."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    for high in (0x3F80, 0x3F81, 0xC2FF, 0x7F7F, 0x0000, 0x8001):
        values = (bits + (high << 16 if high < 1 << 15 else (high << 16) - (1 << 32))).view(torch.float32)
        params, copies = [values.clone()], empty_copies([values])
        ops.muon_update_(params, torch.zeros(1, 1 << 16), copies=copies, lr=0.0)
        assert torch.equal(params[0], values)
        assert torch.equal(copies[0], values.to(BF16))
    params = [torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])]
    copies = empty_copies(params)
    ops.muon_update_(params, torch.zeros(1, 4), copies=copies, lr=0.0)
    assert copies[0].tolist()[:2] == [torch.inf, -torch.inf]
    assert copies[0][2].isnan()


def test_numbers_in_tensors_with_copies():
    params, change = [torch.randn(9, 5)], torch.randn(1, 9, 5)
    others, copies = clone([params])[0], empty_copies(params)
    ops.muon_update_(params, change, lr=number(0.1), weight_decay=number(0.2), copies=copies)
    ops.muon_update_(others, change, lr=0.1, weight_decay=0.2)
    assert_lists_equal([params, copies], [others, [param.to(BF16) for param in others]])


WRONG = [
    ([torch.zeros(3, 3)], TypeError, r"copies\[0\] must be torch.bfloat16, got torch.float32"),
    ([torch.zeros(3, 4, dtype=BF16)], ValueError, r"copies\[0\] must have shape \(3, 3\) like params\[0\]"),
    ([torch.zeros(3, 3, dtype=BF16).t()], ValueError, r"copies\[0\] must be contiguous"),
    ([torch.zeros(3, 3, dtype=BF16)] * 2, ValueError, "copies must have the length of params, 1, got 2"),
    ([torch.zeros(3, 3, dtype=BF16, device="meta")], ValueError, r"copies\[0\] must be on cpu like params\[0\]"),
]


def calls(params, copies):
    """A call of each operator."""
    change = torch.zeros(1, 3, 3)
    return [
        lambda: ops.adamw_(params, *([torch.ones_like(params[0])] for _ in range(3)), copies=copies, **ADAMW),
        lambda: ops.muon_update_(params, change, copies=copies, lr=0.1),
        lambda: ops.normuon_update_(params, change, [torch.zeros(3, 1)], copies=copies, lr=0.1),
        lambda: ops.newton_schulz_update_(params, change, copies=copies, lr=0.1),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("copies", "error", "words"), WRONG)
def test_wrong_copies_are_refused(copies, error, words, backend):
    ops.use_backend(backend)
    for call in calls([torch.zeros(3, 3)], copies):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_of_bfloat16_params_are_refused(backend):
    ops.use_backend(backend)
    for call in calls([torch.zeros(3, 3, dtype=BF16)], [torch.zeros(3, 3, dtype=BF16)]):
        with pytest.raises(TypeError, match=r"copies must be None unless params are torch.float32, got torch.bfloat16"):
            call()


def test_the_raw_operators_check_copies():
    raw = torch.ops.nanochat_native
    zeros, half = torch.zeros(3, 3), torch.zeros(3, 3, dtype=BF16)
    room = torch.zeros(3, 6)
    rest = (0.1, 0.0, 1.0, False, None, None)
    for params, copies, error, words in (
        ([zeros], [zeros.clone()], TypeError, "copies must have one of the dtypes"),
        ([half], [half.clone()], TypeError, "params must be float32 if there are copies, got"),
        ([zeros], [half, half], ValueError, "copies must have 1 tensors, as params"),
        ([zeros], [half.t()], ValueError, r"copies\[0\] must be contiguous"),
        ([room.flatten()[:9].view(3, 3)], [room.view(BF16).flatten()[:9].view(3, 3)], ValueError, "share memory"),
    ):
        with pytest.raises(error, match=words):
            raw.muon_update_(params, torch.zeros(1, 3, 3), copies, *rest)
        with pytest.raises(error, match=words):
            raw.newton_schulz_update_(params, torch.zeros(1, 3, 3), copies, [1.0, 2.0, 3.0], 1.0, None, *rest)


def same_bits(isa):
    """Params with and without copies, and copies, for 1 and 2 threads on one instruction set."""
    assert ops.instruction_set() == isa
    lists, change = state(), torch.randn(3, 129, 67)
    matrices = [torch.randn(129, 67) for _ in range(3)]
    for cautious in (False, True):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for place in (None, list, unaligned):
                ours, others = clone(lists), [clone([matrices])[0] for _ in range(2)]
                copies = [empty_copies(tensors, place) if place else None for tensors in (ours[0], *others)]
                run_adamw(ours, copies[0], cautious=cautious)
                ops.muon_update_(others[0], change, copies=copies[1], cautious=cautious, **RATES)
                ops.newton_schulz_update_(others[1], change, copies=copies[2], cautious=cautious, **RATES)
                results.append([*ours, *others])
                for written, params in zip(copies, (ours[0], *others), strict=True):
                    if place:
                        assert_lists_equal([written], [[param.to(BF16) for param in params]])
        for result in results[1:]:
            assert_lists_equal(result, results[0])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_copies_change_no_bit_on_any_instruction_set_with_1_and_2_threads(isa):
    if isa not in usable_instruction_sets():
        pytest.skip(f"this processor has no {isa}")
    program = f"from test_ops_weight_copies import same_bits; same_bits({isa!r})"
    paths = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)), os.getcwd()])
    environment = os.environ | {"NANOCHAT_CPU_ISA": isa, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
