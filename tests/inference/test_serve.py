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
from fork_server import python
from tiny_run import BACKEND, HANGS, train, wait_until, write_text

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn

from nanochat_native import ops
from nanochat_native import serve as command
from nanochat_native.bench import load
from nanochat_native.data import conversations
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import Sampling
from nanochat_native.inference.server.app import Limits, Server
from nanochat_native.inference.server.connection import configured
from nanochat_native.inference.server.metrics import Histogram, Metrics
from nanochat_native.inference.server.protocol import Served
from nanochat_native.inference.server.worker import ClosedError, Worker
from nanochat_native.runs.saved_model import load_model

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

    def __init__(
        self, model, *, slots=2, max_waiting=14, key=None, chat=False, slow=0.0, connection_timeout=20, **limits
    ):
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
        served = Served(
            "tiny",
            tokenizer,
            chat_trained=chat,
            calculator=chat,
            capacity=600,
            trained_positions=self.engine.trained_positions,
            max_tokens=500,
            choices=slots + max_waiting,
            created=1,
        )
        limits = Limits(**{"max_body_bytes": 50_000, "timeout": HANGS} | limits)
        self.server = Server(served, self.worker, limits, api_key=key, loopback=True)
        self.socket = command.bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        config = configured(self.server.app, timeout=connection_timeout, grace=1, log_level="error")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        wait_until(lambda: self.uvicorn.started)

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
    for stops in ([stop], ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "<|bos|>", stop]):
        cut = client.completions.create(model="tiny", prompt="the tensor", max_tokens=40, temperature=0, stop=stops)
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


# --- log-probabilities ---


def expected_logprobs(model, tokens):
    """By the model's own forward: of each token but the first the log-softmax of the logits before it (T - 1, V)."""
    with torch.no_grad():
        return model[0](torch.tensor([tokens]))[0, :-1].double().log_softmax(-1)


def ids_of(tokenizer, names):
    """Of tokens as completions spell them."""
    spelled = {}
    for token in range(tokenizer.vocab_size):
        content = tokenizer.decode_bytes([token])
        try:
            spelled[content.decode()] = token
        except UnicodeDecodeError:
            spelled["bytes:" + "".join(f"\\x{byte:02x}" for byte in content)] = token
    return [spelled[name] for name in names]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_of_a_completion(server, model, count):
    tokenizer = model[1]
    prompt = [tokenizer.bos_id, *tokenizer.encode("the tensor")]
    bent = {"temperature": 0.3, "top_p": 0.5, "logit_bias": {"40": 5}, "seed": 3}
    answer = server.client().completions.create(model="tiny", prompt="the tensor", max_tokens=9, logprobs=count, **bent)
    (choice,) = answer.choices
    found = choice.logprobs
    tokens = ids_of(tokenizer, found.tokens)
    assert tokenizer.decode(tokens) == choice.text
    rows = expected_logprobs(model, prompt + tokens)[len(prompt) - 1 :]
    assert len(found.token_logprobs) == len(tokens) == len(rows) == 9
    for token, name, logprob, top, row in zip(
        tokens, found.tokens, found.token_logprobs, found.top_logprobs, rows, strict=True
    ):
        assert abs(logprob - row[token].item()) < 3e-5
        assert top.pop(name) == logprob
        assert len(top) in ({0} if count == 0 else {count - 1, count})
        for other, value in zip(ids_of(tokenizer, top), top.values(), strict=True):
            assert abs(value - row[other].item()) < 3e-5
            assert value > row.topk(count + 1).values[-1] - 3e-5
    starts = [len("the tensor")]
    starts += [starts[0] + len(tokenizer.decode(tokens[:i])) for i in range(1, 9)]
    assert found.text_offset == starts


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_a_prompt_is_scored_by_echo(server, model, max_tokens):
    tokenizer, client = model[1], server.client()
    asked = {"model": "tiny", "max_tokens": max_tokens, "echo": True, "logprobs": max_tokens % 2, "temperature": 0}
    text = client.completions.create(prompt="the tensor of", **asked)
    ids = [tokenizer.bos_id, *tokenizer.encode("the tensor of")]
    given = client.completions.create(prompt=ids, **asked)
    rows = expected_logprobs(model, ids)
    for answer, hidden in ((text, 1), (given, 0)):
        (choice,) = answer.choices
        found = choice.logprobs
        assert "".join(found.tokens[: len(ids) - hidden]) == ("the tensor of" if hidden else "<|bos|>the tensor of")
        assert choice.text == "".join(found.tokens)
        assert len(found.tokens) == len(found.top_logprobs) == len(ids) - hidden + max_tokens
        assert answer.usage.completion_tokens == max_tokens
        assert choice.finish_reason == "length"
        told = found.token_logprobs[1 - hidden : len(ids) - hidden]
        assert told == pytest.approx([row[token].item() for row, token in zip(rows, ids[1:], strict=True)], abs=3e-5)
        assert [choice.text[place:].startswith(t) for t, place in zip(found.tokens, found.text_offset, strict=True)]
    assert (given.choices[0].logprobs.token_logprobs[0], given.choices[0].logprobs.top_logprobs[0]) == (None, None)
    assert given.choices[0].logprobs.token_logprobs[1:] == text.choices[0].logprobs.token_logprobs


