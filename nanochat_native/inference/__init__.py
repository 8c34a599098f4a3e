"""Text generation: the engine for many requests, sampling, the chat session and the server.

It depends on `model`, `data` and `runtime`.
"""
