"""The calculator: its arithmetic against Python's, its limits, and its results in the text of a request."""

import random
import time
from fractions import Fraction

import pytest
from models import build

from nanochat_native.data import conversations
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference.calculator import MAX_CHARS, MAX_DEPTH, calculate
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import Sampling
from nanochat_native.model.config import GPTConfig

TOKENIZER = Tokenizer.train(["def f(x): return x + 1\n" * 50], 300)
CODE_START, CODE_END, OUTPUT_START, OUTPUT_END = conversations.special_ids(TOKENIZER, conversations.CODE_TOKENS)
END = TOKENIZER.special_tokens["<|assistant_end|>"]
MODEL = build(GPTConfig(sequence_len=64, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=64))


# --- arithmetic ---


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48/2", "24"),
        ("12 * 1.5", "18"),
        ("0.1 + 0.2", "0.3"),
        ("1/3", "0.333333333333"),
        ("100000/3", "33333.3333333"),
        ("1234567890123.5 + 0", "1234567890123.5"),
        ("-1/8", "-0.125"),
        ("3/200000", "1.5e-05"),
        ("1,234 * 2", "2468"),
        ("2 - -3", "5"),
        ("--+-7", "-7"),
        ("7 // 2", "3"),
        ("-7 // 2", "-4"),
        ("(1 + 2) * (3 - 4) / 5", "-0.6"),
        (".5 + 5.", "5.5"),
        ("\n\t 6*7 ", "42"),
        ("'strawberry'.count('r')", "3"),
        ("\"it's\".count('s') * 10", "10"),
        ("'it\\'s'.count(\"'\")", "1"),
        ("'aaa'.count('')", "4"),
    ],
)
def test_results(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        *("", "()", "1 +", "* 2", "1 2", "(1", "1)", "2 ** 3", "2 % 3", "1e5", "1_000", "0x10", "x", "٣ + 1"),
        *("1/0", "0 // 0", "'a'", "'a' + 'b'", "'a'.count()", "'a'.count(1)", "'a'.upper()", "'a'.count('a'", "..5"),
        *("__import__('os')", "'a'.__class__", "(lambda: 1)()", "print('a'.count('a'))", "1;2", "1.2.3", "1.5,0"),
    ],
)
def test_what_is_no_calculation_has_no_result(expression):
    assert calculate(expression) is None


def test_random_expressions_equal_exact_arithmetic():
    draws = random.Random(5)

    def expression(depth):
        kind = draws.random()
        if depth == 0 or kind < 0.2:
            return str(draws.randint(0, 99))
        if kind < 0.35:
            return f"({expression(depth - 1)})"
        if kind < 0.45:
            return f"-{expression(depth - 1)}"
        return f"{expression(depth - 1)} {draws.choice(['+', '-', '*', '/', '//'])} {expression(depth - 1)}"

    compared = 0
    for _ in range(2000):
        text = expression(4)
        exact = "".join(f"Fraction({part})" if part.isdigit() else part for part in _pieces(text))
        try:
            expected = eval(exact, {"Fraction": Fraction})
        except ZeroDivisionError:
            expected = None
        if len(text) > MAX_CHARS:
            continue
        result = calculate(text)
        assert (result is None) == (expected is None), text
        if result is not None and Fraction(expected).denominator == 1:
            assert result == str(int(expected)), text
        elif result is not None:
            assert float(result) == pytest.approx(float(expected), rel=1e-7, abs=1e-11), text
        compared += 1
    assert compared > 1500


def _pieces(text):
    """The numbers of an expression, and what is between them."""
    pieces = [""]
    for sign in text:
        if pieces[-1].isdigit() != sign.isdigit():
            pieces.append("")
        pieces[-1] += sign
    return pieces


