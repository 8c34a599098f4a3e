"""The memory of a training step, in bytes by part, predicted and measured.

During a step the activations accumulate in the forward pass. The backward pass frees them and creates the gradients.
The optimizer then needs memory of its own. The prediction counts the live tensors at each point that may be the peak
(`snapshots`), and the largest snapshot is the peak. `measure` runs real steps and asks torch's allocator. In bfloat16
on a CPU the measurement includes scratch memory of torch's library, whose size depends on the instruction set.
`library_scratch` bounds it: a measured peak lies between the predicted peak and the sum of both.
"""

from nanochat_native.lab.memory.measurement import Measured, Step, measure
from nanochat_native.lab.memory.options import Options, sized
from nanochat_native.lab.memory.prediction import (
    activation_bytes,
    kernel_scratch,
    largest_batch,
    library_scratch,
    peak,
    predict,
    snapshots,
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
    "peak",
    "predict",
    "sized",
    "snapshots",
    "static_bytes",
]
