import dataclasses
import json
import os
import re

import pytest

from nanochat_native.runs import run_folder
from nanochat_native.runs.config import (
    LOGGER_FLAGS,
    MUON_FLAGS,
    MUON_SWITCHES,
    PARTS,
    PROJECT,
    RECIPES,
    FinetuneConfig,
    TrainConfig,
    command_of,
    parse,
    resolve_defaults,
    resolve_horizon,
    switches,
    to_json,
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


def test_help_of_finetune_names_the_recipe_of_the_base_model(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], kind=FinetuneConfig)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    entry = text[text.index(" --recipe ") :]
    assert "(default: that of the base model)" in entry[: entry.index(" --architecture ")]


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
        (["--matrix-weight-decay", "-2"], "--matrix-weight-decay must be a finite number >= 0, got -2.0"),
        (["--scalar-lr", "-0.5"], "--scalar-lr must be a finite number >= 0, got -0.5"),
        (["--momentum-final", "1"], "--momentum-final must be a number in [0, 1), got 1.0"),
        (["--normuon-beta2", "1"], "--normuon-beta2 must be a number in [0, 1), got 1.0"),
        (["--qk-scale", "0"], "--qk-scale must be a finite number > 0, got 0.0"),
        (["--rotary-base", "0"], "--rotary-base must be a whole number >= 1, got 0"),
        (["--warmup-steps", "-2"], "--warmup-steps must be a whole number >= 0, got -2"),
        (["--reference-batch-size", "-2"], "--reference-batch-size must be a whole number >= 0, got -2"),
        (
            ["--warmup-steps", "10", "--warmup-ratio", "0.1"],
            "--warmup-steps and --warmup-ratio each set the length of the warmup, got 10 and 0.1; set one of them to 0",
        ),
        (["--recipe", "july"], "'july'"),
        (["--smear", "maybe"], "'maybe'"),
        (["--normuon", "--optimizer", "adamw"], "--normuon needs Muon, which --optimizer adamw does not use"),
        (
            ["--muon-form", "cropped", "--optimizer", "adamw"],
            "--muon-form needs Muon, which --optimizer adamw does not",
        ),
        (["--muon-form", "cropped", "--per-head"], "--per-head needs --muon-form nanochat, got cropped"),
        (["--muon-form", "cropped", "--scale-decay"], "--scale-decay needs --muon-form nanochat, got cropped"),
        (["--target-flops", "0"], "--target-flops must be a finite number > 0, got 0.0"),
        (
            ["--num-iterations", "5", "--target-flops", "1e9"],
            "--num-iterations and --target-flops each set the length",
        ),
        (["--window-pattern", "SXL"], "--window-pattern must be letters L and S, such as SSSL, got 'SXL'"),
        (["--run", "a/b"], "--run must be a name without slashes (--out-dir sets the folder), got 'a/b'"),
        (["--run", ""], "--run must be a name without slashes (--out-dir sets the folder), got ''"),
        (["--run", ".."], "--run must be a name without slashes (--out-dir sets the folder), got '..'"),
        (["--schedule", "exponential", "--final-lr-frac", "0"], "--final-lr-frac must be > 0 with --schedule"),
        (["--resume", "auto", "--overwrite"], "give only one of them"),
    ],
)
def test_a_wrong_flag_or_value_is_one_clear_line(args, message):
    with pytest.raises(ConfigError) as error:
        resolve_defaults(parse(args), gpu=False)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_that_are_not_given_keep_their_value_in_the_base():
    base = TrainConfig(depth=7, seed=3)
    assert parse([], base) == base
    assert parse(["--seed", "0"], base) == dataclasses.replace(base, seed=0)
    switched = dataclasses.replace(base, grad_checkpoint=True)
    assert parse(["--grad-checkpoint"], switched) == switched
    assert parse(["--no-grad-checkpoint"], switched) == base


def test_a_switch_of_the_recipe_is_turned_on_and_off_with_and_without_a_value():
    config = parse(["--normuon", "--no-cautious", "--smear=off", "--depth", "3", "--backout", "off", "--scale-decay"])
    assert (config.normuon, config.cautious, config.smear, config.backout) == ("on", "off", "off", "off")
    assert (config.scale_decay, config.depth, config.row_equilibration) == ("on", 3, "auto")
    assert set(switches()) >= {*MUON_SWITCHES, "value_embeddings", "residual_scalars", "smear", "backout"}
    for name in switches():
        for args, value in (
            ([flag(name)], "on"),
            ([flag(name), "on"], "on"),
            ([flag(name), "auto"], "auto"),
            ([flag("no_" + name)], "off"),
            ([flag(name), "--depth", "3"], "on"),
            ([f"--{name}"], "on"),
            ([f"--{name}", "off"], "off"),
            ([f"--no_{name}", "--depth", "3"], "off"),
        ):
            assert getattr(parse(args), name) == value
            assert getattr(parse(args, base=TrainConfig(seed=5)), name) == value


