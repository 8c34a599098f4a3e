"""cached_forward_: against its reference and the model; the same bits in every batch; the cache; wrong arguments."""

import dataclasses
from typing import NamedTuple

import pytest
import torch

from nanochat_native import ops
from nanochat_native.model.gpt import SOFTCAP
from nanochat_native.ops import reference
from nanochat_native.ops.cached_forward import EPS
from nanochat_native.ops.quantization import dequantize_rows, quantize_rows

OPERATOR = torch.ops.nanochat_native.cached_forward_.default


class Shape(NamedTuple):
    """The sizes of a model, with C = H D: some fill whole vectors, others do not."""

    H: int
    Hkv: int
    D: int
    F: int
    V: int
    windows: tuple = (None, None)
    today: bool = False  # with all parts that nanochat's first architecture lacks
    slots: int = 5
    capacity: int = 300


KINDS = ("bfloat16", "int8", "bfloat16 int8")  # of the weights, beside float32
SHAPES = {
    "heads": Shape(2, 2, 64, 512, 1000),
    "wide": Shape(3, 3, 128, 1536, 777, (None,)),
    "grouped": Shape(4, 2, 32, 320, 130, (3, None, 130)),
    "one_kv_head": Shape(6, 1, 16, 96, 50),
    "odd": Shape(3, 1, 10, 37, 11, (7, None)),
    "depth5": Shape(4, 2, 80, 160, 70),
    "tiny": Shape(1, 1, 2, 1, 1, (0, None, 1)),
    "no_blocks": Shape(2, 1, 8, 16, 20, ()),
    "today": Shape(2, 2, 64, 512, 1000, (40, None), today=True),
    "today_grouped": Shape(4, 2, 32, 320, 130, (3, None, 130, 40, 90), today=True),
    "today_one_kv_head": Shape(3, 1, 10, 37, 11, (7, None, 64), today=True),
    "today_one_block": Shape(1, 1, 26, 50, 30, (100,), today=True),
    "today_tiny": Shape(1, 1, 2, 1, 3, (0, None, 1), today=True),
}
EXTRA_ROWS = 6  # of the embeddings, beyond those of lm_head
PARTS = {
    "qk_scale": {"qk_scale": 1.0},
    "value_embeddings": {"value_gates": (), "value_tables": ()},
    "residual_scalars": {"resid_lambdas": None, "x0_lambdas": None},
    "smear": {"smear_gate": None, "smear_lambda": None, "previous": ()},
    "backout": {"backout_lambda": None},
}


@dataclasses.dataclass
class Setting:
    shape: Shape
    weights: dict
    cache: torch.Tensor
    tokens: dict = dataclasses.field(default_factory=dict)  # by slot and position; 2 where none was put

    def run(self, tokens, slots, starts, run=ops.cached_forward_, **others):
        """Run rows of tokens, of equal lengths or not."""
        arguments = {**self.weights, "cache": self.cache, "softcap": SOFTCAP}
        if self.shape.today:
            places = zip(slots, starts, strict=True)
            arguments["previous"] = [self.tokens.get((slot, at - 1), 2) if at else -1 for slot, at in places]
        lengths = [len(row) for row in tokens]
        if len(set(lengths)) > 1:
            tokens_, arguments["lengths"] = torch.tensor([token for row in tokens for token in row]), lengths
        else:
            tokens_ = torch.tensor(tokens)
        logits = run(tokens_, slots, starts, **arguments | others)
        for slot, start, row in zip(slots, starts, tokens, strict=True):
            self.tokens |= {(slot, start + i): token for i, token in enumerate(row)}
        return logits

    def fresh(self, fill=0.0):
        return dataclasses.replace(self, cache=torch.full_like(self.cache, fill), tokens={})

    def exact(self):
        """Return this setting in float64, with the cells of the cache, which stays bfloat16 if it is."""

        def wide(value):
            if isinstance(value, list | tuple):
                return [wide(x) for x in value]
            return value.double() if isinstance(value, torch.Tensor) else value

        weights = {key: wide(value) for key, value in self.weights.items()}
        cache = self.cache.clone() if self.cache.dtype == torch.bfloat16 else self.cache.double()
        return dataclasses.replace(self, weights=weights, cache=cache, tokens=dict(self.tokens))

    def quantized(self):
        """Return this setting with the matrices in int8."""
        pairs = [quantize_rows(matrix) for matrix in (*self.weights["blocks"], self.weights["lm_head"])]
        codes, scales = ([pair[i] for pair in pairs] for i in range(2))
        weights = self.weights | {"blocks": codes[:-1], "lm_head": codes[-1], "scales": scales}
        return dataclasses.replace(self, weights=weights)


