import pytest

from nanochat_native.exercises.chapter_11 import LIMIT, judge, own_rows, ring_inputs, ring_step


def result(rows=27, mib=394.5, **options):
    sizes = {"depth": 6, "max_seq_len": 256, "vocab_size": 8192, "device_batch_size": rows}
    return {"options": sizes | options, "measured": [1, mib * 2**20, 2]}


@pytest.mark.parametrize(
    ("measured", "right", "says"),
    [
        (result(), True, "one more would not fit"),
        (result(rows=26, mib=386.3), False, "more sequences fit"),
        (result(rows=28, mib=LIMIT / 2**20 + 1), False, "more than 400"),
        (result(depth=4), False, "--depth must be 6, got 4"),
        (result(max_seq_len=128), False, "--max-seq-len must be 256, got 128"),
    ],
)
def test_the_largest_micro_batch_is_judged(measured, right, says):
    verdict, text = judge(measured)
    assert verdict == right
    assert says in text


def test_shards_hold_every_row_once():
    for rows, ranks in ((50257, 8), (3, 4), (8, 4)):
        owned = [row for rank in range(ranks) for row in range(*own_rows(rows, ranks, rank))]
        assert owned == list(range(rows))


def test_steps_of_the_ring_end_with_the_sum_of_a_chunk_on_each_rank():
    held, _ = ring_inputs()[2]
    total = held.sum(0)
    for step in range(3):
        held = ring_step(held, step)
    for rank in range(4):
        chunk = (rank + 1) % 4
        assert held[rank, chunk].tolist() == pytest.approx(total[chunk].tolist(), abs=1e-5)
