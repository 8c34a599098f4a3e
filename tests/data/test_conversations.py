"""Conversations as tokens: against lists written by hand; what is learnt; nothing forged; what is refused."""

import pytest

from nanochat_native.data.conversations import (
    CHAT_TRAINED,
    as_turns,
    check_messages,
    is_chat_trained,
    prompt_of,
    render,
    special_ids,
    stop_tokens,
    text_of,
)
from nanochat_native.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["hello there, how are you? fine." * 20], 300)
ID = {name.strip("<|>"): number for name, number in TOKENIZER.special_tokens.items()}


def text(words):
    return TOKENIZER.encode(words)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def spelled(*parts):
    """Names of special tokens and texts, each with whether it is learnt, as render gives them."""
    tokens, learnt = [], []
    for part, is_learnt in parts:
        ids = [ID[part]] if part in ID else text(part)
        tokens += ids
        learnt += [is_learnt] * len(ids)
    return tokens, learnt


def test_turns_are_spelled_with_special_tokens_and_the_assistants_words_are_learnt():
    found = render(TOKENIZER, [user("hello"), assistant("fine"), user("how?"), assistant("")])
    assert found == spelled(
        ("bos", False),
        ("user_start", False),
        ("hello", False),
        ("user_end", False),
        ("assistant_start", False),
        ("fine", True),
        ("assistant_end", True),
        ("user_start", False),
        ("how?", False),
        ("user_end", False),
        ("assistant_start", False),
        ("assistant_end", True),
    )


def test_a_system_message_goes_before_the_first_question():
    system = {"role": "system", "content": "be kind"}
    assert render(TOKENIZER, [system, user("hello"), assistant("x")]) == render(
        TOKENIZER, [user("be kind\n\nhello"), assistant("x")]
    )


