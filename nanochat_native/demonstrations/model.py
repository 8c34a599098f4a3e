"""The model: its parameters, operations, first steps, residual stream and logits."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nanochat_native import data, ops
from nanochat_native.demonstrations.tokens import validation_tokens
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.functional import norm
from nanochat_native.model.gpt import GPT, SOFTCAP
from nanochat_native.optim import setup_optimizers
from nanochat_native.runs.saved_model import load_model

DEPTHS = (4, 6, 8, 12, 16, 20, 26)
VOCABULARIES = (8192, 65536)
GROUPS = ("wte", "c_q", "c_k", "c_v", "attn_c_proj", "c_fc", "mlp_c_proj", "lm_head")
ROWS = 8  # sequences on which a trained model is looked at


def d4(sequence_len: int = 256) -> GPTConfig:
    """Return the shape of the model that the guide's first chapter trains."""
    return GPTConfig.from_depth(4, vocab_size=8192, sequence_len=sequence_len)


def on_meta(config: GPTConfig) -> GPT:
    """Return a model without memory, for counting."""
    with torch.device("meta"):
        return GPT(config)


def group_of(name: str) -> str:
    """Return the group of a parameter: transformer.h.0.mlp.c_proj.weight -> mlp_c_proj."""
    parts = name.removesuffix(".weight").split(".")
    return "_".join(parts[-2:]) if parts[-1] == "c_proj" else parts[-1]


def parameters_by_group(model: GPT) -> dict[str, int]:
    """Return the number of parameters of each group, over all layers."""
    counts: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        counts[group_of(name)] += parameter.numel()
    return {group: counts[group] for group in GROUPS}


def parameters() -> dict[str, Any]:
    """Count the parameters of models of depth 4 to 26 by part, for vocabularies of 8,192 and 65,536.

    A block has 4 matrices of C x C in attention and 8 C^2 parameters in the MLP: 12 C^2 in all.
    """
    found: dict[str, Any] = {}
    for vocab_size in VOCABULARIES:
        for depth in DEPTHS:
            model = on_meta(GPTConfig.from_depth(depth, vocab_size=vocab_size, sequence_len=2048))
            groups = parameters_by_group(model)
            attention = sum(groups[name] for name in ("c_q", "c_k", "c_v", "attn_c_proj"))
            mlp = groups["c_fc"] + groups["mlp_c_proj"]
            total = model.num_params()
            found[f"d{depth}_v{vocab_size}"] = {
                "depth": depth,
                "width": model.config.n_embd,
                "wte": groups["wte"],
                "attention": attention,
                "mlp": mlp,
                "lm_head": groups["lm_head"],
                "total": total,
                "embedding_share": (groups["wte"] + groups["lm_head"]) / total,
                "mlp_share": mlp / total,
                "mlp_share_of_blocks": mlp / (attention + mlp),
                "tokens_at_20_per_parameter": 20 * total,
            }
    return found


