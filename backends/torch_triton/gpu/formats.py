"""Formats of linear weights: each reads matrices, joins them, and makes layers of them.

Shape letters: N rows (out), K columns (in).
"""

from __future__ import annotations

from typing import Protocol

import torch

from ....models.errors import InputError
from ....models.holding import Holding
from ..kernels.chips import chip_of
from ..kernels.experts import Stack
from ..kernels.weights import Fp8Weight, Int4Weight, Int8Weight, dequantise_weight
from .experts import Bf16Experts, Experts, KernelExperts
from .int4 import pad_int4
from .linear import Bf16Linear, Form, Fp8Linear, Int4Linear, KernelLinear, Linear
from .matrices import (
    Bf16Weight,
    M,
    Reorder,
    below,
    pad,
    pad_fp8,
    pad_int8,
    quantise_blocks,
    quantise_channels,
)
from .source import WHOLE, DeviceTensors, Window


class Format(Protocol[M]):
    """How linear weights are held. All of a layer's experts are held in the same one."""

    def read(self, source: DeviceTensors, name: str, window: Window = WHOLE) -> M:
        """This rank's part of a parameter, or a window of that."""

    def reordered(self, matrix: M, reorder: Reorder) -> M:
        """Rows moved."""

    def padded(self, matrix: M, rows: int, columns: int) -> M:
        """Zero below and to the right, up to a size of whole blocks of rows."""

    def joins(self, first: M, second: M) -> bool:
        """Whether two padded matrices with the same input can be one."""

    def joined(self, matrices: list[M]) -> M:
        """One below the other."""

    def linear(self, matrix: M) -> Linear: ...

    def experts(self, gate_up: M, down: M, shared: int, foreign: bool, part: float) -> Experts:
        """Of stacks of matrices, the last ``shared`` of which are the shared experts.

        ``foreign``: choices past the stacks are other ranks' and add nothing here; ``part`` of all routed experts are
        in the stacks.
        """


class Bf16Format:
    def read(self, source: DeviceTensors, name: str, window: Window = WHOLE) -> Bf16Weight:
        return Bf16Weight(source.plain(name, window=window))

    def reordered(self, matrix: Bf16Weight, reorder: Reorder) -> Bf16Weight:
        return Bf16Weight(reorder(matrix.codes))

    def padded(self, matrix: Bf16Weight, rows: int, columns: int) -> Bf16Weight:
        return Bf16Weight(pad(matrix.codes, rows, columns))

    def joins(self, first: Bf16Weight, second: Bf16Weight) -> bool:
        return True

    def joined(self, matrices: list[Bf16Weight]) -> Bf16Weight:
        return Bf16Weight(below([matrix.codes for matrix in matrices]))

    def linear(self, matrix: Bf16Weight) -> Linear:
        return Bf16Linear(matrix.codes)

    def experts(self, gate_up: Bf16Weight, down: Bf16Weight, shared: int, foreign: bool, part: float) -> Experts:
        return Bf16Experts(gate_up.codes, down.codes, shared, foreign)


class Fp8Format:
    """``ue8m0``: scales of activations are powers of two, as this checkpoint was trained with."""

    def __init__(self, device: torch.device, ue8m0: bool):
        self._form = Form("fp8" if chip_of(device).fp8_units else None, ue8m0)

    def read(self, source: DeviceTensors, name: str, window: Window = WHOLE) -> Fp8Weight:
        return source.fp8(name, window)

    def reordered(self, matrix: Fp8Weight, reorder: Reorder) -> Fp8Weight:
        return quantise_blocks(reorder(dequantise_weight(matrix)))  # rows leave their scale blocks

    def padded(self, matrix: Fp8Weight, rows: int, columns: int) -> Fp8Weight:
        return pad_fp8(matrix, rows, columns)

    def joins(self, first: Fp8Weight, second: Fp8Weight) -> bool:
        return True

    def joined(self, matrices: list[Fp8Weight]) -> Fp8Weight:
        return Fp8Weight(*(below(list(parts)) for parts in zip(*matrices, strict=True)))

    def linear(self, matrix: Fp8Weight) -> Linear:
        return Fp8Linear(matrix, self._form)

    def experts(self, gate_up: Fp8Weight, down: Fp8Weight, shared: int, foreign: bool, part: float) -> Experts:
        return KernelExperts(Stack(gate_up, down), self._form, shared, foreign, part)


