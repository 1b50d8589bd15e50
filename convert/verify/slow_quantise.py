"""What `quantize` stores for rows of a weight, spelled out; see `slow_formats` for why it is written a second time.

Weights are BF16 values as FP32, [n, K] for rows n of [out, in]; results are carriers by the ends of their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ...models.dtypes import Float32, bf16_to_f32, f32_to_bf16, f32_to_f8_e4m3
from ...models.quant import BLOCK

_SMALLEST = np.float32(2.0**-126)


def _amax(weight_nK: Float32) -> Float32:
    return np.abs(weight_nK).max(axis=1, keepdims=True)


def _scale(amax: Float32, limit: float) -> Float32:
    return np.where(amax == 0, np.float32(1), np.maximum(amax / np.float32(limit), _SMALLEST))


def _codes(quotients: Float32, low: int) -> NDArray[np.int8]:
    return np.clip(np.rint(quotients), low, 127).astype(np.int8)


def _bf16(values: Float32) -> Float32:
    return bf16_to_f32(f32_to_bf16(values))


def _compressed_tensors(weight_nK: Float32) -> dict[str, NDArray]:
    scale = _bf16(_amax(weight_nK) / np.float32(127.5))
    scale = np.where(scale == 0, np.float32(2.0**-7), scale)
    return {"weight": _codes(_bf16(weight_nK / scale), -128), "weight_scale": f32_to_bf16(scale)}


def _ascend(weight_nK: Float32) -> dict[str, NDArray]:
    scale = _scale(_amax(weight_nK), 127)
    return {
        "weight": _codes(weight_nK / scale, -127),
        "weight_scale": scale,
        "weight_offset": np.zeros_like(scale),
    }


def _fp8(weight_nK: Float32) -> dict[str, NDArray]:
    """Rows from a multiple of 128 on."""
    codes = np.empty(weight_nK.shape, np.uint8)
    scales: list[list[np.float32]] = []
    for row in range(0, weight_nK.shape[0], BLOCK[0]):
        scales.append([])
        for column in range(0, weight_nK.shape[1], BLOCK[1]):
            block = np.s_[row : row + BLOCK[0], column : column + BLOCK[1]]
            scale = _scale(np.abs(weight_nK[block]).max(), 448)
            codes[block] = f32_to_f8_e4m3(weight_nK[block] / scale)
            scales[-1].append(np.float32(scale))
    return {"weight": codes, "weight_scale_inv": np.array(scales, np.float32)}


def golden_stick(weight_nK: Float32, is_static: bool) -> dict[str, NDArray]:
    """Scales [n]; where activations are static they are stored in a product only, and are not rounded."""
    scale = _scale(_amax(weight_nK), 127)
    if is_static:
        return {"_layer.weight": _codes(weight_nK / scale, -127)}
    scale = _bf16(scale)
    return {"_layer.weight": _codes(weight_nK / scale, -127), "_layer.matmul.weight_scale": f32_to_bf16(scale[:, 0])}


# Format of `quantize` -> what it stores of some rows, and how many rows belong together.
HUGGINGFACE_FORMATS: Mapping[str, tuple[Callable[[Float32], dict[str, NDArray]], int]] = {
    "w8a8-ct": (_compressed_tensors, 1),
    "w8a8-ascend": (_ascend, 1),
    "fp8": (_fp8, BLOCK[0]),
}
