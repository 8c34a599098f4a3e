"""The benchmarks on a CPU: `make gpu` end to end on small sizes, what it does when things fail, its time, its table."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import HANGS, wait_until

from nanochat_native import ops
from nanochat_native.bench import __main__ as cpu_bench
from nanochat_native.bench import (
    generation,
    gpu,
    gpu_cases,
    gpu_clock,
    gpu_worker,
    measure,
    operators,
    quantized_generation,
    results_io,
    step,
)
from nanochat_native.bench.attention import Problem, attention_case, instruction_set
from nanochat_native.bench.gpu_cases import Entry
from nanochat_native.bench.measure import Case, UnavailableError
from nanochat_native.ops import backends, reference

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NOT_ON_A_BARE_MACHINE = (
    "hypothesis",
    "matplotlib",
    "rustbpe",
    "safetensors",
    "tensorboard",
    "tiktoken",
    "tqdm",
    "tyro",
)
needs_native = pytest.mark.skipif(bool(backends.load_error), reason=backends.load_error)


def case(check=lambda: None, ours=lambda: None, theirs=lambda: None, **settings):
    return Case("group", "name", ours, theirs, "baseline", check, 1.0, **settings)


def entry(name, make, *operators):
    return Entry("group", name, operators, lambda device: make())


def fail(error):
    raise error


def empty_result():
    kinds = ("stages", "cases", "rows", "skipped", "errors")
    return {kind: [] for kind in kinds} | {"limits": {}, "tests": {}, "seconds": 1.0}


# --- end to end ---


@pytest.mark.slow
@needs_native
def test_make_gpu_on_a_cpu_without_the_packages_of_a_bare_machine(tmp_path):
    for package in NOT_ON_A_BARE_MACHINE:
        (tmp_path / f"{package}.py").write_text("raise ImportError('not here')")
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "nanochat_native.bench.gpu", "--device", "cpu", "--quick", "--commit", "abc"]
    own = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "--json", str(path)], capture_output=True, text=True, cwd=ROOT, env=os.environ | own, timeout=HANGS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert result["commit"] == "abc"
    assert result["machine"]["torch"] == torch.__version__
    assert [stage["stage"] for stage in result["stages"]] == ["first", "doctor", "tests", "bench"]
    if not torch.cuda.is_available():
        tests = result["tests"]
        assert (tests["passed"], tests["failures"]) == (0, [])
        assert tests["skip_reasons"]["torch sees no CUDA device"] > 200
    assert [row["title"] for row in result["rows"]] == result["cases"]
    assert (result["errors"], result["skipped"]) == ([], [])
    assert "running" not in result
    for row in result["rows"]:
        assert row["ratio"] == row["theirs_ms"] / row["ours_ms"] > 0
        assert row["opponent"]
        assert row["opponent"] in done.stdout
    assert all(row["share_of_copy"] > 0 for row in result["rows"] if row["group"] in ("adamw_", "muon halves"))
    assert "passed in" in done.stdout.splitlines()[-1]


# --- the cases ---


def test_titles_of_cases_are_unique():
    for kind in ("cpu", "cuda"):
        for quick in (True, False):
            titles = [each.title for each in gpu_cases.entries(kind, quick=quick)]
            assert titles
            assert len(set(titles)) == len(titles)


@needs_native
def test_cases_are_named_as_their_entries():
    for each in gpu_cases.entries("cpu", quick=True):
        made = each.make(device=CPU)
        assert f"{made.group} {made.name}" == each.title


def test_broken_compiler_is_reported():
    with pytest.raises(UnavailableError, match="nonsense"):
        operators.linear_cross_entropy_case(4, 8, 16, 1.0, name="compiled", compiler="nonsense")


def run_cases(path, monkeypatch, *entries, seconds=60.0, only=""):
    monkeypatch.setattr(gpu_cases, "entries", lambda kind, quick: list(entries))
    monkeypatch.setattr(gpu_clock, "measure_ceilings", lambda target: gpu_clock.Ceilings(1.0, 1.0))
    if not path.exists():
        results_io.save(path, empty_result())
    status = gpu_worker.run(path, CPU, quick=True, only=only, seconds=seconds)
    return status, results_io.load(path)


def test_a_case_that_fails_is_recorded_and_the_others_run(tmp_path, monkeypatch):
    native_there = () if backends.load_error else ("adamw_",)
    status, result = run_cases(
        tmp_path / "result.json",
        monkeypatch,
        entry("wrong", lambda: case(lambda: fail(AssertionError("off by one")), ours=lambda: fail(SystemError()))),
        entry("raises", lambda: case(ours=lambda: fail(ValueError("no such shape")))),
        entry("without its baseline", lambda: fail(UnavailableError("no compiler"))),
        entry("fits alone", lambda: case(theirs=lambda: fail(torch.OutOfMemoryError("too large")))),
        entry("good", case, *native_there),
    )
    assert status == 0
    assert result["cases"] == [f"group {n}" for n in ("wrong", "raises", "without its baseline", "fits alone", "good")]
    assert result["errors"] == [
        {"title": "group wrong", "error": "WRONG, not timed: off by one"},
        {"title": "group raises", "error": "ValueError: no such shape"},
    ]
    assert result["skipped"] == [{"title": "group without its baseline", "why": "no compiler"}]
    alone, good = result["rows"]
    assert (alone["theirs_ms"], alone["ratio"], alone["note"]) == (None, None, "the baseline ran out of memory")
    assert good["ratio"] > 0
    assert not gpu.succeeded(result)
    printed = "\n".join(gpu.summary(result, tmp_path))
    assert "FAILED  group wrong: WRONG, not timed: off by one" in printed
    assert "left out: group without its baseline: no compiler" in printed


def test_reference_backend_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_backend", "torch")
    _, result = run_cases(tmp_path / "result.json", monkeypatch, entry("ours", lambda: fail(SystemError()), "adamw_"))
    assert result["rows"] == result["errors"] == []
    assert "adamw_ is not native: chosen by" in result["skipped"][0]["why"]


def test_finished_cases_are_not_repeated_and_time_is_limited(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    status, result = run_cases(path, monkeypatch, entry("a", case), entry("b", case), only="a")
    assert (status, result["cases"], len(result["rows"])) == (0, ["group a"], 1)
    again = entry("a", lambda: fail(SystemError()))
    _, result = run_cases(path, monkeypatch, again, entry("b", case), seconds=0.5)
    assert len(result["rows"]) == 1
    _, result = run_cases(path, monkeypatch, again, entry("b", case))
    assert [row["title"] for row in result["rows"]] == ["group a", "group b"]
    assert result["errors"] == []


def test_no_case_begins_after_its_time(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    monkeypatch.setattr(gpu_cases, "entries", lambda kind, quick: [entry("a", case), entry("b", case)])
    monkeypatch.setattr(gpu_clock, "measure_ceilings", lambda target: gpu_clock.Ceilings(1.0, 1.0))
    results_io.save(path, empty_result())
    for begin, titles in ((-1.0, []), (60.0, ["group a", "group b"])):
        assert gpu_worker.run(path, CPU, quick=True, only="", seconds=60.0, begin=begin) == 0
        assert [row["title"] for row in results_io.load(path)["rows"]] == titles


def test_the_cpus_benchmarks_write_table_and_json(tmp_path, monkeypatch, capsys):
    if backends.load_error:
        pytest.skip(backends.load_error)
    path = tmp_path / "folder" / "result.json"
    small = {"shapes": [(30, 7), (5,)], "name": "small", "min_speedup": 0.1}
    f32 = torch.float32
    monkeypatch.setattr(operators, "cases", lambda: iter([lambda: operators.adamw_case(f32, f32, **small)]))
    monkeypatch.setattr(step, "MIN_SPEEDUPS", {})
    monkeypatch.setattr(measure, "measure_limits", lambda: measure.Limits(1.0, 1.0))
    for only, status in (("adamw_ small", 0), ("nothing", 2)):
        arguments = ["bench", "--only", only, "--seconds", "0", "--repeats", "2", "--json", str(path)]
        monkeypatch.setattr(sys, "argv", arguments)
        assert cpu_bench.main() == status
    (row,) = json.loads(path.read_text())["rows"]
    assert row["ratio"] == row["theirs_ms"] / row["ours_ms"]
    assert "small" in capsys.readouterr().out


def run_generation(path, monkeypatch, speedups=None):
    monkeypatch.setattr(generation, "MIN_SPEEDUPS", {(1, 2): 1.0} if speedups is None else speedups)
    for name, size in (("V", 500), ("PROMPT", 5), ("NEW", 12)):
        monkeypatch.setattr(generation, name, size)
    monkeypatch.setattr(measure, "measure_limits", lambda: measure.Limits(1.0, 1.0))
    arguments = ["bench", "--only", "generation d1", "--seconds", "0", "--repeats", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    status = cpu_bench.main()
    return status, json.loads(path.read_text())


def test_generation_against_transformers(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    status, result = run_generation(tmp_path / "result.json", monkeypatch)
    assert status == 0
    (row,) = result["rows"]
    assert row["case"] == "d1 V 500 batch 2 prompt 5 new 12"
    assert row["ratio"] == row["theirs_ms"] / row["ours_ms"]
    assert row["ours_tokens_per_second"] == pytest.approx(2000 / row["ours_ms"])
    assert row["ours_first_ms"] > 0
    assert row["theirs_first_ms"] > 0
    assert "tokens/s" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="sequence 1 differs from transformers' at new token 2"):
        generation.check([[*range(9)], [1, 2, 3]], [[*range(9)], [1, 2, 4]])
    with pytest.raises(AssertionError, match="2 distinct tokens"):
        generation.check([[1, 2]], [[1, 2]])


def test_generation_with_few_bits_against_float32(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    cases = {(1, "bfloat16", None): 1.0, (1, "float32", "int8"): 1.0, (1, "bfloat16", "int8"): 1.0}
    monkeypatch.setattr(quantized_generation, "MIN_SPEEDUPS", cases)
    for name, size in (("V", 500), ("PROMPT", 5), ("NEW", 12)):
        monkeypatch.setattr(quantized_generation, name, size)
    status, result = run_generation(tmp_path / "result.json", monkeypatch, speedups={})
    assert status == 0
    assert [row["case"] for row in result["rows"]] == [
        "d1 V 500 batch 1 bfloat16",
        "d1 V 500 batch 1 float32 int8",
        "d1 V 500 batch 1 bfloat16 int8",
    ]
    for row in result["rows"]:
        assert row["ratio"] == row["theirs_ms"] / row["ours_ms"]
    assert "this engine in float32" in capsys.readouterr().out
    model = quantized_generation.random_model(1)
    with pytest.raises(AssertionError, match="standard deviations below the best"):
        quantized_generation.check(model, [1, 2], [7, 8, 9])


def test_generation_is_left_out_without_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, result = run_generation(tmp_path / "result.json", monkeypatch)
    assert (status, result["rows"]) == (0, [])
    assert "transformers with NanoChat is not installed" in result["skipped"][0]["why"]
    assert "left out" in capsys.readouterr().out


# --- stages and time ---


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "result.json"
    return gpu.Run(Namespace(quick=True, json=path, only="", skip_tests=False, device="cuda", commit="abc"))


def test_each_later_stage_keeps_its_share(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    shares = {"build": 100.0, "first": 0.0, "doctor": 10.0, "tests": 50.0, "bench": 40.0, "roofline": 5.0}
    budget = gpu.Budget(shares)
    assert budget.limit("build") == 100
    now += 30
    assert budget.limit("doctor") == 80
    assert budget.limit("tests") == 130
    now += 130
    assert budget.limit("bench") == 40
    now += 100
    assert budget.limit("bench") == 1
    assert sum(gpu.SHARES["full"].values()) <= 10 * 60 - 10
    assert sum(gpu.SHARES["quick"].values()) <= 4 * 60 - 5


def test_a_command_is_stopped_with_its_children(tmp_path, monkeypatch):
    assert gpu.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 30) == 3
    note = tmp_path / "child"
    script = "import subprocess, sys; child = subprocess.Popen(['sleep', '3000']); "
    script += "open(sys.argv[1], 'w').write(str(child.pid)); child.wait()"

    class Impatient(subprocess.Popen):
        """Its time is up when the child is there."""

        def wait(self, timeout=None):
            if timeout is not None:
                wait_until(lambda: note.exists() and note.read_text())
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait()

    with monkeypatch.context() as patch:
        patch.setattr(gpu.subprocess, "Popen", Impatient)
        assert gpu.run_limited([sys.executable, "-c", script, str(note)], 30) is None
    child = Path(f"/proc/{note.read_text()}/stat")

    def ended():  # the signal is sent, perhaps not yet taken
        with contextlib.suppress(FileNotFoundError):
            return child.read_text().split()[2] in "ZX"
        return True

    wait_until(ended)
    assert gpu.run_limited(["sleep", str(10 * HANGS)], 0.1) is None


def stage_of(command):
    """The stage to which a command belongs."""
    if "pytest" in command:
        return "tests"
    if "nanochat_native.bench.gpu_worker" in command:
        return "first" if "--begin" in command else "bench"
    if "nanochat_native.lab.roofline.worker" in command:
        return "roofline"
    return "build" if "setup.py" in command else "doctor"


@pytest.mark.parametrize("stages", [{"tests": 1}, {"tests": None}, {"doctor": 1}, {"first": 1}, {"roofline": 1}, {}])
def test_the_benchmarks_run_whatever_the_other_stages_do(run, monkeypatch, capsys, stages):
    commands = []

    def limited(command, limit, environment=None):
        stage = stage_of(command)
        commands.append(stage)
        if stage == "tests" and stages.get("tests", 0) == 0:
            log = next(word for word in command if word.startswith("gpu_test_log="))
            Path(log.removeprefix("gpu_test_log=")).write_text('{"collected": 0}\n')
        if stage == "bench":
            result = results_io.load(run.path)
            result["cases"], result["skipped"] = ["one"], [{"title": "one", "why": "of no account"}]
            results_io.save(run.path, result)
        return stages.get(stage, 0)

    monkeypatch.setattr(gpu, "run_limited", limited)
    assert run.run() == (1 if stages else 0)
    assert list(dict.fromkeys(commands)) == ["build", "first", "doctor", "tests", "bench", "roofline"]
    result = results_io.load(run.path)
    expected = {name: stages.get(name, 0) for name in gpu.STAGES} | ({"tests": 1} if "tests" in stages else {})
    assert {stage["stage"]: stage["status"] for stage in result["stages"]} == expected
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAILED in" if stages else "passed in")


def test_tests_may_be_skipped(run, monkeypatch):
    commands = []
    monkeypatch.setattr(gpu, "run_limited", lambda command, *_: commands.append(command) or 0)
    run.options.skip_tests = True
    run.run()
    assert [stage_of(command) for command in commands] == ["build", "first", "doctor", "bench", "roofline"]


def test_nothing_runs_on_a_module_that_does_not_build(run, monkeypatch):
    commands = []
    monkeypatch.setattr(gpu, "run_limited", lambda command, *_: commands.append(command) or 1)
    assert run.run() == 1
    assert len(commands) == 1
    assert results_io.load(run.path)["stages"][0]["status"] == 1


def test_a_process_that_dies_costs_one_case(run, monkeypatch):
    starts = []

    def limited(command, limit, environment=None):
        result = results_io.load(run.path)
        result["cases"] = ["a", "dies", "b", "hangs", "c"]
        left = [one for one in result["cases"] if one not in gpu_worker.done(result)]
        starts.append(left)
        for title in left:
            if title in ("dies", "hangs"):
                result["running"] = title
                break
            result["rows"].append(row(title))
        results_io.save(run.path, result)
        return {"dies": -signal.SIGSEGV, "hangs": None}.get(result.get("running"), 0)

    monkeypatch.setattr(gpu, "run_limited", limited)
    run.bench()
    result = results_io.load(run.path)
    assert [one["title"] for one in result["rows"]] == ["a", "b", "c"]
    assert [(e["title"], e["error"].split(" within")[0]) for e in result["errors"]] == [
        ("dies", "its process ended with status -11"),
        ("hangs", "its process was stopped"),
    ]
    assert len(starts) == 3


def test_benchmarks_that_cannot_start_are_errors(run, monkeypatch):
    def limited(command, limit, environment=None):
        result = results_io.load(run.path)
        result["cases"] = ["a", "b"]
        results_io.save(run.path, result)
        return gpu_worker.BROKEN_DEVICE

    monkeypatch.setattr(gpu, "run_limited", limited)
    run.bench()
    assert [error["title"] for error in results_io.load(run.path)["errors"]] == ["a", "b"]


# --- the table, the GPU's facts and clock ---


def row(title, **more):
    base = {"title": title, "group": "group", "case": title, "opponent": "torch", "ours_ms": 1.0, "theirs_ms": 2.0}
    return base | {"ratio": 2.0, "floor": 1.0} | more


def test_the_table():
    plain = results_io.table_parts(row("a"))
    assert len(plain) == 1
    assert "2.00x  (min 1.00x)  torch" in plain[0]
    assert "-" in results_io.table_parts(row("b", theirs_ms=None, ratio=None))[0]
    _, *more = results_io.table_parts(
        row("c", gbytes=4000.0, share_of_copy=0.93, ours_launches=1, theirs_launches=200, note="why")
        | {"ours_peak_bytes": 5e6, "theirs_peak_bytes": 9e9, "ours_host_ms": 0.25, "theirs_host_ms": 0.5}
    )
    assert more == [
        "4000.0 GB/s, 93% of copy",
        "peak 5 against 9,000 MB",
        "1 against 200 launches",
        "0.25 against 0.50 ms of host",
        "[why]",
    ]
    for stored in (ROOT / "benchmarks/results").glob("*.json"):
        assert all(map(results_io.table_parts, results_io.load(stored)["rows"]))


def test_ratio_below_the_minimum_speedup_is_reported(tmp_path):
    result = empty_result() | {"rows": [row("slow", ratio=0.5), row("fast")]}
    lines = gpu.summary(result, tmp_path)
    assert [line for line in lines if line.startswith("below")] == ["below its minimum speedup: slow"]


def test_facts_of_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results_io.gpu_facts() == {}
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1, 1980, 3201, 1980, 3201, 31, [N/A]'\n")
    program.chmod(0o755)
    facts = results_io.gpu_facts()
    assert (facts["name"], facts["sm_mhz"], facts["power_limit_watts"]) == ("NVIDIA H200", 1980.0, "[N/A]")
    assert str(gpu.default_path(facts["name"], quick=True)).startswith("benchmarks/results/nvidia-h200-2")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_row_of_a_gpu(monkeypatch):
    """torch.cuda stands in for itself: which calls are made, and what they become."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end):
            return 2.5

    stand_ins = {
        "Event": Event,
        "_sleep": lambda cycles: calls.append("sleep"),
        "synchronize": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1000),
        "memory_allocated": lambda: 100,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 1100,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(results_io, "gpu_facts", lambda: {"sm_mhz": 1980.0})
    clock = gpu_clock.CudaClock(CPU, host_ms=1.0)
    assert clock.cycles == 3_400_000
    assert clock(lambda: calls.append("call")) == 2.5
    assert calls == ["sleep", "record", "call", "record", "wait"]
    monkeypatch.setattr(gpu_clock, "CudaClock", lambda target, host_ms: clock)
    made = case(bytes=5e9, flops=1e12, saves_memory=True, saves_launches=True)
    found = gpu_clock.run(made, gpu_clock.Ceilings(4000.0, 8e5), SimpleNamespace(type="cuda"), seconds=0, repeats=4)
    assert (found["ours_ms"], found["ratio"], found["turns"]) == (2.5, 1.0, 4)
    assert (found["gbytes"], found["share_of_copy"]) == (2000.0, 0.5)
    assert (found["ours_peak_bytes"], found["theirs_launches"], found["sm_mhz"]) == (1000, None, 1980.0)
    assert results_io.table_parts(found)


