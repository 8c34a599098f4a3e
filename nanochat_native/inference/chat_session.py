"""A conversation with a model in the terminal."""

import contextlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat_native.data import conversations
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference.engine import Engine, beyond_training
from nanochat_native.inference.sampling import Sampling
from nanochat_native.runtime.command import check_text

HELP = """\
/new            forget the conversation, and begin another
/retry          another answer to the last message
/undo           take the last message and its answer back
/system TEXT    what the model is told before the first message; without TEXT, nothing
/save FILE      the conversation as a JSON line, which finetune takes; FILE must not be there yet
/quit           leave; so does Ctrl-D
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one, as does what lies between lines of \"\"\"."""
QUOTES = '"""'
HISTORY_LINES = 1000
# Control characters but newline and tab, which a terminal would obey.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Options:
    """Talk to a trained model. A model that was not fine-tuned on conversations only continues text."""

    checkpoint: Path
    """Run folder, as `python -m nanochat_native.train` or finetune leaves it."""
    prompt: str | None = None
    """Answer this one message, and end."""
    system: str | None = None
    """What the model is told before the first message."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    max_tokens: int = 256
    """Tokens of an answer at most."""
    temperature: float = 0.7
    """Of the softmax; 0 takes the likeliest token."""
    top_k: int | None = 50
    """Tokens to draw from, the likeliest k; None for all."""
    top_p: float | None = None
    """Tokens to draw from, the likeliest that together reach this probability; None for all."""
    min_p: float | None = None
    """Tokens to draw from, those with at least this share of the likeliest's probability; None for all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of the tokens that are already there, and multiplies negative ones; 1 for none."""
    seed: int = 0
    """Of the draws; the same seed and the same messages give the same answers."""
    device: Literal["cpu", "cuda"] | None = None
    """Default: the GPU where there is one."""


class Chat:
    """A conversation with a model: its messages, and how they are answered.

    say: told what the user should know, a line at a time.
    """

    def __init__(self, engine: Engine, options: Options, *, chat_trained: bool, say: Callable[[str], None]) -> None:
        assert engine.tokenizer is not None
        self.engine, self.options, self.chat_trained, self.say = engine, options, chat_trained, say
        self.tokenizer: Tokenizer = engine.tokenizer
        self.system, self.turns = options.system, list[dict[str, Any]]()
        self.draws = 0  # answers so far, each with a seed of its own
        self._length, self._told_length = 0, False  # tokens of the last prompt and its answer

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The system's message, where there is one, and the turns."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer to a message, piece by piece; both are then in the history, the answer as far as it came.

        Raises ValueError, and takes the message back, for one that is too long or is no text.
        """
        check_text(text, "the message")
        self.turns.append({"role": "user", "content": text})
        try:
            prompt, room = self._fitting_prompt()
        except ValueError:
            self.turns.pop()
            raise
        options = self.options
        sampling = Sampling(
            min(options.max_tokens, room),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            stop_tokens=conversations.stop_tokens(self.tokenizer) if self.chat_trained else (),
            seed=random.Random(f"{options.seed} {self.draws}").getrandbits(32),
        )
        self.draws += 1
        said: list[str] = []
        self._length = len(prompt)
        try:
            with contextlib.closing(self.engine.stream(prompt, sampling)) as pieces:
                for piece in pieces:
                    said.append(piece.text)
                    self._length += len(piece.tokens)
                    yield piece.text
        finally:
            self.turns.append({"role": "assistant", "content": "".join(said)})

    def tell_length(self) -> None:
        """Says once that what the model has read and answered is more than it was trained on."""
        if self._length > self.engine.trained_positions and not self._told_length:
            self._told_length = True
            self.say(f"note: {beyond_training(self._length, self.engine.trained_positions)}")

    def _fitting_prompt(self) -> tuple[list[int], int]:
        """The prompt, and the tokens that fit behind it; the oldest exchanges are left out where all do not fit."""
        least = min(self.options.max_tokens, self.engine.capacity // 4)
        for first in range(0, len(self.turns), 2):
            shown = [*self.messages[: len(self.messages) - len(self.turns)], *self.turns[first:]]
            prompt = conversations.prompt_of(self.tokenizer, shown, chat_trained=self.chat_trained)
            room = self.engine.capacity - len(prompt)
            if room >= least:
                if first:
                    self.say(
                        f"the conversation has outgrown the model: it no longer sees the first {first // 2} exchanges"
                    )
                return prompt, room
        raise ValueError(
            f"the message has {len(prompt)} tokens; with an answer it takes {self.engine.capacity - least}"
        )

    def undo(self) -> str | None:
        """Takes the last message and its answer back; the message, or None where there is none."""
        if not self.turns:
            return None
        message, _ = self.turns[-2:]
        del self.turns[-2:]
        return str(message["content"])

    def save(self, path: Path) -> None:
        """Writes the conversation to a new file, in one line.

        Raises FileExistsError or another OSError, and ValueError for a conversation that has not begun.
        """
        if not self.turns:
            raise ValueError("there is nothing to save yet")
        line = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        with open(path, "x", encoding="utf-8") as file:
            file.write(line)


def printable(text: str) -> str:
    """Without the control characters that a terminal would obey."""
    return _CONTROL.sub("�", text)


def read_message(read_line: Callable[[str], str]) -> str:
    """A message from one or several lines. Raises EOFError at the end of the input."""
    line = read_line("> ")
    if line.strip() == QUOTES:
        lines = []
        while (line := read_line(". ")).strip() != QUOTES:
            lines.append(line)
        return "\n".join(lines)
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = read_line(". ")
    return "\n".join([*lines, line])


class Terminal:
    """Where the user types and reads: colours and a history of lines on a terminal, plain text elsewhere."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.colours = self.interactive and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    @contextlib.contextmanager
    def history(self) -> Iterator[None]:
        """Within the block the arrow keys go through the lines of this and of earlier sessions."""
        if not self.interactive:
            yield
            return
        try:
            import readline
        except ImportError:
            yield
            return
        folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "nanochat-native"
        path = folder / "chat_history"
        readline.set_history_length(HISTORY_LINES)
        with contextlib.suppress(OSError):
            readline.read_history_file(path)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a conversation is not to fail for its history
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                path.touch(mode=0o600)
                readline.write_history_file(path)

    def read_line(self, prompt: str) -> str:
        if self.interactive:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def note(self, text: str) -> None:
        quiet = ("\x1b[2m", "\x1b[0m") if self.colours else ("", "")
        print(f"{quiet[0]}{text}{quiet[1]}", file=sys.stderr, flush=True)


