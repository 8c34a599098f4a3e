"""Reads conversations from files of JSON, in the forms in which they are published, as lists of messages.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, or the list alone
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}    ShareGPT
    {"instruction": "...", "input": "...", "output": "..."}                                    Alpaca
    {"prompt": "...", "completion": "..."}

The form is detected for each record, so a file may mix forms. Unknown keys are ignored.
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
from nanochat_native.data.file_names import suffix_of
from nanochat_native.data.sources import find_source

SUFFIXES = (".jsonl", ".ndjson", ".json")
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
    "instruction and output, prompt and completion, prompt and response, or question and answer"
)

_BLANK = re.compile(r"[ \t\r\n\ufeff]*")  # concatenated files have a byte order mark in the middle


class Record(NamedTuple):
    """A value of a file, and the line in which it begins."""

    line: int
    value: Any


class ParsedRecord(NamedTuple):
    """The messages of a record, and a description of its form; "" for a list of role and content."""

    messages: Any
    form: str


def find_files(data: str | Path) -> tuple[list[Path], list[str]]:
    """Return (the files of conversations behind a file, a folder or a glob, notes about other files there).

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
        if suffix_of(source.files[0]) == ".parquet":
            raise ValueError(f"{data}: conversations must be in files of JSON; write each row as a line of .jsonl")
        return list(source.files), []
    files = [path for path in source.files if suffix_of(path) in SUFFIXES]
    others = [path for path in source.files if path not in set(files)]
    if not files:
        raise FileNotFoundError(f"{data}: no file ends in {', '.join(SUFFIXES)}; there is {others[0].name}")
    return files, [
        f"not read, because not JSON: {len(others)} of {len(source.files)} files (first: {others[0]})"
    ] if others else []


def read_records(path: Path) -> Iterator[Record]:
    """Yield the values of a file: one for each line, or, in a .json file, the elements of a list or value after value.

    Raises ValueError, with file and line, for text that is not UTF-8 or not JSON, and DamagedFileError and ImportError
    as read_document_parts does.
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
        advice = "; UTF-16 must begin with a byte order mark" if "\0" in text else ""
        raise ValueError(f"{path}, {damage}{advice}") from None


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


def parse_record(record: Any) -> ParsedRecord:
    """Return the messages of a record. It is not checked that they are a conversation.

    Raises ValueError for a record of no known form or of several, and for one with content that would be lost.
    """
    if isinstance(record, list):
        return ParsedRecord([_message(message, i) for i, message in enumerate(record)], "")
    if not isinstance(record, dict):
        raise ValueError(f"the record must be an object or a list; {KNOWN_FORMS}")
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
    elif pairs:
        (pair,) = pairs
        messages, form = _turns(record, *pair)
    elif "chosen" in record and "rejected" in record:
        raise ValueError("the record is a preference with chosen and rejected; give the chosen answers as messages")
    else:
        raise ValueError(f"the record has the keys {', '.join(map(repr, record)) or 'none'}; {KNOWN_FORMS}")
    return ParsedRecord(_with_system(record, messages), form)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _message(message: Any, index: int) -> Any:
    """Return the message with role and content. Raise ValueError if it has no such keys."""
    if not isinstance(message, dict):
        return message
    if not (message.keys() & {"role", "from"} and message.keys() & {"content", "value"}):
        found = ", ".join(map(repr, message)) or "none"
        raise ValueError(f"messages[{index}] must have role and content, or from and value, got {found}")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ValueError(f"messages[{index}] has {name}, which cannot be trained on: leave the conversation out")
    if message.get("weight") == 0:
        raise ValueError(
            f"messages[{index}] has weight 0, but all answers of the assistant are trained on: leave it out"
        )
    if not {"role", "content"} <= message.keys():
        message = {
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
