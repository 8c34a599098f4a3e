"""Generation for many requests at once, with continuous batching: a new request joins the running batch.

    engine = Engine(model, tokenizer, slots=8)
    request = engine.submit(prompt_tokens, Sampling(max_tokens=100, seed=1))
    while not request.finish_reason:
        engine.step()
        print(request.read().text, end="")

`complete` is the short form for one prompt. Each running request has a slot of a preallocated KV cache.

The tokens of a request depend only on its prompt, its Sampling and the model, not on other requests, the time of its
arrival, `slots`, `capacity` or the number of threads: each request draws from its own generator, and on the native CPU
backend the logits of a row do not depend on other rows (see model.Decoder). On a GPU and on the torch backend they do,
by rounding, which can change a token if two are almost equally likely. The same holds for log-probabilities. Those of a
prompt are computed one token per pass, like those of drawn tokens, so that a text has the same log-probabilities
whether it is given or drawn.
"""

import heapq
import math
from collections import deque
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference.calculator import CodeReader
from nanochat_native.inference.sampling import NONFINITE_LOGITS, Sampling, Scored, sample, score
from nanochat_native.inference.text_stream import TextStream
from nanochat_native.model.decoder import Decoder
from nanochat_native.model.gpt import GPT
from nanochat_native.model.quantization import Quantization

PREFILL_TOKENS = 128  # prompt tokens per step; with more the running requests would wait longer than about ten steps


def beyond_training(tokens: int, trained: int) -> str:
    """Return the note on a text that is longer than the sequences of the training."""
    return f"the text has {tokens} tokens, but the model was trained on {trained}: quality drops beyond that"


def too_long(prompt: int, more: int, limit: int) -> str:
    """Return the error text for a prompt and a number of requested tokens that exceed the limit together."""
    return f"prompt and max_tokens must have at most {limit} tokens together, got {prompt} + {more}"


class Output(NamedTuple):
    """Tokens, text and scores that a request got since it was last read."""

    tokens: list[int]
    text: str
    scored: list[Scored]


