"""The conversions, by the names that ``deepspan convert`` knows them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..plan import Plan
from . import (
    demo_to_hf,
    dequantize,
    fp8_to_bf16,
    hf_to_demo,
    hf_to_mindspore,
    mindspore_to_hf,
    quantize,
    train_to_infer,
)
from .options import COMMON, Options


@dataclass(frozen=True)
class Kind:
    """``plan`` makes the plan of a source directory; ``options`` names the fields of `Options` that it understands."""

    summary: str
    plan: Callable[[Path, Options], Plan]
    options: tuple[str, ...] = COMMON


KINDS = {
    "fp8-to-bf16": Kind(
        "a Hugging Face directory of FP8 weights to BF16, one rounding", fp8_to_bf16.plan, (*COMMON, "shard_bytes")
    ),
    "hf-to-mindspore": Kind(
        "a Hugging Face directory, FP8 or plain, to a MindSpore layout",
        hf_to_mindspore.plan,
        (*COMMON, "layout", "qkv_concat", "ffn_concat", "mtp_names", "dtype"),
    ),
    "mindspore-to-hf": Kind(
        "any MindSpore layout to a Hugging Face directory", mindspore_to_hf.plan, (*COMMON, "shard_bytes", "config")
    ),
    "train-to-infer": Kind(
        "a MindSpore training layout to the inference layout",
        train_to_infer.plan,
        (*COMMON, "qkv_concat", "ffn_concat", "mtp_names", "config"),
    ),
    "hf-to-demo": Kind(
        "a Hugging Face directory to the rank files of DeepSeek's demo", hf_to_demo.plan, (*COMMON, "ranks", "dtype")
    ),
    "demo-to-hf": Kind(
        "the rank files of DeepSeek's demo to a Hugging Face directory",
        demo_to_hf.plan,
        (*COMMON, "shard_bytes", "config"),
    ),
    "quantize": Kind(
        "a Hugging Face directory to INT8 (W8A8 for compressed-tensors, Ascend or MindSpore) or FP8",
        quantize.plan,
        (*COMMON, "shard_bytes", "format", "ignore", "calibration", "qkv_concat", "ffn_concat", "mtp_names"),
    ),
    "dequantize": Kind("any quantised Hugging Face directory to BF16", dequantize.plan, (*COMMON, "shard_bytes")),
}
