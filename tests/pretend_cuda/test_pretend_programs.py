"""The programs on pretend CUDA devices: training and what follows it, on one GPU and on several, and the GPU tests."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest
from tiny_run import HANGS, losses, records, tiny_flags, wait_until, write_text

from pretend_cuda import environment, on_pretend_cuda, pretend_python, python_on_pretend_cuda, unavailable
from pretend_cuda.counted_training import UNPINNED, count_waits, waits

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    **{"device": "cuda", "depth": 1, "max_seq_len": 16, "total_batch_size": 64, "eval_tokens": 64, "vocab_size": 270},
    "recipe": "october",
}


def run(command, *args, codes=(0,)):
    """Return what a command prints to stdout. Its exit code must be one of `codes`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(list(map(str, args)))
    assert code in codes, f"exit code {code}\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue()


def train(folder, **flags):
    from nanochat_native.train import main

    return run(main, *tiny_flags(folder, **TINY | flags))


def train_until_stopped(folder, **flags):
    """Train, and end the run by a signal after its third step."""
    from nanochat_native.train import main
    from nanochat_native.training.trainer import Trainer

    step = Trainer.train_step

    def stop_after_the_third(trainer, batches):
        step(trainer, batches)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.train_step = stop_after_the_third
    assert main(tiny_flags(folder, **TINY | flags)) == 128 + signal.SIGTERM
    Trainer.train_step = step


def chat_flags(folder):
    """Write conversations to learn and to measure on. Return the flags of finetune for them, without samples."""
    question = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "a tensor."}
    chats = folder / "chats.jsonl"
    chats.write_text(4 * (json.dumps({"messages": question}) + "\n"))
    where = ["--out-dir", folder / "runs", "--cache-dir", folder / "cache", "--sample-every", 0]
    return ["--data", chats, "--val-data", chats, *where]


def assert_near(one, other, tolerance):
    """Compare the losses of two runs step by step."""
    assert [entry[:2] for entry in one] == [entry[:2] for entry in other]
    for (kind, step, mine), (_, _, theirs) in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance), (kind, step)


# --- training ---


@on_pretend_cuda
def test_a_run_is_near_the_cpus_and_resumes_exactly(tmp_path):

    write_text(tmp_path / "text.jsonl")
    flags = {"steps": 6, "eval_every": 2, "sample_every": 3, "save_every": 2}
    out = train(tmp_path, run="whole", **flags)
    assert "H100 80GB HBM3 (pretend) sm_90 | " in out
    assert " | bfloat16" in out
    assert "step 3: sample" in out

    train_until_stopped(tmp_path, run="stopped", **flags)
    assert "from step 3\n" in train(tmp_path, run="stopped", resume="auto", **flags)

    whole, stopped = tmp_path / "runs/whole", tmp_path / "runs/stopped"
    assert losses(stopped) == losses(whole)
    assert [r["text"] for r in records(stopped, "sample")] == [r["text"] for r in records(whole, "sample")]
    train(tmp_path, run="cpu", dtype="bfloat16", **flags | {"device": "cpu", "sample_every": 0})
    assert_near(losses(whole), losses(tmp_path / "runs/cpu"), 3e-3)
    assert losses(whole)[5][2] < 0.8 * losses(whole)[0][2]


@on_pretend_cuda
def test_a_run_of_todays_recipe_resumes_exactly_with_graphs_and_without(tmp_path):
    """With accumulation, and schedules that change the rates, the momentum and the decay in each step."""
    write_text(tmp_path / "text.jsonl")
    flags = {"recipe": "today", "warmup_steps": 2, "momentum_warmup_steps": 2, "save_every": 2, "device_batch_size": 2}
    train(tmp_path, run="graphs", steps=5, **flags)
    train(tmp_path, run="resumed", steps=5, cuda_graphs="off", **flags)
    later = tmp_path / "runs/resumed/checkpoints/step_000005"
    shutil.rmtree(later)
    train(tmp_path, run="resumed", steps=5, resume="auto", cuda_graphs="off", **flags)
    assert losses(tmp_path / "runs/resumed") == losses(tmp_path / "runs/graphs")


@on_pretend_cuda
def test_float32_checkpointing_and_diagnosis_are_near_the_cpus(tmp_path):
    write_text(tmp_path / "text.jsonl")
    flags = {"steps": 3, "dtype": "float32", "diagnose": True, "diagnose_every": 1, "depth": 2}
    train(tmp_path, run="gpu", grad_checkpoint=True, **flags)
    train(tmp_path, run="cpu", **flags | {"device": "cpu"})
    gpu, cpu = tmp_path / "runs/gpu", tmp_path / "runs/cpu"
    assert_near(losses(gpu), losses(cpu), 1e-3)
    diagnoses = records(gpu, "diagnosis")
    assert [record["step"] for record in diagnoses] == [1, 2, 3]
    for mine, theirs in zip(diagnoses, records(cpu, "diagnosis"), strict=True):
        assert mine.pop("kind") == theirs.pop("kind")
        assert mine == pytest.approx(theirs, rel=2e-2, abs=1e-3)


