"""Experiments: the range test, the comparison of optimizers, the gradient noise scale, the memory of a step.

It may depend on `ops`, `runtime`, `model`, `optim`, `data`, `runs`, `inference`, `evaluation` and `training`. Each
module has its own Options and run(), so the package exports no names.
"""
