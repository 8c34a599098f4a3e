import contextlib
import importlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from backends import BACKENDS, use
from fork_server import python
from ranks import run
from test_core_score import write_bundle
from tiny_run import BACKEND

import nanochat_native
from nanochat_native import evaluate
from nanochat_native.data import prepare
from nanochat_native.evaluation import bits_per_byte, core_score, session
from nanochat_native.inference.engine import complete
from nanochat_native.inference.sampling import Sampling
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.model.quantization import round_weights_
from nanochat_native.runs import checkpoint, run_folder
from nanochat_native.runs.config import TrainConfig, resolve_defaults
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.distributed import World

CONFIG = GPTConfig(sequence_len=16, vocab_size=40, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
TOKEN_BYTES = np.array([i % 7 for i in range(40)], dtype=np.int32)


def build(config=CONFIG):
    model = GPT(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # those that begin as zero too: the past would not matter
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
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
        result = bits_per_byte.measure_text(model, batches(), TOKEN_BYTES)
        assert bits_per_byte.measure_text(model, batches(), torch.from_numpy(TOKEN_BYTES)) == result
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
        result = bits_per_byte.measure_text(model, batches(), np.full(40, 2))
    assert result.bpb == pytest.approx(math.log2(40) / 2, rel=1e-6)
    assert result.loss == pytest.approx(math.log(40), rel=1e-6)


def test_bad_arguments():
    model = build()
    with use("torch"):
        with pytest.raises(ValueError, match=r"must have shape \(40,\), got \(39,\)"):
            bits_per_byte.measure_text(model, batches(), TOKEN_BYTES[:-1])
        with pytest.raises(ValueError, match="nothing to measure"):
            bits_per_byte.measure_text(model, batches(), np.zeros(40, dtype=np.int32))
        with pytest.raises(ValueError, match="nothing to measure"):
            bits_per_byte.measure_text(model, [], TOKEN_BYTES)


def make_run(folder, name, words, vocab_size):
    """The folder of a run over a small text, with checkpoints of steps 3 and 5; that of step 3 knows nothing."""
    text = folder / f"{name}.txt"
    text.write_text("".join(f"line {i}: {i * i} is the {words} of {i}\n" for i in range(2000)))
    config = TrainConfig(out_dir=folder, run=name, data=str(text), cache_dir=folder / "cache", recipe="october")
    (folder / name).mkdir()
    run_folder.save_config(resolve_defaults(config, gpu=False))
    corpus = prepare(str(text), vocab_size=vocab_size, cache_dir=folder / "cache")
    corpus.tokenizer.save(folder / name / "tokenizer")
    shape = {**vars(CONFIG), "vocab_size": corpus.vocab_size}
    weights = {name: p.detach() for name, p in build(GPTConfig(**shape)).named_parameters()}
    other = {name: torch.zeros_like(weight) if "lm_head" in name else weight for name, weight in weights.items()}
    meta = {"model_config": shape, "tokenizer_hash": corpus.tokenizer.hash}
    checkpoint.save(folder / name / "checkpoints", 3, {"model": other}, meta)
    checkpoint.save(folder / name / "checkpoints", 5, {"model": weights}, meta)
    return folder / name


ADAPTER = ("nanochat_native.lm_eval_adapter", "nanochat_native.evaluation.lm_eval_model")


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path, "r", "square", 300)


def command(capsys, *args):
    with use("torch"):
        code = evaluate.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_line(run_dir, capsys):
    code, out, _ = command(capsys, "--checkpoint", run_dir, "--json")
    assert code == 0
    measured = json.loads(out)

    corpus = prepare(str(run_dir.parent / "r.txt"), vocab_size=300, cache_dir=run_dir.parent / "cache")
    tokens = torch.from_numpy(corpus.val.read(0, len(corpus.val)))
    model = build(GPTConfig(**{**vars(CONFIG), "vocab_size": corpus.vocab_size}))
    windows = [(tokens[i : i + 16][None], tokens[i + 1 : i + 17][None]) for i in range(0, len(tokens) - 1, 16)]
    windows = [(x[:, : y.size(1)], y) for x, y in windows]
    with use("torch"):
        expected = bits_per_byte.measure_text(model, windows, corpus.tokenizer.token_bytes)
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
        (["--checkpoint", run_dir, "--step", 4], "holds no checkpoint of step 4, but of 3, 5"),
        (["--checkpoint", run_dir, "--data", run_dir / "none.txt"], "none.txt"),
        (["--checkpoint", run_dir, "--max-tokens", 0], "--max-tokens must be a whole number >= 1, got 0"),
        (["--checkpoint", run_dir, "--max-per-task", 5], "--max-per-task 5 requires --core FOLDER"),
        (["--checkpoint", run_dir, "--compare-step", 5], "--compare-step 5 requires --compare RUN"),
        (["--checkpoint", run_dir, "--compare", run_dir.parent / "none"], "no such run folder"),
        (["--checkpoint", run_dir, "--compare", run_dir, "--quantize", "int8"], "--compare must not be given with"),
        (["--checkpoint", run_dir.parent / "none", "--core", run_dir], "r is not a CORE bundle: it has no core.yaml"),
        (["--checkpoint", run_dir.parent / "none", "--out", run_dir], "--out must be a new or an empty folder"),
    ):
        code, out, err = command(capsys, *args)
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err


