"""``quantize``: a Hugging Face directory as INT8 or FP8, in one pass over what is stored.

`schemes` says what each format stores. A source that is FP8 is rounded to BF16 on the way, in memory. kv_b_proj (but
for FP8), embedding, head, router and norms stay as they are, and so does what --ignore names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from ...models.errors import InputError
from ...models.spec import nearest
from ..allowances import Allowances
from ..calibration import InputScale, read_calibration
from ..declarations import ASCEND_DESCRIPTION, ascend_description, compressed_tensors_config, fp8_config
from ..lowbit import QuantisedModule
from ..plan import Output, Plan, ShardPlan
from ..schemes import SCHEMES, Scheme
from ..storage import PLAIN, Stored
from .dequantize import bf16_output, read_bf16, unit_of
from .golden_stick import mindspore_files
from .huggingface import as_json, companions, index_files, new_shards, plain_config
from .options import Options
from .source import HuggingFaceSource, open_huggingface


def plan(directory: Path, options: Options) -> Plan:
    scheme = _scheme(options)
    allows = Allowances(options.allow)
    source = open_huggingface(directory, options, allows)
    chosen = _choose(source, scheme, options.ignore)
    _check_format(options, source, chosen)
    static = _calibration(options, chosen)
    files = mindspore_files if options.format == "w8a8-mindspore" else _huggingface_files
    shards, small_files = files(source, options, allows, scheme, chosen, static)
    allows.check_used()
    return Plan(
        kind="quantize",
        options=_chosen_options(options),
        source=source.files,
        meter=source.meter,
        shards=shards,
        small_files=small_files,
        tensors=source.checkpoint.tensors,
        dropped=source.dropped,
        close=source.checkpoint.close,
        notes=_notes(chosen),
    )


def _huggingface_files(
    source: HuggingFaceSource,
    options: Options,
    allows: Allowances,
    scheme: Scheme,
    chosen: Mapping[str, Stored],
    static: Mapping[str, InputScale],
) -> tuple[tuple[ShardPlan, ...], Mapping[str, bytes | Path]]:
    stem = "quant_model_weights" if options.format == "w8a8-ascend" else "model"
    outputs = {
        name: _quantised(source, stored, scheme, static) if name in chosen else [bf16_output(source, stored)]
        for name, stored in source.stored().items()
    }
    shards = new_shards((output for made in outputs.values() for output in made), options.shard_bytes, stem)
    declaration = _declaration(source, options.format, outputs, chosen, static)
    return shards, {**index_files(shards, stem), **declaration, **companions(source.checkpoint.directory)}


def _scheme(options: Options) -> Scheme:
    if options.format is None:
        raise InputError("no --format", "quantize", f"give one of {', '.join(SCHEMES)}")
    if options.format not in SCHEMES:
        raise InputError(f"unknown format {options.format!r}", "--format", nearest(options.format, SCHEMES))
    return SCHEMES[options.format]


def _chosen_options(options: Options) -> dict[str, object]:
    """What decides the result: the content of the calibration file, not its name."""
    if options.calibration is None:
        return options.chosen()
    return options.chosen() | {"calibration": hashlib.sha256(options.calibration.read_bytes()).hexdigest()}


def _choose(source: HuggingFaceSource, scheme: Scheme, ignore: Iterable[str]) -> dict[str, Stored]:
    """The parameters that are quantised. Raises InputError for an --ignore that names none of them."""
    ignore = tuple(ignore)
    stored = source.stored()
    by_default = [form.param for form in stored.values() if scheme.quantises(form.param)]
    modules = [param.name.removesuffix(".weight") for param in by_default]
    for pattern in ignore:
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise InputError(f"no quantised module is called {pattern!r}", "--ignore", nearest(pattern, modules[:500]))
    chosen = {param.name: stored[param.name] for param in by_default if scheme.quantises(param, ignore)}
    if not chosen:
        raise InputError("nothing is left to quantise", "--ignore", "name fewer modules")
    return chosen


def _check_format(options: Options, source: HuggingFaceSource, chosen: Mapping[str, Stored]) -> None:
    variants = {
        "--qkv-concat": options.qkv_concat,
        "--ffn-concat": options.ffn_concat,
        "--mtp-names": options.mtp_names,
    }
    given = [name for name, value in variants.items() if value]
    if given and options.format != "w8a8-mindspore":
        raise InputError(f"{options.format} has no such variant", given[0], "leave it out, or choose w8a8-mindspore")
    if options.shard_bytes is not None and options.format == "w8a8-mindspore":
        raise InputError("w8a8-mindspore has its own files", "--shard-size", "leave it out")
    if options.format == "fp8":
        if options.calibration is not None:
            raise InputError("fp8 has no static scales", "--calibration", "leave it out, or choose a w8a8 format")
        if done := [name for name, stored in chosen.items() if stored.format == "fp8_block"]:
            where = str(source.checkpoint.directory)
            raise InputError(f"{done[0]} is FP8 already", where, "use the directory as it is")


def _calibration(options: Options, chosen: Mapping[str, Stored]) -> dict[str, InputScale]:
    """Input scales by module; empty without a file."""
    if options.calibration is None:
        return {}
    return read_calibration(options.calibration, {name.removesuffix(".weight") for name in chosen})


def _quantised(
    source: HuggingFaceSource, stored: Stored, scheme: Scheme, static: Mapping[str, InputScale]
) -> list[Output]:
    name = stored.param.name
    prefix = name.removesuffix("weight")
    tensors = tuple(info.name for info in stored.tensors.values())
    unit, work = unit_of(stored)
    read, scale = partial(read_bf16, source, name), static.get(prefix.removesuffix("."))
    return QuantisedModule(prefix, stored.param.shape, tensors, read, scheme, scale, unit, work).outputs()


def _declaration(
    source: HuggingFaceSource,
    form: str | None,
    outputs: Mapping[str, list[Output]],
    chosen: Mapping[str, Stored],
    static: Mapping[str, InputScale],
) -> dict[str, bytes]:
    """config.json and what else tells readers how the weights are quantised."""
    config = source.checkpoint.config
    if form == "w8a8-ascend":
        types = {
            output.name: ("W8A8" if param.removesuffix(".weight") in static else "W8A8_DYNAMIC")
            if param in chosen
            else "FLOAT"
            for param, made in outputs.items()
            for output in made
        }
        description = as_json(ascend_description(types))
        return plain_config(config, source.has_mtp) | {ASCEND_DESCRIPTION: description}
    # Embeddings too, though they are no linear modules: compressed-tensors' reader of directories sees tensors only.
    plain = [
        name.removesuffix(".weight")
        for name, param in source.params.items()
        if name in outputs and name not in chosen and len(param.shape) == 2
    ]
    if form == "fp8":
        kept = [module for module in plain if source.params[f"{module}.weight"].quantised]
        declared = fp8_config(kept)
    else:
        declared = compressed_tensors_config(plain, static)
    return plain_config(config, source.has_mtp, declared)


def _notes(chosen: Mapping[str, Stored]) -> tuple[str, ...]:
    """Rounding errors add up where the source is quantised more coarsely than FP8."""
    again = [name for name, stored in chosen.items() if stored.format not in (*PLAIN.values(), "fp8_block")]
    return (f"{len(again)} weights are {chosen[again[0]].format} and are rounded a second time",) if again else ()
