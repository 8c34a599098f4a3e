"""CORE: the mean of a model's centred accuracy over the tasks of DataComp-LM, 22 as published, arXiv:2406.11794.

The tasks are read from a folder in nanochat's layout; prompts, few-shot examples, scored spans and tie rules are
nanochat's too, so that figures compare. `evaluate --core FOLDER` is the command.

    core.yaml            icl_tasks: label, dataset_uri, num_fewshot: [n], icl_task_type, continuation_delimiter
    eval_data/<uri>      an item a line, JSON
    eval_meta_data.csv   "Eval Task" and "Random baseline", in percent

An item of a task of type `multiple_choice` has query, choices and gold, one of `schema` context_options, continuation
and gold, one of `language_modeling` context and continuation. gold is the index of the right choice or context.

What the score depends on: see `grade`.
"""

import csv
import heapq
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.model.gpt import GPT
from nanochat_native.runtime.distributed import World

CHOICE, SCHEMA, LANGUAGE = "multiple_choice", "schema", "language_modeling"
KINDS = (CHOICE, SCHEMA, LANGUAGE)
SHUFFLE_SEED, SHOTS_SEED = 1337, 1234  # nanochat's: of a task's order, and plus the item's number of its examples
LOGITS = 1 << 27  # that are held at once: 512 MB of float32

# Within so many nats, or so much of a logit, a comparison is decided by sequences that go through the model alone. On a
# CPU, 8 layers of 256 channels, what is beside a sequence in a batch changed losses and logits by 1e-5 at most in
# float32, and by 0.08 in bfloat16.
MARGIN = 1e-3
MARGIN_16_BIT = 0.25

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """shots: solved examples before each item. baseline: accuracy of guessing, percent. items in nanochat's order, and
    the line of the file `data` that each is on."""

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    data: Path
    items: list[dict[str, Any]] = field(repr=False)
    lines: list[int] = field(repr=False)


class Span(NamedTuple):
    """tokens (n,) of a prompt; those from start to end are scored, start from 1. cropped: how many were taken off the
    front to fit the model; cut: of those, how many were to be scored."""

    tokens: np.ndarray
    start: int
    end: int
    cropped: int = 0
    cut: int = 0


class Greedy(NamedTuple):
    """nats: of the span's tokens in all. right: whether each has the highest logit, the first of equal ones. gap: the
    least lead of a token's logit over the best of the others, negative where it has none."""

    nats: float
    right: bool
    gap: float


class TaskResult(NamedTuple):
    """centred: 0 for guessing, 1 for all right. cropped: prompts too long for the model, which lost their beginning;
    cut: those of them that lost a part of what is scored."""

    task: str
    type: str
    shots: int
    items: int
    correct: int
    accuracy: float
    centred: float
    cropped: int
    cut: int


def read_bundle(folder: Path, max_per_task: int | None = None) -> list[Task]:
    """The tasks of a bundle, each shuffled as nanochat does, and then the first max_per_task items of it.

    Raises ValueError, naming file, task and line, for whatever is missing or malformed, and ImportError without PyYAML.
    """
    if max_per_task is not None and max_per_task < 1:
        raise ValueError(f"--max-per-task is {max_per_task}; it takes a number from 1")
    path = folder / "core.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is no CORE bundle: it has no core.yaml")
    found = _yaml(path)
    entries = found.get("icl_tasks") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: icl_tasks is {entries!r:.60}; it takes a list of tasks")
    baselines = _baselines(folder / "eval_meta_data.csv")
    tasks: list[Task] = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}: task {number}"
        _check_entry(where, entry)
        label = entry["label"]
        if label in (task.label for task in tasks):
            raise ValueError(f"{where}: the label {label!r} is another task's too")
        if label not in baselines:
            raise ValueError(f"{folder / 'eval_meta_data.csv'}: it has no Random baseline of task {label!r}")
        data = folder / "eval_data" / entry["dataset_uri"]
        pairs = list(enumerate(_items(data, label, entry["icl_task_type"]), 1))
        random.Random(SHUFFLE_SEED).shuffle(pairs)
        pairs, shots = pairs[:max_per_task], entry["num_fewshot"][0]
        if shots >= len(pairs):
            limit = "" if max_per_task is None else f" with --max-per-task {max_per_task}"
            raise ValueError(
                f"{data}: task {label!r} has {len(pairs)} items{limit}; {shots} shots take {shots + 1} or more"
            )
        tasks.append(
            Task(
                label=label,
                kind=entry["icl_task_type"],
                shots=shots,
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=_baseline(folder / "eval_meta_data.csv", label, baselines[label]),
                data=data,
                items=[item for _, item in pairs],
                lines=[line for line, _ in pairs],
            )
        )
    return tasks


