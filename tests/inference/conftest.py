import pytest
from backends import BACKENDS, use


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use(request.param):
        yield request.param
