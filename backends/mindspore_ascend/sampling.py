"""`models.sampling` on the device: the same hash, the same filters, so the same tokens for the same logits.

The hash runs in INT32, which every device multiplies and shifts; right shifts are made logical by a mask. Noise is made
in the order of the sorted logits, so nothing is scattered back.

Shape letters: O rows of logits, V vocabulary.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


def _signed(value: int) -> int:
    """The INT32 of the same bits."""
    return int(np.uint32(value).view(np.int32))


_FIRST, _SECOND = _signed(0x7FEB352D), _signed(0x846CA68B)


class Hash(nn.Cell):
    """`models.sampling.hash_u32` of the bits of INT32 values."""

    def construct(self, x: Tensor) -> Tensor:
        x = self.fold(x, 16, 0xFFFF) * Tensor(_FIRST, ms.int32)
        x = self.fold(x, 15, 0x1FFFF) * Tensor(_SECOND, ms.int32)
        return self.fold(x, 16, 0xFFFF)

    def fold(self, x: Tensor, bits: int, mask: int) -> Tensor:
        """x ^ (x >> bits), without the copies of the sign bit."""
        shifted = ops.bitwise_and(ops.bitwise_right_shift(x, Tensor(bits, ms.int32)), Tensor(mask, ms.int32))
        return ops.bitwise_xor(x, shifted)


class Sampler(nn.Cell):
    """One token for each row: the greedy one at temperature 0, else a draw."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.hash = Hash()

    def construct(
        self, logits_OV: Tensor, greedy_O: Tensor, position_O: Tensor, temperature_O: Tensor, top_k_O: Tensor,
        top_p_O: Tensor, seed_O: Tensor,
    ) -> Tensor:  # fmt: skip
        drawn_O = temperature_O > 0
        divisor_O = ops.select(drawn_O, temperature_O, ops.ones_like(temperature_O))
        sorted_OV, order_OV = ops.sort(logits_OV / divisor_O.expand_dims(1), -1, True)
        order_OV = order_OV.astype(ms.int32)
        kept_OV = self.keep(sorted_OV, top_k_O, top_p_O)
        noisy_OV = (sorted_OV + self.noise(seed_O, position_O, order_OV)).masked_fill(
            ops.logical_not(kept_OV), float("-inf")
        )
        best_O1 = ops.argmax(noisy_OV, -1).astype(ms.int32).expand_dims(1)
        return ops.select(drawn_O, ops.gather_d(order_OV, 1, best_O1).squeeze(1), greedy_O)

    def keep(self, sorted_OV: Tensor, top_k_O: Tensor, top_p_O: Tensor) -> Tensor:
        """`models.sampling.keep_mask` for logits sorted from the best on."""
        rank_V = ops.arange(sorted_OV.shape[1]).astype(ms.int32)
        limited_OV = ops.logical_and(top_k_O.expand_dims(1) > 0, rank_V >= top_k_O.expand_dims(1))
        weight_OV = ops.exp(sorted_OV - sorted_OV[:, :1]).masked_fill(limited_OV, 0.0)
        probability_OV = weight_OV / weight_OV.sum(-1, keepdims=True)
        before_OV = ops.cumsum(probability_OV, -1) - probability_OV
        inside_OV = ops.logical_and(before_OV < top_p_O.expand_dims(1), ops.logical_not(limited_OV))
        return ops.logical_or(inside_OV, rank_V == 0)

    def noise(self, seed_O: Tensor, position_O: Tensor, token_OV: Tensor) -> Tensor:
        """`models.sampling.gumbel_noise` at the given tokens."""
        row_O1 = self.hash(ops.bitwise_xor(self.hash(seed_O), position_O)).expand_dims(1)
        bits_OV = self.hash(ops.bitwise_xor(row_O1, self.hash(token_OV)))
        upper_OV = ops.bitwise_and(ops.bitwise_right_shift(bits_OV, Tensor(9, ms.int32)), Tensor(0x7FFFFF, ms.int32))
        u_OV = (upper_OV.astype(ms.float32) + 0.5) * 2.0**-23
        return -ops.log(-ops.log(u_OV))