def of_kind(name, kind):
    """Return a setting of one of KINDS."""
    made = setting(name, torch.bfloat16 if "bfloat16" in kind else torch.float32)
    return made.quantized() if "int8" in kind else made


def setting(name, dtype=torch.float32):
    s = SHAPES[name]
    C, layers = s.H * s.D, len(s.windows)
    wide = torch.promote_types(dtype, torch.float32)

    def matrix(*size):
        return (torch.randn(size, dtype=torch.float64) * size[-1] ** -0.5).to(dtype)

    blocks = []
    for _ in range(layers):
        blocks += [matrix(C, C), matrix(s.Hkv * s.D, C), matrix(s.Hkv * s.D, C)]
        blocks += [matrix(C, C), matrix(s.F, C), matrix(C, s.F)]
    angles = torch.rand(s.capacity, s.D // 2, dtype=torch.float64) * 6
    weights = {
        "wte": matrix(s.V + EXTRA_ROWS * s.today, C),
        "blocks": blocks,
        "lm_head": 4 * matrix(s.V, C),
        "windows": list(s.windows),
        "cos": torch.cat((angles, angles), -1).cos().to(wide),
        "sin": angles.sin().to(wide),
    }
    if s.today:
        rows, channels = s.V + EXTRA_ROWS, s.Hkv * s.D
        embedded = [layer % 2 == (layers - 1) % 2 for layer in range(layers)]
        weights |= {
            "qk_scale": 1.3,
            "value_gates": [2 * matrix(s.Hkv, min(12, C)) if own else None for own in embedded],
            "value_tables": [channels**0.5 * matrix(rows, channels) if own else None for own in embedded],
            "resid_lambdas": (0.7 + 0.6 * torch.rand(layers, dtype=torch.float64)).to(wide),
            "x0_lambdas": (0.3 + torch.rand(layers, dtype=torch.float64)).to(wide),
            "smear_gate": 2 * matrix(1, min(24, C)).to(wide),
            "smear_lambda": torch.tensor([0.9], dtype=wide),
            "backout_lambda": torch.tensor([0.6], dtype=wide),
        }
    cache = torch.zeros(layers, s.slots, s.capacity, 2 * s.Hkv, s.D, dtype=dtype)
    return Setting(s, weights, cache)


def tokens_of(shape, *size):
    return torch.randint(0, shape.V, size).tolist()


@pytest.mark.parametrize("T", [1, 2, 3, 5, 33, 140])
@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_reference_in_float64(name, T):
    mine = setting(name)
    exact = mine.exact()
    prompts, next_tokens = tokens_of(mine.shape, 3, T), tokens_of(mine.shape, 3, 1)
    slots = [4, 0, 2]
    for run, s in ((ops.cached_forward_, mine), (reference.cached_forward_, exact)):
        s.run(prompts[:1], [4], [0], run, with_logits=False)
        s.run([prompts[1]], [0], [5], run)
        s.run([prompts[2]], [2], [0], run)
    starts = [T, 5 + T, T]
    found = mine.run(next_tokens, slots, starts)
    expected = exact.run(next_tokens, slots, starts, reference.cached_forward_)
    assert found.dtype == torch.float32
    assert found.shape == (3, mine.shape.V)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine.cache.double(), exact.cache, atol=1e-4, rtol=1e-4)
    if mine.shape.V > 1:
        assert expected.std() > 0.1, "the weights do not show in the logits"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("name", SHAPES)
