"""Generation for many requests at once: slots of a preallocated KV cache, a new request joins a running batch.

    engine = Engine(model, tokenizer, slots=8)
    request = engine.submit(prompt_tokens, Sampling(max_tokens=100, seed=1))
    while not request.finish_reason:
        engine.step()
        print(request.read().text, end="")

The tokens of a request depend on its prompt, its Sampling and the model alone: not on what runs beside it, when it
came, on `slots`, `capacity` or the number of threads. Each request draws from its own generator, and the logits of a
row do not depend on other rows (model.Decoder, on the CPU). On a GPU, and on the torch backend, they do by rounding,
which another token follows from where two are as likely to the last digits. The same holds for log-probabilities: those
of a prompt are computed by the same passes, one token each, as those of drawn tokens, so that a text has the same ones
whether it is drawn or given.
"""

import codecs
import heapq
import math
import numbers
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_native.model import GPT, Decoder
from nanochat_native.tokenizer import Tokenizer

NOT_FINITE = "the model's logits are not finite: its training has diverged"
FEW = 256  # tokens, which hold nearly all probability; to put all V in order takes as long as a pass of a small model
LARGEST = 1e30  # of a setting that logits are multiplied with, or divided by
PREFILL_TOKENS = 128  # of prompts, a step; more would let the running requests wait for longer than some ten steps


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
    if not 1 / LARGEST <= repetition_penalty <= LARGEST:
        taken = f"it takes a number from {1 / LARGEST:g} to {LARGEST:g}, 1 for none"
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
        raise ValueError(NOT_FINITE)
    if seen is not None and repetition_penalty != 1:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if temperature == 0:
        return logits.argmax(-1)
    ids = None  # of the candidates, where they are not all tokens in their order
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    # Below that float32 has no number, and 0 / 0 is none.
    temperature = max(temperature, 1 / LARGEST)
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
    few = probabilities.topk(min(FEW, size))
    return few if size <= FEW or (few.values.sum(-1) > share).all() else probabilities.topk(size)


