import dataclasses
import json
import os
import re

import pytest

from nanochat_native.runs import run_folder
from nanochat_native.runs.config import (
    FinetuneConfig,
    TrainConfig,
    command_of,
    parse,
    resolve_defaults,
    resolve_horizon,
)
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import UNSET, flag

NANOCHAT_FLAGS = {
    *(
        "--depth",
        "--num-iterations",
        "--target-param-data-ratio",
        "--target-flops",
        "--max-seq-len",
        "--window-pattern",
    ),
    *("--device-batch-size", "--total-batch-size", "--matrix-lr", "--embedding-lr", "--unembedding-lr"),
    *("--weight-decay", "--warmup-ratio", "--warmdown-ratio", "--final-lr-frac", "--grad-clip"),
    *("--eval-every", "--eval-tokens", "--sample-every", "--save-every", "--run"),
    *("--data", "--out-dir", "--resume", "--seed", "--dtype", "--backend", "--dry-run", "--print-config", "--json"),
}


def test_help_documents_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    flags = [flag(field.name) for field in dataclasses.fields(TrainConfig)]
    assert set(flags) >= NANOCHAT_FLAGS
    start = 0
    for one, following in zip(flags, [*flags[1:], None], strict=True):
        start = text.index(f" {one} ", start)
        entry = text[start : text.index(f" {following} ", start) if following else None]
        assert re.search(r"\w\S*[.\)] \(default: .+\)", entry), entry


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dept", "4"], "Unrecognized options: --dept, 4; perhaps you meant --depth"),
        (["--depth", "x"], "--depth must be a whole number, got 'x'"),
        (["--matrix-lr", "fast"], "--matrix-lr must be a number, got 'fast'"),
        (["--optimizer", "lion"], "'lion'"),
        (["--depth"], "Missing value for argument '--depth'"),
        (["--depth", "0"], "--depth must be a whole number from 1 to 1000, got 0"),
        (["--seed", "-1"], "--seed must be a whole number >= 0, got -1"),
        (["--warmup-ratio", "1.5"], "--warmup-ratio must be a number in [0, 1], got 1.5"),
        (
            ["--warmup-ratio", "0.5", "--warmdown-ratio", "0.6"],
            "the sum of --warmup-ratio and --warmdown-ratio must be <= 1, got 0.5 and 0.6",
        ),
        (["--grad-clip", "nan"], "--grad-clip must be a finite number >= 0, got nan"),
        (["--matrix-lr", "inf"], "--matrix-lr must be a finite number >= 0, got inf"),
        (["--matrix-weight-decay", "-1"], "--matrix-weight-decay must be a finite number >= 0, got -1.0"),
        (["--normuon", "--optimizer", "adamw"], "--normuon needs Muon, which --optimizer adamw does not use"),
        (
            ["--muon-form", "cropped", "--optimizer", "adamw"],
            "--muon-form needs Muon, which --optimizer adamw does not",
        ),
        (["--muon-form", "cropped", "--per-head"], "--per-head needs --muon-form nanochat, got cropped"),
        (["--target-flops", "0"], "--target-flops must be a finite number > 0, got 0.0"),
        (
            ["--num-iterations", "5", "--target-flops", "1e9"],
            "--num-iterations and --target-flops each set the length",
        ),
        (["--window-pattern", "SXL"], "--window-pattern must be letters L and S, such as SSSL, got 'SXL'"),
        (["--run", "a/b"], "--run must be a name without slashes (--out-dir sets the folder), got 'a/b'"),
        (["--run", ""], "--run must be a name without slashes (--out-dir sets the folder), got ''"),
        (["--run", ".."], "--run must be a name without slashes (--out-dir sets the folder), got '..'"),
        (["--schedule", "exponential"], "--final-lr-frac must be > 0 with --schedule"),
        (["--resume", "auto", "--overwrite"], "give only one of them"),
    ],
)
def test_a_wrong_flag_or_value_is_one_clear_line(args, message):
    with pytest.raises(ConfigError) as error:
        parse(args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_that_are_not_given_keep_their_value_in_the_base():
    base = TrainConfig(depth=7, seed=3)
    assert parse([], base) == base
    assert parse(["--seed", "0"], base) == dataclasses.replace(base, seed=0)
    switched = dataclasses.replace(base, grad_checkpoint=True)
    assert parse(["--grad-checkpoint"], switched) == switched
    assert parse(["--no-grad-checkpoint"], switched) == base


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("data", ["stdlib", "/some/text"])
def test_everything_is_sized_and_what_is_given_stays(gpu, data, monkeypatch):
    monkeypatch.delenv("NANOCHAT_NATIVE_BACKEND", raising=False)
    sized = resolve_horizon(resolve_defaults(TrainConfig(data=data), gpu=gpu), num_params=10**8, flops_per_token=10**9)
    assert sized.total_batch_size == (2048 if not gpu else 65536 if data == "stdlib" else 524288)
    assert sized.dtype == ("bfloat16" if gpu else "float32")
    assert sized.backend == "native"
    left = {f.name for f in dataclasses.fields(sized) if getattr(sized, f.name) in (UNSET, "auto", None)}
    # Those below are sized where the model and the memory are known, or stay unset.
    assert left == {
        "n_kv_head",
        "matrix_lr",
        "embedding_lr",
        "unembedding_lr",
        "device_batch_size",
        "target_flops",
        "target_param_data_ratio",
        "device",
        "resume",
        "cuda_graphs",
        "text_column",
    }
    given = TrainConfig(depth=9, max_seq_len=77, vocab_size=999, dtype="bfloat16", backend="torch", run="mine")
    kept = resolve_defaults(given, gpu=gpu)
    assert all(getattr(kept, n) == getattr(given, n) for n in ("depth", "max_seq_len", "vocab_size", "dtype", "run"))
    assert resolve_defaults(TrainConfig(depth=9), gpu=gpu).run == "d9"


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ({"num_iterations": 12}, 12),
        ({"target_param_data_ratio": 20.0}, 20 * 1000 // 64),
        ({"target_flops": 6400.0 * 50}, 50),
        ({"target_flops": 1.0}, 1),
    ],
)
def test_horizon(target, steps):
    config = TrainConfig(depth=1, total_batch_size=64, **target)
    assert resolve_horizon(config, num_params=1000, flops_per_token=100).num_iterations == steps


