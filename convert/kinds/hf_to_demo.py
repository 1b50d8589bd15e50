"""``hf-to-demo``: a Hugging Face directory as ``model{i}-mp{n}.safetensors`` of DeepSeek's own demo, one file a rank.

Stored tensors are cut as they are. FP8 weights can be cut only where their blocks end; where N ranks cut elsewhere, all
weights are written as BF16, and a note says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from numpy.typing import NDArray

from ...models.errors import InputError
from ...models.layouts.deepseek_demo import DemoTensor, demo_tensor, rank_file
from ...models.spec import nearest
from ..allowances import Allowances
from ..plan import Output, Plan, plan_shard
from ..storage import PLAIN, Stored
from .huggingface import METADATA, companions, plain_config
from .options import Options
from .source import HuggingFaceSource, open_huggingface

DTYPES = ("auto", "fp8", "bf16")


@dataclass(frozen=True)
class _Cut:
    """A tensor to be cut: its demo name and dimension, its dtype and shape, and what reads windows of it."""

    place: DemoTensor
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    read: partial[NDArray]  # of (rows, cols)


def plan(directory: Path, options: Options) -> Plan:
    allows = Allowances(options.allow)
    source = open_huggingface(directory, options, allows)
    allows.check_used()
    ranks = _ranks(source, options)
    decode, notes = _decode(source, options.dtype or "auto", ranks)
    cuts = [cut for stored in source.stored().values() for cut in _cuts(source, stored, ranks, decode)]
    for cut in cuts:
        _check_divisible(cut, ranks)
    shards = tuple(
        plan_shard(rank_file(rank, ranks), (output for cut in cuts for output in _share(cut, rank, ranks)), METADATA)
        for rank in range(ranks)
    )
    config = source.checkpoint.config
    declared = None if decode else config.get("quantization_config")
    return Plan(
        kind="hf-to-demo",
        options=options.chosen(),
        source=source.files,
        meter=source.meter,
        shards=shards,
        small_files={**plain_config(config, source.has_mtp, declared), **companions(directory)},
        tensors=source.checkpoint.tensors,
        dropped=source.dropped,
        notes=notes,
        close=source.checkpoint.close,
    )


def _ranks(source: HuggingFaceSource, options: Options) -> int:
    experts = source.spec.n_routed_experts
    if options.ranks is None:
        raise InputError("the number of tensor-parallel ranks is missing", "--mp", "give --mp N")
    if options.ranks < 1 or experts % options.ranks:
        raise InputError(
            f"{options.ranks} ranks cannot share {experts} experts", "--mp", f"give a divisor of {experts}"
        )
    return options.ranks


def _decode(source: HuggingFaceSource, dtype: str, ranks: int) -> tuple[bool, tuple[str, ...]]:
    """Whether FP8 weights are written as BF16, and the note for the user when that was not asked for."""
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}", "--dtype", nearest(dtype, DTYPES))
    blocks = {name: found for name, found in source.stored().items() if found.format == "fp8_block"}
    if dtype == "bf16" or not blocks:
        return dtype == "bf16", ()
    split = next((name for name, found in blocks.items() if _splits_blocks(source, found, ranks)), None)
    if split is None:
        return False, ()
    what = f"{ranks} ranks cut through the scale blocks of {split}"
    if dtype == "fp8":
        raise InputError(what, "--mp", "give --dtype bf16, or fewer ranks")
    return True, (f"{what}: weights are written as BF16",)


def _splits_blocks(source: HuggingFaceSource, stored: Stored, ranks: int) -> bool:
    dimension = demo_tensor(source.spec, stored.param.name, ranks).dimension
    if dimension is None or ranks == 1:
        return False
    assert stored.block is not None
    return bool(stored.param.shape[dimension] % (ranks * stored.block[dimension]))


def _cuts(source: HuggingFaceSource, stored: Stored, ranks: int, decode: bool) -> Iterator[_Cut]:
    name = stored.param.name
    if stored.format not in ("fp8_block", *PLAIN.values()):
        where = str(source.checkpoint.directory)
        raise InputError(f"{name} is stored as {stored.format}", where, "convert it with dequantize first")
    if stored.format == "fp8_block" and decode:
        sources = tuple(info.name for info in stored.tensors.values())
        place = demo_tensor(source.spec, name, ranks)
        yield _Cut(place, "BF16", stored.param.shape, sources, partial(source.weights.read, name, "bf16"))
        return
    for part, info in stored.tensors.items():
        canonical = name if part == "weight" else f"{name}_scale_inv"
        place = demo_tensor(source.spec, canonical, ranks)
        yield _Cut(place, info.dtype, info.shape, (info.name,), partial(source.checkpoint.read, info.name))


def _check_divisible(cut: _Cut, ranks: int) -> None:
    dimension = cut.place.dimension
    if dimension is not None and cut.shape[dimension] % ranks:
        what = f"{ranks} ranks cannot share dimension {dimension} of {cut.sources[0]}, which is {cut.shape[dimension]}"
        raise InputError(what, "--mp", "give a divisor of it")


def _share(cut: _Cut, rank: int, ranks: int) -> Iterator[Output]:
    """The rank's part of a tensor, if it has one."""
    if cut.place.only_rank not in (None, rank):
        return
    shape = list(cut.shape)
    origin = [0] * len(shape)
    if (dimension := cut.place.dimension) is not None:
        shape[dimension] //= ranks
        origin[dimension] = rank * shape[dimension]
    columns = (origin[1], origin[1] + shape[1]) if cut.place.dimension == 1 else None
    make = partial(_window, cut.read, origin[0], columns)
    # A narrow range of columns is read as whole rows.
    yield Output(
        cut.place.name, cut.dtype, tuple(shape), cut.sources, make, shape[0], work_bytes=cut.shape[-1] if columns else 0
    )


def _window(read: partial[NDArray], first_row: int, columns: tuple[int, int] | None, start: int, stop: int) -> NDArray:
    return read((first_row + start, first_row + stop), columns)
