"""Activations for kernels' tests, and what they become."""

import numpy as np
import torch


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a view whose surroundings are NaN: any read past the valid range shows."""
    wide = torch.full((x.shape[0] + 2, *x.shape[1:-1], x.shape[-1] + 37), torch.nan, dtype=x.dtype)
    wide[1:-1, ..., 5 : 5 + x.shape[-1]] = x
    return wide[1:-1, ..., 5 : 5 + x.shape[-1]]


def bits(x: torch.Tensor) -> np.ndarray:
    """Of codes, 0 for -0: a quotient by way of the reciprocal loses the sign of a zero."""
    codes = x.contiguous().view(torch.uint8)
    return codes.masked_fill(codes == 0x80, 0).numpy(force=True)
