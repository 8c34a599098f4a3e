"""A report never ends the run: training continues when a console, log, sample, evaluation or plot fails."""

import io
import itertools
import json
import os
import subprocess
import sys

import pytest
import ranks
import torch
import torch.distributed as dist
from fork_server import python
from test_resume import assert_same_run, killed
from tiny_run import losses, records, tiny_flags, train, write_text

from nanochat_native import plot
from nanochat_native.evaluation import bits_per_byte
from nanochat_native.runs import checkpoint, loggers, metrics_log, pictures
from nanochat_native.runs.config import parse, resolve_device
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.console import Console, SilentConsole
from nanochat_native.runtime.distributed import RankError, World
from nanochat_native.runtime.isolation import EXIT_CODE, GuardedStream, ReportFailures, guarded_streams
from nanochat_native.training import pretraining, report, trainer

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a text, and "whole": a run in which nothing fails."""
    folder = tmp_path_factory.mktemp("isolation")
    write_text(folder / "text.jsonl")
    assert train(folder, run="whole", steps=STEPS, sample_every=4) == 0
    return folder


# --- streams ---


class Stream:
    """A text stream that raises `error` in write and in flush."""

    encoding = "utf-8"

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        return False


ERRORS = [
    BrokenPipeError(32, "Broken pipe"),
    OSError(28, "No space left"),
    ValueError("closed file"),
    RuntimeError("x"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_guarded_stream_never_raises_and_its_fallback_reports_once(error):
    failures, other = ReportFailures(), io.StringIO()
    stream = GuardedStream(Stream(error), "standard output", failures)
    stream.fallback = GuardedStream(other, "standard error", failures)
    for _ in range(3):
        assert stream.write("four") == 4
        stream.flush()
    assert failures.counts == {"standard output": 6}
    assert other.getvalue().count("warning: standard output failed") == 1
    assert str(error.args[-1]) in other.getvalue()


def test_two_closed_streams_do_not_call_each_other_forever():
    failures = ReportFailures()
    out, err = (GuardedStream(Stream(OSError(5, "Input/output error")), name, failures) for name in ("out", "err"))
    out.fallback, err.fallback = err, out
    out.write("text")
    assert set(failures.counts) == {"out", "err"}


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", "\\u6570 \\xfc"), ("latin-1", "\\u6570 ü"), ("utf-8", "数 ü")]
)
def test_characters_that_the_encoding_lacks_are_escaped(encoding, written):
    failures, raw = ReportFailures(), io.BytesIO()
    stream = GuardedStream(io.TextIOWrapper(raw, encoding=encoding, errors="strict"), "out", failures)
    stream.write("数 ü")
    stream.write("\ud800")
    stream.flush()
    assert raw.getvalue().decode(encoding).startswith(written)
    assert not failures


def test_an_object_with_write_and_flush_alone_is_a_stream():
    class Tee:
        def __init__(self):
            self.seen = []

        def write(self, text):
            self.seen.append(text)

        def flush(self):
            pass

    tee = Tee()
    Console(tee).say("message")
    assert "".join(tee.seen) == "message\n"


def test_the_process_streams_are_guarded_and_restored(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Stream(BrokenPipeError(32, "Broken pipe")))
    monkeypatch.setattr(sys, "stderr", None)
    before = sys.stdout
    failures = ReportFailures()
    with guarded_streams(failures):
        print("text", flush=True)
        print("text", file=sys.stderr, flush=True)
    assert (sys.stdout, sys.stderr) == (before, None)
    assert set(failures.counts) == {"standard output"}


def test_a_console_with_a_dead_stream_counts(capsys):
    console = Console(Stream(BrokenPipeError(32, "Broken pipe")))
    console.say("message")
    console.live("line", last=True)
    assert console.failures.counts["standard output"] >= 2
    console = Console(as_json=True)
    console.record({"kind": "train"})
    assert not console.failures
    assert capsys.readouterr().out == '{"kind": "train"}\n'


def started(folder, **streams):
    """Start a run of 4 steps in its own process."""
    args = tiny_flags(folder, steps=4, overwrite=True, **streams.pop("flags", {}))
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | streams.pop("env", {})
    return subprocess.Popen([python(), "-m", "nanochat_native.train", *args], env=env, **streams)


def test_a_closed_pipe_does_not_end_training(folder):
    """Run train | true."""
    process = started(folder, flags={"run": "pipe"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == EXIT_CODE
    assert checkpoint.steps(folder / "runs/pipe/checkpoints") == [4]
    assert err.count("standard output failed (") == 1
    assert "reports of this run failed: standard output" in err
    assert "Traceback" not in err
    assert "Exception ignored" not in err


@pytest.mark.parametrize("json_lines", [False, True], ids=["text", "json"])
def test_both_streams_dead(folder, json_lines):
    """Run train 2>&1 | true."""
    flags = {"run": "dead"} | ({"json": True} if json_lines else {})
    process = started(folder, flags=flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait() == EXIT_CODE
    assert checkpoint.steps(folder / "runs/dead/checkpoints") == [4]
    assert len(records(folder / "runs/dead", "train")) == 4


def test_a_full_disk_under_the_standard_output(folder):
    with open("/dev/full", "w") as full:
        process = started(folder, flags={"run": "full"}, stdout=full, stderr=subprocess.PIPE, text=True)
        err = process.stderr.read()
    assert process.wait() == EXIT_CODE
    assert "No space left on device" in err
    assert "Traceback" not in err
    assert checkpoint.steps(folder / "runs/full/checkpoints") == [4]


def test_without_a_standard_output(folder):
    args = tiny_flags(folder, steps=4, run="closed", overwrite=True)
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-m", "nanochat_native.train", *args]
    assert subprocess.run(command).returncode == 0
    assert checkpoint.steps(folder / "runs/closed/checkpoints") == [4]
    assert len(records(folder / "runs/closed", "train")) == 4


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_samples_in_characters_that_the_terminal_lacks(tmp_path, encoding):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"числа {i} und Wörter, 数字 " * 8}, ensure_ascii=False) + "\n" for i in range(60))
    )
    env = {"PYTHONIOENCODING": f"{encoding}:strict"}
    process = started(tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert b"\\u" in out
    (sample,) = records(tmp_path / "runs/tiny", "sample")
    assert not sample["text"].isascii()


# --- reports of a run ---


def failing(*args, **kwargs):
    raise RuntimeError("it broke\nin two lines")


class BrokenWriter:
    def __getattr__(self, name):
        return failing


# name of the report: (owner, attribute) that fails from its second call on, and the number of failures
REPORTS = {
    "evaluation": (bits_per_byte, "_sums", 3),
    "sample": (pretraining, "complete", 2),
    "plot": (report, "plot_loss", 1),
    "log of a step": (report, "live_line", STEPS),
    "metrics.jsonl": (metrics_log, "_append", STEPS + 4 + 3),
    "diagnosis": (trainer, "finite", None),
    "summary": (report, "next_commands", 1),
    "announcement": (report, "describe_routing", 1),
    "note of the validation": (checkpoint, "add_measurement", 3),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_that_fails_is_named_once_and_counted_and_training_continues(folder, monkeypatch, capsys, name):
    owner, attribute, times = REPORTS[name]
    run, flags = f"no-{name.split()[0]}", {}
    if name == "diagnosis":
        owner, attribute, times = trainer.Diagnosis, "finish", 3
        flags = {"diagnose": True, "diagnose_every": 4}
    once = name in ("plot", "summary", "announcement", "diagnosis", "log of a step", "metrics.jsonl")
    real, calls = getattr(owner, attribute), itertools.count()
    first_fails = once or name == "note of the validation"
    monkeypatch.setattr(owner, attribute, lambda *a, **k: failing() if next(calls) or first_fails else real(*a, **k))
    assert train(folder, run=run, steps=STEPS, sample_every=4, **flags) == EXIT_CODE
    captured = capsys.readouterr()
    assert captured.out.count(f"warning: {name} failed (RuntimeError: it broke in two lines); the run continues\n") == 1
    how_often = "once" if times == 1 else f"{times} times"
    assert f"warning: reports of this run failed: {name} {how_often}\n" in captured.err
    whole, found = (checkpoint.load(folder / "runs" / each / "checkpoints") for each in ("whole", run))
    assert found[1]["step"] == STEPS
    for group, tensors in whole[0].items():
        assert all(torch.equal(tensor, found[0][group][key]) for key, tensor in tensors.items())
    if name != "metrics.jsonl":
        assert [r["loss"] for r in records(folder / "runs" / run, "train")] == [
            r["loss"] for r in records(folder / "runs/whole", "train")
        ]


def test_a_tensorboard_writer_that_fails_is_not_used_again(folder, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "TensorBoard", lambda *args: BrokenWriter())
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: True)
    assert train(folder, run="tensorboard", steps=4) == EXIT_CODE
    assert "failed: TensorBoard once\n" in capsys.readouterr().err
    assert len(records(folder / "runs/tensorboard", "train")) == 4


def test_a_log_that_cannot_be_opened(folder, capsys):
    (folder / "runs/blocked/metrics.jsonl").mkdir(parents=True)
    (folder / "runs/blocked/config.json").write_bytes((folder / "runs/whole/config.json").read_bytes())
    assert train(folder, run="blocked", steps=STEPS, sample_every=4, resume="auto") == EXIT_CODE
    assert "metrics.jsonl failed" in capsys.readouterr().out
    assert checkpoint.steps(folder / "runs/blocked/checkpoints")[-1] == STEPS


def test_a_record_that_does_not_fit_the_disk_leaves_whole_lines(tmp_path, monkeypatch):
    log = metrics_log.MetricsLog(tmp_path)
    log.write("train", 1, loss=1.0)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    log.write("train", 2, loss=2.0)
    monkeypatch.undo()
    log.write("train", 3, loss=3.0)
    log.close()
    assert [record["step"] for record in metrics_log.read(tmp_path / "metrics.jsonl")] == [1, 3]
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 2


def test_the_checkpoint_is_there_before_anything_else_is_done_at_its_step(folder, monkeypatch):
    seen = []

    def spy(name, real):
        def wrapped(run, *args):
            seen.append((name, run.step, checkpoint.latest(run.config.run_dir / "checkpoints")))
            return real(run, *args)

        monkeypatch.setattr(trainer.Trainer, name, wrapped)

    spy("evaluate", trainer.Trainer.evaluate)
    spy("sample", trainer.Trainer.sample)
    assert train(folder, run="order", steps=8, sample_every=4) == 0
    assert seen == [("evaluate", 0, None)] + [(name, step, step) for step in (4, 8) for name in ("evaluate", "sample")]


@pytest.mark.parametrize(
    "where",
    [
        (2, "evaluation.bits_per_byte", "_sums"),
        (3, "evaluation.bits_per_byte", "_sums"),
        (2, "training.pretraining", "complete"),
    ],
    ids=str,
)
def test_killed_between_the_checkpoint_and_its_reports(folder, where):
    """Make up for an evaluation or a sample that a killed run missed, when it is resumed."""
    run = f"killed-{where[0]}-{where[2]}"
    killed(folder, *where, run=run, sample_every=4)
    assert train(folder, run=run, steps=STEPS, sample_every=4, resume="auto") == 0
    assert_same_run(folder / "runs" / run, folder / "runs/whole")


@pytest.mark.parametrize("length", [2, 3, 8, 11])
@pytest.mark.parametrize("text", ["ascii", "four bytes"])
def test_a_sample_fits_the_positions_of_the_shortest_sequences(tmp_path, length, text):
    write_text(tmp_path / "text.jsonl")
    if text == "four bytes":  # tokens end inside characters, so their text has more tokens than were read
        lines = [json.dumps({"text": chr(0x1F600 + i) * 200}) for i in range(40)]
        (tmp_path / "text.jsonl").write_text("\n".join(lines))
    flags = {"max_seq_len": length, "total_batch_size": 8 * length, "vocab_size": 265, "save_every": 0}
    assert train(tmp_path, steps=3, **flags) == 0
    assert checkpoint.steps(tmp_path / "runs/tiny/checkpoints") == [3]
    (sample,) = records(tmp_path / "runs/tiny", "sample")
    assert len(sample["text"]) > 0


def test_the_validation_of_a_checkpoint_is_found_with_it(folder):
    checkpoints = folder / "runs/whole/checkpoints"
    last = records(folder / "runs/whole", "val")[-1]
    assert checkpoint.load(checkpoints)[1]["validation_bpb"] == last["bpb"]
    assert load_model(folder / "runs/whole")[2]["measured_step"] == STEPS
    path = checkpoint.path_of(checkpoints, STEPS) / checkpoint.MEASUREMENT
    before = path.read_bytes()
    for damaged in (b"", b"[]", b'{"validation_bpb": null}', b"\xff"):
        path.write_bytes(damaged)
        meta = checkpoint.load(checkpoints)[1]
        assert meta["step"] == STEPS
        assert "measured_step" not in meta
    path.write_bytes(before)


def rank_with_a_failing_evaluation(folder, failing_rank):
    group, background = dist.group.WORLD, dist.new_group(backend="gloo")
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), group, background)
    flags = tiny_flags(folder, steps=4, run=f"ranks-{failing_rank}", save_every=0, eval_every=2, sample_every=2)
    run = trainer.Trainer(resolve_device(parse(flags)), SilentConsole(), world)
    if world.rank == failing_rank:
        bits_per_byte._sums = failing
    code = run.train()
    summarized = (run.config.run_dir / "loss.png").exists()  # before any rank leaves
    return code, run.console.failures.counts, run.step, run.checkpointer.saved_step, summarized


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_an_evaluation_that_fails_on_one_rank_is_skipped_on_all(folder, failing_rank):
    found = ranks.run(2, rank_with_a_failing_evaluation, folder, failing_rank)
    assert found == [(0, {"evaluation": 3}, 4, 4, True)] * 2
    assert checkpoint.latest(folder / f"runs/ranks-{failing_rank}/checkpoints") == 4


# --- the log ---

NOT_RECORDS = {
    "bytes": b"\xff\xfe",
    "text": b"epoch 1 done",
    "a number": b"5",
    "a list": b"[1]",
    "no step": b'{"kind": "train", "loss": 1.0}',
    "step is text": b'{"kind": "train", "step": "4"}',
    "step is true": b'{"kind": "val", "step": true}',
    "no kind": b'{"step": 4}',
    "deep": b"[" * 100_000,
    "digits": b'{"kind": "train", "step": ' + b"9" * 5000 + b"}",
    "empty line": b"",
}


@pytest.mark.parametrize("name", NOT_RECORDS)
def test_a_damaged_log_never_stands_in_the_way(folder, tmp_path, capsys, name):
    run = folder / "runs" / f"log-{name.replace(' ', '-')}"
    assert train(folder, run=run.name, steps=4, sample_every=4) == 0
    log = run / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:3], NOT_RECORDS[name] + b"\n", *lines[3:]]))
    damaged = log.read_bytes()
    capsys.readouterr()
    assert train(folder, run=run.name, steps=STEPS, sample_every=4, resume="auto") == 0
    out = capsys.readouterr().out
    assert f"warning: {log}: line 4 is not a record: the old file is kept as metrics.damaged.jsonl\n" in out
    assert (run / "metrics.damaged.jsonl").read_bytes() == damaged
    assert log.read_bytes().startswith(b"".join(lines))
    assert [step for kind, step, _ in losses(run) if kind == "train"] == list(range(1, STEPS + 1))


def test_damaged_logs_are_all_kept(tmp_path):
    log = tmp_path / "metrics.jsonl"
    for text in (b"one\n", b"two\n"):
        log.write_bytes(text)
        metrics_log.drop_records_after(log, 5)
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == b"one\n"
    assert (tmp_path / "metrics.damaged1.jsonl").read_bytes() == b"two\n"


def line(kind, step):
    return json.dumps({"kind": kind, "step": step}) + "\n"


def test_records_behind_the_checkpoint_are_cut_off_in_place(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(line("train", 1) + line("train", 2) + line("val", 2) + line("train", 3) + '{"kind": "tr')
    inode = log.stat().st_ino
    assert metrics_log.drop_records_after(log, 2) == [
        json.loads(line(*each)) for each in (("train", 1), ("train", 2), ("val", 2))
    ]
    assert log.read_text() == line("train", 1) + line("train", 2) + line("val", 2)
    assert log.stat().st_ino == inode
    log.write_text(line("train", 3) + line("train", 1))
    metrics_log.drop_records_after(log, 2)
    assert log.read_text() == line("train", 1)


def test_plot_says_what_it_leaves_out(folder, tmp_path, capsys):
    lines = (folder / "runs/whole/metrics.jsonl").read_text()
    odd = '{"kind": "train", "step": 1, "bpb": "many"}\n{"kind": "val", "step": 2, "bpb": 1' + "0" * 400 + "}\n"
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n" + (lines + odd).encode())
    assert plot.main([str(tmp_path)]) == 0
    assert "metrics.jsonl: line 1 is not a record, ignored" in capsys.readouterr().err
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    ("value", "number"), [(1, 1.0), (0.5, 0.5), (True, None), ("1", None), (None, None), (10**400, None)]
)
def test_a_number_of_a_record(value, number):
    assert metrics_log.value_of({"loss": value}, "loss") == number
    assert metrics_log.value_of({}, "loss") is None


def test_an_unsaved_run_advises_nothing_that_needs_a_checkpoint(folder, monkeypatch, capsys):
    def save(where, step, *args, **kwargs):
        raise OSError(28, "No space left on device", str(where))

    monkeypatch.setattr(checkpoint, "save", save)
    assert train(folder, run="unsaved", steps=4) == 1
    out = capsys.readouterr().out
    assert "unsaved  step 4 could not be saved: there is no checkpoint\n" in out
    for word in ("--resume", "nanochat_native.generate", "nanochat_native.evaluate"):
        assert word not in out


def test_a_run_whose_last_save_failed_names_what_there_is(folder, monkeypatch, capsys):
    real = checkpoint.save

    def save(where, step, *args, **kwargs):
        if step > 4:
            raise OSError(28, "No space left on device", str(where))
        return real(where, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    assert train(folder, run="half", steps=8) == 1
    out = capsys.readouterr().out
    assert "unsaved  step 8 could not be saved: the last checkpoint is of step 4\n" in out
    assert f"resume   python -m nanochat_native.train --resume {folder / 'runs/half'}\n" in out


def test_a_log_that_is_a_link_is_repaired_at_its_target(tmp_path):
    log, target = tmp_path / "metrics.jsonl", tmp_path / "elsewhere.jsonl"
    target.write_text(line("train", 1) + "x\n" + line("train", 2))
    log.symlink_to(target)
    metrics_log.drop_records_after(log, 2)
    assert log.is_symlink()
    assert target.read_text() == line("train", 1) + line("train", 2)


def test_a_failed_replacement_leaves_no_temporary_file(tmp_path, monkeypatch):
    log = tmp_path / "metrics.jsonl"
    log.write_text(line("train", 1) + "x\n")
    before = log.read_bytes()
    monkeypatch.setattr(metrics_log.shutil, "copyfile", failing)
    with pytest.raises(RuntimeError, match="it broke"):
        metrics_log.drop_records_after(log, 2)

    class Figure:
        def savefig(self, file, **settings):
            file.write(b"half")
            failing()

    with pytest.raises(RuntimeError, match="it broke"):
        pictures.save(Figure(), tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert log.read_bytes() == before


def test_overwriting_a_run_clears_its_damaged_logs_too(folder):
    run = folder / "runs/cleared"
    assert train(folder, run=run.name, steps=1) == 0
    (run / "metrics.damaged.jsonl").write_text("x\n")
    assert train(folder, run=run.name, steps=1, overwrite=True) == 0
    assert not (run / "metrics.damaged.jsonl").exists()


def test_a_measurement_that_was_only_logged_is_taken_from_the_log(folder, capsys):
    """Kill the run after the record and before measurement.json."""
    killed(folder, 2, "runs.checkpoint", "add_measurement", run="logged", sample_every=4)
    checkpoints = folder / "runs/logged/checkpoints"
    assert "measured_step" not in checkpoint.load(checkpoints)[1]
    logged = records(folder / "runs/logged", "val")[-1]
    assert train(folder, run="logged", steps=STEPS, sample_every=4, resume="auto") == 0
    assert logged["step"] == 8
    assert checkpoint.load(checkpoints, 8)[1]["validation_bpb"] == logged["bpb"]
    assert checkpoint.load(checkpoints, 8)[1]["measured_step"] == 8
    assert_same_run(folder / "runs/logged", folder / "runs/whole")


def test_the_diagnosis_keeps_nothing_of_a_step_that_it_failed_on(folder, monkeypatch):
    run = trainer.Trainer(resolve_device(parse(tiny_flags(folder, diagnose=True))), SilentConsole())
    monkeypatch.setattr(run.diagnosis, "_measure_gradients", failing)
    run.diagnosis._before = {"of an earlier step": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="it broke"):
        run.diagnosis.begin(1.0, 1.0)
    assert run.diagnosis._before == {}


def test_out_of_memory_is_one_line(folder, monkeypatch, capsys):
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't\nallocate memory")

    def out_of_memory(*args):
        raise error

    monkeypatch.setattr(trainer.Trainer, "train_step", out_of_memory)
    assert train(folder, run="memory", steps=1) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory with --device-batch-size 2; try --device-batch-size 1 (")
    assert err.count("\n") == 1


def rank_without_memory():
    group = dist.group.WORLD
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), group)

    def action():
        if world.rank == 1:
            raise MemoryError

    try:
        world.run_collectively(action, MemoryError)
    except RankError as error:
        return str(error)


def test_an_error_without_a_message_reaches_all_ranks():
    assert ranks.run(2, rank_without_memory) == ["rank 1: MemoryError"] * 2
