"""Values that follow from the flags by rules of the model and the optimizers: shape, batch, learning rates, decay."""

import dataclasses
from typing import Any

from nanochat_native.model.config import GPTConfig
from nanochat_native.optim import routing
from nanochat_native.runs.config import LEARNING_RATE_FLAGS, PARTS, C, FinetuneConfig, ReinforceConfig, TrainConfig
from nanochat_native.runtime.flags import UNSET, is_unset
from nanochat_native.training import scaling_laws


def learning_rates(config: TrainConfig) -> dict[str, float]:
    """Return the learning rates by the names of their flags; a rate that is unset is the recipe's for the optimizer.

    scalar_lr is left out if the model has no scalars.

    Args:
        config: as `resolve_defaults` returns it.
    """
    recipe = routing.RECIPES[config.recipe]
    defaults = dict(zip(LEARNING_RATE_FLAGS, recipe.rates[config.optimizer], strict=True))
    if "on" not in (config.residual_scalars, config.smear, config.backout):
        del defaults["scalar_lr"]
    return {name: rate if is_unset(config, name) else getattr(config, name) for name, rate in defaults.items()}


def smear_rate(config: TrainConfig) -> float:
    """Return the learning rate of smear and backout with Adam, which has no flag."""
    return routing.SMEAR_RATE * (config.rate_scale if isinstance(config, FinetuneConfig | ReinforceConfig) else 1.0)


def model_config(config: TrainConfig) -> GPTConfig:
    """Return the model that the flags describe."""
    parts: dict[str, Any] = {name: getattr(config, name) for name in PARTS}
    return GPTConfig.from_depth(
        config.depth,
        vocab_size=config.vocab_size,
        sequence_len=config.max_seq_len,
        head_dim=config.head_dim,
        n_kv_head=None if is_unset(config, "n_kv_head") else config.n_kv_head,
        window_pattern=config.window_pattern,
        architecture=config.architecture,
        **{name: value == "on" if value in ("on", "off") else value for name, value in parts.items()},
    )


def size_ratio(config: TrainConfig, shape: GPTConfig) -> float:
    """Return P / P_ref of the scaling laws for a model of `shape`.

    The reference has the flags of the run, but as many key/value heads as query heads.
    """
    depth: dict[str, Any] = {"depth": scaling_laws.REFERENCE_DEPTH, "n_kv_head": UNSET}
    reference = model_config(dataclasses.replace(config, **depth, vocab_size=shape.vocab_size))
    return scaling_laws.scaling_params(shape) / scaling_laws.scaling_params(reference)


def with_batch(config: C, shape: GPTConfig) -> C:
    """Return the config with its total_batch_size: if it is unset, that of the scaling law for a model of `shape`."""
    if not is_unset(config, "total_batch_size"):
        return config
    batch = scaling_laws.batch_size(size_ratio(config, shape), config.reference_batch_size)
    return dataclasses.replace(config, total_batch_size=batch)


def rate_factor(config: TrainConfig) -> float:
    """Return the factor by which the batch changes the learning rates; 1 without a reference batch."""
    if config.reference_batch_size == 0:
        return 1.0
    return scaling_laws.rate_factor(config.total_batch_size, config.reference_batch_size)


def matrix_weight_decay(config: TrainConfig, shape: GPTConfig) -> float:
    """Return the initial weight decay of Muon: that of the flags, times the factor of the scaling law."""
    if config.reference_batch_size == 0:
        return config.matrix_weight_decay
    ratio = size_ratio(config, shape)
    return config.matrix_weight_decay * scaling_laws.decay_factor(
        config.total_batch_size, config.reference_batch_size, ratio
    )
