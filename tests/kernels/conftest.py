"""Kernels run in Triton's interpreter here, on a CPU (see tests/conftest.py), or with TRITON_INTERPRET=0 on a GPU."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.kernels.device import DEVICE  # noqa: E402 - after torch is known to be there


@pytest.fixture(autouse=True)
def _default_device():
    with DEVICE:
        yield


@pytest.fixture(autouse=True)
def _bf16_as_on_a_gpu(monkeypatch):
    """Two faults of Triton 3.6's interpreter, put right: it multiplies BF16 matrices as integers, and rounds FP32 to
    BF16 without ties to even and without the carry into the exponent."""
    if DEVICE.type != "cpu":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    product, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, d, *rest):
        return product(self, widen(a), widen(b), d, *rest)

    def round_to_even(values, source, target, rounding):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter, "_convert_float", round_to_even)
