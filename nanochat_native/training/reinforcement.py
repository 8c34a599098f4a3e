"""The task of `python -m nanochat_native.reinforce`: a fine-tuned model, trained by rewards for its own answers.

REINFORCE (Williams, 1992) as nanochat does it. Each step is on policy: the model draws --num-samples answers to each
of --examples-per-step examples, and the loss is -sum of log p(token) (r - mean r) over the tokens that the model drew,
with the mean reward of the example's answers. There is no division by the deviation, no penalty for the distance from
the base model (KL) and no clipping. training/rollouts.py has the formula.

An answer is drawn with a seed of its own, from the seed of the run, the step, the example and its number. So a run that
resumes draws the same answers, and so do other numbers of ranks, as long as their weights are the same.
"""

import dataclasses
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from nanochat_native.data import Corpus, Loader, conversations
from nanochat_native.data.shards import TokenStream
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.documents import Documents
from nanochat_native.model.gpt import GPT
from nanochat_native.runs.config import ReinforceConfig, TrainConfig, resolve_device
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.distributed import RankError, World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import UNSET, is_unset
from nanochat_native.training import resolve
from nanochat_native.training.finetuning import PRETRAINING_FLAGS, load_base, resolve_on_base
from nanochat_native.training.reward_tasks import (
    NAMES,
    PASS,
    Example,
    load_task,
    question_of,
    write_chats,
)
from nanochat_native.training.rollouts import Pass, Rollout, draw, loss_weights, pass_at, passes, seed_of
from nanochat_native.training.sizing import largest_divisor
from nanochat_native.training.task import Sample
from nanochat_native.training.trainer import Trainer

MAX_NEW_TOKENS = 256  # nanochat's
MEAN_ROWS = 8  # nanochat's batch on a device
RATES = {"embedding_lr": 0.2, "unembedding_lr": 0.004, "matrix_lr": 0.02}  # nanochat's, with Muon, before --rate-scale
UNUSED_FLAGS = (*PRETRAINING_FLAGS, "data", "max_seq_len", "eval_tokens")

Prompted = tuple[Example, list[int]]  # an example and its prompt


class ExampleLoader(Loader):
    """The examples of each step, in the order of the task, over and over; a rank has a contiguous part of them.

    A batch is a pair of int64 tensors: the number of the step, and the numbers of the examples.
    """

    def __init__(self, count: int, *, examples_per_step: int, num_samples: int, rank: int, world_size: int) -> None:
        """Take `count` examples, of each of which a step has num_samples rows.

        Raises ValueError if examples_per_step is not a multiple of world_size.
        """
        if examples_per_step % world_size:
            raise ValueError(
                f"--examples-per-step must be a multiple of {world_size}, the number of ranks, got {examples_per_step}"
            )
        super().__init__(examples_per_step, 1, "cpu", rank, world_size)
        self._count, self._num_samples = count, num_samples

    def iterate(self, start_step: int = 0, *, depth: int = 4) -> "ExampleIterator":  # type: ignore[override]
        return ExampleIterator(self, start_step)

    def _host_batch(self, step: int) -> tuple[Tensor, Tensor]:
        places = step * self.batch_rows + torch.arange(self._rows.start, self._rows.stop)
        return torch.tensor([step]), places % self._count

    def epochs_of(self, tokens: int) -> float | None:
        return None


