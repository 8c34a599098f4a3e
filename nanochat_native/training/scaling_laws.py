"""nanochat's scaling laws (July 2026): the length of a training, its batch, and the rates and weight decay that fit it.

They start from a reference, the model of 12 layers with the vocabulary and the parts of the model to train, for which
nanochat tuned its batch, rates and decay. P is the number of scaling_params of the model, P_ref that of the reference.
The tokens of a training are --target-param-data-ratio times P, so P / P_ref is also the ratio of their tokens, which
the laws use. nanochat rounds the tokens of the model, but not those of the reference, down to a whole number.
"""

import math

from nanochat_native.model.config import VALUE_GATE_CHANNELS, GPTConfig

REFERENCE_DEPTH = 12
BATCH_EXPONENT = 0.383  # of the tokens of the training: the Power Lines, arXiv:2505.13738


def scaling_params(shape: GPTConfig) -> int:
    """Return the parameters that the laws count: the matrices of the blocks and lm_head.

    Embeddings, value embeddings and scalars are left out. lm_head counts with its padded rows, as in nanochat.
    """
    width, kv_channels = shape.n_embd, shape.n_kv_head * shape.head_dim
    block = 2 * width * width + 2 * width * kv_channels + 8 * width * width
    gates = sum(shape.has_value_embedding(layer) for layer in range(shape.n_layer)) * shape.n_kv_head
    return shape.n_layer * block + gates * VALUE_GATE_CHANNELS + shape.padded_vocab_size * width


def batch_size(size_ratio: float, reference: int) -> int:
    """Return the tokens of an optimizer step, a power of 2: reference * (P / P_ref)^0.383, rounded in its exponent.

    Args:
        size_ratio: P / P_ref.
        reference: the batch of the reference model, in tokens; nanochat's is 2^19.
    """
    return int(2 ** round(math.log2(reference * size_ratio**BATCH_EXPONENT)))


def rate_factor(total_batch_size: int, reference: int) -> float:
    """Return the factor of the learning rates for a batch, in tokens: the square root of its share of `reference`."""
    return math.sqrt(total_batch_size / reference)


def decay_factor(total_batch_size: int, reference: int, size_ratio: float) -> float:
    """Return the factor of Muon's weight decay for a batch, in tokens, and a model.

    The product of rate, decay and steps is then that of the reference model (arXiv:2405.13698): with the rates of
    rate_factor, the decay is multiplied by sqrt(batch / reference) P_ref / P.
    """
    return math.sqrt(total_batch_size / reference) / size_ratio
