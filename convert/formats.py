"""The stored formats as a table: which ranges of the stored tensors a window of a weight needs, and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models.dtypes import F8_E4M3_VALUES, F8_E4M3FNUZ_VALUES, Float32, to_f32
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
    round_to,
)
from .storage import Stored

Range = tuple[int, int]
Ranges = dict[str, tuple[Range | None, Range | None]]
Parts = dict[str, NDArray]


@dataclass(frozen=True)
class Window:
    """Rows and, for matrices, columns of a parameter; a vector has the columns (0, 1)."""

    rows: Range
    cols: Range

    @staticmethod
    def of(param: Param, rows: Range | None, cols: Range | None) -> Window:
        whole = param.shape if len(param.shape) == 2 else (*param.shape, 1)
        for chosen, size in ((rows, whole[0]), (cols, whole[1])):
            assert chosen is None or 0 <= chosen[0] <= chosen[1] <= size, f"{param.name}: {chosen} of {size}"
        return Window(rows or (0, whole[0]), cols or (0, whole[1]))


@dataclass(frozen=True)
class Format:
    """Which ranges of the parts a window needs, and the weight that they mean."""

    ranges: Callable[[Stored, Window], Ranges]
    dequantise: Callable[[Stored, Parts, Window, str], NDArray]


def _touched(window: Range, unit: int) -> Range:
    """The units of ``unit`` elements that a range touches."""
    return window[0] // unit, max(window[0] // unit, -(-window[1] // unit))


def _plain_ranges(stored: Stored, window: Window) -> Ranges:
    return {"weight": (window.rows, window.cols if len(stored.param.shape) == 2 else None)}


def _plain(stored: Stored, parts: Parts, window: Window, dtype: str) -> NDArray:
    source = stored.tensors["weight"].dtype
    if source == "BF16" and dtype == "bf16":
        return parts["weight"]
    return round_to(to_f32(parts["weight"], source), dtype)


def _block_ranges(stored: Stored, window: Window) -> Ranges:
    assert stored.block is not None
    scales = _touched(window.rows, stored.block[0]), _touched(window.cols, stored.block[1])
    return {"weight": (window.rows, window.cols), "weight_scale_inv": scales}


def _fp8_blocks(values: Float32) -> Callable[[Stored, Parts, Window, str], NDArray]:
    def dequantise(stored: Stored, parts: Parts, window: Window, dtype: str) -> NDArray:
        assert stored.block is not None
        origin = window.rows[0], window.cols[0]
        return dequant_fp8_blocks(parts["weight"], parts["weight_scale_inv"], dtype, stored.block, origin, values)

    return dequantise


def _int8_blocks(stored: Stored, parts: Parts, window: Window, dtype: str) -> NDArray:
    assert stored.block is not None
    origin = window.rows[0], window.cols[0]
    return dequant_int8_blocks(parts["weight"], parts["weight_scale_inv"], dtype, stored.block, origin)


def _channel_ranges(stored: Stored, window: Window) -> Ranges:
    by_part: Ranges = {"weight": (window.rows, window.cols)}
    by_part |= dict.fromkeys(("weight_scale", "weight_offset", "deq_scale", "quant_bias"), (window.rows, None))
    return {part: by_part.get(part, (None, None)) for part in stored.tensors}


def _int8_channels(stored: Stored, parts: Parts, window: Window, dtype: str) -> NDArray:
    scales = parts["weight_scale"].reshape(-1, 1)
    offsets = parts["weight_offset"].reshape(-1, 1) if "weight_offset" in parts else None
    return dequant_int8_channels(parts["weight"], scales, dtype, offsets)


def _ascend_static(stored: Stored, parts: Parts, window: Window, dtype: str) -> NDArray:
    return dequant_int8_channels(parts["weight"], ascend_weight_scales(parts), dtype)


def ascend_weight_scales(parts: Parts) -> NDArray:
    """[N, 1]: deq_scale is the activation's scale times the weight's; FP16 models hold its FP32 pattern in 64 bits."""
    deq_scale = parts["deq_scale"]
    if deq_scale.dtype == np.int64:
        deq_scale = deq_scale.astype(np.int32).view(np.float32)
    scales: NDArray = deq_scale.reshape(-1, 1) / parts["input_scale"].reshape(-1)[0]
    return scales


def _int4_ranges(stored: Stored, window: Window) -> Ranges:
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


def _trim(weight_NK: NDArray, window: Window) -> NDArray:
    row, col = window.rows[0] % 8, window.cols[0] % 8
    height, width = window.rows[1] - window.rows[0], window.cols[1] - window.cols[0]
    return weight_NK[row : row + height, col : col + width]


def _group_of(stored: Stored, parts: Parts, part: str, window: Window) -> NDArray[np.int32]:
    """The group of each channel of the widened window: g_idx, or the natural order without one."""
    if part in parts:
        return parts[part]
    assert stored.group_size is not None
    channels = stored.param.shape[1]
    return groups(channels, stored.group_size)[slice(*_eights(window.cols, channels))]


def _gptq(stored: Stored, parts: Parts, window: Window, dtype: str) -> NDArray:
    group_of_K = _group_of(stored, parts, "g_idx", window)
    minus_one = stored.zeros_minus_one
    weight = dequant_gptq(parts["qweight"], parts["qzeros"], parts["scales"], group_of_K, minus_one, dtype)
    return _trim(weight, window)


def _awq(stored: Stored, parts: Parts, window: Window, dtype: str) -> NDArray:
    group_of_K = _group_of(stored, parts, "g_idx", window)
    return _trim(dequant_awq(parts["qweight"], parts["qzeros"], parts["scales"], group_of_K, dtype), window)


def _packed(stored: Stored, parts: Parts, window: Window, dtype: str) -> NDArray:
    group_of_K = _group_of(stored, parts, "weight_g_idx", window)
    zeros = parts.get("weight_zero_point")
    return _trim(dequant_packed_int4(parts["weight_packed"], parts["weight_scale"], group_of_K, dtype, zeros), window)


FORMATS = {
    "bf16": Format(_plain_ranges, _plain),
    "f16": Format(_plain_ranges, _plain),
    "f32": Format(_plain_ranges, _plain),
    "fp8_block": Format(_block_ranges, _fp8_blocks(F8_E4M3_VALUES)),
    "fp8_block_fnuz": Format(_block_ranges, _fp8_blocks(F8_E4M3FNUZ_VALUES)),
    "int8_block": Format(_block_ranges, _int8_blocks),
    "int8_channel": Format(_channel_ranges, _int8_channels),
    "ascend_static": Format(_channel_ranges, _ascend_static),
    "gptq": Format(_int4_ranges, _gptq),
    "awq": Format(_int4_ranges, _awq),
    "ct_int4": Format(_int4_ranges, _packed),
}


def check_parts(stored: Stored, parts: Parts) -> None:
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
