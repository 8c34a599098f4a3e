"""Measure real steps on random tokens with torch's allocator."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from nanochat_native.lab.memory.allocations import PHASES, Allocations
from nanochat_native.lab.memory.options import Options, model_config, sized
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import clip_reduced_, setup_optimizers
from nanochat_native.runtime.hardware import pick_device

STEPS = 3  # the first creates the optimizers' state; the last is measured


class Step:
    """An optimizer step, as train makes it, on random tokens."""

    def __init__(self, options: Options) -> None:
        self.options = options = sized(options)
        self.device = pick_device(options.device)
        config = model_config(options)
        with torch.device("meta"):
            self.model = GPT(config, grad_checkpoint=options.grad_checkpoint)
        self.model.to_empty(device=self.device)
        self.model.init_weights()
        self.optimizers = setup_optimizers(self.model, optimizer=options.optimizer)
        rows = options.device_batch_size * options.micro_batches
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (rows, config.sequence_len + 1), generator=generator).to(self.device)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def __call__(self, phase: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext) -> None:
        count, bfloat16 = self.options.micro_batches, self.options.dtype == "bfloat16"
        for inputs, targets in zip(self.inputs.chunk(count), self.targets.chunk(count), strict=True):
            with phase("forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                loss = self.model(inputs, targets) / count
            with phase("backward"):
                loss.backward()
        with phase("optimizer step"):
            clip_reduced_(self.optimizers, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Measured(NamedTuple):
    """Measured bytes: the peak of each phase, and the activations kept for the backward pass."""

    phases: dict[str, int]
    activations: int

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def measure(options: Options) -> Measured:
    """Run steps, and return the memory of the last one, with the model.

    On a CPU the memory is the sum of all live tensors (see Allocations), on a GPU torch.cuda.max_memory_allocated().
    """
    options = sized(options)
    if options.device == "cpu":
        with Allocations() as allocations:
            step = Step(options)
            for _ in range(STEPS):
                step(record_function)
        began, highest = allocations.began, allocations.highest
    else:
        before = torch.cuda.memory_allocated()
        began, highest = {}, {}

        @contextlib.contextmanager
        def phase(name: str) -> Iterator[None]:
            torch.cuda.reset_peak_memory_stats()
            began[name] = torch.cuda.memory_allocated() - before
            yield
            highest[name] = torch.cuda.max_memory_allocated() - before

        step = Step(options)
        for _ in range(STEPS):
            step(phase)
    # Memory after the forward pass, without the gradients that the loss computes.
    config, element = step.model.config, 2 if options.dtype == "bfloat16" else 4
    loss_gradients = element * (config.vocab_size + options.tokens) * config.n_embd
    left = began["backward"] - began["forward"]
    return Measured({name: highest[name] for name in PHASES}, left - loss_gradients)