def test_the_cost_of_quantization_is_that_of_rounded_weights(run_dir, capsys):
    args = ["--checkpoint", run_dir, "--quantize", "int8"]
    code, out, _ = command(capsys, *args, "--json")
    assert code == 0
    found = json.loads(out)
    plain, small = found, found["compare"]
    assert small["quantize"] == "int8"
    assert found["difference"]["bpb"] == small["bpb"] - plain["bpb"] != 0
    assert json.loads(command(capsys, "--checkpoint", run_dir, "--json")[1])["bpb"] == plain["bpb"]
    model, tokenizer, _ = load_model(run_dir)
    round_weights_(model, "int8")
    corpus = prepare(str(run_dir.parent / "r.txt"), vocab_size=300, cache_dir=run_dir.parent / "cache")
    text = torch.from_numpy(corpus.val.read(0, len(corpus.val)))
    windows = [(text[i : i + 16][None], text[i + 1 : i + 17][None]) for i in range(0, len(text) - 1, 16)]
    windows = [(x[:, : y.size(1)], y) for x, y in windows]
    expected = bits_per_byte.measure_text(model, windows, tokenizer.token_bytes)
    assert small["bpb"] == pytest.approx(expected.bpb, rel=1e-6)

    code, out, _ = command(capsys, *args)
    assert code == 0
    assert f"B  {run_dir} step 5 int8 | {small['bpb']:.4f} bits per byte" in out
    assert f"B - A  {small['bpb'] - plain['bpb']:+.4f} bits per byte" in out


def test_both_are_of_one_checkpoint_though_the_run_continues(run_dir, capsys, monkeypatch):
    args = ["--checkpoint", run_dir, "--quantize", "int8", "--json"]
    expected = json.loads(command(capsys, *args)[1])
    own = session.measure_text

    def measure_and_train(*given):
        found = own(*given)
        folder = run_dir / "checkpoints"
        if checkpoint.path_of(folder, 5).exists():  # a run saves a checkpoint and removes the one before
            meta = {name: checkpoint.load(folder, 5)[1][name] for name in ("model_config", "tokenizer_hash")}
            checkpoint.save(folder, 9, {"model": checkpoint.load(folder, 3)[0]["model"]}, meta)
            shutil.rmtree(checkpoint.path_of(folder, 5))
        return found

    monkeypatch.setattr(session, "measure_text", measure_and_train)
    found = json.loads(command(capsys, *args)[1])
    assert (found["step"], found["compare"]["step"]) == (5, 5)
    assert found == expected