def test_weights_of_few_bits_match_the_reference_in_float64(name, T, kind):
    """A key or value may be rounded to the other of two neighbours in bfloat16, if it is close to their middle."""
    mine = of_kind(name, kind)
    exact = mine.exact()
    prompts, next_tokens = tokens_of(mine.shape, 3, T), tokens_of(mine.shape, 3, 1)
    slots, starts = [4, 0, 2], [T, T, T]
    for run, s in ((ops.cached_forward_, mine), (reference.cached_forward_, exact)):
        s.run(prompts, slots, [0, 0, 0], run, with_logits=False)
    found = mine.run(next_tokens, slots, starts)
    expected = exact.run(next_tokens, slots, starts, reference.cached_forward_)
    assert found.dtype == torch.float32
    loose = 5e-3 if "bfloat16" in kind else 1e-4
    torch.testing.assert_close(found.double(), expected, atol=loose, rtol=loose)
    torch.testing.assert_close(mine.cache.double(), exact.cache.double(), atol=loose, rtol=2 * loose)


@pytest.mark.parametrize("name", ["grouped", "today_grouped"])
def test_int8_computes_with_the_numbers_that_the_codes_stand_for(name):
    s = setting(name)
    small = s.quantized()
    *blocks, lm_head = [
        dequantize_rows(codes, scales)
        for codes, scales in zip(
            (*small.weights["blocks"], small.weights["lm_head"]), small.weights["scales"], strict=True
        )
    ]
    tokens = tokens_of(s.shape, 2, 9)
    found = small.fresh().run(tokens, [0, 3], [0, 0])
    plain = s.fresh().run(tokens, [0, 3], [0, 0])
    torch.testing.assert_close(
        found, s.fresh().run(tokens, [0, 3], [0, 0], blocks=blocks, lm_head=lm_head), atol=1e-4, rtol=1e-4
    )
    assert 1e-3 < (found - plain).abs().max() < 0.5


FEW = ["heads", "odd", "today_grouped", "depth5"]


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "float32") for name in SHAPES), *((name, kind) for name in FEW for kind in KINDS)]
)
def test_same_bits_for_every_division_of_a_prompt_batch_and_number_of_threads(name, kind):
    s = of_kind(name, kind)
    length = 200 if name != "wide" else 140
    sequence = tokens_of(s.shape, length)
    whole = s.fresh()
    expected = whole.run([sequence], [0], [0])
    cell = whole.cache[:, 0, :length]
    for cuts in ([1, 2, 128, 131], [length - 1], [64, 65, 66, 67, 68], list(range(1, 40))):
        cut = s.fresh()
        for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
            logits = cut.run([sequence[begin:end]], [3], [begin])
        assert torch.equal(logits, expected), cuts
        assert torch.equal(cut.cache[:, 3, :length], cell), cuts
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(s.fresh().run([sequence], [0], [0]), expected), threads
        beside = s.fresh()
        for slot in (1, 3, 4):
            beside.run([sequence[:-1]], [slot], [0])
        others = tokens_of(s.shape, 2, 1)
        for slots in ([1], [1, 0], [3, 2, 1], [0, 3, 2, 1], [2, 0, 1, 4, 3]):
            rows = {1: sequence[-1:], 3: sequence[-1:], 4: sequence[-1:], 0: others[0], 2: others[1]}
            starts = {1: length - 1, 3: length - 1, 4: length - 1, 0: 0, 2: 7}
            found = beside.run([rows[slot] for slot in slots], slots, [starts[slot] for slot in slots])
            assert torch.equal(found[slots.index(1)], expected[0]), (threads, slots)


