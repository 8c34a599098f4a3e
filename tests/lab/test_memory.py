import csv
import dataclasses
import errno
import itertools
import json
import os
import re
from typing import get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist
from ranks import run
from tiny_run import tiny_flags, write_text
from torch.profiler import record_function

from nanochat_native.lab import memory
from nanochat_native.lab.memory import (
    Options,
    activation_bytes,
    largest_batch,
    library_scratch,
    measure,
    peak,
    predict,
    prediction,
    snapshots,
    static_bytes,
)
from nanochat_native.lab.memory import options as options_module
from nanochat_native.lab.memory import table as table_module
from nanochat_native.lab.memory.allocations import Allocations
from nanochat_native.memory import main
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import setup_optimizers
from nanochat_native.optim.routing import DEFAULT_LEARNING_RATES
from nanochat_native.runs import results
from nanochat_native.runs.config import parse, resolve_device
from nanochat_native.runs.metrics_log import SilentLog
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.training.sizing import PROCESS_BYTES
from nanochat_native.training.trainer import Trainer

CONFIG = {"depth": 3, "max_seq_len": 128, "vocab_size": 515, "device_batch_size": 2}


@pytest.fixture(autouse=True)
def tensors_alone(monkeypatch):
    """Products that take no scratch, whatever the processor: what is measured are the tensors."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    torch.set_num_threads(1)


def build(architecture):
    sizes = {"vocab_size": CONFIG["vocab_size"], "sequence_len": 128, "architecture": architecture}
    model = GPT(GPTConfig.from_depth(CONFIG["depth"], **sizes))
    model.init_weights(seed=0)
    return model


def held(optimizer, architecture):
    """(weights, gradients, optimizers' state) of this rank after a step, bytes."""
    model = build(architecture)
    optimizers = setup_optimizers(model, optimizer=optimizer, process_group=dist.group.WORLD)
    idx = torch.randint(515, (1, 17))
    model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous()).backward()
    for each in optimizers:
        each.step()
    buckets = [bucket for each in optimizers for bucket in each.buckets]
    return (
        sum(b.flat_values.nbytes for b in buckets),
        sum(b.flat_gradients.nbytes for b in buckets),
        state_bytes(optimizers),
    )


def state_bytes(optimizers):
    tensors = [
        value for each in optimizers for state in each.state.values() for value in state.values() if value is not None
    ]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("size", "optimizer", "architecture"),
    [(2, "hybrid", "october"), (3, "hybrid", "october"), (2, "adamw", "october"), (3, "hybrid", "today")],
)
def test_static_memory_of_ranks_is_as_predicted(size, optimizer, architecture):
    results = run(size, held, optimizer, architecture)
    with torch.device("meta"):
        weights, state = static_bytes(GPT(build(architecture).config), size, optimizer)
    assert {found[:2] for found in results} == {(weights, weights)}
    assert max(found[2] for found in results) == pytest.approx(state, rel=0.05)


@pytest.mark.parametrize("architecture", ["october", "today"])
@pytest.mark.parametrize("optimizer", DEFAULT_LEARNING_RATES)
def test_static_memory_of_one_rank(optimizer, architecture):
    options = Options(**CONFIG, dtype="float32", optimizer=optimizer, micro_batches=2, architecture=architecture)
    step = memory.Step(options)
    step()
    assert predict(options)["tokens"] == step.inputs.nbytes + step.targets.nbytes
    weights, state = static_bytes(step.model, 1, optimizer)
    parameters = list(step.model.parameters())
    padding = 64 * len(parameters)  # of buckets, which ranks have
    assert weights == pytest.approx(sum(p.nbytes for p in parameters), rel=0, abs=padding)
    assert state_bytes(step.optimizers) == pytest.approx(state, rel=0, abs=2 * padding)


