import pytest
from backends import BACKENDS, use

from nanochat_native.inference import engine as engine_module

READ_LOGITS = engine_module.read_logits


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use(request.param):
        yield request.param


@pytest.fixture
def script(monkeypatch):
    """Sets the tokens that the model of an engine with one running request draws, if its temperature is 0.

    Returns the list of the tokens whose logits are read.
    """

    def begin(engine, tokens):
        drawn, given = list(tokens), []
        extend = engine._decoder.extend

        def record(slots, tokens, starts, *, with_logits):
            given.extend(row[-1] for row in tokens if with_logits)
            return extend(slots, tokens, starts, with_logits=with_logits)

        def likeliest(logits, whole):
            top, own, logits = READ_LOGITS(logits, whole)
            if engine.idle:  # another engine decodes
                return top, own, logits
            (request,) = engine.running.values()
            draws = request._filled >= len(request.prompt) and not request._results
            return top, [drawn.pop(0) if draws else 0], logits

        monkeypatch.setattr(engine_module, "read_logits", likeliest)
        monkeypatch.setattr(engine._decoder, "extend", record)
        return given

    return begin
