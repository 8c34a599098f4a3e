"""Exercises of chapter 13, using the model and finding faults."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat_native.evaluation.core_score import centre
from nanochat_native.exercises.base import Experiment, Number, Write
from nanochat_native.model import GPTConfig

# --- 13.1: a CORE score by hand ---

ACCURACIES, CHANCES = (0.4, 0.5, 0.3), (25.0, 50.0, 0.0)  # the chances in percent, as in a bundle


def core() -> float:
    """Return the CORE score of three tasks."""
    pairs = zip(ACCURACIES, CHANCES, strict=True)
    return sum(centre(accuracy, chance) for accuracy, chance in pairs) / len(CHANCES)


def only_subtracted() -> float:
    """Return the mean of accuracy - chance."""
    return sum(a - c / 100 for a, c in zip(ACCURACIES, CHANCES, strict=True)) / len(CHANCES)


# --- 13.2: the cache of a model ---


def cache_bytes(kinds: int = 2, element: int = 4, n_kv_head: int | None = None) -> int:
    """Return the bytes of the cache of a d12 for 2,048 tokens.

    kinds: keys and values are two. n_kv_head: default: that of a d12.
    """
    config = GPTConfig.from_depth(12, vocab_size=8192, sequence_len=2048)
    heads = config.n_kv_head if n_kv_head is None else n_kv_head
    return kinds * config.n_layer * 2048 * heads * config.head_dim * element


# --- 13.3: find the bug in a loader ---

LOADER = '''def batch(tokens, start, B, T):
    """Return inputs and targets (B, T) of the tokens from `start` on.

    Row b has the tokens start + b T ... start + b T + T - 1, and the target of a token is the next one.
    """
    piece = tokens[start : start + B * T]
    return piece[:-1].view(B, -1), piece[1:].view(B, -1)
'''


def batch(tokens: Tensor, start: int, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets."""
    piece = tokens[start : start + B * T + 1]
    return piece[:-1].view(B, T), piece[1:].view(B, T)


