"""CheckpointWeights: what backends load from. Any stored format in, logical [out, in] weights out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models.dtypes import F8_E4M3_VALUES, F8_E4M3FNUZ_VALUES, FLOATS, Float32, to_f32
from ..models.errors import InputError
from ..models.params import Param
from ..models.quant import (
    dequant_awq,
    dequant_fp8_blocks,
    dequant_gptq,
    dequant_int8_blocks,
    dequant_int8_channels,
    dequant_packed_int4,
    groups,
    result_dtype,
    round_to,
)
from ..models.spec import ModelSpec
from .checkpoint import Checkpoint, listed
from .inventory import Inventory, take_inventory
from .quant_config import QuantConfig
from .storage import Stored

Range = tuple[int, int]
Parts = dict[str, NDArray]


class CheckpointWeights:
    """The parameters of ``spec`` as ``checkpoint`` stores them.

    Construction checks everything that headers can show: each parameter is there once, in a known format, with the
    right shape, and every tensor belongs to one; anything else raises InputError. The two legal absences are
    `Inventory`'s: ``has_mtp`` and ``shared`` tell of them. Reading is thread-safe.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec):
        self._checkpoint = checkpoint
        inventory = take_inventory(checkpoint.tensors, spec, quant_config(checkpoint, spec))
        _check_complete(inventory, checkpoint, spec)
        self.has_mtp = inventory.has_mtp
        self.shared = inventory.shared
        self._params = inventory.params
        self._stored = inventory.stored

    def names(self) -> list[str]:
        """The canonical names that can be read, in checkpoint order."""
        return list(self._params)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._params[name].shape

    def format(self, name: str) -> str:
        """How the parameter is stored; `storage.Stored.format` lists the values."""
        return self.stored(name).format

    def stored(self, name: str) -> Stored:
        """Format, block or group size and tensors of a parameter."""
        return self._stored[self.shared.get(name, name)]

    def bytes_as(self, dtype: str) -> int:
        """Memory of all parameters held as "f32" or "bf16"; tables that are shared count once."""
        size = sum(param.size for name, param in self._params.items() if name not in self.shared)
        return size * result_dtype(dtype).itemsize

    def read(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray:
        """The weight, or its window of (start, stop) ``rows`` and ``cols``.

        "f32" gives float32, "bf16" uint16 bit patterns, dequantised in FP32 and rounded once. Only the bytes that the
        window needs are read, up to a page, a scale block or an INT4 word around it.
        """
        stored = self.stored(name)
        window = _Window.of(stored.param, rows, cols)
        return _FORMATS[stored.format].dequantise(stored, self._read_parts(stored, window), window, dtype)

    def parts(self, name: str, rows: Range | None = None, cols: Range | None = None) -> Parts:
        """The stored tensors of a parameter, for backends that compute in its format.

        Codes are raw carriers, scales are FP32. With a window these are the parts that cover it: scales of the blocks
        that it touches, INT4 words widened to multiples of eight rows and columns, INT4 scales of all groups.
        """
        stored = self.stored(name)
        return self._read_parts(stored, _Window.of(stored.param, rows, cols))

    def _read_parts(self, stored: Stored, window: _Window) -> Parts:
        parts = {}
        for part, (rows, cols) in _FORMATS[stored.format].ranges(stored, window).items():
            info = stored.tensors[part]
            array = self._checkpoint.read(info.name, rows, cols)
            is_scale = part != "weight" and info.dtype in FLOATS
            parts[part] = to_f32(array, info.dtype) if is_scale else array
        _check_parts(stored, parts)
        return parts


@dataclass(frozen=True)
class _Window:
    """Rows and, for matrices, columns of a parameter; a vector has the columns (0, 1)."""

    rows: Range
    cols: Range

    @staticmethod
    def of(param: Param, rows: Range | None, cols: Range | None) -> _Window:
        whole = param.shape if len(param.shape) == 2 else (*param.shape, 1)
        for chosen, size in ((rows, whole[0]), (cols, whole[1])):
            assert chosen is None or 0 <= chosen[0] <= chosen[1] <= size, f"{param.name}: {chosen} of {size}"
        return _Window(rows or (0, whole[0]), cols or (0, whole[1]))


Ranges = dict[str, tuple[Range | None, Range | None]]


@dataclass(frozen=True)
class _Format:
    """Which ranges of the parts a window needs, and the weight that they mean."""

    ranges: Callable[[Stored, _Window], Ranges]
    dequantise: Callable[[Stored, Parts, _Window, str], NDArray]


def _touched(window: Range, unit: int) -> Range:
    """The units of ``unit`` elements that a range touches."""
    return window[0] // unit, max(window[0] // unit, -(-window[1] // unit))


def _plain_ranges(stored: Stored, window: _Window) -> Ranges:
    return {"weight": (window.rows, window.cols if len(stored.param.shape) == 2 else None)}


def _plain(stored: Stored, parts: Parts, window: _Window, dtype: str) -> NDArray:
    source = stored.tensors["weight"].dtype
    if source == "BF16" and dtype == "bf16":
        return parts["weight"]
    return round_to(to_f32(parts["weight"], source), dtype)


def _block_ranges(stored: Stored, window: _Window) -> Ranges:
    assert stored.block is not None
    scales = _touched(window.rows, stored.block[0]), _touched(window.cols, stored.block[1])
    return {"weight": (window.rows, window.cols), "weight_scale_inv": scales}


def _fp8_blocks(values: Float32) -> Callable[[Stored, Parts, _Window, str], NDArray]:
    def dequantise(stored: Stored, parts: Parts, window: _Window, dtype: str) -> NDArray:
        assert stored.block is not None
        origin = window.rows[0], window.cols[0]
        return dequant_fp8_blocks(parts["weight"], parts["weight_scale_inv"], dtype, stored.block, origin, values)

    return dequantise


def _int8_blocks(stored: Stored, parts: Parts, window: _Window, dtype: str) -> NDArray:
    assert stored.block is not None
    origin = window.rows[0], window.cols[0]
    return dequant_int8_blocks(parts["weight"], parts["weight_scale_inv"], dtype, stored.block, origin)


def _channel_ranges(stored: Stored, window: _Window) -> Ranges:
    return {part: (window.rows, window.cols if part == "weight" else None) for part in stored.tensors}


def _int8_channels(stored: Stored, parts: Parts, window: _Window, dtype: str) -> NDArray:
    scales = parts["weight_scale"].reshape(-1, 1)
    offsets = parts["weight_offset"].reshape(-1, 1) if "weight_offset" in parts else None
    return dequant_int8_channels(parts["weight"], scales, dtype, offsets)


def _int4_ranges(stored: Stored, window: _Window) -> Ranges:
    """Everything is widened to whole words of eight along both axes; `_trim` cuts the result back."""
    rows, cols = _eights(window.rows, stored.param.shape[0]), _eights(window.cols, stored.param.shape[1])
    row_words, col_words = _touched(window.rows, 8), _touched(window.cols, 8)
    by_part: Ranges = {
        "qweight": (col_words, rows) if stored.format == "gptq" else (cols, row_words),
        "qzeros": (None, row_words),
        "scales": (None, rows),
        "g_idx": (cols, None),
        "weight_packed": (rows, col_words),
        "weight_scale": (rows, None),
        "weight_zero_point": (row_words, None),
        "weight_g_idx": (cols, None),
        "weight_shape": (None, None),
    }
    return {part: by_part[part] for part in stored.tensors}


def _eights(window: Range, size: int) -> Range:
    first, last = _touched(window, 8)
    return 8 * first, min(8 * last, size)


def _trim(weight_NK: NDArray, window: _Window) -> NDArray:
    row, col = window.rows[0] % 8, window.cols[0] % 8
    height, width = window.rows[1] - window.rows[0], window.cols[1] - window.cols[0]
    return weight_NK[row : row + height, col : col + width]


def _group_of(stored: Stored, parts: Parts, part: str, window: _Window) -> NDArray[np.int32]:
    """The group of each channel of the widened window: g_idx, or the natural order without one."""
    if part in parts:
        return parts[part]
    assert stored.group_size is not None
    channels = stored.param.shape[1]
    return groups(channels, stored.group_size)[slice(*_eights(window.cols, channels))]


def _gptq(stored: Stored, parts: Parts, window: _Window, dtype: str) -> NDArray:
    group_of_K = _group_of(stored, parts, "g_idx", window)
    minus_one = stored.zeros_minus_one
    weight = dequant_gptq(parts["qweight"], parts["qzeros"], parts["scales"], group_of_K, minus_one, dtype)
    return _trim(weight, window)


def _awq(stored: Stored, parts: Parts, window: _Window, dtype: str) -> NDArray:
    group_of_K = _group_of(stored, parts, "g_idx", window)
    return _trim(dequant_awq(parts["qweight"], parts["qzeros"], parts["scales"], group_of_K, dtype), window)


def _packed(stored: Stored, parts: Parts, window: _Window, dtype: str) -> NDArray:
    group_of_K = _group_of(stored, parts, "weight_g_idx", window)
    zeros = parts.get("weight_zero_point")
    return _trim(dequant_packed_int4(parts["weight_packed"], parts["weight_scale"], group_of_K, dtype, zeros), window)


_FORMATS = {
    "bf16": _Format(_plain_ranges, _plain),
    "f16": _Format(_plain_ranges, _plain),
    "f32": _Format(_plain_ranges, _plain),
    "fp8_block": _Format(_block_ranges, _fp8_blocks(F8_E4M3_VALUES)),
    "fp8_block_fnuz": _Format(_block_ranges, _fp8_blocks(F8_E4M3FNUZ_VALUES)),
    "int8_block": _Format(_block_ranges, _int8_blocks),
    "int8_channel": _Format(_channel_ranges, _int8_channels),
    "gptq": _Format(_int4_ranges, _gptq),
    "awq": _Format(_int4_ranges, _awq),
    "ct_int4": _Format(_int4_ranges, _packed),
}


def _check_parts(stored: Stored, parts: Parts) -> None:
    """What only the data of index-like tensors shows."""
    shape = parts.get("weight_shape")
    if shape is not None and tuple(shape.tolist()) != stored.param.shape:
        info = stored.tensors["weight_shape"]
        what = f"{info.name} says {shape.tolist()}, the model has {list(stored.param.shape)}"
        raise InputError(what, str(info.path), "get the checkpoint that belongs to this config.json")
    for part in ("g_idx", "weight_g_idx"):
        if part in parts and parts[part].size:
            assert stored.group_size is not None
            count = -(-stored.param.shape[1] // stored.group_size)
            if parts[part].min() < 0 or parts[part].max() >= count:
                info = stored.tensors[part]
                raise InputError(
                    f"{info.name} names groups outside of 0..{count - 1}", str(info.path), "download again"
                )


def _check_complete(inventory: Inventory, checkpoint: Checkpoint, spec: ModelSpec) -> None:
    if inventory.faults:
        raise inventory.faults[0]
    if inventory.missing:
        where = str(checkpoint.directory)
        raise InputError(
            f"missing: {listed(inventory.missing)}", where, "get the complete checkpoint of this config.json"
        )
    if extra := inventory.extra:
        todo = "get the config.json that belongs to the checkpoint, or remove the tensors"
        if all(name.startswith(f"model.layers.{spec.num_hidden_layers}.") for name in extra):
            todo = "set num_nextn_predict_layers to the number of MTP layers, which these tensors look like"
        raise InputError(f"no parameter for: {listed(extra)}", str(checkpoint.tensors[extra[0]].path), todo)


def quant_config(checkpoint: Checkpoint, spec: ModelSpec) -> QuantConfig:
    """The checkpoint's own declaration; a directory without config.json is read by the spec's."""
    path = checkpoint.directory / "config.json"
    if not path.exists():
        return QuantConfig({"weight_block_size": list(spec.fp8.block)} if spec.fp8 else {}, "model spec")
    values = checkpoint.config.get("quantization_config") or {}
    if not isinstance(values, Mapping):
        raise InputError("quantization_config is not an object", str(path), "repair it, or remove it when nothing is")
    return QuantConfig(values, str(path))
