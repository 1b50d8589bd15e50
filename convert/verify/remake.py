"""How each kind of conversion makes rows of its result: one obvious function of the source for each kind of layout.

``info`` is a tensor of the result, ``rows`` are rows of it seen as a matrix (`slow_layouts.unfolded`), inside one
matrix of a stack. What comes back is an array of carriers, or None for what the source alone does not decide.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from ...models.dtypes import Float32, f32_to_bf16
from ...models.layouts.deepseek_demo import demo_tensor, rank_file
from ...models.layouts.placement import TargetTensor
from ...models.spec import ModelSpec
from ..formats import Range
from ..golden_stick import CODES
from ..kinds.source import HuggingFaceSource
from ..safetensors import Header, Reader, TensorInfo
from . import slow_formats
from .slow_layouts import Canonical, target_rows, unfolded
from .slow_quantise import HUGGINGFACE_FORMATS, golden_stick

_SCALE = "_layer.matmul.weight_scale"


def narrowed(values: Float32, dtype: str) -> NDArray:
    """FP32 values as a plain dtype, rounded once."""
    if dtype == "BF16":
        return f32_to_bf16(values)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def canonical_rows(source: Canonical, info: TensorInfo, rows: Range) -> NDArray:
    """Of a Hugging Face directory of plain weights."""
    width = prod(source.params[info.name].shape[1:])
    return narrowed(source.window(info.name, rows, (0, width)), info.dtype)


def layout_rows(source: Canonical, targets: Mapping[str, TargetTensor], info: TensorInfo, rows: Range) -> NDArray:
    """Of a MindSpore layout of plain weights."""
    return narrowed(target_rows(targets[info.name], source, rows), info.dtype)


def quantised_rows(source: Canonical, form: str, info: TensorInfo, rows: Range) -> NDArray | None:
    """Of a Hugging Face directory that `quantize` wrote as ``form``."""
    if info.dtype in ("BF16", "F16", "F32") and info.name in source.params:
        return canonical_rows(source, info, rows)
    module, _, part = info.name.rpartition(".")
    name = f"{module}.weight"
    make, together = HUGGINGFACE_FORMATS[form]
    height, width = source.params[name].shape
    per_row = together if part == "weight_scale_inv" else 1  # rows of the weight that a stored row is made of
    first = rows[0] * per_row // together * together
    last = min(height, -(-rows[1] * per_row // together) * together)
    made = make(source.window(name, (first, last), (0, width))).get(part)
    if made is None:
        return None  # a scale of activations
    start = rows[0] - first // per_row
    return made[start : start + rows[1] - rows[0]]


def golden_stick_rows(
    source: Canonical, targets: Mapping[str, TargetTensor], names: Collection[str], info: TensorInfo, rows: Range
) -> NDArray | None:
    """Of the quantised form of MindSpore's inference layout; ``names`` are all of the result."""
    if info.name in targets:
        return layout_rows(source, targets, info, rows)
    prefix = next((info.name.removesuffix(part) for part in (CODES, _SCALE) if info.name.endswith(part)), None)
    if prefix is None:
        return None  # of static activations
    target, is_static = targets[f"{prefix}weight"], f"{prefix}quant_op.input_scale" in names
    is_codes = info.name.endswith(CODES)
    part = CODES if is_codes else _SCALE
    if len(target.shape) == 2:
        return _as_column(golden_stick(target_rows(target, source, rows), is_static)[part])
    # An expert is quantised by its outputs, which are columns in the stack.
    height = target.shape[1]
    expert = rows[0] // height if is_codes else rows[0]
    whole = target_rows(target, source, (expert * height, (expert + 1) * height))
    made = golden_stick(np.ascontiguousarray(whole.T), is_static)[part]
    return made.T[rows[0] - expert * height : rows[1] - expert * height] if is_codes else made[None]


def _as_column(array: NDArray) -> NDArray:
    return array[:, None] if array.ndim == 1 else array


def rank_rows(
    source: HuggingFaceSource, stored: Mapping[str, tuple[str, str, str]], ranks: int, info: TensorInfo, rows: Range
) -> NDArray:
    """Of a rank file of DeepSeek's demo; ``stored`` are `rank_sources`."""
    param, canonical, tensor = stored[info.name]
    place = demo_tensor(source.spec, canonical, ranks)
    rank = [rank_file(i, ranks) for i in range(ranks)].index(info.path.name)
    whole = source.checkpoint.tensors[tensor]
    matrix = unfolded(info).shape
    top = rank * matrix[0] if place.dimension == 0 else 0
    left = rank * matrix[1] if place.dimension == 1 else 0
    in_rows, in_cols = (top + rows[0], top + rows[1]), (left, left + matrix[1])
    if info.dtype != whole.dtype:
        form = source.weights.stored(param)
        return narrowed(slow_formats.window(source.checkpoint, form, in_rows, in_cols), info.dtype)
    return _as_column(source.checkpoint.read(tensor, in_rows, in_cols if len(whole.shape) == 2 else None))


def rank_sources(source: HuggingFaceSource, ranks: int) -> dict[str, tuple[str, str, str]]:
    """Name in the rank files -> parameter, canonical name of its weight or multipliers, tensor of the source."""
    found = {}
    for name, form in source.stored().items():
        for part, info in form.tensors.items():
            canonical = name if part == "weight" else f"{name}_scale_inv"
            found[demo_tensor(source.spec, canonical, ranks).name] = name, canonical, info.name
    return found


def merged_rows(headers: Sequence[Header], reader: Reader, spec: ModelSpec, info: TensorInfo, rows: Range) -> NDArray:
    """Of a Hugging Face directory merged from rank files; ``headers`` are in the order of the ranks."""
    place = demo_tensor(spec, info.name, len(headers))
    if place.only_rank is not None:
        headers = headers[place.only_rank : place.only_rank + 1]
    parts = [unfolded(header.tensors[place.name]) for header in headers]
    if place.dimension is None:
        return reader.read_window(parts[0], rows)
    if place.dimension == 1:
        return np.concatenate([reader.read_window(part, rows) for part in parts], axis=1)
    taken = []
    for row in range(*rows):
        rank, inside = divmod(row, parts[0].shape[0])
        taken.append(reader.read_window(parts[rank], (inside, inside + 1)))
    return np.concatenate(taken)
