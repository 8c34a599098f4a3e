"""The backends that a test runs on; the native one is skipped, with the reason, where its module is not built."""

import pytest

from nanochat_native import ops

BACKENDS = ("torch", "native")


def use(name):
    """ops.use_backend, or a skip."""
    try:
        return ops.use_backend(name)
    except RuntimeError as error:
        pytest.skip(str(error))
