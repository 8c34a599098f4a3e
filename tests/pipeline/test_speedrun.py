"""Speedruns of tiny models: a whole one, kills in its stages, signals, changes of the recipe, failures, the report."""

import base64
import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from fork_server import python
from tiny_run import BACKEND, records, tiny_flags, wait_until, write_text

from nanochat_native.pipeline import figures, process, report, session
from nanochat_native.pipeline.recipe import Places, Stage
from nanochat_native.pipeline.state import State
from nanochat_native.runs import checkpoint
from nanochat_native.speedrun import main

PROMPTS = ("Hello <b>|*x*\nHi", "Who?")
RUNS = ("base", "chat", "rl")
SHORT = "--sample-every 0 --keep 1"


def recipe_text(folder, *, steps=20, rl="--num-iterations 8", more=""):
    """A recipe with every command that needs no network, on the text in a folder."""
    given = [str(word) for word in tiny_flags(folder, steps=steps, max_seq_len=64)]
    for own in ("--out-dir", "--run", "--device"):
        place = given.index(own)
        del given[place : place + 2]
    stages = {
        "base": ("train", " ".join(given)),
        "score": ("evaluate", "--checkpoint {base} --max-tokens 256"),
        "chats": ("reinforce", "--task spelling --write-chats {chats}/c.jsonl"),
        "chat": ("finetune", "--checkpoint {base} --num-iterations 20 --batch-rows 2 --save-every 2 " + SHORT),
        "rl": (
            "reinforce",
            f"--checkpoint {{chat}} {rl} --examples-per-step 2 --num-samples 2 --max-new-tokens 4 --eval-examples 4 "
            f"--eval-samples 2 --save-every 2 {SHORT}",
        ),
        "last": ("chat_eval", "--checkpoint {rl} --max-problems 2 --max-new-tokens 4 --tasks SimpleSpelling"),
    }
    entries = [
        f"[[stages]]\nname = '{name}'\ncommand = '{command}'\nflags = '{flags}'\n"
        for name, (command, flags) in stages.items()
    ]
    samples = f"[samples]\nprompts = {json.dumps(PROMPTS)}\nmax_tokens = 4\n"
    return "\n".join(["about = 'A <tiny> model.'", "device = 'cpu'", samples, *entries, more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a recipe, and the speedrun `out` of it, which was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    write_text(folder / "text.jsonl")
    (folder / "r.toml").write_text(recipe_text(folder))
    result = speedrun(folder, "out", "--price", "3600")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def command(folder, out, *flags):
    """A speedrun whose stages, as itself, start at once: they run in children of the fork server."""
    program = f"import sys; sys.executable = {python()!r}; from nanochat_native.speedrun import main; sys.exit(main())"
    return [python(), "-c", program, "--recipe", f"{folder}/r.toml", "--out", f"{folder}/{out}", *flags]


def environment():
    return os.environ | {"NANOCHAT_NATIVE_BACKEND": BACKEND, "OMP_NUM_THREADS": "1"}


def speedrun(folder, out, *flags):
    return subprocess.run(command(folder, out, *flags), capture_output=True, text=True, env=environment())


def start(folder, out, *flags):
    return subprocess.Popen(
        command(folder, out, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def state(folder, out="out"):
    return json.loads((folder / out / "state.json").read_text())["stages"]


def copy(whole, tmp_path):
    """The folder of the whole speedrun, for a test to change."""
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def course(run_dir):
    """What a run's log says of its steps and validations, but for times."""
    kept = ("kind", "step", "loss", "reward", "grad_norm", "pass@1")
    return [{key: record.get(key) for key in kept} for kind in ("train", "val") for record in records(run_dir, kind)]


def started_steps(folder, stage):
    """The steps in the log of a run; 0 before it begins."""
    path = folder / "out" / stage / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


class Page(html.parser.HTMLParser):
    """The tags, the text and the pictures of a page. Each tag that is opened must be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.pictures, self.tags = [], "", [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_whole_speedrun_records_figures_and_samples_of_each_stage(whole):
    found = state(whole)
    assert list(found) == ["base", "score", "chats", "chat", "rl", "last"]
    assert {entry["status"] for entry in found.values()} == {"done"}
    assert (
        found["score"]["figures"]["scores"]["bits per byte"]
        == json.loads((whole / "out/score/result.json").read_text())["bpb"]
    )
    assert found["last"]["figures"]["scores"].keys() == {"SimpleSpelling"}
    assert {"pass@1", "pass@1 before", "mean reward"} <= found["rl"]["figures"]["scores"].keys()
    assert found["base"]["figures"]["facts"]["steps"] == 20
    assert {name for name, entry in found.items() if "samples" in entry} == set(RUNS)
    assert all(tuple(found[name]["samples"]) == PROMPTS for name in RUNS)
    assert (whole / "out/chats/c.jsonl").stat().st_size > 0
    for name in found:
        assert (whole / f"out/logs/{name}.log").read_text().startswith("$ ")


def test_report_holds_every_figure_and_needs_no_other_file(whole):
    text = (whole / "out/report.html").read_text()
    page, lines = Page(text), (whole / "out/report.md").read_text()
    assert not re.search(r"https?:|<script|<link|url\(", text)
    assert len(page.pictures) == 3
    for picture in page.pictures:
        head, data = picture.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    for name, entry in state(whole).items():
        for part in entry["figures"].values():
            for figure, value in part.items():
                assert figure in page.text
                assert figures.text(value) in page.text, (name, figure)
                assert figures.text(value) in lines
        for answer in entry.get("samples", {}).values():
            assert answer in page.text
        assert report.cost(entry["seconds"], 3600) in page.text
    assert PROMPTS[0] in page.text
    assert "A <tiny> model." in page.text
    assert "b" not in page.tags
    for what in (torch.__version__, report.commit(), "Python"):
        assert what in page.text
    assert all(line.count("|") in (0, 3, 4, 5, 6, 7, 8) for line in lines.splitlines())


def test_markup_in_a_sample_is_text_in_markdown():
    escaped = report._cell("$a$|b <i>\n`c` &amp; [x](y)")
    assert not set("|<`[]$") & set(escaped.replace("<br>", ""))
    assert escaped.count("<br>") == 1
    assert [report._cell(text) for text in ("- x", "12. x", "-1.5")] == ["&#45; x", "12&#46; x", "-1.5"]


def test_speedrun_that_is_done_does_nothing_again(whole, tmp_path):
    folder = copy(whole, tmp_path)
    before = state(folder)
    result = speedrun(folder, "out")
    assert (result.returncode, result.stderr) == (0, "")
    assert "stage " not in result.stdout
    assert state(folder) == before
    assert "cost" not in (folder / "out/report.html").read_text()


def test_speedrun_that_was_killed_in_each_stage_that_trains_has_the_same_bits(whole, tmp_path):
    write_text(tmp_path / "text.jsonl")
    (tmp_path / "r.toml").write_text((whole / "r.toml").read_text())
    for name in RUNS:
        running = start(tmp_path, "out")
        wait_until(lambda name=name: started_steps(tmp_path, name) >= 1)
        running.kill()
        running.communicate()
        lock = tmp_path / "out" / name
        wait_until(lambda lock=lock: is_free(lock))  # the stage gets SIGTERM, and ends after a checkpoint
        assert state(tmp_path)[name]["status"] == "started"
    result = speedrun(tmp_path, "out")
    assert result.returncode == 0, result.stdout + result.stderr
    found = state(tmp_path)
    for name in RUNS:
        assert found[name]["attempts"] == 2
        assert course(tmp_path / "out" / name) == course(whole / "out" / name)
        folders = [folder / "out" / name / "checkpoints" for folder in (tmp_path, whole)]
        last = max(checkpoint.steps(folders[0]))
        one, other = (checkpoint.weights_hash(folder, last) for folder in folders)
        assert one == other
    assert found["score"]["attempts"] == 1
    assert {name: entry.get("samples") for name, entry in found.items()} == {
        name: entry.get("samples") for name, entry in state(whole).items()
    }


def is_free(folder):
    """Whether no process has the lock of a run."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_stage_with_a_checkpoint_and_the_same_command_continues(number, tmp_path):
    write_text(tmp_path / "text.jsonl")
    text = recipe_text(tmp_path, steps=4000).split("[[stages]]")
    (tmp_path / "r.toml").write_text("[[stages]]".join(text[:2]))
    running = start(tmp_path, "out")
    wait_until(lambda: started_steps(tmp_path, "base") >= 2)
    running.send_signal(number)
    out, err = running.communicate()
    assert running.returncode == 128 + number, out + err
    assert err.endswith("stopped in stage base; the same command continues\n")
    assert state(tmp_path)["base"]["status"] == "started"
    saved = max(checkpoint.steps(tmp_path / "out/base/checkpoints"))
    assert 2 <= saved < 4000
    assert "This stage is not done." in Page((tmp_path / "out/report.html").read_text()).text
    running = start(tmp_path, "out")
    wait_until(lambda: started_steps(tmp_path, "base") > saved)
    running.send_signal(number)
    running.communicate()
    assert course(tmp_path / "out/base")[0]["step"] == 1, "the run was resumed, not begun again"
    running = start(tmp_path, "out", "--redo", "base")
    wait_until(lambda: state(tmp_path).get("base", {}).get("attempts") == 1 and started_steps(tmp_path, "base") >= 1)
    running.send_signal(number)
    _, err = running.communicate()
    assert err.endswith("stopped in stage base; the same command without --redo continues\n")


def test_evaluation_whose_result_was_half_written_is_finished(whole, tmp_path):
    folder = copy(whole, tmp_path)
    content = json.loads((folder / "out/state.json").read_text())
    since = time.time() - 7
    content["stages"]["score"] |= {"status": "started", "running_since": since, "seconds": 1.0}
    del content["stages"]["last"]
    shutil.rmtree(folder / "out/last")
    (folder / "out/state.json").write_text(json.dumps(content))
    os.utime(folder / "out/logs/score.log", (since + 5, since + 5))
    path = folder / "out/score/result.json"
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    result = speedrun(folder, "out")
    assert result.returncode == 0, result.stdout + result.stderr
    found = state(folder)
    assert found["score"]["figures"] == state(whole)["score"]["figures"]
    assert found["score"]["attempts"] == 2
    assert found["score"]["seconds"] > 6 - 0.01, "the attempt that was killed counts up to its last output"
    assert found["last"]["figures"] == state(whole)["last"]["figures"]


def test_killed_measurement_of_chat_tasks_continues_after_the_finished_task(whole, tmp_path):
    flags = "--checkpoint {rl} --tasks SpellingBee SimpleSpelling --max-problems 200 --max-new-tokens 48"
    more = f"[[stages]]\nname = 'more'\ncommand = 'chat_eval'\nflags = '{flags}'\n"
    folder, undisturbed = (copy(whole, tmp_path / name) for name in ("killed", "undisturbed"))
    for place in (folder, undisturbed):
        (place / "r.toml").write_text(recipe_text(whole, more=more))
    running = start(folder, "out")
    wait_until(lambda: (folder / "out/more/finished.json").exists())
    running.kill()
    running.communicate()
    log = folder / "out/logs/more.log"
    wait_until(lambda: time.time() - log.stat().st_mtime > 1)  # the stage gets SIGTERM
    assert state(folder)["more"]["status"] == "started"
    kept = json.loads((folder / "out/more/finished.json").read_text())["finished"]
    assert [entry["facts"]["task"] for entry in kept] == ["SpellingBee"]
    for place in (folder, undisturbed):
        result = speedrun(place, "out")
        assert result.returncode == 0, result.stdout + result.stderr
    assert "more has 1 finished measurement\n" in log.read_text()
    tasks = [json.loads((place / "out/more/result.json").read_text())["tasks"] for place in (folder, undisturbed)]
    assert tasks[0][0]["seconds"] == kept[0]["result"]["seconds"], "the first task was not measured again"
    for one, other in zip(*tasks, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    assert [state(folder)["more"]["attempts"], state(undisturbed)["more"]["attempts"]] == [2, 1]


def test_stage_that_fails_ends_the_speedrun_with_its_exit_code(whole, tmp_path):
    folder = copy(whole, tmp_path)
    more = "[[stages]]\nname = 'more'\ncommand = 'evaluate'\nflags = '--checkpoint {rl} --core nowhere'\n"
    more += "[[stages]]\nname = 'never'\ncommand = 'evaluate'\nflags = '--checkpoint {rl}'\n"
    (folder / "r.toml").write_text(recipe_text(whole, more=more))
    result = speedrun(folder, "out")
    assert result.returncode == 2
    place = f"{folder}/out/logs/more.log"
    assert result.stderr == (
        f"error: stage more ended with exit code 2; its output is in {place}; the same command continues\n"
    )
    assert "nowhere" in (folder / "out/logs/more.log").read_text()
    assert "never" not in state(folder)
    assert "not done" in (folder / "out/report.md").read_text()


def refused(capsys, *args):
    """The line on stderr of a speedrun that must not begin."""
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").removesuffix("\n")


def test_changed_recipe_needs_redo_which_does_the_stage_and_its_dependents_again(whole, tmp_path, capsys):
    folder = copy(whole, tmp_path)
    (folder / "r.toml").write_text(recipe_text(whole, rl="--num-iterations 3"))
    before = state(folder)
    flags = ["--recipe", folder / "r.toml", "--out", folder / "out"]
    message = refused(capsys, *flags)
    assert message.startswith(f"the recipe has other flags for what was started in {folder}/out: rl; --redo rl ")
    assert message.endswith("deletes and does again rl, last")
    assert state(folder) == before
    result = speedrun(folder, "out", "--redo", "rl")
    assert result.returncode == 0, result.stdout + result.stderr
    found = state(folder)
    assert found["rl"]["figures"]["facts"]["steps"] == 3
    assert [found[name]["ended"] == before[name]["ended"] for name in found] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("flags", [(), ("--redo", "rl")], ids=["without", "with"])
def test_redo_that_was_killed_while_it_deleted_is_finished_by_the_next_command(whole, tmp_path, flags):
    folder = copy(whole, tmp_path)
    before = state(folder)
    content = json.loads((folder / "out/state.json").read_text())
    for name in ("rl", "last"):
        content["stages"][name]["status"] = "deleted"
    (folder / "out/state.json").write_text(json.dumps(content))
    shutil.rmtree(folder / "out/rl/checkpoints/step_000008")
    result = speedrun(folder, "out", *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    found = state(folder)
    assert [found[name]["ended"] == before[name]["ended"] for name in found] == [True] * 4 + [False] * 2
    assert [found[name]["attempts"] for name in ("rl", "last")] == [1, 1]
    assert course(folder / "out/rl") == course(whole / "out/rl")


def test_hidden_files_in_a_folder_without_a_state_are_ignored(tmp_path):
    for name in (".DS_Store", ".nfs0000001200000001", ".state.json.01234567.tmp"):
        (tmp_path / name).touch()
    assert State(Places(tmp_path, tmp_path / "data", 0)).stages == {}


def test_downloads_and_what_a_link_names_are_not_deleted(tmp_path, capsys):
    places = Places(tmp_path / "out", tmp_path / "out/data", 0)
    for name in ("out/data", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    (tmp_path / "out/base").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out/state.json").write_text(json.dumps({"format": "nanochat-native speedrun", "stages": {}}))
    found = State(places)
    for stage in (Stage("data", "download"), Stage("base", "train")):
        found.begin(stage, [])
    found.forget(["data", "base"])
    assert found.stages == State(places).stages == {}
    assert (tmp_path / "out/data/file").exists()
    assert (tmp_path / "elsewhere/file").exists()
    assert not (tmp_path / "out/base").is_symlink()
    (tmp_path / "r.toml").write_text("device = 'cpu'\n[[stages]]\nname = 'base'\ncommand = 'train'\n")
    flags = ["--recipe", tmp_path / "r.toml", "--out", tmp_path / "new", "--downloads", tmp_path / "new/base/x"]
    assert refused(capsys, *flags).startswith("--downloads must not be in the folder of stage base, got ")


def test_other_samples_are_made_if_their_length_changes(whole, tmp_path):
    folder = copy(whole, tmp_path)
    (folder / "r.toml").write_text((whole / "r.toml").read_text().replace("max_tokens = 4", "max_tokens = 3"))
    result = speedrun(folder, "out")
    assert result.returncode == 0, result.stdout + result.stderr
    assert {state(folder)[name]["max_tokens"] for name in RUNS} == {3}
    assert "at most 3" in (folder / "out/report.md").read_text()


def test_stage_whose_report_failed_is_done_and_gives_3(whole, tmp_path, monkeypatch):
    folder = copy(whole, tmp_path)
    content = json.loads((folder / "out/state.json").read_text())
    del content["stages"]["last"]
    (folder / "out/state.json").write_text(json.dumps(content))
    shutil.rmtree(folder / "out/last")
    real = process.run
    monkeypatch.setattr(process, "run", lambda *args: (3, real(*args)[1]))
    assert main(["--recipe", str(folder / "r.toml"), "--out", str(folder / "out")]) == 3
    assert (state(folder)["last"]["status"], state(folder)["last"]["exit_code"]) == ("done", 3)
    assert "A report of this stage failed" in (folder / "out/report.md").read_text()


def test_a_run_is_trained_with_a_checkpoint_of_its_last_step(whole, tmp_path):
    folder = copy(whole, tmp_path)
    places = Places(folder / "out", tmp_path, 2)
    assert figures.is_trained(Stage("base", "train"), places, 0.0)
    assert not figures.is_trained(Stage("base", "train"), places, time.time() + 1)
    assert not figures.is_trained(Stage("score", "evaluate"), places, 0.0)
    assert not figures.is_trained(Stage("other", "train"), places, 0.0)
    shutil.rmtree(folder / "out/base/checkpoints/step_000020")
    assert not figures.is_trained(Stage("base", "train"), places, 0.0)


@pytest.mark.parametrize("trained", [True, False])
def test_torchruns_code_is_not_that_of_a_run_whose_report_failed(whole, tmp_path, monkeypatch, trained):
    def run(command, log, signals):
        if trained:
            shutil.copytree(whole / "out/base", tmp_path / "out/base")
            os.utime(tmp_path / "out/base/checkpoints/step_000020")
        return 1, 2.0

    monkeypatch.setattr(process, "run", run)
    monkeypatch.setattr(session.samples, "ask", lambda *args: {"answers": ["", ""], "machine": "none"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = recipe_text(whole).split("[[stages]]")
    (tmp_path / "r.toml").write_text("[[stages]]".join(text[:2]).replace("device = 'cpu'", "device = 'cuda'"))
    flags = ["--recipe", tmp_path / "r.toml", "--out", tmp_path / "out", "--gpus", 2]
    assert main([str(flag) for flag in flags]) == (3 if trained else 1)
    assert state(tmp_path)["base"]["status"] == ("done" if trained else "started")


def test_scores_in_the_course_of_a_run_are_in_the_report(tmp_path):
    lines = [{"kind": kind, "step": step, "score": step / 8} for step in (1, 2) for kind in ("core", "chat")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = figures.of_run(tmp_path)["scores"]
    assert scores == {"CORE": 0.25, "mean of chat tasks, centered": 0.25}


@pytest.mark.parametrize(("first", "before"), [(0, {"pass@1 before": 0.125, "mean reward before": 0.25}), (4, {})])
def test_figures_before_the_rewards_are_those_of_step_0(tmp_path, first, before):
    lines = [{"kind": "val", "step": first, "pass@1": 0.125, "reward": 0.25}]
    lines.append({"kind": "val", "step": 8, "pass@1": 0.5, "reward": 0.75})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figures.of_run(tmp_path)["scores"] == before | {"pass@1": 0.5, "mean reward": 0.75}


def test_a_full_disk_does_not_end_a_stage(capsys):
    assert process.run([python(), "-c", "print('shown')"], Path("/dev/full"), process.Signals())[0] == 0
    assert "shown" in capsys.readouterr().out


def test_a_stage_ends_though_a_lost_child_holds_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "PIPE_SECONDS", 0.1)
    begun = time.monotonic()
    code, _ = process.run(["sh", "-c", "sleep 60 & echo $!; exit 7"], tmp_path / "log", process.Signals())
    assert (code, time.monotonic() - begun < 30) == (7, True)
    os.kill(int((tmp_path / "log").read_text().split()[-1]), signal.SIGKILL)


def test_folder_that_cannot_be_used_is_one_line_and_stays_as_it_is(whole, tmp_path, capsys):
    folder = copy(whole, tmp_path)
    flags = ["--recipe", folder / "r.toml", "--out"]
    (folder / "foreign").mkdir()
    (folder / "foreign/x").touch()
    message = refused(capsys, *flags, folder / "foreign")
    assert message == f"--out must be a new or an empty folder, or that of a speedrun, got {folder}/foreign with x"
    assert f"--out {folder}/r.toml cannot be made (File exists)" in refused(capsys, *flags, folder / "r.toml")
    shutil.rmtree(folder / "out/chat")
    assert f"{folder}/out/chat is gone; --redo chat makes it again" == refused(capsys, *flags, folder / "out")
    content = json.loads((folder / "out/state.json").read_text())
    del content["stages"]["base"]
    (folder / "out/state.json").write_text(json.dumps(content))
    assert f"{folder}/out/base exists, but this speedrun did not make it" in refused(capsys, *flags, folder / "out")
    for damaged in ("{", "[]", '{"format": "x"}', json.dumps({**content, "stages": {"base": {}}})):
        (folder / "out/state.json").write_text(damaged)
        assert "state.json is damaged" in refused(capsys, *flags, folder / "out")
        assert (folder / "out/state.json").read_text() == damaged
    assert (folder / "out/base/checkpoints").is_dir()


def test_folder_belongs_to_one_speedrun_at_a_time(whole, tmp_path, capsys):
    import fcntl

    folder = copy(whole, tmp_path)
    descriptor = os.open(folder / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        message = refused(capsys, "--recipe", folder / "r.toml", "--out", folder / "out")
    finally:
        os.close(descriptor)
    assert message == f"another speedrun is running in {folder}/out"


def test_wrong_values_are_one_line_and_make_nothing(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--recipe", whole / "r.toml", "--out", tmp_path / "out"]
    assert refused(capsys, "--gpus", -1) == "--gpus must be a whole number >= 0, got -1"
    assert refused(capsys, *flags, "--price", -1) == "--price must be a finite number >= 0, got -1.0"
    assert refused(capsys, *flags, "--price", "inf") == "--price must be a finite number >= 0, got inf"
    assert "--redo must be a stage of the recipe (base, score" in refused(capsys, *flags, "--redo", "bas")
    assert "--gpus must be 0 for the recipe r, whose device is cpu, got 1" in refused(capsys, *flags, "--gpus", 1)
    (tmp_path / "gpu.toml").write_text(
        "device = 'cuda'\n[[stages]]\nname = 'a'\ncommand = 'train'\nflags = '--data {downloads}/x'\n"
    )
    gpu = ["--recipe", tmp_path / "gpu.toml", "--out", tmp_path / "out"]
    assert "--gpus must be a number >= 1 for the recipe gpu" in refused(capsys, *gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert refused(capsys, *gpu, "--gpus", 2) == "--gpus must be at most 0, which torch sees, got 2"
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.toml"]


def test_dry_run_prints_the_plan_and_makes_nothing(whole, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert main(["--recipe", str(whole / "r.toml"), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    assert re.search(r"base +train +to do +about \d+ s +about 0\.\d GB +up to 0\.\d\d GB\n", out)
    assert re.search(r"chat +finetune +to do +not estimated +not estimated +up to", out)
    assert "note     not estimated, and not in these sums: time or disk of score, chats, chat, rl, last\n" in out
    assert f"python -m nanochat_native.evaluate --checkpoint {tmp_path}/out/base --max-tokens 256" in out
    assert main(["--recipe", str(whole / "r.toml"), "--out", str(whole / "out"), "--dry-run", "--redo", "rl"]) == 0
    out = capsys.readouterr().out
    states = re.findall(r"^(\w+) +\w+ +(done|begun|to do) ", out, re.MULTILINE)
    assert states == [(name, "to do" if name in ("rl", "last") else "done") for name in state(whole)]


def test_output_that_cannot_be_written_does_not_end_the_speedrun(whole, tmp_path):
    folder = copy(whole, tmp_path)
    content = json.loads((folder / "out/state.json").read_text())
    del content["stages"]["last"]
    (folder / "out/state.json").write_text(json.dumps(content))
    shutil.rmtree(folder / "out/last")
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command(folder, "out"), stdout=full, stderr=subprocess.PIPE, text=True, env=environment()
        )
    assert result.returncode == 3
    assert state(folder)["last"]["status"] == "done"


def test_report_that_cannot_be_written_ends_with_3(whole, tmp_path):
    folder = copy(whole, tmp_path)
    (folder / "out/report.md").unlink()
    (folder / "out/report.md").mkdir()
    result = speedrun(folder, "out")
    assert result.returncode == 3
    assert "warning: report card failed" in result.stdout


def test_only_linux_ends_a_stage_with_its_speedrun(monkeypatch):
    assert callable(process.dies_with_parent())
    monkeypatch.setattr(process.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(process.ctypes, "CDLL", None)
    assert process.dies_with_parent() is None
