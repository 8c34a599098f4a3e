"""Experiments: the range test, the comparison of optimizers, the gradient noise scale, the memory of a step.

They drive `training`. Only commands depend on this package.
"""
