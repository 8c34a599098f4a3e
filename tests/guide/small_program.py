"""python small_program.py MODULE ARGUMENTS: run a command of the package with small demonstrations and benchmarks."""

import importlib
import runpy
import sys

# Constants of modules: they decide how long something takes, not what is done.
SIZES = {
    "demonstrations.faults": {"STEPS": 8, "LAST": 4, "INTRUSION": 4, "SEEDS": 2, "OVERFIT_STEPS": 4},
    "demonstrations.generation": {"LENGTHS": (32, 64)},
    "demonstrations.loss": {"VOCABULARIES": (2048, 4096), "HEAD": {"N": 512, "C": 256}},
    "demonstrations.speed": {"SIZE": 64, "ROUNDS": 1},
    "demonstrations.tokens": {"VOCABULARIES": (265, 512, 1024, 2048)},
    "bench.step": {"T": 64, "B": 2},
}

if __name__ == "__main__":
    for name, sizes in SIZES.items():
        module = importlib.import_module(f"nanochat_native.{name}")
        for constant, value in sizes.items():
            assert hasattr(module, constant), f"{name} has no {constant}"
            setattr(module, constant, value)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
