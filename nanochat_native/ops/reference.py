"""Every operator in plain torch: the torch backend, and what the native kernels are tested against.

Each has the signature and semantics of its operator, without the checks of the arguments, and is defined in the
operator's module. attention, linear, linear_cross_entropy and newton_schulz are differentiable in all autograd modes.
bfloat16 and float16 are computed in float32 and rounded once at the end; within torch.autocast, products have its type.
"""

from nanochat_native.ops.adamw import reference_adamw_ as adamw_
from nanochat_native.ops.attention import attention_mask
from nanochat_native.ops.attention import reference_attention as attention
from nanochat_native.ops.attention import reference_attention_forward as attention_forward
from nanochat_native.ops.cached_forward import reference_cached_forward_ as cached_forward_
from nanochat_native.ops.dtypes import compute_dtype
from nanochat_native.ops.linear import reference_linear as linear
from nanochat_native.ops.linear import reference_linear_backward as linear_backward
from nanochat_native.ops.linear_cross_entropy import reference_linear_cross_entropy as linear_cross_entropy
from nanochat_native.ops.muon import reference_muon_momentum_ as muon_momentum_
from nanochat_native.ops.muon import reference_muon_update_ as muon_update_
from nanochat_native.ops.muon import reference_newton_schulz_update_ as newton_schulz_update_
from nanochat_native.ops.newton_schulz import COEFFICIENTS, newton_schulz_schedule
from nanochat_native.ops.newton_schulz import reference_newton_schulz as newton_schulz

__all__ = [
    "COEFFICIENTS",
    "adamw_",
    "attention",
    "attention_forward",
    "attention_mask",
    "cached_forward_",
    "compute_dtype",
    "linear",
    "linear_backward",
    "linear_cross_entropy",
    "muon_momentum_",
    "muon_update_",
    "newton_schulz",
    "newton_schulz_schedule",
    "newton_schulz_update_",
]
