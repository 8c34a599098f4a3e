"""Rows of conversations: best fit, and where each conversation stands in a row."""

import random

import numpy as np
import pytest

from nanochat_native.data.conversation_rows import ConversationRows, best_fit


def plain_best_fit(lengths, capacity):
    """Best fit by looking at every row."""
    rows = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = [capacity - sum(lengths[i] for i in row) for row in rows]
        fitting = [space for space in free if space >= lengths[index]]
        if fitting:
            rows[free.index(min(fitting))].append(index)
        else:
            rows.append([index])
    return [sum(lengths[i] for i in row) for row in rows]


@pytest.mark.parametrize("seed", range(6))
def test_best_fit_fills_rows_as_a_search_of_all_rows_does(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, rng.choice((10, 64))) for _ in range(rng.randint(1, 200))]
    rows = best_fit(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(plain_best_fit(lengths, 64))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64
    assert best_fit(lengths, 64) == rows


def test_the_first_rows_hold_conversations_of_all_lengths():
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(3.5, 1.0, 4000), 2, 256).astype(int).tolist()
    documents = [(np.zeros(length + 1), np.ones(length + 1, dtype=bool)) for length in lengths]
    rows, again = (ConversationRows(documents, 256, packed=True).rows for _ in range(2))
    assert rows == again
    assert sorted(map(sorted, rows)) == sorted(map(sorted, best_fit(lengths, 256)))
    first = [lengths[i] for row in rows[: len(rows) // 5] for i in row]
    assert np.mean(first) == pytest.approx(np.mean(lengths), rel=0.15)


def test_best_fit_takes_the_fullest_row_with_room_and_the_first_of_equal_lengths():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]
    assert best_fit([5, 5, 5], 10) == [[0, 1], [2]]
    assert best_fit([], 10) == []
    for bad in ([11], [0, 3]):
        with pytest.raises(ValueError, match="lengths must be from 1 to 10"):
            best_fit(bad, 10)


def random_documents(count=60, longest=40, seed=1):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, count)
    return [(rng.integers(0, 90, n).tolist(), rng.integers(0, 2, n).astype(bool).tolist()) for n in lengths]


def test_a_packed_row_is_its_conversations_one_behind_the_other():
    documents = random_documents()
    single = ConversationRows(documents, 32)
    rows = ConversationRows(documents, 32, packed=True)
    assert len(rows.rows) < len(documents) / 1.2
    assert (rows.num_targets, len(rows)) == (single.num_targets, len(rows.rows) * 32 + 1)
    for number, indices in enumerate(rows.rows):
        inputs, targets = rows.pair(number * 32, 32)
        begin = 0
        for index in indices:
            size = len(rows.documents[index][0]) - 1
            for found, own in zip((inputs, targets), single.pair(index * 32, 32), strict=True):
                assert found[begin : begin + size].tolist() == own[:size].tolist()
            begin += size
        assert not inputs[begin:].any()
        assert (targets[begin:] == -1).all()
    used = sum(min(len(tokens), 33) - 1 for tokens, _ in documents)
    assert rows.padding == pytest.approx(1 - used / (32 * len(rows.rows)))
    assert len(list(rows.windows(32))) == len(rows.rows)