def kept_by_autograd(dtype, grad_checkpoint, architecture):
    """Bytes that a forward pass keeps beside the parameters."""
    config = GPTConfig.from_depth(3, vocab_size=515, sequence_len=128, architecture=architecture)
    model = GPT(config, grad_checkpoint=grad_checkpoint)
    model.init_weights(seed=0)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    idx = torch.randint(515, (2, 129))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in known)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "width"), [("october", 192), ("today", 256)])
def test_what_autograd_keeps_is_as_predicted(dtype, grad_checkpoint, architecture, width):
    options = Options(dtype=dtype, grad_checkpoint=grad_checkpoint, architecture=architecture, **CONFIG)
    element = 2 if dtype == "bfloat16" else 4
    loss = element * (CONFIG["vocab_size"] + 256) * width + 8 * 256  # its gradients; the tokens are kept too
    assert kept_by_autograd(dtype, grad_checkpoint, architecture) == pytest.approx(
        activation_bytes(options) + loss, rel=0.01
    )


def case(phase, optimizer, dtype, depth, rows, length, vocabulary, **others):
    sizes = {"depth": depth, "device_batch_size": rows, "max_seq_len": length, "vocab_size": vocabulary}
    return phase, Options(optimizer=optimizer, dtype=dtype, **sizes, **others)


# Each optimizer and type; the MLP, the loss and the optimizer's step set the peak.
CASES = [
    case("backward", "hybrid", "float32", 3, 8, 128, 515),
    case("optimizer step", "hybrid", "float32", 2, 1, 64, 515),
    case("backward", "hybrid", "float32", 4, 4, 256, 515, grad_checkpoint=True),
    case("backward", "hybrid", "bfloat16", 3, 8, 128, 515, n_kv_head=1),
    case("backward", "hybrid", "bfloat16", 2, 8, 64, 2000, grad_checkpoint=True),
    case("optimizer step", "hybrid", "bfloat16", 3, 1, 16, 300, micro_batches=2),
    case("backward", "muon_sgd", "float32", 3, 8, 64, 515, head_dim=32, n_kv_head=2),
    case("optimizer step", "muon_sgd", "bfloat16", 3, 1, 64, 515),
    case("backward", "adamw", "float32", 1, 2, 64, 2000),
    case("backward", "adamw", "bfloat16", 1, 8, 64, 4000),
    case("backward", "adamw", "float32", 3, 2, 64, 300, micro_batches=3),
    case("optimizer step", "adam", "float32", 1, 1, 64, 2000),
    case("backward", "adam", "bfloat16", 3, 8, 64, 515, grad_checkpoint=True, n_kv_head=1),
    case("backward", "sgd_momentum", "float32", 3, 2, 128, 515, n_kv_head=1),
    case("backward", "sgd_momentum", "bfloat16", 3, 2, 64, 515, micro_batches=2),
    case("backward", "sgd", "float32", 1, 1, 64, 1000),
    case("backward", "sgd", "bfloat16", 4, 4, 64, 300, grad_checkpoint=True, micro_batches=2),
    case("backward", "sgd", "bfloat16", 4, 1, 64, 300, grad_checkpoint=True, micro_batches=2),
    case("optimizer step", "adam", "float32", 4, 1, 64, 300),
    case("backward", "sgd", "bfloat16", 4, 2, 128, 515),
    *(
        case(*arguments, architecture="today", **others)
        for *arguments, others in (
            ("backward", "hybrid", "float32", 3, 8, 128, 515, {}),
            ("optimizer step", "hybrid", "float32", 2, 1, 64, 515, {}),
            ("backward", "hybrid", "float32", 4, 4, 256, 515, {"grad_checkpoint": True}),
            ("backward", "hybrid", "bfloat16", 3, 8, 128, 515, {"n_kv_head": 1}),
            ("backward", "hybrid", "bfloat16", 2, 8, 64, 2000, {"grad_checkpoint": True}),
            ("backward", "muon_sgd", "float32", 3, 8, 64, 515, {"head_dim": 32, "n_kv_head": 2}),
            ("backward", "adamw", "bfloat16", 1, 8, 64, 4000, {}),
            ("backward", "adamw", "float32", 3, 2, 64, 4000, {"micro_batches": 3}),
            ("optimizer step", "adam", "float32", 3, 1, 64, 4000, {}),
            ("optimizer step", "adam", "float32", 5, 1, 64, 300, {}),
            ("backward", "sgd", "float32", 4, 2, 128, 300, {}),
            ("backward", "sgd", "bfloat16", 4, 4, 64, 300, {"grad_checkpoint": True, "micro_batches": 2}),
            ("backward", "sgd_momentum", "bfloat16", 3, 2, 64, 515, {"micro_batches": 2}),
        )
    ),
]


