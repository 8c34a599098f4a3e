"""The bench on ranks: what is sent is what the arithmetic says."""

import pytest

from nanochat_native.bench import ranks


@pytest.mark.slow
def test_two_ranks_send_two_halves_of_the_parameters():
    alone, two = (ranks.run(size, repeats=2) for size in (1, 2))
    assert (alone["ranks"], alone["sent_bytes"]) == (1, 0)
    exact = 2 * (2 - 1) * alone["parameter_bytes"] // 2
    assert exact <= two["sent_bytes"] <= 1.02 * exact  # rows and matrices are padded
    line = ranks.describe(two, alone)
    assert f"{two['sent_bytes'] / 1e6:.1f} MB sent by a rank" in line
    assert "2 x 1 thread" in line


def test_failed_ranks_report_their_output(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr(ranks.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="1 ranks"):
        ranks.run(1, repeats=1)
