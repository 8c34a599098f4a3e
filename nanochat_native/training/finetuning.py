"""The task of `python -m nanochat_native.finetune`: a trained model, trained further on conversations."""

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat_native.data import Batch, ConversationRows, Corpus, conversation_files, conversations
from nanochat_native.data.conversation_rows import Rendered
from nanochat_native.data.conversations import Message
from nanochat_native.data.example_chats import example_chats
from nanochat_native.data.file_names import suffix_of
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import Sampling
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.documents import Documents
from nanochat_native.model.gpt import GPT
from nanochat_native.ops.dtypes import widest_dtype
from nanochat_native.runs import checkpoint, run_folder
from nanochat_native.runs.config import (
    EXAMPLES,
    PARTS,
    ChatTrainConfig,
    FinetuneConfig,
    MixtureEntry,
    ReinforceConfig,
    TrainConfig,
    flags_of_model,
    mixture_entry,
    resolve_device,
    resolve_recipe,
)
from nanochat_native.runs.saved_model import load_config, load_model
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import UNSET, flag, is_unset
from nanochat_native.training import resolve
from nanochat_native.training.sizing import largest_divisor
from nanochat_native.training.task import SAMPLE_TOKENS, Sample
from nanochat_native.training.trainer import Trainer

Chat = TypeVar("Chat", FinetuneConfig, ReinforceConfig)

VAL_SHARE = 0.1  # share of the conversations that is held out without --val-data
LENGTHS = 16  # the length of a row, that of the longest conversation, is rounded up to a multiple of this
CPU_ROWS, GPU_ROWS = 8, 32
INHERITED_FLAGS = ("architecture", "depth", "head_dim", "n_kv_head", "window_pattern", "vocab_size", *PARTS)
PRETRAINING_FLAGS = (
    "total_batch_size",
    "target_flops",
    "target_param_data_ratio",
    "text_column",
    "validation",
    "tokenize",
)
SHOWN_BAD = 5  # records that are no conversation and are named in the notes, of each file, folder or glob
# Flags that must be those of the base for the state of its optimizers to be that of the run's.
OPTIMIZER_FLAGS = ("optimizer", "muon_form", "per_head", "normuon")
Conversation = Sequence[Message]


def read_conversations(
    data: str | Path, notes: list[str] | None = None, *, skip_bad: bool = False
) -> list[Conversation]:
    """Return the conversations of a file, a folder or a glob, each of which ends with an answer.

    data/conversation_files.py describes the forms.

    Args:
        notes: receives a line for each form, for files that are not read, and for records that are skipped.
        skip_bad: whether a record that is no conversation is counted and left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a record that is no conversation, with its file and line, and if there is no other.
    """
    files, left_out = conversation_files.find_files(data)
    found: list[Conversation] = []
    forms: Counter[str] = Counter()
    bad: list[str] = []  # the first ones
    bad_count = 0
    for path in files:

        def refuse(number: int, error: ValueError, path: Path = path) -> None:
            nonlocal bad_count
            message = f"{conversation_files.place_of(path, number)}: {error}"
            if not skip_bad:
                raise ValueError(message) from None
            bad_count += 1
            if len(bad) < SHOWN_BAD:
                bad.append(f"skipped: {message}")

        calculations = suffix_of(path) == conversation_files.PARQUET
        for line, record in conversation_files.read_records(path, refuse if skip_bad else None):
            try:
                messages, form = conversation_files.parse_record(record, calculations=calculations)
                messages, has_tools = conversation_files.with_tools(messages)
                conversations.check_messages(messages)
                if messages[-1]["role"] != "assistant":
                    raise ValueError(
                        "the last message must be the assistant's, got the user's: there is no answer to train on"
                    )
            except ValueError as error:
                refuse(line, error)
                continue
            found.append(messages)
            form = form or conversation_files.PLAIN_FORM
            forms[f"{form}, with calls of the calculator" if has_tools else form] += 1
    if notes is not None:
        notes += bad
    if not found:
        skipped = f", {bad_count:,} bad records are skipped; the first: {bad[0]}" if bad else ""
        raise ValueError(f"{data}: no conversation in it{skipped}")
    if notes is not None:
        if bad_count:
            notes.append(f"{Path(data).name}: {bad_count:,} of {bad_count + len(found):,} records are bad and skipped")
        notes += left_out
        notes += [f"{Path(data).name}: {count:,} of {len(found):,} records are {form}" for form, count in forms.items()]
    return found


