"""Which parameter goes to which optimizer, and at which rate."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from nanochat_native.optim.adamw import AdamW
from nanochat_native.optim.muon import Muon

WTE, LM_HEAD, BLOCKS = "transformer.wte.weight", "lm_head.weight", "transformer.h."

# Rate of the blocks' matrices where none is given: Muon's is nanochat's; the others' are of GPT-2's order of size.
MATRIX_LR = {"hybrid": 0.02, "adamw": 0.002, "adam": 0.002, "sgd": 0.1}


def setup_optimizers(
    model: nn.Module,
    *,
    unembedding_lr: float = 0.004,
    embedding_lr: float = 0.2,
    matrix_lr: float | None = None,
    weight_decay: float = 0.0,
    matrix_weight_decay: float = 0.0,
    optimizer: str = "hybrid",
    per_head: bool = False,
    process_group: dist.ProcessGroup | None = None,
    reduce_dtype: torch.dtype | None = None,
    gather_dtype: torch.dtype | None = None,
    **muon_options: Any,
) -> list[torch.optim.Optimizer]:
    """The optimizers of a model with nanochat's parameter names; every group has its "initial_lr".

    optimizer "hybrid": [AdamW of wte and lm_head, Muon of every matrix of the blocks], with nanochat's rates. For
    comparison, one optimizer for everything: "adamw" (ours), "adam" and "sgd" (torch's; sgd plain, and at matrix_lr
    throughout). The rates of Adam's kind are those of a model 768 wide and are multiplied by (dim / 768)^-0.5; their
    betas are (0.8, 0.95), eps 1e-10. matrix_lr defaults to 0.02 for Muon, 0.002 for adamw and adam, 0.1 for sgd.
    weight_decay: of AdamW alone; torch's Adam and SGD take it as their L2 penalty. matrix_weight_decay: of Muon.
    per_head: Muon orthogonalises c_q, c_k and c_v by blocks of rows and c_proj by blocks of columns, one for each of
    the heads that model.config counts. muon_options: cautious, row_equilibration, frobenius_renormalisation and normuon
    of Muon. process_group: AdamW and Muon are sharded over its ranks, with reduce_dtype and gather_dtype as they take
    them; torch's Adam and SGD cannot be.

    Raises ValueError for an unknown optimizer, and for a parameter that belongs to no group or that two names share.
    """
    if optimizer not in MATRIX_LR:
        raise ValueError(f"optimizer is {optimizer!r}; it takes {', '.join(MATRIX_LR)}")
    if process_group is not None and optimizer in ("adam", "sgd"):
        raise ValueError(f"optimizer is {optimizer!r}, which runs on one rank; on many take hybrid or adamw")
    wte, lm_head, matrices = _route(model)
    matrix_lr = MATRIX_LR[optimizer] if matrix_lr is None else matrix_lr
    sharding: dict[str, Any] = {}
    if process_group is not None:
        sharding = {"process_group": process_group, "reduce_dtype": reduce_dtype, "gather_dtype": gather_dtype}
    adam: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": weight_decay}
    scale = (wte[0][1].size(1) / 768) ** -0.5
    ends = [
        {"params": lm_head, "lr": unembedding_lr * scale},
        {"params": wte, "lr": embedding_lr * scale},
    ]
    everything = [*ends, {"params": matrices, "lr": matrix_lr * scale}]

    optimizers: list[torch.optim.Optimizer]
    if optimizer == "hybrid":
        groups = _by_heads(model, matrices) if per_head else matrices
        muon = Muon(groups, lr=matrix_lr, weight_decay=matrix_weight_decay, **muon_options, **sharding)
        optimizers = [AdamW(ends, **adam, **sharding), muon]
    elif optimizer == "adamw":
        optimizers = [AdamW(everything, **adam, **sharding)]
    elif optimizer == "adam":
        optimizers = [torch.optim.Adam(everything, **adam)]
    else:
        optimizers = [torch.optim.SGD(list(model.named_parameters()), lr=matrix_lr, weight_decay=weight_decay)]
    for each in optimizers:
        for group in each.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _route(model: nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """(name, tensor) pairs of wte, of lm_head and of the blocks' matrices."""
    wte: list[Any] = []
    lm_head: list[Any] = []
    matrices: list[Any] = []
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in names:
            raise ValueError(f"{names[parameter]} and {name} are one tensor; every parameter goes to exactly one group")
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
                f"they take {WTE}, {LM_HEAD} and the matrices of {BLOCKS}*"
            )
    for name, found in ((WTE, wte), (LM_HEAD, lm_head), (f"{BLOCKS}*", matrices)):
        if not found:
            raise ValueError(f"the model has no {name}")
    return wte, lm_head, matrices


def _by_heads(model: nn.Module, matrices: list[Any]) -> list[dict[str, Any]]:
    """Muon's groups: each kind of matrix with its number of heads, and all without any."""
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
    """One line for the print at the start, as "24 matrices 3.1M -> Muon | wte, lm_head 4.2M -> AdamW"."""
    parts = []
    for optimizer in optimizers:
        named = [pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]
        matrices = sum(name.startswith(BLOCKS) for name, _ in named)
        what = [f"{matrices} matrices"] if matrices else []
        what += [short for name, short in ((WTE, "wte"), (LM_HEAD, "lm_head")) if name in dict(named)]
        size = sum(parameter.numel() for _, parameter in named) / 1e6
        parts.append((matrices, f"{', '.join(what)} {size:.1f}M -> {type(optimizer).__name__}"))
    return " | ".join(text for _, text in sorted(parts, reverse=True))