def test_size_depth_and_time_are_limited():
    assert calculate("9" * MAX_CHARS) == "9" * MAX_CHARS
    assert calculate("9" * (MAX_CHARS + 1)) is None
    assert calculate("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) == "1"
    assert calculate("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)) is None
    assert calculate("(1)+" * 40 + "1") == "41", "parentheses one after another are not deep"
    begin = time.process_time()
    for sign in ("*", "/", "//", "-", "+", "("):
        calculate((f"9{sign}" * MAX_CHARS)[:MAX_CHARS])
        calculate((sign * MAX_CHARS)[:MAX_CHARS])
        calculate(("9." + "1" * 60 + sign) * 4 + "1")
    calculate("'" * MAX_CHARS)
    calculate("'\\" * 128)
    assert time.process_time() - begin < 1


# --- in the text of a request ---


def encode(text):
    return TOKENIZER.encode(text)


def written(script, tokens, *, max_tokens=40, prompt=(1, 2), **settings):
    """The request whose model draws these tokens, and the tokens that the model was given."""
    engine = Engine(MODEL, TOKENIZER, slots=1)
    given = script(engine, tokens)
    sampling = Sampling(max_tokens, temperature=0, stop_tokens=(END,), **settings)
    (request,) = engine.generate([(list(prompt), sampling)])
    return request, given


ASKED = [*encode("so "), CODE_START, *encode("48/2"), CODE_END, *encode("24 in all"), END]


def test_the_result_is_put_behind_the_code(script):
    request, given = written(script, ASKED, code="compute")
    result = [OUTPUT_START, *encode("24"), OUTPUT_END]
    first = ASKED.index(CODE_END) + 1
    assert request.tokens == [*ASKED[:first], *result, *ASKED[first:-1]]
    assert request.text == "so <<48/2=24>>24 in all"
    assert request.finish_reason == "stop"
    assert [token for token, drawn in zip(request.tokens, request.drawn, strict=True) if not drawn] == result
    assert given == [2, *request.tokens], "the model sees the result"
    assert request.code is None


def test_without_the_calculator_code_is_text(script):
    request, _ = written(script, ASKED)
    assert request.tokens == ASKED[:-1]
    assert request.text == "so <|python_start|>48/2<|python_end|>24 in all"
    assert all(request.drawn)


def test_code_that_is_no_calculation_gets_no_result(script):
    tokens = [CODE_START, *encode("import os"), CODE_END, *encode("x"), END]
    request, _ = written(script, tokens, code="compute")
    assert request.tokens == tokens[:-1]
    assert request.text == "<<import os>>x"


def test_ends_without_code_and_code_without_end_do_nothing(script):
    tokens = [CODE_END, CODE_START, *encode("9"), CODE_START, *encode("1+1"), CODE_END, CODE_END, CODE_START, END]
    request, _ = written(script, tokens, code="compute")
    assert sum(not drawn for drawn in request.drawn) == 3
    assert request.text == "<|python_end|><<9<<1+1=2>><|python_end|><<"


def test_a_result_counts_as_tokens(script):
    most = ASKED.index(CODE_END) + 2  # ends within the result
    request, _ = written(script, ASKED, code="compute", max_tokens=most)
    assert request.finish_reason == "length"
    assert request.tokens[-1] == OUTPUT_START
    assert len(request.tokens) == most


def test_a_stop_string_can_end_a_result(script):
    request, _ = written(script, ASKED, code="compute", stop=("=2",))
    assert request.text == "so <<48/2"
    assert request.finish_reason == "stop"


def test_scores_and_draws_of_what_is_given(script):
    request, _ = written(script, ASKED, code="compute", logprobs=1)
    assert [one.token for one in request.scored] == [*request.tokens, END]
    engine = Engine(MODEL, TOKENIZER, slots=1)
    whole = [1, 2, *request.tokens]
    (again,) = engine.generate([(whole, Sampling(0, logprobs=1, score_prompt=True))])
    assert [one.logprob for one in again.scored[2:]] == [one.logprob for one in request.scored[:-1]]


def test_a_call_ends_the_text(script):
    request, _ = written(script, ASKED, code="call")
    assert (request.text, request.finish_reason, request.code) == ("so ", "tool_calls", "48/2")
    assert request.tokens == ASKED[: ASKED.index(CODE_END) + 1]
    request, _ = written(script, ASKED, code="call", max_tokens=4)
    assert (request.text, request.finish_reason, request.code) == ("so ", "length", None)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="code must be one of write, compute, call, got 'run'"):
        Sampling(1, code="run")
    with pytest.raises(ValueError, match="code must be 'write' for an engine without a tokenizer, got 'compute'"):
        Engine(MODEL, None).submit([1], Sampling(1, code="compute"))
    plain = Tokenizer(
        [bytes([i]) for i in range(256)] + [bytes([97, i]) for i in range(TOKENIZER.vocab_size - 257)],
        specials=("<|bos|>",),
    )
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|python_start\|>"):
        Engine(MODEL, plain).submit([1], Sampling(1, code="call"))


# --- what was written, as the content of a message ---


def test_content_of_is_the_inverse_of_render():
    parts = [
        {"type": "text", "text": "so "},
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"},
        {"type": "text", "text": "24 in all"},
    ]
    messages = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": parts}]
    tokens, _ = conversations.render(TOKENIZER, messages)
    start = tokens.index(TOKENIZER.special_tokens["<|assistant_start|>"])
    assert conversations.content_of(TOKENIZER, tokens[start + 1 : -1]) == parts
    assert conversations.content_of(TOKENIZER, encode("plain é")) == "plain é"
    assert conversations.content_of(TOKENIZER, []) == ""
    cut = conversations.content_of(TOKENIZER, [CODE_START, *encode("1+")])
    assert cut == [{"type": "python", "text": "1+"}]
