"""Benchmarks: `python -m nanochat_native.bench`.

Each case is checked for correctness first. It is then timed side by side with the PyTorch call that it replaces.
"""
