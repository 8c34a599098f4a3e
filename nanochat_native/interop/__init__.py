"""Models in the formats of other programs: transformers (import and export) and nanochat (import).

It may depend on `ops`, `runtime`, `model`, `data`, `runs` and `inference`.
"""
