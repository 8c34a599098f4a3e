"""A training step: ours, on the reference backend, and in torch's own calls. Tokens per second and peak memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_native import ops
from nanochat_native.bench.measure import assert_close
from nanochat_native.bench.torch_baseline import TorchGPT, torch_optimizers
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import setup_optimizers
from nanochat_native.runtime.timing import side_by_side

DEPTH, T, B = 4, 512, 8
BASELINES = {"torch": "model in torch's calls", "reference": "ours, backend torch"}
MIN_SPEEDUPS = {(8192, "torch"): 1.3, (32768, "torch"): 1.5, (8192, "reference"): 1.3}  # by vocabulary and baseline


class Step:
    """One optimizer step of B x T tokens; the variant is "ours", "torch" or "reference" (ours, backend torch)."""

    def __init__(self, variant: str, vocabulary: int) -> None:
        self.backend = "torch" if variant == "reference" else "native"
        config = GPTConfig.from_depth(DEPTH, vocab_size=vocabulary, sequence_len=T)
        self.model: nn.Module = TorchGPT(config) if variant == "torch" else GPT(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(0, 0.02, generator=generator)
        setup: Any = torch_optimizers if variant == "torch" else setup_optimizers
        self.optimizers = setup(self.model)
        tokens = torch.randint(0, vocabulary, (B, T + 1), generator=generator)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def __call__(self) -> Tensor:
        with ops.use_backend(self.backend):
            loss: Tensor = self.model(self.inputs, self.targets)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def check(ours: Step, other: Step) -> None:
    """Raise AssertionError if two steps from the same weights differ in a loss or in the change of a parameter."""
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    for step in range(2):
        assert_close(f"loss of step {step}", ours(), other(), 1e-5)
    named = zip(ours.model.named_parameters(), other.model.parameters(), before, strict=True)
    for (name, a), b, start in named:
        assert_close(f"{name} after two steps", a.detach() - start, b.detach() - start, 1e-2)


def peak_memory(variant: str, vocabulary: int) -> int:
    """Return the bytes that three steps add to a new process: its peak memory minus that before the model is built."""
    output = subprocess.run(
        [sys.executable, "-m", "nanochat_native.bench.step", variant, str(vocabulary), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return int(json.loads(output))


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def run(vocabulary: int, baseline: str, *, seconds: float, repeats: int) -> dict[str, Any]:
    ours, theirs = Step("ours", vocabulary), Step(baseline, vocabulary)
    check(ours, theirs)
    ours_ms, theirs_ms = side_by_side([ours, theirs], seconds=seconds, repeats=repeats)
    ours_peak, theirs_peak = peak_memory("ours", vocabulary), peak_memory(baseline, vocabulary)
    assert isinstance(ours.model, GPT)
    return {
        "group": "training step",
        "case": f"d{DEPTH} T {T} B {B} V {vocabulary}",
        "opponent": BASELINES[baseline],
        "ours_ms": ours_ms,
        "theirs_ms": theirs_ms,
        "ratio": theirs_ms / ours_ms,
        "floor": MIN_SPEEDUPS[vocabulary, baseline],
        "ours_tokens_per_second": B * T / ours_ms * 1e3,
        "theirs_tokens_per_second": B * T / theirs_ms * 1e3,
        "ours_peak_bytes": ours_peak,
        "theirs_peak_bytes": theirs_peak,
        "gflops": ours.model.estimate_flops() * B * T / ours_ms / 1e6,
    }


def main() -> None:
    variant, vocabulary, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = resident("VmRSS")
    step = Step(variant, vocabulary)
    for _ in range(3):
        step()
    print(json.dumps(resident("VmHWM") - before))


if __name__ == "__main__":
    main()
