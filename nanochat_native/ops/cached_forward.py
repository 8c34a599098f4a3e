"""The whole transformer on a key-value cache, for generation."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.attention import attention, reference_attention
from nanochat_native.ops.dtypes import PARAM_DTYPES, compute_dtype

EPS = torch.finfo(torch.float32).eps  # added to the mean square in every RMSNorm


def cached_forward_(
    tokens: Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    *,
    wte: Tensor,
    blocks: Sequence[Tensor],
    lm_head: Tensor,
    windows: Sequence[int | None],
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    softcap: float,
    with_logits: bool = True,
    qk_scale: float = 1.0,
    value_gates: Sequence[Tensor | None] = (),
    value_tables: Sequence[Tensor | None] = (),
    resid_lambdas: Tensor | None = None,
    x0_lambdas: Tensor | None = None,
    smear_gate: Tensor | None = None,
    smear_lambda: Tensor | None = None,
    previous: Sequence[int] = (),
    backout_lambda: Tensor | None = None,
    lengths: Sequence[int] = (),
    scales: Sequence[Tensor] = (),
) -> Tensor:
    """Run the transformer of nanochat_native.model on further tokens of each of B sequences, with a cache.

    The defaults are those of nanochat's first architecture. See nanochat_native.model.gpt for the parts.

    Args:
        tokens: (B, T) int64, T from 1; or (N,), the tokens of the first sequence, then those of the second and so on.
            Token t of sequence b has position starts[b] + t of slot slots[b]. Its key and value are stored there, and
            it sees the positions of its slot up to its own.
        slots, starts: B numbers each. The slots are distinct, and each is filled before starts[b].
        wte: (Vp, C). Tokens are rows of it.
        lm_head: (V, C), V <= Vp.
        blocks: Six matrices per layer, as linear layers have them: of q (C, C), k and v (Hkv D, C), attention's output
            (C, C), and the MLP (F, C) and (C, F).
        windows: One per layer, as attention's.
        cos, sin: (positions, D) and (positions, D / 2), of the rotary angles.
        cache: (layers, slots, capacity, 2 Hkv, D), keys and then values. Updated.
        softcap: Logits are softcap * tanh(x / softcap); 0 for no bound.
        with_logits: False if only the cache is needed.
        qk_scale: A factor of the normalised queries and keys.
        value_gates, value_tables: None, or one per layer, of which each may be None: (Hkv, n) and (Vp, Hkv D). The
            value of a token becomes v + 3 sigmoid(gate h) table[token], for the first n channels of the block's normed
            input h.
        resid_lambdas, x0_lambdas: (layers,) each. A block begins with x = resid_lambda x + x0_lambda x0.
        smear_gate, smear_lambda: (1, n) and (1,). The embedding e of a token becomes e + lambda sigmoid(gate e) f, for
            the first n channels of e and the embedding f of the token before it.
        previous: With smear_gate, B numbers: the token at the position before starts[b], -1 at position 0.
        backout_lambda: (1,). Before the last norm x -= lambda m, for the stream m after the block layers // 2.
        lengths: With tokens (N,), the number of tokens of each sequence, from 1; else empty.
        scales: Empty, or one for each matrix of blocks and one for lm_head, (its rows,), float32. The matrices
            are then int8, on the CPU, each row to be multiplied by its scale. See quantize_rows.

    All tensors but tokens have wte's type and device, and are contiguous. If wte is bfloat16, cos, sin, smear_gate and
    the lambdas are float32 in the kernel, and of either type elsewhere.

    Returns:
        The logits of each sequence's last token: (B, V), float32, or float64 for float64; (0, V) if not with_logits.

    Raises:
        ValueError, TypeError: The arguments do not match.
        RuntimeError: A derivative is asked for.

    For float32 and bfloat16 on the CPU this is one call of one kernel: a token's logits have the same bits whatever it
    is batched with, however its prompt was divided, and for every number of threads. The kernel computes in float32,
    and with bfloat16 rounds keys and values alone. Otherwise it is composed of torch's products and `attention`, with a
    pass over the weights for each different length.
    """
    lambdas: dict[str, Any] = {
        "resid_lambdas": resid_lambdas,
        "x0_lambdas": x0_lambdas,
        "smear_gate": smear_gate,
        "smear_lambda": smear_lambda,
        "backout_lambda": backout_lambda,
    }
    given = [part for part in (*value_gates, *value_tables, *lambdas.values(), *scales) if part is not None]
    modes.refuse("cached_forward_", tokens, wte, blocks, lm_head, cos, sin, cache, given)
    run: Callable[..., Tensor]
    if tokens.device.type == "cpu" and wte.dtype in PARAM_DTYPES and backends.backend() == "native":
        backends.require_native()
        run = native_cached_forward_
    else:
        _check(tokens, slots, starts, lengths, wte, lm_head, cache)
        _check_scales(wte, blocks, lm_head, scales)
        _check_parts(wte, cache, qk_scale, value_gates, value_tables, **lambdas)
        _check_previous(starts, previous, wte.size(0), with_smear=smear_gate is not None)
        run = partial(reference_cached_forward_, attention=attention)
    return run(
        tokens,
        slots,
        starts,
        wte=wte,
        blocks=blocks,
        lm_head=lm_head,
        windows=windows,
        cos=cos,
        sin=sin,
        cache=cache,
        softcap=softcap,
        with_logits=with_logits,
        qk_scale=qk_scale,
        value_gates=value_gates,
        value_tables=value_tables,
        previous=previous,
        lengths=lengths,
        scales=scales,
        **lambdas,
    )


def _check(
    tokens: Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    wte: Tensor,
    lm_head: Tensor,
    cache: Tensor,
) -> None:
    """Check what torch would not find. The native operator checks this and the rest by itself."""
    op = "cached_forward_"
    rectangular = tokens.dim() == 2 and tokens.size(1) > 0 and not lengths
    if not (rectangular or (tokens.dim() == 1 and lengths)) or cache.dim() != 5:
        raise ValueError(
            f"{op}: tokens and cache must have shapes (B, T), T >= 1, or (N,) with lengths, "
            "and (layers, slots, capacity, 2 Hkv, D), "
            f"got {tuple(tokens.shape)} and {tuple(cache.shape)} with {len(lengths)} lengths"
        )
    if lengths and (min(lengths) < 1 or sum(lengths) != tokens.numel()):
        raise ValueError(f"{op}: lengths must be from 1 and have the sum {tokens.numel()}, got {list(lengths)}")
    checks.check_dtype(op, "tokens", tokens, (torch.int64,))
    checks.check_alike(op, "wte", wte, cache=cache)
    if lm_head.size(0) > wte.size(0):
        raise ValueError(f"{op}: lm_head must have at most the {wte.size(0)} rows of wte, got {lm_head.size(0)}")
    count, capacity = cache.size(1), cache.size(2)
    lengths = lengths or [tokens.size(1)] * tokens.size(0)
    B = len(lengths)
    if len(slots) != B or len(starts) != B or len(set(slots)) != len(slots):
        raise ValueError(
            f"{op}: slots and starts must hold {B} numbers each, the slots distinct, "
            f"got slots {list(slots)}, starts {list(starts)}"
        )
    for slot, start, length in zip(slots, starts, lengths, strict=True):
        if not (0 <= slot < count and 0 <= start <= capacity - length):
            raise ValueError(
                f"{op}: tokens must fit into {count} slots of {capacity} positions, "
                f"got {length} tokens from position {start} of slot {slot}"
            )


def _check_scales(wte: Tensor, blocks: Sequence[Tensor], lm_head: Tensor, scales: Sequence[Tensor]) -> None:
    """Check the types of the matrices, and their scales."""
    op, matrices = "cached_forward_", (*blocks, lm_head)
    if scales and wte.device.type != "cpu":
        raise ValueError(f"{op}: int8 matrices must be on the CPU, the only device with a kernel for them, got scales")
    if scales and len(scales) != len(matrices):
        raise ValueError(f"{op}: scales must have {len(matrices)} entries or none, got {len(scales)}")
    for place, matrix in enumerate(matrices):
        name = "blocks" if place < len(blocks) else "lm_head"
        checks.check_dtype(op, name, matrix, (torch.int8 if scales else wte.dtype,))
        if scales:
            checks.check_dtype(op, f"scales[{place}]", scales[place], (torch.float32,))
        if scales and scales[place].shape != matrix.shape[:1]:
            raise ValueError(
                f"{op}: scales[{place}] must have shape {tuple(matrix.shape[:1])}, got {tuple(scales[place].shape)}"
            )


def _check_parts(
    wte: Tensor,
    cache: Tensor,
    qk_scale: float,
    value_gates: Sequence[Tensor | None],
    value_tables: Sequence[Tensor | None],
    *,
    resid_lambdas: Tensor | None,
    x0_lambdas: Tensor | None,
    smear_gate: Tensor | None,
    smear_lambda: Tensor | None,
    backout_lambda: Tensor | None,
) -> None:
    """Check the parts of the model that nanochat's first architecture lacks."""
    op, layers, (heads, D) = "cached_forward_", cache.size(0), cache.shape[3:]

    def check(name: str, part: Tensor, shape: tuple[int, ...]) -> None:
        checks.check_device(op, name, part, wte.device, "wte")
        if part.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(part.shape)}")

    def check_together(**pair: Tensor | None) -> None:
        if len(given := [name for name, part in pair.items() if part is not None]) == 1:
            raise ValueError(f"{op}: {' and '.join(pair)} must be given together, got {given[0]} alone")

    def check_gate(name: str, gate: Tensor, outputs: int) -> None:
        channels = gate.size(1) if gate.dim() == 2 else 0
        check(name, gate, (outputs, channels))
        if not 1 <= channels <= wte.size(1):
            raise ValueError(f"{op}: {name} must have from 1 to {wte.size(1)} columns, got {channels}")

    if not math.isfinite(qk_scale):
        raise ValueError(f"{op}: qk_scale must be finite, got {qk_scale}")
    check_together(resid_lambdas=resid_lambdas, x0_lambdas=x0_lambdas)
    check_together(smear_gate=smear_gate, smear_lambda=smear_lambda)
    sizes = {"resid_lambdas": layers, "x0_lambdas": layers, "smear_lambda": 1, "backout_lambda": 1}
    for (name, size), part in zip(
        sizes.items(), (resid_lambdas, x0_lambdas, smear_lambda, backout_lambda), strict=True
    ):
        if part is not None:
            check(name, part, (size,))
    if smear_gate is not None:
        check_gate("smear_gate", smear_gate, 1)
    if backout_lambda is not None and not layers:
        raise ValueError(f"{op}: backout_lambda must be None without layers")
    if not value_gates and not value_tables:
        return
    if len(value_gates) != layers or len(value_tables) != layers:
        raise ValueError(
            f"{op}: value_gates and value_tables must have {layers} entries or none, "
            f"got {len(value_gates)} and {len(value_tables)}"
        )
    for gate, table in zip(value_gates, value_tables, strict=True):
        check_together(value_gates=gate, value_tables=table)
        if gate is not None and table is not None:
            checks.check_alike(op, "wte", wte, value_gates=gate, value_tables=table)
            check_gate("value_gates", gate, heads // 2)
            check("value_tables", table, (wte.size(0), heads // 2 * D))


def _check_previous(starts: Sequence[int], previous: Sequence[int], tokens: int, *, with_smear: bool) -> None:
    """Check the tokens before the first ones."""
    op, count = "cached_forward_", len(starts) if with_smear else 0
    if len(previous) != count:
        raise ValueError(
            f"{op}: previous must have {count} entries {'with' if with_smear else 'without'} smear_gate, "
            f"got {len(previous)}"
        )
    for start, token in zip(starts, previous, strict=False):
        if not (0 <= token < tokens if start else token == -1):
            raise ValueError(
                f"{op}: previous must be -1 at position 0 and a token from 0 to {tokens - 1} elsewhere, "
                f"got {token} at position {start}"
            )


def to_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Return whole numbers, in lists of any depth, as an int64 tensor, without a wait for a CUDA GPU."""
    is_cuda = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=is_cuda).to(device, non_blocking=is_cuda)


# --- reference ---


def reference_cached_forward_(
    tokens: Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    *,
    lengths: Sequence[int] = (),
    previous: Sequence[int] = (),
    **others: Any,
) -> Tensor:
    """Do what `cached_forward_` does, with torch's products and `attention`, by default the reference of it."""
    if tokens.dim() == 2:
        return _forward_of_one_length(tokens, slots, starts, previous=previous, **others)
    parts, logits = tokens.split(list(lengths)), dict[int, Tensor]()
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        found = _forward_of_one_length(
            torch.stack([parts[row] for row in rows]),
            [slots[row] for row in rows],
            [starts[row] for row in rows],
            previous=[previous[row] for row in rows] if previous else (),
            **others,
        )
        logits |= zip(rows, found, strict=False)
    return torch.stack([logits[row] for row in range(len(lengths))]) if logits else found


@torch.no_grad()
def _forward_of_one_length(
    tokens: Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    *,
    wte: Tensor,
    blocks: Sequence[Tensor],
    lm_head: Tensor,
    windows: Sequence[int | None],
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    softcap: float,
    with_logits: bool = True,
    qk_scale: float = 1.0,
    value_gates: Sequence[Tensor | None] = (),
    value_tables: Sequence[Tensor | None] = (),
    resid_lambdas: Tensor | None = None,
    x0_lambdas: Tensor | None = None,
    smear_gate: Tensor | None = None,
    smear_lambda: Tensor | None = None,
    previous: Sequence[int] = (),
    backout_lambda: Tensor | None = None,
    scales: Sequence[Tensor] = (),
    attention: Callable[..., Tensor] = reference_attention,
) -> Tensor:
    T, device, (Hkv2, D) = tokens.size(1), tokens.device, cache.shape[3:]
    wide = compute_dtype(wte.dtype)
    # `before` are the tokens before the first ones.
    places = [list(slots), list(starts)] + [list(previous)] * (smear_gate is not None)
    slot, first, *before = to_device(places, device)
    at = first[:, None] + torch.arange(T, device=device)
    cos, sin, half = cos[at][:, :, None], sin[at][:, :, None], D // 2

    def norm(x: Tensor, scale: float = 1.0) -> Tensor:
        x = x.to(compute_dtype(x.dtype))
        return (x * ((x.square().mean(-1, keepdim=True) + EPS).rsqrt() * scale)).to(wte.dtype)

    def rotated_norm(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, D))
        swapped = torch.cat((x[..., half:] * sin, x[..., :half] * -sin), dim=-1)
        return norm(x * cos + swapped, qk_scale)

    def smeared(x: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
        """Add a part of the embedding before it to each embedding."""
        ids = torch.cat((before[0][:, None], tokens), dim=1)[:, :-1]
        neighbour = torch.where((ids >= 0)[..., None], norm(F.embedding(ids.clamp(min=0), wte)), 0)
        part = scale.to(wide) * (x[..., : gate.size(1)].to(wide) @ gate.to(wide).T).sigmoid()
        return (x.to(wide) + part * neighbour.to(wide)).to(x.dtype)

    def with_embeddings(values: Tensor, h: Tensor, gate: Tensor, table: Tensor) -> Tensor:
        gates = 3 * (h[..., : gate.size(1)].to(wide) @ gate.to(wide).T).sigmoid()
        embedded = F.embedding(tokens, table).unflatten(-1, (-1, D)).to(wide)
        return (values.to(wide) + gates[..., None] * embedded).to(values.dtype)

    def product(x: Tensor, place: int) -> Tensor:
        """Multiply x by a matrix of blocks, or by lm_head, which follows them."""
        w = blocks[place] if place < len(blocks) else lm_head
        if not scales:
            return x @ w.T
        return ((x @ w.to(x.dtype).T).to(wide) * scales[place].to(wide)).to(x.dtype)

    def mixed(x: Tensor, x_scale: Tensor | float, other: Tensor, scale: Tensor) -> Tensor:
        return (x_scale * x.to(wide) + scale.to(wide) * other.to(wide)).to(x.dtype)

    x = norm(F.embedding(tokens, wte))
    if smear_gate is not None and smear_lambda is not None:
        x = smeared(x, smear_gate, smear_lambda)
    x0 = middle = x
    for layer, window in enumerate(windows):
        q, k, v, out, fc, proj = range(6 * layer, 6 * layer + 6)
        if resid_lambdas is not None and x0_lambdas is not None:
            x = mixed(x, resid_lambdas[layer].to(wide), x0, x0_lambdas[layer])
        h = norm(x)
        values = product(h, v).unflatten(-1, (-1, D))
        gate, table = (parts[layer] if parts else None for parts in (value_gates, value_tables))
        if gate is not None and table is not None:
            values = with_embeddings(values, h, gate, table)
        cache[layer, slot[:, None], at] = torch.cat((rotated_norm(product(h, k)), values), dim=2).to(cache.dtype)
        keys, values = cache[layer].index_select(0, slot).to(wte.dtype).split(Hkv2 // 2, dim=2)
        attended = attention(rotated_norm(product(h, q)), keys, values, window=window, lengths=first + T)
        x = x + product(attended.flatten(-2), out)
        x = x + product(product(norm(x), fc).relu().square(), proj)
        middle = x if layer == len(windows) // 2 else middle
    if not with_logits:
        return wte.new_empty((0, lm_head.size(0)))
    if backout_lambda is not None:
        x = mixed(x, 1.0, middle, -backout_lambda)
    logits = product(norm(x[:, -1]), len(blocks)).to(wide)
    return torch.tanh(logits / softcap) * softcap if softcap else logits


# --- native ---


@torch.no_grad()
def native_cached_forward_(
    tokens: Tensor, slots: Sequence[int], starts: Sequence[int], windows: Sequence[int | None], **others: Any
) -> Tensor:
    """Run the kernel."""
    limits = [-1 if window is None else window for window in windows]
    return torch.ops.nanochat_native.cached_forward_(tokens, slots, starts, windows=limits, **others)


def _fake(
    tokens: Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    wte: Tensor,
    blocks: Sequence[Tensor],
    lm_head: Tensor,
    windows: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    softcap: float,
    with_logits: bool,
    *parts: Any,
    **named_parts: Any,
) -> Tensor:
    return wte.new_empty((len(slots) if with_logits else 0, lm_head.size(0)), dtype=compute_dtype(wte.dtype))


schema.register("cached_forward_", _fake)