@pytest.mark.parametrize("target", ["target_flops", "target_param_data_ratio"])
def test_a_target_of_too_many_steps_is_refused(target):
    config = TrainConfig(depth=1, total_batch_size=64, **{target: 1e300})
    with pytest.raises(ConfigError, match=f"{re.escape(flag(target))} is 1e\\+300; that is more than"):
        resolve_horizon(config, num_params=1000, flops_per_token=100)


def test_the_horizon_follows_depth():
    small, large = (
        resolve_horizon(resolve_defaults(TrainConfig(), gpu=False), num_params=n, flops_per_token=6 * n).num_iterations
        for n in (7_300_000, 14_600_000)
    )
    assert large == pytest.approx(2 * small, abs=1)


def saved_run(tmp_path, **flags):
    config = resolve_defaults(TrainConfig(out_dir=tmp_path, num_iterations=10, device="cpu", **flags), gpu=False)
    config = dataclasses.replace(config, device_batch_size=8)
    config.run_dir.mkdir(parents=True)
    run_folder.save_config(config)
    return config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run of this program: it has no config.json"),
        (b"", "config.json is damaged"),
        (b'{"format": "nanochat-native run", "conf', "config.json is damaged"),
        (b"\xff\xfe", "config.json is damaged"),
        (b"[" * 100_000, "config.json is damaged"),
        (b"[1]", "config.json is damaged"),
        (b'{"format": "nanochat-native run"}', "config.json is damaged (KeyError: 'config')"),
        (b'{"format": "nanochat-native run", "config": 5}', "config.json is damaged"),
        (b'{"format": "another program"}', "is not a run of this program: its config.json is from another one"),
    ],
)
def test_a_damaged_config_is_told_from_a_missing_one(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_folder.load_config(tmp_path)
    assert not run_folder.is_run(tmp_path)
    if content is None:
        return
    (tmp_path / "checkpoints").mkdir()
    for resume in ("auto", str(tmp_path), str(tmp_path / "checkpoints"), str(tmp_path / "checkpoints" / "step_000004")):
        with pytest.raises(ConfigError, match=re.escape(message)):
            run_folder.resolve_config(["--resume", resume, "--out-dir", str(tmp_path.parent), "--run", tmp_path.name])
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_folder.check_free(TrainConfig(out_dir=tmp_path.parent, run=tmp_path.name))


def test_a_flag_that_was_sized_by_the_program_is_shown_as_auto(tmp_path):
    saved = saved_run(tmp_path, depth=3)
    assert run_folder.shown(saved, "matrix_lr") == "auto"
    assert run_folder.shown(saved, "resume") == "none"
    assert run_folder.shown(dataclasses.replace(saved, matrix_lr=0.5), "matrix_lr") == "0.5"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seed", str(2**63)], f"--seed must be a whole number <= {2**63 - 1}, got {2**63}"),
        (["--depth", "1001"], "--depth must be a whole number from 1 to 1000, got 1001"),
        (["--vocab-size", "9" * 30], "--vocab-size must be a whole number from 265 to 16777216, got 9999"),
        (["--num-iterations", "9" * 30], f"--num-iterations must be a whole number <= {2**63 - 1}"),
    ],
)
def test_numbers_that_torch_cannot_take_are_refused(args, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(args)


def test_a_resumed_run_keeps_its_flags(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    saved = saved_run(tmp_path, depth=3, seed=5, run="one")
    for place in ("one", "one/checkpoints"):
        (tmp_path / "one" / "checkpoints").mkdir(exist_ok=True)
        config, notes = run_folder.resolve_config(["--resume", str(tmp_path / place)])
        assert config == dataclasses.replace(saved, resume=str(tmp_path / place))
        assert notes == []
    config, _ = run_folder.resolve_config(["--resume", "auto", "--run", "one", "--out-dir", str(tmp_path)])
    assert config.depth == 3
    assert run_folder.load_config(tmp_path / "one") == saved


def test_resume_auto_without_a_run_starts_one_and_a_path_without_a_run_is_refused(tmp_path):
    config, _ = run_folder.resolve_config(["--resume", "auto", "--out-dir", str(tmp_path), "--device", "cpu"])
    assert config.resume is None
    with pytest.raises(ConfigError, match="not a run of this program"):
        run_folder.resolve_config(["--resume", str(tmp_path / "none")])


def test_flags_that_would_make_it_another_run_are_refused_by_name(tmp_path):
    saved_run(tmp_path, run="one")
    with pytest.raises(ConfigError) as error:
        run_folder.resolve_config(["--resume", str(tmp_path / "one"), "--depth", "5", "--seed", "1", "--keep", "4"])
    assert "--depth 4 -> 5" in str(error.value)
    assert "--seed 0 -> 1" in str(error.value)
    assert "--keep" not in str(error.value)
    with pytest.raises(ConfigError, match="--num-iterations 10 -> 9"):
        run_folder.resolve_config(["--resume", str(tmp_path / "one"), "--num-iterations", "9"])


def test_a_longer_horizon_and_another_rounding_are_allowed_and_the_latter_is_told(tmp_path):
    saved_run(tmp_path, run="one")
    args = ["--resume", str(tmp_path / "one"), "--num-iterations", "20", "--device-batch-size", "4", "--keep", "9"]
    config, notes = run_folder.resolve_config(args)
    assert (config.num_iterations, config.device_batch_size, config.keep) == (20, 4, 9)
    assert notes == ["--device-batch-size 8 -> 4"]


def test_what_a_killed_write_left_does_not_take_the_folder(tmp_path):
    config = TrainConfig(out_dir=tmp_path, run="one")
    config.run_dir.mkdir()
    (config.run_dir / ".config.json.0123abcd.tmp").write_text("half")
    run_folder.check_free(config)
    run_folder.save_config(resolve_defaults(config, gpu=False))
    with pytest.raises(ConfigError, match="holds a run"):
        run_folder.check_free(config)
    (config.run_dir / "notes.txt").write_text("the user's")
    os.close(run_folder.claim(dataclasses.replace(config, overwrite=True)))
    assert os.listdir(config.run_dir) == ["notes.txt"]


def finetune_config(tmp_path):
    config = FinetuneConfig(out_dir=tmp_path, run="chat", checkpoint=tmp_path / "base", num_iterations=10, device="cpu")
    config = resolve_defaults(config, gpu=False)
    config.run_dir.mkdir(parents=True)
    return config


def test_the_config_names_its_command(tmp_path):
    for config in (saved_run(tmp_path, run="one"), finetune_config(tmp_path)):
        run_folder.save_config(config)
        assert json.loads((config.run_dir / "config.json").read_text())["command"] == command_of(config)
        assert run_folder.load_config(config.run_dir) == config


def test_configs_without_a_command_are_told_by_their_flags(tmp_path):
    for config in (saved_run(tmp_path, run="one"), finetune_config(tmp_path)):
        run_folder.save_config(config)
        path = config.run_dir / "config.json"
        content = json.loads(path.read_text())
        del content["command"]
        path.write_text(json.dumps(content))
        assert run_folder.load_config(config.run_dir) == config


@pytest.mark.parametrize("command", ["dream", 5, ["train"], "finetune"])
def test_a_config_of_another_version_is_refused(tmp_path, command):
    config = saved_run(tmp_path, run="one")
    path = config.run_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "command": command}))
    with pytest.raises(ConfigError, match="was written by another version"):
        run_folder.load_config(config.run_dir)
