"""``fp8-to-bf16``: a Hugging Face directory with FP8 weights as one with BF16 weights.

Each FP8 weight is multiplied by its block's multiplier in FP32 and rounded once; every other tensor keeps its bytes.
Files keep their names and their tensors, unless a shard size is given.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from numpy.typing import NDArray

from ...models.errors import InputError
from ..allowances import Allowances
from ..plan import Output, Plan, ShardPlan, plan_shard
from ..storage import PLAIN, Stored
from .huggingface import METADATA, companions, index_files, new_shards, plain_config
from .options import Options
from .source import HuggingFaceSource, open_huggingface

_FP8 = ("fp8_block", "fp8_block_fnuz")


def plan(directory: Path, options: Options) -> Plan:
    allows = Allowances(options.allow)
    source = open_huggingface(directory, options, allows)
    allows.check_used()
    outputs = {name: _output(source, stored) for name, stored in source.stored().items()}
    shards = new_shards(outputs.values(), options.shard_bytes) if options.shard_bytes else _same_files(source, outputs)
    config = plain_config(source.checkpoint.config, source.has_mtp)
    has_fp8 = any(stored.format in _FP8 for stored in source.stored().values())
    return Plan(
        kind="fp8-to-bf16",
        options=options.chosen(),
        source=source.files,
        meter=source.meter,
        shards=shards,
        small_files={**index_files(shards), **config, **companions(directory)},
        tensors=source.checkpoint.tensors,
        dropped=source.dropped,
        notes=() if has_fp8 else ("no weight is FP8: every tensor is copied as it is",),
        close=source.checkpoint.close,
    )


def _output(source: HuggingFaceSource, stored: Stored) -> Output:
    weight, name = stored.tensors.get("weight"), stored.param.name
    if stored.format in _FP8:
        assert weight is not None and stored.block is not None
        make = partial(_dequantised, source, name)
        scale = stored.tensors["weight_scale_inv"].name
        unit = stored.block[0]
        return Output(
            name, "BF16", weight.shape, (weight.name, scale), make, weight.shape[0], unit, unit * weight.shape[1]
        )
    if stored.format not in PLAIN.values():
        where = str(source.checkpoint.directory)
        raise InputError(f"{name} is stored as {stored.format}, not FP8", where, "convert it with dequantize")
    assert weight is not None
    return Output(name, weight.dtype, weight.shape, (weight.name,), partial(_copied, source, name), weight.shape[0])


def _dequantised(source: HuggingFaceSource, name: str, start: int, stop: int) -> NDArray:
    return source.weights.read(name, "bf16", (start, stop))


def _copied(source: HuggingFaceSource, name: str, start: int, stop: int) -> NDArray:
    return source.checkpoint.read(name, (start, stop))


def _same_files(source: HuggingFaceSource, outputs: dict[str, Output]) -> tuple[ShardPlan, ...]:
    """The source's files, each with its own weights in the order of their data; one of scales alone is left out."""
    files = {
        file: [outputs[name] for name in header.tensors if name in outputs]
        for file, header in source.checkpoint.headers.items()
    }
    return tuple(plan_shard(file, content, METADATA) for file, content in files.items() if content)
