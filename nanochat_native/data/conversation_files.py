"""Reads conversations from files of JSON or parquet, in the forms in which they are published, as lists of messages.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, or the list alone
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}    ShareGPT
    {"instruction": "...", "input": "...", "output": "..."}                                    Alpaca
    {"prompt": "...", "completion": "..."}
    {"text": "<|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n...<|im_end|>\\n"}, or the text alone    ChatML
    {"question": "...", "choices": ["...", "..."], "answer": 0}                                              MMLU
    {"question": "...", "answer": "... <<2*3=6>> ..."}                                                       GSM8K

The form is detected for each record, so a file may mix forms. Unknown keys are ignored. A record is a line of JSON
lines, an element of a JSON array, a value of a .json file, or a row of parquet. GSM8K's calculations become the
calculator's tokens only in parquet, the form in which it is published; in JSON they are text.
"""

from __future__ import annotations

import glob
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_native.data import conversations
from nanochat_native.data.documents import parquet_file, read_utf8
from nanochat_native.data.file_names import suffix_of
from nanochat_native.data.sources import find_source

SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"
MESSAGE_LIST_KEYS = ("messages", "conversations", "conversation")
# The keys of a question, of an addition to it, and of its answer.
QUESTION_ANSWER_KEYS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("question", None, "answer"),
    ("question", None, "response"),
)
SYSTEM_KEYS = ("system", "system_prompt")
ROLE_ALIASES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
KNOWN_FORMS = (
    "it must have messages, a list of role and content, or conversations, a list of from and value, or two texts: "
    "instruction and output, prompt and completion, prompt and response, or question and answer; or text in ChatML"
)
PLAIN_FORM = "messages, a list of role and content"  # which parse_record names ""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the choices of a question

_CHATML_START = "<|im_start|>"
_CHATML_MESSAGE = re.compile(r"\s*<\|im_start\|>([^\n<|]*)\n((?:(?!<\|im_start\|>).)*?)<\|im_end\|>\s*", re.DOTALL)
_CALCULATION = re.compile(r"<<([^>]+)>>")
_BLANK = re.compile(r"[ \t\r\n\ufeff]*")  # concatenated files have a byte order mark in the middle


class Record(NamedTuple):
    """A value of a file, and the line in which it begins."""

    line: int
    value: Any


OnBadRecord = Callable[[int, ValueError], None]  # called with the line or the row, and what is wrong with it


class ParsedRecord(NamedTuple):
    """The messages of a record, and a description of its form; "" for a list of role and content."""

    messages: Any
    form: str


def find_files(data: str | Path) -> tuple[list[Path], list[str]]:
    """Return (the files of conversations behind a file, a folder or a glob, notes about other files there).

    A folder or a glob gives its files of JSON, and those of parquet only if there are none of JSON.

    Raises FileNotFoundError if there are none, and ValueError for files that cannot hold conversations.
    """
    if not str(data):
        raise ValueError("the path of a file of conversations must not be empty")
    try:
        source = find_source(str(data))
    except FileNotFoundError:
        raise FileNotFoundError(f"{data}: no file, no folder with files and no glob that matches") from None
    if source.is_tokens:
        raise ValueError(f"{data}: conversations must be in files of JSON ({', '.join(SUFFIXES)}), got token shards")
    if len(source.files) == 1 and not Path(data).is_dir() and not glob.has_magic(str(data)):
        return list(source.files), []
    files = [path for path in source.files if suffix_of(path) in SUFFIXES]
    files = files or [path for path in source.files if suffix_of(path) == PARQUET]
    others = [path for path in source.files if path not in set(files)]
    if not files:
        raise FileNotFoundError(f"{data}: no file ends in {', '.join((*SUFFIXES, PARQUET))}; there is {others[0].name}")
    if not others:
        return files, []
    kind = "JSON" if suffix_of(files[0]) in SUFFIXES else "parquet"
    counts = f"{len(others)} of {len(source.files)} files (first: {others[0]})"
    return files, [f"not read, because not {kind}: {counts}"]


def place_of(path: Path, number: int) -> str:
    """Return the place of a record for a message: its file, and its line or its row."""
    return f"{path}, {'row' if suffix_of(path) == PARQUET else 'line'} {number}"


