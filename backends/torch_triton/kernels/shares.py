"""How many rows of weights a program takes: no tile is left for a second wave, and no processor without one."""

from __future__ import annotations

from .chips import Chip
from .sizes import cdiv, power_of_2

_MOST_STAGES = 9


def even_share(number: int, among: int, most: int) -> int | None:
    """What each of ``among`` gets of ``number``, if it is over half of ``most`` and not more than that."""
    share = cdiv(number, max(1, among))
    return share if most // 2 < share <= most else None


def gated_share(width: int, matrices: int, block_m: int, chip: Chip) -> tuple[int, int] | None:
    """Rows and stages of a tile of gate and of up, for matrices of ``width`` each; None where nothing is even.

    Three programs on each processor, or of narrow matrices one with larger tiles: those of half the size are bound by
    their own steps. Pipelines are as deep as lets just so many programs fit: a launch's programs, which start while the
    kernel ahead still has some, would otherwise share few processors and leave others idle.
    """
    for programs, least, most in ((3, 16, 64), (1, 32, 64)):
        rows = cdiv(width, max(1, programs * chip.processors // matrices))
        if least < rows <= most:
            stage = (2 * power_of_2(rows) + block_m) * 128 + 4 * block_m
            return rows, min(_MOST_STAGES, chip.shared_memory // programs // stage)
    return None
