"""Recipes: the files of the package, what a recipe may hold, each mistake in one line, command lines, estimates."""

import dataclasses
import sys
import tomllib
from pathlib import Path

import pytest

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.pipeline import estimate
from nanochat_native.pipeline.recipe import BY_GPUS, FOLDER, Places, builtin, check, command_line, config_of, read
from nanochat_native.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
STAGES = """
device = "cpu"
[[stages]]
name = "base"
command = "train"
flags = "--depth 2"
[[stages]]
name = "chats"
command = "reinforce"
flags = "--write-chats {chats}/c.jsonl"
[[stages]]
name = "chat"
command = "finetune"
flags = "--checkpoint {base} --data={chats}/c.jsonl"
[[stages]]
name = "score"
command = "evaluate"
flags = "--checkpoint {base}"
[[stages]]
name = "last"
command = "chat_eval"
flags = "--checkpoint {chat}"
"""


def places(out="out", gpus=0):
    return Places(Path(out).absolute(), Path("data").absolute(), gpus)


@pytest.fixture
def recipe(tmp_path):
    def recipe(text=STAGES):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return read(path)

    return recipe


@pytest.mark.parametrize("gpus", BY_GPUS)
def test_recipes_of_the_package_are_taken_by_the_parsers_of_their_commands(gpus):
    found = read(builtin(gpus))
    check(found, places(gpus=gpus))
    assert found.device == ("cuda" if gpus else "cpu")
    assert {stage.command for stage in found.stages} >= {"train", "evaluate", "finetune", "chat_eval"}


def test_recipes_are_part_of_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for pattern in patterns["nanochat_native"] for path in FOLDER.parent.glob(pattern)}
    assert {builtin(gpus) for gpus in BY_GPUS} == set(FOLDER.iterdir()) <= packaged


def test_the_example_of_the_documentation_is_a_recipe(recipe):
    text = (ROOT / "docs/speedrun.md").read_text().split("```toml\n")[1].split("```")[0]
    check(recipe(text), places())


def test_another_number_of_gpus_has_no_recipe():
    with pytest.raises(ConfigError, match="--gpus must be one of 0, 1, 8 without --recipe, got 3"):
        builtin(3)


MISTAKES = {
    "device = ": "mine.toml: Invalid value",
    STAGES.replace('device = "cpu"', ""): "mine.toml: device is needed",
    STAGES.replace('device = "cpu"', 'device = "tpu"'): "device must be cpu or cuda, got 'tpu'",
    STAGES.replace('device = "cpu"', 'device = "cpu"\nstage = 1'): "unknown key 'stage'; there are about, device",
    STAGES.replace('device = "cpu"', "device = 3"): "device must be text, got 3",
    'device = "cpu"': "stages is needed",
    'device = "cpu"\nstages = [1]': r"stages must be tables \(\[\[stages\]\]\), got 1",
    STAGES + "[samples]\nprompt = 3": "samples: unknown key 'prompt'; there are prompts, max_tokens",
    STAGES + '[samples]\nprompts = [""]': "samples: prompts must be texts that are not empty, got ''",
    STAGES + "[samples]\nmax_tokens = 0": "samples: max_tokens must be a whole number >= 1, got 0",
    STAGES + "[samples]\nmax_tokens = true": "samples: max_tokens must be a whole number, got True",
    STAGES + "seconds = -1": "stage last: seconds must be a finite number > 0, got -1",
    STAGES + "time = 1": "stage last: unknown key 'time'; there are name, command",
    STAGES.replace('"base"', '"Base"'): "stage 1: name must have small letters, digits and hyphens",
    STAGES.replace('"base"', '"logs"'): "and not be downloads or logs, got 'logs'",
    STAGES.replace('"score"', '"base"'): "stage base: there are two stages of this name",
    STAGES.replace('"evaluate"', '"evaluat"'): "stage score: command must be one of train, finetune, reinforce",
    STAGES.replace("--depth 2", "--depth '2"): "stage base: flags: No closing quotation",
    STAGES.replace("{base}", "{bse}"): "stage chat: {bse} is no earlier stage; there are base, chats, downloads",
    STAGES.replace(
        "--checkpoint {chat}", "--checkpoint {score}"
    ): "--checkpoint must be a stage that trains, got {score}",
    STAGES.replace(
        "--checkpoint {chat}", "--checkpoint={chats}"
    ): "--checkpoint must be a stage that trains, got {chats}",
    STAGES.replace("--depth 2", "--run x"): "stage base: --run is given by the speedrun; leave it out",
    STAGES.replace("--depth 2", "--out_dir=x"): "stage base: --out-dir is given by the speedrun; leave it out",
    STAGES.replace("--depth 2", "--help"): "stage base: --help is no flag of a stage",
    STAGES.replace("--depth 2", "--dry-run"): "stage base: --dry-run is no flag of a stage",
}


@pytest.mark.parametrize("text", MISTAKES, ids=list(MISTAKES.values()))
def test_mistake_in_a_recipe_is_one_line(text, recipe):
    with pytest.raises(ConfigError, match=MISTAKES[text]) as caught:
        recipe(text)
    assert "\n" not in str(caught.value)
    assert "mine.toml: " in str(caught.value)


