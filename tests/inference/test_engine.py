"""The engine: the same tokens as one at a time, whatever runs beside them; sampling, text, slots, limits."""

import dataclasses
import math
import random

import pytest
import torch
from backends import use
from models import build

from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference import engine as engine_module
from nanochat_native.inference import sampling as sampling_module
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import Sampling, sample
from nanochat_native.inference.text_stream import TextStream
from nanochat_native.model.config import ARCHITECTURES, GPTConfig
from nanochat_native.model.decoder import Decoder

TOKENIZER = Tokenizer.train(["def f(x): return x + 1\n" * 50], 300)
V = TOKENIZER.vocab_size
LENGTHS = (1, 2, 3, 16, 17, 18, 33, 60)  # of prompts, around the chunks of 16 that they are cut in
WINDOWS = GPTConfig(sequence_len=32, vocab_size=V, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")
ONE_KV_HEAD = dataclasses.replace(WINDOWS, n_kv_head=1, window_pattern="SSL", n_layer=4)
TODAY = dataclasses.replace(
    WINDOWS, n_layer=4, window_pattern="SSL", **ARCHITECTURES["today"] | {"window_multiple": 8, "qk_scale": 1.5}
)
WIDE = dataclasses.replace(WINDOWS, n_embd=256, n_head=2, n_kv_head=2, n_layer=2, window_pattern="L", vocab_size=V)


CONFIGS = {"w": WINDOWS, "1": ONE_KV_HEAD, "wide": WIDE, "today": TODAY}
MODELS = {name: build(config) for name, config in CONFIGS.items()}


def prompt_of(length, seed=0):
    return torch.randint(0, V - 9, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model, prompt, sampling, **sizes):
    engine = Engine(model, TOKENIZER, slots=1, **sizes)
    (request,) = engine.generate([(prompt, sampling)])
    return request


def greedy(max_tokens=12, **settings):
    return Sampling(max_tokens, temperature=0, **settings)


# --- the model in rows ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_copy_of_the_logits_holds_what_two_hold(dtype):
    logits = torch.randn(3, 70_001, dtype=dtype)
    logits[1, 7] = logits[1, 70_000] = 9.0  # equally likely
    logits[2, 5] = math.nan
    top, likeliest, whole = engine_module.read_in_one_copy(logits, whole=True)
    expected = engine_module.read_logits(logits, whole=True)
    assert (top[:2], likeliest) == (expected[0][:2], expected[1])
    assert math.isnan(top[2])
    assert all(type(token) is int for token in likeliest)
    assert torch.equal(whole.nan_to_num(), logits.nan_to_num())
    top, likeliest, none = engine_module.read_in_one_copy(logits, whole=False)
    assert (top[:2], likeliest, none.shape) == (expected[0][:2], expected[1], (3, 0))


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"temperature": 0}, []),
        ({"temperature": 1.0}, [2, 3]),
        ({"temperature": 0, "repetition_penalty": 1.5}, [2, 3]),
        ({"temperature": 0, "logit_bias": ((3, 1.0),)}, [2, 3]),
        ({"temperature": 0, "logprobs": 1}, [2, 3]),
        ({"temperature": 1.0, "logprobs": 0, "score_prompt": True}, [0, 1, 2, 3]),
    ],
)
def test_logits_are_copied_only_where_a_token_needs_them(monkeypatch, settings, reads):
    """On a GPU: each decoding step copies once, and all logits only if a request draws or scores."""
    asked = []

    def read(logits, whole, real=engine_module.read_in_one_copy):
        asked.append(whole)
        return real(logits, whole)

    expected = alone(MODELS["w"], prompt_of(3), Sampling(2, **settings))
    monkeypatch.setattr(engine_module, "read_logits", read)
    request = alone(MODELS["w"], prompt_of(3), Sampling(2, **settings))
    assert (request.tokens, request.scored) == (expected.tokens, expected.scored)
    first = 0 if settings.get("score_prompt") else 2
    assert [first + step for step, whole in enumerate(asked) if whole] == reads


