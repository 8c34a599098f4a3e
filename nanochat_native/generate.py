"""Sampling: tokens with a KV cache, text as a stream, and `python -m nanochat_native.generate`."""

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanochat_native.engine import Engine, Sampling, TextStream, beyond_training, check_sampling, sample, too_long
from nanochat_native.loading import autocast, check_text, load_model, pick_device, run_command
from nanochat_native.model import GPT, KVCache
from nanochat_native.tokenizer import Tokenizer


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


@dataclass
class Options:
    """Continue a prompt with a trained model."""

    checkpoint: Path
    """Run folder, as `python -m nanochat_native.train` leaves it."""
    prompt: str = ""
    """Text to continue; empty: a document from its beginning."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    max_tokens: int = 256
    """Tokens to add at most."""
    temperature: float = 0.8
    """Of the softmax; 0 takes the likeliest token."""
    top_k: int | None = 50
    """Tokens to draw from, the likeliest k; None for all."""
    top_p: float | None = None
    """Tokens to draw from, the likeliest that together reach this probability; None for all."""
    min_p: float | None = None
    """Tokens to draw from, those with at least this share of the likeliest's probability; None for all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of the tokens that are already there, and multiplies negative ones; 1 for none."""
    stop: tuple[str, ...] = ()
    """Texts to end before."""
    seed: int = 0
    """Of the draws; the same seed gives the same text."""
    device: Literal["cpu", "cuda"] | None = None
    """Default: the GPU where there is one."""


def run(options: Options) -> None:
    """Prints the prompt and its continuation as it comes, and a note where that has outgrown the model's training.

    Raises ValueError for flags out of range, and what load_model and Engine do.
    """
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens is {options.max_tokens}; it takes a number from 1")
    for text in (options.prompt, *options.stop):
        check_text(text, "--prompt" if text is options.prompt else "--stop")
    if not all(options.stop):
        raise ValueError("--stop has an empty text; it takes texts that are not empty")
    check_sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    device = pick_device(options.device)
    model, tokenizer, _ = load_model(
        options.checkpoint, options.step, device, warn=lambda message: print(message, file=sys.stderr)
    )
    sampling = Sampling(
        options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=options.stop,
        seed=options.seed,
    )
    prompt = [tokenizer.bos_id, *tokenizer.encode(options.prompt)]
    capacity = min(model.max_positions, len(prompt) + sampling.max_tokens)
    with autocast(device):
        engine = Engine(model, tokenizer, slots=1, capacity=capacity)
    pieces = engine.stream(prompt, sampling)
    print(options.prompt, end="", flush=True)
    tokens = len(prompt)
    for piece in pieces:
        tokens += len(piece.tokens)
        print(piece.text, end="", flush=True)
    print(flush=True)
    if tokens > engine.trained_positions:
        print(f"note: {beyond_training(tokens, engine.trained_positions)}", file=sys.stderr)


def main(args: Sequence[str] | None = None) -> int:
    """Generates as `args` say, sys.argv's by default. Returns the exit code."""
    return run_command(Options, "generate", args, run)


if __name__ == "__main__":
    sys.exit(main())
