"""``train-to-infer``: MindSpore's training layouts, grouped or not, to its inference layout.

The router's bias goes under the name that the inference network reads, and every tensor gets the inference layout's
dtype: norms and the router are F32 in training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...models.errors import InputError
from ...models.layouts.mindspore import GENERAL_FILE, InferOptions, inference_targets
from ..allowances import Allowances
from ..plan import Plan
from .huggingface import companions
from .mindspore import mindspore_outputs, mindspore_shards, name_map, open_mindspore
from .mindspore_to_hf import kept_params
from .options import Options


def plan(directory: Path, options: Options) -> Plan:
    allows = Allowances(options.allow)
    source = open_mindspore(directory, options, allows)
    allows.check_used()
    if source.layout == "mindspore_infer":
        source.checkpoint.close()
        raise InputError("is in the inference layout already", str(directory), "use it as it is")
    params, dropped = kept_params(source, options)
    has_mtp = source.has_mtp and not options.drop_mtp
    variant = InferOptions(options.qkv_concat, options.ffn_concat, options.mtp_names)
    targets = [
        replace(target, file=_file(target.file)) for target in inference_targets(source.model.spec, has_mtp, variant)
    ]
    shards = mindspore_shards(mindspore_outputs(targets, source.weights, params, source.weights.sources))
    return Plan(
        kind="train-to-infer",
        options={**options.chosen(), **source.model.named},
        source=source.files,
        meter=source.meter,
        shards=shards,
        small_files={
            **name_map(shards, indent=4),
            **source.model.config_file(has_mtp),
            **companions(directory),
        },
        tensors=source.checkpoint.tensors,
        dropped={**source.checkpoint.dropped, **dropped},
        close=source.checkpoint.close,
    )


def _file(name: str) -> str:
    """The original's file names: general.safetensors, and one layer_L.safetensors for all of a layer."""
    if name == GENERAL_FILE:
        return "general.safetensors"
    layer = name.removeprefix("model_layer_").removesuffix(".safetensors").partition("_")[0]
    return f"layer_{layer}.safetensors"