def test_echo_and_no_tokens_without_logprobs(server):
    for fields, text in (({"echo": True}, "the tensor"), ({}, "")):
        for stream in (False, True):
            status, _, body = server.request(completion(max_tokens=0, stream=stream, **fields))
            assert status == 200
            chunks = [body] if not stream else [json.loads(e) for e in re.findall(rb"data: ({.*})\n", body)]
            choices = [choice for chunk in chunks for choice in chunk["choices"]]
            assert "".join(choice["text"] for choice in choices) == text
            assert choices[-1]["finish_reason"] == "length"
            assert {choice["logprobs"] for choice in choices} == {None}


def harness_scores(answer, contexts):
    """What lm-evaluation-harness's local-completions reads of an answer: of each choice the sum behind the context and
    without the one new token, and whether each was the likeliest."""
    found = []
    for choice, context in zip(sorted(answer["choices"], key=lambda one: one["index"]), contexts, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][context:-1]
        tops = choice["logprobs"]["top_logprobs"][context:-1]
        greedy = all(own == max(top.values()) for own, top in zip(logprobs, tops, strict=True))
        found.append((sum(logprobs), greedy))
    return found


@pytest.mark.parametrize("form", ["ids", "texts", "one text", "one list"])
def test_scoring_as_the_harness_asks(server, model, form):
    """The request of local-completions, for each form that it sends prompts in, also where the model would end the
    text: there is always exactly one token beyond the prompt."""
    tokenizer = model[1]
    texts = [("the tensor", " is the"), ("the kernel of", " a"), ("a", "the tensor")]
    encoded = [(tokenizer.encode(context), tokenizer.encode(context + more)) for context, more in texts]
    rows = [ids for _, ids in encoded]
    contexts = [len(context) for context, _ in encoded]
    if form in ("one text", "one list"):
        rows, contexts, texts = rows[:1], contexts[:1], texts[:1]
    prompts = {"ids": rows, "texts": [a + b for a, b in texts], "one text": "".join(texts[0]), "one list": rows[0]}
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    ends = {"logit_bias": {str(tokenizer.bos_id): 100}}
    for extra in ({}, ends):
        status, _, answer = server.request(asked | {"prompt": prompts[form]} | extra)
        assert status == 200
        found = harness_scores(answer, contexts)
        begin = [tokenizer.bos_id] if "text" in form else []
        for (total, greedy), ids, context in zip(found, rows, contexts, strict=True):
            likely = expected_logprobs(model, begin + ids)[len(begin) + context - 1 :]
            assert total == pytest.approx(
                sum(r[t].item() for r, t in zip(likely, ids[context:], strict=True)), abs=1e-4
            )
            assert greedy == all(r.argmax().item() == t for r, t in zip(likely, ids[context:], strict=True))
            assert total < -0.1
        assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [len(ids) + 1 for ids in rows]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    assert answer["choices"][0]["logprobs"]["tokens"][-1] == "<|bos|>"
    likeliest = expected_logprobs(model, [*rows[0], 0])[-1].argmax().item()
    _, _, answer = server.request(asked | {"prompt": [[*rows[0], likeliest]]})
    assert harness_scores(answer, [len(rows[0])])[0][1] is True


def test_a_stream_has_the_logprobs_of_the_whole_answer(server):
    client = server.client()
    for fields in (
        {"logprobs": 2, "n": 3},
        {"logprobs": 0, "echo": True, "prompt": ["a", "the kernel", [104, 105]], "max_tokens": 9},
        {"logprobs": 1, "echo": True, "max_tokens": 0},
        {"logprobs": 1, "stop": [" "], "max_tokens": 30},
    ):
        asked = completion(**fields)
        whole = client.completions.create(**asked)
        texts, lists = {}, {}
        for chunk in client.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                    lists.setdefault(choice.index, {}).setdefault(name, []).extend(values)
        assert texts == {choice.index: choice.text for choice in whole.choices}
        assert lists == {choice.index: choice.logprobs.model_dump() for choice in whole.choices}


