"""Demonstrations of appendix A: code and statements of the original guide, rebuilt in its form and run."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, TensorDataset

from nanochat_native import ops
from nanochat_native.demonstrations.optimizers import small_model
from nanochat_native.optim import setup_optimizers

Values = dict[str, Any]


def original_code(seed: int = 0) -> Values:
    """Run the faults of the original guide's last chapter, each in a form of our own with the same fault."""
    return {
        "loader": loader_shapes(),
        "gradcheck": gradcheck_of_ids(),
        "positions": order_of_earlier_tokens(seed),
        "leak": tensors_alive(),
        "sampler": sampler_without_epochs(),
        "random_targets": losses_on_random_targets(seed),
    }


def loader_shapes() -> Values:
    """Cut a batch of rows x length tokens into inputs and targets by dropping one token of the whole."""
    rows, length = 4, 8
    tokens = torch.arange(rows * length)
    try:
        tokens[:-1].view(rows, -1)
        message = "none"
    except RuntimeError as error:
        message = str(error)
    inputs = torch.arange(rows * length + 1)[:-1].view(rows, length)
    return {"error": message, "tokens_needed": rows * length + 1, "shape_with_them": list(inputs.shape)}


def gradcheck_of_ids() -> Values:
    """Check the gradient of an embedding with respect to token ids, and with respect to its weights."""
    ids = torch.randint(10, (2, 3), generator=torch.Generator().manual_seed(0))
    embedding = nn.Embedding(10, 4).double()
    try:
        torch.autograd.gradcheck(embedding, ids.double())
        message = "none"
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def of_weights(weight: Tensor) -> Tensor:
        return nn.functional.embedding(ids, weight)

    weights = embedding.weight.detach().clone().requires_grad_()
    return {"error_of_ids": message, "weights_pass": torch.autograd.gradcheck(of_weights, weights)}


def order_of_earlier_tokens(seed: int) -> Values:
    """Permute the tokens before the last in one layer of attention without positions, and with RoPE."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 8, 1, 16, generator=generator)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4, 7])
    angle = torch.arange(8.0)[:, None] / 10 ** (torch.arange(8.0) / 4)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotated(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)

    found = {}
    for name, place in (("without", lambda x: x), ("with_rope", rotated)):
        last = [ops.attention(place(y), place(y), y, causal=True)[:, -1] for y in (x, x[:, order])]
        found[f"change_{name}"] = float((last[0] - last[1]).abs().max())
    return found


def tensors_alive() -> Values:
    """Create tensors in a loop, keep losses with and without their graphs, and count what is still alive."""
    made = [weakref.ref(torch.zeros(100)) for _ in range(50)]
    weight = torch.ones(100, requires_grad=True)
    graphs, kept, plain = [], [], []
    for _ in range(50):
        middle = weight * 2
        graphs.append(weakref.ref(middle))
        kept.append(middle.square().sum())
    alive = sum(ref() is not None or loss.grad_fn is not None for ref, loss in zip(graphs, kept, strict=True))
    for _ in range(50):
        plain.append((weight * 2).square().sum().item())
    return {
        "created_in_a_loop": sum(ref() is not None for ref in made),
        "graphs_kept_by_losses": alive,
        "graphs_kept_by_items": sum(hasattr(value, "grad_fn") for value in plain),
        "of": 50,
    }


def sampler_without_epochs() -> Values:
    """Compare the order of two epochs of torch's DistributedSampler, with and without set_epoch."""
    data = TensorDataset(torch.arange(64))
    sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=2, rank=0, shuffle=True)
    first, second = list(sampler), list(sampler)
    sampler.set_epoch(1)
    return {"same_without_set_epoch": first == second, "same_with_set_epoch": first == list(sampler)}


def losses_on_random_targets(seed: int) -> Values:
    """Train on one batch with random targets: the loss falls although there is nothing to learn but the batch."""
    model = small_model(seed)
    optimizers = setup_optimizers(model)
    generator = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(512, (4, 64), generator=generator) for _ in range(2))
    other_ids, other_targets = (torch.randint(512, (4, 64), generator=generator) for _ in range(2))
    losses = []
    for _ in range(30):
        loss = model(ids, targets)
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        other = model(other_ids, other_targets).item()
    return {"first": losses[0], "last": losses[-1], "on_another_batch": other, "ln_vocabulary": math.log(512)}


def original_statements() -> Values:
    """Evaluate statements of the original guide that need a line each: mask, perplexity, autocast, decoding."""
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    i, j = torch.arange(4)[:, None], torch.arange(4)[None]
    inverted = torch.softmax(scores + torch.where(i < j, 0.0, -math.inf), dim=-1)
    right = torch.softmax(scores + torch.where(j <= i, 0.0, -math.inf), dim=-1)
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    nats = float(nn.functional.cross_entropy(logits, torch.arange(64)))
    return {
        "mask": {
            "inverted_last_row_is_nan": bool(inverted[-1].isnan().all()),
            "inverted_first_row_weight_on_itself": float(inverted[0, 0]),
            "right_rows_sum_to": float(right.sum(1).mean()),
            "right_first_row_weight_on_itself": float(right[0, 0]),
        },
        "perplexity": {
            "nats": nats,
            "bits": nats / math.log(2),
            "exp_of_nats": math.exp(nats),
            "two_to_the_bits": 2 ** (nats / math.log(2)),
            "two_to_the_nats": 2**nats,
        },
        "autocast": {"gradient_dtype": gradient_dtype_under_autocast()},
    }


def gradient_dtype_under_autocast() -> str:
    """Return the dtype in which the gradient of a product travels under autocast to bfloat16."""
    seen: list[torch.dtype] = []
    a, b = (torch.ones(4, 4, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = a @ b
    product.register_hook(lambda gradient: seen.append(gradient.dtype))
    product.float().sum().backward()
    return str(seen[0]).removeprefix("torch.")


DEMONSTRATIONS = {"original-code": original_code, "original-statements": original_statements}
