"""OpenAI's requests and answers: what is taken, what is refused and how, and the objects that go back.

Beside OpenAI's fields top_k, min_p and repetition_penalty are taken, as other servers of open models do.
"""

import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanochat_native import conversations
from nanochat_native.engine import Sampling
from nanochat_native.tokenizer import Tokenizer

MOST_CHOICES = 16  # of a request: prompts times n
MOST_STOPS = 4
COMPLETION_TOKENS = 16  # max_tokens of /v1/completions where it is not given, OpenAI's

# Fields that change nothing here.
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
# Fields of OpenAI's whose given values change nothing, and that are refused with any other.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
COMMON = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "n",
    "stream",
    "stream_options",
    "stop",
    "seed",
}


class ApiError(Exception):
    """An answer that is no success, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Served:
    """The model that requests are for. capacity: tokens of prompt and continuation. max_tokens: of a continuation."""

    name: str
    tokenizer: Tokenizer
    chat_trained: bool
    capacity: int
    max_tokens: int
    created: int

    def description(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochat-native",
            "max_model_len": self.capacity,
            "chat_trained": self.chat_trained,
        }


@dataclass(frozen=True)
class Call:
    """A request that was found right. Choice i continues prompts[i]; echoes: what its text begins with.

    prompt_tokens: of the prompts, each counted once, however often it is continued.
    """

    chat: bool
    prompts: list[list[int]]
    samplings: list[Sampling]
    echoes: list[str]
    stream: bool
    include_usage: bool
    prompt_tokens: int


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body. Raises ApiError 400 for anything else: no UTF-8, no JSON, NaN, a name twice, too deep."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name comes twice in an object")
        return found

    try:
        found = json.loads(body.decode(), parse_constant=no_constant, object_pairs_hook=no_duplicates)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is {_kind(found)}; it takes an object")
    return found


def read_completion(body: dict[str, Any], served: Served) -> Call:
    """A request to /v1/completions. Raises ApiError."""
    _check_fields(body, served, {"prompt", "echo"})
    prompt = body.get("prompt")
    prompts = [""] if prompt is None else prompt if _is_batch(prompt) else [prompt]
    echo = _flag(body, "echo")
    count = _choices(body, len(prompts))
    texts, rows = [], []
    for i, one in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
        rows.append(_prompt_tokens(one, served.tokenizer, where))
        texts.append((one if isinstance(one, str) else served.tokenizer.decode(one)) if echo else "")
    limit = _max_tokens(body, "max_tokens", served) or COMPLETION_TOKENS
    return _call(body, served, chat=False, rows=rows, echoes=texts, count=count, limit=limit, param="prompt")


def read_chat(body: dict[str, Any], served: Served) -> Call:
    """A request to /v1/chat/completions. Raises ApiError."""
    _check_fields(body, served, {"messages", "max_completion_tokens"})
    messages: Any = body.get("messages")
    if isinstance(messages, list):
        named = [dict(m) if isinstance(m, dict) else m for m in messages]
        for message in named:
            if isinstance(message, dict) and message.get("role") == "developer":
                message["role"] = "system"
        messages = named
    try:
        row = conversations.prompt_of(served.tokenizer, messages, chat_trained=served.chat_trained)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None
    limit = _max_tokens(body, "max_completion_tokens", served) or _max_tokens(body, "max_tokens", served)
    if limit is None:
        limit = max(1, min(served.max_tokens, served.capacity - len(row)))
    count = _choices(body, 1)
    return _call(body, served, chat=True, rows=[row], echoes=[""], count=count, limit=limit, param="messages")


def _call(
    body: dict[str, Any],
    served: Served,
    *,
    chat: bool,
    rows: list[list[int]],
    echoes: list[str],
    count: int,
    limit: int,
    param: str,
) -> Call:
    for row in rows:
        if len(row) + limit > served.capacity:
            given = f"the prompt has {len(row)} tokens, and {limit} more are asked for"
            message = f"{given}; this model takes {served.capacity} together"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
    seed = _number(body, "seed", None, low=-(2**63), high=2**63 - 1, whole=True)
    first = secrets.randbits(63) if seed is None else int(seed) % 2**63
    top_k = _number(body, "top_k", -1, low=-1, high=2**31, whole=True)
    settings: dict[str, Any] = {
        "temperature": _number(body, "temperature", 1.0, low=0, high=2),
        "top_p": max(1e-9, _number(body, "top_p", 1.0, low=0, high=1)),
        "top_k": int(top_k) if top_k > 0 else None,
        "min_p": _number(body, "min_p", 0.0, low=0, high=1),
        "repetition_penalty": _number(body, "repetition_penalty", 1.0, low=0.01, high=100),
        "stop": _stops(body),
        "stop_tokens": conversations.stop_tokens(served.tokenizer) if served.chat_trained else (),
    }
    stream = _flag(body, "stream")
    choices = [(row, echo) for row, echo in zip(rows, echoes, strict=True) for _ in range(count)]
    return Call(
        chat=chat,
        prompts=[row for row, _ in choices],
        samplings=[Sampling(limit, seed=(first + i) % 2**63, **settings) for i in range(len(choices))],
        echoes=[echo for _, echo in choices],
        stream=stream,
        include_usage=_include_usage(body, stream),
        prompt_tokens=sum(map(len, rows)),
    )


def _check_fields(body: dict[str, Any], served: Served, own: set[str]) -> None:
    for name, value in body.items():
        if value is None or name in COMMON | own | IGNORED:
            continue
        if name not in NEUTRAL:
            raise ApiError(
                400, f"{name[:100]!r} is no field of this request", param=name[:100], code="unknown_parameter"
            )
        if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]) and not (
            type(value) in (int, float) and value in NEUTRAL[name]
        ):
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
    model = body.get("model")
    if not isinstance(model, str):
        raise ApiError(400, f"model is {_kind(model)}; it takes a text, {served.name!r}", param="model")
    if model != served.name:
        message = f"the model {model[:100]!r} does not exist; this server has {served.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _is_batch(prompt: Any) -> bool:
    """Whether it is a list of prompts; a list of numbers is one prompt."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(one, str | list) for one in prompt)


