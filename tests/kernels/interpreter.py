"""Two faults of Triton 3.6's interpreter, put right: it multiplies BF16 matrices as integers, and rounds FP32 to BF16
without ties to even and without the carry into the exponent."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels.device import DEVICE

_product, _convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float


def compute_bf16_as_on_a_gpu() -> None:
    """From now on in this process; every process that runs kernels on the CPU has to ask for it."""
    if DEVICE.type == "cpu":
        interpreter.InterpreterBuilder.create_dot = _dot
        interpreter._convert_float = _round_to_even


def _dot(self, a, b, d, *rest):
    return _product(self, _widened(a), _widened(b), d, *rest)


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round_to_even(values, source, target, rounding):
    if source != tl.float32 or target != tl.bfloat16:
        return _convert(values, source, target, rounding)
    rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)
