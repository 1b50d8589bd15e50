"""CRC-32 at the speed of memory where the ``speed`` extra is installed; the same number as zlib.crc32.

Carry-less products fold 64 bytes at a time into 64 bytes with the same remainder (the technique of Gopal et al., "Fast
CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009); zlib then takes the checksum of those.
"""

from __future__ import annotations

import zlib

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from .checksums import power_of_x

HAS_CARRYLESS_PRODUCT = bool(llvm.get_host_cpu_features().get("pclmul"))
_LANES = 4  # of 16 bytes: enough products in flight to hide how long one takes
_STEP = 16 * _LANES
_LEAST = 4 * _STEP
_PAIR = ir.VectorType(ir.IntType(64), 2)
_ALL = 0xFFFFFFFF


def _constant(exponent: int) -> int:
    """x ** exponent modulo the polynomial, for a reflected product, which comes out one bit too low."""
    return power_of_x(exponent) << 1


# A lane moves _STEP bytes up: its low word, which has the higher powers, by 32 bits more than that, the other by less.
_FOLDS = _constant(8 * _STEP + 32), _constant(8 * _STEP - 32)


def crc32(data: NDArray[np.uint8]) -> int:
    """`zlib.crc32` of a contiguous array of bytes."""
    steps = len(data) // _STEP
    if not HAS_CARRYLESS_PRODUCT or len(data) < _LEAST:
        return zlib.crc32(data.data)
    folded = np.empty(_STEP, np.uint8)
    _fold(data, steps, folded)
    # Zlib complements what it begins with and what it returns; `_fold` has done the former already.
    return zlib.crc32(data[steps * _STEP :].data, zlib.crc32(folded.data, _ALL))


@intrinsic
def _fold_lanes(typing_context, data, steps, folded):  # type: ignore[no-untyped-def]
    """64 bytes that have the remainder of the first ``steps`` times 64 bytes of ``data``, their first four inverted."""
    signature = types.void(data, types.intp, folded)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        def start(argument):  # type: ignore[no-untyped-def]
            array = context.make_array(signature.args[argument])(context, builder, arguments[argument])
            return builder.bitcast(array.data, _PAIR.as_pointer())

        def lane(pointer, index):  # type: ignore[no-untyped-def]
            return builder.gep(pointer, [index])

        def number(value):  # type: ignore[no-untyped-def]
            return ir.Constant(ir.IntType(64), value)

        source, target = start(0), start(2)
        byte = ir.IntType(8)
        product = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_PAIR, [_PAIR, _PAIR, byte]), "llvm.x86.pclmulqdq"
        )
        folds = ir.Constant(_PAIR, list(_FOLDS))
        sums = [cgutils.alloca_once(builder, _PAIR) for _ in range(_LANES)]
        for i, place in enumerate(sums):
            value = builder.load(lane(source, number(i)), align=1)
            builder.store(builder.xor(value, ir.Constant(_PAIR, [_ALL, 0])) if i == 0 else value, place)
        with cgutils.for_range(builder, arguments[1], start=number(1)) as loop:
            for i, place in enumerate(sums):
                index = builder.add(builder.mul(loop.index, number(_LANES)), number(i))
                before = builder.load(place)
                low = builder.call(product, [before, folds, ir.Constant(byte, 0x00)])
                high = builder.call(product, [before, folds, ir.Constant(byte, 0x11)])
                value = builder.load(lane(source, index), align=1)
                builder.store(builder.xor(builder.xor(low, high), value), place)
        for i, place in enumerate(sums):
            builder.store(builder.load(place), lane(target, number(i)), align=1)
        return context.get_dummy_value()

    return signature, generate


@njit(nogil=True, cache=True, error_model="numpy")
def _fold(data, steps, folded):  # type: ignore[no-untyped-def]
    _fold_lanes(data, steps, folded)