@pytest.mark.parametrize("name", SHAPES)
def test_sequences_of_different_lengths_have_the_bits_that_each_has_alone(name):
    s = setting(name)
    lengths, starts, slots = [1, 70, 2, 1, 9], [66, 0, 130, 0, 60], [3, 0, 4, 1, 2]
    before = [tokens_of(s.shape, start) for start in starts]
    rows = [tokens_of(s.shape, length) for length in lengths]

    def filled():
        new = s.fresh()
        for slot, row in zip(slots, before, strict=True):
            if row:
                new.run([row], [slot], [0], with_logits=False)
        return new

    alone = filled()
    expected = [alone.run([row], [slot], [start])[0] for row, slot, start in zip(rows, slots, starts, strict=True)]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        together = filled()
        found = together.run(rows, slots, starts)
        assert torch.equal(found, torch.stack(expected))
        assert torch.equal(together.cache, alone.cache)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_logits", [True, False])
def test_sequences_of_different_lengths_are_composed_as_each_alone(dtype, with_logits):
    s = setting("today_grouped", dtype)
    rows, slots, starts = [tokens_of(s.shape, length) for length in (3, 1, 40, 3)], [3, 0, 4, 1], [5, 9, 0, 0]
    alone, together = s.fresh(), s.fresh()
    expected = [
        alone.run([row], [slot], [start], with_logits=with_logits)
        for row, slot, start in zip(rows, slots, starts, strict=True)
    ]
    found = together.run(rows, slots, starts, with_logits=with_logits)
    assert found.shape == (4 * with_logits, s.shape.V)
    tolerance = {"atol": 1e-9 if dtype == torch.float64 else 0.5, "rtol": 0.02}
    torch.testing.assert_close(found, torch.cat(expected), **tolerance)
    torch.testing.assert_close(together.cache, alone.cache, **tolerance)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([1, 2, 3], [2, 2], r"lengths must be from 1 and have the sum 3, got \[2, 2\]"),
        ([1, 2, 3], [1, 1], r"lengths must be from 1 and have the sum 3, got \[1, 1\]"),
        ([1, 2, 3], [3, 0], r"lengths must be from 1 and have the sum 3, got \[3, 0\]"),
        ([1, 2, 3], [4, -1], r"lengths must be from 1 and have the sum 3, got \[4, -1\]"),
        ([1, 2, 3], [1, 1, 1], "slots and starts must h"),
        ([1, 2, 3], [], "with 0 lengths"),
        ([[1, 2], [3, 4]], [2, 2], "with 2 lengths"),
        ([1] * 292, [291, 1], "291 tokens from position 10 of slot 1"),
    ],
    ids=str,
)
def test_bad_lengths_are_refused_and_nothing_is_written(backend, tokens, lengths, message):
    s = setting("heads")
    arguments = {**s.weights, "cache": s.cache, "softcap": SOFTCAP, "lengths": lengths}
    before = s.cache.clone()
    with ops.use_backend(backend), pytest.raises(ValueError, match=message):
        ops.cached_forward_(torch.tensor(tokens), [1, 0], [10, 0], **arguments)
    assert torch.equal(s.cache, before)


@pytest.mark.parametrize("name", ["heads", "grouped", "odd", "today_grouped"])
def test_unfilled_cells_are_not_read_and_other_cells_not_written(name):
    s = setting(name)
    sequence = tokens_of(s.shape, 130)
    clean, dirty = s.fresh(), s.fresh(torch.nan)
    for setting_ in (clean, dirty):
        setting_.run([sequence[:77]], [2], [0])
    assert torch.equal(clean.run([sequence[77:]], [2], [77]), dirty.run([sequence[77:]], [2], [77]))
    assert dirty.cache[:, 2, :130].isfinite().all()
    dirty.cache[:, 2, :130] = torch.nan
    assert dirty.cache.isnan().all()