class Request:
    """A prompt and its continuation. Engine.submit creates it.

    Attributes:
        tokens: Tokens so far.
        drawn: For each of them, whether the model drew it; the calculator's results are given.
        stop_token: The token that ended the text, which is in neither tokens nor text; None if none did.
        text: Their text, as far as it can no longer change, without a stop string; "" if the engine has no tokenizer.
        scored: Scores of the prompt's tokens and of those behind it, with the stop token that ended them, if requested.
        finish_reason: None while the request waits or runs; then "stop" (stop token or string), "length" (max_tokens),
            "tool_calls" (code; see Sampling.code), "cancelled" or "error".
        error: Cause of an "error".
    """

    def __init__(self, prompt: list[int], sampling: Sampling, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.tokens: list[int] = []
        self.drawn: list[bool] = []
        self.stop_token: int | None = None
        self.text = ""
        self.scored: list[Scored] = [Scored(prompt[0], None, ())] if sampling.score_prompt else []
        self.finish_reason: str | None = None
        self.error: str | None = None
        # Number of filled positions in the cache.
        self._filled = 0
        self._read_up_to = (0, 0, 0)  # lengths of tokens, text and scored at the last call of read()
        self._reader = None
        if tokenizer is not None and sampling.code != "write":
            self._reader = CodeReader(tokenizer, sampling.code)
        self._results: deque[int] = deque()  # tokens of the calculator that come next
        self._stream = None if tokenizer is None else TextStream(tokenizer, sampling.stop)
        # torch's generator uses only the low 32 bits of a seed.
        self._generator = torch.Generator().manual_seed((sampling.seed ^ sampling.seed >> 32) & 0xFFFFFFFF)
        self._seen = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(1, vocab_size, dtype=torch.bool)
            self._seen[0, prompt] = True

    @property
    def code(self) -> str | None:
        """The code that ended the text, if the finish_reason is "tool_calls"."""
        return None if self._reader is None else self._reader.code

    def read(self) -> Output:
        """Return the output that came since the last call."""
        tokens, text, scored = self._read_up_to
        self._read_up_to = (len(self.tokens), len(self.text), len(self.scored))
        return Output(self.tokens[tokens:], self.text[text:], self.scored[scored:])

    @property
    def _complete(self) -> bool:
        """Whether nothing is left to compute: no tokens are requested and the prompt is scored if needed."""
        to_score = len(self.prompt) - 1 if self.sampling.score_prompt else 0
        return self.sampling.max_tokens == 0 and self._filled >= to_score

    @property
    def _missing(self) -> list[int]:
        """The tokens to compute next: those of the prompt that the cache lacks, or the last token.

        A scored prompt has one at a time, since a pass gives the logits of the last of them alone.
        """
        if self._filled >= len(self.prompt):
            return self.tokens[-1:]
        return self.prompt[self._filled : self._filled + 1 if self.sampling.score_prompt else None]

    @property
    def _reads_next(self) -> bool:
        """Whether the logits of the last token in the cache are read, to draw or to score the next one."""
        return self._filled >= len(self.prompt) or self.sampling.score_prompt

    @property
    def _greedy(self) -> bool:
        """Whether the drawn token is the likeliest of the model's logits."""
        s = self.sampling
        return s.temperature == 0 and self._seen is None and not s.logit_bias

    @property
    def _reads_logits(self) -> bool:
        """Whether the next token needs all logits, not only the likeliest."""
        draws = self._filled >= len(self.prompt) and not self._results
        return self.sampling.logprobs is not None or (draws and not self._greedy)

    def _accept(self, logits: Tensor, likeliest: int) -> int | None:
        """Return the token behind the last one, or None inside the prompt; score it if requested.

        It is the calculator's if there is one, or else drawn from logits (1, V).
        """
        s = self.sampling
        in_prompt = self._filled < len(self.prompt)
        if in_prompt:
            token = self.prompt[self._filled]
        elif self._results:
            token = self._results[0]
        else:
            token = likeliest if self._greedy else self._draw(logits)
        if s.logprobs is not None:
            self.scored.append(score(logits[0], token, s.logprobs))
        return None if in_prompt else token

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

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        self.drawn.append(not self._results)
        if self._results:
            self._results.popleft()
        content = None
        if self._reader is not None:
            content, results = self._reader.put(token)
            self._results.extend(results)
        if self._seen is not None:
            self._seen[0, token] = True
        if self._stream is not None:
            self.text += self._stream.put([token]) if content is None else self._stream.put_bytes(content)
            if self._stream.stopped:
                self.finish_reason = "stop"
        if self.code is not None and not self.finish_reason:
            self._finish("tool_calls")
        if len(self.tokens) == self.sampling.max_tokens and not self.finish_reason:
            self._finish("length")

    def _finish(self, reason: str, error: str | None = None) -> None:
        if self._stream is not None:
            self.text += self._stream.put([], final=True)
            if self._stream.stopped and reason == "length":
                reason = "stop"
        self.finish_reason, self.error = reason, error


class Engine:
    """Runs requests in slots of a KV cache. Further requests wait; they start in the order of their arrival.

    Only one thread at a time may use an engine.

    Args:
        tokenizer: None for tokens without text, stop strings or <|bos|>.
        slots: Number of requests that run at once.
        capacity: Largest number of tokens of a request, prompt included; default: the model's positions. The cache has
            2 n_layer slots capacity Hkv D numbers, allocated once.
        quantize: "int8" generates with weights in int8, on a CPU; see model/quantization.py.

    Attributes:
        model: The model, which the engine reads and does not change.
        trained_positions: Sequence length of the training; the quality of text drops beyond it.

    Raises ValueError for sizes that are out of range, a tokenizer that does not fit the model, and as Decoder does.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None,
        *,
        slots: int = 8,
        capacity: int | None = None,
        quantize: Quantization | None = None,
    ) -> None:
        capacity = model.max_positions if capacity is None else capacity
        if slots < 1 or not 2 <= capacity <= model.max_positions:
            allowed = f"slots must be >= 1, and capacity from 2 to {model.max_positions}"
            raise ValueError(f"{allowed}, got slots {slots} and capacity {capacity}")
        if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"the tokenizer must have {model.config.vocab_size} ids like the model, got {tokenizer.vocab_size}"
            )
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.capacity, self.vocab_size = capacity, model.config.vocab_size
        self.trained_positions = model.config.sequence_len
        self.queue: deque[Request] = deque()
        self.running: dict[int, Request] = {}  # by slot, the oldest first
        self._free = list(
            range(slots)
        )  # a heap: the choice of a slot does not depend on the order in which slots were freed
        self._decoder = Decoder(model, slots, capacity, quantize)

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self.queue and not self.running

    def submit(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Request:
        """Add a request; it starts at the next step that has a free slot.

        Raises ValueError for an empty prompt, ids out of range, more tokens than `capacity`, stop strings or acting on
        code without a tokenizer, and acting on code with a tokenizer that lacks the special tokens of code.
        """
        prompt = list(prompt_tokens)
        if not prompt or not all(type(token) is int and 0 <= token < self.vocab_size for token in prompt):
            allowed = f"at least one token, whole numbers from 0 to {self.vocab_size - 1}"
            raise ValueError(f"the prompt must have {allowed}, got {len(prompt)} tokens")
        if len(prompt) + sampling.max_tokens > self.capacity:
            raise ValueError(too_long(len(prompt), sampling.max_tokens, self.capacity))
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"stop must be empty for an engine without a tokenizer, got {sampling.stop!r}")
        if sampling.code != "write" and self.tokenizer is None:
            raise ValueError(f"code must be 'write' for an engine without a tokenizer, got {sampling.code!r}")
        if not all(0 <= token < self.vocab_size for token, _ in sampling.logit_bias):
            raise ValueError(f"logit_bias must have ids from 0 to {self.vocab_size - 1}")
        request = Request(prompt, sampling, self.tokenizer, self.vocab_size)
        self.queue.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request that waits or runs, and free its slot; do nothing if it has ended."""
        if request in self.queue:
            self.queue.remove(request)
        elif slot := [slot for slot, running in self.running.items() if running is request]:
            self._release(*slot)
        else:
            return
        request._finish("cancelled")

    def step(self) -> list[Request]:
        """Run the model once: on a token of each request that generates or is scored, and on tokens of other prompts.

        At most PREFILL_TOKENS tokens are of other prompts, those of the oldest request first. Returns the requests that
        got a token or ended.
        """
        while self.queue and self._free:
            self.running[heapq.heappop(self._free)] = self.queue.popleft()
        complete = {slot: request for slot, request in self.running.items() if request._complete}
        for slot, request in complete.items():
            request._finish("length")
            self._release(slot)
        return [*complete.values(), *self._advance()]

    def generate(self, requests: Sequence[tuple[Sequence[int], Sampling]]) -> list[Request]:
        """Submit all (prompt_tokens, sampling) and run until they have ended. Raises the errors of submit."""
        submitted = [self.submit(prompt, sampling) for prompt, sampling in requests]
        while any(request.finish_reason is None for request in submitted):
            self.step()
        return submitted

    def stream(self, prompt_tokens: Sequence[int], sampling: Sampling) -> Generator[Output, None, None]:
        """Submit a request at the call; yield its output as it arrives. Closing the generator cancels the request.

        Raises the errors of submit at the call, and ValueError while iterating if the request ends in an error.
        """
        request = self.submit(prompt_tokens, sampling)

        def pieces() -> Generator[Output, None, None]:
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

    def _parts(self) -> dict[int, list[int]]:
        """Return the tokens of the next pass, by slot."""
        parts, budget = dict[int, list[int]](), PREFILL_TOKENS
        for slot, request in self.running.items():
            part = request._missing
            if not request._reads_next:
                part = part[:budget]
                budget -= len(part)
            if part:
                parts[slot] = part
        return parts

    def _advance(self) -> list[Request]:
        parts = self._parts()
        if not parts:
            return []
        requests = [self.running[slot] for slot in parts]
        starts = [request._filled for request in requests]
        for request, part in zip(requests, parts.values(), strict=True):
            request._filled += len(part)
        reading = [(row, slot) for row, slot in enumerate(parts) if self.running[slot]._reads_next]
        logits = self._decoder.extend(list(parts), list(parts.values()), starts, with_logits=bool(reading))
        if not reading:
            return []
        top, likeliest, logits = read_logits(logits, any(self.running[slot]._reads_logits for _, slot in reading))
        changed = []
        for row, slot in reading:
            request = self.running[slot]
            if not math.isfinite(top[row]):
                request._finish("error", NONFINITE_LOGITS)
            else:
                token = request._accept(logits[row : row + 1], likeliest[row])
                if token is None:
                    continue
                ends = self.tokenizer is not None and token == self.tokenizer.bos_id
                if ends or token in request.sampling.stop_tokens:
                    request.stop_token = token
                    request._finish("stop")
                else:
                    request._append(token)
            changed.append(request)
            if request.finish_reason is not None:
                self._release(slot)
        return changed

    def _release(self, slot: int) -> None:
        del self.running[slot]
        heapq.heappush(self._free, slot)


def read_logits(logits: Tensor, whole: bool) -> tuple[list[float], list[int], Tensor]:
    """Return the largest logit of each row of logits (B, V), its token, and the logits, on the CPU.

    Args:
        whole: Whether the logits themselves are needed; else those returned may be (B, 0).
    """
    if logits.device.type == "cpu":
        top, likeliest = logits.max(-1)
        return top.tolist(), likeliest.tolist(), logits
    return read_in_one_copy(logits, whole)


def read_in_one_copy(logits: Tensor, whole: bool) -> tuple[list[float], list[int], Tensor]:
    """Return what read_logits does, for logits on any device. The host waits once."""
    top, likeliest = logits.max(-1)
    # The tokens are exact in the logits' type, float32 or wider: V is below 2^24.
    columns = [top[:, None], likeliest[:, None].to(logits.dtype), logits[:, : logits.size(1) if whole else 0]]
    host = torch.cat(columns, dim=1).cpu()
    return host[:, 0].tolist(), [int(token) for token in host[:, 1].tolist()], host[:, 2:]


def complete(
    model: GPT,
    tokenizer: Tokenizer | None,
    prompt_tokens: Sequence[int],
    sampling: Sampling,
    *,
    quantize: Quantization | None = None,
) -> Generator[Output, None, None]:
    """Continue one prompt, on an engine with a single slot that is made at the call; yield its output as it comes.

    Args:
        tokenizer: None for a model without one; the output then has tokens and no text.
        prompt_tokens: Token ids; a text begins with tokenizer.bos_id.
        quantize: As for Engine.

    Raises ValueError as Engine and Engine.stream do.
    """
    capacity = min(model.max_positions, max(2, len(prompt_tokens) + sampling.max_tokens))
    engine = Engine(model, tokenizer, slots=1, capacity=capacity, quantize=quantize)
    return engine.stream(prompt_tokens, sampling)