def test_logprobs_have_the_same_bits_beside_others(server):
    asked = completion(logprobs=5, echo=True, max_tokens=9)
    alone = server.request(asked)[2]["choices"]
    found = []
    threads = [threading.Thread(target=lambda: found.append(server.request(asked)[2]["choices"])) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 5


def test_parts_of_characters_are_told_by_their_bytes(server, model):
    tokenizer = model[1]
    ids = ids_of(tokenizer, ["a", "bytes:\\xc3", "bytes:\\xa9", "z", "bytes:\\xff", "b"])
    for max_tokens in (0, 2):
        asked = completion(prompt=ids, logprobs=5, echo=True, max_tokens=max_tokens)
        (choice,) = server.request(asked)[2]["choices"]
        assert choice["text"].startswith("aéz\ufffdb")
        assert choice["logprobs"]["tokens"][:6] == ["a", "bytes:\\xc3", "bytes:\\xa9", "z", "bytes:\\xff", "b"]
        assert choice["logprobs"]["text_offset"][:6] == [0, 1, 1, 2, 3, 4]
        assert choice["logprobs"]["text_offset"][6:7] == [5][:max_tokens]
    lead, follow = ids_of(tokenizer, ["bytes:\\xe8", "bytes:\\xa9"])
    forced = {"logit_bias": {str(follow): 100}, "max_tokens": 2}
    (cut,) = server.request(completion(prompt=[ids[0], lead], logprobs=0, echo=True, **forced))[2]["choices"]
    assert cut["text"] == "a\ufffd" + "\ufffd" * 2, "a prompt's half character is not completed by what follows"
    assert cut["logprobs"]["text_offset"] == [0, 1, 2, 3]
    (half,) = server.request(completion(prompt=ids[:2], logprobs=0, max_tokens=1))[2]["choices"]
    assert half["logprobs"]["text_offset"] == [2], "the prompt's text is a\ufffd"


@pytest.mark.parametrize("count", [None, 0, 3, 20])
def test_logprobs_of_a_chat(model, count):
    tokenizer = model[1]
    messages = [{"role": "user", "content": "hi"}]
    prompt = conversations.prompt_of(tokenizer, messages, chat_trained=True)
    (byte,) = ids_of(tokenizer, ["bytes:\\xc3"])
    with started(model, chat=True) as server:
        asked = {"model": "tiny", "messages": messages, "max_tokens": 6, "seed": 2, "logprobs": True}
        asked |= {} if count is None else {"top_logprobs": count}
        for bias in ({}, {str(byte): 100}):
            answer = server.client().chat.completions.create(**asked, logit_bias=bias)
            (choice,) = answer.choices
            content = choice.logprobs.content
            spelled = [bytes(one.bytes) for one in content]
            tokens = [token for one in spelled for token in range(300) if tokenizer.decode_bytes([token]) == one]
            assert b"".join(spelled).decode("utf-8", "replace") == choice.message.content
            rows = expected_logprobs(model, prompt + tokens)[len(prompt) - 1 :]
            for one, token, row in zip(content, tokens, rows, strict=True):
                assert one.token == ("\\xc3" if bias else bytes(one.bytes).decode())
                assert abs(one.logprob - row[token].item()) < 3e-5
                values = [top.logprob for top in one.top_logprobs]
                assert values == pytest.approx(row.topk(count or 0).values.tolist(), abs=3e-5)
            chunks = list(server.client().chat.completions.create(**asked, logit_bias=bias, stream=True))
            told = [choice.logprobs.content for chunk in chunks for choice in chunk.choices if choice.logprobs]
            assert [one for part in told for one in part] == content
        plain = server.client().chat.completions.create(**asked | {"logprobs": None, "top_logprobs": None})
        assert plain.choices[0].logprobs is None
        end = tokenizer.special_tokens["<|assistant_end|>"]
        ended = server.client().chat.completions.create(**asked, logit_bias={str(end): 100}).choices[0]
        assert (ended.message.content, ended.finish_reason, ended.logprobs.content) == ("", "stop", [])
        if count == 20:
            tops = [top for one in content for top in one.top_logprobs if top.token == "<|user_end|>"]
            assert all(top.bytes is None for top in tops)


def test_the_best_of_several(server):
    ends = {str(server.tokenizer.bos_id): 8}  # so that candidates have different lengths
    asked = completion(temperature=2, max_tokens=6, prompt=["a", "the tensor"], logit_bias=ends)
    whole = server.request(asked | {"n": 5, "logprobs": 0, "echo": True})[2]
    candidates, expected = whole["choices"], []
    assert len({len(choice["logprobs"]["tokens"]) for choice in candidates}) > 2
    for group, given in ((candidates[:5], "a"), (candidates[5:], "the tensor")):

        def mean(choice, given=given):
            drawn = [
                logprob
                for logprob, place in zip(
                    *(choice["logprobs"][k] for k in ("token_logprobs", "text_offset")), strict=True
                )
                if place >= len(given)
            ]
            return sum(drawn) / len(drawn)

        expected += [choice["text"] for choice in sorted(group, key=mean, reverse=True)[:2]]
    assert len(set(expected)) == 4
    for fields in ({}, {"logprobs": 1}):
        answer = server.request(asked | {"n": 2, "best_of": 5, "echo": True} | fields)[2]
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert all((choice["logprobs"] is not None) == bool(fields) for choice in answer["choices"])
        assert answer["usage"] == whole["usage"]


def test_a_bias_bends_the_draws(server):
    (choice,) = server.request(completion(logit_bias={"40": 100}, max_tokens=4))[2]["choices"]
    assert choice["text"] == server.tokenizer.decode([40] * 4)


# --- roles ---


CALCULATOR = {
    "type": "function",
    "function": {"name": "calculator", "parameters": {"type": "object", "properties": {"sum": {"type": "string"}}}},
}


def calculation(tokenizer):
    """What a model draws that calculates 6*7 after a word, and that draws a word and the end after it."""
    start, end, *_ = conversations.special_ids(tokenizer, conversations.CODE_TOKENS)
    (over,) = conversations.special_ids(tokenizer, ["<|assistant_end|>"])
    return [*tokenizer.encode("so "), start, *tokenizer.encode("6*7"), end, *tokenizer.encode("yes"), over]


def test_the_server_calculates_in_chats(model, script):
    with started(model, chat=True) as server:
        script(server.engine, [*calculation(server.tokenizer), *calculation(server.tokenizer)])
        chat = server.client().chat.completions
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "how many?"}], "temperature": 0}
        answer = chat.create(**asked)
        assert answer.choices[0].message.content == "so <<6*7=42>>yes"
        assert answer.choices[0].message.tool_calls is None
        answer = chat.create(**asked, tools=[CALCULATOR], tool_choice="none")
        assert answer.choices[0].message.content == "so <<6*7=42>>yes"


