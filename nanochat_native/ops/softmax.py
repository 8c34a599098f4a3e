"""Softmax and log-sum-exp that the references differentiate in every mode of torch."""

from torch import Tensor

from nanochat_native.ops import modes


def logsumexp(x: Tensor) -> Tensor:
    """Return log(sum(exp(x))) over the last dimension, for rows with a finite number."""
    if modes.beyond_backward(x) != modes.FORWARD:
        return x.logsumexp(-1)
    # torch's own forward-mode rule overwrites what a backward pass through it needs (pytorch issue 162350).
    largest = x.detach().logsumexp(-1, keepdim=True)
    return (x - largest).exp().sum(-1).log() + largest[..., 0]


def softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last dimension, for rows with a finite number."""
    return x.softmax(-1) if modes.beyond_backward(x) != modes.FORWARD else (x - logsumexp(x)[..., None]).exp()
