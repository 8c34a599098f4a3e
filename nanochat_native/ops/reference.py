"""Every operator in plain torch: the torch backend, and what the native kernels are tested against.

Each has the signature and semantics of its operator, without the checks of the arguments, and is defined in the
operator's module. attention, the norms, linear, linear_cross_entropy, newton_schulz and relu_squared are
differentiable in all autograd modes. bfloat16 and float16 are computed in float32 and rounded once at the end; within
torch.autocast, products have its type.
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
from nanochat_native.ops.mix_rms_norm import reference_mix_rms_norm as mix_rms_norm
from nanochat_native.ops.muon import reference_muon_momentum_ as muon_momentum_
from nanochat_native.ops.muon import reference_muon_update_ as muon_update_
from nanochat_native.ops.muon import reference_newton_schulz_update_ as newton_schulz_update_
from nanochat_native.ops.muon import reference_normuon_update_ as normuon_update_
from nanochat_native.ops.newton_schulz import COEFFICIENTS, newton_schulz_schedule
from nanochat_native.ops.newton_schulz import reference_newton_schulz as newton_schulz
from nanochat_native.ops.relu_squared import reference_linear_backward_relu_squared as linear_backward_relu_squared
from nanochat_native.ops.relu_squared import reference_linear_relu_squared as linear_relu_squared
from nanochat_native.ops.relu_squared import reference_relu_squared as relu_squared
from nanochat_native.ops.relu_squared import reference_relu_squared_ as relu_squared_
from nanochat_native.ops.relu_squared import reference_relu_squared_backward as relu_squared_backward
from nanochat_native.ops.relu_squared import reference_relu_squared_backward_ as relu_squared_backward_
from nanochat_native.ops.rms_norm import reference_add_rms_norm as add_rms_norm
from nanochat_native.ops.rms_norm import reference_embedding_rms_norm as embedding_rms_norm
from nanochat_native.ops.rms_norm import reference_rms_norm as rms_norm
from nanochat_native.ops.rotary_norm import reference_rotary_norm as rotary_norm
from nanochat_native.ops.smear import reference_smear as smear
from nanochat_native.ops.value_embedding import reference_add_value_embedding as add_value_embedding
from nanochat_native.ops.value_embedding import reference_add_value_embedding_backward as add_value_embedding_backward

__all__ = [
    "COEFFICIENTS",
    "adamw_",
    "add_rms_norm",
    "add_value_embedding",
    "add_value_embedding_backward",
    "attention",
    "attention_forward",
    "attention_mask",
    "cached_forward_",
    "compute_dtype",
    "embedding_rms_norm",
    "linear",
    "linear_backward",
    "linear_backward_relu_squared",
    "linear_cross_entropy",
    "linear_relu_squared",
    "mix_rms_norm",
    "muon_momentum_",
    "muon_update_",
    "newton_schulz",
    "newton_schulz_schedule",
    "newton_schulz_update_",
    "normuon_update_",
    "relu_squared",
    "relu_squared_",
    "relu_squared_backward",
    "relu_squared_backward_",
    "rms_norm",
    "rotary_norm",
    "smear",
]
