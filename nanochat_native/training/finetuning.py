"""Fine-tunes a trained model on conversations."""

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat_native.data import Batch, ConversationRows, Corpus, conversation_files, conversations
from nanochat_native.data.conversations import Message
from nanochat_native.data.example_chats import example_chats
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import Sampling
from nanochat_native.model.config import GPTConfig
from nanochat_native.runs import checkpoint
from nanochat_native.runs.config import EXAMPLES, FinetuneConfig, TrainConfig
from nanochat_native.runs.run_folder import sized
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import UNSET, flag
from nanochat_native.training import resolve
from nanochat_native.training.sizing import largest_divisor
from nanochat_native.training.trainer import SAMPLE_TOKENS, Trainer

VAL_SHARE = 0.1  # of the conversations, where --val-data is not given
LENGTHS = 16  # rows are as long as the longest conversation, rounded up to a multiple of this
CPU_ROWS, GPU_ROWS = 8, 32
INHERITED_FLAGS = ("depth", "head_dim", "n_kv_head", "window_pattern", "vocab_size")
PRETRAINING_FLAGS = ("total_batch_size", "target_flops", "target_param_data_ratio", "text_column")
Conversation = Sequence[Message]


def read_conversations(data: str | Path, notes: list[str] | None = None) -> list[Conversation]:
    """The conversations of a file, a folder or a glob, in the forms of data/chats.py, each ending with an answer.

    notes: takes a line for each form that is not plain messages, and for files that are left out. Raises
    FileNotFoundError, and ValueError that names file, line and what is wrong there.
    """
    files, left_out = conversation_files.find_files(data)
    found: list[Conversation] = []
    forms: Counter[str] = Counter()
    for path in files:
        for line, record in conversation_files.read_records(path):
            try:
                messages, form = conversation_files.parse_record(record)
                conversations.check_messages(messages)
                if messages[-1]["role"] != "assistant":
                    raise ValueError("the last message is the user's: there is no answer to learn")
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
            found.append(messages)
            forms[form] += 1
    if not found:
        raise ValueError(f"{data}: no conversation in it")
    if notes is not None:
        notes += left_out
        notes += [
            f"{Path(data).name}: {count:,} of {len(found):,} records are {form}"
            for form, count in forms.items()
            if form
        ]
    return found


def identity(chat: Conversation) -> bytes:
    """A hash of who says what: equal for conversations that are learnt as the same."""
    said = [{"role": message["role"], "content": message["content"]} for message in chat]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def is_held_out(chat: Conversation) -> bool:
    """Whether to measure on it instead of learning it: equal conversations never lie on both sides."""
    return int.from_bytes(identity(chat)[:8], "big") < VAL_SHARE * 2**64


class Chats(NamedTuple):
    corpus: Corpus
    train: ConversationRows
    val: ConversationRows


Rendered = tuple[list[int], list[bool]]  # conversations.render


