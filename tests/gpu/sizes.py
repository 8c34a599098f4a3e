"""The sizes of the GPU tests: those for a GPU, or small ones for a GPU that is emulated on the CPU.

The environment variable NANOCHAT_TEST_SIZES=small chooses the small ones. Every test function then runs at least once,
and all of them take about a minute on the pretend device of tests/pretend_cuda.
"""

import os

SMALL = os.environ.get("NANOCHAT_TEST_SIZES") == "small"


def pick(usual, small):
    """Return the first argument, or the second one where sizes are small."""
    return small if SMALL else usual