class TextStream:
    """Text of tokens as they come: whole characters, and never a part of a stop string. Not UTF-8 becomes U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def put(self, tokens: Sequence[int], *, final: bool = False) -> str:
        """The text that `tokens` make certain. What may begin a stop string is held back, until `final`; of the stop
        strings the one that ends first counts, the text ends before it, and `stopped` is set."""
        self._held += self._decoder.decode(self._tokenizer.decode_bytes(tokens), final)
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in self._held]
        if found:
            end, length = min(found)
            self.stopped = True
            out, self._held = self._held[: end + length], ""
            return out
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        split = len(self._held) - keep
        out, self._held = self._held[:split], self._held[split:]
        return out


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


def beyond_training(tokens: int, trained: int) -> str:
    """What is said once of a text that has outgrown the sequences that the model was trained on."""
    return f"{tokens} tokens, and the model was trained on {trained}: beyond them text gets worse"


def too_long(prompt: int, more: int, taken: int) -> str:
    """What is said of a prompt of so many tokens, and so many more asked for, where the model takes fewer together."""
    return f"the prompt has {prompt} tokens, and {more} more are asked for; this model takes {taken} together"


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of text that begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


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


class Read(NamedTuple):
    tokens: list[int]
    text: str
    scored: list[Scored]


class Request:
    """One prompt and its continuation, made by Engine.submit.

    tokens: drawn so far. text: what they certainly say, without a stop string; "" where the engine has no tokenizer.
    scored: where Sampling asks for it, the prompt's tokens and those drawn, and the stop token that ended them.
    finish_reason: None while it waits or runs, then "stop" (a stop token or string), "length" (max_tokens), "cancelled"
    or "error", with `error` saying why.
    """

    def __init__(self, prompt: list[int], sampling: Sampling, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.tokens: list[int] = []
        self.text = ""
        self.scored: list[Scored] = [Scored(prompt[0], None, ())] if sampling.score_prompt else []
        self.finish_reason: str | None = None
        self.error: str | None = None
        # Positions in the cache. The token after them is decoded next, once the prompt's others are in.
        self._filled = 0
        self._read = (0, 0, 0)
        self._stream = None if tokenizer is None else TextStream(tokenizer, sampling.stop)
        # The generator looks at a seed's low half alone.
        self._generator = torch.Generator().manual_seed((sampling.seed ^ sampling.seed >> 32) & 0xFFFFFFFF)
        self._seen = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(1, vocab_size, dtype=torch.bool)
            self._seen[0, prompt] = True

    def read(self) -> Read:
        """Tokens, text and scores that came since the last call."""
        tokens, text, scored = self._read
        self._read = (len(self.tokens), len(self.text), len(self.scored))
        return Read(self.tokens[tokens:], self.text[text:], self.scored[scored:])

    @property
    def _complete(self) -> bool:
        """Whether nothing is left to compute: for no tokens, once the prompt is scored."""
        to_score = len(self.prompt) - 1 if self.sampling.score_prompt else 0
        return self.sampling.max_tokens == 0 and self._filled >= to_score

    @property
    def _next(self) -> int | None:
        """The token that is decoded next; None while more than one of the prompt are still to be put into the cache."""
        last = len(self.prompt) + len(self.tokens) - 1
        if self._filled < last and not self.sampling.score_prompt:
            return None
        return self.prompt[self._filled] if self._filled < len(self.prompt) else self.tokens[-1]

    def _take(self, logits: Tensor, likeliest: int) -> int | None:
        """The token that follows the one just decoded, from logits (1, V), scored if asked: the prompt's own, which is
        None, or a draw."""
        s = self.sampling
        given = self.prompt[self._filled] if self._filled < len(self.prompt) else None
        plain = s.temperature == 0 and self._seen is None and not s.logit_bias
        token = given if given is not None else likeliest if plain else self._draw(logits)
        if s.logprobs is not None:
            self.scored.append(score(logits[0], token, s.logprobs))
        return token if given is None else None

    def _draw(self, logits: Tensor) -> int:
        s = self.sampling
        if s.logit_bias:
            tokens, numbers = zip(*s.logit_bias, strict=True)
            biases = torch.tensor([numbers], dtype=torch.float32)
            logits = logits.float().cpu().index_add(1, torch.tensor(tokens), biases)
        drawn = sample(
            logits,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            seen=self._seen,
            generator=self._generator,
        )
        return int(drawn)

    def _put(self, token: int) -> None:
        self.tokens.append(token)
        if self._seen is not None:
            self._seen[0, token] = True
        if self._stream is not None:
            self.text += self._stream.put([token])
            if self._stream.stopped:
                self.finish_reason = "stop"
        if len(self.tokens) == self.sampling.max_tokens and not self.finish_reason:
            self._finish("length")

    def _finish(self, reason: str, error: str | None = None) -> None:
        if self._stream is not None:
            self.text += self._stream.put([], final=True)
            if self._stream.stopped and reason == "length":
                reason = "stop"
        self.finish_reason, self.error = reason, error


class Engine:
    """Runs requests in `slots` slots of `capacity` positions each; more of them wait, first come, first served.

    capacity: prompt and continuation of a request fit in; default: the model's positions. The cache takes 2 n_layer
    slots capacity Hkv D numbers, allocated once.
    tokenizer: None for tokens without text, stop strings or <|bos|>. One thread may use it at a time.
    trained_positions: length of the sequences that the model was trained on; beyond it text gets worse.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer | None, *, slots: int = 8, capacity: int | None = None) -> None:
        capacity = model.max_positions if capacity is None else capacity
        if slots < 1 or not 2 <= capacity <= model.max_positions:
            given = f"slots is {slots}, capacity {capacity}"
            raise ValueError(f"{given}; they take a number from 1, and one from 2 to {model.max_positions}")
        if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
        self.tokenizer, self.capacity, self.vocab_size = tokenizer, capacity, model.config.vocab_size
        self.trained_positions = model.config.sequence_len
        self.queue: deque[Request] = deque()
        self.running: dict[int, Request] = {}  # by slot, the oldest first
        self._free = list(range(slots))  # a heap: which slot is taken does not depend on how they came free
        self._decoder = Decoder(model, slots, capacity)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self.queue and not self.running

    def submit(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Request:
        """Takes a request; it starts in the next step that has a free slot.

        Raises ValueError for an empty prompt, ids out of range, more tokens than `capacity`, and stop strings without
        a tokenizer.
        """
        prompt = list(prompt_tokens)
        if not prompt or not all(type(token) is int and 0 <= token < self.vocab_size for token in prompt):
            taken = f"takes at least one, whole numbers from 0 to {self.vocab_size - 1}"
            raise ValueError(f"the prompt has {len(prompt)} tokens; {taken}")
        if len(prompt) + sampling.max_tokens > self.capacity:
            raise ValueError(too_long(len(prompt), sampling.max_tokens, self.capacity))
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"stop is {sampling.stop!r}; an engine without a tokenizer takes none")
        if not all(0 <= token < self.vocab_size for token, _ in sampling.logit_bias):
            raise ValueError(f"logit_bias takes ids from 0 to {self.vocab_size - 1}")
        request = Request(prompt, sampling, self.tokenizer, self.vocab_size)
        self.queue.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request that waits or runs, and frees its slot; nothing for one that has ended."""
        if request in self.queue:
            self.queue.remove(request)
        elif slot := [slot for slot, running in self.running.items() if running is request]:
            self._release(*slot)
        else:
            return
        request._finish("cancelled")

    def step(self) -> list[Request]:
        """One token for every request that runs, of its prompt where that is scored; and less than 2 PREFILL_TOKENS of
        the other prompts, the oldest first.

        Returns the requests that got a token or ended.
        """
        while self.queue and self._free:
            self.running[heapq.heappop(self._free)] = self.queue.popleft()
        complete = {slot: request for slot, request in self.running.items() if request._complete}
        for slot, request in complete.items():
            request._finish("length")
            self._release(slot)
        self._prefill()
        return [*complete.values(), *self._decode()]

    def generate(self, requests: Sequence[tuple[Sequence[int], Sampling]]) -> list[Request]:
        """Submits all (prompt_tokens, sampling) and runs them to their ends. Raises what submit does."""
        submitted = [self.submit(prompt, sampling) for prompt, sampling in requests]
        while any(request.finish_reason is None for request in submitted):
            self.step()
        return submitted

    def stream(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generator[Read, None, None]:
        """Submits a request at the call; its tokens and text as they come. One that is left early is cancelled.

        Raises what submit does at the call, and ValueError, after what came before, where the request ends in an error.
        """
        request = self.submit(prompt_tokens, sampling)

        def pieces() -> Generator[Read, None, None]:
            try:
                while request.finish_reason is None:
                    self.step()
                    if any(piece := request.read()):
                        yield piece
                if request.error is not None:
                    raise ValueError(request.error)
            finally:
                self.cancel(request)

        return pieces()

    def _prefill(self) -> None:
        """All but the last token of each prompt, which is decoded like those that follow it. Of a prompt that is scored
        every token is decoded: a prefill gives no logits."""
        budget = PREFILL_TOKENS
        for slot, request in self.running.items():
            while budget > 0 and request._next is None:
                part = request.prompt[request._filled : -1][:PREFILL_TOKENS]
                self._decoder.prefill(slot, part, request._filled)
                request._filled += len(part)
                budget -= len(part)

    def _decode(self) -> list[Request]:
        ready = {slot: token for slot, request in self.running.items() if (token := request._next) is not None}
        if not ready:
            return []
        requests = [self.running[slot] for slot in ready]
        logits = self._decoder.decode(list(ready), list(ready.values()), [request._filled for request in requests])
        top, likeliest = (found.tolist() for found in logits.max(-1))
        told = []
        for row, (slot, request) in enumerate(zip(ready, requests, strict=True)):
            request._filled += 1
            if not math.isfinite(top[row]):
                request._finish("error", NOT_FINITE)
            else:
                token = request._take(logits[row : row + 1], likeliest[row])
                if token is None:
                    continue
                ends = self.tokenizer is not None and token == self.tokenizer.bos_id
                if ends or token in request.sampling.stop_tokens:
                    request._finish("stop")
                else:
                    request._put(token)
            told.append(request)
            if request.finish_reason is not None:
                self._release(slot)
        return told

    def _release(self, slot: int) -> None:
        del self.running[slot]
        heapq.heappush(self._free, slot)
