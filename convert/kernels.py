"""The hot loops of conversions, compiled by numba (the ``speed`` extra). `models.quant` defines what they compute.

FP8 to BF16. An E4M3 code is sign, exponent e, mantissa m. Its product with a block's scale, rounded to BF16, has only
eight mantissas a block: bits(e, m) = bits(0, m) + (e << 7), because adding one to a BF16's exponent doubles it. Eight
more entries are the subnormal codes (e = 0), and sixteen more their negatives: 32 entries of 16 bits, which is exactly
what one AVX-512 permutation looks up for 32 codes at a time. Other processors multiply: the code's bits moved to an
FP32's place are its value times 2 ** -120.
"""

from __future__ import annotations

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from ..models.dtypes import Bits8, Bits16, Float32, f32_to_bf16
from ..models.quant import dequant_fp8_blocks
from .pages import empty_pages

HAS_PERMUTATION = bool(llvm.get_host_cpu_features().get("avx512bw"))
_LANES = 32
_TILE = 128  # a square of 16-bit elements that stays in the first-level cache
_VECTOR_BYTES = 16  # as many rows of as many elements as it holds are transposed in registers
# Scales for which no product overflows, no normal code's product is a BF16 denormal, and scale * 2 ** 120 is finite.
_SCALES = np.float32(2.0**-100), np.float32(2.0**6)
_MANTISSAS = np.concatenate([(1 + np.arange(8) / 8) * 2.0**-7, np.arange(8) / 8 * 2.0**-6]).astype(np.float32)


def fp8_to_bf16(
    codes_NK: Bits8,
    scales_RC: Float32,
    block: tuple[int, int],
    origin: tuple[int, int],
    permute: bool = HAS_PERMUTATION,
    out: Bits16 | None = None,
) -> Bits16:
    """`dequant_fp8_blocks` to "bf16", with the same arguments; ``permute`` chooses the AVX-512 form.

    ``out``: contiguous room for the result, of the codes' shape.
    """
    out_NK = empty_pages(codes_NK.shape, np.uint16) if out is None else out
    usual = bool(((scales_RC >= _SCALES[0]) & (scales_RC <= _SCALES[1])).all())
    if usual and codes_NK.flags.c_contiguous:
        first = origin[0] // block[0] * block[0], origin[1] // block[1] * block[1]
        inside = origin[0] - first[0], origin[1] - first[1]
        has_nan = (
            _look_up(codes_NK, _tables(scales_RC), block, inside, out_NK)
            if permute
            else _multiply(codes_NK, scales_RC * np.float32(2.0**120), block, inside, out_NK)
        )
        if not has_nan:
            return out_NK
    out_NK[...] = dequant_fp8_blocks(codes_NK, scales_RC, "bf16", block, origin)
    return out_NK


def _tables(scales_RC: Float32) -> NDArray[np.uint16]:
    """[R, C, 32]: BF16 of scale times mantissa m at exponent 0, subnormals, and the negatives of both."""
    positive = f32_to_bf16(scales_RC[:, :, None] * _MANTISSAS)
    return np.concatenate([positive, positive | np.uint16(0x8000)], axis=-1)


_BYTES = ir.VectorType(ir.IntType(8), _LANES)
_WORDS = ir.VectorType(ir.IntType(16), _LANES)


@intrinsic
def _look_up_lanes(typing_context, codes, start, table, out):  # type: ignore[no-untyped-def]
    """``out[start : start + 32]`` of ``codes`` there and a table of 32: vpermw, which numba does not expose."""
    signature = types.void(codes, types.intp, table, out)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        def pointer(argument, offset, vector):  # type: ignore[no-untyped-def]
            array = context.make_array(signature.args[argument])(context, builder, arguments[argument])
            return builder.bitcast(builder.gep(array.data, [offset]), vector.as_pointer())

        def constant(value):  # type: ignore[no-untyped-def]
            return ir.Constant(_WORDS, [value] * _LANES)

        code = builder.zext(builder.load(pointer(0, arguments[1], _BYTES), align=1), _WORDS)
        exponent = builder.shl(builder.and_(code, constant(0x78)), constant(4))
        is_subnormal = builder.icmp_unsigned("==", exponent, constant(0))
        index = builder.and_(code, constant(7))
        index = builder.or_(index, builder.select(is_subnormal, constant(8), constant(0)))
        index = builder.or_(index, builder.lshr(builder.and_(code, constant(0x80)), constant(3)))
        function = ir.FunctionType(_WORDS, [_WORDS, _WORDS])
        permute = cgutils.get_or_insert_function(builder.module, function, "llvm.x86.avx512.permvar.hi.512")
        table_lanes = builder.load(pointer(2, ir.Constant(ir.IntType(64), 0), _WORDS), align=2)
        result = builder.add(builder.call(permute, [table_lanes, index]), exponent)
        builder.store(result, pointer(3, arguments[1], _WORDS), align=2)
        return context.get_dummy_value()

    return signature, generate


