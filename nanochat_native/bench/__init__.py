"""Benchmarks: `python -m nanochat_native.bench`.

Every case is checked for correctness first, then timed side by side with the torch call that one would write
otherwise, in one run.
"""
