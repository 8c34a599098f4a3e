"""A device that torch on Linux takes for MPS. torch's operators run there by the CPU's kernels.

`call_on_pretend_mps(function)` and `@on_pretend_mps` run a function, or the body of a test, in a process that has the
device. device.cpp says what it refuses. It does not show the speed, the rounding or the defects of Metal's kernels.
"""

import functools
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

from pretend_cuda import DEVICE_FLAGS, ROOT, TORCH, _call_test, object_file, shared_library, torch_flags

HERE = Path(__file__).resolve().parent


# --- building ---


def operators_for_mps(text):
    """Return the operators that torch can run on MPS, such as "aten::add.out".

    Args:
        text: native_functions.yaml of torch, which comes with it: the operators, and their kernels by dispatch key.
    """
    found, delegates = set(), {}
    for block in re.split(r"^- func: ", text, flags=re.MULTILINE)[1:]:
        name = "aten::" + block.split("(", 1)[0]
        keys = set(re.findall(r"\w+", " ".join(re.findall(r"^    ([\w, ]+):", block, flags=re.MULTILINE))))
        if match := re.search(r"^  structured_delegate: (\S+)", block, flags=re.MULTILINE):
            delegates[name] = "aten::" + match[1]
        elif keys & {"MPS", "CompositeImplicitAutograd", "CompositeExplicitAutograd"} or "\n  dispatch:" not in block:
            found.add(name)
    return found | {name for name, target in delegates.items() if target in found}


@functools.cache
def environment():
    """Return the variables with which a Python process has the device, after building what has changed."""
    import torchgen
    from compiled import compiled
    from harness import CXX

    listed = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"

    def make(folder):
        (folder / "operators").write_text("\n".join(sorted(operators_for_mps(listed.read_text()))))

    operators = compiled("operators of MPS", CXX, [listed, HERE / "__init__.py"], make, ROOT) / "operators"
    library = shared_library("pretend_mps.so", [object_file(HERE / "device.cpp", DEVICE_FLAGS, torch_flags())])
    return {
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PRETEND_MPS_LIBRARY": str(library),
        "PRETEND_MPS_OPERATORS": str(operators),
    }


@functools.cache
def unavailable():
    """Return why there can be no pretend device here, or ""."""
    import torch

    if torch.backends.mps.is_built() or torch.version.cuda or torch.version.hip:
        return "the pretend MPS device needs a torch for the CPU alone"
    if torch.__version__.startswith(TORCH + "."):
        return ""
    try:
        environment()
    except RuntimeError as error:
        return f"the pretend MPS device was written for torch {TORCH}: {str(error).splitlines()[-1]}"
    return ""


# --- processes ---


def call_on_pretend_mps(function, *, env=None, timeout=300):
    """Call a function of a module without arguments, or with those that functools.partial has bound, in a process.

    The seed of torch is 0 there. Return what it has printed, to stdout and to stderr.
    """
    import pytest
    from fork_server import python

    if reason := unavailable():
        pytest.skip(reason)
    call = pickle.dumps((sys.path, pickle.dumps(function))).hex()
    command = [python(**environment()), "-c", f"import pretend_mps; pretend_mps._call('{call}')"]
    path = os.pathsep.join([environment()["PYTHONPATH"], str(ROOT / "tests")])
    variables = os.environ | environment() | {"PYTHONPATH": path} | (env or {})
    result = subprocess.run(command, env=variables, timeout=timeout, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(f"exit status {result.returncode}\n{result.stdout}{result.stderr}", pytrace=False)
    return result.stdout, result.stderr


def on_pretend_mps(test):
    """Run a test in a process with the device. The arguments of the test must be such that pickle takes them."""

    @functools.wraps(test)
    def in_process(**arguments):
        call_on_pretend_mps(functools.partial(_call_test, test.__module__, test.__name__, arguments))

    return in_process


def _call(pickled):
    import torch

    torch.manual_seed(0)
    sys.path[:], function = pickle.loads(bytes.fromhex(pickled))
    pickle.loads(function)()
