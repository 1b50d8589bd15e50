"""The W8A8 form of MindSpore's inference layout, under the parameter names of its golden-stick tool.

The layout's tensors are made as BF16 and quantised as they lie in it, so that scales and biases follow the rows of the
rope order; experts, which are swapped to [in, out], keep one scale for each output as the others do.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...models.errors import InputError
from ...models.layouts.mindspore import InferOptions, inference_targets
from ...models.layouts.placement import TargetTensor
from ..allowances import Allowances
from ..calibration import InputScale
from ..lowbit import QuantisedModule, stacked
from ..plan import Output, ShardPlan
from ..schemes import Scheme
from .huggingface import companions, plain_config
from .mindspore import mindspore_outputs, mindspore_shards, name_map
from .options import Options
from .source import HuggingFaceSource, check_rounding

Small = Mapping[str, bytes | Path]


def mindspore_files(
    source: HuggingFaceSource,
    options: Options,
    allows: Allowances,
    scheme: Scheme,
    chosen: Mapping[str, object],
    static: Mapping[str, InputScale],
) -> tuple[tuple[ShardPlan, ...], Small]:
    """Shards and small files; ``chosen`` are the canonical parameters that are quantised, ``static`` their modules."""
    variant = InferOptions(options.qkv_concat, options.ffn_concat, options.mtp_names)
    targets = {target.name: target for target in inference_targets(source.spec, source.has_mtp, variant)}
    _check_plain(source, targets, chosen, allows)
    files = mindspore_outputs(
        targets.values(),
        source.weights,
        source.params,
        lambda name: [info.name for info in source.weights.stored(name).tensors.values()],
    )
    shards = mindspore_shards(
        {
            file: [
                made
                for output in outputs
                for made in _quantised(source, targets[output.name], output, scheme, chosen, static)
            ]
            for file, outputs in files.items()
        }
    )
    directory = source.checkpoint.directory
    config = plain_config(source.checkpoint.config, source.has_mtp)
    return shards, {**name_map(shards, indent=4), **config, **companions(directory)}


def _check_plain(
    source: HuggingFaceSource, targets: Mapping[str, TargetTensor], chosen: Mapping[str, object], allows: Allowances
) -> None:
    placed = {p.source for target in targets.values() if target.dtype == "BF16" for p in target.placements}
    stored = source.stored()
    plain = {name: found.tensors["weight"] for name, found in stored.items() if "weight" in found.tensors}
    check_rounding(plain, sorted(placed & plain.keys() - chosen.keys()), allows)


def _quantised(
    source: HuggingFaceSource,
    target: TargetTensor,
    output: Output,
    scheme: Scheme,
    chosen: Mapping[str, object],
    static: Mapping[str, InputScale],
) -> list[Output]:
    """The target's tensors: quantised when its sources are, which are all or none of what it holds."""
    sources = {placement.source for placement in target.placements}
    inside = sources & chosen.keys()
    if not inside:
        return [output]
    if inside != sources:
        what = f"{target.name} holds {min(sources - inside)}, which is ignored, and {min(inside)}, which is not"
        raise InputError(what, "--ignore", "ignore all of them or none")
    scale = _static(target, sources, static)
    prefix = target.name.removesuffix("weight")
    if len(target.shape) == 3:
        read, work = partial(_experts, source, target), prod(target.shape[1:])
        return QuantisedModule(prefix, target.shape, output.sources, read, scheme, scale, work_bytes=work).outputs()
    return QuantisedModule(
        prefix, target.shape, output.sources, output.make, scheme, scale, output.unit, output.work_bytes
    ).outputs()


def _experts(source: HuggingFaceSource, target: TargetTensor, start: int, stop: int) -> NDArray:
    """Matrices of a stack before they are swapped: [experts, out, in], fused ones one under the other."""
    by_expert: dict[int, dict[int, str]] = {index: {} for index in range(start, stop)}
    for placement in target.placements:
        assert placement.transpose and placement.index is not None and placement.rows is None, target.name
        if placement.index in by_expert:
            by_expert[placement.index][placement.offset[1]] = placement.source
    read = [[source.weights.read(name, "bf16") for _, name in sorted(parts.items())] for parts in by_expert.values()]
    return stacked([parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in read])


def _static(target: TargetTensor, sources: set[str], static: Mapping[str, InputScale]) -> InputScale | None:
    modules = {name.removesuffix(".weight") for name in sources}
    if not modules & static.keys():
        return None
    if len(modules) > 1:
        what = f"{target.name} holds {len(modules)} modules, and {min(modules & static.keys())} has an input scale"
        raise InputError(what, "--calibration", "leave it out: modules that are stored as one stay dynamic")
    return static[modules.pop()]