@pytest.mark.parametrize("name", MODELS)
def test_rows_give_the_logits_of_the_whole_forward(backend, name):
    model = MODELS[name]
    decoder = Decoder(model, 3, 40)
    prompts = [prompt_of(n, n) for n in (3, 17, 30)]
    decoder.prefill(0, prompts[0][:-1], 0)
    decoder.prefill(1, prompts[1][:9], 0)
    decoder.prefill(1, prompts[1][9:-1], 9)
    decoder.prefill(2, prompts[2][:-1], 0)
    at = [len(prompt) - 1 for prompt in prompts]
    logits = decoder.decode([0, 1, 2], [prompt[-1] for prompt in prompts], at)
    with torch.no_grad():
        whole = torch.stack([model(torch.tensor([prompt]))[0, -1] for prompt in prompts])
    assert torch.allclose(logits, whole, atol=2e-5, rtol=0)
    assert whole.std() > 0.3, "the weights do not show in the logits"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_beside_any_others(name, threads):
    with use("native"):
        torch.set_num_threads(threads)
        decoder = Decoder(MODELS[name], 9, 24)
        for slot in range(9):
            decoder.prefill(slot, prompt_of(20, seed=slot % 2), 0)
        expected = decoder.decode([0, 1], [7, 8], [20, 20])
        for slots in ([0], [8], [3, 2], [8, 7, 1], [5, 0, 3, 6], list(range(9)), list(range(8, 0, -1))):
            logits = decoder.decode(slots, [7 + slot % 2 for slot in slots], [20] * len(slots))
            for row, slot in enumerate(slots):
                assert torch.equal(logits[row], expected[slot % 2]), (slots, slot)


@pytest.mark.parametrize("name", ["wide", "today"])
def test_rows_under_autocast_are_those_of_the_model_under_autocast(name):
    """As on a GPU: bfloat16 weights, and angles in float32."""
    model = MODELS[name]
    with use("torch"), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        decoder = Decoder(model, 2, 200)
        prompt = prompt_of(150)
        decoder.prefill(1, prompt[:-1], 0)
        logits = decoder.decode([1], prompt[-1:], [149])
        whole = model(torch.tensor([prompt]))[:, -1]
    assert decoder.cache.dtype == torch.bfloat16
    assert decoder._forward.keywords["cos"].dtype == decoder._forward.keywords["sin"].dtype == torch.float32
    with torch.no_grad():
        exact = model(torch.tensor([prompt]))[:, -1]
    assert (logits - exact).abs().max() < 1.5 * (whole - exact).abs().max()


def test_greedy_tokens_are_those_of_the_whole_forward(backend):
    for model in MODELS.values():
        prompt = prompt_of(9)
        tokens = list(prompt)
        with torch.no_grad():
            while len(tokens) < len(prompt) + 20:
                tokens.append(int(model(torch.tensor([tokens]), last_only=True).argmax()))
        assert alone(model, prompt, greedy(20)).tokens == tokens[len(prompt) :]
        assert len(set(tokens[len(prompt) :])) > 5


# --- the same tokens as one at a time ---


def random_sampling(rng):
    return Sampling(
        rng.randint(1, 14),
        temperature=rng.choice([0, 0, 0.7, 1.0, 2.5]),
        top_k=rng.choice([None, 1, 5, 40]),
        top_p=rng.choice([None, 0.4, 0.95]),
        min_p=rng.choice([None, 0.02, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.4, 0.8]),
        stop=rng.choice([(), (), ("a", "xy"), ("\n",)]),
        stop_tokens=rng.choice([(), tuple(range(0, V, 9))]),
        seed=rng.randint(0, 1 << 40),
    )


