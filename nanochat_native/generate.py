"""python -m nanochat_native.generate: continue a prompt with a trained model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_native.inference.engine import beyond_training, complete
from nanochat_native.inference.sampling import Sampling, check_sampling
from nanochat_native.model.quantization import Quantization, check_quantization
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.command import check_text, run_command
from nanochat_native.runtime.hardware import autocast, pick_device


@dataclass
class Options:
    """Continue a prompt with a trained model.

    The guide explains it: docs/guide/13-using-it.md.
    """

    checkpoint: Path
    """Run folder of `python -m nanochat_native.train` or finetune."""
    prompt: str = ""
    """Text to continue; if empty, generate a document from the beginning."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    max_tokens: int = 256
    """Largest number of tokens to add."""
    temperature: float = 0.8
    """Temperature of the softmax; 0 takes the likeliest token."""
    top_k: int | None = 50
    """Draw from the k likeliest tokens; None for all."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probabilities reach this sum; None for all."""
    min_p: float | None = None
    """Draw from tokens with at least this fraction of the likeliest token's probability; None for all."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens that are already in the text by this, and multiply negative ones; 1 for none."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are left out."""
    seed: int = 0
    """Seed of the draws; the same seed gives the same text."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Device to run on; default: a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights and the cache; default: float32, on a CUDA GPU 16 bits."""
    quantize: Quantization | None = None
    """int8: generate with the matrices in int8, on a CPU. `evaluate --quantize int8` measures the cost."""


def run(options: Options) -> None:
    """Print the prompt, then its continuation as it arrives, and a note if the text is longer than trained on.

    Raises ValueError for flags out of range, and the errors of load_model and complete.
    """
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens must be a whole number >= 1, got {options.max_tokens}")
    for text in (options.prompt, *options.stop):
        check_text(text, "--prompt" if text is options.prompt else "--stop")
    if not all(options.stop):
        raise ValueError("--stop must have strings that are not empty, got an empty one")
    check_sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    device = pick_device(options.device)
    check_quantization(options.quantize, device)
    precision = autocast(device, options.dtype)
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
    with precision:
        pieces = complete(model, tokenizer, prompt, sampling, quantize=options.quantize)
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
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return run_command(Options, "generate", args, run)


if __name__ == "__main__":
    sys.exit(main())
