"""Demonstrations of chapter 7: the gradient of the loss, and how to know that it is right."""

import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native import ops
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT, SOFTCAP
from nanochat_native.ops import reference
from nanochat_native.runs.saved_model import load_model

PROMPT, TARGET = "    for i in", " enumerate"
SHOWN = 9  # tokens
SHAPE = {"N": 256, "C": 64, "V": 1000}
VOCABULARIES = (2048, 8192, 32768)
HEAD = {"N": 4096, "C": 256}
CLOSE = 1e-5  # largest relative error of a result that is called close


def loss_gradient(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Show the logits of one real token, their probabilities, and the gradient of its loss.

    The derivative of -ln p_y by the logit z_i is p_i - 1 for i = y and p_i for the others. The softcap multiplies it by
    1 - (z_i / 15)^2.
    """
    model, tokenizer, _ = load_model(checkpoint, warn=lambda message: None)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(PROMPT)]])
    target = tokenizer.encode(TARGET)[0]
    with torch.no_grad():
        logits = model(ids, last_only=True)[0, 0].double()
    logits.requires_grad_()
    loss = F.cross_entropy(logits[None], torch.tensor([target]))
    loss.backward()
    assert logits.grad is not None
    probabilities = logits.detach().softmax(0)
    by_hand = probabilities - F.one_hot(torch.tensor(target), len(probabilities))
    likeliest = [int(i) for i in probabilities.topk(SHOWN).indices]
    shown = likeliest if target in likeliest else [*likeliest[:-1], target]
    return {
        "prompt": PROMPT,
        "target": tokenizer.decode([target]),
        "loss": float(loss.detach()),
        "tokens": [tokenizer.decode([i]) for i in shown],
        "is_target": [i == target for i in shown],
        "logits": [float(logits.detach()[i]) for i in shown],
        "probabilities": [float(probabilities[i]) for i in shown],
        "gradient": [float(by_hand[i]) for i in shown],
        "softcap_factor": [float(1 - (logits.detach()[i] / SOFTCAP) ** 2) for i in shown],
        "target_probability": float(probabilities[target]),
        "target_gradient": float(by_hand[target]),
        "sum": float(by_hand.sum()),
        "norm": float(by_hand.norm()),
        "difference_from_autograd": float((logits.grad - by_hand).abs().max()),
        "others_share": float(by_hand[by_hand > 0].topk(len(shown)).values.sum() / by_hand[by_hand > 0].sum()),
    }


def gradient_by_hand(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = SOFTCAP) -> tuple[Tensor, Tensor]:
    """Return the gradients of the mean loss by x (N, C) and weight (V, C), by the formula of chapter 7."""
    capped = softcap * torch.tanh(x @ weight.T / softcap)
    dz = (capped.softmax(-1) - F.one_hot(targets, len(weight))) / len(x)
    dz = dz * (1 - (capped / softcap) ** 2)
    return dz @ weight, dz.T @ x


def _head(dtype: torch.dtype, N: int = 256, C: int = 64, V: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Return activations, weights and targets, the same numbers in every type up to rounding."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, C), (V, C)))
    return x.to(dtype), (weight / 4).to(dtype), torch.randint(V, (N,), generator=generator)


def _by_autograd(loss: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    x, weight, targets = _head(dtype, **SHAPE)
    found = loss(x.requires_grad_(), weight.requires_grad_(), targets)
    dx, dweight = torch.autograd.grad(found, (x, weight))
    return {"loss": found.detach(), "dx": dx, "dweight": dweight}


def gradient_cmp() -> dict[str, Any]:
    """Compare ways to compute the loss of the head and its gradients with the exact ones, in the manner of a test.

    "exact": the same bits; "close": a relative error below 1e-5; otherwise "off". The error is |found - exact| divided
    by |exact|, in Frobenius norms. The exact values are those of the reference in float64.
    """
    exact = _by_autograd(reference.linear_cross_entropy, torch.float64)
    x, weight, targets = _head(torch.float64, **SHAPE)
    dx, dweight = gradient_by_hand(x, weight, targets)

    def without_softcap_slope(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        capped = SOFTCAP * torch.tanh(x @ weight.T / SOFTCAP)
        dz = (capped.softmax(-1) - F.one_hot(targets, len(weight))) / len(x)
        return dz @ weight, dz.T @ x

    wrong = without_softcap_slope(x, weight, targets)
    ways = {
        "by_hand_float64": {"dx": dx, "dweight": dweight},
        "kernel_float64": _by_autograd(ops.linear_cross_entropy, torch.float64),
        "reference_float32": _by_autograd(reference.linear_cross_entropy, torch.float32),
        "kernel_float32": _by_autograd(ops.linear_cross_entropy, torch.float32),
        "kernel_bfloat16": _by_autograd(ops.linear_cross_entropy, torch.bfloat16),
        "softcap_slope_forgotten": {"dx": wrong[0], "dweight": wrong[1]},
    }
    return {way: {name: cmp(value, exact[name]) for name, value in found.items()} for way, found in ways.items()} | {
        "shape": SHAPE
    }


def cmp(found: Tensor, exact: Tensor) -> dict[str, Any]:
    """Return how two tensors agree: "exact", "close" or "off", with the relative error and the largest difference."""
    difference = found.double() - exact.double()
    error = float(difference.norm() / exact.double().norm())
    same = found.dtype == exact.dtype and torch.equal(found, exact)
    verdict = "exact" if same else "close" if error < CLOSE else "off"
    return {"verdict": verdict, "error": error, "largest": float(difference.abs().max())}


GROUPS = {
    "wte": "wte",
    "attn.c_q": "c_q",
    "attn.c_k": "c_k",
    "attn.c_v": "c_v",
    "attn.c_proj": "attention c_proj",
    "mlp.c_fc": "c_fc",
    "mlp.c_proj": "MLP c_proj",
    "lm_head": "lm_head",
}


def gradient_dtypes() -> dict[str, Any]:
    """Measure the error of every gradient of a small model in float32 and bfloat16, against float64.

    "other_batch" is how much the gradient of another batch differs, in the same measure.

    Under autocast the weights are float32. The products of both passes, and the activations between them, are bfloat16.
    """
    model = GPT(GPTConfig.from_depth(2, vocab_size=512, sequence_len=64))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                parameter.normal_(0, 0.05, generator=generator)
    ids, other_ids = torch.randint(512, (2, 4, 65), generator=generator)

    def gradients(net: GPT, dtype: torch.dtype | None = None, ids: Tensor = ids) -> tuple[float, dict[str, Tensor]]:
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = net(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        found = {name: p.grad.double() for name, p in net.named_parameters() if p.grad is not None}
        return float(loss.detach()), found

    before = ops.backend()
    exact_model = GPT(model.config).double()
    exact_model.load_state_dict(model.state_dict())
    exact_model.init_rotary()
    try:
        ops.use_backend("torch")
        exact_loss, exact = gradients(exact_model)
        reference_loss, by_reference = gradients(model)
    finally:
        ops.use_backend(before)
    kernel_loss, by_kernels = gradients(model)
    bfloat16_loss, in_bfloat16 = gradients(model, torch.bfloat16)
    other_loss, of_other_batch = gradients(model, ids=other_ids)
    ways = {"reference_float32": by_reference, "kernels_float32": by_kernels, "kernels_bfloat16": in_bfloat16}
    ways["other_batch"] = of_other_batch
    losses = {"reference_float32": reference_loss, "kernels_float32": kernel_loss, "kernels_bfloat16": bfloat16_loss}
    losses["other_batch"] = other_loss
    found: dict[str, Any] = {"groups": list(GROUPS.values())}
    for way, gradient in ways.items():
        errors = []
        for key in GROUPS:
            names = [name for name in exact if key in name]
            difference = math.hypot(*(float((gradient[name] - exact[name]).norm()) for name in names))
            errors.append(difference / math.hypot(*(float(exact[name].norm()) for name in names)))
        found[way] = {
            "errors": errors,
            "largest": max(errors),
            "smallest": min(errors),
            "loss_error": abs(losses[way] - exact_loss),
        }
    return found


def finite_differences() -> dict[str, Any]:
    """Measure the error of the central difference (f(x + h d) - f(x - h d)) / 2h for steps h, in float32 and float64.

    A large h errs by the curvature, in proportion to h^2. A small h errs by the rounding of f, in proportion to 1 / h.
    The direction d is that of the gradient by the activations. The exact derivative is that of the reference.
    """
    x, weight, targets = _head(torch.float64, **SHAPE)
    gradient = _by_autograd(reference.linear_cross_entropy, torch.float64)["dx"]
    direction = gradient / gradient.norm()
    exact = float(gradient.norm())
    steps = [10.0**exponent for exponent in range(1, -10, -1)]
    found: dict[str, Any] = {"steps": steps, "derivative": exact}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        errors = []
        for h in steps:
            values = [
                float(
                    ops.linear_cross_entropy((x + sign * h * direction).to(dtype), weight.to(dtype), targets).double()
                )
                for sign in (1, -1)
            ]
            errors.append(abs((values[0] - values[1]) / (2 * h) - exact) / abs(exact))
        best = min(range(len(steps)), key=errors.__getitem__)
        found[name] = {"errors": errors, "best": errors[best], "best_step": steps[best]}
    return found


def head_memory() -> dict[str, Any]:
    """Measure the peak memory of the head, forward and backward, by vocabulary: the kernel, and all logits (20 s).

    Each is measured in a process of its own, as the increase of its peak over a small call.
    """
    script = textwrap.dedent("""
        import sys, torch
        from nanochat_native import ops
        from nanochat_native.runtime.hardware import peak_resident_bytes, resident_bytes
        backend, N, C, V = sys.argv[1], *map(int, sys.argv[2:])
        torch.set_num_threads(1)
        ops.use_backend(backend)
        x, weight = (torch.randn(n, C).requires_grad_() for n in (N, V))
        targets = torch.randint(V, (N,))
        ops.linear_cross_entropy(x[:8], weight, targets[:8]).backward()
        spare = peak_resident_bytes() - resident_bytes()
        ballast = torch.ones(max(0, spare) // 4)  # so that the next byte raises the peak
        before = peak_resident_bytes()
        ops.linear_cross_entropy(x, weight, targets).backward()
        print(peak_resident_bytes() - before)
    """)
    rows = []
    for vocabulary in VOCABULARIES:
        row = {"vocabulary": vocabulary, "logits": 4 * HEAD["N"] * vocabulary}
        for name, backend in (("kernel", "native"), ("all_logits", "torch")):
            words = [sys.executable, "-c", script, backend, *map(str, (*HEAD.values(), vocabulary))]
            row[name] = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        rows.append(row)
    return {"rows": rows, "ratio": rows[-1]["all_logits"] / rows[-1]["kernel"]} | HEAD


def uneven_accumulation() -> dict[str, Any]:
    """Compare two ways to average the losses of micro-batches that have different numbers of targets.

    The mean of the micro-batches' means gives a target in a short conversation more weight than one in a long one. The
    trainer weights each micro-batch by its number of targets.
    """
    x, weight, targets = _head(torch.float64, **SHAPE)
    weight.requires_grad_()
    half = len(x) // 2
    targets[:half][torch.arange(half) % 8 != 0] = -1  # one in eight counts in the first half
    parts = [(x[:half], targets[:half]), (x[half:], targets[half:])]
    counts = [int((part != -1).sum()) for _, part in parts]
    (whole,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets), weight)

    def gradient(divisors: list[float]) -> Tensor:
        losses = [ops.linear_cross_entropy(a, weight, t) / d for (a, t), d in zip(parts, divisors, strict=True)]
        return torch.autograd.grad(sum(losses[1:], losses[0]), weight)[0]

    weighted = gradient([sum(counts) / count for count in counts])
    of_means = gradient([len(parts)] * len(parts))
    return {
        "targets": counts,
        "weighted": cmp(weighted, whole),
        "mean_of_means": cmp(of_means, whole),
        "cosine": float(F.cosine_similarity(of_means.flatten(), whole.flatten(), dim=0)),
        "weight_of_a_target": (counts[1] / counts[0]),
    }


DEMONSTRATIONS = {
    "loss-gradient": loss_gradient,
    "gradient-cmp": gradient_cmp,
    "gradient-dtypes": gradient_dtypes,
    "finite-differences": finite_differences,
    "head-memory": head_memory,
    "uneven-accumulation": uneven_accumulation,
}
