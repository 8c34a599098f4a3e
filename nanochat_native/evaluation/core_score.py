"""The CORE score: mean centered accuracy of a model over the tasks of DataComp-LM (22 in arXiv:2406.11794).

The tasks are read from a folder in nanochat's layout. Prompts, few-shot examples, scored tokens and tie rules are
nanochat's too, so that scores are comparable. The command is `evaluate --core FOLDER`.

    core.yaml            icl_tasks: label, dataset_uri, num_fewshot: [n], icl_task_type, continuation_delimiter
    eval_data/<uri>      one item per line, JSON
    eval_meta_data.csv   "Eval Task" and "Random baseline", in percent

An item of a `multiple_choice` task has query, choices and gold; of a `schema` task context_options, continuation and
gold; of a `language_modeling` task context and continuation. gold is the index of the right choice or context.

`score_items` explains what can change a score.
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
from nanochat_native.ops.dtypes import widest_dtype
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.files import sha256_json

CHOICE, SCHEMA, LANGUAGE = "multiple_choice", "schema", "language_modeling"
KINDS = (CHOICE, SCHEMA, LANGUAGE)
SHUFFLE_SEED, SHOTS_SEED = 1337, 1234  # nanochat's; an item's index is added to the second
MAX_LOGITS = 1 << 27  # in memory at once: 512 MB of float32

# A comparison closer than this, in nats or in units of a logit, is decided by sequences that pass the model alone. On a
# CPU, with 8 layers of 256 channels, the other sequences of a batch changed losses and logits by at most 1e-5 (float32)
# and 0.08 (bfloat16).
MARGIN = 1e-3
MARGIN_16_BIT = 0.25

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """A task of the bundle.

    Attributes:
        shots: Number of solved examples before each item.
        baseline: Accuracy of guessing, in percent.
        data: File of the items.
        items: The items in nanochat's order.
        lines: Line of each item in `data`.
    """

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    data: Path
    items: list[dict[str, Any]] = field(repr=False)
    lines: list[int] = field(repr=False)


class ScoredSpan(NamedTuple):
    """A sequence of tokens, of which a span is scored.

    Attributes:
        tokens: (n,) token ids.
        start: First scored position, at least 1.
        end: End of the scored positions.
        cropped: Number of tokens removed from the front to fit the model.
        cut: Number of removed tokens that should have been scored.
    """

    tokens: np.ndarray
    start: int
    end: int
    cropped: int = 0
    cut: int = 0


class GreedyScore(NamedTuple):
    """Score of a span under greedy decoding.

    Attributes:
        total_nll: Negative log-likelihood of the span, in nats.
        right: Whether each token has the highest logit; among equal logits the first counts.
        gap: Smallest lead of a token's logit over the best other logit; negative if one has no lead.
    """

    total_nll: float
    right: bool
    gap: float


class TaskResult(NamedTuple):
    """Result of a task.

    Attributes:
        centred: Accuracy scaled so that guessing gives 0 and no mistake gives 1.
        cropped: Number of prompts that were too long for the model and lost their beginning.
        cut: Number of cropped prompts that lost scored tokens.
    """

    task: str
    type: str
    shots: int
    items: int
    correct: int
    accuracy: float
    centred: float
    cropped: int
    cut: int


def read_bundle(folder: Path, max_per_task: int | None = None, flag: str = "--max-per-task") -> list[Task]:
    """Read the tasks of a bundle: the first max_per_task items of each, after nanochat's shuffle.

    flag: the name of the flag in errors.

    Raises ValueError, naming file, task and line, for anything missing or malformed, and ImportError without PyYAML.
    """
    if max_per_task is not None and max_per_task < 1:
        raise ValueError(f"{flag} must be a whole number >= 1, got {max_per_task}")
    path = folder / "core.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is not a CORE bundle: it has no core.yaml")
    found = _yaml(path)
    entries = found.get("icl_tasks") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: icl_tasks must be a list of tasks, got {entries!r:.60}")
    baselines = _baselines(folder / "eval_meta_data.csv")
    tasks: list[Task] = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}: task {number}"
        _check_entry(where, entry)
        label = entry["label"]
        if label in (task.label for task in tasks):
            raise ValueError(f"{where}: an earlier task has the label {label!r} too")
        if label not in baselines:
            raise ValueError(f"{folder / 'eval_meta_data.csv'}: no Random baseline for task {label!r}")
        data = folder / "eval_data" / entry["dataset_uri"]
        pairs = list(enumerate(_items(data, label, entry["icl_task_type"]), 1))
        random.Random(SHUFFLE_SEED).shuffle(pairs)
        pairs, shots = pairs[:max_per_task], entry["num_fewshot"][0]
        if shots >= len(pairs):
            limit = "" if max_per_task is None else f" with {flag} {max_per_task}"
            given = f"{shots} shots, got {len(pairs)}{limit}"
            raise ValueError(f"{data}: task {label!r} must have at least {shots + 1} items for {given}")
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
        raise ImportError(f"reading {path} requires PyYAML: pip install 'nanochat-native[eval]'") from None
    try:
        return yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must have label, dataset_uri, num_fewshot and icl_task_type, got {entry!r:.60}")
    for name in ("label", "dataset_uri"):
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise ValueError(f"{where}: {name} must be a string, got {entry.get(name)!r:.60}")
    where += f" ({entry['label']})"
    if entry.get("icl_task_type") not in KINDS:
        raise ValueError(
            f"{where}: icl_task_type must be one of {', '.join(KINDS)}, got {entry.get('icl_task_type')!r:.60}"
        )
    shots = entry.get("num_fewshot")
    if not isinstance(shots, list) or not shots or type(shots[0]) is not int or shots[0] < 0:
        raise ValueError(f"{where}: num_fewshot must be a list with a whole number >= 0, got {shots!r:.60}")
    if not isinstance(entry.get("continuation_delimiter", " "), str):
        raise ValueError(
            f"{where}: continuation_delimiter must be a string, got {entry['continuation_delimiter']!r:.60}"
        )


def _baselines(path: Path) -> dict[str, tuple[int, str]]:
    """Return for each task the line of its baseline and the text in it."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            missing = {"Eval Task", "Random baseline"} - set(rows.fieldnames or ())
            if missing:
                raise ValueError(f"{path}: missing column {', '.join(sorted(missing))}")
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
            f"{path}: line {line}: Random baseline of {label!r} must be a percentage below 100, got {text!r}"
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
        raise ValueError(f"{path}: {error.strerror}; task {label!r} reads its items from it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: data of task {label!r} is not UTF-8: {error}") from None


