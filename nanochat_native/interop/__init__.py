"""Models in the formats of others: transformers and nanochat.

It depends on `model`, `data`, `runs`, `inference` and `runtime`.
"""