def test_without_logits_only_the_cache_is_written():
    s = setting("heads")
    tokens = tokens_of(s.shape, 1, 9)
    a, b = s.fresh(), s.fresh()
    assert a.run(tokens, [1], [3], with_logits=False).shape == (0, s.shape.V)
    b.run(tokens, [1], [3])
    assert torch.equal(a.cache, b.cache)
    assert a.run(
        [], [], [], run=lambda tokens, *rest, **kw: ops.cached_forward_(tokens.long().view(0, 1), *rest, **kw)
    ).shape == (0, s.shape.V)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", ["heads", "today"])
def test_no_sequences_give_no_logits_and_write_nothing(name, backend):
    s = setting(name)
    arguments = {**s.weights, "cache": s.cache, "softcap": SOFTCAP}
    with ops.use_backend(backend):
        logits = ops.cached_forward_(torch.empty(0, 3, dtype=torch.int64), [], [], **arguments)
    assert logits.shape == (0, s.shape.V)
    assert torch.count_nonzero(s.cache) == 0


def test_logits_without_a_softcap():
    s = setting("grouped")
    tokens = tokens_of(s.shape, 2, 4)
    plain = s.fresh().run(tokens, [0, 1], [0, 0], softcap=0.0)
    capped = s.fresh().run(tokens, [0, 1], [0, 0], softcap=2.0)
    torch.testing.assert_close(capped, 2 * torch.tanh(plain / 2), atol=1e-5, rtol=1e-5)
    with ops.use_backend("torch"):
        torch.testing.assert_close(s.fresh().run(tokens, [0, 1], [0, 0], softcap=0.0), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["grouped", "today_grouped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_matches_where_it_is_composed_of_other_operators(dtype, name):
    s = setting(name, dtype)
    exact = s.exact()
    tokens = tokens_of(s.shape, 2, 40)
    with ops.use_backend("native" if dtype == torch.float64 else "torch"):
        found = s.run(tokens, [3, 1], [0, 9])
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = exact.run(tokens, [3, 1], [0, 9], reference.cached_forward_)
    torch.testing.assert_close(found.double(), expected, atol=1e-9 if dtype == torch.float64 else 0.5, rtol=0.02)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["float32", *KINDS])
def test_not_a_number_stays_in_its_sequence(kind, number):
    s = of_kind("heads", kind)
    s.weights["wte"][5, 3] = number
    found = s.run([[1, 2], [1, 5], [1, 2]], [0, 1, 2], [0, 0, 0])
    assert found[1].isnan().all()
    assert torch.equal(found[0], found[2])
    assert found[0].isfinite().all()


@pytest.mark.parametrize("K", [16, 30, 64, 320])
def test_int8_products_keep_small_activations_beside_large_ones(K):
    """The logits of a model without blocks are products of the weights and a normalised embedding."""
    s = setting("no_blocks")
    embedding = torch.randn(21, K)
    embedding[:, 1] = 3e4
    codes, scales = quantize_rows(torch.randn(21, K))
    codes[:, 1] = 0
    angles = {name: torch.zeros(s.shape.capacity, width) for name, width in (("cos", K), ("sin", K // 2))}
    small = {"wte": embedding, "blocks": [], "lm_head": codes, "scales": [scales], "windows": [], **angles}
    cache = torch.zeros(0, 1, s.shape.capacity, 2, K)
    found = ops.cached_forward_(torch.tensor([[0]]), [0], [0], cache=cache, softcap=0.0, **small)
    # The model normalises the embedding, and again before lm_head.
    x = embedding[:1].double()
    for _ in range(2):
        x = x * (x.square().mean() + EPS).rsqrt()
    weights = codes.double() * scales.double()[:, None]
    expected = x @ weights.T
    unit = x.abs().max() / (127 * 2**16)  # to which activations may be rounded
    allowed = unit / 2 * weights.abs().sum(1) + 1e-6 * (x.abs() @ weights.abs().T)
    assert ((found.double() - expected).abs() <= allowed).all()
    assert (allowed < 0.05 * expected.std()).all()


def test_the_token_before_the_first_one_is_not_read_at_position_0():
    """Row 0 of the embeddings has no influence on a token without a neighbour."""
    for backend in ("native", "torch"):
        s = setting("today")
        s.weights["wte"][0] = torch.nan
        with ops.use_backend(backend):
            assert s.run([[7]], [0], [0]).isfinite().all()
            assert s.run([[7]], [0], [1], previous=[0]).isnan().all()


@pytest.mark.parametrize("run", [ops.cached_forward_, reference.cached_forward_])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_shows_in_the_logits(part, run):
    s = setting("today_grouped")
    tokens = tokens_of(s.shape, 2, 20)
    whole = s.fresh().run(tokens, [0, 1], [0, 0], run)
    without = s.fresh().run(tokens, [0, 1], [0, 0], run, **PARTS[part])
    assert (whole - without).abs().max() > 0.1


def test_schema_fake_and_version_of_the_cache():
    for name, kind in (("grouped", "float32"), ("today_grouped", "float32"), ("grouped", "bfloat16 int8")):
        s = of_kind(name, kind)
        w = dict.fromkeys(("resid_lambdas", "x0_lambdas", "smear_gate", "smear_lambda", "backout_lambda"))
        w |= {"qk_scale": 1.0, "value_gates": [], "value_tables": [], "scales": []} | s.weights
        windows = [-1 if window is None else window for window in s.shape.windows]
        arguments = (torch.tensor([[1, 2]]), [0], [9], w["wte"], w["blocks"], w["lm_head"], windows, w["cos"], w["sin"])
        parts = [w[key] for key in ("qk_scale", "value_gates", "value_tables", "resid_lambdas", "x0_lambdas")]
        parts += [w["smear_gate"], w["smear_lambda"], [3] if s.shape.today else [], w["backout_lambda"]]
        parts += [[], w["scales"]]
        utils = ("test_schema", "test_faketensor")
        torch.library.opcheck(OPERATOR, (*arguments, s.cache, SOFTCAP, True, *parts), test_utils=utils)
        before = [3, 4] if s.shape.today else []
        several = (torch.tensor([1, 2, 3]), [0, 2], [9, 4], *arguments[3:], s.cache, SOFTCAP, True)
        torch.library.opcheck(OPERATOR, (*several, *parts[:-4], before, parts[-3], [1, 2], parts[-1]), test_utils=utils)
        version = s.cache._version
        s.run([[1]], [0], [0])
        assert s.cache._version > version


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [[1, 2]], "slots": [5]}, "slot 5"),
        ({"slots": [-1]}, "slot -1"),
        ({"starts": [-1]}, "position -1"),
        ({"starts": [299]}, "from position 299"),
        ({"tokens": [[1], [2]], "slots": [1, 1], "starts": [0, 0]}, "twice|distinct"),
        ({"slots": [1, 2]}, "slots"),
        ({"starts": []}, "starts"),
        ({"tokens": [1, 2]}, "tokens(, cache and wte| and cache) must have"),
        ({"tokens": [[]]}, "T (from|>=) 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_places_are_refused_and_nothing_is_written(backend, change, message):
    s = setting("heads")
    arguments = {"tokens": [[1, 2]], "slots": [1], "starts": [0]} | change
    before = s.cache.clone()
    with ops.use_backend(backend), pytest.raises(ValueError, match=message):
        ops.cached_forward_(
            torch.tensor(arguments["tokens"], dtype=torch.int64),
            arguments["slots"],
            arguments["starts"],
            **s.weights,
            cache=s.cache,
            softcap=SOFTCAP,
        )
    assert torch.equal(s.cache, before)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("tokens", lambda t: t.int(), TypeError),
        ("tokens", lambda t: t + 2000, ValueError),
        ("tokens", lambda t: t - 2000, ValueError),
        ("wte", lambda t: t[:, :-1], ValueError),
        ("wte", lambda t: t.t().contiguous().t(), ValueError),
        ("lm_head", lambda t: t[:, :-1], ValueError),
        ("lm_head", lambda t: torch.cat((t, t)), ValueError),
        ("lm_head", lambda t: t.double(), TypeError),
        ("cos", lambda t: t[:-1], ValueError),
        ("cos", lambda t: t[:, :-1], ValueError),
        ("sin", lambda t: t[:100], ValueError),
        ("cache", lambda t: t[..., :-2], ValueError),
        ("cache", lambda t: t[:, :, :, 1:], ValueError),
        ("cache", lambda t: t[:1], ValueError),
        ("cache", lambda t: t.double(), TypeError),
        ("blocks", lambda t: t[:-1], ValueError),
        ("blocks", lambda t: [*t[:-1], t[-1][:-1]], ValueError),
        ("windows", lambda t: t[:-1], ValueError),
    ],
)
def test_bad_arguments_are_refused(name, change, error):
    s = setting("heads")
    arguments = {"tokens": torch.ones(1, 150, dtype=torch.int64), "slots": [0], "starts": [0]}
    arguments |= {**s.weights, "cache": s.cache, "softcap": SOFTCAP}
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match="cached_forward_"):
        ops.cached_forward_(**arguments)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scales": ()}, TypeError, "(blocks|lm_head) must (have dtype|be)"),
        ({"scales": lambda t: t[:-1]}, ValueError, "scales must have 13 entries or none, got 12"),
        ({"scales": lambda t: [t[0][:-1], *t[1:]]}, ValueError, r"scales(\[0\])? must have shape"),
        ({"lm_head": lambda t: t.float()}, TypeError, "lm_head must (have dtype|be)"),
        ({"blocks": lambda t: [*t[:-1], t[-1].float()]}, TypeError, "blocks must (have dtype|be)"),
    ],
    ids=["none", "too_few", "too_short", "head", "block"],
)
def test_matrices_and_scales_that_do_not_fit_are_refused(backend, change, error, message):
    s = setting("heads").quantized()
    changes = {name: new(s.weights[name]) if callable(new) else new for name, new in change.items()}
    with ops.use_backend(backend), pytest.raises(error, match=f"cached_forward_: {message}"):
        s.run([[1]], [0], [0], **changes)


