"""Benchmarks: `python -m nanochat_native.bench`.

Each case is checked for correctness first. It is then timed side by side with the PyTorch call that it replaces.

It may depend on `ops`, `runtime`, `model`, `optim`, `data`, `inference`, `interop` and `runs`.
"""
