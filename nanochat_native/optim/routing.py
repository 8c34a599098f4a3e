"""Which parameter goes to which optimizer, and at which rate."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from nanochat_native.optim.adamw import AdamW
from nanochat_native.optim.muon import Muon

WTE, LM_HEAD, BLOCKS = "transformer.wte.weight", "lm_head.weight", "transformer.h."


class Rates(NamedTuple):
    """Learning rates of wte, of lm_head and of the blocks' matrices."""

    embedding: float
    unembedding: float
    matrix: float


# Where none are given. Muon's, and Adam's of the ends, are nanochat's; Adam's of the matrices are of GPT-2's order.
# SGD's are stable without clipping; with it, about 10 times as much is best (`compare`).
DEFAULT_LEARNING_RATES = {
    "hybrid": Rates(0.2, 0.004, 0.02),
    "muon_sgd": Rates(0.3, 0.3, 0.02),
    "adamw": Rates(0.2, 0.004, 0.002),
    "adam": Rates(0.2, 0.004, 0.002),
    "sgd_momentum": Rates(0.1, 0.1, 0.1),
    "sgd": Rates(0.3, 0.3, 0.3),
}
MOMENTUM = 0.9  # of sgd_momentum, torch's: rates of a step that is repeated add up to 10 times as much


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
    process_group: dist.ProcessGroup | None = None,
    reduce_dtype: torch.dtype | None = None,
    gather_dtype: torch.dtype | None = None,
    **muon_options: Any,
) -> list[torch.optim.Optimizer]:
    """The optimizers of a model with nanochat's parameter names; every group has its "initial_lr".

    optimizer "hybrid": [AdamW of wte and lm_head, Muon of every matrix of the blocks], with nanochat's rates. For
    comparison: "muon_sgd", [torch's SGD of wte and lm_head, Muon]; and one optimizer for everything: "adamw" (ours),
    "adam", "sgd_momentum" (0.9) and "sgd" (torch's). All have three groups, lm_head, wte and the matrices, whose rates
    are those of DEFAULT_LEARNING_RATES where they are not given. Adam's are those of a model 768 wide and are
    multiplied by (dim / 768)^-0.5; their betas are (0.8, 0.95), eps 1e-10. weight_decay: of AdamW alone; torch's Adam
    and SGD take it as their L2 penalty. matrix_weight_decay: of Muon. per_head: Muon orthogonalises c_q, c_k and c_v by
    blocks of rows and c_proj by blocks of columns, one for each of the heads that model.config counts. muon_options:
    cautious, row_equilibration, frobenius_renormalisation, normuon, ns_steps and coefficients of Muon. process_group:
    AdamW and Muon are sharded over its ranks, with reduce_dtype and gather_dtype as they take them; torch's Adam and
    SGD cannot be.

    Raises ValueError for an unknown optimizer, and for a parameter that belongs to no group or that two names share.
    """
    if optimizer not in DEFAULT_LEARNING_RATES:
        raise ValueError(f"optimizer is {optimizer!r}; it takes {', '.join(DEFAULT_LEARNING_RATES)}")
    if process_group is not None and optimizer not in ("hybrid", "adamw"):
        raise ValueError(f"optimizer is {optimizer!r}, which runs on one rank; on many take hybrid or adamw")
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
    of_adam = optimizer in ("hybrid", "adamw", "adam")
    scale = (wte[0][1].size(1) / 768) ** -0.5 if of_adam else 1.0
    ends = [
        {"params": lm_head, "lr": rates.unembedding * scale},
        {"params": wte, "lr": rates.embedding * scale},
    ]
    everything = [*ends, {"params": matrices, "lr": rates.matrix * scale}]

    optimizers: list[torch.optim.Optimizer]
    if optimizer in ("hybrid", "muon_sgd"):
        groups = _by_heads(model, matrices) if per_head else matrices
        muon = Muon(groups, lr=rates.matrix, weight_decay=matrix_weight_decay, **muon_options, **sharding)
        of_ends = AdamW(ends, **adam, **sharding) if of_adam else torch.optim.SGD(ends, **sgd)
        optimizers = [of_ends, muon]
    elif optimizer == "adamw":
        optimizers = [AdamW(everything, **adam, **sharding)]
    elif optimizer == "adam":
        optimizers = [torch.optim.Adam(everything, **adam)]
    else:
        optimizers = [torch.optim.SGD(everything, **sgd)]
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