class ExampleIterator:
    """Iterator over the batches of an ExampleLoader from a step on."""

    def __init__(self, loader: ExampleLoader, step: int) -> None:
        self._loader, self._step = loader, step

    def __iter__(self) -> "ExampleIterator":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        self._step += 1
        return self._loader.batch(self._step - 1)

    def __enter__(self) -> "ExampleIterator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Reinforcement:
    """Training by rewards, from the weights of a fine-tuned model (a Task).

    The constructor loads the model as fine-tuning does, and the examples.

    Raises what load_base and load_task do, and ConfigError for a model that was not trained on conversations, and for
    examples that do not fit the model.
    """

    def __init__(self, config: ReinforceConfig, console: Console, world: World) -> None:
        self._source, tokenizer, self._base, meta = load_base(config, console)
        if not conversations.is_chat_trained(meta):
            raise ConfigError(
                f"--checkpoint must be a model that was trained on conversations, got {config.checkpoint}; "
                "finetune makes one"
            )
        self.tokenizer = tokenizer
        self.rewards = load_task(config.task, config.task_data)
        limit = self._source.config.sequence_len
        most = config.max_new_tokens
        if is_unset(config, "max_new_tokens"):
            most = max(1, min(MAX_NEW_TOKENS, limit // 2))
        room = limit - most
        if room < 1:
            raise ConfigError(f"--max-new-tokens must be < {limit}, the length of the model's sequence, got {most}")
        self.train, self.val = (self._prompted(part, room, console) for part in (self.rewards.train, self.rewards.val))
        length = max(len(prompt) for _, prompt in (*self.train, *self.val)) + most
        if config.examples_per_step % world.size:
            raise ConfigError(
                f"--examples-per-step must be a multiple of {world.size}, the number of ranks, "
                f"got {config.examples_per_step}"
            )
        mean_rows = config.mean_rows
        if is_unset(config, "mean_rows"):
            mean_rows = largest_divisor(config.num_samples, MEAN_ROWS)
        steps = config.num_iterations
        if is_unset(config, "num_iterations"):
            steps = max(1, int(config.epochs * (len(self.train) // config.examples_per_step)))
        self.config = dataclasses.replace(
            config,
            max_new_tokens=most,
            mean_rows=mean_rows,
            max_seq_len=length,
            total_batch_size=config.examples_per_step * config.num_samples * length,
            num_iterations=steps,
            target_param_data_ratio=UNSET,
        )

    def _prompted(self, examples: Sequence[Example], room: int, console: Console) -> list[Prompted]:
        """Return the examples whose prompts have at most `room` tokens, with these."""
        tokenizer = self.tokenizer
        found = [
            (example, conversations.prompt_of(tokenizer, question_of(example), chat_trained=True))
            for example in examples
        ]
        kept = [(example, prompt) for example, prompt in found if len(prompt) <= room]
        if not kept:
            shortest = min(len(prompt) for _, prompt in found)
            raise ConfigError(
                f"{self.rewards.name}: the prompts have at least {shortest} tokens, but the model's sequence and "
                f"--max-new-tokens leave {room}"
            )
        if left_out := len(found) - len(kept):
            console.say(f"note     {left_out:,} examples are left out: their prompts have more than {room} tokens")
        return kept

    def model_config(self, config: TrainConfig) -> GPTConfig:
        return self._source.config

    def prepare_data(self, config: TrainConfig, console: Console, world: World) -> Corpus:
        assert isinstance(config, ReinforceConfig)
        digest = hashlib.sha256(f"{self.tokenizer.hash} {self.rewards.source_hash}".encode())
        for part in (self.train, self.val):
            digest.update(json.dumps([example for example, _ in part], sort_keys=True).encode() + b"\n")
        return Corpus(
            tokenizer=self.tokenizer,
            vocab_size=self._source.config.vocab_size,
            train=TokenStream([]),
            val=TokenStream([]),
            description=f"task {self.rewards.name}, {len(self.train):,} examples, {len(self.val):,} for evaluation | "
            f"{config.examples_per_step} examples x {config.num_samples} answers a step, each of at most "
            f"{config.max_new_tokens} tokens",
            notes=(),
            hash=digest.hexdigest(),
            bytes_per_token=None,
        )

    def init_weights(self, model: GPT, seed: int) -> None:
        model.init_rotary()
        model.load_state_dict(self._source.state_dict())
        del self._source

    def init_optimizers(self, model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        pass

    def documents_of(self, inputs: Tensor) -> None:
        return None

    def loss_divisors(self, micro_batches: Sequence[Any], world: World) -> Sequence[float]:
        return [1.0] * len(micro_batches)

    def checkpoint_metadata(self) -> dict[str, Any]:
        return {conversations.CHAT_TRAINED: True, "base": self._base, "task": self.rewards.name}

    def sample(
        self, model: GPT, corpus: Corpus, config: TrainConfig, step: int, autocast: torch.autocast
    ) -> Sample | None:
        """Draw an answer to an example for evaluation, the next each time."""
        assert isinstance(config, ReinforceConfig)
        index = step // max(1, config.sample_every) % len(self.val)
        (answer,) = self.answers(model, config, autocast, [(*self.val[index], seed_of(config.seed, "sample", step))])
        question = conversations.text_of(question_of(self.val[index][0])[-1]["content"])
        shown = answer.text.rstrip().replace("\n", "\n    ")
        message = f"sample, reward {answer.reward:.3g}\n    {question}\n    {shown}"
        return Sample(question, answer.text, message)

    def answers(
        self,
        model: GPT,
        config: ReinforceConfig,
        autocast: torch.autocast,
        asked: Sequence[tuple[Example, list[int], int]],
    ) -> list[Rollout]:
        """Draw an answer for each (example, prompt, seed), as the flags say."""
        return draw(
            model,
            self.tokenizer,
            self.rewards,
            asked,
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            autocast=autocast,
        )


class ReinforcementTrainer(Trainer):
    """A run of reinforcement learning. A batch holds examples; compute_gradients draws the answers to them."""

    task: Reinforcement
    config: ReinforceConfig

    def __init__(self, config: ReinforceConfig, console: Console, world: World, task: Reinforcement) -> None:
        super().__init__(config, console, world, task)
        self._rollouts: list[Rollout] = []  # of the last step, on this rank
        self._tokens_of_step = 0

    def make_loader(self) -> Loader:
        config = self.config
        return ExampleLoader(
            len(self.task.train),
            examples_per_step=config.examples_per_step,
            num_samples=config.num_samples,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def roll_out(self, batch: tuple[Tensor, Tensor]) -> list[Rollout]:
        """Draw --num-samples answers to each example of a batch, one example after the other."""
        (step,), indices = (numbers.tolist() for numbers in batch)
        asked = [
            (*self.task.train[index], seed_of(self.config.seed, step, index, number))
            for index in indices
            for number in range(self.config.num_samples)
        ]
        return self.answers(asked)

    def answers(self, asked: Sequence[tuple[Example, list[int], int]]) -> list[Rollout]:
        """Draw the answers of this rank. A fault of the task's file ends all ranks."""

        def action() -> list[Rollout]:
            return self.task.answers(self.model, self.config, self.autocast(), asked)

        return self.world.run_collectively(action, ConfigError)

    def compute_gradients(self, batch: Any) -> tuple[float, float]:
        """Draw answers and compute the gradients of their loss. Return (the loss, the norm of the gradients).

        The loss is not a measure of progress: its mean is near 0 for every model. Both are NaN if the logits of the
        model were not finite, and no gradient is computed then.
        """
        start = time.perf_counter()
        self._rollouts = self.roll_out(batch)
        self.measured = self._measure(self._rollouts) | {"rollout_seconds": time.perf_counter() - start}
        if not math.isfinite(self.measured["reward"]):
            return math.nan, math.nan
        return super().compute_gradients(cast(Any, self._rollouts))  # which micro_batches divides

    def _measure(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Return statistics of the answers of all ranks."""
        own = [(answer.reward, answer.num_drawn, len(answer.tokens), answer.ended) for answer in rollouts]
        everyone = [row for rows in self.world.all_gather_object(own) for row in rows]
        rewards, drawn, tokens, ended = zip(*everyone, strict=True)
        self._tokens_of_step = sum(tokens)
        num_samples = self.config.num_samples
        examples = [set(rewards[first : first + num_samples]) for first in range(0, len(rewards), num_samples)]
        mean = math.fsum(rewards) / len(rewards)
        return {
            "reward": mean,
            "reward_std": math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)),
            "answer_tokens": statistics.fmean(drawn),
            "ended": statistics.fmean(ended),
            "informative": statistics.fmean(len(found) > 1 for found in examples),
        }

    def micro_batches(self, batch: Any) -> Iterator[Any]:
        """Divide the answers of a step into passes of at most --device-batch-size rows."""
        config = self.config
        weights = loss_weights(batch, num_samples=config.num_samples, mean_rows=config.mean_rows)
        yield from passes(batch, weights, config.device_batch_size, self.device)

    def micro_loss(self, micro_batch: Any, documents: Documents | None) -> Tensor:
        assert isinstance(micro_batch, Pass)
        inputs, targets, weights = micro_batch
        loss: Tensor = self.model(inputs, targets, reduction="sum", row_weights=weights)
        return loss

    @property
    def tokens_of_step(self) -> int:
        """The number of tokens of the last step's prompts and answers, over all ranks."""
        return self._tokens_of_step

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure and log pass@k and the mean reward of answers to the examples for evaluation.

        Raises what answers() does for a fault of the task's file. Other errors are a failed report.
        """
        found, fault = None, None
        with self._isolated("evaluation"):
            try:
                found = self.measure_answers()
            except (ConfigError, RankError) as error:
                fault = error
        if fault is not None:
            raise fault
        if found is None:
            return
        self.console.record(self.log.write("val", self.step, **found))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items() if name.startswith("pass@"))
        self.console.say(
            f"step {self.step}: evaluation {shown}, mean reward {found['reward']:.3f}, "
            f"{found['ended']:.0%} of the answers ended"
        )

    def measure_answers(self) -> dict[str, float]:
        """Return pass@k, the mean reward, and the share of answers that ended, on the examples for evaluation."""
        config, world = self.config, self.world
        count = config.eval_samples
        examples = list(enumerate(self.task.val[: config.eval_examples]))[world.rank :: world.size]
        asked = [
            (*prompted, seed_of(config.seed, "evaluation", index, number))
            for index, prompted in examples
            for number in range(count)
        ]
        answers = self.answers(asked) if asked else world.run_collectively(list, ConfigError)
        rows = [
            (
                sum(answer.reward >= PASS for answer in answers[first : first + count]),
                math.fsum(answer.reward for answer in answers[first : first + count]) / count,
                statistics.fmean(answer.ended for answer in answers[first : first + count]),
            )
            for first in range(0, len(answers), count)
        ]
        passed, rewards, ended = zip(*(row for rows in world.all_gather_object(rows) for row in rows), strict=True)
        powers = [2**i for i in range(count.bit_length())]
        return {
            **{f"pass@{k}": statistics.fmean(pass_at(k, count, one) for one in passed) for k in powers},
            "reward": math.fsum(rewards) / len(rewards),
            "ended": statistics.fmean(ended),
        }


def make_trainer(config: TrainConfig, console: Console, world: World) -> Trainer:
    """Return the trainer of a run of reinforcement learning."""
    assert isinstance(config, ReinforceConfig)
    task = Reinforcement(config, console, world)
    return ReinforcementTrainer(task.config, console, world, task)


def resolve_reinforcement(config: ReinforceConfig) -> ReinforceConfig:
    """Return the config with what follows from the base model and the device.

    Raises ConfigError for a flag of other commands, and for a base model that cannot be read.
    """
    if config.checkpoint is None:
        raise ConfigError("--checkpoint RUN is needed: the model to train")
    if config.cuda_graphs == "on":
        raise ConfigError("--cuda-graphs must be auto or off: the sizes of the passes differ from step to step, got on")
    if config.diagnose:
        raise ConfigError("--diagnose is not for training by rewards: there is no text to measure the layers on")
    base = config.checkpoint.absolute()
    task = config.task if config.task in NAMES else os.path.abspath(os.path.expanduser(config.task))
    config = dataclasses.replace(config, checkpoint=base, task=task, cuda_graphs="off")
    if not is_unset(config, "depth") and not is_unset(config, "total_batch_size"):  # of a run to resume
        return resolve_device(config)
    refused = dict.fromkeys(UNUSED_FLAGS, "is not a flag of reinforce")
    return resolve_on_base(config, refused, suffix="rl", rates_of=initial_rates)


def initial_rates(config: ReinforceConfig) -> Mapping[str, float]:
    """Return the learning rates before --rate-scale: nanochat's with Muon, else those of pretraining."""
    return resolve.learning_rates(config) | (RATES if config.optimizer == "hybrid" else {})


def write_task_chats(config: ReinforceConfig) -> str:
    """Write the examples of the task to --write-chats. Return a line that says what was written."""
    assert config.write_chats is not None
    count = write_chats(load_task(config.task, config.task_data), config.write_chats)
    return f"{config.write_chats}: {count:,} conversations for finetune --data"
