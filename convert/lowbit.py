"""Quantised modules as outputs of a plan: one reading of the BF16 weight makes the codes and everything beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from ..models.errors import InputError
from .plan import Output
from .schemes import Scheme, Static
from .transposing import contiguous

_UNIT = 128  # rows: of FP8's blocks, and few enough for INT8's


def stacked(matrices: Sequence[NDArray]) -> NDArray:
    """`np.stack`, without a copy of one that is alone."""
    return matrices[0][None] if len(matrices) == 1 else np.stack(matrices)


class QuantisedModule:
    """One linear module, or a stack of experts, made from ``read(start, stop)``: rows of BF16 patterns.

    A module is [out, in]. A stack is read as [experts, out, in] and stored as [experts, in, out], MindSpore's way;
    ``shape`` is the stored one.
    ``unit`` is the number of rows below which reading is wasteful, ``work_bytes`` what reading takes beside them. The
    scales are by-products of the codes: they are kept from when the codes are made until they are asked for, and made
    again from the weight when they are asked for first.
    """

    def __init__(
        self,
        prefix: str,
        shape: tuple[int, ...],
        sources: tuple[str, ...],
        read: Callable[[int, int], NDArray[np.uint16]],
        scheme: Scheme,
        static: Static = None,
        unit: int = _UNIT,
        work_bytes: int = 0,
    ):
        self._prefix, self._shape, self._sources, self._read = prefix, shape, sources, read
        self._is_stack = len(shape) == 3
        self._unit = 1 if self._is_stack else -(-unit // _UNIT) * _UNIT
        self._work_bytes = work_bytes
        self._scheme, self._static = scheme, static
        matrix = (shape[2], shape[1]) if self._is_stack else shape
        self._parts = scheme.parts(matrix, static)
        self._codes = next(iter(self._parts))
        self._kept: dict[int, dict[str, NDArray]] = {}  # first row -> by-products of a run of rows
        self._wanted = set(self._parts) - {self._codes}
        self._lock = threading.Lock()

    def outputs(self) -> list[Output]:
        """The module's tensors, the codes first."""
        return [self._codes_output(), *(self._beside(part) for part in self._parts if part != self._codes)]

    def _codes_output(self) -> Output:
        part = self._parts[self._codes]
        # Beside the codes and what reading takes, the weight as BF16 and the codes of a stack before they are swapped.
        work = self._work_bytes + (3 if self._is_stack else 2) * self._unit * prod(self._shape[1:])
        name = self._prefix + self._codes
        return Output(name, part.dtype, self._shape, self._sources, self._make_codes, self._shape[0], self._unit, work)

    def _beside(self, name: str) -> Output:
        part = self._parts[name]
        shape = (self._shape[0], *part.shape) if self._is_stack else part.shape

        def make(start: int, stop: int) -> NDArray:
            made = self._take(name)
            assert made.shape == shape and (start, stop) == (0, shape[0]), f"{name} of {self._prefix} is {made.shape}"
            return made

        return Output(self._prefix + name, part.dtype, shape, self._sources, make, shape[0], shape[0], after=True)

    def _make_codes(self, start: int, stop: int) -> NDArray:
        made = self._quantise(start, stop)
        codes = made.pop(self._codes)
        with self._lock:
            if self._wanted:
                self._kept[start] = made
        return codes

    def _quantise(self, start: int, stop: int) -> dict[str, NDArray]:
        weight = self._read(start, stop)
        if not self._is_stack:
            return self._make(weight)
        made = [self._make(expert) for expert in weight]
        for parts in made:
            parts[self._codes] = contiguous(parts[self._codes].T)
        return {name: stacked([parts[name] for parts in made]) for name in self._parts}

    def _make(self, weight_NK: NDArray[np.uint16]) -> dict[str, NDArray]:
        """The parts of [out, in] rows. A weight that is not finite shows in its scales."""
        with np.errstate(invalid="ignore", over="ignore"):
            made = self._scheme.make(weight_NK, self._static)
        for name, array in made.items():
            bad = (array & 0x7F80) == 0x7F80 if array.dtype == np.uint16 else ~np.isfinite(array)
            if name != self._codes and bad.any():
                todo = "repair the source, or name the module in --ignore"
                raise InputError("weights are not finite numbers", " and ".join(self._sources[:1]), todo)
        return made

    def _take(self, name: str) -> NDArray:
        runs = self._runs()
        with self._lock:
            self._wanted.discard(name)
            if not self._wanted:
                self._kept = {}
        if self._parts[name].per == 0 and not self._is_stack:
            return runs[0][name]
        return np.concatenate([runs[start][name] for start in sorted(runs)])

    def _runs(self) -> dict[int, dict[str, NDArray]]:
        """By-products of all rows: kept ones, or made again."""
        with self._lock:
            kept = dict(self._kept)
        for start, stop in self._codes_output().pieces():
            if start not in kept:
                made = self._quantise(start, stop)
                del made[self._codes]
                kept[start] = made
        with self._lock:
            if self._wanted:
                self._kept = kept
        return kept