@pytest.mark.parametrize(("phase", "options"), CASES, ids=lambda value: getattr(value, "optimizer", value))
def test_the_peak_of_a_step_is_as_predicted(phase, options):
    measured = measure(options)
    assert max(measured.phases, key=measured.phases.get) == phase
    assert peak(options) == pytest.approx(measured.peak, rel=0.001)
    assert sum(predict(options).values()) == peak(options)
    assert predicted_phases(options) == pytest.approx(measured.phases, rel=0.001)
    assert activation_bytes(options) == pytest.approx(measured.activations, rel=0.01)


def predicted_phases(options):
    return {
        phase: max(snapshot.bytes for snapshot in snapshots(options) if snapshot.phase == phase)
        for phase in memory.allocations.PHASES
    }


BFLOAT16 = [options for _, options in CASES if options.dtype == "bfloat16"]


@pytest.mark.parametrize(
    ("options", "threads"),
    [*((options, 1) for options in BFLOAT16), *((options, 3) for options in BFLOAT16[:3])],
    ids=lambda value: getattr(value, "optimizer", value),
)
def test_the_librarys_scratch_is_within_its_bound(options, threads, monkeypatch):
    """With the products that this processor has; test_processors.py takes older instruction sets too."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    torch.set_num_threads(threads)
    measured, bound = measure(options), library_scratch(options)
    for phase, predicted in predicted_phases(options).items():
        assert 0.999 * predicted <= measured.phases[phase] <= 1.001 * predicted + bound, phase
    assert activation_bytes(options) == pytest.approx(measured.activations, rel=0.01)


def test_the_bound_of_the_librarys_scratch():
    options = Options(depth=2, max_seq_len=1000, device_batch_size=3, vocab_size=515, dtype="bfloat16", device="cpu")
    narrow, wide, weight = 3000 * 128, 3000 * 512, 128 * 512
    assert library_scratch(options) == 2 * narrow + 2 * weight + 4 * wide + (1 << 20)
    few = dataclasses.replace(options, max_seq_len=1, device_batch_size=2)
    torch.set_num_threads(4)
    assert library_scratch(few) == 2 * 2 * (128 + 512) + 4 * weight * 4 + (4 << 20)
    for others in ({"dtype": "float32"}, {"device": "cuda"}):
        assert library_scratch(dataclasses.replace(options, **others)) == 0


def test_the_embedding_can_set_the_peak():
    _, options = case("backward", "sgd", "bfloat16", 3, 4, 200, 8000, grad_checkpoint=True)
    *_, embedding, _ = snapshots(options)
    assert embedding.bytes == peak(options) == pytest.approx(measure(options).peak, rel=0.005)


def test_muon_on_one_rank_batches_all_matrices_of_a_shape():
    """They are more than a bucket's 256 MiB."""
    (step,) = (snapshot for snapshot in snapshots(Options(device="cpu")) if snapshot.phase == "optimizer step")
    assert step.parts["temporary tensors"] == 2 * 20 * 4 * 1280 * 5120


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_largest_batch_fits_and_one_more_does_not(grad_checkpoint, micro_batches):
    options = Options(depth=8, device="cuda", grad_checkpoint=grad_checkpoint, micro_batches=micro_batches)
    for gib in (6, 24, 80):
        size = largest_batch(options, gib << 30)
        around = [peak(dataclasses.replace(options, device_batch_size=number)) for number in (size, size + 1)]
        assert around[0] <= gib << 30 < around[1]
    assert largest_batch(options, peak(dataclasses.replace(options, device_batch_size=1))) == 1
    assert largest_batch(options, peak(dataclasses.replace(options, device_batch_size=1)) - 1) == 0


