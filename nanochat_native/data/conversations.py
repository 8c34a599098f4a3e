"""Renders conversations as tokens, as nanochat does for chat, and marks the tokens that are training targets.

    <|bos|> <|user_start|> ... <|user_end|> <|assistant_start|> ... <|assistant_end|> <|user_start|> ...

A message is {"role": "system" | "user" | "assistant", "content": text}. The content of an assistant may be a list of
parts {"type": "text" | "python" | "python_output", "text": text}, for code that it runs and for the output of the code.
A system message comes first and is put before the user's first message. Special tokens come only from roles and parts,
never from text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanochat_native.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
CALCULATOR = "calculator"  # the function that a client of OpenAI's API offers to compute the model's code
CHAT_TRAINED = "chat_trained"  # a key in the meta of a checkpoint; absent for a base model
_OTHER_ROLES = {"developer": "system", "tool": "user", "function": "user"}  # from OpenAI's API; see as_turns
_PARTS = {
    "text": None,
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}

CODE_TOKENS = tuple(name for around in _PARTS.values() if around for name in around)

# In the output of the template, MARK begins an escape for the tokenizer: SPLIT means nothing, and MARKED means MARK.
MARK = "\ufdd0"  # a Unicode noncharacter, reserved for internal use
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
    """Return a Jinja template that makes transformers' apply_chat_template equal to `render` and `prompt_of`.

    transformers' tokenizers take the name of a special token in a text for that token. The template therefore puts
    SPLIT into every such name in a message, and `without_marks` removes it after the search for special tokens. The ids
    are those of `render`, except that two neighbouring parts of type text are encoded as one text.

    Raises ValueError for a special token of one character, which cannot be split.
    """
    starts = set()
    for name in special_tokens:
        if len(name) < 2:
            raise ValueError(f"special tokens must have >= 2 characters, so that they can be split, got {name!r}")
        starts.add(name[0] if name[0] == name[1] else name[:2])  # replace misses a name that overlaps with itself
    splitting = f"| replace({_literal(MARK)}, {_literal(MARKED)})"
    for start in sorted(starts):
        splitting += f" | replace({_literal(start)}, {_literal(start[0] + SPLIT + start[1:])})"
    return _TEMPLATE.replace("SPLITTING", splitting).replace("'SPLIT'", _literal(SPLIT))


def _literal(text: str) -> str:
    """Return a Jinja string; Jinja has the escapes of Python."""
    return json.dumps(text)


def without_marks() -> dict[str, Any]:
    """Return the normalizer of a Hugging Face tokenizer that removes the escapes of `chat_template`."""
    steps = ((SPLIT, ""), (MARKED, MARK))
    replaced = [{"type": "Replace", "pattern": {"String": sign}, "content": text} for sign, text in steps]
    return {"type": "Sequence", "normalizers": replaced}


Message = Mapping[str, Any]


def is_chat_trained(meta: Mapping[str, Any]) -> bool:
    """Return whether the checkpoint with this meta was trained on conversations; a base model only continues text."""
    return bool(meta.get(CHAT_TRAINED, False))


def check_messages(messages: Any) -> None:
    """Raise ValueError unless `messages` is a conversation.

    A conversation is a list of messages: at most one of the system, at the beginning, and then user and assistant in
    turn, beginning with the user.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where} must be an object with role and content, got {json_kind(message)}")
        role = _role(message, ROLES, where)
        _check_content(message.get("content"), role, f"{where}.content")
    roles = [message["role"] for message in messages]
    first = int(roles[0] == "system")
    for i, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ValueError(f"messages[{first + i}].role must be {expected!r}, as roles take turns, got {role!r}")
    if len(messages) == first:
        raise ValueError("messages must have a message of the user after that of the system")


def json_kind(value: Any) -> str:
    """Return the kind of a JSON value in words, for error messages."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _role(message: Message, roles: Sequence[str], where: str) -> str:
    role = message.get("role")
    if not isinstance(role, str) or role not in roles:
        shown = repr(role) if isinstance(role, str) else json_kind(role)
        raise ValueError(f"{where}.role must be one of {', '.join(roles)}, got {shown}")
    return role


def _check_content(content: Any, role: str, where: str) -> None:
    if isinstance(content, str):
        _check_text(content, where)
        return
    if not isinstance(content, list):
        raise ValueError(f"{where} must be a text or a list of parts, got {json_kind(content)}")
    kinds = tuple(_PARTS) if role == "assistant" else ("text",)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            types = " or ".join(map(json.dumps, kinds))
            needed = f'must be {{"type": TYPE, "text": TEXT}} with {types} as TYPE'
            raise ValueError(f"{where}[{i}] {needed} in messages of the {role}")
        _check_text(part["text"], f"{where}[{i}].text")


def _check_text(text: str, where: str) -> None:
    """Raise ValueError for half a character, which JSON can hold but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} must be text that UTF-8 can hold, got a lone surrogate") from None


