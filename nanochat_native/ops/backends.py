"""The backends: the native kernels of `nanochat_native._C`, and the references in plain torch.

`use_backend("native" | "torch")` chooses the backend. These environment variables, read at the start, choose too:
    NANOCHAT_NATIVE_BACKEND=native|torch     the backend that a process starts with; native by default
    NANOCHAT_CPU_ISA=amx|avx512_bf16|avx512|avx2|baseline on x86-64, neon_bf16|neon on aarch64
                                             the instruction set of the CPU kernels; by default the fastest available
    NANOCHAT_CUDA_ISA=sm_90a|sm_80           that of the CUDA kernels that have a choice; likewise
    NANOCHAT_LINEAR=auto|native|torch        the product of `linear` in float32 on a CPU; auto takes the faster one
The CUDA kernel of `linear_cross_entropy` and the models of its memory and time read one more at each call:
    NANOCHAT_LOGIT_BYTES=NUMBER              the most bytes of logits that it holds at once; by default 256 MiB
A wrong value raises ValueError in the first call that needs it, and in `check_environment`.

On the native backend, plain torch runs an operator on a device without a native kernel, and in a mode that the kernel
does not support (second derivatives, forward-mode AD, torch.func transforms). One warning then names the operator. On a
GPU that is older than the CUDA kernels, and on an MPS device, one warning names all operators. A native module that is
missing, or was built for another torch, raises RuntimeError with the command that repairs it.
"""

import importlib
import os
import re
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("native", "torch")
OPERATORS = (
    "attention",
    "rms_norm",
    "add_rms_norm",
    "embedding_rms_norm",
    "mix_rms_norm",
    "add_value_embedding",
    "add_value_embedding_backward",
    "smear",
    "newton_schulz",
    "adamw_",
    "muon_momentum_",
    "muon_update_",
    "normuon_update_",
    "newton_schulz_update_",
    "linear_cross_entropy",
    "linear",
    "linear_backward",
    "cached_forward_",
    "rotary_norm",
    "relu_squared",
    "relu_squared_",
    "relu_squared_backward_",
    "linear_relu_squared",
    "linear_backward_relu_squared",
)
LINEAR_OPERATORS = ("linear", "linear_backward", "linear_relu_squared", "linear_backward_relu_squared")
# Every operator has CPU kernels. Those without a CUDA kernel are composed of torch's operators on a GPU.
CUDA_OPERATORS = frozenset(OPERATORS) - {*LINEAR_OPERATORS, "cached_forward_"}

REPAIR = "run `pip install --no-build-isolation .` in nanochat-native's folder, or choose NANOCHAT_NATIVE_BACKEND=torch"


# --- the native module ---


def _load() -> tuple[Any, str]:
    """Return the module `_C` and the reason why it cannot be used, "" if it can."""
    try:
        module = importlib.import_module("nanochat_native._C")
    except ModuleNotFoundError:
        return None, f"the native module nanochat_native._C is not built for this Python: {REPAIR}"
    except ImportError as error:
        return None, (
            f"the native module nanochat_native._C does not load with torch {torch.__version__} ({error}): {REPAIR}"
        )
    built_for = module.build_info()["torch"]
    if _minor_release(built_for) != _minor_release(torch.__version__):
        return module, (
            f"the native module nanochat_native._C was built for torch {built_for}, "
            f"but this is torch {torch.__version__}: {REPAIR}"
        )
    return module, ""


def _minor_release(version: str) -> list[str]:
    return version.split(".")[:2]


_C, load_error = _load()


def native_file() -> Path | None:
    """Return the file of the native module, or None without one."""
    return None if _C is None else Path(_C.__file__)


def require_native() -> None:
    """Raise RuntimeError, which says how to repair it, when the native kernels cannot be used."""
    if load_error:
        raise RuntimeError(load_error)


def build_info() -> dict[str, Any]:
    """Return how `_C` was built.

    Returns:
        version, torch, compiler, instruction_sets, cuda (the version of nvcc, or ""), cuda_architectures (entries as in
        TORCH_CUDA_ARCH_LIST) and cuda_off (the reason why it has no CUDA kernels, or "").

    Raises:
        RuntimeError: There is no usable module. The message says how to repair it.
    """
    require_native()
    info: dict[str, Any] = _C.build_info()
    return info


def instruction_set() -> str:
    """Return the instruction set that the CPU kernels use here.

    On x86-64 it is "amx", "avx512_bf16", "avx512", "avx2" or "baseline", on aarch64 "neon_bf16" or "neon".

    Raises:
        RuntimeError: There is no usable module. The message says how to repair it.
        ValueError: The environment variable NANOCHAT_CPU_ISA names a set that this processor does not have.
    """
    require_native()
    name: str = _C.instruction_set()
    return name


