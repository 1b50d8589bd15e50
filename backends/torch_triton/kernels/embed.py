"""Rows of the embedding table, by token ids that the host may not know yet: it need not wait for a step to queue the
next one.

Shape letters: T tokens, N rows of the table, D hidden, O outputs of the step before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import pdl
from .chips import check, chip_of, options
from .sizes import cdiv

BLOCK_D = 1024


@triton.jit(do_not_specialize=["first"])
def _embed(
    id_ptr, last_ptr, table_ptr, stride, out_ptr, first, N, D, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, tiles of D."""
    token = tl.program_id(0)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    pdl.wait(PDL)
    pdl.release(PDL)
    token_id = tl.load(id_ptr + token)
    if token_id < 0:
        token_id = tl.load(last_ptr - 1 - token_id)
    row = token_id - first
    here = (row >= 0) & (row < N)
    x_D = tl.load(table_ptr + row.to(tl.int64) * stride + d_D, mask=here & (d_D < D), other=0.0)
    tl.store(out_ptr + token.to(tl.int64) * D + d_D, x_D, mask=d_D < D)


def embed(token_ids_T: torch.Tensor, last_O: torch.Tensor, table_ND: torch.Tensor, first: int = 0) -> torch.Tensor:
    """BF16 [T, D]. The table has the rows of the vocabulary from ``first`` on; other tokens get zeros.

    A token id of -1 - o means ``last_O[o]``. Both are int32.
    """
    name = "embed"
    check(token_ids_T.dtype == last_O.dtype == torch.int32, f"token ids in {token_ids_T.dtype}", name)
    check(token_ids_T.is_contiguous() and last_O.is_contiguous(), "token ids must be contiguous", name)
    check(table_ND.stride(1) == 1, "rows must be contiguous", name)
    tokens, (rows, hidden) = len(token_ids_T), table_ND.shape
    out_TD = torch.empty(tokens, hidden, dtype=table_ND.dtype, device=table_ND.device)
    chip = chip_of(table_ND.device)
    _embed[(tokens, cdiv(hidden, BLOCK_D))](
        token_ids_T, last_O, table_ND, table_ND.stride(0), out_TD, first, rows, hidden, BLOCK_D=BLOCK_D,
        PDL=chip.dependent_launch, **options(chip, 4),
    )  # fmt: skip
    return out_TD


def embed_eager(
    token_ids_T: torch.Tensor, last_O: torch.Tensor, table_ND: torch.Tensor, first: int = 0
) -> torch.Tensor:
    """The twin of `embed`."""
    known_T = torch.where(token_ids_T < 0, last_O[(-1 - token_ids_T).clamp(min=0).long()], token_ids_T) - first
    here_T = (known_T >= 0) & (known_T < len(table_ND))
    return table_ND[known_T.where(here_T, 0).long()].where(here_T[:, None], 0)
