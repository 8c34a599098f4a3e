"""The peak compute rate and the memory of the machine, and the device to use."""

import functools
import os
import platform
import resource
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanochat_native.runtime.distributed import launched_by_torchrun

# Dense bfloat16 tensor-core rates in FLOP/s, with float32 accumulation and without sparsity, and memory bandwidths in
# bytes/s, from NVIDIA's data sheets and architecture whitepapers. The first row counts whose words are all in the name
# of the device.
GPU_PEAKS: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (("gb200",), 2.5e15, 8e12),
    (("b200",), 2.25e15, 8e12),
    (("b100",), 1.8e15, 8e12),
    (("h200", "nvl"), 835e12, 4.8e12),
    (("h200",), 989e12, 4.8e12),
    (("gh200",), 989e12, 4e12),
    (("h100", "nvl"), 835e12, 3.9e12),
    (("h100", "pcie"), 756e12, 2e12),
    (("h100",), 989e12, 3.35e12),
    (("h800", "pcie"), 756e12, 2e12),
    (("h800",), 989e12, 3.35e12),
    (("h20",), 148e12, 4e12),
    (("a100", "80gb", "pcie"), 312e12, 1.935e12),
    (("a100", "80gb"), 312e12, 2.039e12),
    (("a100",), 312e12, 1.555e12),
    (("a800", "80gb", "pcie"), 312e12, 1.935e12),
    (("a800", "80gb"), 312e12, 2.039e12),
    (("a800",), 312e12, 1.555e12),
    (("a40",), 149.7e12, 696e9),
    (("a30",), 165e12, 933e9),
    (("l40s",), 362e12, 864e9),
    (("l4",), 121e12, 300e9),
    (("rtx", "pro", "6000", "server"), 503.8e12, 1.597e12),
    (("rtx", "pro", "6000"), 503.8e12, 1.792e12),
    (("6000", "ada"), 364.2e12, 960e9),
    (("a6000",), 154.8e12, 768e9),
    (("5090",), 209.5e12, 1.792e12),
    (("4090",), 165.2e12, 1.008e12),
    (("3090",), 71e12, 936e9),
)


@dataclass(frozen=True)
class Peak:
    """The peak rate in FLOP/s, or None if it is not known, and the source of the figure."""

    flops: float | None
    source: str


# Words in the names of devices that share the name of a GPU of the table, but not its rates.
NOT_IN_THE_TABLE = {
    "laptop": "laptop GPUs share the names of faster ones",
    "mig": "a MIG slice is a part of the GPU that is in the table",
}


def gpu_peak(name: str, dtype: torch.dtype) -> Peak:
    """Return the peak of a GPU by its device name, such as "NVIDIA H100 80GB HBM3". It is known for bfloat16 only."""
    if dtype != torch.bfloat16:
        return Peak(None, f"the table has no rates of {dtype}, only of bfloat16")
    for word, reason in NOT_IN_THE_TABLE.items():
        if word in _words(name):
            return Peak(None, f"{name}: {reason}")
    row = _row_of(name)
    return Peak(None, f"{name} is not in the table") if row is None else Peak(row[0], f"{name}, dense bfloat16")


def gpu_bandwidth(name: str) -> float | None:
    """Return the bandwidth of a GPU's memory in bytes/s by its device name, or None if it is not known."""
    row = _row_of(name)
    return None if row is None else row[1]


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").split()


def _row_of(name: str) -> tuple[float, float] | None:
    """Return the rate and the bandwidth of a GPU by its device name."""
    words = _words(name)
    for needed, flops, bandwidth in GPU_PEAKS:
        if all(word in words for word in needed) and NOT_IN_THE_TABLE.keys().isdisjoint(words):
            return flops, bandwidth
    return None


def cpu_peak() -> Peak:
    """Return the best rate of torch's float32 product of 1536 x 1536 matrices. It is measured once for each number of
    threads, for about 0.1 s.

    A run can exceed it, because the kernels of this package can be faster than torch's, and because the FLOPs of a
    token count attention to the whole sequence.
    """
    return _cpu_peak(torch.get_num_threads(), 0.1)


@functools.cache
def _cpu_peak(threads: int, seconds: float) -> Peak:
    n = 1536
    a, b = torch.ones(n, n), torch.ones(n, n)
    best = float("inf")
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return Peak(2 * n**3 / best, f"torch's sgemm, measured, {threads} threads")


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the peak rate of `device`: from the table for a GPU, measured for a CPU, always in float32."""
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), dtype)
    if device.type == "mps":
        return Peak(None, "the table has no rates of MPS devices")
    return cpu_peak()


def describe(device: torch.device) -> str:
    """Return the name of a device: "H200 sm_90", "MPS on Apple M2" or "AMD EPYC 7B13, 2 threads"."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device).removeprefix('NVIDIA ')} sm_{major}{minor}"
    name = cpu_name() or platform.machine()
    return f"MPS on {name}" if device.type == "mps" else f"{name}, {torch.get_num_threads()} threads"


def memory(device: torch.device) -> tuple[int, int]:
    """Return (peak use by this process, total size) of the memory of a device, in bytes; for MPS the present use."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
    return peak_resident_bytes(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """Return the most memory of the CPU that this process has had, in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024  # getrusage(2) of the two systems
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes(pid: int | None = None) -> int:
    """Return the memory of the CPU that a process has now, by default this one, in bytes."""
    pid = pid or os.getpid()
    if platform.system() == "Darwin":
        return 1024 * int(subprocess.run(["/bin/ps", "-o", "rss=", "-p", str(pid)], capture_output=True).stdout)
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def usable_cores() -> int:
    """Return the number of processor cores that this process may use; on macOS, which cannot tell, all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all of its work. On a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def cpu_name() -> str | None:
    """Return the name of the processor as Linux or macOS gives it, or None."""
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None


def pick_device(name: str | None) -> torch.device:
    """Return the device `name`, by default a CUDA GPU if there is one, else the CPU.

    MPS is never the default: plain torch runs every operator there, and the kernels for the CPU may be faster.

    Raises ValueError for a GPU that is not there, and for MPS on several ranks.
    """
    available = ["cpu", *["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available()]
    if name is None:
        return torch.device("cuda" if "cuda" in available else "cpu")
    device = torch.device(name)
    if device.type not in available:
        what = "MPS device" if device.type == "mps" else "GPU"
        raise ValueError(f"--device must be {' or '.join(available)}, because torch sees no {what}, got {name}")
    if device.type == "mps" and launched_by_torchrun():
        raise ValueError("--device must be cpu on several ranks, because gloo takes no tensors of MPS, got mps")
    return device


def gpu_dtype(device: torch.device) -> torch.dtype:
    """Return the type of the activations on a GPU: bfloat16, or float16 on one without products in bfloat16."""
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def has_float8(device: torch.device) -> bool:
    """Return whether a device is a GPU with products in FP8: compute capability 8.9 or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def autocast(device: torch.device, dtype: Literal["float32", "bfloat16"] | None = None) -> torch.autocast:
    """Return the precision in which models run: `dtype`, by default gpu_dtype on a CUDA GPU and float32 elsewhere.

    Raises ValueError for bfloat16 on a GPU without products in it.
    """
    is_gpu = device.type == "cuda"
    if is_gpu and dtype == "bfloat16" and gpu_dtype(device) != torch.bfloat16:
        raise ValueError("--dtype must be float32 on a GPU without products in bfloat16, got bfloat16")
    enabled = is_gpu if dtype is None else dtype != "float32"
    return torch.autocast(device.type, gpu_dtype(device) if is_gpu else torch.bfloat16, enabled=enabled)
