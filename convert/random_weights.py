"""RandomWeights: the parameters of a spec without a checkpoint, for timings and tests."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from ..models.dtypes import bf16_to_f32, f32_to_bf16
from ..models.params import Param, parameters
from ..models.quant import result_dtype
from ..models.spec import ModelSpec

_ROWS = 256  # rows that share a generator, so that a slice costs no more than what it touches


class RandomWeights:
    """Weights that depend on the seed, the name and the position only: not on the order or the windows of reading.

    Linear weights and embeddings are normal with the standard deviation ``scale`` / sqrt(in), which keeps activations
    near one; norm weights are near 1, router biases near 0 and not equal. Same reading interface as CheckpointWeights;
    an MTP layer's embedding and head equal the main model's, as in published checkpoints.
    """

    def __init__(self, spec: ModelSpec, seed: int = 0, scale: float = 1.0):
        self._seed = seed
        self._scale = scale
        self._params = {param.name: param for param in parameters(spec)}
        self.has_mtp = spec.num_nextn_predict_layers > 0

    def names(self) -> list[str]:
        return list(self._params)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._params[name].shape

    def format(self, name: str) -> str:
        """The precision in which values are exact."""
        return self._params[name].dtype.lower()

    def group_size(self, name: str) -> None:
        """None: the values are plain."""

    def bytes_as(self, dtype: str) -> int:
        """Memory of all parameters held as "f32" or "bf16"."""
        return sum(param.size for param in self._params.values()) * result_dtype(dtype).itemsize

    def read(
        self, name: str, dtype: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> NDArray:
        """The weight, or its window of (start, stop) ``rows`` and ``cols``, as "f32" or "bf16" (bit patterns)."""
        param = self._params[name]
        start, stop = rows or (0, param.shape[0])
        chunks = [self._chunk(param, index, dtype) for index in range(start // _ROWS, -(-stop // _ROWS))]
        if not chunks:
            return np.empty((0, *param.shape[1:]), result_dtype(dtype))
        first = start - start // _ROWS * _ROWS
        window = np.concatenate(chunks)[first : first + stop - start]
        return window if cols is None else np.ascontiguousarray(window[:, slice(*cols)])

    def fp8_blocks(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> None:
        """None, too."""

    def int8_channels(
        self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> None:
        """None, too."""

    def static_input(
        self, name: str, rows: tuple[int, int] | None = None
    ) -> tuple[float, int, NDArray[np.int32] | None] | None:
        """None, too."""
        return None

    def int8_blocks(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> None:
        """None, too."""

    def int4(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> None:
        """None, too."""

    def _chunk(self, param: Param, index: int, dtype: str) -> NDArray:
        """Rows index * _ROWS and on, rounded to the parameter's own precision first: "f32" and "bf16" agree."""
        shape = min(_ROWS, param.shape[0] - index * _ROWS), *param.shape[1:]
        key = f"{self._seed}/{_drawn_as(param)}/{index}".encode()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(hashlib.sha256(key).digest(), "little")))
        values = generator.standard_normal(shape, np.float32)
        if len(shape) == 2:
            values *= np.float32(self._scale / math.sqrt(shape[1]))
        elif param.name.endswith("norm.weight"):
            values = 1 + np.float32(0.1) * values
        else:
            values *= np.float32(0.05)
        if param.dtype == "F32" and dtype == "f32":
            return values
        bits = f32_to_bf16(values)
        return bits if dtype == "bf16" else bf16_to_f32(bits)


def _drawn_as(param: Param) -> str:
    """The name whose numbers the parameter has: an MTP layer's tables are copies of the main model's."""
    if param.name.endswith(".embed_tokens.weight"):
        return "model.embed_tokens.weight"
    if param.name.endswith(".shared_head.head.weight"):
        return "lm_head.weight"
    return param.name
