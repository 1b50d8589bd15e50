"""What kernels for Hopper share whose warps have different tasks. They are written in Gluon, Triton's language for what
its compiler does not do alone, and compile for sm_90 only.

Shape letters: K rows of a tile in shared memory, V columns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from .chips import Chip

# Triton 3.8 renamed it, and 3.9 raises an error under the old name.
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

_WIPE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))


def runs_tasks(chip: Chip) -> bool:
    """Whether this is the chip."""
    return chip.name == "sm_90"


@gluon.jit
def unknown_zero():
    """0, but not to the compiler: addresses that it is added to are made anew for each tile, or they would spill."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wipe(tile_KV, rows, ROWS: gl.constexpr):
    """Zeros in the tile's rows from ``rows`` on, which may hold anything, even NaN. By four warps."""
    for first in gl.static_range(0, ROWS, 8):
        if first + 8 > rows:
            some = tile_KV.slice(first, 8)
            k_K = first + gl.arange(0, 8, layout=gl.SliceLayout(1, _WIPE))
            held = some.load(_WIPE)
            some.store(gl.where((k_K < rows)[:, None], held, gl.zeros_like(held)))
