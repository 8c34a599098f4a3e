"""torch's modes beyond a plain backward pass: torch.func transforms, forward-mode AD, derivatives of derivatives.

Kernels, and functions whose backward pass is written by hand, know none of them. A caller asks here which one is on,
and runs plain torch, which knows all of them, or refuses.
"""

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

Argument = Tensor | float | None | Sequence[Tensor]

TRANSFORM = "torch.func transforms"
FORWARD = "forward-mode AD"
GRADIENT = "gradients"


def _tensors(arguments: Sequence[Argument]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, Sequence):
            yield from argument


def beyond_backward(*arguments: Argument) -> str:
    """TRANSFORM within torch.func.grad, vmap, jvp and so on; FORWARD where one of `arguments`, tensors or lists of
    them, has a tangent; "" where all that can be asked for is a backward pass.

    Within a transform the answer does not depend on the arguments: what is captured may be differentiated too. While
    torch.compile traces within forward-mode AD, every tensor counts as one with a tangent.
    """
    if torch._C._are_functorch_transforms_active():
        return TRANSFORM
    if forward_ad._current_level < 0:
        return ""
    if torch.compiler.is_compiling() or any(forward_ad.unpack_dual(t).tangent is not None for t in _tensors(arguments)):
        return FORWARD
    return ""


def derivative(*arguments: Argument) -> str:
    """As beyond_backward; and GRADIENT where one of `arguments` requires a gradient while grad mode is on."""
    if mode := beyond_backward(*arguments):
        return mode
    return GRADIENT if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(arguments)) else ""


_REFUSAL = {
    TRANSFORM: "does not run under torch.func transforms; call it outside of grad, vmap, jvp and the others",
    FORWARD: "has no derivative, and a tensor has a tangent of forward-mode AD; "
    "give it the primal (torch.autograd.forward_ad.unpack_dual)",
    GRADIENT: "has no derivative, and a tensor requires a gradient; call it under torch.no_grad()",
}


def refuse(op: str, *arguments: Argument) -> None:
    """Raises RuntimeError when a derivative or a transform of `op`, which has none, is asked for."""
    if mode := derivative(*arguments):
        raise RuntimeError(f"{op}: {_REFUSAL[mode]}")


def refuse_beside(op: str, name: str, *arguments: Argument) -> None:
    """Raises ValueError when a derivative or a transform of `op` is asked for beside its argument `name`."""
    if mode := derivative(*arguments):
        asked = "and a gradient is asked for" if mode == GRADIENT else f"under {mode}"
        raise ValueError(f"{op}: {name} is given {asked}; takes one of the two")


warned: set[tuple[str, str, str]] = set()


@torch.compiler.assume_constant_result  # run while torch.compile traces: the warning survives, the graph is whole
def warn_twin_serves(op: str, kind: str, why: str) -> None:
    """Says once that plain torch serves `op` on devices of this kind, and why."""
    if (op, kind, why) not in warned:
        warned.add((op, kind, why))
        warnings.warn(f"nanochat_native: {op} on {kind} is served by plain torch: {why}", stacklevel=4)
