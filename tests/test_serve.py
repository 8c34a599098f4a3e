"""The server: OpenAI's client, streams, limits and their status codes, clients that go away, malformed requests."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from training import BACKEND, HANGS, train, wait_until, write_text

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn

from nanochat_native import conversations, ops
from nanochat_native.bench import load
from nanochat_native.engine import Engine, Sampling
from nanochat_native.loading import load_model
from nanochat_native.serve import __main__ as command
from nanochat_native.serve.app import Limits, Server
from nanochat_native.serve.metrics import Histogram, Metrics
from nanochat_native.serve.protocol import Served
from nanochat_native.serve.worker import ClosedError, Worker

KEY = "sk-secret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    write_text(folder / "text.jsonl")
    assert train(folder, run="base", steps=6, vocab_size=300, max_seq_len=64) == 0
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder / "runs/base")


class Running:
    """A server on a free port in a thread of this process."""

    def __init__(self, model, *, slots=2, max_waiting=4, key=None, chat=False, slow=0.0, **limits):
        gpt, tokenizer, _ = model
        self.tokenizer = tokenizer
        self.engine = Engine(gpt, tokenizer, slots=slots, capacity=600)
        step = self.engine.step
        self.steps = 0

        def slow_step():
            self.steps += 1
            time.sleep(slow)
            return step()

        self.engine.step = slow_step
        self.worker = Worker(self.engine, slots, max_waiting)
        served = Served("tiny", tokenizer, chat_trained=chat, capacity=600, max_tokens=500, created=1)
        limits = Limits(**{"max_body_bytes": 50_000, "timeout": HANGS} | limits)
        self.server = Server(served, self.worker, limits, api_key=key, loopback=True)
        self.socket = command.bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        config = uvicorn.Config(self.server.app, log_level="error", timeout_graceful_shutdown=1)
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def close(self):
        self.uvicorn.should_exit = True
        self.thread.join(HANGS)
        self.worker.close()
        assert not self.thread.is_alive()

    def client(self, key="unused"):
        openai = pytest.importorskip("openai")
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=HANGS)

    def send(self, data, *, wait=HANGS, until=b""):
        """What comes back for these bytes until the server closes, or `until` is in it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            received = b""
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while part := connection.recv(65536):
                    received += part
                    if until and until in received:
                        break
        return received

    def request(self, body, path="/v1/completions", method="POST", headers="", **options):
        """(status, headers, body as JSON or text)."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}"
        data = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
        received = self.send(data, **options)
        head, _, rest = received.partition(b"\r\n\r\n")
        assert head, "no answer"
        with contextlib.suppress(ValueError):
            rest = json.loads(rest)
        return int(head.split()[1]), head.decode().lower(), rest

    def settles(self):
        """True when all slots are free."""
        return wait_until(lambda: self.engine.idle and self.worker.running == self.worker.waiting == 0)


@pytest.fixture(scope="module")
def server(model):
    running = Running(model)
    yield running
    running.close()


@contextlib.contextmanager
def started(model, **settings):
    running = Running(model, **settings)
    try:
        yield running
    finally:
        running.close()


def completion(**fields):
    return {"model": "tiny", "prompt": "the tensor", "max_tokens": 12, "seed": 3} | fields


# --- what OpenAI's client sees ---


def test_completions_are_the_engines(server, model):
    client = server.client()
    answer = client.completions.create(model="tiny", prompt="the tensor", max_tokens=20, temperature=0)
    tokenizer = model[1]
    prompt = [tokenizer.bos_id, *tokenizer.encode("the tensor")]
    (expected,) = Engine(model[0], tokenizer, slots=1).generate([(prompt, Sampling(20, temperature=0))])
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert len(choice.text) > 10
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(expected.tokens))
    assert usage.total_tokens == len(prompt) + len(expected.tokens)
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    ids = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0)
    assert ids.choices[0].text == choice.text


def test_a_stream_says_what_the_whole_answer_does(server):
    client = server.client()
    for fields in ({"seed": 5}, {"seed": 6, "n": 3}, {"seed": 7, "prompt": ["a", "the kernel"], "echo": True}):
        asked = {"model": "tiny", "prompt": "the tensor", "max_tokens": 25} | fields
        whole = client.completions.create(**asked)
        texts, reasons, usages = {}, {}, []
        for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usages += [chunk.usage] if chunk.usage else []
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                reasons[choice.index] = choice.finish_reason
        assert texts == {choice.index: choice.text for choice in whole.choices}
        assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
        assert [u.total_tokens for u in usages] == [whole.usage.total_tokens]
    assert len(set(texts.values())) == 2
    assert texts[1].startswith("the kernel")


def test_seeds(server):
    client = server.client()

    def text(**fields):
        return (
            client.completions.create(model="tiny", prompt="a", max_tokens=30, temperature=1.5, **fields)
            .choices[0]
            .text
        )

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=-1) == text(seed=-1)
    assert text() != text()
    many = client.completions.create(model="tiny", prompt="a", max_tokens=30, temperature=1.5, seed=1, n=3)
    assert len({choice.text for choice in many.choices}) == 3
    assert many.choices[0].text == text(seed=1)


def test_stop_strings_and_extensions(server):
    client = server.client()
    free = client.completions.create(model="tiny", prompt="the tensor", max_tokens=40, temperature=0).choices[0].text
    stop = free[12:15]
    cut = client.completions.create(model="tiny", prompt="the tensor", max_tokens=40, temperature=0, stop=[stop])
    assert cut.choices[0].text == free[: free.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}
    same = client.completions.create(model="tiny", prompt="the tensor", max_tokens=40, extra_body=extra)
    assert same.choices[0].text == free


def test_chat_with_a_base_model_continues_the_texts(server):
    client = server.client()
    messages = [
        {"role": "developer", "content": "the"},
        {"role": "user", "content": [{"type": "text", "text": "tensor"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=15, temperature=0)
    plain = client.completions.create(model="tiny", prompt="the\ntensor", max_tokens=15, temperature=0)
    assert answer.choices[0].message.content == plain.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=15, temperature=0, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_with_a_chat_model_has_its_tokens_and_ends_with_the_answer(folder, model):
    gpt, tokenizer, _ = model
    ends = conversations.stop_tokens(tokenizer)
    with started(model, chat=True) as server:
        client = server.client()
        messages = [{"role": "user", "content": "hi"}]
        answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=10)
        prompt = conversations.prompt_of(tokenizer, messages, chat_trained=True)
        sampling = Sampling(10, temperature=0, stop_tokens=ends)
        (expected,) = Engine(gpt, tokenizer, slots=1).generate([(prompt, sampling)])
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == len(prompt)
        without_limit = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
        assert without_limit.usage.completion_tokens <= 500
        assert client.models.list().data[0].model_extra["chat_trained"] is True


def test_models(server):
    client = server.client()
    (found,) = client.models.list().data
    assert (found.id, found.object) == ("tiny", "model")
    assert found.model_extra["chat_trained"] is False
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_are_the_clients_exceptions(server, model):
    openai = pytest.importorskip("openai")
    client = server.client()
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-9", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="word " * 700, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    with started(model, key=KEY) as locked:
        assert locked.client(KEY).models.list().data
        for wrong in ("sk", KEY + "x", KEY.upper()):
            with pytest.raises(openai.AuthenticationError):
                locked.client(wrong).models.list()
        assert locked.request(b"", "/v1/models", "GET")[0] == 401
        status, head, body = locked.request(completion())
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert "www-authenticate: bearer" in head
        assert locked.request(b"", "/metrics", "GET")[0] == 401
        assert locked.request(b"", "/metrics", "GET", "Authorization: Bearer \xff\xfe\r\n")[0] == 401
        assert locked.request(b"", "/health", "GET")[0] == 200
        assert locked.request(b"", "/", "GET")[0] == 200
        assert locked.request(b"", "/metrics", "GET", f"Authorization: bearer {KEY}\r\n")[0] == 200
        assert locked.request(b"", "/metrics", "GET", f"Authorization: Basic {KEY}\r\n")[0] == 401


# --- what is refused ---

REFUSED = [
    ({"prompt": None, "temperature": "hot"}, "temperature is a text; it takes a number", "temperature"),
    ({"temperature": True}, "temperature is true or false", "temperature"),
    ({"temperature": -0.1}, "temperature is -0.1; it takes a number from 0 to 2", "temperature"),
    ({"temperature": 10**400}, "temperature is a number too large", "temperature"),
    ({"max_tokens": 0}, "max_tokens is 0; it takes a number from 1 to 500", "max_tokens"),
    ({"max_tokens": 501}, "max_tokens is 501", "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens is a number; it takes a whole number", "max_tokens"),
    ({"max_tokens": True}, "max_tokens is true or false", "max_tokens"),
    ({"n": 17}, "n is 17", "n"),
    ({"n": 9, "prompt": ["a", "b"]}, "2 prompts, 9 times each; it takes 16 in all", "n"),
    ({"top_p": 1.1}, "top_p is 1.1", "top_p"),
    ({"top_k": 1.0}, "top_k is a number; it takes a whole number", "top_k"),
    ({"seed": 2**63}, "seed is a number too large", "seed"),
    ({"seed": "x"}, "seed is a text", "seed"),
    ({"stop": ["a"] * 5}, "stop takes a text, or up to 4", "stop"),
    ({"stop": [""]}, "stop takes a text", "stop"),
    ({"stop": 3}, "stop takes a text", "stop"),
    ({"stream": "yes"}, "stream is a text; it takes true or false", "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options goes with stream", "stream_options"),
    ({"stream": True, "stream_options": 3}, "stream_options goes with stream", "stream_options"),
    ({"prompt": 3}, "prompt is a number; it takes a text", "prompt"),
    ({"prompt": []}, "prompt is a list; it takes", "prompt"),
    ({"prompt": [1, "a"]}, "prompt is a list; it takes", "prompt"),
    ({"prompt": [[1], []]}, "prompt[1] is a list", "prompt"),
    ({"prompt": [1, True]}, "prompt is a list", "prompt"),
    ({"prompt": [300]}, "prompt takes ids from 0 to 299", "prompt"),
    ({"prompt": [-1]}, "prompt takes ids from 0 to 299", "prompt"),
    ({"prompt": "\ud800"}, "prompt has a lone surrogate", "prompt"),
    ({"model": None}, "model is null; it takes a text, 'tiny'", "model"),
    ({"model": 3}, "model is a number", "model"),
    ({"logprobs": 5}, "logprobs is not supported", "logprobs"),
    ({"best_of": 2}, "best_of is not supported", "best_of"),
    ({"suffix": "x"}, "suffix is not supported", "suffix"),
    ({"logit_bias": {"5": 1}}, "logit_bias is not supported", "logit_bias"),
    ({"presence_penalty": 0.5}, "presence_penalty is not supported", "presence_penalty"),
    ({"tempratur": 1}, "'tempratur' is no field", "tempratur"),
]


@pytest.mark.parametrize(("fields", "message", "param"), REFUSED, ids=lambda value: str(value)[:50])
def test_wrong_fields_are_named(server, fields, message, param):
    status, _, body = server.request(completion(**fields))
    assert status == 400
    assert message in body["error"]["message"]
    assert body["error"]["param"] == param
    assert body["error"]["type"] == "invalid_request_error"


def test_neutral_and_null_fields_are_taken(server):
    fields = {"best_of": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logprobs": None, "logit_bias": {}}
    fields |= {"user": "me", "temperature": None, "max_tokens": None, "stop": None, "n": None, "stream": None}
    status, _, body = server.request(completion(**fields))
    assert status == 200
    assert body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "messages takes a list"),
        ({"messages": []}, "messages takes a list"),
        ({"messages": "hi"}, "messages takes a list"),
        ({"messages": [3]}, "messages[0] is int"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role is 'wizard'"),
        ({"messages": [{"role": "user", "content": None}]}, "content is NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no part that user messages have"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "lone surrogate"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "last one takes 'user'",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_messages_are_named(server, fields, message):
    status, _, body = server.request({"model": "tiny", **fields}, "/v1/chat/completions")
    assert status == 400
    assert message in body["error"]["message"]
    assert body["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"prompt": "x"},
        {"echo": True},
    ],
    ids=str,
)
def test_what_chat_does_not_have_is_refused(server, fields):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **fields}
    assert server.request(body, "/v1/chat/completions")[0] == 400
    body = {"model": "tiny", "messages": body["messages"], "max_tokens": 2, "response_format": {"type": "text"}}
    assert server.request(body, "/v1/chat/completions")[0] == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"null", "the body is null; it takes an object"),
        (b"[]", "the body is a list"),
        (b'{"model": "tiny", "temperature": NaN}', "NaN is no JSON"),
        (b'{"model": "tiny", "temperature": -Infinity}', "-Infinity is no JSON"),
        (b'{"model": "tiny", "model": "tiny"}', "a name comes twice"),
        (b'{"model": "\xff"}', "no JSON"),
        (b"[" * 20000, "nested too deeply"),
        (b'{"a": ' * 5000, "nested too deeply"),
        (b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}", "no JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_json_is_said(server, content, message):
    status, _, body = server.request(content)
    assert status == 400
    assert message in body["error"]["message"]


def test_paths_and_methods(server):
    assert server.request(b"", "/v2", "GET")[2]["error"]["message"] == "there is no such path"
    assert server.request(b"", "/v2", "GET")[0] == 404
    status, head, body = server.request(b"", "/v1/completions", "GET")
    assert status == 405
    assert "allow: post" in head
    assert body["error"]["message"] == "GET is not taken here"
    assert server.request(b"", "/../../etc/passwd", "GET")[0] == 404


def test_a_page_of_another_site_is_not_answered(server):
    for host, status in (("evil.example", 421), ("127.0.0.1", 200), (f"localhost:{server.port}", 200), ("", 421)):
        received = server.send(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert received.split()[1] == str(status).encode(), host
    own = f"http://localhost:{server.port}"
    for origin, status in ((own, 200), ("http://evil.example", 403), ("null", 403), ("https://localhost", 403)):
        head = f"GET /v1/models HTTP/1.1\r\nHost: localhost:{server.port}\r\nOrigin: {origin}\r\nConnection: close\r\n"
        assert server.send(f"{head}\r\n".encode()).split()[1] == str(status).encode(), origin


def test_random_damage_is_never_a_server_error(server):
    rng = random.Random(0)
    good = [json.dumps(completion(max_tokens=2, n=2, stop=["x"], echo=True, top_p=0.5)).encode()]
    good.append(json.dumps({"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}).encode())
    seen = set()
    for number in range(150):
        content = bytearray(good[number % 2])
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content))
            kind = rng.randrange(3)
            if kind == 0:
                content[place] = rng.choice(b'{}[]",:0-9.eEtfn\\u\x00\xff ')
            elif kind == 1:
                del content[place : place + rng.randint(1, 5)]
            else:
                content[place:place] = rng.choice([b"null", b"[]", b"{}", b"1e999", b'"', b"-1", b"true"])
        path = ("/v1/completions", "/v1/chat/completions")[number % 2]
        status, _, body = server.request(bytes(content), path)
        seen.add(status)
        assert status in (200, 400, 404), content
        assert status == 200 or body["error"]["message"]
    assert {200, 400} <= seen
    assert server.settles()


# --- limits ---


def test_large_bodies(server):
    status, head, body = server.request(completion(prompt="x" * 60_000))
    assert (status, body["error"]["message"]) == (413, "the body is larger than 50,000 bytes")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    received = server.send(head + b"4000\r\n" + b"x" * 0x4000 + b"\r\n" + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 5)
    assert received.split()[1] == b"413"


def test_slow_bodies_and_slow_answers(model):
    with started(model, timeout=3.0, slow=0.05) as server:  # 400 tokens take 20 s at least
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n{"
        assert server.send(head).split()[1] == b"408"
        status, _, body = server.request(completion(max_tokens=400))
        assert (status, body["error"]["code"]) == (504, "timeout")
        _, _, content = server.request(completion(max_tokens=400, stream=True))
        events = [e for e in re.findall(rb"data: (.*?)\n\n", content) if e]
        assert json.loads(events[0])["choices"]
        assert json.loads(events[-1])["error"]["code"] == "timeout"
        assert server.settles()


def test_more_than_may_wait_are_told_so(model):
    openai = pytest.importorskip("openai")
    with started(model, slots=1, max_waiting=1, slow=0.1) as server:
        streams = [server.client().completions.create(**completion(max_tokens=300), stream=True) for _ in range(2)]
        next(iter(streams[0]))
        assert (server.worker.running, server.worker.waiting) == (1, 1)
        status, head, body = server.request(completion())
        assert (status, body["error"]["type"]) == (429, "rate_limit_error")
        assert "retry-after: 1" in head
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(**completion())
        assert server.request(completion(n=2))[0] == 429
        for stream in streams:
            stream.close()
        assert server.settles()
        assert server.request(completion())[0] == 200


# --- clients that go away ---


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(model, stream):
    with started(model, slots=1, slow=0.02) as server:
        content = json.dumps(completion(max_tokens=500, stream=stream)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + content)
            wait_until(lambda: server.engine.running and server.worker.running)
            assert server.worker.running == 1
        assert server.settles()
        assert server.steps < 400, "500 tokens take a step each"
        assert server.server.metrics.gone.values[()] == 1
        assert server.request(completion())[0] == 200


def test_half_a_request_harms_nobody(server):
    for data in (b"POST", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{", b"\x00\xff\x00\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(data)
    assert server.request(completion())[0] == 200
    assert server.settles()


# --- the engine's thread ---


def test_an_engine_that_fails_is_said_and_nothing_hangs(model, capfd):
    with started(model, slots=1, slow=0.02) as server:
        stream = server.client().completions.create(**completion(max_tokens=300), stream=True)
        next(iter(stream))

        def broken():
            raise RuntimeError("a card fell out")

        server.engine.step = broken
        openai = pytest.importorskip("openai")
        with pytest.raises(openai.APIError, match="the engine has failed: RuntimeError"):
            list(stream)
        assert server.request(b"", "/health", "GET")[0] == 503
        status, _, body = server.request(completion())
        assert (status, body["error"]["type"]) == (503, "server_error")
        assert "card" not in json.dumps(body)
        assert "a card fell out" in capfd.readouterr().err


def test_jobs_that_were_to_begin_when_the_engine_failed_are_told(model):
    """Those whose commands wait, and those that are sent after the thread has ended."""
    engine = Engine(model[0], model[1], slots=1)
    worker = Worker(engine, 1, 9)
    entered, go = threading.Event(), threading.Event()

    def broken():
        entered.set()
        go.wait(HANGS)
        raise RuntimeError

    engine.step = broken

    async def submit():
        first = worker.submit([([1], Sampling(1))])
        await asyncio.to_thread(entered.wait, HANGS)
        second = worker.submit([([1], Sampling(1)), ([2], Sampling(1))])
        go.set()
        found = [await asyncio.wait_for(jobs[0].events.get(), HANGS) for jobs in (first, second, second)]
        assert [event.finish_reason for event in found] == ["error"] * 3
        worker._send(worker._start, [first[0]])
        assert (await asyncio.wait_for(first[0].events.get(), HANGS)).finish_reason == "error"
        assert worker.running == worker.waiting == 0

    asyncio.run(submit())


def test_settings_at_their_ends_harm_nobody(server):
    for fields in (
        {"top_p": 5e-324},
        {"top_p": 0},
        {"temperature": 5e-324},
        {"repetition_penalty": 0.01, "temperature": 2},
        {"repetition_penalty": 100, "min_p": 1},
        {"top_k": 2**31, "top_p": 1e-300, "min_p": 5e-324, "temperature": 1e-300},
    ):
        assert server.request(completion(**fields))[0] == 200, fields
    assert server.worker.failed is None


def test_a_diverged_model_is_an_error_of_the_server(folder):
    model, tokenizer, meta = load_model(folder / "runs/base")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with started((model, tokenizer, meta)) as server:
        status, _, body = server.request(completion())
        assert status == 500
        assert "not finite" in body["error"]["message"]
        assert server.settles()


def test_a_closed_worker_takes_nothing(model):
    worker = Worker(Engine(model[0], model[1], slots=1), 1, 1)
    worker.close()

    async def submit():
        worker.submit([([1], Sampling(1))])

    with pytest.raises(ClosedError, match="shutting down"):
        asyncio.run(submit())


# --- metrics ---


def test_metrics_count(model):
    with started(model) as server:
        server.request(completion(max_tokens=7))
        server.request(completion(temperature=9))
        server.request(b"", "/nowhere", "GET")
        status, head, text = server.request(b"", "/metrics", "GET")
        assert status == 200
        assert "content-type: text/plain; version=0.0.4" in head
        lines = text.decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert values['nanochat_requests_total{route="/v1/completions",status="200"}'] == "1"
        assert values['nanochat_requests_total{route="/v1/completions",status="400"}'] == "1"
        assert values['nanochat_requests_total{route="unknown",status="404"}'] == "1"
        assert values["nanochat_generated_tokens_total"] == "7"
        assert values["nanochat_slots"] == "2"
        assert values["nanochat_running"] == values["nanochat_waiting"] == "0"
        assert values['nanochat_first_token_seconds_bucket{le="+Inf"}'] == "1"
        names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        assert len(names) == len(set(names)) == len([line for line in lines if line.startswith("# HELP")])


def test_buckets_add_up_and_labels_are_escaped():
    histogram = Histogram("seconds", "Help.")
    for seconds in (0.005, 0.01, 0.3, 1000.0):
        histogram.observe(seconds)
    lines = list(histogram.lines())
    assert 'seconds_bucket{le="0.01"} 2' in lines
    assert 'seconds_bucket{le="0.5"} 3' in lines
    assert 'seconds_bucket{le="120"} 3' in lines
    assert 'seconds_bucket{le="+Inf"} 4' in lines
    assert lines[-1] == "seconds_count 4"
    metrics = Metrics()
    metrics.requests.add(1, 'a"b\\c\nd', "200")
    assert 'route="a\\"b\\\\c\\nd",status="200"} 1' in metrics.text({})


# --- the command ---


def run_command(folder, *flags, program=("-m", "nanochat_native.serve"), **environment):
    args = [sys.executable, *program, "--checkpoint", str(folder / "runs/base"), *flags]
    env = os.environ | {"NANOCHAT_NATIVE_BACKEND": BACKEND} | environment
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_ends_with_a_signal(folder, number):
    with run_command(folder, "--port", "0", "--capacity", "100", NANOCHAT_API_KEY="k") as process:
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith("model    base step 6")
        assert "a base model: it was not trained to chat" in lines[1]
        port = int(re.search(r"http://127.0.0.1:(\d+)/", lines[2]).group(1))
        with socket.create_connection(("127.0.0.1", port), timeout=HANGS) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"status": "ok", "model": "base", "key_needed": True}
        process.send_signal(number)
        assert process.wait(HANGS) in (0, -number, 128 + number)
        assert process.stderr.read().strip() == ""


PATIENT = """
import sys
from nanochat_native.serve import __main__ as serve
serve.GRACE_SECONDS = 10_000
sys.exit(serve.main())
"""


def test_a_second_signal_ends_it_at_once(folder):
    flags = ("--port", "0", "--slots", "1")
    with run_command(folder, *flags, program=("-c", PATIENT), NANOCHAT_NATIVE_BACKEND="torch") as process:
        lines = [process.stdout.readline() for _ in range(3)]
        port = int(re.search(r"http://127.0.0.1:(\d+)/", lines[2]).group(1))
        content = json.dumps({"model": "base", "prompt": "a", "max_tokens": 600, "n": 16, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=HANGS) as connection:
            connection.sendall(head.encode() + content)
            assert b"200 OK" in connection.recv(4096)
            process.send_signal(signal.SIGINT)

            def listens_no_more():  # the first signal has been taken
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=HANGS).close()
                except OSError:
                    return True
                return False

            wait_until(listens_no_more)
            process.send_signal(signal.SIGINT)
            rest = b"".join(iter(lambda: connection.recv(65536), b""))
            code = process.wait(HANGS)
        assert b"[DONE]" not in rest
        assert code in (-signal.SIGINT, 128 + signal.SIGINT)
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slots", "0"], "--slots is 0; it takes a number from 1"),
        (["--timeout", "0"], "--timeout is 0.0"),
        (["--port", "70000"], "--port is 70000"),
        (["--api-key", ""], "the API key is empty"),
        (["--api-key", "kü"], "the API key takes visible ASCII"),
        (["--capacity", "100000"], "capacity 100000"),
        (["--step", "99"], "holds no checkpoint of step 99, but of 4, 6"),
        (["--host", "203.0.113.7", "--port", "0"], "203.0.113.7 port 0"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(folder, flags, message, capsys):
    with ops.use_backend(BACKEND):
        assert command.main(["--checkpoint", str(folder / "runs/base"), *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_a_port_in_use_and_a_missing_extra(folder, capsys, monkeypatch):
    args = ["--checkpoint", str(folder / "runs/base")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command.main([*args, "--port", str(port)]) == 2
        assert f"127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert command.main(args) == 2
    assert "pip install 'nanochat-native[serve]'" in capsys.readouterr().err


def test_the_readmes_example(server):
    pytest.importorskip("openai")
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "OpenAI" in block]
    example = example.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace("d4-chat", "tiny")
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=True)
    assert len(result.stdout) > 10
    assert result.stderr == ""


# --- load ---


@pytest.mark.slow
def test_many_clients_lose_nothing(folder):
    result = load.run(load.Options(folder / "runs/base", clients=64, seconds=8, max_tokens=16))
    assert result["lost"] == []
    assert result["answers"]["whole"] > 64
    assert result["answers"]["streamed"] > 64
    assert result["answers"]["hung up"] > 5
    memory = result["memory_bytes"]
    assert max(memory) < memory[0] + 30e6


def test_a_load_that_loses_something_says_so():
    with pytest.raises(ValueError, match="the stream ends with"):
        load.read(b'data: {"choices": []}\n\n', stream=True)
    chunk = b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
    with pytest.raises(ValueError, match="the stream ends with"):
        load.read(chunk + b"data: [DONE]\n\n", stream=True)
