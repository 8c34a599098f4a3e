"""--resume of `evaluate` and `chat_eval`: kills within a task, what is measured again, damaged files, ranks."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from backends import use
from fork_server import python
from ranks import run as run_ranks
from test_core_score import write_bundle
from test_evaluate import make_run
from tiny_run import BACKEND, wait_until

from nanochat_native import chat_eval, evaluate
from nanochat_native.data.shards import ShardWriter
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.evaluation import chat_evaluation, core_score, finished, session
from nanochat_native.evaluation.chat_score import TaskResult
from nanochat_native.evaluation.chat_tasks import Task
from nanochat_native.model.gpt import GPT
from nanochat_native.runs import checkpoint
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.files import lock_folder

CHAT_TASKS = ("SpellingBee", "SimpleSpelling")
MEASURES = ((session, "measure_text"), (core_score, "evaluate_task"), (chat_evaluation, "evaluate"))

# Runs a command in a process of its own. Each measurement that begins is written to a file, and one never ends.
PROGRAM = """
import sys, time
sys.path[:] = {path!r}
from test_finished import trace
def begun(name):
    with open({log!r}, "a") as file:
        file.write(name + "\\n")
    if name == {stop!r}:
        time.sleep(600)
trace(begun, setattr)
from nanochat_native.{command} import main
sys.exit(main())
"""


def trace(begun, replace):
    """Call begun(name) before each measurement of a text or a task."""

    def traced(original):
        def measure(*given, **more):
            tasks = [one for one in given if isinstance(one, core_score.Task | Task)]
            begun(getattr(tasks[0], "label", None) or tasks[0].name if tasks else "text")
            return original(*given, **more)

        return measure

    for module, name in MEASURES:
        replace(module, name, traced(getattr(module, name)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the run r and the CORE tasks in bundle."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder, "r", "square", 300)
    write_bundle(folder / "bundle")
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A copy of the folder for a test to change; its text stays where it was."""
    for name in ("r", "bundle"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def labels(place):
    return [task.label for task in core_score.read_bundle(place / "bundle")]


def flags_of(name, place):
    if name == "evaluate":
        return ["--checkpoint", place / "r", "--core", place / "bundle", "--device", "cpu"]
    given = ["--checkpoint", place / "r", "--max-problems", 3, "--max-new-tokens", 4, "--device", "cpu"]
    return [*given, "--tasks", *CHAT_TASKS]


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command here. Returns its exit code, its output, its errors, and the names of what was measured."""
    measured = []
    trace(measured.append, monkeypatch.setattr)

    def run(name, *flags, backend=BACKEND):
        measured.clear()
        with use(backend):
            code = {"evaluate": evaluate, "chat_eval": chat_eval}[name].main([str(flag) for flag in flags])
        out, err = capsys.readouterr()
        return code, out, err, list(measured)

    return run


def process(name, log, flags, stop=""):
    program = PROGRAM.format(path=sys.path, log=str(log), stop=stop, command=name)
    return subprocess.Popen(
        [python(), "-c", program, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NANOCHAT_NATIVE_BACKEND": BACKEND, "OMP_NUM_THREADS": "1"},
    )


def without_times(record):
    return record | {"tasks": [{**task, "seconds": 0} for task in record.get("tasks", ())]}


@pytest.mark.parametrize(
    ("name", "more", "stop"),
    [
        ("evaluate", (), 0),
        ("evaluate", (), 2),
        ("evaluate", ("--quantize", "int8"), 2),
        ("chat_eval", (), 1),
    ],
    ids=["text", "second task", "two models", "chat"],
)
def test_a_command_that_was_killed_measures_the_rest_and_has_the_same_result(place, name, more, stop):
    flags = [*flags_of(name, place), *more, "--out", place / "out", "--resume", "--json"]
    tasks = ["text", *labels(place)] if name == "evaluate" else list(CHAT_TASKS)
    everything = tasks * (2 if more else 1)
    whole = process(name, place / "whole", flags)
    expected, err = whole.communicate()
    assert (whole.returncode, (place / "whole").read_text().split("\n")[:-1]) == (0, everything), err
    result = json.loads((place / "out/result.json").read_text())
    shutil.rmtree(place / "out")

    killed = process(name, place / "killed", flags, tasks[stop])
    log = place / "killed"
    wait_until(lambda: log.exists() and log.read_text().endswith(tasks[stop] + "\n"))
    killed.kill()
    assert killed.communicate()[0] == ""
    kept = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    assert ("finished.json" in kept) == (stop > 0)
    resumed = process(name, place / "resumed", flags)
    out, err = resumed.communicate()
    assert (resumed.returncode, (place / "resumed").read_text().split("\n")[:-1]) == (0, everything[stop:]), err
    assert (f"resume   {place}/out has {stop} finished measurement" in err) == (stop > 0)
    assert "did not fit" not in err
    found = json.loads((place / "out/result.json").read_text())
    if name == "evaluate":
        assert (out, found) == (expected, result)
    else:
        assert without_times(json.loads(out)) == without_times(json.loads(expected))
        assert without_times(found) == without_times(result)
        assert found["tasks"][0] == json.loads(kept["finished.json"])["finished"][0]["result"]


@pytest.mark.parametrize("name", ["evaluate", "chat_eval"])
def test_a_command_that_is_finished_measures_nothing_again(place, command, name):
    flags = [*flags_of(name, place), "--out", place / "out", "--json"]
    code, expected, _, measured = command(name, *flags)
    assert (code, len(measured)) == (0, 7 if name == "evaluate" else 2)
    before = (place / "out/result.json").read_bytes()
    code, out, err, measured = command(name, *flags, "--resume")
    assert (code, out, measured) == (0, expected, [])
    assert (place / "out/result.json").read_bytes() == before
    assert "did not fit" not in err
    code, _, err, measured = command(name, *flags)
    assert (code, measured) == (2, [])
    assert err.endswith(f"got {place}/out with finished.json, result.json; --resume continues what is there\n")


def other_weights(place):
    """The same step with a weight that differs in one bit."""
    state, meta = checkpoint.load(place / "r/checkpoints", 5)
    weights = state["model"]
    weights["lm_head.weight"].view(torch.int32)[0, 0] ^= 1
    shutil.rmtree(checkpoint.path_of(place / "r/checkpoints", 5))
    meta = {name: meta[name] for name in ("model_config", "tokenizer_hash")}
    checkpoint.save(place / "r/checkpoints", 5, {"model": weights}, meta)


def other_task(place):
    """The first CORE task with the right choices of other items."""
    path = next(place.glob("bundle/eval_data/choices.jsonl"))
    items = [json.loads(line) for line in path.read_text().splitlines()]
    for item in items:
        item["gold"] = (item["gold"] + 1) % len(item["choices"])
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def other_baseline(place):
    path = place / "bundle/eval_meta_data.csv"
    path.write_text(path.read_text().replace("no shots,x,25", "no shots,x,24"))


def other_tokenizer(place):
    """The same step with another tokenizer of the same size."""
    state, meta = checkpoint.load(place / "r/checkpoints", 5)
    old = Tokenizer.load(place / "r/tokenizer")
    new = Tokenizer.train(["".join(f"{i} is no word, {i * i}\n" for i in range(2000))], old.vocab_size)
    assert (new.vocab_size, new.hash == old.hash) == (old.vocab_size, False)
    shutil.rmtree(place / "r/tokenizer")
    new.save(place / "r/tokenizer")
    shutil.rmtree(checkpoint.path_of(place / "r/checkpoints", 5))
    meta = {"model_config": meta["model_config"], "tokenizer_hash": new.hash}
    checkpoint.save(place / "r/checkpoints", 5, {"model": state["model"]}, meta)


def other_packing(place):
    path = place / "r/config.json"
    content = json.loads(path.read_text())
    content["config"]["packing"] = "bestfit" if content["config"]["packing"] == "stream" else "stream"
    path.write_text(json.dumps(content))


def other_versions(place):
    finished.results.versions = lambda device: {"torch": "0"}


def other_code(place):
    finished.hash_of_code = lambda: "0"


def other_settings(place):
    finished.backends.settings = lambda device: {"backend": "a third one"}


def nothing(place):
    pass


@pytest.mark.parametrize(
    ("change", "flags", "again"),
    [
        (nothing, ["--step", 3], "everything"),
        (other_weights, [], "everything"),
        (nothing, ["--device-batch-size", 3], "everything"),
        (nothing, ["--max-tokens", 200], "text"),
        (nothing, ["--split", "train"], "text"),
        (nothing, ["--data", "other.txt"], "text"),
        (nothing, ["--max-per-task", 11], "choices language long"),
        (other_task, [], "choices"),
        (other_tokenizer, [], "everything"),
        (other_packing, [], "text"),
        (other_versions, [], "everything"),
        (other_code, [], "everything"),
        (other_settings, [], "everything"),
    ],
    ids=lambda given: (
        given.__name__ if callable(given) else given[0].strip("-") if isinstance(given, list) and given else ""
    ),
)
def test_what_other_flags_models_or_data_change_is_measured_again(place, command, monkeypatch, change, flags, again):
    for module, replaced in (
        (finished.results, "versions"),
        (finished, "hash_of_code"),
        (finished.backends, "settings"),
    ):
        monkeypatch.setattr(module, replaced, getattr(module, replaced))
    monkeypatch.chdir(place)
    (place / "other.txt").write_text("".join(f"line {i} is another one of {i * 7}\n" for i in range(2000)))
    given = [*flags_of("evaluate", place), "--json"]
    assert command("evaluate", *given, "--out", place / "out")[0] == 0
    change(place)
    if flags:  # as if the command had been killed before it wrote its result
        (place / "out/result.json").unlink()
    code, out, err, measured = command("evaluate", *given, *flags, "--out", place / "out", "--resume")
    tasks = labels(place)
    assert (code, measured) == (0, ["text", *tasks] if again == "everything" else again.split())
    assert f"note: {len(measured)} finished measurement" in err
    assert out == command("evaluate", *given, *flags)[1]


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        (["--step", 3], 2),
        (["--max-problems", 2], 2),
        (["--max-new-tokens", 5], 2),
        (["--device-batch-size", 3], 2),
        (["--temperature", 1], 2),
        (["--seed", 1], 2),
        (["--dtype", "bfloat16"], 2),
        (["--quantize", "int8"], 2),
        (["--tasks", "SimpleSpelling"], 0),
    ],
    ids=lambda given: given[0].strip("-") if isinstance(given, list) else "",
)
def test_chat_tasks_with_other_flags_are_measured_again(place, command, flags, again):
    given = [*flags_of("chat_eval", place), "--json"]
    assert command("chat_eval", *given, "--out", place / "out")[0] == 0
    (place / "out/result.json").unlink()
    code, out, err, measured = command("chat_eval", *given, *flags, "--out", place / "out", "--resume")
    assert (code, len(measured)) == (0, again)
    assert "did not fit" in err
    fresh = command("chat_eval", *given, *flags)[1]
    assert without_times(json.loads(out)) == without_times(json.loads(fresh))


def test_chat_tasks_with_another_tokenizer_are_measured_again(place, command):
    given = [*flags_of("chat_eval", place), "--out", place / "out"]
    assert command("chat_eval", *given)[0] == 0
    other_tokenizer(place)
    code, _, _, measured = command("chat_eval", *given, "--resume")
    assert (code, measured) == (0, list(CHAT_TASKS))


def test_programs_that_see_other_files_run_again(place, command, monkeypatch):
    (place / "data/openai_humaneval").mkdir(parents=True)
    problem = {"prompt": "def f():\n", "test": "def check(f):\n    f()\n", "entry_point": "f"}
    (place / "data/openai_humaneval/test.jsonl").write_text(json.dumps(problem) + "\n")
    given = ["--checkpoint", place / "r", "--data", place / "data", "--max-new-tokens", 4, "--device", "cpu"]
    given += ["--tasks", "HumanEval", "SimpleSpelling", "--max-problems", 1, "--allow-code", "--out", place / "out"]
    ran = []

    def evaluate(task, *_, **__):
        ran.append(task.name)
        return TaskResult(task.name, 1, 1, 1.0, 0.0, 1.0, 1.0, 0, 1.0)

    monkeypatch.setattr(chat_evaluation, "evaluate", evaluate)
    for sees_files, expected in (
        (True, ["HumanEval", "SimpleSpelling"]),
        (False, ["HumanEval"]),
        (False, []),
    ):
        monkeypatch.setattr(chat_evaluation.sandbox, "check", lambda sees_files=sees_files: sees_files)
        assert command("chat_eval", *given, *["--resume"] * (place / "out").exists())[0] == 0
        assert ran == expected
        ran.clear()


def test_token_shards_that_validate_instead_of_others_are_measured_again(place, command):
    """The hash of the data is the same: the shards have the same order."""
    tokens = np.arange(600).reshape(2, 300) % 290
    (place / "shards").mkdir()
    for name, part in zip(("a_val", "b"), tokens, strict=True):
        writer = ShardWriter(place / "shards", name, np.dtype("<u2"))
        writer.write(part)
        writer.close()
        writer.paths[0].rename(place / f"shards/{name}.bin")
    given = [*flags_of("evaluate", place), "--data", place / "shards", "--out", place / "out"]
    assert command("evaluate", *given)[0] == 0
    (place / "shards/a_val.bin").rename(place / "shards/a.bin")
    (place / "shards/b.bin").rename(place / "shards/b_val.bin")
    code, _, _, measured = command("evaluate", *given, "--resume")
    assert (code, measured) == (0, ["text"])


def test_another_backend_measures_again(place, command):
    if BACKEND == "torch":
        pytest.skip("there is one backend")
    given = [*flags_of("evaluate", place), "--out", place / "out"]
    assert command("evaluate", *given)[0] == 0
    code, _, _, measured = command("evaluate", *given, "--resume", backend="torch")
    assert (code, len(measured)) == (0, 7)


def half(text):
    return text[: len(text) // 2]


def other_figure(text):
    record = json.loads(text)
    record["finished"][0]["result"]["bpb"] += 1e-9
    return json.dumps(record)


@pytest.mark.parametrize(
    "damage",
    [
        half,
        other_figure,
        lambda text: "",
        lambda text: text[:60],
        lambda text: text.replace("finished measurements", "other measurements"),
        lambda text: "\udcff" + text,
    ],
    ids=["half", "figure", "empty", "begin", "format", "bytes"],
)
def test_damaged_measurements_are_named_and_made_again(place, command, damage):
    flags = [*flags_of("evaluate", place), "--out", place / "out", "--json"]
    _, expected, _, _ = command("evaluate", *flags)
    path = place / "out/finished.json"
    whole = path.read_text()
    path.write_text(damage(whole), errors="surrogateescape")
    (place / "out/result.json").write_text((place / "out/result.json").read_text()[:60])
    code, out, err, measured = command("evaluate", *flags, "--resume")
    assert (code, out, len(measured)) == (0, expected, 7)
    (line,) = [line for line in err.splitlines() if str(path) in line]
    assert line.startswith(f"note: {path} is damaged, everything is measured again (")
    assert path.read_text() == whole
    assert json.loads((place / "out/result.json").read_text())["finished"]


@pytest.mark.parametrize("name", ["finished.json", "result.json"])
@pytest.mark.parametrize("content", ["[]", "{}", "half", '{"command": "evaluate"}', "\udcff"])
def test_a_file_of_another_program_is_refused_and_stays(place, command, name, content):
    (place / "out").mkdir()
    (place / "out" / name).write_text(content, errors="surrogateescape")
    code, _, err, measured = command("evaluate", *flags_of("evaluate", place), "--resume", "--out", place / "out")
    message = f"error: --out must be a new or an empty folder, or one of evaluate, got {place}/out with {name}\n"
    assert (code, err, measured) == (2, message, [])
    assert [path.name for path in (place / "out").iterdir()] == [name]
    assert (place / "out" / name).read_text(errors="surrogateescape") == content


@pytest.mark.parametrize("name", ["finished.json", "result.json"])
def test_a_file_that_cannot_be_read_is_one_line(place, command, name):
    (place / "out" / name).mkdir(parents=True)
    code, _, err, measured = command("evaluate", *flags_of("evaluate", place), "--resume", "--out", place / "out")
    assert (code, err, measured) == (2, f"error: {place}/out/{name}: Is a directory\n", [])


def test_a_folder_that_is_not_of_the_command_is_refused_and_stays_as_it_is(place, command):
    flags = [*flags_of("chat_eval", place), "--resume", "--out"]
    assert command("evaluate", *flags_of("evaluate", place), "--out", place / "score")[0] == 0
    before = {path: path.read_bytes() for path in (place / "score").iterdir()}
    code, _, err, measured = command("chat_eval", *flags, place / "score")
    message = "error: --out must be a new or an empty folder, or one of chat_eval, got "
    assert (code, err, measured) == (2, f"{message}{place}/score with finished.json, result.json\n", [])
    assert {path: path.read_bytes() for path in (place / "score").iterdir()} == before
    (place / "other").mkdir()
    for name in ("thesis.txt", ".hidden", "a", "b", "c"):
        (place / "other" / name).touch()
    code, _, err, measured = command("chat_eval", *flags, place / "other")
    assert (code, err, measured) == (2, f"{message}{place}/other with a, b, c, ...\n", [])
    code, _, err, measured = command("chat_eval", *flags, place / "other/thesis.txt")
    message = "error: --out must be a new or an empty folder, got "
    assert (code, err, measured) == (2, f"{message}{place}/other/thesis.txt\n", [])
    for name in ("evaluate", "chat_eval"):
        code, _, err, _ = command(name, *flags_of(name, place), "--resume")
        assert (code, err) == (2, "error: --resume requires --out FOLDER\n")


@pytest.mark.parametrize(
    ("name", "flags", "differing"),
    [
        ("evaluate", ["--max-tokens", 200, "--step", 3], "--step None -> 3, --max-tokens None -> 200"),
        ("evaluate", ["--core", "other"], "--core {place}/bundle -> other"),
        ("chat_eval", ["--tasks", "SimpleSpelling"], "--tasks ['SpellingBee', 'SimpleSpelling'] -> ['SimpleSpelling']"),
    ],
    ids=["evaluate", "path", "chat"],
)
def test_a_result_of_other_flags_is_not_replaced(place, command, monkeypatch, name, flags, differing):
    given = [*flags_of(name, place), "--out", place / "out"]
    monkeypatch.chdir(place)
    shutil.copytree(place / "bundle", place / "other")
    assert command(name, *given)[0] == 0
    before = {path: path.read_bytes() for path in (place / "out").iterdir()}
    code, _, err, measured = command(name, *given, *flags, "--resume")
    message = f"error: a resumed {name} must keep its flags, got {differing.format(place=place)}; "
    assert (code, err, measured) == (2, message + "start another one with another --out\n", [])
    assert {path: path.read_bytes() for path in (place / "out").iterdir()} == before
    assert command(name, *given, "--resume", "--json")[::3] == (0, [])  # which changes no figure


def test_a_folder_that_was_moved_with_its_run_is_resumed(place, command):
    assert command("evaluate", *flags_of("evaluate", place), "--out", place / "out")[0] == 0
    (place / "moved").mkdir()
    for name in ("r", "bundle", "out"):
        (place / name).rename(place / "moved" / name)
    given = [*flags_of("evaluate", place / "moved"), "--resume", "--out"]
    assert command("evaluate", *given, place / "moved/out")[::3] == (0, [])
    shutil.copytree(place / "moved/r", place / "r")
    given[1] = place / "r"
    code, _, err, _ = command("evaluate", *given, place / "moved/out")
    assert (code, f"got --checkpoint {place}/moved/r -> {place}/r;" in err) == (2, True)


def test_hidden_files_do_not_stop_a_resumed_command(place, command):
    (place / "out").mkdir()
    for name in (".DS_Store", ".nfs0000001200000001", ".finished.json.01234567.tmp.swp"):
        (place / "out" / name).write_text("x")
    given = [*flags_of("evaluate", place), "--out", place / "out"]
    code, _, err, measured = command("evaluate", *given)
    assert (code, measured) == (2, [])
    assert err.endswith(
        f"got {place}/out with .DS_Store, .finished.json.01234567.tmp.swp, .nfs0000001200000001; "
        "--resume continues what is there\n"
    )
    assert command("evaluate", *given, "--resume")[0] == 0
    assert len(list((place / "out").glob(".*"))) == 3


def test_what_a_write_left_behind_is_deleted_by_a_resumed_command(place, command):
    (place / "out").mkdir()
    for name in ("finished", "result"):
        (place / f"out/.{name}.json.01234567.tmp").write_text("half")
    given = [*flags_of("evaluate", place), "--out", place / "out"]
    code, _, err, measured = command("evaluate", *given)
    assert (code, measured) == (2, [])
    assert err.endswith(
        "with .finished.json.01234567.tmp, .result.json.01234567.tmp; --resume continues what is there\n"
    )
    assert len(list((place / "out").iterdir())) == 2
    code, _, _, measured = command("evaluate", *given, "--resume")
    assert (code, len(measured)) == (0, 7)
    assert {path.name for path in (place / "out").iterdir()} == {"finished.json", "result.json"}


@pytest.mark.parametrize("name", ["evaluate", "chat_eval"])
@pytest.mark.parametrize("resume", [False, True], ids=["new", "resume"])
def test_a_folder_is_used_by_one_command_at_a_time(place, command, name, resume):
    given = [*flags_of(name, place), "--out", place / "out"]
    if resume:
        assert command(name, *given)[0] == 0
        given.append("--resume")
    lock = lock_folder(place / "out")
    try:
        code, _, err, measured = command(name, *given)
    finally:
        os.close(lock)
    assert (code, measured) == (2, [])
    assert err == f"error: another process writes to {place}/out; give another --out\n"
    assert command(name, *given)[0] == 0


def test_the_folder_is_locked_while_a_task_is_measured(place, command, monkeypatch):
    def measure(*_, **__):
        with pytest.raises(BlockingIOError):
            lock_folder(place / "out")
        raise ValueError("it was locked")

    for module, name in MEASURES:
        monkeypatch.setattr(module, name, measure)
    for name in ("evaluate", "chat_eval"):
        code, _, err, _ = command(name, *flags_of(name, place), "--out", place / "out")
        assert (code, err.splitlines()[-1]) == (2, "error: it was locked")
        os.close(lock_folder(place / "out"))


def test_measurements_that_do_not_fit_are_noted_once(place, command):
    given = [*flags_of("evaluate", place), "--out", place / "out"]
    assert command("evaluate", *given)[0] == 0
    other_task(place)
    code, _, err, measured = command("evaluate", *given, "--resume")
    assert (code, measured) == (0, ["choices"])
    (line,) = [line for line in err.splitlines() if line.startswith("note: ")]
    assert line.startswith(f"note: 1 finished measurement in {place}/out did not fit, and was removed: ")
    kept = json.loads((place / "out/finished.json").read_text())["finished"]
    assert sorted(entry["facts"]["task"] for entry in kept) == sorted(["text", *labels(place)])
    code, _, err, measured = command("evaluate", *given, "--resume")
    assert (code, measured, "note: " in err) == (0, [], False)


def measured_on_rank(place, times, threads=(1, 1, 1)):
    use(BACKEND)
    torch.set_num_threads(threads[dist.get_rank()])
    measured = []
    trace(measured.append, setattr)
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    found = []
    for _ in range(times):
        measured.clear()
        options = session.Options(
            checkpoint=place / "r", core=place / "bundle", device="cpu", json=True, out=place / "out", resume=True
        )
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert session.run(options, world) == 0
        found.append((out.getvalue(), list(measured)))
    return found


def test_ranks_measure_nothing_again(place):
    first, second = run_ranks(2, measured_on_rank, place, 2)
    for (out, measured), (again, nothing_more) in (first, second):
        assert (out, len(measured)) == (again, 7)
        assert nothing_more == []
    assert first[0][0].startswith("{")
    assert second[0][0] == ""
    (place / "out/finished.json").unlink()
    third = run_ranks(3, measured_on_rank, place, 1)
    assert [len(measured) for ((_, measured),) in third] == [7] * 3


def test_another_machine_of_a_rank_measures_again(place):
    run_ranks(2, measured_on_rank, place, 1)
    found = run_ranks(2, measured_on_rank, place, 1, (1, 2))
    assert [len(measured) for ((_, measured),) in found] == [7, 7]


def test_another_number_of_ranks_measures_again(place, command):
    run_ranks(2, measured_on_rank, place, 1)
    code, _, err, measured = command("evaluate", *flags_of("evaluate", place), "--out", place / "out", "--resume")
    assert (code, len(measured)) == (0, 7)
    assert "note: 7 finished measurements" in err


def test_the_hash_of_a_model_has_its_weights_names_and_config(place):
    model, _, _ = load_model(place / "r", 5)
    first = finished.hash_of(model)
    assert first == finished.hash_of(load_model(place / "r", 5)[0])
    assert first != finished.hash_of(load_model(place / "r", 3)[0])
    for change in ({"window_pattern": "S"}, {"sequence_len": 32}):  # the last layer is always L: no weight changes
        other = GPT(dataclasses.replace(model.config, **change))
        other.load_state_dict(model.state_dict(), strict=False)
        assert all(map(torch.equal, other.parameters(), model.parameters()))
        assert finished.hash_of(other) != first
    attention = model.transformer.h[0].attn
    attention.c_q, attention.c_k = attention.c_k, attention.c_q
    assert finished.hash_of(model) != first
    attention.c_q, attention.c_k = attention.c_k, attention.c_q
    assert finished.hash_of(model) == first
    # The weights in the same order, with other names.
    swapped = {"c_q": "c_k", "c_k": "c_q"}
    attention._modules = {swapped.get(name, name): module for name, module in attention._modules.items()}
    assert finished.hash_of(model) != first
    assert finished.hash_of(load_model(place / "r", 5)[0].double()) != first


def test_the_hash_of_a_task_has_all_that_decides_its_score(place):
    tasks = core_score.read_bundle(place / "bundle")
    hashes = [core_score.hash_of(task) for task in tasks]
    assert len(set(hashes)) == len(tasks)
    other_baseline(place)
    other = [core_score.hash_of(task) for task in core_score.read_bundle(place / "bundle")]
    changed = [task.label for task, one, two in zip(tasks, hashes, other, strict=True) if one != two]
    assert changed == ["no shots"]
    values = {
        "label": "another",
        "kind": "another",
        "shots": tasks[0].shots + 1,
        "delimiter": tasks[0].delimiter + " ",
        "baseline": tasks[0].baseline + 1,
        "items": tasks[0].items[1:],
    }
    assert {*values, "data", "lines"} == {field.name for field in dataclasses.fields(tasks[0])}
    for name, value in values.items():
        assert core_score.hash_of(dataclasses.replace(tasks[0], **{name: value})) != hashes[0], name
    for name, value in (("data", place), ("lines", [])):  # where the items are
        assert core_score.hash_of(dataclasses.replace(tasks[0], **{name: value})) == hashes[0], name


def test_the_hash_of_the_code_has_each_python_file_and_the_native_module(tmp_path, monkeypatch):
    (tmp_path / "evaluation").mkdir()
    monkeypatch.setattr(finished, "__file__", str(tmp_path / "evaluation/finished.py"))
    monkeypatch.setattr(finished.backends, "native_file", lambda: tmp_path / "native")
    (tmp_path / "native").touch()
    hashes = []
    for name, text in (("a.py", ""), ("a.py", "1"), ("evaluation/b.py", "2"), ("native", "3")):
        (tmp_path / name).write_text(text)
        hashes.append(finished.hash_of_code.__wrapped__())
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    hashes.append(finished.hash_of_code.__wrapped__())
    monkeypatch.setattr(finished.backends, "native_file", lambda: None)
    hashes.append(finished.hash_of_code.__wrapped__())
    assert len(set(hashes)) == len(hashes)
    (tmp_path / "notes.txt").touch()
    assert finished.hash_of_code.__wrapped__() == hashes[-1]