def test_a_client_with_a_calculator_calculates_itself(model, script):
    with started(model, chat=True) as server:
        tokenizer = server.tokenizer
        drawn = calculation(tokenizer)
        first = drawn[: drawn.index(tokenizer.special_tokens["<|python_end|>"]) + 1]
        given = script(server.engine, [*first, *drawn[len(first) :], *first])
        chat = server.client().chat.completions
        messages = [{"role": "user", "content": "how many?"}]
        asked = {"model": "tiny", "temperature": 0, "tools": [CALCULATOR]}
        (choice,) = chat.create(**asked, messages=messages).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "so ")
        (call,) = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("calculator", {"sum": "6*7"})

        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "forty-two"}]
        given.clear()
        (choice,) = chat.create(**asked, messages=messages).choices
        assert (choice.finish_reason, choice.message.content) == ("stop", "yes")
        assert given[0] == tokenizer.special_tokens["<|output_end|>"], "the assistant continues its message"

        streamed = list(chat.create(**asked, messages=messages[:1], stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "so "
        (call,) = [call for chunk in streamed for call in chunk.choices[0].delta.tool_calls or []]
        assert (call.index, call.function.name, call.function.arguments) == (0, "calculator", '{"sum": "6*7"}')
        assert streamed[-1].choices[0].finish_reason == "tool_calls"
        server.settles()


@pytest.mark.parametrize("parameters", [None, {}, {"properties": {}}, {"properties": {"a": {}, "b": {}}}], ids=str)
def test_a_calculator_without_one_parameter_is_never_called(model, script, parameters):
    tool = {"type": "function", "function": {"name": "calculator", "parameters": parameters}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [tool], "temperature": 0}
    with started(model, chat=True) as server:
        script(server.engine, calculation(server.tokenizer))
        status, _, answer = server.request(body, "/v1/chat/completions")
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "so <<6*7=42>>yes"


def test_roles_in_the_orders_of_clients(model):
    tokenizer = model[1]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    orders = [
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "b"}],
        [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, {"role": "user", "content": "c"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "content": "3", "tool_call_id": "1"},
        ],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "function_call": call["function"]},
            {"role": "function", "name": "f", "content": "3"},
        ],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "refusal": "no"},
            {"role": "user", "content": "b", "name": "bob"},
        ],
    ]
    with started(model, chat=True) as server:
        client = server.client()
        for messages in orders:
            answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=5)
            prompt = conversations.prompt_of(tokenizer, messages, chat_trained=True)
            plain = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=5)
            assert answer.choices[0].message.content == plain.choices[0].text
            assert answer.usage.prompt_tokens == len(prompt)


# --- beyond the training ---


def test_the_trained_length_is_told_and_what_goes_beyond_it(server):
    assert server.client().models.retrieve("tiny").model_extra["trained_positions"] == 64
    prompt = [7] * 60
    for more, warning in (
        (4, None),
        (5, "the text has 65 tokens, but the model was trained on 64: quality drops beyond that"),
    ):
        asked = completion(prompt=prompt, max_tokens=more, logit_bias={"7": 100})
        assert server.request(asked)[2].get("warning") == warning
        chunks = [json.loads(e) for e in re.findall(rb"data: ({.*})\n", server.request(asked | {"stream": True})[2])]
        assert [chunk["warning"] for chunk in chunks if "warning" in chunk] == [warning] * (warning is not None)


# --- what is refused ---