def test_the_cost_of_quantization_is_measured_on_a_gpu_too(run_dir, capsys, monkeypatch):
    """tests/pretend_cuda measures it; here, the flags are not refused."""

    def load(run, step, device, *, warn):
        raise ValueError(f"loaded to {device}")

    monkeypatch.setattr(session, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(session, "load_model", load)
    code, out, err = command(capsys, "--checkpoint", run_dir, "--quantize", "int8", "--json")
    assert (code, out, err) == (2, "", "error: loaded to cuda\n")


def test_a_weight_that_is_not_finite_is_named_before_the_work(run_dir, capsys, monkeypatch):
    state, meta = checkpoint.load(run_dir / "checkpoints", 5)
    state["model"]["transformer.h.0.attn.c_q.weight"][3, 1] = torch.nan
    meta = {name: meta[name] for name in ("model_config", "tokenizer_hash")}
    checkpoint.save(run_dir / "checkpoints", 7, state, meta)
    monkeypatch.setattr(session, "measure_text", None)
    code, out, err = command(capsys, "--checkpoint", run_dir, "--quantize", "int8")
    message = "transformer.h.0.attn.c_q.weight: weights must be finite to be quantized, got infinities or NaN"
    assert (code, out, err) == (2, "", f"error: {message}\n")


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


def expected_tasks(run_dir, bundle, step=None, **limit):
    with use("torch"):
        model, tokenizer, _ = load_model(run_dir, step)
        return [
            core_score.evaluate_task(model, tokenizer, t, batch_tokens=100)
            for t in core_score.read_bundle(bundle, **limit)
        ]


@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 2), (BrokenPipeError(), 141)])
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_a_result_that_cannot_be_printed_is_no_success(run_dir, monkeypatch, error, code, form):
    class Dead:
        def __init__(self, descriptor):
            self.descriptor = descriptor

        def write(self, text):
            raise error

        def flush(self):
            raise error

        def fileno(self):
            return self.descriptor

        def isatty(self):
            return False

    with open(os.devnull, "w") as nowhere:
        monkeypatch.setattr(sys, "stdout", Dead(nowhere.fileno()))
        assert evaluate.main(["--checkpoint", str(run_dir), *form]) == code


def test_core(run_dir, bundle, capsys):
    code, out, _ = command(capsys, "--checkpoint", run_dir, "--core", bundle, "--json")
    assert code == 0
    found = json.loads(out)
    results = expected_tasks(run_dir, bundle)
    assert found["core"]["tasks"] == [result._asdict() for result in results]
    assert found["core"]["score"] == sum(result.centred for result in results) / 6
    assert (found["checkpoint"], found["step"]) == (str(run_dir), 5)
    assert found["bpb"] > 1

    code, out, _ = command(capsys, "--checkpoint", run_dir, "--core", bundle, "--max-per-task", 11)
    assert code == 0
    results = expected_tasks(run_dir, bundle, max_per_task=11)
    lines = out.splitlines()
    assert "bits per byte" in next(line for line in lines if not line.startswith("CORE 1/6"))
    header = next(i for i, line in enumerate(lines) if line.startswith("task "))
    assert lines[header].split() == ["task", "type", "shots", "items", "accuracy", "centred"]
    for result, line in zip(results, lines[header + 1 : header + 7], strict=True):
        assert line.startswith(result.task)
        assert line.endswith(f"{result.items:>5}    {result.accuracy:.4f}  {result.centred:>7.4f}")
    assert f"CORE  {core_score.score(results):.4f}" in lines
    cropped = sum(result.cropped for result in results)
    assert f"CORE  {cropped} prompts are longer than the model's sequence and lost their beginning" in lines


def test_two_checkpoints_side_by_side(run_dir, bundle, capsys):
    args = ["--checkpoint", run_dir, "--compare", run_dir, "--core", bundle]
    code, out, _ = command(capsys, *args, "--compare-step", 3, "--json")
    assert code == 0
    found = json.loads(out)
    other = found["compare"]
    assert (found["step"], other["step"]) == (5, 3)
    assert other["loss"] == pytest.approx(math.log(load_model(run_dir)[0].config.vocab_size), rel=1e-6)
    assert found["bytes"] == other["bytes"]
    assert other["core"]["tasks"] == [result._asdict() for result in expected_tasks(run_dir, bundle, step=3)]
    difference = found["difference"]
    assert difference["bpb"] == other["bpb"] - found["bpb"] != 0
    assert difference["core"]["score"] == other["core"]["score"] - found["core"]["score"] != 0
    centred = [{task["task"]: task["centred"] for task in one["core"]["tasks"]} for one in (found, other)]
    assert difference["core"]["tasks"] == {name: centred[1][name] - centred[0][name] for name in centred[0]}

    code, out, _ = command(capsys, *args, "--compare-step", 3)
    assert f"B - A  {difference['bpb']:+.4f} bits per byte" in out
    assert f"B - A  {difference['core']['score']:+.4f} CORE" in out
    assert re.search(r"^A  \S*/r step 5 \| .*\nB  \S*/r step 3 \| ", out, re.MULTILINE)
    change = f"{difference['core']['tasks']['choices']:+.4f}"
    assert re.search(rf"^choices .* {re.escape(change)}$", out, re.MULTILINE)
    _, out, _ = command(capsys, *args, "--json")
    assert set(json.loads(out)["difference"]["core"]["tasks"].values()) == {0.0}


