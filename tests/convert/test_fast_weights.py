"""FastWeights against CheckpointWeights, with the compiled kernels and without, as stored and transposed."""

import numpy as np
import pytest

from deepspan.convert import fast_weights, speed
from deepspan.convert.checkpoint import Checkpoint
from deepspan.convert.fast_weights import FastWeights
from deepspan.convert.weights import CheckpointWeights
from tests.convert.encoders import FORMATS, SPEC, encode_model, write

NAME = "model.layers.0.mlp.gate_proj.weight"  # [264, 136]
WINDOWS = [
    (None, None),
    ((0, 256), (0, 128)),  # whole squares
    ((3, 264), None),
    (None, (5, 136)),
    ((100, 260), (40, 120)),
    ((127, 129), (31, 33)),
    ((128, 128), (0, 136)),
]


@pytest.fixture(params=[True, False], ids=["kernels", "numpy"])
def has_kernels(request, monkeypatch):
    monkeypatch.setattr(speed, "HAS_KERNELS", request.param)


@pytest.fixture(params=[1, 1 << 20], ids=["strips of a block", "one strip"])
def strips(request, monkeypatch):
    monkeypatch.setattr(fast_weights, "_STRIP_BYTES", request.param)


@pytest.mark.usefixtures("has_kernels", "strips")
@pytest.mark.parametrize("form", ["bf16", "fp8", "fp8, small blocks", "fnuz", "int8 channels, F32"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_the_same_bits(tmp_path, form, dtype):
    directory = write(tmp_path / "source", encode_model(SPEC, FORMATS[form])[0], FORMATS[form].config)
    with Checkpoint.open(directory) as checkpoint:
        fast, plain = FastWeights(checkpoint, SPEC), CheckpointWeights(checkpoint, SPEC)
        for rows, cols in WINDOWS:
            expected = plain.read(NAME, dtype, rows, cols)
            np.testing.assert_array_equal(fast.read(NAME, dtype, rows, cols), expected)
            transposed = fast.read_transposed(NAME, dtype, rows, cols)
            np.testing.assert_array_equal(transposed, expected.T)
            assert transposed.flags.c_contiguous