def show(chat: Chat, text: str) -> None:
    """Prints the answer as it comes. Ctrl-C ends it, and it alone."""
    pieces = chat.answer(text)
    try:
        for piece in pieces:
            print(printable(piece), end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        chat.say("stopped")
    finally:
        pieces.close()
    chat.tell_length()


def obey(chat: Chat, line: str) -> bool:
    """Does what a command says. False to leave. Raises ValueError and OSError for what cannot be done."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        chat.say(HELP)
    elif name in ("/new", "/clear"):
        chat.turns.clear()
        chat.say("a new conversation")
    elif name == "/undo":
        gone = chat.undo()
        chat.say("there is nothing to take back" if gone is None else f"taken back: {printable(gone)[:60]}")
    elif name == "/retry":
        message = chat.undo()
        if message is None:
            chat.say("there is nothing to answer again")
        else:
            show(chat, message)
    elif name == "/system":
        chat.system = rest or None
        chat.say("the model is told nothing before" if not rest else "told before the first message")
    elif name == "/save":
        if not rest:
            raise ValueError("/save takes a file's name")
        chat.save(Path(rest).expanduser())
        chat.say(f"saved to {rest}")
    else:
        chat.say(f"{name} is no command; /help lists them")
    return True


def talk(chat: Chat, terminal: Terminal) -> None:
    """Reads and answers until the input ends or /quit."""
    while True:
        try:
            text = read_message(terminal.read_line)
        except KeyboardInterrupt:
            print(flush=True)
            chat.say("Ctrl-D or /quit leaves")
            continue
        except EOFError:
            if terminal.interactive:
                print(flush=True)
            return
        try:
            if terminal.interactive and text.startswith("/"):
                if not obey(chat, text):
                    return
            elif text.strip():
                show(chat, text)
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except (ValueError, OSError) as error:
            chat.say(f"error: {error}")
