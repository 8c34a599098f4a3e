"""Replace this process by Python on pretend CUDA devices: see __init__.py."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretend_cuda

parser = argparse.ArgumentParser(
    prog="python tests/pretend_cuda",
    epilog="Python's arguments follow: -m, -c or a file.",
    description=__doc__,
    allow_abbrev=False,
)
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--capability", type=int, default=90, help="90 or 80, for example")
parser.add_argument("--memory", type=int, help="bytes of each device")
parser.add_argument("--open", action="store_true", help="the host may read the device's memory")
words = sys.argv[1:]
start = next((i for i, word in enumerate(words) if word in ("-m", "-c") or word.endswith(".py")), len(words))
given = parser.parse_args(words[:start])
if reason := pretend_cuda.unavailable():
    sys.exit(reason)
variables = pretend_cuda.environment(
    devices=given.devices,
    capability=divmod(given.capability, 10),
    strict=not given.open,
    memory=given.memory,
)
os.execve(sys.executable, [sys.executable, *words[start:]], os.environ | variables)
