"""What stored tensors of a Hugging Face checkpoint mean, spelled out element by element.

Written a second time, and for a few rows only, so that a fault of the code that converts cannot hide in the code that
checks it. Formats: docstring of `models.quant`. Shape letters: N rows (out), K columns (in), n and k chosen ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ...models.dtypes import F8_E4M3_VALUES, F8_E4M3FNUZ_VALUES, FLOATS, Float32, to_f32
from ...models.quant import AWQ_ORDER
from ..checkpoint import Checkpoint
from ..formats import Range
from ..storage import PLAIN, Stored

Indices = NDArray[np.int64]
_FP8_VALUES = {"fp8_block": F8_E4M3_VALUES, "fp8_block_fnuz": F8_E4M3FNUZ_VALUES}


def window(checkpoint: Checkpoint, stored: Stored, rows: Range, cols: Range) -> Float32:
    """FP32 values [n, k] of a matrix; [n, 1] of a vector, whose columns are (0, 1)."""
    if stored.format in PLAIN.values():
        info = stored.tensors["weight"]
        plain = to_f32(checkpoint.read(info.name, rows, cols if len(info.shape) == 2 else None), info.dtype)
        return plain.reshape(rows[1] - rows[0], cols[1] - cols[0])
    parts = _Parts(checkpoint, stored)
    return _FORMATS[stored.format](parts, np.arange(*rows)[:, None], np.arange(*cols)[None, :])


class _Parts:
    """The tensors of a module, read whole but for the codes of formats that keep rows together."""

    def __init__(self, checkpoint: Checkpoint, stored: Stored):
        self.stored = stored
        self._checkpoint = checkpoint

    def __contains__(self, part: str) -> bool:
        return part in self.stored.tensors

    def __getitem__(self, part: str) -> NDArray:
        info = self.stored.tensors[part]
        array = self._checkpoint.read(info.name)
        return to_f32(array, info.dtype) if info.dtype in FLOATS and not info.dtype.startswith("F8_E4M3") else array

    def rows(self, part: str, n: Indices) -> NDArray:
        """The rows that ``n`` runs over, in its order."""
        return self._checkpoint.read(self.stored.tensors[part].name, (int(n[0, 0]), int(n[-1, 0]) + 1))

    def group_of(self, k: Indices, part: str) -> Indices:
        """The group of channels ``k``."""
        size = self.stored.group_size
        assert size is not None
        return self[part].astype(np.int64)[k] if part in self else k // size


def _blocks(values: Callable[[Stored, NDArray], Float32]) -> Callable[[_Parts, Indices, Indices], Float32]:
    def product(parts: _Parts, n: Indices, k: Indices) -> Float32:
        assert parts.stored.block is not None
        height, width = parts.stored.block
        codes = parts.rows("weight", n)[:, k[0]]
        return values(parts.stored, codes) * parts["weight_scale_inv"][n // height, k // width]

    return product


def _channels(parts: _Parts, n: Indices, k: Indices) -> Float32:
    codes = parts.rows("weight", n)[:, k[0]].astype(np.float32)
    if "weight_offset" in parts:
        codes = codes - parts["weight_offset"].reshape(-1)[n]
    return codes * parts["weight_scale"].reshape(-1)[n]


def _ascend_static(parts: _Parts, n: Indices, k: Indices) -> Float32:
    product = parts["deq_scale"].reshape(-1)
    if product.dtype == np.int64:  # the FP32 pattern in the low half
        product = product.astype(np.uint32).view(np.float32)
    codes = parts.rows("weight", n)[:, k[0]].astype(np.float32)
    return codes * (product[n] / parts["input_scale"].reshape(-1)[0])


def _nibble(words: NDArray, position: Indices) -> NDArray[np.int64]:
    """Four bits of each 32-bit word; position 0 holds the lowest."""
    return (words.astype(np.int64) >> (4 * position)) & 15


def _gptq(parts: _Parts, n: Indices, k: Indices) -> Float32:
    group = parts.group_of(k, "g_idx")
    codes = _nibble(parts["qweight"][k // 8, n], k % 8)
    zeros = _nibble(parts["qzeros"][group, n // 8], n % 8)
    if parts.stored.zeros_minus_one:
        zeros = (zeros + 1) % 16
    return (codes - zeros).astype(np.float32) * parts["scales"][group, n]


def _awq(parts: _Parts, n: Indices, k: Indices) -> Float32:
    group = parts.group_of(k, "g_idx")
    position = np.argsort(AWQ_ORDER)[n % 8]
    codes = _nibble(parts["qweight"][k, n // 8], position)
    zeros = _nibble(parts["qzeros"][group, n // 8], position)
    return (codes - zeros).astype(np.float32) * parts["scales"][group, n]


def _packed(parts: _Parts, n: Indices, k: Indices) -> Float32:
    group = parts.group_of(k, "weight_g_idx")
    codes = _nibble(parts.rows("weight_packed", n)[:, k[0] // 8], k % 8)
    zeros: NDArray | int = 8
    if "weight_zero_point" in parts:
        zeros = _nibble(parts["weight_zero_point"][n // 8, group], n % 8)
    return (codes - zeros).astype(np.float32) * parts["weight_scale"][n, group]


_FORMATS: Mapping[str, Callable[[_Parts, Indices, Indices], Float32]] = {
    **dict.fromkeys(_FP8_VALUES, _blocks(lambda stored, codes: _FP8_VALUES[stored.format][codes])),
    "int8_block": _blocks(lambda stored, codes: codes.astype(np.float32)),
    "int8_channel": _channels,
    "ascend_static": _ascend_static,
    "gptq": _gptq,
    "awq": _awq,
    "ct_int4": _packed,
}
