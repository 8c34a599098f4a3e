"""Registers fakes (results without data) and gradients for the operators that python/schema.cpp declares."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat_native.ops import backends


def register(
    name: str,
    fake: Callable[..., Any],
    gradient: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Register the fake of native operator `name`, and its gradient if it has one.

    Does nothing if the native module cannot be used, because there is no such operator then.
    """
    if backends.load_error:
        return
    torch.library.register_fake(f"nanochat_native::{name}", fake)
    if gradient is not None:
        torch.library.register_autograd(f"nanochat_native::{name}", gradient, setup_context=setup_context)


def returns_nothing(*args: Any, **options: Any) -> None:
    """Do nothing: the fake of an operator that only updates its arguments."""


def number_and_tensor(value: Any, placeholder: float) -> tuple[Any, Tensor | None]:
    """Return the two arguments that a schema has for a number that may be in a tensor.

    A schema takes a number, and a tensor that replaces it. With a tensor, the number is `placeholder`.
    """
    return (placeholder, value) if isinstance(value, Tensor) else (value, None)
