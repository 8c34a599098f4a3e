"""Sampling: tokens with a KV cache, text as a stream, and `python -m nanochat_native.generate`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_native.inference.engine import beyond_training, complete
from nanochat_native.inference.sampling import Sampling, check_sampling
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.command import check_text, run_command
from nanochat_native.runtime.hardware import autocast, pick_device


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
    with autocast(device):
        pieces = complete(model, tokenizer, prompt, sampling)
    print(options.prompt, end="", flush=True)
    tokens = len(prompt)
    for piece in pieces:
        tokens += len(piece.tokens)
        print(piece.text, end="", flush=True)
    print(flush=True)
    trained = model.config.sequence_len
    if tokens > trained:
        print(f"note: {beyond_training(tokens, trained)}", file=sys.stderr)


def main(args: Sequence[str] | None = None) -> int:
    """Generates as `args` say, sys.argv's by default. Returns the exit code."""
    return run_command(Options, "generate", args, run)


if __name__ == "__main__":
    sys.exit(main())