@pytest.mark.parametrize("name", LOGGER_FLAGS)
def test_a_logger_is_turned_on_and_off_with_and_without_a_project(name):
    on, off = f"--{name}", f"--no-{name}"
    logging = dataclasses.replace(TrainConfig(seed=5), **{name: "mine"})
    for args, project in (
        ([on], PROJECT),
        ([on, "--depth", "3"], PROJECT),
        ([on, "mine"], "mine"),
        ([f"{on}=mine"], "mine"),
        ([off], None),
        ([off, "--depth", "3"], None),
    ):
        for base in (None, TrainConfig(seed=5), logging):
            assert getattr(parse(args, base=base), name) == project
    assert getattr(parse([], base=logging), name) == "mine"
    for project in ("", "a/b", "a#b", "x" * 129):
        with pytest.raises(ConfigError, match=f"^{on} must be a name of at most 128 characters without any of"):
            parse([f"{on}={project}"])


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("data", ["stdlib", "/some/text"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_is_sized_and_what_is_given_stays(gpu, data, recipe, monkeypatch):
    monkeypatch.delenv("NANOCHAT_NATIVE_BACKEND", raising=False)
    sized = resolve_defaults(TrainConfig(data=data, recipe=recipe), gpu=gpu)
    by_law = gpu and data != "stdlib" and recipe == "today"
    assert sized.total_batch_size == (UNSET if by_law else 2048 if not gpu else 65536 if data == "stdlib" else 524288)
    sized = dataclasses.replace(sized, total_batch_size=2**19)
    sized = resolve_horizon(sized, num_params=10**8, flops_per_token=10**9)
    assert sized.dtype == ("bfloat16" if gpu else "float32")
    assert sized.backend == "native"
    left = {f.name for f in dataclasses.fields(sized) if getattr(sized, f.name) in (UNSET, "auto", None)}
    # Those below are sized where the model and the memory are known, or stay unset.
    assert left == {
        "n_kv_head",
        "matrix_lr",
        "embedding_lr",
        "unembedding_lr",
        "scalar_lr",
        *(["weight_decay"] if recipe == "today" else []),
        "device_batch_size",
        "target_flops",
        "target_param_data_ratio",
        "device",
        "resume",
        "cuda_graphs",
        "text_column",
        "core",
        "core_every",
        "core_max_per_task",
        "wandb",
        "trackio",
    }
    given = TrainConfig(depth=9, max_seq_len=77, vocab_size=999, dtype="bfloat16", backend="torch", run="mine")
    kept = resolve_defaults(given, gpu=gpu)
    assert all(getattr(kept, n) == getattr(given, n) for n in ("depth", "max_seq_len", "vocab_size", "dtype", "run"))
    assert resolve_defaults(TrainConfig(depth=9), gpu=gpu).run == "d9"


# nanochat's own values: of its commit of July 2026, and of this program before it had recipes.
TABLE = {
    "architecture": ("today", "october"),
    "window_pattern": ("SSSL", "L"),
    "value_embeddings": ("on", "off"),
    "residual_scalars": ("on", "off"),
    "smear": ("on", "off"),
    "backout": ("on", "off"),
    "qk_scale": (1.2, 1.0),
    "rotary_base": (100_000, 10_000),
    "weight_decay": (UNSET, 0.0),
    "matrix_weight_decay": (0.28, 0.0),
    "decay_schedule": ("cosine", "constant"),
    "scale_decay": ("on", "off"),
    "cautious": ("on", "off"),
    "ns_steps": (5, 5),
    "ns_coefficients": ("polar_express", "quintic"),
    "momentum_start": (0.85, 0.85),
    "momentum_end": (0.97, 0.95),
    "momentum_warmup_steps": (400, 300),
    "momentum_final": (0.9, 0.95),
    "row_equilibration": ("on", "off"),
    "frobenius_renormalisation": ("on", "off"),
    "normuon": ("on", "off"),
    "normuon_beta2": (0.9, 0.95),
    "per_head": (False, False),
    "muon_form": ("nanochat", "nanochat"),
    "grad_clip": (0.0, 1.0),
    "schedule": ("linear", "linear"),
    "warmup_steps": (40, 0),
    "warmup_ratio": (0.0, 0.0),
    "warmdown_ratio": (0.65, 0.2),
    "final_lr_frac": (0.05, 0.0),
}


@pytest.mark.parametrize("gpu", [False, True])
def test_the_recipes_set_the_flags_that_are_not_given(gpu):
    for recipe, place in (("today", 0), ("october", 1)):
        config = resolve_defaults(TrainConfig(recipe=recipe, data="/some/text"), gpu=gpu)
        assert {name: getattr(config, name) for name in TABLE} == {name: pair[place] for name, pair in TABLE.items()}
        ratio = {(True, 0): 12.0, (True, 1): 20.0, (False, 0): 0.14, (False, 1): 0.1}[gpu, place]
        assert config.target_param_data_ratio == ratio
        assert config.reference_batch_size == (2**19 if gpu and recipe == "today" else 0)
    differing = {name for name, (today, october) in TABLE.items() if today != october}
    given_by_recipe = {name for values in RECIPES.values() for name in values} | {"momentum_final", "window_pattern"}
    assert differing <= given_by_recipe | set(PARTS)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "off"),
        ({"dtype": "bfloat16"}, "on"),
        ({"dtype": "bfloat16", "ns_bfloat16": "off"}, "off"),
        ({"ns_bfloat16": "on"}, "on"),
        ({"dtype": "bfloat16", "optimizer": "adamw"}, "off"),
        ({"dtype": "bfloat16", "muon_form": "cropped"}, "off"),
    ],
)
def test_newton_schulz_multiplies_in_bfloat16_if_the_model_does(flags, expected):
    assert resolve_defaults(TrainConfig(**flags), gpu=False).ns_bfloat16 == expected


