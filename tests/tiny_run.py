"""Tiny training runs for the tests: a generated text, a model of two layers, seconds."""

import json
import random
import time

import torch

from nanochat_native.ops import backends
from nanochat_native.train import main

BACKEND = "torch" if backends.load_error else "native"
HANGS = 300  # seconds after which a wait fails; on a busy machine no test needs as many


def wait_until(condition, seconds=HANGS):
    """Wait until condition() is true, and return its value. Fails after `seconds`, which only end a hang."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.01)
    return found


def write_text(path, documents=120, seed=0):
    """A small language of its own: sentences of subject, verb and object with a fixed grammar."""
    rng = random.Random(seed)
    nouns = ("tensor", "kernel", "matrix", "gradient", "token", "layer")
    verbs = ("multiplies", "feeds", "scales", "rotates")
    lines = []
    for number in range(documents):
        sentences = [f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}." for _ in range(12)]
        lines.append(json.dumps({"text": f"document {number}: " + " ".join(sentences)}))
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_flags(folder, *, steps=8, run="tiny", **flags):
    """Flags of a run below `folder`, which holds text.jsonl."""
    values = {
        "data": folder / "text.jsonl",
        "cache_dir": folder / "cache",
        "out_dir": folder / "runs",
        "run": run,
        "device": "cpu",
        "backend": BACKEND,
        "recipe": "october",
        "depth": 2,
        "head_dim": 32,
        "max_seq_len": 32,
        "vocab_size": 300,
        "device_batch_size": 2,
        "total_batch_size": 128,
        "num_iterations": steps,
        "eval_every": 4,
        "eval_tokens": 256,
        "sample_every": 0,
        "save_every": 4,
    }
    values |= flags
    args = []
    for name, value in values.items():
        args += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return args


def train(folder, **flags):
    """Exit code of a run in this process, on one thread: for so small a model a second one only waits."""
    torch.set_num_threads(1)
    return main(tiny_flags(folder, **flags))


def assert_refused(capsys, run_dir, code, message):
    """A command ended with `code` because of a mistake: one line that says `message`, and no folder of a run."""
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not run_dir.exists()


def records(run_dir, kind):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir):
    """[(step, loss)] of training and of validation, as they are in the log, in order."""
    return [(kind, r["step"], r["loss"]) for kind in ("train", "val") for r in records(run_dir, kind)]