def read_records(path: Path, on_bad: OnBadRecord | None = None) -> Iterator[Record]:
    """Yield the values of a file: one for each line, or, in a .json file, the elements of a list or value after value,
    or the rows of a .parquet file, whose nulls are left out.

    Args:
        on_bad: called for each line that is not UTF-8 or not JSON, and each row that is not UTF-8; the others are read.
            In a .json file there is no next value to continue with.

    Raises ValueError, with file and line, for text that is not UTF-8 or not JSON, unless on_bad takes it, and
    DamagedFileError and ImportError as read_document_parts does.
    """
    if suffix_of(path) == PARQUET:
        yield from _rows(path, on_bad)
        return
    content = read_utf8(path)
    if on_bad is not None and suffix_of(path) != ".json":
        yield from _good_lines(content, on_bad)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    try:
        yield from _values(text) if suffix_of(path) == ".json" else _line_values(text)
    except _DamageError as damage:
        advice = "; UTF-16 must begin with a byte order mark" if "\0" in text else ""
        raise ValueError(f"{path}, {damage}{advice}") from None


def _good_lines(content: bytes, on_bad: OnBadRecord) -> Iterator[Record]:
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            for record in _line_values(line.decode()):
                yield Record(number, record.value)
        except UnicodeDecodeError as error:
            on_bad(number, ValueError(f"not UTF-8 ({error.reason})"))
        except _DamageError as damage:
            on_bad(number, ValueError(str(damage).partition(": ")[2]))


def _rows(path: Path, on_bad: OnBadRecord | None) -> Iterator[Record]:
    number = 0
    with parquet_file(path) as (_, file):
        for batch in file.iter_batches(batch_size=1024):
            for i in range(len(batch)):
                number += 1
                try:
                    (row,) = batch.slice(i, 1).to_pylist()
                except UnicodeDecodeError as error:
                    reason = f"not UTF-8 ({error.reason})"
                    if on_bad is None:
                        raise ValueError(f"{place_of(path, number)}: {reason}") from None
                    on_bad(number, ValueError(reason))
                    continue
                yield Record(number, _without_nulls(row))