def invented_batch(step: int, config: GPTConfig, rows: int) -> tuple[Tensor, Tensor]:
    """Return (inputs, targets) of a language of frequent and rare tokens, a function of the step alone.

    Each token is a fixed function of the one before, or, once in four, a new one with a probability like 1 / rank.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    ranks = torch.arange(1, config.vocab_size + 1, dtype=torch.float64)
    shape = (rows, config.sequence_len + 1)
    tokens = torch.multinomial(1 / ranks, rows * shape[1], replacement=True, generator=generator).view(shape)
    keep = torch.rand(shape, generator=generator) < 0.75
    for position in range(1, shape[1]):
        following = (tokens[:, position - 1] * 31 + 17) % 512
        tokens[:, position] = torch.where(keep[:, position], following, tokens[:, position])
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def waking(steps: int = 6, seed: int = 0) -> dict[str, Any]:
    """Train a new d4 for six steps and measure the gradient of each group of matrices before each.

    lm_head and every c_proj begin at zero, as in nanochat. A matrix in front of a product with zero has no gradient.
    The data are invented tokens; which gradients are zero does not depend on them.
    """
    config = d4()
    model = GPT(config)
    model.init_weights(seed)
    optimizers = setup_optimizers(model)
    losses: list[float] = []
    norms: dict[str, list[float]] = {group: [] for group in GROUPS}
    moved: dict[str, bool] = {}
    for step in range(steps):
        inputs, targets = invented_batch(step, config, rows=4)
        loss = model(inputs, targets)
        loss.backward()
        losses.append(loss.item())
        squares: dict[str, float] = defaultdict(float)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            squares[group_of(name)] += float(parameter.grad.double().square().sum())
        for group in GROUPS:
            norms[group].append(math.sqrt(squares[group]))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        if step == 0:
            for name, parameter in model.named_parameters():
                group = group_of(name)
                moved[group] = moved.get(group, False) or not torch.equal(parameter.detach(), before[name])
    first = {group: next(step for step, value in enumerate(values) if value > 0) for group, values in norms.items()}
    return {
        "ln_vocabulary": math.log(config.vocab_size),
        "losses": losses,
        "gradient_norm": norms,
        "first_step_with_gradient": first,
        "moved_in_step_0": moved,
    }


def first_loss(seed: int = 0) -> dict[str, Any]:
    """Measure the loss of new models on invented tokens: with the zero lm_head, and with a random one.

    Zero logits give each of V tokens the probability 1 / V, and the loss ln V. The random lm_head is normal with
    standard deviation 1 / sqrt(C), and then 10 times as large, both without the softcap.
    """
    config = d4(64)
    model = GPT(config)
    model.init_weights(seed)
    inputs, targets = invented_batch(0, config, rows=4)
    found: dict[str, Any] = {"ln_vocabulary": math.log(config.vocab_size), "zero": model(inputs, targets).item()}
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        x = model.hidden_states(inputs)
        head = torch.randn(config.vocab_size, config.n_embd, generator=generator) / math.sqrt(config.n_embd)
        for name, factor in (("random", 1), ("random_10_times", 10)):
            logits = F.linear(x, factor * head)
            found[name] = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    return found


def flops() -> dict[str, Any]:
    """Count the operations of the plain model with torch's counter, and compare with the formula of the package.

    The formula is that of PaLM's appendix B, arXiv:2204.02311: 6 for each parameter outside wte, and 12 C T for each
    layer. It counts all T scores of a token, although causality needs half of them; the plain reference computes all.
    """
    found = {}
    for depth, length in ((2, 64), (4, 256), (4, 1024)):
        config = GPTConfig.from_depth(depth, vocab_size=8192, sequence_len=length)
        model = GPT(config)
        model.init_weights()
        tokens = torch.zeros(1, length, dtype=torch.int64)
        with ops.use_backend("torch"), FlopCounterMode(display=False) as forward:
            loss = model(tokens, tokens)
        with ops.use_backend("torch"), FlopCounterMode(display=False) as backward:
            loss.backward()
        counted = (forward.get_total_flops() + backward.get_total_flops()) / length
        estimated = model.estimate_flops()
        attention = 12 * config.n_embd * config.n_layer * length
        found[f"d{depth}_t{length}"] = {
            "counted": counted,
            "estimated": estimated,
            "ratio": counted / estimated,
            "backward_to_forward": backward.get_total_flops() / forward.get_total_flops(),
            "attention_share": attention / estimated,
        }
    return found


def blocks_against_scores() -> dict[str, Any]:
    """Return the length at which the scores of a block cost as much as its matrices: T = 6 C, and 12 C if halved."""
    config = d4()
    model = on_meta(config)
    matrices = 6 * sum(p.numel() for name, p in model.named_parameters() if ".h.0." in name)
    per_position = 12 * config.n_embd
    return {
        "width": config.n_embd,
        "matrices_per_token": matrices,
        "scores_per_token_and_position": per_position,
        "equal_at": matrices / per_position,
        "equal_at_causal": 2 * matrices / per_position,
    }


def validation_batch(checkpoint: Path) -> tuple[GPT, Tensor, Tensor, Any]:
    """Return the model of a run, (inputs, targets) of its validation text, and its step."""
    model, tokenizer, meta = load_model(checkpoint, warn=lambda _: None)
    stream = validation_tokens(checkpoint, tokenizer)
    inputs, targets = next(iter(data.iterate_val(stream, batch_rows=ROWS, sequence_len=model.config.sequence_len)))
    return model, inputs, targets, meta["step"]


def residual_norms(model: GPT, inputs: Tensor) -> dict[str, list[float]]:
    """Return the RMS of the residual stream after the embedding's norm and after each block, and of what blocks add.

    All are means over the tokens of the RMS over channels.
    """
    stream: list[Tensor] = []
    added: dict[str, list[float]] = {"attention": [], "mlp": []}
    hooks = [model.blocks[0].register_forward_pre_hook(lambda module, arguments: stream.append(arguments[0]))]
    for block in model.blocks:
        hooks += [
            block.register_forward_hook(lambda module, arguments, out: stream.append(out[0] + out[1])),
            block.attn.register_forward_hook(lambda module, arguments, out: added["attention"].append(mean_rms(out))),
            block.mlp.register_forward_hook(lambda module, arguments, out: added["mlp"].append(mean_rms(out))),
        ]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {"stream": [mean_rms(x) for x in stream], **added}


def mean_rms(x: Tensor) -> float:
    """Return the mean over all tokens of the RMS of the last dimension."""
    return x.double().square().mean(-1).sqrt().mean().item()


def residual_stream(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Measure the RMS of the residual stream of a run, and what each attention and MLP adds, new and trained."""
    model, inputs, _, step = validation_batch(checkpoint)
    new = GPT(model.config)
    new.init_weights()
    found = {"new": residual_norms(new, inputs), "trained": residual_norms(model, inputs)}
    stream = found["trained"]["stream"]
    return {"step": step, **found, "growth": stream[-1] / stream[0]}


