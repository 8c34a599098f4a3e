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
from nanochat_native.model.quantization import Quantization
from nanochat_native.runtime.command import check_text

HELP = """\
/new            start a new conversation
/retry          generate another answer to the last message
/undo           remove the last message and its answer
/system TEXT    set the system prompt; without TEXT, clear it
/save FILE      save the conversation as a line of JSON for finetune; FILE must not exist
/quit           quit; Ctrl-D does the same
Ctrl-C stops an answer. A line that ends with \\ continues in the next line; \"\"\" begins and ends several lines."""
QUOTES = '"""'
HISTORY_LINES = 1000
# Control characters except newline and tab.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Options:
    """Chat with a trained model. A model that was not fine-tuned on conversations only continues text.

    The guide explains it: docs/guide/13-using-it.md.
    """

    checkpoint: Path
    """Run folder of `python -m nanochat_native.train` or finetune."""
    prompt: str | None = None
    """Answer this message and exit."""
    system: str | None = None
    """System prompt: an instruction before the first message."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    max_tokens: int = 256
    """Largest number of tokens of an answer."""
    temperature: float = 0.7
    """Temperature of the softmax; 0 takes the likeliest token."""
    top_k: int | None = 50
    """Draw from the k likeliest tokens; None for all."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probabilities reach this sum; None for all."""
    min_p: float | None = None
    """Draw from tokens with at least this fraction of the likeliest token's probability; None for all."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens that are already in the text by this, and multiply negative ones; 1 for none."""
    calculator: bool = True
    """Compute the calculations that the model writes as code, and give it the results."""
    seed: int = 0
    """Seed of the draws; the same seed and messages give the same answers."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Device to run on; default: a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights and the cache; default: float32, on a CUDA GPU 16 bits."""
    quantize: Quantization | None = None
    """int8: generate with the matrices in int8, on a CPU. `evaluate --quantize int8` measures the cost."""


