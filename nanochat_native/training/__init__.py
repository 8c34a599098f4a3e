"""The training loop and what drives it: sizing, checkpoints, diagnosis, reports, fine-tuning.

It may depend on everything but the experiments, the interchange formats and the benchmarks.
"""
