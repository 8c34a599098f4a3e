"""The chat in the terminal: history, commands, what no longer fits; on a pseudo-terminal with Ctrl-C; in a pipe."""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tiny_run import BACKEND, HANGS, train, wait_until, write_text

from nanochat_native import chat
from nanochat_native.data import conversations
from nanochat_native.inference import chat_session
from nanochat_native.inference.chat_session import Chat, Options, printable, read_message, run_slash_command
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import Sampling
from nanochat_native.runs import checkpoint
from nanochat_native.runs.saved_model import load_model
from nanochat_native.training import finetuning

ASK = [{"role": "user", "content": "the tensor"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, and the same weights marked as those of a chat model."""
    folder = tmp_path_factory.mktemp("chat")
    write_text(folder / "text.jsonl")
    assert train(folder, run="base", steps=6, vocab_size=300, max_seq_len=64) == 0
    tensors, meta = checkpoint.load(folder / "runs/base/checkpoints")
    shutil.copytree(folder / "runs/base/tokenizer", folder / "runs/talks/tokenizer")
    checkpoint.save(folder / "runs/talks/checkpoints", 6, tensors, meta | {conversations.CHAT_TRAINED: True})
    return folder


@pytest.fixture
def talks(folder):
    """(Chat of the chat model, what was said to the user)."""
    model, tokenizer, meta = load_model(folder / "runs/talks")
    said = []
    options = Options(folder / "runs/talks", max_tokens=12, seed=5)
    engine = Engine(model, tokenizer, slots=1, capacity=120)
    return Chat(engine, options, chat_trained=conversations.is_chat_trained(meta), say=said.append), said


def ask(talk, text):
    return "".join(talk.answer(text))


# --- the conversation ---


def test_the_model_sees_the_history_and_ends_with_its_answer(talks):
    talk, _ = talks
    prompts = []
    stream = talk.engine.stream
    talk.engine.stream = lambda prompt, sampling: prompts.append((prompt, sampling)) or stream(prompt, sampling)
    talk.system = "be kind"
    first = ask(talk, "the tensor")
    second = ask(talk, "more")
    system = {"role": "system", "content": "be kind"}
    history = [system, *ASK, {"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
    expected = conversations.prompt_of(talk.tokenizer, history, chat_trained=True)
    assert prompts[1][0] == expected
    assert talk.messages == [*history, {"role": "assistant", "content": second}]
    assert prompts[0][1].stop_tokens == conversations.stop_tokens(talk.tokenizer)
    assert prompts[0][1].seed != prompts[1][1].seed


def test_calculations_are_kept_as_code(talks, script, tmp_path):
    talk, _ = talks
    talk.options.temperature = 0
    start, end, *_ = conversations.special_ids(talk.tokenizer, conversations.CODE_TOKENS)
    (over,) = conversations.special_ids(talk.tokenizer, ["<|assistant_end|>"])
    script(talk.engine, [start, *talk.tokenizer.encode("6*7"), end, over, start, end, over])
    assert ask(talk, "how many?") == "<<6*7=42>>"
    content = [{"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"}]
    assert talk.turns[1] == {"role": "assistant", "content": content}
    assert ask(talk, "sure?") == "<<>>"
    talk.save(tmp_path / "saved.jsonl")
    (saved,) = (tmp_path / "saved.jsonl").read_text().splitlines()
    conversations.check_messages(json.loads(saved)["messages"])


def test_without_the_calculator_nothing_is_calculated(talks, script):
    talk, _ = talks
    options = dataclasses.replace(talk.options, temperature=0, calculator=False)
    talk = Chat(talk.engine, options, chat_trained=True, say=print)
    start, end, *_ = conversations.special_ids(talk.tokenizer, conversations.CODE_TOKENS)
    (over,) = conversations.special_ids(talk.tokenizer, ["<|assistant_end|>"])
    script(talk.engine, [start, *talk.tokenizer.encode("6*7"), end, over])
    assert ask(talk, "how many?") == "<|python_start|>6*7<|python_end|>"
    assert talk.turns[1]["content"] == [{"type": "python", "text": "6*7"}]


def test_the_same_seed_gives_the_same_conversation(talks):
    talk, _ = talks
    first = [ask(talk, "the tensor"), ask(talk, "more")]
    talk.turns.clear()
    talk.draws = 0
    assert [ask(talk, "the tensor"), ask(talk, "more")] == first
    talk.undo()
    again = ask(talk, "more")
    assert again != first[1], "another try draws anew"


def test_an_answer_that_is_left_is_kept_as_far_as_it_came(talks):
    talk, _ = talks
    pieces = talk.answer("the tensor")
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert talk.turns == [*ASK, {"role": "assistant", "content": begun}]
    assert talk.engine.idle


def test_what_no_longer_fits_is_left_out_from_the_oldest_on(talks):
    talk, said = talks
    for number in range(6):
        ask(talk, f"number {number}")
    assert "the model no longer sees its first" in said[-1]
    assert len(talk.turns) == 12, "the conversation itself is whole"
    with pytest.raises(
        ValueError, match=r"the message must have at most 108 tokens to leave room for an answer, got \d+"
    ):
        ask(talk, "word " * 80)
    assert len(talk.turns) == 12
    with pytest.raises(ValueError, match="lone surrogate"):
        ask(talk, "\ud800")
    assert len(talk.turns) == 12


def test_what_outgrows_the_training_is_said_once(talks, capsys):
    talk, said = talks
    trained = talk.engine.trained_positions
    while not said:
        chat_session.show(talk, "the tensor")
        last = {"role": "user", "content": "the tensor"}
        prompt = conversations.prompt_of(talk.tokenizer, [*talk.turns[:-2], last], chat_trained=True)
        at_most = len(prompt) + talk.options.max_tokens
        assert len(talk.turns) < 20
    assert at_most > trained >= len(prompt) - talk.options.max_tokens
    tokens = int(re.search(r"has (\d+) tokens", said[0]).group(1))
    assert trained < tokens <= at_most
    assert said == [
        f"note: the text has {tokens} tokens, but the model was trained on {trained}: quality drops beyond that"
    ]
    chat_session.show(talk, "the tensor")
    assert [line for line in said if "trained on" in line] == said[:1]


def test_what_is_no_text_is_one_line_and_the_chat_goes_on(folder):
    module = [sys.executable, "-m", "nanochat_native.chat", "--checkpoint", str(folder / "runs/talks")]
    env = os.environ | {"NANOCHAT_NATIVE_BACKEND": BACKEND, "PYTHONIOENCODING": "ascii"}
    text = b"b\xffad\nthe tensor\n"
    process = subprocess.run([*module, "--max-tokens", "3"], input=text, capture_output=True, env=env, timeout=60)
    assert process.returncode == 0
    error = b"error: the message must be text, got a lone surrogate or bytes that are not UTF-8\n"
    assert process.stderr == error
    assert process.stdout


def test_a_base_model_continues_the_text(folder):
    model, tokenizer, _ = load_model(folder / "runs/base")
    engine = Engine(model, tokenizer, slots=1)
    talk = Chat(engine, Options(folder, temperature=0, max_tokens=9), chat_trained=False, say=print)
    prompt = [tokenizer.bos_id, *tokenizer.encode("the tensor")]
    (expected,) = engine.generate([(prompt, Sampling(9, temperature=0))])
    assert ask(talk, "the tensor") == expected.text


# --- commands ---


def test_commands(talks, tmp_path, capsys):
    talk, said = talks
    assert run_slash_command(talk, "/undo")
    assert said[-1] == "there is nothing to undo"
    answer = ask(talk, "the tensor")
    path = tmp_path / "saved.jsonl"
    assert run_slash_command(talk, f"/save {path}")
    assert finetuning.read_conversations(path) == [[*ASK, {"role": "assistant", "content": answer}]]
    content = path.read_bytes()
    with pytest.raises(FileExistsError):
        run_slash_command(talk, f"/save {path}")
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="requires the name of a file"):
        run_slash_command(talk, "/save")
    assert run_slash_command(talk, "/retry")
    assert talk.turns[0] == ASK[0]
    assert len(talk.turns) == 2
    assert capsys.readouterr().out == printable(talk.turns[1]["content"]) + "\n"
    assert run_slash_command(talk, "/system be brief")
    assert talk.messages[0] == {"role": "system", "content": "be brief"}
    assert run_slash_command(talk, "/system")
    assert run_slash_command(talk, "/undo")
    assert said[-1] == "removed: the tensor"
    assert talk.messages == []
    with pytest.raises(ValueError, match="nothing to save"):
        run_slash_command(talk, f"/save {tmp_path / 'empty'}")
    ask(talk, "the tensor")
    assert run_slash_command(talk, "/new")
    assert talk.messages == []
    assert run_slash_command(talk, "/retry")
    assert said[-1] == "there is nothing to retry"
    assert run_slash_command(talk, "/dance")
    assert said[-1] == "unknown command /dance; /help lists the commands"
    assert run_slash_command(talk, "/help")
    for name in ("/new", "/retry", "/undo", "/system", "/save", "/quit"):
        assert name in said[-1]
    assert not run_slash_command(talk, "/quit")


def test_messages_of_several_lines():
    def lines(*texts):
        source = iter(texts)

        def read(prompt):
            with contextlib.suppress(StopIteration):
                return next(source)
            raise EOFError

        return read

    assert read_message(lines("one")) == "one"
    assert read_message(lines("one\\", "two\\", "three")) == "one\ntwo\nthree"
    assert read_message(lines('"""', "a", "", " b", '"""')) == "a\n\n b"
    for cut in ((), ("one\\",), ('"""', "a")):
        with pytest.raises(EOFError):
            read_message(lines(*cut))


def test_a_terminal_gets_no_control_characters():
    assert printable("a\tb\nc\x1b[31m\x07\r\x9b\x7f\x00d é🙂") == "a\tb\nc�[31m�����d é🙂"


# --- in a pipe ---


def test_a_pipe_is_answered_line_by_line(folder, capsys, monkeypatch):
    flags = ["--checkpoint", str(folder / "runs/base"), "--temperature", "0", "--max-tokens", "9"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the tensor\n\n/quit\n"))
    assert chat.main(flags) == 0
    captured = capsys.readouterr()
    assert "is a base model: it was not trained to chat" in captured.err
    assert "\x1b" not in captured.out + captured.err
    assert chat.main([*flags, "--prompt", "the tensor"]) == 0
    once = capsys.readouterr().out
    assert captured.out.startswith(once)
    assert len(captured.out) > len(once), "a command is a message like any other there"


def test_a_chat_model_is_not_called_a_base_model(folder, capsys):
    assert chat.main(["--checkpoint", str(folder / "runs/talks"), "--prompt", "hi", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "/nowhere"], "no such run folder"),
        (["--temperature", "-1"], "temperature must be a number >= 0, got -1"),
        (["--max-tokens", "0"], "--max-tokens must be a whole number >= 1, got 0"),
        (["--step", "99"], "holds no checkpoint of step 99, but of"),
        (["--prompt", "word " * 900], "the message must have at most 480 tokens"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(folder, flags, message, capsys):
    assert chat.main(["--checkpoint", str(folder / "runs/talks"), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


# --- on a terminal ---


class Screen:
    """The command on a pseudo-terminal."""

    def __init__(self, folder, tmp_path, *flags, run="talks", program=("-m", "nanochat_native.chat"), **environment):
        self.master, slave = pty.openpty()
        env = os.environ | {"NANOCHAT_NATIVE_BACKEND": BACKEND, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
        command = [sys.executable, *program, "--checkpoint", str(folder / "runs" / run), *flags]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env | environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.seen = ""

    def until(self, text):
        """What came until `text`, which is in it."""
        while text not in self.seen and select.select([self.master], [], [], HANGS)[0]:
            try:
                part = os.read(self.master, 65536)
            except OSError:
                break
            self.seen += part.decode(errors="replace")
        assert text in self.seen, self.seen
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def waits(self):
        """Returns when the program sleeps. input() loses a Ctrl-C that comes between its prompt and its first wait."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")

    def type(self, text):
        os.write(self.master, text.encode())

    def ends(self):
        self.type("\x04")
        return self.process.wait(HANGS)


ENDLESS = """
import sys, time
from nanochat_native import chat

def endless(engine, prompt, sampling, stream=chat.Engine.stream):
    yield from stream(engine, prompt, sampling)
    while True:
        time.sleep(1)

chat.Engine.stream = endless
sys.exit(chat.main())
"""


def test_on_a_terminal_answers_stream_and_ctrl_c_stops_them_alone(folder, tmp_path):
    flags = ("--max-tokens", "60", "--temperature", "0")
    screen = Screen(folder, tmp_path, *flags, run="base", program=("-c", ENDLESS))
    try:
        screen.until("Ctrl-D to quit")
        screen.until("> ")
        screen.type("the tensor\n")
        screen.until("the tensor")
        first = screen.until("\n") + screen.until("e")
        assert len(first) > 1
        screen.type("\x03")
        screen.until("stopped")
        screen.until("> ")
        screen.waits()
        screen.type("\x03")
        screen.until("use Ctrl-D or /quit to quit")
        screen.until("> ")
        screen.type("/help\n")
        screen.until("/save FILE")
        screen.until("> ")
        assert screen.ends() == 0
    finally:
        screen.process.kill()
    history = tmp_path / "nanochat-native" / "chat_history"
    assert "the tensor" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    second = Screen(folder, tmp_path, "--max-tokens", "2")
    try:
        second.until("> ")
        second.type("\x1b[A\x1b[A")
        second.until("the tensor")
        second.type("\x15/quit\n")
        assert second.process.wait(HANGS) == 0
    finally:
        second.process.kill()


def test_no_colour_and_a_history_that_cannot_be_kept(folder, tmp_path):
    (tmp_path / "nanochat-native").write_text("a file where the folder should be")
    screen = Screen(folder, tmp_path, "--max-tokens", "2", run="base", NO_COLOR="1")
    try:
        seen = screen.until("> ")
        assert "is a base model" in seen
        assert "\x1b[2m" not in seen
        assert screen.ends() == 0
    finally:
        screen.process.kill()
    assert Path(tmp_path / "nanochat-native").read_text().startswith("a file")
