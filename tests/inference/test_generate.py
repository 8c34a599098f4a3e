import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch
from backends import use
from fork_server import python
from models import build

from nanochat_native import chat, chat_eval, generate, serve
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference.engine import Engine, complete
from nanochat_native.inference.sampling import Sampling, sample
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.decoder import Decoder
from nanochat_native.runs import checkpoint
from nanochat_native.runs.saved_model import load_model

CONFIG = GPTConfig(sequence_len=16, vocab_size=60, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def drawn(model, prompt=PROMPT, tokenizer=None, **settings):
    pieces = complete(model, tokenizer, prompt, Sampling(**settings))
    return [token for piece in pieces for token in piece.tokens]


def text_of(model, tokenizer, prompt, **settings):
    """The text that follows the prompt, from an engine with room for more requests."""
    engine = Engine(model, tokenizer, slots=3)
    (request,) = engine.generate([([tokenizer.bos_id, *tokenizer.encode(prompt)], Sampling(**settings))])
    return request.text


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, n_kv_head=1, window_pattern="SSSL", n_layer=5)])
def test_greedy_equals_the_whole_forward(backend, config):
    model, tokens = build(config), list(PROMPT)
    with torch.no_grad():
        for _ in range(30):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert drawn(model, max_tokens=30, temperature=0) == tokens[len(PROMPT) :]
    assert len(set(tokens)) > 5, "a sequence that repeats one token shows little"


def test_draws_equal_those_from_the_whole_forward(backend):
    """Sampled tokens too: the same generator draws from the logits of the plain forward pass."""
    model, tokens = build(CONFIG), list(PROMPT)
    settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.95}
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _ in range(40):
            logits = model(torch.tensor([tokens]), last_only=True)[:, 0]
            tokens.append(int(sample(logits, generator=generator, **settings)))
    assert drawn(model, max_tokens=40, seed=7, **settings) == tokens[len(PROMPT) :]


def test_same_seed_same_tokens(backend):
    model = build(CONFIG)
    first, again, other = (drawn(model, max_tokens=20, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_global_random_state_is_neither_read_nor_changed():
    model = build(CONFIG)
    with use("torch"):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first = drawn(model, max_tokens=5)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(6)
        assert drawn(model, max_tokens=5) == first


def test_a_stop_token_ends_the_tokens(backend):
    model = build(CONFIG)
    free = drawn(model, max_tokens=40, seed=1)
    stop = free[4]
    assert drawn(model, max_tokens=40, seed=1, stop_tokens=(stop,)) == free[: free.index(stop)]


def draws(logits, **settings):
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **settings}
    drawn = sample(torch.tensor([logits]).expand(20000, -1), generator=generator, **settings)
    return torch.bincount(drawn, minlength=len(logits)) / 20000


def test_frequencies_of_the_draws():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().tolist()

    def expect(found, weights):
        expected = torch.tensor(weights) / sum(weights)
        assert torch.allclose(found, expected, atol=0.015)
        assert (found[expected == 0] == 0).all()

    expect(draws(logits), [0.5, 0.3, 0.15, 0.05])
    expect(draws(logits, temperature=0.5), [0.25, 0.09, 0.0225, 0.0025])
    expect(draws(logits, top_k=2), [0.5, 0.3, 0.0, 0.0])
    expect(draws(logits, top_k=9), [0.5, 0.3, 0.15, 0.05])
    expect(draws(logits, top_p=0.4), [1.0, 0.0, 0.0, 0.0])
    expect(draws(logits, top_p=0.7), [0.5, 0.3, 0.0, 0.0])
    expect(draws(logits, top_p=0.9), [0.5, 0.3, 0.15, 0.0])
    expect(draws(logits, top_p=1.0), [0.5, 0.3, 0.15, 0.05])
    expect(draws(list(reversed(logits)), top_p=0.7), [0.0, 0.0, 0.3, 0.5])
    expect(draws(logits, top_k=3, top_p=0.6), [0.5, 0.3, 0.0, 0.0])
    expect(draws(logits, temperature=0), [1.0, 0.0, 0.0, 0.0])
    expect(draws(logits, temperature=1e-38), [1.0, 0.0, 0.0, 0.0])
    expect(draws(logits, temperature=5e-324), [1.0, 0.0, 0.0, 0.0])
    expect(draws(logits, top_p=5e-324), [1.0, 0.0, 0.0, 0.0])
    expect(draws(logits, min_p=5e-324), [0.5, 0.3, 0.15, 0.05])


def test_bad_arguments_are_refused_at_the_call():
    model = build(CONFIG)
    with use("torch"):
        for settings, prompt, message in (
            ({"max_tokens": 153}, PROMPT, r"must have at most 160 tokens together, got 8 \+ 153"),
            ({"max_tokens": 4}, [0] * 161, r"must have at most 160 tokens together, got 161 \+ 4"),
            ({"max_tokens": 4, "stop": ("a",)}, PROMPT, "without a tokenizer"),
            ({"max_tokens": 4}, [], "0 tokens"),
            ({"max_tokens": 4}, [1, 60], "0 to 59"),
            ({"max_tokens": 4}, [-1], "0 to 59"),
        ):
            with pytest.raises(ValueError, match=message):
                complete(model, None, prompt, Sampling(**settings))


def test_as_many_tokens_as_there_are_positions():
    model = build(CONFIG)
    with use("torch"):
        tokens = drawn(model, max_tokens=152, temperature=0)
        assert len(tokens) == 152
        with torch.no_grad():
            last = model(torch.tensor([PROMPT + tokens[:-1]]), last_only=True)
        assert int(last.argmax()) == tokens[-1]


def test_one_token_of_a_prompt_of_one():
    with use("torch"):
        assert drawn(build(CONFIG), [3], max_tokens=0) == []
        assert len(drawn(build(CONFIG), [3], max_tokens=1)) == 1


def test_a_diverged_model_is_said_to_be_one():
    model = build(CONFIG)
    with use("torch"), torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
        with pytest.raises(ValueError, match="diverged"):
            drawn(model, max_tokens=4)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["def f(x): return x + 1\n" * 50], 280)


