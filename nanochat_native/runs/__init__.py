"""A run on the disk: its flags, folder, checkpoints, log, results and pictures.

It depends on `model`, `data` and `runtime`.
"""
