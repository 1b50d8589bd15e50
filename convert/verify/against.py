"""Two checkpoints, each in any layout, compared parameter by parameter under canonical names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ...models.dtypes import FLOATS, bf16_to_f32, to_f32
from ...models.params import Param
from ..formats import Range
from ..storage import Stored
from ..transposing import contiguous
from .findings import in_parallel
from .views import View

_PIECE = 1 << 21  # elements that are compared at a time
_WIDE = ("f32", "f16")  # forms that BF16 would round


@dataclass(frozen=True)
class Difference:
    """How far a parameter of B is from A's: largest difference, and the norm of it divided by A's norm.

    ``what`` says it where there are no numbers. Both are infinite where one side has a NaN or infinity.
    """

    name: str
    what: str | None = None
    max_error: float = math.inf
    relative_error: float = math.inf

    def within(self, rtol: float) -> bool:
        """Whether a tolerance above 0 covers it; without one only the same values or codes are the same."""
        return rtol > 0 and self.relative_error <= rtol

    def __str__(self) -> str:
        if self.what:
            return f"{self.name}: {self.what}"
        return f"{self.name}: differs, max error {self.max_error:.3g}, relative error {self.relative_error:.3g}"


@dataclass
class Comparison:
    """``identical`` counts parameters; ``missing`` are those of A that B lacks, ``extra`` those that only B has."""

    identical: int = 0
    differing: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    def is_equal(self, rtol: float) -> bool:
        return not self.missing and not self.extra and all(found.within(rtol) for found in self.differing)


def compare(a: View, b: View, workers: int, report: Callable[[int], None], mtp: bool = True) -> Comparison:
    """``report`` gets the number of elements that have been compared; ``mtp=False`` leaves the MTP layers out."""
    names_a, names_b = _names(a, mtp), _names(b, mtp)
    found = Comparison(
        missing=[name for name in names_a if name not in b.params],
        extra=[name for name in names_b if name not in a.params],
    )
    common = [a.params[name] for name in names_a if name in b.params]
    done = 0
    for param, difference in zip(common, in_parallel(partial(_compare, a, b), common, workers), strict=True):
        done += param.size
        report(done)
        if difference is None:
            found.identical += 1
        else:
            found.differing.append(difference)
    return found


def _names(view: View, mtp: bool) -> list[str]:
    left_out = range(0) if mtp else view.spec.mtp_layers()
    return [name for name, param in view.params.items() if param.layer not in left_out]


def _compare(a: View, b: View, param: Param) -> Difference | None:
    """None when both hold the same: codes and scales in one format, BF16 values in two."""
    name = param.name
    if b.params[name].shape != param.shape:
        return Difference(name, f"{list(param.shape)} and {list(b.params[name].shape)}")
    if _is_same_format(a.stored.get(name), b.stored.get(name)):
        parts = [part for part in a.stored[name].tensors if not _is_same_part(a, b, name, part)]
        if not parts:
            return None
        difference = _compare_values(a, b, param, "f32")
        return difference or _compare_parts(a, b, name, parts)
    wide = a.forms[name] == b.forms[name] and a.forms[name] in _WIDE
    return _compare_values(a, b, param, "f32" if wide or param.dtype == "F32" else "bf16")


def _is_same_format(one: Stored | None, other: Stored | None) -> bool:
    return one is not None and other is not None and _signature(one) == _signature(other)


def _signature(stored: Stored) -> tuple[object, ...]:
    parts = {part: (info.dtype, info.shape) for part, info in stored.tensors.items()}
    return stored.format, stored.block, stored.group_size, stored.zeros_minus_one, parts


def _is_same_part(a: View, b: View, name: str, part: str) -> bool:
    one, other = (view.stored[name].tensors[part] for view in (a, b))
    if not one.shape:
        return a.checkpoint.read(one.name).tobytes() == b.checkpoint.read(other.name).tobytes()
    step = max(1, _PIECE // max(1, math.prod(one.shape[1:])))
    return all(
        a.checkpoint.read(one.name, rows).tobytes() == b.checkpoint.read(other.name, rows).tobytes()
        for rows in _runs(one.shape[0], step)
    )


def _runs(rows: int, step: int) -> Iterator[Range]:
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _compare_parts(a: View, b: View, name: str, parts: list[str]) -> Difference:
    """Of parts that do not show in the values: scales of activations, or codes that mean the same."""
    worst = Difference(name, max_error=0.0, relative_error=0.0)
    for part in parts:
        error = _Error()
        error.add(*(_numbers(view, view.stored[name].tensors[part].name) for view in (a, b)))
        if error.relative >= worst.relative_error:
            worst = Difference(name, f"the same values, but another {part}", error.largest, error.relative)
    return worst


def _numbers(view: View, tensor: str) -> NDArray:
    dtype, stored = view.checkpoint.tensors[tensor].dtype, view.checkpoint.read(tensor)
    return to_f32(stored, dtype) if dtype in FLOATS else stored


def _compare_values(a: View, b: View, param: Param, dtype: str) -> Difference | None:
    pieces = list(_pieces(a, b, param))
    if all(
        np.array_equal(_bits(a.read(param.name, dtype, rows)), _bits(b.read(param.name, dtype, rows)))
        for rows in pieces
    ):
        return None
    error = _Error()
    for rows in pieces:
        error.add(*(_widened(view.read(param.name, dtype, rows)) for view in (a, b)))
    return Difference(param.name, None, error.largest, error.relative)


def _pieces(a: View, b: View, param: Param) -> Iterator[Range]:
    unit = max(a.units(param.name), b.units(param.name))
    return _runs(param.shape[0], unit * max(1, _PIECE // (unit * math.prod(param.shape[1:]))))


def _bits(array: NDArray) -> NDArray:
    return contiguous(array).view(f"u{array.itemsize}")


def _widened(values: NDArray) -> NDArray:
    return bf16_to_f32(values) if values.dtype == np.uint16 else values


class _Error:
    """How far arrays differ that are given in pieces."""

    def __init__(self) -> None:
        self.largest = 0.0
        self._square = self._norm = 0.0

    def add(self, one: NDArray, other: NDArray) -> None:
        differs = _bits(one) != _bits(other)
        wide = one[differs].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(wide - other[differs])
            error[np.isnan(error)] = math.inf
            self.largest = max(self.largest, float(error.max(initial=0)))
            self._square += float(np.square(error).sum())
            self._norm += float(np.square(one, dtype=np.float64)[np.isfinite(one)].sum())

    @property
    def relative(self) -> float:
        """The norm of the difference divided by the norm of the first."""
        if self._square == 0:
            return 0.0
        return math.sqrt(self._square / self._norm) if self._norm and math.isfinite(self._square) else math.inf
