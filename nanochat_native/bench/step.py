"""A training step: ours, on the reference backend, and in torch's own calls. Tokens per second and peak memory."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_native import ops
from nanochat_native.bench.measure import assert_close
from nanochat_native.bench.torch_baseline import TorchGPT, torch_optimizers
from nanochat_native.bench.torch_today import TorchToday, today_optimizers
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import setup_optimizers
from nanochat_native.runtime import hardware
from nanochat_native.runtime.timing import side_by_side

DEPTH, T, B = 4, 512, 8
BASELINES = {"torch": "model in torch's calls", "reference": "ours, backend torch", "float32": "ours, float32"}
F32, BF16 = torch.float32, torch.bfloat16
# By recipe, vocabulary, baseline and the dtype of the model. The baseline "float32" is in float32.
MIN_SPEEDUPS = {
    ("october", 8192, "torch", F32): 1.3,
    ("october", 32768, "torch", F32): 1.5,
    ("october", 8192, "reference", F32): 1.3,
    ("today", 8192, "torch", F32): 1.3,
    ("october", 8192, "float32", BF16): 0.0,  # about 2.5 with AMX; below 1 where bfloat16 is computed in float32
    ("october", 8192, "torch", BF16): 1.3,
    ("today", 8192, "torch", BF16): 1.3,
}


class Step:
    """One optimizer step of B x T tokens.

    Args:
        variant: "ours", "torch" or "reference" (ours, backend torch).
        recipe: "october" or "today", for the model and the optimizers.
        dtype: float32, or bfloat16 under autocast. Newton-Schulz then multiplies in bfloat16 too.
    """

    def __init__(
        self, variant: str, vocabulary: int, recipe: str = "october", dtype: torch.dtype = torch.float32
    ) -> None:
        self.dtype = dtype
        self.backend = "torch" if variant == "reference" else "native"
        pattern = "SSSL" if recipe == "today" else "L"
        sizes: dict[str, Any] = {"vocab_size": vocabulary, "sequence_len": T, "window_pattern": pattern}
        config = GPTConfig.from_depth(DEPTH, architecture=recipe, **sizes)
        theirs: Any = TorchToday if recipe == "today" else TorchGPT
        self.model: nn.Module = theirs(config) if variant == "torch" else GPT(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, parameter in sorted(self.model.named_parameters()):
                mean, deviation = (0.0, 0.02) if parameter.ndim == 2 else (0.5, 0.1)
                parameter.normal_(mean, deviation, generator=generator)
        setup: Any = partial(setup_optimizers, recipe=recipe, ns_bfloat16=dtype == BF16)
        if variant == "torch":
            setup = today_optimizers if recipe == "today" else torch_optimizers
        self.optimizers = setup(self.model)
        tokens = torch.randint(0, vocabulary, (B, T + 1), generator=generator)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def __call__(self) -> Tensor:
        with ops.use_backend(self.backend):
            with torch.autocast("cpu", BF16, enabled=self.dtype == BF16):
                loss: Tensor = self.model(self.inputs, self.targets)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def check(ours: Step, other: Step) -> None:
    """Raise AssertionError if two steps from the same weights differ in a loss or in the change of a parameter.

    In bfloat16 the changes are not compared: the sign of a small gradient, and AdamW's first step, depend on rounding.
    """
    if ours.dtype == BF16:
        for step in range(2):
            assert_close(f"loss of step {step}", ours(), other(), 2e-3)
        return
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    for step in range(2):
        assert_close(f"loss of step {step}", ours(), other(), 1e-5)
    theirs = dict(other.model.named_parameters())
    for (name, a), start in zip(ours.model.named_parameters(), before, strict=True):
        assert_close(f"{name} after two steps", a.detach() - start, theirs[name].detach() - start, 1e-2)


def peak_memory(variant: str, vocabulary: int, recipe: str, dtype: torch.dtype) -> int:
    """Return the bytes that three steps add to a new process: its peak memory minus that before the model is built."""
    name = str(dtype).removeprefix("torch.")
    arguments = [variant, str(vocabulary), recipe, name, *map(str, (torch.get_num_threads(), T, B))]
    output = subprocess.run(
        [sys.executable, "-m", "nanochat_native.bench.step", *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return int(json.loads(output))


def peak_bytes() -> int:
    """Return the most memory that this process has had. On Linux, getrusage would count the process that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return hardware.peak_resident_bytes()
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def name_of(recipe: str, vocabulary: int, dtype: torch.dtype) -> str:
    """Return the name of a case, without its baseline."""
    name = f"d{DEPTH} T {T} B {B} V {vocabulary}" + (" today" if recipe == "today" else "")
    return name + (" bfloat16" if dtype == BF16 else "")


def run(
    recipe: str, vocabulary: int, baseline: str, dtype: torch.dtype, *, seconds: float, repeats: int
) -> dict[str, Any]:
    theirs_variant, theirs_dtype = ("ours", F32) if baseline == "float32" else (baseline, dtype)
    ours, theirs = Step("ours", vocabulary, recipe, dtype), Step(theirs_variant, vocabulary, recipe, theirs_dtype)
    check(ours, theirs)
    ours_ms, theirs_ms = side_by_side([ours, theirs], seconds=seconds, repeats=repeats)
    ours_peak = peak_memory("ours", vocabulary, recipe, dtype)
    theirs_peak = peak_memory(theirs_variant, vocabulary, recipe, theirs_dtype)
    assert isinstance(ours.model, GPT)
    return {
        "group": "training step",
        "case": name_of(recipe, vocabulary, dtype),
        "opponent": BASELINES[baseline],
        "ours_ms": ours_ms,
        "theirs_ms": theirs_ms,
        "ratio": theirs_ms / ours_ms,
        "floor": MIN_SPEEDUPS[recipe, vocabulary, baseline, dtype],
        "ours_tokens_per_second": B * T / ours_ms * 1e3,
        "theirs_tokens_per_second": B * T / theirs_ms * 1e3,
        "ours_peak_bytes": ours_peak,
        "theirs_peak_bytes": theirs_peak,
        "gflops": ours.model.estimate_flops() * B * T / ours_ms / 1e6,
    }


def main() -> None:
    global T, B
    variant, vocabulary, recipe, dtype = sys.argv[1:5]
    threads, T, B = map(int, sys.argv[5:])
    torch.set_num_threads(threads)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = hardware.resident_bytes()
    step = Step(variant, int(vocabulary), recipe, getattr(torch, dtype))
    for _ in range(3):
        step()
    print(json.dumps(peak_bytes() - before))


if __name__ == "__main__":
    main()
