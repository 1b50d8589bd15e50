"""``hf-to-mindspore``: a Hugging Face directory, FP8 or plain, in one of MindSpore Transformers' layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...models.dtypes import bf16_to_f32
from ...models.errors import InputError
from ...models.layouts.mindspore import InferOptions, inference_targets, training_targets
from ...models.layouts.placement import TargetTensor
from ...models.spec import nearest
from ..allowances import Allowances
from ..formats import Range
from ..inventory import main_table
from ..plan import Plan
from ..storage import PLAIN
from .huggingface import companions, plain_config
from .mindspore import mindspore_outputs, mindspore_shards, name_map
from .options import Options
from .source import HuggingFaceSource, check_rounding, open_huggingface

LAYOUTS = ("infer", "train", "train-grouped")
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_INDENT = {"infer": 4, "train": 2, "train-grouped": 2}  # of the name map, as the original writes it
_ROWS = 1024  # compared at a time


def plan(directory: Path, options: Options) -> Plan:
    layout = options.layout or "infer"
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}", "--layout", nearest(layout, LAYOUTS))
    if layout != "infer" and (options.qkv_concat or options.ffn_concat or options.mtp_names):
        raise InputError("only the inference layout has variants", f"--layout {layout}", "leave them out")
    allows = Allowances(options.allow)
    source = open_huggingface(directory, options, allows)
    targets = _targets(source, layout, options)
    stored = source.stored()
    placed = {placement.source for target in targets for placement in target.placements}
    left_out = {name: found for name, found in stored.items() if name not in placed}
    narrowed = [p.source for target in targets if target.dtype == "BF16" for p in target.placements]
    plain = {name: found.tensors["weight"] for name, found in stored.items() if "weight" in found.tensors}
    check_rounding(plain, narrowed, allows)
    allows.check_used()
    files = mindspore_outputs(
        targets,
        _ThroughBf16(source),
        source.params,
        lambda name: [info.name for info in source.weights.stored(name).tensors.values()],
    )
    shards = mindspore_shards(files)
    copies = {info.name: "mtp-copy" for found in left_out.values() for info in found.tensors.values()}
    return Plan(
        kind="hf-to-mindspore",
        options=options.chosen() | {"layout": layout},
        source=source.files,
        meter=source.meter,
        shards=shards,
        small_files={
            **name_map(shards, _INDENT[layout]),
            **plain_config(source.checkpoint.config, source.has_mtp),
            **companions(directory),
        },
        tensors=source.checkpoint.tensors,
        dropped={**source.dropped, **copies},
        checks=tuple(_check_copy(source, name) for name in left_out),
        close=source.checkpoint.close,
    )


class _ThroughBf16:
    """The source's weights, low-bit ones rounded to BF16 whatever follows, as a cast before the conversion would."""

    def __init__(self, source: HuggingFaceSource):
        self._weights = source.weights

    def read(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray:
        if dtype == "bf16" or self._weights.format(name) in PLAIN.values():
            return self._weights.read(name, dtype, rows, cols)
        return bf16_to_f32(self._weights.read(name, "bf16", rows, cols))

    def read_transposed(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray:
        if dtype == "bf16" or self._weights.format(name) in PLAIN.values():
            return self._weights.read_transposed(name, dtype, rows, cols)
        return bf16_to_f32(self._weights.read_transposed(name, "bf16", rows, cols))


def _targets(source: HuggingFaceSource, layout: str, options: Options) -> list[TargetTensor]:
    if layout == "infer":
        variant = InferOptions(options.qkv_concat, options.ffn_concat, options.mtp_names)
        targets = inference_targets(source.spec, source.has_mtp, variant)
    else:
        targets = training_targets(source.spec, source.has_mtp, grouped=layout == "train-grouped")
    dtype = options.dtype or "bf16"
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}", "--dtype", nearest(dtype, DTYPES))
    return [replace(target, dtype=DTYPES[dtype]) if target.dtype == "BF16" else target for target in targets]


def _check_copy(source: HuggingFaceSource, name: str) -> Callable[[], None]:
    """The training layouts leave an MTP layer's tables out; that loses nothing only where they equal the main ones."""
    main = main_table(source.params[name], source.spec)
    assert main is not None, f"the layout has no place for {name}"
    return partial(_compare_tables, source, name, main)


def _compare_tables(source: HuggingFaceSource, name: str, main: str) -> None:
    rows = source.params[name].shape[0]
    for start in range(0, rows, _ROWS):
        window = start, min(start + _ROWS, rows)
        copy, table = (source.weights.read(each, "f32", window) for each in (name, main))
        if not np.array_equal(copy, table, equal_nan=True):
            what = f"{name} differs from {main}, which the training layout stores in its place"
            raise InputError(what, str(source.checkpoint.directory), "convert to the inference layout, or --drop-mtp")
