"""python -m nanochat_native.lab.roofline.worker [RESULT]: the stage of `make gpu` that prints measured beside modelled
times.

It needs only torch. The model is d12 on 16 x 2048 tokens, or on as many sequences as the memory of the GPU holds. The
rates of a GPU that is not in the table of runtime/hardware.py are those that RESULT, the file of `make gpu`, holds as
measured. If it holds none, there is nothing to compare with, and the stage says so and succeeds.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat_native.lab.roofline.analysis import Machine, analyse, machine_named
from nanochat_native.lab.roofline.measurement import measure, names_of
from nanochat_native.lab.roofline.recording import record
from nanochat_native.lab.roofline.text import lines_of
from nanochat_native.model.config import GPTConfig
from nanochat_native.runtime import hardware


def machine_of(gpu: str, limits: dict[str, float]) -> Machine | None:
    """Return a GPU by its name, with its rates in bfloat16; None if they are not known.

    Args:
        limits: the measured `copy` in GB/s and `bfloat16_product` in GFLOP/s, or nothing.
    """
    if hardware.gpu_peak(gpu, torch.bfloat16).flops is not None:
        return machine_named(gpu, torch.bfloat16)
    if not limits:
        return None
    return machine_named(gpu, torch.bfloat16, 1e9 * limits["bfloat16_product"], 1e9 * limits["copy"])


def compare(depth: int, rows: int, length: int, vocabulary: int, machine: Machine) -> dict[str, Any]:
    """Return the modelled figures of a step in bfloat16 on a GPU, and the measured ones of this computer.

    Raises ValueError if this computer has no GPU.
    """
    config = GPTConfig.from_depth(depth, vocab_size=vocabulary, sequence_len=length)
    step = (config, rows, torch.bfloat16, "hybrid", False)
    sizes = {"depth": depth, "device_batch_size": rows, "max_seq_len": length, "vocab_size": vocabulary}
    result = {
        "options": sizes | {"dtype": "bfloat16", "optimizer": "hybrid"},
        **analyse(record(*step), machine),
    }
    return result | {"measured": measure(*step, names_of(result))}


def main(args: Sequence[str]) -> int:
    gpu = torch.cuda.get_device_name()
    machine = machine_of(gpu, json.loads(Path(args[0]).read_text())["limits"] if args else {})
    if machine is None:
        print(f"left out: the rates of {gpu} are neither in the table nor measured")
        return 0
    rows = 16
    while True:
        try:
            print("\n".join(lines_of(compare(12, rows, 2048, 32768, machine))))
            return 0
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
