"""Scores of a model that are measured while it is trained, at fixed steps and at the end: the CORE score.

A score has parts, such as the tasks of CORE. The trainer measures them one after another, on all ranks, and stops
between two of them if a signal asks for it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.evaluation import core_score
from nanochat_native.evaluation.core_score import Progress, TaskResult
from nanochat_native.model.gpt import GPT
from nanochat_native.runs.config import TrainConfig
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import flag


class Score(Protocol):
    """A score, as the trainer sees it. All ranks call each method.

    Attributes:
        title: its name in messages; in small letters, the kind of its records and its name in the summary.
        every: steps between two measurements; 0: only at the end.
        parts: the names of its parts.
    """

    title: str
    every: int
    parts: Sequence[str]

    def prepare(self, tokenizer: Tokenizer | None, longest: int) -> str:
        """Check what is measured with the run's tokenizer, and return a description.

        Args:
            tokenizer: None for data without one.
            longest: tokens of a sequence of the model.

        Raises:
            ValueError: it cannot be measured.
        """

    def measure(
        self, part: int, model: GPT, tokenizer: Tokenizer, *, batch_tokens: int, world: World, progress: Progress
    ) -> Any:
        """Measure a part, under the autocast of the training. It changes neither the model nor a random generator.

        Args:
            batch_tokens: tokens that may go through the model at once.
            world: ranks that share the work.
            progress: called with (done, all).
        """

    def figures(self, results: Sequence[Any]) -> dict[str, float]:
        """Return the content of the record, by name, from the results of all parts. "score" is the score."""


class Core:
    """The CORE score (a Score). The constructor reads the bundle; it raises what core_score.read_bundle does."""

    title = "CORE"

    def __init__(self, config: TrainConfig) -> None:
        assert config.core is not None
        self.every = config.core_every
        self._folder = config.core
        self._tasks = core_score.read_bundle(config.core, config.core_max_per_task or None, flag("core_max_per_task"))
        self.parts: Sequence[str] = [task.label for task in self._tasks]

    def prepare(self, tokenizer: Tokenizer | None, longest: int) -> str:
        if tokenizer is None:
            raise ConfigError("--core needs data with a tokenizer; token shards (.bin) have none")
        for task in self._tasks:
            core_score.require_tokens(task, tokenizer, longest)
        return f"{len(self._tasks)} tasks, {sum(len(task.items) for task in self._tasks):,} items, from {self._folder}"

    def measure(
        self, part: int, model: GPT, tokenizer: Tokenizer, *, batch_tokens: int, world: World, progress: Progress
    ) -> TaskResult:
        return core_score.evaluate_task(
            model, tokenizer, self._tasks[part], batch_tokens=batch_tokens, world=world, progress=progress
        )

    def figures(self, results: Sequence[TaskResult]) -> dict[str, float]:
        centred = {f"centred/{result.task}": result.centred for result in results}
        return {"score": core_score.score(results), "items": sum(result.items for result in results), **centred}


def scores_of(config: TrainConfig) -> list[Score]:
    """Return the scores that the flags of a run name. Raises the errors of their constructors."""
    return [] if config.core is None else [Core(config)]
