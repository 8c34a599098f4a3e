"""Experiments: range test, comparison of optimizers, gradient noise scale, memory.

It drives `training`; nothing but commands depends on it.
"""
