"""A run on the disk: its config, folder, checkpoints, log, results and pictures.

It depends on `model`, `data`, `optim` and `runtime`.
"""
