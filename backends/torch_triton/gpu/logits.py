"""Logits of a vocabulary of which each tensor-parallel rank has a part.

Shape letters: O outputs, V vocabulary, P columns of this rank, R ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import gather
from ..kernels.best import Copies, best, takes
from ..parallel import ALONE, Group


class Logits(NamedTuple):
    """This rank's columns; the ranks' parts are equal, and in the order of the ranks."""

    part_OP: Tensor  # float32
    ranks: Group = ALONE.tp

    @property
    def first(self) -> int:
        """Where in the vocabulary this part begins."""
        return self.ranks.index * self.part_OP.shape[1]

    def joined(self) -> Logits:
        """With all columns, on all ranks, which call this together; not after `best`, whose launch sends, too."""
        peers = self.ranks.peers
        if peers is not None and gather.takes(self.part_OP, peers):
            return Logits(gather.beside(self.part_OP, peers))
        return Logits(self.ranks.beside(self.part_OP))

    def best(self, out_O: Tensor | None = None, copies: Copies | None = None) -> Tensor:
        """int32 [O]: the token of the largest logit, the lower of equal ones; see `kernels.best`. All ranks call this
        together."""
        ranks, peers = self.ranks, self.ranks.peers
        if ranks.size == 1 or (peers is not None and takes(self.part_OP, peers)):
            return best(self.part_OP, out_O, copies, peers)
        own_O1 = best(self.part_OP)[:, None]
        logit_O1 = self.part_OP.gather(1, own_O1.long())
        found_OX = ranks.beside(torch.cat([logit_O1.view(torch.int32), own_O1 + self.first], dim=1))
        logit_OR, token_OR = found_OX.unflatten(1, (ranks.size, 2)).permute(2, 0, 1).contiguous()
        return best(logit_OR.view(torch.float32), out_O, copies, names_OV=token_OR)
