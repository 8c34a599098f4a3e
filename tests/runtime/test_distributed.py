"""Runs on several ranks: torchrun's processes on this machine, over gloo."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from fork_server import python
from ranks import run
from tiny_run import HANGS, losses, records, tiny_flags, train, wait_until, write_text
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from nanochat_native.runs import checkpoint
from nanochat_native.runs.config import parse
from nanochat_native.runtime import distributed
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.runtime.distributed import RankError, World
from nanochat_native.training.pretraining import Pretraining

pytestmark = pytest.mark.slow

STEPS = 8
MATRIX = "transformer.h.0.attn.c_q.weight"
ALL = {"device_batch_size": 1, "steps": STEPS}  # with one row at a time, 4 ranks have a row each


def torchrun(size, args, agent=("--standalone",), program=("-m", "nanochat_native.train"), real=False, **environment):
    """Start the ranks of a program; `real`: as processes that can be killed and stopped themselves."""
    interpreter = sys.executable if real else python()
    command = [interpreter, "-m", "torch.distributed.run", *agent, "--nproc_per_node", str(size), *program]
    return subprocess.Popen(
        [*command, "--", *args],  # without the "--", torchrun reads --run as its own flag
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": interpreter} | environment,
    )


def finished(process):
    out, err = process.communicate(timeout=HANGS)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_text(folder / "text.jsonl")
    assert train(folder, run="1", **ALL) == 0
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def on_ranks(folder, request):
    """Return (ranks, output) of the run on this number of ranks."""
    code, out, err = finished(torchrun(request.param, tiny_flags(folder, run=str(request.param), **ALL)))
    assert code == 0, err
    return request.param, out


def test_the_loss_curve_is_that_of_one_rank(folder, on_ranks):
    size, _ = on_ranks
    one, many = (losses(folder / "runs" / run) for run in ("1", str(size)))
    assert [entry[:2] for entry in many] == [entry[:2] for entry in one]
    for (_, _, mine), (_, _, theirs) in zip(many, one, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)
    norms = [[r["grad_norm"] for r in records(folder / "runs" / run, "train")] for run in ("1", str(size))]
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)


def test_one_rank_prints(on_ranks):
    size, out = on_ranks
    assert out.count("device   ") == 1
    assert out.count("step 0: validation") == 1
    assert re.search(rf"ranks    {size} over gloo \| each owns [\d.]+ of [\d.]+ MB of weights, and sends", out)


def test_a_checkpoint_holds_what_one_rank_would_write(folder, on_ranks):
    size, _ = on_ranks
    (one, one_meta), (many, many_meta) = (
        checkpoint.load(folder / "runs" / run / "checkpoints") for run in ("1", str(size))
    )
    assert one_meta["model_config"] == many_meta["model_config"]
    for kind in ("model", "optimizer"):
        assert {k: v.shape for k, v in many[kind].items()} == {k: v.shape for k, v in one[kind].items()}
        for name, tensor in many[kind].items():
            torch.testing.assert_close(tensor, one[kind][name], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize(("first", "second"), [(1, 4), (4, 2), (3, 1)])
def test_a_run_resumes_on_another_number_of_ranks(folder, first, second):
    """Require the data and, up to rounding, the losses of a run that kept its number of ranks."""
    name = f"{first} to {second}"
    flags = {"total_batch_size": 12 * 32, "device_batch_size": 1, "run": name.replace(" ", "-")}
    for size, steps, more in ((first, 4, {}), (second, STEPS, {"resume": "auto"})):
        args = tiny_flags(folder, steps=steps, **flags, **more)
        code, _, err = (
            finished(torchrun(size, args)) if size > 1 else (train(folder, steps=steps, **flags, **more), "", "")
        )
        assert code == 0, err
    assert train(folder, steps=4, **flags | {"run": "whole-" + flags["run"]}) == 0
    assert train(folder, steps=STEPS, resume="auto", **flags | {"run": "whole-" + flags["run"]}) == 0
    whole, cut = (losses(folder / "runs" / run) for run in ("whole-" + flags["run"], flags["run"]))
    for (kind, step, mine), (_, _, theirs) in zip(cut, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=5e-4), (kind, step)


@pytest.mark.parametrize("tokenize", ["ahead", "while-training"])
def test_documents_packed_by_best_fit_are_the_same_on_any_number_of_ranks(folder, tokenize):
    flags = {"packing": "bestfit", "tokenize": tokenize, "max_seq_len": 64, "total_batch_size": 512}
    flags |= {"device_batch_size": 1, "steps": 6, "save_every": 3, "eval_every": 3}
    whole, cut = f"{tokenize}-whole", f"{tokenize}-cut"
    assert train(folder, run=whole, **flags) == 0
    for size, steps, more in ((4, 3, {}), (2, 6, {"resume": "auto"})):
        code, _, err = finished(torchrun(size, tiny_flags(folder, run=cut, **flags | {"steps": steps}, **more)))
        assert code == 0, err
        assert (folder / "runs" / cut / "checkpoints" / f"step_{steps:06d}" / "loader.safetensors").is_file()
    one, many = (losses(folder / "runs" / run) for run in (whole, cut))
    found = {entry[:2]: entry[2] for entry in many}
    for kind, step, loss in one:
        assert found[kind, step] == pytest.approx(loss, rel=5e-4), (kind, step)
    states = [checkpoint.load(folder / "runs" / run / "checkpoints", 6)[0]["loader"] for run in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_with_bfloat16_between_ranks_resumes_bit_for_bit(folder):
    """Save the owners' exact values, so that a resumed run equals an uninterrupted one, bit for bit."""
    flags = {"device_batch_size": 2, "reduce_dtype": "bfloat16", "gather_dtype": "bfloat16"}
    flags |= {"check_replicas_every": 1, "save_every": 4, "warmdown_ratio": 0}
    for name, steps, more in (("bf16-whole", 8, {}), ("bf16", 4, {}), ("bf16", 8, {"resume": "auto"})):
        code, _, err = finished(torchrun(2, tiny_flags(folder, run=name, steps=steps, **flags, **more)))
        assert code == 0, err
    assert losses(folder / "runs/bf16") == losses(folder / "runs/bf16-whole")
    assert losses(folder / "runs/bf16") != losses(folder / "runs/1")
    tensors, _ = checkpoint.load(folder / "runs/bf16/checkpoints")
    weight, master = tensors["model"][MATRIX], tensors["optimizer"][f"{MATRIX}.master"]
    assert torch.equal(weight, master.bfloat16().float())
    assert not torch.equal(weight, master)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1, 2)], ids=str)
