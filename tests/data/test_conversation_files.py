"""Conversations in files: the forms in which they are published, what is refused and where, compressed, damaged."""

import gzip
import json
from pathlib import Path

import pytest

from nanochat_native.data import DamagedFileError
from nanochat_native.data.conversation_files import find_files, parse_record, read_records, with_tools

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PLAIN = [USER, ASSISTANT]
SYSTEM = {"role": "system", "content": "s"}


# --- forms ---


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        (PLAIN, PLAIN),
        ({"messages": PLAIN, "id": 3, "prompt": "q"}, PLAIN),
        ({"conversation": PLAIN}, PLAIN),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PLAIN),
        ([{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}], PLAIN),
        ([{"from": "human", "content": "q"}, {"role": "assistant", "value": "a"}], PLAIN),
        ({"messages": [{"role": "human", "content": "q"}, {"role": "model", "content": "a"}]}, PLAIN),
        ({"conversations": [{"from": "system", "value": "s"}, USER, ASSISTANT]}, [SYSTEM, *PLAIN]),
        ({"system": "s", "conversations": PLAIN}, [SYSTEM, *PLAIN]),
        ({"system": "", "system_prompt": None, "messages": PLAIN}, PLAIN),
        ({"messages": None, "prompt": "q", "completion": "a"}, PLAIN),
        ({"instruction": "q", "output": "a"}, PLAIN),
        ({"instruction": "q", "input": "", "output": "a", "text": "x"}, PLAIN),
        ({"instruction": "q", "input": None, "output": "a", "history": []}, PLAIN),
        ({"instruction": "q", "input": "i", "output": "a"}, [{"role": "user", "content": "q\n\ni"}, ASSISTANT]),
        ({"instruction": "q", "context": "i", "response": "a"}, [{"role": "user", "content": "q\n\ni"}, ASSISTANT]),
        ({"prompt": "q", "completion": "a"}, PLAIN),
        ({"prompt": "q", "response": "a"}, PLAIN),
        ({"question": "q", "answer": "a"}, PLAIN),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, *PLAIN]),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, *PLAIN]),
        ({"prompt": [{"from": "human", "value": "q"}], "completion": "a"}, PLAIN),
    ],
    ids=str,
)
def test_every_form_gives_its_messages(record, messages):
    before = json.dumps(record)
    assert parse_record(record).messages == messages
    assert json.dumps(record) == before


CHATML = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na\n<|im_end|>\n"
CALL = {"type": "function", "function": {"name": "calculator", "arguments": '{"expression": "2*3"}'}}
CALLING = {"role": "assistant", "content": "so ", "tool_calls": [CALL]}
OUTPUT = {"role": "tool", "content": "6"}


def test_chatml_is_read_as_messages():
    answer = {"role": "assistant", "content": "a\n"}
    for record in (CHATML, {"text": CHATML}):
        assert parse_record(record).messages == [SYSTEM, USER, answer]
    assert (parse_record(CHATML).form, parse_record({"text": CHATML}).form) == ("ChatML, a text", "text in ChatML")
    user, last = CHATML.index("<|im_start|>user") + 1, CHATML.rindex("<|im_start|>") + 1
    for wrong, at in (
        (CHATML + "more", len(CHATML) + 1),
        (CHATML[:-10], last),
        ("x" + CHATML, 1),
        (CHATML.replace("user\n", "user"), user),
        (CHATML.replace("q<|im_end|>\n", "q"), user),
    ):
        with pytest.raises(ValueError, match=f"not ChatML from character {at} on"):
            parse_record({"text": wrong})