def drive(engine, arrivals, cancelled=()):
    """Submits (step, prompt, sampling) when its step has come; cancels the requests of `cancelled` four steps later."""
    requests = {}
    step = 0
    while len(requests) < len(arrivals) or not engine.idle:
        for number, (when, prompt, sampling) in enumerate(arrivals):
            if when == step:
                requests[number] = engine.submit(prompt, sampling)
            if when + 4 == step and number in cancelled:
                engine.cancel(requests[number])
        engine.step()
        step += 1
    return [requests[number] for number in range(len(arrivals))]


@pytest.mark.parametrize("name", MODELS)
def test_same_tokens_as_one_at_a_time(backend, name, monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 16)
    model, rng = MODELS[name], random.Random(1)
    tokens = 0
    for _ in range(2 if backend == "torch" else 8):
        arrivals = [
            (rng.randint(0, 12), prompt_of(rng.choice(LENGTHS), rng.randint(0, 99)), random_sampling(rng))
            for _ in range(rng.randint(2, 12))
        ]
        expected = [alone(model, prompt, sampling) for _, prompt, sampling in arrivals]
        cancelled = {number for number in range(len(arrivals)) if rng.random() < 0.15}
        found = drive(
            Engine(model, TOKENIZER, slots=rng.randint(1, 9), capacity=rng.randint(74, 200)), arrivals, cancelled
        )
        for number, (request, one) in enumerate(zip(found, expected, strict=True)):
            if request.finish_reason == "cancelled":
                assert number in cancelled
                assert one.tokens[: len(request.tokens)] == request.tokens
                continue
            assert request.finish_reason == one.finish_reason
            assert request.tokens == one.tokens
            assert request.text == one.text
            tokens += len(request.tokens)
    assert tokens > 60


def test_seeds_and_the_global_generator():
    with use("torch"):
        engine = Engine(MODELS["w"], TOKENIZER, slots=4)
        state = torch.get_rng_state()
        prompt = prompt_of(5)
        runs = engine.generate([(prompt, Sampling(20, seed=seed)) for seed in (1, 1, 2)])
        assert runs[0].tokens == runs[1].tokens != runs[2].tokens
        assert torch.equal(torch.get_rng_state(), state)


def test_all_of_a_seed_counts():
    """torch's generator takes the low 32 bits of a seed."""
    with use("torch"):
        seeds = (3, 4, 3 + (1 << 32), 3 + (1 << 62))
        runs = [tuple(alone(MODELS["w"], prompt_of(9), Sampling(14, temperature=3.0, seed=s)).tokens) for s in seeds]
        assert len(set(runs)) == len(seeds)


# --- slots ---


def test_a_new_request_joins_a_running_batch_and_slots_are_used_again():
    with use("torch"):
        engine = Engine(MODELS["w"], TOKENIZER, slots=2, capacity=40)
        cache = engine._decoder.cache.data_ptr()
        first, second, third = (engine.submit(prompt_of(4), greedy(n)) for n in (9, 3, 4))
        assert engine.step() == [first, second]
        engine.step()
        assert (len(first.tokens), len(second.tokens), third.tokens) == (2, 2, [])
        assert engine.step() == [first, second]
        assert second.finish_reason == "length"
        assert engine.step() == [first, third]
        assert (len(first.tokens), len(third.tokens)) == (4, 1)
        for _ in range(30):
            engine.submit(prompt_of(6), greedy(3))
        while not engine.idle:
            assert len(engine.running) <= 2
            engine.step()
        assert sorted(engine._free) == [0, 1]
        assert engine._decoder.cache.data_ptr() == cache
        assert engine._decoder.cache.shape[1:3] == (2, 40)
        assert engine.step() == []


