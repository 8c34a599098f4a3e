"""The floating-point types that the operators take and compute in."""

import torch

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
ALL_DTYPES = (*CPU_DTYPES, torch.float16)
PARAM_DTYPES = (torch.float32, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type that inputs of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
