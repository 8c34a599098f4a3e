"""nanochat-native: train nanochat-style GPTs on hand-written CPU and CUDA kernels."""

__version__ = "0.1.0"
