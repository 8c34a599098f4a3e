"""Operators and programs on the pretend MPS device: against the CPU, and without anything that MPS does not have."""

import contextlib
import functools
import io
import json
import os
import signal
import warnings

import pytest
import torch
from pretend_cuda.test_pretend_programs import TINY, assert_near, chat_flags, requested, run, train_until_stopped
from tiny_run import losses, records, tiny_flags, write_text

from pretend_mps import on_pretend_mps, operators_for_mps

WARNING = "every operator on mps is served by plain torch: the kernels are for CPUs and CUDA GPUs"


def train(folder, **flags):
    from nanochat_native.train import main

    return run(main, *tiny_flags(folder, **TINY | {"device": "mps"} | flags))


# --- the device ---


@on_pretend_mps
def test_the_device_refuses_what_mps_does_not_have():
    x, y = torch.ones(4, 4, device="mps"), torch.ones(4, 4)
    assert x.device == torch.device("mps", 0)
    for make in (x.double, lambda: y.double().to("mps"), lambda: x.sum(dtype=torch.float64)):
        with pytest.raises(TypeError, match="the MPS framework doesn't support float64"):
            make()
    with pytest.raises(NotImplementedError, match=r"The operator 'aten::mm\.dtype' is not currently implemented"):
        torch.mm(x.bfloat16(), x.bfloat16(), out_dtype=torch.float32)
    for source, target in ((y, "mps"), (x, "cpu")):
        with pytest.raises(RuntimeError, match="a copy between the host and MPS does not block"):
            source.to(target, non_blocking=True)
    with pytest.raises(RuntimeError, match="copies the wrong elements"):
        y[:, ::2].copy_(x[:, ::2])
    with pytest.raises(RuntimeError, match="at least two devices"):
        x + y
    assert torch.equal((x + 2 * y.sum()).cpu(), y + 32)


def test_the_list_of_operators_follows_delegates_and_composites():
    text = """
- func: add.Tensor(Tensor self) -> Tensor
  structured_delegate: add.out
- func: add.out(Tensor self) -> Tensor
  dispatch:
    CPU, CUDA, MPS: add_out
- func: erf.out(Tensor self) -> Tensor
  dispatch:
    SparseMPS, CPU: erf_out
- func: erf(Tensor self) -> Tensor
  structured_delegate: erf.out
- func: chunk(Tensor self) -> Tensor[]
- func: stack(Tensor[] tensors) -> Tensor
  dispatch:
    CompositeExplicitAutograd: stack
"""
    assert operators_for_mps(text) == {"aten::add.Tensor", "aten::add.out", "aten::chunk", "aten::stack"}


# --- operators ---


@on_pretend_mps
def test_every_operator_matches_the_cpu_and_one_warning_names_all():
    from gpu.calls import CALLS

    from nanochat_native import ops

    def results(call, device):
        torch.manual_seed(1)
        return [result.cpu() for result in call(device, small=True)()]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, call in CALLS.items():
            ours = results(call, "mps")
            with ops.use_backend("torch"):
                theirs = results(call, "cpu")
            for mine, other in zip(ours, theirs, strict=True):
                tolerance = 2e-2 if mine.dtype == torch.bfloat16 or "bfloat16" in name else 2e-4
                close = functools.partial(torch.testing.assert_close, msg=lambda text, name=name: f"{name}: {text}")
                close(mine, other, rtol=tolerance, atol=tolerance, check_dtype=False, equal_nan=True)
    messages = [str(warning.message) for warning in caught if "nanochat_native" in str(warning.message)]
    assert messages == [f"nanochat_native: {WARNING}"]
    assert {ops.serves(op, "mps") for op in ops.OPERATORS} == {("torch", "the kernels are for CPUs and CUDA GPUs")}


@on_pretend_mps
def test_linear_layers_match_the_cpu():
    from nanochat_native import ops

    dy, x, weight = torch.randn(70, 24), torch.randn(70, 33), torch.randn(24, 33)
    for dtype in (torch.float32, torch.bfloat16):
        given = [tensor.to(dtype) for tensor in (dy, x, weight)]
        found = ops.linear_backward(*(tensor.to("mps") for tensor in given), weight_dtype=torch.float32)
        for mine, theirs in zip(found, ops.linear_backward(*given, weight_dtype=torch.float32), strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-4)


# --- programs ---


@pytest.mark.parametrize("recipe", ["october", "today"])
@on_pretend_mps
def test_a_run_is_near_the_cpus_and_resumes_exactly(tmp_path, recipe):
    write_text(tmp_path / "text.jsonl")
    flags = {"recipe": recipe, "steps": 6, "eval_every": 2, "save_every": 2}
    out = train(tmp_path, run="whole", sample_every=3, **flags)
    assert "device   MPS on " in out
    assert " | float32\n" in out
    assert "normuon_update_" in out.split("kernels  ")[1].split(": torch\n")[0]
    assert "step 3: sample" in out

    train_until_stopped(tmp_path, run="stopped", device="mps", **flags)
    assert "from step 3\n" in train(tmp_path, run="stopped", resume="auto", **flags)
    assert losses(tmp_path / "runs/stopped") == losses(tmp_path / "runs/whole")
    train(tmp_path, run="cpu", **flags | {"device": "cpu"})
    assert_near(losses(tmp_path / "runs/whole"), losses(tmp_path / "runs/cpu"), 1e-4)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"grad_checkpoint": True, "diagnose": True, "diagnose_every": 1}, 1e-4),
        ({"recipe": "today", "dtype": "bfloat16"}, 3e-3),
        ({"backend": "torch"}, 1e-4),
        ({"recipe": "today", "packing": "bestfit", "validation": "fraction"}, 1e-4),
    ],
    ids=["checkpointed", "bfloat16", "torch", "bestfit"],
)
@on_pretend_mps
def test_options_of_training_are_near_the_cpus(tmp_path, options, tolerance):
    write_text(tmp_path / "text.jsonl")
    for device in ("mps", "cpu"):
        train(tmp_path, run=device, steps=3, eval_every=3, **options | {"device": device})
    mps, cpu = tmp_path / "runs/mps", tmp_path / "runs/cpu"
    assert_near(losses(mps), losses(cpu), tolerance)
    for mine, theirs in zip(records(mps, "diagnosis"), records(cpu, "diagnosis"), strict=True):
        assert mine.pop("kind") == theirs.pop("kind")
        assert mine == pytest.approx(theirs, rel=2e-2, abs=1e-3)
    assert len(records(mps, "diagnosis")) == (3 if "diagnose" in options else 0)


