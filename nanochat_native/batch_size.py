"""python -m nanochat_native.batch_size: the gradient noise scale, and what it says of the batch.

"An Empirical Model of Large-Batch Training" (McCandlish, Kaplan, Amodei, 2018, arXiv:1812.06162), appendix A: of the
gradient g of b sequences, E |g|^2 = |G|^2 + S / b, with the true gradient G and the sum S of the variances of one
sequence's gradient. Two batch sizes give both, and the simple noise scale is S / |G|^2 sequences.
"""

import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.lab.noise_scale import run
from nanochat_native.runtime import command


def main(args: Sequence[str] | None = None) -> int:
    """Measures as `args` say, sys.argv's by default. Returns the exit code: 1 where training diverged."""
    return command.run_reporting(run, args)


if __name__ == "__main__":
    sys.exit(main())
