"""Accuracy of a chat model in the tasks of `chat_tasks`, and ChatCORE.

Multiple choice is decided as in nanochat: among the letters of the choices, the model chooses the one with the highest
logit behind <|assistant_start|>, the first of equal ones. The answers to other problems are written by the engine, with
the calculator, until <|assistant_end|>.

ChatCORE is nanochat's mean of the centred accuracies of ARC-Easy, ARC-Challenge, MMLU, GSM8K and HumanEval.
"""

import itertools
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanochat_native.data import conversations
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.evaluation.chat_tasks import BASELINES, CHATCORE, Problem, Task
from nanochat_native.evaluation.core_score import centre, margin
from nanochat_native.inference.engine import Engine, Request
from nanochat_native.inference.sampling import NONFINITE_LOGITS, Sampling
from nanochat_native.model.gpt import GPT
from nanochat_native.model.quantization import Quantization
from nanochat_native.runtime.distributed import World

MAX_PROMPT = 2048  # nanochat's limit of the tokens of a conversation, without <|assistant_start|>
MAX_PROGRAMS = 8  # that run at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn; the defaults are nanochat's.

    Attributes:
        samples: Number of answers to each problem.
        seed: Seed of the draws; each answer has a seed of its own, made of this one, its problem and its number.
    """

    samples: int = 1
    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = 50
    seed: int = 0


class TaskResult(NamedTuple):
    """Result of a task.

    Attributes:
        correct: Number of problems with a right answer: with several samples, with at least one.
        baseline: Accuracy of guessing.
        centred: Accuracy scaled so that guessing gives 0 and no mistake gives 1.
        sample_accuracy: Fraction of all samples that are right.
        cut: Number of prompts that were too long for the model and lost their end.
    """

    task: str
    problems: int
    correct: int
    accuracy: float
    baseline: float
    centred: float
    sample_accuracy: float
    cut: int
    seconds: float


class Prompt(NamedTuple):
    """The tokens of a prompt, up to <|assistant_start|>, and whether it was cut."""

    tokens: list[int]
    is_cut: bool


def prompt_of(tokenizer: Tokenizer, message: str, longest: int) -> Prompt:
    """Return the prompt for the answer to a message: at most `longest` tokens and <|assistant_start|>."""
    messages = [{"role": "user", "content": message}]
    *tokens, start = conversations.prompt_of(tokenizer, messages, chat_trained=True)
    return Prompt([*tokens[:longest], start], len(tokens) > longest)


def letter_ids(tokenizer: Tokenizer, letters: Sequence[str]) -> list[int]:
    """Return the token of each letter. Raises ValueError for a letter that is no single token."""
    found = [tokenizer.encode(letter) for letter in letters]
    for letter, ids in zip(letters, found, strict=True):
        if len(ids) != 1:
            raise ValueError(f"the letter of a choice must be one token, got {letter!r} with {len(ids)}")
    return [ids[0] for ids in found]


@torch.inference_mode()
def choose(
    model: GPT,
    questions: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_tokens: int,
    progress: Progress = lambda done, total: None,
) -> list[int]:
    """Return for each question the index of the choice with the highest logit behind the prompt, the first of equals.

    The longest prompts go first, so that a batch has little padding, which is on the right, where no earlier position
    sees it. A decision closer than core_score.margin is repeated with the prompt alone, so that the result does not
    depend on the batches; see core_score.score_items.

    Args:
        questions: (tokens of the prompt, tokens of the choices) of each question.
        batch_tokens: Largest number of tokens of a batch, padding included; a batch has at least one prompt.
        progress: Called with (done, all) of the questions.

    Raises ValueError for a model whose logits are not finite.
    """
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i][0]), i))
    chosen = [0] * len(questions)
    first = 0
    while first < len(order):
        rows = max(1, batch_tokens // len(questions[order[first]][0]))
        batch = order[first : first + rows]
        first += len(batch)
        for i, logits in zip(batch, _choice_logits(model, [questions[i] for i in batch]), strict=True):
            best, *others = sorted(logits, reverse=True)
            if others and best - others[0] <= margin(model):
                (logits,) = _choice_logits(model, [questions[i]])
            chosen[i] = logits.index(max(logits))
        progress(first, len(order))
    return chosen


def _choice_logits(model: GPT, questions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
    lengths = [len(prompt) for prompt, _ in questions]
    inputs = torch.zeros(len(questions), max(lengths), dtype=torch.int64)
    for row, (prompt, _) in enumerate(questions):
        inputs[row, : len(prompt)] = torch.tensor(prompt)
    device = model.wte.weight.device
    hidden = model.hidden_states(inputs.to(device))
    last = torch.tensor(lengths, device=device) - 1
    logits = model.logits(hidden[torch.arange(len(questions), device=device), last]).cpu().double()
    found = [logits[row, list(choices)].tolist() for row, (_, choices) in enumerate(questions)]
    if not all(map(math.isfinite, (logit for row in found for logit in row))):
        raise ValueError(NONFINITE_LOGITS)
    return found


def write_answers(
    engine: Engine,
    requests: Sequence[tuple[Sequence[int], Sampling]],
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Return the text that the engine writes for each (prompt, sampling). If this fails, it cancels what it began.

    Raises ValueError for a model whose logits are not finite, and the errors of Engine.submit.
    """
    texts = [""] * len(requests)
    waiting = iter(enumerate(requests))
    open_: dict[Request, int] = {}
    done = 0
    try:
        while done < len(requests):
            for number, (prompt, sampling) in itertools.islice(waiting, engine.slots - len(open_)):
                open_[engine.submit(prompt, sampling)] = number
            for request in engine.step():
                if request in open_ and request.finish_reason is not None:
                    if request.error is not None:
                        raise ValueError(request.error)
                    texts[open_.pop(request)] = request.text
                    done += 1
            progress(done, len(requests))
    finally:
        for request in open_:
            engine.cancel(request)
    return texts