def make_chats(config: FinetuneConfig, tokenizer: Tokenizer, vocab_size: int) -> Chats:
    """The config's conversations as rows of at most max_seq_len tokens.

    Raises what read_conversations does, and ValueError where nothing is left to learn or to measure, or the tokenizer
    has no tokens for conversations.
    """
    notes: list[str] = []
    found: Sequence[Conversation] = (
        example_chats() if config.data == EXAMPLES else read_conversations(config.data, notes)
    )
    rendered = [conversations.render(tokenizer, chat) for chat in found]
    train: list[Rendered]
    val: list[Rendered]
    if config.val_data is None:
        held_out = [is_held_out(chat) for chat in found]
        train, val = ([row for row, held in zip(rendered, held_out, strict=True) if held == side] for side in (0, 1))
    else:
        others = read_conversations(config.val_data, notes)
        train, val = rendered, [conversations.render(tokenizer, chat) for chat in others]
        learnt_too = {identity(chat) for chat in found}
        if both := sum(identity(chat) in learnt_too for chat in others):
            notes.append(f"{both:,} of {len(others):,} conversations of --val-data are in --data too, and are learnt")
    length = max(len(tokens) for tokens, _ in train + val) - 1
    length = min(config.max_seq_len, math.ceil(length / LENGTHS) * LENGTHS)
    if cut := sum(len(tokens) - 1 > length for tokens, _ in train + val):
        lost = sum(not any(learnt[1 : length + 1]) for _, learnt in train + val)
        left_out = f"; {lost:,} whose answers all lie there are left out" if lost else ""
        notes.append(f"{cut:,} conversations lose what is behind {length} tokens{left_out}")

    def kept(part: Sequence[Rendered]) -> list[Rendered]:
        return [(tokens, learnt) for tokens, learnt in part if any(learnt[1 : length + 1])]

    def learnt_bytes(rows: ConversationRows, count: int | None = None) -> int:
        return sum(
            int(tokenizer.token_bytes[tokens[1:][learnt[1:]]].sum()) for tokens, learnt in rows.documents[:count]
        )

    parts = kept(train), kept(val)
    if config.val_data is None and not all(learnt_bytes(ConversationRows(part, length)) for part in parts):
        parts = kept(rendered), kept(rendered)
        notes.append(
            f"too few conversations with answers ({len(parts[0])}) to hold some out: validation measures on all"
        )
    rows, val_rows = (ConversationRows(part, length) for part in parts)
    for name, part in ((config.data, rows), (config.val_data or config.data, val_rows)):
        if not part.documents:
            raise ValueError(f"{name}: no answer begins within {length} tokens: take a longer --max-seq-len")
        if not learnt_bytes(part):
            raise ValueError(f"{name}: every answer is empty: there is nothing to learn or to measure")
    if not learnt_bytes(val_rows, math.ceil(config.eval_tokens / length)):
        raise ValueError(
            f"{config.val_data or config.data}: the first answers to measure on are all empty: take an --eval-tokens "
            f"above {config.eval_tokens}"
        )
    digest = hashlib.sha256(f"{tokenizer.hash} {length}".encode())
    for side in parts:
        digest.update(json.dumps(side).encode() + b"\n")
    name = "made-up examples" if config.data == EXAMPLES else Path(config.data).name
    corpus = Corpus(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        train=rows,
        val=val_rows,
        description=f"{name}, {len(rows.documents):,} conversations, {len(val_rows.documents):,} to measure on | "
        f"{rows.num_targets:,} tokens to learn, rows of {length}",
        notes=tuple(notes),
        hash=digest.hexdigest(),
        bytes_per_token=learnt_bytes(rows) / rows.num_targets,
    )
    return Chats(corpus, rows, val_rows)


