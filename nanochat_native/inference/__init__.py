"""Text generation: the engine for many requests, sampling, the chat session and the server.

It may depend on `ops`, `runtime`, `model` and `data`.
"""

from nanochat_native.inference.engine import Engine, Output, Request, complete
from nanochat_native.inference.sampling import Sampling, Scored

__all__ = ["Engine", "Output", "Request", "Sampling", "Scored", "complete"]