def test_a_run_from_before_the_flag_keeps_its_newton_schulz_in_float32(tmp_path):
    saved = saved_run(tmp_path, run="one", dtype="bfloat16", ns_bfloat16="off")
    path = saved.run_dir / "config.json"
    content = json.loads(path.read_text())
    del content["config"]["ns_bfloat16"]
    path.write_text(json.dumps(content))
    assert run_folder.load_config(saved.run_dir) == saved


@pytest.mark.parametrize("gpu", [False, True])
def test_todays_recipe_is_the_default(gpu):
    config = resolve_defaults(TrainConfig(), gpu=gpu)
    assert (config.recipe, config.architecture) == ("today", "today")


# Another value than that of either recipe.
OTHERS = {
    "window_pattern": "SL",
    "qk_scale": 1.1,
    "rotary_base": 500,
    "weight_decay": 0.3,
    "matrix_weight_decay": 0.1,
    "ns_coefficients": "cubic",
    "momentum_end": 0.9,
    "momentum_warmup_steps": 7,
    "momentum_final": 0.5,
    "normuon_beta2": 0.8,
    "grad_clip": 2.0,
    "warmup_steps": 3,
    "warmup_ratio": 0.1,
    "warmdown_ratio": 0.4,
    "final_lr_frac": 0.3,
    "reference_batch_size": 1024,
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("gpu", [False, True])
def test_a_given_flag_wins_over_the_recipe(recipe, gpu):
    names = {name for values in RECIPES.values() for name in values} | {"momentum_final", "window_pattern", *PARTS}
    two = {
        name: ["today", "october"] if name == "architecture" else ["constant", "cosine"]
        for name in ("architecture", "decay_schedule")
    }
    for name in names:
        for value in two.get(name, ["on", "off"] if name in switches() else [OTHERS.get(name)]):
            config = resolve_defaults(TrainConfig(recipe=recipe, **{name: value}), gpu=gpu)
            assert getattr(config, name) == value


def test_a_warmup_of_one_kind_replaces_the_recipes():
    for flags, steps, ratio in (
        ({"warmup_ratio": 0.1}, 0, 0.1),
        ({"warmup_ratio": 0.0}, 0, 0.0),
        ({"warmup_steps": 3}, 3, 0.0),
        ({}, 40, 0.0),
    ):
        config = resolve_defaults(TrainConfig(recipe="today", **flags), gpu=False)
        assert (config.warmup_steps, config.warmup_ratio) == (steps, ratio)


def test_the_architecture_may_differ_from_the_recipe():
    config = resolve_defaults(TrainConfig(recipe="october", architecture="today", smear="off"), gpu=False)
    assert (config.window_pattern, config.smear, config.backout, config.qk_scale) == ("SSSL", "off", "on", 1.2)
    assert (config.normuon, config.warmdown_ratio) == ("off", 0.2)
    config = resolve_defaults(TrainConfig(recipe="today", architecture="october", backout="on"), gpu=False)
    assert (config.window_pattern, config.smear, config.backout, config.qk_scale) == ("L", "off", "on", 1.0)
    assert (config.normuon, config.warmdown_ratio) == ("on", 0.65)


@pytest.mark.parametrize("flags", [{"optimizer": "adamw"}, {"optimizer": "sgd"}, {"muon_form": "cropped"}])
def test_what_is_not_nanochats_muon_takes_no_options_of_it_from_the_recipe(flags):
    config = resolve_defaults(TrainConfig(recipe="today", **flags), gpu=False)
    october = resolve_defaults(TrainConfig(recipe="october", **flags), gpu=False)
    assert {name: getattr(config, name) for name in MUON_FLAGS} == {name: getattr(october, name) for name in MUON_FLAGS}
    assert config.warmdown_ratio == 0.65


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


def test_a_target_whose_tokens_overflow_is_refused():
    config = resolve_defaults(parse(["--target-param-data-ratio", "1e308"]), gpu=False)
    with pytest.raises(ConfigError, match=r"^--target-param-data-ratio is 1e\+308; that is more than \d+ steps$"):
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


def finetune_config(tmp_path, **flags):
    flags |= {"checkpoint": tmp_path / "base", "num_iterations": 10, "device": "cpu"}
    config = resolve_defaults(FinetuneConfig(out_dir=tmp_path, run="chat", **flags), gpu=False)
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


# What the config.json of a run before there were recipes did not have, and its switches.
SINCE_RECIPES = {
    *("recipe", "architecture", *PARTS, "reference_batch_size", "scalar_lr", "decay_schedule", "scale_decay"),
    *("momentum_final", "normuon_beta2", "warmup_steps"),
}
OLD_SWITCHES = ("cautious", "row_equilibration", "frobenius_renormalisation", "normuon")


def as_an_earlier_version_wrote_it(config):
    """Rewrite the config.json of a run of October's recipe."""
    path = config.run_dir / "config.json"
    content = json.loads(path.read_text())
    flags = {name: value for name, value in content["config"].items() if name not in SINCE_RECIPES}
    content["config"] = flags | {name: flags[name] == "on" for name in OLD_SWITCHES}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("flags", [{}, {"normuon": "on", "momentum_end": 0.9, "grad_clip": 0.0, "optimizer": "hybrid"}])
def test_a_run_before_there_were_recipes_is_octobers(tmp_path, flags, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    saved = saved_run(tmp_path, run="one", recipe="october", **flags)
    as_an_earlier_version_wrote_it(saved)
    assert run_folder.load_config(saved.run_dir) == saved
    config, notes = run_folder.resolve_config(["--resume", str(saved.run_dir)])
    assert config == dataclasses.replace(saved, resume=str(saved.run_dir))
    assert notes == []
    with pytest.raises(ConfigError, match="--recipe october -> today"):
        run_folder.resolve_config(["--resume", str(saved.run_dir), "--recipe", "today"])


def test_a_fine_tuned_run_before_there_were_recipes_is_octobers(tmp_path):
    saved = finetune_config(tmp_path, recipe="october")
    run_folder.save_config(saved)
    as_an_earlier_version_wrote_it(saved)
    assert run_folder.load_config(saved.run_dir) == saved


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_keeps_what_its_recipe_has_set(tmp_path, recipe, gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    config = TrainConfig(out_dir=tmp_path, run="one", num_iterations=10, recipe=recipe, device="cuda" if gpu else "cpu")
    saved = dataclasses.replace(resolve_defaults(config, gpu=gpu), device_batch_size=8)
    saved.run_dir.mkdir(parents=True)
    run_folder.save_config(saved)
    config, notes = run_folder.resolve_config(["--resume", str(saved.run_dir)])
    assert config == dataclasses.replace(saved, resume=str(saved.run_dir))
    assert notes == []
    changes = {"architecture": "october", "smear": "auto", "qk_scale": 3.0, "normuon_beta2": 0.1, "scalar_lr": 7.0}
    changes |= {"momentum_final": 0.1, "decay_schedule": "constant", "warmup_steps": 5, "reference_batch_size": 9}
    for name, value in changes.items():
        if value != to_json(saved)[name] and value != "auto":
            with pytest.raises(ConfigError, match=f"a resumed run must keep its flags, got {flag(name)} "):
                run_folder.resolve_config(["--resume", str(saved.run_dir), flag(name), str(value)])


@pytest.mark.parametrize("command", ["dream", 5, ["train"], "finetune"])
def test_a_config_of_another_version_is_refused(tmp_path, command):
    config = saved_run(tmp_path, run="one")
    path = config.run_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "command": command}))
    with pytest.raises(ConfigError, match="was written by another version"):
        run_folder.load_config(config.run_dir)