# --- attention ---


@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (True, 0), (True, 7), (True, 40), (True, 100)]
)
@pytest.mark.parametrize("Tq", [0, 1, 13])
def test_visible_pairs(causal, window, Tq):
    problem = Problem(B=1, T=41, H=1, D=8, causal=causal, window=window, Tq=Tq)
    assert problem.pairs == reference.attention_mask(Tq or 41, 41, causal, window).sum()
    assert problem.flops("forward") + problem.flops("backward") == problem.flops("fwd+bwd") == 14 * 8 * problem.pairs


@pytest.mark.parametrize("before", [None, "sm_90a"])
def test_the_instruction_set_is_put_back(monkeypatch, before):
    monkeypatch.delenv("NANOCHAT_CUDA_ISA", raising=False)
    if before:
        monkeypatch.setenv("NANOCHAT_CUDA_ISA", before)
    with instruction_set("sm_80"):
        assert os.environ["NANOCHAT_CUDA_ISA"] == "sm_80"
    assert os.environ.get("NANOCHAT_CUDA_ISA") == before
    with instruction_set(""):
        assert os.environ.get("NANOCHAT_CUDA_ISA") == before


@pytest.mark.parametrize("direction", ["forward", "backward", "fwd+bwd"])
def test_wrong_attention_is_not_timed(monkeypatch, direction):
    problem = Problem(B=2, T=40, H=4, Hkv=2, D=16, window=9)
    case = attention_case(problem, direction, baseline="SDPA", dtype=torch.float32, min_speedup=1.0, name=direction)
    case.check()
    monkeypatch.setattr(ops, "attention", lambda q, k, v, **_: reference.attention(q, k, v))
    wrong = attention_case(problem, direction, baseline="SDPA", dtype=torch.float32, min_speedup=1.0, name=direction)
    with pytest.raises(AssertionError, match="relative error"):
        wrong.check()


