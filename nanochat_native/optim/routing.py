"""Assign each parameter to an optimizer, a learning rate and a decay: nanochat's recipes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from nanochat_native.ops import weight_copies
from nanochat_native.optim.adamw import AdamW
from nanochat_native.optim.base import check_number
from nanochat_native.optim.muon import Muon
from nanochat_native.optim.original_guide import FORMS, NANOCHAT_ONLY, UNSUPPORTED, OriginalGuideMuon

WTE, LM_HEAD, BLOCKS = "transformer.wte.weight", "lm_head.weight", "transformer.h."
VALUE_EMBEDS = "value_embeds."
# The parameters outside the blocks that not every model has, by their group.
SCALARS = {
    "resid_lambdas": "resid_lambdas",
    "x0_lambdas": "x0_lambdas",
    "smear_gate.weight": "smear",
    "smear_lambda": "smear",
    "backout_lambda": "smear",
}
KINDS = ("lm_head", "wte", "value_embeds", "resid_lambdas", "x0_lambdas", "smear", "matrices")


class Rates(NamedTuple):
    """Learning rates of wte, of lm_head, of the matrices of the blocks, and of the scalars."""

    embedding: float
    unembedding: float
    matrix: float
    scalar: float


class Adam(NamedTuple):
    """The betas and the decay of a group of AdamW."""

    betas: tuple[float, float] = (0.8, 0.95)
    weight_decay: float = 0.0


class Recipe(NamedTuple):
    """The settings of nanochat at a date.

    Attributes:
        rates: the learning rates of each optimizer.
        adam: the settings of the groups of AdamW; a group that is absent has those of Adam().
        muon: the options of Muon that differ from its defaults.
        matrix_weight_decay: the decay of Muon.
    """

    rates: dict[str, Rates]
    adam: dict[str, Adam]
    muon: dict[str, Any]
    matrix_weight_decay: float


# Muon's rates, and Adam's rates of wte and lm_head, are nanochat's. Adam's rates of the matrices have the order of
# GPT-2's. SGD's rates are stable without clipping; with clipping about 10 times as much is best (`compare`). nanochat
# had no scalars in October 2025.
DEFAULT_LEARNING_RATES = {
    "hybrid": Rates(0.2, 0.004, 0.02, 0.5),
    "muon_sgd": Rates(0.3, 0.3, 0.02, 0.03),
    "adamw": Rates(0.2, 0.004, 0.002, 0.5),
    "adam": Rates(0.2, 0.004, 0.002, 0.5),
    "sgd_momentum": Rates(0.1, 0.1, 0.1, 0.01),
    "sgd": Rates(0.3, 0.3, 0.3, 0.03),
}
EPS = 1e-10  # of Adam and AdamW
MOMENTUM = 0.9  # of sgd_momentum; it multiplies the effective learning rate by 10
SMEAR_RATE = 0.2  # of Adam, for smear and backout at every batch size
# nanochat of October 2025 and of July 2026, by the names of --recipe.
RECIPES = {
    "october": Recipe(rates=DEFAULT_LEARNING_RATES, adam={}, muon={}, matrix_weight_decay=0.0),
    "today": Recipe(
        rates={
            name: rates._replace(embedding=0.3, unembedding=0.008) if name in ("hybrid", "adamw", "adam") else rates
            for name, rates in DEFAULT_LEARNING_RATES.items()
        },
        adam={
            "lm_head": Adam((0.8, 0.96), 0.01),
            "wte": Adam((0.8, 0.995), 0.001),
            "value_embeds": Adam((0.8, 0.995), 0.01),
            "resid_lambdas": Adam((0.8, 0.95), 0.05),
            "x0_lambdas": Adam((0.96, 0.95), 0.0),
        },
        muon={
            "coefficients": "polar_express",
            "cautious": True,
            "row_equilibration": True,
            "frobenius_renormalisation": True,
            "normuon": True,
            "beta2": 0.9,
            "norm_eps": 1e-6,
            "normuon_eps": 1e-10,
            "scale_decay": True,
        },
        matrix_weight_decay=0.28,
    ),
}


def setup_optimizers(
    model: nn.Module,
    *,
    recipe: str = "october",
    unembedding_lr: float | None = None,
    embedding_lr: float | None = None,
    matrix_lr: float | None = None,
    scalar_lr: float | None = None,
    smear_lr: float = SMEAR_RATE,
    batch_lr_scale: float = 1.0,
    weight_decay: float | None = None,
    matrix_weight_decay: float | None = None,
    optimizer: str = "hybrid",
    per_head: bool = False,
    muon_form: str = "nanochat",
    process_group: dist.ProcessGroup | None = None,
    reduce_dtype: torch.dtype | None = None,
    gather_dtype: torch.dtype | None = None,
    **muon_options: Any,
) -> list[torch.optim.Optimizer]:
    """Create the optimizers of a model with nanochat's parameter names.

    Every group has its "initial_lr", and every group of Muon its "initial_weight_decay". The groups are lm_head, wte,
    value_embeds, resid_lambdas, x0_lambdas, smear with backout, and the matrices of the blocks; those of parts that the
    model does not have are left out. Their rates, with r = (width / 768)^-0.5 for Adam and AdamW and 1 for SGD, and
    b = batch_lr_scale, are:

        lm_head        unembedding_lr r b          resid_lambdas   scalar_lr b / 100
        wte            embedding_lr r b            x0_lambdas      scalar_lr b
        value_embeds   embedding_lr r b / 2        smear           smear_lr for Adam and AdamW, scalar_lr b for SGD
        matrices       matrix_lr b; with Adam or AdamW matrix_lr r b

    Args:
        recipe: "october" or "today", nanochat of October 2025 or of July 2026: the defaults of the rates and decays,
            the betas of each group of AdamW, and the options of Muon. With "october" all betas are (0.8, 0.95), also
            those of parameters that its model does not have. eps is 1e-10.
        optimizer: "hybrid" is [AdamW for all other groups, Muon for every matrix of the blocks]. The others are for
            comparison. "muon_sgd" is [torch's SGD, Muon]. "adamw" (ours), "adam", "sgd_momentum" (0.9) and "sgd"
            (torch's) are one optimizer for all groups.
        unembedding_lr, embedding_lr, matrix_lr, scalar_lr: the learning rates; default: RECIPES[recipe].rates.
        smear_lr: the learning rate of smear and backout with Adam and AdamW.
        batch_lr_scale: the factor of all rates except that of smear.
        weight_decay: the decay of every group of AdamW; default: that of the recipe for each group. For torch's Adam
            and SGD it is an L2 penalty, 0 by default.
        matrix_weight_decay: the decay of Muon; default: that of the recipe.
        per_head: Muon orthogonalises c_q, c_k and c_v by blocks of rows and c_proj by blocks of columns, one block for
            each head in model.config.
        muon_form: "nanochat", or for comparison on one rank "cropped", "momentum_after" or "original_guide": the
            switches of OriginalGuideMuon that FORMS names, without the recipe's options of Muon.
        process_group: the ranks over which AdamW and Muon are sharded, with reduce_dtype and gather_dtype. torch's Adam
            and SGD cannot be sharded.
        muon_options: options of Muon that replace those of the recipe: nesterov, ns_steps, coefficients, cautious,
            row_equilibration, frobenius_renormalisation, normuon, beta2, norm_eps, normuon_eps, scale_decay and
            ns_bfloat16.

    Raises:
        ValueError: the recipe or the optimizer is unknown or does not support an option, or a parameter belongs to no
            group or has two names.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
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
    check_number("batch_lr_scale", batch_lr_scale)
    routed = _route(model)
    chosen = RECIPES[recipe]
    given = {"embedding": embedding_lr, "unembedding": unembedding_lr, "matrix": matrix_lr, "scalar": scalar_lr}
    rates = chosen.rates[optimizer]._replace(**{name: rate for name, rate in given.items() if rate is not None})
    sharding: dict[str, Any] = {}
    if process_group is not None:
        sharding = {"process_group": process_group, "reduce_dtype": reduce_dtype, "gather_dtype": gather_dtype}
    decoupled = optimizer in ("hybrid", "adamw")
    uses_adam = decoupled or optimizer == "adam"
    scale = (routed["wte"][0][1].size(1) / 768) ** -0.5 if uses_adam else 1.0
    rate_of = {
        "lm_head": rates.unembedding * scale,
        "wte": rates.embedding * scale,
        "value_embeds": rates.embedding * scale * 0.5,
        "resid_lambdas": rates.scalar * 0.01,
        "x0_lambdas": rates.scalar,
        "smear": rates.scalar,
        "matrices": rates.matrix * scale,
    }
    rate_of = {kind: rate * batch_lr_scale for kind, rate in rate_of.items()}
    if uses_adam:
        rate_of["smear"] = smear_lr

    groups: list[dict[str, Any]] = []
    for kind, named in routed.items():
        group: dict[str, Any] = {"params": named, "lr": rate_of[kind]}
        adam = chosen.adam.get(kind, Adam())
        if uses_adam:
            group["betas"] = adam.betas
        group["weight_decay"] = weight_decay if weight_decay is not None else adam.weight_decay if decoupled else 0.0
        groups.append(group)
    momentum = MOMENTUM if optimizer == "sgd_momentum" else 0.0

    optimizers: list[torch.optim.Optimizer]
    if optimizer in ("hybrid", "muon_sgd"):
        matrices = groups.pop()["params"]
        settings: dict[str, Any] = {"lr": rates.matrix * batch_lr_scale}
        settings["weight_decay"] = chosen.matrix_weight_decay if matrix_weight_decay is None else matrix_weight_decay
        if muon_form == "nanochat":
            by_heads = _by_heads(model, matrices) if per_head else matrices
            muon = Muon(by_heads, **settings, **{**chosen.muon, **muon_options}, **sharding)
        else:
            kept = {name: value for name, value in muon_options.items() if name not in NANOCHAT_ONLY}
            muon = OriginalGuideMuon(matrices, **settings, **kept, **FORMS[muon_form])
        for group in muon.param_groups:
            group["initial_weight_decay"] = group["weight_decay"]
        other = AdamW(groups, eps=EPS, **sharding) if uses_adam else torch.optim.SGD(groups, momentum=momentum)
        optimizers = [other, muon]
    elif optimizer == "adamw":
        optimizers = [AdamW(groups, eps=EPS, **sharding)]
    elif optimizer == "adam":
        optimizers = [torch.optim.Adam(groups, eps=EPS)]
    else:
        optimizers = [torch.optim.SGD(groups, momentum=momentum)]
    for each in optimizers:
        for group in each.param_groups:
            group["initial_lr"] = group["lr"]
    weight_copies.keep(model.parameters())  # torch's Adam and SGD, which are not fused, raise the versions
    return optimizers


def _on(options: dict[str, Any]) -> list[str]:
    """Return the names of the options that are on and that OriginalGuideMuon does not support."""
    return [name for name in UNSUPPORTED if options.get(name)]


def _route(model: nn.Module) -> dict[str, list[Any]]:
    """Return the (name, tensor) pairs of each kind that the model has, in the order of KINDS."""
    routed: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in names:
            raise ValueError(
                f"{names[parameter]} and {name} are one tensor; each parameter must belong to exactly one group"
            )
        names[parameter] = name
        kind = _kind_of(name, parameter)
        if kind is None:
            raise ValueError(
                f"{name}, shape {tuple(parameter.shape)}, belongs to no optimizer: the model may have {WTE}, "
                f"{LM_HEAD}, matrices {BLOCKS}* and {VALUE_EMBEDS}*, {', '.join(SCALARS)}"
            )
        routed[kind].append((name, parameter))
    for name, kind in ((WTE, "wte"), (LM_HEAD, "lm_head"), (f"{BLOCKS}*", "matrices")):
        if not routed[kind]:
            raise ValueError(f"the model has no {name}")
    return {kind: named for kind, named in routed.items() if named}


def _kind_of(name: str, parameter: Tensor) -> str | None:
    """Return the kind of a parameter, None if it has none."""
    if name in (WTE, LM_HEAD):
        return "wte" if name == WTE else "lm_head"
    if name.startswith((BLOCKS, VALUE_EMBEDS)):
        kind = "matrices" if name.startswith(BLOCKS) else "value_embeds"
        return kind if parameter.ndim == 2 else None
    return SCALARS.get(name)


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
        own = {name for name, _ in named}
        matrices, embeddings = (sum(name.startswith(prefix) for name in own) for prefix in (BLOCKS, VALUE_EMBEDS))
        what = [f"{matrices} matrices"] if matrices else []
        what += [short for name, short in ((WTE, "wte"), (LM_HEAD, "lm_head")) if name in own]
        what += [f"{embeddings} value embeddings"] if embeddings else []
        what += [name.removesuffix(".weight") for name in SCALARS if name in own]
        size = sum(parameter.numel() for _, parameter in named) / 1e6
        parts.append((matrices, f"{', '.join(what)} {size:.1f}M -> {type(optimizer).__name__}"))
    return " | ".join(text for _, text in sorted(parts, reverse=True))