def identity(chat: Conversation) -> bytes:
    """Return a hash of the roles and texts, which is equal for conversations that are the same in training."""
    said = [{"role": message["role"], "content": message["content"]} for message in chat]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def is_held_out(chat: Conversation) -> bool:
    """Return whether a conversation is for validation instead of training. Equal conversations are on the same side."""
    return int.from_bytes(identity(chat)[:8], "big") < VAL_SHARE * 2**64


class Chats(NamedTuple):
    """Conversations as data: the corpus, and its two parts as rows."""

    corpus: Corpus
    train: ConversationRows
    val: ConversationRows


def repeated(chats: Sequence[Conversation], epochs: float) -> list[int]:
    """Return indices of conversations: each floor(epochs) times, and the fraction that is left for the same share of
    them, which the hashes of the conversations choose."""
    whole, fraction = divmod(epochs, 1)
    more = round(fraction * len(chats))
    chosen = sorted(range(len(chats)), key=lambda i: identity(chats[i])[8:])[:more] if more else []
    return [*range(len(chats))] * int(whole) + sorted(chosen)


def name_of(data: str) -> str:
    """Return the name of a value of --data or --mix, for messages."""
    return "made-up examples" if data == EXAMPLES else Path(data).name


def rendered(tokenizer: Tokenizer, chats: Iterable[Conversation]) -> list[Rendered]:
    """Return the conversations as tokens, int32, and targets, bool."""
    pairs = (conversations.render(tokenizer, chat) for chat in chats)
    return [(np.array(tokens, dtype=np.int32), np.array(is_target, dtype=bool)) for tokens, is_target in pairs]


def render_conversations(
    config: FinetuneConfig, tokenizer: Tokenizer, notes: list[str]
) -> tuple[list[Rendered], list[Rendered], list[Rendered], list[Rendered]]:
    """Return the conversations as tokens: those for training, those for validation, all of a pass over --data and
    --mix, and all of the files.

    A pass has those of --mix as often as their epochs or weights say; the last list and validation have each once. With
    --val-data, all of --data and --mix is for training. notes: as for read_conversations.
    """
    sources: list[tuple[str, Sequence[Conversation], float]] = []
    for entry in [MixtureEntry(config.data), *map(mixture_entry, config.mix)]:
        data = entry.path
        found: Sequence[Conversation] = (
            example_chats() if data == EXAMPLES else read_conversations(data, notes, skip_bad=config.skip_bad_lines)
        )
        of_data = len(sources[0][1]) if sources else 0
        sources.append((name_of(data), found, entry.epochs(len(found), of_data)))
    whole_pass: list[Rendered] = []
    everything: list[Rendered] = []
    train: list[Rendered] = []
    val: list[Rendered] = []
    for name, chats, epochs in sources:
        rows = rendered(tokenizer, chats)
        taken = repeated(chats, epochs)
        whole_pass += [rows[i] for i in taken]
        everything += rows
        held_out = [config.val_data is None and is_held_out(chat) for chat in chats]
        train += [rows[i] for i in taken if not held_out[i]]
        val += [row for row, held in zip(rows, held_out, strict=True) if held]
        if config.mix:
            notes.append(f"{name}: {len(chats):,} conversations, {epochs:g} times, are {len(taken):,} of a pass")
    if config.val_data is None:
        return train, val, whole_pass, everything
    others = read_conversations(config.val_data, notes, skip_bad=config.skip_bad_lines)
    trained_on = {identity(chat) for _, chats, _ in sources for chat in chats}
    if both := sum(identity(chat) in trained_on for chat in others):
        notes.append(f"{both:,} of {len(others):,} conversations of --val-data are in --data or --mix too")
    return train, rendered(tokenizer, others), whole_pass, everything