def _without_nulls(value: Any) -> Any:
    """Return a value of parquet without the fields that a row does not have, which are null there."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


class _DamageError(Exception):
    """The problem with a file, and its line."""


def _line_values(text: str) -> Iterator[Record]:
    for number, line in enumerate(io.StringIO(text), 1):
        line = line.rstrip()
        begin = _after_blanks(line, 0)
        if begin < len(line):
            value, end = _decoded(line, begin, number)
            if _after_blanks(line, end) < len(line):
                raise _DamageError(f"line {number}: not JSON (something follows the value at column {end + 1})")
            yield Record(number, value)


def _values(text: str) -> Iterator[Record]:
    """Yield the elements of a list, or else the values of the text. A list of messages is one value."""
    at, counted, line = _after_blanks(text, 0), 0, 1
    listed = False
    if text.startswith("[", at):
        first = _after_blanks(text, at + 1)
        listed = text.startswith("]", first) or not _is_message(_decoded(text, first)[0])
        at = first if listed else at
    while at < len(text) and not (listed and text.startswith("]", at)):
        line += text.count("\n", counted, at)
        counted = at
        value, end = _decoded(text, at)
        yield Record(line, value)
        at = _after_blanks(text, end)
        if listed and text.startswith(",", at):
            at = _after_blanks(text, at + 1)
        elif listed and not text.startswith("]", at):
            raise _DamageError(f"line {line}: not JSON (neither a comma nor the end of the list follows the record)")
    if listed and at == len(text):
        raise _DamageError(f"line {line}: not JSON (the list has no end)")
    if listed and _after_blanks(text, at + 1) < len(text):
        raise _DamageError(f"line {line}: not JSON (something follows the end of the list)")


def _decoded(text: str, at: int, line: int | None = None) -> tuple[Any, int]:
    """Return the value that begins at `at`, and its end. `line` is that of the text; None counts the lines."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        number = error.lineno if line is None else line
        raise _DamageError(f"line {number}: not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        number = text.count("\n", 0, at) + 1 if line is None else line
        raise _DamageError(f"line {number}: not JSON (it is nested too deeply)") from None


def _after_blanks(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    assert blank is not None
    return blank.end()


def _integer(digits: str) -> int | float:
    """Return a float for more digits than Python converts. Only texts matter here, and a number is none."""
    most = sys.get_int_max_str_digits()
    return int(digits) if not most or len(digits) <= most else float(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)


def parse_record(record: Any, *, calculations: bool = False) -> ParsedRecord:
    """Return the messages of a record. It is not checked that they are a conversation.

    Args:
        calculations: whether <<2*3=6>> in an answer to a question is code with its output, as in GSM8K, or text.

    Raises ValueError for a record of no known form or of several, and for one with content that would be lost.
    """
    if isinstance(record, list):
        return ParsedRecord([_message(message, i) for i, message in enumerate(record)], "")
    if isinstance(record, str) and _CHATML_START in record:
        return ParsedRecord(_chatml(record), "ChatML, a text")
    if not isinstance(record, dict):
        raise ValueError(f"the record must be an object or a list; {KNOWN_FORMS}")
    if len(record) == 1 and isinstance(record.get("train"), dict):  # MMLU's auxiliary_train
        record = record["train"]
    lists = [name for name in MESSAGE_LIST_KEYS if record.get(name) is not None]
    pairs = [pair for pair in QUESTION_ANSWER_KEYS if pair[0] in record and pair[2] in record]
    if len(lists) > 1 or (not lists and len(pairs) > 1):
        found = lists or dict.fromkeys(name for question, _, answer in pairs for name in (question, answer))
        raise ValueError(f"the record has {', '.join(found)}: it must have only one of them")
    if lists:
        (name,) = lists
        if not isinstance(record[name], list):
            raise ValueError(f"{name} must be a list of messages, each an object with role and content")
        messages = [_message(message, i) for i, message in enumerate(record[name])]
        form = "" if name == "messages" else f"{name}, a list of messages"
    elif (
        pairs == [("question", None, "answer")]
        and isinstance(record.get("choices"), list)
        and not isinstance(record["answer"], str)
    ):
        messages, form = _multiple_choice(record), "question, choices and answer, as in MMLU"
    elif pairs:
        (pair,) = pairs
        messages, form = _turns(record, *pair)
        answer = record[pair[2]]
        if calculations and pair[0] == "question" and isinstance(answer, str) and _CALCULATION.search(answer):
            messages[-1]["content"] = with_calculations(answer)
            form = "question and answer with calculations, as in GSM8K"
    elif isinstance(record.get("text"), str) and _CHATML_START in record["text"]:
        messages, form = _chatml(record["text"]), "text in ChatML"
    elif "chosen" in record and "rejected" in record:
        raise ValueError("the record is a preference with chosen and rejected; give the chosen answers as messages")
    else:
        raise ValueError(f"the record has the keys {', '.join(map(repr, record)) or 'none'}; {KNOWN_FORMS}")
    return ParsedRecord(_with_system(record, messages), form)


def _chatml(text: str) -> list[Any]:
    """Return the messages of a text in ChatML. Raise ValueError for one with anything outside of its messages."""
    messages: list[Any] = []
    at = 0
    while at < len(text):
        message = _CHATML_MESSAGE.match(text, at)
        if message is None:
            raise ValueError(
                f"the text is not ChatML from character {at + 1} on: there must be <|im_start|>, a role, a line break, "
                "the content and <|im_end|>"
            )
        messages.append(_message({"role": message[1].strip(), "content": message[2]}, len(messages)))
        at = message.end()
    return messages


def _multiple_choice(record: dict[str, Any]) -> list[Any]:
    """Return a question with choices as nanochat asks it, and the letter of the right choice."""
    question, choices, answer = record["question"], record["choices"], record.get("answer")
    if not isinstance(question, str) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("question and choices must be texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices must be 2 to {len(LETTERS)} texts, got {len(choices)}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer must be the index of a choice, from 0 to {len(choices) - 1}, got {answer!r}")
    asked = choice_prompt(question, LETTERS[: len(choices)], choices)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": LETTERS[answer]}]


def choice_prompt(question: str, letters: Iterable[str], choices: Iterable[str]) -> str:
    """Return nanochat's message for a multiple-choice problem. The letter follows "=" without a space, as a token."""
    lines = [f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True)]
    return (
        f"Multiple Choice question: {question}\n{''.join(lines)}\nRespond only with the letter of the correct answer."
    )


def with_calculations(answer: str) -> list[dict[str, str]]:
    """Return an answer of GSM8K as parts: text, code, and its output."""
    parts = []
    for number, piece in enumerate(_CALCULATION.split(answer)):
        if number % 2:
            code, _, output = piece.rpartition("=") if "=" in piece else (piece, "", "")
            parts += [{"type": "python", "text": code}, {"type": "python_output", "text": output}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def with_tools(messages: Any) -> tuple[Any, bool]:
    """Return messages whose calls of the calculator, and the tool's messages behind them, are parts of the assistant's
    messages, and whether there were any.

    Raises ValueError for a call of another tool, several calls in one message, arguments other than one text, a call
    without its output, a tool's message without a call, and roles that do not take turns.
    """
    if not isinstance(messages, list):
        return messages, False
    waiting = -1  # the message whose call has no output yet
    found = is_output = False
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        is_output = message.get("role") in ("tool", "function")
        if waiting >= 0 and not is_output:
            raise ValueError(f"messages[{waiting}] calls a tool, and no message of the tool follows it")
        if is_output and waiting < 0:
            raise ValueError(f"messages[{i}] is of a tool, and no call of the {conversations.CALCULATOR} precedes it")
        waiting = -1
        if message.get("tool_calls"):
            found = True
            conversations.require_calculation(message, f"messages[{i}]")
            waiting = i
    if waiting >= 0:
        raise ValueError(f"messages[{waiting}] calls a tool, and no message of the tool follows it")
    if not found:
        return messages, False
    if is_output:
        raise ValueError("the last message must be the assistant's, got the tool's: there is no answer to train on")
    if messages[0].get("role") == "system" and messages[0].get("content") in (None, ""):
        messages = messages[1:]
    turns = conversations.as_turns(messages)
    outputs = sum(message["role"] in ("tool", "function") for message in messages)
    if len(turns) != len(messages) - 2 * outputs or any(message["role"] == "system" for message in messages[1:]):
        raise ValueError(
            "after at most one message of the system, the roles must take turns: user, assistant, perhaps the tool and "
            "again the assistant"
        )
    return turns, True


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _message(message: Any, index: int) -> Any:
    """Return the message with role and content. Raise ValueError if it has no such keys."""
    if not isinstance(message, dict):
        return message
    calls = bool(message.get("tool_calls"))
    if not (message.keys() & {"role", "from"} and (calls or message.keys() & {"content", "value"})):
        found = ", ".join(map(repr, message)) or "none"
        raise ValueError(f"messages[{index}] must have role and content, or from and value, got {found}")
    if message.get("function_call"):
        raise ValueError(
            f"messages[{index}] has function_call, which cannot be trained on; calls of the {conversations.CALCULATOR} "
            "in tool_calls can"
        )
    if message.get("weight") == 0:
        raise ValueError(
            f"messages[{index}] has weight 0, but all answers of the assistant are trained on: leave it out"
        )
    if not {"role", "content"} <= message.keys():
        message = {
            **({"tool_calls": message["tool_calls"]} if calls else {}),
            "role": message.get("role", message.get("from")),
            "content": message.get("content", message.get("value")),
        }
    role = message.get("role")
    known = ROLE_ALIASES.get(role) if isinstance(role, str) else None
    return message if known is None else {**message, "role": known}


def _turns(record: dict[str, Any], question: str, more: str | None, answer: str) -> tuple[list[Any], str]:
    """Return the messages of a question with an addition to it, and of an answer, and a description of this form."""
    if record.get("history"):
        raise ValueError("the record has a history, which is not supported; give the whole conversation as messages")
    added = record.get(more) if more else None
    if added is not None and not isinstance(added, str):
        raise ValueError(f"{more} must be a text")
    messages: list[Any] = []
    for name, role in ((question, "user"), (answer, "assistant")):
        content = record[name]
        if isinstance(content, list):
            messages += [_message(message, len(messages) + i) for i, message in enumerate(content)]
        elif isinstance(content, str):
            joined = f"{content}\n\n{added}" if added and name == question else content
            messages.append({"role": role, "content": joined})
        else:
            raise ValueError(f"{name} must be a text or a list of messages")
    with_more = f" (with {more} after a blank line)" if more else ""
    return messages, f"{question} and {answer}, a question{with_more}, and its answer"


def _with_system(record: dict[str, Any], messages: list[Any]) -> list[Any]:
    """Return the messages after the system message that another key of the record holds."""
    for name in SYSTEM_KEYS:
        system = record.get(name)
        if system is None or system == "":
            continue
        if not isinstance(system, str):
            raise ValueError(f"{name} must be a text")
        if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
            raise ValueError(f"the record has {name}, and its first message is of the system; give only one of them")
        return [{"role": "system", "content": system}, *messages]
    return messages
