"""Muon and AdamW on the native operators, the routing of parameters to them, gradient clipping, and schedules.

It may depend on `ops`.
"""

from nanochat_native.optim.adamw import AdamW
from nanochat_native.optim.base import buckets_of
from nanochat_native.optim.buckets import overlap_backward
from nanochat_native.optim.clip import clip_grad_norm_, clip_reduced_
from nanochat_native.optim.muon import Muon
from nanochat_native.optim.routing import describe_routing, setup_optimizers

__all__ = [
    "AdamW",
    "Muon",
    "buckets_of",
    "clip_grad_norm_",
    "clip_reduced_",
    "describe_routing",
    "overlap_backward",
    "setup_optimizers",
]