@on_pretend_cuda
def test_a_training_step_waits_once(tmp_path):
    from nanochat_native.training.trainer import Trainer

    write_text(tmp_path / "text.jsonl")
    steps = count_waits(Trainer, "train_step")
    train(tmp_path, steps=4, eval_every=0, save_every=0)
    # torch synchronizes before it captures a graph: those of the first and of later micro-batches, and of the update.
    assert [step.pop("sync device.synchronize", 0) for step in steps] == [0, 3, 0, 0]
    assert [waits(step) for step in steps] == [1, 1, 1, 1]
    assert [step.get(UNPINNED, 0) for step in steps] == [0, 0, 0, 0]


# --- after training ---


@on_pretend_cuda
def test_commands_run_a_trained_model(tmp_path):
    from nanochat_native import chat, evaluate, finetune, generate, serve

    write_text(tmp_path / "text.jsonl")
    train(tmp_path, run="base", steps=3, eval_every=3, max_seq_len=32)
    base = tmp_path / "runs/base"
    given = ["--checkpoint", base, "--device", "cuda"]

    texts = [run(generate.main, *given, "--prompt", "the ", "--max-tokens", 5) for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("the ")
    assert len(texts[0]) > len("the \n")

    measure = [evaluate.main, "--checkpoint", base, "--max-tokens", 128, "--json"]
    gpu, cpu = (json.loads(run(*measure, "--device", device)) for device in ("cuda", "cpu"))
    assert gpu["bpb"] == pytest.approx(cpu["bpb"], rel=1e-2)
    found = json.loads(run(*measure, "--device", "cuda", "--quantize", "int8"))
    assert found["bpb"] == gpu["bpb"] != found["compare"]["bpb"] == pytest.approx(gpu["bpb"], rel=1e-2)

    run(finetune.main, *given, *chat_flags(tmp_path), "--run", "chat", "--num-iterations", 2)
    assert [step for kind, step, _ in losses(tmp_path / "runs/chat") if kind == "train"] == [1, 2]
    given[1] = tmp_path / "runs/chat"
    answers = [run(chat.main, *given, "--prompt", "who?", "--max-tokens", 4) for _ in range(2)]
    assert answers[0] == answers[1]

    with requested("/v1/completions", {"model": "chat", "prompt": "the ", "max_tokens": 4, "temperature": 0}) as (
        port,
        answered,
    ):
        run(serve.main, *given, "--port", port, "--slots", 2, "--capacity", 64, codes=(128 + signal.SIGINT,))
    assert answered["usage"]["completion_tokens"] == 4


@on_pretend_cuda
def test_packed_fine_tuning_is_near_the_cpus_and_rewards_resume_exactly(tmp_path):
    from nanochat_native import finetune, reinforce

    write_text(tmp_path / "text.jsonl")
    train(tmp_path, run="base", steps=3, eval_every=3, max_seq_len=32)
    runs = tmp_path / "runs"
    packed = ["--checkpoint", runs / "base", *chat_flags(tmp_path), "--packing", "best-fit", "--batch-rows", 2]
    packed += ["--num-iterations", 3, "--chat-tasks", "SimpleSpelling", "--chat-max-problems", 2]
    run(finetune.main, *packed, "--run", "packed", "--device", "cuda")
    run(finetune.main, *packed, "--run", "cpu", "--device", "cpu", "--dtype", "bfloat16")
    assert_near(losses(runs / "packed"), losses(runs / "cpu"), 1e-2)
    assert [record["problems"] for record in records(runs / "packed", "chat")] == [2]

    rewards = ["--checkpoint", runs / "packed", "--out-dir", runs, "--device", "cuda", "--num-iterations", 2]
    rewards += ["--examples-per-step", 1, "--num-samples", 2, "--max-new-tokens", 4, "--eval-examples", 1]
    rewards += ["--save-every", 1, "--keep", 2, "--sample-every", 0]
    run(reinforce.main, *rewards, "--run", "whole")
    shutil.copytree(runs / "whole", runs / "resumed")
    shutil.rmtree(runs / "resumed/checkpoints/step_000002")
    run(reinforce.main, *rewards, "--run", "resumed", "--resume", "auto")
    kept = ("step", "loss", "reward")
    found = [[[r[k] for k in kept] for r in records(runs / name, "train")] for name in ("whole", "resumed")]
    assert found[0] == found[1]
    assert [step for step, *_ in found[0]] == [1, 2]


@contextlib.contextmanager
def requested(path, body):
    """Yield a port, and a dict that gets the answer to a request of it. Then the server, this process, gets SIGINT."""
    answered = {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ask():
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        try:
            wait_until(lambda: is_listening(port))
            with urllib.request.urlopen(request, timeout=HANGS) as response:
                answered.update(json.load(response))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    client = threading.Thread(target=ask)
    client.start()
    yield port, answered
    client.join()


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@on_pretend_cuda
def test_experiments_and_the_doctor(tmp_path):
    from nanochat_native import batch_size, compare, doctor, lr_find, memory
    from nanochat_native.ops import backends

    write_text(tmp_path / "text.jsonl")
    flags = tiny_flags(tmp_path, **TINY | {"device_batch_size": 4, "steps": 2, "eval_every": 2, "optimizer": "adamw"})
    own = ("--out-dir", "--run")
    flags = [word for i in range(0, len(flags), 2) if flags[i] not in own for word in flags[i : i + 2]]
    result = tmp_path / "result"
    cases = ["--cases", "a:", "b: --optimizer hybrid", "--rates", 1, "--seeds", 1]
    run(compare.main, *cases, "--out", result, *flags)
    assert [case["case"] for case in json.loads((result / "result.json").read_text())["runs"]] == ["a", "b"]
    run(lr_find.main, "--steps", 20, "--out", tmp_path / "rates", *flags, codes=(0, 1))  # 1: no rate stands out
    assert (tmp_path / "rates/result.json").exists()
    flags[flags.index("--device-batch-size") + 1] = "1"
    run(batch_size.main, "--steps", 9, "--skip", 1, "--out", tmp_path / "batch", *flags)
    assert (tmp_path / "batch/result.json").exists()
    sizes = ["--depth", 1, "--head-dim", 32, "--max-seq-len", 32, "--vocab-size", 300, "--device-batch-size", 1]
    out = run(memory.main, "--measure", "--device", "cuda", *sizes, "--out", tmp_path / "memory")
    assert "measured" in out
    out = run(doctor.main)
    assert out.count("cuda: native, differs from the reference by ") == len(backends.CUDA_OPERATORS)
    assert "CUDA: driver for 13.0, kernels built with 13." in out


@on_pretend_cuda
def test_the_doctor_says_that_the_driver_is_too_old(tmp_path):
    from nanochat_native import doctor
    from nanochat_native.ops import backends

    backends._C.cuda_versions = lambda: (12080, 13000)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert doctor.main() == 1
    (problem,) = err.getvalue().splitlines()
    assert problem.startswith("broken: the GPU driver is for CUDA 12.8, and the kernels were built with CUDA 13.0: ")


@on_pretend_cuda
def test_a_decoding_step_waits_once(tmp_path):
    import torch

    from nanochat_native.inference.engine import Engine
    from nanochat_native.inference.sampling import Sampling
    from nanochat_native.model import GPT, GPTConfig

    model = GPT(GPTConfig.from_depth(1, vocab_size=50, sequence_len=16)).to("cuda")
    model.init_weights(seed=0)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        engine = Engine(model, None, slots=3)
        engine.submit([1, 2, 3], Sampling(4, temperature=0.0))
        engine.submit([4, 5], Sampling(4, temperature=0.9, top_k=5, seed=1))
        engine.submit([6], Sampling(4, temperature=0.9, repetition_penalty=1.2, seed=2))
        engine.step()
        steps = count_waits(Engine, "step")
        for _ in range(2):
            engine.step()
    assert [waits(step) for step in steps] == [1, 1]


# --- ranks ---


@on_pretend_cuda(devices=2)
def test_a_collective_has_ended_when_it_was_waited_for():
    """The result is not there before, the input must stay, and both are on the current device, as with NCCL."""
    import torch
    import torch.distributed as dist

    from nanochat_native.optim.buckets import _all_gather, _reduce_scatter

    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    x, y = torch.arange(4.0, device="cuda"), torch.zeros(4, device="cuda")
    for collective in (_all_gather, _reduce_scatter):
        work = collective(y.fill_(5), x, async_op=True)
        assert y.isnan().all()
        work.wait()
        assert torch.equal(y, x)
    work = _all_gather(y, x, async_op=True)
    x[1] = 7
    with pytest.raises(RuntimeError, match="the input of a collective was changed before it ended"):
        work.wait()
    work = _reduce_scatter(y, x, async_op=True)
    y[1] = 7
    with pytest.raises(RuntimeError, match="the result of a collective was written to before it ended"):
        work.wait()
    dist.all_reduce(x, dist.ReduceOp.AVG)
    assert x.tolist() == [0, 7, 2, 3]
    with torch.cuda.device(1), pytest.raises(RuntimeError, match="the current device is 1, and a tensor is on cuda:0"):
        dist.all_reduce(x)
    with pytest.raises(RuntimeError, match="nccl does not support broadcast"):
        dist.broadcast(x, 0)


def on_ranks(folder, size, *, capability=(9, 0), **flags):
    """Train on several ranks, and return the output and what each step of each rank did: see counted_training.py."""
    if reason := unavailable():
        pytest.skip(reason)
    python = pretend_python()
    program = Path(__file__).with_name("counted_training.py")
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size), str(program), "--"]
    variables = (
        os.environ | environment(devices=size, capability=capability) | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": python}
    )
    result = subprocess.run(
        [*command, *tiny_flags(folder, **TINY | RANKS | flags)],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    files = [folder / f"runs/waits-{rank}.json" for rank in range(size)]
    return result.stdout, [json.loads(file.read_text()) for file in files]


RANKS = {"device_batch_size": 1, "eval_every": 2, "save_every": 2, "max_seq_len": 16, "check_replicas_every": 2}


@on_pretend_cuda
def train_on_one_rank(tmp_path):
    """2 steps as "whole" and "grown", and the first of them goes on to 4."""
    write_text(tmp_path / "text.jsonl")
    train(tmp_path, run="whole", steps=2, **RANKS)
    shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/grown")
    train(tmp_path, run="whole", steps=4, resume="auto", **RANKS)


@on_pretend_cuda
def go_on_with_one_rank(tmp_path):
    train(tmp_path, run="shrunk", steps=4, resume="auto", **RANKS)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    train_on_one_rank(tmp_path=folder)
    return folder


def test_two_ranks_over_nccl_train_as_one(one_rank):
    """The first 2 steps run on two ranks, and the next ones on one."""
    out, ranks = on_ranks(one_rank, 2, run="shrunk", steps=2)
    assert "ranks    2 over NCCL" in out
    for steps in ranks:
        first, second = steps
        assert first.keys() == second.keys()
        # Each bucket is reduced and gathered; norm and loss are sums over the ranks.
        assert first["nccl _REDUCE_SCATTER_BASE"] == first["nccl _ALLGATHER_BASE"] == 3
        assert first["nccl ALLREDUCE"] == 2
        assert first.get(UNPINNED, 0) == second.get(UNPINNED, 0) == 0
        assert waits(first) == 1
        assert waits(second) == 2  # the replicas are compared
    go_on_with_one_rank(tmp_path=one_rank)
    assert_near(losses(one_rank / "runs/shrunk"), losses(one_rank / "runs/whole"), 1e-3)


TODAY = RANKS | {"recipe": "today", "warmup_steps": 2, "depth": 2, "n_kv_head": 1, "head_dim": 64}


@on_pretend_cuda
def train_with(tmp_path, flags):
    """Train "one" on one rank."""
    write_text(tmp_path / "text.jsonl")
    train(tmp_path, run="one", **flags)


def test_two_ranks_train_todays_recipe_as_one(tmp_path):
    """Value embeddings, scalars and gates are sharded or summed; the rows of best fit are shared between the ranks."""
    train_with(tmp_path=tmp_path, flags={"steps": 3, **TODAY})
    _, ranks = on_ranks(tmp_path, 2, run="two", steps=3, **TODAY)
    assert [waits(step) for step in ranks[0]] == [1, 2, 1]
    assert_near(losses(tmp_path / "runs/two"), losses(tmp_path / "runs/one"), 1e-3)


@pytest.mark.slow
def test_a_run_of_one_rank_goes_on_with_two(one_rank):
    on_ranks(one_rank, 2, run="grown", steps=4, resume="auto")
    assert_near(losses(one_rank / "runs/grown"), losses(one_rank / "runs/whole"), 1e-3)


@pytest.mark.slow
def test_gradients_and_weights_travel_in_bfloat16(one_rank):
    on_ranks(one_rank, 2, run="narrow", steps=2, reduce_dtype="bfloat16", gather_dtype="bfloat16")
    narrow = losses(one_rank / "runs/narrow")
    assert_near(narrow, [entry for entry in losses(one_rank / "runs/whole") if entry[1] <= 2], 1e-2)


# --- the GPU tests ---

LONG = ("attention", "behaviour", "newton_schulz", "training")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LONG else [])
        for path in sorted((ROOT / "tests/gpu").glob("test_gpu_*.py"))
        for name in [path.stem.removeprefix("test_gpu_")]
    ],
)
def test_the_gpu_tests_pass_on_the_pretend_device(name):
    result = python_on_pretend_cuda(
        ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow", f"tests/gpu/test_gpu_{name}.py"],
        cwd=ROOT,
        env={"NANOCHAT_TEST_SIZES": "small"},
        timeout=HANGS,
        devices=2,
    )
    assert " passed" in result.stdout