def test_a_question_with_choices_is_asked_as_nanochat_asks_it():
    record = {"question": "Which?", "subject": "s", "choices": ["one", "two"], "answer": 1}
    asked = "Multiple Choice question: Which?\n- one=A\n- two=B\n\nRespond only with the letter of the correct answer."
    expected = [{"role": "user", "content": asked}, {"role": "assistant", "content": "B"}]
    assert parse_record(record).messages == parse_record({"train": record}).messages == expected
    for wrong, message in (
        ({"answer": 2}, "answer must be the index of a choice, from 0 to 1, got 2"),
        ({"answer": True}, "got True"),
        ({"choices": ["one"]}, "choices must be 2 to 26 texts, got 1"),
        ({"choices": ["one", 2]}, "question and choices must be texts"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_record(record | wrong)
    assert parse_record(record | {"answer": "two"}).messages[1]["content"] == "two", "as before"
    assert parse_record(record | {"system": "s"}).messages == [SYSTEM, *expected]
    assert parse_record(record | {"messages": PLAIN}).messages == PLAIN
    other = {"prompt": "Which?", "completion": "two", "choices": ["one", "two"], "answer": 1}
    assert parse_record(other).messages[1]["content"] == "two"
    without = {"question": "Which?", "choices": ["one", "two"], "response": "two"}
    assert parse_record(without).messages[1]["content"] == "two"


def test_calculations_are_code_only_where_they_are_asked_for():
    record = {"question": "q", "answer": "It is <<2*3=6>>6.\n#### 6"}
    assert parse_record(record).messages[1]["content"] == record["answer"]
    (_, answer), form = parse_record(record, calculations=True)
    assert answer["content"] == [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "2*3"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": "6.\n#### 6"},
    ]
    assert form == "question and answer with calculations, as in GSM8K"
    for answer in (["It is <<2*3=6>>"], [ASSISTANT | {"content": [{"type": "text", "text": "<<2*3=6>>"}]}]):
        assert parse_record({"question": "q", "answer": answer}, calculations=True).messages[1:] == answer


def test_calls_of_the_calculator_become_code_and_its_output():
    last = {"role": "assistant", "content": "6."}
    for calling in (CALLING, {"role": "assistant", "content": None, "tool_calls": [CALL]}):
        turns, found = with_tools(parse_record([USER, calling, OUTPUT, last, USER, ASSISTANT]).messages)
        assert found
        said = [{"type": "text", "text": "so "}] if calling["content"] else []
        parts = [*said, {"type": "python", "text": "2*3"}, {"type": "python_output", "text": "6"}]
        assert turns[1]["content"] == [*parts, {"type": "text", "text": "6."}]
        assert turns[2:] == [USER, ASSISTANT]
    assert with_tools(PLAIN) == (PLAIN, False)
    for empty in ("", None):
        turns, found = with_tools([{"role": "system", "content": empty}, USER, CALLING, OUTPUT, last])
        assert found
        assert turns[0] == USER


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, ASSISTANT | {"tool_calls": [{}]}], r"messages\[1\] has tool_calls .*no function"),
        (
            [USER, ASSISTANT | {"tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}],
            r"messages\[1\] has tool_calls that cannot be trained on \(weather\): .* single call of calculator",
        ),
        ([USER, ASSISTANT | {"tool_calls": [CALL, CALL]}], r"\(calculator, calculator\)"),
        ([USER | {"tool_calls": [CALL]}, ASSISTANT], r"messages\[0\] has tool_calls, but its role is 'user'"),
        ([USER, CALLING, ASSISTANT], r"messages\[1\] calls a tool, and no message of the tool follows"),
        ([USER, CALLING], r"messages\[1\] calls a tool, and no message of the tool follows"),
        ([USER, OUTPUT], r"messages\[1\] is of a tool, and no call of the calculator precedes"),
        ([USER, CALLING, OUTPUT, OUTPUT], r"messages\[3\] is of a tool, and no call"),
        ([USER, CALLING, OUTPUT], "the last message must be the assistant's, got the tool's"),
        ([USER, CALLING, OUTPUT, USER, ASSISTANT], "roles must take turns"),
        ([USER, USER, CALLING, OUTPUT, ASSISTANT], "roles must take turns"),
        ([USER, CALLING, OUTPUT, ASSISTANT, SYSTEM], "roles must take turns"),
    ],
)
def test_tools_that_cannot_be_trained_on_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        with_tools(parse_record(messages).messages)


def test_plain_messages_are_passed_on_as_they_are():
    messages = [USER | {"name": "Ada"}, ASSISTANT | {"weight": 1}]
    for record in (messages, {"messages": messages}):
        chat = parse_record(record)
        assert chat.form == ""
        assert all(found is given for found, given in zip(chat.messages, messages, strict=True))


