import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from fork_server import python
from tiny_run import HANGS, losses, records, tiny_flags, train, wait_until, write_text

from nanochat_native.runs import checkpoint
from nanochat_native.runs.run_folder import claim, load_config
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime import signals
from nanochat_native.runtime.console import Console
from nanochat_native.train import main
from nanochat_native.training import trainer


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return a folder with a text, and the finished run "tiny" of 24 steps."""
    folder = tmp_path_factory.mktemp("shared")
    write_text(folder / "text.jsonl")
    assert train(folder, steps=24) == 0
    return folder


@pytest.fixture
def folder(shared, tmp_path):
    """Return a folder for one test, with the same text and its cache."""
    (tmp_path / "text.jsonl").symlink_to(shared / "text.jsonl")
    (tmp_path / "cache").symlink_to(shared / "cache")
    return tmp_path


def test_a_run_learns_and_leaves_everything(shared, capsys):
    run = shared / "runs" / "tiny"
    train_records = records(run, "train")
    assert [r["step"] for r in train_records] == list(range(1, 25))
    assert train_records[0]["loss"] == pytest.approx(torch.log(torch.tensor(300.0)).item(), rel=1e-3)
    assert train_records[-1]["loss"] < 0.6 * train_records[0]["loss"]
    validation = records(run, "val")
    assert [r["step"] for r in validation] == [0, 4, 8, 12, 16, 20, 24]
    assert validation[-1]["bpb"] < 0.6 * validation[0]["bpb"]
    assert all(r["tokens_per_second"] > 0 and r["mfu"] > 0 and r["memory_bytes"] > 0 for r in train_records)
    (sample,) = records(run, "sample")
    assert sample["step"] == 24
    assert sample["text"].startswith(sample["prompt"])
    assert checkpoint.steps(run / "checkpoints") == [20, 24]
    assert load_config(run).num_iterations == 24
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    model, tokenizer, meta = load_model(run)
    assert meta["step"] == 24
    assert model.num_params() == 2 * 300 * 128 + 2 * 12 * 128**2
    assert tokenizer.vocab_size == 300


def test_the_train_bpb_agrees_with_the_evaluation(shared):
    """Train and validate on texts of one kind, so that the two measures must agree."""
    run = shared / "runs" / "tiny"
    assert records(run, "train")[-1]["bpb"] == pytest.approx(records(run, "val")[-1]["bpb"], rel=0.25)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(folder):
    for run, seed in (("one", 1), ("two", 1), ("three", 2)):
        assert train(folder, run=run, seed=seed) == 0
    one, two, three = (losses(folder / "runs" / run) for run in ("one", "two", "three"))
    assert one == two
    assert all(a != b for a, b in zip(one[1:8], three[1:8], strict=True))


def test_two_threads_give_the_same_bits_each_time(folder):
    torch.set_num_threads(2)
    for run in ("one", "two"):
        assert main(tiny_flags(folder, run=run)) == 0
    assert losses(folder / "runs" / "one") == losses(folder / "runs" / "two")


def test_samples_evaluations_and_saves_do_not_change_the_losses(folder):
    assert train(folder, run="often", sample_every=1, eval_every=1, save_every=1) == 0
    assert train(folder, run="never", sample_every=0, eval_every=0, save_every=0) == 0
    often, never = (records(folder / "runs" / run, "train") for run in ("often", "never"))
    assert [r["loss"] for r in often] == [r["loss"] for r in never]
    assert [r["step"] for r in records(folder / "runs" / "never", "val")] == [0, 8]
    assert checkpoint.steps(folder / "runs" / "never" / "checkpoints") == [8]


def test_accumulation_gives_the_gradient_of_the_whole_batch(folder):
    assert train(folder, run="whole", device_batch_size=4) == 0
    assert train(folder, run="parts", device_batch_size=1) == 0
    whole, parts = (records(folder / "runs" / run, "train") for run in ("whole", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def test_gradient_checkpointing_changes_no_bit(folder):
    assert train(folder, run="kept") == 0
    assert train(folder, run="recomputed", grad_checkpoint=True) == 0
    assert losses(folder / "runs" / "kept") == losses(folder / "runs" / "recomputed")


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adam"},
        {"optimizer": "sgd"},
        {"window_pattern": "SL", "n_kv_head": 1, "head_dim": 64},
        {"dtype": "bfloat16"},
        {"backend": "torch", "grad_clip": 0, "schedule": "cosine", "warmup_ratio": 0.2},
    ],
    ids=lambda flags: " ".join(f"{n}={v}" for n, v in flags.items()),
)
def test_options_train(folder, flags):
    assert train(folder, run="option", **flags) == 0
    first, *_, last = records(folder / "runs" / "option", "train")
    assert last["loss"] < first["loss"]


def test_schedules_reach_the_optimizers(folder, monkeypatch):
    rates = []

    def spy(run, batches, real=trainer.Trainer.train_step):
        real(run, batches)
        adamw, muon = run.optimizers
        (group,) = muon.param_groups
        rates.append(
            (group["lr"], adamw.param_groups[0]["lr"] / adamw.param_groups[0]["initial_lr"], group["momentum"])
        )

    monkeypatch.setattr(trainer.Trainer, "train_step", spy)
    assert train(folder, steps=10, matrix_lr=0.01, warmup_ratio=0.2, warmdown_ratio=0.4, final_lr_frac=0.2) == 0
    multipliers = [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]
    assert [lr for lr, _, _ in rates] == pytest.approx([0.01 * m for m in multipliers])
    assert [m for _, m, _ in rates] == pytest.approx(multipliers)
    assert rates[0][2] == 0.85
    assert rates[9][2] == pytest.approx(0.85 + 0.1 * 9 / 300)


def test_a_run_is_never_overwritten_unasked(folder, capsys):
    assert train(folder, run="one", steps=2) == 0
    before = losses(folder / "runs" / "one")
    (folder / "runs" / "one" / "notes.txt").write_text("mine")
    assert train(folder, run="one", steps=3) == 2
    error = capsys.readouterr().err
    assert "--resume auto" in error
    assert "--overwrite" in error
    assert losses(folder / "runs" / "one") == before
    assert train(folder, run="one", steps=3, overwrite=True) == 0
    assert len(records(folder / "runs" / "one", "train")) == 3
    assert checkpoint.steps(folder / "runs" / "one" / "checkpoints") == [3]
    assert (folder / "runs" / "one" / "notes.txt").read_text() == "mine"


def test_overwrite_deletes_nothing_that_is_no_run(folder, capsys):
    foreign = folder / "runs" / "thesis"
    (foreign / "checkpoints").mkdir(parents=True)
    (foreign / "checkpoints" / "chapter.txt").write_text("all of it")
    (foreign / "config.json").write_text('{"format": "another program"}')
    assert train(folder, run="thesis", overwrite=True) == 2
    assert "not a run" in capsys.readouterr().err
    assert (foreign / "checkpoints" / "chapter.txt").read_text() == "all of it"
    assert {p.name for p in foreign.iterdir()} == {"checkpoints", "config.json"}


def test_overwrite_keeps_the_old_run_when_the_new_one_cannot_start(folder):
    assert train(folder, run="one", steps=2) == 0
    before = losses(folder / "runs" / "one")
    assert train(folder, run="one", overwrite=True, data=folder / "missing.txt") == 2
    assert train(folder, run="one", overwrite=True, total_batch_size=100) == 2
    assert losses(folder / "runs" / "one") == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"total_batch_size": 100}, "use --total-batch-size"),
        ({"data": "/nonexistent/text"}, "/nonexistent/text"),
        ({"n_kv_head": 3}, "n_kv_head 3"),
        ({"total_batch_size": 2**20, "device_batch_size": 2**15}, "smaller batch"),
        ({"depth": "deep"}, "--depth must be a whole number"),
        ({"resume": "/nonexistent/run"}, "not a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(folder, capsys, flags, message):
    assert train(folder, run="wrong", **flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert not (folder / "runs").exists()


def test_a_dry_run_prints_the_plan_and_leaves_nothing(folder, capsys):
    assert train(folder, dry_run=True) == 0
    out = capsys.readouterr().out
    for word in ("device", "kernels", "peak", "data", "model", "optimizer", "batch", "run"):
        assert f"\n{word}" in "\n" + out
    assert "12 matrices" in out
    assert "2 x 32 x 2 = 128 tokens | 8 steps, 1,024 tokens" in out
    assert not (folder / "runs").exists()


def test_print_config_is_json(folder, capsys):
    assert train(folder, print_config=True) == 0
    assert json.loads(capsys.readouterr().out)["total_batch_size"] == 128
    assert not (folder / "runs").exists()


def test_json_output_is_records_only(folder, capsys):
    assert train(folder, json=True, steps=2) == 0
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["kind"] for r in out] == ["val", "train", "train", "val", "sample", "summary"]
    assert out[-1]["step"] == 2


def test_token_shards_without_a_tokenizer_train_without_bytes(folder):
    corpus = next(p for p in (folder / "cache").iterdir() if p.is_dir())
    shards = folder / "shards"
    shards.mkdir()
    for path in corpus.glob("*.bin"):
        (shards / path.name).write_bytes(path.read_bytes())
    assert train(folder, run="shards", data=shards) == 0
    run = folder / "runs" / "shards"
    assert records(run, "val")[-1]["bpb"] is None
    assert records(run, "val")[-1]["loss"] < records(run, "val")[0]["loss"]
    assert records(run, "sample") == []
    assert (run / "loss.png").exists()


def poison(monkeypatch, steps):
    """Make the gradient of one matrix NaN in the given steps."""
    real = trainer.clip_reduced_
    count = iter(range(1, 1000))

    def clip(optimizers, max_norm, **options):
        if next(count) in steps:
            optimizers[1].param_groups[0]["params"][2].grad[0, 0] = float("nan")
        return real(optimizers, max_norm, **options)

    monkeypatch.setattr(trainer, "clip_reduced_", clip)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(folder, monkeypatch, capsys):
    weights = []

    def spy(run, batches, real=trainer.Trainer.train_step):
        real(run, batches)
        weights.append(run.model.lm_head.weight.detach().clone())

    monkeypatch.setattr(trainer.Trainer, "train_step", spy)
    poison(monkeypatch, {3, 6})
    assert train(folder, run="skips") == 0
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert [r["skipped"] for r in records(folder / "runs" / "skips", "train")] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert records(folder / "runs" / "skips", "train")[2]["grad_norm"] is None
    out = capsys.readouterr().out
    assert "step 3: the gradient's norm is nan (transformer.h.0.attn.c_v.weight): no update; 1 in a row" in out
    assert "2 steps skipped" in out


def test_training_stops_when_gradients_stay_bad(folder, monkeypatch, capsys):
    poison(monkeypatch, range(6, 100))
    assert train(folder, run="bad", steps=30, max_skipped_steps=5) == 1
    assert [r["step"] for r in records(folder / "runs" / "bad", "train")][-1] == 10
    assert "5 steps in a row had no finite gradient" in capsys.readouterr().out
    model, _, _ = load_model(folder / "runs" / "bad")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_weights_that_are_not_finite_never_reach_a_checkpoint(folder, capsys):
    flags = {"matrix_lr": 3e38, "weight_decay": 0, "save_every": 1, "keep": 50, "max_skipped_steps": 3}
    assert train(folder, run="lost", steps=30, sample_every=1, **flags) == 1
    assert "is not finite" in capsys.readouterr().out
    for step in checkpoint.steps(folder / "runs" / "lost" / "checkpoints"):
        tensors, _ = checkpoint.load(folder / "runs" / "lost" / "checkpoints", step)
        assert all(tensor.isfinite().all() for group in tensors.values() for tensor in group.values())


def test_a_save_that_fails_does_not_end_the_run(folder, monkeypatch, capsys):
    real = checkpoint.save

    def save(where, step, *args, **kwargs):
        if step == 4:
            raise OSError(28, "No space left on device", str(where))
        return real(where, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    assert train(folder, run="full") == 0
    assert "No space left on device" in capsys.readouterr().out
    assert checkpoint.steps(folder / "runs" / "full" / "checkpoints") == [8]


def test_a_run_whose_last_save_fails_says_so_by_its_exit_code(folder, monkeypatch):
    def save(where, step, *args, **kwargs):
        raise OSError(28, "No space left on device", str(where))

    monkeypatch.setattr(checkpoint, "save", save)
    assert train(folder, run="full") == 1


def test_two_processes_do_not_share_a_run(folder, capsys):
    assert train(folder, run="one", steps=2) == 0
    descriptor = claim(
        load_config(folder / "runs" / "one").__class__(out_dir=folder / "runs", run="one", resume="auto")
    )
    try:
        assert train(folder, run="one", steps=2, resume="auto") == 2
    finally:
        os.close(descriptor)
    assert "another process is training in" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(folder, number, code):
    args = tiny_flags(folder, steps=100_000, save_every=0, eval_every=0)
    command = [python(), "-m", "nanochat_native.train", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = folder / "runs" / "tiny"
    wait_until(lambda: process.poll() is not None or ((run / "metrics.jsonl").exists() and records(run, "train")))
    assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == code
    assert f"{number.name}: finishing the step" in err
    (step,) = checkpoint.steps(run / "checkpoints")
    assert checkpoint.load(run / "checkpoints")[1]["step"] == step == records(run, "train")[-1]["step"]
    assert f"resume   python -m nanochat_native.train --resume {run}" in out


def test_a_second_signal_stops_at_once():
    with signals.StopSignals() as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Terminal:
    """A stream that is a terminal and keeps what is written."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_terminal_shows_one_line_and_a_log_only_some(capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "20")
    console = Console(terminal)
    console.live("first " * 10)
    console.live("second")
    console.say("a message")
    assert terminal.text == "\r" + ("first " * 10)[:19] + "\x1b[K\rsecond\x1b[K\na message\n"
    console = Console()
    for number in range(50):
        console.live(f"line {number}", last=number == 49)
    assert capsys.readouterr().out == "line 0\nline 49\n"


def test_the_expected_time_needs_a_known_peak(folder, capsys, monkeypatch):
    monkeypatch.setattr(trainer.hardware, "peak", lambda device, dtype: trainer.hardware.Peak(None, "not in the table"))
    assert train(folder, steps=1) == 0
    out = capsys.readouterr().out
    assert "peak     unknown (not in the table)" in out
    assert "about" not in out.split("batch    ")[1].splitlines()[0]
    assert "mfu ?" in out


def test_a_wrong_flag_shows_no_traceback():
    result = subprocess.run(
        [sys.executable, "-m", "nanochat_native.train", "--dept", "4"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == "error: Unrecognized options: --dept, 4; perhaps you meant --depth\n"
    assert result.stdout == ""
