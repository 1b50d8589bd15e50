"""Four-bit weights on a device: from the words of a checkpoint to the layout of `kernels.weights`.

A word of 32 bits is four bytes of two codes each, lowest first. Shape letters: N rows (out), K columns (in), W words,
G groups of the device's layout, X channels of a group.
Sources of the stored layouts: docstring of `models.quant`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.errors import InputError
from ....models.holding import GROUPS, device_group
from ....models.quant import AWQ_ORDER, StoredInt4
from ..kernels.quant import GROUP
from ..kernels.weights import Int4Weight, int4_words, words_of

_ZERO = 8


class Codes(NamedTuple):
    """Unpacked: (code - zero point) * scale by group of the stored layout."""

    codes_NK: Tensor  # uint8
    scales_GN: Tensor  # float32
    zeros_GN: Tensor  # uint8


def int4_weight(name: str, stored: StoredInt4, device: torch.device) -> Int4Weight:
    """The same numbers; InputError for groups that no layout of the device holds."""
    codes = _unpacked(stored, device)
    order_K = _order(name, stored)
    first, columns = stored.first_column, stored.shape[1]
    group = device_group(name, stored.group_size, first, columns)
    codes_NK = codes.codes_NK if order_K is None else codes.codes_NK[:, order_K.to(device)]
    place_G = (first + torch.arange(0, columns, group, device=device)) // stored.group_size
    weight = _packed(codes_NK, words_of(codes.scales_GN[place_G], codes.zeros_GN[place_G]), group)
    if order_K is None:
        return weight
    channels = GROUP * len(weight.codes)
    return weight._replace(order=torch.cat([order_K, torch.arange(columns, channels)]).int().to(device))


def _unpacked(stored: StoredInt4, device: torch.device) -> Codes:
    parts = {
        part: torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)
        for part, array in stored.parts.items()
    }
    if stored.layout == "gptq":
        codes_NK = _nibbles(parts["qweight"].t())
        zeros_GN = (_nibbles(parts["qzeros"]) + int(stored.zeros_minus_one)) & 15
        scales_GN = parts["scales"]
    elif stored.layout == "awq":
        codes_NK = _in_awq_order(_nibbles(parts["qweight"])).t()
        zeros_GN, scales_GN = _in_awq_order(_nibbles(parts["qzeros"])), parts["scales"]
    else:
        codes_NK, scales_GN = _nibbles(parts["weight_packed"]), parts["weight_scale"].t()
        packed = parts.get("weight_zero_point")
        zeros_GN = torch.full_like(scales_GN, _ZERO, dtype=torch.uint8) if packed is None else _nibbles(packed.t())
    row, column = stored.skip
    rows, columns = stored.shape
    here = slice(row, row + rows)
    return Codes(codes_NK[here, column : column + columns], scales_GN[:, here], zeros_GN[:, here])


def _nibbles(words: Tensor) -> Tensor:
    """uint8 [..., 8 W] of int32 [..., W]."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


def _in_awq_order(nibbles: Tensor) -> Tensor:
    place = torch.tensor(AWQ_ORDER, device=nibbles.device).argsort()
    return nibbles.unflatten(-1, (-1, 8))[..., place].flatten(-2)


def _order(name: str, stored: StoredInt4) -> Tensor | None:
    """Where the channels of each group are, group by group, if act-order has scattered them; else None."""
    part = "g_idx" if "g_idx" in stored.parts else "weight_g_idx"
    if part not in stored.parts:
        return None
    column, columns = stored.skip[1], stored.shape[1]
    group_K = torch.from_numpy(stored.parts[part])[column : column + columns].long()
    natural_K = (stored.first_column + torch.arange(columns)) // stored.group_size
    if torch.equal(group_K, natural_K):
        return None
    order_K = group_K.argsort(stable=True)
    if not torch.equal(group_K[order_K], natural_K):  # a rank's part of all groups, or groups of other sizes
        raise InputError(
            f"groups of channels are scattered (act-order) and this rank has parts of them: {stored.shape[1]} channels",
            name,
            "set parallel.tp to 1, or ep to tp x dp, or use a checkpoint without act-order (desc_act: false)",
        )
    return order_K


def _packed(codes_NK: Tensor, words_GN: Tensor, group: int) -> Int4Weight:
    """Codes past K and words of groups past the last are zero."""
    columns = codes_NK.shape[1]
    codes_NK = F.pad(codes_NK, (0, -columns % GROUP))
    words_GN = F.pad(words_GN, (0, 0, 0, codes_NK.shape[1] // group - len(words_GN)))
    return Int4Weight(int4_words(codes_NK), words_GN.contiguous(), columns)


def quantise_groups(weight_NK: Tensor, group: int = GROUPS[0]) -> Int4Weight:
    """To the nearest of a symmetric group's codes, on the weight's device; a scale is the absmax / 7.5."""
    rows, columns = weight_NK.shape
    groups_NGX = F.pad(weight_NK.float(), (0, -columns % group)).view(rows, -1, group)
    amax_NG = groups_NGX.abs().amax(2)
    scales_NG = (amax_NG / 7.5).clamp(min=2.0**-126).masked_fill(amax_NG == 0, 1.0)
    words_NG = words_of(scales_NG, torch.full_like(scales_NG, _ZERO))
    codes_NGX = ((groups_NGX / scales_NG[:, :, None]).round() + _ZERO).clamp(0, 15).to(torch.uint8)
    return _packed(codes_NGX.flatten(1)[:, :columns], words_NG.t(), group)


def pad_int4(matrix: Int4Weight, rows: int, columns: int) -> Int4Weight:
    """Padded words are zero, and so is what codes are worth there."""
    blocks = -(-columns // GROUP)
    channels, more_rows = GROUP * blocks, rows - matrix.codes.shape[1]
    codes = F.pad(matrix.codes, (0, 0, 0, more_rows, 0, blocks - len(matrix.codes)))
    words = F.pad(matrix.scales, (0, more_rows, 0, channels // matrix.group - len(matrix.scales)))
    order = matrix.order
    if order is not None:
        order = torch.cat([order, torch.arange(len(order), channels, dtype=torch.int32, device=order.device)])
    return Int4Weight(codes.contiguous(), words.contiguous(), columns, order)
