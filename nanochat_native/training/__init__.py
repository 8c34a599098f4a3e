"""The training loop, its tasks (pretraining and fine-tuning), and its parts: checkpoints, sizes, diagnosis, reports.

It may depend on `ops`, `runtime`, `model`, `optim`, `data`, `runs`, `inference` and `evaluation`. It exports no names,
so that `training.sizing` can be imported without the trainer.
"""