def _check_item(where: str, item: Any, kind: str) -> None:
    if not isinstance(item, dict):
        raise ValueError(f"{where} must be an object, got {item!r:.60}")
    options = {CHOICE: "choices", SCHEMA: "context_options"}.get(kind)
    texts = {CHOICE: ("query",), SCHEMA: ("continuation",), LANGUAGE: ("context", "continuation")}[kind]
    for name in texts:
        if not isinstance(item.get(name), str):
            raise ValueError(f"{where}: {name} must be a string, got {item.get(name)!r:.60}")
    if options is None:
        return
    found, gold = item.get(options), item.get("gold")
    if not isinstance(found, list) or not found or not all(isinstance(option, str) for option in found):
        raise ValueError(f"{where}: {options} must be a list of strings, got {found!r:.60}")
    if type(gold) is not int or not 0 <= gold < len(found):
        raise ValueError(f"{where}: gold must be an index into {len(found)} {options}, got {gold!r:.60}")


def shots_of(task: Task, index: int) -> list[int]:
    """Return the indices of the solved examples before item `index`."""
    drawn = random.Random(SHOTS_SEED + index).sample(range(len(task.items) - 1), task.shots)
    return [i + (i >= index) for i in drawn]


def prompts(task: Task, index: int) -> list[str]:
    """Return the prompts of an item: one for each option, or for language_modeling without and with continuation."""
    item, delimiter = task.items[index], task.delimiter
    before = "".join(_solved(task, task.items[i]) + "\n\n" for i in shots_of(task, index))
    if task.kind == CHOICE:
        return [before + item["query"] + delimiter + choice for choice in item["choices"]]
    if task.kind == SCHEMA:
        return [before + context + delimiter + item["continuation"] for context in item["context_options"]]
    text = before + item["context"].strip() + delimiter
    # The tokenizer would put a space at the end into the continuation's first token.
    return [text.rstrip(), text + item["continuation"]]


def _solved(task: Task, item: dict[str, Any]) -> str:
    if task.kind == CHOICE:
        return str(item["query"] + task.delimiter + item["choices"][item["gold"]])
    context = item["context"].strip() if task.kind == LANGUAGE else item["context_options"][item["gold"]]
    return str(context + task.delimiter + item["continuation"])


def spans(task: Task, index: int, tokens: Sequence[np.ndarray], longest: int) -> list[ScoredSpan]:
    """Return the scored spans of an item, given the tokens of its prompts, cropped on the left to `longest` tokens.

    multiple_choice: the tokens after the common prefix of all options. schema: the common suffix of all options.
    language_modeling: the tokens after the prompt without the continuation.

    Raises ValueError, naming task and line, if that prompt is not a proper prefix of the one with the continuation.
    """
    if task.kind == LANGUAGE:
        without, whole = tokens
        if len(without) >= len(whole) or not np.array_equal(without, whole[: len(without)]):
            raise ValueError(
                f"{task.data}: line {task.lines[index]} of task {task.label!r}: with this tokenizer the tokens of the "
                "context are not a prefix of those with the continuation"
            )
        return [crop(whole, len(without), longest)]
    if task.kind == CHOICE:
        start = common_prefix(tokens)
        return [crop(option, start, longest) for option in tokens]
    length = common_prefix([option[::-1] for option in tokens])
    return [crop(option, len(option) - length, longest) for option in tokens]


