"""Generation: the engine against transformers' generate on the same weights, greedy, with a KV cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nanochat_native.bench.measure import UnavailableError
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import Sampling
from nanochat_native.interop import transformers_config
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.runtime.timing import side_by_side

V, PROMPT, NEW = 8192, 32, 128
MIN_SPEEDUPS = {(4, 1): 3.0, (5, 1): 3.0, (6, 1): 3.0, (4, 8): 1.0, (6, 8): 1.0}  # by depth and batch size
BASELINE = "transformers generate"
MIN_DIFFERENT = 8  # distinct tokens of a continuation, so that its equality is evidence

Tokens = list[list[int]]


def name_of(depth: int, batch: int) -> str:
    return f"d{depth} V {V} batch {batch} prompt {PROMPT} new {NEW}"


def their_model(model: GPT) -> Any:
    """Return a NanoChatForCausalLM with the model's weights. Raises UnavailableError if transformers has none."""
    try:
        from transformers import NanoChatConfig, NanoChatForCausalLM
    except ImportError as error:
        raise UnavailableError(f"transformers with NanoChat is not installed ({error})") from None
    config = transformers_config.config_of(model.config, bos_id=None, dtype="float32")
    del config["architectures"], config["model_type"]
    theirs = NanoChatForCausalLM(NanoChatConfig(**config)).eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    theirs.load_state_dict(transformers_config.renamed(weights, transformers_config.names(model.config.n_layer)))
    return theirs


def generators(depth: int, batch: int) -> tuple[Callable[[int], Tokens], Callable[[int], Tokens]]:
    """Return our generator and the baseline's: each continues the same prompts by n tokens, and returns those."""
    model = GPT(GPTConfig.from_depth(depth, vocab_size=V, sequence_len=512))
    generator = torch.Generator().manual_seed(depth)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05, generator=generator)
    other = their_model(model)
    prompts = torch.randint(0, V, (batch, PROMPT), generator=generator)
    engine = Engine(model, None, slots=batch, capacity=PROMPT + NEW)

    def ours(new: int) -> Tokens:
        sampling = Sampling(new, temperature=0)
        return [request.tokens for request in engine.generate([(prompt.tolist(), sampling) for prompt in prompts])]

    def theirs(new: int) -> Tokens:
        settings: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        found: Tokens = other.generate(prompts, **settings)[:, PROMPT:].tolist()
        return found

    return ours, theirs


def check(ours: Tokens, theirs: Tokens) -> None:
    """Raise AssertionError if a continuation differs, or has too few distinct tokens to be evidence."""
    for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            place = next(
                (i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b))
            )
            raise AssertionError(f"sequence {row} differs from transformers' at new token {place}")
        if len(set(a)) < MIN_DIFFERENT:
            raise AssertionError(f"sequence {row} has only {len(set(a))} distinct tokens, too few for a check")


def run(depth: int, batch: int, *, seconds: float, repeats: int) -> dict[str, Any]:
    """Check and time a case, and return its row.

    The row has the milliseconds per token of each sequence, with the prompt's time included, and the milliseconds to
    the first token.
    """
    both = generators(depth, batch)
    check(*(generate(NEW) for generate in both))

    def times(new: int) -> list[float]:
        return side_by_side([partial(generate, new) for generate in both], seconds=seconds, repeats=repeats)

    ours_ms, theirs_ms = (taken / NEW for taken in times(NEW))
    ours_first_ms, theirs_first_ms = times(1)
    return {
        "group": "generation",
        "case": name_of(depth, batch),
        "opponent": BASELINE,
        "ours_ms": ours_ms,
        "theirs_ms": theirs_ms,
        "ratio": theirs_ms / ours_ms,
        "floor": MIN_SPEEDUPS[depth, batch],
        "ours_tokens_per_second": batch / ours_ms * 1e3,
        "theirs_tokens_per_second": batch / theirs_ms * 1e3,
        "ours_first_ms": ours_first_ms,
        "theirs_first_ms": theirs_first_ms,
    }
