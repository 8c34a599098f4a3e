import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, use

from nanochat_native import checkpoint, evaluate, run_folder
from nanochat_native.config import TrainConfig, with_defaults
from nanochat_native.data import prepare
from nanochat_native.evaluate import evaluate_bpb
from nanochat_native.model import GPT, GPTConfig

CONFIG = GPTConfig(sequence_len=16, vocab_size=40, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
TOKEN_BYTES = np.array([i % 7 for i in range(40)], dtype=np.int32)


def build(config=CONFIG):
    model = GPT(config)
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def batches(seed=0):
    """Two batches of different shapes, with ignored targets."""
    generator = torch.Generator().manual_seed(seed)
    for rows, length in ((3, 16), (1, 5)):
        idx, targets = torch.randint(0, 40, (2, rows, length), generator=generator)
        targets[0, 1:4] = -1
        yield idx, targets


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_definition(backend):
    model = build()
    nats = total_bytes = all_nats = count = 0
    with use(backend):
        result = evaluate.evaluate(model, batches(), TOKEN_BYTES)
        assert evaluate_bpb(model, batches(), torch.from_numpy(TOKEN_BYTES)) == result.bpb
        for idx, targets in batches():
            logits = model(idx).detach().double()
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
            for loss, target in zip(losses.tolist(), targets.flatten().tolist(), strict=True):
                if target == -1:
                    continue
                count += 1
                all_nats += loss
                if TOKEN_BYTES[target] > 0:
                    nats += loss
                    total_bytes += int(TOKEN_BYTES[target])
    assert (result.targets, result.bytes) == (count, total_bytes)
    assert count == 3 * 16 + 5 - 6
    assert result.bpb == pytest.approx(nats / (math.log(2) * total_bytes), rel=1e-6)
    assert result.loss == pytest.approx(all_nats / count, rel=1e-6)


def test_a_uniform_model_takes_log2_of_the_vocabulary():
    model = GPT(CONFIG)
    model.init_weights()
    with use("torch"):
        result = evaluate.evaluate(model, batches(), np.full(40, 2))
    assert result.bpb == pytest.approx(math.log2(40) / 2, rel=1e-6)
    assert result.loss == pytest.approx(math.log(40), rel=1e-6)


def test_bad_arguments():
    model = build()
    with use("torch"):
        with pytest.raises(ValueError, match=r"\(39,\); it takes \(40,\)"):
            evaluate_bpb(model, batches(), TOKEN_BYTES[:-1])
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate_bpb(model, batches(), np.zeros(40, dtype=np.int32))
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate_bpb(model, [], TOKEN_BYTES)


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a run over a small text."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(2000)))
    config = TrainConfig(out_dir=tmp_path, run="r", data=str(text), cache_dir=tmp_path / "cache")
    (tmp_path / "r").mkdir()
    run_folder.save_config(with_defaults(config, gpu=False))
    corpus = prepare(str(text), vocab_size=300, cache_dir=tmp_path / "cache")
    corpus.tokenizer.save(tmp_path / "r" / "tokenizer")
    shape = {**vars(CONFIG), "vocab_size": corpus.vocab_size}
    weights = {name: p.detach() for name, p in build(GPTConfig(**shape)).named_parameters()}
    meta = {"model_config": shape, "tokenizer_hash": corpus.tokenizer.hash}
    checkpoint.save(tmp_path / "r" / "checkpoints", 5, {"model": weights}, meta)
    return tmp_path / "r"


def command(capsys, *args):
    with use("torch"):
        code = evaluate.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_line(run_dir, capsys):
    code, out, _ = command(capsys, "--checkpoint", run_dir, "--json")
    assert code == 0
    measured = json.loads(out)

    corpus = prepare(str(run_dir.parent / "text.txt"), vocab_size=300, cache_dir=run_dir.parent / "cache")
    tokens = torch.from_numpy(corpus.val.read(0, len(corpus.val)))
    model = build(GPTConfig(**{**vars(CONFIG), "vocab_size": corpus.vocab_size}))
    windows = [(tokens[i : i + 16][None], tokens[i + 1 : i + 17][None]) for i in range(0, len(tokens) - 1, 16)]
    windows = [(x[:, : y.size(1)], y) for x, y in windows]
    with use("torch"):
        expected = evaluate.evaluate(model, windows, corpus.tokenizer.token_bytes)
    assert measured["bytes"] == expected.bytes > 1000
    assert measured["targets"] == len(tokens) - 1
    assert measured["bpb"] == pytest.approx(expected.bpb, rel=1e-6)

    code, out, _ = command(capsys, "--checkpoint", run_dir)
    assert f"{measured['bpb']:.4f} bits per byte" in out
    _, out, _ = command(capsys, "--checkpoint", run_dir, "--json", "--split", "train", "--max-tokens", 100)
    assert json.loads(out)["targets"] == 112, "rounded up to windows of 16"
    other = run_dir.parent / "other.txt"
    other.write_text("abcdefg " * 500)
    _, out, _ = command(capsys, "--checkpoint", run_dir, "--json", "--data", other)
    assert json.loads(out)["bytes"] != measured["bytes"]


def test_command_line_mistakes_are_one_line(run_dir, capsys):
    for args, message in (
        (["--checkpoint", run_dir.parent / "none"], "no such run folder"),
        (["--checkpoint", run_dir, "--step", 3], "step_000003"),
        (["--checkpoint", run_dir, "--data", run_dir / "none.txt"], "none.txt"),
        (["--checkpoint", run_dir, "--max-tokens", 0], "--max-tokens 0"),
    ):
        code, out, err = command(capsys, *args)
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