def softcap(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Measure the logits of a run before the softcap 15 tanh(z / 15), and the loss with and without it."""
    model, inputs, targets, step = validation_batch(checkpoint)
    with torch.no_grad():
        raw = F.linear(model.hidden_states(inputs), model.lm_head.weight).flatten(0, 1).double()
        capped = SOFTCAP * (raw / SOFTCAP).tanh()
        wanted = targets.flatten()
        edges = torch.linspace(-30, 30, 61, dtype=torch.float64)
        counts = torch.histogram(raw.flatten(), edges).hist
        losses = {
            "with": F.cross_entropy(capped, wanted, ignore_index=-1).item(),
            "without": F.cross_entropy(raw, wanted, ignore_index=-1).item(),
        }
    largest = raw.max(-1).values
    return {
        "step": step,
        "tokens": len(raw),
        "largest_raw": raw.max().item(),
        "smallest_raw": raw.min().item(),
        "largest_capped": capped.max().item(),
        "share_above_5": (raw.abs() > 5).double().mean().item(),
        "share_above_10": (raw.abs() > 10).double().mean().item(),
        "tokens_whose_largest_is_above_10": (largest > 10).double().mean().item(),
        "loss": losses,
        "edges": edges.tolist(),
        "share": (counts / counts.sum()).tolist(),
    }


def dead_units(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Count, for each layer of a run, the hidden units of the MLP that are zero: on a token, and on every token."""
    model, inputs, _, step = validation_batch(checkpoint)
    new = GPT(model.config)
    new.init_weights()
    found: dict[str, Any] = {"step": step, "tokens": inputs.numel(), "units": 4 * model.config.n_embd}
    for name, each in (("new", new), ("trained", model)):
        zero, dead = [], []
        for hidden in hidden_units(each, inputs):
            active = hidden.flatten(0, -2) > 0
            zero.append(1 - active.double().mean().item())
            dead.append(1 - active.any(0).double().mean().item())
        found[name] = {"zero_on_a_token": zero, "zero_on_every_token": dead, "largest_share_dead": max(dead)}
    return found


def hidden_units(model: GPT, inputs: Tensor) -> list[Tensor]:
    """Return what each MLP computes before its squared ReLU, (B, T, 4 C) for each layer."""
    found: list[Tensor] = []
    hooks = [
        block.mlp.register_forward_pre_hook(
            lambda module, arguments: found.append(F.linear(arguments[0], module.c_fc.weight))
        )
        for block in model.blocks
    ]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def rms_norm() -> dict[str, Any]:
    """Show that RMSNorm removes the scale of a token and keeps its direction.

    The largest change of the output when the input is multiplied by 1000, and the RMS of the output.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator)
    y = norm(x)
    return {
        "rms_of_output": mean_rms(y),
        "change_at_1000_times": (norm(1000 * x) - y).abs().max().item(),
        "cosine_with_input": F.cosine_similarity(x, y).min().item(),
        "zero_stays_zero": bool((norm(torch.zeros(1, 256)) == 0).all()),
    }


DEMONSTRATIONS = {
    "parameters": parameters,
    "waking": waking,
    "first-loss": first_loss,
    "flops": flops,
    "blocks-against-scores": blocks_against_scores,
    "rms-norm": rms_norm,
    "residual-stream": residual_stream,
    "softcap": softcap,
    "dead-units": dead_units,
}