def test_a_form_is_named_by_its_keys():
    assert parse_record({"conversations": []}).form == "conversations, a list of messages"
    assert parse_record({"prompt": "", "completion": ""}).form == "prompt and completion, a question, and its answer"
    alpaca = "instruction and output, a question (with input after a blank line), and its answer"
    assert parse_record({"instruction": "", "output": ""}).form == alpaca


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "must be an object or a list; it must have messages"),
        ("text", "must be an object or a list"),
        (None, "must be an object or a list"),
        ({}, "has the keys none; it must have messages"),
        (
            {"text": "x", "source": "y"},
            "has the keys 'text', 'source'; it must have messages, .* prompt and completion",
        ),
        ({"prompt": "q"}, "has the keys 'prompt'"),
        ({"messages": {"user": "q", "assistant": "a"}}, "messages must be a list of messages"),
        ({"conversations": "q"}, "conversations must be a list of messages"),
        ({"messages": PLAIN, "conversations": PLAIN}, "has messages, conversations: it must have only one"),
        (
            {"prompt": "q", "completion": "a", "question": "q", "answer": "a"},
            "has prompt, completion, question, answer: it must have only one",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "a preference with chosen and rejected; give the chosen"),
        ({"prompt": 3, "completion": "a"}, "prompt must be a text or a list of messages"),
        ({"prompt": "q", "completion": None}, "completion must be a text"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, "input must be a text"),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, "history, which is not supported"),
        ({"system": ["s"], "messages": PLAIN}, "system must be a text"),
        ({"system": "s", "messages": [SYSTEM, *PLAIN]}, "and its first message is of the system"),
        (
            {"conversations": [{"user": "q", "text": "x"}]},
            r"messages\[0\] must have role .* got 'user', 'text'",
        ),
        ([{"messages": PLAIN}], r"messages\[0\] must have role and content, or from and value, got 'messages'"),
        ([USER, {"role": "assistant"}], r"messages\[1\] must have role and content, or from and value, got 'role'"),
        ([{}], r"messages\[0\] must have role and content, or from and value, got none"),
        ({"messages": [USER, ASSISTANT | {"function_call": {"name": "f"}}]}, r"messages\[1\] has function_call"),
        ([USER, ASSISTANT | {"weight": 0}], r"messages\[1\] has weight 0"),
        ({"prompt": [USER], "completion": [ASSISTANT | {"weight": 0}]}, r"messages\[1\] has weight 0"),
    ],
    ids=str,
)
def test_what_cannot_be_read_or_would_be_lost_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        parse_record(record)


# --- files ---


def records(path):
    return [tuple(record) for record in read_records(path)]


def test_lines_in_every_layout(tmp_path):
    path = tmp_path / "x.jsonl"
    bom = b"\xef\xbb\xbf"
    for content in (
        b'{"a": 1}\n\n[2]\n',
        b'{"a": 1}\r\n\r\n[2]\r\n',
        bom + b'{"a": 1}\n \t\n[2]',
        b'{"a": 1}\n\n' + bom + b"[2]\n",
    ):
        path.write_bytes(content)
        assert records(path) == [(1, {"a": 1}), (3, [2])]
    path.write_text('"\u2028\x85"\n"\\r\\n"\n')
    assert records(path) == [(1, "\u2028\x85"), (2, "\r\n")]
    path.write_bytes(bom + b"\n")
    assert records(path) == []


def test_compressed_files(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    content = b'\xef\xbb\xbf{"a": 1}\n[2]\n'
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "x.json.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    for name in ("x.jsonl.gz", "x.json.zst"):
        assert records(tmp_path / name) == [(1, {"a": 1}), (2, [2])]
    cut = (tmp_path / "x.jsonl.gz").read_bytes()[:-6]
    (tmp_path / "x.jsonl.gz").write_bytes(cut)
    with pytest.raises(DamagedFileError, match=r"x.jsonl.gz: damaged gzip file"):
        records(tmp_path / "x.jsonl.gz")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[]", []),
        (" [\n] \n", []),
        ('[\n {"a": 1},\n {"a":\n 2}\n]\n', [(2, {"a": 1}), (3, {"a": 2})]),
        ("[[1], [2]]", [(1, [1]), (1, [2])]),
        (json.dumps(PLAIN), [(1, PLAIN)]),
        (json.dumps(PLAIN, indent=1), [(1, PLAIN)]),
        (json.dumps([PLAIN, PLAIN]), [(1, PLAIN), (1, PLAIN)]),
        (json.dumps(PLAIN) + "\n" + json.dumps(PLAIN), [(1, PLAIN), (2, PLAIN)]),
        ('{\n"a": 1\n}\n{"a": 2}', [(1, {"a": 1}), (4, {"a": 2})]),
        ('\ufeff{"a": 1}\n\ufeff{"a": 2}\ufeff', [(1, {"a": 1}), (2, {"a": 2})]),
        ("", []),
    ],
    ids=repr,
)
def test_a_json_file_holds_a_list_or_values_one_after_the_other(tmp_path, text, found):
    path = tmp_path / "x.JSON"
    path.write_text(text)
    assert records(path) == found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n{"a": 2}\n', "line 2: not JSON .Expecting value at column 6"),
        ("x.jsonl", b'{"a": 1} {"a": 2}\n', "line 1: not JSON .something follows the value at column 9"),
        ("x.jsonl", b'[{"a": 1},\n', "line 1: not JSON"),
        ("x.jsonl", "{}\n".encode("utf-16-le"), "line 1: not JSON .*; UTF-16 must begin with a"),
        ("x.jsonl", b"{}\n\n" + b"[" * 100_000, "line 3: not JSON .it is nested too deeply"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "line 2: not UTF-8 .*save the file as UTF-8"),
        ("x.json", b'[{"a": 1},\n{"a" 2}]', "line 2: not JSON"),
        ("x.json", b'[{"a": 1}\n {"a": 2}]', "line 1: not JSON .neither a comma nor the end"),
        ("x.json", b'[{"a": 1},\n', "line 1: not JSON .the list has no end"),
        ("x.json", b'[{"a": 1}\n', "line 1: not JSON .neither a comma nor the end"),
        ("x.json", b"[", "line 1: not JSON"),
        ("x.json", b"[]\n]", "line 1: not JSON .something follows the end of the list"),
        ("x.json", b"\n\n" + b"[" * 100_000, "line 3: not JSON .it is nested too deeply"),
    ],
)
def test_damage_is_told_by_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}, {message}"):
        records(path)


