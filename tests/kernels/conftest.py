"""Kernels run in Triton's interpreter here, on a CPU (see tests/conftest.py), or with TRITON_INTERPRET=0 on a GPU."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.kernels.device import DEVICE
from tests.kernels.interpreter import compute_bf16_as_on_a_gpu

compute_bf16_as_on_a_gpu()


@pytest.fixture(autouse=True)
def _default_device():
    with DEVICE:
        yield
