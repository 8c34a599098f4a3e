"""The time that each operator of a training step takes on a GPU, by torch's profiler."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import clip_reduced_, setup_optimizers

OTHER = "other operators"  # that the model of the step does not have


def measure(
    config: GPTConfig, rows: int, dtype: torch.dtype, optimizer: str, accumulate: bool, names: Collection[str]
) -> dict[str, dict[str, float]]:
    """Run steps on the current GPU, and return the milliseconds of the operators `names` in the last one, by phase.

    The phases are those of recording.Step. Raises ValueError without a GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("--measure needs a GPU, and torch sees none")
    device = torch.device("cuda")
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    optimizers = setup_optimizers(model, optimizer=optimizer)
    tokens = torch.randint(config.vocab_size, (rows, config.sequence_len + 1), device=device)
    idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def micro_step() -> None:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(idx, targets) / 2
        loss.backward()

    def update() -> None:
        clip_reduced_(optimizers, 1.0)
        for each in optimizers:
            each.step()

    def zero_grad() -> None:
        for each in optimizers:
            each.zero_grad()

    for _ in range(3):
        zero_grad()
        micro_step()
        update()
    if not accumulate:
        zero_grad()
    return {"micro_step": profiled(micro_step, names), "optimizers": profiled(update, names)}


def names_of(result: dict[str, Any]) -> set[str]:
    """Return the names of the modelled operators, given the figures of a step."""
    return {row["operator"] for phase in ("micro_step", "optimizers") for row in result[phase]["rows"]}


def profiled(body: Callable[[], None], names: Collection[str]) -> dict[str, float]:
    """Return the milliseconds of device time that a call of `body` takes, by operator."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        body()
        torch.cuda.synchronize()
    return by_operator(recorded.events() or [], names)


def by_operator(events: Iterable[Any], names: Collection[str]) -> dict[str, float]:
    """Return the device time of events by the outermost operator of `names` that they belong to, in milliseconds."""
    found: dict[str, float] = defaultdict(float)
    everything = 0.0
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        if event.cpu_parent is None:
            everything += event.device_time_total / 1e3
        outer = event.cpu_parent
        while outer is not None and outer.name not in names:
            outer = outer.cpu_parent
        if event.name in names and outer is None:
            found[event.name] += event.device_time_total / 1e3
    found[OTHER] = everything - sum(found.values())
    return dict(found)
