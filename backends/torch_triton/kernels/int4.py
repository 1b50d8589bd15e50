"""Four-bit codes to BF16: exact, for (code - zero point) is a small integer. `weights` says how codes lie."""

import triton
import triton.language as tl

# Two bytes in, two times (code - zero point) of their low and of their high bits out. 0x4300 | code is 128 + code in
# BF16, and zero points come as 128 + z, so that an instruction subtracts two at once, exactly.
_DECODE = tl.constexpr("""{
.reg .b32 low, high, minus;
mov.b32 minus, 0xBF80BF80;
cvt.u32.u16 low, $2;
prmt.b32 low, low, 0, 0x4140;
shr.u32 high, low, 4;
lop3.b32 low, low, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 high, high, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, $3, minus, low;
fma.rn.bf16x2 $1, $4, minus, high;
}""")


@triton.jit
def decode(bytes_JX, low_zero_J, high_zero_J, INSTRUCTION: tl.constexpr):
    """Code minus zero point of the low halves and of the high ones, BF16 [J, X]. Zero points come as int32 128 + z.

    INSTRUCTION: NVIDIA's, of which one subtracts for two codes.
    """
    if INSTRUCTION:
        low_zero_JX = tl.broadcast_to(low_zero_J.to(tl.bfloat16)[:, None], bytes_JX.shape)
        high_zero_JX = tl.broadcast_to(high_zero_J.to(tl.bfloat16)[:, None], bytes_JX.shape)
        low_JX, high_JX = tl.inline_asm_elementwise(
            _DECODE, "=r,=r,h,r,r", [bytes_JX, low_zero_JX, high_zero_JX], dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        low_JX = ((bytes_JX & 15).to(tl.int32) + 128 - low_zero_J[:, None]).to(tl.float32).to(tl.bfloat16)
        high_JX = ((bytes_JX >> 4).to(tl.int32) + 128 - high_zero_J[:, None]).to(tl.float32).to(tl.bfloat16)
    return low_JX, high_JX


@triton.jit
def scale_and_zero(word_J):
    """FP32 scales, and zero points as `decode` takes them, of int32 words."""
    return (word_J & -256).to(tl.float32, bitcast=True), word_J & 255
