"""What must hold of every operator with CUDA kernels: same bits again, CUDA graphs, no waiting, few launches, any
stream and device, and nothing for compute-sanitizer to find."""

import gc
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from calls import ADAMW, BF16, CALLS, F32, F64, adamw
from sizes import SMALL, pick

from nanochat_native import ops
from nanochat_native.bench.gpu_clock import count_launches
from nanochat_native.ops import backends, reference
from nanochat_native.optim import AdamW, Muon, clip_grad_norm_

pytestmark = pytest.mark.gpu

HALF_A_SECOND = 1_000_000_000  # cycles; a GPU's clock is below 2 GHz or little above
SANITIZER_SECONDS = 60


@pytest.fixture(params=CALLS)
def call(request, device, require_native):
    made = CALLS[request.param](device, small=SMALL)
    require_native(*made.operators)
    return made


def assert_equal(ours, theirs):
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(mine, other), f"result {index} differs"


def test_the_module_has_the_kernels(cuda):
    for operator in backends.CUDA_OPERATORS:
        assert ops.serves(operator, cuda) == ("native", "kernel built")


def test_same_bits_a_hundred_times(call, device):
    first = call()
    for _ in range(pick(99, 1) if device.type == "cuda" else 2):
        assert_equal(call(), first)


def test_nothing_waits_for_the_device(call, cuda):
    """The call returns while the device still sleeps; torch's own check names the place if it does not."""
    for _ in range(2):  # modules are loaded, memory is at hand
        call()
    tensors = [tensor.clone() for tensor in call.tensors]
    torch.cuda.synchronize()
    woke = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(HALF_A_SECOND)
        woke.record()
        call.run(tensors)
        waited = woke.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert not waited


def test_replays_of_a_graph_equal_eager_calls(call, cuda):
    static = [tensor.clone() for tensor in call.tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run(static)
    clobber(cuda)
    for scale in (1.0, 0.5):
        values = [tensor * scale if tensor.is_floating_point() else tensor for tensor in call.tensors]
        for tensor, value in zip(static, values, strict=True):
            tensor.copy_(value)
        graph.replay()
        expected = call.run([value.clone() for value in values])
        if call.same_bits:
            assert_equal(results, expected)
        else:
            for mine, other in zip(results, expected, strict=True):
                torch.testing.assert_close(mine, other)


def clobber(device):
    """Overwrites memory that was freed: a graph that still reads from there is found out."""
    gc.collect()
    junk = [torch.full((n,), -1, dtype=torch.int64, device=device) for n in (64, 512, 4096, 1 << 16, 1 << 20)]
    pinned = [torch.full((n,), -1, dtype=torch.int64, pin_memory=True) for n in (64, 512, 4096, 1 << 16)]
    host = [bytearray(b"\xff" * n) for n in (1 << 8, 1 << 12, 1 << 16, 1 << 20)]
    torch.cuda.synchronize()
    del junk, pinned, host


def quarters(tensors):
    """params, grads, exp_avgs, exp_avg_sqs of calls.adamw."""
    count = len(tensors) // 4
    return [tensors[i * count : (i + 1) * count] for i in range(4)]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_adamw_in_a_graph_reads_step_and_rates_from_the_device(cuda, require_native, dtype):
    require_native("adamw_")
    call = adamw(cuda, SMALL, dtype)
    step = torch.ones((), dtype=torch.int64, device=cuda)
    lr, weight_decay = (torch.zeros((), dtype=F64, device=cuda) for _ in range(2))
    rates = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "stochastic_rounding": True, "seed": 7}
    static, eager = ([tensor.clone() for tensor in call.tensors] for _ in range(2))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm = [tensor.clone() for tensor in call.tensors]
        ops.adamw_(*quarters(warm), step=step, lr=lr, weight_decay=weight_decay, **rates)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.adamw_(*quarters(static), step=step, lr=lr, weight_decay=weight_decay, **rates)
    assert_equal(static, eager)  # capturing runs nothing
    clobber(cuda)
    for number, rate, decay in ((1, 0.1, 0.1), (2, 0.03, 0.0), (3, 0.0, 0.5), (1000, 1e-4, 0.01)):
        step.fill_(number)
        lr.fill_(rate)
        weight_decay.fill_(decay)
        for gradients in (quarters(static)[1], quarters(eager)[1]):
            for gradient in gradients:
                gradient.mul_(-0.7)
        graph.replay()
        ops.adamw_(*quarters(eager), step=number, lr=rate, weight_decay=decay, **rates)
        assert_equal(static, eager)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tensors_and_numbers_give_the_same_bits(device, require_native, dtype):
    require_native("adamw_", "muon_momentum_", "muon_update_")
    numbers = {"momentum": 0.9, "lr": 0.3, "weight_decay": 0.1}
    tensors = {name: torch.tensor(number, dtype=F64, device=device) for name, number in numbers.items()}
    call = adamw(device, SMALL, dtype)
    grads, buffers, params = ([p.detach().clone() for p in matrices(4, device)] for _ in range(3))
    results = []
    for step, given in ((7, numbers), (torch.tensor(7, device=device), tensors)):
        rates = {"lr": given["lr"], "weight_decay": given["weight_decay"]}
        lists = quarters([tensor.clone() for tensor in call.tensors])
        ops.adamw_(*lists, **ADAMW | rates | {"step": step})
        momenta, changed = ([tensor.clone() for tensor in each] for each in (buffers, params))
        update = ops.muon_momentum_(grads, momenta, momentum=given["momentum"])
        ops.muon_update_(changed, update, **rates)
        results.append([*lists[0], *lists[2], *lists[3], update, *momenta, *changed])
    assert_equal(*results)