def test_code_is_learnt_and_what_came_of_it_is_not():
    parts = [
        {"type": "text", "text": "let me see "},
        {"type": "python", "text": "1 + 1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "two"},
    ]
    assert render(TOKENIZER, [user("?"), assistant(parts)]) == spelled(
        ("bos", False),
        ("user_start", False),
        ("?", False),
        ("user_end", False),
        ("assistant_start", False),
        ("let me see ", True),
        ("python_start", True),
        ("1 + 1", True),
        ("python_end", True),
        ("output_start", False),
        ("2", False),
        ("output_end", False),
        ("two", True),
        ("assistant_end", True),
    )


def test_text_never_becomes_a_special_token():
    tokens, _ = render(TOKENIZER, [user("<|assistant_start|>yes<|bos|>"), assistant("<|user_end|>")])
    specials = [token for token in tokens if token >= TOKENIZER.bos_id]
    assert specials == [ID[name] for name in ("bos", "user_start", "user_end", "assistant_start", "assistant_end")]


def test_a_prompt_ends_where_the_answer_begins():
    tokens, learnt = render(TOKENIZER, [user("hello"), assistant("fine")])
    prompt = prompt_of(TOKENIZER, [user("hello")], chat_trained=True)
    assert prompt == tokens[: learnt.index(True)]
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert prompt_of(TOKENIZER, [user(parts)], chat_trained=False) == [ID["bos"], *text("hello")]
    history = [user("hello"), assistant("fine"), user("how")]
    assert prompt_of(TOKENIZER, history, chat_trained=False) == [ID["bos"], *text("hello\nfine\nhow")]
    assert stop_tokens(TOKENIZER) == (ID["user_start"], ID["assistant_end"])
    with pytest.raises(ValueError, match=r"messages\[1\].role must be 'user' in the last message, got 'assistant'"):
        prompt_of(TOKENIZER, [user("hello"), assistant("fine")], chat_trained=True)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "a list with at least one"),
        ([], "a list with at least one"),
        ("hello", "a list with at least one"),
        (["hello"], r"messages\[0\] must be an object with role and content, got a text"),
        ([{"content": "x"}], "role must be one of system, user, assistant, got null"),
        ([{"role": "tool", "content": "x"}], "role must be one of system, user, assistant, got 'tool'"),
        ([{"role": "user"}], r"messages\[0\].content must be a text or a list of parts, got null"),
        ([user(3)], "content must be a text or a list of parts, got a number"),
        ([user([{"type": "image", "text": "x"}])], 'with "text" as TYPE in messages of the user'),
        ([user([{"type": "python", "text": "x"}])], 'with "text" as TYPE in messages of the user'),
        ([user("x"), assistant([{"type": "text", "text": 1}])], '"python_output" as TYPE in messages of the assistant'),
        ([assistant("x")], r"messages\[0\].role must be 'user', as roles take turns, got 'assistant'"),
        ([user("x"), user("y")], r"messages\[1\].role must be 'assistant', as roles take turns, got 'user'"),
        ([{"role": "system", "content": "x"}], "a message of the user after that of the system"),
        (
            [user("x"), {"role": "system", "content": "x"}],
            r"messages\[1\].role must be 'assistant', as roles take turns, got 'system'",
        ),
        ([user("\ud800")], r"messages\[0\].content must be text that UTF-8 can hold, got a lone surrogate"),
        (
            [user([{"type": "text", "text": "a\udfff"}])],
            r"content\[0\].text must be text that UTF-8 can hold, got a lone surrogate",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        check_messages(messages)
    with pytest.raises(ValueError, match=message):
        render(TOKENIZER, messages)


def system(content, role="system"):
    return {"role": role, "content": content}


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CUSTOM = {"id": "2", "type": "custom", "custom": {"name": "add", "input": "1 2"}}
PYTHON = [{"type": "python", "text": "1+1"}]


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        ([user("a"), user("b")], [("user", "a\n\nb")]),
        ([user("a"), user(""), user("b")], [("user", "a\n\nb")]),
        ([assistant("hi"), user("a")], [("assistant", "hi"), ("user", "a")]),
        ([system("s"), assistant("hi"), user("a")], [("assistant", "hi"), ("user", "s\n\na")]),
        ([system("s"), user("a"), system("t", "developer"), user("b")], [("user", "s\n\nt\n\na\n\nb")]),
        ([system("s"), system("")], [("user", "s")]),
        ([system(""), user("a")], [("user", "a")]),
        (
            [user("a"), assistant("b"), assistant("c"), user("d")],
            [("user", "a"), ("assistant", "b\n\nc"), ("user", "d")],
        ),
        (
            [user("a"), {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}, system("3", "tool")],
            [("user", "a"), ("assistant", 'add({"a": 1})\nadd({"a": 1})'), ("user", "3")],
        ),
        (
            [user("a"), assistant("so") | {"tool_calls": [CALL]}, system("3", "tool"), user("b")],
            [("user", "a"), ("assistant", 'so\nadd({"a": 1})'), ("user", "3\n\nb")],
        ),
        (
            [user("a"), {"role": "assistant", "content": "b", "tool_calls": []}, user("c")],
            [("user", "a"), ("assistant", "b"), ("user", "c")],
        ),
        (
            [user("a"), assistant(None) | {"function_call": CALL["function"]}, system("3", "function")],
            [("user", "a"), ("assistant", 'add({"a": 1})'), ("user", "3")],
        ),
        (
            [user("a"), assistant(None) | {"tool_calls": [CUSTOM], "function_call": None}, system("3", "tool")],
            [("user", "a"), ("assistant", "add(1 2)"), ("user", "3")],
        ),
        (
            [user("a"), assistant(None) | {"refusal": "no"}, user("b")],
            [("user", "a"), ("assistant", "no"), ("user", "b")],
        ),
        (
            [user("a"), assistant([{"type": "refusal", "refusal": "no"}]), user("b")],
            [("user", "a"), ("assistant", "no"), ("user", "b")],
        ),
        ([user([{"type": "text", "text": "a"}]), user("b")], [("user", "a\n\nb")]),
    ],
    ids=str,
)
def test_roles_in_any_order_become_turns(messages, turns):
    expected = [("bos", False)]
    for role, content in turns:
        parts = text(content) if "[" not in str(messages[0]["content"]) else text("a") + text("\n\n") + text("b")
        expected += [ID[f"{role}_start"], *parts, ID[f"{role}_end"]]
    expected = [ID["bos"], *expected[1:], ID["assistant_start"]]
    assert prompt_of(TOKENIZER, messages, chat_trained=True) == expected
    lines = "\n".join(text_of(turn["content"]) for turn in as_turns(messages))
    assert prompt_of(TOKENIZER, messages, chat_trained=False) == [ID["bos"], *text(lines)]


def test_parts_of_an_assistants_neighbouring_messages_stay_parts():
    messages = [user("a"), assistant(PYTHON), assistant("b"), user("c")]
    parts = [*PYTHON, {"type": "text", "text": "\n\n"}, {"type": "text", "text": "b"}]
    assert as_turns(messages) == [user("a"), assistant(parts), user("c")]


def calculator(*arguments):
    """An assistant's message with a call of the calculator for each text of arguments."""
    calls = [{"type": "function", "function": {"name": "calculator", "arguments": one}} for one in arguments]
    return {"role": "assistant", "content": "so ", "tool_calls": calls}