def test_the_second_is_measured_on_the_first_ones_text(run_dir, capsys):
    other = make_run(run_dir.parent, "other", "second power", 280)
    code, out, _ = command(capsys, "--checkpoint", run_dir, "--compare", other, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["bytes"] == found["compare"]["bytes"]
    assert found["targets"] < found["compare"]["targets"]
    given = ["--checkpoint", other, "--data", run_dir.parent / "r.txt", "--json"]
    assert json.loads(command(capsys, *given)[1])["bpb"] == found["compare"]["bpb"]
    _, out, _ = command(capsys, "--checkpoint", run_dir, "--compare", other)
    assert "different length" not in out
    _, out, _ = command(capsys, "--checkpoint", run_dir, "--compare", other, "--max-tokens", 160)
    assert "A and B were measured on texts of different lengths" in out


def test_a_missing_second_is_said_before_the_first_is_measured(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(session, "measure_text", None)
    code, _, err = command(capsys, "--checkpoint", run_dir, "--compare", run_dir, "--compare-step", 4)
    assert code == 2
    assert "holds no checkpoint of step 4, but of 3, 5" in err


def test_a_result_is_kept(run_dir, bundle, tmp_path, capsys):
    args = ["--checkpoint", run_dir, "--core", bundle, "--out", tmp_path / "out", "--json"]
    code, out, _ = command(capsys, *args)
    assert code == 0
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (record["command"], record["finished"]) == ("evaluate", True)
    assert record["options"]["core"] == str(bundle)
    assert record["options"]["split"] == "val"
    assert record["versions"]["torch"] == torch.__version__
    assert json.loads(out).items() <= record.items()
    code, _, err = command(capsys, *args)
    message = f"--out must be a new or an empty folder, got {tmp_path / 'out'} with finished.json, result.json; "
    assert (code, err) == (2, f"error: {message}--resume continues what is there\n")


@pytest.mark.parametrize("compare", [False, True])
def test_an_interruption_keeps_the_finished_tasks(run_dir, bundle, tmp_path, capsys, monkeypatch, compare):
    original, calls = core_score.evaluate_task, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == (8 if compare else 3):
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(core_score, "evaluate_task", interrupted)
    more = ["--compare", run_dir] if compare else []
    args = ["--checkpoint", run_dir, "--core", bundle, *more, "--out", tmp_path / "out"]
    code, out, err = command(capsys, *args)
    assert (code, err) == (130, "interrupted\n")
    assert ("CORE of B  unknown: 1 of 6 tasks done" if compare else "CORE  unknown: 2 of 6 tasks done") in out
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert not record["finished"]
    kept = (record["compare"] if compare else record)["core"]
    assert kept["score"] is None
    assert [task["task"] for task in kept["tasks"]] == (["choices"] if compare else ["choices", "no shots"])
    if compare:
        assert record["core"]["score"] is not None
        assert record["difference"]["core"] == {"score": None, "tasks": {"choices": 0.0}}


def test_an_interruption_before_the_first_figure_prints_none(run_dir, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "measure_text", interrupted)
    code, out, _ = command(capsys, "--checkpoint", run_dir)
    assert (code, out) == (130, "")


def printed_on_rank(run_dir, bundle):
    use(BACKEND)
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    options = session.Options(checkpoint=run_dir, core=bundle, device="cpu", json=True)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert session.run(options, world) == 0
    return out.getvalue()


def test_ranks_find_what_one_process_does(run_dir, bundle, capsys):
    with use(BACKEND):
        evaluate.main(["--checkpoint", str(run_dir), "--core", str(bundle), "--json"])
    alone = json.loads(capsys.readouterr().out)
    first, *others = run(3, printed_on_rank, run_dir, bundle)
    assert others == ["", ""]
    found = json.loads(first)
    assert found["core"] == alone["core"]
    assert (found["targets"], found["bytes"]) == (alone["targets"], alone["bytes"])
    assert found["bpb"] == pytest.approx(alone["bpb"], rel=1e-7)


@pytest.mark.slow
def test_under_torchrun(run_dir, bundle, capsys):
    def torchrun(*args):
        command = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        return subprocess.run(
            [*command, "-m", "nanochat_native.evaluate", "--", *map(str, args)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "NANOCHAT_NATIVE_BACKEND": BACKEND, "PYTHON_EXEC": python()},
        )

    with use(BACKEND):
        evaluate.main(["--checkpoint", str(run_dir), "--core", str(bundle)])
    alone = capsys.readouterr().out.splitlines()
    ranks = torchrun("--checkpoint", run_dir, "--core", bundle)
    assert ranks.returncode == 0, ranks.stderr
    assert ranks.stdout.splitlines()[-9:] == alone[-9:]
    assert next(line for line in alone if "bits per byte" in line) in ranks.stdout
    wrong = torchrun("--checkpoint", run_dir.parent / "none")
    assert wrong.returncode != 0
    assert wrong.stderr.count("error: ") == 1
    assert f"error: {run_dir.parent / 'none'}: no such run folder" in wrong.stderr


# --- the adapter for lm-evaluation-harness, without it: what it takes of the harness stands in ---


@pytest.fixture
def adapter(monkeypatch):
    model, registry = types.ModuleType("lm_eval.api.model"), types.ModuleType("lm_eval.api.registry")
    model.LM = type("LM", (), {})
    registry.register_model = lambda *names: lambda kind: kind
    for name, module in {
        "lm_eval": None,
        "lm_eval.api": None,
        model.__name__: model,
        registry.__name__: registry,
    }.items():
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    for name in ADAPTER:
        sys.modules.pop(name, None)
    yield importlib.import_module(ADAPTER[-1])
    for name in ADAPTER:
        sys.modules.pop(name, None)


def requests(*args):
    return [types.SimpleNamespace(args=one) for one in args]


def log_probabilities(model, tokens, start):
    """Of tokens[start:], and whether each is the likeliest."""
    with torch.no_grad():
        found = model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)[start - 1 :]
    wanted = torch.tensor(tokens[start:])
    return found.gather(1, wanted[:, None]).sum().item(), bool((found.argmax(-1) == wanted).all())


@pytest.mark.parametrize("batch_size", ["1", 8])
def test_the_harness_gets_log_probabilities(run_dir, adapter, batch_size):
    with use("torch"):
        lm = adapter.NanochatLM(str(run_dir), device="cpu", batch_size=batch_size)
        model, tokenizer, _ = load_model(run_dir)
        greedy = tokenizer.decode([int(model(torch.tensor([[tokenizer.bos_id]]))[0, -1].argmax())])
        asked = [
            ("line 1", ": 1"),
            ("", "square"),
            ("line 2: 4 ", "is the"),
            ("0123456789abcdef" * 4, " is"),
            ("line", ""),
            ("", greedy),
            *[(f"line {i}", f": {i} is") for i in range(9)],
        ]
        found = lm.loglikelihood(requests(*asked))
        for (context, continuation), (value, right) in zip(asked, found, strict=True):
            assert isinstance(value, float)
            tokens = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
            start = 1 + len(tokenizer.encode(context.rstrip()))
            off = max(0, len(tokens) - 17)
            expected = log_probabilities(model, tokens[off:], start - off) if continuation else (0.0, True)
            assert value == pytest.approx(expected[0], rel=1e-5, abs=1e-9)
            assert right == expected[1]
        assert found[5][1]
        with pytest.raises(ValueError, match=r"a continuation must have at most 16 tokens, got 40 in 'xyz"):
            lm.loglikelihood(requests(("a", "xyz" + "\1" * 37)))


def test_the_harness_gets_the_likelihood_of_long_texts(run_dir, adapter):
    with use("torch"):
        lm = adapter.NanochatLM(str(run_dir), device="cpu")
        model, tokenizer, _ = load_model(run_dir)
        texts = ["line 7: 49 is", "", "".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(9))]
        found = lm.loglikelihood_rolling(requests(*[(text,) for text in texts]))
        for text, value in zip(texts, found, strict=True):
            tokens = [tokenizer.bos_id, *tokenizer.encode(text)]
            expected, done = 0.0, 1
            while done < len(tokens):  # 16 predicted a time, the last of them after all that the model takes
                end = min(done + 16, len(tokens))
                begin = max(0, end - 17)
                expected += log_probabilities(model, tokens[begin:end], done - begin)[0]
                done = end
            assert value == pytest.approx(expected, rel=1e-5)
        assert len(tokens) > 40
        assert found[1] == 0