REFUSED = [
    ({"prompt": None, "temperature": "hot"}, "temperature must be a number, got a text", "temperature"),
    ({"temperature": True}, "temperature must be a number, got true or false", "temperature"),
    ({"temperature": -0.1}, "temperature must be from 0 to 2, got -0.1", "temperature"),
    ({"temperature": 10**400}, "temperature must be from 0 to 2, got a number too large", "temperature"),
    ({"max_tokens": -1}, "max_tokens must be from 0 to 500, got -1", "max_tokens"),
    ({"max_tokens": 501}, "max_tokens must be from 0 to 500, got 501", "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens must be a whole number, got 2.5", "max_tokens"),
    ({"max_tokens": True}, "max_tokens must be a whole number, got true or false", "max_tokens"),
    ({"n": 0}, "n must be from 1 to 128, got 0", "n"),
    ({"n": 129}, "n must be from 1 to 128, got 129", "n"),
    ({"n": True}, "n must be a whole number, got true or false", "n"),
    ({"n": 9, "prompt": ["a", "b"]}, "a request must have at most 16 continuations, got 2 x 9", "n"),
    ({"best_of": 17}, "a request must have at most 16 continuations, got 1 x 17", "best_of"),
    ({"prompt": ["a"] * 17}, "a request must have at most 16 continuations, got 17 x 1", "prompt"),
    ({"top_p": 1.1}, "top_p must be from 0 to 1, got 1.1", "top_p"),
    ({"top_k": 1.0}, "top_k must be a whole number, got 1.0", "top_k"),
    ({"top_p": False}, "top_p must be a number, got true or false", "top_p"),
    ({"temperature": "0"}, "temperature must be a number, got a text", "temperature"),
    ({"seed": 2**63}, "seed must be from -9.22337e+18 to 9.22337e+18, got a number too large", "seed"),
    ({"seed": "x"}, "seed must be a whole number, got a text", "seed"),
    ({"stop": ["a"] * 17}, "stop must be a string of 1 to 1000 characters, or a list of at most 16", "stop"),
    ({"stop": [""]}, "stop must be a string", "stop"),
    ({"stop": ""}, "stop must be a string", "stop"),
    ({"stop": False}, "stop must be a string", "stop"),
    ({"stop": 3}, "stop must be a string", "stop"),
    ({"stop": ["a", "\ud800"]}, "stop must be a string", "stop"),
    ({"stop": ["x" * 1001]}, "stop must be a string of 1 to 1000 characters", "stop"),
    ({"stream": "yes"}, "stream must be true or false, got a text", "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options requires stream", "stream_options"),
    ({"stream": True, "stream_options": 3}, "stream_options requires stream", "stream_options"),
    (
        {"prompt": 3},
        "prompt must be a string, a list of ids that is not empty, or a list of these, got a number",
        "prompt",
    ),
    ({"prompt": []}, "a list of ids that is not empty, or a list of these, got a list", "prompt"),
    ({"prompt": [1, "a"]}, "a list of ids that is not empty, or a list of these, got a list", "prompt"),
    (
        {"prompt": [[1], []]},
        "prompt[1] must be a string, a list of ids that is not empty, or a list of these, got a list",
        "prompt",
    ),
    ({"prompt": [1, True]}, "or a list of these, got a list", "prompt"),
    ({"prompt": [300]}, "prompt must have ids from 0 to 299", "prompt"),
    ({"prompt": [-1]}, "prompt must have ids from 0 to 299", "prompt"),
    ({"prompt": "\ud800"}, "prompt must be text, got a lone surrogate", "prompt"),
    ({"model": None}, "model must be the string 'tiny', got null", "model"),
    ({"model": 3}, "model must be the string 'tiny', got a number", "model"),
    ({"seed": True}, "seed must be a whole number, got true or false", "seed"),
    ({"stream": 0}, "stream must be true or false, got a number", "stream"),
    ({"echo": 1}, "echo must be true or false, got a number", "echo"),
    ({"logprobs": 6}, "logprobs must be from 0 to 5, got 6", "logprobs"),
    ({"logprobs": -1}, "logprobs must be from 0 to 5, got -1", "logprobs"),
    ({"logprobs": True}, "logprobs must be a whole number, got true or false", "logprobs"),
    ({"logprobs": False}, "logprobs must be a whole number, got true or false", "logprobs"),
    ({"logprobs": 0.0}, "logprobs must be a whole number, got 0.0", "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs is not supported here; it must be 0 or null", "top_logprobs"),
    ({"n": 3, "best_of": 2}, "best_of must be >= n, got best_of 2 and n 3", "best_of"),
    ({"best_of": 2, "stream": True}, "best_of > n cannot be combined with stream", "best_of"),
    ({"suffix": "x"}, "suffix is not supported", "suffix"),
    ({"logit_bias": []}, "from -100 to 100, got a list", "logit_bias"),
    (
        {"logit_bias": {"300": 1}},
        "logit_bias must be an object of at most 1024 ids below 300, each with a number from -100 to 100, got '300'",
        "logit_bias",
    ),
    (
        {"logit_bias": {"-1": 1}},
        "logit_bias must be an object of at most 1024 ids below 300, each with a number from -100 to 100, got '-1'",
        "logit_bias",
    ),
    (
        {"logit_bias": {"\u00b2": 1}},
        "logit_bias must be an object of at most 1024 ids below 300, each with a number from -100 to 100, got '\u00b2'",
        "logit_bias",
    ),
    (
        {"logit_bias": {"5": 101}},
        "logit_bias must be an object of at most 1024 ids below 300, each with a number from -100 to 100, got '5'",
        "logit_bias",
    ),
    (
        {"logit_bias": {"5": True}},
        "logit_bias must be an object of at most 1024 ids below 300, each with a number from -100 to 100, got '5'",
        "logit_bias",
    ),
    (
        {"logit_bias": {"5": 1, "05": 2}},
        "logit_bias must be an object of at most 1024 ids below 300, each with a number from -100 to 100, got '05'",
        "logit_bias",
    ),
    ({"presence_penalty": 0.5}, "presence_penalty is not supported", "presence_penalty"),
    ({"presence_penalty": False}, "presence_penalty is not supported", "presence_penalty"),
    ({"ignore_eos": True}, "ignore_eos is not supported here; it must be false or null", "ignore_eos"),
    ({"ignore_eos": 0}, "ignore_eos is not supported here", "ignore_eos"),
    ({"messages": []}, "messages is not supported here", "messages"),
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
    fields |= {"store": True, "metadata": {"a": "b"}, "suffix": None, "tools": []}
    fields |= {"user": "me", "temperature": None, "max_tokens": None, "stop": None, "n": None, "stream": None}
    status, _, body = server.request(completion(**fields))
    assert status == 200
    assert body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "messages must be a list with at least one message"),
        ({"messages": []}, "messages must be a list with at least one message"),
        ({"messages": "hi"}, "messages must be a list with at least one message"),
        ({"messages": [3]}, "messages[0] must be an object with role and content, got a number"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "assistant, developer, tool, function, got 'wizard'"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "content must be a text or a list of parts, got null",
        ),
        ({"messages": [{"content": "x"}]}, "messages[0].role must be one of system, user, assistant, dev"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "function, got a list"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "content must be a text or a list of parts, got null",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "messages[0].tool_calls[0] must be a call"),
        (
            {"messages": [{"role": "assistant", "tool_calls": {}}]},
            "tool_calls must be a list, got an object",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "in messages of the user"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "lone surrogate"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "messages[1].role must be 'user' in the last message",
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
    ("fields", "message"),
    [
        ({"tools": {}}, "tools must be a list, got an object"),
        ({"tool_choice": "required"}, "tool_choice must be 'none' or 'auto': this model cannot be made to call tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice must be 'none' or 'auto'"),
        ({"tool_choice": False}, "tool_choice must be 'none' or 'auto'"),
        ({"function_call": {"name": "f"}}, "function_call must be 'none' or 'auto'"),
        ({"response_format": {"type": "json_object"}}, "response_format with type 'json_object' is not supported here"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "with type 'json_schema' is not supported"),
        ({"response_format": "text"}, "response_format is not supported here"),
        ({"logprobs": 1}, "logprobs must be true or false, got a number"),
        ({"logprobs": 0}, "logprobs must be true or false, got a number"),
        ({"top_logprobs": 2}, "top_logprobs requires logprobs to be true"),
        ({"top_logprobs": 0}, "top_logprobs requires logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be from 0 to 20, got 21"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs must be a whole number, got true or false"),
        ({"max_tokens": 0}, "max_tokens must be from 1 to 500, got 0"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens and max_completion_tokens must be equal"),
        ({"prompt": "x"}, "prompt is not supported here"),
        ({"echo": True}, "echo is not supported here"),
        ({"best_of": 2}, "best_of is not supported here"),
        ({"modalities": ["text", "audio"]}, "modalities is not supported here"),
    ],
    ids=str,
)
def test_what_chat_does_not_have_is_refused(server, fields, message):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **fields}
    status, _, answer = server.request(body, "/v1/chat/completions")
    assert status == 400
    assert message in answer["error"]["message"]
    assert answer["error"]["param"] in fields


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
        {"tool_choice": "none", "parallel_tool_calls": True},
        {"max_completion_tokens": 2, "max_tokens": 2},
        {"echo": False, "best_of": 1, "logprobs": False, "modalities": ["text"]},
    ],
    ids=str,
)
def test_what_changes_no_answer_is_taken(server, fields):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "temperature": 0}
    plain = server.request(body, "/v1/chat/completions")[2]
    status, head, answer = server.request(body | fields, "/v1/chat/completions")
    assert status == 200
    assert answer["choices"] == plain["choices"]
    assert "x-ignored-fields" not in head


