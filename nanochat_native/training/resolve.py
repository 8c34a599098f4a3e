"""Values that follow from the flags: the shape of the model, the learning rates."""

from __future__ import annotations

from nanochat_native.model.config import GPTConfig
from nanochat_native.optim import routing
from nanochat_native.runs.config import LEARNING_RATE_FLAGS, TrainConfig
from nanochat_native.runtime.flags import UNSET


def learning_rates(config: TrainConfig) -> dict[str, float]:
    """Return the learning rates by the names of their flags; a rate that is not given is the optimizer's default."""
    defaults = dict(zip(LEARNING_RATE_FLAGS, routing.DEFAULT_LEARNING_RATES[config.optimizer], strict=True))
    given = {name: getattr(config, name) for name in LEARNING_RATE_FLAGS}
    return {name: defaults[name] if rate == UNSET else rate for name, rate in given.items()}


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The model that the flags describe."""
    return GPTConfig.from_depth(
        config.depth,
        vocab_size=vocab_size,
        sequence_len=config.max_seq_len,
        head_dim=config.head_dim,
        n_kv_head=None if config.n_kv_head == UNSET else config.n_kv_head,
        window_pattern=config.window_pattern,
    )
