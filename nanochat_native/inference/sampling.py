"""How the next token is drawn from the logits."""

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NONFINITE_LOGITS = "the model's logits are not finite: its training has diverged"
TOPK_FAST_PATH = (
    256  # tokens, which hold nearly all probability; to put all V in order takes as long as a pass of a small model
)
MAX_SCALE = 1e30  # of a setting that logits are multiplied with, or divided by


def check_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Raises ValueError for settings that `sample` does not take."""
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
            raise ValueError(f"{name} is {value!r}; it takes a {kind}{', or None' if optional else ''}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it takes a number from 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it takes a number from 1, or None for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it takes a number above 0 to 1, or None for all")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}; it takes a number from 0 to 1, or None for all")
    if not 1 / MAX_SCALE <= repetition_penalty <= MAX_SCALE:
        taken = f"it takes a number from {1 / MAX_SCALE:g} to {MAX_SCALE:g}, 1 for none"
        raise ValueError(f"repetition_penalty is {repetition_penalty}; {taken}")


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
    """Draws one token a row: logits (B, V) on any device -> (B,) int64 on the CPU, where `generator` is.

    In this order: logits of tokens in seen (B, V) bool are divided by repetition_penalty where positive, else
    multiplied by it (CTRL, arXiv:1909.05858); temperature, 0 for the likeliest token; top_k keeps the k likeliest;
    top_p the fewest whose probabilities reach p (arXiv:1904.09751); min_p those with at least min_p of the
    likeliest's probability (arXiv:2407.01082).

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
    ids = None  # of the candidates, where they are not all tokens in their order
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    # Below that float32 has no number, and 0 / 0 is none.
    temperature = max(temperature, 1 / MAX_SCALE)
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p is not None and top_p < 1:
        probabilities, order = _likeliest(probabilities, top_p)
        ids = order if ids is None else ids.gather(-1, order)
        before = probabilities.cumsum(-1) - probabilities
        beyond = before >= top_p
        beyond[:, 0] = False  # whatever float32 makes of top_p
        probabilities = probabilities.masked_fill(beyond, 0.0)
    if min_p is not None:
        likeliest = probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < min_p * likeliest, 0.0)
    # By the inverse of the distribution function: one number of the generator's a row. torch.multinomial takes V.
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    share = torch.rand(len(reached), 1, dtype=torch.float64, generator=generator) * reached[:, -1:]
    below_all = torch.nextafter(reached[:, -1:], torch.zeros(()).double())
    drawn = torch.searchsorted(reached, torch.minimum(share, below_all), right=True)
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]


def _likeliest(probabilities: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The largest of each row, in falling order, and where they stand: enough of them to add up to `share`."""
    size = probabilities.size(-1)
    few = probabilities.topk(min(TOPK_FAST_PATH, size))
    return few if size <= TOPK_FAST_PATH or (few.values.sum(-1) > share).all() else probabilities.topk(size)


class Scored(NamedTuple):
    """A token and its log-probability in nats: the log-softmax of the model's logits as they are, before logit_bias,
    repetition_penalty, temperature and whatever narrows the choice.

    logprob: None for the first token of a prompt, which nothing predicts. top: (token, logprob) of the likeliest tokens
    in its place, the likeliest first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def score(logits: Tensor, token: int, count: int) -> Scored:
    """`token` in the place that `logits` (V,) are for, with the `count` likeliest. Computed in float64, on one row
    alone: neither other rows nor the number of threads change a bit."""
    logprobs = logits.double().cpu()[None].log_softmax(-1)[0]
    top = logprobs.topk(min(count, len(logprobs)))
    return Scored(token, logprobs[token].item(), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


@dataclass(frozen=True)
class Sampling:
    """How a request is continued; see `sample`. Raises ValueError for settings out of range.

    max_tokens: tokens to add at most; 0 for none. stop: the text ends before the first of these strings.
    stop_tokens: ids that end it beside <|bos|>, which always does; they are in neither tokens nor text.
    seed: of this request's draws.
    logit_bias: (token, number) pairs; the number is added to the token's logit before everything else.
    logprobs: each token is scored, with so many of the likeliest beside it; None for no scores.
    score_prompt: the tokens of the prompt are scored too, which takes a pass of the model for each of them.
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

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 0:
            raise ValueError(f"max_tokens is {self.max_tokens!r}; it takes a whole number from 0")
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        if not isinstance(self.stop, tuple) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ValueError(f"stop is {self.stop!r}; it takes a tuple of strings, none empty")
        if not isinstance(self.stop_tokens, tuple) or not all(type(token) is int for token in self.stop_tokens):
            raise ValueError(f"stop_tokens is {self.stop_tokens!r}; it takes a tuple of ids")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed is {self.seed!r}; it takes a whole number from 0 to 2^63 - 1")
        if not all(type(token) is int and math.isfinite(number) for token, number in self.logit_bias):
            raise ValueError(f"logit_bias is {self.logit_bias!r}; it takes pairs of an id and a finite number")
        if self.logprobs is not None and (type(self.logprobs) is not int or self.logprobs < 0):
            raise ValueError(f"logprobs is {self.logprobs!r}; it takes a whole number from 0, or None")
        if self.score_prompt and self.logprobs is None:
            raise ValueError("score_prompt goes with logprobs, which is None")
