"""Demonstrations of chapter 5: the mask, the scale, rotary positions, QK-norm, grouped heads, and the attention of a
trained run."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.data import iterate_val, prepare
from nanochat_native.data.shards import TokenStream
from nanochat_native.model import GPT, GPTConfig, attention_weights
from nanochat_native.model.functional import add_norm, norm, rotary_norm
from nanochat_native.ops.attention import attention_mask
from nanochat_native.runs.config import STDLIB
from nanochat_native.runs.run_folder import load_config
from nanochat_native.runs.saved_model import load_model

D4 = GPTConfig.from_depth(4, vocab_size=8192, sequence_len=256)
CODE = """def mean(values):
    if not values:
        raise ValueError("no values")
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""
LENGTHS = (64, 128, 256, 512, 1024, 2048)  # tokens that a row of the text has in context_length


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """Return a model in which the weights that start at zero are random too, so that every layer counts."""
    model = GPT(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def causal_mask() -> dict[str, Any]:
    """Change one token of a sequence and see which logits of a random model change; then invert the mask.

    The inverted mask hides the keys j <= i, as a chapter of the original guide has it. The last query then sees no key.
    """
    length, changed = 64, 40
    model = random_model(GPTConfig.from_depth(2, vocab_size=256, sequence_len=length, head_dim=32))
    ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % 256
    one, two = model(ids)[0], model(other)[0]
    same = (one == two).all(dim=-1)
    scores = normal(8, 32, seed=2) @ normal(8, 32, seed=3).T / 32**0.5
    visible = attention_mask(8, 8, True, None)
    inverted = scores.masked_fill(visible, -torch.inf).softmax(dim=-1)
    return {
        "positions": length,
        "changed_position": changed,
        "positions_before": int(same[:changed].numel()),
        "positions_before_with_the_same_bits": int(same[:changed].sum()),
        "positions_after_that_changed": int((~same[changed:]).sum()),
        "largest_change_after": float((one - two)[changed:].abs().max()),
        "inverted": {
            "rows": 8,
            "rows_that_are_nan": int(inverted.isnan().any(dim=-1).sum()),
            "weight_of_row_0_on_the_future": float(inverted[0, 1:].sum()),
            "weight_of_row_0_on_itself": float(inverted[0, 0]),
        },
    }


def attention_scale() -> dict[str, Any]:
    """Measure the spread of scores q k, and how much weight the largest of 64 keys gets, with and without 1 / sqrt(D).

    q and k are standard normal. The scale is that of Vaswani et al., 2017, arXiv:1706.03762, section 3.2.1. slope: the
    mean over queries of sum_j w_j (1 - w_j), by which the softmax passes gradients to its scores.
    """
    found = []
    for D in (4, 16, 64, 128, 256):
        q, k = normal(512, D, seed=D), normal(512, 64, D, seed=D + 1)
        scores = torch.einsum("id,ijd->ij", q, k)
        row: dict[str, Any] = {"D": D, "sqrt_D": D**0.5, "spread": float(scores.std())}
        for name, scale in (("scaled", D**-0.5), ("unscaled", 1.0)):
            weights = (scores * scale).softmax(dim=-1)
            row[name] = {
                "largest_weight": float(weights.amax(dim=-1).mean()),
                "slope": float((weights * (1 - weights)).sum(dim=-1).mean()),
            }
        found.append(row)
    return {"sizes": found}


@torch.no_grad()
def rotary_positions() -> dict[str, Any]:
    """Rotate random queries and keys as d4 does, and see what their scores depend on.

    RoPE is from Su et al., 2021, arXiv:2104.09864. shift: the largest change of a score if both positions grow by the
    same number. wrong_sign: the same if the keys turn the other way. lengths: the largest relative change of a length.
    commute: the largest difference between normalizing before and after the rotation.
    """
    model = GPT(D4)
    D, pairs = D4.head_dim, 256
    q, k = normal(pairs, D, seed=1), normal(pairs, D, seed=2)
    generator = torch.Generator().manual_seed(3)
    m, n = (torch.randint(256, (pairs,), generator=generator) for _ in range(2))

    def turned(x: Tensor, positions: Tensor, sign: float = 1.0) -> Tensor:
        x = x[None, :, None]
        return rotary_norm(x, x, model.cos[:, positions], sign * model.sin[:, positions])[0][0, :, 0]

    def scores(shift: int, sign: float = 1.0) -> Tensor:
        return (turned(q, m + shift) * turned(k, n + shift, sign)).sum(-1) / D**0.5

    shifts = (1, 10, 100, 1000, 2000)
    x = normal(pairs, D, seed=4)
    rms = x.square().mean(-1, keepdim=True).sqrt()
    before = turned(norm(x), m)
    halves = x.chunk(2, dim=-1)
    cos, sin = model.cos[0, m, 0, : D // 2], model.sin[0, m, 0]
    plain = torch.cat((halves[0] * cos + halves[1] * sin, halves[1] * cos - halves[0] * sin), dim=-1)
    frequencies = [float(10000 ** (-2 * i / D)) for i in range(D // 2)]
    turns = [2 * math.pi / frequency for frequency in frequencies]
    return {
        "head_size": D,
        "score_spread": float(scores(0).std()),
        "shift": {str(shift): float((scores(shift) - scores(0)).abs().max()) for shift in shifts},
        "wrong_sign": {str(shift): float((scores(shift, -1.0) - scores(0, -1.0)).abs().max()) for shift in shifts},
        "lengths": float((plain.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max()),
        "commute": float((before - plain / rms).abs().max()),
        "frequencies": frequencies,
        "tokens_of_a_turn": {"fastest": turns[0], "middle": turns[D // 4], "slowest": turns[-1]},
        "pairs_that_turn_once_in_256_tokens": sum(turn <= 256 for turn in turns),
        "similarity_by_distance": [
            sum(math.cos(distance * frequency) for frequency in frequencies) / len(frequencies)
            for distance in range(0, 513, 4)
        ],
    }


@torch.no_grad()
def order_without_positions() -> dict[str, Any]:
    """Exchange earlier tokens and measure how much the last logits of a random model change.

    Without rotary positions, one layer of attention is a weighted sum over a set of earlier tokens. With two layers the
    causal mask alone tells positions apart: a token's first-layer output depends on which tokens come before it (Haviv
    et al., 2022, arXiv:2203.16634).
    """
    length = 32
    ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(5))
    shuffled = ids.clone()
    order = torch.randperm(length - 1, generator=torch.Generator().manual_seed(6))
    shuffled[0, :-1] = ids[0, order]
    found: dict[str, Any] = {"tokens_exchanged": int((shuffled != ids).sum())}
    for layers in (1, 2):
        config = GPTConfig(
            sequence_len=length, vocab_size=256, n_layer=layers, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L"
        )
        model = random_model(config)
        for name in ("with_rotary_positions", "without_positions"):
            if name == "without_positions":
                model.cos.fill_(1.0)
                model.sin.fill_(0.0)
            change = (model(ids)[0, -1] - model(shuffled)[0, -1]).abs().max()
            found.setdefault(f"{layers}_layer{'s' * (layers > 1)}", {})[name] = float(change)
    return found


def _validation(checkpoint: Path) -> tuple[GPT, Any, TokenStream]:
    """Return the model, the tokenizer and the validation text of a run."""
    model, tokenizer, _ = load_model(checkpoint, warn=lambda text: None)
    config = load_config(checkpoint)
    assert config.cache_dir is not None
    corpus = prepare(
        None if config.data == STDLIB else config.data,
        vocab_size=tokenizer.vocab_size,
        cache_dir=config.cache_dir,
        tokenizer=tokenizer,
        text_column=config.text_column,
        needs_training=False,
    )
    return model, tokenizer, corpus.val


@torch.inference_mode()
def context_length(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Measure a trained model on one text, cut into rows of different lengths, and by position in the longest rows.

    Every length measures the same tokens, and a token in a longer row has more tokens before it. Bits per byte is that
    of evaluate. by_position: bits per byte of the tokens at positions 0 to 255, 256 to 511, ... of the longest rows.
    same_tokens: bits per byte of these tokens in rows of the trained length.
    """
    model, tokenizer, text = _validation(checkpoint)
    trained = model.config.sequence_len
    most = min(model.max_positions, len(text) // 8)
    lengths = sorted({trained, *(length for length in LENGTHS if length <= most)})
    longest, tokens = lengths[-1], 8 * lengths[-1]
    sizes = torch.from_numpy(tokenizer.token_bytes).long()
    found, rows = {}, []
    for length in lengths:
        pairs = list(iterate_val(text, batch_rows=max(1, 2048 // length), sequence_len=length, max_tokens=tokens))
        size = torch.cat([sizes[targets.clamp(min=0)].flatten() for _, targets in pairs])
        nats = torch.cat([model(inputs, targets, reduction="none").double().flatten() for inputs, targets in pairs])
        found[length] = (nats * (size > 0), size)
        bits = float(found[length][0].sum()) / (math.log(2) * int(size.sum()))
        rows.append({"T": length, "bits_per_byte": bits, "targets": len(nats)})

    def by_position(length: int) -> list[float]:
        shape = (-1, longest // trained, trained) if longest % trained == 0 else (-1, 1, longest)
        nats, size = (values.reshape(shape).sum(dim=(0, 2)) for values in found[length])
        return (nats / (math.log(2) * size)).tolist()

    return {
        "trained": trained,
        "tokens": tokens,
        "lengths": rows,
        "by_position": by_position(longest),
        "same_tokens": by_position(min(trained, longest)),
    }


@torch.inference_mode()
def attention_maps(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Compute the attention of a trained model on a few lines of Python, and what its heads look at on validation text.

    Heads: the mean weight on the first token, on the token itself and on the one before it, over all queries but the
    first 16; and the mean distance between a query and its keys, by weight. equal_weights: the same if every
    visible key had the same weight. untrained: the weight on the first token before training. The first token of a
    document that gets much weight is called a sink (Xiao et al., 2023, arXiv:2309.17453).
    """
    model, tokenizer, text = _validation(checkpoint)
    ids = [tokenizer.bos_id, *tokenizer.encode(CODE)][: model.max_positions]
    weights = attention_weights(model, torch.tensor([ids]))[:, 0]
    lower = torch.tril_indices(len(ids), len(ids)).unbind()
    config = model.config
    length = min(config.sequence_len, 256)
    start = min(16, length // 2)
    rows = torch.cat([x for x, _ in iterate_val(text, batch_rows=4, sequence_len=length, max_tokens=16 * length)])
    starting = rows.clone()
    starting[:, 0] = tokenizer.bos_id
    untrained = GPT(config)
    untrained.init_weights()
    equal = attention_mask(length, length, True, None).float()
    equal /= equal.sum(dim=-1, keepdim=True)

    def seen(weights: Tensor) -> dict[str, float]:
        """Return what a matrix of weights (..., T, T) looks at."""
        mean = weights.reshape(-1, length, length).mean(dim=0)[start:]
        distance = (torch.arange(length)[:, None] - torch.arange(length))[start:]
        return {
            "first": float(mean[:, 0].mean()),
            "itself": float((mean * (distance == 0)).sum(dim=-1).mean()),
            "previous": float((mean * (distance == 1)).sum(dim=-1).mean()),
            "mean_distance": float((mean * distance).sum(dim=-1).mean()),
        }

    def of_all(model: GPT, rows: Tensor) -> Tensor:
        """Return the weights of some rows, (n_layer, B, H, T, T)."""
        return torch.cat([attention_weights(model, part) for part in rows.split(4)], dim=1)

    trained = of_all(model, starting)
    heads = [
        {"layer": layer, "head": head} | seen(trained[layer, :, head])
        for layer in range(config.n_layer)
        for head in range(config.n_head)
    ]
    before = of_all(untrained, starting)
    middle = of_all(model, rows)
    return {
        "tokens": [tokenizer.decode([token]) for token in ids],
        "maps": {
            f"layer_{layer}_head_{head}": [round(value, 3) for value in weights[layer, head][lower].tolist()]
            for layer in range(config.n_layer)
            for head in range(config.n_head)
        },
        "largest_deviation_of_a_row_sum_from_1": float((weights.sum(dim=-1) - 1).abs().max()),
        "rows": len(rows),
        "T": length,
        "heads": heads,
        "layers": [{"layer": layer} | seen(trained[layer]) for layer in range(config.n_layer)],
        "layers_without_bos": [{"layer": layer} | seen(middle[layer]) for layer in range(config.n_layer)],
        "equal_weights": seen(equal),
        "untrained": [{"layer": layer} | seen(before[layer]) for layer in range(config.n_layer)],
        "largest_share_on_the_first": max(head["first"] for head in heads),
        "largest_share_on_the_previous": max(head["previous"] for head in heads),
    }


@torch.inference_mode()
def qk_norm(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Measure the scores of a trained model, and what they would be without the norm of queries and keys.

    The norm makes every query and key sqrt(D) long, so a score lies between -sqrt(D) and sqrt(D) (Henry et al., 2020,
    arXiv:2010.04245, and Dehghani et al., 2023, arXiv:2302.05442). without: the scores of the same weights with the
    rotation alone.
    """
    model, _, text = _validation(checkpoint)
    length = min(model.config.sequence_len, 256)
    rows = torch.cat([x for x, _ in iterate_val(text, batch_rows=4, sequence_len=length, max_tokens=8 * length)])
    cos, sin = model.cos[:, :length], model.sin[:, :length]
    D = model.config.head_dim
    hidden = ~attention_mask(length, length, True, None)
    x, inputs = add_norm(norm(model.wte(rows)), None)
    layers = []
    for layer, block in enumerate(model.blocks):
        q, k, _ = block.attn.project(inputs, cos, sin)
        raw = [linear(inputs).unflatten(-1, (-1, D)) for linear in (block.attn.c_q, block.attn.c_k)]
        sizes = [y.square().mean(dim=-1).sqrt() for y in raw]
        plain = [y * size[..., None] for y, size in zip((q, k), sizes, strict=True)]
        pairs = {"score": (q, k), "without": tuple(plain)}
        row: dict[str, Any] = {"layer": layer}
        for name, (one, other) in pairs.items():
            group = one.size(2) // other.size(2)
            scores = torch.einsum("bihd,bjhd->bhij", one, other.repeat_interleave(group, dim=2)) / D**0.5
            visible = scores.masked_fill(hidden, 0.0)
            row[f"largest_{name}"] = float(visible.abs().max())
        row["longest_query"] = float(q.norm(dim=-1).max())
        row["rms_of_queries_before"] = float(sizes[0].mean())
        row["rms_of_keys_before"] = float(sizes[1].mean())
        layers.append(row)
        x, inputs = add_norm(*block(x, inputs, cos, sin))
    return {
        "bound": D**0.5,
        "layers": layers,
        "largest_score": max(row["largest_score"] for row in layers),
        "largest_without": max(row["largest_without"] for row in layers),
    }


@torch.no_grad()
def grouped_heads() -> dict[str, Any]:
    """Compare heads that share keys with copied keys, and count the bytes that a token takes in the cache of d4.

    Grouped-query attention is from Ainslie et al., 2023, arXiv:2305.13245, and one key head for all, multi-query
    attention, from Shazeer, 2019, arXiv:1911.02150.
    """
    q, k, v = normal(1, 64, 8, 32, seed=1), normal(1, 64, 2, 32, seed=2), normal(1, 64, 2, 32, seed=3)
    shared = ops.attention(q, k, v)
    copied = ops.attention(q, k.repeat_interleave(4, dim=2), v.repeat_interleave(4, dim=2))
    wide = GPTConfig.from_depth(20, vocab_size=65536, sequence_len=2048)

    def cache(config: GPTConfig, heads: int) -> int:
        return 2 * config.n_layer * heads * config.head_dim * 4

    return {
        "difference": float((shared - copied).abs().max()),
        "bytes_of_keys_and_values": {"shared": 2 * k.numel() * 4, "copied": 2 * 4 * k.numel() * 4},
        "bytes_of_a_token_in_float32": {
            "d4": {str(heads): cache(D4, heads) for heads in (2, 1)},
            "d20": {str(heads): cache(wide, heads) for heads in (10, 5, 2, 1)},
        },
    }


@torch.no_grad()
def attention_window() -> dict[str, Any]:
    """Count the keys that queries of an L layer and of an S layer of d4 see, and check that no weight is outside.

    reach: how many tokens back a change is seen by the last query, through one S layer and through two, in a random
    model. Stacked windows see further than one window (Beltagy et al., 2020, arXiv:2004.05150).
    """
    length = D4.sequence_len
    window = length // 4
    full = int(attention_mask(length, length, True, None).sum())
    short = int(attention_mask(length, length, True, window).sum())
    reach, outside = {}, 0.0
    for layers, name in ((1, "one_S_layer"), (2, "two_S_layers")):
        config = GPTConfig(
            sequence_len=64, vocab_size=64, n_layer=layers + 1, n_head=2, n_kv_head=2, n_embd=32, window_pattern="S"
        )
        model = random_model(config)
        ids = torch.randint(64, (1, 64), generator=torch.Generator().manual_seed(1))
        weights = attention_weights(model, ids)[:-1]
        outside = max(outside, float(weights[..., ~attention_mask(64, 64, True, 16)].abs().max()))
        reach[name] = _reach(model, ids, layers)
    return {
        "T": length,
        "window": window,
        "pairs_of_an_L_layer": full,
        "pairs_of_an_S_layer": short,
        "share": short / full,
        "largest_weight_outside_the_window": outside,
        "window_of_the_test": 16,
        "reach": reach,
    }


def _reach(model: GPT, ids: Tensor, layers: int) -> int:
    """Return how many tokens back a change of a token changes the last position of the residual stream."""

    def last(ids: Tensor) -> Tensor:
        x, n = add_norm(norm(model.wte(ids)), None)
        for block in model.blocks[:layers]:
            x, n = add_norm(*block(x, n, model.cos[:, : ids.size(1)], model.sin[:, : ids.size(1)]))
        return x[0, -1]

    expected = last(ids)
    for position in range(ids.size(1)):
        other = ids.clone()
        other[0, position] = (ids[0, position] + 1) % model.config.vocab_size
        if not torch.equal(last(other), expected):
            return ids.size(1) - 1 - position
    return 0


DEMONSTRATIONS = {
    "causal-mask": causal_mask,
    "attention-scale": attention_scale,
    "rotary-positions": rotary_positions,
    "order-without-positions": order_without_positions,
    "context-length": context_length,
    "attention-maps": attention_maps,
    "qk-norm": qk_norm,
    "grouped-heads": grouped_heads,
    "attention-window": attention_window,
}