def test_a_penalty_and_a_share_of_the_likeliest():
    model = build(CONFIG)
    with use("torch"):
        kept = drawn(model, max_tokens=30, temperature=0, repetition_penalty=1e6)
        assert len({*kept, *PROMPT}) == len(kept) + len(set(PROMPT)), "no token comes twice"
        greedy = drawn(model, max_tokens=12, temperature=0)
        assert drawn(model, max_tokens=12, min_p=1.0) == greedy


@pytest.fixture
def run_dir(tmp_path, tokenizer):
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    tokenizer.save(tmp_path / "run" / "tokenizer")
    meta = {"model_config": vars(config), "tokenizer_hash": tokenizer.hash}
    for step in (1, 2):
        weights = {name: p.detach() for name, p in build(config, seed=step).named_parameters()}
        checkpoint.save(tmp_path / "run" / "checkpoints", step, {"model": weights}, meta)
    return tmp_path / "run"


def test_load_model(run_dir, tokenizer):
    for step, expected_step in ((None, 2), (1, 1)):
        model, loaded, meta = load_model(run_dir, step)
        expected = build(model.config, seed=expected_step)
        assert meta["step"] == expected_step
        assert loaded.hash == tokenizer.hash
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
        with use("torch"), torch.no_grad():
            idx = torch.tensor([PROMPT])
            assert torch.equal(model(idx), expected(idx)), "the rotary tables are not in the checkpoint"


def test_load_model_goes_back_to_an_intact_checkpoint_and_says_so(run_dir):
    damaged = checkpoint.path_of(run_dir / "checkpoints", 2) / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    told = []
    assert load_model(run_dir, warn=told.append)[2]["step"] == 1
    assert len(told) == 1
    assert "step_000002" in told[0]