@on_pretend_mps
def test_commands_run_a_trained_model(tmp_path):
    from nanochat_native import chat, evaluate, finetune, generate, reinforce, serve

    write_text(tmp_path / "text.jsonl")
    with warnings.catch_warnings(record=True) as caught:
        train(tmp_path, run="base", steps=3, eval_every=3, recipe="today", max_seq_len=32)
    assert sum(WARNING in str(warning.message) for warning in caught) == 1
    base = tmp_path / "runs/base"
    given = ["--checkpoint", base, "--device", "mps"]

    text = run(generate.main, *given, "--prompt", "the ", "--max-tokens", 5, "--temperature", 0)
    assert text == run(generate.main, "--checkpoint", base, "--prompt", "the ", "--max-tokens", 5, "--temperature", 0)

    measure = [evaluate.main, "--checkpoint", base, "--max-tokens", 128, "--json"]
    gpu, cpu = (json.loads(run(*measure, "--device", device)) for device in ("mps", "cpu"))
    assert gpu["bpb"] == pytest.approx(cpu["bpb"], rel=1e-5)
    assert (gpu["targets"], gpu["bytes"]) == (cpu["targets"], cpu["bytes"])

    runs = tmp_path / "runs"
    packed = ["--checkpoint", base, *chat_flags(tmp_path), "--packing", "best-fit", "--batch-rows", 2]
    packed += ["--num-iterations", 3, "--chat-tasks", "SimpleSpelling", "--chat-max-problems", 2]
    for device in ("mps", "cpu"):
        run(finetune.main, *packed, "--run", f"chat-{device}", "--device", device)
    assert_near(losses(runs / "chat-mps"), losses(runs / "chat-cpu"), 1e-3)
    assert [record["problems"] for record in records(runs / "chat-mps", "chat")] == [2]

    rewards = ["--checkpoint", runs / "chat-mps", "--out-dir", runs, "--device", "mps", "--num-iterations", 1]
    rewards += ["--examples-per-step", 1, "--num-samples", 2, "--max-new-tokens", 4, "--eval-examples", 1]
    run(reinforce.main, *rewards, "--run", "rewarded", "--sample-every", 0)
    talk = ["--checkpoint", runs / "rewarded", "--device", "mps", "--prompt", "who?", "--max-tokens", 4]
    for dtype in ("float32", "bfloat16"):
        assert run(chat.main, *talk, "--dtype", dtype).endswith("\n")

    body = {"model": "base", "prompt": "the ", "max_tokens": 4, "temperature": 0}
    with requested("/v1/completions", body) as (port, answered):
        run(serve.main, *given, "--port", port, "--slots", 2, "--capacity", 32, codes=(128 + signal.SIGINT,))
    assert answered["usage"]["completion_tokens"] == 4


@on_pretend_mps
def test_what_mps_cannot_do_is_refused_in_one_line(tmp_path):
    from nanochat_native import generate
    from nanochat_native.train import main

    write_text(tmp_path / "text.jsonl")

    def refusal(command, flags):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            assert command(list(map(str, flags))) == 2
        return err.getvalue()

    flags = functools.partial(tiny_flags, tmp_path, device="mps")
    assert refusal(main, flags(dtype="float16")) == "error: --dtype must be float32 or bfloat16 on MPS, got float16\n"
    assert "--fp8 must be off on MPS on " in refusal(main, flags(fp8="rowwise", dtype="bfloat16"))
    assert "--cuda-graphs must be auto or off here: --device is mps" in refusal(main, flags(cuda_graphs="on"))
    given = ["--checkpoint", tmp_path, "--device", "mps", "--prompt", "a"]
    assert "needs device cpu, got mps" in refusal(generate.main, [*given, "--quantize", "int8"])
    os.environ["WORLD_SIZE"] = "2"
    assert "--device must be cpu on several ranks, because gloo takes no tensors of MPS" in refusal(
        generate.main, given
    )


@on_pretend_mps
def test_the_cpu_stays_the_default_and_the_doctor_names_mps():
    from nanochat_native import doctor
    from nanochat_native.runtime import hardware

    assert hardware.pick_device(None) == torch.device("cpu")
    assert hardware.memory(torch.device("mps"))[1] == 8 << 30
    out = run(doctor.main)
    assert "MPS: --device mps runs in plain torch, which serves every operator there: the kernels are for" in out
    assert "no GPU" not in out
