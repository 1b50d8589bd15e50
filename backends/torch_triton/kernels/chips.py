"""What the launchers must know of a chip. An unknown chip gets a description that is safe, not fast.

Sources: CUDA C++ programming guide, compute capabilities; AMD CDNA3 and CDNA4 instruction set guides (e4m3 of MI300 is
the fnuz form: the same bits mean half the value, and 0x80 is NaN, not -0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from ....models.errors import DeepspanError


@dataclass(frozen=True)
class Chip:
    name: str
    processors: int  # what one wave of programs fills
    fp8_units: bool  # whether the matrix units take e4m3; otherwise weights are decoded with integer operations
    fnuz: bool = False  # whether e4m3 is the fnuz form
    encodes_fp8: bool = False  # whether an instruction rounds FP32 to e4m3fn
    dependent_launch: bool = False  # whether a kernel may start before the one ahead of it has ended
    shared_memory: int = 64 << 10  # bytes a program may use

    @property
    def decodes_fp8(self) -> bool:
        """Whether an instruction converts e4m3fn codes; otherwise integer operations do."""
        return self.fp8_units and not self.fnuz

    @property
    def fp8(self) -> torch.dtype:
        """The dtype of FP8 codes on this chip."""
        return torch.float8_e4m3fnuz if self.fnuz else torch.float8_e4m3fn


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", 108, fp8_units=False, shared_memory=163 << 10),
        Chip("sm_90", 132, fp8_units=True, encodes_fp8=True, dependent_launch=True, shared_memory=227 << 10),
        Chip("sm_100", 148, fp8_units=True, encodes_fp8=True, dependent_launch=True, shared_memory=227 << 10),
        Chip("gfx942", 304, fp8_units=True, fnuz=True),
        Chip("gfx950", 256, fp8_units=True, shared_memory=160 << 10),
    )
}


def chip_named(name: str) -> Chip:
    """The chip of an architecture name such as sm_90 or gfx942."""
    return CHIPS.get(name) or Chip(name, 64, fp8_units=False)


@lru_cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind ``device``; on a CPU, where kernels run in Triton's interpreter, a plain one with FP8."""
    if device.type == "cpu":
        return Chip("interpreter", 2, fp8_units=True)
    arch = triton.runtime.driver.active.get_current_target().arch
    return chip_named(arch if isinstance(arch, str) else f"sm_{arch}")


@lru_cache
def counters(device: torch.device) -> torch.Tensor:
    """Zeros that the programs of a launch count with and leave as zeros. Kernels of a device run one after another."""
    return torch.zeros(1 << 14, dtype=torch.int32, device=device)


def check(condition: bool, what: str, kernel: str) -> None:
    """A launcher's one error: what it cannot take."""
    if not condition:
        raise DeepspanError(what, f"kernel {kernel}", "this is a fault of deepspan's model code: please report it")


def options(chip: Chip, warps: int, stages: int = 1) -> dict[str, int | bool]:
    """Launch options of a kernel that begins with `pdl.wait`."""
    pdl = {"launch_pdl": True} if chip.dependent_launch else {}
    return {"num_warps": warps, "num_stages": stages, **pdl}
