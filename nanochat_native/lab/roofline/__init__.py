"""The least time of a training step on a GPU, from what its operators move and compute.

The real model and the real optimizers run on tensors without memory, and each operator that would start a kernel is
recorded with its bytes and its floating-point operations. The time of a kernel is the largest of three: operations /
rate, bytes / bandwidth, and the time of a launch. No GPU is needed.
"""

from nanochat_native.lab.roofline.analysis import Machine, UncountedError, analyse, floor_bytes
from nanochat_native.lab.roofline.recording import Step, record

__all__ = ["Machine", "Step", "UncountedError", "analyse", "floor_bytes", "record"]
