"""Calibration scales: how the input of each statically quantised module maps to INT8, measured by some other tool.

A file is a JSON object or a safetensors file with, for each module (named as in the Hugging Face checkpoint), the
scalars ``MODULE.input_scale`` and, when the mapping is not symmetric, ``MODULE.input_offset``:
``x_q = clip(round(x / input_scale + input_offset), -128, 127)``. Modules that are not named stay dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..models.dtypes import FLOATS, to_f32
from ..models.errors import InputError
from .safetensors import Reader, TensorInfo
from .strict_json import read_object, shorten

_SCALE, _OFFSET = ".input_scale", ".input_offset"


@dataclass(frozen=True)
class InputScale:
    """``x_q = clip(round(x / scale + offset), -128, 127)``."""

    scale: float
    offset: int = 0


def read_calibration(path: Path, modules: Container[str]) -> dict[str, InputScale]:
    """The input scales by module. Raises InputError for names that are not in ``modules`` and impossible numbers."""
    values = dict(_tensors(path)) if path.suffix == ".safetensors" else read_object(path)
    named = {name.removesuffix(_SCALE).removesuffix(_OFFSET): name for name in values}
    for module, name in named.items():
        if not name.endswith((_SCALE, _OFFSET)):
            raise InputError(f"{shorten(name)} is no calibration value", str(path), "name it MODULE.input_scale")
        if module not in modules:
            raise InputError(f"{shorten(name)} belongs to no module that is quantised", str(path), "remove it")
    return {module: _input_scale(module, values, path) for module in named}


def _input_scale(module: str, values: Mapping[str, Any], path: Path) -> InputScale:
    scale, offset = values.get(module + _SCALE), values.get(module + _OFFSET, 0)
    if not (_is_number(scale) and scale > 0):
        raise InputError(f"{module}{_SCALE} is {scale!r}", str(path), "give a positive number")
    if not (_is_number(offset) and offset == round(offset) and -128 <= offset <= 127):
        raise InputError(f"{module}{_OFFSET} is {offset!r}", str(path), "give an integer of -128 to 127")
    return InputScale(float(scale), int(offset))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tensors(path: Path) -> Iterator[tuple[str, float]]:
    with Reader() as reader:
        for name, info in reader.header(path).tensors.items():
            yield name, _scalar(reader, info)


def _scalar(reader: Reader, info: TensorInfo) -> float:
    if info.shape not in ((), (1,)) or info.dtype not in (*FLOATS, "I8", "I32"):
        what = f"{info.name} is {info.dtype} {list(info.shape)}"
        raise InputError(what, str(info.path), "give a single number")
    value = reader.read(info).reshape(1)
    return float(to_f32(value, info.dtype)[0] if info.dtype in FLOATS else value[0])