def crop(tokens: np.ndarray, start: int, longest: int) -> ScoredSpan:
    """Return the span within the last `longest` tokens; the first of them is not scored, since nothing predicts it."""
    off = max(0, len(tokens) - longest)
    kept = max(1, start - off)
    return ScoredSpan(tokens[off:], kept, len(tokens) - off, off, kept - max(1, start) + off)


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Return the length of the common prefix of all sequences."""
    shortest = min(map(len, sequences))
    same = np.ones(shortest, dtype=bool)
    for other in sequences[1:]:
        same &= sequences[0][:shortest] == other[:shortest]
    return shortest if same.all() else int(same.argmin())


def batches(
    sequences: Sequence[ScoredSpan], tokens: int, positions: int | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield (indices of the sequences, inputs, targets) of batches, the longest sequences first; int64 (B, T).

    Padding is on the right, where no earlier position sees it. Its targets are -1, like all that are not scored.
    Sequences without a scored token are left out.

    Args:
        tokens: Largest number of tokens of a batch, padding included; a batch has at least one sequence.
        positions: Largest number of scored positions of a batch.
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
def total_nll(
    model: GPT, sequences: Sequence[ScoredSpan], batch_tokens: int, progress: Progress | None = None
) -> list[float]:
    """Return the total negative log-likelihood of each span, in nats, 0 for an empty span.

    The sums are in float64, on MPS in float32.

    Raises ValueError for a model whose losses are not finite.
    """
    device = model.wte.weight.device
    found = [0.0] * len(sequences)
    done = 0
    for chosen, inputs, targets in batches(sequences, batch_tokens):
        losses = model(inputs.to(device), targets.to(device), reduction="none")
        for i, total in zip(chosen, losses.sum(1, dtype=widest_dtype(device)).tolist(), strict=True):
            found[i] = _finite(total)
        done += len(chosen)
        if progress is not None:
            progress(done, len(sequences))
    return found


@torch.inference_mode()
def greedy(
    model: GPT, sequences: Sequence[ScoredSpan], batch_tokens: int, progress: Progress | None = None
) -> list[GreedyScore]:
    """Score each span: its negative log-likelihood, and whether greedy decoding would generate it.

    Only the scored positions go through the last layer, so that MAX_LOGITS bounds the memory.

    Raises ValueError for a model whose logits are not finite.
    """
    device = model.wte.weight.device
    found = [GreedyScore(0.0, True, math.inf)] * len(sequences)
    done = 0
    for chosen, inputs, targets in batches(sequences, batch_tokens, max(1, MAX_LOGITS // model.config.vocab_size)):
        rows, columns = (targets >= 0).nonzero(as_tuple=True)
        wanted = targets[rows, columns].to(device)
        logits = model.logits(model.hidden_states(inputs.to(device))[rows.to(device), columns.to(device)])
        best = logits.topk(2)
        own = logits.gather(1, wanted[:, None])[:, 0]
        right = logits.argmax(1) == wanted
        gap = (own - torch.where(right, best.values[:, 1], best.values[:, 0])).cpu().double()
        losses = (logits.logsumexp(1) - own).cpu().double()
        sizes = [sequences[i].end - sequences[i].start for i in chosen]
        parts = (part.split(sizes) for part in (losses, right.cpu(), gap))
        for i, loss, correct, lead in zip(chosen, *parts, strict=True):
            found[i] = GreedyScore(_finite(loss.sum().item()), bool(correct.all()), lead.min().item())
        done += len(chosen)
        if progress is not None:
            progress(done, len(sequences))
    return found


def greedy_with_recheck(
    model: GPT, sequences: Sequence[ScoredSpan], batch_tokens: int, progress: Progress | None = None
) -> list[GreedyScore]:
    """Score as `greedy` does, and score spans within the margin again, alone; see `score_items`."""
    found = greedy(model, sequences, batch_tokens, progress)
    for i, sequence in enumerate(sequences):
        if abs(found[i].gap) <= margin(model):
            found[i] = greedy(model, [sequence], 1)[0]
    return found


def margin(model: GPT) -> float:
    """Return the lead within which a comparison of two sequences of a batch is repeated; see `score_items`."""
    return MARGIN_16_BIT if model.compute_dtype in (torch.bfloat16, torch.float16) else MARGIN


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("the model's losses are not finite: its training has diverged")
    return number


def score_items(
    model: GPT,
    kind: str,
    items: Sequence[tuple[Sequence[ScoredSpan], int]],
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[bool]:
    """Return for each item whether the model gets it right.

    The model chooses the option with the lowest mean loss over its span, the first of equal ones. An empty span has the
    mean NaN, which is chosen only if it is the first option, as in Python's `min`. A language_modeling item is right if
    every token of the span has the highest logit, the first of equal ones; gold is ignored.

    The composition of a batch changes the last bits of a loss. A comparison closer than MARGIN (MARGIN_16_BIT in
    bfloat16) is therefore repeated with sequences that go through the model one by one, without padding. The result is
    exactly the same for every batch size and every number of ranks, provided that a batch changes no mean loss and no
    logit by half the margin or more; options with the same tokens tie exactly. If two options differ by no more than
    rounding, the result can still depend on the machine, the backend and the number of threads.

    Args:
        items: (spans of the options, gold) of each item.

    Raises ValueError for a model whose losses are not finite.
    """
    if kind == LANGUAGE:
        first_spans = [spans[0] for spans, _ in items]
        return [one.right for one in greedy_with_recheck(model, first_spans, batch_tokens, progress)]
    flat = [option for options, _ in items for option in options]
    totals = iter(total_nll(model, flat, batch_tokens, progress))
    correct = []
    for options, gold in items:
        means = [_mean(next(totals), option) for option in options]
        lowest = _first_lowest(means)
        if any(mean - means[lowest] <= margin(model) for i, mean in enumerate(means) if i != lowest):
            lowest = _first_lowest([_mean(total_nll(model, [option], 1)[0], option) for option in options])
        correct.append(lowest == gold)
    return correct


def _mean(total: float, span: ScoredSpan) -> float:
    return total / (span.end - span.start) if span.end > span.start else math.nan


def _first_lowest(means: Sequence[float]) -> int:
    return min(range(len(means)), key=means.__getitem__)


def balance(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Distribute items of these sizes over the ranks in about equal parts; return the indices of each rank.

    The largest item comes first; each goes to the rank with the smallest sum so far.
    """
    found: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, rank = heapq.heappop(heap)
        found[rank].append(i)
        heapq.heappush(heap, (load + sizes[i], rank))
    return [sorted(share) for share in found]