def text_of(content: str | Sequence[Mapping[str, str]]) -> str:
    """Return the text of the content of a message, joining its parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation and, for each, whether it is a training target.

    Targets are the words of the assistant, with <|assistant_end|>. The output of code is not, because the assistant
    does not write it. Raises ValueError for messages that check_messages refuses, and if the tokenizer lacks a special
    token.
    """
    check_messages(messages)
    return _render_turns(tokenizer, messages)


def _render_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Return what `render` returns, for messages that check_messages or as_turns has checked."""
    tokens, is_target = [tokenizer.bos_id], [False]

    def add(ids: list[int], target: bool) -> None:
        tokens.extend(ids)
        is_target.extend([target] * len(ids))

    for role, content in _turns(messages):
        start, end = special_ids(tokenizer, (f"<|{role}_start|>", f"<|{role}_end|>"))
        add([start], False)
        if isinstance(content, str):
            add(tokenizer.encode(content), role == "assistant")
        else:
            for part in content:
                around = _PARTS[part["type"]]
                first, last = ([i] for i in special_ids(tokenizer, around)) if around else ([], [])
                add([*first, *tokenizer.encode(part["text"]), *last], part["type"] != "python_output")
        add([end], role == "assistant")
    return tokens, is_target


def prompt_of(tokenizer: Tokenizer, messages: Any, *, chat_trained: bool) -> list[int]:
    """Return the prompt for the assistant's next message, after messages in any form that `as_turns` accepts.

    The last turn must be the user's, or the assistant's with the output of code, which the assistant then continues. A
    base model has never seen the special tokens, so it continues the texts of all messages, joined by line breaks.
    Raises ValueError for messages that as_turns refuses, and if the tokenizer lacks a special token.
    """
    turns = as_turns(messages, with_code=chat_trained and has_code_tokens(tokenizer))
    continues = turns[-1]["role"] == "assistant" and _ends_with(turns[-1]["content"], "python_output")
    if turns[-1]["role"] != "user" and not continues:
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        raise ValueError(f"messages[{last}].role must be 'user' in the last message, got 'assistant'")
    if not chat_trained:
        text = "\n".join(text_of(message["content"]) for message in turns)
        return [tokenizer.bos_id, *tokenizer.encode(text)]
    tokens, _ = _render_turns(tokenizer, turns)
    if continues:
        return tokens[:-1]  # without <|assistant_end|>
    return [*tokens, *special_ids(tokenizer, ("<|assistant_start|>",))]


def has_code_tokens(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer has the special tokens of code and its output."""
    return all(name in tokenizer.special_tokens for name in CODE_TOKENS)


def content_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str | list[dict[str, str]]:
    """Return the tokens that an assistant wrote as the content of its message.

    It is a text, or a list of parts if there is code in it. Code or an output that has no end ends with the tokens.
    """
    kinds: dict[int, str] = {}  # of the part that begins behind a special token
    for kind, around in _PARTS.items() if has_code_tokens(tokenizer) else ():
        if around:
            start, end = special_ids(tokenizer, around)
            kinds |= {start: kind, end: "text"}
    parts: list[tuple[str, list[int]]] = [("text", [])]
    for token in tokens:
        if token in kinds:
            parts.append((kinds[token], []))
        else:
            parts[-1][1].append(token)
    if len(parts) == 1:
        return tokenizer.decode(tokens)
    return [{"type": kind, "text": tokenizer.decode(ids)} for kind, ids in parts if ids or kind != "text"]


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end a reply, besides <|bos|>."""
    return tuple(i for name, i in tokenizer.special_tokens.items() if name in ("<|assistant_end|>", "<|user_start|>"))


def special_ids(tokenizer: Tokenizer, names: Sequence[str]) -> list[int]:
    """Return the ids of special tokens by name. Raise ValueError if the tokenizer lacks one."""
    missing = [name for name in names if name not in tokenizer.special_tokens]
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}, which conversations need")
    return [tokenizer.special_tokens[name] for name in names]


def as_turns(messages: Any, *, with_code: bool = True) -> list[dict[str, Any]]:
    """Return messages, as clients of OpenAI's API send them, as turns that can be rendered.

    The result has at most one message of the system, at the beginning, and then those of user and assistant in turn.

    - The role developer becomes system. The roles tool and function become user: their content, too, comes from
      outside the model.
    - All messages of the system are joined by blank lines, wherever they are, and so are neighbouring messages of the
      same role. The assistant may begin. If there are only messages of the system, they become one of the user.
    - The content of an assistant may be null beside tool_calls, function_call or refusal. Each call becomes a line of
      text after the content: name(arguments). A refusal becomes text.
    - With `with_code`, a single call of the function `calculator` becomes the code that the assistant ran, and the
      message of the tool behind it the output of the code. Both belong to the assistant's message, which the next one
      continues. Without, it is text like any other call.

    Raises ValueError for messages of any other form.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message")
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role, content = _role_and_content(message, f"messages[{i}]", with_code)
        last = turns[-1]["content"] if turns and turns[-1]["role"] == "assistant" else ""
        if message["role"] in ("tool", "function") and _ends_with(last, "python"):
            turns[-1]["content"] = [*last, {"type": "python_output", "text": text_of(content)}]
        elif role == "assistant" and _ends_with(last, "python_output"):
            turns[-1]["content"] = _joined(last, content, "")
        elif role == "system":
            system.append(text_of(content))
        elif turns and turns[-1]["role"] == role:
            turns[-1]["content"] = _joined(turns[-1]["content"], content)
        else:
            turns.append({"role": role, "content": content})
    instructions = "\n\n".join(filter(None, system))
    if not turns:
        return [{"role": "user", "content": instructions}]
    return [{"role": "system", "content": instructions}, *turns] if instructions else turns