def test_the_harness_gets_text(run_dir, adapter):
    with use("torch"):
        lm = adapter.NanochatLM(str(run_dir), device="cpu")
        model, tokenizer, _ = load_model(run_dir)
        prompt = [tokenizer.bos_id, *tokenizer.encode("line 3")]
        whole = "".join(piece.text for piece in complete(model, tokenizer, prompt, Sampling(12, temperature=0)))
        stop = whole[4:6]
        found = lm.generate_until(
            requests(
                ("line 3", {"max_gen_toks": 12, "until": []}),
                ("line 3", {"max_gen_toks": 12, "until": [stop, "never there"], "do_sample": False, "temperature": 1}),
                ("line 3", {"max_gen_toks": 12, "until": stop}),
                ("x" * 100, {"max_gen_toks": 2, "do_sample": True, "temperature": 0.5, "top_k": 5}),
            )
        )
        assert found[:3] == [whole, whole.partition(stop)[0], whole.partition(stop)[0]]
        assert found[3]
        with pytest.raises(
            ValueError, match=r"settings of generate_until must be among until, max_gen_toks, .*, got num_beams"
        ):
            lm.generate_until(requests(("a", {"num_beams": 3})))
        with pytest.raises(ValueError, match="max_gen_toks must be a whole number >= 1, got 0"):
            lm.generate_until(requests(("a", {"max_gen_toks": 0})))
        with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 'auto'"):
            adapter.NanochatLM(str(run_dir), batch_size="auto")