ONE = torch.ones(1)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"previous": []}, "previous must have 1 entries with smear_gate, got 0"),
        ({"previous": [1, 2]}, "previous must have 1 entries with smear_gate, got 2"),
        ({"previous": [-1]}, "previous must be -1 at position 0 and a token from 0 to 135 elsewhere, got -1"),
        ({"previous": [136]}, "got 136 at position 7"),
        ({"starts": [0]}, "got 5 at position 0"),
        ({"smear_gate": None, "smear_lambda": None}, "previous must have 0 entries without smear_gate, got 1"),
        ({"smear_gate": None}, "smear_gate and smear_lambda must be given together, got smear_lambda alone"),
        ({"smear_lambda": None}, "smear_gate and smear_lambda must be given together, got smear_gate alone"),
        ({"smear_gate": torch.ones(2, 24)}, "smear_gate must have shape"),
        ({"smear_gate": torch.ones(24)}, "smear_gate must have shape"),
        ({"smear_gate": torch.ones(1, 129)}, "smear_gate must have from 1 to 128 columns, got 129"),
        ({"smear_gate": torch.ones(1, 0)}, "smear_gate must have from 1 to 128 columns, got 0"),
        ({"smear_lambda": torch.ones(())}, "smear_lambda must have shape"),
        ({"resid_lambdas": None}, "resid_lambdas and x0_lambdas must be given together, got x0_lambdas alone"),
        ({"resid_lambdas": torch.ones(4)}, "resid_lambdas must have shape"),
        ({"x0_lambdas": torch.ones(6)}, "x0_lambdas must have shape"),
        ({"backout_lambda": torch.ones(2)}, "backout_lambda must have shape"),
        ({"qk_scale": torch.inf}, "qk_scale must be finite, got inf"),
        ({"value_gates": [None] * 4}, "must have 5 entries or none, got 4 and 5"),
        ({"value_tables": ()}, "must have 5 entries or none, got 5 and 0"),
        ({"value_gates": [None] * 5}, "value_gates and value_tables must be given together, got value_tables alone"),
        ({"value_tables": [None] * 5}, "value_gates and value_tables must be given together, got value_gates alone"),
        ({"value_gates": [torch.ones(3, 12)] + [None] * 4}, "value_gates must have shape"),
        ({"value_gates": [torch.ones(2, 200)] + [None] * 4}, "value_gates must have from 1 to 128 columns, got 200"),
        ({"value_tables": [torch.ones(135, 64)] + [None] * 4}, "value_tables must have shape"),
        ({"lm_head": torch.ones(137, 128)}, "lm_head must have at most the 136 rows of wte, got 137"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:50],
)
def test_bad_parts_are_refused_by_name_and_nothing_is_written(backend, change, message):
    s = setting("today_grouped")
    arguments = {"tokens": torch.tensor([[1, 2]]), "slots": [1], "starts": [7], "previous": [5]}
    arguments |= {**s.weights, "cache": s.cache, "softcap": SOFTCAP} | change
    before = s.cache.clone()
    with ops.use_backend(backend), pytest.raises(ValueError, match=message):
        ops.cached_forward_(**arguments)
    assert torch.equal(s.cache, before)