def _prompt_tokens(prompt: Any, tokenizer: Tokenizer, where: str) -> list[int]:
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ApiError(400, f"{where} has a lone surrogate; it takes text", param="prompt") from None
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        if not all(0 <= token < tokenizer.vocab_size for token in prompt):
            raise ApiError(400, f"{where} takes ids from 0 to {tokenizer.vocab_size - 1}", param="prompt")
        return prompt
    taken = "it takes a text, a list of ids that is not empty, or a list of such"
    raise ApiError(400, f"{where} is {_kind(prompt)}; {taken}", param="prompt")


def _choices(body: dict[str, Any], prompts: int) -> int:
    count = int(_number(body, "n", 1, low=1, high=MOST_CHOICES, whole=True))
    if count * prompts > MOST_CHOICES:
        raise ApiError(400, f"{prompts} prompts, {count} times each; it takes {MOST_CHOICES} in all", param="n")
    return count


def _max_tokens(body: dict[str, Any], name: str, served: Served) -> int | None:
    found = _number(body, name, None, low=1, high=served.max_tokens, whole=True)
    return None if found is None else int(found)


def _number(body: dict[str, Any], name: str, default: Any, *, low: float, high: float, whole: bool = False) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int and (whole or type(value) is not float):
        raise ApiError(400, f"{name} is {_kind(value)}; it takes a {'whole ' if whole else ''}number", param=name)
    if not low <= value <= high or not math.isfinite(value):
        shown = value if abs(value) < 1e18 else "a number too large"
        raise ApiError(400, f"{name} is {shown}; it takes a number from {low:g} to {high:g}", param=name)
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise ApiError(400, f"{name} is {_kind(value)}; it takes true or false", param=name)
    return bool(value)


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    right = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not right or not all(isinstance(stop, str) and 0 < len(stop) <= 1000 for stop in stops):
        raise ApiError(400, f"stop takes a text, or up to {MOST_STOPS} of them, none empty", param="stop")
    return tuple(stops)


def _include_usage(body: dict[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not stream or set(options) - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, "stream_options goes with stream, and takes include_usage", param="stream_options")
    return _flag(options, "include_usage")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


class Answer:
    """The objects that a call is answered with."""

    def __init__(self, call: Call, served: Served) -> None:
        self.call = call
        self.tokens = 0
        self._head = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
        }

    def whole(self, texts: list[str], reasons: list[str]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for i, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            said: dict[str, Any] = {"text": self.call.echoes[i] + text}
            if self.call.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": i, **said, "logprobs": None, "finish_reason": reason})
        kind = "chat.completion" if self.call.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage()}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        if self.call.chat:
            return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)
        echo = self.call.echoes[index]
        return self._chunk(index, {"text": echo}, None) if echo else None

    def chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"delta": {"content": text}} if self.call.chat else {"text": text}, None)

    def last_chunk(self, index: int, reason: str) -> dict[str, Any]:
        return self._chunk(index, {"delta": {}} if self.call.chat else {"text": ""}, reason)

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head, "object": self._chunk_kind(), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompt = self.call.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens}

    def _chunk(self, index: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": self._chunk_kind(), "choices": [choice]}

    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.call.chat else "text_completion"


Reader = Callable[[dict[str, Any], Served], Call]
