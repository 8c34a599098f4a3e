"""Generation with weights of 16 and 8 bits against the same engine in float32: one sequence, greedy."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import torch

from nanochat_native.bench.generation import NEW, PROMPT, Tokens, V
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import Sampling
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.model.quantization import Quantization, round_weights_
from nanochat_native.runtime.timing import side_by_side

DType = Literal["float32", "bfloat16"]
# By depth, dtype and quantization; for two threads.
MIN_SPEEDUPS: dict[tuple[int, DType, Quantization | None], float] = {
    (6, "bfloat16", None): 1.2,
    (6, "float32", "int8"): 1.5,
    (6, "bfloat16", "int8"): 1.5,
}
TOLERANCE = 0.1  # in standard deviations of a row's logits, of which the drawn one must be the largest


def name_of(depth: int, dtype: DType, quantize: Quantization | None) -> str:
    return f"d{depth} V {V} batch 1 {dtype}{'' if quantize is None else ' ' + quantize}"


def random_model(depth: int) -> GPT:
    model = GPT(GPTConfig.from_depth(depth, vocab_size=V, sequence_len=512))
    generator = torch.Generator().manual_seed(depth)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05, generator=generator)
    return model


def rounded(model: GPT, dtype: DType, quantize: Quantization | None) -> GPT:
    """Return a float32 copy of the model whose weights are rounded as the engine's."""
    found = deepcopy(model)
    if quantize is not None:
        round_weights_(found, quantize)
    elif dtype == "bfloat16":
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.copy_(parameter.bfloat16())
    return found


@torch.no_grad()
def check(model: GPT, prompt: list[int], tokens: list[int]) -> None:
    """Raise AssertionError unless each token is among the likeliest of the model, within TOLERANCE."""
    logits = model(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :].float()
    short = (logits.amax(1) - logits[range(len(tokens)), tokens]) / logits.std(1)
    if not short.max() <= TOLERANCE:
        raise AssertionError(f"new token {int(short.argmax())} is {short.max():.3f} standard deviations below the best")


def run(depth: int, dtype: DType, quantize: Quantization | None, *, seconds: float, repeats: int) -> dict[str, Any]:
    """Check and time a case, and return its row, with milliseconds per token, the prompt's time included."""
    model = random_model(depth)
    prompt = torch.randint(0, V, (PROMPT,), generator=torch.Generator().manual_seed(depth)).tolist()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        small = Engine(model, None, slots=1, capacity=PROMPT + NEW, quantize=quantize)
    wide = Engine(model, None, slots=1, capacity=PROMPT + NEW)

    def generate(engine: Engine) -> Tokens:
        return [request.tokens for request in engine.generate([(prompt, Sampling(NEW, temperature=0))])]

    check(rounded(model, dtype, quantize), prompt, generate(small)[0])
    both: list[Callable[[], Any]] = [partial(generate, engine) for engine in (small, wide)]
    ours_ms, theirs_ms = (taken / NEW for taken in side_by_side(both, seconds=seconds, repeats=repeats))
    return {
        "group": "generation",
        "case": name_of(depth, dtype, quantize),
        "opponent": "this engine in float32",
        "ours_ms": ours_ms,
        "theirs_ms": theirs_ms,
        "ratio": theirs_ms / ours_ms,
        "floor": MIN_SPEEDUPS[depth, dtype, quantize],
        "ours_tokens_per_second": 1e3 / ours_ms,
        "theirs_tokens_per_second": 1e3 / theirs_ms,
    }
