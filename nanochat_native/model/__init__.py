"""The transformer: its shape, its forward pass, its decoder for generation, its operation counts, and
the weights of its attention.

It may depend on `ops`.
"""

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.decoder import Decoder
from nanochat_native.model.gpt import GPT
from nanochat_native.model.weights_of_attention import attention_weights

__all__ = ["GPT", "Decoder", "GPTConfig", "attention_weights"]
