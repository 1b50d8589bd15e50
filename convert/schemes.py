"""What `quantize` stores of a linear module in each format: its tensors, by the last part of their names, and how to
make them.

Everything starts from BF16 weights: an FP8 source is rounded to BF16 first, so that the codes equal those of tools that
start from a BF16 checkpoint. Sources of the layouts: compressed-tensors (int-quantized), msModelSlim's description
files (W8A8, W8A8_DYNAMIC), golden-stick's parameter names, DeepSeek-V3's FP8 release.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from ..models.dtypes import Bits16, bf16_to_f32, f32_to_bf16
from ..models.params import Param
from ..models.quant import BLOCK, block_grid
from ..models.quantise import static_int8_companions
from .calibration import InputScale
from .fast_quantise import quantisers

Shape = tuple[int, ...]
Static = InputScale | None  # None: activations are scaled token by token as they come


@dataclass(frozen=True)
class Part:
    """One stored tensor of a module. A row of it belongs to ``per`` rows of the weight, or all of it to all (0)."""

    dtype: str
    shape: Shape
    per: int = 1


Parts = dict[str, Part]  # by the last part of the tensor's name; the codes come first


@dataclass(frozen=True)
class Scheme:
    """One format. ``parts`` plans from a weight's shape what ``make`` returns for it as BF16 patterns.

    ``make`` also takes a run of the weight's rows, from a multiple of 128 on, and returns these rows' share.
    """

    parts: Callable[[Shape, Static], Parts]
    make: Callable[[Bits16, Static], dict[str, NDArray]]
    is_int8: bool = True

    def quantises(self, param: Param, ignore: Collection[str] = ()) -> bool:
        """Whether a parameter becomes low-bit; ``ignore`` holds names or patterns (``*``) of modules that stay BF16.

        INT8 leaves kv_b_proj alone, which decoding multiplies into queries and outputs instead of running it as a
        layer, and the sparse indexer.
        """
        module = param.name.removesuffix(".weight")
        if not param.quantised or any(fnmatchcase(module, pattern) for pattern in ignore):
            return False
        return not (self.is_int8 and (module.endswith(".kv_b_proj") or ".indexer." in module))


def _compressed_tensors_parts(shape: Shape, static: Static) -> Parts:
    parts = {"weight": Part("I8", shape), "weight_scale": Part("BF16", (shape[0], 1))}
    if static:
        parts["input_scale"] = Part("F32", (1,), per=0)
        if static.offset:
            parts["input_zero_point"] = Part("I8", (1,), per=0)
    return parts


def _compressed_tensors(weight_NK: Bits16, static: Static) -> dict[str, NDArray]:
    q_NK, scales_N1 = quantisers().quantise_int8_compressed_tensors(weight_NK)
    made: dict[str, NDArray] = {"weight": q_NK, "weight_scale": scales_N1}
    if static:
        made["input_scale"] = np.array([static.scale], np.float32)
        if static.offset:
            made["input_zero_point"] = np.array([static.offset], np.int8)
    return made


def _ascend_parts(shape: Shape, static: Static) -> Parts:
    column = shape[0], 1
    parts = {"weight": Part("I8", shape), "weight_scale": Part("F32", column), "weight_offset": Part("F32", column)}
    if static:
        parts |= {"deq_scale": Part("F32", shape[:1]), "quant_bias": Part("I32", shape[:1])}
        parts |= {"input_scale": Part("F32", (1,), per=0), "input_offset": Part("F32", (1,), per=0)}
    return parts


def _ascend(weight_NK: Bits16, static: Static) -> dict[str, NDArray]:
    q_NK, scales_N1 = quantisers().quantise_int8_channels(weight_NK)
    # Zero, as symmetric weights have no offset, and there, as loaders ask for it by name.
    made: dict[str, NDArray] = {"weight": q_NK, "weight_scale": scales_N1, "weight_offset": np.zeros_like(scales_N1)}
    if static:
        made["input_scale"] = np.array([static.scale], np.float32)
        made["input_offset"] = np.array([static.offset], np.float32)
        made["deq_scale"], made["quant_bias"] = static_int8_companions(q_NK, scales_N1, static.scale, static.offset)
    return made


def _golden_stick_parts(shape: Shape, static: Static) -> Parts:
    rows, channels = shape
    parts = {"_layer.weight": Part("I8", shape)}
    if not static:
        return parts | {"_layer.matmul.weight_scale": Part("BF16", (rows,))}
    parts |= {"_layer.matmul.quant_bias": Part("I32", (rows,)), "_layer.matmul.dequant_scale": Part("F32", (rows,))}
    parts |= {"quant_op.input_scale": Part("BF16", (1,), per=0), "quant_op.input_zp": Part("I8", (1,), per=0)}
    return parts | {"quant_op.beta": Part("BF16", (channels,), per=0)}


def _golden_stick(weight_NK: Bits16, static: Static) -> dict[str, NDArray]:
    q_NK, scales_N1 = quantisers().quantise_int8_channels(weight_NK, bf16_scales=static is None)
    made: dict[str, NDArray] = {"_layer.weight": q_NK}
    if not static:
        return made | {"_layer.matmul.weight_scale": f32_to_bf16(scales_N1[:, 0])}
    input_scale = f32_to_bf16(np.array([static.scale], np.float32))
    stored_scale = float(bf16_to_f32(input_scale)[0])
    deq_scale, quant_bias = static_int8_companions(q_NK, scales_N1, stored_scale, static.offset)
    made |= {"_layer.matmul.quant_bias": quant_bias, "_layer.matmul.dequant_scale": deq_scale}
    made |= {"quant_op.input_scale": input_scale, "quant_op.input_zp": np.array([static.offset], np.int8)}
    return made | {"quant_op.beta": np.zeros(weight_NK.shape[1], np.uint16)}  # no outlier shift was taken out


def _fp8_parts(shape: Shape, static: Static) -> Parts:
    return {"weight": Part("F8_E4M3", shape), "weight_scale_inv": Part("F32", block_grid(shape), per=BLOCK[0])}


def _fp8(weight_NK: Bits16, static: Static) -> dict[str, NDArray]:
    codes_NK, scales_RC = quantisers().quantise_fp8_blocks(weight_NK)
    return {"weight": codes_NK, "weight_scale_inv": scales_RC}


SCHEMES = {
    "w8a8-ct": Scheme(_compressed_tensors_parts, _compressed_tensors),
    "w8a8-ascend": Scheme(_ascend_parts, _ascend),
    "w8a8-mindspore": Scheme(_golden_stick_parts, _golden_stick),
    "fp8": Scheme(_fp8_parts, _fp8, is_int8=False),
}
