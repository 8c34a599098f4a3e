"""Assign each parameter to an optimizer and a learning rate."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from nanochat_native.ops import weight_copies
from nanochat_native.optim.adamw import AdamW
from nanochat_native.optim.muon import Muon
from nanochat_native.optim.original_guide import FORMS, UNSUPPORTED, OriginalGuideMuon

WTE, LM_HEAD, BLOCKS = "transformer.wte.weight", "lm_head.weight", "transformer.h."


class Rates(NamedTuple):
    """Learning rates of wte, of lm_head and of the matrices of the blocks."""

    embedding: float
    unembedding: float
    matrix: float


# Muon's rates, and Adam's rates of wte and lm_head, are nanochat's. Adam's rates of the matrices have the order of
# GPT-2's. SGD's rates are stable without clipping; with clipping about 10 times as much is best (`compare`).
DEFAULT_LEARNING_RATES = {
    "hybrid": Rates(0.2, 0.004, 0.02),
    "muon_sgd": Rates(0.3, 0.3, 0.02),
    "adamw": Rates(0.2, 0.004, 0.002),
    "adam": Rates(0.2, 0.004, 0.002),
    "sgd_momentum": Rates(0.1, 0.1, 0.1),
    "sgd": Rates(0.3, 0.3, 0.3),
}
MOMENTUM = 0.9  # of sgd_momentum; it multiplies the effective learning rate by 10


def setup_optimizers(
    model: nn.Module,
    *,
    unembedding_lr: float | None = None,
    embedding_lr: float | None = None,
    matrix_lr: float | None = None,
    weight_decay: float = 0.0,
    matrix_weight_decay: float = 0.0,
    optimizer: str = "hybrid",
    per_head: bool = False,
    muon_form: str = "nanochat",
    process_group: dist.ProcessGroup | None = None,
    reduce_dtype: torch.dtype | None = None,
    gather_dtype: torch.dtype | None = None,
    **muon_options: Any,
) -> list[torch.optim.Optimizer]:
    """Create the optimizers of a model with nanochat's parameter names. Every group has its "initial_lr".

    Args:
        optimizer: "hybrid" is [AdamW for wte and lm_head, Muon for every matrix of the blocks] at nanochat's rates. The
            others are for comparison. "muon_sgd" is [torch's SGD for wte and lm_head, Muon]. "adamw" (ours), "adam",
            "sgd_momentum" (0.9) and "sgd" (torch's) are one optimizer for all parameters. All have three groups:
            lm_head, wte and the matrices.
        unembedding_lr, embedding_lr, matrix_lr: the learning rates; default: DEFAULT_LEARNING_RATES. Those of Adam and
            AdamW are for a width of 768 and are multiplied by (width / 768)^-0.5; betas are (0.8, 0.95), eps is 1e-10.
        weight_decay: the decay of AdamW; for torch's Adam and SGD an L2 penalty.
        matrix_weight_decay: the decay of Muon.
        per_head: Muon orthogonalises c_q, c_k and c_v by blocks of rows and c_proj by blocks of columns, one block for
            each head in model.config.
        muon_form: "nanochat", or for comparison on one rank "cropped", "momentum_after" or "original_guide": the
            switches of OriginalGuideMuon that FORMS names.
        process_group: the ranks over which AdamW and Muon are sharded, with reduce_dtype and gather_dtype. torch's Adam
            and SGD cannot be sharded.
        muon_options: cautious, row_equilibration, frobenius_renormalisation, normuon, ns_steps and coefficients of
        Muon.

    Raises:
        ValueError: the optimizer is unknown or does not support an option, or a parameter belongs to no group or has
            two names.
    """
    if optimizer not in DEFAULT_LEARNING_RATES:
        raise ValueError(f"optimizer must be one of {', '.join(DEFAULT_LEARNING_RATES)}, got {optimizer!r}")
    if process_group is not None and optimizer not in ("hybrid", "adamw"):
        raise ValueError(f"optimizer must be hybrid or adamw on several ranks, got {optimizer!r}")
    if muon_form not in FORMS:
        raise ValueError(f"muon_form must be one of {', '.join(FORMS)}, got {muon_form!r}")
    if muon_form != "nanochat" and process_group is not None:
        raise ValueError(f"muon_form must be nanochat on several ranks, got {muon_form!r}")
    if muon_form != "nanochat" and (given_options := _on({**muon_options, "per_head": per_head})):
        raise ValueError(f"muon_form {muon_form!r} does not support {given_options[0]}")
    wte, lm_head, matrices = _route(model)
    given = {"embedding": embedding_lr, "unembedding": unembedding_lr, "matrix": matrix_lr}
    rates = DEFAULT_LEARNING_RATES[optimizer]._replace(
        **{name: rate for name, rate in given.items() if rate is not None}
    )
    sharding: dict[str, Any] = {}
    if process_group is not None:
        sharding = {"process_group": process_group, "reduce_dtype": reduce_dtype, "gather_dtype": gather_dtype}
    adam: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": weight_decay}
    sgd: dict[str, Any] = {"momentum": MOMENTUM if optimizer == "sgd_momentum" else 0.0, "weight_decay": weight_decay}
    uses_adam = optimizer in ("hybrid", "adamw", "adam")
    scale = (wte[0][1].size(1) / 768) ** -0.5 if uses_adam else 1.0
    ends = [
        {"params": lm_head, "lr": rates.unembedding * scale},
        {"params": wte, "lr": rates.embedding * scale},
    ]
    everything = [*ends, {"params": matrices, "lr": rates.matrix * scale}]

    optimizers: list[torch.optim.Optimizer]
    if optimizer in ("hybrid", "muon_sgd"):
        groups = _by_heads(model, matrices) if per_head else matrices
        settings: dict[str, Any] = {"lr": rates.matrix, "weight_decay": matrix_weight_decay, **muon_options}
        if muon_form == "nanochat":
            muon = Muon(groups, **settings, **sharding)
        else:
            kept = {name: value for name, value in settings.items() if name not in UNSUPPORTED}
            muon = OriginalGuideMuon(groups, **kept, **FORMS[muon_form])
        other = AdamW(ends, **adam, **sharding) if uses_adam else torch.optim.SGD(ends, **sgd)
        optimizers = [other, muon]
    elif optimizer == "adamw":
        optimizers = [AdamW(everything, **adam, **sharding)]
    elif optimizer == "adam":
        optimizers = [torch.optim.Adam(everything, **adam)]
    else:
        optimizers = [torch.optim.SGD(everything, **sgd)]
    for each in optimizers:
        for group in each.param_groups:
            group["initial_lr"] = group["lr"]
    weight_copies.keep(model.parameters())  # torch's Adam and SGD, which are not fused, raise the versions
    return optimizers


def _on(options: dict[str, Any]) -> list[str]:
    """Return the names of the options that are on and that OriginalGuideMuon does not support."""
    return [name for name in UNSUPPORTED if options.get(name)]


def _route(model: nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the (name, tensor) pairs of wte, of lm_head and of the matrices of the blocks."""
    wte: list[Any] = []
    lm_head: list[Any] = []
    matrices: list[Any] = []
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in names:
            raise ValueError(
                f"{names[parameter]} and {name} are one tensor; each parameter must belong to exactly one group"
            )
        names[parameter] = name
        if name == WTE:
            wte.append((name, parameter))
        elif name == LM_HEAD:
            lm_head.append((name, parameter))
        elif name.startswith(BLOCKS) and parameter.ndim == 2:
            matrices.append((name, parameter))
        else:
            raise ValueError(
                f"{name}, shape {tuple(parameter.shape)}, belongs to no optimizer: "
                f"the model may have {WTE}, {LM_HEAD} and matrices {BLOCKS}*"
            )
    for name, found in ((WTE, wte), (LM_HEAD, lm_head), (f"{BLOCKS}*", matrices)):
        if not found:
            raise ValueError(f"the model has no {name}")
    return wte, lm_head, matrices


def _by_heads(model: nn.Module, matrices: list[Any]) -> list[dict[str, Any]]:
    """Return the groups of Muon: each kind of projection with its number of heads, and the other matrices."""
    config: Any = model.config
    kinds = {
        "attn.c_q.weight": {"heads": config.n_head},
        "attn.c_k.weight": {"heads": config.n_kv_head},
        "attn.c_v.weight": {"heads": config.n_kv_head},
        "attn.c_proj.weight": {"heads": config.n_head, "head_axis": "columns"},
        "": {},
    }
    groups: list[dict[str, Any]] = [{"params": [], **settings} for settings in kinds.values()]
    for name, parameter in matrices:
        place = next(i for i, ending in enumerate(kinds) if name.endswith(ending))
        groups[place]["params"].append((name, parameter))
    return [group for group in groups if group["params"]]


def describe_routing(optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """Return the routing in one line, e.g. "24 matrices 3.1M -> Muon | wte, lm_head 4.2M -> AdamW"."""
    parts = []
    for optimizer in optimizers:
        named = [pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]
        matrices = sum(name.startswith(BLOCKS) for name, _ in named)
        what = [f"{matrices} matrices"] if matrices else []
        what += [short for name, short in ((WTE, "wte"), (LM_HEAD, "lm_head")) if name in dict(named)]
        size = sum(parameter.numel() for _, parameter in named) / 1e6
        parts.append((matrices, f"{', '.join(what)} {size:.1f}M -> {type(optimizer).__name__}"))
    return " | ".join(text for _, text in sorted(parts, reverse=True))
