"""OpenAI's requests and answers: the supported fields, the errors for others, and the objects of the answers.

In addition to OpenAI's fields, top_k, min_p and repetition_penalty are supported, as in other servers for open models.
A known field that is not supported is an error if its value would change the answer. Unknown fields are ignored; the
header X-Ignored-Fields of the answer lists them. conversations.as_turns describes how roles are read, in any order.

Log-probabilities are those of the model's own distribution (sampling.Scored), not of the one that tokens are drawn
from. The list of a completion has every predicted token: also the tokens that a stop string cut off, and the special
token that ended the text. With echo the tokens of the prompt come first. The <|bos|> before a text is left out, since
it is not in the text, so that the first token of a text has a log-probability. The first token of a prompt that is
given as ids has none (null). text_offset counts characters from the beginning of the prompt.
"""

import codecs
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_native.data import conversations
from nanochat_native.data.conversations import json_kind
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference.engine import beyond_training, too_long
from nanochat_native.inference.sampling import Sampling, Scored

MAX_CHOICES = 128  # of a request: prompts times n, if slots and queue have room for them
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000  # OpenAI allows 4 strings; evaluation harnesses send more
MAX_LOGPROBS, MAX_CHAT_LOGPROBS = 5, 20  # OpenAI's limits
MAX_BIASES, MAX_BIAS = 1024, 100
MAX_DIGITS = 1000  # of a number in a body
MAX_IGNORED_SHOWN = 20  # ignored fields that the header lists
COMPLETION_TOKENS = 16  # OpenAI's default for max_tokens of /v1/completions

COMMON = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "logit_bias",
    "logprobs",
    "n",
    "stream",
    "stream_options",
    "stop",
    "seed",
}
COMPLETION = {"prompt", "echo", "best_of"}  # only for /v1/completions
CHAT = {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "functions", "function_call"}
# OpenAI's fields that have no effect here.
SILENT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "parallel_tool_calls",
}
# Fields of OpenAI and of other servers, with the values that are accepted although the field is not supported, because
# they change nothing. Any other value is an error.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "prompt": (),
    "echo": (False,),
    "best_of": (1,),
    "messages": (),
    "max_completion_tokens": (),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "typical_p": (1,),
    "grammar": ("",),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}


class ApiError(Exception):
    """An error, and its answer in OpenAI's format."""

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
    """The served model and its limits.

    Attributes:
        calculator: Whether calculations in a chat are computed; see inference.calculator.
        capacity: Largest number of tokens of prompt and continuation.
        trained_positions: Sequence length that the model was trained on.
        max_tokens: Largest number of tokens of a continuation.
        choices: Largest number of choices of a request.
    """

    name: str
    tokenizer: Tokenizer
    chat_trained: bool
    calculator: bool
    capacity: int
    trained_positions: int
    max_tokens: int
    choices: int
    created: int

    def description(self) -> dict[str, Any]:
        """Return the model object of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochat-native",
            "max_model_len": self.capacity,
            "trained_positions": self.trained_positions,
            "chat_trained": self.chat_trained,
        }


@dataclass(frozen=True)
class Call:
    """A valid request. Candidate i continues prompts[i] with samplings[i].

    Attributes:
        count: Number of choices for each prompt: the best of best_of candidates, which are adjacent.
        texts: The prompts as text; "" for a chat.
        hidden: Number of tokens at the beginning of each prompt that are not in its text.
        echo: Whether a choice begins with its prompt.
        logprobs: Number of likeliest tokens to list for each token; None for no log-probabilities.
        argument: Name of the expression in calls of the client's calculator; None if the client has none.
        prompt_tokens: Number of tokens of the prompts; a prompt counts once, even if it is continued several times.
        ignored: Names of unknown fields.
    """

    chat: bool
    prompts: list[list[int]]
    samplings: list[Sampling]
    count: int
    best_of: int
    texts: list[str]
    hidden: list[int]
    echo: bool
    logprobs: int | None
    stream: bool
    include_usage: bool
    argument: str | None
    prompt_tokens: int
    ignored: list[str]

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        names = [json.dumps(name[:40])[1:-1] for name in self.ignored[:MAX_IGNORED_SHOWN]]
        return {"X-Ignored-Fields": ", ".join(names)} if names else {}


def read_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises ApiError 400 for anything else, and for NaN, a repeated name, a number with too many digits and nesting that
    is too deep.
    """

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not allowed")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("an object has a name twice")
        return found

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a number must have at most {MAX_DIGITS} digits, got {len(digits)}")
        return int(digits)

    try:
        found = json.loads(body.decode(), parse_constant=no_constant, parse_int=whole, object_pairs_hook=no_duplicates)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not JSON: byte {error.start} is not UTF-8") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be an object, got {json_kind(found)}")
    return found


