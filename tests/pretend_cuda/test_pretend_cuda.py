"""The pretend device is what the package expects of a CUDA device, and finds what a program does wrong on one."""

import ctypes
import io
import os
import signal

import pytest
import torch

from pretend_cuda import on_pretend_cuda, python_on_pretend_cuda
from pretend_cuda.counted_training import UNPINNED

CUDA = torch.device("cuda")


def randn(*shape, **options):
    return torch.randn(*shape, device=CUDA, **options)


# --- torch on the device ---


@on_pretend_cuda(devices=2)
def test_torch_finds_the_devices():
    assert torch.cuda.is_available()
    assert (torch.cuda.device_count(), torch.cuda.current_device()) == (2, 0)
    assert torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.get_device_properties(1).multi_processor_count == 4
    with torch.cuda.device(1):
        assert torch.empty(3, device="cuda").device == torch.device("cuda", 1)
    assert torch.empty(3, device="cuda").device == torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="invalid device ordinal 2"):
        torch.empty(3, device="cuda:2")


@on_pretend_cuda
def test_tensors_are_what_they_are_on_the_cpu():
    assert torch.empty(3, device=CUDA).isnan().all()
    a, b = randn(3, 4), torch.arange(12, device=CUDA).view(4, 3).float()
    torch.testing.assert_close((a @ b).cpu(), a.cpu() @ b.cpu())
    assert a.t().contiguous().stride() == (3, 1)
    torch.testing.assert_close(a[1:, ::2].cpu(), a.cpu()[1:, ::2])
    torch.testing.assert_close(a[a > 0].cpu(), a.cpu()[a.cpu() > 0])
    index = torch.tensor([0, 2], device=CUDA)
    torch.testing.assert_close(a[:, index].cpu(), a.cpu()[:, index.cpu()])
    a[0] = 5
    a.mul_(2).view(-1)[3] = 7
    assert a[0].tolist() == [10, 10, 10, 7]
    out = torch.empty(0, device=CUDA)
    torch.add(a, 1, out=out)
    assert torch.equal(out, a + 1)
    assert torch.cat([a, a]).topk(2).indices.device.type == "cuda"
    assert torch.multinomial(a.abs(), 1).shape == (3, 1)
    assert torch.empty_like(torch.empty(2, 2, device="meta"), device=CUDA).shape == (2, 2)
    half = randn(4, 4, dtype=torch.bfloat16)
    assert torch.mm(half, half, out_dtype=torch.float32).dtype == torch.float32
    with pytest.raises(RuntimeError, match="out_dtype must be"):
        torch.mm(half, half, out_dtype=torch.float64)


@on_pretend_cuda
def test_random_numbers_repeat_from_a_seed():
    first = torch.Generator(CUDA).manual_seed(3)
    state = first.get_state()
    drawn = torch.rand(2, device=CUDA, generator=first)
    first.set_state(state)
    assert torch.equal(torch.rand(2, device=CUDA, generator=first), drawn)
    torch.manual_seed(5)
    a = randn(3)
    torch.manual_seed(5)
    assert torch.equal(randn(3), a)


@on_pretend_cuda
def test_a_network_trains():
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).to(CUDA)
    x, targets = randn(5, 8), torch.randint(0, 4, (5,), device=CUDA)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
        assert logits.dtype == torch.bfloat16
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded["0.weight"], net[0].weight)
    assert loaded["0.weight"].device.type == "cuda"


@on_pretend_cuda
def test_inference_mode_and_attention_of_torch():
    with torch.inference_mode():
        q = randn(1, 2, 8, 4)
        q.view(-1)[0] = 1
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q.cpu(), q.cpu(), q.cpu(), is_causal=True)
    torch.testing.assert_close(out.cpu(), expected)


@on_pretend_cuda(memory=1 << 20)
def test_memory_is_counted_and_ends():
    start = torch.cuda.memory_allocated()
    x = torch.empty(100_000, device=CUDA)
    assert torch.cuda.memory_allocated() - start == 400_384  # a multiple of 512, as CUDA's
    free, total = torch.cuda.mem_get_info()
    assert (total, free) == (1 << 20, (1 << 20) - torch.cuda.memory_allocated())
    with pytest.raises(torch.cuda.OutOfMemoryError, match="Tried to allocate 800000 bytes"):
        torch.empty(200_000, device=CUDA)
    del x
    assert torch.cuda.memory_allocated() == start
    assert torch.cuda.max_memory_allocated() >= start + 400_384
    torch.empty(200_000, device=CUDA)