class FinetuneTrainer(Trainer):
    """A run that begins with the weights of another. Raises what Trainer, load_model and make_chats do."""

    config: FinetuneConfig

    def __init__(self, config: TrainConfig, console: Console, world: World | None = None) -> None:
        assert isinstance(config, FinetuneConfig)
        assert config.checkpoint is not None
        goes_on = config.resume is not None and checkpoint.steps(config.run_dir / "checkpoints")
        source, step = (config.run_dir, None) if goes_on else (config.checkpoint, config.step)
        self.source, tokenizer, meta = load_model(source, step, warn=console.say)
        kept = ("step", "nanochat_native", "data_hash", "tokenizer_hash", "validation_bpb", "imported")
        if goes_on:
            self.base = same_base(config, meta["base"])
        else:
            self.base = {"run": str(source)} | {name: meta.get(name) for name in kept}
            self.base["weights_sha256"] = checkpoint.weights_hash(source / "checkpoints", meta["step"])
        self.chats = make_chats(config, tokenizer, self.source.config.vocab_size)
        for note in self.chats.corpus.notes:
            console.say(f"note     {note}")
        length, count = self.chats.train.sequence_len, len(self.chats.train.documents)
        ranks = 1 if world is None else world.size
        rows = min(config.batch_rows, count) // ranks * ranks
        if rows == 0:
            raise ConfigError(f"{count} conversations, or --batch-rows {config.batch_rows}, for {ranks} ranks")
        given = config.device_batch_size
        config = dataclasses.replace(
            config,
            max_seq_len=length,
            total_batch_size=rows * length,
            device_batch_size=given if given == UNSET else largest_divisor(rows // ranks, given),
            num_iterations=config.num_iterations if config.num_iterations != UNSET else steps_of(config, count, rows),
            target_param_data_ratio=UNSET,
        )
        super().__init__(config, console, world, self.chats.corpus)
        del self.source

    def model_config(self, config: TrainConfig, vocab_size: int) -> GPTConfig:
        return self.source.config

    def init_weights(self) -> None:
        self.model.init_rotary()
        self.model.load_state_dict(self.source.state_dict())

    def divisors(self, batch: Batch) -> Iterator[float]:
        counts = [int((targets != -1).sum()) for _, targets in self.micro_batches(batch)]
        total = self.world.all_reduce_sum_(torch.tensor(sum(counts), device=self.device)).item()
        return (total / (count * self.world.size) for count in counts)

    def origin(self) -> dict[str, Any]:
        return {conversations.CHAT_TRAINED: True, "base": self.base}

    def sample(self) -> None:
        """Answer the first question of a conversation that is held out, the next each time. On the first rank alone."""
        tokenizer, val = self.corpus.tokenizer, self.chats.val
        assert tokenizer is not None
        (start,) = conversations.special_ids(tokenizer, ["<|assistant_start|>"])
        tokens = val.documents[self.step // max(1, self.config.sample_every) % len(val.documents)][0]
        prompt = [int(token) for token in tokens[: list(tokens).index(start) + 1]]
        capacity = min(self.model.max_positions, len(prompt) + SAMPLE_TOKENS)
        ends = conversations.stop_tokens(tokenizer)
        with self.autocast():
            engine = Engine(self.model, tokenizer, slots=1, capacity=capacity)
        (request,) = engine.generate([(prompt, Sampling(capacity - len(prompt), temperature=0, stop_tokens=ends))])
        if request.error is not None:
            raise ValueError(request.error)
        question = tokenizer.decode(prompt)
        self.console.record(self.log.write("sample", self.step, prompt=question, text=question + request.text))
        self.console.say(f"step {self.step}: {question}\n    " + request.text.rstrip().replace("\n", "\n    "))


def same_base(config: FinetuneConfig, base: dict[str, Any]) -> dict[str, Any]:
    """The base of a run that goes on, which may have moved to the config's checkpoint. Raises ConfigError where that
    has other weights."""
    assert config.checkpoint is not None
    if Path(base["run"]) == config.checkpoint:
        return base
    try:
        found = checkpoint.weights_hash(config.checkpoint / "checkpoints", base["step"])
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"--checkpoint {config.checkpoint}: {error}") from None
    if found != base.get("weights_sha256"):
        raise ConfigError(f"--checkpoint {config.checkpoint} is not the model that this run began with, {base['run']}")
    return base | {"run": str(config.checkpoint)}


def steps_of(config: FinetuneConfig, count: int, rows: int) -> int:
    """Optimizer steps in which `count` conversations, `rows` a step, are seen --epochs times."""
    return math.ceil(config.epochs * count / rows)


def complete(config: FinetuneConfig) -> FinetuneConfig:
    """Fill in what the base model and the device decide. Raises ConfigError for a flag that is not fine-tuning's, and
    for a model that cannot be read."""
    if config.checkpoint is None:
        raise ConfigError("--checkpoint RUN is needed: the model to begin with")
    if config.val_data == "":
        raise ConfigError("--val-data is empty; it takes a file, a folder or a glob")
    if config.depth != UNSET and config.total_batch_size != UNSET:  # a run's own
        return sized(located(config))
    fields = config.__dataclass_fields__
    for name in (*INHERITED_FLAGS, *PRETRAINING_FLAGS):
        if getattr(config, name) != fields[name].default:
            why = (
                "the base model's"
                if name in INHERITED_FLAGS
                else "pretraining's; fine-tuning takes --batch-rows, --epochs"
            )
            raise ConfigError(f"{flag(name)} is {why}")
    try:
        model, _, meta = load_model(config.checkpoint, config.step, warn=lambda message: None)
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        raise ConfigError(str(error)) from error
    shape = model.config
    if config.max_seq_len > shape.sequence_len:
        raise ConfigError(f"--max-seq-len is {config.max_seq_len}; the base model takes up to {shape.sequence_len}")
    rates: dict[str, Any] = {
        name: config.rate_scale * rate
        for name, rate in resolve.learning_rates(config).items()
        if getattr(config, name) == UNSET
    }
    config = sized(
        dataclasses.replace(
            located(config),
            step=meta["step"],
            depth=shape.n_layer,
            head_dim=shape.head_dim,
            n_kv_head=shape.n_kv_head,
            window_pattern=shape.window_pattern,
            vocab_size=shape.vocab_size,
            max_seq_len=shape.sequence_len if config.max_seq_len == UNSET else config.max_seq_len,
            run=f"{config.checkpoint.absolute().name}-chat" if config.run is None else config.run,
            **rates,
        )
    )
    rows = GPU_ROWS if config.device == "cuda" else CPU_ROWS
    return dataclasses.replace(config, batch_rows=rows if config.batch_rows == UNSET else config.batch_rows)


def located(config: FinetuneConfig) -> FinetuneConfig:
    """The config with paths that hold in every working directory."""
    assert config.checkpoint is not None
    val_data = None if config.val_data is None else os.path.abspath(os.path.expanduser(config.val_data))
    return dataclasses.replace(config, checkpoint=config.checkpoint.absolute(), val_data=val_data)