def test_unknown_fields_are_ignored_and_named(server):
    plain = server.request(completion())[2]["choices"]
    unknown = {"tempratur": 1, "x\r\ny\u20ac": {}, "z" * 99: None, "w" * 99: 0}
    status, head, answer = server.request(completion(**unknown))
    assert (status, answer["choices"]) == (200, plain)
    assert f"x-ignored-fields: tempratur, x\\r\\ny\\u20ac, {'w' * 40}\r\n" in head + "\r\n"
    _, head, _ = server.request(completion(stream=True, tempratur=1))
    assert "x-ignored-fields: tempratur" in head
    _, head, _ = server.request(completion(**{f"f{i}": 1 for i in range(30)}))
    assert "f19" in head
    assert "f20" not in head


# Python 3.14 reads on to the end, which is missing.
TOO_DEEP = "nested too deeply" if sys.version_info < (3, 14) else "the body is not JSON: Expecting value"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"null", "the body must be an object, got null"),
        (b"[]", "the body must be an object, got a list"),
        (b'{"model": "tiny", "temperature": NaN}', "the body is not JSON: NaN is not allowed"),
        (b'{"model": "tiny", "temperature": -Infinity}', "the body is not JSON: -Infinity is not allowed"),
        (b'{"model": "tiny", "model": "tiny"}', "an object has a name twice"),
        (b'{"model": "\xff"}', "the body is not JSON: byte 11 is not UTF-8"),
        (b"[" * 20000, TOO_DEEP),
        (b'{"a": ' * 5000, TOO_DEEP),
        (
            b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}",
            "the body is not JSON: a number must have at most 1000 digits, got 5000",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_json_is_said(server, content, message):
    status, _, body = server.request(content)
    assert status == 400
    assert message in body["error"]["message"]


