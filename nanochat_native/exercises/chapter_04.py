"""Exercises of chapter 4, the model."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.exercises.base import Experiment, Number, Write
from nanochat_native.model import GPT, GPTConfig
from nanochat_native.model.functional import EPS
from nanochat_native.model.functional import norm as package_norm

Part = Callable[[Tensor], Tensor]

# --- 4.1: parameters of d8 that are not embeddings ---


def model_of(depth: int, length: int = 256) -> GPT:
    """Return a model without memory, for counting."""
    config = GPTConfig.from_depth(depth, vocab_size=8192, sequence_len=length)
    with torch.device("meta"):
        return GPT(config)


def parameters_of(depth: int, *parts: str) -> int:
    """Return the number of parameters whose names contain one of `parts`."""
    named = model_of(depth).named_parameters()
    return sum(p.numel() for name, p in named if any(part in name for part in parts))


# --- 4.2: where scores cost as much as matrices ---


def equal_length(depth: int) -> float:
    """Return the T at which the scores of all blocks take as many operations as their matrices, in training."""
    per_position = (model_of(depth, 200).estimate_flops() - model_of(depth, 100).estimate_flops()) / 100
    return 6 * parameters_of(depth, ".h.") / per_position


# --- 4.3: find the bug in RMSNorm ---

NORM = '''def norm(x):
    """Return the RMSNorm of each token of x (T, C): divide it by the root of its mean square, plus 2^-23 in the root.

    A token of zeros stays zero.
    """
    return x / (x.square().mean() + 2**-23).sqrt()
'''


def norm(x: Tensor) -> Tensor:
    """Return the RMSNorm of each token."""
    return package_norm(x)


def norm_of_all(x: Tensor) -> Tensor:
    """Return the result of the stub: all tokens are divided by one number."""
    return x / (x.square().mean() + EPS).sqrt()


def norm_of_channels(x: Tensor) -> Tensor:
    """Return x with each channel divided by its RMS over the tokens."""
    return x / (x.square().mean(0, keepdim=True) + EPS).sqrt()


def layer_norm(x: Tensor) -> Tensor:
    """Return the LayerNorm of each token: its mean is subtracted first."""
    return package_norm(x - x.mean(-1, keepdim=True))


def unit_length(x: Tensor) -> Tensor:
    """Return each token divided by its length."""
    return x / (x.square().sum(-1, keepdim=True) + EPS).sqrt()


def norm_without_root(x: Tensor) -> Tensor:
    """Return each token divided by its mean square."""
    return x / (x.square().mean(-1, keepdim=True) + EPS)


def norm_without_eps(x: Tensor) -> Tensor:
    """Return the RMSNorm without the number that keeps zeros from being divided by zero."""
    return x / x.square().mean(-1, keepdim=True).sqrt()


def norm_inputs() -> list[tuple[Any, ...]]:
    """Return tokens of different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 8, generator=generator) + 0.5
    return [(x,), (torch.cat((100 * x[:2], x[2:], torch.zeros(1, 8))),)]


# --- 4.4: a block ---

BLOCK = '''def block(x, attention, mlp, norm):
    """Return x after a block of the model, x (T, C).

    attention, mlp and norm are functions from (T, C) to (T, C). Both parts of the block read the norm of the residual
    stream, and add what they return to the stream.
    """
    raise NotImplementedError
'''


def block(x: Tensor, attention: Part, mlp: Part, norm: Part) -> Tensor:
    """Return x after a block."""
    x = x + attention(norm(x))
    return x + mlp(norm(x))


def block_with_norm_after(x: Tensor, attention: Part, mlp: Part, norm: Part) -> Tensor:
    """Return x after a block of the first transformer: the norm comes after the sum."""
    x = norm(x + attention(x))
    return norm(x + mlp(x))


def block_without_stream(x: Tensor, attention: Part, mlp: Part, norm: Part) -> Tensor:
    """Return x after a block that adds nothing to its input."""
    return mlp(norm(attention(norm(x))))


def block_in_parallel(x: Tensor, attention: Part, mlp: Part, norm: Part) -> Tensor:
    """Return x after a block whose parts read the same input."""
    return x + attention(norm(x)) + mlp(norm(x))


def block_on_norm(x: Tensor, attention: Part, mlp: Part, norm: Part) -> Tensor:
    """Return x after a block that adds to the norm of the stream."""
    x = norm(x)
    x = norm(x + attention(x))
    return x + mlp(x)


def block_without_norm(x: Tensor, attention: Part, mlp: Part, norm: Part) -> Tensor:
    """Return x after a block without norms."""
    x = x + attention(x)
    return x + mlp(x)


def block_that_drops_attention(x: Tensor, attention: Part, mlp: Part, norm: Part) -> Tensor:
    """Return x after a block whose MLP reads the sum with attention, which the stream does not keep."""
    return x + mlp(norm(x + attention(norm(x))))


def block_with_one_sum(x: Tensor, attention: Part, mlp: Part, norm: Part) -> Tensor:
    """Return x after a block whose MLP replaces the stream."""
    x = x + attention(norm(x))
    return mlp(norm(x))


def mean_with_previous(x: Tensor) -> Tensor:
    """Return each token's mean with its predecessor: what takes the place of attention."""
    return (x + F.pad(x, (0, 0, 1, 0))[:-1]) / 2