# --- launches ---


def matrices(count, device):
    parameters = [torch.nn.Parameter(torch.randn(33, 65, device=device)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def launches(function):
    function()
    counted = count_launches(function)
    if counted is None:
        pytest.skip("the profiler sees no kernel on this machine")
    return counted


def phase(count, device):
    """Steps of Muon on `count` matrices and of AdamW on as many tensors."""
    optimizers = [Muon(matrices(count, device)), AdamW(matrices(count, device))]
    return lambda: [optimizer.step() for optimizer in optimizers]


def operators(count, device):
    grads, buffers, params, squares = ([p.detach().abs() for p in matrices(count, device)] for _ in range(4))
    update = ops.muon_momentum_(grads, buffers, momentum=0.9, return_norm=True)[0]
    return {
        "adamw_": lambda: ops.adamw_(params, grads, buffers, squares, **ADAMW),
        "muon_momentum_": lambda: ops.muon_momentum_(grads, buffers, momentum=0.9, return_norm=True),
        "muon_update_": lambda: ops.muon_update_(params, update, lr=0.1),
        "newton_schulz_update_": lambda: ops.newton_schulz_update_(params, update, lr=0.1),
    }


@pytest.mark.parametrize("operator", ["adamw_", "muon_momentum_", "muon_update_", "newton_schulz_update_"])
def test_launches_do_not_grow_with_the_number_of_tensors(cuda, require_native, operator):
    require_native(operator)
    few, many = (launches(operators(count, cuda)[operator]) for count in (4, 400))
    assert few <= (20 if operator == "newton_schulz_update_" else 6)
    assert many <= few + 2  # one for every several hundred tensors


def test_the_optimizers_launches_do_not_grow_with_the_number_of_tensors(cuda, require_native):
    require_native("adamw_", "muon_momentum_", "newton_schulz_update_")
    few, many = (launches(phase(count, cuda)) for count in (4, 400))
    assert many <= few + 10, f"{few} launches for 4 tensors, {many} for 400"


def test_a_step_of_muon_in_a_graph(cuda, require_native):
    """Captured once, replayed with new gradients and rates: the bits of eager steps."""
    require_native("muon_momentum_", "newton_schulz_update_")
    graphed, eager = matrices(5, cuda), matrices(5, cuda)
    for mine, other in zip(graphed, eager, strict=True):
        other.data.copy_(mine.data)
        other.grad.copy_(mine.grad)
    lr, momentum = (torch.full((), value, dtype=F64, device=cuda) for value in (0.1, 0.9))
    optimizer = Muon(graphed, lr=0.1, momentum=0.9)
    optimizer.param_groups[0] |= {"lr": lr, "momentum": momentum}
    other = Muon(eager, lr=0.1, momentum=0.9)
    for each in (optimizer, other):
        each.step()  # state is allocated, kernels are loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    clobber(cuda)
    for rate, decay in ((0.03, 0.5), (0.2, 0.95)):
        lr.fill_(rate)
        momentum.fill_(decay)
        other.param_groups[0] |= {"lr": rate, "momentum": decay}
        for parameter in (*graphed, *eager):
            parameter.grad.mul_(-0.7)
        graph.replay()
        other.step()
        assert_equal(graphed, eager)


# --- streams and devices ---


def late_inputs(call, device):
    """Runs the call on the current stream, where its inputs arrive only after half a second."""
    late = [torch.zeros_like(tensor) for tensor in call.tensors]
    torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
    torch.cuda._sleep(HALF_A_SECOND)
    for tensor, value in zip(late, call.tensors, strict=True):
        tensor.copy_(value, non_blocking=True)
    results = call.run(late)
    torch.cuda.current_stream(device).synchronize()
    return results


def test_work_goes_to_the_current_stream(call, cuda):
    expected = call()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        results = late_inputs(call, cuda)
    for mine, other in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_of_another_device_than_the_current_one(cuda, require_native, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    other = torch.device("cuda", 1)
    call = CALLS[name](other, small=SMALL)
    require_native(*call.operators)
    copies = [tensor.to("cuda:0") for tensor in call.tensors]
    with torch.cuda.device(0):
        results, expected = call(), call.run(copies)
    assert all(result.device == other for result in results)
    for mine, value in zip(results, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), value.cpu())


# --- compute-sanitizer ---


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(cuda, require_native, tool):
    require_native("attention", "adamw_", "muon_momentum_", "muon_update_", "linear_cross_entropy")
    require_native("add_rms_norm", "embedding_rms_norm", "mix_rms_norm", "rotary_norm", "relu_squared_backward_")
    require_native("add_value_embedding", "add_value_embedding_backward", "smear")
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer was not found")
    script = Path(__file__).with_name("sanitized.py")
    command = [program, "--tool", tool, "--error-exitcode", "86", "--kernel-name", "kns=nanochat", sys.executable]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor is an allocation, with its ends
    try:
        result = subprocess.run(
            [*command, str(script)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=script.parents[2],
            timeout=SANITIZER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer {tool} did not end within {SANITIZER_SECONDS} s")
    output = result.stdout + result.stderr
    if re.search("Device not supported|not supported on this|error 999", output):
        pytest.skip("compute-sanitizer does not take this machine's device")
    assert (result.returncode, "all calls ran" in output) == (0, True), output[-4000:]


def test_references_agree_on_the_device(device):
    """Compare the references on the GPU with those on the CPU: a wrong reference would hide a wrong kernel."""
    grads = [torch.randn(5, 7, device=device)]
    for kind in (torch.device("cpu"), device):
        buffers = [torch.zeros(5, 7, device=kind)]
        update = reference.muon_momentum_([grads[0].to(kind)], buffers, momentum=0.9)
        torch.testing.assert_close(update.cpu(), (0.9 * 0.1 + 0.1) * grads[0].cpu()[None])


def test_the_clips_launches_hardly_grow_with_the_number_of_tensors(cuda):
    few, many = (launches(partial(clip_grad_norm_, matrices(count, cuda), 1e-3)) for count in (4, 400))
    assert many <= few + 20, f"{few} launches for 4 tensors, {many} for 400"  # torch's lists: one for every hundred


def test_the_clip_measures_and_scales(cuda):
    parameters = matrices(5, cuda)
    exact = torch.cat([parameter.grad.double().flatten() for parameter in parameters]).norm()
    assert abs(clip_grad_norm_(parameters, 1.0).item() / exact.item() - 1) < 1e-6
    clipped = torch.cat([parameter.grad.double().flatten() for parameter in parameters]).norm()
    assert abs(clipped.item() - 1) < 1e-5
