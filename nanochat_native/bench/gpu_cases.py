"""The cases of `make gpu`: every operator with a CUDA kernel, against torch.

A new CUDA kernel adds its cases to `entries`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.bench.attention import Problem, attention_case
from nanochat_native.bench.measure import Case, assert_close
from nanochat_native.bench.operators import (
    Shapes,
    adamw_case,
    add_rms_norm_case,
    linear_cross_entropy_case,
    mix_rms_norm_case,
    muon_case,
    muon_step_case,
    newton_schulz_set_case,
    normuon_case,
    relu_squared_case,
    rotary_norm_case,
    smear_case,
    value_embedding_case,
)
from nanochat_native.bench.step import BASELINES
from nanochat_native.bench.torch_baseline import TorchGPT
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import setup_optimizers


@dataclass(frozen=True)
class Entry:
    """A case whose tensors, perhaps gigabytes, are not allocated yet. Its group and name together are unique."""

    group: str
    name: str
    operators: tuple[str, ...]  # they must be native; without them the case is skipped
    make: Callable[..., Case]  # takes device=

    @property
    def title(self) -> str:
        return f"{self.group} {self.name}"


MUON = ("muon_momentum_", "newton_schulz_update_")


def optimizer_phase_case(depth: int, vocabulary: int, min_speedup: float, *, name: str, device: torch.device) -> Case:
    """Return a case of all optimizers of a step on a model of nanochat's shapes.

    The baseline, torch's fused AdamW on every tensor, does less work. The check compares with the same optimizers on
    the reference backend, which on a GPU rounds to bfloat16 within Newton-Schulz.
    """

    def model() -> GPT:
        with device:
            built = GPT(GPTConfig.from_depth(depth, vocab_size=vocabulary, sequence_len=32))
        generator = torch.Generator(device).manual_seed(depth)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.normal_(0, 0.02, generator=generator)
                parameter.grad = torch.randn(parameter.shape, generator=generator, device=device)
        return built

    ours_model, theirs_model = model(), model()
    optimizers = setup_optimizers(ours_model)
    theirs = torch.optim.AdamW(theirs_model.parameters(), lr=1e-3, fused=True)

    def ours() -> None:
        for optimizer in optimizers:
            optimizer.step()

    def check() -> None:
        reference_model = model()
        start = [parameter.detach().clone() for parameter in reference_model.parameters()]
        ours()
        with ops.use_backend("torch"):
            for optimizer in setup_optimizers(reference_model):
                optimizer.step()
        named: list[tuple[str, Tensor]] = list(ours_model.named_parameters())
        for (parameter, mine), other, before in zip(named, reference_model.parameters(), start, strict=True):
            assert_close(parameter, mine.detach() - before, other.detach() - before, 3e-2)

    return Case(
        "optimizer phase",
        name,
        ours,
        theirs.step,
        "AdamW(fused=True) of all",
        check,
        min_speedup,
        saves_launches=True,
    )


def model_case(
    depth: int, T: int, B: int, vocabulary: int, min_speedup: float, *, baseline: str, name: str, device: torch.device
) -> Case:
    """Return a case of the whole model, forward and backward in bfloat16, against torch's calls or our reference."""
    config = GPTConfig.from_depth(depth, vocab_size=vocabulary, sequence_len=T)
    with device:
        ours_model = GPT(config)
        theirs_model: torch.nn.Module = GPT(config) if baseline == "reference" else TorchGPT(config)
    generator = torch.Generator(device).manual_seed(depth)
    with torch.no_grad():
        for mine, other in zip(ours_model.parameters(), theirs_model.parameters(), strict=True):
            other.copy_(mine.normal_(0, 0.02, generator=generator))
    tokens = torch.randint(0, vocabulary, (B, T + 1), generator=generator, device=device)
    idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def run(model: torch.nn.Module) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss: Tensor = model(idx, targets)
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def theirs() -> Tensor:
        with ops.use_backend("torch" if baseline == "reference" else "native"):
            return run(theirs_model)

    def check() -> None:
        assert_close("loss", run(ours_model), theirs(), 1e-3)
        for (parameter, mine), other in zip(ours_model.named_parameters(), theirs_model.parameters(), strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            assert_close(f"gradient of {parameter}", mine.grad, other.grad, 6e-2)

    return Case(
        "model fwd+bwd",
        name,
        lambda: run(ours_model),
        theirs,
        BASELINES[baseline],
        check,
        min_speedup,
        flops=float(ours_model.estimate_flops() * B * T),
        saves_memory=True,
        saves_launches=True,
    )


def short(number: int) -> str:
    return f"{number / 1e6:.0f}M" if number >= 1_000_000 else f"{number / 1e3:.0f}K"


def nanochat_shapes(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    layer = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return [(vocabulary, width), *layer * layers, (vocabulary, width)]


def adamw_entry(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, moments: torch.dtype, min_speedup: float
) -> Entry:
    size, names = sum(torch.Size(shape).numel() for shape in shapes), {torch.float32: "float32"}
    label = f"{short(size)} {names.get(dtype, 'bf16')}/{names.get(moments, 'bf16')} moments, {len(shapes)} tensors"
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "moments": moments,
        "min_speedup": min_speedup,
        "name": label,
        "shapes": shapes,
    }
    return Entry("adamw_", label, ("adamw_",), partial(adamw_case, **arguments))


def muon_entry(count: int, rows: int, columns: int) -> Entry:
    name = f"{count} x {rows}x{columns} float32"
    return Entry(
        "muon halves",
        name,
        ("muon_momentum_", "muon_update_"),
        partial(muon_case, count, rows, columns, min_speedup=1.5, name=name),
    )


def normuon_entry(count: int, rows: int, columns: int) -> Entry:
    make = partial(normuon_case, count, rows, columns, min_speedup=2.0)
    return Entry("normuon_update_", f"{count} x {rows} x {columns}", ("normuon_update_",), make)


def matrices_of(depth: int) -> Shapes:
    """Return the shapes of the matrices of nanochat's blocks. The width is 64 channels for each layer."""
    width = 64 * depth
    return [(4 * depth, width, width), (depth, 4 * width, width), (depth, width, 4 * width)]


def newton_schulz_entry(shapes: Shapes, min_speedup: float, name: str = "", compiler: str | None = None) -> Entry:
    name = name or ", ".join(f"{count} x {rows}x{columns}" for count, rows, columns in shapes)
    name += ", compiled" if compiler else ""
    make = partial(newton_schulz_set_case, shapes, min_speedup, name=name, compiler=compiler)
    return Entry("newton_schulz", name, ("newton_schulz",), make)


def muon_step_entry(shapes: Shapes, name: str) -> Entry:
    baseline = "torch.optim.Muon"
    make = partial(muon_step_case, shapes, 1.0, baseline=baseline, name=name)
    return Entry("Muon step", f"{name}, {baseline}", MUON, make)


def loss_entry(N: int, C: int, vocabulary: int, compiler: str | None = None) -> Entry:
    name = f"N {N} C {C} V {vocabulary} bf16" + (", compiled" if compiler else "")
    make = partial(
        linear_cross_entropy_case, N, C, vocabulary, min_speedup=1.0, name=name, dtype=torch.bfloat16, compiler=compiler
    )
    return Entry("linear_cross_entropy", name, ("linear_cross_entropy",), make)


def attention_entries(
    problem: Problem, min_speedups: dict[str, float], directions: Sequence[str] = ("forward", "backward"), isa: str = ""
) -> list[Entry]:
    """Return an entry for each direction and baseline; the keys of `min_speedups` are the baselines."""
    found = []
    for direction in directions:
        for baseline, min_speedup in min_speedups.items():
            name = f"{problem}, {baseline}" + (f", {isa}" if isa else "")
            options: dict[str, Any] = {
                "baseline": baseline,
                "dtype": torch.bfloat16,
                "min_speedup": min_speedup,
                "isa": isa,
            }
            make = partial(attention_case, problem, direction, name=name, **options)
            found.append(Entry(f"attention {direction}", name, ("attention",), make))
    return found


def passes_between_products(
    width: int,
    T: int,
    B: int,
    head: int,
    dtype: torch.dtype = torch.bfloat16,
    min_speedups: tuple[float, float, float, float] = (1.2, 1.6, 2.0, 1.5),
) -> list[Entry]:
    """Return the entries of what lies between the products of a block: norms, rotation and activation.

    The minimum speedups are below the ratios of the bytes that the operators and torch's calls move: about 1.4, 2.4, 3
    and 2.4.
    """
    norm, mix, rotary, relu = min_speedups
    label = str(dtype).removeprefix("torch.")
    rows, heads = B * T, width // head
    return [
        Entry(
            "add_rms_norm fwd+bwd",
            f"{rows} x {width} {label}",
            ("add_rms_norm",),
            partial(add_rms_norm_case, dtype, norm, rows, width),
        ),
        Entry(
            "mix_rms_norm fwd+bwd",
            f"{rows} x {width} {label}",
            ("mix_rms_norm",),
            partial(mix_rms_norm_case, dtype, mix, rows, width),
        ),
        Entry(
            "rotary_norm fwd+bwd",
            f"{B}x{T}x{heads}x{head} {label}",
            ("rotary_norm",),
            partial(rotary_norm_case, B, T, heads, head, dtype, rotary),
        ),
        Entry(
            "relu_squared fwd+bwd",
            f"{rows}x{4 * width} {label}",
            ("relu_squared",),
            partial(relu_squared_case, rows, 4 * width, dtype, relu),
        ),
    ]


def parts_of_today(
    width: int,
    T: int,
    B: int,
    head: int,
    vocabulary: int,
    dtype: torch.dtype = torch.bfloat16,
    min_speedups: tuple[float, float] = (1.2, 1.5),
) -> list[Entry]:
    """Return the entries of what nanochat's architecture of today has beside October's between its products.

    The gradient of the table, which both sides sum up by the same call, takes most of the time of the value embeddings.
    """
    values, smeared = min_speedups
    label = str(dtype).removeprefix("torch.")
    rows, heads = B * T, width // head
    return [
        Entry(
            "add_value_embedding fwd+bwd",
            f"{rows} x {heads} x {head} V {vocabulary} {label}",
            ("add_value_embedding",),
            partial(value_embedding_case, rows, heads, head, vocabulary, dtype, values),
        ),
        Entry(
            "smear fwd+bwd",
            f"{B} x {T} x {width} {label}",
            ("smear",),
            partial(smear_case, B, T, width, dtype, smeared),
        ),
    ]


def model_entry(depth: int, T: int, B: int, vocabulary: int, baseline: str) -> Entry:
    name = f"d{depth} T {T} B {B} V {vocabulary} bf16, {baseline}"
    make = partial(model_case, depth, T, B, vocabulary, min_speedup=1.0, baseline=baseline, name=name)
    return Entry("model fwd+bwd", name, ("attention", "linear_cross_entropy"), make)


def phase_entry(depth: int, vocabulary: int) -> Entry:
    name = f"d{depth} V {vocabulary}, Muon and AdamW"
    make = partial(optimizer_phase_case, depth, vocabulary, min_speedup=0.0, name=name)
    return Entry("optimizer phase", name, ("adamw_", *MUON), make)


def entries(device_type: str, *, quick: bool) -> list[Entry]:
    """Return every case, the most informative first: time may run out before the last. CPU cases are small.

    With bfloat16 parameters and float32 moments the minimum speedup is the ratio of the bytes: torch moves 14 for our
    22, because it keeps bfloat16 moments.
    """
    f32, bf16 = torch.float32, torch.bfloat16
    if device_type == "cpu":
        many = nanochat_shapes(16, 3, 64)
        return [
            *attention_entries(Problem(B=1, T=96, H=2, Hkv=1, D=16), {"SDPA": 1.0}),
            *attention_entries(Problem(B=1, T=96, H=2, D=16, window=20), {"SDPA": 1.0}, ["fwd+bwd"]),
            *attention_entries(Problem(B=2, T=96, H=2, Hkv=1, D=16, Tq=1), {"SDPA": 1.0}, ["forward"]),
            model_entry(1, 32, 2, 64, "torch"),
            model_entry(1, 32, 2, 64, "reference"),
            adamw_entry(many, f32, f32, 1.0),
            adamw_entry(many, bf16, f32, 0.6),
            muon_entry(4, 48, 32),
            normuon_entry(4, 48, 32),
            normuon_entry(2, 32, 96),
            newton_schulz_entry([(3, 48, 32), (2, 32, 96)], 0.0),
            newton_schulz_entry([(3, 48, 32)], 0.0, compiler="eager"),
            muon_step_entry([(3, 48, 32), (2, 32, 96)], "5 small"),
            loss_entry(64, 32, 128),
            *passes_between_products(32, 16, 2, 16, f32, (0.0, 0.0, 0.0, 0.0)),
            *parts_of_today(32, 16, 2, 16, 64, f32, (0.0, 0.0)),
            phase_entry(1, 64),
            loss_entry(64, 32, 128, compiler="eager"),
        ]
    windowed = Problem(B=16, T=2048, H=10, D=128, window=512)  # three of four layers of nanochat's d20
    large = Problem(B=4, T=4096, H=16, D=128)
    libraries = {"FLASH": 1.0, "cuDNN": 0.0}
    if quick:
        attention = [
            *attention_entries(windowed, {"FLASH": 1.0}),
            *attention_entries(large, {"FLASH": 1.0}),
        ]
    else:
        attention = [
            *attention_entries(windowed, {"FLASH": 1.0, "FlexAttention": 1.0}),
            *attention_entries(large, libraries),
            *attention_entries(Problem(B=2, T=8192, H=16, D=128), libraries),
            *attention_entries(Problem(B=4, T=4096, H=16, D=64), libraries),
            *attention_entries(Problem(B=4, T=4096, H=32, Hkv=4, D=128), libraries),
            model_entry(12, 2048, 16, 65536, "torch"),
            model_entry(12, 2048, 4, 65536, "reference"),
            *attention_entries(large, {"FLASH": 1.0}, isa="sm_80"),
            *attention_entries(Problem(B=2, T=8192, H=16, D=128), {"FLASH": 1.0}, isa="sm_80"),
            *attention_entries(Problem(B=32, T=8192, H=32, Hkv=4, D=128, Tq=1), {"FLASH": 1.0}, ["forward"]),
            *attention_entries(Problem(B=4, T=4096, H=16, D=128, causal=False), libraries),
            *attention_entries(Problem(B=32, T=512, H=16, D=128), libraries),
            *attention_entries(Problem(B=16, T=1024, H=16, D=128), libraries),
            *attention_entries(Problem(B=8, T=2048, H=16, D=128), libraries),
            *attention_entries(Problem(B=1, T=16384, H=16, D=128), libraries),
            *attention_entries(large, {"FlexAttention": 0.0}),
        ]
    one, many = [(100_000_000,)], nanochat_shapes(384, 33, 54_272)
    chosen = [
        adamw_entry(many, f32, f32, 1.0),
        adamw_entry(many, bf16, f32, 0.6),
        muon_entry(80, 1280, 1280),
        newton_schulz_entry(matrices_of(20), 1.5, "d20's 120 matrices"),
        newton_schulz_entry(matrices_of(12), 1.3, "d12's 72 matrices"),
        muon_step_entry(matrices_of(20), "d20's 120 matrices"),
    ]
    if quick:
        return [
            *attention,
            *chosen,
            *passes_between_products(1280, 2048, 16, 128),
            *parts_of_today(1280, 2048, 16, 128, 32768),
            loss_entry(8192, 1280, 32768),
            phase_entry(12, 65536),
            loss_entry(8192, 1280, 32768, compiler="inductor"),
        ]
    return [
        *chosen,
        *attention,
        *passes_between_products(1280, 2048, 16, 128),
        *parts_of_today(1280, 2048, 16, 128, 32768),
        *passes_between_products(768, 2048, 16, 128),
        newton_schulz_entry([(64, 768, 768)], 1.3),
        newton_schulz_entry([(48, 1024, 1024)], 1.3),
        newton_schulz_entry([(16, 2048, 2048)], 1.3),
        newton_schulz_entry([(24, 3072, 768)], 1.8),
        newton_schulz_entry([(20, 5120, 1280)], 1.8),
        newton_schulz_entry([(20, 1280, 5120)], 1.8),
        muon_step_entry(matrices_of(12), "d12's 72 matrices"),
        loss_entry(65536, 1280, 65536),
        phase_entry(12, 65536),
        adamw_entry(one, f32, f32, 1.0),
        adamw_entry(one, bf16, f32, 0.6),
        adamw_entry(many, bf16, bf16, 1.0),
        muon_entry(20, 5120, 1280),
        muon_entry(20, 1280, 5120),
        normuon_entry(20, 5120, 1280),
        normuon_entry(20, 1280, 5120),
        loss_entry(65536, 1280, 32768),
        loss_entry(65536, 1280, 65536, compiler="inductor"),
        newton_schulz_entry(matrices_of(20), 1.3, "d20's 120 matrices", compiler="inductor"),
        newton_schulz_entry(matrices_of(12), 1.3, "d12's 72 matrices", compiler="inductor"),
        loss_entry(65536, 1280, 32768, compiler="inductor"),
    ]
