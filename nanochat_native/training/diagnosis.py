"""Numerical health of a run, layer by layer, for train --diagnose: its gradients, updates and activations.

A layer is a block of the transformer ("h.0"), wte, lm_head, a value embedding, or the scalars of a kind. Quantities, as
"<quantity>/<layer>":

    gradient_norm         Euclidean norm of the layer's gradient, averaged over the ranks, before clipping
    update_norm           Euclidean norm of the change of its weights in the step
    update_to_weight      update_norm divided by the norm of its weights
    orthogonality_error   |O O^T - 1| / sqrt(r), Frobenius, for the worst update O of Muon, r its shorter side.
                          Newton-Schulz's quintic takes singular values to 0.7 to 1.2, and the smallest less far:
                          0.3 is good, and 0.5 is usual for square matrices. NorMuon's updates are not meant to be
                          orthogonal. With weights sent in bfloat16, the error includes their rounding
    resid_lambda, x0_lambda, smear_lambda, backout_lambda
                          the model's scalars after the step, where it has them
    attention_logit       largest |q . k| scale of a query and a key that it sees; QK-norm bounds it by sqrt(head_dim)
                          times the square of --qk-scale
    dead_units            share of the MLP's hidden units that are 0 on every token

The last two are measured on a fixed piece of the validation text.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.model.gpt import GPT, MLP, Attention
from nanochat_native.ops.dtypes import widest_dtype
from nanochat_native.optim import Muon
from nanochat_native.optim.base import Optimizer
from nanochat_native.optim.muon import split_heads
from nanochat_native.runtime import hardware
from nanochat_native.runtime.distributed import World

ROWS = 2  # sequences of the validation text on which activations are measured


def layer_of(name: str) -> str:
    """Return the layer of a parameter: transformer.h.0.attn.c_q.weight -> h.0; transformer.wte.weight -> wte."""
    parts = name.removeprefix("transformer.").split(".")
    return ".".join(parts[:2]) if parts[0] == "h" else parts[0]


class Diagnosis:
    """Measures a step of training: begin() before the update, finish() after it. It changes nothing in the run.

    Between the two calls it holds a copy of the weights. `count` steps have been measured, in `seconds`.
    """

    def __init__(self, model: GPT, optimizers: Sequence[torch.optim.Optimizer], world: World) -> None:
        self.model, self.optimizers, self.world = model, optimizers, world
        self.seconds, self.count = 0.0, 0
        self._before: dict[str, Tensor] = {}
        self._found: dict[str, float] = {}

    @torch.no_grad()
    def begin(self, norm: float, max_norm: float) -> None:
        """Measure the gradients of a step, on all ranks. An exception on one rank is a RankError on all.

        norm: of all gradients before they were clipped to max_norm.
        """
        start = self._now()
        unclipped = max(1.0, norm / max_norm)
        self._found = {}
        try:
            own = self.world.run_collectively(self._measure_gradients, Exception)
        except Exception:
            self._before = {}
            raise
        everyone = self.world.all_gather_object(own)
        for layer in dict.fromkeys(layer_of(name) for name, _ in self.model.named_parameters()):
            square = sum(squares.get(layer, 0.0) for squares in everyone)
            self._found[f"gradient_norm/{layer}"] = math.sqrt(square) * unclipped
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def finish(self, probe: Tensor) -> dict[str, float]:
        """Return all quantities of the step, on rank 0 alone. probe: (rows, T) int64, for the activations."""
        start = self._now()
        try:
            if self.world.is_rank0:
                self._found |= self._updates()
                self._found |= activations(self.model, probe)
        finally:
            self._before = {}
        self.seconds += time.perf_counter() - start
        self.count += 1
        return self._found

    def _now(self) -> float:
        """Return the time after synchronizing the device."""
        hardware.synchronize(self.model.wte.weight.device)
        return time.perf_counter()

    def _measure_gradients(self) -> dict[str, float]:
        """Return squared norms, by layer, of the gradients of this rank's part of the update. Rank 0 copies the
        weights."""
        if self.world.is_rank0:
            self._before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        own: dict[str, Any] = defaultdict(float)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if isinstance(optimizer, Optimizer):
                    pairs = [(piece.parameter, piece.gradient) for piece in optimizer.local_pieces(group)]
                else:
                    pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
                for parameter, gradient in pairs:
                    own[layer_of(names[parameter])] += _square(gradient)
        return {layer: float(square) for layer, square in own.items()}

    def _updates(self) -> dict[str, float]:
        moved: dict[str, Any] = defaultdict(float)
        weights: dict[str, Any] = defaultdict(float)
        for name, parameter in self.model.named_parameters():
            before = self._before[name]
            moved[layer_of(name)] += _square(parameter - before)
            weights[layer_of(name)] += _square(before)
        found = {}
        for layer in moved:
            update, weight = math.sqrt(moved[layer]), math.sqrt(weights[layer])
            found[f"update_norm/{layer}"] = update
            found[f"update_to_weight/{layer}"] = update / weight if weight else 0.0
        for name, error in self._orthogonality():
            key = f"orthogonality_error/{layer_of(name)}"
            found[key] = max(error, found.get(key, 0.0))
        return found | scalars(self.model)

    def _orthogonality(self) -> Iterable[tuple[str, float]]:
        parameters = dict(self.model.named_parameters())
        groups = [group for each in self.optimizers if isinstance(each, Muon) for group in each.param_groups]
        for group in groups:
            if not group["lr"]:
                continue
            for name in group["param_names"]:
                before = self._before[name]
                update = (before - parameters[name]) / group["lr"]
                rows, columns = split_heads(before[None], group["heads"], group["head_axis"]).shape[-2:]
                factor = max(1.0, rows / columns) ** 0.5 if group.get("aspect_factor", True) else 1.0
                decay = before * group["weight_decay"] * (factor if group.get("scale_decay") else 1.0)
                if group["cautious"]:  # Muon decays only where update and weight have the same sign
                    decay = decay * (update * before > 0)
                blocks = split_heads((update - decay)[None], group["heads"], group["head_axis"])
                yield name, orthogonality_error(blocks / factor)


@torch.no_grad()
def scalars(model: GPT) -> dict[str, float]:
    """Return the scalars that the model has: of each block, of smear and of backout."""
    found: dict[str, float] = {}
    for quantity in ("resid_lambda", "x0_lambda"):
        values = getattr(model, f"{quantity}s", None)
        if values is not None:
            found |= {f"{quantity}/h.{layer}": value for layer, value in enumerate(values.tolist())}
    for part in ("smear", "backout"):
        value = getattr(model, f"{part}_lambda", None)
        if value is not None:
            found[f"{part}_lambda/{part}"] = value.item()
    return found


def orthogonality_error(matrices: Tensor) -> float:
    """Return |O O^T - 1| / sqrt(r), Frobenius, for the worst of (..., rows, columns), r the shorter side."""
    if matrices.size(-2) > matrices.size(-1):
        matrices = matrices.mT
    gram = matrices @ matrices.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return float(torch.linalg.matrix_norm(gram).max()) / matrices.size(-2) ** 0.5


@torch.no_grad()
def activations(model: GPT, idx: Tensor) -> dict[str, float]:
    """Return attention_logit and dead_units of every block, from a forward pass of idx (rows, T) int64."""
    found: dict[str, float] = {}
    hooks = []
    for number, block in enumerate(model.blocks):

        def measure_attention(module: Attention, inputs: Any, layer: str = f"h.{number}") -> None:
            found[f"attention_logit/{layer}"] = largest_logit(module, *inputs[:3])

        def measure_mlp(module: MLP, inputs: Any, layer: str = f"h.{number}") -> None:
            hidden = ops.linear(inputs[0], module.c_fc.weight)
            found[f"dead_units/{layer}"] = 1 - float((hidden > 0).flatten(0, -2).any(0).float().mean())

        hooks += [block.attn.register_forward_pre_hook(measure_attention)]
        hooks += [block.mlp.register_forward_pre_hook(measure_mlp)]
    try:
        model(idx, last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def largest_logit(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> float:
    """Return max |q . k| / sqrt(head_dim) over all queries and the keys that they see, for x (B, T, C)."""
    q, k, _ = attention.project(x, cos, sin)
    distance = torch.arange(q.size(1), device=q.device)[:, None] - torch.arange(k.size(1), device=q.device)
    seen = distance >= 0 if attention.window is None else (distance >= 0) & (distance <= attention.window)
    group = q.size(2) // k.size(2)
    largest = torch.zeros((), device=q.device)
    for row in range(q.size(0)):
        for head in range(q.size(2)):  # one (T, T) at a time
            logits = q[row, :, head].float() @ k[row, :, head // group].float().mT
            largest = torch.maximum(largest, (logits.abs_() * seen).max())
    return float(largest) / math.sqrt(attention.head_dim)


def _square(tensor: Tensor) -> float:
    """Return the squared norm, summed by rows: torch's float32 norm of a whole tensor errs by 1e-4 on a CPU."""
    norms = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
    return float(norms.to(widest_dtype(norms.device)).square().sum())
