"""Quality measures of a trained model: bits per byte, the CORE score, chat tasks, lm-evaluation-harness.

It may depend on `ops`, `runtime`, `model`, `data`, `runs` and `inference`.
"""

from nanochat_native.evaluation.bits_per_byte import Evaluation, measure_text

__all__ = ["Evaluation", "measure_text"]
