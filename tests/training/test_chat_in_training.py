"""Chat tasks while a model is fine-tuned: the same figures as chat_eval's, without an effect on the run."""

import json
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run as run_ranks
from test_finetune import base, config_of, flags, run  # noqa: F401  # base is a fixture
from tiny_run import assert_refused, losses, records

from nanochat_native import chat_eval, finetune, reinforce
from nanochat_native.evaluation import chat_score
from nanochat_native.runs import checkpoint, loggers, pictures, run_folder
from nanochat_native.runs.config import FinetuneConfig, parse
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.isolation import EXIT_CODE
from nanochat_native.training import finetuning
from nanochat_native.training.scores import Chat

CHAT = {"chat_every": 3, "chat_max_problems": 4}
TASKS = ["--chat-tasks", "ARC-Easy", "SimpleSpelling"]


@pytest.fixture(scope="module")
def folder(base):  # noqa: F811
    """Return a folder with a base model, a task, "plain": a run without tasks, and "whole": the same run with them."""
    (base / "tasks/ARC-Easy").mkdir(parents=True)
    rows = [
        {"question": f"what is {i}?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "AB"[i % 2]}
        for i in range(9)
    ]
    (base / "tasks/ARC-Easy/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(base, "plain") == 0
    assert measuring(base, "whole") == 0
    return base


def measuring(folder, name, tasks=TASKS, **changes):
    """Return the exit code of a run that measures tasks."""
    torch.set_num_threads(1)
    return finetune.main([*flags(folder, name, **{"chat_data": folder / "tasks", **CHAT, **changes}), *tasks])


def scores(folder, name):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records(folder / "runs" / name, "chat")]


def measured(folder, name, step, capsys):
    """Return what chat_eval finds for a checkpoint of a run, in the form of a record."""
    args = ["--checkpoint", folder / "runs" / name, "--step", step, "--data", folder / "tasks", "--json"]
    args += ["--tasks", *TASKS[1:], "--max-problems", 4, "--device", "cpu", "--device-batch-size", 3]
    capsys.readouterr()
    assert chat_eval.main([str(arg) for arg in args]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    accuracies = {f"accuracy/{task['task']}": task["accuracy"] for task in tasks}
    score = sum(task["centred"] for task in tasks) / len(tasks)
    return {"kind": "chat", "step": step, "score": score, "problems": 8} | accuracies


def assert_same_weights(one, other):
    assert losses(one) == losses(other)
    (tensors, _), (expected, _) = checkpoint.load(one / "checkpoints"), checkpoint.load(other / "checkpoints")
    assert all(torch.equal(tensors["model"][name], expected["model"][name]) for name in expected["model"])


def test_fine_tuning_has_the_same_bits_with_and_without_tasks(folder):
    assert_same_weights(folder / "runs/whole", folder / "runs/plain")


def test_tasks_are_measured_at_their_steps_and_equal_the_command(folder, capsys):
    assert scores(folder, "whole") == [measured(folder, "whole", step, capsys) for step in (3, 6)]


def test_a_run_that_is_resumed_measures_what_is_missing(folder):
    assert measuring(folder, "stopped", num_iterations=3) == 0
    log = folder / "runs/stopped/metrics.jsonl"
    kept = [line for line in log.read_text().splitlines(keepends=True) if '"kind": "chat"' not in line]
    log.write_text("".join(kept))
    assert finetune.main(["--resume", str(folder / "runs/stopped"), "--num-iterations", "6"]) == 0
    assert [record["step"] for record in scores(folder, "stopped")] == [3, 6]
    config = run_folder.load_config(folder / "runs/stopped")
    assert (config.chat_tasks, config.chat_data) == (("ARC-Easy", "SimpleSpelling"), folder / "tasks")


def test_a_run_is_resumed_without_tasks(folder):
    assert measuring(folder, "without", num_iterations=3) == 0
    args = ["--resume", str(folder / "runs/without"), "--num-iterations", "6", "--chat-tasks"]
    assert finetune.main(args) == 0
    assert [record["step"] for record in scores(folder, "without")] == [3]
    assert run_folder.load_config(folder / "runs/without").chat_data is None


def test_training_by_rewards_measures_tasks_too(folder):
    args = ["--checkpoint", folder / "runs/plain", "--out-dir", folder / "runs", "--run", "rl", "--device", "cpu"]
    args += ["--num-iterations", 1, "--examples-per-step", 1, "--num-samples", 2, "--max-new-tokens", 4]
    args += ["--eval-examples", 1, "--chat-tasks", "SimpleSpelling", "--chat-max-problems", 2]
    assert reinforce.main([str(arg) for arg in args]) == 0
    assert [(record["step"], record["problems"]) for record in scores(folder, "rl")] == [(1, 2)]


def test_the_defaults_are_those_of_nanochat(folder):
    config = finetuning.resolve_finetuning(parse([*flags(folder), "--chat-tasks", "SpellingBee"], kind=FinetuneConfig))
    assert config.chat_every == 200
    assert (config_of(folder).chat_every, config_of(folder).chat_max_problems) == (-1, -1)


@pytest.mark.parametrize(
    ("given", "counts"),
    [([], (40, 24)), (["--chat-max-problems", "3"], (3, 3)), (["--chat-max-problems", "0"], (40, 174))],
)
def test_all_choices_and_24_written_answers_are_measured_by_default(tmp_path, given, counts):
    (tmp_path / "ARC-Easy").mkdir()
    row = {"question": "which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    (tmp_path / "ARC-Easy/test.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    args = ["--chat-tasks", "ARC-Easy", "SimpleSpelling", "--chat-data", str(tmp_path), *given]
    chat = Chat(parse(args, kind=FinetuneConfig))
    assert tuple(len(task.problems) for task in chat._tasks) == counts


@pytest.mark.parametrize(
    ("tasks", "changes", "message"),
    [
        ([], {}, "--chat-every needs --chat-tasks NAMES"),
        ([], dict.fromkeys(CHAT), "--chat-data needs --chat-tasks NAMES"),
        (["--chat-tasks", "Nothing"], {}, "--chat-tasks must be among ARC-Easy, ARC-Challenge, MMLU"),
        (["--chat-tasks", "HumanEval"], {}, "SimpleSpelling, got HumanEval"),
        (["--chat-tasks", "GSM8K"], {}, "--chat-tasks: "),
        (["--chat-tasks", "GSM8K"], {"chat_data": None}, "--chat-data FOLDER must name the folder of its files"),
        (["--chat-tasks", "GSM8K"], {"chat_data": "nowhere"}, "--chat-data must be a folder, got "),
        (["--chat-tasks", "SpellingBee"], {}, "--chat-data is for tasks with files"),
        (TASKS, {"chat_every": -2}, "--chat-every must be a whole number >= 0, got -2"),
    ],
)
def test_a_mistake_is_one_line_before_training(folder, capsys, tasks, changes, message):
    code = measuring(folder, "mistake", tasks, **changes)
    assert_refused(capsys, folder / "runs/mistake", code, message)


def test_tasks_that_fail_do_not_end_training(folder, monkeypatch, capsys):
    def failing(*args, **kwargs):
        raise RuntimeError("it broke")

    monkeypatch.setattr(chat_score, "evaluate", failing)
    assert measuring(folder, "failing") == EXIT_CODE
    captured = capsys.readouterr()
    assert "warning: Chat failed (RuntimeError: it broke); the run continues\n" in captured.out
    assert_same_weights(folder / "runs/failing", folder / "runs/plain")


def test_the_score_is_in_the_summary_and_the_picture(folder, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure) or path)
    assert measuring(folder, "shown", json=True) == 0
    found = scores(folder, "shown")
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["chat"] == found[-1]["score"]
    left, right = figures[0].axes
    (line,) = right.lines
    assert list(line.get_ydata()) == [record["score"] for record in found]
    assert right.get_ylabel() == "score: chat tasks"
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["train", "val", "chat tasks"]


def on_a_rank(folder, name, prepare):
    rank, background, waiting = dist.get_rank(), dist.new_group(), dist.new_group()
    world = World(rank, dist.get_world_size(), rank, dist.group.WORLD, background, waiting)
    prepare(rank)
    args = [*flags(folder, name, chat_data=folder / "tasks", **CHAT), *TASKS]
    config = finetuning.resolve_finetuning(parse(args, kind=FinetuneConfig))
    made = finetuning.make_trainer(config, SilentConsole(), world)
    return made.train(), made.last_scores.get("Chat")


def save_slowly_on_rank_1(rank):
    writer = checkpoint.dcp.HuggingFaceStorageWriter
    real = writer.write_data
    if rank == 1:
        writer.write_data = lambda *args, **named: time.sleep(2) or real(*args, **named)


def fail_on_rank_1(rank):
    def failing(*args, **named):
        raise MemoryError("no memory")

    if rank == 1:
        chat_score.engine_for = failing


def lack_a_logger_on_rank_0(rank):
    def lacking(config):
        assert rank == 0
        raise ConfigError("--wandb needs a package")

    loggers.require_packages = lacking


@pytest.mark.slow
def test_two_ranks_have_the_figures_of_the_command_while_a_checkpoint_is_written(folder, capsys):
    found = run_ranks(2, on_a_rank, folder, "ranks", save_slowly_on_rank_1)
    record = scores(folder, "ranks")[-1]
    assert record == measured(folder, "ranks", 6, capsys)
    assert found == [(0, record["score"])] * 2


@pytest.mark.slow
def test_tasks_that_fail_on_one_rank_do_not_end_training(folder):
    found = run_ranks(2, on_a_rank, folder, "one-fails", fail_on_rank_1)
    assert found == [(0, None)] * 2
    assert scores(folder, "one-fails") == []


@pytest.mark.slow
def test_a_package_that_is_missing_ends_all_ranks(folder):
    with pytest.raises(Exception, match="rank 0: --wandb needs a package"):
        run_ranks(2, on_a_rank, folder, "lacking", lack_a_logger_on_rank_0)