@njit(nogil=True, cache=True, error_model="numpy")
def _look_up(codes, tables, block, inside, out):  # type: ignore[no-untyped-def]
    rows, columns = codes.shape
    worst = np.uint8(0)
    for row in range(rows):
        codes_K, out_K = codes[row], out[row]
        worst = max(worst, _largest_magnitude(codes_K))
        tables_C = tables[(inside[0] + row) // block[0]]
        column = 0
        for c in range(tables_C.shape[0]):
            table = tables_C[c]
            end = min((c + 1) * block[1] - inside[1], columns)
            while column + 32 <= end:
                _look_up_lanes(codes_K, column, table, out_K)
                column += 32
            while column < end:
                code = np.uint32(codes_K[column])
                exponent = code & np.uint32(0x78)
                index = (code & np.uint32(7)) | ((code & np.uint32(0x80)) >> np.uint32(3))
                if exponent == 0:
                    index |= np.uint32(8)
                out_K[column] = np.uint16(table[index] + (exponent << np.uint32(4)))
                column += 1
    return worst == 0x7F


@njit(nogil=True, cache=True, error_model="numpy")
def _multiply(codes, scales, block, inside, out):  # type: ignore[no-untyped-def]
    rows, columns = codes.shape
    width = block[1]
    bits, values = np.empty(width, np.uint32), np.empty(width, np.float32)
    products = values.view(np.uint32)
    floats = bits.view(np.float32)
    worst = np.uint8(0)
    for row in range(rows):
        worst = max(worst, _largest_magnitude(codes[row]))
        scales_C = scales[(inside[0] + row) // block[0]]
        column = 0
        for c in range(scales_C.shape[0]):
            end = min((c + 1) * width - inside[1], columns)
            codes_K, out_K = codes[row, column:end], out[row, column:end]
            for i in range(end - column):
                code = np.uint32(codes_K[i])
                bits[i] = ((code & np.uint32(0x7F)) << np.uint32(20)) | ((code & np.uint32(0x80)) << np.uint32(24))
            scale = scales_C[c]
            for i in range(end - column):
                values[i] = floats[i] * scale
            for i in range(end - column):
                odd = (products[i] >> np.uint32(16)) & np.uint32(1)
                out_K[i] = np.uint16((products[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
            column = end
    return worst == 0x7F


@njit(nogil=True, cache=True, error_model="numpy")
def _largest_magnitude(codes_K):  # type: ignore[no-untyped-def]
    worst = np.uint8(0)
    for i in range(codes_K.shape[0]):
        worst = max(worst, codes_K[i] & np.uint8(0x7F))
    return worst


def can_transpose(out_KN: NDArray, source_NK: NDArray) -> bool:
    """Whether `transpose` takes these arrays: 8 or 16 bits an element, in whole squares of 16 x 16 or 8 x 8."""
    size = source_NK.itemsize
    square = _VECTOR_BYTES // size
    return size in _CARRIERS and all(
        array.itemsize == size and array.strides[1] == size and not (array.shape[0] % square or array.shape[1] % square)
        for array in (out_KN, source_NK)
    )


def transpose(out_KN: NDArray, source_NK: NDArray) -> None:
    """``out[...] = source.T`` where `can_transpose` says so."""
    carrier = _CARRIERS[source_NK.itemsize]
    _transpose(out_KN.view(carrier), source_NK.view(carrier))


_CARRIERS = {1: np.uint8, 2: np.uint16}


@intrinsic
def _turn_square(typing_context, source, start, step, out, out_start, out_step):  # type: ignore[no-untyped-def]
    """A square of ``source``, rows ``step`` elements apart from the element ``start`` on, turned into ``out``.

    A square of eight rows is transposed by interleaving row i with row i + 4 three times, one of sixteen by rows i and
    i + 8 four times; each time is an instruction a row of every vector unit.
    """
    signature = types.void(source, types.intp, types.intp, out, types.intp, types.intp)

    side = _VECTOR_BYTES * 8 // source.dtype.bitwidth
    vector = ir.VectorType(ir.IntType(source.dtype.bitwidth), side)
    # Of two rows a and b, the first halves as a0 b0 a1 b1 ..., and the second halves.
    interleaved = [
        ir.Constant(ir.VectorType(ir.IntType(32), side), [half + i // 2 + i % 2 * side for i in range(side)])
        for half in (0, side // 2)
    ]

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        def pointer(argument, row):  # type: ignore[no-untyped-def]
            array = context.make_array(signature.args[argument])(context, builder, arguments[argument])
            first, step = arguments[argument + 1], arguments[argument + 2]
            place = builder.add(first, builder.mul(step, ir.Constant(ir.IntType(64), row)))
            return builder.bitcast(builder.gep(array.data, [place]), vector.as_pointer())

        rows = [builder.load(pointer(0, row), align=1) for row in range(side)]
        for _ in range(side.bit_length() - 1):
            pairs = [(rows[i // 2], rows[i // 2 + side // 2], interleaved[i % 2]) for i in range(side)]
            rows = [builder.shuffle_vector(*pair) for pair in pairs]
        for row, values in enumerate(rows):
            builder.store(values, pointer(3, row), align=1)
        return context.get_dummy_value()

    return signature, generate


@njit(nogil=True, cache=True, error_model="numpy")
def _transpose(out, source):  # type: ignore[no-untyped-def]
    rows, columns = source.shape
    step, out_step = source.strides[0] // source.itemsize, out.strides[0] // out.itemsize
    square = _VECTOR_BYTES // source.itemsize
    for first in range(0, rows, _TILE):
        for left in range(0, columns, _TILE):
            for column in range(left, min(left + _TILE, columns), square):
                for row in range(first, min(first + _TILE, rows), square):
                    _turn_square(source, row * step + column, step, out, column * out_step + row, out_step)