def test_load_model_refuses_what_does_not_belong_together(run_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such run folder"):
        load_model(tmp_path / "none")
    folder = run_dir / "checkpoints"
    tensors, meta = checkpoint.load(folder, 2)

    def saved(**changes):
        checkpoint.save(folder, 3, {"model": changes.pop("model", tensors["model"])}, {**meta, **changes})
        return run_dir

    shape = {**meta["model_config"], "n_layer": 2}
    with pytest.raises(ValueError, match=r"do not fit model_config.*transformer\.h\.2"):
        load_model(saved(model_config=shape))
    with pytest.raises(ValueError, match="without a tokenizer"):
        load_model(saved(tokenizer_hash=None))
    weights = tensors["model"]
    first, *others = weights
    changed = [
        ({name: weights[name] for name in others}, f"{first} is missing$"),
        (weights | {"extra": torch.ones(2)}, "extra is unknown$"),
        (weights | {first: torch.ones(2, 3)}, rf"{first} must have shape \(.*\), got \(2, 3\)"),
        ({"extra": torch.ones(2)}, r"transformer.wte.weight is missing, .* and \d+ more$"),
    ]
    for model, message in changed:
        with pytest.raises(ValueError, match=f"{run_dir}: the weights do not fit model_config: .*{message}"):
            load_model(saved(model=model))
    for other, message in (
        ({**meta["model_config"], "width": 3}, "got an unexpected keyword argument 'width'"),
        ({**meta["model_config"], "n_head": 0}, "n_head must be a whole number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"{run_dir}: its model_config is not one of this version .{message}"):
            load_model(saved(model_config=other))
    for name in ("tokenizer_hash", "model_config"):
        checkpoint.save(folder, 3, tensors, {key: value for key, value in meta.items() if key != name})
        with pytest.raises(ValueError, match=f"{run_dir}: its checkpoint has no {name}$"):
            load_model(run_dir)
    checkpoint.save(folder, 3, {"optimizer": {"x": torch.ones(2)}}, meta)
    with pytest.raises(ValueError, match=r"its checkpoint has no weights of a model$"):
        load_model(run_dir)
    saved()
    Tokenizer.train(["other text " * 99], 280).save(run_dir / "tokenizer")
    with pytest.raises(ValueError, match="not the tokenizer"):
        load_model(run_dir)


def test_command_line(run_dir, capfd):
    args = ["--checkpoint", str(run_dir), "--prompt", "def f", "--max-tokens", "20", "--seed", "3", "--top-k", "5"]
    with use("torch"):
        assert generate.main([*args, "--temperature", "0.9", "--top-p", "0.95"]) == 0
        printed = capfd.readouterr().out
        model, tokenizer, _ = load_model(run_dir)
        settings = {"max_tokens": 20, "temperature": 0.9, "top_k": 5, "top_p": 0.95, "seed": 3}
        assert printed == "def f" + text_of(model, tokenizer, "def f", **settings) + "\n"
        flags = ["--min-p", "0.05", "--repetition-penalty", "1.2", "--stop", "x", "yz"]
        assert generate.main([*args, *flags]) == 0
        settings = {"max_tokens": 20, "temperature": 0.8, "top_k": 5, "seed": 3, "min_p": 0.05}
        settings |= {"repetition_penalty": 1.2, "stop": ("x", "yz")}
        text = text_of(model, tokenizer, "def f", **settings)
        assert capfd.readouterr().out == f"def f{text}\n"
        generate.main([*args, "--step", "1"])
        of_first_step = capfd.readouterr().out
    # The same in a process of its own, as the README calls it.
    module = [sys.executable, "-m", "nanochat_native.generate", *args, "--step", "1"]
    env = {**os.environ, "NANOCHAT_NATIVE_BACKEND": "torch", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.run(module, capture_output=True, encoding="utf-8", check=True, env=env)
    note = r"note: the text has \d+ tokens, but the model was trained on 16: quality drops beyond that\n"
    assert process.stdout == of_first_step
    assert re.fullmatch(note, process.stderr)
    assert of_first_step != printed


COMMANDS = {
    "generate": (generate, ["--prompt", "def f", "--max-tokens", "5"]),
    "chat": (chat, ["--prompt", "def f", "--max-tokens", "5"]),
    "serve": (serve, ["--port", "0"]),
    "chat_eval": (chat_eval, ["--tasks", "SimpleSpelling", "--max-problems", "1", "--max-new-tokens", "2"]),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], ["--quantize", "int8"]])
def test_the_precision_of_the_weights_is_a_flag(run_dir, name, flags, capsys, monkeypatch):
    module, given = COMMANDS[name]
    if name == "serve":
        pytest.importorskip("starlette")
        uvicorn = pytest.importorskip("uvicorn")
        monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: [one.close() for one in sockets])
    made = []
    own = Decoder.__init__

    def record(self, *args, **settings):
        own(self, *args, **settings)
        made.append(self)

    monkeypatch.setattr(Decoder, "__init__", record)
    args = ["--checkpoint", str(run_dir), "--device", "cpu", *given]
    assert module.main([*args, *flags]) == 0
    printed = capsys.readouterr().out
    assert module.main(args) == 0
    small, plain = (decoder._forward.keywords["blocks"][0].dtype for decoder in made)
    assert (small, plain) == (torch.bfloat16 if "bfloat16" in flags else torch.int8, torch.float32)
    assert [decoder.cache.dtype for decoder in made] == [
        torch.bfloat16 if "bfloat16" in flags else torch.float32,
        torch.float32,
    ]
    if name in ("serve", "chat_eval"):  # generate and chat print nothing but text
        shown = f", {flags[1]} weights" if name == "serve" else f"measured with {' '.join(flags)}\n"
        assert shown in printed
        assert shown not in capsys.readouterr().out


@pytest.mark.parametrize("more", [0, 1])
def test_what_outgrows_the_training_is_said_once(run_dir, tokenizer, capsys, more):
    tokens = CONFIG.sequence_len - 1 - len(tokenizer.encode("def f")) + more
    args = ["--checkpoint", str(run_dir), "--prompt", "def f", "--max-tokens", str(tokens), "--seed", "3"]
    with use("torch"):
        assert generate.main(args) == 0
    expected = (
        "note: the text has 17 tokens, but the model was trained on 16: quality drops beyond that\n" if more else ""
    )
    assert capsys.readouterr().err == expected


def test_a_closed_pipe_ends_it_without_a_word(run_dir):
    module = [python(), "-m", "nanochat_native.generate", "--checkpoint", str(run_dir), "--max-tokens", "5"]
    env = {**os.environ, "NANOCHAT_NATIVE_BACKEND": "torch"}
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as nobody:
        process = subprocess.run([*module, "--prompt", "a"], stdout=nobody, stderr=subprocess.PIPE, env=env)
    assert (process.returncode, process.stderr) == (141, b"")


def test_a_terminal_that_lacks_a_character_ends_nothing(run_dir):
    module = [sys.executable, "-m", "nanochat_native.generate", "--checkpoint", str(run_dir), "--prompt", "é語"]
    env = {**os.environ, "NANOCHAT_NATIVE_BACKEND": "torch", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    process = subprocess.run([*module, "--max-tokens", "2"], capture_output=True, check=True, env=env)
    assert process.stdout.startswith(rb"\xe9\u8a9e")
    assert process.stderr == b""


def test_command_line_mistakes_are_one_line(run_dir, capsys):
    for args, message in (
        (["--checkpoint", run_dir / "none"], "no such run folder"),
        (["--checkpoint", run_dir, "--temperature", "-1"], "temperature must be a number >= 0, got -1"),
        (
            ["--checkpoint", run_dir, "--max-tokens", "1000"],
            "prompt and max_tokens must have at most 160 tokens together, got 1 + 1000",
        ),
        (["--checkpoint", run_dir, "--max-tokens", "0"], "--max-tokens must be a whole number >= 1, got 0"),
        (["--checkpoint", run_dir, "--seed", str(1 << 70)], "--seed must be a whole number <= 9223372036854"),
        (
            ["--checkpoint", run_dir, "--prompt", "a\udcff"],
            "--prompt must be text, got a lone surrogate or bytes that are",
        ),
        (["--checkpoint", run_dir, "--stop", "a", "\udcff"], "--stop must be text, got a lone surrogate"),
        (["--checkpoint", run_dir, "--stop", ""], "--stop must have strings that are not empty"),
        (["--checkpoint", run_dir, "--quantize", "int4"], "'int4'"),
        (["--checkpoint", run_dir, "--step", "7"], "holds no checkpoint of step 7, but of 1, 2"),
    ):
        with use("torch"):
            assert generate.main([str(arg) for arg in args]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err
