"""The training loop, its tasks (pretraining and fine-tuning), and its parts: checkpoints, sizes, diagnosis, reports.

It may depend on everything but the experiments, the interchange formats and the benchmarks.
"""
