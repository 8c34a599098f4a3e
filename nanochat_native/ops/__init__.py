"""The operators: each is one public call that checks its arguments, then runs its native kernel or its reference.

It may depend on no other package of nanochat_native, and it alone touches the native module `_C`. Each operator's call,
reference, fake and gradient stand in one module, named as in csrc/; `backends` chooses what runs, `checks` has the rule
for checking arguments, and `reference` lists every operator in plain torch. `weight_copies` keeps the bfloat16
copies of weights.

Shape letters: B batch, Tq queries, Tk keys, H query heads, Hkv key/value heads, D head size,
               N rows (tokens), C channels, V vocabulary, (M, K) one matrix.
"""

from nanochat_native.ops.adamw import adamw_
from nanochat_native.ops.attention import attention
from nanochat_native.ops.backends import (
    OPERATORS,
    backend,
    build_info,
    check_environment,
    cuda_instruction_set,
    cuda_versions,
    instruction_set,
    serves,
    use_backend,
)
from nanochat_native.ops.cached_forward import cached_forward_
from nanochat_native.ops.linear import linear, linear_backward
from nanochat_native.ops.linear_cross_entropy import linear_cross_entropy
from nanochat_native.ops.mix_rms_norm import mix_rms_norm
from nanochat_native.ops.modes import beyond_backward
from nanochat_native.ops.muon import muon_momentum_, muon_update_, newton_schulz_update_, normuon_update_
from nanochat_native.ops.newton_schulz import newton_schulz
from nanochat_native.ops.relu_squared import (
    linear_backward_relu_squared,
    linear_relu_squared,
    relu_squared,
    relu_squared_,
    relu_squared_backward_,
)
from nanochat_native.ops.rms_norm import add_rms_norm, embedding_rms_norm, rms_norm
from nanochat_native.ops.rotary_norm import rotary_norm
from nanochat_native.ops.smear import smear
from nanochat_native.ops.value_embedding import add_value_embedding, add_value_embedding_backward

__all__ = [
    "OPERATORS",
    "adamw_",
    "add_rms_norm",
    "add_value_embedding",
    "add_value_embedding_backward",
    "attention",
    "backend",
    "beyond_backward",
    "build_info",
    "cached_forward_",
    "check_environment",
    "cuda_instruction_set",
    "cuda_versions",
    "embedding_rms_norm",
    "instruction_set",
    "linear",
    "linear_backward",
    "linear_backward_relu_squared",
    "linear_cross_entropy",
    "linear_relu_squared",
    "mix_rms_norm",
    "muon_momentum_",
    "muon_update_",
    "newton_schulz",
    "newton_schulz_update_",
    "normuon_update_",
    "relu_squared",
    "relu_squared_",
    "relu_squared_backward_",
    "rms_norm",
    "rotary_norm",
    "serves",
    "smear",
    "use_backend",
]
