"""Tasks for training by rewards: examples, and a number for each answer to one. A task is one Python file, such as

    def examples(split):
        return [{"messages": [{"role": "user", "content": "Say a word that begins with b."}]}]

    def reward(example, answer):
        return 1.0 if answer.strip().lower().startswith("b") else 0.0

`examples("train")` returns the examples to train on, and `examples("val")` those to evaluate on: a list of objects.
`messages` is a conversation (data/conversations.py) that ends with a message of the user, or with the right answer as a
message of the assistant, which the model does not see. An example may have other keys for the reward.

`reward` returns a finite number for the example and the text of an answer; true and false count as 1 and 0. In the
text a calculation of the model is `<<12 * 3=36>>` (inference/calculator.py). An answer passes, for pass@k, with a
reward of at least 1.

`arithmetic` and `spelling` are such tasks without a file, and `gsm8k` is one with a folder of data.
"""

import contextlib
import hashlib
import itertools
import json
import math
import numbers
import random
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_native.data import conversations
from nanochat_native.data.conversation_files import with_calculations
from nanochat_native.data.conversations import Message
from nanochat_native.evaluation.chat_tasks import MissingTaskError, number_of, read_problem, read_rows
from nanochat_native.runtime.errors import ConfigError

Example = Mapping[str, Any]
PASS = 1.0  # the least reward of an answer that passes
TRAIN_EXAMPLES, VAL_EXAMPLES = 512, 64  # of an embedded task
GSM8K = "gsm8k"
MODULE = "nanochat_native_task"  # the name under which the module of a file is known


class RewardTask(NamedTuple):
    """The examples of a task, and the reward of an answer.

    Attributes:
        name: the name or the path, for messages.
        reward: returns the reward of an answer, finite. Raises ConfigError, in one line, for a fault of a file.
        source_hash: SHA-256, in hex, of the file; of the name for an embedded task.
    """

    name: str
    train: Sequence[Example]
    val: Sequence[Example]
    reward: Callable[[Example, str], float]
    source_hash: str


def question_of(example: Example) -> list[Message]:
    """Return the messages that the model sees: all but the right answer."""
    messages = list(example["messages"])
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def load_task(name: str, data: Path | None = None) -> RewardTask:
    """Return the task of a name or of a Python file.

    data: the folder with the files of `gsm8k`.

    Raises ConfigError, in one line that names the file, and what chat_tasks.read_rows does.
    """
    if name == GSM8K:
        return _gsm8k(data)
    if data is not None:
        raise ConfigError(f"--task-data is for --task {GSM8K}, got --task {name}")
    if name in EMBEDDED:
        make, embedded = EMBEDDED[name]
        return RewardTask(name, list(make("train")), list(make("val")), embedded, _hash_of(name))
    path = Path(name).expanduser()
    if path.suffix != ".py":
        raise ConfigError(f"--task must be {', '.join(NAMES)} or a Python file, got {name!r}")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--task {name}: {error.strerror}") from None
    functions = _functions(name, source)

    def reward(example: Example, answer: str) -> float:
        value = _called(name, functions["reward"], example, answer)
        if isinstance(value, numbers.Real):
            with contextlib.suppress(OverflowError):
                if math.isfinite(number := float(value)):
                    return number
        raise ConfigError(f"{name}: reward must return a finite number, got {_short(value)}")

    train, val = (_examples(name, split, _called(name, functions["examples"], split)) for split in ("train", "val"))
    return RewardTask(name, train, val, reward, hashlib.sha256(source).hexdigest())


def _hash_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _gsm8k(data: Path | None) -> RewardTask:
    """Return GSM8K: its training split to train on, its test split to evaluate on, both in nanochat's order.

    The reward is nanochat's: 1 if the number behind the first "####" of the answer is the right one, else 0.
    """
    splits = []
    for split in ("train", "test"):
        try:
            rows = read_rows("GSM8K", data, "--task-data", split)
        except MissingTaskError as error:
            raise ConfigError(f"--task {GSM8K}: {error}") from None
        splits.append(
            [
                _example(row["question"], with_calculations(row["answer"]), number=problem.answer)
                for problem, row in ((read_problem("GSM8K", row, where), row) for where, row in rows)
            ]
        )
    train, val = splits
    return RewardTask(GSM8K, train, val, _number_reward, _hash_of(GSM8K))


def _number_reward(example: Example, answer: str) -> float:
    return float(number_of(answer) == example["number"])


def _functions(name: str, source: bytes) -> dict[str, Callable[..., Any]]:
    """Return the two functions of a file, which is run. No bytecode is written beside it."""
    module = types.ModuleType(MODULE)
    module.__file__ = name
    sys.modules[MODULE] = module  # where dataclasses and pickle look for it

    def run() -> None:
        exec(compile(source, name, "exec"), module.__dict__)

    _called(name, run)
    for wanted in ("examples", "reward"):
        if not callable(getattr(module, wanted, None)):
            raise ConfigError(f"{name}: it must define the functions examples(split) and reward(example, answer)")
    return {wanted: getattr(module, wanted) for wanted in ("examples", "reward")}