def test_exact_values_follow_a_change_of_ranks(folder, sizes):
    """Resume from the exact weights of the checkpoint, although rounded ones are sent between ranks."""
    name = "master-" + "-".join(map(str, sizes))
    flags = {"device_batch_size": 2, "gather_dtype": "bfloat16", "save_every": 4, "warmdown_ratio": 0}
    for count, size in enumerate(sizes, 1):
        more = {"resume": "auto"} if count > 1 else {}
        args = {"run": name, "steps": 4 * count} | flags | more
        if size == 1:
            assert train(folder, **args) == 0
            continue
        code, _, err = finished(torchrun(size, tiny_flags(folder, **args)))
        assert code == 0, err
    whole = {"device_batch_size": 2, "save_every": 4, "warmdown_ratio": 0, "steps": 4 * len(sizes)}
    assert train(folder, run=f"{name}-whole", **whole) == 0
    exact, found = (losses(folder / "runs" / run_) for run_ in (f"{name}-whole", name))
    assert [loss for _, _, loss in found] == pytest.approx([loss for _, _, loss in exact], rel=2e-2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"total_batch_size": 96}, "--total-batch-size must be a multiple of"),
        ({"depth": 0}, "--depth must be a whole number from 1 to 1000, got 0"),
        ({"data": "/nowhere.jsonl"}, "/nowhere.jsonl"),
        ({"optimizer": "sgd"}, "optimizer must be hybrid or adamw on several ranks, got 'sgd'"),
    ],
)
def test_a_mistake_stops_all_ranks_with_one_message(folder, flags, message):
    code, _, err = finished(torchrun(2, tiny_flags(folder, **{"run": "wrong", "device_batch_size": 2} | flags)))
    assert code != 0
    assert err.count("error: ") == 1
    assert message in err
    assert not (folder / "runs/wrong").exists()


def wait_for_checkpoints(run, count, process, after=0):
    """Wait until the run of `process` has `count` checkpoints of steps above `after`."""

    def there():
        return len([s for s in checkpoint.steps(run / "checkpoints") if s > after]) >= count

    wait_until(lambda: process.poll() is not None or there())
    assert process.poll() is None, process.communicate()[1]