def read_completion(body: dict[str, Any], served: Served) -> Call:
    """Read a request to /v1/completions. Raises ApiError."""
    ignored = _check_fields(body, served, COMPLETION)
    prompt = body.get("prompt")
    prompts = [""] if prompt is None else prompt if _is_batch(prompt) else [prompt]
    texts, rows, hidden = [], [], []
    for i, one in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
        rows.append(_prompt_tokens(one, served.tokenizer, where))
        texts.append(one if isinstance(one, str) else served.tokenizer.decode(one))
        hidden.append(1 if isinstance(one, str) else 0)
    logprobs = _whole(body, "logprobs", None, low=0, high=MAX_LOGPROBS)
    limit = _whole(body, "max_tokens", COMPLETION_TOKENS, low=0, high=served.max_tokens)
    return _call(body, served, rows, limit, "prompt", ignored, logprobs=logprobs, texts=texts, hidden=hidden)


def read_chat(body: dict[str, Any], served: Served) -> Call:
    """Read a request to /v1/chat/completions. Raises ApiError.

    The only tool that the model can call is a calculator, a function of this name with one parameter. If a request
    offers it among its tools, the client computes; else the server does. A request may offer other tools, since a model
    may always call none, but a required call is an error.
    """
    ignored = _check_fields(body, served, CHAT)
    for name, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if body.get(name) is not None and not isinstance(body[name], list):
            raise ApiError(400, f"{name} must be a list, got {json_kind(body[name])}", param=name)
        if body.get(choice) not in (None, "none", "auto"):
            message = f"{choice} must be 'none' or 'auto': this model cannot be made to call tools"
            raise ApiError(400, message, param=choice, code="unsupported_value")
    try:
        row = conversations.prompt_of(served.tokenizer, body.get("messages"), chat_trained=served.chat_trained)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None
    most = max(1, min(served.max_tokens, served.capacity - len(row)))
    names = ("max_completion_tokens", "max_tokens")
    given = {_whole(body, name, None, low=1, high=served.max_tokens) for name in names} - {None}
    if len(given) > 1:
        message = "max_tokens and max_completion_tokens must be equal if both are set"
        raise ApiError(400, message, param="max_tokens")
    logprobs = _whole(body, "top_logprobs", None, low=0, high=MAX_CHAT_LOGPROBS)
    if not _flag(body, "logprobs"):
        if logprobs is not None:
            raise ApiError(400, "top_logprobs requires logprobs to be true", param="top_logprobs")
    elif logprobs is None:
        logprobs = 0
    limit = given.pop() if given else most
    argument = _calculator_argument(body)
    return _call(body, served, [row], limit, "messages", ignored, logprobs=logprobs, argument=argument)


def _calculator_argument(body: dict[str, Any]) -> str | None:
    """Return the name of the argument of the calculator that a request offers; None if it offers none."""
    for tool in body.get("tools") or [] if body.get("tool_choice") != "none" else []:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or function.get("name") != conversations.CALCULATOR:
            continue
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(properties, dict) and len(properties) == 1:
            return str(next(iter(properties)))
    return None


