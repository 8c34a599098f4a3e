"""A run of nanochat's architecture of today, in the commands: its texts are those of the model without a cache."""

import contextlib

import pytest
import torch
from models import build

from nanochat_native import generate
from nanochat_native.data import conversations
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference.chat_session import Chat, Options, run_slash_command
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.text_stream import TextStream
from nanochat_native.model.config import GPTConfig
from nanochat_native.runs import checkpoint
from nanochat_native.runs.saved_model import load_model

PENALTY = 4.0  # of repetition: a model with random weights repeats its likeliest token


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with windows of 16 and 64 tokens."""
    folder = tmp_path_factory.mktemp("today") / "run"
    tokenizer = Tokenizer.train(["def f(x): return x + 1\n" * 50], 300)
    config = GPTConfig.from_depth(
        3,
        vocab_size=tokenizer.vocab_size,
        sequence_len=64,
        head_dim=64,
        n_kv_head=1,
        window_pattern="SSL",
        architecture="today",
        window_multiple=8,
    )
    tokenizer.save(folder / "tokenizer")
    meta = {"model_config": vars(config), "tokenizer_hash": tokenizer.hash}
    weights = {name: p.detach() for name, p in build(config).named_parameters()}
    checkpoint.save(folder / "checkpoints", 1, {"model": weights}, meta)
    return folder


@pytest.fixture(scope="module")
def model(run_dir):
    return load_model(run_dir)


def expected_text(model, tokenizer, prompt, count):
    """The text of the likeliest tokens with the penalty, each from a forward pass over the whole text."""
    tokens, seen = list(prompt), torch.zeros(1, tokenizer.vocab_size, dtype=torch.bool)
    seen[0, tokens] = True
    with torch.no_grad():
        while len(tokens) < len(prompt) + count:
            logits = model(torch.tensor([tokens]), last_only=True)[:, 0]
            token = int(torch.where(seen, torch.where(logits > 0, logits / PENALTY, logits * PENALTY), logits).argmax())
            if token == tokenizer.bos_id:
                break
            tokens.append(token)
            seen[0, token] = True
    assert len(set(tokens[len(prompt) :])) > 5, "a text that repeats one token shows little"
    return TextStream(tokenizer, ()).put(tokens[len(prompt) :], final=True)


def test_generate_writes_the_expected_text(run_dir, model, capsys):
    gpt, tokenizer, _ = model
    prompt = "def f(x): return x + 1\n" * 3
    expected = expected_text(gpt, tokenizer, [tokenizer.bos_id, *tokenizer.encode(prompt)], 40)
    flags = ["--checkpoint", str(run_dir), "--prompt", prompt, "--max-tokens", "40", "--device", "cpu"]
    assert generate.main([*flags, "--temperature", "0", "--repetition-penalty", str(PENALTY)]) == 0
    assert expected in capsys.readouterr().out


def test_a_chat_that_goes_back_answers_as_the_model_does(run_dir, model, backend):
    """Every answer starts again in the same slot, after another history."""
    gpt, tokenizer, _ = model
    options = Options(run_dir, max_tokens=16, temperature=0, repetition_penalty=PENALTY)
    chat = Chat(Engine(gpt, tokenizer, slots=1, capacity=200), options, chat_trained=False, say=lambda text: None)

    def ask(text):
        history = [*chat.messages, {"role": "user", "content": text}]
        prompt = conversations.prompt_of(tokenizer, history, chat_trained=False)
        assert "".join(chat.answer(text)) == expected_text(gpt, tokenizer, prompt, 16)

    ask("def f(x): return x + 1")
    ask("return f(x) + 2")
    run_slash_command(chat, "/undo")
    ask("f(f(x))")
    run_slash_command(chat, "/new")
    ask("x + x")


def test_a_server_answers_several_clients_as_the_model_does(model):
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    from test_serve import Running, completion

    gpt, tokenizer, _ = model
    with contextlib.closing(Running(model, slots=2)) as server:
        prompts = ["def f(x)", "x + 1\n" * 20, "f"]
        for _ in range(2):
            body = completion(prompt=prompts, max_tokens=20, temperature=0)
            answer = server.client().completions.create(**body, extra_body={"repetition_penalty": PENALTY})
            for prompt, choice in zip(prompts, answer.choices, strict=True):
                ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
                assert choice.text == expected_text(gpt, tokenizer, ids, 20)