@on_pretend_cuda(capability=(8, 0))
def test_an_older_gpu_runs_the_older_kernels():
    from nanochat_native import ops

    assert torch.cuda.get_device_capability() == (8, 0)
    assert ops.cuda_instruction_set() == "sm_80"
    os.environ["NANOCHAT_CUDA_ISA"] = "sm_90a"
    with pytest.raises(ValueError, match="sm_90a: this GPU"):
        ops.cuda_instruction_set()


@on_pretend_cuda
def test_a_forked_process_has_memory_of_its_own():
    x = torch.ones(1000, device=CUDA)
    child = os.fork()
    if not child:
        torch.zeros(1000, device=CUDA).fill_(7)
        del x
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert x.sum().item() == 1000


# --- streams ---


@on_pretend_cuda
def test_streams_and_events():
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
        assert torch.cuda.current_stream().cuda_stream == side.cuda_stream
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != side
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    end.record(side)
    end.synchronize()
    assert start.elapsed_time(end) >= 0


@on_pretend_cuda
def test_sleep_ends_when_it_is_waited_for():
    side = torch.cuda.Stream()
    torch.cuda._sleep(1000)
    slept = torch.cuda.Event()
    slept.record()
    assert not slept.query()
    assert side.query()
    side.wait_event(slept)
    assert not side.query()
    side.synchronize()
    assert slept.query()


