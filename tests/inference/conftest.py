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

    Returns the list of the tokens that the model is given.
    """

    def begin(engine, tokens):
        drawn, given = list(tokens), []
        decode = engine._decoder.decode

        def record(slots, inputs, positions):
            given.extend(inputs)
            return decode(slots, inputs, positions)

        def likeliest(logits, whole):
            top, own, logits = READ_LOGITS(logits, whole)
            if engine.idle:  # another engine decodes
                return top, own, logits
            (request,) = engine.running.values()
            draws = request._filled + 1 >= len(request.prompt) and not request._results
            return top, [drawn.pop(0) if draws else 0], logits

        monkeypatch.setattr(engine_module, "read_logits", likeliest)
        monkeypatch.setattr(engine._decoder, "decode", record)
        return given

    return begin
