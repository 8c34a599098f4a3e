"""A run on the disk: its flags, folder, checkpoints, log, results and pictures.

It may depend on `ops`, `runtime`, `model` and `data`.
"""
