import pytest
import torch

from nanochat_native import ops

try:
    import hypothesis
except ImportError:  # on a bare GPU machine, whose tests do without
    pass
else:
    # The same examples on every run, and no deadline: other work shares the machine.
    hypothesis.settings.register_profile("default", derandomize=True, deadline=None, database=None, max_examples=40)
    hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from the same seed and leaves backend and number of threads as they were."""
    backend, threads = ops.backend(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    ops.use_backend(backend)
    torch.set_num_threads(threads)