def test_backout_without_layers_is_refused():
    s = setting("no_blocks")
    for backend in ("native", "torch"):
        with ops.use_backend(backend), pytest.raises(ValueError, match="backout_lambda must be None without layers"):
            s.run([[1]], [0], [0], backout_lambda=ONE)


def test_parts_of_a_model_without_layers_are_applied():
    s = setting("no_blocks")
    none, parts = torch.ones(0), {"smear_gate": torch.zeros(1, 16), "smear_lambda": ONE, "previous": [3]}
    parts |= {"resid_lambdas": none, "x0_lambdas": none}
    found = s.run([[1, 2]], [0], [5], **parts)
    torch.testing.assert_close(found, s.run([[1, 2]], [0], [5], reference.cached_forward_, **parts))
    assert (found - s.run([[1, 2]], [0], [5])).abs().max() > 0.1


@pytest.mark.parametrize("name", ["value_gates", "value_tables", "resid_lambdas", "smear_gate", "backout_lambda"])
def test_parts_of_another_type_are_refused_by_the_kernel(name):
    s = setting("today_grouped")
    part = s.weights[name]
    other = [x if x is None else x.double() for x in part] if isinstance(part, list) else part.double()
    with pytest.raises(TypeError, match=f"cached_forward_: {name} must have dtype"):
        s.run([[1]], [0], [0], **{name: other})


@pytest.mark.parametrize(
    "name", ["blocks", "value_gates", "value_tables", "x0_lambdas", "smear_gate", "backout_lambda"]
)
def test_weights_that_need_gradients_are_taken_under_no_grad_alone(name):
    s = setting("today")
    weight = s.weights[name]
    (weight[-1] if isinstance(weight, list) else weight).requires_grad_()
    with pytest.raises(RuntimeError, match=r"cached_forward_: has no derivative, but a tensor requires a gradient"):
        s.run([[1]], [0], [0])
    with torch.no_grad():
        assert not s.run([[1]], [0], [0]).requires_grad
