"""Small models with random weights."""

import torch

from nanochat_native.model.gpt import GPT


def build(config, seed=0):
    """Return a model whose outputs depend on all of its weights: those that start at zero are random too."""
    model = GPT(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                parameter.normal_(0, 0.2, generator=generator)
            elif "gate" in name or "lambda" in name:
                parameter.uniform_(0.3, 1.2, generator=generator)
    return model
