"""A CUDA device that a CPU-only torch believes in, on which the project's CUDA operators run by csrc/emulation.

A process gets it by its environment: `python_on_pretend_cuda(["-m", "nanochat_native.train", ...])` runs Python with
one, `@on_pretend_cuda` runs the body of a test in such a process, and on the command line

    python tests/pretend_cuda [--devices 2] [--capability 80] [--memory BYTES] [--open] -m pytest tests/gpu

does. Processes that such a process starts have the device too. In there, `import pretend_device` has what tests ask.

The libraries are compiled once and kept in build/tests: the device (device.cpp, fallback.cpp, module.cpp),
python/ops_cuda.cpp with csrc/cuda on the emulation (launches.cpp), and the collectives of torch.distributed (nccl.cpp).
"""

import functools
import importlib
import os
import pickle
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SITE = HERE / "site"
sys.path[:0] = [str(SITE), str(HERE.parent / "emulation")]

LOGIT_BYTES = 16384  # of a chunk of linear_cross_entropy: small losses have several
TORCH = "2.13"  # whose internals the device was written for
DEVICE_FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall"]


# --- building ---


def torch_flags():
    import torch.utils.cpp_extension

    return [part for path in torch.utils.cpp_extension.include_paths() for part in ("-isystem", path)]


def object_file(source, flags, unhashed=(), included=()):
    """Return the compiled file.

    Args:
        unhashed: further flags, with paths that differ between equal compilations.
        included: files of ours that it includes, where a search for #include does not find them.
    """
    import torch
    from compiled import compiled
    from harness import CXX, run

    command = [*CXX, *flags, "-c"]
    versions = [f"torch {torch.__version__}"] if unhashed else []

    def make(folder):
        run([*command, *unhashed, source, "-o", folder / "object.o"])

    return (
        compiled(f"pretend {source.name}", [*command, *versions], [source, *included], make, ROOT / "csrc") / "object.o"
    )


def shared_library(name, objects, flags=(), torch_libraries=("torch_cpu", "c10")):
    import torch
    from compiled import compiled
    from harness import CXX, run

    libraries = Path(torch.__file__).parent / "lib"
    linked = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", *(f"-l{library}" for library in torch_libraries)]
    command = [*CXX, "-shared", "-Wl,-z,defs", *flags, *(path.parent.name for path in objects)]

    def make(folder):
        run([*CXX, "-shared", *objects, *flags, *linked, "-o", folder / name])

    return compiled(name, command, [], make, ROOT / "csrc") / name


def _device_object(name):
    python = ["-isystem", sysconfig.get_paths()["include"]]
    return object_file(HERE / name, DEVICE_FLAGS, [*torch_flags(), *python])


def _kernel_object(source):
    from harness import KERNEL_FLAGS

    header = ROOT / "csrc/emulation/emulation.h"
    # What is not initialised, padding too, must look like no address: see check_arguments of launches.cpp.
    flags = [*KERNEL_FLAGS, "-O1", "-ftrivial-auto-var-init=pattern", "-fno-lifetime-dse"]
    return object_file(source, [*flags, "-x", "c++"], ["-include", header], [header])


def bindings_object(source=ROOT / "python/ops_cuda.cpp", options=()):
    """Return python/ops_cuda.cpp, or what stands for it, compiled."""
    return object_file(
        source,
        [*DEVICE_FLAGS, *options],
        ["-I", ROOT / "python", *torch_flags()],
        sorted((ROOT / "python").glob("*.h")),
    )


def operators_library(device, bindings):
    """Return the library of the CUDA operators: their bindings with the emulated kernels."""
    from harness import build_core

    kernels = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), HERE / "launches.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [*pool.map(_kernel_object, kernels), bindings]
    objects += [path for path in build_core() if path.name != "runner.o"]
    run = "_ZN8nanochat9emulation3runERKNS0_6LaunchE"
    return shared_library("pretend_operators.so", objects, [f"-Wl,--wrap={run}", *_linked_with(device)])


def _linked_with(library):
    return [f"-L{library.parent}", f"-Wl,-rpath,{library.parent}", f"-l:{library.name}"]


