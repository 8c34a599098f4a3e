"""The loader: every target once an epoch, one global batch for every world size, and a well-behaved thread."""

import gc
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import HANGS, wait_until

from nanochat_native.data import BatchLoader, Prefetcher, TokenStream, iterate_val
from nanochat_native.data.loader import permute


def counting_stream(count: int, pieces: int = 3) -> TokenStream:
    """Token i is i, so that a batch tells which positions it holds."""
    return TokenStream(np.array_split(np.arange(count, dtype=np.uint32), pieces))


def batch_threads() -> int:
    return sum(thread.name == "batches" for thread in threading.enumerate())


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n, key):
    keys = np.array([key, key ^ 0x1234567, key // 3], dtype=np.uint64)
    assert np.array_equal(np.sort(permute(np.arange(n), n, keys)), np.arange(n))


def test_permute_far_beyond_memory():
    n = 10**15 + 7
    out = permute(np.arange(1000), n, np.arange(1, 7, dtype=np.uint64))
    assert len(np.unique(out)) == 1000
    assert out.min() >= 0
    assert out.max() < n
    assert out.mean() == pytest.approx(n / 2, rel=0.1)


def test_windows_are_shuffled():
    loader = BatchLoader(counting_stream(10_001), batch_rows=1000, sequence_len=10, seed=0)
    order = loader.positions(0) // 10
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert (np.diff(order) == 1).sum() < 10


@pytest.mark.parametrize(("tokens", "rows"), [(1001, 4), (1005, 25), (1009, 7), (1010, 100)])
def test_every_target_once_an_epoch(tokens, rows):
    T = 10
    loader = BatchLoader(counting_stream(tokens), batch_rows=rows, sequence_len=T, seed=3)
    n = loader.windows_per_epoch
    assert n == (tokens - 1) // T
    steps = -(-2 * n // rows)
    batches = [loader.batch(step) for step in range(steps)]
    inputs = torch.cat([b[0] for b in batches])
    targets = torch.cat([b[1] for b in batches])
    assert torch.equal(targets, inputs + 1)
    for epoch in range(2):
        seen = targets[epoch * n : (epoch + 1) * n].flatten()
        assert len(seen.unique()) == n * T, "no target twice"
    if (tokens - 1) % T == 0:
        assert torch.equal(targets[:n].flatten().sort().values, torch.arange(1, tokens))
    assert not torch.equal(targets[:n], targets[n : 2 * n]), "epochs differ in order"


def test_left_out_targets_change_with_the_epoch():
    loader = BatchLoader(counting_stream(1010), batch_rows=100, sequence_len=10, seed=1)
    left_out = [frozenset(range(1, 1010)) - set(loader.batch(e)[1].flatten().tolist()) for e in range(20)]
    assert {len(x) for x in left_out} == {9}
    assert len(set(left_out)) > 3


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_global_batch_does_not_depend_on_the_world(world_size):
    stream = counting_stream(2000)
    whole = BatchLoader(stream, batch_rows=12, sequence_len=16, seed=5)
    ranks = [
        BatchLoader(stream, batch_rows=12, sequence_len=16, seed=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in (0, 1, 10, 999):
        for part in (0, 1):
            assert torch.equal(torch.cat([loader.batch(step)[part] for loader in ranks]), whole.batch(step)[part])


def test_batch_is_a_function_of_seed_and_step():
    stream = counting_stream(5000)
    a, b = (BatchLoader(stream, batch_rows=8, sequence_len=16, seed=7) for _ in range(2))
    forward = [a.batch(step)[0] for step in range(50)]
    for step in reversed(range(50)):
        assert torch.equal(b.batch(step)[0], forward[step])
    other = BatchLoader(stream, batch_rows=8, sequence_len=16, seed=8)
    assert not torch.equal(other.batch(0)[0], forward[0])
    inputs, targets = a.batch(0)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (8, 16)
    assert inputs.is_contiguous()


def test_order_is_the_same_on_every_machine():
    loader = BatchLoader(counting_stream(10_000), batch_rows=6, sequence_len=7, seed=42)
    assert loader.positions(0).tolist() == [8885, 499, 7163, 604, 8395, 4839]
    assert loader.positions(1234).tolist() == [8577, 1010, 3866, 8843, 3670, 6981]


@pytest.mark.parametrize("start", [0, 17])
def test_prefetch_gives_the_same_batches(start):
    loader = BatchLoader(counting_stream(3000), batch_rows=4, sequence_len=16, seed=2)
    with loader.iterate(start) as batches:
        for step in range(start, start + 20):
            inputs, targets = next(batches)
            assert torch.equal(inputs, loader.batch(step)[0])
            assert torch.equal(targets, loader.batch(step)[1])
        assert batch_threads() == 1
    assert batch_threads() == 0
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_is_bounded():
    loader = BatchLoader(counting_stream(3000), batch_rows=4, sequence_len=16, seed=2)
    made = []
    original = loader._host_batch
    loader._host_batch = lambda step: made.append(step) or original(step)  # type: ignore[method-assign]
    with loader.iterate(depth=3) as batches:
        next(batches)
        time.sleep(0.3)
        assert made == list(range(len(made)))
        assert len(made) <= 1 + 3 + 1


def test_error_of_the_thread_reaches_the_consumer():
    loader = BatchLoader(counting_stream(3000), batch_rows=4, sequence_len=16, seed=2)
    original = loader._host_batch

    def failing(step):
        if step == 3:
            raise OSError("disk gone")
        return original(step)

    loader._host_batch = failing  # type: ignore[method-assign]
    batches = loader.iterate()
    for _ in range(3):
        next(batches)
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert batch_threads() == 0


class RecordedCopy:
    """Stands in for the copy of a batch to a GPU."""

    def __init__(self, batch, log):
        self.batch, self.log = batch, log
        log.append(("begin", batch))

    def get(self):
        self.log.append(("get", self.batch))
        return self.batch


def test_the_copy_of_the_next_batch_begins_when_a_batch_is_taken():
    log = []
    with Prefetcher(lambda step: step, lambda batch: RecordedCopy(batch, log), 5, depth=2) as batches:
        for step in (5, 6, 7):
            wait_until(batches._queue.full)
            assert next(batches) == step
    assert log == [("begin", 5), ("get", 5), ("begin", 6), ("get", 6), ("begin", 7), ("get", 7), ("begin", 8)]
    with pytest.raises(StopIteration):
        next(batches)


def test_a_batch_whose_copy_could_not_begin_ahead_is_copied_when_it_is_asked_for():
    log = []
    may_go_on = threading.Event()

    def produce(step):
        assert step == 0 or may_go_on.wait(HANGS)
        return step

    with Prefetcher(produce, lambda batch: RecordedCopy(batch, log), 0, depth=2) as batches:
        assert next(batches) == 0
        assert log == [("begin", 0), ("get", 0)]
        may_go_on.set()
        assert next(batches) == 1


def test_an_error_of_the_thread_comes_after_the_batches_before_it():
    def produce(step):
        if step == 2:
            raise OSError("disk gone")
        return step

    batches = Prefetcher(produce, lambda batch: RecordedCopy(batch, []), 0, depth=4)
    wait_until(lambda: batches._queue.qsize() == 3)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert batch_threads() == 0


def test_forgotten_iterator_ends_its_thread():
    loader = BatchLoader(counting_stream(3000), batch_rows=4, sequence_len=16, seed=2)
    batches = loader.iterate()
    next(batches)
    assert batch_threads() == 1
    del batches
    gc.collect()
    wait_until(lambda: batch_threads() == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_rows": 0}, "must be >= 1"),
        ({"sequence_len": 0}, "must be >= 1"),
        ({"batch_rows": 5, "world_size": 2}, "multiple of world_size 2"),
        ({"rank": 2, "world_size": 2}, "rank must be in \\[0, 2\\), got 2"),
        ({"rank": -1}, "rank must be .* got -1"),
        ({"batch_rows": 64}, "100 training tokens make 9 rows of 10 tokens, but a batch needs 64"),
        ({"sequence_len": 100}, "make 0 rows"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        BatchLoader(counting_stream(100), **{"batch_rows": 4, "sequence_len": 10, "seed": 0, **options})


def test_negative_step():
    loader = BatchLoader(counting_stream(100), batch_rows=4, sequence_len=10, seed=0)
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        loader.batch(-1)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("tokens", [2, 11, 12, 100, 101])
def test_validation_holds_every_target_once(tokens, world_size):
    rows = [
        (inputs, targets)
        for rank in range(world_size)
        for inputs, targets in iterate_val(
            counting_stream(tokens), batch_rows=3, sequence_len=10, rank=rank, world_size=world_size
        )
    ]
    assert all(len(inputs) <= 3 for inputs, _ in rows)
    inputs = torch.cat([row[0].flatten() for row in rows])
    targets = torch.cat([row[1].flatten() for row in rows])
    wanted = targets != -1
    assert targets[wanted].tolist() == list(range(1, tokens))
    assert torch.equal(inputs[wanted] + 1, targets[wanted])
    assert (inputs[~wanted] == 0).all()


def test_validation_can_be_limited():
    batches = list(iterate_val(counting_stream(1000), batch_rows=4, sequence_len=10, max_tokens=95))
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 2]
    with pytest.raises(ValueError, match="must be >= 2 validation tokens, got"):
        next(iterate_val(counting_stream(1, pieces=1), batch_rows=4, sequence_len=10))


@given(cuts=st.lists(st.integers(0, 50), max_size=5), data=st.data())
@settings(max_examples=80, deadline=None)
def test_stream_reads_over_shards(cuts, data):
    tokens = np.arange(50)
    stream = TokenStream(np.split(tokens.astype("<u2"), sorted(cuts)))
    start = data.draw(st.integers(0, 50))
    stop = data.draw(st.integers(start, 50))
    assert len(stream) == 50
    assert np.array_equal(stream.read(start, stop), tokens[start:stop])
    left, right = stream.split_at(start)
    assert np.array_equal(left.read(0, start), tokens[:start])
    assert np.array_equal(right.read(0, 50 - start), tokens[start:])
    with pytest.raises(ValueError, match="must be within 0:50, got"):
        stream.read(start, 51)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_batches_equal_cpu_batches():
    stream = counting_stream(20_000)
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    loader = BatchLoader(stream, batch_rows=8, sequence_len=64, seed=1, device=device)
    reference = BatchLoader(stream, batch_rows=8, sequence_len=64, seed=1)
    assert loader._host_batch(0)[0].is_pinned()
    with loader.iterate() as batches:
        for step in range(20):
            inputs, targets = next(batches)
            assert inputs.device == device
            assert torch.equal(inputs.cpu(), reference.batch(step)[0])
            assert torch.equal(targets.cpu(), reference.batch(step)[1])


def test_the_fingerprint_of_a_stream_is_that_of_its_tokens():
    tokens = np.arange(50_000) % 40_000
    found = TokenStream([tokens.astype("<u2")]).fingerprint()
    assert found == TokenStream(np.array_split(tokens.astype("<u4"), 7)).fingerprint()
    for position in (0, 4096, 30_000, 49_999):
        changed = tokens.copy()
        changed[position] += 1
        assert TokenStream([changed]).fingerprint() != found
    assert (
        len({TokenStream([np.zeros(n, "<u2")]).fingerprint() for n in (0, 1, 2)} | {TokenStream([]).fingerprint()}) == 3
    )


def test_the_fingerprint_of_a_long_stream_has_parts_of_each_shard():
    shards = [np.full(20_000, i, dtype="<u2") for i in range(60)]
    found = TokenStream(shards).fingerprint()
    for i in range(60):
        others = [*shards[:i], shards[i] + 1, *shards[i + 1 :]]
        assert TokenStream(others).fingerprint() != found
    assert TokenStream([*shards, shards[0][:1]]).fingerprint() != found
