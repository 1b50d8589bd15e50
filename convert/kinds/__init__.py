"""The conversions, by the names that ``deepspan convert`` knows them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..plan import Plan
from . import fp8_to_bf16
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
}