def hash_of(task: Task) -> str:
    """Return the SHA-256 of all that decides the prompts of a task and their scores, in hex."""
    return sha256_json([task.label, task.kind, task.shots, task.delimiter, task.baseline, task.items])


def require_tokens(task: Task, tokenizer: Tokenizer, longest: int) -> None:
    """Raise the ValueError of `spans` for an item that this tokenizer cannot score, before any model is evaluated.

    longest: number of tokens that fit the model.
    """
    if task.kind == LANGUAGE:
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(lambda index: _spans_of(task, index, tokenizer, longest), range(len(task.items))):
                pass


def _spans_of(task: Task, index: int, tokenizer: Tokenizer, longest: int) -> list[ScoredSpan]:
    bos = np.array([tokenizer.bos_id], dtype=np.uint32)
    tokens = [np.concatenate([bos, tokenizer.encode_to_numpy(text)]) for text in prompts(task, index)]
    return spans(task, index, tokens, longest)


def evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    *,
    batch_tokens: int,
    world: World | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Measure the model's accuracy in a task.

    Args:
        batch_tokens: Number of tokens that go through the model at once, padding included.
        world: Ranks that share the items, balanced by the length of their prompts.
        progress: Called with (done, all) of this rank's sequences.

    Raises the ValueErrors of `spans` and `score_items`; on many ranks RankError, for any error of a rank.
    """
    world = world or World()

    def prepare(index: int) -> list[ScoredSpan]:
        return _spans_of(task, index, tokenizer, model.config.sequence_len)

    def score_own_items() -> list[int]:
        indices: Sequence[int] = range(len(task.items))
        if world.size > 1:
            indices = balance([sum(map(len, prompts(task, i))) for i in indices], world.size)[world.rank]
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(prepare, indices))
        golds = [task.items[i].get("gold", 0) for i in indices]
        correct = score_items(model, task.kind, list(zip(found, golds, strict=True)), batch_tokens, progress)
        everything = [span for options in found for span in options]
        return [sum(correct), sum(s.cropped > 0 for s in everything), sum(s.cut > 0 for s in everything)]

    counts = world.run_collectively(score_own_items, Exception)
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
    """Scale an accuracy so that `baseline` percent gives 0 and no mistake gives 1."""
    return (accuracy - 0.01 * baseline) / (1 - 0.01 * baseline)


def score(results: Sequence[TaskResult]) -> float:
    """Return the CORE score, the mean of the centered accuracies."""
    return sum(result.centred for result in results) / len(results)