def _called(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args). An error becomes a ConfigError with the line of the file."""
    try:
        return function(*args)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = name if line is None else f"{name}, line {line}"
        text = error.msg if isinstance(error, SyntaxError) else str(error)
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {text}" if text else type(error).__name__)
        raise ConfigError(f"{where}: {reason}") from None


def _examples(name: str, split: str, found: Any) -> Sequence[Example]:
    """Return what examples(split) of a file returned. Raises ConfigError unless they are examples."""
    where = f"{name}: examples({split!r})"
    if not isinstance(found, list | tuple) or not found:
        raise ConfigError(f"{where} must return a list with at least one example, got {_short(found)}")
    for number, example in enumerate(found):
        if not isinstance(example, dict) or "messages" not in example:
            raise ConfigError(f"{where}[{number}] must be an object with messages, got {_short(example)}")
        try:
            conversations.check_messages(example["messages"])
            question = question_of(example)
            if not question or question[-1]["role"] != "user":
                raise ValueError("messages must have a message of the user before the answer")
            json.dumps(example)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}[{number}]: {error}") from None
    return found


def _short(value: Any) -> str:
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= 60 else f"{text[:60]}..."


def write_chats(task: RewardTask, path: Path) -> int:
    """Write the training examples that end with an answer as conversations, a line each. Return their number.

    Raises ConfigError if there is none, or if the file exists.
    """
    chats = [example["messages"] for example in task.train if example["messages"][-1]["role"] == "assistant"]
    if not chats:
        raise ConfigError(f"{task.name}: no training example ends with an answer of the assistant")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": chat}) + "\n" for chat in chats)
    except FileExistsError:
        raise ConfigError(f"--write-chats must be a new file, got {path}") from None
    return len(chats)


# --- embedded tasks ---

ASKED = ("What is {}?", "How much is {}?", "Compute {}.")
SYLLABLES = ("ba", "ke", "li", "mo", "nu", "pa", "re", "si", "to", "vu", "da", "fi", "go", "ha", "jo", "za")


def _example(question: str, answer: str | list[dict[str, str]], **more: Any) -> Example:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def _arithmetic(split: str) -> Iterator[Example]:
    """Yield questions with two numbers of up to three digits; the answers calculate (inference/calculator.py)."""
    rng = random.Random(f"arithmetic {split}")
    for _ in range(TRAIN_EXAMPLES if split == "train" else VAL_EXAMPLES):
        a, b, sign = rng.randrange(2, 1000), rng.randrange(2, 100), rng.choice("+-*")
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        parts = [("python", f"{a} {sign} {b}"), ("python_output", str(result)), ("text", str(result))]
        answer = [{"type": kind, "text": text} for kind, text in parts]
        yield _example(rng.choice(ASKED).format(f"{a} {sign} {b}"), answer, result=result)


def _arithmetic_reward(example: Example, answer: str) -> float:
    """Return 1 if the text behind the last calculation is the result, else 0.5 if the calculation has this result."""
    calculation, _, text = answer.rpartition(">>")
    result = str(example["result"])
    if text.strip() == result:
        return 1.0
    return 0.5 * (calculation.rpartition("=")[2] == result)


def _words(split: str) -> Iterator[str]:
    """Yield words of two to four syllables, without an end."""
    rng = random.Random(f"spelling {split}")
    while True:
        yield "".join(rng.choice(SYLLABLES) for _ in range(rng.randrange(2, 5)))


def _spelling(split: str) -> Iterator[Example]:
    """Yield words to spell; no word for evaluation is in the training set."""
    words = list(itertools.islice(_words("val"), VAL_EXAMPLES))
    if split == "train":
        held_out = set(words)
        words = list(itertools.islice((w for w in _words("train") if w not in held_out), TRAIN_EXAMPLES))
    for word in words:
        yield _example(f"Spell the word {word}.", "-".join(word), spelled="-".join(word))


def _spelling_reward(example: Example, answer: str) -> float:
    """Return 1 for the right spelling, else half of the share of the letters before the first wrong one."""
    right, written = (text.strip().split("-") for text in (example["spelled"], answer))
    if right == written:
        return 1.0
    wrong = next((i for i, pair in enumerate(zip(right, written, strict=False)) if pair[0] != pair[1]), None)
    return 0.5 * (min(len(right), len(written)) if wrong is None else wrong) / len(right)


EMBEDDED: dict[str, tuple[Callable[[str], Iterator[Example]], Callable[[Example, str], float]]] = {
    "arithmetic": (_arithmetic, _arithmetic_reward),
    "spelling": (_spelling, _spelling_reward),
}
NAMES = (*EMBEDDED, GSM8K)