def _call(
    body: dict[str, Any],
    served: Served,
    rows: list[list[int]],
    limit: int,
    param: str,
    ignored: list[str],
    *,
    logprobs: int | None,
    texts: list[str] | None = None,
    hidden: list[int] | None = None,
    argument: str | None = None,
) -> Call:
    """Return the Call of a request; texts and hidden are None for a chat."""
    chat = texts is None
    for row in rows:
        if len(row) + limit > served.capacity:
            message = too_long(len(row), limit, served.capacity)
            raise ApiError(400, message, param=param, code="context_length_exceeded")
    stream = _flag(body, "stream")
    count = _whole(body, "n", 1, low=1, high=MAX_CHOICES)
    best_of = _whole(body, "best_of", count, low=1, high=MAX_CHOICES)
    if best_of < count:
        raise ApiError(400, f"best_of must be >= n, got best_of {best_of} and n {count}", param="best_of")
    if best_of > count and stream:
        raise ApiError(
            400, "best_of > n cannot be combined with stream: the best is only known at the end", param="best_of"
        )
    if best_of * len(rows) > served.choices:
        given = f"got {len(rows)} x {best_of}"
        blamed = "best_of" if best_of > count else "n" if count > 1 else param
        raise ApiError(400, f"a request must have at most {served.choices} continuations, {given}", param=blamed)
    echo = _flag(body, "echo")
    seed = _whole(body, "seed", None, low=-(2**63), high=2**63 - 1)
    first = secrets.randbits(63) if seed is None else seed % 2**63
    top_k = _whole(body, "top_k", -1, low=-1, high=2**31)
    settings: dict[str, Any] = {
        "temperature": _number(body, "temperature", 1.0, low=0, high=2),
        "top_p": max(1e-9, _number(body, "top_p", 1.0, low=0, high=1)),
        "top_k": top_k if top_k > 0 else None,
        "min_p": _number(body, "min_p", 0.0, low=0, high=1),
        "repetition_penalty": _number(body, "repetition_penalty", 1.0, low=0.01, high=100),
        "logit_bias": _biases(body, served.tokenizer.vocab_size),
        "stop": _stops(body),
        "stop_tokens": conversations.stop_tokens(served.tokenizer) if served.chat_trained else (),
        "logprobs": 0 if logprobs is None and best_of > count else logprobs,
        "score_prompt": echo and logprobs is not None,
        "code": "write" if not chat or not served.calculator else "compute" if argument is None else "call",
    }

    def repeated(of_prompts: list[Any]) -> list[Any]:
        return [one for one in of_prompts for _ in range(best_of)]

    return Call(
        chat=chat,
        prompts=repeated(rows),
        samplings=[Sampling(limit, seed=(first + i) % 2**63, **settings) for i in range(best_of * len(rows))],
        count=count,
        best_of=best_of,
        texts=repeated(texts or [""] * len(rows)),
        hidden=repeated(hidden or [0] * len(rows)),
        echo=echo,
        logprobs=logprobs,
        stream=stream,
        include_usage=_include_usage(body, stream),
        argument=argument,
        prompt_tokens=sum(map(len, rows)),
        ignored=ignored,
    )


def _check_fields(body: dict[str, Any], served: Served, own: set[str]) -> list[str]:
    """Return the names of unknown fields. Raises ApiError for another model and for fields that are not supported."""
    unknown = []
    for name, value in body.items():
        if value is None or name in COMMON | own | SILENT:
            continue
        if name not in NEUTRAL:
            unknown.append(name)
        elif not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            raise ApiError(400, _not_served(name, value), param=name, code="unsupported_parameter")
    model = body.get("model")
    if not isinstance(model, str):
        raise ApiError(400, f"model must be the string {served.name!r}, got {json_kind(model)}", param="model")
    if model != served.name:
        message = f"the model {model[:100]!r} does not exist; this server serves {served.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return unknown


