"""Counts of floating-point operations."""

from nanochat_native.model.config import GPTConfig


def flops_per_token(config: GPTConfig, num_params: int) -> int:
    """Return the floating-point operations of a training token, forward and backward pass together.

    nanochat's formula, after appendix B of PaLM, arXiv:2204.02311: 6 for each parameter outside wte, and
    12 H D min(T, window) in each layer for attention. Causality is not taken into account: all scores are counted.

    Args:
        num_params: Parameters of the model, those of wte included.
    """
    spans = [config.sequence_len if window is None else window for window in config.windows]
    return 6 * (num_params - config.vocab_size * config.n_embd) + 12 * config.n_embd * sum(spans)
