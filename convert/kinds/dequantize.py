"""``dequantize``: a Hugging Face directory in any quantised form that can be read, as one with BF16 weights.

FP8 and INT8 by blocks, INT8 by channels (compressed-tensors, Ascend W8A8 and W8A8_DYNAMIC), GPTQ, AWQ and
compressed-tensors' packed INT4. Each product is made in FP32 and rounded once; what was not quantised keeps its bytes.
"""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path

from numpy.typing import NDArray

from ..allowances import Allowances
from ..plan import Output, Plan
from ..storage import PLAIN, Stored
from .huggingface import companions, index_files, new_shards, plain_config
from .options import Options
from .source import HuggingFaceSource, open_huggingface

_ROWS = 128  # a unit of formats whose rows lie one after the other, where no block says otherwise


def plan(directory: Path, options: Options) -> Plan:
    allows = Allowances(options.allow)
    source = open_huggingface(directory, options, allows)
    allows.check_used()
    stored = source.stored()
    shards = new_shards((bf16_output(source, form) for form in stored.values()), options.shard_bytes)
    config = plain_config(source.checkpoint.config, source.has_mtp)
    is_plain = all(form.format in PLAIN.values() for form in stored.values())
    return Plan(
        kind="dequantize",
        options=options.chosen(),
        source=source.files,
        meter=source.meter,
        shards=shards,
        small_files={**index_files(shards), **config, **companions(directory)},
        tensors=source.checkpoint.tensors,
        dropped=source.dropped,
        close=source.checkpoint.close,
        notes=("no weight is quantised: every tensor is copied as it is",) if is_plain else (),
    )


def bf16_output(source: HuggingFaceSource, stored: Stored) -> Output:
    """The parameter dequantised to BF16, or with the bytes that it has when it is not quantised."""
    name, shape = stored.param.name, stored.param.shape
    tensors = tuple(info.name for info in stored.tensors.values())
    if stored.format in PLAIN.values():
        info = stored.tensors["weight"]
        return Output(name, info.dtype, shape, tensors, partial(_copied, source, info.name), shape[0])
    return Output(name, "BF16", shape, tensors, partial(read_bf16, source, name), shape[0], *unit_of(stored))


def unit_of(stored: Stored) -> tuple[int, int]:
    """Rows that are read together, and the bytes that this takes beside the rows as BF16.

    GPTQ and AWQ keep the input channels of a weight one after the other: a run of its rows is a little of everywhere.
    """
    rows, columns = stored.param.shape
    if stored.format in ("gptq", "awq"):
        return rows, sum(info.nbytes for info in stored.tensors.values())
    unit = min(rows, _ROWS if stored.block is None else stored.block[0])
    return unit, prod((unit, columns))


def read_bf16(source: HuggingFaceSource, name: str, start: int, stop: int) -> NDArray:
    return source.weights.read(name, "bf16", (start, stop))


def _copied(source: HuggingFaceSource, name: str, start: int, stop: int) -> NDArray:
    return source.checkpoint.read(name, (start, stop))