def test_cancelling_frees_the_slot_at_once():
    with use("torch"):
        engine = Engine(MODELS["w"], TOKENIZER, slots=1)
        running, waiting, third = (engine.submit(prompt_of(4), greedy(30)) for _ in range(3))
        engine.step()
        engine.cancel(waiting)
        engine.cancel(running)
        assert engine.step() == [third]
        assert (running.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")
        assert (len(running.tokens), waiting.tokens) == (1, [])
        engine.cancel(running)
        engine.cancel(third)
        assert engine.idle


@pytest.fixture
def passes(monkeypatch):
    """Return a list that receives the number of tokens of each slot in each pass of the model."""
    passes, extend = [], Decoder.extend

    def recorded(self, slots, tokens, starts, **settings):
        passes.append(dict(zip(slots, map(len, tokens), strict=True)))
        return extend(self, slots, tokens, starts, **settings)

    monkeypatch.setattr(Decoder, "extend", recorded)
    return passes


def test_a_long_prompt_does_not_stop_the_others(monkeypatch, passes):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 16)
    with use("torch"):
        engine = Engine(MODELS["w"], TOKENIZER, slots=3)
        short = engine.submit(prompt_of(4), greedy(30))
        engine.step()
        long = engine.submit(prompt_of(200), greedy(30))
        for step in range(2, 14):
            assert short in engine.step()
            assert len(short.tokens) == step
            assert not long.tokens
        assert engine.step() == [short, long]
    assert passes == [{0: 4}, *[{0: 1, 1: 16}] * 12, {0: 1, 1: 8}]


def test_waiting_prompts_are_computed_in_one_pass_up_to_the_bound(monkeypatch, passes):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 16)
    with use("torch"):
        engine = Engine(MODELS["w"], TOKENIZER, slots=5)
        scored = engine.submit(prompt_of(3), Sampling(0, score_prompt=True, logprobs=0))
        a, b, c, d = (engine.submit(prompt_of(n, n), greedy(3)) for n in (5, 7, 20, 2))
        returned = []
        while not engine.idle:
            returned.append(engine.step())
    assert passes == [
        {0: 1, 1: 5, 2: 7, 3: 4},
        {0: 1, 1: 1, 2: 1, 3: 16},
        {1: 1, 2: 1, 3: 1, 4: 2},
        {3: 1, 4: 1},
        {4: 1},
    ]
    assert returned == [[a, b], [a, b, c], [scored, a, b, c, d], [c, d], [d]]
    for request in (a, b, c, d):
        assert request.tokens == alone(MODELS["w"], request.prompt, greedy(3)).tokens


def test_a_pass_without_the_end_of_a_prompt_reads_no_logits(monkeypatch):
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 16)
    with use("torch"):
        engine = Engine(MODELS["w"], TOKENIZER, slots=1)
        request = engine.submit(prompt_of(40), greedy(2))
        monkeypatch.setattr(engine_module, "read_logits", None)
        assert [engine.step(), engine.step()] == [[], []]
        monkeypatch.undo()
        assert engine.step() == [request]


