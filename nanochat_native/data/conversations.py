"""Conversations in the messages form as tokens, the way nanochat trains chat: who says what, and what is learnt.

    <|bos|> <|user_start|> ... <|user_end|> <|assistant_start|> ... <|assistant_end|> <|user_start|> ...

A message is {"role": "system" | "user" | "assistant", "content": text}; an assistant's content may be a list of parts,
{"type": "text" | "python" | "python_output", "text": text}, for code that it runs and what came of it. A system message
comes first and is put before the user's first message. Special tokens come from roles and parts alone, never from text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanochat_native.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
CHAT_TOKENS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
CHAT_TRAINED = "chat_trained"  # key of a checkpoint's meta; absent for a base model
_OTHER_ROLES = {"developer": "system", "tool": "user", "function": "user"}  # of OpenAI's API; see as_turns
_PARTS = {
    "text": None,
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}

# In what the template spells, MARK begins a sign for the tokenizer: SPLIT stands for nothing, and MARKED for one MARK.
MARK = "\ufdd0"  # a noncharacter of Unicode, for use inside a program
SPLIT, MARKED = MARK + "\ufdd1", MARK + "\ufdd2"

_TEMPLATE = """\
{%- macro spelled(role, content) -%}
    {%- if content is string -%}{{- content SPLITTING -}}
    {%- elif content is defined and content is iterable -%}
        {%- for part in content -%}
            {%- if not loop.first -%}{{- 'SPLIT' -}}{%- endif -%}
            {%- if part['text'] is not string -%}{{- raise_exception('a part of a message has no text') -}}{%- endif -%}
            {%- set text = part['text'] SPLITTING -%}
            {%- if part['type'] == 'text' -%}{{- text -}}
            {%- elif role == 'assistant' and part['type'] == 'python' -%}
                {{- '<|python_start|>' + text + '<|python_end|>' -}}
            {%- elif role == 'assistant' and part['type'] == 'python_output' -%}
                {{- '<|output_start|>' + text + '<|output_end|>' -}}
            {%- else -%}{{- raise_exception(role ~ ' messages have no part of this type') -}}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{- raise_exception('the content of a message is a text or a list of parts') -}}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set system = messages[0]['role'] == 'system' -%}
{%- if system and messages | length == 1 -%}{{- raise_exception('no message of the user follows the system message') -}}
{%- endif -%}
{%- for message in (messages[1:] if system else messages) -%}
    {%- set role = 'user' if loop.index0 % 2 == 0 else 'assistant' -%}
    {%- if message['role'] != role -%}
        {{- raise_exception('after at most one system message, user and assistant take turns, the user first') -}}
    {%- endif -%}
    {{- '<|' + role + '_start|>' -}}
    {%- if system and loop.first -%}{{- spelled('system', messages[0]['content']) + '\\n\\n' -}}{%- endif -%}
    {{- spelled(role, message['content']) -}}
    {{- '<|' + role + '_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""


def chat_template(special_tokens: Iterable[str]) -> str:
    """What render and prompt_of do, for transformers' apply_chat_template.

    transformers' tokenizers read the name of a special token in a text as that token. The template puts SPLIT into
    every such name in a message; `without_marks` takes it out again after special tokens were looked for. The ids are
    those of `render`, except that two neighbouring parts of type text are encoded as one text.

    Raises ValueError for a special token of one character, which cannot be split.
    """
    starts = set()
    for name in special_tokens:
        if len(name) < 2:
            raise ValueError(f"the special token {name!r} is one character: texts cannot be kept apart from it")
        starts.add(name[0] if name[0] == name[1] else name[:2])  # one that overlaps with itself is missed by replace
    splitting = f"| replace({_literal(MARK)}, {_literal(MARKED)})"
    for start in sorted(starts):
        splitting += f" | replace({_literal(start)}, {_literal(start[0] + SPLIT + start[1:])})"
    return _TEMPLATE.replace("SPLITTING", splitting).replace("'SPLIT'", _literal(SPLIT))


def _literal(text: str) -> str:
    """A string of Jinja's, which has the escapes of Python."""
    return json.dumps(text)


def without_marks() -> dict[str, Any]:
    """The normalizer of a Hugging Face tokenizer for texts that chat_template spelled."""
    steps = ((SPLIT, ""), (MARKED, MARK))
    replaced = [{"type": "Replace", "pattern": {"String": sign}, "content": text} for sign, text in steps]
    return {"type": "Sequence", "normalizers": replaced}


Message = Mapping[str, Any]


def is_chat_trained(meta: Mapping[str, Any]) -> bool:
    """Whether the checkpoint of this meta was trained on conversations; a base model only continues text."""
    return bool(meta.get(CHAT_TRAINED, False))


def check_messages(messages: Any) -> None:
    """Raises ValueError for what is not a conversation: a list of messages, at most one of the system, at the
    beginning, then user and assistant in turn, the user first."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages takes a list with at least one message")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is {json_kind(message)}; it takes an object with role and content")
        role = _role(message, ROLES, where)
        _check_content(message.get("content"), role, f"{where}.content")
    roles = [message["role"] for message in messages]
    first = int(roles[0] == "system")
    for i, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ValueError(f"messages[{first + i}].role is {role!r} where {expected!r} comes: they take turns")
    if len(messages) == first:
        raise ValueError("messages takes a message of the user after that of the system")


def json_kind(value: Any) -> str:
    """What a value of JSON is, in words for messages."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _role(message: Message, roles: Sequence[str], where: str) -> str:
    role = message.get("role")
    if not isinstance(role, str) or role not in roles:
        shown = repr(role) if isinstance(role, str) else json_kind(role)
        raise ValueError(f"{where}.role is {shown}; it takes one of {', '.join(roles)}")
    return role


def _check_content(content: Any, role: str, where: str) -> None:
    if isinstance(content, str):
        _check_text(content, where)
        return
    if not isinstance(content, list):
        raise ValueError(f"{where} is {json_kind(content)}; it takes a text, or a list of parts")
    kinds = tuple(_PARTS) if role == "assistant" else ("text",)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            types = " or ".join(map(json.dumps, kinds))
            taken = f'it takes {{"type": TYPE, "text": TEXT}} with {types} as TYPE'
            raise ValueError(f"{where}[{i}] is not a part that {role} messages have; {taken}")
        _check_text(part["text"], f"{where}[{i}].text")


def _check_text(text: str, where: str) -> None:
    """JSON can spell half of a character, which no text has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} has a lone surrogate; it takes text that UTF-8 can hold") from None


def text_of(content: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a message's content, parts one after the other."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and of each whether it is learnt: what the assistant says, with its <|assistant_end|>.

    What came of code that ran is not said by the assistant, hence not learnt. Raises ValueError for what
    check_messages refuses, and where the tokenizer lacks a special token.
    """
    check_messages(messages)
    return _spell(tokenizer, messages)


def _spell(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """What render returns, of messages that check_messages or as_turns has seen."""
    tokens, learnt = [tokenizer.bos_id], [False]

    def put(ids: list[int], learn: bool) -> None:
        tokens.extend(ids)
        learnt.extend([learn] * len(ids))

    for role, content in _turns(messages):
        start, end = special_ids(tokenizer, (f"<|{role}_start|>", f"<|{role}_end|>"))
        put([start], False)
        if isinstance(content, str):
            put(tokenizer.encode(content), role == "assistant")
        else:
            for part in content:
                around = _PARTS[part["type"]]
                first, last = ([i] for i in special_ids(tokenizer, around)) if around else ([], [])
                put([*first, *tokenizer.encode(part["text"]), *last], part["type"] != "python_output")
        put([end], role == "assistant")
    return tokens, learnt


def prompt_of(tokenizer: Tokenizer, messages: Any, *, chat_trained: bool) -> list[int]:
    """The tokens that the assistant's next message continues, of messages in the form and order of `as_turns`; the last
    of the turns must be the user's.

    A base model has never seen the special tokens: it continues the texts of all messages, line after line, which is
    all that it can. Raises ValueError for what as_turns refuses, and where the tokenizer lacks a special token.
    """
    turns = as_turns(messages)
    if turns[-1]["role"] != "user":
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        raise ValueError(f"messages[{last}].role is 'assistant'; the last one takes 'user'")
    if not chat_trained:
        text = "\n".join(text_of(message["content"]) for message in turns)
        return [tokenizer.bos_id, *tokenizer.encode(text)]
    tokens, _ = _spell(tokenizer, turns)
    return [*tokens, *special_ids(tokenizer, ("<|assistant_start|>",))]


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a reply beside <|bos|>."""
    return tuple(i for name, i in tokenizer.special_tokens.items() if name in ("<|assistant_end|>", "<|user_start|>"))


def special_ids(tokenizer: Tokenizer, names: Sequence[str]) -> list[int]:
    """Ids of special tokens by name. Raises ValueError where the tokenizer lacks one."""
    missing = [name for name in names if name not in tokenizer.special_tokens]
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}: it cannot spell a conversation")
    return [tokenizer.special_tokens[name] for name in names]


def as_turns(messages: Any) -> list[dict[str, Any]]:
    """Messages as clients of OpenAI's API send them, as a conversation that can be spelled: at most one message of the
    system, at the beginning, then those of user and assistant in turn. Raises ValueError for what is neither.

    - developer is the system; tool and function, whose results come from outside as the user's words do, are the user.
    - The messages of the system are one, wherever they stand, and so are messages of one role that follow each other:
      joined by a blank line. An assistant may begin. Where only the system speaks, its text is the user's message.
    - An assistant's content may be null beside tool_calls, function_call or refusal. Calls become text after the
      content, a line each: name(arguments). A refusal becomes text.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages takes a list with at least one message")
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role, content = _role_and_content(message, f"messages[{i}]")
        if role == "system":
            system.append(text_of(content))
        elif turns and turns[-1]["role"] == role:
            turns[-1]["content"] = _joined(turns[-1]["content"], content)
        else:
            turns.append({"role": role, "content": content})
    told = "\n\n".join(filter(None, system))
    if not turns:
        return [{"role": "user", "content": told}]
    return [{"role": "system", "content": told}, *turns] if told else turns


def _role_and_content(message: Any, where: str) -> tuple[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {json_kind(message)}; it takes an object with role and content")
    role = _role(message, (*ROLES, *_OTHER_ROLES), where)
    role = _OTHER_ROLES.get(role, role)
    content = message.get("content")
    if role != "assistant":
        _check_content(content, role, f"{where}.content")
        return role, content
    if isinstance(content, list):
        content = [_without_refusal(part) for part in content]
    elif content is None:
        content = message.get("refusal")
    calls = _calls(message, where)
    if content is not None or calls is None:
        _check_content(content, role, f"{where}.content")
    return role, _joined(content or "", calls or "", "\n")


def _without_refusal(part: Any) -> Any:
    """A part of an assistant's message; a refusal as text."""
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def _calls(message: Message, where: str) -> str | None:
    """The calls in an assistant's message as text, a line each; None where the message has no field for them."""
    calls, single = message.get("tool_calls"), message.get("function_call")
    if calls is None and single is None:
        return None
    if calls is not None and not isinstance(calls, list):
        raise ValueError(f"{where}.tool_calls is {json_kind(calls)}; it takes a list")
    given = [(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls or [])]
    if single is not None:
        given.append((f"{where}.function_call", {"function": single}))
    lines = []
    for place, call in given:
        called = [
            (call[kind].get("name"), call[kind].get(told))
            for kind, told in (("function", "arguments"), ("custom", "input"))
            if isinstance(call, dict) and isinstance(call.get(kind), dict)
        ]
        if not called or not all(isinstance(text, str) for text in called[0]):
            taken = 'it takes {"type": "function", "function": {"name": TEXT, "arguments": TEXT}}'
            raise ValueError(f"{place} is not a call of a function; {taken}")
        lines.append("{}({})".format(*called[0]))
        _check_text(lines[-1], place)
    return "\n".join(lines)


def _joined(first: Any, second: Any, between: str = "\n\n") -> Any:
    """Two contents as one, `between` them where neither is empty."""
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return first + between + second
    parts = [[{"type": "text", "text": one}] if isinstance(one, str) else one for one in (first, second)]
    return [*parts[0], {"type": "text", "text": between}, *parts[1]]


def _turns(messages: Sequence[Message]) -> list[tuple[str, Any]]:
    """(role, content) of the messages, the system's put before the user's first."""
    turns = [(message["role"], message["content"]) for message in messages]
    if turns[0][0] != "system":
        return turns
    (_, system), *turns = turns
    first = next(i for i, (role, _) in enumerate(turns) if role == "user")
    turns[first] = ("user", f"{text_of(system)}\n\n{text_of(turns[first][1])}")
    return turns