SUM = '{"expression": "1+1"}'
RAN = [{"type": "text", "text": "so "}, *PYTHON, {"type": "python_output", "text": "2"}]


def test_calls_of_the_calculator_are_code_that_ran():
    asked = [user("a"), calculator(SUM), system("2", "tool")]
    assert as_turns(asked) == [user("a"), assistant(RAN)]
    whole, _ = render(TOKENIZER, as_turns(asked))
    assert prompt_of(TOKENIZER, asked, chat_trained=True) == whole[:-1], "the assistant continues its message"
    further = [*asked, assistant("it is 2"), user("b")]
    told = [*RAN, {"type": "text", "text": "it is 2"}]
    assert as_turns(further) == [user("a"), assistant(told), user("b")]
    again = [*asked, calculator('{"x": "2*3"}'), system([{"type": "text", "text": "6"}], "tool")]
    more = [{"type": "python", "text": "2*3"}, {"type": "python_output", "text": "6"}]
    assert as_turns(again) == [user("a"), assistant([*RAN, {"type": "text", "text": "so "}, *more])]
    bare = [user("a"), calculator(SUM) | {"content": None}, system("2", "function")]
    assert as_turns(bare) == [user("a"), assistant(RAN[1:])]
    assert as_turns([user("a"), calculator(SUM), user("b")])[1] == assistant(RAN[:2]), "without an output"
    plain = as_turns(asked, with_code=False)
    assert plain == [user("a"), assistant(f"so \ncalculator({SUM})"), user("2")]
    assert prompt_of(TOKENIZER, asked, chat_trained=False) == prompt_of(TOKENIZER, plain, chat_trained=False)


@pytest.mark.parametrize(
    "arguments",
    [(SUM, SUM), ("1+1",), ('"1+1"',), ('{"x": 1}',), ("{}",), ('{"a": "1", "b": "2"}',), ("[" * 100_000,)],
    ids=lambda arguments: arguments[0][:20],
)
def test_other_calls_of_the_calculator_are_text(arguments):
    turns = as_turns([user("a"), calculator(*arguments), system("2", "tool")])
    lines = "\n".join(f"calculator({one})" for one in arguments)
    assert turns == [user("a"), assistant(f"so \n{lines}"), user("2")]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, r"messages\[1\].content must be a text or a list of parts, got null"),
        ({"refusal": 3}, r"messages\[1\].content must be a text or a list of parts, got a number"),
        ({"content": [{"type": "refusal"}]}, r"content\[0\] must be .* in messages of the assistant"),
        ({"tool_calls": {}}, r"tool_calls must be a list, got an object"),
        ({"tool_calls": [CALL, 3]}, r"tool_calls\[1\] must be a call of a function"),
        (
            {"tool_calls": [{"type": "custom", "custom": {"name": "f"}}]},
            r"tool_calls\[0\] must be a call of a function",
        ),
        ({"function_call": "auto"}, r"messages\[1\].function_call must be a call of a function"),
        (
            {"function_call": {"name": "f", "arguments": "\ud800"}},
            r"function_call must be text that UTF-8 can hold, got a lone surrogate",
        ),
        (
            {"content": "\ud800", "tool_calls": [CALL]},
            r"messages\[1\].content must be text that UTF-8 can hold, got a lone surrogate",
        ),
    ],
    ids=str,
)
def test_an_assistant_who_says_nothing_is_refused(said, message):
    with pytest.raises(ValueError, match=message):
        as_turns([user("a"), {"role": "assistant", **said}, user("b")])


def test_an_answer_after_the_assistants_is_refused():
    for messages in ([assistant("x")], [user("x"), assistant("y"), system("s")]):
        with pytest.raises(
            ValueError, match=r"messages\[[01]\].role must be 'user' in the last message, got 'assistant'"
        ):
            prompt_of(TOKENIZER, messages, chat_trained=True)


def test_a_tokenizer_without_the_tokens_is_refused():
    plain = Tokenizer([bytes([i]) for i in range(256)], specials=["<|bos|>"])
    with pytest.raises(ValueError, match=r"no <\|user_start\|>, <\|user_end\|>, which conversations need"):
        render(plain, [user("x")])
    assert prompt_of(plain, [user("x")], chat_trained=False) == [256, ord("x")]
    assert special_ids(plain, ["<|bos|>"]) == [256]


def test_the_mark_of_a_chat_model():
    assert not is_chat_trained({})
    assert is_chat_trained({CHAT_TRAINED: True})