def test_bad_lines_are_told_one_by_one_and_the_others_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a"\n"\xe9"\n\n{} {}\n[2]')
    bad = []
    found = [tuple(record) for record in read_records(path, lambda line, error: bad.append((line, str(error))))]
    assert found == [(1, {"a": 1}), (6, [2])]
    assert [line for line, _ in bad] == [2, 3, 5]
    for (_, message), start in zip(bad, ("not JSON (Exp", "not UTF-8 (", "not JSON (something follows"), strict=True):
        assert message.startswith(start)


def test_rows_of_parquet_are_records_without_their_nulls(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    rows = [{"messages": PLAIN, "source": "s"}, {"messages": [USER | {"name": "Ada"}, ASSISTANT], "source": None}]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)
    assert records(path) == [(1, rows[0]), (2, {"messages": rows[1]["messages"]})]
    assert find_files(tmp_path) == ([path], [])
    bad_text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xe9")]
    )
    pq.write_table(pa.table({"text": bad_text}), path)
    with pytest.raises(ValueError, match=r"x.parquet, row 2: not UTF-8"):
        records(path)
    bad = []
    assert [tuple(r) for r in read_records(path, lambda row, error: bad.append(row))] == [(1, {"text": "a"})]
    assert bad == [2]
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DamagedFileError, match="damaged parquet file"):
        records(path)


def test_utf_16_and_utf_32_are_read_by_their_mark(tmp_path):
    path = tmp_path / "x.jsonl"
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes('{"a": "ü"}\n'.encode(encoding))
        assert records(path) == [(1, {"a": "ü"})]
    path.write_bytes("{}\n".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=f"{path}: not utf-16"):
        records(path)


def test_a_number_may_have_any_number_of_digits(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"id": {"9" * 5000}, "n": 12}}\n')
    ((_, record),) = records(path)
    assert record["id"] > 10**300
    assert record["n"] == 12
    assert type(record["n"]) is int


def test_files_folders_and_globs(tmp_path):
    for name in ("b.jsonl", "a.ndjson", "sub/c.json.gz", "README.md", "data.parquet"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    wanted = [tmp_path / name for name in ("a.ndjson", "b.jsonl", "sub/c.json.gz")]
    files, notes = find_files(tmp_path)
    assert files == wanted
    assert notes == [f"not read, because not JSON: 2 of 5 files (first: {tmp_path / 'README.md'})"]
    assert find_files(f"{tmp_path}/*.jsonl") == ([tmp_path / "b.jsonl"], [])
    (tmp_path / "any").write_text("{}")
    assert find_files(tmp_path / "any") == ([tmp_path / "any"], []), "a file that is named is read whatever its name"


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("", ValueError, "must not be empty"),
        ("nowhere.jsonl", FileNotFoundError, "nowhere.jsonl: no file, no folder with files and no glob that matches"),
        ("*.jsonl", FileNotFoundError, "no glob that matches"),
        ("texts", FileNotFoundError, r"texts: no file ends in .jsonl, .ndjson, .json, .parquet; there is x.txt"),
        ("shards", ValueError, "shards: conversations must be in files of JSON .*, got token shards"),
    ],
)
def test_places_without_conversations(tmp_path, monkeypatch, data, error, message):
    monkeypatch.chdir(tmp_path)
    for name in ("texts/x.txt", "shards/train_0.bin", "rows.parquet"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x")
    with pytest.raises(error, match=message):
        find_files(data)