def squared_relu(x: Tensor) -> Tensor:
    """Return the squared ReLU: what takes the place of the MLP."""
    return x.relu().square()


def block_inputs() -> list[tuple[Any, ...]]:
    """Return x and the three functions."""
    generator = torch.Generator().manual_seed(4)
    parts = (mean_with_previous, squared_relu, package_norm)
    return [(3 * torch.randn(size, 8, generator=generator), *parts) for size in (1, 6)]


# --- 4.5: two depths ---


def judge_depths(result: dict[str, Any]) -> tuple[bool, str]:
    """Compare d2 and d4 after the same steps, and after the same number of operations."""
    cases = {run["case"]: run["curve"][-1]["step"] for run in result["runs"]}
    if set(cases) != {"d2", "d4"}:
        return False, f"the cases must be d2 and d4, got {', '.join(cases)}"
    if cases["d2"] != cases["d4"]:
        return False, f"both cases must have the same number of steps, got {cases['d2']} and {cases['d4']}"
    found = compare_depths(result)
    by_steps = "d4" if found["d4"] < found["d2"] else "d2"
    by_operations = "d4" if found["d4_with_operations_of_d2"] < found["d2"] else "d2"
    return True, (
        f"after {cases['d2']} steps {by_steps} is better, {found['d4']:.3f} for d4 and {found['d2']:.3f} for d2; with "
        f"the operations of d2, d4 makes {found['steps_with_operations_of_d2']:.0f} steps, and {by_operations} is "
        f"better: d4 had reached {found['d4_with_operations_of_d2']:.3f}"
    )


def compare_depths(result: dict[str, Any]) -> dict[str, float]:
    """Return the last bits per byte of d2 and d4, and the value of d4 when it had used as many operations as d2.

    Values between two evaluations are interpolated.
    """
    curves = {run["case"]: run["curve"] for run in result["runs"]}
    shape = {"vocab_size": result["config"]["vocab_size"], "sequence_len": result["config"]["max_seq_len"]}
    with torch.device("meta"):
        flops = {depth: GPT(GPTConfig.from_depth(depth, **shape)).estimate_flops() for depth in (2, 4)}
    steps = curves["d2"][-1]["step"] * flops[2] / flops[4]
    points = curves["d4"]
    after = next(i for i, point in enumerate(points) if point["step"] >= steps)
    one, other = points[max(0, after - 1)], points[after]
    way = (steps - one["step"]) / (other["step"] - one["step"] or 1)
    return {
        "d2": curves["d2"][-1]["value"],
        "d4": points[-1]["value"],
        "operations_of_d4": flops[4] / flops[2],
        "steps_with_operations_of_d2": steps,
        "d4_with_operations_of_d2": one["value"] + way * (other["value"] - one["value"]),
    }


EXERCISES = (
    Number(
        "4.1",
        "Parameters of d8 that are not embeddings",
        answer=lambda: parameters_of(8, ".h."),
        unit="parameters",
        mistakes={
            "lm_head is an embedding too": lambda: parameters_of(8, ".h.", "lm_head"),
            "that is one block; d8 has eight": lambda: parameters_of(8, ".h.0."),
            "the MLP is missing": lambda: parameters_of(8, ".attn."),
            "that is 8 C^2 a block; attention and the MLP have 12 C^2": lambda: parameters_of(8, ".mlp."),
        },
    ),
    Number(
        "4.2",
        "Sequence length at which scores cost as much as matrices in d12",
        answer=lambda: equal_length(12),
        unit="tokens",
        mistakes={
            "that is the width; the factors of both costs differ": lambda: equal_length(12) / 6,
            "the formula counts all T scores, not the half that causality needs": lambda: 2 * equal_length(12),
            "that is d4, or attention alone: d12 has C = 768, a block 12 C^2": lambda: equal_length(4),
        },
    ),
    Write(
        "4.3",
        "Find the bug: a norm that lets a token see the future",
        NORM,
        norm,
        {
            "the mean is over all tokens: each token depends on the others, later ones too": norm_of_all,
            "the mean is over the tokens; it must be over the channels of each": norm_of_channels,
            "this is LayerNorm: RMSNorm does not subtract the mean": layer_norm,
            "it divides by the length; it must divide by the root of the mean square": unit_length,
            "the root is missing": norm_without_root,
            "a token of zeros becomes NaN: add 2^-23 in the root": norm_without_eps,
        },
        norm_inputs,
    ),
    Write(
        "4.4",
        "A block",
        BLOCK,
        block,
        {
            "the norm comes after the sum, as in the first transformer; it must be before": block_with_norm_after,
            "nothing is added to the stream: x + is missing": block_without_stream,
            "both parts read the same input; the MLP must read the stream after attention": block_in_parallel,
            "the parts add to the norm of the stream; they must add to the stream": block_on_norm,
            "there is no norm": block_without_norm,
            "the stream loses what attention adds: x = x + attention(norm(x)) first": block_that_drops_attention,
            "the MLP replaces the stream: its x + is missing": block_with_one_sum,
        },
        block_inputs,
    ),
    Experiment(
        "4.5",
        "Two depths",
        command=(
            'python -m nanochat_native.compare --recipe october --cases "d2: --depth 2" "d4: --depth 4" '
            "--num-iterations 200 --rates 1 --seeds 1 --out lab/exercise-4-5"
        ),
        folder="lab/exercise-4-5",
        judge=judge_depths,
    ),
)
