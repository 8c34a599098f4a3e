"""Answers that a model in training draws, their rewards, and the factors of their losses."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_native.data import conversations
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import Sampling
from nanochat_native.model.gpt import GPT
from nanochat_native.training.reward_tasks import Example, RewardTask

SLOTS = 256  # answers that are drawn at once


class Rollout(NamedTuple):
    """An answer to an example.

    Attributes:
        tokens: those of the prompt, of the answer and, if there is one, the token that ended it.
        is_drawn: for each of them, whether the model drew it. The prompt and the results of the calculator are given.
        text: the answer.
        ended: whether the model ended the answer; else it was cut.
        reward: NaN if the model's logits were not finite.
    """

    tokens: list[int]
    is_drawn: list[bool]
    text: str
    ended: bool
    reward: float

    @property
    def num_drawn(self) -> int:
        return sum(self.is_drawn)


class Pass(NamedTuple):
    """Rows of one forward and backward pass.

    Attributes:
        inputs, targets: (B, T) int64, padded at the end; a target of -1 does not count.
        weights: B factors of the sums of the rows' cross-entropies.
    """

    inputs: Tensor
    targets: Tensor
    weights: list[float]


def seed_of(*parts: object) -> int:
    """Return a seed that depends on the parts alone, for the draws of one answer."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw(
    model: GPT,
    tokenizer: Tokenizer,
    task: RewardTask,
    asked: Sequence[tuple[Example, Sequence[int], int]],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    autocast: torch.autocast,
) -> list[Rollout]:
    """Draw an answer for each (example, prompt, seed), many at once, with the model's weights. Return them in order.

    On the CPU with the native backend, an answer depends on the model, its prompt and its seed alone.

    Args:
        max_tokens: largest number of tokens of an answer.
        top_k: 0 for all tokens.
        autocast: the context in which the model runs in the type of the training.

    Raises ConfigError for a fault of the task's file.
    """
    capacity = max(len(prompt) for _, prompt, _ in asked) + max_tokens
    with autocast:  # which sets the type of the weights and the cache
        engine = Engine(model, tokenizer, slots=min(SLOTS, len(asked)), capacity=capacity)
    code = "compute" if conversations.has_code_tokens(tokenizer) else "write"
    stops = conversations.stop_tokens(tokenizer)
    requests = engine.generate(
        [
            (
                prompt,
                Sampling(max_tokens, temperature, top_k=top_k or None, stop_tokens=stops, seed=seed, code=code),
            )
            for _, prompt, seed in asked
        ]
    )
    found = []
    for (example, prompt, _), request in zip(asked, requests, strict=True):
        end = [] if request.stop_token is None else [request.stop_token]
        found.append(
            Rollout(
                [*prompt, *request.tokens, *end],
                [False] * len(prompt) + request.drawn + [True] * len(end),
                request.text,
                bool(end),
                math.nan if request.error is not None else task.reward(example, request.text),
            )
        )
    return found


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return each reward minus the mean of all. Equal rewards give zeros, without a rounding error."""
    mean = rewards[0] if len(set(rewards)) == 1 else math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def loss_weights(rollouts: Sequence[Rollout], *, num_samples: int, mean_rows: int) -> list[float]:
    """Return the factor of each answer's summed cross-entropy in the loss of a step on this rank.

    The loss is that of nanochat: -sum of log p(token) (r - mean r), a mean over the drawn tokens of each `mean_rows`
    answers to an example, then over these groups, and over the examples.

    Args:
        rollouts: num_samples answers to each example, one example after the other.
        mean_rows: a divisor of num_samples.
    """
    weights = []
    for first in range(0, len(rollouts), num_samples):
        answers = rollouts[first : first + num_samples]
        shares = advantages([answer.reward for answer in answers])
        for begin in range(0, num_samples, mean_rows):
            group = answers[begin : begin + mean_rows]
            tokens = max(1, sum(answer.num_drawn for answer in group))
            weights += [share * mean_rows / (tokens * len(rollouts)) for share in shares[begin : begin + mean_rows]]
    return weights


def passes(rollouts: Sequence[Rollout], weights: Sequence[float], rows: int, device: torch.device) -> Iterator[Pass]:
    """Divide answers into passes of at most `rows`, the longest first, so that little is padded.

    Answers of weight 0 have no gradient and are left out. If that leaves none, the shortest makes a pass, so that every
    rank has gradients.
    """
    by_length = sorted(range(len(rollouts)), key=lambda i: -len(rollouts[i].tokens))
    kept = [i for i in by_length if weights[i] != 0] or by_length[-1:]
    for first in range(0, len(kept), rows):
        chosen = kept[first : first + rows]
        length = len(rollouts[chosen[0]].tokens) - 1
        inputs = torch.zeros(len(chosen), length, dtype=torch.int64)
        targets = torch.full((len(chosen), length), -1, dtype=torch.int64)
        for row, i in enumerate(chosen):
            tokens, is_drawn = torch.tensor(rollouts[i].tokens), torch.tensor(rollouts[i].is_drawn)
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = tokens[1:].masked_fill(~is_drawn[1:], -1)
        yield Pass(inputs.to(device), targets.to(device), [weights[i] for i in chosen])


def pass_at(k: int, count: int, passed: int) -> float:
    """Return the unbiased estimate of the chance that one of k answers passes, if `passed` of `count` did.

    That is 1 - C(count - passed, k) / C(count, k) (arXiv:2107.03374). k <= count.
    """
    return 1 - math.comb(count - passed, k) / math.comb(count, k)
