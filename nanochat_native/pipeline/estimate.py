"""Estimates of time, memory and disk of the stages that have not run, from their flags alone.

The rules are those by which a run announces itself (training/report.py): the operations of the training at a usual
share of the peak rate, and the memory of training/sizing.py.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat_native.model.gpt import GPT
from nanochat_native.pipeline.recipe import Places, Recipe, config_of
from nanochat_native.runs.config import FinetuneConfig, ReinforceConfig, TrainConfig, resolve_defaults, resolve_horizon
from nanochat_native.runtime import hardware
from nanochat_native.runtime.flags import is_unset
from nanochat_native.training import resolve, scaling_laws, sizing
from nanochat_native.training.report import EXPECTED_MFU

CHECKPOINT_BYTES = 12  # a parameter: float32 weights and at most two moments


@dataclass(frozen=True)
class Estimate:
    """An estimate of what a stage takes; None for what cannot be estimated.

    Attributes:
        seconds: of the stage.
        source: of the seconds: "recipe", the time that the recipe gives, or "estimate".
        memory_bytes: of one device.
        disk_bytes: of its folder, at the end.
    """

    seconds: float | None = None
    source: str = ""
    memory_bytes: int | None = None
    disk_bytes: int | None = None


def peak_flops(recipe: Recipe) -> float | None:
    """Return the peak rate of one device in FLOP/s: of this machine or, on one without a GPU, of the recipe's GPU."""
    if recipe.device == "cpu":
        return hardware.cpu_peak().flops
    if torch.cuda.is_available():
        return hardware.gpu_peak(torch.cuda.get_device_name(), torch.bfloat16).flops
    return None if recipe.gpu is None else hardware.gpu_peak(recipe.gpu, torch.bfloat16).flops


def of_stages(recipe: Recipe, places: Places) -> dict[str, Estimate]:
    """Return the estimates of the stages of a recipe that `check` accepts, by name."""
    peak = peak_flops(recipe)
    found: dict[str, Estimate] = {}
    params: dict[Path, int] = {}  # of the models of earlier stages, by their folders
    for stage in recipe.stages:
        estimate = Estimate()
        config = config_of(stage, recipe, places)
        if isinstance(config, FinetuneConfig | ReinforceConfig):
            base = params.get(config.checkpoint) if config.checkpoint is not None else None
            if base is not None:
                params[places.folder(stage.name)] = base
                estimate = Estimate(disk_bytes=CHECKPOINT_BYTES * base * config.keep)
        elif config is not None:
            estimate = of_training(config, recipe, places, peak)
            params[places.folder(stage.name)] = _model(_resolved(config, recipe)).num_params()
        elif stage.command != "download":
            estimate = Estimate(disk_bytes=0)
        if stage.seconds is not None:
            estimate = dataclasses.replace(estimate, seconds=stage.seconds, source="recipe")
        found[stage.name] = estimate
    return found


def _resolved(config: TrainConfig, recipe: Recipe) -> TrainConfig:
    return resolve_defaults(config, gpu=recipe.device == "cuda")


def _model(config: TrainConfig) -> GPT:
    with torch.device("meta"):
        return GPT(resolve.model_config(config))


def of_training(config: TrainConfig, recipe: Recipe, places: Places, peak: float | None) -> Estimate:
    """Return the estimate of a stage of `train`. peak: FLOP/s of one device."""
    config = _resolved(config, recipe)
    shape, model = resolve.model_config(config), _model(config)
    config = resolve.with_batch(config, shape)
    size, flops = model.num_params(), model.estimate_flops()
    counted = scaling_laws.scaling_params(shape) if config.recipe == "today" else size
    config = resolve_horizon(config, num_params=counted, flops_per_token=flops)
    total = config.num_iterations * config.total_batch_size * flops
    devices = max(1, places.gpus)
    seconds = None if peak is None else total / (peak * devices * EXPECTED_MFU[recipe.device])
    memory = None
    if recipe.device == "cpu" and is_unset(config, "device_batch_size"):
        config = sizing.resolve_batch_size(config, row_bytes=0, free_bytes=None, world_size=1)
    if not is_unset(config, "device_batch_size"):
        element_bytes = 4 if config.dtype == "float32" else 2
        row = sizing.row_bytes(config, shape, element_bytes=element_bytes)
        memory = sizing.memory_bytes(config, num_params=size, row_bytes=row)
    return Estimate(seconds, "estimate" if seconds is not None else "", memory, CHECKPOINT_BYTES * size * config.keep)
