"""e4m3 codes from and to FP32, with integer operations where the chip or the interpreter has nothing better."""

import triton
import triton.language as tl


@triton.jit
def encode(x, FNUZ: tl.constexpr, INSTRUCTION: tl.constexpr):
    """Codes (uint8) of FP32 values, to nearest even, saturating at 448; NaN gives NaN.

    For fnuz the code stands for half the value, so its scale must be doubled: both forms then hold the same numbers.
    INSTRUCTION: the chip has one that does this, for e4m3fn.
    """
    if INSTRUCTION:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        magnitude = bits & 0x7FFFFFFF
        clipped = tl.minimum(magnitude, 0x43E00000)  # 448
        normal = ((clipped + 0x7FFFF + ((clipped >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 codes are multiples of 2^-9; adding 2^14 makes FP32 round to them.
        subnormal = (clipped.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        rounded = tl.where(clipped < 0x3C800000, subnormal, normal)
        signed = tl.where(rounded == 0, 0, rounded | sign) if FNUZ else rounded | sign
        code = tl.where(magnitude > 0x7F800000, 0x80 if FNUZ else 0x7F, signed).to(tl.uint8)
    return code


@triton.jit
def decode(codes):
    """FP32 values of codes in the chip's FP8 type, or of e4m3fn codes held as uint8. Exact."""
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.uint32)
        shifted = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        value = shifted.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120: the exponents' biases differ
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    else:
        value = codes.to(tl.float32)
    return value
