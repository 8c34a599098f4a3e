"""What a training step holds in memory, bytes by part, predicted and measured.

A step's memory rises and falls: activations pile up in the forward pass and go in the backward pass, while gradients
come; then the optimizer needs space of its own. A prediction counts the tensors that are alive at the moments that may
be the highest (`moments`), and the peak is the highest of them. `measure` runs real steps and asks torch's allocator.
In bfloat16 on a CPU that counts scratch of torch's library too, as much as the processor's instruction set wants:
`library_scratch` bounds it, and a measured peak lies between the predicted one and the sum of both.
"""

from nanochat_native.lab.memory.measurement import Measured, Step, measure
from nanochat_native.lab.memory.options import Options, sized
from nanochat_native.lab.memory.prediction import (
    activation_bytes,
    kernel_scratch,
    largest_batch,
    library_scratch,
    moments,
    peak,
    predict,
    static_bytes,
)

__all__ = [
    "Measured",
    "Options",
    "Step",
    "activation_bytes",
    "kernel_scratch",
    "largest_batch",
    "library_scratch",
    "measure",
    "moments",
    "peak",
    "predict",
    "sized",
    "static_bytes",
]
