"""NANOCHAT_LOGIT_BYTES: the models of memory and time have one rule, which is that of python/ops_cuda.cpp."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_native import ops
from nanochat_native.lab.memory import prediction
from nanochat_native.lab.memory.options import Options
from nanochat_native.lab.roofline import costs
from nanochat_native.ops import backends

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "NANOCHAT_LOGIT_BYTES"


def test_the_default_is_that_of_the_kernel(monkeypatch):
    (value,) = re.findall(r"kLogitBytes = int64_t{(\d+)} << 20", (ROOT / "python/ops_cuda.cpp").read_text())
    for text in (None, ""):
        if text is None:
            monkeypatch.delenv(VARIABLE, raising=False)
        else:
            monkeypatch.setenv(VARIABLE, text)
        assert backends.logit_bytes() == int(value) << 20


def test_the_models_read_it_at_each_call(monkeypatch):
    monkeypatch.setenv(VARIABLE, str(4 * 2 * 512))
    assert backends.logit_bytes() == 4096
    assert costs.logit_rows(1024, 2 * 512) == 4
    options = Options(device="cuda", depth=2, max_seq_len=256, vocab_size=512)
    few = prediction.snapshots(options)
    monkeypatch.delenv(VARIABLE)
    assert costs.logit_rows(1024, 2 * 512) == 1024
    assert few != prediction.snapshots(options)


@pytest.mark.parametrize("text", ["abc", "0", "-1", "1e9", " 1", "+1", "1_000", "\u0661", str(2**63)])
def test_another_value_is_refused(text, monkeypatch):
    monkeypatch.setenv(VARIABLE, text)
    message = re.escape(f"{VARIABLE} must be a number of bytes > 0, got {text}") + "$"
    uses = (backends.logit_bytes, ops.check_environment, lambda: costs.logit_rows(8, 8))
    for use in (*uses, lambda: prediction.snapshots(Options(device="cuda", depth=2))):
        with pytest.raises(ValueError, match=message):
            use()


def test_largest_value(monkeypatch):
    monkeypatch.setenv(VARIABLE, f"0{2**63 - 1}")
    assert backends.logit_bytes() == 2**63 - 1


@pytest.mark.parametrize("flags", [["--help"], ["--depth", "2"]])
def test_a_wrong_value_is_no_traceback_of_a_command(flags):
    environment = os.environ | {VARIABLE: "abc"}
    command = [sys.executable, "-m", "nanochat_native.memory", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if flags == ["--help"]:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert (done.returncode, done.stderr) == (2, f"error: {VARIABLE} must be a number of bytes > 0, got abc\n")