def _choices_are_right(
    model: GPT,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    tokens: int,
    show: Progress,
) -> list[list[bool]]:
    """Return for each problem whether the letter that the model chooses is right, as the only sample."""
    questions = [
        (prompt.tokens, letter_ids(tokenizer, problem.letters))
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    chosen = choose(model, questions, tokens, show)
    return [[problem.letters[i] == problem.answer] for problem, i in zip(problems, chosen, strict=True)]


def _answers_are_right(
    task: Task,
    texts: Sequence[str],
    problems: Sequence[Problem],
    samples: int,
) -> list[list[bool]]:
    """Return for each problem whether each of its texts is right."""
    assert task.is_right is not None
    with ThreadPoolExecutor(min(MAX_PROGRAMS, os.cpu_count() or 1)) as pool:
        judged = list(pool.map(task.is_right, [problem for problem in problems for _ in range(samples)], texts))
    return [judged[i : i + samples] for i in range(0, len(judged), samples)]


def make_engine(
    model: GPT,
    tokenizer: Tokenizer,
    batch_size: int,
    max_tokens: int = Drawing.max_tokens,
    *,
    quantize: Quantization | None = None,
) -> Engine:
    """Return an engine for `evaluate`: batch_size requests at once, each with room for nanochat's longest prompt."""
    capacity = min(model.max_positions, MAX_PROMPT + 1 + max_tokens)
    return Engine(model, tokenizer, slots=batch_size, capacity=capacity, quantize=quantize)


def engine_for(task: Task, model: GPT, tokenizer: Tokenizer, batch_size: int) -> Engine:
    """Return an engine for `evaluate` with this task alone: without a cache for a task that needs none."""
    if task.is_right is None:
        return Engine(model, tokenizer, slots=batch_size, capacity=2)
    return make_engine(model, tokenizer, batch_size)


def evaluate(
    task: Task,
    engine: Engine,
    drawing: Drawing = Drawing(),
    *,
    world: World | None = None,
    progress: Progress = lambda done, total: None,
) -> TaskResult:
    """Measure the accuracy of the engine's model in a task.

    A prompt longer than nanochat's limit loses its end, and so does one that leaves no room for an answer: a quarter of
    the engine's capacity is kept for it. Call this under the autocast in which the engine was made.

    Args:
        engine: Runs as many requests at once as it has slots; it must have a tokenizer. Problems with choices need no
            cache: the model takes as many prompts at once as fit into slots sequences of the training's length.
        world: Ranks that share the problems.
        progress: Called with (done, all) of this rank's problems or answers.

    Raises ValueError for an engine without a tokenizer, a model whose logits are not finite, and a letter that is no
    single token, and OSError if HumanEval's sandbox cannot be made; on many ranks RankError, for any error of a rank.
    """
    if engine.tokenizer is None:
        raise ValueError("a chat task needs an engine with a tokenizer")
    model, tokenizer = engine.model, engine.tokenizer
    world = world or World()
    begun = time.perf_counter()
    own = range(world.rank, len(task.problems), world.size)

    def count() -> list[int]:
        problems = [task.problems[i] for i in own]
        room = model.max_positions
        if task.is_right is not None:
            room = engine.capacity - min(drawing.max_tokens, engine.capacity // 4)
        prompts = [prompt_of(tokenizer, problem.prompt, min(MAX_PROMPT, room - 1)) for problem in problems]
        if task.is_right is None:
            tokens = engine.slots * model.config.sequence_len
            right = _choices_are_right(model, tokenizer, problems, prompts, tokens, progress)
        else:
            requests = [
                (prompt.tokens, _sampling(engine, len(prompt.tokens), drawing, f"{task.name} {i} {sample}"))
                for i, prompt in zip(own, prompts, strict=True)
                for sample in range(drawing.samples)
            ]
            right = _answers_are_right(task, write_answers(engine, requests, progress), problems, drawing.samples)
        return [sum(map(any, right)), sum(map(sum, right)), sum(map(len, right)), sum(p.is_cut for p in prompts)]

    counts = world.run_collectively(count, Exception, long_running=True)
    correct, right, samples, cut = world.all_reduce_sum_(torch.tensor(counts)).tolist()
    accuracy = correct / len(task.problems)
    return TaskResult(
        task=task.name,
        problems=len(task.problems),
        correct=correct,
        accuracy=accuracy,
        baseline=task.baseline / 100,
        centred=centre(accuracy, task.baseline),
        sample_accuracy=right / samples,
        cut=cut,
        seconds=time.perf_counter() - begun,
    )


def _sampling(engine: Engine, prompt: int, drawing: Drawing, name: str) -> Sampling:
    """Return the settings of an answer to a prompt of so many tokens; `name` tells its draws from those of others."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    return Sampling(
        min(drawing.max_tokens, engine.capacity - prompt),
        temperature=drawing.temperature,
        top_k=drawing.top_k,
        stop_tokens=tuple(conversations.special_ids(tokenizer, ("<|assistant_end|>",))),
        code="compute" if conversations.has_code_tokens(tokenizer) else "write",
        seed=random.Random(f"{drawing.seed} {name}").getrandbits(32),
    )


def chatcore(accuracies: Mapping[str, float]) -> float | None:
    """Return ChatCORE for the accuracy of each task, or None if one of its tasks is missing."""
    if not all(name in accuracies for name in CHATCORE):
        return None
    return sum(centre(accuracies[name], BASELINES.get(name, 0.0)) for name in CHATCORE) / len(CHATCORE)
