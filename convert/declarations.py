"""What a checkpoint says of its own quantisation: config.json's quantization_config and Ascend's description file.

Sources: compressed-tensors' QuantizationConfig, Hugging Face's FP8 config, msModelSlim's quant_model_description.json.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..models.quant import BLOCK
from .calibration import InputScale

ASCEND_DESCRIPTION = "quant_model_description.json"
# Keys beside quantization_config that tools write into config.json to the same end.
QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantize", "mla_quantize", "mtp_quantize")


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model in BF16."""
    kept = {key: value for key, value in config.items() if key not in QUANTISATION_KEYS}
    dtypes = {key: "bfloat16" for key in ("torch_dtype", "dtype") if key in kept}
    return kept | (dtypes or {"torch_dtype": "bfloat16"})


def fp8_config(plain: Collection[str]) -> dict[str, Any]:
    """The published FP8 checkpoints' form; ``plain`` are linear modules that would be FP8 there and are not."""
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }
    return config | ({"modules_to_not_convert": sorted(plain)} if plain else {})


def compressed_tensors_config(plain: Collection[str], static: Mapping[str, InputScale]) -> dict[str, Any]:
    """int-quantized W8A8: ``plain`` modules have a matrix and are not quantised, ``static`` ones have input scales."""
    dynamic = _ct_args("token", symmetric=True, dynamic=True)
    groups = {"group_0": _ct_group(["Linear"], dynamic)}
    for symmetric in (True, False):
        if targets := [module for module, scale in static.items() if (scale.offset == 0) is symmetric]:
            groups[f"group_{len(groups)}"] = _ct_group(targets, _ct_args("tensor", symmetric=symmetric))
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(plain),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _ct_group(targets: list[str], activations: dict[str, Any]) -> dict[str, Any]:
    weights = _ct_args("channel", symmetric=True)
    return {"targets": targets, "weights": weights, "input_activations": activations, "output_activations": None}


def _ct_args(strategy: str, symmetric: bool, dynamic: bool = False) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": symmetric, "dynamic": dynamic}


def ascend_description(types: Mapping[str, str]) -> dict[str, Any]:
    """quant_model_description.json: the type of every tensor, W8A8_DYNAMIC, W8A8 or FLOAT."""
    whole = "W8A8" if "W8A8" in types.values() else "W8A8_DYNAMIC"
    return {"model_quant_type": whole, "version": "1.0.0", "group_size": 0, **types}
