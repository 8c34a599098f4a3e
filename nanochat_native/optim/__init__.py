"""Muon and AdamW on the native operators, their routing, and gradient clipping."""

from nanochat_native.optim.adamw import AdamW
from nanochat_native.optim.clip import clip_grad_norm_
from nanochat_native.optim.muon import Muon
from nanochat_native.optim.routing import describe_routing, setup_optimizers

__all__ = ["AdamW", "Muon", "clip_grad_norm_", "describe_routing", "setup_optimizers"]
