"""Models in the formats of other programs: transformers (import and export) and nanochat (import).

It depends on `model`, `data`, `runs`, `inference` and `runtime`.
"""
