"""The task of `python -m nanochat_native.train`: a model of its own shape and random weights, trained on text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat_native.data import Batch, Corpus, prepare
from nanochat_native.inference.engine import complete
from nanochat_native.inference.sampling import Sampling
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.runs import run_folder
from nanochat_native.runs.config import STDLIB, TrainConfig
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.training import resolve
from nanochat_native.training.task import SAMPLE_TOKENS, Sample

PYTHON_PROMPTS = ("def __init__(self", "import os\n", "class")
PROMPT_TOKENS = 16  # tokens of the validation text in a prompt, for other data than the standard library


class Pretraining:
    """Training on text (a Task).

    corpus: the prepared data, if another run has prepared it.
    """

    def __init__(self, corpus: Corpus | None = None) -> None:
        self._corpus = corpus

    def model_config(self, config: TrainConfig) -> GPTConfig:
        return resolve.model_config(config)

    def prepare_data(self, config: TrainConfig, console: Console, world: World) -> Corpus:
        if self._corpus is not None:
            return self._corpus
        assert config.cache_dir is not None
        assert config.validation != "auto", "resolve_defaults chooses the rule"
        cache_dir, validation = config.cache_dir, config.validation
        read = (lambda: run_folder.data_files(config)) if world.is_rank0 else lambda: None
        files = world.all_gather_object(world.run_collectively(read, ConfigError))[0]

        def run() -> Corpus:
            try:
                return prepare(
                    None if config.data == STDLIB else config.data,
                    vocab_size=config.vocab_size,
                    cache_dir=cache_dir,
                    text_column=config.text_column,
                    validation=validation,
                    tokenize=config.tokenize,
                    only=files,
                    log=lambda note: console.say(f"data     {note}"),
                )
            except FileNotFoundError as error:
                if config.resume is None:
                    raise
                raise FileNotFoundError(f"{error}; if the data has moved, give its new path with --data") from None

        # One rank of a machine builds the shards, and the others then find them.
        built = world.run_collectively(
            run if world.local_rank == 0 else lambda: None, ValueError, OSError, long_running=True
        )
        corpus = world.run_collectively(lambda: run() if built is None else built, ValueError, OSError)
        # They list the files at different times, while others may still be downloaded.
        name = f"the data of --data {config.data}, whose files must not change while the ranks start"
        world.require_same({name: corpus.hash[:16]})
        return corpus

    def init_weights(self, model: GPT, seed: int) -> None:
        model.init_weights(seed=seed)

    def init_optimizers(self, model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        pass  # the optimizers begin without a state

    def documents_of(self, inputs: Tensor) -> None:
        return None

    def loss_divisors(self, micro_batches: Sequence[Batch], world: World) -> Sequence[float]:
        return [len(micro_batches)] * len(micro_batches)

    def checkpoint_metadata(self) -> dict[str, Any]:
        return {}

    def sample(
        self, model: GPT, corpus: Corpus, config: TrainConfig, step: int, autocast: torch.autocast
    ) -> Sample | None:
        """Continue one of the prompts, the next each time, with a random generator of its own."""
        tokenizer = corpus.tokenizer
        if tokenizer is None:
            return None
        positions = model.max_positions
        prompts = list(PYTHON_PROMPTS)
        if config.data != STDLIB:
            count = min(PROMPT_TOKENS, len(corpus.val) - 1, positions // 2)
            prompts = [tokenizer.decode(corpus.val.read(1, 1 + count))]
        prompt = prompts[step // max(1, config.sample_every) % len(prompts)]
        while len(tokenizer.encode(prompt)) > positions - 2:  # broken characters take more tokens than were read
            prompt = prompt[: len(prompt) // 2]
        tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        seed = config.seed & 0xFFFFFFFF  # torch's generator uses only these bits
        sampling = Sampling(min(SAMPLE_TOKENS, positions - len(tokens)), temperature=0.7, top_k=50, seed=seed)
        with autocast:
            pieces = complete(model, tokenizer, tokens, sampling)
        text = prompt + "".join(piece.text for piece in pieces)
        return Sample(prompt, text, "sample\n    " + text.rstrip().replace("\n", "\n    "))