def test_paths_and_methods(server):
    assert server.request(b"", "/v2", "GET")[2]["error"]["message"] == "no such path"
    assert server.request(b"", "/v2", "GET")[0] == 404
    status, head, body = server.request(b"", "/v1/completions", "GET")
    assert status == 405
    assert "allow: post" in head
    assert body["error"]["message"] == "method GET is not allowed here"
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
    assert (status, body["error"]["message"]) == (413, "the body must have at most 50,000 bytes")
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


@contextlib.contextmanager
def standing_still(server):
    """The server's event loop does nothing within the block: what is sent there arrives before its clocks run."""
    go = threading.Event()
    server.uvicorn.servers[0].get_loop().call_soon_threadsafe(go.wait, HANGS)
    try:
        yield
    finally:
        go.set()


def trickled(server, begin, drip, *, seconds=HANGS):
    """What comes back where `drip` follows `begin`, again and again, until the server closes."""
    received, end = b"", time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        with standing_still(server):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=0.05))
            connection.sendall(begin + drip)
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                part = connection.recv(65536)
                received += part
                if not part:
                    return received
            with contextlib.suppress(ConnectionError):
                connection.sendall(drip)
    raise AssertionError(f"still open after {seconds} s: {received}")


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def impatient(model):
    running = Running(model, connection_timeout=0.3)
    yield running
    running.close()


@pytest.mark.parametrize("begin", [b"", b"P", HEALTH], ids=str)
def test_headers_that_trickle_are_answered_by_408(impatient, begin):
    received = trickled(impatient, begin, b"X-A: b\r\n")
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["message"] == "the request's headers did not arrive within 0.3 s"


def test_a_connection_that_says_nothing_is_closed(impatient):
    assert trickled(impatient, b"", b"") == b""
    received = trickled(impatient, HEALTH + b"\r\n", b"")
    assert received.startswith(b"HTTP/1.1 200")
    assert received.count(b"HTTP/1.1") == 1