def test_damaged_checkpoints_stop_all_ranks_with_one_message(folder):
    code, _, err = finished(torchrun(2, tiny_flags(folder, run="damaged", steps=4, device_batch_size=2)))
    assert code == 0, err
    weights = folder / "runs/damaged/checkpoints/step_000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    code, _, err = finished(torchrun(2, tiny_flags(folder, run="damaged", device_batch_size=2, resume="auto")))
    assert code != 0
    assert err.count("error: ") == 1
    assert f"{weights} is damaged" in err


def test_sigterm_ends_all_ranks_with_a_checkpoint(folder):
    process = torchrun(2, tiny_flags(folder, run="stopped", steps=100_000, save_every=50, device_batch_size=2))
    run = folder / "runs/stopped"
    wait_for_checkpoints(run, 1, process)
    process.send_signal(signal.SIGTERM)
    finished(process)
    assert records(run, "train")[-1]["step"] == checkpoint.steps(run / "checkpoints")[-1]


def test_a_killed_rank_ends_the_job_and_the_run_resumes(folder):
    run = folder / "runs/killed"
    flags = {"run": "killed", "steps": 100_000, "save_every": 50, "device_batch_size": 2}
    process = torchrun(2, tiny_flags(folder, **flags), real=True)
    wait_for_checkpoints(run, 2, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    code, _, _ = finished(process)
    assert code != 0
    step = checkpoint.latest(run / "checkpoints")
    process = torchrun(2, tiny_flags(folder, resume="auto", **flags))
    wait_for_checkpoints(run, 1, process, after=step)
    process.send_signal(signal.SIGTERM)
    finished(process)
    found = [record["step"] for record in records(run, "train")]
    assert found == list(range(1, len(found) + 1))


def test_a_stalled_rank_ends_the_job_in_time(folder):
    run = folder / "runs/stalled"
    flags = tiny_flags(folder, run="stalled", steps=100_000, save_every=50, device_batch_size=2)
    process = torchrun(2, flags, real=True, NANOCHAT_RANK_TIMEOUT="30")
    wait_for_checkpoints(run, 1, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGSTOP)
    code, _, err = finished(process)
    assert code != 0
    assert re.search(r"rank \d: another rank does not answer, after at most 30 s", err)
    assert checkpoint.latest(run / "checkpoints") is not None


def test_an_error_is_shown_with_its_rank(folder):
    script = (
        "import os, sys; from nanochat_native.training import trainer; from nanochat_native.train import main\n"
        "def fail(*_): raise ZeroDivisionError('of this rank')\n"
        "if os.environ['RANK'] == '1': trainer.Trainer.train_step = fail\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    path = folder / "failing.py"
    path.write_text(script)
    code, _, err = finished(torchrun(2, tiny_flags(folder, run="failing", device_batch_size=2), program=[str(path)]))
    assert code != 0
    assert "rank 1: ZeroDivisionError: of this rank" in err


SABOTAGE = """
import itertools, os, signal, sys
from nanochat_native.runs import checkpoint
from nanochat_native.training import trainer
from nanochat_native.train import main

calls = itertools.count(1)
rank, what = os.environ["RANK"], os.environ["SABOTAGE"]

def dying(*args, real=checkpoint.fsync):
    if next(calls) == 12:  # in the second checkpoint, after its files are written and before they are in place
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

def poisoned(run, *args, real=trainer.Trainer.__init__):
    real(run, *args)
    weight = dict(run.model.named_parameters())["transformer.h.0.attn.c_v.weight"]
    weight.register_hook(lambda gradient: gradient * float("nan") if next(calls) == 3 else gradient)

if what == "kill in a save" and rank == "0":
    checkpoint.fsync = dying
if what == "disk full":
    full = lambda folder: checkpoint.shutil._ntuple_diskusage(1, 1, 0)
    checkpoint.shutil.disk_usage = full
if what == "nan" and rank == "1":
    trainer.Trainer.__init__ = poisoned
sys.exit(main(sys.argv[1:]))
"""


def sabotaged(folder, what, **flags):
    path = folder / "sabotage.py"
    path.write_text(SABOTAGE)
    args = tiny_flags(folder, device_batch_size=2, **flags)
    return finished(torchrun(2, args, program=[str(path)], SABOTAGE=what))


def test_kill_in_a_save_leaves_the_checkpoint_before(folder):
    code, _, _ = sabotaged(folder, "kill in a save", run="save", steps=12)
    assert code != 0
    assert checkpoint.latest(folder / "runs/save/checkpoints") == 4
    code, _, err = finished(torchrun(2, tiny_flags(folder, run="save", steps=12, device_batch_size=2, resume="auto")))
    assert code == 0, err
    code, _, err = finished(torchrun(2, tiny_flags(folder, run="unharmed", steps=12, device_batch_size=2)))
    assert code == 0, err
    assert losses(folder / "runs/save") == losses(folder / "runs/unharmed")


def test_a_gradient_that_is_not_finite_on_one_rank_makes_all_skip_the_step(folder):
    code, out, err = sabotaged(folder, "nan", run="nan")
    assert code == 0, err
    assert "step 3: the gradient's norm is nan (transformer.h.0.attn.c_v.weight): no update; 1 in a row" in out
    assert [record["skipped"] for record in records(folder / "runs/nan", "train")] == [0, 0, 1, 1, 1, 1, 1, 1]


def test_a_full_disk_leaves_the_earlier_checkpoints_and_the_run_continues(folder):
    code, _, err = finished(torchrun(2, tiny_flags(folder, run="full", steps=4, device_batch_size=2)))
    assert code == 0, err
    code, out, _ = sabotaged(folder, "disk full", run="full", steps=12, resume="auto")
    assert code != 0  # the last checkpoint is not there
    assert "warning: " in out
    assert "the disk has 0.0 MB free" in out
    assert records(folder / "runs/full", "train")[-1]["step"] == 12
    assert checkpoint.latest(folder / "runs/full/checkpoints") == 4


def test_two_jobs_do_not_train_in_one_folder(folder):
    flags = tiny_flags(folder, run="shared", steps=100_000, save_every=50, device_batch_size=2)
    process = torchrun(2, flags)
    wait_for_checkpoints(folder / "runs/shared", 1, process)
    code, _, err = finished(torchrun(2, [*flags, "--resume", "auto"]))
    assert code != 0
    assert err.count("error: ") == 1
    assert "another process is training in" in err
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    finished(process)


def test_two_agents_make_one_world(folder):
    """Start two agents as on two machines: each starts its ranks, and they connect to one address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "two"]
    flags = tiny_flags(folder, run="two-agents", **ALL)
    agents = [torchrun(1, flags, agent=rendezvous) for _ in range(2)]
    ends = [finished(agent) for agent in agents]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sum(out.count("device   ") for _, out, _ in ends) == 1
    one, many = (losses(folder / "runs" / run) for run in ("1", "two-agents"))
    assert [loss for _, _, loss in many] == pytest.approx([loss for _, _, loss in one], rel=2e-4)


def test_a_folder_that_cannot_be_written_stops_all_ranks(folder):
    (folder / "a file").write_text("in the way")
    flags = tiny_flags(folder, device_batch_size=2)
    flags[flags.index("--out-dir") + 1] = str(folder / "a file")
    code, _, err = finished(torchrun(2, flags))
    assert code != 0
    assert err.count("error: ") == 1
    assert "a file" in err


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(RankError, match="--nproc_per_node must be <= 2, the GPUs of this machine, got 4"),
        distributed.init_process_group(),
    ):
        pass


# --- what ranks agree on ---


def world():
    return World(dist.get_rank(), dist.get_world_size(), group=dist.group.WORLD)


def fail_on(rank):
    def act():
        if dist.get_rank() in rank:
            raise ValueError("no room")
        return dist.get_rank()

    try:
        return world().run_collectively(act, ValueError)
    except RankError as error:
        return str(error)


def written_while_it_changes(folder):
    """Write a checkpoint of a matrix of each rank and of a table that is cut by rows, while all of them change."""
    here, group = world(), dist.new_group(backend="gloo")
    weights = {"w": torch.arange(6.0)}
    mesh = init_device_mesh("cpu", (here.size,))
    rows = torch.arange(10.0).view(5, 2)
    local = rows[-(-5 // here.size) * here.rank :][: -(-5 // here.size)].clone()
    table = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=rows.shape, stride=rows.stride())
    saving = checkpoint.ShardedSave(folder, 3, rank=here.rank)
    if here.is_rank0:
        saving.prepare(1000)
    here.barrier()
    own = torch.full((2, 2), float(here.rank))
    saving.start(weights, {f"own{here.rank}": own, "table": table}, group)
    for changed in (weights["w"], own, local):
        changed.fill_(-1.0)
    while here.all_reduce_max(not saving.done):
        pass
    assert not saving.failed
    if here.is_rank0:
        saving.seal({"note": "mine"})
        while not saving.done:
            pass
        assert not saving.failed
    here.barrier()
    saving.close()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_write_one_checkpoint_of_the_values_at_its_start(tmp_path, size):
    run(size, written_while_it_changes, tmp_path)
    tensors, meta = checkpoint.load(tmp_path)
    assert (meta["step"], meta["note"]) == (3, "mine")
    assert torch.equal(tensors["model"]["w"], torch.arange(6.0))
    assert torch.equal(tensors["optimizer"].pop("table"), torch.arange(10.0).view(5, 2))
    assert {name: tensor[0, 0].item() for name, tensor in tensors["optimizer"].items()} == {
        f"own{rank}": float(rank) for rank in range(size)
    }
    shard = next(tmp_path.glob("step_000003/optimizer/*"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=f"optimizer/{shard.name} is damaged"):
        checkpoint.load(tmp_path)


def fails_on_one_rank(folder):
    here, group = world(), dist.new_group(backend="gloo")
    saving = checkpoint.ShardedSave(folder, 3, rank=here.rank)
    if here.is_rank0:
        saving.prepare(1000)
        (folder / ".tmp-step_000003/optimizer").rmdir()
        (folder / ".tmp-step_000003/optimizer").write_text("in the way")
    here.barrier()
    saving.start({"w": torch.ones(2)}, {f"own{here.rank}": torch.ones(2, 2)}, group)
    while here.all_reduce_max(not saving.done):
        pass
    messages = here.all_gather_object(saving.failed)
    saving.close()
    return messages


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    for messages in run(2, fails_on_one_rank, tmp_path):
        assert any("checkpoint of step 3 could not be written" in message for message in messages)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_one_rank_is_raised_on_all():
    assert run(3, fail_on, ()) == [0, 1, 2]
    assert run(3, fail_on, (1,)) == ["rank 1: no room"] * 3
    assert run(3, fail_on, (0, 1, 2)) == ["no room"] * 3


def differing():
    here, messages = world(), []
    tensors = [("a.weight", torch.arange(10.0)), ("b.weight", torch.ones(3, 3))]
    distributed.require_same_bits(here, tensors)
    if here.rank == 2:
        tensors[1][1][2, 1] = -1.0
    for attempt in (
        lambda: distributed.require_same_bits(here, tensors),
        lambda: here.require_same({"version": 1, "--seed": here.rank // 2}),
    ):
        try:
            attempt()
        except RankError as error:
            messages.append(str(error))
    return messages


def listed_before_a_file_comes(folder):
    """Prepare data of which rank 0 sees a file less than rank 1. Return the message of the error."""
    here = world()
    config = parse(tiny_flags(folder, data=folder / ("both" if here.rank else "one"), validation="fraction"))
    try:
        Pretraining().prepare_data(dataclasses.replace(config, tokenize="ahead"), SilentConsole(), here)
    except RankError as error:
        return str(error)
    return None


def test_ranks_that_find_other_files_of_the_data_are_refused(tmp_path):
    for name, count in (("one", 1), ("both", 2)):
        (tmp_path / name).mkdir()
        for seed in range(count):
            write_text(tmp_path / name / f"{seed}.jsonl", seed=seed)
    messages = run(2, listed_before_a_file_comes, tmp_path)
    assert messages[0] is not None
    assert messages[0] == messages[1]
    assert f"the ranks differ in the data of --data {tmp_path / 'one'}, whose files must not change" in messages[0]


def test_replicas_that_have_diverged_are_named():
    for messages in run(3, differing):
        assert messages == [
            "b.weight differs between rank 2 and rank 0: the replicas have diverged",
            "the ranks differ in --seed: 0 on rank 0, 1 on 2",
        ]


def test_checksums_depend_on_every_bit_and_position():
    base = torch.arange(8.0)
    swapped, flipped = base[[1, 0, 2, 3, 4, 5, 6, 7]], base.clone()
    flipped[5] = torch.nextafter(flipped[5], torch.tensor(9.0))
    found = distributed.checksums([base, swapped, flipped, base.bfloat16(), base[:7].bfloat16()]).tolist()
    assert len(set(found)) == 5
    assert found[0] == distributed.checksums([base.clone()]).item()


def test_one_process_needs_no_process_group():
    here = World()
    assert here.all_gather_object(3) == [3]
    assert here.all_reduce_max(4) == 4
    assert here.run_collectively(lambda: 5) == 5
    assert json.dumps(here.all_reduce_sum_(torch.ones(2)).tolist()) == "[1.0, 1.0]"