class Chat:
    """A conversation with a model: its messages, and the answers to them.

    Args:
        say: Called with each note to the user.
    """

    def __init__(self, engine: Engine, options: Options, *, chat_trained: bool, say: Callable[[str], None]) -> None:
        assert engine.tokenizer is not None
        self.engine, self.options, self.chat_trained, self.say = engine, options, chat_trained, say
        self.tokenizer: Tokenizer = engine.tokenizer
        self.system, self.turns = options.system, list[dict[str, Any]]()
        self.calculates = options.calculator and chat_trained and conversations.has_code_tokens(self.tokenizer)
        self.draws = 0  # number of answers so far; each has its own seed
        self._length, self._warned_length = 0, False  # tokens of the last prompt and its answer

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The system message, if there is one, and the turns."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to a message piece by piece; add both to the history, the answer as far as it got.

        Raises ValueError for a message that is too long or is not valid text; the history then stays as it was.
        """
        check_text(text, "the message")
        self.turns.append({"role": "user", "content": text})
        try:
            prompt, max_answer = self._fitting_prompt()
        except ValueError:
            self.turns.pop()
            raise
        options = self.options
        sampling = Sampling(
            min(options.max_tokens, max_answer),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            stop_tokens=conversations.stop_tokens(self.tokenizer) if self.chat_trained else (),
            code="compute" if self.calculates else "write",
            seed=random.Random(f"{options.seed} {self.draws}").getrandbits(32),
        )
        self.draws += 1
        said: list[int] = []
        self._length = len(prompt)
        try:
            with contextlib.closing(self.engine.stream(prompt, sampling)) as pieces:
                for piece in pieces:
                    said += piece.tokens
                    self._length += len(piece.tokens)
                    yield piece.text
        finally:
            self.turns.append({"role": "assistant", "content": conversations.content_of(self.tokenizer, said)})

    def warn_of_length(self) -> None:
        """Note once that prompt and answer are longer than the sequences of the training."""
        if self._length > self.engine.trained_positions and not self._warned_length:
            self._warned_length = True
            self.say(f"note: {beyond_training(self._length, self.engine.trained_positions)}")

    def _fitting_prompt(self) -> tuple[list[int], int]:
        """Return the prompt, without the oldest exchanges if it is too long, and how many tokens fit after it."""
        least = min(self.options.max_tokens, self.engine.capacity // 4)
        for first in range(0, len(self.turns), 2):
            shown = [*self.messages[: len(self.messages) - len(self.turns)], *self.turns[first:]]
            prompt = conversations.prompt_of(self.tokenizer, shown, chat_trained=self.chat_trained)
            room = self.engine.capacity - len(prompt)
            if room >= least:
                if first:
                    self.say(f"the conversation is too long; the model no longer sees its first {first // 2} exchanges")
                return prompt, room
        limit = self.engine.capacity - least
        raise ValueError(f"the message must have at most {limit} tokens to leave room for an answer, got {len(prompt)}")

    def undo(self) -> str | None:
        """Remove the last message and its answer; return the message, or None if there is none."""
        if not self.turns:
            return None
        message, _ = self.turns[-2:]
        del self.turns[-2:]
        return str(message["content"])

    def save(self, path: Path) -> None:
        """Write the conversation to a new file, in one line.

        Raises FileExistsError or another OSError, and ValueError for an empty conversation.
        """
        if not self.turns:
            raise ValueError("there is nothing to save yet")
        line = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        with open(path, "x", encoding="utf-8") as file:
            file.write(line)


def printable(text: str) -> str:
    """Return the text with U+FFFD in place of control characters, which could control the terminal."""
    return _CONTROL.sub("�", text)


def read_message(read_line: Callable[[str], str]) -> str:
    """Read a message of one or several lines. Raises EOFError at the end of the input."""
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
    """Standard input and output: with colours and a history of lines on a terminal, otherwise plain text."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.colours = self.interactive and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    @contextlib.contextmanager
    def history(self) -> Iterator[None]:
        """Provide the lines of this and earlier sessions on the arrow keys, within the block."""
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
            with contextlib.suppress(OSError):  # the conversation must not fail because of its history
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                path.touch(mode=0o600)
                readline.write_history_file(path)

    def read_line(self, prompt: str) -> str:
        """Read a line; show the prompt only on a terminal. Raises EOFError at the end of the input."""
        if self.interactive:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def note(self, text: str) -> None:
        """Print a note to stderr, dimmed on a terminal."""
        dim = ("\x1b[2m", "\x1b[0m") if self.colours else ("", "")
        print(f"{dim[0]}{text}{dim[1]}", file=sys.stderr, flush=True)


def show(chat: Chat, text: str) -> None:
    """Print the answer as it arrives. Ctrl-C stops only the answer."""
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
    chat.warn_of_length()


def run_slash_command(chat: Chat, line: str) -> bool:
    """Run a command such as /new; return False to quit. Raises ValueError and OSError for a command that fails."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        chat.say(HELP)
    elif name in ("/new", "/clear"):
        chat.turns.clear()
        chat.say("new conversation")
    elif name == "/undo":
        removed = chat.undo()
        chat.say("there is nothing to undo" if removed is None else f"removed: {printable(removed)[:60]}")
    elif name == "/retry":
        message = chat.undo()
        if message is None:
            chat.say("there is nothing to retry")
        else:
            show(chat, message)
    elif name == "/system":
        chat.system = rest or None
        chat.say("system prompt cleared" if not rest else "system prompt set")
    elif name == "/save":
        if not rest:
            raise ValueError("/save requires the name of a file")
        chat.save(Path(rest).expanduser())
        chat.say(f"saved to {rest}")
    else:
        chat.say(f"unknown command {name}; /help lists the commands")
    return True


def repl(chat: Chat, terminal: Terminal) -> None:
    """Read messages and print answers until the input ends or /quit."""
    while True:
        try:
            text = read_message(terminal.read_line)
        except KeyboardInterrupt:
            print(flush=True)
            chat.say("use Ctrl-D or /quit to quit")
            continue
        except EOFError:
            if terminal.interactive:
                print(flush=True)
            return
        try:
            if terminal.interactive and text.startswith("/"):
                if not run_slash_command(chat, text):
                    return
            elif text.strip():
                show(chat, text)
        except BrokenPipeError:  # the reader of the answers is gone
            raise
        except (ValueError, OSError) as error:
            chat.say(f"error: {error}")