def cut_after_answer(document: Rendered, length: int, end: int) -> Rendered:
    """Return a conversation up to the last answer that ends within `length` targets.

    end: the token that ends an answer. Without such an answer the result has no target.
    """
    tokens, is_target = (np.asarray(part) for part in document)
    if len(tokens) <= length + 1:
        return document
    ends = np.flatnonzero((tokens == end) & is_target)
    last = ends[ends <= length]
    stop = int(last[-1]) + 1 if len(last) else 1
    return tokens[:stop], is_target[:stop]


def make_chats(config: FinetuneConfig, tokenizer: Tokenizer, vocab_size: int) -> Chats:
    """Return the config's conversations as rows of at most max_seq_len tokens.

    Raises what read_conversations does, and ValueError if nothing is left to train on or to validate on, or if the
    tokenizer has no tokens for conversations.
    """
    notes: list[str] = []
    train, val, whole_pass, everything = render_conversations(config, tokenizer, notes)
    packed = config.packing == "best-fit"
    length = max(len(tokens) for tokens, _ in train + val) - 1
    if packed:  # the tokens of a small file fill less than a row
        length = max(length, sum(len(tokens) - 1 for tokens, _ in train))
    length = min(config.max_seq_len, math.ceil(length / LENGTHS) * LENGTHS)
    (end,) = conversations.special_ids(tokenizer, ["<|assistant_end|>"])
    if cut := sum(len(tokens) - 1 > length for tokens, _ in train + val):
        if config.cuts_turns:
            train, val, whole_pass, everything = (
                [cut_after_answer(document, length, end) for document in part]
                for part in (train, val, whole_pass, everything)
            )
        lost = sum(not np.any(is_target[1 : length + 1]) for _, is_target in train + val)
        left_out = f"; {lost:,} with no answer before that are left out" if lost else ""
        where = f"after the last answer within {length} tokens" if config.cuts_turns else f"after {length} tokens"
        notes.append(f"{cut:,} conversations are cut {where}{left_out}")

    def kept(part: Sequence[Rendered]) -> list[Rendered]:
        return [(tokens, is_target) for tokens, is_target in part if np.any(is_target[1 : length + 1])]

    def target_bytes(rows: ConversationRows, count: int | None = None) -> int:
        first = [rows.documents[index] for row in rows.rows[:count] for index in row]
        return sum(int(tokenizer.token_bytes[tokens[1:][is_target[1:]]].sum()) for tokens, is_target in first)

    parts = kept(train), kept(val)
    if config.val_data is None and not all(target_bytes(ConversationRows(part, length)) for part in parts):
        parts = kept(whole_pass), kept(everything)
        notes.append(f"too few conversations with answers ({len(parts[1])}) to hold some out: validation uses all")
    rows, val_rows = (ConversationRows(part, length, packed=packed) for part in parts)
    for name, part in ((config.data, rows), (config.val_data or config.data, val_rows)):
        if not part.documents:
            raise ValueError(f"{name}: no answer begins within {length} tokens; use a longer --max-seq-len")
        if not target_bytes(part):
            raise ValueError(f"{name}: every answer is empty: there is nothing to train on or to validate on")
    if not target_bytes(val_rows, math.ceil(config.eval_tokens / length)):
        raise ValueError(
            f"{config.val_data or config.data}: the first answers for validation are all empty; use an --eval-tokens "
            f"above {config.eval_tokens}"
        )
    name = name_of(config.data)
    name += f" and {len(config.mix)} of --mix" if config.mix else ""
    shape = f"{len(rows.rows):,} rows of {length}, {rows.padding:.0%} padding" if packed else f"rows of {length}"
    corpus = Corpus(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        train=rows,
        val=val_rows,
        description=f"{name}, {len(rows.documents):,} conversations, {len(val_rows.documents):,} for validation | "
        f"{rows.num_targets:,} tokens to train on, {shape}",
        notes=tuple(notes),
        hash=hash_of(f"{tokenizer.hash} {length}" + (" best-fit" if packed else ""), parts),
        bytes_per_token=target_bytes(rows) / rows.num_targets,
    )
    return Chats(corpus, rows, val_rows)