def cuda_instruction_set() -> str:
    """Return the instruction set that the CUDA kernels with a choice use on the current GPU: "sm_80" or "sm_90a".

    Raises:
        RuntimeError: There is no GPU, or no module built with CUDA.
        ValueError: The environment variable NANOCHAT_CUDA_ISA names a set that is unknown or that this GPU does not
            have.
    """
    info = build_info()
    if not info["cuda"]:
        raise RuntimeError(f"nanochat_native was built without CUDA: {info['cuda_off']}")
    name: str = _C.cuda_instruction_set()
    return name


def cuda_versions() -> tuple[tuple[int, int], tuple[int, int]]:
    """Return two versions of CUDA, as (major, minor): the newest that the driver runs, and the one of the kernels.

    Without a driver its version is (0, 0).

    Raises:
        RuntimeError: There is no module built with CUDA.
    """
    info = build_info()
    if not info["cuda"]:
        raise RuntimeError(f"nanochat_native was built without CUDA: {info['cuda_off']}")
    driver, runtime = ((number // 1000, number % 1000 // 10) for number in _C.cuda_versions())
    return driver, runtime


# The types of device that have a native kernel, for each operator. "meta" stands for shapes without data.
DEVICES: dict[str, tuple[str, ...]] = {
    op: ("cpu", "meta", "cuda") if op in CUDA_OPERATORS and not load_error and build_info()["cuda"] else ("cpu", "meta")
    for op in OPERATORS
}

NO_MPS_KERNELS = "the kernels are for CPUs and CUDA GPUs"

LEAST_CAPABILITY = (8, 0)  # the compute capability from which a GPU has the instructions of the CUDA kernels
_gpu_problems: dict[int, str] = {}


@torch.compiler.assume_constant_result
def gpu_problem(index: int | None = None) -> str:
    """Return, as a phrase, why the CUDA kernels do not run on a GPU, by default the current one; "" if they do."""
    if not torch.cuda.is_available():  # the device of a tensor without data
        return ""
    index = torch.cuda.current_device() if index is None else index
    if index not in _gpu_problems:
        capability = torch.cuda.get_device_capability(index)
        needed, found = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        problem = f"the CUDA kernels need compute capability {needed} or newer, and this GPU has {found}"
        _gpu_problems[index] = problem if capability < LEAST_CAPABILITY else ""
    return _gpu_problems[index]


# --- the product of `linear` on a CPU ---

LINEAR_PRODUCTS = ("auto", "native", "torch")


def _native_linear_is_faster() -> bool:
    try:
        return not load_error and _C.linear_pays()
    except ValueError:  # about NANOCHAT_CPU_ISA: the first operator that runs raises it, not the import
        return False


native_linear_is_faster = _native_linear_is_faster()
_linear_product = os.environ.get("NANOCHAT_LINEAR") or "auto"


def uses_native_linear() -> bool:
    """Return whether `linear` uses the native product on this CPU, for float32 with enough rows.

    By default it does where that product is faster than torch's. The environment variable NANOCHAT_LINEAR overrides it.

    Raises:
        ValueError: NANOCHAT_LINEAR is not one of LINEAR_PRODUCTS.
    """
    if _linear_product not in LINEAR_PRODUCTS:
        raise ValueError(f"NANOCHAT_LINEAR must be auto, native or torch, got {_linear_product!r}")
    return native_linear_is_faster if _linear_product == "auto" else _linear_product == "native"


# --- the logits on a GPU ---

LOGIT_BYTES = 256 << 20  # kLogitBytes of python/ops_cuda.cpp


def logit_bytes() -> int:
    """Return the most bytes of logits that the CUDA `linear_cross_entropy` holds at once: NANOCHAT_LOGIT_BYTES.

    Raises:
        ValueError: NANOCHAT_LOGIT_BYTES is not a whole number from 1 to 2^63 - 1 in decimal digits.
    """
    text = os.environ.get("NANOCHAT_LOGIT_BYTES") or str(LOGIT_BYTES)
    if not re.fullmatch("0*[1-9][0-9]{0,18}", text) or int(text) >= 2**63:
        raise ValueError(f"NANOCHAT_LOGIT_BYTES must be a number of bytes > 0, got {text}")
    return int(text)


# --- the choice ---

_backend = os.environ.get("NANOCHAT_NATIVE_BACKEND") or "native"


def backend() -> str:
    """Return the backend in use: "native" or "torch".

    Raises:
        ValueError: The environment variable NANOCHAT_NATIVE_BACKEND names another one.
    """
    if _backend not in BACKENDS:
        raise ValueError(f"NANOCHAT_NATIVE_BACKEND must be native or torch, got {_backend!r}")
    return _backend


def settings(device: torch.device | str) -> dict[str, Any]:
    """Return what decides which code computes on a device, as JSON. Equal inputs then have results of equal bits.

    These are the backend, the choices of the environment variables that have an effect on the device, and the
    instruction set of torch's own kernels on the CPU.

    Raises:
        RuntimeError: The backend is "native", and the native module cannot be used.
        ValueError: An environment variable holds an unknown or impossible choice.
    """
    device = torch.device(device)
    found: dict[str, Any] = {"backend": backend(), "torch": torch.backends.cpu.get_cpu_capability()}
    if backend() == "torch":
        return found
    found |= {"instruction_set": instruction_set(), "native_linear": uses_native_linear()}
    if device.type == "cuda" and build_info()["cuda"] and not gpu_problem(device.index):
        found |= {"cuda_instruction_set": cuda_instruction_set(), "logit_bytes": logit_bytes()}
    return found


def check_environment() -> None:
    """Raise ValueError if an environment variable holds an unknown or impossible choice.

    NANOCHAT_CUDA_ISA is not read, because only the CUDA kernels can tell what the GPU has.
    """
    if backend() == "native" and not load_error:
        instruction_set()
    uses_native_linear()
    logit_bytes()


class use_backend:  # noqa: N801 (called as a function)
    """Choose the backend of every operator: permanently as a call, temporarily in a `with` block.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The name is "native", and the native module cannot be used.
    """

    def __init__(self, name: str) -> None:
        global _backend
        if name not in BACKENDS:
            raise ValueError(f"use_backend: name must be 'native' or 'torch', got {name!r}")
        if name == "native":
            require_native()
        self._previous = _backend
        _backend = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _backend
        _backend = self._previous


def serves(op: str, device: torch.device | str) -> tuple[str, str]:
    """Return which backend ("native" or "torch") runs operator `op` on `device`, and the reason as a phrase.

    The answer is for the types and shapes that the operator's kernel takes.

    Raises:
        ValueError: `op` is not one of OPERATORS.
    """
    if op not in DEVICES:
        raise ValueError(f"serves: op must be one of {', '.join(DEVICES)}, got {op!r}")
    device = torch.device(device)
    kind = device.type
    if backend() == "torch":
        return "torch", "chosen by use_backend or NANOCHAT_NATIVE_BACKEND"
    if load_error:
        return "torch", load_error
    if kind == "mps":
        return "torch", NO_MPS_KERNELS
    if op in LINEAR_OPERATORS and kind == "cpu" and not uses_native_linear():
        return "torch", "torch's product is chosen by NANOCHAT_LINEAR, or is as fast or faster on this processor"
    if kind in DEVICES[op]:
        problem = gpu_problem(device.index) if kind == "cuda" else ""
        return ("torch", problem) if problem else ("native", "kernel built")
    if op not in CUDA_OPERATORS:
        return "torch", f"composed of torch's products on {kind}"
    if kind == "cuda" and not build_info()["cuda"]:
        return "torch", "nanochat_native was built without CUDA"
    return "torch", f"no native kernel for {kind} yet"


def runs_native(op: str, tensor: Tensor, unsupported: str = "") -> bool:
    """Return whether the native kernel of `op` runs on the device of `tensor`. Warn when the reference has to instead.

    Args:
        op: The operator.
        tensor: One of its arguments.
        unsupported: The reason, as a phrase, why the kernel does not take these arguments, or "".
    """
    if backend() == "torch":
        return False
    require_native()
    kind = tensor.device.type
    if kind == "cuda" and kind in DEVICES[op] and (problem := gpu_problem(tensor.device.index)):
        warn_reference_runs("every operator", kind, problem)
        return False
    if kind == "mps":
        warn_reference_runs("every operator", kind, NO_MPS_KERNELS)
        return False
    if kind in DEVICES[op] and not unsupported:
        return True
    warn_reference_runs(op, kind, unsupported if kind in DEVICES[op] else serves(op, kind)[1])
    return False


warned: set[tuple[str, str, str]] = set()


@torch.compiler.assume_constant_result  # runs while torch.compile traces: the warning appears, the graph stays whole
def warn_reference_runs(op: str, kind: str, reason: str) -> None:
    """Warn, once for each reason, that plain torch runs `op` on devices of this kind."""
    if (op, kind, reason) not in warned:
        warned.add((op, kind, reason))
        warnings.warn(f"nanochat_native: {op} on {kind} is served by plain torch: {reason}", stacklevel=4)
