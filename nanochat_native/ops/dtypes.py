"""The floating-point types that the operators take and compute in."""

import torch

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
ALL_DTYPES = (*CPU_DTYPES, torch.float16)
PARAM_DTYPES = (torch.float32, torch.bfloat16)
FUSED_CUDA_DTYPES = (torch.float32, torch.bfloat16)  # of the CUDA kernels of norms, rotation and squared ReLU


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that inputs of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x in dtype, for a result of an autograd.Function.

    Where nothing is converted, it is x itself and not x.to(dtype): torch 2.11 loses the gradient of that in a graph.
    """
    return x if x.dtype == dtype else x.to(dtype)


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the type of long sums and of settings in device memory: float64, on MPS float32, as it has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def dtypes_on(device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the types that the norms, the rotation and squared ReLU take on a device."""
    return ALL_DTYPES if device.type == "cuda" else CPU_DTYPES


def no_cuda_kernel(device: torch.device, *dtypes: torch.dtype) -> str:
    """Return, as a phrase, why the CUDA kernels of these operators do not take one of the types; "" if they do."""
    for dtype in dtypes:
        if device.type == "cuda" and dtype not in FUSED_CUDA_DTYPES:
            return f"its kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return ""
