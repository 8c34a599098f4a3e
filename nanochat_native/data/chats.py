"""Conversations in files of JSON, in the forms in which they are published, as lists of messages.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, or the list alone
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}    ShareGPT
    {"instruction": "...", "input": "...", "output": "..."}                                    Alpaca
    {"prompt": "...", "completion": "..."}

Every record is looked at for itself: a file may hold several forms. Keys that no form has are not looked at.
"""

from __future__ import annotations

import glob
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_native.data.documents import read_utf8
from nanochat_native.data.names import suffix_of
from nanochat_native.data.sources import find_source

SUFFIXES = (".jsonl", ".ndjson", ".json")
LISTS = ("messages", "conversations", "conversation")
# The keys of a question, of what is added to it, and of its answer.
PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("question", None, "answer"),
    ("question", None, "response"),
)
SYSTEMS = ("system", "system_prompt")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
TAKEN = (
    "it takes messages, a list of role and content, or conversations, a list of from and value, or two texts: "
    "instruction and output, prompt and completion, prompt and response, question and answer"
)

_BLANK = re.compile(r"[ \t\r\n\ufeff]*")  # files that were put together have a byte order mark in their middle


class Record(NamedTuple):
    """A value of a file, and the line that it begins in."""

    line: int
    value: Any


class Chat(NamedTuple):
    """form: how the record holds it, in words; "" for a list of role and content, which is as it was."""

    messages: Any
    form: str


def find_files(data: str | Path) -> tuple[list[Path], list[str]]:
    """(the files of conversations behind a file, a folder or a glob, notes about others there).

    Raises FileNotFoundError where there are none, and ValueError for files that hold no conversations.
    """
    if not str(data):
        raise ValueError("the name of a file of conversations is empty")
    try:
        source = find_source(str(data))
    except FileNotFoundError:
        raise FileNotFoundError(f"{data}: no file, no folder with files and no glob that matches") from None
    if source.is_tokens:
        raise ValueError(f"{data} holds token shards; conversations are files of JSON, {', '.join(SUFFIXES)}")
    if len(source.files) == 1 and not Path(data).is_dir() and not glob.has_magic(str(data)):
        if suffix_of(source.files[0]) == ".parquet":
            raise ValueError(f"{data}: conversations are read from JSON; write each row of it as a line of .jsonl")
        return list(source.files), []
    files = [path for path in source.files if suffix_of(path) in SUFFIXES]
    others = [path for path in source.files if path not in set(files)]
    if not files:
        raise FileNotFoundError(f"{data}: no file that ends in {', '.join(SUFFIXES)}, but {others[0].name}")
    return files, [
        f"not read, as no JSON: {len(others)} of {len(source.files)} files (first: {others[0]})"
    ] if others else []


def read_records(path: Path) -> Iterator[Record]:
    """The values of a file: one a line, or, where the name ends in .json, the elements of a list or one after another.

    Raises ValueError, naming file and line, for what is not UTF-8 or not JSON; DamagedFileError and ImportError as
    read_pieces does.
    """
    content = read_utf8(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    try:
        yield from _values(text) if suffix_of(path) == ".json" else _line_values(text)
    except _DamageError as damage:
        advice = "; UTF-16 is read where the file begins with a byte order mark" if "\0" in text else ""
        raise ValueError(f"{path}, {damage}{advice}") from None


class _DamageError(Exception):
    """What is wrong with a file, and in which line."""


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
    """The elements of the list, unless that is a list of messages itself, or the values one after the other."""
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
    """The value that begins at a place in the text, and where it ends. line: of the text; None for its first."""
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
    """Of more digits than Python converts as a float: no number is text, which is all that counts here."""
    most = sys.get_int_max_str_digits()
    return int(digits) if not most or len(digits) <= most else float(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)


def chat_of(record: Any) -> Chat:
    """The messages of a record; whether they are a conversation is not looked at.

    Raises ValueError for a record of no known form, of several, or with something in it that would be lost.
    """
    if isinstance(record, list):
        return Chat([_message(message, i) for i, message in enumerate(record)], "")
    if not isinstance(record, dict):
        raise ValueError(f"the record is no object and no list; {TAKEN}")
    lists = [name for name in LISTS if record.get(name) is not None]
    pairs = [pair for pair in PAIRS if pair[0] in record and pair[2] in record]
    if len(lists) > 1 or (not lists and len(pairs) > 1):
        found = lists or dict.fromkeys(name for question, _, answer in pairs for name in (question, answer))
        raise ValueError(f"the record has {', '.join(found)}: it is not clear which of them is the conversation")
    if lists:
        (name,) = lists
        if not isinstance(record[name], list):
            raise ValueError(f"{name} takes a list of messages, each an object with role and content")
        messages = [_message(message, i) for i, message in enumerate(record[name])]
        form = "" if name == "messages" else f"{name}, a list of messages"
    elif pairs:
        (pair,) = pairs
        messages, form = _turns(record, *pair)
    elif "chosen" in record and "rejected" in record:
        raise ValueError("the record is a preference, chosen and rejected; give the chosen answers as messages")
    else:
        raise ValueError(f"the record has the keys {', '.join(map(repr, record)) or 'none'}; {TAKEN}")
    return Chat(_with_system(record, messages), form)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _message(message: Any, index: int) -> Any:
    """The message with role and content, as it is where it has them. Raises ValueError where it has no such keys."""
    if not isinstance(message, dict):
        return message
    if not (message.keys() & {"role", "from"} and message.keys() & {"content", "value"}):
        found = ", ".join(map(repr, message)) or "none"
        raise ValueError(f"messages[{index}] has the keys {found}; a message has role and content, or from and value")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ValueError(f"messages[{index}] has {name}, which cannot be learnt: leave the conversation out")
    if message.get("weight") == 0:
        raise ValueError(f"messages[{index}] has weight 0; every answer of the assistant is learnt: leave it out")
    if not {"role", "content"} <= message.keys():
        message = {
            "role": message.get("role", message.get("from")),
            "content": message.get("content", message.get("value")),
        }
    role = message.get("role")
    known = ROLES.get(role) if isinstance(role, str) else None
    return message if known is None else {**message, "role": known}


def _turns(record: dict[str, Any], question: str, more: str | None, answer: str) -> tuple[list[Any], str]:
    """A question with what is added to it, and an answer; either may be a list of messages instead."""
    if record.get("history"):
        raise ValueError("the record has a history, which is not read; give the whole conversation as messages")
    added = record.get(more) if more else None
    if added is not None and not isinstance(added, str):
        raise ValueError(f"{more} takes a text")
    messages: list[Any] = []
    for name, role in ((question, "user"), (answer, "assistant")):
        content = record[name]
        if isinstance(content, list):
            messages += [_message(message, len(messages) + i) for i, message in enumerate(content)]
        elif isinstance(content, str):
            joined = f"{content}\n\n{added}" if added and name == question else content
            messages.append({"role": role, "content": joined})
        else:
            raise ValueError(f"{name} takes a text, or a list of messages")
    with_more = f" (with {more} after a blank line)" if more else ""
    return messages, f"{question} and {answer}, a question{with_more}, and its answer"


def _with_system(record: dict[str, Any], messages: list[Any]) -> list[Any]:
    for name in SYSTEMS:
        system = record.get(name)
        if system is None or system == "":
            continue
        if not isinstance(system, str):
            raise ValueError(f"{name} takes a text")
        if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
            raise ValueError(f"the record has {name}, and its first message is the system's; give one of them")
        return [{"role": "system", "content": system}, *messages]
    return messages
