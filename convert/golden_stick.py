"""Reading the W8A8 form of MindSpore's inference layout: weights under golden-stick's names as plain BF16 weights.

A quantised ``X.weight`` is stored as codes ``X._layer.weight`` and scales: ``X._layer.matmul.weight_scale`` where
activations are dynamic; its product with ``X.quant_op.input_scale``, ``X._layer.matmul.dequant_scale``, where they are
static. Matrices are [out, in], stacks of experts [experts, in, out]; scales belong to the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ..models.dtypes import FLOATS, Float32, f32_to_bf16, to_f32
from ..models.errors import InputError
from .meter import Meter, MeteredReader
from .safetensors import TensorInfo

CODES = "_layer.weight"
_SCALE, _PRODUCT, _INPUT = "_layer.matmul.weight_scale", "_layer.matmul.dequant_scale", "quant_op.input_scale"
_ZERO_POINT, _BETA = "quant_op.input_zp", "quant_op.beta"
_COMPANIONS = (_SCALE, _PRODUCT, _INPUT, "_layer.matmul.quant_bias", _ZERO_POINT, _BETA)


def plain_names(names: Iterable[str]) -> set[str]:
    """The names of the layout that is not quantised; others are returned as they are."""
    names = set(names)
    prefixes = {name.removesuffix(CODES) for name in names if name.endswith("." + CODES)}
    companions = {prefix + part for prefix in prefixes for part in (CODES, *_COMPANIONS)}
    return names - companions | {f"{prefix}weight" for prefix in prefixes}


@dataclass(frozen=True)
class _Module:
    codes: TensorInfo
    scale: TensorInfo
    input_scale: TensorInfo | None
    input_zp: TensorInfo | None
    beta: TensorInfo | None


class GoldenStickReader(MeteredReader):
    """A reader that gives quantised modules, found by `plain`, as the weights that they mean: BF16, by `exact` FP32."""

    def __init__(self, meter: Meter):
        super().__init__(meter)
        self._modules: dict[str, _Module] = {}

    def plain(self, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """The tensors of the layout that is not quantised; InputError for a module without its scales."""
        found = {name: tensors[name] for name in plain_names(tensors) if name in tensors}
        for name, codes in tensors.items():
            if name.endswith("." + CODES):
                prefix = name.removesuffix(CODES)
                weight = replace(codes, name=f"{prefix}weight", dtype="BF16")
                self._modules[weight.name] = _module(prefix, codes, tensors)
                found[weight.name] = weight
        return MappingProxyType({name: found[name] for name in sorted(found)})

    def exact(self, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """The result of `plain` with quantised modules as FP32: what they mean before it is rounded."""
        found = {name: replace(info, dtype="F32") if name in self._modules else info for name, info in tensors.items()}
        return MappingProxyType(found)

    def read_window(
        self, info: TensorInfo, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> NDArray:
        """As `Reader.read_window`; a quantised tensor is a matrix here, a stack with its matrices unfolded."""
        module = self._modules.get(info.name)
        if module is None:
            return super().read_window(info, rows, cols)
        (first, last), (left, right) = rows or (0, info.shape[0]), cols or (0, info.shape[1])
        codes = super().read_window(replace(info, dtype="I8"), (first, last), (left, right)).astype(np.float32)
        scales = self._scales(module)
        if scales.ndim == 1:
            codes *= scales[first:last, None]
        else:
            codes *= scales[np.arange(first, last) // module.codes.shape[1], left:right]
        return codes if info.dtype == "F32" else f32_to_bf16(codes)

    def is_quantised(self, name: str) -> bool:
        """Whether a weight that `plain` found is a quantised module's."""
        return name in self._modules

    def static_input(self, name: str) -> tuple[float, int] | None:
        """Scale and zero point of a weight's inputs where they are static, else None.

        InputError for inputs that are shifted by ``beta`` first (outlier suppression).
        """
        module = self._modules.get(name)
        if module is None or module.input_scale is None:
            return None
        if module.beta is not None and to_f32(self.read(module.beta), module.beta.dtype).any():
            what = f"{module.beta.name} is not zero: shifted activations (outlier suppression) are not supported"
            raise InputError(what, str(module.beta.path), "use the checkpoint with dtype: bf16, or a dynamic one")
        scale = to_f32(self.read(module.input_scale), module.input_scale.dtype)
        zero_point = 0 if module.input_zp is None else int(self.read(module.input_zp).reshape(-1)[0])
        return float(scale.reshape(-1)[0]), zero_point

    def _scales(self, module: _Module) -> Float32:
        scales = to_f32(self.read(module.scale), module.scale.dtype)
        if module.input_scale is None:
            return scales
        return scales / to_f32(self.read(module.input_scale), module.input_scale.dtype)


def _module(prefix: str, codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> _Module:
    scale = tensors.get(prefix + _SCALE)
    product, input_scale = tensors.get(prefix + _PRODUCT), tensors.get(prefix + _INPUT)
    todo = "get the complete checkpoint: the weights mean nothing without it"
    if scale is None and (product is None or input_scale is None):
        raise InputError(f"{codes.name} has no {prefix}{_SCALE}", str(codes.path), todo)
    found = scale or product
    assert found is not None
    outputs = (codes.shape[0], codes.shape[2]) if len(codes.shape) == 3 else codes.shape[:1]
    if found.shape != outputs or found.dtype not in FLOATS or codes.dtype != "I8":
        what = (
            f"{found.name} is {found.dtype} {list(found.shape)} for {codes.name} of {codes.dtype} {list(codes.shape)}"
        )
        raise InputError(what, str(codes.path), "get the checkpoint that belongs to this config.json")
    if scale:
        return _Module(codes, found, None, None, None)
    return _Module(codes, found, input_scale, tensors.get(prefix + _ZERO_POINT), tensors.get(prefix + _BETA))