def collectives_library(device):
    """Return the library of the collectives that stand in for NCCL's."""
    objects, libraries = [_device_object("nccl.cpp")], ("torch_cpu", "torch_python", "c10")
    return shared_library("_pretend_nccl.so", objects, _linked_with(device), libraries)


@functools.cache
def libraries():
    """Return the libraries of the device, the operators and the collectives, after building what has changed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bindings = pool.submit(bindings_object)
        pool.submit(_device_object, "nccl.cpp")
        objects = pool.map(_device_object, ("fallback.cpp", "module.cpp", "device.cpp"))
        device = shared_library("_pretend_cuda.so", list(objects))
        return device, operators_library(device, bindings.result()), collectives_library(device)


@functools.cache
def unavailable():
    """Return why there can be no pretend device here, or ""."""
    import torch

    if torch.version.cuda or torch.version.hip:
        return "the pretend CUDA device needs a torch without CUDA"
    if torch.__version__.startswith(TORCH + "."):
        return ""
    try:
        libraries()
    except RuntimeError as error:
        return f"the pretend CUDA device was written for torch {TORCH}: {str(error).splitlines()[-1]}"
    return ""


# --- processes ---


def environment(*, devices=1, capability=(9, 0), strict=True, memory=None):
    """Return the variables with which a Python process has the device.

    Args:
        devices: how many, at most 8.
        capability: (9, 0), or (8, 0) for example.
        strict: host code that follows a device address dies.
        memory: bytes of each device; 8 GiB by default.
    """
    device, operators, collectives = libraries()
    variables = {
        "PYTHONPATH": os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PRETEND_CUDA_LIBRARY": str(device),
        "PRETEND_CUDA_OPERATORS": str(operators),
        "PRETEND_CUDA_COLLECTIVES": str(collectives),
        "PRETEND_CUDA_DEVICES": str(devices),
        "PRETEND_CUDA_CAPABILITY": str(10 * capability[0] + capability[1]),
        "PRETEND_CUDA_STRICT": str(int(strict)),
        "NANOCHAT_LOGIT_BYTES": str(LOGIT_BYTES),
    }
    return variables | ({"PRETEND_CUDA_MEMORY": str(memory)} if memory else {})


def pretend_python():
    """Return the path of a program that stands for Python in processes with the `environment` of the device.

    They are forked from one that has imported torch and the package: see fork_server.py.
    """
    from fork_server import python

    at_start = ("PYTHONPATH", "PRETEND_CUDA_LIBRARY", "PRETEND_CUDA_OPERATORS", "PRETEND_CUDA_COLLECTIVES")
    variables = environment()
    return python(**{name: variables[name] for name in at_start})


def python_on_pretend_cuda(arguments, *, cwd=None, env=None, timeout=300, check=True, **device):
    """Run Python with `arguments` in a process that has the device, and return what subprocess.run does, as text.

    Args:
        env: further variables.
        check: fail the test where the process fails, with its output.
        device: arguments of `environment`.
    """
    import pytest

    if reason := unavailable():
        pytest.skip(reason)
    command = [pretend_python(), *map(str, arguments)]
    variables = os.environ | environment(**device) | (env or {})
    result = subprocess.run(command, cwd=cwd, env=variables, timeout=timeout, capture_output=True, text=True)
    if check and result.returncode:
        pytest.fail(f"exit status {result.returncode}\n{result.stdout}{result.stderr}", pytrace=False)
    return result


def call_on_pretend_cuda(function, **options):
    """Call a function of a module without arguments, or with those that functools.partial has bound.

    In the process that has the device, torch's seed is 0, and in the end the memory is checked.

    Args:
        options: those of `python_on_pretend_cuda`.
    """
    call = pickle.dumps((sys.path, pickle.dumps(function))).hex()
    return python_on_pretend_cuda(["-c", f"import pretend_device; pretend_device.call('{call}')"], **options)


def on_pretend_cuda(test=None, **device):
    """Run a test in a process with the device. The arguments of the test must be such that pickle takes them.

    Args:
        device: arguments of `environment`.
    """
    if test is None:
        return functools.partial(on_pretend_cuda, **device)

    @functools.wraps(test)
    def in_process(**arguments):
        call_on_pretend_cuda(functools.partial(_call_test, test.__module__, test.__name__, arguments), **device)

    return in_process


def _call_test(module, name, arguments):
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)
