"""The GPU's path runs on CPU tensors here, its kernels in Triton's interpreter (see tests/conftest.py)."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.kernels.interpreter import compute_bf16_as_on_a_gpu

compute_bf16_as_on_a_gpu()