def test_broken_baseline_is_reported():
    problem = Problem(B=1, T=16, H=2, D=16)
    with pytest.raises(UnavailableError, match="cuDNN: RuntimeError"):
        attention_case(problem, "forward", baseline="cuDNN", dtype=torch.bfloat16, min_speedup=0.0, name="")


def test_unknown_baseline_is_a_value_error():
    problem = Problem(B=1, T=16, H=2, D=16)
    with pytest.raises(ValueError, match=r"baseline must be one of 'SDPA'.*, got 'FLASHY'"):
        attention_case(problem, "forward", baseline="FLASHY", dtype=torch.bfloat16, min_speedup=0.0, name="")


@pytest.mark.parametrize("recipe", ["october", "today"])
def test_our_step_is_that_of_torchs_calls(recipe, monkeypatch):
    if backends.load_error:
        pytest.skip(backends.load_error)
    monkeypatch.setattr(step, "T", 160)  # beyond the short window of 128
    monkeypatch.setattr(step, "B", 1)
    step.check(step.Step("ours", 300, recipe), step.Step("torch", 300, recipe))
    other = step.Step("torch", 300, recipe)
    other.optimizers[1].param_groups[0]["lr"] *= 1.05
    with pytest.raises(AssertionError, match="relative error must be at most"):
        step.check(step.Step("ours", 300, recipe), other)
