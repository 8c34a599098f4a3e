"""The transformer: its shape, its forward pass, its decoder for generation, and its operation counts.

It may depend on `ops`.
"""

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.decoder import Decoder
from nanochat_native.model.gpt import GPT

__all__ = ["GPT", "Decoder", "GPTConfig"]
