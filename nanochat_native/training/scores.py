"""Scores of a model that are measured while it is trained, at fixed steps and at the end: the CORE score, and that of
chat_eval's tasks.

A score has parts, such as the tasks of CORE. The trainer measures them one after another, on all ranks, and stops
between two of them if a signal asks for it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.evaluation import chat_score, core_score
from nanochat_native.evaluation.chat_tasks import JUDGES, NAMES, WITHOUT_FILES, MissingTaskError, read_task
from nanochat_native.evaluation.core_score import Progress, TaskResult
from nanochat_native.model.gpt import GPT
from nanochat_native.runs.config import CHAT_PROBLEMS, ChatTrainConfig, TrainConfig
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import flag, is_unset


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


class Chat:
    """The mean of the centred accuracies of --chat-tasks (a Score), as chat_eval measures them.

    It is ChatCORE only if the tasks are those of ChatCORE. The constructor reads the tasks; it raises ValueError for a
    task that is not there or cannot be measured, and what chat_tasks.read_task does.
    """

    title = "Chat"

    def __init__(self, config: ChatTrainConfig) -> None:
        self.every = config.chat_every
        names = [name for name in NAMES if name != "HumanEval"]  # whose programs need chat_eval's --allow-code
        for name in config.chat_tasks:
            if name not in names:
                raise ConfigError(f"--chat-tasks must be among {', '.join(names)}, got {name}")
        if config.chat_data is not None and WITHOUT_FILES.keys() >= set(config.chat_tasks):
            raise ConfigError("--chat-data is for tasks with files, which --chat-tasks does not name")
        try:
            self._tasks = [
                read_task(name, config.chat_data, _max_problems(config, name), "--chat-data")
                for name in NAMES
                if name in config.chat_tasks
            ]
        except MissingTaskError as error:
            raise ConfigError(f"--chat-tasks: {error}") from None
        self.parts: Sequence[str] = [task.name for task in self._tasks]

    def prepare(self, tokenizer: Tokenizer | None, longest: int) -> str:
        assert tokenizer is not None, "a chat model has one"
        for task in self._tasks:
            for letters in {problem.letters for problem in task.problems}:
                chat_score.letter_ids(tokenizer, letters)
        return f"{', '.join(self.parts)}, {sum(len(task.problems) for task in self._tasks):,} problems"

    def measure(
        self, part: int, model: GPT, tokenizer: Tokenizer, *, batch_tokens: int, world: World, progress: Progress
    ) -> chat_score.TaskResult:
        task, slots = self._tasks[part], max(1, batch_tokens // model.config.sequence_len)
        engine = world.run_collectively(lambda: chat_score.engine_for(task, model, tokenizer, slots), Exception)
        return chat_score.evaluate(task, engine, world=world, progress=progress)

    def figures(self, results: Sequence[chat_score.TaskResult]) -> dict[str, float]:
        accuracies = {f"accuracy/{result.task}": result.accuracy for result in results}
        score = sum(result.centred for result in results) / len(results)
        return {"score": score, "problems": sum(result.problems for result in results), **accuracies}


def _max_problems(config: ChatTrainConfig, name: str) -> int | None:
    """Return the largest number of problems of a task; None: all."""
    if is_unset(config, "chat_max_problems"):
        return CHAT_PROBLEMS if name in JUDGES or name in WITHOUT_FILES else None
    return config.chat_max_problems or None


def scores_of(config: TrainConfig) -> list[Score]:
    """Return the scores that the flags of a run name. Raises the errors of their constructors."""
    scores: list[Score] = [] if config.core is None else [Core(config)]
    if isinstance(config, ChatTrainConfig):
        if config.chat_tasks:
            scores.append(Chat(config))
        elif config.chat_data is not None:
            raise ConfigError("--chat-data needs --chat-tasks NAMES")
    return scores
