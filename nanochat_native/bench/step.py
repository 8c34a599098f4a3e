"""A whole training step, ours, on the twins, and in torch's own calls: tokens a second, peak memory of a process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_native import ops
from nanochat_native.bench.measure import assert_close
from nanochat_native.bench.plain import PlainGPT, plain_optimizers
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import setup_optimizers
from nanochat_native.runtime.timing import side_by_side

DEPTH, T, B = 4, 512, 8
OPPONENTS = {"plain": "model in torch's calls", "twins": "ours, backend torch"}
FLOORS = {(8192, "plain"): 1.3, (32768, "plain"): 1.5, (8192, "twins"): 1.3}  # by vocabulary and opponent


class Step:
    """One optimizer step of B x T tokens; ours, plain, or ours on the twins."""

    def __init__(self, variant: str, vocabulary: int) -> None:
        self.backend = "torch" if variant == "twins" else "native"
        config = GPTConfig.from_depth(DEPTH, vocab_size=vocabulary, sequence_len=T)
        self.model: nn.Module = PlainGPT(config) if variant == "plain" else GPT(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(0, 0.02, generator=generator)
        setup: Any = plain_optimizers if variant == "plain" else setup_optimizers
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
    """Two steps from the same weights: the same losses, and the same change of every parameter."""
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    for step in range(2):
        assert_close(f"loss of step {step}", ours(), other(), 1e-5)
    named = zip(ours.model.named_parameters(), other.model.parameters(), before, strict=True)
    for (name, a), b, start in named:
        assert_close(f"{name} after two steps", a.detach() - start, b.detach() - start, 1e-2)


def peak_memory(variant: str, vocabulary: int) -> int:
    """Bytes that three steps add to a fresh process: its peak resident memory less that before the model is built."""
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


def run(vocabulary: int, opponent: str, *, seconds: float, repeats: int) -> dict[str, Any]:
    ours, theirs = Step("ours", vocabulary), Step(opponent, vocabulary)
    check(ours, theirs)
    ours_ms, theirs_ms = side_by_side([ours, theirs], seconds=seconds, repeats=repeats)
    ours_peak, theirs_peak = peak_memory("ours", vocabulary), peak_memory(opponent, vocabulary)
    assert isinstance(ours.model, GPT)
    return {
        "group": "training step",
        "case": f"d{DEPTH} T {T} B {B} V {vocabulary}",
        "opponent": OPPONENTS[opponent],
        "ours_ms": ours_ms,
        "theirs_ms": theirs_ms,
        "ratio": theirs_ms / ours_ms,
        "floor": FLOORS[vocabulary, opponent],
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
