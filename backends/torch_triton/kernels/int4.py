"""Four-bit codes to BF16: exact, for (code - zero point) is a small integer. `weights` says how codes lie."""

import triton
import triton.language as tl

# Two words in, (code - zero point) of both for each of their four fields out. 0x4300 | code is 128 + code in BF16, and
# zero points come as 128 + z, so that an instruction subtracts two at once, exactly.
_DECODE = tl.constexpr("""{
.reg .b32 codes, minus;
mov.b32 minus, 0xBF80BF80;
lop3.b32 codes, $4, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, $5, minus, codes;
shr.u32 codes, $4, 4;
lop3.b32 codes, codes, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 $1, $6, minus, codes;
shr.u32 codes, $4, 8;
lop3.b32 codes, codes, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 $2, $7, minus, codes;
shr.u32 codes, $4, 12;
lop3.b32 codes, codes, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 $3, $8, minus, codes;
}""")


@triton.jit
def decode(words_JX, groups, INSTRUCTION: tl.constexpr):
    """Code minus zero point of the four fields of words [J, X], BF16. ``groups``: each field's from `load_groups`.

    INSTRUCTION: NVIDIA's, of which one subtracts for two codes.
    """
    if INSTRUCTION:
        fields = tl.inline_asm_elementwise(
            _DECODE, "=r,=r,=r,=r,r,r,r,r,r",
            [words_JX, _zero(groups[0]), _zero(groups[1]), _zero(groups[2]), _zero(groups[3])],
            dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        fields = (
            _field(words_JX, groups, 0), _field(words_JX, groups, 1),
            _field(words_JX, groups, 2), _field(words_JX, groups, 3),
        )  # fmt: skip
    return fields


@triton.jit
def _zero(group_J):
    return (group_J & 255).to(tl.bfloat16)[:, None]


@triton.jit
def _field(words_JX, groups, FIELD: tl.constexpr):
    codes_JX = (words_JX >> (4 * FIELD)).to(tl.int32) & 15
    return (codes_JX + 128 - (groups[FIELD] & 255)[:, None]).to(tl.float32).to(tl.bfloat16)


@triton.jit
def load_groups(ptr_J, stride, GROUPS: tl.constexpr):
    """The words of scale and zero point of the four fields of a block, which has 1, 2 or 4 groups."""
    first_J = tl.load(ptr_J)
    second_J = tl.load(ptr_J + stride) if GROUPS == 4 else first_J
    third_J = tl.load(ptr_J + GROUPS // 2 * stride) if GROUPS > 1 else first_J
    fourth_J = tl.load(ptr_J + 3 * stride) if GROUPS == 4 else third_J
    return first_J, second_J, third_J, fourth_J


@triton.jit
def scale(groups, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """FP32 [J] of one of a block's groups."""
    return (groups[GROUP * 4 // GROUPS] & -256).to(tl.float32, bitcast=True)


@triton.jit
def channels(fields, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """The fields of one of a block's groups beside each other: moves nothing between threads."""
    if GROUPS == 4:
        out_JX = fields[GROUP]
    elif GROUPS == 2:
        pair_JXF = tl.join(fields[2 * GROUP], fields[2 * GROUP + 1])
        out_JX = tl.reshape(tl.permute(pair_JXF, (0, 2, 1)), (pair_JXF.shape[0], 2 * pair_JXF.shape[1]))
    else:
        all_JXFF = tl.join(tl.join(fields[0], fields[2]), tl.join(fields[1], fields[3]))
        out_JX = tl.reshape(tl.permute(all_JXFF, (0, 2, 3, 1)), (all_JXFF.shape[0], 4 * all_JXFF.shape[1]))
    return out_JX
