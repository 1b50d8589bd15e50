"""How the linear weights of a run lie in its devices' memory: the format of each, its bytes, where it may be cut.

Runs in FP32, BF16 and FP8 hold all of them so. INT8 and INT4 runs hold each as it is stored, if the checkpoint has
weights in the run's format (others were left out of it for a reason), and otherwise all in that format.

INT4 lies on a device in blocks of 128 input channels and groups of 32, 64 or 128, each of which has a word in each row
for its scale and its zero point (`backends.torch_triton.kernels.weights`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from .errors import InputError
from .params import Param, parameters
from .quant import block_grid
from .sharding import Shard
from .spec import ModelSpec

_DTYPES = {
    "fp8_block": "fp8", "fp8_block_fnuz": "fp8", "int8_block": "w8a8", "int8_channel": "w8a8", "ascend_static": "w8a8",
    "gptq": "int4", "awq": "int4", "ct_int4": "int4",
}  # fmt: skip
GROUPS = (128, 64, 32)  # channels that share a word on a device
_BLOCK = 128  # channels that are stored whole
_WORD = 4  # bytes


class Held(NamedTuple):
    """How a weight is held: the dtype of a run that holds all weights so.

    ``group``: input channels that share a scale in stored INT4; None when it is quantised on load.
    """

    dtype: str
    group: int | None = None


def held_as(stored_format: str, group_size: int | None) -> Held:
    """How to hold a weight as it is stored; `convert.storage.Stored` explains the arguments."""
    return Held(_DTYPES.get(stored_format, "bf16"), group_size)


@dataclass(frozen=True)
class Holding:
    """How a run of ``dtype`` holds each linear weight; ``stored``: of a checkpoint's parameters, by name."""

    dtype: str
    stored: Mapping[str, Held] = field(default_factory=dict)

    def of(self, name: str) -> Held:
        return self.stored.get(name, Held(self.dtype)) if self._follows else Held(self.dtype)

    def keeps_codes(self, name: str) -> bool:
        """Whether a parameter's FP8 codes are held as they are stored. Random weights count as stored so."""
        return self.dtype == "fp8" and self.stored.get(name, Held("fp8")).dtype == "fp8"

    @cached_property
    def _follows(self) -> bool:
        return self.dtype in ("w8a8", "int4") and any(held.dtype == self.dtype for held in self.stored.values())


def stored_dtype(spec: ModelSpec, stored: Mapping[str, Held]) -> str:
    """The dtype in which most values of the linear weights are stored; of no checkpoint, as the model is published."""
    values: Counter[str] = Counter()
    for param in parameters(spec):
        if param.quantised and param.name in stored:
            values[stored[param.name].dtype] += param.size
    return values.most_common(1)[0][0] if values else "fp8" if spec.fp8 else "bf16"


def is_low_bit(param: Param) -> bool:
    """Whether it is held in a low-bit format alone: kv_b_proj, multiplied into queries and outputs, is plain, too."""
    return param.quantised and not _is_kv_b(param)


def _is_kv_b(param: Param) -> bool:
    return param.name.endswith("kv_b_proj.weight")


def shard_bytes(shard: Shard, holding: Holding) -> int:
    """Bytes of a rank's part of a parameter, scales and zero points included. Padding and act-order are not counted."""
    plain = 4 if holding.dtype == "fp32" or shard.param.dtype == "F32" else 2
    held = holding.of(shard.param.name) if is_low_bit(shard.param) else None
    if held is None or held.dtype in ("bf16", "fp32"):
        return plain * shard.size + codes_beside(shard, holding)
    rows, columns = shard.shape
    if held.dtype == "fp8":
        return _fp8_bytes(shard)
    if held.dtype == "w8a8":
        return shard.size + 4 * rows
    first = shard.cols[0] if shard.cols else 0
    group = GROUPS[0] if held.group is None else device_group(shard.param.name, held.group, first, columns)
    return rows * -(-columns // _BLOCK) * (_BLOCK // 2 + _BLOCK // group * _WORD)


def codes_beside(shard: Shard, holding: Holding) -> int:
    """Bytes of the FP8 codes of kv_b_proj, which few tokens are multiplied with instead of its plain values."""
    return _fp8_bytes(shard) if _is_kv_b(shard.param) and holding.keeps_codes(shard.param.name) else 0


def _fp8_bytes(shard: Shard) -> int:
    blocks = block_grid(shard.shape)
    return shard.size + 4 * blocks[0] * blocks[1]


def device_group(name: str, size: int, first: int, columns: int) -> int:
    """The largest group for ``columns`` channels from ``first`` on that no border of a stored group of ``size`` cuts.

    InputError when there is none.
    """
    group = _device_group(size, first, columns)
    if group is not None:
        return group
    if size % GROUPS[-1]:
        todo = f"use a checkpoint with groups of a multiple of {GROUPS[-1]}, or dtype bf16"
        raise InputError(f"groups of {size} columns", name, todo)
    raise InputError(
        f"parts of {columns} columns of {name} cut its groups of {size}",
        "parallel",
        f"choose degrees that cut at multiples of {GROUPS[-1]}, or dtype bf16",
    )


def _device_group(size: int, first: int, columns: int) -> int | None:
    if first // size == (first + columns - 1) // size:
        return GROUPS[0]
    return next((group for group in GROUPS if size % group == 0 and first % group == 0), None)


def check_groups(held: Iterable[Shard], holding: Holding) -> None:
    """Refuse degrees with which any rank's part of an INT4 weight has no `device_group`."""
    for shard in held:
        how = holding.of(shard.param.name) if is_low_bit(shard.param) else None
        if how is not None and how.dtype == "int4" and how.group is not None:
            columns = shard.shape[1]
            if (first := _cut(how.group, columns, shard.param.shape[1])) is not None:
                device_group(shard.param.name, how.group, first, columns)


@lru_cache
def _cut(size: int, columns: int, of: int) -> int | None:
    """Where the first part of ``columns`` begins that cuts groups."""
    return next((first for first in range(0, of, columns) if _device_group(size, first, columns) is None), None)