class Int8Format:
    """Activations get a scale a row."""

    _form = Form("int8")

    def read(self, source: DeviceTensors, name: str, window: Window = WHOLE) -> Int8Weight:
        return source.int8(name, window)

    def reordered(self, matrix: Int8Weight, reorder: Reorder) -> Int8Weight:
        if matrix.has_blocks:
            return quantise_channels(reorder(dequantise_weight(matrix)))  # rows leave their scale blocks
        return Int8Weight(reorder(matrix.codes), reorder(matrix.scales[:, None])[:, 0])

    def padded(self, matrix: Int8Weight, rows: int, columns: int) -> Int8Weight:
        return pad_int8(matrix, rows, columns)

    def joins(self, first: Int8Weight, second: Int8Weight) -> bool:
        return first.has_blocks == second.has_blocks

    def joined(self, matrices: list[Int8Weight]) -> Int8Weight:
        return Int8Weight(*(below(list(parts)) for parts in zip(*matrices, strict=True)))

    def linear(self, matrix: Int8Weight) -> Linear:
        return KernelLinear(matrix, self._form)

    def experts(self, gate_up: Int8Weight, down: Int8Weight, shared: int, foreign: bool, part: float) -> Experts:
        return KernelExperts(Stack(gate_up, down), self._form, shared, foreign, part)


class Int4Format:
    """Activations stay BF16."""

    _form = Form()

    def read(self, source: DeviceTensors, name: str, window: Window = WHOLE) -> Int4Weight:
        return source.int4(name, window)

    def reordered(self, matrix: Int4Weight, reorder: Reorder) -> Int4Weight:
        blocks, rows, words = matrix.codes.shape
        codes_NX = reorder(matrix.codes.transpose(0, 1).flatten(1))
        codes_CNX = codes_NX.view(rows, blocks, words).transpose(0, 1).contiguous()
        return matrix._replace(codes=codes_CNX, scales=reorder(matrix.scales.t()).t().contiguous())

    def padded(self, matrix: Int4Weight, rows: int, columns: int) -> Int4Weight:
        return pad_int4(matrix, rows, columns)

    def joins(self, first: Int4Weight, second: Int4Weight) -> bool:
        if first.group != second.group or (first.order is None) != (second.order is None):
            return False
        return first.order is None or second.order is None or torch.equal(first.order, second.order)

    def joined(self, matrices: list[Int4Weight]) -> Int4Weight:
        codes = torch.cat([matrix.codes for matrix in matrices], dim=1)
        return matrices[0]._replace(codes=codes, scales=torch.cat([matrix.scales for matrix in matrices], dim=1))

    def linear(self, matrix: Int4Weight) -> Linear:
        return Int4Linear(matrix)

    def experts(self, gate_up: Int4Weight, down: Int4Weight, shared: int, foreign: bool, part: float) -> Experts:
        return KernelExperts(Stack(gate_up, down), self._form, shared, foreign, part)


class Formats:
    """Which format each parameter is held in, as ``holding`` says."""

    def __init__(self, device: torch.device, holding: Holding, ue8m0: bool):
        self._holding = holding
        self._by_name: dict[str, Format] = {
            "bf16": Bf16Format(), "fp8": Fp8Format(device, ue8m0), "w8a8": Int8Format(), "int4": Int4Format(),
        }  # fmt: skip

    def of(self, *names: str) -> Format:
        """The one format of some parameters; InputError when they have several."""
        held = {self._holding.of(name).dtype: name for name in names}
        if len(held) > 1:
            what = " and ".join(f"{name} in {format_}" for format_, name in held.items())
            raise InputError(what, "checkpoint", "use one whose experts of a layer are all in one format")
        return self._by_name[next(iter(held))]
