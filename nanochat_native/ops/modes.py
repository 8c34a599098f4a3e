"""The modes of torch beyond a plain backward pass: torch.func transforms, forward-mode AD, higher derivatives.

Native kernels, and functions with a backward pass written by hand, support none of them. A caller asks here which one
is active, and then runs plain torch, which supports all of them, or raises an error.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

Argument = Tensor | float | None | Sequence[Tensor]

TRANSFORM = "torch.func transforms"
FORWARD = "forward-mode AD"
GRADIENT = "gradients"
SECOND = "second derivatives"


def _tensors(arguments: Sequence[Argument]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, Sequence):
            yield from argument


def beyond_backward(*arguments: Argument) -> str:
    """Return the active mode that needs more than a backward pass, "" if there is none.

    Within a transform the answer does not depend on the arguments: a captured tensor may be differentiated too. While
    torch.compile traces within forward-mode AD, every tensor counts as one with a tangent.

    Args:
        arguments: The arguments of the caller. Tensors and lists of tensors count, others are ignored.

    Returns:
        TRANSFORM within torch.func.grad, vmap, jvp and so on; FORWARD if an argument has a tangent; otherwise "".
    """
    if torch._C._are_functorch_transforms_active():
        return TRANSFORM
    if forward_ad._current_level < 0:
        return ""
    if torch.compiler.is_compiling() or any(forward_ad.unpack_dual(t).tangent is not None for t in _tensors(arguments)):
        return FORWARD
    return ""


def derivative(*arguments: Argument) -> str:
    """Return beyond_backward(), or GRADIENT if an argument requires a gradient while grad mode is on."""
    if mode := beyond_backward(*arguments):
        return mode
    return GRADIENT if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(arguments)) else ""


def out_of_place(*arguments: Argument) -> bool:
    """Return whether a function may not write into tensors: a derivative is recorded, or gradients are batched.

    The backward pass of torch.autograd.grad(is_grads_batched=True) runs on tensors for which torch has no operators in
    place, and outside of the transforms of torch.func.
    """
    if derivative(*arguments):
        return True
    if torch.compiler.is_compiling():
        return False
    return any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in _tensors(arguments))


def beyond_first_derivative(*grads: Tensor) -> str:
    """Return the mode that needs more than the result of a backward pass, given its incoming gradients, or ""."""
    # Grad mode is on during a backward pass only under create_graph=True.
    return beyond_backward(*grads) or (SECOND if torch.is_grad_enabled() else "")


def unsupported(mode: str) -> str:
    """Return, as a phrase, why no kernel runs in `mode`; "" for no mode."""
    return f"its kernel does not support {mode}" if mode else ""


_REFUSAL = {
    TRANSFORM: "does not support torch.func transforms; call it outside grad, vmap, jvp and the other transforms",
    FORWARD: "has no derivative, but a tensor has a forward-mode tangent; "
    "pass the primal (torch.autograd.forward_ad.unpack_dual)",
    GRADIENT: "has no derivative, but a tensor requires a gradient; call it under torch.no_grad()",
}


def refuse(op: str, *arguments: Argument) -> None:
    """Raise RuntimeError if `op`, which has no derivative, is called for a derivative or within a transform."""
    if mode := derivative(*arguments):
        raise RuntimeError(f"{op}: {_REFUSAL[mode]}")


def refuse_with(op: str, name: str, *arguments: Argument) -> None:
    """Raise ValueError if `op` is called for a derivative or within a transform although `name` is given."""
    if mode := derivative(*arguments):
        when = "when a tensor requires a gradient" if mode == GRADIENT else f"under {mode}"
        raise ValueError(f"{op}: {name} must be None {when}, got a tensor")