def test_limits_are_refused_at_the_call():
    model = MODELS["w"]
    with use("torch"):
        engine = Engine(model, TOKENIZER, slots=1, capacity=20)
        for prompt, sampling, message in (
            ([], greedy(), "0 tokens"),
            ([1, V], greedy(), f"0 to {V - 1}"),
            ([-1], greedy(), "0 to"),
            ([1.0], greedy(), "whole numbers"),
            (prompt_of(9), greedy(12), r"must have at most 20 tokens together, got 9 \+ 12"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.submit(prompt, sampling)
        assert engine.idle
        (request,) = engine.generate([(prompt_of(8), greedy(12))])
        assert len(request.tokens) == 12
        with pytest.raises(ValueError, match="without a tokenizer"):
            Engine(model, None).submit([1], greedy(stop=("a",)))
        for sizes in ({"slots": 0}, {"capacity": 1}, {"capacity": 321}):
            with pytest.raises(ValueError, match="slots must be >= 1, and capacity from 2 to 320"):
                Engine(model, TOKENIZER, **sizes)
        with pytest.raises(ValueError, match=f"must have 97 ids like the model, got {V}"):
            Engine(build(dataclasses.replace(WINDOWS, vocab_size=97)), TOKENIZER)


def test_sampling_refuses_what_it_does_not_take():
    nan = float("nan")
    for name, values in {
        "max_tokens": (-1, 1.5, True, False, "3", None),
        "temperature": (-0.1, nan, float("inf"), False, "0", None),
        "top_k": (0, True, 2.0, "5"),
        "top_p": (0.0, 1.1, nan, True, "1"),
        "min_p": (-0.1, 1.1, nan, False, "0"),
        "repetition_penalty": (0.0, -1.0, nan, float("inf"), 1e31, True, None),
        "stop": ("ab", ("",), (3,)),
        "stop_tokens": ([1], ("a",)),
        "seed": (-1, 1 << 63, 0.5, True, None),
        "logprobs": (-1, True, False, 1.0),
        "logit_bias": (((1, nan),), ((1.0, 2.0),)),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} must be"):
                Sampling(**{"max_tokens": 4, name: value})


# --- log-probabilities ---


def everything(max_tokens, **settings):
    return Sampling(max_tokens, logprobs=4, score_prompt=True, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_models_own_forward(backend, name):
    """Of the raw logits, whatever narrows or bends the draws."""
    model, prompt = MODELS[name], prompt_of(40)
    bent = {"temperature": 0.5, "top_k": 9, "repetition_penalty": 1.3, "logit_bias": ((7, 3.0), (8, -50.0))}
    request = alone(model, prompt, everything(20, seed=4, **bent))
    sequence = prompt + request.tokens
    assert len(request.tokens) == 20
    assert [one.token for one in request.scored] == sequence
    assert (request.scored[0].logprob, request.scored[0].top) == (None, ())
    with torch.no_grad():
        expected = model(torch.tensor([sequence]))[0, :-1].double().log_softmax(-1)
    for one, row in zip(request.scored[1:], expected, strict=True):
        assert abs(one.logprob - row[one.token].item()) < 3e-5
        ids, values = zip(*one.top, strict=True)
        assert torch.allclose(torch.tensor(values).double(), row.topk(4).values, atol=3e-5, rtol=0)
        assert torch.allclose(torch.tensor(values).double(), row[list(ids)], atol=3e-5, rtol=0)
        assert list(values) == sorted(values, reverse=True)
        assert dict(one.top).get(one.token, one.logprob) == one.logprob
    assert max(one.logprob for one in request.scored[1:]) - min(one.logprob for one in request.scored[1:]) > 1


@pytest.mark.parametrize("name", MODELS)
def test_scores_have_the_same_bits_whatever_runs_beside_and_whether_drawn_or_given(name):
    model, rng = MODELS[name], random.Random(2)
    with use("native"):
        arrivals = []
        for seed in range(7):
            sampling = everything(rng.randint(1, 9), seed=seed)
            arrivals.append((rng.randint(0, 9), prompt_of(rng.choice(LENGTHS), seed), sampling))
            arrivals.append((rng.randint(0, 9), prompt_of(30, seed), Sampling(8, seed=seed)))
        expected = [alone(model, prompt, sampling) for _, prompt, sampling in arrivals]
        for threads, slots in ((1, 3), (2, 9)):
            torch.set_num_threads(threads)
            found = drive(Engine(model, TOKENIZER, slots=slots, capacity=80), arrivals)
            assert [request.scored for request in found] == [request.scored for request in expected]
        for (_, prompt, _), request in zip(arrivals, expected, strict=True):
            if request.scored and request.finish_reason == "length":
                assert alone(model, prompt + request.tokens, everything(0)).scored == request.scored
        plain = [alone(model, prompt, Sampling(s.max_tokens, seed=s.seed)) for _, prompt, s in arrivals]
        assert [request.tokens for request in plain] == [request.tokens for request in expected]


def test_a_prompt_is_scored_a_row_at_a_time_while_others_go_on(monkeypatch):
    """No more logits are held than one row a slot, however long the prompt."""
    rows, extend = [], Decoder.extend

    def recorded(*args, **settings):
        logits = extend(*args, **settings)
        rows.append(logits.numel() // V)
        return logits

    monkeypatch.setattr(Decoder, "extend", recorded)
    with use("torch"):
        engine = Engine(MODELS["w"], TOKENIZER, slots=2)
        long, short = engine.submit(prompt_of(200), everything(0)), engine.submit(prompt_of(5), greedy(100))
        for step in range(1, 100):
            assert engine.step() == [short], "a token of the prompt that is scored is no news"
            assert (len(short.tokens), len(long.scored)) == (step, step + 1)
        assert long.read().scored == long.scored
        assert max(rows) == 2
        while not engine.idle:
            engine.step()
        assert (long.finish_reason, len(long.scored), long.tokens, long.text) == ("length", 200, [], "")
        assert len(rows) == 199


def test_no_tokens_are_no_work(monkeypatch):
    with use("torch"):
        engine = Engine(MODELS["w"], TOKENIZER, slots=2)
        monkeypatch.setattr(engine, "_decoder", None)
        for sampling in (Sampling(0), Sampling(0, logprobs=2), everything(0)):
            prompt = [5] if sampling.score_prompt else prompt_of(150)
            request = engine.submit(prompt, sampling)
            assert engine.step() == [request]
            assert (request.finish_reason, request.tokens, request.text) == ("length", [], "")
            assert [one.token for one in request.scored] == ([5] if sampling.score_prompt else [])
        assert engine.idle


def test_scores_are_computed_in_float64():
    request = alone(MODELS["w"], prompt_of(9), Sampling(3, logprobs=V, score_prompt=True))
    for one in request.scored[1:]:
        assert len(one.top) == V
        assert math.fsum(math.exp(value) for _, value in one.top) == pytest.approx(1, abs=1e-12)


def test_what_ends_a_text_is_scored_too():
    with use("torch"):
        request = alone(MODELS["w"], prompt_of(9), Sampling(5, stop_tokens=tuple(range(V)), logprobs=0, seed=1))
        assert (request.finish_reason, request.tokens, len(request.scored)) == ("stop", [], 1)
        assert request.scored[0].top == ()
        assert request.scored[0].logprob < 0


def test_a_bias_bends_the_draws_and_not_the_scores():
    with use("torch"):
        free = alone(MODELS["w"], prompt_of(9), greedy(6, logprobs=0))
        banned = ((free.tokens[0], -100.0),)
        for settings in ({"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.01}, {"top_k": 1}):
            forced = alone(MODELS["w"], prompt_of(9), Sampling(6, logit_bias=((7, 100.0),), logprobs=0, **settings))
            assert forced.tokens == [7] * 6
            assert forced.scored[0].logprob < free.scored[0].logprob
            other = alone(MODELS["w"], prompt_of(9), Sampling(6, logit_bias=banned, **settings))
            assert free.tokens[0] not in other.tokens
        with pytest.raises(ValueError, match=f"logit_bias must have ids from 0 to {V - 1}"):
            alone(MODELS["w"], [1], greedy(1, logit_bias=((V, 1.0),)))
    with pytest.raises(ValueError, match="score_prompt requires logprobs"):
        Sampling(1, score_prompt=True)


def test_a_broken_row_fails_alone(backend):
    """A token whose embedding is NaN: its request fails with a reason, and its slot serves another afterwards."""
    model = build(WINDOWS, seed=3)
    with torch.no_grad():
        model.wte.weight[5] = float("nan")
        model.lm_head.weight[5] = 0
    prompts = [[p for p in prompt_of(12, seed) if p != 5] for seed in range(3)]
    expected = [alone(model, prompt, greedy(8)).tokens for prompt in prompts]
    engine = Engine(model, TOKENIZER, slots=3)
    broken = [engine.submit([1, 2, 5, 3], sampling) for sampling in (greedy(9), Sampling(9))]
    good = engine.generate([(prompt, greedy(8)) for prompt in prompts])
    assert [request.tokens for request in good] == expected
    for request in broken:
        assert (request.finish_reason, request.tokens) == ("error", [])
        assert "not finite" in request.error
        with pytest.raises(ValueError, match="not finite"):
            list(engine.stream([5, 6], greedy(3)))
    assert engine.idle


# --- drawing ---


def plain_probabilities(logits, seen, temperature, top_k, top_p, min_p, penalty):
    """In Python's floats, as the settings are defined."""
    z = [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(logits)]
    z = [x / temperature for x in z]
    order = sorted(range(len(z)), key=lambda i: -z[i])
    kept = order[:top_k] if top_k else order

    def normalised(kept):
        weights = {i: math.exp(z[i] - z[order[0]]) for i in kept}
        return {i: w / sum(weights.values()) for i, w in weights.items()}

    p = normalised(kept)
    if top_p:
        nucleus, total = [], 0.0
        for i in kept:
            if total < top_p:
                nucleus.append(i)
            total += p[i]
        p = normalised(nucleus)
    if min_p:
        p = normalised([i for i in p if p[i] >= min_p * p[order[0]]])
    return [p.get(i, 0.0) for i in range(len(z))]


@pytest.mark.parametrize("few", [2, sampling_module.TOPK_FAST_PATH])
def test_draws_against_a_plain_formula(few, monkeypatch):
    monkeypatch.setattr(sampling_module, "TOPK_FAST_PATH", few)
    rng = random.Random(0)
    for number in range(12):
        logits = torch.randn(12, generator=torch.Generator().manual_seed(number)) * 2
        seen = set(rng.sample(range(12), 4))
        settings = {
            "temperature": rng.choice([0.6, 1.0, 1.7]),
            "top_k": rng.choice([None, 3, 8]),
            "top_p": rng.choice([None, 0.5, 0.9]),
            "min_p": rng.choice([None, 0.05, 0.4]),
        }
        penalty = rng.choice([1.0, 1.5, 0.7])
        mask = torch.tensor([[i in seen for i in range(12)]])
        drawn = sample(
            logits.expand(20000, -1),
            **settings,
            repetition_penalty=penalty,
            seen=mask.expand(20000, -1),
            generator=torch.Generator().manual_seed(number),
        )
        found = torch.bincount(drawn, minlength=12) / 20000
        expected = torch.tensor(plain_probabilities(logits.tolist(), seen, **settings, penalty=penalty))
        assert torch.allclose(found, expected, atol=0.016), (settings, penalty)
        assert (found[expected == 0] == 0).all(), (settings, penalty)


def test_the_penalty_is_of_prompt_and_continuation():
    with use("torch"):
        prompt = prompt_of(10)
        free = alone(MODELS["w"], prompt, greedy(40)).tokens
        assert len(set(free)) < len(free) or set(free) & set(prompt)
        kept = alone(MODELS["w"], prompt, greedy(40, repetition_penalty=1e6)).tokens
        assert len({*kept, *prompt}) == len(kept) + len(set(prompt)), "no token comes twice"


# --- text ---


def ids_of(data):
    ids = {TOKENIZER.decode_bytes([i]): i for i in range(V)}
    return [ids[bytes([byte])] for byte in data]


class Script(Decoder):
    """Gives the tokens of `script`, one after the other."""

    def __init__(self, model, script, prompt_length):
        super().__init__(model, 1, 64)
        self.script, self.prompt_length = script, prompt_length

    def extend(self, slots, tokens, starts, **settings):
        logits = super().extend(slots, tokens, starts, **settings).clone()
        logits[0, self.script[starts[0] + len(tokens[0]) - self.prompt_length]] = 100
        return logits


def say(script, **settings):
    engine = Engine(MODELS["w"], TOKENIZER, slots=1, capacity=64)
    engine._decoder = Script(MODELS["w"], script, 2)
    request = engine.submit([1, 2], Sampling(len(script), temperature=0, **settings))
    pieces = []
    while request.finish_reason is None:
        engine.step()
        pieces.append(request.read().text)
    assert "".join(pieces) == request.text
    return request, pieces


def test_characters_are_whole_and_pieces_make_the_text():
    with use("torch"):
        request, pieces = say(ids_of("aé語🎲z".encode()))
        assert [piece for piece in pieces if piece] == ["a", "é", "語", "🎲", "z"]
        assert request.finish_reason == "length"
        request, _ = say(ids_of(b"a\xffb" + "語".encode()[:2]))
        assert request.text == "a\ufffdb\ufffd"


def test_the_document_ends_where_the_model_ends_it():
    with use("torch"):
        request, _ = say([*ids_of(b"ab"), TOKENIZER.bos_id, *ids_of(b"cd")])
        assert (request.text, request.finish_reason, request.tokens) == ("ab", "stop", ids_of(b"ab"))
        request, _ = say(ids_of(b"abcd"), stop_tokens=(ids_of(b"c")[0],))
        assert (request.text, request.finish_reason) == ("ab", "stop")


def test_stop_strings_across_tokens_never_leak():
    with use("torch"):
        request, pieces = say(ids_of(b"one END two"), stop=("END",))
        assert (request.text, request.finish_reason) == ("one ", "stop")
        assert request.tokens == ids_of(b"one END")
        assert pieces[:4] == ["o", "n", "e", " "]
        request, pieces = say(ids_of(b"EEN ENENEND."), stop=("END", "zzz"))
        assert request.text == "EEN ENEN"
        request, _ = say(ids_of(b"an EN"), stop=("END",))
        assert (request.text, request.finish_reason) == ("an EN", "length"), "a part that ends the text is said"
        request, _ = say(ids_of(b"abcd"), stop=("abcd", "bc"))
        assert request.text == "a", "the one that ends first counts"
        request, _ = say(ids_of(b"xabc"), stop=("bc", "abc"))
        assert request.text == "x", "of two that end together the longer"
        request, _ = say(ids_of("né語".encode()), stop=("é語",))
        assert request.text == "n"


def test_text_is_the_same_however_tokens_cut_it():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("abé") for _ in range(rng.randint(1, 12)))
        stop = tuple({"".join(rng.choice("abé") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))})
        ends = sorted((text.find(s) + len(s), text.find(s)) for s in stop if s in text)
        expected = text[: ends[0][1]] if ends else text
        data, pieces = ids_of(text.encode()), []
        stream = TextStream(TOKENIZER, stop)
        while data and not stream.stopped:
            count = rng.randint(1, 5)
            pieces.append(stream.put(data[:count]))
            assert expected.startswith("".join(pieces))
            data = data[count:]
        if not stream.stopped:
            pieces.append(stream.put([], final=True))
        assert "".join(pieces) == expected
        assert stream.stopped == bool(ends)


def test_streams_give_what_generate_gives_and_are_cancelled_when_left():
    with use("torch"):
        engine = Engine(MODELS["w"], TOKENIZER, slots=2)
        sampling = Sampling(20, seed=4, stop=("zq",))
        whole = alone(MODELS["w"], prompt_of(6), sampling)
        other = engine.submit(prompt_of(7), greedy(60))
        pieces = list(engine.stream(prompt_of(6), sampling))
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [token for piece in pieces for token in piece.tokens] == whole.tokens
        assert 0 < len(other.tokens) < 60, "the others go on beside a stream"
        left = engine.stream(prompt_of(6), sampling)
        next(left)
        left.close()
        assert list(engine.running.values()) == [other]
        with pytest.raises(ValueError, match="0 tokens"):
            engine.stream([], sampling)