WRONG_FLAGS = {
    STAGES.replace("--depth 2", "--dept 2"): "stage base: Unrecognized options: --dept",
    STAGES.replace("--depth 2", "--depth two"): "stage base: --depth must be a whole number, got 'two'",
    STAGES.replace("--checkpoint {base} --data={chats}/c.jsonl", ""): "stage chat: --checkpoint is needed",
    STAGES.replace('flags = "--checkpoint {chat}"', ""): "stage last: --checkpoint PATH is needed",
    STAGES.replace("{chat}", "{chat} --num-samples 0"): "stage last: --num-samples must be a whole number >= 1, got 0",
    STAGES + '[[stages]]\nname = "data"\ncommand = "download"\nflags = "--yes"': "stage data: the name of a dataset",
    STAGES
    + '[[stages]]\nname = "data"\ncommand = "download"\nflags = "gsm --yes"': "a dataset must be one of climbmix",
    STAGES + '[[stages]]\nname = "data"\ncommand = "download"\nflags = "gsm8k"': "--yes or --offline is needed",
}


@pytest.mark.parametrize("text", WRONG_FLAGS, ids=list(WRONG_FLAGS.values()))
def test_flag_that_a_command_does_not_take_is_found_before_anything_runs(text, recipe):
    with pytest.raises(ConfigError, match=WRONG_FLAGS[text]) as caught:
        check(recipe(text), places())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_file_that_cannot_be_read_is_one_line(content, tmp_path):
    path = tmp_path / "x.toml"
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.toml: No such file|x\.toml is not UTF-8"):
        read(path)


def test_command_lines_have_the_folders_of_the_stages(recipe):
    found = recipe()
    lines = {stage.name: command_line(stage, found, places()) for stage in found.stages}
    out = Path("out").absolute()
    head = [sys.executable, "-m"]
    run = ["--out-dir", str(out), "--run", "chat", "--resume", "auto", "--device", "cpu"]
    flags = ["--checkpoint", f"{out}/base", f"--data={out}/chats/c.jsonl"]
    assert lines["chat"] == [*head, "nanochat_native.finetune", *flags, *run]
    assert lines["chats"] == [*head, "nanochat_native.reinforce", "--write-chats", f"{out}/chats/c.jsonl"]
    score = ["--checkpoint", f"{out}/base", "--out", f"{out}/score", "--resume", "--device", "cpu"]
    assert lines["score"] == [*head, "nanochat_native.evaluate", *score]


def test_several_gpus_use_torchrun_where_ranks_share_the_work(recipe):
    text = STAGES.replace('"cpu"', '"cuda"')
    text += '[[stages]]\nname = "data"\ncommand = "download"\nflags = "gsm8k --yes"'
    found = recipe(text)
    modules = {stage.name: command_line(stage, found, places(gpus=8))[2] for stage in found.stages}
    ranks, one = "torch.distributed.run", "nanochat_native."
    expected = {"base": ranks, "chat": ranks, "score": ranks, "last": ranks}
    assert modules == expected | {"chats": f"{one}reinforce", "data": f"{one}download"}
    line = command_line(found.stages[0], found, places(gpus=8))
    assert line[3:8] == ["--standalone", "--nproc_per_node", "8", "-m", "nanochat_native.train"]
    assert line[8:11] == ["--", "--depth", "2"]


def test_dependents_follow_from_the_placeholders(recipe):
    found = recipe()
    assert found.dependents(["base"]) == ["base", "chat", "score", "last"]
    assert found.dependents(["chats"]) == ["chats", "chat", "last"]
    assert found.dependents(["score"]) == ["score"]


def test_estimates_are_those_of_the_announcement_of_a_run(recipe):
    text = STAGES.replace('"cpu"', '"cuda"\ngpu = "NVIDIA H100 80GB HBM3"', 1)
    text = text.replace("--depth 2", "--depth 2 --vocab-size 32768 --num-iterations 100 --total-batch-size 65536")
    found = recipe(text + "seconds = 5")
    estimates = estimate.of_stages(found, places(gpus=2))
    shape = GPTConfig.from_depth(2, vocab_size=32768, sequence_len=1024, architecture="today", window_pattern="SSSL")
    model = GPT(shape)
    flops = 100 * 65536 * model.estimate_flops()
    assert estimates["base"].seconds == pytest.approx(flops / (989e12 * 2 * 0.4))
    assert estimates["base"].disk_bytes == 12 * 2 * model.num_params() == estimates["chat"].disk_bytes
    assert (estimates["last"].seconds, estimates["last"].source) == (5, "recipe")
    assert estimates["chat"].seconds is None
    unknown = dataclasses.replace(found, gpu="another")
    assert estimate.of_stages(unknown, places(gpus=2))["base"].seconds is None


def test_checking_the_flags_makes_no_file(recipe, tmp_path):
    found = recipe()
    for stage in found.stages:
        config_of(stage, found, places(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