def _yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError(f"{path} takes PyYAML to read: pip install 'nanochat-native[eval]'") from None
    try:
        return yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r:.60}; it takes label, dataset_uri, num_fewshot, icl_task_type")
    for name in ("label", "dataset_uri"):
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise ValueError(f"{where}: {name} is {entry.get(name)!r:.60}; it takes text")
    where += f" ({entry['label']})"
    if entry.get("icl_task_type") not in KINDS:
        raise ValueError(f"{where}: icl_task_type is {entry.get('icl_task_type')!r:.60}; it takes {', '.join(KINDS)}")
    shots = entry.get("num_fewshot")
    if not isinstance(shots, list) or not shots or type(shots[0]) is not int or shots[0] < 0:
        raise ValueError(f"{where}: num_fewshot is {shots!r:.60}; it takes a list of a whole number from 0")
    if not isinstance(entry.get("continuation_delimiter", " "), str):
        raise ValueError(f"{where}: continuation_delimiter is {entry['continuation_delimiter']!r:.60}; it takes text")


def _baselines(path: Path) -> dict[str, tuple[int, str]]:
    """Of each task the line of its baseline, and what is there."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            missing = {"Eval Task", "Random baseline"} - set(rows.fieldnames or ())
            if missing:
                raise ValueError(f"{path}: it has no column {', '.join(sorted(missing))}")
            return {row["Eval Task"]: (rows.line_num, row["Random baseline"]) for row in rows}
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8: {error}") from None


def _baseline(path: Path, label: str, found: tuple[int, str]) -> float:
    line, text = found
    try:
        value = float(text)
    except (ValueError, TypeError):
        value = math.nan
    if not 0 <= value < 100:
        raise ValueError(
            f"{path}: line {line}: Random baseline of {label!r} is {text!r}; it takes a percentage below 100"
        )
    return value


def _items(path: Path, label: str, kind: str) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}: line {number} of task {label!r}"
                try:
                    item = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not JSON: {error}") from None
                _check_item(where, item, kind)
                yield item
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; task {label!r} takes its items from it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: data of task {label!r} is not UTF-8: {error}") from None


def _check_item(where: str, item: Any, kind: str) -> None:
    if not isinstance(item, dict):
        raise ValueError(f"{where} is {item!r:.60}; it takes an object")
    options = {CHOICE: "choices", SCHEMA: "context_options"}.get(kind)
    texts = {CHOICE: ("query",), SCHEMA: ("continuation",), LANGUAGE: ("context", "continuation")}[kind]
    for name in texts:
        if not isinstance(item.get(name), str):
            raise ValueError(f"{where}: {name} is {item.get(name)!r:.60}; it takes text")
    if options is None:
        return
    found, gold = item.get(options), item.get("gold")
    if not isinstance(found, list) or not found or not all(isinstance(option, str) for option in found):
        raise ValueError(f"{where}: {options} is {found!r:.60}; it takes a list of texts")
    if type(gold) is not int or not 0 <= gold < len(found):
        raise ValueError(f"{where}: gold is {gold!r:.60}; it takes an index into {len(found)} {options}")


def shots_of(task: Task, index: int) -> list[int]:
    """Which items are the solved examples before item `index`."""
    drawn = random.Random(SHOTS_SEED + index).sample(range(len(task.items) - 1), task.shots)
    return [i + (i >= index) for i in drawn]


def prompts(task: Task, index: int) -> list[str]:
    """The texts of an item: one an option, or of a language_modeling item the one without its continuation and the one
    with it."""
    item, delimiter = task.items[index], task.delimiter
    before = "".join(_solved(task, task.items[i]) + "\n\n" for i in shots_of(task, index))
    if task.kind == CHOICE:
        return [before + item["query"] + delimiter + choice for choice in item["choices"]]
    if task.kind == SCHEMA:
        return [before + context + delimiter + item["continuation"] for context in item["context_options"]]
    text = before + item["context"].strip() + delimiter
    # A space at the end would belong to the continuation's first token.
    return [text.rstrip(), text + item["continuation"]]


def _solved(task: Task, item: dict[str, Any]) -> str:
    if task.kind == CHOICE:
        return str(item["query"] + task.delimiter + item["choices"][item["gold"]])
    context = item["context"].strip() if task.kind == LANGUAGE else item["context_options"][item["gold"]]
    return str(context + task.delimiter + item["continuation"])


def spans(task: Task, index: int, tokens: Sequence[np.ndarray], longest: int) -> list[Span]:
    """What is scored of an item, given the tokens of its prompts, cropped from the left to `longest` of them.

    multiple_choice: what follows the tokens that all options begin with. schema: the tokens that all end with.
    language_modeling: what follows the tokens without the continuation; raises ValueError, naming task and line, where
    the tokens with it do not begin with those, or add none.
    """
    if task.kind == LANGUAGE:
        without, whole = tokens
        if len(without) >= len(whole) or not np.array_equal(without, whole[: len(without)]):
            raise ValueError(
                f"{task.data}: line {task.lines[index]} of task {task.label!r}: with this tokenizer the tokens of the "
                "context are no beginning of those with the continuation"
            )
        return [crop(whole, len(without), longest)]
    if task.kind == CHOICE:
        start = common_prefix(tokens)
        return [crop(option, start, longest) for option in tokens]
    length = common_prefix([option[::-1] for option in tokens])
    return [crop(option, len(option) - length, longest) for option in tokens]


def crop(tokens: np.ndarray, start: int, longest: int) -> Span:
    """The last `longest` tokens; the first of them is never scored, as nothing predicts it."""
    off = max(0, len(tokens) - longest)
    kept = max(1, start - off)
    return Span(tokens[off:], kept, len(tokens) - off, off, kept - max(1, start) + off)


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """How many first tokens are the same in all."""
    shortest = min(map(len, sequences))
    same = np.ones(shortest, dtype=bool)
    for other in sequences[1:]:
        same &= sequences[0][:shortest] == other[:shortest]
    return shortest if same.all() else int(same.argmin())


def batches(
    sequences: Sequence[Span], tokens: int, positions: int | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(which of the sequences, inputs, targets) of batches, the longest first; int64 (B, T), at most `tokens` in a
    batch, padding included, and at most `positions` scored; but one sequence at least.

    Padding is at the right, where no position before it sees it; its targets are -1, as all that are not scored.
    Sequences without a scored token are in no batch.
    """
    scored = [s.end - s.start for s in sequences]
    order = sorted((i for i, n in enumerate(scored) if n > 0), key=lambda i: (-len(sequences[i].tokens), i))
    first = 0
    while first < len(order):
        longest = len(sequences[order[first]].tokens) - 1
        rows, total = 0, 0
        for i in order[first : first + max(1, tokens // longest)]:
            total += scored[i]
            if rows and positions is not None and total > positions:
                break
            rows += 1
        chosen = order[first : first + rows]
        first += rows
        inputs = np.zeros((rows, longest), dtype=np.int64)
        targets = np.full((rows, longest), -1, dtype=np.int64)
        for row, i in enumerate(chosen):
            sequence = sequences[i]
            inputs[row, : len(sequence.tokens) - 1] = sequence.tokens[:-1]
            targets[row, sequence.start - 1 : sequence.end - 1] = sequence.tokens[sequence.start : sequence.end]
        yield chosen, torch.from_numpy(inputs), torch.from_numpy(targets)


@torch.inference_mode()
def nats(model: GPT, sequences: Sequence[Span], batch_tokens: int, progress: Progress | None = None) -> list[float]:
    """Of each sequence the nats of its span in all, 0 for an empty one; summed in float64.

    Raises ValueError for a model whose losses are not finite.
    """
    device = model.wte.weight.device
    found = [0.0] * len(sequences)
    done = 0
    for chosen, inputs, targets in batches(sequences, batch_tokens):
        losses = model(inputs.to(device), targets.to(device), reduction="none")
        for i, total in zip(chosen, losses.sum(1, dtype=torch.float64).tolist(), strict=True):
            found[i] = _finite(total)
        done += len(chosen)
        if progress is not None:
            progress(done, len(sequences))
    return found


@torch.inference_mode()
def greedy(model: GPT, sequences: Sequence[Span], batch_tokens: int, progress: Progress | None = None) -> list[Greedy]:
    """Of each sequence the nats of its span, and whether the model, always taking the likeliest token, would write it.

    Only the scored positions go through the last layer, so that memory is bounded: LOGITS.

    Raises ValueError for a model whose logits are not finite.
    """
    device = model.wte.weight.device
    found = [Greedy(0.0, True, math.inf)] * len(sequences)
    done = 0
    for chosen, inputs, targets in batches(sequences, batch_tokens, max(1, LOGITS // model.config.vocab_size)):
        rows, columns = (targets >= 0).nonzero(as_tuple=True)
        wanted = targets[rows, columns].to(device)
        selecting = model.lm_head.register_forward_pre_hook(_select(rows.to(device), columns.to(device)))
        try:
            logits = model(inputs.to(device))
        finally:
            selecting.remove()
        best = logits.topk(2)
        own = logits.gather(1, wanted[:, None])[:, 0]
        right = logits.argmax(1) == wanted
        gap = (own - torch.where(right, best.values[:, 1], best.values[:, 0])).double().cpu()
        losses = (logits.logsumexp(1) - own).double().cpu()
        sizes = [sequences[i].end - sequences[i].start for i in chosen]
        parts = (part.split(sizes) for part in (losses, right.cpu(), gap))
        for i, loss, correct, lead in zip(chosen, *parts, strict=True):
            found[i] = Greedy(_finite(loss.sum().item()), bool(correct.all()), lead.min().item())
        done += len(chosen)
        if progress is not None:
            progress(done, len(sequences))
    return found


def settled_greedy(
    model: GPT, sequences: Sequence[Span], batch_tokens: int, progress: Progress | None = None
) -> list[Greedy]:
    """`greedy`, those within the margin again by themselves: `grade` says why."""
    found = greedy(model, sequences, batch_tokens, progress)
    for i, sequence in enumerate(sequences):
        if abs(found[i].gap) <= _margin(model):
            found[i] = greedy(model, [sequence], 1)[0]
    return found


def _margin(model: GPT) -> float:
    return MARGIN_16_BIT if model.compute_dtype in (torch.bfloat16, torch.float16) else MARGIN


def _select(rows: Tensor, columns: Tensor) -> Callable[[torch.nn.Module, tuple[Tensor]], tuple[Tensor]]:
    """A hook by which a layer gets (N, C) of its input (B, T, C)."""
    return lambda _, inputs: (inputs[0][rows, columns],)


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("the model's losses are not finite: its training has diverged")
    return number


def grade(
    model: GPT,
    kind: str,
    items: Sequence[tuple[Sequence[Span], int]],
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[bool]:
    """Which items, (spans of the options, gold) each, the model gets right.

    An option is chosen by the lowest mean loss over its span, the first of equal ones; an empty span has the mean NaN,
    which is chosen as the first option alone, as by Python's `min`. language_modeling: right when every token of the
    span has the highest logit, the first of equal ones; gold is not looked at.

    What a batch is made of changes the last bits of a loss. Where a comparison is closer than MARGIN (MARGIN_16_BIT in
    bfloat16), it is made again of sequences that went through the model one by one, without padding. So the result is
    exactly the same for every batch size and every number of ranks, as long as a batch changes no mean loss and no
    logit by half that margin or more; and options of the same tokens tie exactly. It may still depend on the
    machine, the backend and the number of threads, where two options are as close as rounding.

    Raises ValueError for a model whose losses are not finite.
    """
    if kind == LANGUAGE:
        return [one.right for one in settled_greedy(model, [spans[0] for spans, _ in items], batch_tokens, progress)]
    flat = [option for options, _ in items for option in options]
    totals = iter(nats(model, flat, batch_tokens, progress))
    correct = []
    for options, gold in items:
        means = [_mean(next(totals), option) for option in options]
        lowest = _first_lowest(means)
        if any(mean - means[lowest] <= _margin(model) for i, mean in enumerate(means) if i != lowest):
            lowest = _first_lowest([_mean(nats(model, [option], 1)[0], option) for option in options])
        correct.append(lowest == gold)
    return correct


def _mean(total: float, span: Span) -> float:
    return total / (span.end - span.start) if span.end > span.start else math.nan


def _first_lowest(means: Sequence[float]) -> int:
    return min(range(len(means)), key=means.__getitem__)


def shares(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of `sizes` for each rank, so that every share is about as large: the largest first, each to the rank with
    the least so far."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, rank = heapq.heappop(heap)
        found[rank].append(i)
        heapq.heappush(heap, (load + sizes[i], rank))
    return [sorted(share) for share in found]


def evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    *,
    batch_tokens: int,
    world: World | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """The model's accuracy in a task, the items shared out over the ranks of `world`, by the length of their prompts.

    batch_tokens: that go through the model at once, padding included. progress: of this rank's sequences, (done, all).

    Raises ValueError for a tokenizer or a model that `spans` or `nats` refuse; RankError on many ranks.
    """
    world = world or World()
    encode = tokenizer.encode_to_numpy
    bos = np.array([tokenizer.bos_id], dtype=np.uint32)

    def prepare(index: int) -> list[Span]:
        tokens = [np.concatenate([bos, encode(text)]) for text in prompts(task, index)]
        return spans(task, index, tokens, model.config.sequence_len)

    def grade_own() -> list[int]:
        indices: Sequence[int] = range(len(task.items))
        if world.size > 1:
            indices = shares([sum(map(len, prompts(task, i))) for i in indices], world.size)[world.rank]
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(prepare, indices))
        golds = [task.items[i].get("gold", 0) for i in indices]
        correct = grade(model, task.kind, list(zip(found, golds, strict=True)), batch_tokens, progress)
        everything = [span for options in found for span in options]
        return [sum(correct), sum(s.cropped > 0 for s in everything), sum(s.cut > 0 for s in everything)]

    counts = world.run_collectively(grade_own, ValueError)
    right, cropped, cut = world.all_reduce_sum_(torch.tensor(counts)).tolist()
    accuracy = right / len(task.items)
    return TaskResult(
        task=task.label,
        type=task.kind,
        shots=task.shots,
        items=len(task.items),
        correct=right,
        accuracy=accuracy,
        centred=centre(accuracy, task.baseline),
        cropped=cropped,
        cut=cut,
    )


def centre(accuracy: float, baseline: float) -> float:
    """0 for an accuracy of `baseline` percent, 1 for all right."""
    return (accuracy - 0.01 * baseline) / (1 - 0.01 * baseline)


def score(results: Sequence[TaskResult]) -> float:
    """CORE, the mean of the centred accuracies."""
    return sum(result.centred for result in results) / len(results)
