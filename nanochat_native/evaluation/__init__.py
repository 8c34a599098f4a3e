"""Quality measures of a trained model: bits per byte, the CORE score, lm-evaluation-harness.

It depends on `model`, `data`, `runs`, `inference` and `runtime`.
"""