def _same(value: Any, other: Any) -> bool:
    """Return whether two JSON values are equal: true is not 1, and false is not 0."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _not_served(name: str, value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    shown = f" with type {kind[:100]!r}" if isinstance(kind, str) else ""
    allowed = [json.dumps(neutral) for neutral in NEUTRAL[name]]
    return f"{name}{shown} is not supported here; it must be {' or '.join([*allowed, 'null'])}"


def _is_batch(prompt: Any) -> bool:
    """Return whether it is a list of prompts; a list of numbers is one prompt."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(one, str | list) for one in prompt)


def _prompt_tokens(prompt: Any, tokenizer: Tokenizer, where: str) -> list[int]:
    if isinstance(prompt, str):
        if not _is_text(prompt):
            raise ApiError(400, f"{where} must be text, got a lone surrogate in it", param="prompt")
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        if not all(0 <= token < tokenizer.vocab_size for token in prompt):
            raise ApiError(400, f"{where} must have ids from 0 to {tokenizer.vocab_size - 1}", param="prompt")
        return prompt
    allowed = "a string, a list of ids that is not empty, or a list of these"
    raise ApiError(400, f"{where} must be {allowed}, got {json_kind(prompt)}", param="prompt")


def _is_text(value: Any) -> bool:
    """Return whether it is a string that UTF-8 can encode; JSON allows lone surrogates."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _whole(body: dict[str, Any], name: str, default: Any, *, low: int, high: int) -> Any:
    return _number(body, name, default, low=low, high=high, types=(int,))


def _number(
    body: dict[str, Any], name: str, default: Any, *, low: float, high: float, types: Sequence[type] = (int, float)
) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in types:
        kind = "number" if float in types else "whole number"
        shown = value if type(value) is float else json_kind(value)
        raise ApiError(400, f"{name} must be a {kind}, got {shown}", param=name)
    if not low <= value <= high:
        shown = value if abs(value) < 1e18 else "a number too large"
        raise ApiError(400, f"{name} must be from {low:g} to {high:g}, got {shown}", param=name)
    return value


def _biases(body: dict[str, Any], vocab_size: int) -> tuple[tuple[int, float], ...]:
    given = body.get("logit_bias")
    if given is None:
        return ()
    allowed = (
        f"an object of at most {MAX_BIASES} ids below {vocab_size}, each with a number from -{MAX_BIAS} to {MAX_BIAS}"
    )
    if not isinstance(given, dict) or len(given) > MAX_BIASES:
        shown = f"an object of {len(given)}" if isinstance(given, dict) else json_kind(given)
        raise ApiError(400, f"logit_bias must be {allowed}, got {shown}", param="logit_bias")
    found: dict[int, float] = {}
    for name, value in given.items():
        token = int(name) if name.isascii() and name.isdigit() and len(name) < MAX_DIGITS else vocab_size
        number_ = type(value) in (int, float) and -MAX_BIAS <= value <= MAX_BIAS
        if token >= vocab_size or token in found or not number_:
            message = f"logit_bias must be {allowed}, got {name[:40]!r}"
            raise ApiError(400, message, param="logit_bias")
        found[token] = value
    return tuple(found.items())


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise ApiError(400, f"{name} must be true or false, got {json_kind(value)}", param=name)
    return bool(value)


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    right = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not right or not all(_is_text(stop) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        allowed = f"a string of 1 to {MAX_STOP_LENGTH} characters, or a list of at most {MAX_STOPS}"
        raise ApiError(400, f"stop must be {allowed}", param="stop")
    return tuple(stops)


def _include_usage(body: dict[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not stream or set(options) - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, "stream_options requires stream, and supports only include_usage", param="stream_options")
    return _flag(options, "include_usage")


@dataclass
class Candidate:
    """The output of a candidate so far: text without the prompt, scores as in the engine."""

    text: str = ""
    tokens: int = 0
    scored: list[Scored] = field(default_factory=list)
    finish_reason: str = ""
    code: str | None = None


class Answer:
    """Builds the objects of an answer from the output of its candidates as it arrives."""

    def __init__(self, call: Call, served: Served) -> None:
        self.call, self.served = call, served
        self.candidates = [Candidate() for _ in call.prompts]
        # For candidates with log-probabilities: the place of the next token in the text.
        self._places = [
            Places(served.tokenizer, call, i) if call.logprobs is not None and not call.chat else None
            for i in range(len(call.prompts))
        ]
        self._head = {
            "id": f"{'chatcmpl' if call.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
        }

    def put(
        self,
        index: int,
        tokens: int,
        text: str,
        scored: list[Scored],
        finish_reason: str | None,
        code: str | None = None,
    ) -> None:
        """Add the new output of a candidate."""
        candidate = self.candidates[index]
        candidate.text += text
        candidate.tokens += tokens
        candidate.scored += scored
        candidate.finish_reason, candidate.code = finish_reason or "", code

    def whole(self) -> dict[str, Any]:
        """Return the answer without streaming."""
        choices: list[dict[str, Any]] = []
        for i in self._chosen():
            candidate = self.candidates[i]
            content: dict[str, Any] = {"text": self._echo(i) + candidate.text}
            if self.call.chat:
                message: dict[str, Any] = {"role": "assistant", "content": candidate.text, "refusal": None}
                if calls := self._calls(i):
                    message |= {"content": candidate.text or None, "tool_calls": calls}
                content = {"message": message}
            end = {"logprobs": self._logprobs(i, candidate.scored), "finish_reason": candidate.finish_reason}
            choices.append({"index": len(choices), **content, **end})
        kind = "chat.completion" if self.call.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage(), **self._warning()}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Return the chunk before any output of a candidate; None if there is none."""
        if self.call.chat:
            return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
        # With log-probabilities the prompt comes later, together with its own.
        echo = self._echo(index)
        return self._chunk(index, {"text": echo}) if echo and self.call.logprobs is None else None

    def chunk(self, index: int, text: str, scored: list[Scored]) -> dict[str, Any] | None:
        """Return the chunk for new output that has been put; None if it is empty."""
        if self.call.logprobs is not None and len(self.candidates[index].scored) == len(scored):
            text = self._echo(index) + text
        logprobs = self._logprobs(index, scored) if scored else None
        if not text and logprobs is None:
            return None
        return self._chunk(index, {"delta": {"content": text}} if self.call.chat else {"text": text}, logprobs)

    def call_chunk(self, index: int) -> dict[str, Any] | None:
        """Return the chunk with the call that ends a candidate; None if there is none."""
        calls = [{"index": 0, **call} for call in self._calls(index)]
        return self._chunk(index, {"delta": {"tool_calls": calls}}) if calls else None

    def last_chunk(self, index: int) -> dict[str, Any]:
        """Return the chunk that ends a candidate."""
        content: dict[str, Any] = {"delta": {}} if self.call.chat else {"text": ""}
        return {**self._chunk(index, content, None, self.candidates[index].finish_reason), **self._warning()}

    def _calls(self, index: int) -> list[dict[str, Any]]:
        """Return the calls of the client's calculator that a candidate ends with: one or none."""
        code, argument = self.candidates[index].code, self.call.argument
        if code is None or argument is None:
            return []
        function = {"name": conversations.CALCULATOR, "arguments": json.dumps({argument: code}, ensure_ascii=False)}
        return [{"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}]

    def usage_chunk(self) -> dict[str, Any]:
        """Return the chunk with the usage, the last of a stream that asks for it."""
        return {**self._head, "object": self._chunk_kind(), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens."""
        prompt, completion = self.call.prompt_tokens, sum(candidate.tokens for candidate in self.candidates)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _chosen(self) -> list[int]:
        """Return the candidates that become choices: for each prompt those with the highest mean log-probability."""
        count, best_of = self.call.count, self.call.best_of
        if best_of == count:
            return list(range(len(self.candidates)))
        groups = [range(first, first + best_of) for first in range(0, len(self.candidates), best_of)]
        return [i for group in groups for i in sorted(group, key=lambda i: (-self._mean(i), i))[:count]]

    def _mean(self, index: int) -> float:
        drawn = self.candidates[index].scored[len(self.call.prompts[index]) if self._scores_prompt else 0 :]
        return math.fsum(one.logprob or 0.0 for one in drawn) / max(1, len(drawn))

    @property
    def _scores_prompt(self) -> bool:
        return self.call.echo and self.call.logprobs is not None

    def _echo(self, index: int) -> str:
        return self.call.texts[index] if self.call.echo else ""

    def _warning(self) -> dict[str, str]:
        pairs = zip(self.call.prompts, self.candidates, strict=True)
        longest = max(len(prompt) + candidate.tokens for prompt, candidate in pairs)
        trained = self.served.trained_positions
        if longest <= trained:
            return {}
        return {"warning": beyond_training(longest, trained)}

    def _logprobs(self, index: int, scored: list[Scored]) -> dict[str, Any] | None:
        """Return the log-probabilities of the next tokens of a candidate, in OpenAI's format."""
        count, tokenizer = self.call.logprobs, self.served.tokenizer
        if count is None:
            return None
        places = self._places[index]
        if places is not None:
            return places.logprobs(scored, count)
        ends = {tokenizer.bos_id, *self.call.samplings[index].stop_tokens}
        content = [
            {**_chat_token(tokenizer, one.token, one.logprob), "top_logprobs": _chat_top(tokenizer, one)}
            for one in scored
            if one.token not in ends  # an end token is not in the content
        ]
        return {"content": content, "refusal": None}

    def _chunk(
        self, index: int, content: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": self._chunk_kind(), "choices": [choice]}

    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.call.chat else "text_completion"


class Places:
    """The places of a completion's tokens in its text, and their log-probabilities in OpenAI's format."""

    def __init__(self, tokenizer: Tokenizer, call: Call, index: int) -> None:
        self._tokenizer = tokenizer
        scored = call.samplings[index].score_prompt
        self._hidden = call.hidden[index] if scored else 0  # tokens to leave out
        self._given = len(call.prompts[index]) - self._hidden if scored else 0  # prompt tokens still to come
        self._prompt = call.texts[index]
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0 if self._given else len(self._prompt)

    def logprobs(self, scored: list[Scored], count: int) -> dict[str, Any]:
        """Return the log-probabilities of the next tokens, each with the `count` likeliest."""
        hidden = min(self._hidden, len(scored))
        self._hidden -= hidden
        scored = scored[hidden:]
        names = [_name(self._tokenizer, one.token) for one in scored]
        tops: list[dict[str, float] | None] = []
        for name, one in zip(names, scored, strict=True):
            likeliest = {_name(self._tokenizer, token): logprob for token, logprob in one.top[:count]}
            tops.append(None if one.logprob is None else {**likeliest, name: one.logprob})
        return {
            "tokens": names,
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": tops,
            "text_offset": [self._place(one.token) for one in scored],
        }

    def _place(self, token: int) -> int:
        """Return the place of the next token: the number of complete characters before it."""
        place = self._offset
        self._offset += len(self._characters.decode(self._tokenizer.decode_bytes([token])))
        if self._given == 1:  # the continuation begins where the prompt's text ends, even within a character
            self._offset = len(self._prompt)
            self._characters.reset()
        self._given -= 1
        return place


def _name(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as completions show it; part of a character is shown as bytes."""
    content = tokenizer.decode_bytes([token])
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _chat_token(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    content = tokenizer.decode_bytes([token])
    special = token in tokenizer.special_tokens.values()
    text = content.decode("utf-8", errors="backslashreplace")
    return {"token": text, "logprob": logprob, "bytes": None if special else list(content)}


def _chat_top(tokenizer: Tokenizer, scored: Scored) -> list[dict[str, Any]]:
    return [_chat_token(tokenizer, token, logprob) for token, logprob in scored.top]


Reader = Callable[[dict[str, Any], Served], Call]
