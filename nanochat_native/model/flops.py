"""Counts of floating-point operations."""

from nanochat_native.model.config import GPTConfig


def flops_per_token(config: GPTConfig, num_params: int) -> int:
    """Return the floating-point operations of a training token, forward and backward pass together.

    nanochat's formula, after appendix B of PaLM, arXiv:2204.02311: 6 for each parameter that takes part in a product,
    which excludes embeddings and scalars, and 12 H D min(T, window) in each layer for attention. Causality is not taken
    into account: all scores are counted.

    Args:
        num_params: Parameters of the model, those of wte included.
    """
    spans = [config.sequence_len if window is None else min(window, config.sequence_len) for window in config.windows]
    factors = num_params - embedding_params(config) - scalar_params(config)
    return 6 * factors + 12 * config.n_embd * sum(spans)


def embedding_params(config: GPTConfig) -> int:
    """Return the number of parameters of wte and the value embeddings."""
    layers = sum(config.has_value_embedding(layer) for layer in range(config.n_layer))
    return config.padded_vocab_size * (config.n_embd + layers * config.n_kv_head * config.head_dim)


def scalar_params(config: GPTConfig) -> int:
    """Return the number of parameters that are scalars: of the residual stream, of smear and of backout."""
    return 2 * config.n_layer * config.residual_scalars + config.smear + config.backout
