"""The task of a run: the parts of training in which pretraining and fine-tuning differ."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nanochat_native.data import Batch, Corpus
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.documents import Documents
from nanochat_native.model.gpt import GPT
from nanochat_native.runs.config import TrainConfig
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.distributed import World

SAMPLE_TOKENS = 96


class Sample(NamedTuple):
    """Text that a model generated in the course of its training.

    message: the sample as the console shows it.
    """

    prompt: str
    text: str
    message: str


class Task(Protocol):
    """Pretraining or fine-tuning, as the trainer sees it. All ranks call each method but `sample`."""

    def model_config(self, config: TrainConfig) -> GPTConfig:
        """Return the shape of the model, with the vocabulary that the config asks for."""

    def prepare_data(self, config: TrainConfig, console: Console, world: World) -> Corpus:
        """Return the data. Raises OSError or ValueError for data that cannot be read."""

    def init_weights(self, model: GPT, seed: int) -> None:
        """Set the first weights of a new run."""

    def init_optimizers(self, model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Set the first state of the optimizers of a new run, after the weights."""

    def documents_of(self, inputs: Tensor) -> Documents | None:
        """Return the documents of inputs (B, T) that the model reads apart; None if a row is one text."""

    def loss_divisors(self, micro_batches: Sequence[Batch], world: World) -> Sequence[float | Tensor]:
        """Return the number by which to divide the mean loss of each micro-batch, so that their sum, averaged over the
        ranks, is the mean over all targets of the step. Numbers that depend on the batch are float32, 0-d, on its
        device: the host does not wait for them."""

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Return what the meta of a checkpoint holds besides that of every run."""

    def sample(
        self, model: GPT, corpus: Corpus, config: TrainConfig, step: int, autocast: torch.autocast
    ) -> Sample | None:
        """Return text that the model generates after `step` steps; None if the task has no text. On rank 0 alone."""
