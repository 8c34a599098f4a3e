"""python -m nanochat_native.lm_eval_adapter: run EleutherAI's lm-evaluation-harness on a trained model.

    python -m nanochat_native.lm_eval_adapter run --model nanochat_native --model_args checkpoint=runs/d4 --tasks piqa

This is the harness's own command line. Importing this module registers the model. It requires an extra:
pip install 'nanochat-native[eval]'.
"""

from nanochat_native.evaluation.lm_eval_model import NanochatLM

__all__ = ["NanochatLM"]

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
