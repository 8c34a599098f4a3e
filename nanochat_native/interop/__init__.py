"""Models in the formats of other programs, transformers and nanochat: import and export.

It may depend on `ops`, `runtime`, `model`, `data`, `runs` and `inference`.
"""
