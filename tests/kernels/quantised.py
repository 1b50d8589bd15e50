"""Quantised matrices for tests, inside larger ones of NaN, or of other codes where there is none, so that any read past
the valid range shows. In the interpreter e4m3's NaN reads as 480."""

import torch

from deepspan.backends.torch_triton.kernels import int8, quant
from deepspan.backends.torch_triton.kernels.weights import Fp8Weight, Int4Weight, Int8Weight, Weight, words_of
from tests.kernels.device import seeded

KINDS = ["fp8", "int8", "int8 blocks", "int4", "int4, zero points, order"]


def weights(kind: str, outputs: int, inputs: int, count: int | None = None, used: set[int] | None = None) -> Weight:
    """A matrix, or a stack of ``count`` of which those that are not ``used`` are poison, too."""
    generator = seeded(outputs + inputs)
    rows, columns = -(-outputs // 128), -(-inputs // 128)
    stack = () if count is None else (count,)
    kept = None if used is None else torch.tensor([expert in used for expert in range(count or 0)])

    def inside(valid: torch.Tensor, poison: float, extra: tuple[int, ...]) -> torch.Tensor:
        """A view of ``valid`` in a larger tensor."""
        sizes = valid.shape[len(stack) :]
        wide = valid.new_full((*stack, *(size + more for size, more in zip(sizes, extra, strict=True))), poison)
        part = wide[(..., *(slice(size) for size in sizes))]
        part.copy_(valid if kept is None else torch.where(kept.view(-1, *[1] * len(sizes)), valid, poison))
        return part

    def floats(*shape: int) -> torch.Tensor:
        return (torch.rand(*stack, *shape, generator=generator) + 0.5) / 1024

    def integers(low: int, high: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, (*stack, *shape), generator=generator).to(dtype)

    nan = float("nan")
    if kind == "fp8":
        values = (torch.randn(*stack, outputs, inputs, generator=generator) * 64).to(torch.float8_e4m3fn)
        codes = inside(values.view(torch.uint8), 0x7F, (3, -inputs % 16 + 32)).view(torch.float8_e4m3fn)
        return Fp8Weight(codes, inside(floats(rows, columns), nan, (2, 3)))
    if kind.startswith("int8"):
        codes = inside(integers(-128, 128, torch.int8, outputs, inputs), 127, (3, -inputs % 16 + 32))
        if kind == "int8 blocks":
            return Int8Weight(codes, inside(floats(rows, columns), nan, (2, 3)))
        return Int8Weight(codes, inside(floats(outputs, 1), nan, (3, 0))[..., 0])
    group = 32 if "order" in kind else 128
    groups = columns * 128 // group
    codes = inside(integers(-(2**15), 2**15, torch.int16, columns, outputs, 32), -1, (1, 3, 0))
    zeros = integers(0, 16, torch.int32, groups, outputs) if "zero points" in kind else torch.tensor(8)
    scales = inside(words_of(floats(groups, outputs), zeros), 0x7FC000FF, (2, 5))
    if kind == "int4":
        return Int4Weight(codes, scales, inputs)
    orders = [torch.randperm(inputs, generator=generator).int() for _ in range(count or 1)]
    order = torch.stack([torch.cat([one, torch.full((groups * group - inputs,), 1 << 30)]).int() for one in orders])
    return Int4Weight(codes, scales, inputs, order if stack else order[0])


def operand(kind: str, x: torch.Tensor) -> quant.Codes | torch.Tensor:
    """BF16 activations as weights of this kind take them."""
    if kind == "fp8":
        return quant.quantise(x)
    return x if kind.startswith("int4") else int8.quantise_rows(x)


def rows(count: int, inputs: int) -> torch.Tensor:
    generator = seeded(count)
    wide = torch.full((count + 2, inputs + 16), torch.nan).bfloat16()
    wide[:count, :inputs] = torch.randn(count, inputs, generator=generator)
    return wide[:count, :inputs]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