def test_headers_that_trickle_after_an_answer_are_answered_by_408(impatient):
    received = trickled(impatient, HEALTH + b"\r\n" + HEALTH, b"X-A: b\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"408"]


@pytest.mark.parametrize("length", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"], ids=str)
def test_a_body_that_trickles_where_none_is_read_is_ended(impatient, length):
    drip = b"x" if b"Length" in length else b"1\r\nx\r\n"
    received = trickled(impatient, HEALTH + length + b"\r\n\r\n", drip)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200"]


NO_HTTP = (
    b"no request\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    HEALTH + b"Content-Length: -1\r\n\r\n",
    HEALTH + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    HEALTH + b"X: " + b"x" * 200_000 + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n",
)


@pytest.mark.parametrize("content", NO_HTTP, ids=lambda value: str(value)[:40])
def test_what_is_no_http_is_answered_in_the_form_of_the_api(server, content):
    head, _, body = server.send(content).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert json.loads(body)["error"]["message"] == "the request is not valid HTTP/1.1, or its headers are too long"
    assert server.settles()


def test_a_wrong_body_behind_an_answer_closes_the_connection(server, caplog):
    with socket.create_connection(("127.0.0.1", server.port), timeout=HANGS) as connection:
        connection.sendall(HEALTH + b"Transfer-Encoding: chunked\r\n\r\n")
        received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 200")
        connection.sendall(b"no chunk\r\n")
        while part := connection.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1") == 1
    assert [record for record in caplog.records if record.exc_info] == []


def test_an_upgrade_is_not_made(server, caplog):
    keys = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    for name in (b"websocket", b"h2c"):
        asked = HEALTH + b"Connection: Upgrade, close\r\nUpgrade: " + name + b"\r\n" + keys + b"\r\n"
        assert server.send(asked).startswith(b"HTTP/1.1 200"), name
    assert [record for record in caplog.records if record.exc_info] == []


def test_requests_in_one_piece_are_answered_in_their_order(server):
    content = json.dumps(completion()).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    last = HEALTH + b"Connection: close\r\n\r\n"
    received = server.send((head + content) * 2 + HEALTH + b"\r\n" + last)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200"] * 4
    assert re.findall(rb'"object":"text_completion"|"status":"ok"', received.replace(b'": "', b'":"')) == [
        b'"object":"text_completion"',
        b'"object":"text_completion"',
        b'"status":"ok"',
        b'"status":"ok"',
    ]


def test_what_the_server_works_on_is_not_ended(model):
    """A body within the request's own time, an answer that takes long, and a connection that is used again."""
    with started(model, connection_timeout=1.0, slow=0.07) as server:
        content = json.dumps(completion(max_tokens=20)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=HANGS) as connection:
            for _ in range(2):
                connection.sendall(head.encode())
                time.sleep(1.3)
                connection.sendall(content)
                received = b""
                while not received.endswith(b"}"):
                    part = connection.recv(65536)
                    assert part, received
                    received += part
                assert received.startswith(b"HTTP/1.1 200")


def test_a_client_that_does_not_read_is_left():
    ended = threading.Event()

    async def endless(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not (disconnected := asyncio.ensure_future(receive())).done():
                await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
                await asyncio.sleep(0)
                if disconnected.done() and disconnected.result()["type"] == "http.disconnect":
                    break
        finally:
            ended.set()

    listener = command.bind("127.0.0.1", 0)
    config = configured(endless, timeout=0.3, grace=1, log_level="critical")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with socket.create_connection(listener.getsockname(), timeout=HANGS) as connection:
            connection.sendall(HEALTH + b"\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            assert ended.wait(HANGS)
    finally:
        running.should_exit = True
        thread.join(HANGS)
    assert not thread.is_alive()


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
    args = [python(), *program, "--checkpoint", str(folder / "runs/base"), *flags]
    env = os.environ | {"NANOCHAT_NATIVE_BACKEND": BACKEND} | environment
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_ends_with_a_signal(folder, number):
    with run_command(folder, "--port", "0", "--capacity", "100", NANOCHAT_API_KEY="k") as process:
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith("model    base step 6")
        assert "a base model: it was not trained to chat" in lines[1]
        assert lines[2].endswith("8 slots of 100 tokens (trained on 64; quality drops beyond that)\n")
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
from nanochat_native import serve
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
        (["--slots", "0"], "--slots must be a whole number >= 1, got 0"),
        (["--timeout", "0"], "--timeout must be > 0 and <= 1e+06 seconds, got 0"),
        (["--timeout", "inf"], "--timeout must be > 0 and <= 1e+06 seconds, got inf"),
        (["--connection-timeout", "0"], "--connection-timeout must be > 0 and <= 1e+06 seconds, got 0"),
        (["--port", "70000"], "--port must be <= 65535, got 70000"),
        (["--api-key", ""], "the API key is empty"),
        (["--api-key", "kü"], "the API key must consist of visible ASCII"),
        (["--capacity", "100000"], "--capacity must be from 2 to 640, got 100000"),
        (["--slots", "10000000000"], "--slots must be <= 4096, got 10000000000"),
        (["--host", ""], "--host is empty"),
        (["--model-name", ""], "--model-name is empty"),
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


def test_slots_that_do_not_fit_into_memory_are_one_line(folder, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(command, "Engine", full)
    with ops.use_backend(BACKEND):
        assert command.main(["--checkpoint", str(folder / "runs/base"), "--port", "0", "--slots", "5"]) == 2
    error = "error: 5 slots of 640 tokens do not fit into memory; reduce --slots or --capacity\n"
    assert capsys.readouterr().err == error


def test_a_port_in_use_and_a_missing_extra(folder, capsys, monkeypatch):
    args = ["--checkpoint", str(folder / "runs/base")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command.main([*args, "--port", str(port)]) == 2
        assert f"127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "nanochat_native.inference.server.connection")  # it is imported already
    assert command.main(args) == 2
    assert "pip install 'nanochat-native[serve]'" in capsys.readouterr().err


def test_the_readmes_example(server):
    pytest.importorskip("openai")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "OpenAI" in block]
    example = example.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace("d4-chat", "tiny")
    for _ in range(5):  # an answer may be short: its seed is random
        result = subprocess.run([python(), "-c", example], capture_output=True, text=True, timeout=HANGS, check=True)
        assert result.stderr == ""
        if len(result.stdout) > 10:
            return
    raise AssertionError("five short answers")


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