def batch_too_short(tokens: Tensor, start: int, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Return the result of the stub."""
    piece = tokens[start : start + B * T]
    return piece[:-1].view(B, -1), piece[1:].view(B, -1)


def batch_without_a_target(tokens: Tensor, start: int, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Return rows of T - 1 targets."""
    rows = tokens[start : start + B * T].view(B, T)
    return rows[:, :-1], rows[:, 1:]


def batch_not_shifted(tokens: Tensor, start: int, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Return the inputs as targets."""
    rows = tokens[start : start + B * T].view(B, T)
    return rows, rows.clone()


def batch_shifted_by_two(tokens: Tensor, start: int, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Return targets that are two tokens later."""
    piece = tokens[start : start + B * T + 2]
    return piece[:-2].view(B, T), piece[2:].view(B, T)


def batch_rolled(tokens: Tensor, start: int, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Return targets that are rolled within their row."""
    rows = tokens[start : start + B * T].view(B, T)
    return rows, rows.roll(-1, 1)


def loader_inputs() -> list[tuple[Any, ...]]:
    """Return token streams, starts and shapes."""
    return [(torch.arange(100, 160), 0, 4, 8), (torch.arange(500, 540), 3, 2, 5)]


# --- 13.4: write the check for a leak ---

LEAKS = '''def leaks(model, ids, t):
    """Return True if the outputs of model(ids) before position t change when token t changes, else False.

    ids is (B, T) with values from 0 to 9. model(ids) returns (B, T, V): what it thinks at each position.
    """
    raise NotImplementedError
'''

Model = Callable[[Tensor], Tensor]


def _changed(ids: Tensor, t: int) -> Tensor:
    changed = ids.clone()
    changed[:, t] = (ids[:, t] + 1) % 10
    return changed


def leaks(model: Model, ids: Tensor, t: int) -> bool:
    """Return whether the outputs before t depend on token t."""
    return not torch.equal(model(ids)[:, :t], model(_changed(ids, t))[:, :t])


def leaks_at_t(model: Model, ids: Tensor, t: int) -> bool:
    """Return whether the outputs up to t, t included, depend on token t."""
    return not torch.equal(model(ids)[:, : t + 1], model(_changed(ids, t))[:, : t + 1])


def leaks_after(model: Model, ids: Tensor, t: int) -> bool:
    """Return whether the outputs from t on depend on token t."""
    return not torch.equal(model(ids)[:, t:], model(_changed(ids, t))[:, t:])


def leaks_at_neighbor(model: Model, ids: Tensor, t: int) -> bool:
    """Return whether the output at t - 2 alone depends on token t."""
    return not torch.equal(model(ids)[:, t - 2], model(_changed(ids, t))[:, t - 2])


def leaks_inverted(model: Model, ids: Tensor, t: int) -> bool:
    """Return the opposite."""
    return not leaks(model, ids, t)


def leaks_without_a_change(model: Model, ids: Tensor, t: int) -> bool:
    """Return whether two calls with the same tokens differ."""
    return not torch.equal(model(ids)[:, :t], model(ids.clone())[:, :t])


def causal(ids: Tensor) -> Tensor:
    """Return sums of the tokens up to each position."""
    return ids.double().cumsum(1)[..., None]


def off_by_one(ids: Tensor) -> Tensor:
    """Return sums of the tokens up to each position and of the next one."""
    following = torch.cat((ids[:, 1:], torch.zeros_like(ids[:, :1])), dim=1)
    return (ids.double().cumsum(1) + following)[..., None]


def everything(ids: Tensor) -> Tensor:
    """Return the sum of all tokens at each position."""
    return ids.double().sum(1, keepdim=True).expand(ids.shape)[..., None]


def delayed(ids: Tensor) -> Tensor:
    """Return sums of the tokens before each position."""
    return causal(ids) - ids[..., None]


def constant(ids: Tensor) -> Tensor:
    """Return zeros."""
    return torch.zeros(*ids.shape, 1)


def leak_inputs() -> list[tuple[Any, ...]]:
    """Return models, some of which leak, with tokens and a position."""
    ids = torch.randint(10, (2, 8), generator=torch.Generator().manual_seed(3))
    return [(model, ids, 5) for model in (causal, delayed, off_by_one, everything, constant)]


# --- 13.5: what fine-tuning costs ---


def judge(result: dict[str, Any]) -> tuple[bool, str]:
    """Judge the comparison of the fine-tuned model with its base model, on Python code."""
    if not result["finished"] or "compare" not in result:
        return False, "the result must compare runs/d4-chat with runs/d4"
    tuned, base = result["bpb"], result["compare"]["bpb"]
    cost = tuned - base
    text = f"on Python code: {base:.3f} bits per byte before fine-tuning, {tuned:.3f} after: it cost {cost:+.3f}"
    return True, text


EXERCISES = (
    Number(
        "13.1",
        "CORE score of three tasks",
        answer=core,
        tolerance=0.005,
        mistakes={
            "that is the mean accuracy; each is to be measured from chance": lambda: sum(ACCURACIES) / 3,
            "accuracy - chance must be divided by 1 - chance": only_subtracted,
            "that is the sum; CORE is the mean": lambda: 3 * core(),
        },
    ),
    Number(
        "13.2",
        "Bytes of the cache of a d12 for 2,048 tokens in float32",
        answer=cache_bytes,
        unit="bytes",
        mistakes={
            "that is half: keys and values are both kept, and float32 has four bytes": lambda: cache_bytes(kinds=1),
            "that is the number of values; each has four bytes": lambda: cache_bytes(element=1),
            "that is one layer; each layer has a cache": lambda: cache_bytes() / 12,
            "that is one head; a d12 has six key/value heads": lambda: cache_bytes(n_kv_head=1),
        },
    ),
    Write(
        "13.3",
        "Find the bug: a loader that raises an error",
        LOADER,
        batch,
        {
            "B T tokens have B T - 1 pairs, which make no (B, T): read one token more": batch_too_short,
            "the last target of each row is lost: rows must have T targets": batch_without_a_target,
            "the targets are the inputs: the loss would fall to 0": batch_not_shifted,
            "the targets are two tokens later": batch_shifted_by_two,
            "the last target of a row is the first token of the row": batch_rolled,
        },
        loader_inputs,
    ),
    Write(
        "13.4",
        "A check that finds a mask off by one",
        LEAKS,
        leaks,
        {
            "position t may change: compare the outputs before t only": leaks_at_t,
            "it compares the outputs from t on; those before t must not change": leaks_after,
            "it looks at one position, and t - 1 is where a mask off by one shows": leaks_at_neighbor,
            "the answer is inverted": leaks_inverted,
            "token t is not changed, so nothing can differ": leaks_without_a_change,
        },
        leak_inputs,
    ),
    Experiment(
        "13.5",
        "What fine-tuning costs on the first task",
        command="python -m nanochat_native.evaluate --checkpoint runs/d4-chat --compare runs/d4 --data stdlib "
        "--max-tokens 32768 --out lab/exercise-13-5",
        folder="lab/exercise-13-5",
        judge=judge,
    ),
)