def hash_of(head: str, parts: Iterable[Sequence[Rendered]]) -> str:
    """Return the hash of a text and of conversations for training and for validation, as earlier versions computed it:
    of the lists in JSON, which are too large to build at once."""
    digest = hashlib.sha256(head.encode())
    for part in parts:
        between = "["
        for tokens, is_target in part:
            pair = [np.asarray(tokens).tolist(), np.asarray(is_target).tolist()]
            digest.update(f"{between}{json.dumps(pair)}".encode())
            between = ", "
        digest.update(b"]\n")
    return digest.hexdigest()


class Finetuning:
    """Training on conversations, from the weights of another run (a Task).

    The constructor loads the model: that of --checkpoint for a new run, or the run's own newest to resume it.

    config: as given, with the sizes that follow from the conversations.

    Raises what load_model and make_chats do, and ConfigError for fewer conversations than ranks, or for another base
    than that of the run to resume.
    """

    def __init__(self, config: FinetuneConfig, console: Console, world: World) -> None:
        self._begins = not is_resumed(config)
        if config.load_optimizer and self._begins:
            require_optimizer_of_base(config)
        self._source, tokenizer, self._base, _ = load_base(config, console)
        self._chats = make_chats(config, tokenizer, self._source.config.vocab_size)
        for note in self._chats.corpus.notes:
            console.say(f"note     {note}")
        self.config: FinetuneConfig = resolve_batch(config, self._chats, world)

    def model_config(self, config: TrainConfig) -> GPTConfig:
        return self._source.config

    def prepare_data(self, config: TrainConfig, console: Console, world: World) -> Corpus:
        return self._chats.corpus

    def init_weights(self, model: GPT, seed: int) -> None:
        model.init_rotary()
        model.load_state_dict(self._source.state_dict())
        del self._source

    def init_optimizers(self, model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        config = self.config
        if not config.load_optimizer or not self._begins:
            return
        assert config.checkpoint is not None
        tensors, meta = checkpoint.load(config.checkpoint / "checkpoints", config.step)
        state = tensors.get(checkpoint.OPTIMIZER, {})
        checkpoint.restore_optimizers(list(model.named_parameters()), optimizers, state, meta.get("optimizer", {}))

    def documents_of(self, inputs: Tensor) -> Documents | None:
        tokenizer = self._chats.corpus.tokenizer
        assert tokenizer is not None
        return Documents(inputs, tokenizer.bos_id) if self.config.packing == "best-fit" else None

    def loss_divisors(self, micro_batches: Sequence[Batch], world: World) -> Sequence[Tensor]:
        """Return divisors that weight each micro-batch by its number of targets, on the device of the batch."""
        counts = torch.stack([(targets != -1).sum() for _, targets in micro_batches])
        total = world.all_reduce_sum_(counts.sum())
        return (total.to(widest_dtype(total.device)) / (counts * world.size)).float().unbind()

    def checkpoint_metadata(self) -> dict[str, Any]:
        return {conversations.CHAT_TRAINED: True, "base": self._base}

    def sample(
        self, model: GPT, corpus: Corpus, config: TrainConfig, step: int, autocast: torch.autocast
    ) -> Sample | None:
        """Answer the first question of a held-out conversation, the next each time."""
        tokenizer, val = corpus.tokenizer, self._chats.val
        assert tokenizer is not None
        (start,) = conversations.special_ids(tokenizer, ["<|assistant_start|>"])
        tokens = val.documents[step // max(1, config.sample_every) % len(val.documents)][0]
        prompt = [int(token) for token in tokens[: list(tokens).index(start) + 1]]
        capacity = min(model.max_positions, len(prompt) + SAMPLE_TOKENS)
        ends = conversations.stop_tokens(tokenizer)
        with autocast:
            engine = Engine(model, tokenizer, slots=1, capacity=capacity)
        code = "compute" if conversations.has_code_tokens(tokenizer) else "write"
        sampling = Sampling(capacity - len(prompt), temperature=0, stop_tokens=ends, code=code)
        (request,) = engine.generate([(prompt, sampling)])
        if request.error is not None:
            raise ValueError(request.error)
        question = tokenizer.decode(prompt)
        shown = request.text.rstrip().replace("\n", "\n    ")
        return Sample(question, question + request.text, f"{question}\n    {shown}")


def is_resumed(config: ChatTrainConfig) -> bool:
    """Return whether the run continues from a checkpoint of its own."""
    return config.resume is not None and bool(checkpoint.steps(config.run_dir / "checkpoints"))


def load_base(config: ChatTrainConfig, console: Console) -> tuple[GPT, Tokenizer, dict[str, Any], dict[str, Any]]:
    """Return the model that a run begins with, its tokenizer, the description of the base for the meta of checkpoints,
    and the meta of the checkpoint that was read: that of the base, or of the run's own newest if it resumes.

    Raises what load_model does, and ConfigError for another base than that of the run to resume.
    """
    assert config.checkpoint is not None
    resumed = is_resumed(config)
    source, step = (config.run_dir, None) if resumed else (config.checkpoint, config.step)
    model, tokenizer, meta = load_model(source, step, warn=console.say)
    if resumed:
        return model, tokenizer, same_base(config, meta["base"]), meta
    kept = ("step", "nanochat_native", "data_hash", "tokenizer_hash", "validation_bpb", "imported")
    base = {"run": str(source)} | {name: meta.get(name) for name in kept}
    base["weights_sha256"] = checkpoint.weights_hash(source / "checkpoints", meta["step"])
    return model, tokenizer, base, meta


def make_trainer(config: TrainConfig, console: Console, world: World) -> Trainer:
    """Return the trainer of a fine-tuning run."""
    assert isinstance(config, FinetuneConfig)
    task = Finetuning(config, console, world)
    return Trainer(task.config, console, world, task)


def require_optimizer_of_base(config: FinetuneConfig) -> None:
    """Raise ConfigError if the base run has no state of optimizers, or that of others than the config asks for."""
    assert config.checkpoint is not None
    try:
        base = run_folder.load_config(config.checkpoint)
        imported = checkpoint.load_meta(config.checkpoint / "checkpoints", config.step).get("imported")
    except (ConfigError, checkpoint.CheckpointError) as error:
        raise ConfigError(f"--load-optimizer needs the base run with its optimizers: {error}") from None
    if imported:
        raise ConfigError(
            f"--load-optimizer needs a base run with the state of its optimizers; {config.checkpoint} was imported"
        )
    for name in OPTIMIZER_FLAGS:
        theirs, own = getattr(base, name), getattr(config, name)
        if theirs != own:
            raise ConfigError(f"--load-optimizer needs the base's {flag(name)} {theirs}, got {own}")


def same_base(config: ChatTrainConfig, base: dict[str, Any]) -> dict[str, Any]:
    """Return the base of a run to resume, with the path in --checkpoint, to which the base may have moved.

    Raises ConfigError if the model there has other weights.
    """
    assert config.checkpoint is not None
    if Path(base["run"]) == config.checkpoint:
        return base
    try:
        found = checkpoint.weights_hash(config.checkpoint / "checkpoints", base["step"])
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"--checkpoint {config.checkpoint}: {error}") from None
    if found != base.get("weights_sha256"):
        raise ConfigError(
            f"--checkpoint must be the model that this run began with, {base['run']}, got {config.checkpoint}"
        )
    return base | {"run": str(config.checkpoint)}


def resolve_batch(config: FinetuneConfig, chats: Chats, world: World) -> FinetuneConfig:
    """Return the config with the sizes that follow from the conversations: rows of a batch, their length, the horizon.

    Raises ConfigError if a rank would have no conversation of a batch.
    """
    length, count = chats.train.sequence_len, len(chats.train.rows)
    rows = min(config.batch_rows, count) // world.size * world.size
    if rows == 0:
        raise ConfigError(
            f"--batch-rows and the number of {'rows' if config.packing == 'best-fit' else 'conversations'} must be >= "
            f"{world.size}, the number of ranks, "
            f"got {config.batch_rows} and {count}"
        )
    device_batch_size, num_iterations = config.device_batch_size, config.num_iterations
    if not is_unset(config, "device_batch_size"):
        device_batch_size = largest_divisor(rows // world.size, device_batch_size)
    if is_unset(config, "num_iterations"):
        num_iterations = steps_of(config, count, rows)
    return dataclasses.replace(
        config,
        max_seq_len=length,
        total_batch_size=rows * length,
        device_batch_size=device_batch_size,
        num_iterations=num_iterations,
        target_param_data_ratio=UNSET,
    )


def steps_of(config: FinetuneConfig, count: int, rows: int) -> int:
    """Return the optimizer steps in which `count` rows of conversations, `rows` a step, are seen --epochs times."""
    return math.ceil(config.epochs * count / rows)


def resolve_finetuning(config: FinetuneConfig) -> FinetuneConfig:
    """Return the config with what follows from the base model and the device.

    Raises ConfigError for a flag of pretraining, and for a base model that cannot be read.
    """
    if config.checkpoint is None:
        raise ConfigError("--checkpoint RUN is needed: the model to fine-tune")
    if config.val_data == "":
        raise ConfigError("--val-data must be a file, a folder or a glob, got ''")
    if not is_unset(config, "depth") and not is_unset(config, "total_batch_size"):  # of a run to resume
        return resolve_device(with_absolute_paths(config))
    why = "is a flag of pretraining; fine-tuning has --batch-rows and --epochs"
    config = resolve_on_base(config, dict.fromkeys(PRETRAINING_FLAGS, why), suffix="chat")
    config = with_absolute_paths(config)
    rows = GPU_ROWS if config.device == "cuda" else CPU_ROWS
    return dataclasses.replace(config, batch_rows=rows if is_unset(config, "batch_rows") else config.batch_rows)


def resolve_on_base(
    config: Chat,
    refused: Mapping[str, str],
    *,
    suffix: str,
    rates_of: Callable[[Chat], Mapping[str, float]] = resolve.learning_rates,
) -> Chat:
    """Return the config of a new run with what follows from the base model and the device.

    Args:
        refused: names of flags that the command does not have, with the reason for the message.
        suffix: ends the name of the run if none is given.
        rates_of: returns the learning rates before --rate-scale, for those that are not given.

    Raises ConfigError for a flag that the base model sets or the command does not have, a base model that cannot be
    read, and sequences longer than its own.
    """
    assert config.checkpoint is not None
    fields = config.__dataclass_fields__
    for name, why in {**dict.fromkeys(INHERITED_FLAGS, "follows from the base model"), **refused}.items():
        if getattr(config, name) != fields[name].default:
            raise ConfigError(f"{flag(name)} {why}")
    base = config.checkpoint
    try:
        shape, meta = load_config(base, config.step, warn=lambda message: None)
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        raise ConfigError(str(error)) from error
    if config.max_seq_len > shape.sequence_len:
        raise ConfigError(f"--max-seq-len must be <= {shape.sequence_len}, the base model's, got {config.max_seq_len}")
    config = dataclasses.replace(config, **flags_of_model(shape))
    config = resolve_recipe(config, default=recipe_of(base, default=config.architecture))
    rates: dict[str, Any] = {
        name: config.rate_scale * rate for name, rate in rates_of(config).items() if is_unset(config, name)
    }
    return resolve_device(
        dataclasses.replace(
            config,
            step=meta["step"],
            depth=shape.n_layer,
            head_dim=shape.head_dim,
            n_kv_head=shape.n_kv_head,
            vocab_size=shape.vocab_size,
            max_seq_len=shape.sequence_len if is_unset(config, "max_seq_len") else config.max_seq_len,
            run=f"{base.absolute().name}-{suffix}" if is_unset(config, "run") else config.run,
            **rates,
        )
    )


def recipe_of(folder: Path, *, default: str) -> str:
    """Return the recipe of the run in a folder; `default` if it has no config that this version can read."""
    try:
        return run_folder.load_config(folder).recipe
    except ConfigError:
        return default


def with_absolute_paths(config: FinetuneConfig) -> FinetuneConfig:
    """Return the config with paths that do not depend on the working directory."""
    assert config.checkpoint is not None
    val_data = None if config.val_data is None else absolute_path(config.val_data)
    mix = tuple(with_absolute_path(entry) for entry in config.mix)
    return dataclasses.replace(config, checkpoint=config.checkpoint.absolute(), val_data=val_data, mix=mix)


def with_absolute_path(entry: str) -> str:
    """Return a value of --mix with an absolute path."""
    path = mixture_entry(entry).path
    return (path if path == EXAMPLES else absolute_path(path)) + entry[len(path) :]


def absolute_path(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