def test_gpu_keeps_logits_and_a_float32_sum_for_chunks():
    def work(rows):
        found = snapshots(Options(device_batch_size=rows, device="cuda"))
        return max(snapshot.parts["temporary tensors"] for snapshot in found if snapshot.phase == "forward")

    assert work(1) < 2 * 2048 * 1280 * 2 + (256 << 20) + 4 * 65536 * 1280
    assert work(2) >= (256 << 20) + 4 * 65536 * 1280


@pytest.fixture
def small_grid(monkeypatch):
    """Two values of each flag of the table, to be quick."""
    monkeypatch.setattr(options_module, "GRID", {name: values[-2:] for name, values in options_module.GRID.items()})
    monkeypatch.setattr(table_module, "GRID", options_module.GRID)
    return options_module.GRID


def rows_of(path):
    """The rows of a table in a JSON file, as dicts, with the names that indices stand for."""
    content = json.loads(path.read_text())
    for values in content["rows"]:
        row = dict(zip(content["columns"], values, strict=True))
        row["optimizer"], row["phase"] = content["grid"]["optimizer"][row["optimizer"]], content["phases"][row["phase"]]
        row["grad_checkpoint"] = bool(row["grad_checkpoint"])
        yield row


@pytest.mark.parametrize("fixed", [{}, {"vocab_size": 8192, "dtype": "float32", "micro_batches": 2}])
def test_each_row_of_the_table_is_the_prediction(small_grid, fixed, tmp_path, capsys):
    flags = [text for name, value in fixed.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert main([*flags, "--device", "cpu", "--table", str(tmp_path / "table.json")]) == 0
    assert "64 rows of 16 columns in" in capsys.readouterr().out
    rows = list(rows_of(tmp_path / "table.json"))
    points = {tuple(row[name] for name in small_grid) for row in rows}
    assert points == set(itertools.product(*small_grid.values()))
    for row in rows:
        options = Options(**{name: row[name] for name in small_grid}, **fixed, device="cpu")
        highest = max(snapshots(options), key=lambda snapshot: snapshot.bytes)
        assert row["phase"] == highest.phase
        assert {name: row[name] for name in highest.parts} == {
            name: round(size / 2**20) for name, size in predict(options).items()
        }


def test_the_place_of_a_row_follows_from_the_grid(small_grid, tmp_path):
    content = table_module.write(Options(device="cpu"), tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == content
    assert content["columns"][: len(small_grid)] == list(small_grid)
    assert len({tuple(row[: len(small_grid)]) for row in content["rows"]}) == len(content["rows"]) == 2**6
    assert [row[: len(small_grid)] for row in content["rows"][:3]] == [
        [26, 16, 1024, 4, 0, 0],
        [26, 16, 1024, 4, 0, 1],
        [26, 16, 1024, 4, 1, 0],
    ]


def test_the_table_as_csv_names_what_json_numbers(small_grid, tmp_path):
    for name in ("table.json", "table.csv"):
        table_module.write(Options(device="cpu"), tmp_path / name)
    with open(tmp_path / "table.csv", newline="") as file:
        found = list(csv.DictReader(file))
    expected = [row | {"grad_checkpoint": int(row["grad_checkpoint"])} for row in rows_of(tmp_path / "table.json")]
    assert found == [{name: str(value) for name, value in row.items()} for row in expected]


@pytest.mark.slow
def test_the_whole_table_is_small(tmp_path):
    table_module.write(Options(device="cpu"), tmp_path / "table.json")
    assert (tmp_path / "table.json").stat().st_size < 150_000
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 2160


def test_a_table_that_fails_leaves_the_old_file(small_grid, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    assert main(["--device", "cpu", "--table", str(path)]) == 2
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def numbers(line):
    return [float(number.replace(",", "")) for number in re.findall(r"[-+]?[\d,]+\.\d+", line)]


SMALL = ["--depth", "2", "--device-batch-size", "2", "--max-seq-len", "64", "--vocab-size", "515"]


def test_the_table_adds_up(capsys):
    assert main(["--depth", "20", "--nproc", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    columns = list(zip(*map(numbers, lines[2:10]), strict=True))
    (total,) = (line for line in lines if "in all, on each of 8 ranks" in line)
    assert [sum(column) for column in columns] == pytest.approx(numbers(total), abs=1)
    assert numbers(next(line for line in lines if line.startswith("peak")))[0] == max(numbers(total))
    assert "in the backward" in next(line for line in lines if line.startswith("peak"))


def test_measured_beside_predicted(tmp_path, capsys):
    out = tmp_path / "result"
    assert main([*SMALL, "--dtype", "float32", "--measure", "--optimizer", "sgd_momentum", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = {line.split("  ")[0]: numbers(line) for line in captured.out.splitlines()}
    assert lines["measured"] == pytest.approx(lines["in all"], rel=0.05)
    record = json.loads((out / "result.json").read_text())
    assert (record["format"], record["command"]) == (results.FORMAT, "memory")
    assert record["options"]["optimizer"] == "sgd_momentum"
    assert max(record["predicted"]) == pytest.approx(max(record["measured"]), rel=0.01)
    assert [sum(column) for column in zip(*record["parts"].values(), strict=True)] == record["predicted"]
    assert [size / 2**20 for size in record["measured"]] == pytest.approx(lines["measured"], abs=0.06)
    assert main([*SMALL, "--out", str(out)]) == 2
    assert "must be a new or an empty folder" in capsys.readouterr().err


def test_library_scratch_is_printed(tmp_path, capsys):
    out = tmp_path / "result"
    assert main([*SMALL, "--dtype", "bfloat16", "--device", "cpu", "--out", str(out)]) == 0
    bound = library_scratch(
        Options(depth=2, device_batch_size=2, max_seq_len=64, vocab_size=515, dtype="bfloat16", device="cpu")
    )
    assert f"in products of torch's library: {bound / 2**20:.1f} MiB at most" in capsys.readouterr().out
    assert json.loads((out / "result.json").read_text())["library_scratch"] == bound
    assert main([*SMALL, "--dtype", "float32", "--device", "cpu"]) == 0
    assert "torch's library" not in capsys.readouterr().out


def test_largest_batches_printed(capsys):
    assert main(["--gpu-memory", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kept, again = ([int(cell) for cell in line.split()[-2:]] for line in lines[-2:])
    options = Options(device="cuda", micro_batches=2)
    available = (24 << 30) - PROCESS_BYTES
    assert kept == [largest_batch(dataclasses.replace(options, micro_batches=n), available) for n in (1, 2)]
    assert again[1] == largest_batch(dataclasses.replace(options, grad_checkpoint=True), available)
    assert main(["--gpu-memory", "2"]) == 0
    printed = capsys.readouterr().out
    assert "not even one sequence fits" in printed
    one = peak(Options(device="cuda", device_batch_size=1)) + PROCESS_BYTES
    assert f"1 takes {one / 2**30:.1f} GiB" in printed


def test_the_table_of_gradient_checkpointing(tmp_path, capsys):
    sizes = ["--depth", "4", "--device-batch-size", "4", "--max-seq-len", "64", "--vocab-size", "515"]
    assert main([*sizes, "--checkpointing", "--out", str(tmp_path / "result")]) == 0
    lines = {line.split("  ")[0]: numbers(line) for line in capsys.readouterr().out.splitlines()}
    kept, recomputed, ratios = lines["kept"], lines["recomputed"], lines["ratio"]
    for row in kept, recomputed:
        assert row[0] == pytest.approx(row[1], rel=0.05)
        assert row[2] == pytest.approx(row[3], rel=0.05)
    assert ratios == pytest.approx([kept[i] / recomputed[i] for i in range(4)] + [recomputed[4] / kept[4]], rel=0.1)
    assert ratios[3] > 5
    record = json.loads((tmp_path / "result" / "result.json").read_text())
    assert record["activations_predicted"] == pytest.approx(record["activations_measured"], rel=0.01)
    assert record["options"]["dtype"] == "float32"


def test_defaults_are_for_a_plan_and_small_where_steps_are_run():
    planned, run_here = memory.sized(Options(device="cpu")), memory.sized(Options(device="cpu", measure=True))
    assert (planned.depth, planned.device_batch_size, planned.dtype) == (20, 16, "bfloat16")
    assert (run_here.depth, run_here.tokens, run_here.vocab_size, run_here.dtype) == (4, 2048, 8192, "float32")
    assert memory.sized(Options(gpu_memory=24)).device == "cuda"
    assert memory.sized(run_here) == run_here
    assert set(get_args(get_type_hints(Options)["optimizer"])) == set(DEFAULT_LEARNING_RATES) == set(prediction.STATE)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--nproc 0", "--nproc must be a whole number >= 1, got 0"),
        ("--device-batch-size -3", "--device-batch-size must be a whole number >= 1, got -3"),
        ("--nproc 2 --optimizer adam", "--optimizer must be hybrid or adamw on several ranks, got adam"),
        ("--nproc 2 --measure", "--nproc must be 1 with --measure, got 2"),
        ("--measure --checkpointing", "--measure and --checkpointing exclude each other"),
        ("--optimizer lion", "--optimizer"),
        ("--depth many", "--depth must be a whole number"),
        ("--dept 3", "perhaps you meant --depth"),
        ("--n-kv-head 7", "n_head must be a multiple of n_kv_head 7, got 10"),
        ("--gpu-memory 0", "--gpu-memory must be a finite number of GiB above 0, got 0.0"),
        ("--gpu-memory 24 --dtype float32", "on a GPU --dtype must be bfloat16"),
        ("--table memory.txt", "--table must be a file that ends in .json or .csv, got memory.txt"),
        ("--table memory.json --depth 4", "--table excludes --depth: the table has rows for its values"),
        ("--table memory.json --out lab/memory", "--table excludes --out: it writes one file"),
        ("--table memory.json --measure", "--measure and --table exclude each other"),
        ("--table nowhere/memory.json", "nowhere/memory.json: No such file or directory"),
    ],
)
def test_wrong_flags_are_one_line(args, says, capsys):
    assert main(args.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert says in captured.err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all("--" + field.name.replace("_", "-") in printed for field in dataclasses.fields(Options))


@pytest.mark.parametrize("flags", [{}, {"optimizer": "adamw", "dtype": "bfloat16", "grad_checkpoint": True}])
def test_the_trainers_own_steps_hold_what_is_predicted(tmp_path, flags):
    """Not only steps on random tokens: what the prediction leaves out, the loader and the log, is small."""
    write_text(tmp_path / "text.jsonl")
    sizes = {"depth": 3, "max_seq_len": 64, "vocab_size": 515, "device_batch_size": 4}
    args = tiny_flags(tmp_path, total_batch_size=512, **sizes, **flags)
    with Allocations() as allocations:
        trainer = Trainer(resolve_device(parse(args)), SilentConsole())
        trainer.log = SilentLog()
        with trainer.loader.iterate(0) as batches:
            for _ in range(3):
                with record_function("forward"):
                    trainer.train_step(batches)
    sizes["vocab_size"] = trainer.corpus.vocab_size
    predicted = peak(Options(micro_batches=2, head_dim=32, **{"dtype": "float32", **flags}, **sizes))
    assert allocations.highest["forward"] == pytest.approx(predicted, rel=0.01)
