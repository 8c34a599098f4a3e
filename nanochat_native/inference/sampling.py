"""Drawing the next token from logits, and the settings for it."""

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NONFINITE_LOGITS = "the model's logits are not finite: its training has diverged"
# This many tokens usually have nearly all probability; sorting all V takes as long as a forward pass of a small model.
TOPK_FAST_PATH = 256
CODE_ACTIONS = ("write", "compute", "call")
MAX_SCALE = 1e30  # largest factor or divisor of logits


def check_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Raise ValueError for settings that are out of range."""
    settings = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    for name, value in settings.items():
        optional = name in ("top_k", "top_p", "min_p")
        number = isinstance(value, numbers.Integral if name == "top_k" else numbers.Real)
        if (not number or isinstance(value, bool)) and not (optional and value is None):
            kind = "whole number" if name == "top_k" else "number"
            raise ValueError(f"{name} must be a {kind}{' or None' if optional else ''}, got {value!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be a whole number >= 1, or None for all tokens, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a number > 0 and <= 1, or None for all tokens, got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be a number from 0 to 1, or None for all tokens, got {min_p}")
    if not 1 / MAX_SCALE <= repetition_penalty <= MAX_SCALE:
        allowed = f"a number from {1 / MAX_SCALE:g} to {MAX_SCALE:g}, 1 for none"
        raise ValueError(f"repetition_penalty must be {allowed}, got {repetition_penalty}")


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Draw one token per row; return (B,) int64 on the CPU.

    The settings apply in the order of the list below.

    Args:
        logits: (B, V), on any device.
        repetition_penalty: Logits of tokens in `seen` are divided by it if positive, otherwise multiplied by it (CTRL,
            arXiv:1909.05858).
        temperature: Divisor of the logits; 0 takes the likeliest token.
        top_k: Keep the k likeliest tokens.
        top_p: Keep the fewest tokens whose probabilities reach p (arXiv:1904.09751).
        min_p: Keep the tokens with at least min_p times the probability of the likeliest (arXiv:2407.01082).
        generator: Generator on the CPU; each row takes one number from it.
        seen: (B, V) bool, the tokens that repetition_penalty applies to.

    Raises ValueError for logits that are not finite.
    """
    logits = logits.float().cpu()
    if not all(map(math.isfinite, [*logits.amin(-1).tolist(), *logits.amax(-1).tolist()])):
        raise ValueError(NONFINITE_LOGITS)
    if seen is not None and repetition_penalty != 1:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if temperature == 0:
        return logits.argmax(-1)
    ids = None  # of the candidates, unless these are all tokens in order
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    # A smaller temperature underflows in float32, and 0 / 0 would be NaN.
    temperature = max(temperature, 1 / MAX_SCALE)
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p is not None and top_p < 1:
        probabilities, order = _likeliest(probabilities, top_p)
        ids = order if ids is None else ids.gather(-1, order)
        before = probabilities.cumsum(-1) - probabilities
        beyond = before >= top_p
        beyond[:, 0] = False  # even if top_p rounds to 0 in float32
        probabilities = probabilities.masked_fill(beyond, 0.0)
    if min_p is not None:
        likeliest = probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < min_p * likeliest, 0.0)
    # Inverse transform sampling: one random number per row. torch.multinomial would take V.
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    share = torch.rand(len(reached), 1, dtype=torch.float64, generator=generator) * reached[:, -1:]
    below_all = torch.nextafter(reached[:, -1:], torch.zeros(()).double())
    drawn = torch.searchsorted(reached, torch.minimum(share, below_all), right=True)
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]


def _likeliest(probabilities: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the largest probabilities of each row in descending order, and their indices: enough to reach `share`."""
    size = probabilities.size(-1)
    few = probabilities.topk(min(TOPK_FAST_PATH, size))
    return few if size <= TOPK_FAST_PATH or (few.values.sum(-1) > share).all() else probabilities.topk(size)


class Scored(NamedTuple):
    """A token and its log-probability in nats.

    The log-probability is the log-softmax of the model's raw logits, before logit_bias, repetition_penalty, temperature
    and the restrictions of the choice.

    Attributes:
        logprob: None for the first token of a prompt, which nothing predicts.
        top: (token, logprob) of the likeliest tokens at this position, the likeliest first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def score(logits: Tensor, token: int, count: int) -> Scored:
    """Return the score of `token` under `logits` (V,), with the `count` likeliest tokens.

    It is computed in float64 on one row, so that neither other rows nor the number of threads change a bit.
    """
    logprobs = logits.double().cpu()[None].log_softmax(-1)[0]
    top = logprobs.topk(min(count, len(logprobs)))
    return Scored(token, logprobs[token].item(), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


@dataclass(frozen=True)
class Sampling:
    """The settings of a request; see `sample`. Raises ValueError for settings that are out of range.

    Attributes:
        max_tokens: Largest number of tokens to add; 0 for none.
        stop: The text ends before the first of these strings.
        stop_tokens: Ids that end the text, in addition to <|bos|>; they are in neither tokens nor text.
        seed: Seed of the request's draws.
        logit_bias: (token, number) pairs; the number is added to the token's logit before anything else.
        logprobs: Score each token, together with this many of the likeliest tokens; None for no scores.
        score_prompt: Score the tokens of the prompt too, which takes a forward pass for each of them.
        code: What happens when the model writes code, between <|python_start|> and <|python_end|>. "write": nothing.
            "compute": the calculator puts the result behind it (inference.calculator). "call": the text ends, and
            Request.code is the code.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    score_prompt: bool = False
    code: str = "write"

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 0:
            raise ValueError(f"max_tokens must be a whole number >= 0, got {self.max_tokens!r}")
        if self.code not in CODE_ACTIONS:
            raise ValueError(f"code must be one of {', '.join(CODE_ACTIONS)}, got {self.code!r}")
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        if not isinstance(self.stop, tuple) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ValueError(f"stop must be a tuple of strings that are not empty, got {self.stop!r}")
        if not isinstance(self.stop_tokens, tuple) or not all(type(token) is int for token in self.stop_tokens):
            raise ValueError(f"stop_tokens must be a tuple of ids, got {self.stop_tokens!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, got {self.seed!r}")
        if not all(type(token) is int and math.isfinite(number) for token, number in self.logit_bias):
            raise ValueError(f"logit_bias must be pairs of an id and a finite number, got {self.logit_bias!r}")
        if self.logprobs is not None and (type(self.logprobs) is not int or self.logprobs < 0):
            raise ValueError(f"logprobs must be a whole number >= 0 or None, got {self.logprobs!r}")
        if self.score_prompt and self.logprobs is None:
            raise ValueError("score_prompt requires logprobs, got None")
