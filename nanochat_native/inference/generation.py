"""Text from a model, one token after another."""

from collections.abc import Collection, Iterator, Sequence

import torch

from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference.engine import too_long
from nanochat_native.inference.sampling import check_sampling, sample
from nanochat_native.inference.text_stream import TextStream
from nanochat_native.model.gpt import GPT
from nanochat_native.model.kv_cache import KVCache


def generate_tokens(
    model: GPT,
    prompt_tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
    stop_tokens: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Continues a prompt in num_samples ways; yields the next token of each, up to max_tokens times.

    The settings are those of engine.sample. A sample that draws a stop token is over: it yields None from there on,
    and the iterator ends when all are. The prompt runs through the model once, whatever num_samples. Same seed, same
    tokens.

    Raises ValueError, at the call, for arguments out of range and for more tokens than the model has positions.
    """
    vocab_size = model.config.vocab_size
    if not prompt_tokens or not all(0 <= token < vocab_size for token in prompt_tokens):
        raise ValueError(f"the prompt has {len(prompt_tokens)} tokens; takes at least one, from 0 to {vocab_size - 1}")
    if not all(type(count) is int and count > 0 for count in (max_tokens, num_samples)):
        raise ValueError(f"max_tokens is {max_tokens}, num_samples {num_samples}; both take a whole number from 1")
    if len(prompt_tokens) + max_tokens > model.max_positions:
        raise ValueError(too_long(len(prompt_tokens), max_tokens, model.max_positions))
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if type(seed) is not int or not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed is {seed!r}; it takes a whole number from -2^63 to 2^64 - 1")
    generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def tokens() -> Iterator[list[int | None]]:
        device, capacity = model.wte.weight.device, len(prompt_tokens) + max_tokens
        cache = KVCache(model.config, 1, capacity, dtype=model.compute_dtype, device=device)
        logits = model(torch.tensor([list(prompt_tokens)], device=device), kv_cache=cache, last_only=True)[:, -1]
        logits = logits.expand(num_samples, -1)
        if num_samples > 1:
            cache = cache.repeat(num_samples)
        running = [True] * num_samples
        seen = torch.zeros(num_samples, vocab_size, dtype=torch.bool)
        seen[:, list(prompt_tokens)] = True
        for count in range(1, max_tokens + 1):
            drawn = sample(
                logits,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seen=seen,
                generator=generator,
            )
            seen[torch.arange(num_samples), drawn] = True
            running = [alive and int(token) not in stop_tokens for alive, token in zip(running, drawn, strict=True)]
            if not any(running):
                return
            yield [int(token) if alive else None for alive, token in zip(running, drawn, strict=True)]
            if count < max_tokens:
                logits = model(drawn[:, None].to(device), kv_cache=cache)[:, -1]

    return tokens()


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[str]:
    """Continues a text, which is taken for the beginning of a document, until the model ends it or the text holds one
    of the strings of `stop`, which is left out; yields whole characters as they come. Bytes that are not UTF-8 become
    U+FFFD. The settings, and the errors raised at the call, of generate_tokens; ValueError for an empty stop string.
    """
    if not all(stop):
        raise ValueError(f"stop is {list(stop)}; it takes strings that are not empty")
    stream = generate_tokens(
        model,
        [tokenizer.bos_id, *tokenizer.encode(prompt)],
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_tokens=[tokenizer.bos_id],
    )

    def pieces() -> Iterator[str]:
        text = TextStream(tokenizer, stop)
        for row in stream:
            if piece := text.put([token for token in row if token is not None]):
                yield piece
            if text.stopped:
                return
        if piece := text.put([], final=True):
            yield piece

    return pieces()
