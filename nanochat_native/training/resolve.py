"""Values that follow from the flags by rules of the model and the optimizers: the model's shape, the learning rates."""

from nanochat_native.model.config import GPTConfig
from nanochat_native.optim import routing
from nanochat_native.runs.config import LEARNING_RATE_FLAGS, TrainConfig
from nanochat_native.runtime.flags import is_unset


def learning_rates(config: TrainConfig) -> dict[str, float]:
    """Return the learning rates by the names of their flags; a rate that is unset is the optimizer's default."""
    defaults = dict(zip(LEARNING_RATE_FLAGS, routing.DEFAULT_LEARNING_RATES[config.optimizer], strict=True))
    return {name: rate if is_unset(config, name) else getattr(config, name) for name, rate in defaults.items()}


def model_config(config: TrainConfig) -> GPTConfig:
    """Return the model that the flags describe."""
    return GPTConfig.from_depth(
        config.depth,
        vocab_size=config.vocab_size,
        sequence_len=config.max_seq_len,
        head_dim=config.head_dim,
        n_kv_head=None if is_unset(config, "n_kv_head") else config.n_kv_head,
        window_pattern=config.window_pattern,
    )