def test_without_the_harness_the_extra_is_named_and_nothing_else_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ADAPTER:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"lm_eval is not installed .*: pip install 'nanochat-native\[eval\]'"):
        importlib.import_module(ADAPTER[0])
    for path in Path(nanochat_native.__file__).parent.rglob("*.py"):
        if path.name not in ("lm_eval_adapter.py", "lm_eval_model.py"):
            assert not re.search(r"^\s*(import|from) .*\blm_eval", path.read_text(), re.MULTILINE), path


def test_records_are_measured_by_the_column_that_is_named(run_dir, tmp_path, capsys):
    records = [{"title": f"title {i}", "prose": f"line {i} and some more words\n" * 9} for i in range(200)]
    for name, column in (("prose", "prose"), ("title", "title")):
        lines = "\n".join(json.dumps({"text": record[column]}) for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "both.jsonl").write_text("\n".join(map(json.dumps, records)))
    both = ["--checkpoint", run_dir, "--json", "--data", tmp_path / "both.jsonl"]
    code, _, err = command(capsys, *both)
    assert code == 2
    assert "both.jsonl: name the text column with --text-column" in err
    for column in ("prose", "title"):
        alone = ["--checkpoint", run_dir, "--json", "--data", tmp_path / f"{column}.jsonl"]
        _, expected, err = command(capsys, *alone)
        assert "data     text column: 'text' (text in 200 of 200 sampled records)\n" in err
        code, out, _ = command(capsys, *both, "--text-column", column)
        assert code == 0
        assert json.loads(out) == json.loads(expected)
    # The run's own column goes with the run's own data.
    path = run_dir / "config.json"
    stored = json.loads(path.read_text())
    stored["config"] |= {"data": str(tmp_path / "both.jsonl"), "text_column": "title"}
    path.write_text(json.dumps(stored))
    assert json.loads(command(capsys, "--checkpoint", run_dir, "--json")[1]) == json.loads(expected)
    assert command(capsys, *both)[0] == 2


def test_shards_that_all_validate_are_measured_whole(run_dir, tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 400
    for i in range(2):
        tokens = (np.arange(400) % 256).astype("<u2")
        (tmp_path / "shards" / f"x_val_{i}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    args = ["--checkpoint", run_dir, "--json", "--data", tmp_path / "shards"]
    code, out, _ = command(capsys, *args)
    assert code == 0
    assert json.loads(out)["targets"] == 799
    code, _, err = command(capsys, *args, "--split", "train")
    assert code == 2
    assert "nothing to train on" in err