def _role_and_content(message: Any, where: str, with_code: bool) -> tuple[str, Any]:
    """Return the role of a message, as one of ROLES, and its content with calls and refusals as text."""
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object with role and content, got {json_kind(message)}")
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
    if with_code and (code := _calculation(message)) is not None:
        if content is not None:
            _check_content(content, role, f"{where}.content")
        _check_text(code, f"{where}.tool_calls[0]")
        return role, _joined(content or "", [{"type": "python", "text": code}], "")
    calls = _calls(message, where)
    if content is not None or calls is None:
        _check_content(content, role, f"{where}.content")
    return role, _joined(content or "", calls or "", "\n")


def _without_refusal(part: Any) -> Any:
    """Return a part of an assistant's message; a refusal becomes text."""
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def _ends_with(content: Any, kind: str) -> bool:
    """Return whether the last part of a content is of this kind."""
    return isinstance(content, list) and bool(content) and content[-1]["type"] == kind


def _calculation(message: Message) -> str | None:
    """Return the code of an assistant's message with a single call of the calculator; None for any other message."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or len(calls) != 1 or not isinstance(calls[0], dict):
        return None
    function = calls[0].get("function")
    if not isinstance(function, dict) or function.get("name") != CALCULATOR:
        return None
    try:
        arguments = json.loads(str(function.get("arguments")))
    except (ValueError, RecursionError):
        return None
    values = list(arguments.values()) if isinstance(arguments, dict) else []
    return values[0] if len(values) == 1 and isinstance(values[0], str) else None


def require_calculation(message: Message, where: str) -> None:
    """Raise ValueError unless the tool_calls of an assistant's message are a single call of the calculator."""
    if message.get("role") != "assistant":
        raise ValueError(f"{where} has tool_calls, but its role is {message.get('role')!r}, not 'assistant'")
    if _calculation(message) is None:
        calls = message["tool_calls"] if isinstance(message["tool_calls"], list) else []
        functions = [call.get("function") for call in calls if isinstance(call, dict)]
        names = [str(each.get("name")) for each in functions if isinstance(each, dict)]
        raise ValueError(
            f"{where} has tool_calls that cannot be trained on ({', '.join(names) or 'no function'}): the one that can "
            f"is a single call of {CALCULATOR} with one text as its arguments"
        )


def _calls(message: Message, where: str) -> str | None:
    """Return the calls of an assistant's message, one on each line; None if the message has no field for them."""
    calls, single = message.get("tool_calls"), message.get("function_call")
    if calls is None and single is None:
        return None
    if calls is not None and not isinstance(calls, list):
        raise ValueError(f"{where}.tool_calls must be a list, got {json_kind(calls)}")
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
            needed = '{"type": "function", "function": {"name": TEXT, "arguments": TEXT}}'
            raise ValueError(f"{place} must be a call of a function, {needed}")
        lines.append("{}({})".format(*called[0]))
        _check_text(lines[-1], place)
    return "\n".join(lines)


def _joined(first: Any, second: Any, between: str = "\n\n") -> Any:
    """Return two contents as one, with `between` between them if neither is empty."""
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return first + between + second
    parts = [[{"type": "text", "text": one}] if isinstance(one, str) else one for one in (first, second)]
    return [*parts[0], *([{"type": "text", "text": between}] if between else []), *parts[1]]


def _turns(messages: Sequence[Message]) -> list[tuple[str, Any]]:
    """Return (role, content) of the messages, with the system message put before the user's first."""
    turns = [(message["role"], message["content"]) for message in messages]
    if turns[0][0] != "system":
        return turns
    (_, system), *turns = turns
    first = next(i for i, (role, _) in enumerate(turns) if role == "user")
    turns[first] = ("user", f"{text_of(system)}\n\n{text_of(turns[first][1])}")
    return turns