@on_pretend_cuda
def test_a_copy_to_pinned_memory_lands_when_it_is_waited_for():
    x = torch.arange(4.0, device=CUDA)
    y = x.to("cpu", non_blocking=True)
    assert y.is_pinned()
    assert y.isnan().all()
    copied = torch.cuda.Event()
    copied.record()
    copied.synchronize()
    assert y.tolist() == [0, 1, 2, 3]

    tokens = torch.zeros(3, dtype=torch.int64, pin_memory=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tokens.copy_(torch.arange(3, device=CUDA), non_blocking=True)
    torch.cuda.current_stream().synchronize()  # another stream
    assert tokens.tolist() == [-1, -1, -1]
    torch.cuda.current_stream().wait_stream(side)
    x.sum().item()  # waits for the current stream, which waits for the other
    assert tokens.tolist() == [0, 1, 2]


@on_pretend_cuda
def test_a_pinned_buffer_that_is_reused_too_early_is_found():
    buffer = torch.arange(4.0).pin_memory()
    x = buffer.to(CUDA, non_blocking=True)
    torch.cuda.synchronize()
    buffer.fill_(7)
    buffer.to(CUDA, non_blocking=True)
    buffer.fill_(8)
    with pytest.raises(RuntimeError, match="pinned buffer was changed"):
        torch.cuda.synchronize()
    assert x.tolist() == [0, 1, 2, 3]


@on_pretend_cuda
def test_waits_are_counted_and_refused():
    import pretend_device

    x, pinned = randn(4), torch.zeros(4).pin_memory()
    with pretend_device.counted() as calls:
        x.sum().item()
        x.cpu()
        pinned.to(CUDA, non_blocking=True)
        torch.ones(4).to(CUDA, non_blocking=True)
    assert calls["sync aten::_local_scalar_dense"] == 1
    assert calls["sync copy to host"] == 1
    assert calls[UNPINNED] == 1
    assert calls["aten::sum.IntList_out"] == 1

    recorded = torch.cuda.Event()
    recorded.record()
    waiting = {
        "device.synchronize": torch.cuda.synchronize,
        "stream.synchronize": torch.cuda.current_stream().synchronize,
        "event.synchronize": recorded.synchronize,
    }
    for name, wait in waiting.items():
        with pretend_device.counted() as calls:
            wait()
        assert calls == {f"sync {name}": 1}
    with pretend_device.counted() as calls:
        recorded.query()
        torch.cuda.current_stream().wait_event(recorded)
    assert calls == {}

    waiting = [
        x.tolist,
        torch.cuda.current_stream().synchronize,
        lambda: x[x > 0],
        x.nonzero,
        lambda: torch.equal(x, x),
        lambda: torch.tensor([1.0], device=CUDA),
    ]
    torch.cuda.set_sync_debug_mode("error")
    for wait in waiting:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            wait()
    (x * 2).sum()
    x.to("cpu", non_blocking=True)
    torch.cuda.set_sync_debug_mode("default")


# --- what is found ---


@on_pretend_cuda(devices=2)
def test_tensors_of_two_devices_do_not_mix():
    x, y = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
    for other in (y, y.cpu()):
        with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
            x + other
    assert (x + y.to("cuda:0")).sum().item() == 6
    assert (x + torch.tensor(1.0)).sum().item() == 6  # a number


def test_host_code_that_reads_device_memory_dies():
    text = "import ctypes, torch; x = torch.ones(3, device='cuda'); print(ctypes.string_at(x.data_ptr(), 4))"
    assert python_on_pretend_cuda(["-c", text], check=False).returncode == -signal.SIGSEGV
    assert "b'" in python_on_pretend_cuda(["-c", text], strict=False).stdout


@on_pretend_cuda(strict=False)
def test_writes_outside_of_allocations_are_found():
    import pretend_device

    x = torch.ones(3, device=CUDA)
    for place, where in ((x.data_ptr() + 12, "behind the end"), (x.data_ptr() - 1, "before the start")):
        ctypes.memset(place, 0, 1)
        with pytest.raises(RuntimeError, match=f"a write {where} of an allocation of 12 bytes"):
            pretend_device.check_memory()
    place = x.data_ptr()
    del x
    assert ctypes.string_at(place, 4) == b"\xff" * 4
    ctypes.memset(place, 0, 1)
    with pytest.raises(RuntimeError, match="a write to memory that was freed"):
        pretend_device.check_memory()


# --- graphs ---


@on_pretend_cuda
def test_a_graph_repeats_what_was_captured():
    x, weight = torch.zeros(4, device=CUDA), randn(4, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = weight @ x
        total = torch.zeros((), device=CUDA)
        total += y.sum()
        x.add_(1)
    assert x.sum().item() == 0  # capturing runs nothing
    assert y.isnan().all()
    for number in range(3):
        x.fill_(number)
        graph.replay()
        torch.testing.assert_close(y, weight.sum(1) * number)
        torch.testing.assert_close(total, y.sum())
        assert x[0].item() == number + 1


@on_pretend_cuda
def test_a_graph_reads_freed_memory_as_poison():
    x, y = torch.ones(4, device=CUDA), torch.zeros(4, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.copy_(x * 2)
    graph.replay()
    assert y.tolist() == [2] * 4
    del x
    graph.replay()
    assert y.isnan().all()


@on_pretend_cuda
def test_backward_and_side_streams_are_captured():
    weight, x = randn(3, 3, requires_grad=True), randn(3)
    weight.grad = torch.zeros_like(weight)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        (weight @ x).square().sum().backward()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            norm = weight.grad.norm()
        torch.cuda.current_stream().wait_stream(side)
    x.normal_()
    graph.replay()
    expected = 2 * torch.outer(weight.detach() @ x, x)
    torch.testing.assert_close(weight.grad, expected)
    torch.testing.assert_close(norm, expected.norm())


@on_pretend_cuda
def test_what_a_capture_cannot_hold_is_an_error():
    x, other = randn(4), torch.cuda.Stream()

    def on_another_stream():
        with torch.cuda.stream(other):
            x.add(1)

    refused = {
        "not permitted when stream is capturing": (x.tolist, torch.cuda.synchronize, lambda: x.copy_(torch.ones(4))),
        "does not belong to the capture": (on_another_stream,),
    }
    for message, calls in refused.items():
        for call in calls:
            with (
                pytest.raises(RuntimeError, match="due to a previous error") as found,
                torch.cuda.graph(torch.cuda.CUDAGraph()),
            ):
                call()
            assert message in str(found.value.__context__)
            assert not torch.cuda.is_current_stream_capturing()
            torch.cuda.set_stream(torch.cuda.default_stream())
    with pytest.raises(RuntimeError, match="preceding successful capture"):
        torch.cuda.CUDAGraph().replay()
